"""AttNet: a convolutional network whose token mixer is the attentive convolution.

Yu et al., "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency" (2025).
The diffusion transformer that takes the same operator is in `nearfar.vision.generation.sit.sit`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath
from nearfar.ops.convolution.atconv import ATConv, GatedConvMLP
from nearfar.ops.convolution.convnext import scale_output
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, Weights, register


class AttBlock(nn.Module):
    """x + DP(g1 * ATConv(LN(x))), then x + DP(g2 * GatedConvMLP(LN(x))); the gammas are optional."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        kernel_size: int = 3,
        *,
        mlp_depthwise: bool = True,
        mlp_norm: bool = False,
        norm_variance: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_1 = ChannelNorm(dim)
        self.token_mixer = ATConv(dim, kernel_size)
        self.norm_2 = ChannelNorm(dim)
        self.channel_mixer = GatedConvMLP(dim, hidden, mlp_depthwise, mlp_norm, norm_variance)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.token_mixer(self.norm_1(x))
        x = x + self.drop_path(y if self.gamma_1 is None else y * self.gamma_1[:, None, None])
        y = self.channel_mixer(self.norm_2(x))
        return x + self.drop_path(y if self.gamma_2 is None else y * self.gamma_2[:, None, None])

    @torch.no_grad()
    def fuse(self) -> Self:
        """Fold the gammas into the projections before them."""
        if self.gamma_1 is not None:
            scale_output(self.token_mixer.proj, self.gamma_1)
            scale_output(self.channel_mixer.fc2, self.gamma_2)
            self.gamma_1 = self.gamma_2 = None
        return self


class AttNet(Backbone):
    """Two strided stem convolutions, four stages of `AttBlock`, strided convolutions between, pooled classifier.

    Input (B, in_chans, H, W) with H, W >= 32; strided layers round other sizes up. The generated kernels summarize
    bands of rows, so that a network trained at one size sees others differently. The published multiply-accumulates
    count another order of operations: a kernel projected at every position, where here the nine pooled ones are.

    Args:
        depths, dims, kernel_sizes: blocks, channels and attentive kernel of each stage.
        expansions: e of each stage; the gated MLP has floor(2/3 floor(e C)) hidden channels.
        num_classes: classes; 0 for pooled features.
        mlp_depthwise, mlp_norm: the convolution and the RMS norm of the gated MLP. norm_variance: see `ChannelRMSNorm`.
        layer_scale: initial gammas; None for none.
        Others as in `ConvNeXt`.
    """

    CARD = Card(
        "AttNet",
        "2510.20092",
        "attentive convolution: a kernel per sample from a global summary",
        6.1e-7,
        small={
            "attnet_xxs": {"depths": (1, 1, 2, 1), "dims": (24, 32, 64, 96), "expansions": (4, 4, 4, 4)},
        },
    )

    RULES = (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"(stages\.\d+\.blocks\.\d+)\.layer_scale_([12])\.gamma$", r"\1.gamma_\2"),
        (r"norm\.", "head.norm."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )
    FIRST_CONV = "stem.0.0"

    def __init__(
        self,
        depths: Sequence[int] = (2, 3, 12, 3),
        dims: Sequence[int] = (48, 96, 224, 384),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        expansions: Sequence[float] = (8, 8, 4, 4),
        kernel_sizes: Sequence[int] = (3, 3, 3, 3),
        mlp_depthwise: bool = True,
        mlp_norm: bool = False,
        norm_variance: bool = False,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(expansions) == len(kernel_sizes):
            raise ValueError(f"depths {depths}, dims {dims}, expansions and kernel_sizes differ in length")
        self.stem = nn.Sequential(_halve(in_chans, dims[0] // 2), GELU(), _halve(dims[0] // 2, dims[0]))
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [
                AttBlock(
                    dims[i],
                    2 * int(dims[i] * expansions[i]) // 3,
                    kernel_sizes[i],
                    mlp_depthwise=mlp_depthwise,
                    mlp_norm=mlp_norm,
                    norm_variance=norm_variance,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for rate in rates
            ]
            self.stages.append(Stage(_halve(dims[i - 1], dims[i]) if i else nn.Identity(), blocks))
        norm = ChannelNorm(dims[-1], eps=1e-5)
        self.head = Head(dims[-1], num_classes, norm, global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))])
        self.apply(init_weights)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        first = "blocks.0"
        dims = [len(state[f"stages.{i}.{first}.norm_1.weight"]) for i in stages]
        hidden = [state[f"stages.{i}.{first}.channel_mixer.fc2.weight"].shape[1] for i in stages]
        taps = [len(state[f"stages.{i}.{first}.token_mixer.kernel_gen.weight"]) for i in stages]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.0.weight"].shape[1],
            "expansions": [_expansion(dim, width) for dim, width in zip(dims, hidden, strict=True)],
            "kernel_sizes": [round(n**0.5) for n in taps],
            "mlp_depthwise": f"stages.0.{first}.channel_mixer.dwconv.weight" in state,
            "mlp_norm": f"stages.0.{first}.channel_mixer.norm_layer.weight" in state,
            "layer_scale": 1e-6 if f"stages.0.{first}.gamma_1" in state else None,
        }


def _halve(dim_in: int, dim: int) -> nn.Sequential:
    return nn.Sequential(Conv2d(dim_in, dim, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(dim))


def _expansion(dim: int, hidden: int) -> float:
    """The roundest e with floor(2/3 floor(e dim)) = hidden."""
    widths = [width for width in range(hidden, 2 * hidden + 2) if 2 * width // 3 == hidden]
    return next((width // dim for width in widths if width % dim == 0), widths[0] / dim)


def _variant(
    depths: Sequence[int],
    dims: Sequence[int],
    norm: bool,
    scale: bool,
    params: float,
    gmacs: float | None,
    top1: float | None = None,
) -> Variant:
    settings = {"depths": depths, "dims": dims, "mlp_norm": norm, "layer_scale": 1e-6 if scale else None}
    return Variant(settings, params, gmacs, (Weights("in1k", top1),))


ATTNETS = {
    "attnet_xxs": _variant((2, 2, 4, 2), (32, 64, 128, 240), False, False, 2.85, 0.53),
    "attnet_xs": _variant((2, 2, 7, 2), (40, 80, 160, 320), False, True, 5.55, None),
    "attnet_s": _variant((2, 3, 10, 3), (40, 80, 160, 320), False, False, 7.68, None),
    "attnet_t1": _variant((2, 3, 12, 3), (48, 96, 224, 384), True, True, 13.71, 2.42),
    "attnet_t2": _variant((3, 3, 16, 3), (64, 128, 288, 512), True, True, 27.01, 5.09, 84.4),
    "attnet_t3": _variant((4, 4, 26, 4), (72, 144, 320, 576), True, True, 49.18, None),
    "attnet_t4": _variant((5, 5, 28, 5), (96, 192, 384, 768), True, True, 87.32, None),
}

register(AttNet, ATTNETS)
