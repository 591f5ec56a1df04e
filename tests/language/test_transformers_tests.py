"""transformers' own test classes for models, run on every mixer and on the classifier; see `tests/peers.py`.

What `generate` has to give back is in `test_generation.py`, since transformers' class for that is in no distribution.
"""

import copy
import importlib
import unittest
import unittest.mock

import torch
from transformers.models.auto import modeling_auto

from nearfar.language.modeling import MixerForCausalLM, MixerModel
from nearfar.language.tcnca import SequenceClassifier
from tests.language.test_modeling import LAYERS, SPECIAL
from tests.peers import package, package_of


class GenerationTesterMixin:
    """In the place of the class that no distribution has."""


THEIRS = package_of("transformers")
package(f"{THEIRS}.generation")
package(f"{THEIRS}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
package(f"{THEIRS}.exporters")
package(f"{THEIRS}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
ModelTesterMixin = importlib.import_module(f"{THEIRS}.test_modeling_common").ModelTesterMixin
TrainingTesterMixin = importlib.import_module(f"{THEIRS}.test_training_mixin").TrainingTesterMixin


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
