"""Attentive convolution: a depthwise convolution whose kernel is generated from a global summary of the input."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import CONVOLUTIONS, check_dims, check_odd
from nearfar.ops.common.layers import GELU, DepthwiseConv, linear_map
from nearfar.ops.common.pooling import pool_to
from nearfar.ops.common.precision import full_precision
from nearfar.ops.convolution.dynamic import sample_depthwise

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}


class ATConv(nn.Module):
    """Wo (K(x) * Wx x), a depthwise convolution with a kernel of the sample's own.

    K = G act(pool(Wk x)) - sigmoid(d) mean(G act(pool(Wk x))): the positions, in row-major order, are averaged in
    k^dims equal runs, projected, and a linear map G over the k^dims values, shared by all channels, makes a kernel
    per channel, from which a learned share of its own mean is taken ("lateral inhibition"). Yu et al., "Attentive
    Convolution" (2025). Wk, Wx, Wo are pointwise and biased.

    Pooling in runs makes the kernel depend on the raster order: a run is a band of rows, another input size means
    other bands, and a transposed input gives no transposed kernel. `pool="grid"` averages over a grid of k cells an
    axis instead; published weights need `pool="runs"`. The pooling comes before Wk, which gives the same
    numbers as the published order and saves C^2 N multiply-adds. The kernel is generated outside autocast.
    `forward` maps (B, C, *S) to (B, C, *S); cost 2 C^2 N + C k^dims N. Not causal.

    Args:
        dim: channels C.
        kernel_size: k, odd.
        activation: "gelu", "gelu_tanh" or "silu".
        bias: biases of the pointwise maps and of G.
        pool: "runs" or "grid".
        dims: number of grid axes, 1, 2 or 3.

    Raises:
        ValueError: an even kernel, dims outside 1..3, an unknown activation or pool.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        activation: str = "gelu",
        bias: bool = True,
        pool: str = "runs",
        *,
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_dims(dims)
        check_odd(kernel_size=kernel_size)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}")
        if pool not in ("runs", "grid"):
            raise ValueError(f"pool is {pool!r}; allowed are 'runs' and 'grid'")
        conv, taps = CONVOLUTIONS[dims], kernel_size**dims
        self.window, self.pool, self.activation = (kernel_size,) * dims, pool, ACTIVATIONS[activation]
        self.difference_control = nn.Parameter(torch.zeros(dim))
        self.kernel_proj = conv(dim, dim, 1, bias=bias)
        self.kernel_gen = nn.Linear(taps, taps, bias=bias)
        self.x_proj = conv(dim, dim, 1, bias=bias)
        self.proj = conv(dim, dim, 1, bias=bias)

    def kernel(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *k"]:
        """The kernel of every sample and channel."""
        with full_precision(x):
            x = x.to(self.difference_control.dtype)
            if self.pool == "runs":
                x, bins = x.flatten(2), (math.prod(self.window),)
            else:
                bins = self.window
            pooled = pool_to(x, bins).flatten(2).transpose(1, 2)
            pooled = F.linear(pooled, *linear_map(self.kernel_proj))
            kernel = self.kernel_gen(self.activation(pooled).transpose(1, 2))
            kernel = kernel - torch.sigmoid(self.difference_control)[:, None] * kernel.mean(-1, keepdim=True)
            return kernel.unflatten(-1, self.window)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        values = self.x_proj(x)
        return self.proj(sample_depthwise(values, self.kernel(x).to(values.dtype)))


class TokenATConv(ATConv):
    """`ATConv` on tokens (B, N, C) of a grid of `size`, row-major; without a size, of a square grid."""

    def __init__(self, dim: int, *args, size: tuple[int, ...] | None = None, **settings) -> None:
        super().__init__(dim, *args, **settings)
        self.size = size

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        size = self.size or (math.isqrt(x.shape[1]),) * len(self.window)
        if math.prod(size) != x.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens do not fill a grid of {size}; give TokenATConv its size")
        grid = x.transpose(1, 2).unflatten(2, size)
        return super().forward(grid).flatten(2).transpose(1, 2)


class ChannelRMSNorm(nn.Module):
    """w_c x_c / sqrt(mean_c x^2 + eps) over the channels of (B, C, *S).

    `variance=True` divides by the unbiased variance over channels instead of the mean square, as the library that
    the published attentive-convolution code builds on did in older versions.
    """

    def __init__(self, dim: int, eps: float = 1e-6, variance: bool = False) -> None:
        super().__init__()
        self.eps, self.variance = eps, variance
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        last = x.movedim(1, -1)
        if self.variance:
            last = last * torch.rsqrt(last.var(-1, keepdim=True) + self.eps) * self.weight
        elif last.is_cpu and last.dtype == torch.float32 and not _keeps_graph():  # half the passes of F.rms_norm
            energy = torch.linalg.vector_norm(last, dim=-1, keepdim=True).square_()
            last = (last * energy.div_(last.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)
        else:
            last = F.rms_norm(last, self.weight.shape, self.weight.to(last.dtype), self.eps)
        return last.movedim(-1, 1)


class GatedConvMLP(nn.Module):
    """W2 RMS(GELU(DW3(g)) * v) with (g, v) the halves of W1 x: a gated MLP with a depthwise convolution in its gate.

    W1: C -> 2h and W2: h -> C are pointwise and biased, GELU is exact, the RMS norm over channels is optional.
    (B, C, *S) to (B, C, *S); cost N (3 C h + h 3^dims).

    Raises:
        ValueError: dims outside 1..3, causal with dims > 1.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        depthwise: bool = True,
        norm: bool = False,
        norm_variance: bool = False,
        *,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        conv = CONVOLUTIONS[dims]
        self.fc1 = conv(dim, 2 * hidden, 1)
        self.dwconv = DepthwiseConv(hidden, 3, dims=dims, causal=causal) if depthwise else nn.Identity()
        self.act = GELU()
        self.norm_layer = ChannelRMSNorm(hidden, variance=norm_variance) if norm else nn.Identity()
        self.fc2 = conv(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        gate, value = self.fc1(x).chunk(2, dim=1)
        y = self.act(self.dwconv(gate))
        y = y * value if _keeps_graph() else y.mul_(value)
        del gate, value  # the widest map
        return self.fc2(self.norm_layer(y))


def _keeps_graph() -> bool:
    """Whether what is written over would be missed: by gradients or in a graph."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
