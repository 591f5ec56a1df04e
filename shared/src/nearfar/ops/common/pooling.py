"""Adaptive average pooling as a matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.ops.common.tables import cached_table


@cached_table
def pooling_matrix(positions: int, bins: int, like: tuple[torch.device, torch.dtype]) -> Float[Tensor, "bins n"]:
    """Row i averages positions floor(i N / bins) to ceil((i + 1) N / bins) - 1, so that uneven rows overlap."""
    device, dtype = like
    index = torch.arange(bins, device=device)
    start, end = index * positions // bins, -(-(index + 1) * positions // bins)
    place = torch.arange(positions, device=device)
    inside = (place >= start[:, None]) & (place < end[:, None])
    return inside.to(dtype) / (end - start)[:, None]
