"""TransXNet: a hybrid network whose token mixer learns near dynamics by convolution and far ones by attention.

Lou et al., "TransXNet: Learning Both Global and Local Dynamics with a Dual Dynamic Token Mixer for Visual Recognition"
(IEEE TNNLS 2025).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.common.layers import DepthwiseConv, DropPath, LayerScale
from nearfar.ops.common.tables import Derived
from nearfar.ops.convolution.dmixer import ConvBN, DMixer, MultiScaleFFN, resize_table
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.tracing import whole


class TransXBlock(nn.Module):
    """x + DW7(x); x + DP(LS(DMixer(GN(x)))); x + DP(LS(MultiScaleFFN(GN(x)))), GN over channels and positions."""

    def __init__(
        self, dim: int, mixer: DMixer, mlp_ratio: float, layer_scale: float, drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv(dim, 7)
        self.norm1 = nn.GroupNorm(1, dim)
        self.token_mixer = mixer
        self.layer_scale_1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = MultiScaleFFN(dim, int(dim * mlp_ratio), drop=drop)
        self.layer_scale_2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.residual = True

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        x = x + self.pos_embed(x) if self.residual else self.pos_embed(x)
        x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm1(x), position)))
        return x + self.drop_path(self.layer_scale_2(self.mlp(self.norm2(x))))

    @torch.no_grad()
    def fuse(self) -> Self:
        """Put the first shortcut into the kernel it goes round, and the last scale into the norm before it."""
        if self.residual:
            self.pos_embed.weight[:, 0, 3, 3] += 1
            self.residual = False
            norm, scale = self.mlp.fc2[1], self.layer_scale_2
            norm.weight *= scale.weight.flatten()
            norm.bias.mul_(scale.weight.flatten()).add_(scale.bias)
            self.layer_scale_2 = nn.Identity()
        return self


class TransXStage(Stage):
    """A stage whose blocks share one position table."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], sr_ratio: int, table: str) -> None:
        super().__init__(downsample, blocks)
        self.sr_ratio, self.table, self._resized = sr_ratio, table, Derived()

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = self.downsample(x)
        size = tuple(x.shape[-2:])
        reduced = tuple(_reduced(n, self.sr_ratio) for n in size)
        # once per size and stage, not in every block
        resized = self._resized.get(position, size, lambda: resize_table(position, size, reduced, self.table))
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, resized, use_reentrant=False)
            else:
                x = block(x, resized)
        return x


