"""Gaussian masks on ViT, PiT and timm's models; the TiC-like pyramid; ConvShareViT and its conversions."""

import copy
import math
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import nn

from nearfar.core.errors import UserError
from nearfar.ops.attention.gaussian_mask import GaussianMixtureMask
from nearfar.ops.attention.window import MSAConv
from nearfar.ops.convolution.shared import SharedConv
from nearfar.vision.contracts import gaussian_mixture_mask as gmm
from nearfar.vision.contracts import tic
from nearfar.vision.models.convsharevit import ConvShareViT, in_light, optical_passes, to_electronic, to_optical
from nearfar.vision.models.gaussian_mask import GMMPiT, GMMViT, add_gaussian_mask
from nearfar.vision.models.tic import TiCBlock, TiCLike
from tests.vision.base import BackboneTester, TokenTester, close, described, randomize, shapes_of


class TestGMMViT(TokenTester):
    model, name = GMMViT, "gmm_vit_32"
    tiny = {"dim": 24, "depth": 4, "num_heads": 2, "img_size": 64, "patch_size": 16}
    least = {"depth": 1}
    prefix_of_levels = 0
    fuses = False
    autocast_tolerance = 0.1
    macs_tolerance = 0.01

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 24, "img_size": 64, "patch_size": 16}

    def test_head(self) -> None:
        """The pooled vector passes a norm, so plain pooling of the features is not the head's input."""
        model, x = self.create(), self.input()
        features = model.forward_features(x)
        close(model.forward_head(features), model(x), 1e-6)
        hidden = model.forward_head(features, pre_logits=True)
        close(hidden, model.head.norm(features.mean(1)), 1e-6)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        close(model(x), hidden, 1e-6)


class TestTiCLike(BackboneTester):
    model, name = TiCLike, "tic_like_tiny"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "num_heads": (1, 1, 1, 2)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "num_heads": (1, 1)}
    fuses = False


@torch.no_grad()
def test_pit() -> None:
    settings = {"dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "head_dim": 8, "img_size": 16, "patch_size": 2}
    model = randomize(timm.create_model("gmm_pit_32", **settings))
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape == (2, 10)
    assert model(torch.randn(1, 3, 20, 12)).shape == (1, 10)
    close(GMMPiT.from_published(model.state_dict())(x), model(x), 1e-6)
    features = timm.create_model("gmm_pit_32", features_only=True, **settings)(x)
    assert [tuple(f.shape[1:]) for f in features] == [(8, 8, 8), (16, 4, 4)]
    program = torch.export.export(model, (x,))
    close(program.module()(x), model(x), 1e-5)
    with torch.device("meta"):
        for name, want in (("gmm_pit_32", 6973186), ("gmm_pit_64", 7049792)):
            assert sum(p.numel() for p in timm.create_model(name).parameters()) == want
    with pytest.raises(ValueError, match="twice"):
        GMMPiT((8, 24), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="differ in length"):
        GMMPiT((8, 16), (1,), (1, 1))


@torch.no_grad()
def test_masks_closed_and_clipped_agree_on_small_grids() -> None:
    closed = randomize(GMMViT(24, 2, 2, head_dim=8))
    clipped = GMMViT(24, 2, 2, head_dim=8, clipped=True).eval()
    clipped.load_state_dict(closed.state_dict())
    x = torch.randn(1, 3, 32, 32)
    close(clipped(x), closed(x), 1e-5)


HOSTS = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (3, 6)},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "pit_ti_224": {"img_size": 64, "depth": (1, 1, 1)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_mask_on_timms_models(name: str) -> None:
    """A mask of ones leaves the model as it is; another changes it; all other tensors keep their names."""
    torch.manual_seed(0)
    plain = randomize(timm.create_model(name, num_classes=5, **HOSTS[name]))  # CaiT's branches start near zero
    masked = add_gaussian_mask(copy.deepcopy(plain)).eval()
    kept = {n: v for n, v in masked.state_dict().items() if ".gaussian." not in n}
    assert kept.keys() == plain.state_dict().keys()
    masks = [m for m in masked.modules() if isinstance(m, GaussianMixtureMask)]
    for mask in masks:
        mask.sigma.fill_(1e4)
        mask.alpha.fill_(0.2)
    x = torch.randn(2, 3, 64, 64)
    close(masked(x), plain(x), 1e-4)
    for mask in masks:
        mask.sigma.fill_(1.0)
    assert (masked(x) - plain(x)).norm() > 1e-4 * plain(x).norm()


def test_mask_needs_an_attention_it_knows() -> None:
    with pytest.raises(ValueError, match="goes on timm's ViT"):
        add_gaussian_mask(nn.Linear(3, 3))


@torch.no_grad()
def test_mask_learns_on_timms_vit() -> None:
    model = add_gaussian_mask(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2))
    with torch.enable_grad():
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gradient = model.blocks[0].attn.gaussian.alpha.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_contracts_that_are_not_shipped() -> None:
    op = randomize(MSAConv(8, 6, (3, 5), num_heads=2, border="mask", padding=(1, 2)))
    x = torch.randn(1, 8, 6, 7)
    settings = {"kernel_size": [3, 5], "heads": 2, "output_conv_padding": [1, 2], "padding_keys": "masked"}
    close(tic.build_contract(described(shapes_of(op), settings, [tuple(x.shape)]))(x), op(x), 1e-6)
    with pytest.raises(UserError, match="kernel_size"):
        tic.build_contract(described(shapes_of(op), {"kernel_size": 3}))
    with pytest.raises(UserError, match="vit and pit are built"):
        gmm.build_contract(described({"head.weight": (3, 4)}, {"model": "swin"}))


