"""Sparsifiner: a vision transformer whose heads predict which pairs of tokens to attend to.

Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (CVPR 2023).
No weights were released; training starts from those of DeiT-S or LV-ViT-S, which load without a predictor.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.predicted_sparsity import Connectivity, ConnectivityPredictor, PredictedSparseAttention
from nearfar.ops.common.ranking import ranked
from nearfar.ops.tokens.reorganize import keep_count
from nearfar.vision.models.lvvit import LVVIT_SMALL, LVViTModel, make_stem, stem_settings
from nearfar.vision.models.pyramid import drop_path_rates, linear
from nearfar.vision.models.registry import Variant, register
from nearfar.vision.models.tokens import (
    Block,
    Positions,
    State,
    TokenHead,
    init_linear,
    pair,
    picture_size,
    split_positions,
)
from nearfar.vision.tracing import is_traced


class SparseBlock(Block):
    """A block whose attention is over predicted pairs; it tells what its predictor said, and the class attention."""

    def forward(
        self, x: Tensor, active: Tensor | None, dense: bool, present: Tensor | None = None
    ) -> tuple[Tensor, Connectivity, Tensor]:
        y, found, scores = self.attn(self.norm1(x), active, dense, present)
        return self.add_mlp(x + self.branch(y)), found, scores


class Sparsifiner(LVViTModel):
    """DeiT-S or LV-ViT-S with predicted sparse attention in every block.

    Input (B, in_chans, H, W) of the size that the model is built for: the predictors know its number of tokens.

    Args:
        dim, depth, num_heads, num_classes, in_chans, img_size, patch_size, mlp_ratio, qkv_bias: of the transformer.
        keep_rate: share of the keys that each query keeps. coefficients, threshold: of the predictor's factors.
        token_reduction, channel_reduction: N // token_reduction basis rows, d // channel_reduction channels.
        reduced_tokens: the number of basis rows itself, where `set_input_size` has changed N.
        share: one tensor for both factors over tokens. stable: break ties by the lowest index.
        token_keep_rate: share of the patches kept at each block of `prune_at` (its powers 1, 2, 3); 1 for none.
        skip_lambda: both branches are divided by it. stem: "patch", or "conv" for LV-ViT's. aux_head: LV-ViT's second
            head on every patch; in eval mode half its largest value over the patches is added to the logits.
        dense: attend to all pairs, as in the phase of training that fits the predictors to the attention.
    """

    CARD = Card(
        "Sparsifiner",
        "2303.13755",
        "attention over pairs of tokens that a low-rank predictor picks per picture and head",
        1.8e-6,
        weights="none released; starts from DeiT-S or LV-ViT-S",
    )
    fixed_size = True

    RULES = (
        (r"head\.(weight|bias)$", r"head.fc.\1"),
        (r"(blocks\.\d+\.attn\.)mask_predictor\.proj_c_([qk])\.", r"\1predictor.\2."),
        (r"(blocks\.\d+\.attn\.)mask_predictor\.proj_n$", r"\1predictor.reduce"),
        (r"(blocks\.\d+\.attn\.)mask_predictor\.proj_back_n$", r"\1predictor.basis"),
    )

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        keep_rate: float = 0.25,
        coefficients: int = 8,
        threshold: float = 0.02,
        token_reduction: int = 6,
        channel_reduction: int = 2,
        reduced_tokens: int | None = None,
        share: bool = False,
        stable: bool = True,
        token_keep_rate: float = 1.0,
        prune_at: Iterable[int] = (3, 6, 9),
        skip_lambda: float = 1.0,
        stem: str = "patch",
        aux_head: bool = False,
        eps: float = 1e-6,
        dense: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        keep_count(token_keep_rate, 1)
        self.token_keep_rate, self.prune_at, self.dense = token_keep_rate, tuple(prune_at), dense
        self.patch_embed = make_stem(stem, in_chans, dim, patch_size)
        grid = tuple(n // patch_size for n in pair(img_size))
        self.pos_embed = Positions(dim, grid, 1)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        tokens, width = 1 + math.prod(grid), dim // num_heads
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList()
        for rate in rates:
            predictor = ConnectivityPredictor(
                width,
                tokens,
                reduced_tokens or tokens // token_reduction,
                width // channel_reduction,
                keep_rate=keep_rate,
                coefficients=coefficients,
                threshold=threshold,
                share=share,
                stable=stable,
            )
            attn = PredictedSparseAttention(dim, num_heads, predictor, qkv_bias=qkv_bias)
            self.blocks.append(SparseBlock(dim, attn, mlp_ratio, rate, eps=eps, skip_lambda=skip_lambda))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.aux_head = linear(dim, num_classes) if aux_head else None
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth)
        self.apply(init_linear)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if tuple(-(-n // self.patch_size) * self.patch_size for n in x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"input is {tuple(x.shape)}; the predictors of this model are for {self.img_size[0]} x "
                f"{self.img_size[1]}: build it with img_size of the pictures, or call set_input_size"
            )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Interpolate positions and predictors to the grid of `img_size`; the predictors keep their rank."""
        before = self.grid(self.img_size)
        super().set_input_size(img_size, patch_size)
        if (after := self.grid(self.img_size)) != before:
            for block in self.blocks:
                block.attn.predictor.resize(before, after)

    def embed(self, x: Tensor) -> State:
        return *super().embed(x), None, []

    def kept_at(self, index: int) -> int:
        """How many patches are left after block `index`, where it prunes; 0 where it does not."""
        if index not in self.prune_at or self.token_keep_rate == 1:
            return 0
        return keep_count(self.token_keep_rate ** (self.prune_at.index(index) + 1), math.prod(self.grid(self.img_size)))

    def forward_blocks(
        self, state: State, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, tuple[int, int]]]]:
        """As in `TokenModel`, without the patches that pruning has removed, which are zeros in the end, and keeping
        nothing of what the predictors say.

        The published form, which `details` and exported programs have, keeps them as zeros: the same numbers.
        """
        tokens, size = state[:2]
        if is_traced(tokens) or torch.compiler.is_exporting():
            return super().forward_blocks(state, take, last)
        present: Tensor | None = None
        taken: list[tuple[Tensor, tuple[int, int]]] = []

        def on_grid() -> Tensor:
            if present is None:
                return tokens
            place = present[..., None].expand(-1, -1, tokens.shape[2])
            return tokens.new_zeros(len(tokens), 1 + math.prod(size), tokens.shape[2]).scatter(1, place, tokens)

        for i in range(len(self.layers) if last is None else last + 1):
            tokens, _, scores = self.run(self.blocks[i], tokens, None, self.dense, present)
            if 0 < (count := self.kept_at(i)) < scores.shape[1]:
                kept = F.pad(1 + ranked(scores)[:, :count].sort(1).values, (1, 0))
                tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
                present = kept if present is None else present.gather(1, kept)
            if i in take:
                taken.append((on_grid(), size))
        return on_grid(), taken

    def apply_block(self, index: int, state: State) -> State:
        tokens, size, active, told = state
        tokens, found, scores = self.run(self.blocks[index], tokens, active, self.dense)
        if count := self.kept_at(index):
            if active is not None:
                scores = scores.masked_fill(~active, float("-inf"))
            active = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ranked(scores)[:, :count], True)
        if active is not None:
            tokens = tokens * F.pad(active, (1, 0), value=True)[..., None]
        return tokens, size, active, [*told, found]

    def details(self, x: Tensor) -> tuple[Tensor, list[Connectivity], Tensor | None]:
        """The features (B, N, C), what every block's predictor said, and the patches that pruning left (B, M)."""
        state = self.embed(self.prepare(x))
        for i in range(len(self.blocks)):
            state = self.apply_block(i, state)
        return self.conclude(state[0]), state[3], state[2]

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return split_positions(super().published_state(state), "pos_embed", 1)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, found = stem_settings(state)
        found |= {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "num_heads": dim // 64 or 1,
        }
        predictor = "blocks.0.attn.predictor."
        if f"{predictor}q.weight" in state:
            reduced, head_dim = state[f"{predictor}q.weight"].shape
            tokens, rows = state[f"{predictor}reduce"].shape
            found |= {
                "num_heads": dim // head_dim,
                "channel_reduction": head_dim // reduced,
                "token_reduction": tokens // rows,
                "reduced_tokens": None if tokens // (tokens // rows) == rows else rows,
                "share": f"{predictor}basis" not in state
                or same(state[f"{predictor}basis"], state[f"{predictor}reduce"]),
            }
        return found


def same(reduce: Tensor, basis: Tensor | None) -> bool:
    """Whether both factors are one tensor; of those without values none are."""
    return basis is None or (not basis.is_meta and bool(torch.equal(reduce, basis)))


SPARSIFINERS = {
    "sparsifiner_deit_small": Variant({}, 22.25, None),
    "sparsifiner_deit_small_token07": Variant({"token_keep_rate": 0.7}, 22.25, None),
    "sparsifiner_lvvit_small": Variant(LVVIT_SMALL, 26.42, None),
}

register(Sparsifiner, SPARSIFINERS)
