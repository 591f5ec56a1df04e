"""Scores of several sizes of the same input, joined by their maximum."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearfar.ops.common.conv_norm_act import INTERPOLATION


def multi_scale_scores(
    network: Callable[[Tensor], Tensor], x: Float[Tensor, "b c *s"], scales: Sequence[int | float] = (0.5, 0.75)
) -> list[Tensor]:
    """[network(x), network(x resized by p) for each p of `scales`, the position-wise maximum of all].

    Chen et al., "Attention to Scale" (2016), with maximum fusion as in DeepLab v2. Inputs are resized linearly to
    floor(p size), with coordinates from p itself; scores come on the grids that the network gives, and are resized
    linearly to the first one's for the maximum. Cost: 1 + sum p^dims runs of the network on x.

    Raises:
        ValueError: for a scale that is not positive.
    """
    if any(p <= 0 for p in scales):
        raise ValueError(f"scales are {tuple(scales)}; they must be positive")
    mode = INTERPOLATION[x.ndim - 2]
    scores = [network(x)]
    for p in scales:
        small = F.interpolate(x, scale_factor=p, mode=mode, align_corners=False, recompute_scale_factor=False)
        scores.append(network(small))
    size = scores[0].shape[2:]
    resized = [scores[0], *(F.interpolate(s, size, mode=mode, align_corners=False) for s in scores[1:])]
    return [*scores, torch.stack(resized).amax(0)]
