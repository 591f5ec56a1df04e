"""Every registered system has a tester; those with other checks in their own test files have theirs here, for CI."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from nearfar.vision.models.convsharevit import ConvShareViT
from nearfar.vision.models.evit import EViT
from nearfar.vision.models.gaussian_mask import GMMPiT
from nearfar.vision.models.gaussian_mask_hosts import GMMT2T, GMMCaiT, GMMSwin
from nearfar.vision.models.ninformer import NiNformer
from nearfar.vision.models.registry import MODELS
from nearfar.vision.models.sparsifiner import Sparsifiner
from nearfar.vision.models.vim import Vim

from .base import BackboneTester, PictureTester, TokenTester, close


def test_every_system_has_a_tester() -> None:
    for file in Path(__file__).parent.rglob("test_*.py"):
        if "Tester)" in file.read_text(encoding="utf-8"):
            importlib.import_module(".".join(file.relative_to(Path(__file__).parents[2]).with_suffix("").parts))
    found, left = [], [PictureTester]
    while left:
        found += (kinds := left.pop().__subclasses__())
        left += kinds
    assert set(MODELS.values()) <= {kind.model for kind in found if hasattr(kind, "model")}


@pytest.mark.ci
class TestEViT(TokenTester):
    model, name = EViT, "evit_deit_tiny"
    tiny = {"dim": 48, "depth": 4, "num_heads": 2, "img_size": 64, "reduce_at": (1, 2)}
    least = {"depth": 2, "reduce_at": (1,)}
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 48, "num_heads": 2, "img_size": 64}

    def test_intermediates(self) -> None:
        """The number of tokens falls; maps are whole (see the system's own tests)."""
        model, x = self.create(), self.input(size=(64, 96))
        final, maps = model.forward_intermediates(x)
        close(model.forward_head(final), model(x), 1e-6)
        assert all(tuple(found.shape) == (2, 48, 4, 6) for found in maps)


@pytest.mark.ci
class TestSparsifiner(TokenTester):
    model, name = Sparsifiner, "sparsifiner_deit_small"
    tiny = {"dim": 48, "depth": 4, "num_heads": 2, "img_size": 64}
    least = {"depth": 1}
    sizes = ((64, 64),)
    fixed, fuses = True, False
    test_published_macs_of_every_variant = None  # none are published; how many tokens go depends on the values
    test_shapes_and_gradients_of_every_variant = None  # which meta tensors have none of

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 48, "num_heads": 2, "img_size": 64}

    def untouched(self, name: str) -> bool:
        return "predictor" in name  # the mask passes no gradient


@pytest.mark.ci
class TestVim(TokenTester):
    model, name = Vim, "vim_tiny"
    tiny = {"dim": 16, "depth": 4, "img_size": 64, "d_state": 4}
    least = {"depth": 1}
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 16, "img_size": 64, "d_state": 4}


@pytest.mark.ci
class TestConvShareViT(TokenTester):
    model, name = ConvShareViT, "convsharevit_cifar"
    tiny = {"dim": 16, "depth": 4, "num_heads": 2, "img_size": 64, "patch_size": 16}
    prefix_of_levels = 0
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 16, "num_heads": 2, "img_size": 64, "patch_size": 16}

    test_variant_is_detected = None  # the one variant's stencil is no shape


@pytest.mark.ci
class TestGMMPiT(TokenTester):
    model, name = GMMPiT, "gmm_pit_32"
    tiny = {"dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": (1, 2, 2), "head_dim": 8, "img_size": 64} | {
        "patch_size": 4
    }
    fuses = False
    test_encoder_of_segmentation_models = None  # its decoder for tokens takes four levels


@pytest.mark.ci
class TestGMMCaiT(TokenTester):
    model, name = GMMCaiT, "gmm_cait_32"
    tiny = {"dim": 16, "depth": 4, "num_heads": 2, "head_dim": 12, "img_size": 64, "patch_size": 16, "mlp_ratio": 2}
    least = {"depth": 1}
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 16, "num_heads": 2, "img_size": 64, "patch_size": 16}


@pytest.mark.ci
class TestGMMT2T(TokenTester):
    model, name = GMMT2T, "gmm_t2t_32"
    tiny = {"dim": 16, "depth": 4, "num_heads": 2, "hidden": 8, "img_size": 64, "patch_size": 8}
    least = {"depth": 1}
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 16, "num_heads": 2, "hidden": 8, "img_size": 64, "patch_size": 8}


@pytest.mark.ci
class TestGMMSwin(BackboneTester):
    model, name = GMMSwin, "gmm_swin_32"
    tiny = {"dims": (8, 16, 32), "depths": (2, 2, 1), "num_heads": (1, 2, 2), "img_size": 64, "patch_size": 4}
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dims": (8, 8, 8, 16, 16), "depths": (1, 2, 1, 1, 1), "num_heads": (1, 1, 1, 2, 2), "img_size": 64}


@pytest.mark.ci
class TestNiNformer(TokenTester):
    model, name = NiNformer, "ninformer_cifar10"
    tiny = {"dim": 16, "depth": 4, "hidden": 24, "img_size": 64, "patch_size": 16}
    sizes = ((64, 64),)
    fixed, fuses = True, False
    prefix_of_levels = 0

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 16, "hidden": 24, "img_size": 64, "patch_size": 16}