@torch.no_grad()
def test_tic_block_shifts_channels_and_back() -> None:
    block = TiCBlock(8, 2, shift=2)
    x = torch.randn(1, 8, 6, 5)
    torch.testing.assert_close(block.rolled(block.rolled(x, 2), -2), x)
    block.mixer = nn.Identity()
    plain = TiCBlock(8, 2)
    plain.mixer = nn.Identity()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), plain(x))


# ConvShareViT


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 48}),
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 48}),
        ("dhvt_tiny_cifar_patch4", {"dim": 48}),
    ],
)
def test_there_and_back(name: str, settings: dict[str, int]) -> None:
    """ViT -> convolutions -> ViT: the same logits, the same numbers, the same weights at the end."""
    vit = timm.create_model(name, img_size=32, depth=2, num_classes=4, **settings).eval()
    x = torch.randn(2, 3, 32, 32)
    optical = to_optical(vit)
    assert any(isinstance(m, SharedConv) for m in optical.modules())
    close(optical(x), vit(x), 1e-5)
    back = to_electronic(optical)
    close(back(x), vit(x), 1e-5)
    for (name_, a), (_, b) in zip(back.state_dict().items(), vit.state_dict().items(), strict=True):
        assert torch.equal(a, b), name_
    light = in_light(optical)
    close(light(x), vit(x), 1e-4)
    passes = optical_passes(optical, x)
    assert passes.keys() == optical_passes(light, x).keys()
    first = next(name for name in passes if "blocks.0" in name)
    conv = optical.get_submodule(first)
    # every token of the two pictures, every kernel, two signs of either
    assert passes[first] % (2 * conv.kernels * 2) == 0


@torch.no_grad()
def test_light_with_few_levels_is_near() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4, embed_dim=48).eval()
    x = torch.randn(1, 3, 32, 32)
    error = lambda bits: float((in_light(to_optical(vit), bits=bits)(x) - vit(x)).norm() / vit(x).norm())  # noqa: E731
    assert error(14) < error(6) < 1


@torch.no_grad()
def test_convsharevit() -> None:
    model = randomize(timm.create_model("convsharevit_cifar", dim=36, depth=2, num_heads=2, num_classes=5))
    x = torch.randn(2, 3, 32, 32)
    close(to_electronic(model)(x), model(x), 1e-5)
    close(ConvShareViT.from_published(model.state_dict(), num_heads=2)(x), model(x), 1e-6)
    close(torch.export.export(model, (x,)).module()(x), model(x), 1e-5)
    assert model(torch.randn(1, 3, 16, 24)).shape == (1, 5)
    with torch.device("meta"):
        whole = timm.create_model("convsharevit_cifar")
    linear = 12 * 256**2 + 9 * 256 + 4 * 256  # maps with biases, two norms
    rest = 48 * 256 + 256 + 64 * 256 + 2 * 256 + 257 * 100 - 0
    assert sum(p.numel() for p in whole.parameters()) == 6 * linear + rest


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "same", "kernel_size": 3},
        {"kernel_size": 5},
        {"padding": "same", "kernel_size": 3, "shared": False},
        {"parts": ("qkv",)},
        {"parts": ("proj", "mlp")},
    ],
)
def test_convsharevit_of_other_kinds(settings: dict[str, Any]) -> None:
    model = ConvShareViT(36, 1, 2, 5, img_size=16, **settings).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    if not settings.get("shared", True):
        with pytest.raises(ValueError, match="shared=True"):
            model(torch.randn(1, 3, 16, 20))


def test_convsharevit_same_padding_is_local() -> None:
    """With kernels that keep the size a feature of q depends on its neighbours in the picture alone."""
    q = ConvShareViT(36, 1, 2, 5, padding="same", kernel_size=3).blocks[0].q
    matrix = q.matrix().detach()
    rows, columns = torch.arange(36) // 6, torch.arange(36) % 6
    far = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) > 1
    assert (matrix[far] == 0).all()
    assert math.isclose(sum(p.numel() for p in q.parameters()), 10)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="allowed are qkv, proj, mlp"):
        ConvShareViT(parts=("head",))
    with pytest.raises(ValueError, match="do not divide"):
        ConvShareViT(36, 1, 2, kernel_size=2)
    with pytest.raises(ValueError, match="no layer to convert"):
        to_optical(nn.ReLU())
    with pytest.raises(ValueError, match="differ in length"):
        TiCLike((1, 1), (8,), (1, 1))
