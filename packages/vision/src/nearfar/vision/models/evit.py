"""EViT: a vision transformer that keeps the tokens its class token attends to, and drops or fuses the others.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (ICLR 2022).
It has no parameters of its own: every checkpoint of a class-token transformer loads, and the keep rate may change at
any time. `reorganize_tokens` gives the same switch to a timm model.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, VisionTransformer
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.core.errors import UserError
from nearfar.ops.attention.self_attention import SelfAttention
from nearfar.ops.common.heads import from_heads
from nearfar.ops.tokens.reorganize import TokenTrail, keep_count, received_scores, reorganize, summary_scores
from nearfar.vision.models.lvvit import LVVIT_SMALL, LVViTModel, make_stem, stem_settings
from nearfar.vision.models.pyramid import drop_path_rates, linear
from nearfar.vision.models.registry import Variant, Weights, register
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

Keep = float | int
"""A share of the tokens in (0, 1], or a number of them."""


def keeps_all(keep: Keep, x: Tensor) -> bool:
    """Whether of the tokens (B, 1 + M, C) all stay."""
    return keep_count(keep, x.shape[1] - 1) == x.shape[1] - 1


class ReorganisingBlock(Block):
    """A transformer block that reorganizes the tokens between its attention and its MLP."""

    def forward(self, x: Tensor, keep: Keep = 1.0, fuse: bool = True) -> Tensor:
        """Tokens after the block."""
        return super().forward(x) if keeps_all(keep, x) else self.reduce(x, keep, fuse)[0]

    def reduce(self, x: Tensor, keep: Keep, fuse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens after the block, indices kept and left, and the patches as they were before."""
        q, k, v = self.attn.heads(self.norm1(x))
        y = self.attn.proj(from_heads(F.scaled_dot_product_attention(q, k, v)))
        before = x = x + self.branch(y)
        x, kept, rest = reorganize(x, summary_scores(q, k), keep_count(keep, x.shape[1] - 1), fuse=fuse)
        return self.add_mlp(x), kept, rest, before[:, 1:]


