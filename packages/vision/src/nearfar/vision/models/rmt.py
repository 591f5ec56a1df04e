"""RMT: attention that fades with the distance between positions, at a pace of each head's own.

Fan et al., "RMT: Retentive Networks Meet Vision Transformers" (CVPR 2024).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.ops.common.layers import GELU, ChannelNorm, DepthwiseConv, DropPath
from nearfar.ops.convolution.conv_ffn import ConvFFN
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.token_mixing import Box, random_box, swap
from nearfar.vision.tracing import whole


class RMTBlock(nn.Module):
    """x + DW3(x); x + DP(g1 attention(LN(x))); x + DP(g2 ConvFFN(LN(x))), g scales of the channels, if any."""

    def __init__(self, dim: int, attn: ManhattanAttention, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.pos_embed = DepthwiseConv(dim, 3)
        self.norm1 = ChannelNorm(dim)
        self.attn = attn
        self.norm2 = ChannelNorm(dim)
        self.ffn = ConvFFN(dim, int(dim * mlp_ratio))
        scale = lambda: nn.Parameter(torch.full((dim, 1, 1), float(layer_scale))) if layer_scale else None  # noqa: E731
        self.gamma_1, self.gamma_2 = scale(), scale()
        self.drop_path = DropPath(drop_path)
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x) if self.residual else self.pos_embed(x)
        y, gamma = self.attn(self.norm1(x)), self.gamma_1
        x = x + self.drop_path(y if gamma is None else gamma * y)
        y, gamma = self.ffn(self.norm2(x)), self.gamma_2
        return x + self.drop_path(y if gamma is None else gamma * y)

    @torch.no_grad()
    def fuse(self) -> Self:
        """Put the first shortcut into the kernel it goes round, and the scales into the maps before them."""
        if self.residual:
            self.pos_embed.weight[:, 0, 1, 1] += 1
            self.residual = False
        for name, layer in (("gamma_1", self.attn.proj), ("gamma_2", self.ffn.fc2)):
            gamma = getattr(self, name)
            if gamma is not None:
                layer.weight *= gamma[:, 0]
                layer.bias *= gamma.flatten()
                setattr(self, name, None)
        return self


class RMTStage(Stage):
    """A stage that keeps in its state what names and shapes do not tell of its attention.

    `attention`: heads, whether axes go one by one (-1 where that is not known), decay_initial and decay_range in
    thousandths.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[RMTBlock]) -> None:
        super().__init__(downsample, blocks)
        attn = blocks[0].attn
        thousandths = [round(1000 * value) for value in (attn.decay_initial, attn.decay_range)]
        self.register_buffer("attention", torch.tensor([attn.num_heads, int(attn.decomposed), *thousandths]))


