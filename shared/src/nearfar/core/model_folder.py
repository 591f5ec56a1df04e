"""Model folders, of one form in all domains.

Beside the weights and what else a model needs, a folder holds a description, a JSON file whose name tells the kind of
model (`KINDS`): kind, version of the format, a SHA-256 digest of each file, the environment that wrote it, hashes of
the items and groups (patients, speakers, subjects) that it was trained on, so that a score on them can be told as such,
and what the model's own package has to say about it.

All files appear together: they are written to a folder `.next` beside them, which is complete when it gets that name,
and are then moved into place, the description last. A kill in between is made good by the next reader or writer.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nearfar.core.environment import environment
from nearfar.core.errors import UserError
from nearfar.core.files import file_digest, locked, settle, sweep, temporary_folder, write_json
from nearfar.core.reading import reading

KINDS = {
    "classifier": "classifier.json",
    "region classifier": "regions.json",
    "decoder": "decoder.json",
    "segmenter": "model.json",
    "tile classifier": "tiles.json",
    "speaker model": "scoring.json",
    "separation model": "separator.json",
    "language model": "language_model.json",
}
"""Each kind of model and its description's name."""

AGAIN = "copy the folder again"
NEXT = ".next"
FORMAT = 1


@dataclass(frozen=True)
class TrainedOn:
    """Hashes of the items (by their content) and groups that a model was trained on or chosen by."""

    items: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()

    @classmethod
    def of(cls, items: Iterable[str], groups: Iterable[Any] = ()) -> "TrainedOn":
        """From digests of the items' content and names of the groups."""
        named = (str(group) for group in groups if group is not None)
        return cls(frozenset(map(_short, items)), frozenset(map(_short, named)))

    def __or__(self, other: "TrainedOn") -> "TrainedOn":
        """What either has seen, as for a model that began from another."""
        return TrainedOn(self.items | other.items, self.groups | other.groups)

    def seen(self, items: Iterable[str], groups: Iterable[Any] = ()) -> list[bool]:
        """Which of `items`, given by the digests of their content, or of their `groups`, the model has seen."""
        items = list(items)
        groups = list(groups) or [None] * len(items)
        of_group = [group is not None and _short(str(group)) in self.groups for group in groups]
        return [_short(item) in self.items or known for item, known in zip(items, of_group, strict=True)]


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


@contextmanager
def writing(
    folder: str | Path,
    kind: str,
    about: Mapping[str, Any],
    trained_on: TrainedOn = TrainedOn(),
    keep: Iterable[str] = (),
) -> Iterator[Path]:
    """A place to write a model's files into; when the block ends well they are in `folder`, what else is there stays.

    Args:
        kind: of model, one of `KINDS`.
        about: what `read` gives back beside what all descriptions hold.
        trained_on: what it has seen.
        keep: files that are in `folder` already and stay the model's.
    """
    folder = Path(folder)
    sweep(folder)
    with locked(folder, "writes a model"), temporary_folder(folder, "model") as place:
        files = place / "files"
        files.mkdir()
        yield files
        seen = {"items": sorted(trained_on.items), "groups": sorted(trained_on.groups)}
        paths = [*sorted(files.iterdir()), *(folder / name for name in keep)]
        description = {"kind": kind, "format": FORMAT, "files": {path.name: file_digest(path) for path in paths}}
        content = description | {"environment": environment()} | dict(about) | {"trained_on": seen}
        write_json(files / KINDS[kind], content, exact=True)
        settle(files)
        _finish(folder)
        os.replace(files, folder / NEXT)
        _finish(folder)


def read(folder: str | Path, kind: str) -> dict[str, Any]:
    """The description of the model in `folder`, all files checked against their digests.

    Raises UserError where it is no such folder, of another kind or a later format, or where a file is missing or is not
    the one described.
    """
    folder = Path(folder)
    description = describe(folder, kind)
    for name, digest in description["files"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise UserError(f"{folder / name}: is not the file that {KINDS[kind]} describes; copy the folder again")
    return description


def describe(folder: str | Path, kind: str) -> dict[str, Any]:
    """The description of the model in `folder`, its files unread. Raises UserError as `read` does."""
    folder = Path(folder)
    _finish(folder)
    path = folder / KINDS[kind]
    if not path.is_file():
        what = next((other for other, name in KINDS.items() if (folder / name).is_file()), None)
        other = f"; it is one of a {what}" if what else "; name one that training wrote"
        raise UserError(f"{folder}: holds no trained {kind}, it lacks {path.name}{other}")
    with reading(path, "damaged", AGAIN):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "format" not in found:
            raise UserError(
                f"{path}: names no format, so an older nearfar wrote it; train again with the same data and settings "
                "into a new folder"
            )
        files: dict[str, str] = found["files"]
        plain = isinstance(files, dict) and all(
            Path(name).name == name and name.isprintable() and isinstance(files[name], str) for name in files
        )
        others = found["kind"] != kind or not plain
        later = found["format"] > FORMAT
    if later:
        raise UserError(f"{path}: has format {found['format']}, this nearfar reads up to {FORMAT}; install a newer one")
    if others:
        raise UserError(f"{path}: damaged, it describes no {kind}; copy the folder again")
    return found


def trained_on(folder: str | Path) -> TrainedOn:
    """What the model in `folder` has seen; nothing where that was not recorded."""
    for path in (Path(folder) / name for name in KINDS.values()):
        if not path.is_file():
            continue
        with reading(path, "damaged", AGAIN):
            found = json.loads(path.read_text(encoding="utf-8")).get("trained_on", {"items": (), "groups": ()})
            items, groups = found["items"], found["groups"]
            if any(not isinstance(names, list | tuple) for names in (items, groups)):
                raise TypeError("trained_on holds no lists")
            return TrainedOn(frozenset(items), frozenset(groups))
    return TrainedOn()


def _finish(folder: Path) -> None:
    """Move what a writer has completed into place."""
    coming = folder / NEXT
    if not coming.is_dir():
        return
    try:
        with suppress(FileNotFoundError):  # another reader may do the same
            names = sorted(path.name for path in coming.iterdir())
            last = next(name for name in names if name in KINDS.values())
            new = json.loads((coming / last).read_text(encoding="utf-8"))["files"]
            with suppress(OSError, ValueError, KeyError):
                old = json.loads((folder / last).read_text(encoding="utf-8"))["files"]
                for name in set(old) - set(new):
                    (folder / Path(name).name).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == last):
                os.replace(coming / name, folder / name)
        shutil.rmtree(coming, ignore_errors=True)
    except (OSError, StopIteration) as error:
        raise UserError(f"{folder}: its writing was interrupted and cannot be finished here ({error})") from error


def mark_seen(folder: str | Path, items: Iterable[str], groups: Iterable[Any] = ()) -> str:
    """A mark for every figure on these items: "" where the model has seen none of them, else how many it has."""
    return mark(trained_on(folder).seen(items, groups))


def mark(seen: Sequence[bool]) -> str:
    """A mark for every figure on items of which a model has seen some: "" for none, else how many."""
    return f"{sum(seen)} of {len(seen)} seen in training" if any(seen) else ""
