<<<<<<< HEAD
"""Attention of every position to its neighbourhood, by shifting maps: no buffer of k^d copies of the channels."""

import itertools
from collections.abc import Iterator, Sequence
=======
"""Self-attention inside windows of a grid, with a bias for every relative position and optional shift."""
>>>>>>> 393bd2d (DRCT and CATANet with their operators, MATLAB's resizing and the protocol's scores)

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

<<<<<<< HEAD
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.common.precision import full_precision
from nearfar.ops.common.tables import cached_table

BORDERS = ("zero", "mask")
"""What lies outside the grid: zero keys and values that take part in the softmax, or nothing."""


def window_products(
    query: Float[Tensor, "b h d *s"],
    key: Float[Tensor, "b h d *s"],
    kernel_size: Sequence[int],
    dilation: int = 1,
    *,
    causal: bool = False,
) -> Float[Tensor, "b h k *s"]:
    """A_o(p) = sum_d q_d(p) k_d(p + dilation o): every query with the keys of its neighbourhood, 0 outside the grid.

    Offsets o run row-major over the kernel, from its first corner on; with `causal` the window ends at p.
    Cost k d a position; one map per offset is kept.
    """
    rows = [(query * shifted).sum(2) for shifted in _shifts(key, kernel_size, dilation, causal)]
    return torch.stack(rows, 2)


def window_sums(
    weights: Float[Tensor, "b h k *s"],
    value: Float[Tensor, "b h d *s"],
    kernel_size: Sequence[int],
    dilation: int = 1,
    *,
    causal: bool = False,
) -> Float[Tensor, "b h d *s"]:
    """O_d(p) = sum_o a_o(p) v_d(p + dilation o), with the offsets of `window_products`."""
    total: Tensor | None = None
    for weight, shifted in zip(weights.split(1, 2), _shifts(value, kernel_size, dilation, causal), strict=True):
        total = weight * shifted if total is None else torch.addcmul(total, weight, shifted)
    assert total is not None
    return total


def window_attention(
    query: Float[Tensor, "b h d *s"],
    key: Float[Tensor, "b h d *s"],
    value: Float[Tensor, "b h e *s"],
    kernel_size: Sequence[int],
    dilation: int = 1,
    *,
    scale: float | None = None,
    border: str = "zero",
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "b h e *s"]:
    """sum_o softmax_o(scale q(p) . k(p + o)) v(p + o) over the neighbourhood; scale is d^-1/2 where None.

    With border="zero" a place outside the grid has the logit 0 and the value 0 and takes its share of the softmax; with
    "mask" it has none. `causal` (one axis) always masks.
    """
    scale = query.shape[2] ** -0.5 if scale is None else scale
    logits = window_products(query * scale, key, kernel_size, dilation, causal=causal)
    if border == "mask" or causal:
        outside = _outside(tuple(query.shape[3:]), tuple(kernel_size), dilation, causal, query.device)
        logits = logits.masked_fill(outside, float("-inf"))
    weights = F.dropout(logits.softmax(2), dropout) if dropout else logits.softmax(2)
    return window_sums(weights, value, kernel_size, dilation, causal=causal)


