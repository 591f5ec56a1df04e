"""The other hosts of the Gaussian mixture mask: Swin, CaiT and T2T-ViT for small pictures.

"RetNet Viewed through Convolution" (arXiv 2309.05375) puts its mask on five networks for pictures of 32 and 64 pixels;
ViT and PiT stand in `gaussian_mask`. No weights are published; sizes, and parameters at 32 pixels, are the published.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.checkpoints import count, ratio
from nearfar.ops.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from nearfar.ops.attention.shifted_window import WindowAttention
from nearfar.ops.common.heads import from_heads, to_heads
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath
from nearfar.ops.common.tables import cached_table
from nearfar.vision.models.gaussian_mask import GMMBlock, MaskedModel, untrained, xavier
from nearfar.vision.models.pyramid import Backbone, Head, Stage, init_weights
from nearfar.vision.models.registry import Variant, register
from nearfar.vision.models.tokens import Mlp, PatchEmbed, Positions, State, TokenHead, pair, picture_size
from nearfar.vision.tracing import whole

# CaiT


class TalkingMaskAttention(GaussianMaskAttention):
    """`GaussianMaskAttention` whose heads are mixed twice: masked logits by one matrix, weights by another."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, **settings: Any) -> None:
        super().__init__(dim, num_heads, head_dim, **settings)
        self.before, self.after = (nn.Parameter(torch.randn(num_heads, num_heads)) for _ in range(2))

    def weigh(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return talk(self.mask(query @ (key * self.head_dim**-0.5).mT, grid), self.before, self.after), value


def talk(logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Heads mixed by `before`, softmax, heads mixed by `after`; (B, heads, N, M), matrices (from, to)."""
    logits = torch.einsum("bhij,hg->bgij", logits, before)
    return torch.einsum("bhij,hg->bgij", logits.softmax(-1), after)


class TalkingClassAttention(nn.Module):
    """What the class token reads from itself and the patches, with heads mixed as in `TalkingMaskAttention`."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * num_heads * head_dim, bias=qkv_bias)
        self.before, self.after = (nn.Parameter(torch.randn(num_heads, num_heads)) for _ in range(2))
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def weigh(self, token: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.kv(torch.cat((token, patches), dim=1)).chunk(2, dim=-1)
        query, key, value = (to_heads(x, self.num_heads) for x in (self.q(token), key, value))
        return talk(query @ key.mT * self.head_dim**-0.5, self.before, self.after), value

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        weights, value = self.weigh(token, patches)
        return self.proj(from_heads(weights @ value))


class CaiTBlock(nn.Module):
    """x + DP(s1 A(LN(x))), then x + DP(s2 MLP(LN(x))), with a scale a channel that starts at `layer_scale`."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attn, Mlp(dim, round(mlp_ratio * dim))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, other: Any) -> Tensor:
        """`other`: the grid of the patches `x`, or, where `x` is the class token, the patches."""
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x), other))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class GMMCaiT(MaskedModel):
    """Patches with learned positions, `CaiTBlock`s with masks, class attention without, norm, classifier.

    The class token joins behind the patches' blocks and reads them as they are. Input as in `GMMViT`.

    Args:
        dim, depth, num_heads, head_dim: channels, blocks of the patches, heads and their width.
        class_layers: blocks of the class token.
        layer_scale: initial scales; None for 0.1, from block 19 on 1e-5, from block 25 on 1e-6, as published.
        Others as in `GMMViT`.
    """

    min_size = 8

    def __init__(
        self,
        dim: int = 108,
        depth: int = 24,
        num_heads: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        head_dim: int = 64,
        class_layers: int = 2,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        mlp_ratio: float = 384 / 108,
        kernels: int = 5,
        clipped: bool = False,
        qkv_bias: bool = False,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.pos_embed = Positions(dim, tuple(n // patch_size for n in pair(img_size)))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))

        def scale(index: int) -> float:
            return layer_scale if layer_scale is not None else 0.1 if index < 18 else 1e-5 if index < 24 else 1e-6

        width = {"num_heads": num_heads, "head_dim": head_dim, "qkv_bias": qkv_bias}
        self.blocks = nn.ModuleList(
            CaiTBlock(
                dim,
                TalkingMaskAttention(dim, **width, kernels=kernels, clipped=clipped),
                mlp_ratio,
                scale(i),
                drop_path_rate,
            )
            for i in range(depth)
        )
        self.class_blocks = nn.ModuleList(
            CaiTBlock(dim, TalkingClassAttention(dim, **width), mlp_ratio, scale(i)) for i in range(class_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth)
        self.apply(xavier)
        nn.init.normal_(self.pos_embed.grid)

    def embed(self, x: Tensor) -> State:
        patches, size = whole(self.patch_embed, x)
        return whole(self.pos_embed, patches, size), size

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        return self.run(self.blocks[index], tokens, size), size

    def split(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        token = tokens.new_zeros(1, 0, tokens.shape[2]) if self.cls_token is None else self.cls_token
        return token.expand(tokens.shape[0], -1, -1), tokens

    def prefix_at(self, index: int) -> int:
        return 0

    def conclude(self, tokens: Tensor) -> Tensor:
        """The class token, after its blocks, before the patches, all normed."""
        if self.cls_token is None:
            return self.norm(tokens)
        token = self.with_prefix(tokens)[:, :1]
        for block in self.class_blocks:
            token = self.run(block, token, tokens)
        return self.norm(torch.cat((token, tokens), dim=1))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.class_blocks = nn.ModuleList()
        return take

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer decay: patches, every block, class blocks, norm and head."""
        last = [(r"^class_blocks\.(\d+)", (99998,)), (r"^cls_token", (99998,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed|^pos_embed", "blocks": [(r"^blocks\.(\d+)", None), *last]}

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        kernels, heads = state["blocks.0.attn.mask.sigma"].shape[:2]
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_heads": heads,
            "head_dim": state["blocks.0.attn.proj.weight"].shape[1] // heads,
            "class_layers": count(state, r"class_blocks\.(\d+)\."),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / dim,
            "kernels": kernels,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }


# T2T-ViT


class TokensToToken(nn.Module):
    """A picture (B, C, H, W) to tokens (B, N, D) and their grid: neighbourhoods, attention, neighbourhoods.

    Windows of side 2 s - 1 at stride s become tokens of `hidden` channels through one masked head of attention,
    v + W_o A(LN(x)), and a feed-forward of the same width; windows of 3 x 3 of these at stride 2 are normed and mapped
    to D. Yuan et al., "Tokens-to-Token ViT" (ICCV 2021).
    """

    def __init__(
        self, in_chans: int, dim: int, hidden: int, stride: int, *, kernels: int, clipped: bool, qkv_bias: bool
    ) -> None:
        super().__init__()
        self.stride, self.window = stride, 2 * stride - 1
        wide = in_chans * self.window**2
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(wide), nn.LayerNorm(hidden), nn.LayerNorm(9 * hidden)
        self.qkv = nn.Linear(wide, 3 * hidden, bias=qkv_bias)
        self.mask = GaussianMixtureMask(1, kernels, clipped=clipped)
        self.out, self.mlp = nn.Linear(hidden, hidden), Mlp(hidden, hidden)
        self.proj = nn.Linear(9 * hidden, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        size = (x.shape[2] // self.stride, x.shape[3] // self.stride)
        x = self.norm1(F.unfold(x, self.window, padding=self.window // 2, stride=self.stride).mT)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        scores = self.mask((query @ (key * key.shape[-1] ** -0.5).mT)[:, None], size)[:, 0]
        x = value + self.out(scores.softmax(-1) @ value)
        x = x + self.mlp(self.norm2(x))
        x = F.unfold(x.mT.unflatten(2, size), 3, padding=1, stride=2).mT
        return self.proj(self.norm3(x)), (size[0] // 2, size[1] // 2)


class Sinusoids(nn.Module):
    """x + P, P(n, 2i) = sin(n / 10000^(2i / C)), P(n, 2i + 1) = cos(the same), for tokens (B, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[2]
        rates = 10000 ** (-2 * torch.arange((width + 1) // 2, device=x.device) / width)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates
        return x + torch.stack((angles.sin(), angles.cos()), 2).flatten(1)[:, :width].to(x.dtype)


class GMMT2T(MaskedModel):
    """`TokensToToken`, class token, fixed sinusoidal positions, `GMMBlock`s, norm, classifier of the class token.

    The masks spare the class token. The description of the published network speaks of two attentions before the
    blocks; its parameters and multiply-accumulates are those of one, which is what stands here.
    Input (B, in_chans, H, W) with sides that are multiples of `patch_size`, 4 for pictures of 32 pixels, 8 of 64.

    Args:
        dim, depth, num_heads: channels, blocks, heads.
        hidden: channels of the tokens before the blocks.
        patch_size: stride of all, 4 or 8.
        Others as in `GMMViT`.

    Raises:
        ValueError: an odd patch_size.
    """

    FIRST_CONV = "patch_embed.qkv"
    min_size = 8

    def __init__(
        self,
        dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        hidden: int = 64,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        mlp_ratio: float = 2.0,
        kernels: int = 5,
        clipped: bool = False,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size is {patch_size}; it must be even")
        self.dynamic_img_pad = dynamic_img_pad
        mask = {"kernels": kernels, "clipped": clipped, "qkv_bias": qkv_bias}
        self.patch_embed = TokensToToken(in_chans, dim, hidden, patch_size // 2, **mask)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.positions = Sinusoids()
        self.blocks = nn.ModuleList(
            GMMBlock(dim, num_heads, dim // num_heads, mlp_ratio, drop_path=drop_path_rate, **mask)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth)
        self.apply(xavier)

    def embed(self, x: Tensor) -> State:
        patches, size = whole(self.patch_embed, x)
        return whole(self.positions, self.with_prefix(patches)), size

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        return self.run(self.blocks[index], tokens, size), size

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in `TokenModel`; for other channels the first norm and map become their means, of the same sum."""
        state, taps = dict(state), self.patch_embed.window**2
        for part in ("norm1.weight", "norm1.bias", "qkv.weight"):
            name = f"patch_embed.{part}"
            if name in state and state[name].shape[-1] != self.in_chans * taps:
                value = state[name].unflatten(-1, (-1, taps))
                mean = value.mean(-2, keepdim=True) * (value.shape[-2] / self.in_chans if part == "qkv.weight" else 1)
                state[name] = mean.expand(*value.shape[:-2], self.in_chans, taps).flatten(-2)
        return super().fit_state(state)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim = state["patch_embed.proj.weight"].shape[0]
        hidden, wide = state["patch_embed.out.weight"].shape[0], state["patch_embed.qkv.weight"].shape[1]
        kernels, heads = state["blocks.0.attn.mask.sigma"].shape[:2]
        patch = next(p for p in (4, 8, 2, 16) if wide % (p - 1) ** 2 == 0)  # windows of 3, 7, 1, 15
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_heads": heads,
            "hidden": hidden,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": wide // (patch - 1) ** 2,
            "img_size": 8 * patch,
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
            "kernels": kernels,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }


# Swin


class MaskedWindowAttention(WindowAttention):
    """Attention in windows: logits times the mask, then the biases of relative positions, then the shift's cut.

    Every window has the mask of its own grid. Grids that windows do not fill gain zeros at their end, which take part.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, *, kernels: int, clipped: bool) -> None:
        super().__init__(dim, num_heads, window_size, shift)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)  # plain ones, which are saved
        self.mask = GaussianMixtureMask(num_heads, kernels, clipped=clipped)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        filled = F.pad(x, (0, -width % self.window_size, 0, -height % self.window_size))
        return super().forward(filled)[..., :height, :width]

    def attend(self, qkv: Tensor, end: bool = True) -> Tensor:
        windows = qkv.flatten(0, 2)
        query, key, value = windows.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.mask(query * self.scale @ key.mT, (self.window_size,) * 2) + self.biases()
        if self.shift:
            cut = _ends_apart(qkv.shape[1], qkv.shape[2], self.window_size, self.shift, qkv.device)
            scores = scores.unflatten(0, (-1, cut.shape[0])).masked_fill(cut[:, None], -torch.inf).flatten(0, 1)
        return from_heads(scores.softmax(-1) @ value).reshape(*qkv.shape[:-1], -1)


@cached_table
def _ends_apart(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which pairs of positions of every window come from different ends of a shifted grid, (windows, w^2, w^2)."""
    ends = [torch.arange(n * window) >= n * window - shift for n in (rows, columns)]
    side = (2 * ends[0][:, None] + ends[1].int()).unflatten(1, (-1, window)).unflatten(0, (-1, window))
    side = side.transpose(1, 2).flatten(0, 1).flatten(1)
    return (side[:, :, None] != side[:, None]).to(device)


class SwinBlock(nn.Module):
    """x + DP(A(LN(x))), then x + DP(MLP(LN(x))) on (B, C, H, W)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (ChannelNorm(dim, eps=1e-5) for _ in range(2))
        self.attn, hidden = attn, int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), GELU(), nn.Conv2d(hidden, dim, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """The four positions of every 2 x 2 side by side, normed, mapped to `out` channels; an odd end gains zeros."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = ChannelNorm(4 * dim, eps=1e-5), nn.Conv2d(4 * dim, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.reduction(self.norm(F.pixel_unshuffle(x, 2)))


class PositionedPatches(nn.Module):
    """Patches, norm, learned positions: (B, C, H, W) to (B, D, H / P, W / P), zeros added where P does not divide."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj, self.norm = nn.Conv2d(in_chans, dim, patch_size, patch_size), ChannelNorm(dim, eps=1e-5)
        self.positions = Positions(dim, grid)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))))
        return x + self.positions.at(tuple(x.shape[2:])).mT.unflatten(2, x.shape[2:])


class GMMSwin(Backbone):
    """Patches with learned positions, stages of `SwinBlock`s whose windows have masks, patch merging, classifier.

    Input (B, in_chans, H, W) of at least the last stride times the window; zeros fill what windows and merging leave.

    Args:
        dims, depths, num_heads: channels, blocks and heads of each stage.
        window_size: side of the windows; every second block shifts them by half where the stage has more than one.
        img_size: of the position table, and of the pictures that the shifts are decided for.
        drop_path_rate: stochastic depth, the same in every block, as published.
        Others as in `GMMViT`.

    Raises:
        ValueError: lists of different lengths.
    """

    FIRST_CONV = "stem.proj"
    min_size = 32

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (3, 6, 12),
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        window_size: int = 4,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        mlp_ratio: float = 2.0,
        kernels: int = 5,
        clipped: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims {dims}, depths {depths} and num_heads {num_heads} differ in length")
        grid = tuple(n // patch_size for n in pair(img_size))
        self.stem = PositionedPatches(in_chans, dims[0], patch_size, grid)
        self.stages = nn.ModuleList()
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            shift = window_size // 2 if min(grid) // 2**i > window_size else 0
            mask = {"kernels": kernels, "clipped": clipped}
            attentions = [MaskedWindowAttention(dim, heads, window_size, j % 2 * shift, **mask) for j in range(depth)]
            blocks = [SwinBlock(dim, attention, mlp_ratio, drop_path_rate) for attention in attentions]
            self.stages.append(Stage(PatchMerging(dims[i - 1], dim) if i else nn.Identity(), blocks))
        norm = ChannelNorm(dims[-1], eps=1e-5)
        self.head = Head(dims[-1], num_classes, norm, norm_first=True, global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, dims, [patch_size * 2**i for i in range(len(dims))])
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Positions, tables of biases and masks."""
        ends = ("positions.grid", "bias_table", "mask.sigma", "mask.alpha")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return settings.get("patch_size", 2) * 2 ** (len(settings["depths"]) - 1)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = range(count(state, r"stages\.(\d+)\."))
        dim, in_chans, patch, _ = state["stem.proj.weight"].shape
        masks = [state[f"stages.{i}.blocks.0.attn.mask.sigma"].shape for i in stages]
        return {
            "dims": [len(state[f"stages.{i}.blocks.0.norm1.weight"]) for i in stages],
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages],
            "num_heads": [mask[1] for mask in masks],
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "window_size": (math.isqrt(len(state["stages.0.blocks.0.attn.bias_table"])) + 1) // 2,
            "img_size": picture_size(state["stem.positions.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["stages.0.blocks.0.mlp.0.bias"]), dim),
            "kernels": masks[0][0],
        }


def _sizes(name: str, small: float, large: float, patch_size: int, **settings: Any) -> dict[str, Variant]:
    """The variants for pictures of 32 pixels and 10 classes, and of 64 pixels and 200, twice the patch."""
    return {
        f"{name}_{size}": Variant(
            {**settings, "img_size": size, "patch_size": patch_size * size // 32},
            params,
            None,
            untrained(classes, size),
        )
        for size, params, classes in ((32, small, 10), (64, large, 200))
    }


_SWIN = {"dims": (96, 192, 384), "depths": (2, 6, 4), "num_heads": (3, 6, 12), "window_size": 4}
GMMS_SWIN = _sizes("gmm_swin", 7.074088, 7.150694, 2, **_SWIN)
GMMS_CAIT = _sizes("gmm_cait", 5.079794, 5.116056, 4, dim=108, depth=24, num_heads=4, head_dim=64)
GMMS_T2T = _sizes("gmm_t2t", 6.486570, 6.558680, 4, dim=256, depth=12, num_heads=4, hidden=64)

register(GMMSwin, GMMS_SWIN)
register(GMMCaiT, GMMS_CAIT)
register(GMMT2T, GMMS_T2T)
