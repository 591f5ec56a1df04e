"""Depthwise convolutions with parallel dilated branches that fold into one kernel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims
from nearfar.ops.common.folding import fold_batch_norm
from nearfar.ops.common.layers import DepthwiseConv

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""(size, dilation) of the parallel depthwise branches, by the size of the large kernel."""


class DilatedReparam(nn.Module):
    """BN(DW_K(x)) + sum of BN(DW_(k, dilation r)(x)) over the branches of `BRANCHES[K]`.

    The dilated re-parameterization of UniRepLKNet (2024) as OverLoCK (2025) takes it. `fuse` spreads every branch over
    the large kernel and adds them up: one biased depthwise K-tap convolution, which `merged=True` makes from the
    start. (B, C, *S) to (B, C, *S); merged cost C K^dims per position.

    Raises:
        ValueError: a kernel size without branches, dims outside 1..3.
    """

    def __init__(self, dim: int, kernel_size: int, merged: bool = False, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        if kernel_size not in BRANCHES:
            raise ValueError(f"kernel_size is {kernel_size}; allowed are {', '.join(map(str, BRANCHES))}")
        conv, norm = CONVOLUTIONS[dims], BATCH_NORMS[dims]
        self.branches: tuple[tuple[int, int], ...] = () if merged else BRANCHES[kernel_size]
        self.lk_origin = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=merged)
        self.origin_bn = nn.Identity() if merged else norm(dim)
        for k, r in self.branches:
            pad = (r * (k - 1) + 1) // 2
            branch = conv(dim, dim, k, padding=pad, dilation=r, groups=dim, bias=False)
            self.add_module(f"dil_conv_k{k}_{r}", branch)
            self.add_module(f"dil_bn_k{k}_{r}", norm(dim))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        out = self.origin_bn(self.lk_origin(x))
        for k, r in self.branches:
            out = out + getattr(self, f"dil_bn_k{k}_{r}")(getattr(self, f"dil_conv_k{k}_{r}")(x))
        return out

    @torch.no_grad()
    def fuse(self) -> "DilatedReparam":
        """Merge the branches, for inference; the outputs stay the same."""
        if not self.branches:
            return self
        fold_batch_norm(self.lk_origin, self.origin_bn)
        self.origin_bn = nn.Identity()
        size = self.lk_origin.kernel_size[0]
        for k, r in self.branches:
            branch = getattr(self, f"dil_conv_k{k}_{r}")
            fold_batch_norm(branch, getattr(self, f"dil_bn_k{k}_{r}"))
            margin = (size - (r * (k - 1) + 1)) // 2
            taps = (slice(margin, size - margin, r),) * (branch.weight.ndim - 2)
            self.lk_origin.weight[(slice(None), slice(None), *taps)] += branch.weight
            self.lk_origin.bias += branch.bias
            delattr(self, f"dil_conv_k{k}_{r}")
            delattr(self, f"dil_bn_k{k}_{r}")
        self.branches = ()
        return self


class ResidualDepthwise(DepthwiseConv):
    """x + depthwise convolution of x, biased; `fuse` puts the shortcut into the kernel."""

    residual = True

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return x + super().forward(x) if self.residual else super().forward(x)

    @torch.no_grad()
    def fuse(self) -> "ResidualDepthwise":
        """Add the shortcut to the centre tap, for inference; the outputs stay the same."""
        if self.residual:
            centre = (n // 2 for n in self.weight.shape[2:])
            self.weight[(slice(None), 0, *centre)] += 1
            self.residual = False
        return self


def fuse_pair(sequence: nn.Sequential, index: int) -> None:
    """Merge the `DilatedReparam` at `index` and fold the batch norm that follows into it."""
    sequence[index].fuse()
    if isinstance(sequence[index + 1], nn.BatchNorm2d):
        fold_batch_norm(sequence[index].lk_origin, sequence[index + 1])
        sequence[index + 1] = nn.Identity()
