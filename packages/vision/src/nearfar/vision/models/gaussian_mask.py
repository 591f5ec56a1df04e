"""Vision transformers whose attention logits are multiplied by a mixture of Gaussians of the tokens' distance.

"RetNet Viewed through Convolution" (arXiv 2309.05375): ViT and PiT for small pictures, and `add_gaussian_mask`, which
puts the mask on timm's ViT, Swin, CaiT and PiT.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.cait import TalkingHeadAttn
from timm.models.pit import Transformer
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio, rename
from nearfar.ops.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from nearfar.ops.common.layers import DropPath
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import (
    Mlp,
    PatchEmbed,
    Positions,
    State,
    TokenHead,
    TokenModel,
    pair,
    picture_size,
    split_positions,
)
from nearfar.vision.tracing import whole

BLOCK = (
    (r"\.0\.norm\.", ".norm1."),
    (r"\.0\.fn\.to_qkv\.", ".attn.qkv."),
    (r"\.0\.fn\.to_out\.0\.", ".attn.proj."),
    (r"\.0\.fn\.mask\.", ".attn.mask."),
    (r"\.1\.norm\.", ".norm2."),
    (r"\.1\.fn\.net\.0\.", ".mlp.fc1."),
    (r"\.1\.fn\.net\.3\.", ".mlp.fc2."),
)
"""The published names of a block's parts and ours."""


class GMMBlock(nn.Module):
    """x + DP(A(LN(x), grid)), then x + DP(MLP(LN(x))), A the `GaussianMaskAttention`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        mlp_ratio: float = 2.0,
        *,
        kernels: int = 5,
        clipped: bool = False,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = GaussianMaskAttention(dim, num_heads, head_dim, kernels=kernels, clipped=clipped, qkv_bias=qkv_bias)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NormedHead(TokenHead):
    """Pool, norm, dropout, linear."""

    def __init__(self, dim: int, num_classes: int, *, global_pool: str, drop_rate: float, num_heads: int, eps: float):
        super().__init__(dim, num_classes, 0, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def pool(self, x: Tensor) -> Tensor:
        return self.norm(super().pool(x))


def xavier(module: nn.Module) -> None:
    """Xavier normal linear maps with zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MaskedModel(TokenModel):
    """What the masked ViT and PiT share."""

    def no_weight_decay(self) -> set[str]:
        """Also the masks' numbers, whose widths decay would pull to 0; the published training decays them."""
        masks = {n for n, _ in self.named_parameters() if n.endswith(("mask.sigma", "mask.alpha"))}
        return super().no_weight_decay() | masks

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published code keeps the table of distances many times, under names that end in `mask`."""
        kept = {name: value for name, value in state.items() if name.split(".")[-1] != "mask"}
        return rename(super().published_state(kept), BLOCK, anywhere=True)


class GMMViT(MaskedModel):
    """Patches with learned positions, `GMMBlock`s, mean over patches, norm, classifier; no class token.

    Input (B, in_chans, H, W) with sides that are multiples of the patch; masks are made for any grid.

    Args:
        dim, depth, num_heads, head_dim: channels, blocks, heads and their width.
        num_classes: classes; 0 for the pooled features.
        img_size, patch_size: of the position table.
        kernels, clipped: of the masks, see `GaussianMixtureMask`.
        drop_path_rate: stochastic depth, the same in every block, as published.
        mlp_ratio, qkv_bias, eps, drop_rate, global_pool, dynamic_img_pad: as named.
    """

    CARD = Card(
        title="Gaussian mixture mask",
        paper="2309.05375",
        what="attention whose logits are multiplied by Gaussians of the distance",
        error=8.4e-07,
        small={"gmm_vit_32": {"dim": 64, "depth": 4, "num_heads": 4, "head_dim": 16}},
        plain={
            "gmm_vit_32": (
                "vit_tiny_patch16_224",
                {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "qkv_bias": False},
            )
        },
    )

    RULES = (
        (r"transformer\.layers\.", "blocks."),
        (r"to_patch_embedding\.1\.", "patch_embed.proj."),
        (r"mlp_head\.0\.", "head.norm."),
        (r"mlp_head\.1\.", "head.fc."),
    )
    min_size = 8

    def __init__(
        self,
        dim: int = 192,
        depth: int = 9,
        num_heads: int = 12,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        head_dim: int = 16,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        mlp_ratio: float = 2.0,
        kernels: int = 5,
        clipped: bool = False,
        qkv_bias: bool = False,
        eps: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.pos_embed = Positions(dim, tuple(n // patch_size for n in pair(img_size)))
        block = {"kernels": kernels, "clipped": clipped, "qkv_bias": qkv_bias, "drop_path": drop_path_rate, "eps": eps}
        self.blocks = nn.ModuleList(GMMBlock(dim, num_heads, head_dim, mlp_ratio, **block) for _ in range(depth))
        self.norm = nn.Identity()
        self.head = NormedHead(
            dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads, eps=eps
        )
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth, num_prefix_tokens=0)
        self.apply(xavier)
        nn.init.normal_(self.pos_embed.grid)

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        return self.run(self.blocks[index], tokens, size), size

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = super().published_state(state)
        weight = state.get("patch_embed.proj.weight")
        if weight is not None and weight.ndim == 2:  # a linear map of pixels in the order (row, column, channel)
            channels = 1 if weight.shape[1] % 3 else 3
            side = round((weight.shape[1] // channels) ** 0.5)
            state["patch_embed.proj.weight"] = weight.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
        return split_positions(state, "pos_embedding")

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        kernels, heads = state["blocks.0.attn.mask.sigma"].shape[:2]
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_heads": heads,
            "head_dim": state["blocks.0.attn.proj.weight"].shape[1] // heads,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
            "kernels": kernels,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }


class TokenPool(nn.Module):
    """Halves the grid of the patches and doubles the channels: depthwise 3x3 of stride 2, 1x1; class token: linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, groups=dim)
        self.pointwise = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.token = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        grid = self.pointwise(self.depthwise(x[:, 1:].mT.unflatten(2, size)))
        return torch.cat((self.token(x[:, :1]), grid.flatten(2).mT), dim=1), tuple(grid.shape[-2:])


