"""A scan in memory: its image, and where its voxels lie."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

SAME = 0.1
"""Voxels by which two grids may differ at their corners and still be one."""


@dataclass
class Scan:
    """An image (C, *S) in float32 and where its voxels lie.

    `affine` (4, 4) is None for pictures, whose axes are (row, column). `source` is what its format needs to write
    something on the same grid; `notes` say what had to be decided about it.
    """

    path: Path
    image: np.ndarray
    affine: np.ndarray | None = None
    kind: str = "picture"
    source: Any = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel along each axis, in mm; 1 for pictures."""
        if self.affine is None:
            return (1.0,) * (self.image.ndim - 1)
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Directions in which the axes grow, such as RAS or LPS; "rows, columns" for pictures."""
        return "rows, columns" if self.affine is None else "".join(nib.aff2axcodes(self.affine))

    def canonical(self) -> np.ndarray:
        """The image (C, *S), its axes permuted and flipped so that they come nearest to RAS+; a view, not resampled."""
        if self.affine is None:
            return self.image
        order = io_orientation(self.affine) + np.array([1, 0])  # after the channels
        return apply_orientation(self.image, np.vstack([[0, 1], order]))

    def canonical_shape(self) -> tuple[int, ...]:
        """`shape` in the order of `canonical`."""
        return self._canonical(self.shape)

    def canonical_spacing(self) -> tuple[float, ...]:
        """`spacing` in the order of `canonical`."""
        return self._canonical(self.spacing)

    def _canonical(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.affine is None:
            return values
        order = io_orientation(self.affine)[:, 0].astype(int)
        return tuple(values[int(np.flatnonzero(order == axis)[0])] for axis in range(3))

    def to_canonical(self, labels: np.ndarray) -> np.ndarray:
        """A map on this scan's grid, in the order of `canonical`."""
        return labels if self.affine is None else apply_orientation(labels, io_orientation(self.affine))

    def from_canonical(self, labels: np.ndarray) -> np.ndarray:
        """A map in the order of `canonical`, on this scan's grid: the exact inverse of `to_canonical`."""
        if self.affine is None:
            return labels
        order = io_orientation(self.affine)
        back = np.zeros_like(order)
        for axis, (target, flip) in enumerate(order):
            back[int(target)] = (axis, flip)
        return apply_orientation(labels, back)


def no_image(shape: Iterable[int]) -> np.ndarray:
    """An array of NaN of this shape that takes no memory: the image of a scan of which only the header was read."""
    return np.broadcast_to(np.float32(np.nan), tuple(shape))


def grid_distance(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """The largest distance along an axis, in voxels of `first`, between the corners of a grid under two affines."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))], float).T
    return float(np.abs(np.linalg.solve(first, second @ corners) - corners)[:3].max())
