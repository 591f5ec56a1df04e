"""Self-attention inside windows of a grid, with a bias for every relative position and optional shift."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.fused import FusedLinear
from nearfar.ops.common.tables import Derived, cached_table


class WindowAttention(nn.Module):
    """Attention of each position to those of its window of a grid of rank `dims`.

    The grid is cut into windows of w = `window_size` positions a side, after a cyclic shift by s = `shift` towards the
    origin. For the positions i, j of one window, with d = dim / num_heads,

        a_ij = softmax_j(q_i . k_j / sqrt(d) + b[i - j]),   y_i = W_o sum_j a_ij v_j

    where b is a table of (2 w - 1)^dims offsets per head. With a shift, the windows at the end of an axis hold
    positions from both ends of the grid, and only positions of one end see each other; they alone pay for a mask.

    x: (B, C, *S), every side a multiple of w -> (B, C, *S), channels-last. Cost: O(prod(S) w^dims C).
    Source: Liu et al., Swin Transformer (ICCV 2021), eq. 4. The released code adds -100 between the two ends where
    this forbids the pair, and keeps a mask of every window for one size.

    Raises ValueError for heads that do not divide dim or a shift outside [0, w).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int = 0, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide dim = {dim}")
        if not 0 <= shift < window_size:
            raise ValueError(f"shift is {shift}; it must be in [0, window_size = {window_size})")
        self.num_heads, self.window_size, self.shift, self.dims = num_heads, window_size, shift, dims
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = FusedLinear(nn.Linear(dim, 3 * dim))
        self.bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** dims, num_heads))
        self.out = FusedLinear(nn.Linear(dim, dim))
        self.bias = Derived()
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        sides = x.shape[2:]
        if len(sides) != self.dims or any(side % self.window_size for side in sides):
            raise ValueError(
                f"the grid is {tuple(sides)}; WindowAttention takes {self.dims} sides that are multiples of "
                f"window_size = {self.window_size}"
            )
        order = window_order(sides, self.window_size, self.shift, x.device)
        windows = x.flatten(2).mT.index_select(1, order.flatten()).unflatten(1, order.shape)
        y = self.inside(windows).flatten(1, -2).index_select(1, inverse(order))
        return y.mT.unflatten(2, sides)

    def inside(self, x: Float[Tensor, "b *n w c"], *, end: bool = True) -> Float[Tensor, "b *n w c"]:
        """Attention inside windows that stand as a grid, or as its rows without the last where `end` is false."""
        return self.out(self.attend(self.qkv(x), end))

    def attend(self, qkv: Float[Tensor, "b *n w e"], end: bool = True) -> Float[Tensor, "b *n w c"]:
        """Attention of each window; the last of every shifted axis apart, since it sees two ends of the grid."""
        bias = self.bias.get(self.bias_table, (), self.biases)
        if not self.shift:
            return self.attend_alike(qkv, bias)

        def along(part: Tensor, axis: int, ends: tuple[bool, ...]) -> Tensor:
            if axis > self.dims:
                if not any(ends):
                    return self.attend_alike(part, bias)
                apart = two_ends(self.window_size, self.shift, ends, bias.device)
                return self.attend_alike(part, bias.masked_fill(apart, float("-inf")))
            if axis == 1 and not end:
                return along(part, 2, (False,))
            last = part.shape[axis] - 1
            pieces = [along(part.narrow(axis, last, 1), axis + 1, (*ends, True))]
            if last:
                pieces.insert(0, along(part.narrow(axis, 0, last), axis + 1, (*ends, False)))
            return torch.cat(pieces, axis)

        return along(qkv, 1, ())

    def attend_alike(self, qkv: Float[Tensor, "b *n w e"], bias: Float[Tensor, "h w w"]) -> Float[Tensor, "b *n w c"]:
        """Attention inside windows that share one table of biases."""
        flat = qkv.flatten(0, -3)
        q, k, v = flat.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        width = v.shape[-1]
        if q.is_cuda and width % 8:  # what the fused kernels take; zeros change no product
            q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None], scale=self.scale)[..., :width]
        return y.transpose(1, 2).flatten(2).reshape(*qkv.shape[:-1], -1)

    def biases(self) -> Float[Tensor, "h w w"]:
        index = relative_positions(self.window_size, self.dims, self.bias_table.device)
        return self.bias_table[index].movedim(-1, 0).contiguous()


def window_order(sides: Sequence[int], size: int, shift: int, device: torch.device) -> Int[Tensor, "*n w"]:
    """The positions of a grid, counted in row-major order, window by window: (*counts, size^dims)."""
    dims = len(sides)
    places = torch.arange(math.prod(sides), device=device).view(*sides).roll([-shift] * dims, list(range(dims)))
    for axis in range(dims):
        places = places.unflatten(2 * axis, (-1, size))
    return places.permute(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2)).flatten(dims)


def inverse(order: Int[Tensor, "*n w"]) -> Int[Tensor, " n"]:
    """Where each position of the grid stands in `order`."""
    flat = order.flatten()
    return torch.empty_like(flat).scatter_(0, flat, torch.arange(len(flat), device=flat.device))


@cached_table
def relative_positions(size: int, dims: int, device: torch.device) -> Tensor:
    """Row of the table of offsets for every pair of positions of a window: (size^dims, size^dims)."""
    axis = torch.arange(size, device=device)
    place = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij"), -1).flatten(0, -2)
    offset = place[:, None] - place[None] + size - 1
    index = offset[..., 0]
    for i in range(1, dims):
        index = index * (2 * size - 1) + offset[..., i]
    return index


@cached_table
def two_ends(size: int, shift: int, ends: tuple[bool, ...], device: torch.device) -> Tensor:
    """Pairs of positions that come from different ends of the grid along the axes where `ends` is true."""
    axis = (torch.arange(size, device=device) >= size - shift).long()
    sides = torch.meshgrid(*[axis if end else torch.zeros_like(axis) for end in ends], indexing="ij")
    side = torch.stack(sides, -1).flatten(0, -2)
    return (side[:, None] != side[None]).any(-1)