def _reduced(length: int, ratio: int) -> int:
    """Length of an axis after the overlapping reduction."""
    return length if ratio == 1 else (length + 2 * ((ratio + 3) // 2) - (ratio + 3)) // ratio + 1


class TransXNet(Backbone):
    """7x7 patch stem, four stages of `TransXBlock`, overlapping downsampling, normed and pooled classifier.

    Input (B, in_chans, H, W) with H, W >= 32; strided layers round other sizes up. Every stage adds one learned
    position table to its attention; at other sizes than the table's it is resized, see
    `OverlappingReductionAttention`.

    Args:
        depths, dims: blocks and channels of each stage.
        groups, sr_ratios, num_heads, mlp_ratios: kernel banks, attention reduction, attention heads (on half of the
            channels) and expansion of each stage.
        num_classes: classes; 0 for pooled features.
        kernel_size: of the input-dependent convolution.
        table_size: input size, in pixels, that the position tables are made for.
        table: "flat" resizes tables as the published code does, "spatial" by their axes.
        layer_scale: initial scales of the two branches.
        feature_norms: each pyramid level through its own norm, without a classifier, as dense-prediction
            checkpoints have it.
        Others as in `ConvNeXt`.
    """

    CARD = Card(
        "TransXNet",
        "2310.19380",
        "input-dependent convolution beside attention over a coarse map",
        3.7e-7,
        small={
            "transxnet_t": {
                "depths": (1, 1, 2, 1),
                "dims": (16, 32, 64, 96),
                "num_heads": (1, 2, 4, 4),
                "table_size": 64,
            }
        },
    )

    RULES = (
        (r"patch_embed\.proj\.", "stem.0."),
        (r"relative_pos_enc\.", "position_tables."),
        (r"network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample."),
        (r"network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
        (r"norm([0246])\.", lambda m: f"feature_norms.{int(m[1]) // 2}."),
        (r"classifier\.0\.", "head.norm."),
        (r"classifier\.2\.", "head.fc."),
    )
    FIRST_CONV = "stem.0.conv"

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (48, 96, 224, 448),
        groups: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        kernel_size: int = 7,
        table_size: int = 224,
        table: str = "flat",
        layer_scale: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        per_stage = (depths, dims, groups, sr_ratios, num_heads, mlp_ratios)
        if len({len(values) for values in per_stage}) > 1:
            raise ValueError(f"settings of the stages differ in number: {per_stage}")
        self.stem = nn.Sequential(ConvBN(in_chans, dims[0], 7, 4, 3, act=False))
        self.position_tables = nn.ParameterList()
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            side = -(-table_size // (4 * 2**i))
            reduced = _reduced(side, sr_ratios[i])
            self.position_tables.append(nn.Parameter(torch.zeros(1, num_heads[i], side**2, reduced**2)))
            nn.init.trunc_normal_(self.position_tables[i], std=0.02)
            blocks = [
                TransXBlock(
                    dims[i],
                    DMixer(dims[i], kernel_size, groups[i], num_heads[i], sr_ratios[i], table=table),
                    mlp_ratios[i],
                    layer_scale,
                    drop_rate,
                    rate,
                )
                for rate in rates
            ]
            down = ConvBN(dims[i - 1], dims[i], 3, 2, 1, act=False) if i else nn.Identity()
            self.stages.append(TransXStage(down, blocks, sr_ratios[i], table))
        norm = nn.Identity() if feature_norms else nn.GroupNorm(1, dims[-1])
        self.head = Head(dims[-1], num_classes, norm, norm_first=True, global_pool=global_pool)
        norms = [nn.GroupNorm(1, dim) for dim in dims] if feature_norms else ()
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))], norms)
        self.apply(init_weights)

    def forward_pyramid(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        x = whole(self.stem, x)
        levels = []
        for stage, position in zip(
            self.stages[: None if last is None else last + 1], self.position_tables, strict=False
        ):
            x = whole(stage, x, position)
            levels.append(x)
        return levels

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.position_tables = self.position_tables[: len(self.stages)]
        return take

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        first = [f"stages.{i}.blocks.0" for i in stages]
        banks = [state[f"{name}.token_mixer.local_unit.weight"] for name in first]
        reducers = [state.get(f"{name}.token_mixer.global_unit.sr.0.conv.weight") for name in first]
        dims = [len(state[f"{name}.norm1.weight"]) for name in first]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "groups": [len(bank) for bank in banks],
            "sr_ratios": [1 if weight is None else weight.shape[-1] - 3 for weight in reducers],
            "num_heads": [state[f"position_tables.{i}"].shape[1] for i in stages],
            "mlp_ratios": [
                ratio(len(state[f"{name}.mlp.norm.weight"]), dim) for name, dim in zip(first, dims, strict=True)
            ],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.conv.weight"].shape[1],
            "kernel_size": banks[0].shape[-1],
            "table_size": 4 * math.isqrt(state["position_tables.0"].shape[2]),
            "feature_norms": "feature_norms.0.weight" in state,
        }


def _variant(size: str, table_size: int = 224, **weights: Any) -> Variant:
    depths, dims, groups, heads, ratios, params, gmacs = {
        "t": ((3, 3, 9, 3), (48, 96, 224, 448), (2, 2, 2, 2), (1, 2, 4, 8), (4, 4, 4, 4), 12.83, 1.8),
        "s": ((4, 4, 12, 4), (64, 128, 320, 512), (2, 2, 3, 4), (1, 2, 5, 8), (6, 6, 4, 4), 26.86, 4.5),
        "b": ((4, 4, 21, 4), (76, 152, 336, 672), (2, 2, 4, 4), (2, 4, 8, 16), (8, 8, 4, 4), 48.0, 8.3),
    }[size]
    settings = {
        "depths": depths,
        "dims": dims,
        "groups": groups,
        "num_heads": heads,
        "mlp_ratios": ratios,
        "table_size": table_size,
    }
    if table_size != 224:
        gmacs = 24.2
    return Variant(settings, params, gmacs, (Weights(**weights, size=table_size),))


_RELEASE = "https://github.com/LMMMEng/TransXNet/releases/download/v1.0"

TRANSXNETS = {
    "transxnet_t": _variant("t", tag="in1k", top1=81.6, crop_pct=0.9, url=f"{_RELEASE}/transx-t.pth.tar"),
    "transxnet_s": _variant("s", tag="in1k", top1=83.8, crop_pct=0.9, url=f"{_RELEASE}/transx-s.pth.tar"),
    "transxnet_b": _variant("b", tag="in1k", top1=84.6, crop_pct=0.95, url=f"{_RELEASE}/transx-b.pth.tar"),
    "transxnet_b_384": _variant("b", 384, tag="in1k", top1=85.5, crop_pct=0.95, url=f"{_RELEASE}/transx-b-384.pth.tar"),
}

register(TransXNet, TRANSXNETS)
