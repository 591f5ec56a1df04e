"""HorNet: a convolutional network whose token mixer is the recursive gated convolution.

Rao et al., "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions" (NeurIPS 2022). The
GF variants filter globally, through the Fourier transform, in the two deep stages.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.fused import FusedLinear
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath
from nearfar.ops.convolution.convnext import fold_norm, scale_output
from nearfar.ops.convolution.gnconv import GnConv
from nearfar.ops.spectral.global_filter import GlobalLocalFilter
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights, twelve_layers
from nearfar.vision.models.registry import Variant, Weights, register


class HorBlock(nn.Module):
    """x + DP(g1 * gnConv(LN(x))), then x + DP(g2 * W2 GELU(W1 LN(x))); W1: C -> 4C, W2: 4C -> C, exact GELU."""

    def __init__(
        self,
        dim: int,
        order: int,
        filter_size: tuple[int, int] | None = None,
        *,
        scale: float = 1 / 3,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        filter = (lambda channels: GlobalLocalFilter(channels, *filter_size)) if filter_size else None
        self.norm1 = ChannelNorm(dim)
        self.gnconv = GnConv(dim, order, scale=scale, filter=filter)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, int(mlp_ratio * dim))
        self.act = GELU()
        self.pwconv2 = nn.Linear(int(mlp_ratio * dim), dim)
        gamma = partial(torch.full, (dim,), layer_scale)
        self.gamma1 = nn.Parameter(gamma()) if layer_scale else None
        self.gamma2 = nn.Parameter(gamma()) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gnconv(self.norm1(x))
        if self.gamma1 is not None:
            y = y * self.gamma1[:, None, None]
        x = x + self.drop_path(y)
        y = self.pwconv2(self.act(self.pwconv1(self.norm2(x.movedim(1, -1)))))
        if self.gamma2 is not None:
            y = y * self.gamma2
        return x + self.drop_path(y.movedim(-1, 1))

    @torch.no_grad()
    def fuse(self) -> Self:
        """Fold gammas into the projections before them, the second norm's affine part and the GELU into W1."""
        if self.gamma1 is not None:
            scale_output(self.gnconv.proj_out, self.gamma1)
            scale_output(self.pwconv2, self.gamma2)
            self.gamma1 = self.gamma2 = None
        if self.norm2.elementwise_affine:
            fold_norm(self.norm2, self.pwconv1)
            self.norm2 = nn.LayerNorm(self.norm2.normalized_shape, self.norm2.eps, elementwise_affine=False)
            self.pwconv1, self.act = FusedLinear(self.pwconv1, "gelu"), nn.Identity()
        return self