def _pads(kernel_size: Sequence[int], dilation: int, causal: bool) -> list[tuple[int, int]]:
    reach = [dilation * (k - 1) for k in kernel_size]
    return [(r, 0) if causal else (r // 2, r // 2) for r in reach]


def _shifts(x: Tensor, kernel_size: Sequence[int], dilation: int, causal: bool) -> Iterator[Tensor]:
    """x at every offset of the window, as views of one padded copy."""
    size = x.shape[3:]
    pads = _pads(kernel_size, dilation, causal)
    padded = F.pad(x, [n for pair in reversed(pads) for n in pair])
    for offset in itertools.product(*map(range, kernel_size)):
        view = padded
        for axis, (o, n) in enumerate(zip(offset, size, strict=True)):
            view = view.narrow(axis + 3, dilation * o, n)
        yield view


@cached_table
def _outside(
    size: tuple[int, ...], kernel_size: tuple[int, ...], dilation: int, causal: bool, device: torch.device
) -> Tensor:
    """Which places of every window lie outside the grid, (k, *S)."""
    inside = torch.ones(1, 1, 1, *size)
    rows = [view[0, 0, 0] for view in _shifts(inside, kernel_size, dilation, causal)]
    return (torch.stack(rows) == 0).to(device)


class MSAConv(nn.Module):
    """relu(conv(W(x) + x)): window attention W with 1x1-convolution queries, keys and values, then a convolution.

    The layer of TiC (arXiv 2310.04134) as its released code computes it: W = `window_attention` with zero keys outside
    the grid (border="zero"), float32 at least, one head of scale C^-1/2 and dropout of the weights in training; the
    output convolution has the same kernel, a stride, its own padding and no dilation. Several heads, each a contiguous
    share of the channels, are the paper's; border="mask" leaves places outside the grid out of the softmax. With
    `causal` (dims=1) both windows end at the position itself and what lies before the start is masked.
    `forward` maps (B, C, *S) to (B, out_channels, *T), any size; cost per position 3 C^2 + 2 k C + k C out_channels.

    Args:
        in_channels, out_channels: widths C and of the output.
        kernel_size: odd, one number or one per axis.
        stride: of the output convolution.
        dilation: of the attention window.
        padding: of the output convolution; None keeps the size at stride 1.
        bias: of the output convolution.
        num_heads, dropout, border: of the attention.
        dims, causal: grid axes, and whether a position sees only itself and what is before it.

    Raises:
        ValueError: an even kernel, heads that do not divide the channels, another border, causal in a plane.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int | Sequence[int] | None = None,
        bias: bool = False,
        num_heads: int = 1,
        dropout: float | int = 0.1,
        border: str = "zero",
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        kernel = (kernel_size,) * dims if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != dims or any(k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd and positive, one number or {dims}")
        if num_heads < 1 or in_channels % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide in_channels={in_channels}")
        if border not in BORDERS:
            raise ValueError(f"border is {border!r}; allowed are {', '.join(BORDERS)}")
        if causal and padding is not None:
            raise ValueError("causal=True pads on the left by itself; leave padding out")
        self.kernel_size, self.dilation, self.num_heads = kernel, dilation, num_heads
        self.dropout, self.border, self.causal = dropout, border, causal
        if padding is None:
            padding = 0 if causal else tuple(k // 2 for k in kernel)
        conv = CONVOLUTIONS[dims]
        self.qkv_conv = conv(in_channels, 3 * in_channels, 1)
        self.mlp = conv(in_channels, out_channels, kernel, stride, padding, bias=bias)

    def attend(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """The attention alone, without the residual."""
        qkv = self.qkv_conv(x)
        with full_precision(x):
            qkv = (qkv if qkv.dtype == torch.float64 else qkv.float()).contiguous()  # shifts of channels-last are slow
            query, key, value = (part.unflatten(1, (self.num_heads, -1)) for part in qkv.chunk(3, 1))
            mixed = window_attention(
                query,
                key,
                value,
                self.kernel_size,
                self.dilation,
                border=self.border,
                causal=self.causal,
                dropout=self.dropout if self.training else 0.0,
            )
        return mixed.flatten(1, 2).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *t"]:
        mixed = self.attend(x) + x
        if self.causal:
            mixed = F.pad(mixed, (self.kernel_size[0] - 1, 0))
        return torch.relu(self.mlp(mixed))
=======
from nearfar.ops.common.dims import check_dims
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
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** dims, num_heads))
        self.out = nn.Linear(dim, dim)
        self.bias = Derived()
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        sides, axes = x.shape[2:], tuple(range(1, self.dims + 1))
        if len(sides) != self.dims or any(side % self.window_size for side in sides):
            raise ValueError(
                f"the grid is {tuple(sides)}; WindowAttention takes {self.dims} sides that are multiples of "
                f"window_size = {self.window_size}"
            )
        qkv = self.qkv(x.movedim(1, -1))
        if self.shift:
            qkv = qkv.roll([-self.shift] * self.dims, axes)
        y = self.attend(self.windows(qkv))
        counts = [side // self.window_size for side in sides]
        # (B, *counts, *window, C) -> (B, count, window, count, window ..., C)
        order = [0, *(axis + k * self.dims for axis in axes for k in (0, 1)), 2 * self.dims + 1]
        y = y.reshape(len(x), *counts, *(self.window_size,) * self.dims, -1).permute(order)
        y = y.reshape(len(x), *sides, -1)
        if self.shift:
            y = y.roll([self.shift] * self.dims, axes)
        return self.out(y).movedim(-1, 1)

    def windows(self, qkv: Float[Tensor, "b *s e"]) -> Float[Tensor, "b *n w e"]:
        """The grid as a grid of windows, each a list of positions in row-major order."""
        cut = qkv
        for axis in range(1, self.dims + 1):
            cut = cut.unflatten(2 * axis - 1, (-1, self.window_size))
        order = [0, *range(1, 2 * self.dims, 2), *range(2, 2 * self.dims + 1, 2), 2 * self.dims + 1]
        return cut.permute(order).flatten(self.dims + 1, 2 * self.dims)

    def attend(self, qkv: Float[Tensor, "b *n w e"]) -> Float[Tensor, "b *n w c"]:
        """Attention inside each window; the last of every shifted axis apart, since it sees two ends of the grid."""
        bias = self.bias.get(self.bias_table, (), self.biases)
        if not self.shift:
            return self.attend_alike(qkv, bias)

        def along(part: Tensor, axis: int, ends: tuple[bool, ...]) -> Tensor:
            if axis > self.dims:
                if not any(ends):
                    return self.attend_alike(part, bias)
                apart = two_ends(self.window_size, self.shift, ends, bias.device)
                return self.attend_alike(part, bias.masked_fill(apart, float("-inf")))
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
>>>>>>> 393bd2d (DRCT and CATANet with their operators, MATLAB's resizing and the protocol's scores)
