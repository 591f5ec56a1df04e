"""LS convolution (see large, focus small): a large-kernel branch predicts a small kernel for every position."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims, check_odd
from nearfar.ops.common.folding import fold_batch_norm, scale_of_norm
from nearfar.ops.common.fused import FusedConv2d
from nearfar.ops.common.layers import DepthwiseConv, LayerScale
from nearfar.ops.convolution.dynamic import position_depthwise


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (eps 1e-5), ReLU where `relu` is set; `fuse` makes one layer of them."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        depthwise: bool = False,
        relu: bool = False,
        norm_weight: float = 1.0,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        self.dims, self.relu = dims, relu
        if depthwise and stride == 1:
            self.c: nn.Module = DepthwiseConv(dim, kernel_size, dims=dims, causal=causal, bias=False)
        else:
            groups = dim if depthwise else 1
            self.c = CONVOLUTIONS[dims](in_dim, dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn: nn.Module = BATCH_NORMS[dims](dim)
        nn.init.constant_(self.bn.weight, norm_weight)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *t"]:
        y = self.bn(self.c(x))
        return y.relu() if self.relu else y

    @torch.no_grad()
    def fuse(self) -> "ConvNorm":
        """Fold norm and ReLU into the convolution, for inference; the outputs stay the same."""
        if isinstance(self.bn, nn.Identity):
            return self
        fold_batch_norm(self.c, self.bn)
        self.bn = nn.Identity()
        if self.dims == 2:
            self.c = FusedConv2d(self.c, "relu" if self.relu else "none")
            self.relu = False
        return self

    @property
    def fused(self) -> nn.Module | None:
        """The one layer that does it all after `fuse`."""
        return self.c if isinstance(self.c, FusedConv2d) else None


class RepVGGDepthwise(nn.Module):
    """BN(DW3(x)) + BN(DW1(x)) + x; `fuse` turns the three branches into one biased depthwise 3-tap convolution.

    Wang et al., "RepViT" (2024) and "LSNet" (2025). Maps (B, C, *S) to (B, C, *S); C 3^dims multiply-adds per
    position once fused.

    Raises:
        ValueError: dims outside 1..3, causal with dims > 1.
    """

    def __init__(self, dim: int, *, dims: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, depthwise=True, dims=dims, causal=causal)
        self.conv1: nn.Module | None = ConvNorm(dim, dim, 1, depthwise=True, dims=dims)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        if self.conv1 is None:
            return self.conv(x)
        return self.conv(x) + self.conv1(x) + x

    @torch.no_grad()
    def fuse(self) -> "RepVGGDepthwise":
        """Merge the branches, for inference; the outputs stay the same."""
        if self.conv1 is None:
            return self
        self.conv.fuse()
        self.conv1.fuse()
        kernel = self.conv.c.weight
        here = (-1 if getattr(self.conv.c, "left", 0) else 1,) * (kernel.ndim - 2)
        kernel[(slice(None), 0, *here)] += self.conv1.c.weight.flatten() + 1
        self.conv.c.bias += self.conv1.c.bias
        self.conv1 = None
        return self


class LargeKernelPerception(nn.Module):
    """Kernels (B, C/share, k^dims, *S) for every position, from a wide look around it.

    W = GN(conv(ReLU(BN conv1(BN DW_K(ReLU(BN conv1(x))))))), of widths C -> C/2 -> C/2 -> k^dims C / share, the last
    biased; GN has one group per kernel, so a kernel is normalized over its taps and all positions (eps 1e-5).
    Wang et al., "LSNet" (2025), section 3.2. The paper speaks of C/8 groups of channels; in the published code 8 is
    the number of channels that share a kernel, as here. With `causal` the depthwise convolution is left-padded and
    the group norm, which sees every position, is left out.

    Raises:
        ValueError: even kernels, a `dim` that `share` or 2 does not divide, dims outside 1..3, causal with dims > 1.
    """

    def __init__(
        self,
        dim: int,
        large_kernel: int = 7,
        small_kernel: int = 3,
        share: int = 8,
        *,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_odd(large_kernel=large_kernel, small_kernel=small_kernel)
        if dim % share or dim % 2:
            raise ValueError(f"dim is {dim}; it must be even and a multiple of share={share}")
        self.taps = small_kernel**dims
        kernels = dim // share
        self.cv1 = ConvNorm(dim, dim // 2, relu=True, dims=dims)
        self.cv2 = ConvNorm(dim // 2, dim // 2, large_kernel, depthwise=True, dims=dims, causal=causal)
        self.cv3 = ConvNorm(dim // 2, dim // 2, relu=True, dims=dims)
        self.cv4 = CONVOLUTIONS[dims](dim // 2, kernels * self.taps, 1)
        self.norm = nn.Identity() if causal else nn.GroupNorm(kernels, kernels * self.taps)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b n t *s"]:
        return self.norm(self.cv4(self.cv3(self.cv2(self.cv1(x))))).unflatten(1, (-1, self.taps))


class LSConv(nn.Module):
    """x + BN(position_depthwise(x, LargeKernelPerception(x))): see large, focus small.

    Wang et al., "LSNet" (2025), section 3.2. Maps (B, C, *S) to (B, C, *S). Channel c takes kernel c mod (C/share).
    Cost per position: about C^2 (3/4 + k^dims / (2 share)) + C (K^dims / 2 + k^dims) multiply-adds, linear in N.
    The published code computes the aggregation in a CUDA kernel; here it is `position_depthwise`.

    Args:
        dim: channels C.
        large_kernel, small_kernel: K of the look around, k of the predicted kernels, odd.
        share: channels per kernel.
        dims: number of grid axes, 1, 2 or 3.
        causal: see `LargeKernelPerception` (dims=1); a position then sees only itself and what came before.

    Raises:
        ValueError: as `LargeKernelPerception`.
    """

    def __init__(
        self,
        dim: int,
        large_kernel: int = 7,
        small_kernel: int = 3,
        share: int = 8,
        *,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        self.dims, self.causal = dims, causal
        self.lkp = LargeKernelPerception(dim, large_kernel, small_kernel, share, dims=dims, causal=causal)
        self.bn = BATCH_NORMS[dims](dim)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return self.bn(position_depthwise(x, self.lkp(x), causal=self.causal)) + x

    def fuse(self) -> "LSConv":
        """Make one multiply-add of the norm, for inference; the outputs stay the same."""
        if not isinstance(self.bn, LayerScale):
            self.bn = scale_of_norm(self.bn, self.dims)
        return self
