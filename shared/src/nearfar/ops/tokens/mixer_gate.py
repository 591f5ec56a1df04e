"""Gates made by mixing all tokens without attention: an MLP-Mixer block or a Fourier transform, times a projection."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.precision import full_precision
from nearfar.ops.spectral.fourier import real_fourier


class FeedForward(nn.Sequential):
    """W2 GELU(W1 x + b1) + b2 over the last axis, dropout behind both; exact GELU."""

    def __init__(self, dim: int, hidden: int, drop: float | int = 0.0) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, dim), nn.Dropout(drop))


class MixerBlock(nn.Module):
    """x + (W2 GELU(W1 LN(x)^T))^T, then + V2 GELU(V1 LN(x)): tokens are mixed, then channels (Tolstikhin et al. 2021).

    W1 (T x N) and W2 (N x T) tie the block to N tokens; `resize` interpolates them to another grid.
    (B, N, C) to the same. Cost O(C N T + N C D) for hidden widths T of tokens and D of channels. Not causal: two
    full layers over tokens have no triangular form.

    Args:
        dim, tokens: channels C and tokens N.
        token_hidden, channel_hidden: hidden widths T and D.
        drop: dropout behind every linear map.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, dim: int, tokens: int, token_hidden: int, channel_hidden: int, *, drop: float | int = 0.0
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, tokens=tokens, token_hidden=token_hidden, channel_hidden=channel_hidden)
        self.token_norm, self.token_mix = nn.LayerNorm(dim), FeedForward(tokens, token_hidden, drop)
        self.channel_norm, self.channel_mix = nn.LayerNorm(dim), FeedForward(dim, channel_hidden, drop)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        tokens = self.token_mix[0].in_features
        if x.shape[1] != tokens:
            raise ValueError(f"{x.shape[1]} tokens; the mixing matrices are made for {tokens}, see `resize`")
        x = x + self.token_mix(self.token_norm(x).mT).mT
        return x + self.channel_mix(self.channel_norm(x))

    @torch.no_grad()
    def resize(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Make the mixing matrices fit a row-major grid `after` in place of `before`; the channel parts stay."""
        first, last = self.token_mix[0], self.token_mix[3]
        self.token_mix[0] = _linear(first, resize_tokens(first.weight, before, after, total=True), first.bias)
        bias = resize_tokens(last.bias[None], before, after)[0]
        self.token_mix[3] = _linear(last, resize_tokens(last.weight.T, before, after).T, bias)


class MixerGate(nn.Module):
    """(Wx + b) * M(x) with M a `MixerBlock`: the mixer gating unit of NiNformer (arXiv 2403.02411).

    No activation bounds the gate, as published; with `bounded` it is tanh(M(x)), an extension of ours for deep models.
    (B, N, C) to the same; cost O(N C^2) beside the mixer's. Arguments as in `MixerBlock`.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        token_hidden: int,
        channel_hidden: int,
        *,
        drop: float | int = 0.0,
        bounded: bool = False,
    ) -> None:
        super().__init__()
        self.mixer = MixerBlock(dim, tokens, token_hidden, channel_hidden, drop=drop)
        self.proj = nn.Linear(dim, dim)
        self.bounded = bounded

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        gate = self.mixer(x)
        return self.proj(x) * (gate.tanh() if self.bounded else gate)


class FourierGate(nn.Module):
    """(Wx + b) * Re F(x) with F the unnormalized transform over tokens and channels, in float32 at least.

    The gate of the Fourier NiNformer, as FNet mixes (Lee-Thorp et al. 2021); it grows with sqrt(N C). Any number of
    tokens. While a model is exported the transform is Cn x Cc - Sn x Sc with cosine and sine matrices.
    (B, N, C) to the same; cost O(N C (log N C + C)). Not causal.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_sizes(dim=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        with full_precision(x):
            gate = real_fourier(x if x.dtype == torch.float64 else x.float())
        y = self.proj(x)
        return y * gate.to(y.dtype)


def resize_tokens(
    weight: Float[Tensor, "r n"], before: Sequence[int], after: Sequence[int], *, total: bool = False
) -> Float[Tensor, "r m"]:
    """Rows over a row-major grid `before` as rows over the grid `after`, interpolated linearly.

    With `total` the values are scaled by the ratio of positions, so that a sum over a smooth field stays what it was.
    """
    tokens, wanted = torch.Size(before).numel(), torch.Size(after).numel()
    if weight.shape[1] != tokens or len(before) != len(after):
        raise ValueError(f"rows of {weight.shape[1]} do not lie on a grid {tuple(before)} to become {tuple(after)}")
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(before)]
    grid = F.interpolate(weight.unflatten(1, tuple(before))[None], tuple(after), mode=mode, antialias=False)[0]
    return grid.flatten(1) * (tokens / wanted if total else 1.0)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every named size is positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def _linear(old: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    """A map of these values that learns, or does not, as the old one."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.contiguous(), old.weight.requires_grad)
    layer.bias = nn.Parameter(bias.clone(), old.bias.requires_grad)
    return layer
