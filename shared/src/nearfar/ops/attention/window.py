"""Attention of every position to its neighbourhood, by shifting maps: no buffer of k^d copies of the channels."""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
        total = weight * shifted if total is None else total.addcmul_(weight, shifted)  # needs no new map
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
