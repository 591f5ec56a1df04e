"""Pooling a sequence into one vector by weighted statistics."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def masked_moments(
    x: Float[Tensor, "b c t"], mask: Bool[Tensor, "b t"] | None, correction: int
) -> tuple[Float[Tensor, "b c 1"], Float[Tensor, "b c 1"]]:
    """Mean and variance over the real frames; the variance divides by `n - correction` (at least 1)."""
    if mask is None:
        count = torch.full((1, 1, 1), float(x.shape[-1]), device=x.device, dtype=x.dtype)
        mean = x.mean(-1, keepdim=True)
        squares = (x - mean).square()
    else:
        weight = mask.to(x.dtype)[:, None]
        count = weight.sum(-1, keepdim=True)
        mean = (x * weight).sum(-1, keepdim=True) / count
        squares = (x - mean).square() * weight
    return mean, squares.sum(-1, keepdim=True) / (count - correction).clamp(min=1)


class AttentiveStatisticsPool(nn.Module):
    """Channel-wise attentive statistics over time, then a linear embedding between two batch normalizations.

    With mu and sigma the mean and standard deviation of x over time::

        w    = softmax over time of W2 BN(relu(W1 [x, mu, sigma] + b1)) + b2
        mean = sum w x,   std = sqrt(max(sum w x^2 - mean^2, 1e-4))
        y    = BN(W BN([mean, std]) + b)

    Okabe et al. 2018 with the context of Desplanques et al. 2020 (ECAPA-TDNN), without the tanh that ECAPA has before
    W2. W1 is applied to x and to the two context vectors apart, so they are never repeated along time.
    Frames outside the mask get no weight and count in no statistic. In training the weights are dropped with
    probability `dropout`; with `drop_frames` whole frames leave the softmax instead (LAP). Cost is linear in time.

    The published code takes the unbiased deviation for sigma where it has no mask and the biased one where it has;
    `correction` in `forward` (1 or 0; None = as published) chooses by hand, so that a padded batch can equal its items.

    Args:
        in_dim: C.
        out_dim: size of the embedding (192).
        attention_dim: inner width of the attention, C // 2 by default.
        dropout: probability (0.1).
        drop_frames: drop frames and not weights.

    Shapes: `(B, C, T)`, mask `(B, T)`, to `(B, out_dim)`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 192,
        attention_dim: int | None = None,
        dropout: float = 0.1,
        drop_frames: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_dim // 2 if attention_dim is None else attention_dim
        if min(in_dim, out_dim, hidden) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"widths must be positive and 0 <= dropout < 1, got {in_dim}, {out_dim}, {hidden}, {dropout}"
            )
        self.drop_frames = drop_frames
        self.reduce = nn.Conv1d(3 * in_dim, hidden, 1)
        self.attention_norm = nn.BatchNorm1d(hidden)
        self.expand = nn.Conv1d(hidden, in_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(2 * in_dim)
        self.linear = nn.Linear(2 * in_dim, out_dim)
        self.out_norm = nn.BatchNorm1d(out_dim)

    def forward(
        self,
        x: Float[Tensor, "b c t"],
        mask: Bool[Tensor, "b t"] | None = None,
        correction: int | None = None,
    ) -> Float[Tensor, "b e"]:
        if correction is None:
            correction = 1 if mask is None else 0
        mean, variance = masked_moments(x, mask, correction)
        context = torch.cat([mean, variance.clamp(min=1e-12).sqrt()], 1)
        on_x, on_context = self.reduce.weight.split([x.shape[1], 2 * x.shape[1]], 1)
        hidden = nn.functional.conv1d(x, on_x) + nn.functional.conv1d(context, on_context, self.reduce.bias)
        logits = self.expand(self.attention_norm(torch.relu(hidden)))
        keep = mask
        if self.training and self.drop_frames:
            kept = torch.rand(x.shape[0], x.shape[2], device=x.device) >= self.dropout.p
            if mask is not None:
                kept = kept & mask
            # an item that would lose all its frames keeps them
            full = mask if mask is not None else torch.ones_like(kept)
            keep = torch.where(kept.any(1, keepdim=True), kept, full)
        if keep is not None:
            logits = logits.masked_fill(~keep[:, None], float("-inf"))
        weights = torch.softmax(logits, -1)
        if not self.drop_frames:
            weights = self.dropout(weights)
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0.0)
        mean = (weights * x).sum(-1)
        std = ((weights * x.square()).sum(-1) - mean.square()).clamp(min=1e-4).sqrt()
        return self.out_norm(self.linear(self.norm(torch.cat([mean, std], 1))))
