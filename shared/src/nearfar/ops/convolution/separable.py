"""Separable convolution with a depth multiplier, its batch norm and SELU, run as one convolution."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS
from nearfar.ops.common.folding import batch_norm_affine
from nearfar.ops.common.keras import glorot_uniform_, selu_


class SeparableConv(nn.Module):
    """y = SELU(BN(pointwise(depthwise(x)))), of the same size as x; (B, C_in, *S) -> (B, C_out, *S).

        z[c, j] = sum_k depthwise[c, j, k] x[c, s + k - floor((K - 1) / 2)]      j < m, zeros outside x
        y[o]    = SELU(BN(sum_{c in group of o, j} pointwise[o, c, j] z[c, j]))

    No bias. Even kernels follow Keras' `same` padding: floor((K-1)/2) zeros before and ceil((K-1)/2) after;
    `causal=True` puts all K - 1 zeros before, along the last axis.

    Several separable convolutions run as one: with `groups` = G, every C_out/G outputs read C_in/G inputs (the heads
    of an attention, for example); with `branches` = R, R of them with filters of their own read the same inputs. The
    outputs are ordered (group, branch, output).

    Depthwise and pointwise are linear with nothing between, so they are one convolution with the product kernel
    w[o, c, k] = sum_j pointwise[o, c, j] depthwise[c, j, k], which is formed in every call (the parameters stay those
    of the factors). That spares the map of m C_in channels at up to K/m times the multiply-adds; where K is above 2 m
    the factors run one after the other instead. In eval mode the batch norm is folded into the kernel. A map in
    channels_last layout stays so, which on a CPU is several times faster than the default layout.

    Cost per position: K C_in C_out / G (product) or m C_in (R K + C_out / G) multiply-adds.
    Source: Chollet 2017 (arXiv 1610.02357) with TensorFlow's depth multiplier; weights start Glorot-uniform with the
    fans that Keras gives these two kernels. Batch norm: eps 1e-3, momentum 0.01, as Keras has them by default.

    Args:
        in_channels: C_in. out_channels: C_out, of all branches together.
        kernel_size: one size per axis of S: (K,) for a series, (1, K) for K steps along the second of two axes.
        depth_multiplier: m. groups: G. branches: R. causal: see above.

    Raises ValueError for sizes below 1, more than three axes, or channels that G (for C_out, G R) does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        depth_multiplier: int = 1,
        groups: int = 1,
        branches: int = 1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= len(kernel_size) <= 3 or min(kernel_size) < 1:
            raise ValueError(f"kernel_size is {kernel_size}; it must hold one to three positive sizes")
        if min(in_channels, out_channels, depth_multiplier, groups, branches) < 1:
            raise ValueError("in_channels, out_channels, depth_multiplier, groups and branches must be at least 1")
        if in_channels % groups or out_channels % (groups * branches):
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels}, "
                f"and groups * branches = {groups * branches} must divide out_channels={out_channels}"
            )
        self.groups, self.branches, self.causal = groups, branches, causal
        size, inputs, outputs = math.prod(kernel_size), in_channels // groups, out_channels // (groups * branches)
        self.depthwise = nn.Parameter(torch.empty(in_channels, branches, depth_multiplier, *kernel_size))
        self.pointwise = nn.Parameter(torch.empty(out_channels, inputs, depth_multiplier))
        self.norm = BATCH_NORMS[len(kernel_size)](out_channels, eps=1e-3, momentum=0.01)
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel_size) - 1]
        self.product = size <= 2 * depth_multiplier
        before = [(k - 1) // 2 for k in kernel_size]
        if causal:
            before[-1] = kernel_size[-1] - 1
        # F.pad wants (before, after) from the last axis to the first
        self.padding = [size for k, zeros in zip(kernel_size[::-1], before[::-1]) for size in (zeros, k - 1 - zeros)]
        glorot_uniform_(self.depthwise, size * inputs, size * depth_multiplier)
        glorot_uniform_(self.pointwise, inputs * depth_multiplier, outputs)

    def forward(self, x: Float[Tensor, "b c_in *s"]) -> Float[Tensor, "b c_out *s"]:
        if any(self.padding):
            x = F.pad(x, self.padding)
        pointwise: Tensor = self.pointwise
        shift: Tensor | None = None
        if not self.training:
            scale, shift = batch_norm_affine(self.norm)
            pointwise = pointwise * scale[:, None, None]
        if self.product:
            x = self.convolve(x, self.kernel(pointwise), shift, groups=self.groups)
        else:
            x = self.convolve(x, self.depthwise.flatten(0, 2).unsqueeze(1), groups=len(self.depthwise))
            x = x.unflatten(1, (self.groups, -1, self.branches, self.depthwise.shape[2])).transpose(2, 3).flatten(1, 4)
            pointwise = pointwise.flatten(1)[(...,) + (None,) * (x.ndim - 2)]
            x = self.convolve(x, pointwise, shift, groups=self.groups * self.branches)
        return selu_(self.norm(x) if self.training else x)

    def kernel(self, pointwise: Tensor) -> Tensor:
        """The product kernel (C_out, C_in / G, *K)."""
        depthwise = self.depthwise.unflatten(0, (self.groups, -1))
        pointwise = pointwise.unflatten(0, (self.groups, self.branches, -1))
        return torch.einsum("groij,girj...->groi...", pointwise, depthwise).flatten(0, 2)

    def extra_repr(self) -> str:
        in_channels, _, multiplier, *kernel_size = self.depthwise.shape
        return (
            f"{in_channels}, {len(self.pointwise)}, kernel_size={tuple(kernel_size)}, depth_multiplier={multiplier}, "
            f"groups={self.groups}, branches={self.branches}, causal={self.causal}"
        )
