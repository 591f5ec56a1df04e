"""OverLoCK: a convolutional network that takes an overview first and then looks closely, guided from the top down.

Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels" (CVPR 2025).
The published code needs a neighbourhood-attention extension; here the clamped windows are plain matrix products.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath, LayerScale
from nearfar.ops.convolution.contmix import (
    ChannelGate,
    ContextMixer,
    ContMixBlock,
    GlobalResponseNorm,
    RepConvBlock,
    conv_bn,
    conv_mlp,
    large_kernels,
)
from nearfar.ops.convolution.reparam import DilatedReparam, ResidualDepthwise, fuse_pair
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights, linear
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.tracing import whole


class FocusBlock(ContextMixer):
    """A block that looks at features x (C channels) under context h (Cc channels), with context mixing.

    Unless it is the first, h = LS(h) + LS(r) with the overview's context r. f' = ResDW3([x, h]), f = LN(f'),
    u = GRN(W GELU(BN(DW3(f)))); m = BN(W mix(query f's x part, key f's h part, value u)),
    m = SiLU(BN(W u)) SE(m + BN(DilatedReparam(u))); f = LS1(f') + W BN(m); out = LS2(g) + MLP(LN(g)), g = ResDW3(f).
    Gives x and h, or both in one map from the last block.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_size: int,
        small_kernel: int = 5,
        num_heads: int = 4,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = 1.0,
        drop_path: float = 0.0,
        *,
        first: bool = False,
        last: bool = False,
        res_scale: bool = True,
        merged: bool = False,
    ) -> None:
        super().__init__(dim, context_dim, num_heads, kernel_size, small_kernel)
        both = dim + context_dim
        self.splits, self.last, self.res_scale = (dim, context_dim), last, res_scale
        self.x_scale = nn.Identity() if first else LayerScale(context_dim)
        self.h_scale = nn.Identity() if first else LayerScale(context_dim)
        self.first = first
        self.dwconv1 = ResidualDepthwise(both, 3)
        self.norm1 = ChannelNorm(both)
        self.fusion = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both),
            nn.BatchNorm2d(both),
            GELU(),
            Conv2d(both, dim, 1),
            GlobalResponseNorm(dim),
        )
        self.dyconv_proj = conv_bn(dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel_size, merged), nn.BatchNorm2d(dim))
        self.se_layer = ChannelGate(dim)
        self.gate = nn.Sequential(*conv_bn(dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), Conv2d(dim, both, 1))
        self.dwconv2 = ResidualDepthwise(both, 3)
        self.norm2 = ChannelNorm(both)
        self.mlp = conv_mlp(both, int(dim * mlp_ratio))
        self.ls1 = LayerScale(both, layer_scale) if layer_scale is not None else nn.Identity()
        self.ls2 = LayerScale(both, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def join(self, x: Tensor, h: Tensor, r: Tensor) -> Tensor:
        """Features and context in one map."""
        h = h if self.first else self.x_scale(h) + self.h_scale(r)
        return self.dwconv1(torch.cat((x, h), dim=1))

    def forward(self, x: Tensor, h: Tensor, r: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        f = self.join(x, h, r)
        normed = self.norm1(f)
        u = self.fusion(normed)
        mixed = self.dyconv_proj(self.mix(*normed.split(self.splits, dim=1), u))
        mixed = self.gate(u) * self.se_layer(mixed + self.lepe(u))
        f = self.add(f, self.ls1, self.proj(mixed))
        f = self.dwconv2(f)
        f = self.add(f, self.ls2, self.mlp(self.norm2(f)))
        return f if self.last else f.split(self.splits, dim=1)

    add = ContMixBlock.add

    def fuse(self) -> Self:
        """Merge the large kernel with the norm after it."""
        fuse_pair(self.lepe, 0)
        return self

    def attention_map(self, x: Tensor, h: Tensor, r: Tensor) -> Tensor:
        """The large kernels, (B, heads, positions, taps of the window), rows summing to one."""
        return large_kernels(self, *self.norm1(self.join(x, h, r)).split(self.splits, dim=1))


class FocusDown(nn.Module):
    """Strided convolutions of features and context between the two focus stages."""

    def __init__(self, dim_in: int, dim: int, context_dim: int) -> None:
        super().__init__()
        self.x_proj = _halve(dim_in, dim)
        self.h_proj = _halve(context_dim, context_dim)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_proj(x), self.h_proj(h)


class Join(nn.Module):
    """Features and context in one map: the third level of the pyramid."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat((x, h), dim=1)


class OverLoCKHead(Head):
    """Classifier: 1x1 convolution to `hidden`, batch norm, SiLU, pool, dropout, linear."""

    def __init__(self, dim: int, num_classes: int, hidden: int = 1024, **settings: Any) -> None:
        norm = nn.Sequential(Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU())
        super().__init__(hidden, num_classes, norm, norm_first=True, **settings)


class AuxiliaryHead(nn.Sequential):
    """Classifier of the overview, for training: batch norm, mean, linear."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(nn.BatchNorm2d(dim), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(dim, num_classes))


class OverLoCK(Backbone):
    """Base stages 1-3, an overview stage 4 on top, and focus stages 3 and 4 that look again under its context.

    Input (B, in_chans, H, W) with H, W >= 32; strided layers round other sizes up, and maps smaller than a dynamic
    kernel are enlarged inside it. The pyramid is: base stage 1, base stage 2, focus stage 3 with its context, focus
    stage 4 with its context.

    Args:
        depths, dims: blocks and channels of the base stages and the overview.
        focus_depths: blocks of the two focus stages.
        num_classes: classes; 0 for projected and pooled features.
        kernel_sizes, mlp_ratios: of the base blocks; the focus stages take the last two kernels.
        focus_heads, focus_mlp_ratios: half the heads, and the expansion, of the focus stages.
        small_kernel: of the dynamic convolution.
        layer_scales: initial shortcut scales of stages 1-4, None for none.
        res_scale: see `RepConvBlock`.
        head_dim: width of the projection before the classifier.
        aux_head: a classifier of the overview; in training the model then returns (logits, overview's logits).
        feature_norms: the dense-prediction form: every level through its own norm, the overview added to the last.
        merged: large kernels in their merged form from the start.
        Others as in `ConvNeXt`.
    """

    CARD = Card(
        "OverLoCK",
        "2502.20087",
        "re-parameterized large kernels; context-mixing dynamic convolution",
        4.8e-7,
        small={
            "overlock_xt": {
                "depths": (1, 1, 1, 1),
                "dims": (16, 32, 64, 96),
                "focus_depths": (1, 1),
                "focus_heads": (2, 2),
                "kernel_sizes": (7, 7, 5, 5),
                "head_dim": 256,
            }
        },
    )

    RULES = (
        (r"backbone\.", ""),
        (r"patch_embed1\.", "stem."),
        (r"patch_embed([234])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"blocks([1234])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
        (r"sub_blocks([34])\.(\d+)\.", lambda m: f"focus.{int(m[1]) - 3}.{m[2]}."),
        (r"patch_embedx\.", "focus_down."),
        (r"high_level_proj\.", "context_proj."),
        (r"extra_norm\.", "feature_norms."),
        (r"aux_head\.2\.", "aux_head.3."),
        (r"head\.([01])\.", r"head.norm.\1."),
        (r"head\.4\.", "head.fc."),
    )
    CLASSIFIERS = ("head.fc", "aux_head.3")

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 3, 2),
        dims: Sequence[int] = (56, 112, 256, 336),
        focus_depths: Sequence[int] = (6, 2),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        focus_heads: Sequence[int] = (4, 6),
        focus_mlp_ratios: Sequence[float] = (3, 3),
        small_kernel: int = 5,
        layer_scales: Sequence[float | None] = (None, None, 1.0, 1.0),
        res_scale: bool = True,
        head_dim: int = 1024,
        aux_head: bool = False,
        feature_norms: bool = False,
        merged: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if {len(depths), len(dims), len(kernel_sizes), len(mlp_ratios)} != {4} or len(focus_depths) != 2:
            raise ValueError(
                f"depths {depths}, dims {dims}, kernel_sizes {kernel_sizes} and mlp_ratios {mlp_ratios} must be of "
                f"four stages, focus_depths {focus_depths} of two"
            )
        half = dims[0] // 2
        convs = ((in_chans, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1))
        layers: list[nn.Module] = []
        for i, (a, b, stride) in enumerate(convs):
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)] + [GELU()] * (i < 3)
        self.stem = nn.Sequential(*layers)
        rates = drop_path_rates(drop_path_rate, (*depths, *focus_depths))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [
                RepConvBlock(dim, kernel_sizes[i], mlp_ratios[i], layer_scales[i], rate, res_scale, merged)
                for rate in rates[i]
            ]
            self.stages.append(Stage(_halve(dims[i - 1], dim) if i else nn.Identity(), blocks))
        context = dims[3] // 4
        self.context_proj = Conv2d(dims[3], context, 1)
        self.focus = nn.ModuleList()
        for i, depth in enumerate(focus_depths):
            self.focus.append(
                nn.ModuleList(
                    FocusBlock(
                        dims[i + 2],
                        context,
                        kernel_sizes[i + 2],
                        small_kernel,
                        focus_heads[i],
                        focus_mlp_ratios[i],
                        layer_scales[i + 2],
                        rates[i + 4][j],
                        first=i == 0 and j == 0,
                        last=i == 1 and j == depth - 1,
                        res_scale=res_scale,
                        merged=merged,
                    )
                    for j in range(depth)
                )
            )
        self.focus_down = FocusDown(dims[2], dims[3], context)
        self.join = Join()
        widths = (dims[0], dims[1], dims[2] + context, dims[3] + context)
        self.h_proj = None
        if feature_norms:
            self.head = nn.Identity()
            self.h_proj = nn.Sequential(
                ChannelNorm(dims[3]), Conv2d(dims[3], widths[3], 1), LayerScale(widths[3], 1e-5)
            )
        else:
            self.head = OverLoCKHead(widths[3], num_classes, head_dim, global_pool=global_pool, drop_rate=drop_rate)
        self.aux_head = AuxiliaryHead(dims[3], num_classes) if aux_head else None
        self.finish(
            num_classes, in_chans, widths, (4, 8, 16, 32), [ChannelNorm(w) for w in widths] if feature_norms else ()
        )
        for info, module in zip(self.feature_info[2:], ("join", f"focus.1.{focus_depths[1] - 1}"), strict=True):
            info["module"] = module
        self.head_hidden_size = head_dim
        self.grad_checkpointing = False
        self.apply(init_weights)

    @classmethod
    def classifiers(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.CLASSIFIERS if settings.get("aux_head") else cls.CLASSIFIERS[:1]

    def forward_all(self, x: Tensor, last: int | None = None) -> tuple[list[Tensor], Tensor | None]:
        """The pyramid up to level `last`, and the overview where it was needed."""
        x = whole(self.stem, x)
        levels = []
        most = 3 if self.focus_down is not None else len(self.stages) - 1 if self.focus is None else 2
        last = most if last is None else min(last, most)
        for stage in self.stages[: min(last + 1, 2)]:
            x = stage(x)
            levels.append(x)
        if last < 2:
            return levels, None
        x = self.stages[2](x)
        overview = self.stages[3](x)
        context = whole(self.context_proj, overview)
        raised = F.interpolate(context, size=x.shape[-2:], mode="bilinear", align_corners=False)
        x, h = self.look(self.focus[0], x, raised, raised)
        levels.append(self.join(x, h))
        if last > 2:
            levels.append(self.look(self.focus[1], *self.focus_down(x, h), context))
        return levels, overview

    def look(self, blocks: nn.ModuleList, x: Tensor, h: Tensor, r: Tensor) -> Any:
        """Features and context (or, from the last stage, both in one) after the focus `blocks`."""
        for block in blocks:
            if self.grad_checkpointing and self.training:
                out = checkpoint(block, x, h, r, use_reentrant=False)
            else:
                out = whole(block, x, h, r)
            if block.last:
                return out
            x, h = out
        return x, h

    def forward_pyramid(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        levels, overview = self.forward_all(x, last)
        if len(self.feature_norms):
            levels = [norm(level) for norm, level in zip(self.feature_norms, levels, strict=False)]
            if len(levels) == 4:
                levels[3] = levels[3] + self.h_proj(overview)
        return levels

    def norm_levels(self, levels: list[Tensor]) -> list[Tensor]:
        return levels

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits; in training with an auxiliary head, (logits, logits of the overview)."""
        self.check_input(x)
        if self.aux_head is None or not self.training:
            return self.forward_head(self.forward_pyramid(x)[-1])
        levels, overview = self.forward_all(x)
        return self.forward_head(levels[-1]), self.aux_head(overview)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        stages = self.stages
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if max(take) < 2:
            self.context_proj, self.focus, self.focus_down = None, None, None
        else:
            self.stages = stages
        if max(take) == 2:
            self.focus, self.focus_down = self.focus[:1], None
        if prune_head:
            self.aux_head = None
        return take

    def reset_heads(self, num_classes: int, global_pool: str | None) -> None:
        super().reset_heads(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = AuxiliaryHead(self.aux_head[0].num_features, num_classes) if num_classes else None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^(?:focus|context)", (4,))]}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^context_proj", (3, 1000)),
            (r"^focus\.0\.(\d+)", (4,)),
            (r"^focus_down", (5,)),
            (r"^focus\.1\.(\d+)", (6,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fitted = super().fit_state(state)
        if self.aux_head is None:  # of use in training only
            fitted = {name: value for name, value in fitted.items() if not name.startswith("aux_head.")}
        return fitted

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dims = [len(state[f"stages.{i}.blocks.0.dwconv.weight"]) for i in range(4)]
        hidden = [len(state[f"stages.{i}.blocks.0.proj.6.weight"]) for i in range(4)]
        focus = [f"focus.{i}.0" for i in range(2)]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(4)],
            "dims": dims,
            "focus_depths": [count(state, rf"focus\.{i}\.(\d+)\.") for i in range(2)],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.weight"].shape[1],
            "kernel_sizes": [state[f"stages.{i}.blocks.0.proj.1.lk_origin.weight"].shape[-1] for i in range(4)],
            "mlp_ratios": [ratio(width, dim) for width, dim in zip(hidden, dims, strict=True)],
            "focus_heads": [len(state[f"{name}.rpb1"]) // 2 for name in focus],
            "focus_mlp_ratios": [
                ratio(len(state[f"{name}.mlp.2.weight"]), dim) for name, dim in zip(focus, dims[2:], strict=True)
            ],
            "small_kernel": (state["focus.0.0.rpb1"].shape[-1] + 1) // 2,
            "layer_scales": [1.0 if f"stages.{i}.blocks.0.ls.weight" in state else None for i in range(4)],
            "head_dim": len(state["head.norm.0.weight"]) if "head.norm.0.weight" in state else 1024,
            "aux_head": "aux_head.3.weight" in state,
            "feature_norms": "feature_norms.0.weight" in state,
            "merged": "stages.0.blocks.0.proj.1.origin_bn.weight" not in state,
        }


def _halve(dim_in: int, dim: int) -> nn.Sequential:
    return nn.Sequential(Conv2d(dim_in, dim, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(dim))


def _variant(
    name: str, depths: Sequence[int], focus_depths: Sequence[int], dims: Sequence[int], heads: Sequence[int],
    params: float, gmacs: float, top1: float, crop_pct: float,
) -> Variant:  # fmt: skip
    settings = {"depths": depths, "focus_depths": focus_depths, "dims": dims, "focus_heads": heads}
    url = f"https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_{name}_in1k_224.pth"
    return Variant(settings, params, gmacs, (Weights("in1k", top1, url, crop_pct=crop_pct),))


OVERLOCKS = {
    "overlock_xt": _variant("xt", (2, 2, 3, 2), (6, 2), (56, 112, 256, 336), (4, 6), 16.45, 2.6, 82.7, 0.925),
    "overlock_t": _variant("t", (4, 4, 6, 2), (12, 2), (64, 128, 256, 512), (4, 8), 33.47, 5.5, 84.2, 0.95),
    "overlock_s": _variant("s", (6, 6, 8, 3), (16, 3), (64, 128, 320, 512), (8, 16), 56.16, 9.7, 84.8, 0.95),
    "overlock_b": _variant("b", (8, 8, 10, 4), (20, 4), (80, 160, 384, 576), (6, 9), 94.94, 16.7, 85.1, 0.975),
}

register(OverLoCK, OVERLOCKS)
