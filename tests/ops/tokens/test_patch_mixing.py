"""Cells of a grid in place of another's: exact proportions, labels by the realised share, any number of axes."""

import itertools
import math

import pytest
import torch

from nearfar.ops.tokens.patch_mixing import (
    PatchMixing,
    mix_cells,
    mixed_labels,
    permute_cells,
    random_cells,
    replaced_count,
    smallest_cells,
)

SIZES = {1: ((24,), (4,)), 2: ((12, 8), (3, 4)), 3: ((4, 6, 2), (2, 3, 1))}


@pytest.mark.parametrize("dims", SIZES)
def test_it_is_the_obvious_form(dims: int) -> None:
    size, grid = SIZES[dims]
    a, b = torch.randn(2, 3, 2, *size).double()
    cells = random_cells(3, math.prod(grid), 0.4, torch.Generator().manual_seed(0))
    assert cells.sum(1).tolist() == [math.floor(0.4 * math.prod(grid))] * 3
    slow = a.clone()
    for i, (number, cell) in itertools.product(range(3), enumerate(itertools.product(*map(range, grid)))):
        box = tuple(slice(c * (n // g), (c + 1) * (n // g)) for c, n, g in zip(cell, size, grid, strict=True))
        if cells[i, number]:
            slow[(i, slice(None), *box)] = b[(i, slice(None), *box)]
    assert torch.equal(mix_cells(a, b, cells, grid), slow)
    axes = tuple(range(2, 2 + dims))
    back, forth = (lambda x: x.roll((-1,) * dims, axes)), (lambda x: x.roll((1,) * dims, axes))
    assert torch.equal(mix_cells(a, b, cells, grid, (1,) * dims), forth(mix_cells(back(a), back(b), cells, grid)))
    shuffled = permute_cells(a, grid, torch.Generator().manual_seed(1))
    assert torch.equal(shuffled.flatten(2).sort(2).values, a.flatten(2).sort(2).values), "nothing is lost"
    assert pieces(shuffled, size, grid) == pieces(a, size, grid)
    assert torch.equal(permute_cells(a, (1,) * dims), a)


def pieces(x: torch.Tensor, size: tuple[int, ...], grid: tuple[int, ...]) -> set[tuple[float, ...]]:
    """The contents of the cells of the first sample."""
    sides = [n // g for n, g in zip(size, grid, strict=True)]
    cells = itertools.product(*map(range, grid))
    boxes = [tuple(slice(c * n, (c + 1) * n) for c, n in zip(cell, sides, strict=True)) for cell in cells]
    return {tuple(x[(0, slice(None), *box)].flatten().tolist()) for box in boxes}


def test_labels_are_mixed_by_the_realised_share_and_then_smoothed() -> None:
    a, b = torch.tensor([0, 2]), torch.tensor([1, 2])
    y = mixed_labels(a, b, 4 / 49, 3, 0.1)
    want = torch.tensor([[45 / 49, 4 / 49, 0], [0, 0, 1]]) * 0.9 + 0.1 / 3
    assert torch.allclose(y, want)
    assert smallest_cells(torch.tensor([[5, 1, 1, 0]]), 2).tolist() == [[False, True, False, True]], "first of equals"
    mixing = PatchMixing(3, 0.3, (7,), 1.0, 0.0)
    x = torch.arange(2.0)[:, None, None, None].expand(2, 3, 14, 14)
    mixed, soft = mixing(x, a)
    share = replaced_count(0.3, 49) / 49
    assert mixed.mean((1, 2, 3)).tolist() == pytest.approx([share, 1 - share])
    assert soft[0].tolist() == pytest.approx([1 - share, 0, share])
    never = PatchMixing(3, probability=0.0)
    assert torch.equal(never(x, a)[0], x)
    sound = torch.randn(2, 1, 16)
    drawn = [PatchMixing(3, grids=(4,))(sound, a, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    volume = PatchMixing(3, grids=((2, 2, 1),), probability=1.0)(torch.randn(2, 1, 4, 4, 3), a)[0]
    assert volume.shape == (2, 1, 4, 4, 3)


def test_refusals() -> None:
    x = torch.randn(2, 1, 12, 12)
    with pytest.raises(ValueError, match="divide"):
        mix_cells(x, x, torch.zeros(2, 25).bool(), (5, 5))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        replaced_count(1.1, 4)
    with pytest.raises(ValueError, match="lower bound"):
        PatchMixing(3, (0.5, 0.1))
    with pytest.raises(ValueError, match="smoothing"):
        mixed_labels(torch.zeros(1).long(), torch.zeros(1).long(), 0.1, 2, 1.0)
