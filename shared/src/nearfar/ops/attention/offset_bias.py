"""Attention over a small grid with a learned bias for every pair of absolute offsets."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.heads import join_heads, split_heads
from nearfar.ops.common.tables import Derived
from nearfar.ops.convolution.lsconv import ConvNorm


class OffsetBiasAttention(nn.Module):
    """Wo ReLU(softmax(q k^T / sqrt(d_k) + B) v) with B[head, i, j] = table[head, |di|, |dj|] and q = BN(DW3(Wq x)).

    The last-stage attention of LSNet (Wang et al. 2025), in the way of LeViT (2021). Projections are 1x1 convolutions
    with batch norm, of channel order all queries, all keys, all values, each head by head; values have C / heads
    channels a head. The table holds resolution^2 offsets, row-major. At other sizes it is resized bicubically to
    H x W, as the published converter does; the published code runs at the one size only.
    `forward` maps (B, C, H, W) to (B, C, H, W); cost O(N^2 (C + d_k heads)).

    Args:
        dim: channels C.
        num_heads: heads.
        key_dim: channels of a query or key, d_k.
        resolution: side of the grid whose offsets the table holds.

    Raises:
        ValueError: heads that do not divide `dim`, a resolution below 1.
    """

    def __init__(self, dim: int, num_heads: int = 4, key_dim: int = 16, resolution: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if resolution < 1:
            raise ValueError(f"resolution is {resolution}; it must be at least 1")
        self.num_heads, self.key_dim = num_heads, key_dim
        keys = num_heads * key_dim
        self.splits = (keys, keys, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))
        self.spread = Derived()
        self.qkv = ConvNorm(dim, dim + 2 * keys)
        self.dw = ConvNorm(keys, keys, 3, depthwise=True)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, norm_weight=0.0))

    def bias(self, height: int, width: int) -> Float[Tensor, "h n n"]:
        """B for a grid of height x width."""
        return self.spread.get(self.attention_biases, (height, width), lambda: self.spread_table(height, width))

    def spread_table(self, height: int, width: int) -> Float[Tensor, "h n n"]:
        side = math.isqrt(self.attention_biases.shape[1])
        table = self.attention_biases.reshape(self.num_heads, side, side)
        # a traced graph serves all sizes; to the same size this changes nothing
        if torch.compiler.is_compiling() or (height, width) != (side, side):
            table = F.interpolate(table[None], size=(height, width), mode="bicubic", align_corners=False)[0]
        rows, columns = (torch.arange(n, device=table.device) for n in (height, width))
        rows, columns = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
        grid = table[:, rows[:, None, :, None], columns[None, :, None, :]]
        return grid.flatten(3).flatten(1, 2)

    def heads(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, heads, N, d)."""
        query, key, value = self.qkv(x).split(self.splits, dim=1)
        return tuple(split_heads(part, self.num_heads) for part in (self.dw(query), key, value))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        query, key, value = self.heads(x)
        # values are wider than keys, which the CPU's fused kernel does not take
        return self.proj(join_heads(self.weigh(query, key, *x.shape[-2:]) @ value, *x.shape[-2:]))

    def weigh(self, query: Tensor, key: Tensor, height: int, width: int) -> Float[Tensor, "b heads n n"]:
        bias = self.bias(height, width).to(query.dtype)
        return torch.add(bias, query @ key.mT, alpha=self.key_dim**-0.5).softmax(-1)

    def attention_map(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n n"]:
        """The attention weights, rows summing to one: for every query position its weight on every position."""
        query, key, _ = self.heads(x)
        return self.weigh(query, key, *x.shape[-2:])
