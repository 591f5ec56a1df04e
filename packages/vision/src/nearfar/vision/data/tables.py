"""Labels in a table: CSV with a column of pictures and one of classes, or a column of zeros and ones for each class."""

import csv
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from typing import Any

from nearfar.core.errors import UserError, some
from nearfar.core.reading import reading

log = logging.getLogger(__name__)

FILES = ("file", "filename", "file_name", "image", "path", "picture")
LABELS = ("label", "class", "labels", "classes", "tags")
SUFFIXES = {".csv", ".tsv"}
SEPARATORS = ";|"
"""Between the classes of a picture that has several."""


MOST_CLASSES = 1_000_000
"""The largest class number that is believed without a list of classes."""


@dataclass
class Labelled:
    """Rows of a table: files, the classes of each, all classes by name."""

    files: list[str]
    """As the table names them."""
    labels: list[tuple[int, ...]]
    classes: list[str]
    multilabel: bool
    """Whether a picture may have several classes, or none."""
    splits: list[str]
    """The parts that its column `split` names, none without one."""


def read_table(
    path: str | Path,
    text: str,
    split: str | None,
    is_there: Callable[[str], bool],
    beside: Callable[[Sequence[str]], list[str]],
) -> Labelled:
    """The rows of a CSV or TSV file `path` that says `text`, or those whose column `split` says `split`.

    The picture's file, relative to the table's folder (its name, in an archive), stands in a column called file (or
    filename, image, path), its class in one called label (or class). Several classes are separated by `;` or `|`, in a
    column of this name or one called labels (or classes, tags); an empty cell is then none of them. Without a label
    column every other column is a class, whose cells are 0 or 1. Classes are numbered in the order of their sorted
    names. Raises UserError for what is unclear; pictures that are not there (`is_there`) stay in the list, and they are
    counted and named, as are those `beside` the listed ones that no row names.
    """
    with reading(path, "cannot be read as a table of pictures and labels"):
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
    files: list[str] = []
    kept, twice, unlabelled = [], [], []
    everything = [normpath(cells[place]) if cells[place] else "" for _, cells in rows[1:]]
    for (number, cells), names, file in zip(rows[1:], labels, everything, strict=True):
        if split is not None and parts is not None and cells[parts] != split:
            continue
        if not cells[place]:
            raise UserError(f"{path}: line {number} names no picture")
        before = seen.setdefault(file, (number, names))
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
    if files and not any(map(is_there, files)):
        raise UserError(f"{path}: none of its {len(files)} pictures is there, for example {files[0]}")
    unused = [rows[0][1][i] for i in others if header[i] not in named] if named else []
    for what, which in (
        ("columns are not used", unused),
        ("rows repeat another and are not used", twice),
        ("pictures have no label and are not used", unlabelled),
        ("pictures are not there", [file for file in files if not is_there(file)]),
        ("pictures beside those listed are in no row and are not used", beside(everything)),
    ):
        if which and (split is None or split in splits):
            log.warning("%s: %d %s: %s", path, len(which), what, some(which))
    if multilabel:
        several = sum(len(names) > 1 for names in kept)
        log.info("%s: %d of %d pictures have several classes, %d none", path, several, len(kept), kept.count(()))
    return Labelled(files, kept, classes, multilabel, splits)


def _split_cells(path: str | Path, column: str, cells: Sequence[tuple[int, str]]) -> tuple[list[list[str]], bool]:
    """The classes of each cell, and whether there may be several."""
    multilabel = column in LABELS[2:] or any(mark in cell for _, cell in cells for mark in SEPARATORS)
    if not multilabel:
        return [[cell] if cell else [] for _, cell in cells], False
    names = [[part.strip() for part in re.split(f"[{SEPARATORS}]", cell)] if cell else [] for _, cell in cells]
    if bad := next((number for (number, _), part in zip(cells, names, strict=True) if "" in part), None):
        raise UserError(f"{path}: line {bad} has an empty class between its separators ({SEPARATORS})")
    return names, True


def _marked(path: str | Path, number: int, cells: Sequence[tuple[str, str]]) -> list[str]:
    """The classes whose cell is 1."""
    if bad := next((f"{name} is {cell!r}" for name, cell in cells if cell not in ("0", "1")), None):
        raise UserError(
            f"{path}: line {number}: {bad}; a table has a column {' or '.join(LABELS[:2])}, or a column of zeros and "
            "ones for each class"
        )
    return [name for name, cell in cells if cell == "1"]


def parts_of(label: Any) -> list[Any]:
    """The classes of a label that may be a list, or a text of several."""
    if isinstance(label, str):
        return [part.strip() for part in re.split(f"[{SEPARATORS}]", label)]
    return list(label) if isinstance(label, list | tuple) else [label]


def numbered(
    names: Sequence[str], given: Sequence[Any], listed: Sequence[str] = (), where: str | Path = "the list of classes"
) -> tuple[list[Any], list[str], bool]:
    """Class numbers, names of the classes, and whether a picture may have several, of what samples say of themselves.

    `given`: of the sample of each name a class, or a list of classes; each a number from 0, or a name, in which `;` and
    `|` stand between several. Numbers are those of `listed` (which stands `where`), or of classes called "0", "1" and
    so on; names are numbered in their order. Raises UserError for anything else.
    """
    marked = lambda label: isinstance(label, str) and any(mark in label for mark in SEPARATORS)  # noqa: E731
    multilabel = any(isinstance(label, list | tuple) or marked(label) for label in given)
    several = []
    for name, label in zip(names, given, strict=True):
        parts = parts_of(label) if label != "" or not multilabel else []
        if any(not isinstance(part, str | int) or isinstance(part, bool) or part == "" for part in parts):
            raise UserError(
                f"{name}: its label is {str(label)[:40]!r}, neither a number nor a name, nor a list of them"
            )
        if len(set(map(str, parts))) < len(parts):
            raise UserError(f"{name}: its label has a class twice; a list holds classes, not zeros and ones")
        several.append([str(part) for part in parts])
    every = {part for parts in several for part in parts}
    if all(re.fullmatch("[0-9]{1,9}", part) for part in every):
        labels = [tuple(sorted(map(int, parts))) for parts in several]
        most, name = max((max(label, default=0), name) for label, name in zip(labels, names, strict=True))
        if not listed and most > MOST_CLASSES:
            raise UserError(f"{name}: its class is {most}, beyond {MOST_CLASSES}")
        if listed and most >= len(listed):
            raise UserError(f"{where}: lists {len(listed)} classes, {name} has class {most}")
        classes = list(listed) or [str(i) for i in range(most + 1)]
    else:
        classes = sorted(every)
        index = {name: i for i, name in enumerate(classes)}
        labels = [tuple(sorted(index[part] for part in parts)) for parts in several]
    return (labels if multilabel else [label for (label,) in labels]), classes, multilabel
