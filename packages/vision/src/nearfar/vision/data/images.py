"""Pictures of files, and labelled ones as a data set; `nearfar.vision.data.sources` finds them on disk."""

import hashlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.core.errors import UserError, some
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.leakage import keep_twins_together
from nearfar.core.reading import check_announced, check_picture, reading

Image.init()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - {
    ".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits", ".msp", ".bw"
}  # fmt: skip
"""Of the files that Pillow reads; those of documents, films and measurements are none."""

LARGEST_MEMBER = 1 << 26
"""Bytes up to which a picture in an archive may be packed however tightly."""

LONGEST_STRIP = 500
"""How many times longer than wide a picture may be."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """`picture` in RGB, 8 bits: 16-bit grey is scaled by 257 and not clipped, transparency is laid on white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        if picture.mode != "F":
            values = values / 257 if values.max(initial=0) > 255 else values
        elif values.max(initial=0) <= 1:
            values = values * 255
        picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        ground = Image.new("RGBA", layered.size, "white")
        picture = Image.alpha_composite(ground, layered)
    return picture.convert("RGB")


def read_picture(source: str | Path | bytes, name: str = "") -> Image.Image:
    """The RGB picture of a file, or of the bytes of one called `name`, turned upright as its EXIF data say.

    Raises UserError where it is missing, damaged or no picture.
    """
    name = name or str(source)
    if not isinstance(source, bytes) and not Path(source).exists():
        raise UserError(f"{name}: no such file")
    with reading(name, "cannot be read as a picture"):
        try:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        except UnidentifiedImageError as error:
            raise UserError(
                f"{name}: cannot be read as a picture (damaged from its start, or another format)"
            ) from error
        with opened as picture:
            if max(picture.size) > LONGEST_STRIP * min(picture.size):  # resized to a square's height it is a bomb
                raise UserError(f"{name}: is {picture.width} x {picture.height} pixels, a strip; cut it into pictures")
            check_picture(picture, name, len(source) if isinstance(source, bytes) else Path(source).stat().st_size)
            return to_rgb(ImageOps.exif_transpose(picture))


def is_picture(path: PurePath) -> bool:
    """Whether a path inside a data set is a picture's, by its suffix; what systems hide beside pictures is none."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def picture_files(paths: Iterable[str | Path]) -> list[Path]:
    """Picture files: those named, and those anywhere in the folders named, in order. Raises UserError for none."""
    found: list[Path] = []
    places = [Path(path) for path in paths]
    for path in places:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.is_file() and is_picture(p.relative_to(path)))
        found += inside if path.is_dir() else [path]
    if not found:
        raise UserError(f"{some(places)}: no pictures there")
    return found


class Pictures(Dataset):
    """(picture, class index) pairs, decoded when asked for.

    `names`: one per picture. `labels`: class indices, -1 for pictures without one. `classes`: their names in order.
    With `multilabel` a picture has a tuple of class indices, and its pair a vector of zeros and ones. `transform` is
    applied to the RGB picture. A damaged picture raises UserError that names it. `read` and `transform` must be
    picklable for loaders with worker processes.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[Any],
        classes: Sequence[str],
        read: Callable[[int], Image.Image],
        transform: Callable[[Image.Image], Any] | None = None,
        multilabel: bool = False,
    ) -> None:
        self.names, self.classes = list(names), list(classes)
        self.labels: list[Any] = list(labels)
        self.read, self.transform, self.multilabel = read, transform, multilabel
        self.known: list[str] | None = None  # digests, once they are made

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int | Tensor]:
        picture = self.read(index)
        target = self.targets([index])[0] if self.multilabel else self.labels[index]
        return (picture if self.transform is None else self.transform(picture)), target

    def targets(self, indices: Sequence[int] | None = None) -> Tensor:
        """Zeros and ones, (pictures, classes), of the pictures at `indices`, by default of all; -1 has no class."""
        labels = self.labels if indices is None else [self.labels[i] for i in indices]
        found = torch.zeros(len(labels), len(self.classes))
        for row, label in zip(found, labels, strict=True):
            row[[c for c in (label if self.multilabel else (label,)) if c >= 0]] = 1
        return found

    def strata(self) -> list[int]:
        """A class for each picture, by which shares are drawn: of several the rarest, -1 for none."""
        if not self.multilabel:
            return self.labels
        counts = Counter(label for labels in self.labels for label in labels)
        return [min(labels, key=lambda label: (counts[label], label), default=-1) for labels in self.labels]

    def renumbered(self, classes: Sequence[str], multilabel: bool) -> "Pictures":
        """The same pictures under the numbers of `classes`, which hold all of theirs; `multilabel`: as tuples."""
        index = [list(classes).index(name) for name in self.classes]
        found = self.subset(range(len(self)))
        several = [labels if self.multilabel else (labels,) for labels in self.labels]
        numbers = [tuple(sorted(index[label] for label in labels if label >= 0)) for labels in several]
        found.labels = numbers if multilabel else [labels[0] for labels in numbers]
        found.classes, found.multilabel = list(classes), multilabel
        return found

    def subset(self, indices: Sequence[int], transform: Callable[[Image.Image], Any] | None = None) -> "Pictures":
        """The pictures at `indices`, with their own transform."""
        chosen = list(indices)
        part = Pictures(
            [self.names[i] for i in chosen],
            [self.labels[i] for i in chosen],
            self.classes,
            partial(_read_chosen, self.read, chosen),
            transform or self.transform,
            self.multilabel,
        )
        part.known = None if self.known is None else [self.known[i] for i in chosen]
        return part

    def digests(self) -> list[str]:
        """A digest of the content of each picture's file; of one from no file, of its name and what it shows."""
        if self.known is None:
            self.known = [_content_digest(self.read, index, self.names[index]) for index in range(len(self))]
        return self.known

    def content_digest(self) -> str:
        """A digest of all pictures and their labels, wherever they lie."""
        return data_digest(self.digests(), self.labels, self.classes)

    def readable(self, show: Callable[[Sequence[int]], Any] = iter) -> tuple["Pictures", list[str]]:
        """The pictures that can be decoded, and one line for each that cannot."""
        good, failures = [], []
        for index in show(range(len(self))):
            try:
                self.read(index)
                good.append(index)
            except UserError as error:
                failures.append(str(error))
        return self.subset(good), failures


