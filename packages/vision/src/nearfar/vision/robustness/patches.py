"""Which patches are perturbed: random cells of a grid, given ones, or a square anywhere."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def check_grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError where the picture is smaller than a patch or no multiple of it."""
    if patch < 1 or min(size) < patch:
        raise ValueError(f"pictures of {size[0]} x {size[1]} are smaller than a patch of {patch}")
    if any(n % patch for n in size):
        raise ValueError(f"pictures of {size[0]} x {size[1]} are no multiple of the patch of {patch}")
    return size[0] // patch, size[1] // patch


def cells_to_pixels(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask of cells (B, rows, columns) as one of pixels (B, 1, H, W)."""
    tall, wide = size[0] // cells.shape[1], size[1] // cells.shape[2]
    return cells.repeat_interleave(tall, 1).repeat_interleave(wide, 2)[:, None]


def random_patches(batch: int, size: tuple[int, int], patch: int, count: int, generator: Generator) -> Tensor:
    """A pixel mask (B, 1, H, W) of `count` patches of each picture, drawn without replacement."""
    rows, columns = check_grid(size, patch)
    if not 0 <= count <= rows * columns:
        raise ValueError(f"{count} patches were asked for; pictures have {rows * columns}")
    order = torch.rand(batch, rows * columns, generator=generator).argsort(1)
    cells = torch.zeros(batch, rows * columns, dtype=torch.bool).scatter(1, order[:, :count], True)
    return cells_to_pixels(cells.view(batch, rows, columns), size)


def given_patches(batch: int, size: tuple[int, int], patch: int, places: Sequence[tuple[int, int]]) -> Tensor:
    """A pixel mask (B, 1, H, W) of the patches at `places`, (row, column) in the grid."""
    rows, columns = check_grid(size, patch)
    if outside := [place for place in places if not (0 <= place[0] < rows and 0 <= place[1] < columns)]:
        raise ValueError(f"patch {outside[0]} is outside the grid of {rows} x {columns}")
    cells = torch.zeros(batch, rows, columns, dtype=torch.bool)
    for row, column in places:
        cells[:, row, column] = True
    return cells_to_pixels(cells, size)


def squares(top: Tensor, left: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """A pixel mask (B, 1, H, W) of one square per picture, its corner at (top, left) in pixels, on no grid."""
    if side < 1 or min(size) < side:
        raise ValueError(f"a square of {side} pixels does not fit into pictures of {size[0]} x {size[1]}")
    if (top < 0).any() or (left < 0).any() or (top > size[0] - side).any() or (left > size[1] - side).any():
        raise ValueError(f"a square of {side} pixels at {top.tolist()}, {left.tolist()} leaves the picture")
    inside = [
        (torch.arange(n) >= first[:, None]) & (torch.arange(n) < first[:, None] + side)
        for n, first in zip(size, (top, left), strict=True)
    ]
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]


def random_squares(
    batch: int, size: tuple[int, int], side: int, generator: Generator, *, step: int = 1, offset: int = 0
) -> Tensor:
    """A pixel mask (B, 1, H, W) of one square per picture whose corner lies at a multiple of `step`, plus `offset`.

    step = the model's patch puts it on the model's grid; an offset moves it off.
    """
    if side < 1 or min(size) < side + offset or step < 1 or offset < 0:
        raise ValueError(f"squares of {side} pixels, {offset} off, do not fit into pictures of {size[0]} x {size[1]}")
    top, left = (
        torch.randint(0, (n - side - offset) // step + 1, (batch,), generator=generator) * step + offset for n in size
    )
    return squares(top, left, size, side)