class PiTStage(nn.Module):
    """One resolution: `pool` but in the first stage, then blocks."""

    def __init__(self, pool: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pool, self.blocks = pool, nn.ModuleList(blocks)


class GMMPiT(MaskedModel):
    """Patches with learned positions and a class token, stages of `GMMBlock`s with pooling between them, classifier.

    The masks spare the class token.

    Args:
        dims, depths, num_heads: channels, blocks and heads of each stage; each has twice the channels of the last.
        head_dim: width of a head.
        Others as in `GMMViT`.

    Raises:
        ValueError: lists of different lengths, channels that do not double.
    """

    RULES = (
        (r"to_patch_embedding\.0\.", "patch_embed.proj."),
        (r"mlp_head\.0\.", "norm."),
        (r"mlp_head\.1\.", "head.fc."),
        (r"layers\.(\d+)\.layers\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
        (r"layers\.(\d+)\.downsample\.net\.0\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.pool.depthwise."),
        (r"layers\.(\d+)\.downsample\.net\.1\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.pool.pointwise."),
        (r"layers\.(\d+)\.cls_ff\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.pool.token."),
    )
    LAYERS = "stages"
    min_size = 8

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (2, 4, 8),
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        head_dim: int = 48,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        mlp_ratio: float = 2.0,
        kernels: int = 5,
        clipped: bool = False,
        qkv_bias: bool = False,
        eps: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims {dims}, depths {depths} and num_heads {num_heads} differ in length")
        if any(2 * a != b for a, b in pairwise(dims)):
            raise ValueError(f"dims are {dims}; each must be twice the one before")
        self.dynamic_img_pad = dynamic_img_pad
        self.patch_embed = PatchEmbed(in_chans, dims[0], patch_size)
        self.pos_embed = Positions(dims[0], tuple(n // patch_size for n in pair(img_size)), 1)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dims[0]))
        block = {"kernels": kernels, "clipped": clipped, "qkv_bias": qkv_bias, "drop_path": drop_path_rate, "eps": eps}
        self.stages = nn.ModuleList()
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = [GMMBlock(dim, heads, head_dim, mlp_ratio, **block) for _ in range(depth)]
            self.stages.append(PiTStage(TokenPool(dims[i - 1]) if i else None, blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=eps)
        self.head = TokenHead(dims[-1], num_classes, global_pool=global_pool, drop_rate=drop_rate)
        strides = [patch_size * 2**i for i in range(len(dims))]
        self.finish(num_classes, in_chans, img_size, patch_size, dims, strides)
        self.apply(xavier)
        nn.init.normal_(self.pos_embed.grid)
        nn.init.normal_(self.pos_embed.prefix)

    @classmethod
    def feature_indices(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(range(len(settings["depths"])))

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return settings.get("patch_size", 2) * 2 ** (len(settings["depths"]) - 1)

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        stage = self.stages[index]
        if stage.pool is not None:
            tokens, size = whole(stage.pool, tokens, size)
        for block in stage.blocks:
            tokens = self.run(block, tokens, size)
        return tokens, size

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return split_positions(super().published_state(state), "pos_embedding", 1)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        stages = range(count(state, r"stages\.(\d+)\."))
        masks = [state[f"stages.{i}.blocks.0.attn.mask.sigma"].shape for i in stages]
        return {
            "dims": [dim * 2**i for i in stages],
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "num_heads": [mask[1] for mask in masks],
            "head_dim": state["stages.0.blocks.0.attn.proj.weight"].shape[1] // masks[0][1],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["stages.0.blocks.0.mlp.fc1.bias"]), dim),
            "kernels": masks[0][0],
            "qkv_bias": "stages.0.blocks.0.attn.qkv.bias" in state,
        }


def untrained(classes: int, size: int) -> tuple[Weights, ...]:
    return (Weights("untrained", size=size, crop_pct=1.0, num_classes=classes),)


# no weights are published; 32 pixels are the CIFAR and SVHN pictures, 64 those of Tiny-ImageNet
_VIT = {"dim": 192, "depth": 9, "num_heads": 12, "head_dim": 16}
_PIT = {"dims": (96, 192, 384), "depths": (2, 6, 4), "num_heads": (2, 4, 8)}
GMMS_VIT = {
    "gmm_vit_32": Variant({**_VIT, "img_size": 32, "patch_size": 4}, 2.693122, 0.1846, untrained(10, 32)),
    "gmm_vit_64": Variant({**_VIT, "img_size": 64, "patch_size": 8}, 2.757440, None, untrained(200, 64)),
}
GMMS_PIT = {
    "gmm_pit_32": Variant({**_PIT, "img_size": 32, "patch_size": 2}, 6.973186, None, untrained(10, 32)),
    "gmm_pit_64": Variant({**_PIT, "img_size": 64, "patch_size": 4}, 7.049792, None, untrained(200, 64)),
}

register(GMMViT, GMMS_VIT)
register(GMMPiT, GMMS_PIT)


# the mask on timm's models


class _Grid:
    """The patch grid of the picture that passes through a model."""

    size: tuple[int, int] | None = None


class _MaskedAttention(Attention):
    """timm's attention of ViT and PiT, its logits multiplied by `gaussian`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if is_causal:
            raise ValueError("is_causal: the Gaussian mask is for attention in both directions")
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = self.gaussian(self.q_norm(q) * self.scale @ self.k_norm(k).mT, self.gaussian_grid.size)
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
        x = (self.attn_drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        x = self.norm(x)
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class _MaskedWindows(WindowAttention):
    """timm's window attention: scaled logits times `gaussian`, then the relative positions and the shift's mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.gaussian(q * self.scale @ k.mT, self.window_size) + self._get_rel_pos_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        x = (self.attn_drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class _MaskedTalkingHeads(TalkingHeadAttn):
    """timm's attention of CaiT: `gaussian` after the scale, before the heads are mixed."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.gaussian(q * self.scale @ k.mT, self.gaussian_grid.size)
        scores = self.proj_l(scores.movedim(1, -1)).movedim(-1, 1).softmax(-1)
        scores = self.attn_drop(self.proj_w(scores.movedim(1, -1)).movedim(-1, 1))
        return self.proj_drop(self.proj((scores @ v).transpose(1, 2).flatten(2)))


_MASKED = {Attention: _MaskedAttention, WindowAttention: _MaskedWindows, TalkingHeadAttn: _MaskedTalkingHeads}


def add_gaussian_mask(model: nn.Module, kernels: int = 5, *, clipped: bool = False) -> nn.Module:
    """Put a `GaussianMixtureMask` on every self-attention of timm's ViT, Swin, CaiT or PiT; returns the model itself.

    The model's own tensors keep their names, so its weights load as before; each attention gains `gaussian.sigma` and
    `gaussian.alpha`. Class and register tokens are spared. The grid is taken from the picture, or is the window.

    Raises:
        ValueError: a model that has no attention of these kinds.
    """
    grid, found = _Grid(), 0
    for module in list(model.modules()):
        if type(module) not in _MASKED:
            continue
        mask = GaussianMixtureMask(module.num_heads, kernels, clipped=clipped)
        module.gaussian = mask.to(next(module.parameters()))
        module.gaussian_grid = grid
        module.__class__ = _MASKED[type(module)]
        found += 1
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that takes the mask; it goes on timm's ViT, Swin, "
                         "CaiT and PiT")  # fmt: skip
    stages = [m for m in model.modules() if isinstance(m, Transformer)]
    for stage in stages:
        stage.register_forward_pre_hook(lambda _stage, inputs: setattr(grid, "size", tuple(inputs[0][0].shape[-2:])))
        if stage.pool is not None:
            stage.pool.register_forward_hook(lambda _p, _x, out: setattr(grid, "size", tuple(out[0].shape[-2:])))
    embed = getattr(model, "patch_embed", None)
    if embed is not None and not stages and hasattr(embed, "patch_size"):
        patch = pair(embed.patch_size)
        embed.register_forward_pre_hook(
            lambda _embed, inputs: setattr(
                grid, "size", tuple(-(-n // p) for n, p in zip(inputs[0].shape[-2:], patch, strict=True))
            )
        )
    return model
