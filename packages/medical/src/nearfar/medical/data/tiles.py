"""Histology tiles: where they lie, splits by slide and patient, stains, from tiles to a slide."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nearfar.core.errors import UserError, some
from nearfar.core.reading import check_picture, reading
from nearfar.medical.data.groups import read_table, teller

log = logging.getLogger(__name__)

READABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
AGGREGATIONS = ("mean", "vote", "max")
BY_NAME = r"^([^_]+)_"
"""The slide in a tile's name, where nothing else is said."""


@dataclass(frozen=True)
class Tile:
    """A labelled tile. `label` is empty where it has none, `patient` where that is not known apart from the slide."""

    path: Path
    label: str
    slide: str
    patient: str = ""

    @property
    def group(self) -> str:
        """What must not stand on both sides of a split: the patient, or else the slide."""
        return self.patient or self.slide


def find_tiles(source: str | Path, slides: str | None = None, patients: str | None = None) -> list[Tile]:
    """The tiles of a folder with one folder per class, or of a CSV file of file, class, slide and, if known, patient.

    Args:
        slides: a regular expression on a tile's path below its class's folder whose one group is the slide, or a CSV
            file of file (below `source`) and slide. By default the folder in the class's folder, or else what stands
            before the first _ in the name.
        patients: a regular expression on the slide's name whose one group is the patient, or a CSV file of slide and
            patient.

    Sorted by path. Raises UserError for what is missing, fewer than two classes, or names that do not tell the slide.
    """
    root = Path(source)
    if root.is_file():
        tiles = _listed(root)
    else:
        tiles = _in_folders(root, slides)
    if patients is not None:
        patient = teller(patients, ("slide", "patient"), "slide")
        tiles = [replace(tile, patient=patient(tile.slide)) for tile in tiles]
    if len({tile.label for tile in tiles}) < 2:
        raise UserError(f"{root}: holds tiles of {len({t.label for t in tiles})} classes; a folder per class is needed")
    return tiles


def _in_folders(root: Path, slides: str | None) -> list[Tile]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    slide = None if slides is None else teller(slides, ("file", "slide"), "tile")
    tiles, silent = [], []
    kinds = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = [p.name for p in sorted(root.iterdir()) if p.suffix.lower() in READABLE]
    for kind in kinds:
        for path in sorted(p for p in kind.rglob("*") if p.is_file() and not p.name.startswith(".")):
            if path.suffix.lower() not in READABLE:
                loose.append(path.relative_to(root).as_posix())
                continue
            inside = path.relative_to(kind)
            if slide is not None:
                listed = Path(slides or "").is_file()
                tiles.append(Tile(path, kind.name, slide((path.relative_to(root) if listed else inside).as_posix())))
            elif inside.parent != Path():
                tiles.append(Tile(path, kind.name, inside.parent.as_posix()))
            elif match := re.search(BY_NAME, path.name):
                tiles.append(Tile(path, kind.name, match[1]))
            else:
                silent.append(path)
    if silent:
        raise UserError(
            f"{silent[0]}: its name does not tell the slide ({BY_NAME}), nor those of {len(silent) - 1} others; give a "
            "pattern, or a CSV file of file and slide"
        )
    if loose:
        log.warning("%s: %s are no tiles in a class's folder, and are left out", root, some(loose))
    return tiles


def _listed(table: Path) -> list[Tile]:
    rows = read_table(table, ("file", "class", "slide"))
    tiles = []
    for number, row in enumerate(rows, start=2):
        for name in ("file", "class", "slide"):
            if not row[name]:
                raise UserError(f"{table}, line {number}: has no {name}")
        tiles.append(Tile(table.parent / row["file"], row["class"], row["slide"], row.get("patient") or ""))
    if twice := len(tiles) - len({tile.path for tile in tiles}):
        raise UserError(f"{table}: names {twice} files more than once")
    return sorted(tiles, key=lambda tile: tile.path)


def table_of(tile: Tile) -> dict[str, str]:
    """A tile's row in a table that `find_tiles` reads."""
    return {"file": str(tile.path.absolute()), "class": tile.label, "slide": tile.slide, "patient": tile.patient}


def read_tile(path: str | Path) -> np.ndarray:
    """The pixels (height, width, 3) uint8 of a tile; transparency is laid on white. Raises UserError."""
    with reading(path, "cannot be read as a tile"), Image.open(path) as picture:
        check_picture(picture, path)
        if picture.mode.startswith(("I", "F")):
            raise UserError(f"{path}: has more than 8 bits a channel; tiles have 8")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            layered = picture.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB"))
        return np.asarray(picture.convert("RGB"))


def split_by_slide(tiles: Sequence[Tile], folds: int = 5, seed: int = 0) -> list[tuple[list[Tile], list[Tile]]]:
    """Cross-validation: (training, validation) tiles of each fold, no slide or patient on both sides.

    Patients (slides, where patients are not known) are dealt out class by class, the largest first, to the fold that
    has least of their class. Every class has training tiles in all folds.
    """
    groups: dict[str, list[Tile]] = {}
    for tile in tiles:
        groups.setdefault(tile.group, []).append(tile)
    if folds < 2 or folds > len(groups):
        raise UserError(f"{folds} folds need at least 2 folds and as many slides; there are {len(groups)}")
    labels = sorted({tile.label for tile in tiles})
    order = sorted(groups)
    np.random.default_rng(seed).shuffle(order)
    counts = {s: np.array([sum(t.label == label for t in groups[s]) for label in labels]) for s in order}
    rarity = np.sum(list(counts.values()), axis=0, dtype=float)
    order.sort(key=lambda s: -float((counts[s] / rarity).sum()))
    held: list[set[str]] = [set() for _ in range(folds)]
    filled = np.zeros((folds, len(labels)))
    for group in order:
        fold = int((filled @ (counts[group] / rarity) + 1e-9 * filled.sum(1)).argmin())
        held[fold].add(group)
        filled[fold] += counts[group]
    parts = [([t for t in tiles if t.group not in h], [t for t in tiles if t.group in h]) for h in held]
    for train, validation in parts:
        check_tile_split(train, validation)
        if missing := [name for name in labels if name not in {t.label for t in train}]:
            raise UserError(f"class {missing[0]} is on too few slides for {folds} folds; take fewer")
    return parts


def check_tile_split(train: Iterable[Tile], validation: Iterable[Tile]) -> None:
    """Raise UserError where a slide or a patient has tiles on both sides."""
    train, validation = list(train), list(validation)
    for what, of in (("slides", lambda t: t.slide), ("patients", lambda t: t.patient)):
        if both := ({of(t) for t in train} & {of(t) for t in validation}) - {""}:
            raise UserError(f"{what} on both sides of the split: {some(sorted(both))}; split by {what[:-1]}")


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