class HorNet(Backbone):
    """Patch stem, four stages of `HorBlock` with strided convolutions between them, pooled linear classifier.

    Input (B, in_chans, H, W) with H, W >= 32; other sizes than multiples of 32 are floored. The global filters are
    resized to any input.

    Args:
        depths, dims, orders: blocks, channels and gnConv order of each stage.
        filters: (h, w) of the global filter of each stage, None for the depthwise 7x7.
        scale: what gnConv multiplies its filter's output with.
        num_classes: classes; 0 for pooled features.
        layer_scale: initial gammas; None for none.
        feature_norms: each pyramid level through its own channel norm instead of a norm in the head.
        Others as in `ConvNeXt`.
    """

    CARD = Card(
        "HorNet",
        "2207.14284",
        "recursive gated convolution; GF: with a global Fourier filter",
        4.7e-7,
        small={"hornet_tiny_7x7": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}},
    )

    RULES = (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"norm(\d)\.", r"feature_norms.\1."),
        (r"norm\.", "head.norm."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        depths: Sequence[int] = (2, 3, 18, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        orders: Sequence[int] = (2, 3, 4, 5),
        filters: Sequence[tuple[int, int] | None] = (None, None, None, None),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        scale: float = 1 / 3,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(orders) == len(filters):
            raise ValueError(f"depths {depths}, dims {dims}, orders {orders} and filters {filters} differ in length")
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), ChannelNorm(dims[0]))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depths)
        for i, (dim, order, filter_size) in enumerate(zip(dims, orders, filters, strict=True)):
            down = nn.Sequential(ChannelNorm(dims[i - 1]), Conv2d(dims[i - 1], dim, 2, stride=2)) if i else None
            blocks = [
                HorBlock(
                    dim,
                    order,
                    filter_size,
                    scale=scale,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            self.stages.append(Stage(down or nn.Identity(), blocks))
        norm = nn.Identity() if feature_norms else ChannelNorm(dims[-1])
        self.head = Head(dims[-1], num_classes, norm, global_pool=global_pool, drop_rate=drop_rate)
        norms = [ChannelNorm(dim) for dim in dims] if feature_norms else ()
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))], norms)
        self.apply(init_weights)

    def dilates(self) -> bool:
        return not any(isinstance(module, GlobalLocalFilter) for module in self.modules())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], tuple[int, ...]]:
        """Groups for layer decay; stage 2 two blocks at a time up to group 11."""
        if coarse or len(self.stages) != 4:
            return super().group_matcher(coarse)
        return twelve_layers(lambda block: min(3 + block // 2, 11))

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        filters = [state.get(f"stages.{i}.blocks.0.gnconv.dwconv.complex_weight") for i in stages]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": [len(state[f"stages.{i}.blocks.0.norm1.weight"]) for i in stages],
            "orders": [count(state, rf"stages\.{i}\.blocks\.0\.gnconv\.pws\.(\d+)\.") + 1 for i in stages],
            "filters": [None if weight is None else tuple(weight.shape[1:3]) for weight in filters],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.weight"].shape[1],
            "mlp_ratio": ratio(
                len(state["stages.0.blocks.0.pwconv1.bias"]), len(state["stages.0.blocks.0.norm2.weight"])
            ),
            "layer_scale": 1e-6 if "stages.0.blocks.0.gamma1" in state else None,
            "feature_norms": "feature_norms.0.weight" in state,
        }


class HorFPNConv(nn.Sequential):
    """The gated convolution that takes the place of a pyramid neck's 3x3 output convolution.

    Order-2 gnConv of width `out_channels * ratio` without scale, projected to `out_channels` where `project` is set
    (otherwise the width stays), then `norm(channels)` and `activation()` where given. `filter_size` is (32, 17) in
    the published GF necks, None for the depthwise 7x7.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ratio: int = 1,
        filter_size: tuple[int, int] | None = None,
        *,
        project: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        width = out_channels * ratio
        filter = (lambda channels: GlobalLocalFilter(channels, *filter_size)) if filter_size else None
        gnconv = GnConv(width, 2, filter=filter, in_dim=in_channels, out_dim=out_channels if project else 0)
        after = [norm(out_channels if project else width)] if norm else []
        super().__init__(gnconv, *after, *([activation()] if activation else []))


def _variant(base: int, params: float, gmacs: float, tag: str, top1: float | None, size: int = 224, gf: bool = False):
    filters = (None, None, (size // 16, size // 32 + 1), (size // 32, size // 64 + 1)) if gf else (None,) * 4
    settings = {"dims": tuple(base * 2**i for i in range(4)), "depths": (2, 3, 18, 2), "filters": filters}
    weights = Weights(
        tag,
        top1,
        size=size,
        crop_pct=1.0 if size >= 384 else 0.875,
        crop_mode="squash" if size >= 384 else "center",
        num_classes=10450 if tag == "in22k" else 1000,  # with 21,841 the published 209, 211, 216 M would be 227 to 234
    )
    return Variant(settings, params, gmacs, (weights,))


HORNETS = {
    "hornet_tiny_7x7": _variant(64, 22.41, 4.0, "in1k", 82.8),
    "hornet_tiny_gf": _variant(64, 22.99, 3.9, "in1k", 83.0, gf=True),
    "hornet_small_7x7": _variant(96, 50, 8.8, "in1k", 83.8),
    "hornet_small_gf": _variant(96, 50.4, 8.7, "in1k", 84.0, gf=True),
    "hornet_base_7x7": _variant(128, 87.26, 15.6, "in1k", 84.2),
    "hornet_base_gf": _variant(128, 88, 15.5, "in1k", 84.3, gf=True),
    "hornet_large_7x7": _variant(192, 209, 34.8, "in22k", None),
    "hornet_large_gf": _variant(192, 211, 34.7, "in22k", None, gf=True),
    "hornet_large_gf_384": _variant(192, 216, 101.8, "in22k", None, size=384, gf=True),
}

register(HorNet, HORNETS)
