"""DHVT: a small vision transformer that convolutions, a channel gate and head tokens make trainable on small data.

Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets" (NeurIPS
2022).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.head_tokens import HeadTokenAttention
from nearfar.ops.common.layers import DropPath
from nearfar.ops.convolution.overlapping import ChannelGatedFeedForward, OverlappingPatches
from nearfar.vision.models.pyramid import drop_path_rates
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import State, TokenHead, TokenModel, init_linear


class OverlappingTokens(OverlappingPatches):
    """The overlapping stem with its map as tokens (B, N, C), and their grid."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = super().forward(x)
        return x.flatten(2).mT, tuple(x.shape[-2:])


class DHVTBlock(nn.Module):
    """x + DP(A(LN(x))), then x + DP(F(LN(x), grid)): `HeadTokenAttention` and `ChannelGatedFeedForward`."""

    def __init__(self, dim: int, num_heads: int, hidden: int, *, qkv_bias: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = HeadTokenAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.mlp = ChannelGatedFeedForward(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class DHVT(TokenModel):
    """Overlapping stem, class token, `DHVTBlock`s, norm, classifier of the class token; no positions.

    Input (B, in_chans, H, W) with sides that are multiples of the patch, any grid.

    Args:
        dim, depth, num_heads: channels, blocks, heads (and head tokens).
        num_classes: classes; 0 for the pooled token.
        img_size: size of the published pictures; nothing depends on it.
        patch_size: reduction of the stem, a power of two.
        mlp_ratio, qkv_bias: of the blocks.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        drop_rate, global_pool, dynamic_img_pad: as in `ConViT`.
    """

    CARD = Card(
        title="DHVT",
        paper="2210.05958",
        what="attention with a token for every head, between convolutions",
        error=3e-06,
        small={"dhvt_tiny_cifar_patch4": {"dim": 64, "depth": 4}},
        plain={
            "dhvt_tiny_cifar_patch4": (
                "deit_tiny_patch16_224",
                {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
            )
        },
    )

    RULES = ((r"head\.(weight|bias)$", r"head.fc.\1"),)
    FIRST_CONV = "patch_embed.proj.0.0"

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
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        self.patch_embed = OverlappingTokens(dim, patch_size, in_chans)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList(
            DHVTBlock(dim, num_heads, int(mlp_ratio * dim), qkv_bias=qkv_bias, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth)
        self.apply(init_linear)

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        return self.run(self.blocks[index], tokens, size), size

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in `TokenModel`; for other channels the first scale and shift become their mean."""
        state = dict(state)
        for name in ("patch_embed.pre_affine.alpha", "patch_embed.pre_affine.beta"):
            if name in state and state[name].shape[1] != self.in_chans:
                state[name] = state[name].mean(1, keepdim=True).expand(-1, self.in_chans, -1, -1).clone()
        return super().fit_state(state)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        heads, dim = state["blocks.0.attn.pos_embed"].shape[-2:]
        patch = 2 ** sum(f"patch_embed.proj.{2 * i}.0.weight" in state for i in range(8))
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_heads": heads,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["patch_embed.proj.0.0.weight"].shape[1],
            "patch_size": patch,
            "img_size": 32 if patch < 16 else 224,
            "mlp_ratio": ratio(len(state["blocks.0.mlp.conv1.bias"]), dim),
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }


def _variant(
    dim: int, heads: int, patch: int, params: float, gmacs: float, classes: int, tag: str, top1: float | None = None
) -> Variant:
    settings = {"dim": dim, "num_heads": heads, "patch_size": patch, "img_size": 32 if patch < 16 else 224}
    weights = Weights(tag, top1, size=settings["img_size"], num_classes=classes, crop_pct=1.0 if patch < 16 else 0.875)
    return Variant(settings, params, gmacs, (weights,))


# no weights are released; accuracies of other rows were not at hand
DHVTS = {
    "dhvt_tiny": _variant(192, 3, 16, 6.27, 1.35, 1000, "in1k", 77.6),
    "dhvt_small": _variant(384, 6, 16, 24.04, 5.03, 1000, "in1k", 82.3),
    "dhvt_tiny_cifar_patch4": _variant(192, 4, 4, 6.01, 0.39, 100, "cifar100"),
    "dhvt_small_cifar_patch4": _variant(384, 8, 4, 23.43, 1.5, 100, "cifar100"),
    "dhvt_tiny_cifar_patch2": _variant(192, 4, 2, 5.85, 1.4, 100, "cifar100"),
    "dhvt_small_cifar_patch2": _variant(384, 8, 2, 22.77, 5.6, 100, "cifar100"),
    "dhvt_tiny_domain": _variant(192, 4, 16, 6.11, 1.4, 345, "domainnet"),
    "dhvt_small_domain": _variant(384, 6, 16, 23.8, 5.1, 345, "domainnet"),
}

register(DHVT, DHVTS)
