"""timm's own tests of models, run on the smallest variant of every backbone; see `tests/peers.py`."""

import importlib
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import jaxtyping
import pytest
import timm

from nearfar.vision.models.registry import MODELS, VARIANTS
from nearfar.vision.models.sparsifiner import Sparsifiner
from nearfar.vision.models.tokens import TokenModel
from tests.peers import package_of

NAMES = (
    "cfg_device",
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
)
SMALLEST = {MODELS[name]: name for name in sorted(MODELS, key=lambda name: VARIANTS[name].params, reverse=True)}
del SMALLEST[Sparsifiner]  # what predicts its mask has no gradient, and is left over when no block follows


def list_models(
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """timm's function, by which its tests choose, for ours: what it tells apart by names, its vision transformers from
    networks with maps, is told by class."""
    if pretrained:
        return []  # nothing is fetched
    tokens = {"vit_*" in filter: True, "vit_*" in exclude_filters: False}.get(True)
    return [
        tag
        for kind, name in SMALLEST.items()
        if tokens is None or issubclass(kind, TokenModel) == tokens
        for tag in (timm_list(f"{name}*", include_tags=True) if include_tags else [name])
        if tag.split(".")[0] == name
    ]


timm_list: Any = timm.list_models
with patch("timm.list_models", list_models):
    theirs = importlib.import_module(f"{package_of('timm')}.test_models")
globals().update({name: getattr(theirs, name) for name in NAMES})


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-time checks of shapes know no values that are traced."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
