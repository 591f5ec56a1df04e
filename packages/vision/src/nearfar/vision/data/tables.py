"""Labels in a table: CSV with a column of pictures and one of classes, or a column of zeros and ones for each class."""

import csv
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfar.core.errors import UserError, some
from nearfar.core.reading import reading

log = logging.getLogger(__name__)

FILES = ("file", "filename", "file_name", "image", "path", "picture")
LABELS = ("label", "class", "labels", "classes", "tags")
SUFFIXES = {".csv", ".tsv"}
SEPARATORS = ";|"
"""Between the classes of a picture that has several."""


@dataclass
class Labelled:
    """Rows of a table: files, the classes of each, all classes by name."""

    files: list[Path]
    labels: list[tuple[int, ...]]
    classes: list[str]
    multilabel: bool
    """Whether a picture may have several classes, or none."""
    splits: list[str]
    """The parts that its column `split` names, none without one."""


def read_table(path: Path, split: str | None, is_picture: Callable[[Path], bool]) -> Labelled:
    """The rows of a CSV or TSV file, or those whose column `split` says `split`.

    The picture's file, relative to the table's folder, stands in a column called file (or filename, image, path), its
    class in one called label (or class). Several classes are separated by `;` or `|`, in a column of this name or one
    called labels (or classes, tags); an empty cell is then none of them. Without a label
    column every other column is a class, whose cells are 0 or 1. Classes are numbered in the order of their sorted
    names. Raises UserError for what is unclear; pictures that are not there stay in the list, and they are counted and
    named, as are pictures (what `is_picture` says is one) beside those listed that no row names.
    """
    with reading(path, "cannot be read as a table of pictures and labels"):
        text = path.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=first.count)
        lines = list(csv.reader(text.splitlines(), delimiter=delimiter, strict=True))
    rows = [(number, [cell.strip() for cell in cells]) for number, cells in enumerate(lines, 1) if any(cells)]
    if not rows:
        raise UserError(f"{path}: is empty; it needs a header, for example file,label")
    header = [name.lower() for name in rows[0][1]]
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns of its header have one name: {delimiter.join(rows[0][1])}")
    if bad := next((number for number, cells in rows if len(cells) != len(header)), None):
        raise UserError(f"{path}: line {bad} has not the {len(header)} columns of the header")
    found = [name for name in FILES if name in header]
    if len(found) != 1:
        raise UserError(f"{path}: needs one column of pictures, called {some(FILES, 6)}; it has {some(rows[0][1])}")
    place = header.index(found[0])
    parts = header.index("split") if "split" in header else None
    splits = sorted({cells[parts] for _, cells in rows[1:]}) if parts is not None else []
    named = [name for name in LABELS if name in header]
    if len(named) > 1:
        raise UserError(f"{path}: has {len(named)} columns of classes, {some(named)}; leave one")
    others = [i for i in range(len(header)) if i not in (place, parts)]
    if named:
        labels, multilabel = _split_cells(path, named[0], [(n, cells[header.index(named[0])]) for n, cells in rows[1:]])
        classes = sorted({name for names in labels for name in names})
    else:
        classes, multilabel = sorted(rows[0][1][i] for i in others), True
        labels = [_marked(path, number, [(rows[0][1][i], cells[i]) for i in others]) for number, cells in rows[1:]]
    if len(classes) < (1 if multilabel else 2):
        raise UserError(f"{path}: has {len(classes)} classes; to learn there must be two or more")
    index = {name: i for i, name in enumerate(classes)}
    seen: dict[str, tuple[int, list[str]]] = {}
    files, kept, twice, unlabelled = [], [], [], []
    everything = [path.parent / cells[place] for _, cells in rows[1:]]
    for (number, cells), names, file in zip(rows[1:], labels, everything, strict=True):
        if split is not None and parts is not None and cells[parts] != split:
            continue
        if not cells[place]:
            raise UserError(f"{path}: line {number} names no picture")
        before = seen.setdefault(cells[place], (number, names))
        if sorted(before[1]) != sorted(names):
            raise UserError(
                f"{path}: lines {before[0]} and {number} give {cells[place]} other classes; give all of them in one "
                "line, separated by ;"
            )
        if before[0] != number:
            twice.append(cells[place])
        elif not names and not multilabel:
            unlabelled.append(cells[place])
        else:
            files.append(file)
            kept.append(tuple(sorted(index[name] for name in set(names))))
    unused = [rows[0][1][i] for i in others if header[i] not in named] if named else []
    for what, which in (
        ("columns are not used", unused),
        ("rows repeat another and are not used", twice),
        ("pictures have no label and are not used", unlabelled),
        ("pictures are not there", [file.name for file in files if not file.is_file()]),
        ("pictures beside those listed are in no row and are not used", _beside(everything, is_picture)),
    ):
        if which:
            log.warning("%s: %d %s: %s", path, len(which), what, some(which))
    if multilabel:
        several = sum(len(names) > 1 for names in kept)
        log.info("%s: %d of %d pictures have several classes, %d none", path, several, len(kept), kept.count(()))
    return Labelled(files, kept, classes, multilabel, splits)


def _split_cells(path: Path, column: str, cells: Sequence[tuple[int, str]]) -> tuple[list[list[str]], bool]:
    """The classes of each cell, and whether there may be several."""
    multilabel = column in LABELS[2:] or any(mark in cell for _, cell in cells for mark in SEPARATORS)
    if not multilabel:
        return [[cell] if cell else [] for _, cell in cells], False
    names = [[part.strip() for part in re.split(f"[{SEPARATORS}]", cell)] if cell else [] for _, cell in cells]
    if bad := next((number for (number, _), part in zip(cells, names, strict=True) if "" in part), None):
        raise UserError(f"{path}: line {bad} has an empty class between its separators ({SEPARATORS})")
    return names, True


def _marked(path: Path, number: int, cells: Sequence[tuple[str, str]]) -> list[str]:
    """The classes whose cell is 1."""
    if bad := next((f"{name} is {cell!r}" for name, cell in cells if cell not in ("0", "1")), None):
        raise UserError(
            f"{path}: line {number}: {bad}; a table has a column {' or '.join(LABELS[:2])}, or a column of zeros and "
            "ones for each class"
        )
    return [name for name, cell in cells if cell == "1"]


def _beside(files: Sequence[Path], is_picture: Callable[[Path], bool]) -> list[str]:
    """Pictures in the folders of `files` that are none of them."""
    listed = {file.resolve() for file in files}
    folders = sorted({file.parent for file in files if file.parent.is_dir()})
    return [
        str(file.name)
        for folder in folders
        for file in sorted(folder.iterdir())
        if is_picture(Path(file.name)) and file.is_file() and file.resolve() not in listed
    ]
