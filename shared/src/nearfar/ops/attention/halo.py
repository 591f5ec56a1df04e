"""Blocked local self-attention: every block of a grid attends to itself and a halo around it."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.attention.places import attend, extend, places
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.common.tables import cached_table

NEVER = -1e4
"""A logit whose weight is zero in every precision, and whose gradient stays finite."""

AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
BORDERS = ("zero", "mask")


class HaloAttention(nn.Module):
    """y[i] = sum_j softmax_j(q[i] . k[j] / sqrt(d) + sum_a q[i] . T_a[p_a(j) - p_a(i) + w - 1]) v[j], block by block.

    The grid is cut into blocks of side b. All queries i of a block share one window of side w = b + 2h, the block and
    its halo; p_a counts positions along axis a from the corner of the block for queries and from the corner of the
    window for keys, so an offset of zero means a key h to the left of its query. q, k, v are 1x1 convolutions of x, of
    channel order head by head and, in a head, first the key and then the value. There is no projection of the output.
    Vaswani et al., HaloNet (2021, arXiv 2103.12731), section 3, as timm's `HaloAttn` has it.

    Keys outside the grid are zeros that take part in the softmax with their relative logit, as in timm's code
    (`border="zero"`), or get no weight (`border="mask"`). With `stride` 2, every second position of each axis has a
    query, counted 0, 1, 2 ... against the keys' full grid, geometrically odd but what the published weights know; where
    b is odd, or with `avg_down`, attention at stride 1 is averaged over 2x2 positions instead. `pad` takes grids that
    are no multiple of b: what a last block lacks is outside the grid, as the halo is; the published code refuses them.
    `causal` (dims=1) gives the window its left halo only, w = b + h, and no weight to keys after the query.

    The relative logits never stand as a tensor of queries by keys: q . T_a[...] are w further channels of the query,
    against keys that have a one where they lie along axis a. `forward` maps (B, C, *S) to (B, out_dim, *S / stride).
    Cost O(N w^dims (d + dims w + out_dim / heads) heads), linear in N; keys and values are copied (w / b)^dims times.

    Args:
        dim, out_dim: channels in and out (`dim` if not given).
        num_heads: heads; head_dim: channels d of a query or key, by default those of a value, out_dim / heads.
        block_size, halo_size: b and h.
        scale_relative: divide the relative logits by sqrt(d) too.
        qkv_bias: biases in q, k, v; keys outside the grid are zeros nonetheless.

    Raises:
        ValueError: heads that do not divide `out_dim`, another border or stride, sizes that are no size; on a grid
            that is no multiple of b without `pad`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        *,
        stride: int = 1,
        avg_down: bool = False,
        scale_relative: bool = False,
        qkv_bias: bool = False,
        border: str = "zero",
        pad: bool = False,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        out_dim = out_dim or dim
        if num_heads < 1 or out_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide out_dim={out_dim}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"block_size is {block_size} and halo_size {halo_size}; they must be at least 1 and 0")
        if border not in BORDERS:
            raise ValueError(f"border is {border!r}; allowed are {' and '.join(map(repr, BORDERS))}")
        if stride not in (1, 2) or (stride == 2 and causal):
            raise ValueError(f"stride is {stride}; allowed are 1 and, where causal is False, 2")
        self.num_heads, self.head_dim, self.value_dim = (
            num_heads,
            head_dim or out_dim // num_heads,
            out_dim // num_heads,
        )
        self.block_size, self.halo_size, self.dims, self.causal = block_size, halo_size, dims, causal
        self.window_size = block_size + halo_size * (1 if causal else 2)
        self.pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.stride = 1 if self.pooled else stride
        self.border, self.pad, self.scale_relative = border, pad, scale_relative
        keys = num_heads * self.head_dim
        self.q = CONVOLUTIONS[dims](dim, keys, 1, stride=self.stride, bias=qkv_bias)
        self.kv = CONVOLUTIONS[dims](dim, keys + out_dim, 1, bias=qkv_bias)
        table = (2 * self.window_size - 1, self.head_dim)
        self.relative = nn.ParameterList(nn.Parameter(torch.empty(table)) for _ in range(dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal: q, k, v with standard deviation 1 / sqrt(dim), the tables with 1 / sqrt(d)."""
        for layer in (self.q, self.kv):
            nn.init.trunc_normal_(layer.weight, std=layer.in_channels**-0.5)
        for table in self.relative:
            nn.init.trunc_normal_(table, std=self.head_dim**-0.5)

    def blocks(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """How many blocks lie along each axis of a grid."""
        if not self.pad and any(n % self.block_size for n in size):
            raise ValueError(
                f"the grid is {size}; its sizes must be multiples of block_size={self.block_size}, or pad=True, "
                "which fills the last blocks up with positions outside the grid"
            )
        return tuple(-(-n // self.block_size) for n in size)

    def queries_and_keys(
        self, x: Float[Tensor, "b c *s"], blocks: tuple[int, ...]
    ) -> tuple[Float[Tensor, "z heads n d"], Float[Tensor, "z heads m d"], Float[Tensor, "z heads m e"]]:
        """Queries of every block and keys of every window, extended by the relative logits, and values."""
        query, bias = self.queries(x, blocks)
        key, value = self.windows(x, blocks)
        place = places((self.window_size,) * self.dims, x.device).to(x.dtype)
        if self.border == "mask":
            outside = _outside(tuple(x.shape[2:]), blocks, self.block_size, self.halo_size, self.causal, x.device)
            outside = outside.to(x.dtype).repeat(x.shape[0], 1)[:, None, :, None]
            place = torch.cat([place.expand(outside.shape[0], 1, -1, -1), outside], -1)
            bias = F.pad(bias, (0, 1), value=1.0)
        return *extend(query, key, bias, place, self.head_dim**-0.5), value

    def queries(
        self, x: Float[Tensor, "b c *s"], blocks: tuple[int, ...]
    ) -> tuple[Float[Tensor, "z heads n d"], Float[Tensor, "z heads n w"]]:
        """Queries of every block, and their logits for every place of a key along each axis of the window."""
        side = self.block_size // self.stride
        q = self.q(x).movedim(1, -1)
        missing = [count * side - n for count, n in zip(blocks, q.shape[1:-1], strict=True)]
        if any(missing):
            q = F.pad(q, (0, 0, *(edge for n in reversed(missing) for edge in (0, n))))
        q = _cut(q, blocks, side).unflatten(-1, (self.num_heads, -1)).movedim(-2, 1)  # (B blocks, heads, *b, d)
        offsets = _offsets(side, self.window_size, q.device)
        logits = []
        for axis, table in enumerate(self.relative, 2):
            along = torch.einsum("...qd,qkd->...qk", q.movedim(axis, -2), table[offsets])
            if self.scale_relative:
                along = along * self.head_dim**-0.5
            if self.causal:
                along = along + _future(side, self.halo_size, q.device).to(along.dtype)
            logits.append(along.movedim(-2, axis))
        return q.flatten(2, -2), torch.cat(logits, -1).flatten(2, -2)

    def windows(
        self, x: Float[Tensor, "b c *s"], blocks: tuple[int, ...]
    ) -> tuple[Float[Tensor, "z heads m d"], Float[Tensor, "z heads m e"]]:
        """Keys and values of every window."""
        h, b, w = self.halo_size, self.block_size, self.window_size
        kv = self.kv(x).movedim(1, -1)
        after = [count * b - n + (0 if self.causal else h) for count, n in zip(blocks, x.shape[2:], strict=True)]
        kv = F.pad(kv, (0, 0, *(edge for n in reversed(after) for edge in (h, n))))
        for axis in range(1, self.dims + 1):
            kv = kv.unfold(axis, w, b)
        kv = kv.movedim(self.dims + 1, -1).flatten(self.dims + 1, -2).flatten(0, self.dims)  # (B blocks, keys, C)
        kv = kv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return kv.split((self.head_dim, self.value_dim), -1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *t"]:
        blocks = self.blocks(tuple(x.shape[2:]))
        out = attend(*self.queries_and_keys(x, blocks))
        out = self.grid(out.transpose(1, 2).flatten(2), blocks, x.shape[2:]).movedim(-1, 1)
        return AVERAGE_POOLS[self.dims](out, 2) if self.pooled else out

    def grid(
        self, x: Float[Tensor, "z n c"], blocks: tuple[int, ...], size: tuple[int, ...]
    ) -> Float[Tensor, "b *s c"]:
        """What the queries of every block have, as a channels-last grid of the size that x left."""
        x = _join(x.unflatten(1, (self.block_size // self.stride,) * self.dims), blocks)
        for axis, n in enumerate(size, 1):
            x = x.narrow(axis, 0, -(-n // self.stride))
        return x

    def attention_map(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b heads n m"]:
        """The weights of every query position, before any averaging, on the w^dims keys of its block's window."""
        blocks = self.blocks(tuple(x.shape[2:]))
        query, key, _ = self.queries_and_keys(x, blocks)
        weights = (query @ key.mT).softmax(-1).transpose(1, 2)  # (B blocks, queries, heads, keys)
        weights = self.grid(weights.flatten(2), blocks, x.shape[2:]).flatten(1, -2)
        return weights.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def window(self, index: tuple[int, ...]) -> tuple[slice, ...]:
        """Where the window of the query at `index` lies on the grid of keys; it may reach over the edges."""
        corners = [n * self.stride // self.block_size * self.block_size - self.halo_size for n in index]
        return tuple(slice(corner, corner + self.window_size) for corner in corners)


def _cut(x: Float[Tensor, "b *s c"], blocks: tuple[int, ...], side: int) -> Float[Tensor, "z *t c"]:
    """A channels-last grid as blocks, (B blocks, *side, C)."""
    dims = len(blocks)
    x = x.reshape(x.shape[0], *(n for count in blocks for n in (count, side)), x.shape[-1])
    order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
    return x.permute(order).flatten(0, dims)


def _join(x: Float[Tensor, "z *t"], blocks: tuple[int, ...]) -> Float[Tensor, "b *s"]:
    """Blocks (B blocks, *side, ...) as a grid again, (B, *S, ...)."""
    dims = len(blocks)
    x = x.unflatten(0, (-1, *blocks))
    order = [0, *(axis for a in range(1, dims + 1) for axis in (a, a + dims)), *range(2 * dims + 1, x.ndim)]
    x = x.permute(order)
    for axis in range(1, dims + 1):
        x = x.flatten(axis, axis + 1)
    return x


@cached_table
def _offsets(side: int, window: int, device: torch.device) -> Tensor:
    """Row of the table for each query of a block and key of a window, along one axis."""
    return torch.arange(window, device=device) - torch.arange(side, device=device)[:, None] + window - 1


@cached_table
def _future(side: int, halo: int, device: torch.device) -> Tensor:
    """NEVER for the keys of a causal window that lie after the query."""
    return NEVER * torch.ones(side, side + halo, device=device).triu(halo + 1)


@cached_table
def _outside(
    size: tuple[int, ...], blocks: tuple[int, ...], block: int, halo: int, causal: bool, device: torch.device
) -> Tensor:
    """(blocks, window^dims): NEVER for the keys of each window that lie outside the grid, else 0."""
    window = block + halo * (1 if causal else 2)
    inside = torch.ones((), dtype=torch.bool, device=device)
    dims = len(size)
    for axis, (n, count) in enumerate(zip(size, blocks, strict=True)):
        at = torch.arange(count, device=device)[:, None] * block - halo + torch.arange(window, device=device)
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = count, window
        inside = inside & ((at >= 0) & (at < n)).reshape(shape)
    return torch.where(inside, 0.0, NEVER).reshape(math.prod(blocks), -1)
