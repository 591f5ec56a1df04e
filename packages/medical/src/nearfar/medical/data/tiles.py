"""Histology: folders of tiles, splits by slide, whole slides in bounded memory, stains, from tiles to a slide."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.core.reading import UNIFORM, reading

READABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
AGGREGATIONS = ("mean", "vote", "max")


@dataclass(frozen=True)
class Tile:
    """A labelled tile."""

    path: Path
    label: str
    slide: str


def find_tiles(folder: str | Path, slide_pattern: str = r"^([^_]+)_") -> list[Tile]:
    """The tiles of `folder/<class>/<slide>_<anything>.png`, sorted by path.

    `slide_pattern`: regular expression on the file's name whose one group is the slide or, better, the patient.
    Raises UserError for a missing folder, fewer than two classes, or names that do not tell the slide.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    tiles = []
    for kind in sorted(p for p in root.iterdir() if p.is_dir()):
        for path in sorted(p for p in kind.rglob("*") if p.suffix.lower() in READABLE):
            match = re.search(slide_pattern, path.name)
            if match is None:
                raise UserError(f"{path}: its name does not tell the slide ({slide_pattern}); give another pattern")
            tiles.append(Tile(path, kind.name, match[1]))
    if len({tile.label for tile in tiles}) < 2:
        raise UserError(f"{root}: holds tiles of {len({t.label for t in tiles})} classes; a folder per class is needed")
    return tiles


def split_by_slide(tiles: Sequence[Tile], folds: int = 5, seed: int = 0) -> list[tuple[list[Tile], list[Tile]]]:
    """Cross-validation: (training, validation) tiles of each fold, no slide on both sides, every class on both.

    Slides are dealt out class by class, the largest first, to the fold that has least of their class.
    """
    slides: dict[str, list[Tile]] = {}
    for tile in tiles:
        slides.setdefault(tile.slide, []).append(tile)
    if folds < 2 or folds > len(slides):
        raise UserError(f"{folds} folds need at least 2 folds and as many slides; there are {len(slides)}")
    labels = sorted({tile.label for tile in tiles})
    order = sorted(slides)
    np.random.default_rng(seed).shuffle(order)
    counts = {s: np.array([sum(t.label == label for t in slides[s]) for label in labels]) for s in order}
    rarity = np.sum(list(counts.values()), axis=0, dtype=float)
    order.sort(key=lambda s: -float((counts[s] / rarity).sum()))
    held: list[set[str]] = [set() for _ in range(folds)]
    filled = np.zeros((folds, len(labels)))
    for slide in order:
        fold = int((filled @ (counts[slide] / rarity) + 1e-9 * filled.sum(1)).argmin())
        held[fold].add(slide)
        filled[fold] += counts[slide]
    parts = [([t for t in tiles if t.slide not in h], [t for t in tiles if t.slide in h]) for h in held]
    for train, validation in parts:
        check_tile_split(train, validation)
        if missing := [name for name in labels if name not in {t.label for t in train}]:
            raise UserError(f"class {missing[0]} is on too few slides for {folds} folds; take fewer")
    return parts


def check_tile_split(train: Iterable[Tile], validation: Iterable[Tile]) -> None:
    """Raise UserError where a slide has tiles on both sides."""
    both = {t.slide for t in train} & {t.slide for t in validation}
    if both:
        raise UserError(f"slides on both sides of the split: {', '.join(sorted(both)[:5])}; split by slide")


def aggregate(probabilities: Tensor, how: str = "mean") -> Tensor:
    """Class probabilities of a slide `(K,)` from those of its tiles `(N, K)`.

    "mean" averages, "vote" counts each tile's most likely class, "max" takes each class's highest and normalizes.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"how is {how!r}; allowed are {', '.join(AGGREGATIONS)}")
    if how == "vote":
        votes = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        return votes.to(probabilities.dtype) / len(probabilities)
    if how == "max":
        highest = probabilities.amax(0)
        return highest / highest.sum()
    return probabilities.mean(0)


# haematoxylin, eosin, residual: optical densities of the stains in red, green, blue (Ruifrok & Johnston 2001)
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def jitter_stains(tile: Tensor, strength: float = 0.05, generator: torch.Generator | None = None) -> Tensor:
    """Stain augmentation of `(3, H, W)` in 0..1: each stain's density times 1 +- strength, plus +- strength."""
    matrix = torch.nn.functional.normalize(torch.tensor(STAINS, dtype=tile.dtype, device=tile.device), dim=1)
    density = -torch.log(tile.clamp_min(1 / 255)).flatten(1).T @ matrix.inverse()
    factor, shift = (strength * (2 * torch.rand(3, generator=generator).to(density) - 1) for _ in range(2))
    density = density * (1 + factor) + shift
    return torch.exp(-(density @ matrix)).clamp(0, 1).T.reshape(tile.shape)