def _content_digest(read: Callable[[int], Image.Image], index: int, name: str) -> str:
    kind: Any = getattr(read, "func", None)
    given: tuple[Any, ...] = getattr(read, "args", ())
    if kind is _read_chosen:
        return _content_digest(given[0], given[1][index], name)
    if kind is read_file and not given[0][index].exists():  # a table may name what is not there
        content = b"missing " + name.encode()
    elif kind is read_file:
        with reading(given[0][index], "cannot be read as a picture"):
            return content_digest(given[0][index])
    elif kind is read_member:
        content = _member(given[0], given[1][index])
    elif kind is read_part:
        path, offset, size, _ = given[0][index]
        with path.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(size)
    elif kind is read_row and (entry := given[0][index][given[1]])["bytes"]:
        content = entry["bytes"]
    else:
        content = name.encode() + read(index).tobytes()
    return hashlib.sha256(content).hexdigest()


def _read_chosen(read: Callable[[int], Image.Image], chosen: Sequence[int], index: int) -> Image.Image:
    return read(chosen[index])


def read_file(files: Sequence[Path], index: int) -> Image.Image:
    return read_picture(files[index])


def read_member(path: Path, members: Sequence[str], index: int) -> Image.Image:
    return read_picture(_member(path, members[index]), f"{path}/{members[index]}")


def _member(path: Path, name: str) -> bytes:
    with reading(f"{path}/{name}", "damaged in the archive"):
        archive = _archive(path, os.getpid())
        info = archive.getinfo(name)
        check_announced(f"{path}/{name}", info.file_size, info.compress_type != 0, info.compress_size)
        if info.file_size > max(LARGEST_MEMBER, 10 * info.compress_size):  # pictures are compressed already
            raise UserError(f"{path}/{name}: {info.compress_size:,} bytes unpack to {info.file_size:,}; leave it out")
        return archive.read(name)


@lru_cache(maxsize=8)
def _archive(path: Path, _process: int) -> zipfile.ZipFile:
    """An open zip file, one per process, as processes must not share a file position."""
    return zipfile.ZipFile(path)


def read_part(pictures: Sequence[tuple[Path, int, int, str]], index: int) -> Image.Image:
    path, offset, size, name = pictures[index]
    with path.open("rb") as stream:
        stream.seek(offset)
        return read_picture(stream.read(size), name)


def read_row(rows: Any, column: str, names: Sequence[str], index: int) -> Image.Image:
    with reading(names[index], "cannot be read as a row with a picture"):
        entry = rows[index][column]
        content = entry["bytes"] or entry["path"]
        if not isinstance(content, bytes | str):
            raise ValueError("holds no picture")
    return read_picture(content, names[index])


def split_pictures(pictures: Pictures, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of (the rest, a random `share` of every class); both keep a picture of every class that has two.

    A picture of several classes counts for the rarest of them.
    """
    generator = np.random.default_rng(seed)
    strata, held = pictures.strata(), []
    labels = np.asarray(strata)
    for label in sorted(set(strata)):
        members = generator.permutation(np.flatnonzero(labels == label))
        number = min(max(1, round(share * len(members))), len(members) - 1)
        held += members[:number].tolist()
    chosen = keep_twins_together(held, pictures.digests())  # copies of a picture stay on one side
    for label in set(strata) - {strata[i] for i in range(len(labels)) if i not in chosen}:
        if sum(strata[i] == label for i in chosen) > 1:
            raise UserError(f"{pictures.classes[label]}: its pictures are all the same, so none is left to learn from")
    return [i for i in range(len(labels)) if i not in chosen], sorted(held)
