"""Token mixing: two pictures of a batch change places inside a box, as models with token labels are trained.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (2021), section 3.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[int, int, int, int]
"""Upper, left, lower and right edge of cells; the last two are outside."""


def random_box(height: int, width: int) -> Box:
    """A box of the grid: area 1 - L for L uniform in 0..1, a uniform centre, clipped at the edges."""
    share, row, column = torch.rand(3, device="cpu").tolist()
    sides = [int(n * math.sqrt(1 - share)) for n in (height, width)]
    centre = int(row * height), int(column * width)
    start = [max(c - n // 2, 0) for c, n in zip(centre, sides, strict=True)]
    stop = [min(c + n // 2, end) for c, n, end in zip(centre, sides, (height, width), strict=True)]
    return start[0], start[1], stop[0], stop[1]


def swap(x: Tensor, box: Sequence[int]) -> Tensor:
    """(B, h, w, C), where inside the box every sample has what its counterpart in the reversed batch has."""
    top, left, bottom, right = box
    inside = torch.zeros(x.shape[1:3], dtype=torch.bool, device=x.device)
    inside[top:bottom, left:right] = True
    return torch.where(inside[..., None], x.flip(0), x)
