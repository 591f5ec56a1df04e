"""Writing files so that an interruption, a kill or a loss of power leaves nothing half-written."""

import atexit
import csv
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError
from nearfar.core.processes import process_rank
from nearfar.core.remote import told, written

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".nearfar-tmp-"
"""Stands in the name of every temporary folder, so that those of killed processes can be told and removed."""

_held: set[int] = set()
_owned: set[tuple[Path, int]] = set()
_swept: set[Path] = set()
_mine: set[Path] = set()
_umask = os.umask(0o077)
os.umask(_umask)


def _forget_locks() -> None:
    """A forked process gives back the locks of its parent, which would else outlive it."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()
    _owned.clear()
    _mine.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _lock(folder: Path) -> int | None:
    """A handle of `folder`, locked until it is closed or the process ends in whatever way; None: another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(handle)
            return None
        # a file system without locks: nothing can be told there
    _held.add(handle)
    return handle


def _unlock(handle: int) -> None:
    if handle in _held:  # not after a fork
        _held.remove(handle)
        os.close(handle)


@contextmanager
def locked(folder: str | Path, doing: str = "works") -> Iterator[None]:
    """Keep `folder` for this thread while the block runs; the lock ends with the process, even one that is killed.

    Raises UserError where another process or thread has it; `doing` says what it does there. Of several processes that
    train together (torchrun, SLURM, Lightning) the first holds the lock.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    owner = (folder.resolve(), threading.get_ident())
    if fcntl is None or owner in _owned or process_rank():
        yield
        return
    if (handle := _lock(folder)) is None:
        raise UserError(f"{folder}: another process {doing} in this folder; wait for it, or name another folder")
    _owned.add(owner)
    try:
        yield
    finally:
        _owned.discard(owner)
        _unlock(handle)


def new_start() -> None:
    """A command begins: folders are swept again when something is first written there."""
    _swept.clear()


@contextmanager
def temporary_folder(parent: str | Path | None = None, name: str = "") -> Iterator[Path]:
    """A hidden folder in `parent` (None: the system's place) for the length of the block.

    What a killed process left behind in `parent` is removed first; that of processes that still run stays.
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    parent.mkdir(parents=True, exist_ok=True)
    if parent not in _swept:
        sweep(parent)
        _swept.add(parent)
    while True:
        folder = parent / f".{name[:50]}{TEMPORARY}{secrets.token_hex(6)}"
        _mine.add(folder)  # before it is there: a signal may come at any line
        folder.mkdir(mode=0o700)
        if fcntl is None:
            handle = None
            break
        # a sweep of another process may come between the making and the locking
        with suppress(FileNotFoundError):
            handle = _lock(folder)
            if handle is not None and folder.is_dir():
                break
            if handle is not None:
                _unlock(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _mine.discard(folder)
        if handle is not None:
            _unlock(handle)


def remove_left() -> None:
    """Remove what temporary folders this process has, where it ends by a signal that came while one was left."""
    for folder in list(_mine):
        shutil.rmtree(folder, ignore_errors=True)
    _mine.clear()


atexit.register(remove_left)


def sweep(parent: str | Path) -> None:
    """Remove the temporary folders in `parent` whose processes are no more."""
    if fcntl is None:
        return
    for folder in Path(parent).glob(f".*{TEMPORARY}*"):
        with suppress(OSError):
            if (handle := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                _unlock(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same ending, that becomes `path` when the block ends well.

    The block may write a file or make a folder there. On an error or an interruption the temporary is removed
    and an existing `path` stays as it was. So it does after a kill or a loss of power, and the temporary goes when the
    next process writes beside it. Missing parent folders are made.
    """
    path = Path(path)
    with temporary_folder(path.parent, path.name) as folder:
        temporary = folder / path.name
        yield temporary
        settle(temporary)
        if temporary.is_dir() and path.is_dir():
            os.replace(path, folder / f"{path.name}-old")
        os.replace(temporary, path)
        _sync_one(path.parent)
        written(path)


def settle(path: Path) -> None:
    """Give a file, or all of a folder, the permissions that the user's umask leaves, and wait for the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            settle(inside)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_dir() and fcntl is None:
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def json_text(value: Any, exact: bool = False) -> str:
    """`value` as indented JSON; numpy scalars and arrays, tensors and paths are converted.

    JSON has no NaN and no infinity, and parsers other than Python's refuse them: they become null, unless `exact`, for
    what nearfar alone reads back.
    """
    plain = value if exact else _finite(value)
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=exact, default=_plain)


def write_json(path: str | Path, value: Any, exact: bool = False) -> Path:
    """Write `json_text` of `value` to `path` atomically."""
    return write_text(path, json_text(value, exact) + "\n")


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], delimiter: str = ",") -> Path:
    """Write `rows` as CSV (or TSV, with `delimiter`) to `path` atomically; the columns are those of all rows."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({name: told(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows)
    return Path(path)


def file_digest(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, str | Path):
        return told(str(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