class EViT(LVViTModel):
    """DeiT, or LV-ViT, with token reorganization in some blocks.

    Input (B, in_chans, H, W) with sides that are multiples of the patch. Feature maps are whole: fused tokens fill the
    places of their members, dropped ones keep the value that they had last.

    Args:
        dim, depth, num_heads: channels, blocks, heads.
        num_classes: classes; 0 for the pooled token.
        img_size: size of the pictures that the position table is made for.
        keep_rate: share (or number) of the patches that each reorganizing block keeps; one, or one for each of
            `reduce_at`. `model.keep_rate = 0.5` changes it at any time; 1 is the plain transformer.
        reduce_at: the blocks that reorganize, from 0.
        fuse: join the tokens that are not kept into one, weighted by their scores, instead of dropping them.
        stem, aux_head, skip_lambda, eps: of LV-ViT, as in `Sparsifiner`; its second head sees the tokens that are left.
        drop_path_rate, drop_rate, global_pool, dynamic_img_pad: as in `ConViT`.
    """

    CARD = Card(
        "EViT",
        "2202.07800",
        "attention over ever fewer tokens: those that the class token looks at, and the rest in one",
        5.9e-7,
        weights="official, timm's DeiT",
        small={"evit_deit_tiny": {"dim": 96, "depth": 4, "num_heads": 3, "patch_size": 8, "reduce_at": (1, 2)}},
    )

    UNSHAPED = ("num_heads", "keep_rate", "reduce_at", "fuse")
    RULES = ((r"head\.(weight|bias)$", r"head.fc.\1"),)

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
        keep_rate: Keep | Iterable[Keep] = 0.7,
        reduce_at: Iterable[int] = (3, 6, 9),
        fuse: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        stem: str = "patch",
        aux_head: bool = False,
        skip_lambda: float = 1.0,
        eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.reduce_at, self.fuse_tokens = tuple(reduce_at), fuse
        if any(not 0 <= i < depth for i in self.reduce_at):
            raise ValueError(f"reduce_at is {self.reduce_at}; the model has blocks 0 to {depth - 1}")
        self.keep_rate = keep_rate
        self.patch_embed = make_stem(stem, in_chans, dim, patch_size)
        self.pos_embed = Positions(dim, tuple(n // patch_size for n in pair(img_size)), 1, antialias=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.dynamic_img_pad = dynamic_img_pad
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList(
            ReorganisingBlock(
                dim, SelfAttention(dim, num_heads, qkv_bias=qkv_bias), mlp_ratio, rate, eps=eps, skip_lambda=skip_lambda
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.aux_head = linear(dim, num_classes) if aux_head else None
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth)
        self.apply(init_linear)

    @property
    def keep_rate(self) -> Keep | tuple[Keep, ...]:
        """Share or number of the patches that each reorganizing block keeps, one or one each."""
        return self._keep[0] if len(set(self._keep)) == 1 else self._keep

    @keep_rate.setter
    def keep_rate(self, keep: Keep | Iterable[Keep]) -> None:
        rates = (keep,) * len(self.reduce_at) if isinstance(keep, int | float) else tuple(keep)
        if len(rates) != len(self.reduce_at):
            raise ValueError(f"keep_rate has {len(rates)} values; the model reduces in {len(self.reduce_at)} blocks")
        for rate in rates:
            keep_count(rate, 1)
        self._keep = rates or (1.0,)

    def embed(self, x: Tensor) -> State:
        tokens, size = super().embed(x)
        if is_traced(x):  # a graph has the features alone
            return tokens, size, None
        return tokens, size, TokenTrail.start(tokens.shape[0], tokens.shape[1] - 1, tokens.device)

    def apply_block(self, index: int, state: State) -> State:
        tokens, size, trail = state
        keep = self._keep[self.reduce_at.index(index)] if index in self.reduce_at else 1.0
        if is_traced(tokens) or keeps_all(keep, tokens):
            return self.run(self.blocks[index], tokens, keep, self.fuse_tokens), size, trail
        tokens, kept, rest, before = self.run(self.blocks[index].reduce, tokens, keep, self.fuse_tokens)
        return tokens, size, trail.follow(kept, rest, before, self.fuse_tokens)

    def forward_blocks(
        self, state: State, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, tuple[int, int]]]]:
        taken = []
        for i in range(len(self.layers) if last is None else last + 1):
            state = self.apply_block(i, state)
            if i in take:
                tokens, size, trail = state
                taken.append((torch.cat([tokens[:, :1], trail.dense(tokens[:, 1:])], 1), size))
        return state[0], taken

    def trail(self, x: Tensor) -> tuple[Tensor, TokenTrail]:
        """The features (B, 1 + K, C) of a picture and the trail of its tokens, for pictures of what was kept."""
        state = self.embed(self.prepare(x))
        for i in range(len(self.blocks)):
            state = self.apply_block(i, state)
        return self.conclude(state[0]), state[2]

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return split_positions(super().published_state(state), "pos_embed", 1)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, found = stem_settings(state)
        depth = count(state, r"blocks\.(\d+)\.")
        return found | {
            "dim": dim,
            "depth": depth,
            # shapes do not tell: published sizes have heads of 64 channels and reduce in blocks 3, 6 and 9 of 12
            "num_heads": {192: 3, 384: 6, 768: 12}.get(dim),
            "reduce_at": {12: (3, 6, 9), 16: (4, 8, 12)}.get(depth),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }


def scheduled_keep_rate(epoch: float, keep_rate: float, warm_up: float = 10, shrink_until: float = 100) -> float:
    """The keep rate at `epoch` (fractions count) of the published training: 1, then down a half cosine, then fixed."""
    if epoch < warm_up:
        return 1.0
    if epoch >= shrink_until:
        return keep_rate
    done = (epoch - warm_up) / (shrink_until - warm_up)
    return keep_rate + (1 - keep_rate) * 0.5 * (1 + math.cos(math.pi * done))


def whole_tokens(keep_rate: float, tokens: int) -> float:
    """The rate of a whole number of `tokens`, so that a schedule has that many values and not one every step."""
    return keep_count(keep_rate, tokens) / tokens


class _Reorganizer(nn.Module):
    """A timm block that reorganizes; its parts keep their names, and so do its weights."""

    def __init__(self, block: nn.Module, keep: Keep, fuse: bool, prefix: int) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.train(block.training)
        self.keep, self.fuse_tokens, self.prefix = keep, fuse, prefix

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if any(value is not None and value is not False for value in options.values()):
            raise ValueError(f"a reorganizing block takes no {', '.join(options)}")
        count = keep_count(self.keep, x.shape[1] - self.prefix)
        if count == x.shape[1] - self.prefix:
            return TimmBlock.forward(self, x)  # type: ignore[arg-type]
        attn, y = self.attn, self.norm1(x)
        q, k, v = attn.qkv(y).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        drop = attn.attn_drop.p if self.training else 0.0
        z = attn.norm(F.scaled_dot_product_attention(q, k, v, dropout_p=drop).transpose(1, 2).flatten(2))
        x = x + self.drop_path1(self.ls1(attn.proj_drop(attn.proj(z))))
        scores = summary_scores(q, k) if self.prefix else received_scores(q, k)
        x, _, _ = reorganize(x, scores, count, fuse=self.fuse_tokens, prefix=self.prefix)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def reorganize_tokens(
    model: nn.Module,
    keep_rate: Keep | Iterable[Keep] = 0.7,
    reduce_at: Iterable[int] = (3, 6, 9),
    *,
    fuse: bool = True,
) -> nn.Module:
    """Give a transformer of timm (DeiT, ViT, AugReg) token reorganization, in place; returns the model.

    Its weights and their names stay. Calling again changes the keep rate; 1 is the plain model, bit for bit. An `EViT`
    takes the keep rate at its `keep_rate`. Without a class token, which the published code needs, tokens are kept by
    the mean attention that they receive: a choice of ours, and a mean over tokens then counts a fused one once.

    Args:
        keep_rate: share in (0, 1], or number, of the patches that are kept; one, or one for each of `reduce_at`.
        reduce_at: the blocks that reorganize, from 0.
        fuse: join the tokens that are not kept into one, instead of dropping them.

    Raises UserError for another model, for prefix tokens other than one class token, and for other blocks or attention
    than timm's plain ones; ValueError for rates or blocks out of range.
    """
    blocks, at = getattr(model, "blocks", None), list(reduce_at)
    if not isinstance(model, VisionTransformer) or blocks is None:
        raise UserError(f"{type(model).__name__}: token reorganization is for timm's VisionTransformer and EViT")
    prefix = model.num_prefix_tokens
    if prefix != int(model.has_class_token):
        raise UserError(f"{type(model).__name__}: token reorganization takes one class token or none, not {prefix}")
    rates = [keep_rate] * len(at) if isinstance(keep_rate, int | float) else list(keep_rate)
    if len(rates) != len(at):
        raise ValueError(f"keep_rate has {len(rates)} values; the model reduces in {len(at)} blocks")
    if bad := [i for i in at if not 0 <= i < len(blocks)]:
        raise ValueError(f"reduce_at has {bad[0]}; the model has blocks 0 to {len(blocks) - 1}")
    for rate, i in zip(rates, at, strict=True):
        keep_count(rate, 1)
        attn = getattr(blocks[i], "attn", None)
        if type(attn) is not Attention or getattr(attn, "gate", None) is not None:
            raise UserError(f"block {i}: its attention, {type(attn).__name__}, is not one that tells class attention")
        if type(blocks[i]) not in (TimmBlock, _Reorganizer):
            raise UserError(f"block {i}: is a {type(blocks[i]).__name__}, no plain block of timm")
    for rate, i in zip(rates, at, strict=True):
        if isinstance(blocks[i], _Reorganizer):
            blocks[i].keep, blocks[i].fuse_tokens = rate, fuse
        else:
            blocks[i] = _Reorganizer(blocks[i], rate, fuse, prefix)
    return model


def _size(name: str, dim: int, heads: int, params: float, gmacs: float) -> Variant:
    # the starting point, and with any keep rate a working model, are the dense weights
    hub = (f"timm/deit_{name}_patch16_224.fb_in1k", "model.safetensors")
    return Variant(
        {"dim": dim, "num_heads": heads}, params, gmacs, (Weights("deit_fb_in1k", None, "", hub, crop_pct=0.875),)
    )


EVITS = {
    "evit_deit_tiny": _size("tiny", 192, 3, 5.72, None),
    "evit_deit_small": _size("small", 384, 6, 22.05, 3.0),
    "evit_deit_base": _size("base", 768, 12, 86.57, 11.6),
    # never released: it reduces after as many quarters of its blocks as DeiT does
    "evit_lvvit_small": Variant(LVVIT_SMALL | {"reduce_at": (4, 8, 12)}, 26.2, None),
}

register(EViT, EVITS)
