"""Normalization of a sequence (B, N, C): by a frame's length, or by statistics gathered over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """y = g * x / max(|x|_2 / sqrt(dim), eps): root-mean-square normalization with one scalar gain.

    x: (..., dim). Nguyen and Salazar, "Transformers without tears" (2019), with the norm divided by sqrt(dim) as in
    the FLASH and MossFormer code; eps bounds the divisor from below, it is not added. Cost O(N * dim).

    Args:
        dim: channels. eps: lower bound of the divisor.

    Raises ValueError for a dim below 1.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1")
        self.g = nn.Parameter(torch.ones(1))
        self.dim, self.eps = dim, eps

    def forward(self, x: Float[Tensor, "*s c"]) -> Float[Tensor, "*s c"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * self.dim**-0.5
        return (wide * (self.g / rms.clamp(min=self.eps))).to(x.dtype)


class TimeNorm(nn.Module):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, with mean and variance taken over time.

    x: (B, N, dim), one item at a time:

    - `per_channel=False`: over all frames and channels, which is GroupNorm with one group;
    - `per_channel=True`: over all frames of each channel, which is InstanceNorm;
    - `causal=True`: over the frames up to and including the present one ("cumulative" normalization), so frame t
      depends on no later frame, and a stream carries count, mean and mean square in `state`.

    Frames where `mask` is False take no part in the statistics. Statistics are computed in float32 at least.
    Cost O(N * dim).

    Args:
        dim: channels. per_channel, causal: see above. eps: added to the variance.

    Raises ValueError for a dim below 1, and at the call for `state` without `causal`.
    """

    def __init__(self, dim: int, per_channel: bool = False, causal: bool = False, eps: float = 1e-8):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1")
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.per_channel, self.causal, self.eps = per_channel, causal, eps

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
    ) -> Float[Tensor, "b n c"]:
        if state is not None and not self.causal:
            raise ValueError("a stream needs statistics of the past alone: build TimeNorm with causal=True")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.causal:
            normed = self._cumulative(wide, state)
        elif mask is not None:
            normed = self._masked(wide, mask.unsqueeze(-1))
        elif self.per_channel:
            var, mean = torch.var_mean(wide, dim=1, keepdim=True, correction=0)
            normed = (wide - mean) * torch.rsqrt(var + self.eps)
        else:
            normed = F.layer_norm(wide, wide.shape[1:], eps=self.eps)
        return (normed * self.weight + self.bias).to(x.dtype)

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        axes = (1,) if self.per_channel else (1, 2)
        count = mask.sum(1, keepdim=True) * (1 if self.per_channel else x.shape[2])
        mean = (x * mask).sum(axes, keepdim=True) / count
        centred = (x - mean) * mask
        var = centred.square().sum(axes, keepdim=True) / count
        return centred * torch.rsqrt(var + self.eps)

    def _cumulative(self, x: Tensor, state: dict | None) -> Tensor:
        first, second = (x, x.square()) if self.per_channel else (x.mean(-1, True), x.square().mean(-1, True))
        seen, mean0, square0 = (0, 0.0, 0.0) if state is None else state.get(self, (0, 0.0, 0.0))
        count = torch.arange(seen + 1, seen + x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        mean = (first.cumsum(1) + seen * mean0) / count
        square = (second.cumsum(1) + seen * square0) / count
        if state is not None and x.shape[1]:
            state[self] = (seen + x.shape[1], mean[:, -1:], square[:, -1:])
        return (x - mean) * torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps)
