"""ConViT: a vision transformer whose first layers may look at fixed distances, as a convolution does.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases" (ICML 2021). timm has
the same models with the same weights (`convit_*`), for the one square size they were built for. Here positional
attention is separable, so any grid works and no table of all pairs is made.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.gated_positional import GatedPositionalAttention
from nearfar.ops.attention.self_attention import SelfAttention
from nearfar.vision.models.pyramid import drop_path_rates
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import (
    Block,
    PatchEmbed,
    Positions,
    State,
    TokenHead,
    TokenModel,
    init_linear,
    pair,
    picture_size,
    split_positions,
)
from nearfar.vision.tracing import whole


class ConViT(TokenModel):
    """Patches with learned positions, gated positional blocks, then the class token and plain attention blocks.

    Input (B, in_chans, H, W) with sides that are multiples of the patch. Before the class token joins, at block
    `local_layers`, features give it as it will join.

    Args:
        dim, depth, num_heads: channels, blocks, heads.
        num_classes: classes; 0 for the pooled token.
        img_size: size of the pictures that the position table is made for.
        local_layers: blocks with gated positional attention.
        locality_strength: see `GatedPositionalAttention`.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling name, see `TokenHead`.
        dynamic_img_pad: pad other sides with zeros instead of refusing them.
    """

    CARD = Card(
        "ConViT",
        "2103.10697",
        "attention blended with looks at fixed distances by a gate a head",
        4.9e-7,
        weights="official, timm",
        small={"nearfar_convit_tiny": {"dim": 96, "depth": 4, "local_layers": 3, "patch_size": 8}},
    )

    RULES = ((r"head\.(weight|bias)$", r"head.fc.\1"),)

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        local_layers: int = 10,
        locality_strength: float | None = 1.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= local_layers < depth:
            raise ValueError(f"local_layers is {local_layers}; the class token needs a block after them, of {depth}")
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        grid = tuple(n // patch_size for n in pair(img_size))
        self.pos_embed = Positions(dim, grid)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.local_layers, self.dynamic_img_pad = local_layers, dynamic_img_pad
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(rates):
            if local := i < local_layers:
                attn = GatedPositionalAttention(dim, num_heads, qkv_bias=qkv_bias, locality_strength=locality_strength)
            else:
                attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias)
            self.blocks.append(Block(dim, attn, mlp_ratio, rate, on_grid=local))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth)
        self.apply(init_linear)
        for block in self.blocks[:local_layers]:
            block.attn.reset_locality()

    def embed(self, x: Tensor) -> State:
        patches, size = whole(self.patch_embed, x)
        return whole(self.pos_embed, patches, size), size

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        if index == self.local_layers:
            tokens = self.with_prefix(tokens)
        return self.run(self.blocks[index], tokens, size), size

    def split(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        if index < self.local_layers:
            token = tokens[:1, :0] if self.cls_token is None else self.cls_token
            return token.expand(tokens.shape[0], -1, -1), tokens
        return super().split(tokens, index)

    def prefix_at(self, index: int) -> int:
        return 0 if index < self.local_layers else super().prefix_at(index)

    def gates(self) -> Tensor:
        """The weight of positions against content, (layers, heads), of every gated layer."""
        return torch.stack([b.attn.gates() for b in self.blocks if isinstance(b.attn, GatedPositionalAttention)])

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {f"blocks.{i}.attn.gating_param" for i in range(self.local_layers)}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return split_positions(super().published_state(state), "pos_embed")

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_heads": len(state["blocks.0.attn.gating_param"]),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "local_layers": count(state, r"blocks\.(\d+)\.attn\.gating_param"),
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
            "qkv_bias": "blocks.0.attn.v.bias" in state,
        }


def _size(name: str, dim: int, heads: int, params: float, gmacs: float | None, top1: float) -> Variant:
    url = f"https://dl.fbaipublicfiles.com/convit/convit_{name}.pth" if "plus" not in name else ""
    hub = (f"timm/convit_{name}.fb_in1k", "model.safetensors") if url else None
    weights = Weights("fb_in1k" if url else "untrained", top1 if url else None, url, hub)
    return Variant({"dim": dim, "num_heads": heads, "img_size": 224}, params, gmacs, (weights,))


# timm has models of the plain names, with the same weights; the paper counts multiply-accumulates of the linear maps
# alone, where it prints enough digits; the wider ones ("+" in the paper) were not released
CONVITS = {
    "nearfar_convit_tiny": _size("tiny", 192, 4, 5.71, None, 73.1),
    "nearfar_convit_tiny_plus": _size("tiny_plus", 256, 4, 9.97, None, 76.7),
    "nearfar_convit_small": _size("small", 432, 9, 27.78, 5.4, 81.3),
    "nearfar_convit_small_plus": _size("small_plus", 576, 9, 48.98, None, 82.2),
    "nearfar_convit_base": _size("base", 768, 16, 86.54, 17, 82.4),
    "nearfar_convit_base_plus": _size("base_plus", 1024, 16, 153.1, 30, 82.5),
}

register(ConViT, CONVITS)
