"""Scan orders as data: in which order a recurrence visits the positions of a grid of 1, 2 or 3 axes.

Every order here is a sort: `ORDERS[name]` gives the keys of each position, most significant first, and the positions
are visited by rising keys. `scan_order` makes tables of positions of them, one row per direction, and keeps them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nearfar.ops.common.tables import cached_table

Keys = list[Tensor]


def _along(axes: Keys, axis: int) -> Keys:
    """The axis `axis` runs fastest, the others as they come."""
    return [a for i, a in enumerate(axes) if i != axis] + [axes[axis]]


def _snake(axes: Keys) -> Keys:
    """Row by row, every second row backwards, so that each step goes to a neighbour."""
    keys, turns = [], torch.zeros_like(axes[0])
    for axis in axes:
        keys.append(torch.where(turns % 2 == 1, -axis, axis))
        turns = turns + axis
    return keys


def _windowed(axes: Keys, window: int) -> Keys:
    return [a // window for a in axes] + [a % window for a in axes]


def _atrous(axes: Keys, step: int) -> Keys:
    return [a % step for a in axes] + [a // step for a in axes]


ORDERS: dict[str, Callable[..., Keys]] = {
    "row": lambda axes: axes,
    "column": lambda axes: _along(axes, 0),
    "middle": lambda axes: _along(axes, len(axes) // 2),
    "snake": _snake,
    "windowed": _windowed,
    "atrous": _atrous,
    "slices": lambda axes: axes,
}
"""Name -> keys of the positions with coordinates `axes` (one flat tensor per axis).

row: the last axis fastest. column: the first axis fastest. middle: in 3-D, the second axis fastest. snake: row by row,
every second one backwards (PlainMamba). windowed: windows of `window` positions a side one after the other
(LocalMamba). atrous: every `step`-th position, then the same one further (EfficientVMamba). slices: one position of
each of `slices` equal runs of the flat sequence, then the next of each (SegMamba).
"""

SETS = {
    "bidirectional": ("row", "row-reversed"),
    "cross": ("row", "column", "row-reversed", "column-reversed"),
    "tri": ("row", "row-reversed", "slices"),
    "axes": ("row", "middle", "column", "row-reversed", "middle-reversed", "column-reversed"),
}
"""Published sets of directions: Vim, VMamba, SegMamba; `axes` is VMamba's for three axes."""


@cached_table
def _table(name: str, size: tuple[int, ...], option: int | None, device: torch.device) -> Tensor:
    kind, _, reverse = name.partition("-")
    n = math.prod(size)
    if kind == "slices":
        if option is None or option < 1 or n % option:
            raise ValueError(f"slices={option} must divide the {n} positions of a grid of {size}")
        return torch.arange(n, device=device).view(option, -1).T.flatten()
    axes = [a.flatten() for a in torch.meshgrid(*(torch.arange(s, device=device) for s in size), indexing="ij")]
    keys = ORDERS[kind](axes) if option is None else ORDERS[kind](axes, option)
    rank = torch.zeros_like(axes[0])
    for key in keys:  # one number per position; keys are small, so nothing overflows
        key = key - key.min()
        rank = rank * (key.max() + 1) + key
    order = rank.argsort()
    return order.flip(0) if reverse else order


def scan_order(
    names: str | tuple[str, ...],
    size: tuple[int, ...],
    *,
    window: int | None = None,
    step: int | None = None,
    slices: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`(K, N)`: for each of K directions, the N positions (row-major numbers) of a grid in the order of the scan.

    Args:
        names: orders of `ORDERS`, each perhaps with "-reversed" behind it, or one name of `SETS`.
        size: lengths of the grid's 1 to 3 axes.
        window, step, slices: what the orders "windowed", "atrous" and "slices" need.
        device: where the table is wanted.
    """
    if isinstance(names, str):
        names = SETS.get(names, (names,))
    options = {"windowed": ("window", window), "atrous": ("step", step), "slices": ("slices", slices)}
    size = tuple(map(int, size))
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise ValueError(f"size is {size}; a grid has 1, 2 or 3 axes of at least one position")
    rows = []
    for name in names:
        kind, _, ending = name.partition("-")
        if kind not in ORDERS or ending not in ("", "reversed"):
            raise ValueError(
                f"no scan order {name!r}; there are {', '.join(ORDERS)}, each also with -reversed, and the sets "
                f"{', '.join(SETS)}"
            )
        needed, option = options.get(kind, ("", None))
        if needed and (option is None or option < 1):
            raise ValueError(f"the scan order {name!r} needs {needed}, at least 1; given is {option}")
        rows.append(_table(name, size, option, torch.device(device)))
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def invert(order: Tensor) -> Tensor:
    """The inverse of each row: when each position is visited."""
    steps = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, steps)
