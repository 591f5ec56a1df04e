"""Gaussian masks on ViT, PiT and timm's models; the TiC-like pyramid; ConvShareViT and its conversions."""

import copy
import math
from typing import Any, ClassVar

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from nearfar.core.errors import UserError
from nearfar.ops.attention.gaussian_mask import GaussianMixtureMask
from nearfar.ops.attention.window import MSAConv
from nearfar.ops.convolution.shared import SharedConv
from nearfar.vision.contracts import gaussian_mixture_mask as gmm
from nearfar.vision.contracts import tic
from nearfar.vision.models.convsharevit import ConvShareViT, in_light, optical_passes, to_electronic, to_optical
from nearfar.vision.models.gaussian_mask import GMMPiT, GMMViT, add_gaussian_mask
from nearfar.vision.models.gaussian_mask_hosts import (
    GMMT2T,
    GMMSwin,
    TalkingClassAttention,
    TalkingMaskAttention,
    TokensToToken,
)
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


@torch.no_grad()
def test_gmm_swin_is_timms_swin_but_for_masks_and_positions() -> None:
    ours = randomize(GMMSwin((16, 32, 64), (2, 2, 1), (1, 2, 4)))
    theirs = SwinTransformer(
        32, 2, num_classes=10, embed_dim=16, depths=(2, 2, 1), num_heads=(1, 2, 4), window_size=4, mlp_ratio=2
    ).eval()
    ours.stem.positions.grid.zero_()
    for mask in (m for m in ours.modules() if isinstance(m, GaussianMixtureMask)):
        mask.sigma.fill_(1e4)
        mask.alpha.fill_(0.2)
    names = {"layers.": "stages.", "patch_embed.": "stem.", "relative_position_bias_table": "bias_table"}
    names |= {"attn.proj": "attn.out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    state, found = ours.state_dict(), {}
    for name, value in theirs.state_dict().items():
        mine = "head." + name if name.startswith("norm.") else name
        for a, b in names.items():
            mine = mine.replace(a, b)
        tensor = state[mine].flatten(1) if "downsample.reduction" in name else state[mine]
        if "downsample" in name:  # they merge by columns, then rows, then channels
            tensor = tensor.unflatten(-1, (-1, 2, 2)).movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)
        found[name] = tensor.reshape(value.shape)
    theirs.load_state_dict(found)
    x = torch.randn(2, 3, 32, 32)
    close(ours(x), theirs(x), 1e-5)
    tall = torch.randn(1, 3, 40, 36)  # windows and merging fill up with zeros
    assert ours(tall).shape == (1, 10)


def test_talking_heads_are_their_sums() -> None:
    attention = TalkingMaskAttention(12, 3, 5).double()
    x, grid = torch.randn(2, 6, 12, dtype=torch.float64), (2, 3)
    q, k, v = attention.qkv(x).unflatten(2, (3, 3, 5)).unbind(2)  # (B, N, heads, d)
    mask = attention.mask.mask(grid)
    slow = torch.zeros(2, 6, 3, 5, dtype=torch.float64)
    for i in range(6):
        logits = torch.stack([mask[h, i] * (k[:, :, h] @ q[:, i, h, :, None])[..., 0] / 5**0.5 for h in range(3)], 1)
        mixed = torch.stack([sum(attention.before[h, g] * logits[:, h] for h in range(3)) for g in range(3)], 1)
        weights = mixed.softmax(-1)
        for g in range(3):
            weight = sum(attention.after[h, g] * weights[:, h] for h in range(3))
            slow[:, i, g] = (weight[..., None] * v[:, :, g]).sum(1)
    torch.testing.assert_close(attention(x, grid), attention.proj(slow.flatten(2)))
    reader = TalkingClassAttention(12, 3, 5).double()
    reader.load_state_dict(
        {
            n.replace("qkv", "q"): t[:15] if "qkv" in n else t
            for n, t in attention.state_dict().items()
            if "mask" not in n
        }
        | {"kv.weight": attention.qkv.weight[15:]}
    )
    attention.mask.sigma.data.fill_(1e9)
    attention.mask.alpha.data.fill_(0.2)  # a mask of ones: the first of a line of tokens reads all of them
    torch.testing.assert_close(reader(x[:, :1], x[:, 1:]), attention(x, (1, 6))[:, :1])


@torch.no_grad()
def test_tokens_to_token_reads_neighbourhoods() -> None:
    stem = TokensToToken(3, 8, 4, 2, kernels=5, clipped=False, qkv_bias=False).double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    windows = [padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten(1) for i in range(8) for j in range(8)]
    y = stem.norm1(torch.stack(windows, 1))
    q, k, v = (y @ part.T for part in stem.qkv.weight.chunk(3))
    y = v + stem.out((stem.mask.mask((8, 8))[0] * (q @ k.mT) / 2).softmax(-1) @ v)
    y = nn.functional.pad((y + stem.mlp(stem.norm2(y))).mT.unflatten(2, (8, 8)), (1, 1, 1, 1))
    windows = [y[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten(1) for i in range(4) for j in range(4)]
    tokens, grid = stem(x)
    assert grid == (4, 4)
    torch.testing.assert_close(tokens, stem.proj(stem.norm3(torch.stack(windows, 1))))
    adapted = GMMT2T.from_published(GMMT2T(16, 1, 2, hidden=4).state_dict(), in_chans=1)
    assert adapted(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="must be even"):
        GMMT2T(patch_size=3)


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
