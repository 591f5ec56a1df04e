"""transformers' own test classes for models, run on every mixer and on the classifier.

Its wheel leaves the tests out, its source distribution brings `tests/test_*.py`: `.ci/transformers-tests FOLDER` gets
that of the installed version, and NEARFAR_TRANSFORMERS names the folder. Without it these tests skip. What `generate`
has to give back is in `test_generation.py`, since transformers' class for that is in no distribution.
"""

import copy
import importlib
import os
import sys
import unittest
import unittest.mock
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.models.auto import modeling_auto

from nearfar.language.modeling import MixerForCausalLM, MixerModel
from nearfar.language.tcnca import SequenceClassifier
from tests.language.test_modeling import LAYERS, SPECIAL

SOURCE = os.environ.get("NEARFAR_TRANSFORMERS")
if not SOURCE:
    pytest.skip("needs transformers' tests: see .ci/transformers-tests", allow_module_level=True)


def module(name: str, folder: Path | None = None, **content: type) -> ModuleType:
    """A package among the loaded ones, with `content` and the modules in `folder`."""
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = [] if folder is None else [str(folder)]
    made.__dict__.update(content)
    return made


class GenerationTesterMixin:
    """In the place of the class that no distribution has."""


PACKAGE = "transformers_tests"
module(PACKAGE, Path(SOURCE) / "tests")
module(f"{PACKAGE}.generation")
module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
module(f"{PACKAGE}.exporters")
module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
ModelTesterMixin = importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
TrainingTesterMixin = importlib.import_module(f"{PACKAGE}.test_training_mixin").TrainingTesterMixin


class Inputs:
    """The small model and batch that transformers' tests ask for."""

    batch_size, seq_length, num_hidden_layers, hidden_size, vocab_size, is_training = 3, 7, 2, 16, 40, True
    causal_lm_class = MixerForCausalLM

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NAMES = {
    "MODEL_MAPPING_NAMES": MixerModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": MixerForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": SequenceClassifier,
}


class Suite(ModelTesterMixin):
    has_attentions = False
    model_tester = None
    training_overfit_learning_rate = 1e-2  # of 16 channels; the default is for 32 and more

    def setUp(self):
        """transformers' tests find out by these tables of names what a class's outputs and labels are."""
        self.model_tester = Inputs(self.config_class(**self.settings))
        for table, model in NAMES.items():
            known = {model.config_class.model_type: model.__name__}
            change = unittest.mock.patch.dict(getattr(modeling_auto, table), known)
            change.start()
            self.addCleanup(change.stop)


def settings(kind):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return sizes | {"mixers": LAYERS[kind]} | SPECIAL.get(kind, {})


def suite(name, *testers, models, **attributes):
    """A test class of `unittest`, as transformers' own are, and among this module's names, where pytest collects it."""
    attributes |= {"__module__": __name__, "all_model_classes": models, "config_class": models[-1].config_class}
    globals()[name] = type(name, (Suite, *testers, unittest.TestCase), attributes)


for kind in LAYERS:
    suite(
        "Test" + kind.title().replace(" ", "").replace("-", ""),
        GenerationTesterMixin,
        TrainingTesterMixin,
        models=(MixerModel, MixerForCausalLM),
        settings=settings(kind),
    )
suite(
    "TestSequenceClassifier",
    models=(SequenceClassifier,),
    settings=settings("mega"),
    test_mismatched_shapes=False,  # needs AutoModel, which has no name for a classifier's layers alone
)
