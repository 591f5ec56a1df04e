"""What DHVT puts around attention: a stem of overlapping strided convolutions, and a convolutional feed-forward."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims
from nearfar.ops.common.folding import fold_batch_norm
from nearfar.ops.common.layers import GELU


class Affine(nn.Module):
    """alpha_c x_c + beta_c on (B, C, *S); alpha starts at 1, beta at 0."""

    def __init__(self, dim: int, dims: int = 2) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, *(1,) * dims))
        self.beta = nn.Parameter(torch.zeros(1, dim, *(1,) * dims))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return torch.addcmul(self.beta, x, self.alpha)


class OverlappingPatches(nn.Module):
    """Affine, log2(P) convolutions of kernel 3 and stride 2, each with batch norm, and Affine: a map P times smaller.

    The sequential overlapping patch embedding of DHVT (Lu et al. 2022). Widths halve backwards from C;
    GELU stands between the convolutions, and for P = 2 after the only one, as in the published code. A size that P
    does not divide is rounded up, in every halving. `forward` maps (B, in_chans, *S) to (B, C, *S / P).
    Cost O(C^2 N) for N output positions.

    Args:
        dim: channels C, a multiple of P / 2.
        patch_size: P, a power of two from 2 on.
        in_chans: channels of the input.
        dims: grid axes.

    Raises:
        ValueError: a patch size that is no power of two, or a width that it does not divide.
    """

    def __init__(self, dim: int, patch_size: int = 16, in_chans: int = 3, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        steps = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 2**steps:
            raise ValueError(f"patch_size is {patch_size}; allowed are 2, 4, 8, 16, ...")
        if dim % (patch_size // 2):
            raise ValueError(f"dim is {dim}; with patch_size={patch_size} it must be a multiple of {patch_size // 2}")
        widths = [in_chans, *(dim // 2 ** (steps - 1 - i) for i in range(steps))]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            conv = CONVOLUTIONS[dims](before, after, 3, stride=2, padding=1, bias=False)
            layers.append(nn.Sequential(conv, BATCH_NORMS[dims](after)))
            if i < steps - 1 or steps == 1:
                layers.append(GELU())
        self.pre_affine, self.proj, self.post_affine = Affine(in_chans, dims), nn.Sequential(*layers), Affine(dim, dims)

    def forward(self, x: Float[Tensor, "b i *s"]) -> Float[Tensor, "b c *t"]:
        return self.post_affine(self.proj(self.pre_affine(x)))


class ChannelGatedFeedForward(nn.Module):
    """W3(u + v) with u = GELU(W1 x), v = GELU(DW3 u), on the grid; a class token c becomes c * g(mean of the result).

    The dynamic aggregation feed-forward of DHVT (Lu et al. 2022). W1 (C to `hidden`), DW3 (depthwise, kernel 3) and W3
    (back to C) have biases and each a batch norm; g = E GELU(S m) with S: C to C / 4 and E back, no sigmoid: the gate
    starts near 0. `forward` maps tokens (B, P + N, C) with P = 0 or 1 class tokens before a row-major grid of N
    positions to the same. Cost O(C hidden N).

    Args:
        dim: channels C, a multiple of 4.
        hidden: inner channels; None for 4 C.
        kernel_size: of the depthwise convolution, odd.
        dims: grid axes.

    Raises:
        ValueError: a `dim` below 4, an even kernel.
    """

    def __init__(self, dim: int, hidden: int | None = None, kernel_size: int = 3, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        if dim < 4:
            raise ValueError(f"dim is {dim}; the gate has dim // 4 hidden channels, so it must be at least 4")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd and positive")
        hidden = hidden or 4 * dim
        conv, norm = CONVOLUTIONS[dims], BATCH_NORMS[dims]
        self.conv1, self.bn1 = conv(dim, hidden, 1), norm(hidden)
        self.conv2, self.bn2 = conv(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden), norm(hidden)
        self.conv3, self.bn3 = conv(hidden, dim, 1), norm(dim)
        self.compress, self.excitation = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Sequence[int]) -> Float[Tensor, "b n c"]:
        positions = math.prod(grid)
        classes = x.shape[1] - positions
        if classes not in (0, 1):
            raise ValueError(f"{x.shape[1]} tokens are no grid of {tuple(grid)} with at most one class token before it")
        first, rest = (x[:, :1], x[:, 1:]) if classes else (x[:, :0], x)
        u = F.gelu(self.bn1(self.conv1(rest.mT.unflatten(2, tuple(grid)))))
        z = self.bn3(self.conv3(u + F.gelu(self.bn2(self.conv2(u)))))
        tokens = z.flatten(2).mT
        if not classes:
            return tokens
        gate = self.excitation(F.gelu(self.compress(tokens.mean(1, keepdim=True))))
        return torch.cat((first * gate, tokens), dim=1)

    @torch.no_grad()
    def fuse(self) -> "ChannelGatedFeedForward":
        """Fold the batch norms into the convolutions, for inference. Same output to rounding."""
        for i in (1, 2, 3):
            norm = getattr(self, f"bn{i}")
            if not isinstance(norm, nn.Identity):
                fold_batch_norm(getattr(self, f"conv{i}"), norm)
                setattr(self, f"bn{i}", nn.Identity())
        return self
