"""BiFormer: attention of every region to the few regions that are nearest in meaning.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention, EnhancedAttention
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.layers import GELU, ChannelNorm, DepthwiseConv, DropPath
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, Weights, register

NORMS = {"batch": nn.BatchNorm2d, "layer": ChannelNorm}


class BiFormerBlock(nn.Module):
    """x + DW3(x), if any; x + DP(g1 attention(N(x))); x + DP(g2 W2 GELU(W1 N(x))), g scales of the channels, if any."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        position: bool,
        norm: str,
        layer_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv(dim, 3) if position else None
        self.norm1, self.norm2 = NORMS[norm](dim), NORMS[norm](dim)
        self.attn = attn
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), GELU(), nn.Linear(hidden, dim))
        scale = lambda: nn.Parameter(torch.full((dim, 1, 1), float(layer_scale))) if layer_scale else None  # noqa: E731
        self.gamma1, self.gamma2 = scale(), scale()
        self.drop_path = DropPath(drop_path)
        self.residual = position

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x) if self.residual else self.pos_embed(x)
        y, gamma = self.attn(self.norm1(x)), self.gamma1
        x = x + self.drop_path(y if gamma is None else gamma * y)
        y, gamma = self.mlp(self.norm2(x).movedim(1, -1)).movedim(-1, 1), self.gamma2
        return x + self.drop_path(y if gamma is None else gamma * y)

    @torch.no_grad()
    def fuse(self) -> Self:
        """Put the first shortcut into the kernel it goes round, and the scales into the maps before them."""
        if self.residual:
            self.pos_embed.weight[:, 0, 1, 1] += 1
            self.residual = False
        for name, layer in (("gamma1", self.attn.proj), ("gamma2", self.mlp[2])):
            gamma = getattr(self, name)
            if gamma is not None:
                layer.weight *= gamma[:, 0]
                layer.bias *= gamma.flatten()
                setattr(self, name, None)
        return self


