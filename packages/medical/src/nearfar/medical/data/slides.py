"""Whole slides in bounded memory: tiled pyramidal TIFF, OME-TIFF and SVS by tifffile, other scanners' by OpenSlide."""

import io
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from skimage.filters import threshold_otsu

from nearfar.core.errors import UserError
from nearfar.core.reading import UNIFORM, reading

TIFFS = (".tif", ".tiff", ".btf", ".svs")
OTHERS = (".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
"""Formats of scanners that OpenSlide reads."""

CACHE = 64 << 20
"""Bytes of the file's own tiles that are kept decoded: those at the edges of regions are read again and again."""

WIDEST = 10.0
"""Microns per pixel above which a TIFF's resolution is that of a printer and not of a scanner."""

JPEG, JPEG_2000, APERIO_YCBCR = (6, 7), (33003, 33004, 33005, 34712), 33003
"""TIFF's numbers of compressions that Pillow decodes; the others are tifffile's."""

ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""A JPEG segment that says: three channels are red, green, blue."""


class Slide(ABC):
    """A slide of several resolutions, read piece by piece; memory is that of the pieces.

    `levels`: (height, width) of each resolution, finest first. `mpp`: microns per pixel of the finest, None where the
    file does not tell.
    """

    path: Path
    levels: list[tuple[int, int]]
    mpp: float | None

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def read(self, top: int, left: int, height: int, width: int, level: int = 0) -> np.ndarray:
        """A region (height, width, 3) uint8 of a level, in its own pixels; white beyond its edge.

        Raises UserError for a part that cannot be decoded.
        """

    def thumbnail(self, largest: int = 2048) -> np.ndarray:
        """The whole slide with at most `largest` pixels a side, by the finest level that fits and can be read.

        Where no level is small enough, every n-th pixel of the coarsest. Raises UserError where none can be read.
        """
        fitting = [level for level, size in enumerate(self.levels) if max(size) <= largest] or [len(self.levels) - 1]
        for level in fitting:
            height, width = self.levels[level]
            step = -(-max(height, width) // largest)
            rows = max(1, UNIFORM // 4 // width // step) * step
            try:
                strips = [
                    self.read(top, 0, min(rows, height - top), width, level)[::step, ::step].copy()
                    for top in range(0, height, rows)
                ]
            except UserError:  # a broken part of this level, which is told where a tile needs it
                if level == fitting[-1]:
                    raise
                continue
            return np.concatenate(strips)
        raise AssertionError("there is a level")

    @cached_property
    def _tissue(self) -> np.ndarray:
        small = self.thumbnail()
        high, low = small.max(-1), small.min(-1)
        saturation = (high - low).astype(np.float32) / np.maximum(high, 1)
        if saturation.max() < 0.05:
            raise UserError(f"{self.path}: holds no tissue")
        return saturation > max(0.05, float(threshold_otsu(saturation)))

    def tissue(self) -> tuple[np.ndarray, float]:
        """A mask of tissue on a coarse level and how many finest pixels one of its pixels spans.

        Tissue is where the saturation is above Otsu's threshold and above 0.05. Raises UserError where there is none.
        """
        return self._tissue, max(self.levels[0]) / max(self._tissue.shape)

    def places(self, side: int, least: float = 0.5) -> list[tuple[int, int]]:
        """(top, left) of the squares of a grid of `side` finest pixels of which tissue covers at least `least`.

        The grid covers the slide; squares at its right and lower edge hang over. Raises UserError where there is none.
        """
        mask, scale = self.tissue()
        height, width = self.levels[0]
        total = np.pad(mask.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0)))

        def edges(length: int, most: int) -> tuple[np.ndarray, np.ndarray]:
            starts = np.minimum(np.arange(0, length, side) / scale, most - 1).astype(int)
            return starts, np.minimum(starts + max(1, int(side / scale)), most)

        (top, bottom), (left, right) = edges(height, mask.shape[0]), edges(width, mask.shape[1])
        covered = total[bottom][:, right] - total[top][:, right] - total[bottom][:, left] + total[top][:, left]
        found = np.argwhere((covered > 0) & (covered >= least * max(1, int(side / scale)) ** 2)) * side
        if not len(found):
            raise UserError(f"{self.path}: no tile of {side} pixels has {100 * least:.0f} % tissue")
        return [(int(t), int(x)) for t, x in found]

    def square(self, top: int, left: int, side: int, pixels: int) -> np.ndarray:
        """The square of `side` finest pixels at (top, left) as a tile of `pixels`, by the coarsest level with them."""
        ratios = [self.levels[0][0] / height for height, _ in self.levels]
        level = max((i for i, ratio in enumerate(ratios) if ratio <= side / pixels * 1.01), default=0)
        there = round(side / ratios[level])
        region = self.read(round(top / ratios[level]), round(left / ratios[level]), there, there, level)
        if there == pixels:
            return region
        return np.asarray(Image.fromarray(region).resize((pixels, pixels), Image.Resampling.LANCZOS))

    def tiles(self, size: int, least: float = 0.5) -> Iterator[tuple[int, int, np.ndarray]]:
        """(row, column, tile) of `places` in a grid of `size` finest pixels."""
        for top, left in self.places(size, least):
            yield top // size, left // size, self.read(top, left, size, size)


class TiffSlide(Slide):
    """A tiled, pyramidal TIFF (also OME-TIFF, SVS). Raises UserError for a file that is none, or is cut off."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with reading(self.path, "cannot be read as a TIFF slide"):
            self.file = tifffile.TiffFile(self.path)
            try:
                self.pages = _pyramid(self.file)
                self._check()
                self.levels = [(page.imagelength, page.imagewidth) for page in self.pages]
                self.mpp = _microns(self.file, self.pages[0])
            except BaseException:
                self.file.close()
                raise
        self._cache: OrderedDict[tuple[int, int], np.ndarray | None] = OrderedDict()
        self._cached = 0

    def _check(self) -> None:
        size = self.file.filehandle.size
        for level, page in enumerate(self.pages):
            beyond = sum(o + n > size for o, n in zip(page.dataoffsets, page.databytecounts))
            if beyond:
                raise UserError(
                    f"{self.path}: is cut off: {beyond:,} of the {len(page.dataoffsets):,} parts of level {level} lie "
                    "beyond its end; copy it again"
                )
        if len(self.pages) < 2:
            raise UserError(
                f"{self.path}: has no pyramid; save it with smaller levels, for example with vips --pyramid"
            )
        if not all(page.is_tiled and page.samplesperpixel >= 3 and page.planarconfig == 1 for page in self.pages):
            raise UserError(f"{self.path}: its levels must be tiled and in colour, the channels side by side")
        for level, page in enumerate(self.pages):
            tiles = -(-page.imagelength // max(1, page.tilelength)) * -(-page.imagewidth // max(1, page.tilewidth))
            if not tiles == len(page.dataoffsets) == len(page.databytecounts):
                raise UserError(
                    f"{self.path}: level {level} announces {tiles:,} tiles and holds {len(page.dataoffsets):,}; it is "
                    "damaged, copy it again"
                )
            if page.tilelength * page.tilewidth > UNIFORM:
                raise UserError(f"{self.path}: tiles of {page.tilelength} x {page.tilewidth} pixels are too large")
            if page.bitspersample != 8:
                raise UserError(f"{self.path}: has {page.bitspersample} bits a channel; 8 are read")
            if page.compression not in (*JPEG, *JPEG_2000):
                try:
                    tifffile.TIFF.DECOMPRESSORS[page.compression]
                except KeyError:
                    name = getattr(page.compression, "name", page.compression)
                    raise UserError(
                        f"{self.path}: its tiles are compressed by {name}; pip install imagecodecs, which decodes them"
                    ) from None

    def close(self) -> None:
        self.file.close()

    def read(self, top: int, left: int, height: int, width: int, level: int = 0) -> np.ndarray:
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
        if (level, index) in self._cache:
            self._cache.move_to_end((level, index))
            return self._cache[level, index]
        found = self._decoded(page, index, level)
        self._cache[level, index] = found
        self._cached += 0 if found is None else found.nbytes
        while self._cached > CACHE:
            _, old = self._cache.popitem(last=False)
            self._cached -= 0 if old is None else old.nbytes
        return found

    def _decoded(self, page: Any, index: int, level: int) -> np.ndarray | None:
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        if size == 0:  # left out by the scanner: glass
            return None
        with reading(self.path, f"tile {index} of level {level} is broken"):
            handle = self.file.filehandle
            handle.seek(offset)
            content = handle.read(size)
            if page.compression in JPEG:
                data = _jpeg(content, page.jpegtables, page.photometric == 2)
            elif page.compression in JPEG_2000:
                data = _jpeg_2000(content, page.compression == APERIO_YCBCR)
            else:
                data, _, shape = page.decode(content, index, jpegtables=page.jpegtables)
                if data is None:
                    raise ValueError("no data")
                data = np.asarray(data).reshape(shape)
                data = data[0] if data.ndim == 4 else data
            if data.shape[0] * data.shape[1] > page.tilelength * page.tilewidth:
                raise ValueError(f"it holds {data.shape[0]} x {data.shape[1]} pixels")
            return data


class OtherSlide(Slide):
    """A slide of another scanner, by OpenSlide. Raises UserError where that is not installed or cannot read it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            import openslide
        except ImportError as error:
            raise UserError(
                f"{path}: is read by OpenSlide, which is not here: pip install openslide-python openslide-bin"
            ) from error
        with reading(self.path, "cannot be read by OpenSlide"):
            self.file = openslide.OpenSlide(str(self.path))
            self.levels = [(height, width) for width, height in self.file.level_dimensions]
            told = self.file.properties.get("openslide.mpp-x")
            self.mpp = None if told is None else float(told)
        if len(self.levels) < 2:
            self.close()
            raise UserError(f"{path}: has no pyramid; convert it, for example with vips --pyramid")

    def close(self) -> None:
        self.file.close()

    def read(self, top: int, left: int, height: int, width: int, level: int = 0) -> np.ndarray:
        ratio = self.levels[0][0] / self.levels[level][0]
        with reading(self.path, f"the region at {left}, {top} of level {level} is broken"):
            place = (round(left * ratio), round(top * ratio))
            found = self.file.read_region(place, level, (width, height))  # transparent beyond the edge
        white = Image.new("RGBA", found.size, "white")
        return np.asarray(Image.alpha_composite(white, found).convert("RGB"))


def open_slide(path: str | Path) -> Slide:
    """The slide in a file, by its ending."""
    return OtherSlide(path) if Path(path).suffix.lower() in OTHERS else TiffSlide(path)


def is_slide(path: str | Path) -> bool:
    """Whether a file is a slide and not a single tile: by its ending, or a TIFF of several levels or of many pixels."""
    suffix = Path(path).suffix.lower()
    if suffix in OTHERS or suffix == ".svs":
        return True
    if suffix not in TIFFS:
        return False
    try:
        with reading(path, "cannot be read as a TIFF slide"), tifffile.TiffFile(path) as file:
            pages = _pyramid(file)
            return len(pages) > 1 or pages[0].imagelength * pages[0].imagewidth > UNIFORM
    except UserError:
        return False  # what reads it as a tile says what is wrong


def _pyramid(file: tifffile.TiffFile) -> list[Any]:
    """The pages of the levels, finest first: as the file declares them, else its tiled pages of one shape."""
    every: list[Any] = list(file.series)
    series = max(every, key=lambda s: s.pages[0].imagelength * s.pages[0].imagewidth)
    pages: list[Any] = [level.pages[0] for level in series.levels]
    if len(pages) > 1:
        return pages
    first = pages[0]
    for page in sorted((s.pages[0] for s in every), key=lambda page: -page.imagewidth):
        ratio = first.imagewidth / max(1, page.imagewidth)
        alike = abs(first.imagelength / ratio - page.imagelength) <= 2
        if page.is_tiled and alike and page.imagewidth < pages[-1].imagewidth:
            pages.append(page)
    return pages


def _microns(file: tifffile.TiffFile, page: Any) -> float | None:
    """Microns per pixel by Aperio's description, OME's metadata or the resolution; None where none of them tells."""
    if found := re.search(r"\bMPP\s*=\s*([\d.]+)", page.description or ""):
        return float(found[1])
    if file.is_ome and (found := re.search(r'PhysicalSizeX="([\d.eE+-]+)"', file.ome_metadata or "")):
        unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', file.ome_metadata or "")
        factor = {"nm": 1e-3, "mm": 1e3, "cm": 1e4}.get(unit[1], 1.0) if unit else 1.0
        return float(found[1]) * factor
    tags = page.tags
    if "XResolution" in tags and "ResolutionUnit" in tags:
        above, below = tags["XResolution"].value
        length = {2: 25400.0, 3: 10000.0}.get(int(tags["ResolutionUnit"].value))
        if length and above and below and length * below / above < WIDEST:
            return length * below / above
    return None


def _jpeg(content: bytes, tables: bytes | None, rgb: bool) -> np.ndarray:
    """The pixels of a JPEG whose tables may lie apart; `rgb`: of channels that are no luma and chroma."""
    if tables:
        content = tables[:-2] + content[2:]
    if rgb:
        content = content[:2] + ADOBE_RGB + content[2:]
    return np.asarray(_plain(content, "JPEG"))


def _jpeg_2000(content: bytes, luma: bool) -> np.ndarray:
    plain = _plain(content, "JPEG2000")
    return np.asarray(Image.frombytes("YCbCr", plain.size, plain.tobytes()).convert("RGB") if luma else plain)


def _plain(content: bytes, kind: str) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=(kind,)) as picture:
        if picture.width * picture.height > UNIFORM:
            raise ValueError(f"it announces {picture.width} x {picture.height} pixels")
        return picture.convert("RGB")
