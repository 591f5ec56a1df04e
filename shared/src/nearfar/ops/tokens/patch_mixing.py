"""Patch Mixing and its relatives: grid cells of one sample in place of another's, dropped, or shuffled."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor


def replaced_count(proportion: float, cells: int) -> int:
    """floor(r N). Raises ValueError for a proportion outside [0, 1]."""
    if not 0 <= proportion <= 1:
        raise ValueError(f"proportion is {proportion}; it must be in [0, 1]")
    return math.floor(proportion * cells)


def smallest_cells(order: Tensor, count: int) -> Bool[Tensor, "b n"]:
    """A mask of the `count` cells with the smallest values of `order` (B, N); of equal ones the first."""
    chosen = order.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter(1, chosen, True)


def random_cells(batch: int, cells: int, proportion: float, generator: Generator | None = None) -> Bool[Tensor, "b n"]:
    """A mask of floor(r N) cells of every sample, drawn without replacement."""
    order = torch.rand(batch, cells, generator=generator)
    return smallest_cells(order, replaced_count(proportion, cells))


def cell_sides(size: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of a cell along every axis. Raises ValueError for a grid that does not divide the sample."""
    if len(size) != len(grid) or any(g < 1 or n % g for n, g in zip(size, grid, strict=False)):
        raise ValueError(f"grid is {tuple(grid)}; it must divide the {tuple(size)} positions axis by axis")
    return tuple(n // g for n, g in zip(size, grid, strict=True))


def spread_cells(
    cells: Bool[Tensor, "b n"], size: tuple[int, ...], grid: tuple[int, ...], offset: tuple[int, ...] = ()
) -> Bool[Tensor, "b 1 *s"]:
    """A mask of cells, row-major, as one of positions; `offset` turns it round by so many positions along each axis."""
    sides = cell_sides(size, grid)
    mask = cells.unflatten(1, grid)
    for axis, side in enumerate(sides):
        mask = mask.repeat_interleave(side, dim=1 + axis)
    if any(offset):
        mask = mask.roll(offset, tuple(range(1, 1 + len(size))))
    return mask[:, None]


def mix_cells(
    a: Float[Tensor, "b c *s"],
    b: Float[Tensor, "b c *s"],
    cells: Bool[Tensor, "b n"],
    grid: tuple[int, ...],
    offset: tuple[int, ...] = (),
) -> Float[Tensor, "b c *s"]:
    """x = (1 - M) a + M b, with M the cells of a `grid` over any number of axes: M copies b where it is set, in place.

    Lee et al., "Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing" (arXiv 2306.17848). Pictures, windows of
    time and volumes alike; no cell moves. Cost O(N).
    """
    if a.shape != b.shape:
        raise ValueError(f"samples are {tuple(a.shape)} and {tuple(b.shape)}; they must have the same shape")
    return torch.where(spread_cells(cells, tuple(a.shape[2:]), grid, offset), b, a)


def mixed_labels(
    a: Int[Tensor, "b"], b: Int[Tensor, "b"], share: Float[Tensor, "b"] | float, classes: int, smoothing: float = 0.0
) -> Float[Tensor, "b k"]:
    """((1 - r) y_a + r y_b) (1 - eps) + eps / K: mixed by the realised share r, then smoothed."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; it must be in [0, 1)")
    share = torch.as_tensor(share, dtype=torch.float32, device=a.device).expand(len(a))[:, None]
    mixed = torch.lerp(F.one_hot(a, classes).float(), F.one_hot(b, classes).float(), share)
    return mixed * (1 - smoothing) + smoothing / classes


def permute_cells(
    x: Float[Tensor, "b c *s"], grid: tuple[int, ...], generator: Generator | None = None
) -> Float[Tensor, "b c *s"]:
    """The cells of every sample in a random order of its own: all content, no positions. Cost O(N)."""
    sides, dims = cell_sides(tuple(x.shape[2:]), grid), len(grid)
    order = torch.rand(len(x), math.prod(grid), generator=generator).argsort(1).to(x.device)
    for axis, side in enumerate(sides):
        x = x.unflatten(2 + 2 * axis, (-1, side))
    first, second = (range(start, 2 + 2 * dims, 2) for start in (2, 3))
    cells = x.permute(0, *first, 1, *second).flatten(1, dims)
    index = order.view(*order.shape, *(1,) * (cells.ndim - 2)).expand_as(cells)
    cells = cells.gather(1, index).unflatten(1, grid)
    # (b, g..., c, p...) back to (b, c, g p, ...)
    back = [0, 1 + dims, *(i for axis in range(dims) for i in (1 + axis, 2 + dims + axis))]
    x = cells.permute(back)
    for axis in range(dims):
        x = x.flatten(2 + axis, 3 + axis)
    return x


class PatchMixing:
    """Patch Mixing of a batch with itself turned round, as timm pairs: samples and soft labels.

    Args:
        num_classes: classes K.
        proportion: r, one number, or the bounds of a uniform draw for each batch.
        grids: cells along each axis, one of them at random for each batch.
        probability: of mixing a batch at all.
        smoothing: eps of the labels.

    What is published leaves the grid, r and the probability open: 7 and 14 cells, r up to 0.5 and 0.5 are choices here.
    Samples are (B, C, *S) after normalization; with one axis the grid cuts windows of time.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        num_classes: int,
        proportion: float | tuple[float, float] = (0.0, 0.5),
        grids: tuple[int | tuple[int, ...], ...] = (7, 14),
        probability: float = 0.5,
        smoothing: float = 0.1,
    ) -> None:
        low, high = (proportion, proportion) if isinstance(proportion, int | float) else proportion
        if not 0 <= low <= high <= 1:
            raise ValueError(f"proportion is {proportion}; it must lie in [0, 1], the lower bound first")
        if not grids or not 0 <= probability <= 1:
            raise ValueError(f"grids={grids} must not be empty and probability={probability} lie in [0, 1]")
        self.num_classes, self.low, self.high = num_classes, low, high
        self.grids, self.probability, self.smoothing = tuple(grids), probability, smoothing

    def __call__(
        self, x: Float[Tensor, "b c *s"], labels: Int[Tensor, "b"], generator: Generator | None = None
    ) -> tuple[Float[Tensor, "b c *s"], Float[Tensor, "b k"]]:
        draw, which = torch.rand(2, generator=generator).tolist()
        choice = int(torch.randint(len(self.grids), (), generator=generator))
        grid, dims = self.grids[choice], x.ndim - 2
        grid = (grid,) * dims if isinstance(grid, int) else tuple(grid)
        share = 0.0
        if which < self.probability:
            cells = random_cells(len(x), math.prod(grid), self.low + draw * (self.high - self.low), generator)
            x, share = mix_cells(x, x.flip(0), cells.to(x.device), grid), float(cells[0].float().mean())
        return x, mixed_labels(labels, labels.flip(0), share, self.num_classes, self.smoothing)
