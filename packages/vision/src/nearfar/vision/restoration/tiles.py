"""Enlarging pictures of any size in bounded memory, tile by tile."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.core.tensor_memory import peak_memory
from nearfar.vision.restoration.restorer import Restorer

Blend = Literal["cosine", "core", "average"]
"""How tiles that overlap become one picture: weights that fall as a half cosine over the overlap; each tile's middle
alone, the overlap being its context; or equal weights."""


RESIDENT = 4.0
"""Bytes that a process comes to hold for each byte of the tensors that a tile's work has alive, for scratch space and
what the allocator keeps: on Linux 1.5 to 1.9 after one pass of CATANet or DRCT, 3.5 after a picture of many tiles."""


@dataclass(frozen=True)
class Tiling:
    """Square tiles of `tile` pixels of the input, the next beginning `overlap` before the end of the last."""

    tile: int
    overlap: int = 32
    blend: Blend = "cosine"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and below tile, {self.tile}")
        if self.blend not in ("cosine", "core", "average"):
            raise ValueError(f"blend is {self.blend!r}; allowed are 'cosine', 'core' and 'average'")

    def check(self, multiple: int) -> None:
        """Raise ValueError unless tiles can begin at multiples of so many pixels."""
        if self.tile % multiple or self.overlap % multiple:
            raise ValueError(f"tile {self.tile} and overlap {self.overlap} must be multiples of {multiple}")

    def spans(self, length: int, multiple: int) -> list[tuple[int, int]]:
        """Begin and end of the tiles along an axis; all begin at a multiple, and the last ends with the axis."""
        if length <= self.tile:
            return [(0, length)]
        self.check(multiple)
        step = self.tile - self.overlap
        begins = range(0, length - self.overlap, step)
        return [(begin, min(begin + self.tile, length)) for begin in begins]

    def weights(self, spans: list[tuple[int, int]], index: int, scale: int) -> Float[Tensor, " n"]:
        """What each output position of a tile counts, before all tiles' weights are made to sum to one."""
        begin, end = spans[index]
        weights = torch.ones((end - begin) * scale)
        shared = [spans[index - 1][1] - begin if index else 0, end - spans[index + 1][0] if spans[index + 1 :] else 0]
        for n, turn in zip((n * scale for n in shared), (False, True), strict=True):
            if n == 0 or self.blend == "average":
                continue
            place = (torch.arange(n) + 0.5) / n
            core = (place > 0.5 if turn else place >= 0.5).float()  # the middle one belongs to the later tile
            ramp = (1 - torch.cos(math.pi * place)) / 2 if self.blend == "cosine" else core
            if turn:
                weights[-n:] *= ramp.flip(0)
            else:
                weights[:n] *= ramp
        return weights


@dataclass(frozen=True)
class Band:
    """Rows of the enlarged picture that are ready, and what going on from there needs."""

    first: int
    """The first row of the output."""
    rows: Float[Tensor, "c k w"]
    done: int
    """Rows of tiles that are done."""
    begun: Float[Tensor, "c k w"] | None
    """Weighted sums of the rows that the next row of tiles shares."""


