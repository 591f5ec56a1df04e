"""AFFNet: a mobile network whose deep stages mix tokens by a filter in the Fourier domain that the input makes.

Huang et al., "Adaptive Frequency Filters As Efficient Global Token Mixers" (ICCV 2023), on MobileViT's skeleton.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import make_divisible
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio, rename
from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.spectral.adaptive import AdaptiveFrequencyFilter
from nearfar.vision.models.pyramid import Backbone, Head, Stage
from nearfar.vision.models.registry import Variant, Weights, register

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}
BLOCK_NORMS = ("group", "pixel")


class PixelNorm(nn.Module):
    """w_c (x_c - mean_c x) / (std_c x + eps) + b_c over the channels of (B, C, H, W), the deviation biased.

    What the framework of the released code calls layer_norm; the released models have a group norm in its place.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=1, keepdim=True, correction=0)
        return torch.addcmul(self.bias[:, None, None], (x - mean) / (std + self.eps), self.weight[:, None, None])


def block_norm(kind: str, dim: int) -> nn.Module:
    """The norm of a block: over channels and positions together ("group"), or over channels ("pixel")."""
    return nn.GroupNorm(1, dim, eps=1e-5) if kind == "group" else PixelNorm(dim)


class MBConv(nn.Module):
    """red(dw(exp(x))), + x where the shape stays: 1x1 to `hidden`, depthwise 3x3, 1x1; each with batch norm.

    An activation follows the first two. Where `hidden` is the input's width the first is left out.
    """

    def __init__(
        self, dim: int, out: int, hidden: int, activation: Callable[[], nn.Module], stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        unit = partial(ConvNormAct, activation=activation)
        self.exp_1x1 = nn.Identity() if hidden == dim else unit(dim, hidden)
        self.conv_3x3 = unit(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        self.red_1x1 = unit(hidden, out, activation=None)
        self.adds = stride == 1 and dim == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.red_1x1(self.conv_3x3(self.exp_1x1(x)))
        return x + y if self.adds else y


class FilterBlock(nn.Module):
    """x + AFF(N2(MBConv(N1(x)))): channels are mixed first, then positions, inside one residual.

    With `num_blocks` 0 there is no filter, and the depthwise convolution alone mixes positions.
    """

    def __init__(
        self, dim: int, hidden: int, num_blocks: int, activation: Callable[[], nn.Module], norm: str, dilation: int
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = block_norm(norm, dim), block_norm(norm, dim)
        self.mlp = MBConv(dim, dim, hidden, activation, dilation=dilation)
        self.filter: nn.Module = nn.Identity()
        if num_blocks:
            self.filter = AdaptiveFrequencyFilter(dim, num_blocks, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.filter(self.norm2(self.mlp(self.norm1(x))))


class AFFBlock(nn.Module):
    """act(BN(W [x; BN(P N(B_n(...B_1(x))))])) with `FilterBlock`s B, a norm N and 1x1 convolutions P and W."""

    def __init__(
        self,
        dim: int,
        depth: int,
        hidden: int,
        num_blocks: int = 8,
        activation: Callable[[], nn.Module] = nn.SiLU,
        norm: str = "group",
        dilation: int = 1,
    ) -> None:
        super().__init__()
        blocks = [FilterBlock(dim, hidden, num_blocks, activation, norm, dilation) for _ in range(depth)]
        self.global_rep = nn.Sequential(*blocks, block_norm(norm, dim))
        self.conv_proj = ConvNormAct(dim, dim, activation=None)
        self.fusion = ConvNormAct(2 * dim, dim, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(torch.cat((x, self.conv_proj(self.global_rep(x))), dim=1))


_SMALL = {"dims": (16, 24, 32, 48, 64), "aff_blocks": (1, 1, 1)}


class AFFNet(Backbone):
    """A strided convolution, MBConvs at strides 2 and 4, an MBConv and an `AFFBlock` at 8, 16, 32; classifier.

    Input (B, in_chans, H, W) with H, W >= 32, other sizes than multiples of 32 are rounded up in every halving.

    Args:
        dims: channels of the five stages.
        expand_ratio: of the MBConvs between stages; widths are rounded to multiples of 8.
        mv2_blocks: MBConvs of the first two stages.
        aff_blocks: filter blocks of the last three.
        ffn_ratio: of the MBConvs inside filter blocks.
        num_blocks: blocks of the filter's MLP; 0 for a network without filters, to compare with.
        stem_width, last_dim: channels of the stem and of the classifier; None for min(4 dims[-1], 960).
        activation: "silu", as released, or "relu", everywhere, the filter's MLP included.
        norm: "group", as released, or "pixel", the norm in the blocks.
        output_stride: 32, or 16 or 8: later strides become dilations of the depthwise convolutions.
        num_classes, in_chans, drop_rate, global_pool: as in `ConvNeXt`.

    Raises:
        ValueError: an unknown activation, norm or output_stride, other than five dims.
    """

    CARD = Card(
        title="AFFNet",
        paper="2307.14008",
        what="a filter on the spectrum that the spectrum itself makes, in the three deep stages",
        error=3.3e-07,
        weights="the released code's (a file of your own)",
        small={"affnet_et": _SMALL},
        plain={"affnet_et": ("affnet_et", {**_SMALL, "num_blocks": 0})},
    )

    RULES = (
        (r"conv_1\.", "stem.0."),
        (r"layer_1\.(\d+)\.", r"stages.0.blocks.\1."),
        (r"layer_(\d)\.0\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"layer_(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
        (r"conv_1x1_exp\.", "head.norm."),
        (r"classifier\.fc\.", "head.fc."),
    )
    FIRST_CONV = "stem.0.conv"

    def __init__(
        self,
        dims: Sequence[int] = (32, 64, 128, 256, 320),
        expand_ratio: float = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        mv2_blocks: Sequence[int] = (1, 3),
        aff_blocks: Sequence[int] = (2, 4, 3),
        ffn_ratio: float = 2,
        num_blocks: int = 8,
        stem_width: int = 16,
        last_dim: int | None = None,
        activation: str = "silu",
        norm: str = "group",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if len(dims) != 5 or len(mv2_blocks) != 2 or len(aff_blocks) != 3:
            raise ValueError(
                f"dims {dims}, mv2_blocks {mv2_blocks} and aff_blocks {aff_blocks} must be five, two and three"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}")
        if norm not in BLOCK_NORMS:
            raise ValueError(f"norm is {norm!r}; allowed are {', '.join(BLOCK_NORMS)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; allowed are 8, 16 and 32")
        act = ACTIVATIONS[activation]

        def step(dim: int, out: int, stride: int = 1, dilation: int = 1) -> MBConv:
            hidden = make_divisible(dim * expand_ratio, 8)
            return MBConv(dim, out, hidden, act, stride, dilation)

        self.stem = nn.Sequential(ConvNormAct(in_chans, stem_width, 3, stride=2, activation=act))
        first = [step(width, dims[0]) for width in [stem_width, *[dims[0]] * (mv2_blocks[0] - 1)]]
        second = [step(dims[1], dims[1]) for _ in range(mv2_blocks[1] - 1)]
        stages = [Stage(nn.Identity(), first), Stage(step(dims[0], dims[1], 2), second)]
        strides, dilation = [2, 4], 1
        for before, dim, depth in zip(dims[1:], dims[2:], aff_blocks, strict=False):
            stride = 2 if strides[-1] < output_stride else 1
            down = step(before, dim, stride, dilation)
            dilation *= 1 if stride == 2 else 2
            hidden = make_divisible(dim * ffn_ratio, 8)
            stages.append(Stage(down, [AFFBlock(dim, depth, hidden, num_blocks, act, norm, dilation)]))
            strides.append(strides[-1] * stride)
        self.stages = nn.ModuleList(stages)
        last = last_dim or min(4 * dims[-1], 960)
        expand = ConvNormAct(dims[-1], last, activation=act)
        self.head = Head(last, num_classes, expand, norm_first=True, global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, dims, strides)
        self.head_hidden_size = last
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @classmethod
    def levels(cls, settings: Mapping[str, Any]) -> int:
        return 5

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(rename(state, cls.RULES), [(r"\.block\.", ".")], anywhere=True)

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return settings.get("output_stride", 32)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        widths = [len(state[f"stages.{i}.downsample.red_1x1.conv.weight"]) for i in range(1, 5)]
        hidden = len(state["stages.1.downsample.conv_3x3.conv.weight"])
        first = len(state["stages.0.blocks.0.red_1x1.conv.weight"])
        inner = len(state["stages.2.blocks.0.global_rep.0.mlp.conv_3x3.conv.weight"])
        last = len(state["head.norm.conv.weight"])
        filter = "stages.2.blocks.0.global_rep.0.filter.w1"
        return {
            "dims": [first, *widths],
            "expand_ratio": ratio(hidden, first),
            "mv2_blocks": [
                count(state, r"stages\.0\.blocks\.(\d+)\."),
                count(state, r"stages\.1\.blocks\.(\d+)\.") + 1,
            ],
            "aff_blocks": [count(state, rf"stages\.{i}\.blocks\.0\.global_rep\.(\d+)\.") - 1 for i in (2, 3, 4)],
            "ffn_ratio": ratio(inner, widths[1]),
            "num_blocks": state[filter].shape[1] if filter in state else 0,
            "stem_width": len(state["stem.0.conv.weight"]),
            "last_dim": None if last == min(4 * widths[-1], 960) else last,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.conv.weight"].shape[1],
        }


def _variant(dims: Sequence[int], expand_ratio: int, params: float, gmacs: float, top1: float) -> Variant:
    # pictures in [0, 1] without mean and deviation, as is the custom of the framework that the code is built on
    weights = Weights("in1k", top1, size=256, crop_pct=256 / 288, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Variant({"dims": tuple(dims), "expand_ratio": expand_ratio}, params, gmacs, (weights,))


AFFNETS = {
    "affnet_et": _variant((32, 48, 64, 104, 144), 2, 1.4, 0.4, 73.0),
    "affnet_t": _variant((32, 48, 96, 160, 192), 4, 2.6, 0.8, 77.0),
    "affnet": _variant((32, 64, 128, 256, 320), 4, 5.5, 1.5, 79.8),
}

register(AFFNet, AFFNETS)