class RMT(Backbone):
    """Stem of four 3x3 convolutions, four stages of `RMTBlock`, strided convolutions between, a wide pooled head.

    Input (B, in_chans, H, W) with H, W >= 32; strided layers round other sizes up. Rotations count positions row by
    row over the whole map, so features depend on its width; that is what published weights expect at every size.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, decay_initial, decay_range: of each stage's attention, see `ManhattanAttention`.
        mlp_ratios: expansion of each stage's feed-forward layers.
        decomposed: of each stage, whether attention goes axis by axis.
        layer_scale: initial scale of the branches, of all stages or of each, 0 for none.
        projection: channels of the head's 1x1 convolution, before batch norm, SiLU and pooling.
        num_classes: classes; 0 for pooled features.
        aux_dim: width of the token-labelling head, which sees every position of the last map: its channels, as in the
            released code, or `projection`, behind the head's convolution, which is what the parameter count of one
            published log suggests; 0 for none. Half its largest value over the positions is added to the logits.
        token_labels: training gives (logits, logits of every position (B, N, classes), box) for `TokenLabelLoss`, where
            two pictures of the batch change places inside the box; without it training gives logits as in eval mode.
        feature_norms: each pyramid level through its own norm (eps 1e-5), as dense-prediction checkpoints have it.
        drop_path_rate, drop_rate, global_pool: as in `ConvNeXt`.
    """

    CARD = Card(
        "RMT",
        "2309.11523",
        "attention that fades with Manhattan distance, in early stages axis by axis",
        1.5e-6,
        small={
            "rmt_t": {
                "depths": (1, 1, 2, 1),
                "dims": (16, 32, 64, 96),
                "num_heads": (2, 2, 4, 4),
                "projection": 192,
            },
        },
    )

    RULES = (
        (r"patch_embed\.proj\.", "stem."),
        (r"layers\.(\d+)\.downsample\.reduction\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.0."),
        (r"layers\.(\d+)\.downsample\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.1."),
        (r"layers\.(\d+)\.Relpos\.", r"stages.\1."),
        (r"layers\.(\d+)\.", r"stages.\1."),
        (r"(stages\.\d+\.blocks\.\d+)\.retention_layer_norm\.", r"\1.norm1."),
        (r"(stages\.\d+\.blocks\.\d+)\.final_layer_norm\.", r"\1.norm2."),
        (r"(stages\.\d+\.blocks\.\d+)\.pos\.conv\.", r"\1.pos_embed."),
        (r"(stages\.\d+\.blocks\.\d+)\.retention\.out_proj\.", r"\1.attn.proj."),
        (r"(stages\.\d+\.blocks\.\d+)\.retention\.lepe\.conv\.", r"\1.attn.lepe."),
        (r"(stages\.\d+\.blocks\.\d+)\.retention\.([qkv])_proj\.", r"\1.attn.\2."),
        (r"(stages\.\d+\.blocks\.\d+)\.ffn\.dwconv\.conv\.", r"\1.ffn.dwconv."),
        (r"extra_norms\.", "feature_norms."),
        (r"proj\.", "head.norm.0."),
        (r"norm\.", "head.norm.1."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )
    IGNORE = (r"stages\.\d+\.angle$",)
    CLASSIFIERS = ("head.fc", "aux_head")
    UNSHAPED = ("num_heads", "decay_initial", "decay_range", "decomposed")

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        decay_initial: Sequence[float] = (2, 2, 2, 2),
        decay_range: Sequence[float] = (4, 4, 6, 6),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        decomposed: Sequence[bool] = (True, True, False, False),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        layer_scale: float | Sequence[float] = (0, 0, 0, 0),
        projection: int = 1024,
        aux_dim: int = 0,
        token_labels: bool = False,
        feature_norms: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        layer_scale = (layer_scale,) * len(depths) if isinstance(layer_scale, int | float) else layer_scale
        per_stage = (depths, dims, num_heads, decay_initial, decay_range, mlp_ratios, decomposed, layer_scale)
        per_stage = tuple(tuple(values)[: len(depths)] for values in per_stage)
        if len({len(values) for values in per_stage}) > 1:
            raise ValueError(f"settings of the stages differ in number: {per_stage}")
        if aux_dim not in (0, dims[-1], projection):
            raise ValueError(f"aux_dim is {aux_dim}; allowed are 0, dims[-1]={dims[-1]} and projection={projection}")
        if token_labels and not aux_dim:
            raise ValueError("token_labels=True needs aux_dim, the width of the positions' classifier")
        half = dims[0] // 2
        self.stem = nn.Sequential(
            *_conv(in_chans, half, 2), GELU(), *_conv(half, half, 1), GELU(),
            *_conv(half, dims[0], 2), GELU(), *_conv(dims[0], dims[0], 1),
        )  # fmt: skip
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim, heads, decay = dims[i], num_heads[i], (decay_initial[i], decay_range[i])
            blocks = [
                RMTBlock(
                    dim,
                    ManhattanAttention(dim, heads, *decay, decomposed=decomposed[i]),
                    mlp_ratios[i],
                    layer_scale[i],
                    rate,
                )
                for rate in rates
            ]
            down = nn.Sequential(*_conv(dims[i - 1], dim, 2)) if i else nn.Identity()
            self.stages.append(RMTStage(down, blocks))
        wide = nn.Sequential(nn.Conv2d(dims[-1], projection, 1), nn.BatchNorm2d(projection), nn.SiLU())
        self.head = Head(
            projection if not feature_norms else dims[-1],
            num_classes,
            nn.Identity() if feature_norms else wide,
            norm_first=True,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.aux_head = nn.Linear(aux_dim, num_classes) if aux_dim and num_classes else None
        self.aux_dim, self.token_labels = aux_dim, token_labels
        norms = [ChannelNorm(dim, eps=1e-5) for dim in dims] if feature_norms else ()
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))], norms)
        self.head_hidden_size = self.head.dim
        self.apply(init_weights)

    @classmethod
    def classifiers(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.CLASSIFIERS if settings.get("aux_dim") else cls.CLASSIFIERS[:1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a feature map; with a token-labelling head as the class says."""
        if self.aux_head is None or pre_logits or self.head.pool.is_identity():
            return whole(self.head, x, pre_logits)
        logits, dense = self.forward_dense(x)
        return logits + 0.5 * dense.amax(1)

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a feature map as a whole, (B, K), and of every position in row-major order, (B, N, K)."""
        tokens = self.head.norm(x) if self.aux_dim == self.head.dim else x
        return whole(self.head, x), self.aux_head(tokens.flatten(2).mT)

    def forward(self, x: Tensor) -> Any:
        """Logits; in training with `token_labels`, what `forward_train` gives."""
        return self.forward_train(x) if self.training and self.token_labels else super().forward(x)

    def forward_train(self, x: Tensor, box: Box | None = None) -> tuple[Tensor, Tensor, Box]:
        """Logits of the class, (B, K), and of every position, (B, N, K), and the box in which pictures changed places.

        The box counts in cells of the last map; by default it is random. Inside it every picture has, from the stem on,
        what the picture at the other end of the batch has there; the positions' logits are put back.
        """
        self.check_input(x)
        maps, scale = self.stem(x), self.feature_info[-1]["reduction"] // self.feature_info[0]["reduction"]
        grid = tuple(-(-n // scale) for n in maps.shape[-2:])
        box = random_box(*grid) if box is None else box
        maps = swap(maps.movedim(1, -1), [scale * n for n in box]).movedim(-1, 1)
        for stage in self.stages:
            maps = stage(maps)
        logits, dense = self.forward_dense(maps)
        return logits, swap(dense.unflatten(1, grid), box).flatten(1, 2), box

    def reset_heads(self, num_classes: int, global_pool: str | None) -> None:
        super().reset_heads(num_classes, global_pool)
        if self.aux_dim:
            like = next(self.head.norm.parameters())
            self.aux_head = nn.Linear(self.aux_dim, num_classes).to(like) if num_classes else None
            if self.aux_head is not None:
                init_weights(self.aux_head)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.aux_head, self.aux_dim = None, 0
        return take

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        first = [f"stages.{i}.blocks.0" for i in stages]
        dims = [len(state[f"{name}.norm1.weight"]) for name in first]
        dense = "feature_norms.0.weight" in state
        scales = [state.get(f"{name}.gamma_1") for name in first]
        settings = {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "dims": dims,
            "mlp_ratios": [ratio(len(state[f"{n}.ffn.fc1.weight"]), dim) for n, dim in zip(first, dims, strict=True)],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.weight"].shape[1],
            "layer_scale": [0 if scale is None else 1e-6 for scale in scales],
            "aux_dim": state["aux_head.weight"].shape[1] if "aux_head.weight" in state else 0,
            "feature_norms": dense,
            **({} if dense else {"projection": len(state["head.norm.0.weight"])}),
        }
        return settings | cls._attention_settings(state, settings)

    @classmethod
    def _attention_settings(cls, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Heads, decay and decomposition of every stage: from the state's tables, else of the variant of this size."""
        size = (tuple(settings["depths"]), tuple(settings["dims"]))
        known = next((v.settings for v in RMTS.values() if (v.settings["depths"], v.settings["dims"]) == size), {})
        found = {key: known.get(key) for key in ("num_heads", "decay_initial", "decay_range", "decomposed")}
        tables = [state.get(f"stages.{i}.attention") for i in range(len(settings["depths"]))]
        if any(table is None or table.is_meta for table in tables):
            return found
        heads, split, initial, span = zip(*(table.tolist() for table in tables), strict=True)
        found["num_heads"] = heads
        found["decay_initial"], found["decay_range"] = (tuple(n / 1000 for n in values) for values in (initial, span))
        return found if -1 in split else found | {"decomposed": tuple(map(bool, split))}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under our names; of the published tables, g_h = ln(1 - 2^(-initial - range h / heads)), what made them."""
        renamed = super().published_state(state)
        for name in [name for name in renamed if re.match(r"stages\.\d+\.decay$", name)]:
            powers = -torch.log2(-torch.expm1(renamed.pop(name).double()))
            span = float(powers[-1] - powers[0]) * len(powers) / max(len(powers) - 1, 1)
            found = [len(powers), -1, round(1000 * float(powers[0])), round(1000 * span)]
            renamed[name.replace("decay", "attention")] = torch.tensor(found)
        return renamed

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in `Backbone`; what the settings say of attention is the model's own."""
        return super().fit_state(state) | {n: v for n, v in self.state_dict().items() if n.endswith(".attention")}


def _conv(in_chans: int, out_chans: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(in_chans, out_chans, 3, stride, 1), nn.BatchNorm2d(out_chans)


def _variants() -> dict[str, Variant]:
    """The four sizes, and those trained with token labels; the paper's counts fit units of 2^30, here are 10^9."""
    found = {}
    for name, depths, dims, heads, ranges, ratios, split, scale, params, gmacs, top1 in (
        ("t", (2, 2, 8, 2), (64, 128, 256, 512), (4, 4, 8, 16), (4, 4, 6, 6), (3, 3, 3, 3), 2, 0, 14.33, 2.5, (82.4,)),
        ("s", (3, 4, 18, 4), (64, 128, 256, 512), (4, 4, 8, 16), (4, 4, 6, 6), (4, 4, 3, 3), 3, 0, 26.97, 4.5,
         (84.1, 84.8)),
        ("b", (4, 8, 25, 8), (80, 160, 320, 512), (5, 5, 10, 16), (5, 5, 6, 6), (4, 4, 3, 3), 3, 1e-6, 54.15, 9.7,
         (85.0, 85.6)),
        ("l", (4, 8, 25, 8), (112, 224, 448, 640), (7, 7, 14, 20), (6, 6, 6, 6), (4, 4, 3, 3), 3, 1e-6, 95.46, 18.2,
         (85.5, 86.1)),
    ):  # fmt: skip
        settings = {
            "depths": depths,
            "dims": dims,
            "num_heads": heads,
            "decay_initial": (2, 2, 2, 2),
            "decay_range": ranges,
            "mlp_ratios": ratios,
            "decomposed": tuple(i < split for i in range(4)),
            "layer_scale": (0, 0, scale, scale),
            "aux_dim": 0,
        }
        gmacs = round(gmacs * 2**30 / 1e9, 2)
        found[f"rmt_{name}"] = Variant(settings, params, gmacs, (Weights("in1k", top1[0]),))
        if len(top1) == 2:
            labelled = settings | {"aux_dim": dims[-1]}
            aux = (dims[-1] + 1) / 1000
            weights = Weights("in1k", top1[1], crop_pct=0.96)
            found[f"rmt_{name}_token_label"] = Variant(labelled, round(params + aux, 2), gmacs, (weights,))
    return found


RMTS = _variants()

register(RMT, RMTS)