class Slide:
    """A tiled, pyramidal TIFF, read piece by piece; memory is that of the pieces.

    `levels`: (height, width) of each resolution, finest first. Raises UserError for a file that is no tiled pyramid.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with reading(self.path, "cannot be read as a TIFF slide"):
            self.file = tifffile.TiffFile(self.path)
            every: list[Any] = list(self.file.series)
            series = max(every, key=lambda s: s.pages[0].imagelength * s.pages[0].imagewidth)
            self.pages: list[Any] = [level.pages[0] for level in series.levels]
        if len(self.pages) < 2:
            raise UserError(
                f"{self.path}: has no pyramid; save it with smaller levels, for example with vips --pyramid"
            )
        if not all(page.is_tiled and page.samplesperpixel >= 3 for page in self.pages):
            raise UserError(f"{self.path}: its levels must be tiled and in colour")
        for level, page in enumerate(self.pages):
            tiles = -(-page.imagelength // max(1, page.tilelength)) * -(-page.imagewidth // max(1, page.tilewidth))
            if not tiles == len(page.dataoffsets) == len(page.databytecounts):
                raise UserError(
                    f"{self.path}: level {level} announces {tiles:,} tiles and holds {len(page.dataoffsets):,}; it is "
                    "damaged, copy it again"
                )
            if page.tilelength * page.tilewidth > UNIFORM:
                raise UserError(f"{self.path}: tiles of {page.tilelength} x {page.tilewidth} pixels are too large")
        self.levels = [(page.imagelength, page.imagewidth) for page in self.pages]

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def read(self, top: int, left: int, height: int, width: int, level: int = 0) -> np.ndarray:
        """A region (height, width, 3) uint8 of a level, by the file's own tiles; white beyond its edge.

        Raises UserError for a tile that cannot be decoded.
        """
        page = self.pages[level]
        th, tw = page.tilelength, page.tilewidth
        columns = -(-page.imagewidth // tw)
        region = np.full((height, width, 3), 255, np.uint8)
        rows = range(max(0, top) // th, -(-min(top + height, page.imagelength) // th))
        for row in rows:
            for column in range(max(0, left) // tw, -(-min(left + width, page.imagewidth) // tw)):
                data = self._tile(page, row * columns + column, level)
                if data is None:
                    continue
                y, x = row * th, column * tw
                data = data[: page.imagelength - y, : page.imagewidth - x, :3]
                y0, x0 = max(y, top), max(x, left)
                y1, x1 = min(y + data.shape[0], top + height), min(x + data.shape[1], left + width)
                if y1 > y0 and x1 > x0:
                    region[y0 - top : y1 - top, x0 - left : x1 - left] = data[y0 - y : y1 - y, x0 - x : x1 - x]
        return region

    def _tile(self, page: Any, index: int, level: int) -> np.ndarray | None:
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        if size == 0:  # left out by the scanner: glass
            return None
        with reading(self.path, f"tile {index} of level {level} is broken"):
            handle = self.file.filehandle
            handle.seek(offset)
            data, _, shape = page.decode(handle.read(size), index, jpegtables=page.jpegtables)
            if data is None:
                raise ValueError("no data")
            return np.asarray(data).reshape(shape)[0] if np.asarray(data).ndim == 4 else np.asarray(data)

    def tissue(self, largest: int = 2048) -> tuple[np.ndarray, float]:
        """A mask of tissue on a coarse level and how many finest pixels one of its pixels spans.

        Tissue is where the saturation is above Otsu's threshold and above 0.05. Raises UserError where there is none.
        """
        level = next((i for i, s in enumerate(self.levels) if max(s) <= largest), len(self.levels) - 1)
        small = self.read(0, 0, *self.levels[level], level).astype(np.float32)
        high, low = small.max(-1), small.min(-1)
        saturation = (high - low) / np.maximum(high, 1)
        if saturation.max() < 0.05:
            raise UserError(f"{self.path}: holds no tissue")
        return saturation > max(0.05, float(threshold_otsu(saturation))), self.levels[0][0] / self.levels[level][0]

    def tiles(self, size: int, least: float = 0.5) -> Iterator[tuple[int, int, np.ndarray]]:
        """(row, column, tile) of the grid of `size` pixels whose tissue covers at least the share `least` of it."""
        mask, scale = self.tissue()
        height, width = self.levels[0]
        found = 0
        for row in range(height // size):
            for column in range(width // size):
                y, x = int(row * size / scale), int(column * size / scale)
                step = max(1, int(size / scale))
                if mask[y : y + step, x : x + step].mean() >= least:
                    found += 1
                    yield row, column, self.read(row * size, column * size, size, size)
        if not found:
            raise UserError(f"{self.path}: no tile of {size} pixels has {100 * least:.0f} % tissue")
