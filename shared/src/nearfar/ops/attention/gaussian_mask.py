"""Attention whose logits are multiplied by a mixture of Gaussians of the distance between tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.tables import Derived, cached_table


class GaussianMixtureMask(nn.Module):
    """G_h(i, j) = sum_k alpha_kh exp(-|p_i - p_j|^2 / (2 (sigma_kh^2 + 1e-5))) for tokens on a grid, times the logits.

    The mask of "RetNet Viewed through Convolution" (arXiv 2309.05375): two learned numbers a Gaussian and head. It
    multiplies, so a pair far apart gets the logit 0, not minus infinity, and keeps a share of the weight. G depends on
    the offset alone: one value for each |offset| of every axis is computed (a product of one Gaussian an axis) and
    spread over the pairs, and kept while no gradient is needed. Any grid, square or not.

    The published code raises a float32 table sqrt(exp(-d^2)) to the power 1 / (sigma^2 + 1e-5). exp(-d^2) is 0 beyond
    d^2 = 103, so on grids larger than 8 x 8 far pairs are cut whatever sigma is. `clipped` is that table exactly.
    Cost O(heads N^2) for a mask; `forward` maps logits (B, heads, P + N, P + N) to the same shape, with P tokens
    before the grid (class tokens), whose rows and columns stay as they are.

    Args:
        num_heads: heads.
        kernels: Gaussians K of each head.
        dims: axes of the grid.
        clipped: the published table instead of the closed form.

    Raises:
        ValueError: no head or kernel, dims other than 1, 2, 3.
    """

    def __init__(self, num_heads: int, kernels: int = 5, *, dims: int = 2, clipped: bool = False) -> None:
        super().__init__()
        check_dims(dims)
        if num_heads < 1 or kernels < 1:
            raise ValueError(f"num_heads is {num_heads} and kernels {kernels}; both must be at least 1")
        self.dims, self.clipped = dims, clipped
        self.sigma = nn.Parameter(10 * torch.randn(kernels, num_heads) + 10)
        self.alpha = nn.Parameter(2 * torch.randn(kernels, num_heads))
        self.kept = Derived()

    def offsets(self, grid: Sequence[int]) -> Float[Tensor, "heads *grid"]:
        """G for the offsets 0 to n - 1 of every axis."""
        power = 1 / (self.sigma.square() + 1e-5)
        if self.clipped:
            base = _clipped_table(tuple(grid), power.device).to(power.dtype)
            return torch.einsum("kh...,kh->h...", base ** power[(..., *(None,) * len(grid))], self.alpha)
        values = self.alpha[(..., *(None,) * len(grid))]
        for axis, n in enumerate(grid):
            squared = torch.arange(n, device=power.device, dtype=power.dtype).square()
            values = (
                values
                * torch.exp(-0.5 * power[..., None] * squared)[
                    (..., *(None,) * axis, slice(None), *(None,) * (len(grid) - 1 - axis))
                ]
            )
        return values.sum(0)

    def mask(self, grid: Sequence[int]) -> Float[Tensor, "heads n n"]:
        """G for every pair of tokens of a row-major grid."""
        grid = tuple(grid)
        if len(grid) != self.dims:
            raise ValueError(f"grid is {grid}; the mask was made for {self.dims} axes")
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.spread(grid)
        alpha = self.alpha
        key = (grid, alpha.data_ptr(), None if alpha.is_inference() else alpha._version)
        return self.kept.get(self.sigma, key, lambda: self.spread(grid))

    def spread(self, grid: tuple[int, ...]) -> Float[Tensor, "heads n n"]:
        pairs = _pair_offsets(grid, self.sigma.device)
        return self.offsets(grid).flatten(1).index_select(1, pairs.flatten()).unflatten(1, pairs.shape)

    def forward(self, scores: Float[Tensor, "b heads n n"], grid: Sequence[int]) -> Float[Tensor, "b heads n n"]:
        return scores * self.padded(grid, scores.shape[-1]).to(scores.dtype)

    def padded(self, grid: Sequence[int], tokens: int) -> Float[Tensor, "heads n n"]:
        """The mask with rows and columns of ones before it for what precedes the grid in `tokens`."""
        mask = self.mask(grid)
        before = tokens - mask.shape[-1]
        if before < 0:
            raise ValueError(f"grid {tuple(grid)} has {mask.shape[-1]} positions, there are {tokens} tokens")
        return F.pad(mask, (before, 0, before, 0), value=1.0) if before else mask

    def extra_repr(self) -> str:
        kernels, heads = self.sigma.shape
        return f"num_heads={heads}, kernels={kernels}, dims={self.dims}, clipped={self.clipped}"


@cached_table
def _clipped_table(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """sqrt(exp(-d^2)) in float32 for every offset, 0 where exp(-d^2) is."""
    squared = torch.zeros(grid)
    for axis, n in enumerate(grid):
        squared = squared + torch.arange(n).float().square().reshape(-1, *(1,) * (len(grid) - 1 - axis))
    return (-squared).exp().sqrt().to(device)


@cached_table
def _pair_offsets(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """For every pair of positions the flat index of its |offset| on the grid, (N, N)."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid))
    flat = torch.zeros(places.shape[0], places.shape[0], dtype=torch.long)
    for axis, n in enumerate(grid):
        flat = flat * n + (places[:, None, axis] - places[:, axis]).abs()
    return flat.to(device)


class GaussianMaskAttention(nn.Module):
    """Wo softmax(G * q k^T / sqrt(d)) v with G the `GaussianMixtureMask`; heads of width d, q, k, v of width heads d.

    The factor multiplies, so fused attention kernels, which add a mask, do not take it; the scale goes into G.
    With `causal` (a line of tokens), later keys are cut after the multiplication, as an extension of ours. `forward`
    maps (B, P + N, C) on a grid of N positions to the same; P leading tokens (class tokens) are attended to and attend
    without a mask. Cost O(N^2 heads d).

    Args:
        dim: channels C.
        num_heads: heads.
        head_dim: width d of a head; None for C / heads.
        kernels, dims, clipped: of the mask.
        qkv_bias: biases of the q, k, v projections.
        causal: position i sees positions up to i only; needs dims=1.

    Raises:
        ValueError: heads that do not divide `dim` where `head_dim` is None, causal with dims other than 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        kernels: int = 5,
        dims: int = 2,
        clipped: bool = False,
        qkv_bias: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}, or give head_dim")
        self.num_heads, self.causal = num_heads, causal
        self.head_dim = head_dim or dim // num_heads
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias)
        self.mask = GaussianMixtureMask(num_heads, kernels, dims=dims, clipped=clipped)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Sequence[int]) -> Float[Tensor, "b n c"]:
        weights, value = self.weigh(x, grid)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))

    def weigh(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = self.mask(query @ (key * self.head_dim**-0.5).mT, grid)
        if self.causal:
            scores = scores.masked_fill(_later(x.shape[1], scores.device), float("-inf"))
        return scores.softmax(-1), value

    def attention_map(self, x: Float[Tensor, "b n c"], grid: Sequence[int]) -> Float[Tensor, "b heads n n"]:
        """The attention weights, rows summing to one."""
        return self.weigh(x, grid)[0]


@cached_table
def _later(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