@torch.inference_mode()
def bands(
    model: Restorer,
    picture: Shaped[Tensor, "c h w"],
    tiling: Tiling,
    *,
    peak: float = 1.0,
    ensemble: bool = False,
    done: int = 0,
    begun: Float[Tensor, "c k w"] | None = None,
) -> Iterator[Band]:
    """The enlarged picture from above, a row of tiles at a time; `done` and `begun` of a band go on behind it.

    `picture` holds 0 .. `peak`, in whatever dtype. Holds a row of tiles and no more of the output, which is in [0, 1]
    but for overshoots.
    """
    scale, (height, width) = model.scale, picture.shape[1:]
    rows, columns = tiling.spans(height, model.multiple), tiling.spans(width, model.multiple)
    across = [tiling.weights(columns, j, scale) for j in range(len(columns))]
    total, down = torch.zeros(width * scale), torch.zeros(height * scale)
    for (left, right), weights in zip(columns, across, strict=True):
        total[left * scale : right * scale] += weights
    for i, (top, bottom) in enumerate(rows):
        down[top * scale : bottom * scale] += tiling.weights(rows, i, scale)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    for i in range(done, len(rows)):
        top, bottom = rows[i]
        band = torch.zeros(len(picture), (bottom - top) * scale, width * scale)
        for (left, right), weights in zip(columns, across, strict=True):
            tile = picture[None, :, top:bottom, left:right].to(device, dtype) / peak
            out = ensembled(model, tile) if ensemble else model(tile)
            band[..., left * scale : right * scale] += out[0].float().cpu() * weights
        band /= total
        sums = band * tiling.weights(rows, i, scale)[:, None]
        if begun is not None:
            sums[:, : begun.shape[1]] += begun
        ready = sums.shape[1] if i + 1 == len(rows) else (rows[i + 1][0] - top) * scale
        begun = None if i + 1 == len(rows) else sums[:, ready:]
        weight = down[top * scale : top * scale + ready, None]
        yield Band(top * scale, sums[:, :ready] / weight, i + 1, begun)


def upscale(
    model: Restorer, picture: Float[Tensor, "c h w"], tiling: Tiling | None = None, *, ensemble: bool = False
) -> Float[Tensor, "c p q"]:
    """`picture` (in_chans, H, W) in [0, 1] enlarged, not clamped: whole, or in tiles.

    Tiles that begin at multiples of `model.multiple` and overlap by twice `model.context` give what the whole picture
    gives with `blend="core"`; with less overlap, and for models whose outputs depend on all of the picture (`context`
    is None), the result is another. `ensemble`: the mean over the eight flips and turns, at eight times the cost.
    """
    tiling = tiling or Tiling(max(picture.shape[1:]), 0)
    return torch.cat([band.rows for band in bands(model, picture, tiling, ensemble=ensemble)], 1)


def ensembled(model: Restorer, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c p q"]:
    """The mean of the model's outputs over flips and turns of the input, each turned back."""
    total = torch.zeros((), device=x.device, dtype=x.dtype)
    for flips in ([], [2], [3], [2, 3]):
        for turn in (False, True):
            y = x.flip(flips)
            y = model(y.mT if turn else y)
            total = total + (y.mT if turn else y).flip(flips)
    return total / 8


def choose_tiling(model: Restorer, size: tuple[int, int], memory: int, overlap: int = 32) -> Tiling:
    """The largest tiles for which the model's work fits into `memory` bytes; the whole picture where it fits.

    The work is measured on two small pictures and grows with the area. Raises UserError where not even a tile of 64
    pixels fits; the line says what it would take.
    """
    sides = (64, 128)
    like = next(model.parameters())
    measured = []
    for side in sides:
        x = torch.rand(1, model.in_chans, side, side, device=like.device, dtype=like.dtype)
        with torch.inference_mode():
            measured.append(peak_memory(partial(model, x), like.device.type))
    slope = (measured[1] - measured[0]) / (sides[1] ** 2 - sides[0] ** 2)
    fixed = max(measured[0] - slope * sides[0] ** 2, 0)
    # a row of tiles of the output, its sums and a copy, beside the tile
    row = 3 * 4 * len(("row", "sums", "copy")) * model.scale**2 * size[1]

    def need(side: int) -> float:
        return RESIDENT * (fixed + slope * side * min(side, size[1])) + row * side

    if need(max(size)) <= memory:
        return Tiling(max(size), 0)
    step = math.lcm(model.multiple, 16)
    overlap = -(-overlap // model.multiple) * model.multiple
    best = max((side for side in range(step, max(size), step) if need(side) <= memory), default=0)
    if best < max(64, overlap + step):
        raise UserError(
            f"{memory / 2**20:.0f} MB are left for the model's work; a tile of 64 pixels takes {need(64) / 2**20:.0f}"
        )
    return Tiling(best, overlap)
