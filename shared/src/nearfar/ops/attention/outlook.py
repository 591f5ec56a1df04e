"""Attention within small windows whose weights each centre predicts without comparing anything."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.attention.self_attention import POOLS
from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.heads import check_heads


class OutlookAttention(nn.Module):
    """y = W_o fold(softmax(A / sqrt(d)) unfold(W_v x)), A = W_a pool(x): a K x K matrix for every window, K = k^dims.

    Yuan et al., "VOLO: Vision Outlooker for Visual Recognition" (2021), section 3.1. Windows of k cells an axis, one
    around every `stride`-th cell, zeros outside. From the mean of its cells (fewer at an edge) each predicts, head by
    head, what every one of its K places takes from the K values in it; overlapping windows are summed, and what falls
    outside the grid is dropped. (B, C, *S) to the same; 1 to 3 axes (in 3-D A has 3^6 entries a head). `causal` (one
    axis, stride 1): the window begins at its cell and place p takes from places q <= p.
    Cost O(N C (C + K^2 / stride^dims)).

    Args:
        dim: channels C. num_heads: heads, of d = C / heads channels.
        kernel_size: k; odd unless causal. stride: distance of windows, at most (k + 1) / 2 so that they cover the grid.
        bias: whether W_v has one.

    Raises ValueError for sizes that do not go together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        bias: bool = False,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_heads(dim, num_heads)
        if kernel_size < 1 or (kernel_size % 2 == 0 and not causal):
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd and positive (causal: positive)")
        if not 1 <= stride <= (1 if causal else (kernel_size + 1) // 2):
            raise ValueError(
                f"stride is {stride}; allowed is 1 to (kernel_size + 1) / 2 with kernel_size={kernel_size}, causal 1"
            )
        self.num_heads, self.kernel_size, self.stride, self.dims = num_heads, kernel_size, stride, dims
        self.causal, self.pad = causal, 0 if causal else kernel_size // 2
        self.scale = (dim // num_heads) ** -0.5
        places = kernel_size**dims
        self.v = nn.Linear(dim, dim, bias=bias)
        self.attn = nn.Linear(dim, num_heads * places**2)
        self.proj = nn.Linear(dim, dim)

    def attention_map(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b heads windows places taps"]:
        """The weights of every window, rows summing to one."""
        return self.weigh(x).flatten(1, self.dims).movedim(2, 1)

    def attention_on_grid(self, weights: Tensor, windows: tuple[int, int], at: tuple[int, int]) -> Tensor:
        """The weights (places, taps) of the window `at`, of its middle place, on the plane that `windows` cover."""
        k, stride, pad = self.kernel_size, self.stride, self.pad
        plane = weights.new_zeros([n * stride + 2 * pad for n in windows])
        top, left = (n * stride for n in at)
        plane[top : top + k, left : left + k] = weights[len(weights) // 2].reshape(k, k)
        return plane[pad : -pad or None, pad : -pad or None]

    def weigh(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b *t heads places taps"]:
        """softmax(A / sqrt(d)) of every window."""
        if self.stride > 1:
            x = POOLS[self.dims](x, self.stride, self.stride, ceil_mode=True)
        places = self.kernel_size**self.dims
        logits = self.attn(x.movedim(1, -1)).unflatten(-1, (self.num_heads, places, places))
        if self.causal:
            future = torch.ones(places, places, dtype=torch.bool, device=x.device).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        # CPUs are slow at the softmax of a few values in a row, and fast at that of many columns
        columns = (logits * self.scale).flatten(-3, -2).mT.contiguous()
        return columns.softmax(-2).mT.unflatten(-2, (self.num_heads, places))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        size, axes = x.shape[2:], range(1, self.dims + 1)
        windows = [-(-n // self.stride) for n in size]
        reach = [self.stride * (w - 1) + self.kernel_size for w in windows]
        values = self.v(x.movedim(1, -1))
        after = [r - n - self.pad for r, n in zip(reach, size, strict=True)]
        values = F.pad(values, (0, 0, *(n for extra in reversed(after) for n in (self.pad, extra))))
        for axis in axes:
            values = values.unfold(axis, self.kernel_size, self.stride)
        values = values.unflatten(self.dims + 1, (self.num_heads, -1)).movedim(self.dims + 2, -1)
        y = self.weigh(x) @ values.flatten(self.dims + 2, -2)
        # overlapping windows are added axis by axis
        y = y.unflatten(-2, (self.kernel_size,) * self.dims)
        for axis in axes:
            y = overlap_add(y, axis, self.dims + 2, self.stride)
        for axis, n in zip(axes, size, strict=True):
            y = y.narrow(axis, self.pad, n)
        return self.proj(y.flatten(self.dims + 1)).movedim(-1, 1)


def overlap_add(x: Tensor, axis: int, taps: int, stride: int) -> Tensor:
    """Sums windows along `axis`, tap t of window w at stride w + t; the taps' axis `taps` goes."""
    windows, kernel = x.shape[axis], x.shape[taps]
    size = list(x.shape)
    size[axis] = stride * (windows - 1) + kernel
    del size[taps]
    y = x.new_zeros(size)
    for tap, values in enumerate(x.unbind(taps)):
        place = [slice(None)] * y.ndim
        place[axis] = slice(tap, tap + stride * (windows - 1) + 1, stride)
        y[tuple(place)] += values
    return y
