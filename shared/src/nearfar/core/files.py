"""Writing files so that an interruption leaves nothing half-written."""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same ending, that becomes `path` when the block ends well.

    The block may write a file or make a folder there. On an error or an interruption the temporary is removed
    and an existing `path` stays as it was. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = parent / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON to `path` atomically; numpy scalars and arrays and paths are converted."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], delimiter: str = ",") -> Path:
    """Write `rows` as CSV (or TSV, with `delimiter`) to `path` atomically; the columns are those of all rows."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


def file_digest(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