class BiFormerStage(Stage):
    """A stage that keeps in its state what names and shapes do not tell of its attention.

    `attention`: heads, regions along each axis, regions kept (0: full attention), and whether it is of the
    channels-first build; -1 where that is not known.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[BiFormerBlock], channels_first: bool) -> None:
        super().__init__(downsample, blocks)
        attn = blocks[0].attn
        routes = (getattr(attn, "regions", -1), getattr(attn, "topk", 0))
        self.register_buffer("attention", torch.tensor([attn.num_heads, *routes, int(channels_first)]))


class BiFormer(Backbone):
    """Strided stem, four stages of `BiFormerBlock`, strided convolutions between, normed and pooled classifier.

    Input (B, in_chans, H, W) with H, W >= 32. `regions` is a number along each axis, not a size: regions grow with the
    picture, and cost as the square of its pixels, unless `regions` does too, as published dense models do (8 for
    512 pixels, 16 for detection); weights do not depend on it. A map that `regions` does not divide is padded, see
    `BiLevelRoutingAttention`; the published classifiers refuse it.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads: of each stage; by default dims / 32, and 8 where attention is full.
        regions, topks: of each stage's attention; topk 0 is full attention with local enhancement.
        kernel_sizes: of each stage's local enhancement, 0 for none.
        mlp_ratios: expansion of each stage's feed-forward layers.
        patch_stem: a 4x4 convolution and norm, with norm and 2x2 convolution between stages, as in the layout of
            Swin-T (STL); else two 3x3 convolutions, with 3x3 convolution and norm between stages.
        position: a 3x3 depthwise convolution before attention.
        channels_first: the refactored operators (NCHW): other padding, and the last stage enhances its values.
        norm, block_norm: "batch" or "layer", of stem, downsampling and head, and of blocks.
        layer_scale: initial scale of the branches, 0 for none.
        feature_norms: each pyramid level through its own norm, as dense-prediction checkpoints have it.
        Others as in `ConvNeXt`.
    """

    CARD = Card(
        "BiFormer",
        "2303.08810",
        "attention of regions to the few regions nearest in meaning",
        4.3e-7,
        small={
            "biformer_tiny": {
                "depths": (1, 1, 2, 1),
                "dims": (16, 32, 64, 96),
                "num_heads": (1, 2, 4, 4),
                "regions": (4, 2, 2, 1),
                "topks": (4, 2, 2, 0),
            },
        },
    )

    RULES = (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"(stages\.\d+\.blocks\.\d+\.attn)\.(?:qkv\.qkv|qkv_linear)\.", r"\1.qkv."),
        (r"(stages\.\d+\.blocks\.\d+\.attn)\.(?:wo|output_linear)\.", r"\1.proj."),
        (r"(stages\.\d+\.blocks\.\d+\.mlp)\.3\.", r"\1.2."),
        (r"extra_norms\.", "feature_norms."),
        (r"norm\.", "head.norm."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] | None = None,
        regions: int | Sequence[int] = 7,
        topks: Sequence[int] = (1, 4, 16, 0),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        patch_stem: bool = False,
        position: bool = True,
        channels_first: bool = False,
        norm: str = "batch",
        block_norm: str = "layer",
        layer_scale: float = 0.0,
        feature_norms: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = [max(dim // 32, 1) if k else 8 for dim, k in zip(dims, topks, strict=False)]
        regions = [regions] * len(depths) if isinstance(regions, int) else regions
        per_stage = (depths, dims, num_heads, regions, topks, kernel_sizes, mlp_ratios)
        per_stage = tuple(tuple(values)[: len(depths)] for values in per_stage)
        if len({len(values) for values in per_stage}) > 1:
            raise ValueError(f"settings of the stages differ in number: {per_stage}")
        if {norm, block_norm} - set(NORMS):
            raise ValueError(f"norm is {norm!r} and block_norm {block_norm!r}; allowed are 'batch' and 'layer'")
        make = NORMS[norm]
        if patch_stem:
            self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), make(dims[0]))
        else:
            half = dims[0] // 2
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, half, 3, 2, 1), make(half), GELU(),
                nn.Conv2d(half, dims[0], 3, 2, 1), make(dims[0]),
            )  # fmt: skip
        self.stages = nn.ModuleList()
        form = {"padding": "values"} if channels_first else {}
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim, kernel = dims[i], kernel_sizes[i]
            blocks = [
                BiFormerBlock(
                    dim,
                    BiLevelRoutingAttention(dim, num_heads[i], regions[i], topks[i], kernel, **form)
                    if topks[i]
                    else EnhancedAttention(dim, num_heads[i], kernel, enhance="values" if channels_first else "input"),
                    mlp_ratios[i],
                    position,
                    block_norm,
                    layer_scale,
                    rate,
                )
                for rate in rates
            ]
            down = nn.Identity()
            if i and patch_stem:
                down = nn.Sequential(make(dims[i - 1]), Conv2d(dims[i - 1], dim, 2, 2))
            elif i:
                down = nn.Sequential(Conv2d(dims[i - 1], dim, 3, 2, 1), make(dim))
            self.stages.append(BiFormerStage(down, blocks, channels_first))
        last = nn.Identity() if feature_norms else make(dims[-1])
        self.head = Head(dims[-1], num_classes, last, norm_first=True, global_pool=global_pool, drop_rate=drop_rate)
        norms = [ChannelNorm(dim) for dim in dims] if feature_norms else ()
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))], norms)
        self.apply(init_weights)

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under our names, with what the published names tell of every stage's attention."""
        renamed = super().published_state(state)
        first = any(re.match(r".*attn\.(qkv_linear|output_linear)\.", name) for name in state)
        for name in state:
            if match := re.match(r"stages\.(\d+)\.(?:blocks\.)?0\.attn\.(wo|output_linear|proj)\.weight$", name):
                renamed.setdefault(
                    f"stages.{match[1]}.attention",
                    torch.tensor([-1, -1, 0 if match[2] == "proj" else -1, int(first or state[name].ndim == 4)]),
                )
        return renamed

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        first = [f"stages.{i}.blocks.0" for i in stages]
        dims = [len(state[f"{name}.norm1.weight"]) for name in first]
        kernels = [state.get(f"{name}.attn.lepe.weight") for name in first]
        norm = lambda name: "batch" if f"{name}.running_mean" in state else "layer"  # noqa: E731
        stem = state["stem.0.weight"]
        scale = state.get("stages.0.blocks.0.gamma1")
        tables = [state.get(f"stages.{i}.attention") for i in stages]
        known = all(table is not None and not table.is_meta for table in tables)
        # every published variant keeps 1, 4, 16 of 7 x 7 regions, and attends to all in the last of four stages
        found = torch.stack(tables).tolist() if known else [[-1, -1, -1 if i < 3 else 0, 0] for i in stages]
        topks = [(1, 4, 16, 0)[i] if k < 0 else k for i, (_, _, k, _) in zip(stages, found, strict=True)]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "num_heads": [
                (max(dim // 32, 1) if k else 8) if heads < 0 else heads
                for (heads, *_), k, dim in zip(found, topks, dims, strict=True)
            ],
            "regions": [7 if regions < 0 else regions for _, regions, *_ in found],
            "topks": topks,
            "kernel_sizes": [0 if weight is None else weight.shape[-1] for weight in kernels],
            "mlp_ratios": [ratio(len(state[f"{n}.mlp.0.weight"]), dim) for n, dim in zip(first, dims, strict=True)],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": stem.shape[1],
            "patch_stem": stem.shape[-1] == 4,
            "position": f"{first[0]}.pos_embed.weight" in state,
            "channels_first": bool(found[0][3]),
            "norm": norm("stem.1"),
            "block_norm": norm(f"{first[0]}.norm1"),
            "layer_scale": 0.0 if scale is None else 1e-6,
            "feature_norms": "feature_norms.0.weight" in state,
        }

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in `Backbone`; what the settings say of attention is the model's own."""
        return super().fit_state(state) | {n: v for n, v in self.state_dict().items() if n.endswith(".attention")}


def _variant(
    depths: Sequence[int], dims: Sequence[int], mlp_ratio: int, params: float, gmacs: float, top1: float, **form: bool
) -> Variant:
    settings = {"depths": depths, "dims": dims, "mlp_ratios": (mlp_ratio,) * 4}
    settings |= {"patch_stem": False, "position": True, "channels_first": False} | form
    return Variant(settings, params, gmacs, (Weights("in1k", top1),))


BIFORMERS = {
    "biformer_tiny": _variant((2, 2, 8, 2), (64, 128, 256, 512), 3, 13.14, 2.2, 81.4),
    "biformer_small": _variant((4, 4, 18, 4), (64, 128, 256, 512), 3, 25.54, 4.5, 83.8),
    "biformer_base": _variant((4, 4, 18, 4), (96, 192, 384, 768), 3, 56.81, 9.8, 84.3),
    "biformer_stl": _variant((2, 2, 6, 2), (96, 192, 384, 768), 4, 28.37, 4.6, 82.7, patch_stem=True, position=False),
    "biformer_stl_nchw": _variant(
        (2, 2, 6, 2), (96, 192, 384, 768), 4, 28.37, 4.6, 82.7, patch_stem=True, position=False, channels_first=True
    ),
}

register(BiFormer, BIFORMERS)
