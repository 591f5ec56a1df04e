"""Files elsewhere: URLs that fsspec knows (`s3://`, `gs://`, `memory://` ...) as paths below a folder of this machine.

`place` gives the path of a URL. What is there is listed, and stands below the folder as empty files until it is read:
`nearfar.core.reading` and the digests of `nearfar.core.fingerprint` call `fetch`. What is written, which
`nearfar.core.files` says by `written`, goes to the URL when its item of a batch is done (`Carried`), the rest at the
command's end; of both nothing stays here, so the disk holds no more than the items that are being worked on.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

URL = re.compile(r"([a-z][a-z0-9+.-]+)://")

PART = "part"
"""Ending of a hidden file beside a result that is being sent: what stands there may be cut off and counts as absent."""

PREFIX = "nearfar-elsewhere-"
"""Of the folders' names, in the system's place for temporary files."""

FLUSH = 60.0
"""Seconds between two times that a table's kept rows are sent."""

VERSIONS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call that which changes with a file's content; the first that is there counts, with the size."""


PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub", "http": "aiohttp", "sftp": "paramiko"}
"""What has to be installed for a protocol."""


class _Elsewhere:
    """What this process knows of the URLs of a command."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.held: int | None = None  # the handle of the folder's lock, which all processes that use it share
        self.urls: dict[str, bool] = {}  # whether all is wanted at once
        self.anchors: dict[Path, tuple[str, str]] = {}  # folder here -> protocol, folder there
        self.versions: dict[Path, str] = {}
        self.written: dict[Path, None] = {}
        self.kept: set[Path] = set()
        self.fetched: set[Path] = set()
        self.sent = time.monotonic()


_here = _Elsewhere()

_folders: list[Path] = []
"""Those of this process's commands: a message may come when one is over."""


def place(text: str | Path, whole: bool = False) -> Path:
    """The path that stands for a URL; of what is no URL, the path that it is.

    whole: fetch all that is there now, as for a model. Raises UserError where no implementation of the protocol is
    installed, or it cannot be reached.
    """
    if not URL.match(str(text)):
        return Path(text)
    if _here.folder is None:
        _sweep()
        _here.folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        _hold()
    url = str(text).rstrip("/")
    path = _listed(url)
    _here.urls[url] = whole or _here.urls.get(url, False)
    (_here.folder / "versions.json").write_text(json.dumps({str(p): v for p, v in _here.versions.items()}))
    if whole:
        fetch(path)
        _here.fetched.clear()  # it stays
    return path


def protocols() -> dict[str, str]:
    """What reads each protocol here, or what has to be installed for it."""
    import fsspec

    found = {}
    for name in ("file", "memory", *PACKAGES):
        try:
            found[f"{name}://"] = fsspec.get_filesystem_class(name).__module__.partition(".")[0]
        except ImportError:
            found[f"{name}://"] = f"not here: pip install {PACKAGES[name]}"
    return found


def used() -> bool:
    return _here.folder is not None


def told(text: str) -> str:
    """`text` with the URLs in place of the paths that stand for them."""
    for folder in _folders:
        if str(folder) in text:
            text = text.replace(f"{folder}/file/", "file:///")
            text = re.sub(rf"{re.escape(str(folder))}/([a-z0-9+.-]+)/", r"\1://", text)
    return text


def version_of(path: Path) -> str | None:
    """What changes where the content of a file elsewhere does, without reading it; None for files of this machine."""
    if _here.folder is None or not _is_ours(path):
        return None
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        found = {p.relative_to(path): _here.versions.get(p.absolute()) for p in inside}
        return None if None in found.values() else "\n".join(f"{name} {mark}" for name, mark in found.items())
    return _here.versions.get(path.absolute())


def fetch(*paths: str | Path) -> None:
    """Get the content of files, or of all in folders, that stand for files elsewhere and are not here yet."""
    if _here.folder is None:
        return
    for path in map(Path, paths):
        if not _is_ours(path):
            continue
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if file.exists() and file.stat().st_size:
                continue
            system, there = _there(file)
            temporary = file.with_name(f".{file.name}.{os.getpid()}.{PART}")
            try:
                if not system.isfile(there):
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(there, str(temporary))
                os.replace(temporary, file)
            except Exception as error:
                raise UserError(f"{file}: cannot be fetched ({_reason(error)})") from error
            finally:
                temporary.unlink(missing_ok=True)
            _here.fetched.add(file)


def written(path: str | Path, now: bool = True) -> None:
    """Say that a file or folder has been written; `now`: it is sent with its item, else every minute and at the end."""
    path = Path(path)
    if _here.folder is None or not _is_ours(path):
        return
    if now:
        _here.written[path] = None
    else:
        _here.kept.add(path)


def flush() -> None:
    """Send the kept rows of tables, once a minute."""
    if _here.kept and time.monotonic() - _here.sent > FLUSH:
        _send([*_here.kept])
        _here.kept.clear()
        _here.sent = time.monotonic()


def check_shared() -> None:
    """Raises UserError where other processes cannot see what a URL names."""
    if alone := [url for url in _here.urls if url.startswith("memory:")]:
        raise UserError(f"{alone[0]}: is in the memory of this process; leave out --workers, --engine and --timeout")


class Carried:
    """An action on items in whichever process: it sees the URLs, sends what it wrote and leaves nothing here."""

    def __init__(self, action: Callable[[Any], Any]) -> None:
        self.action, self.folder, self.urls = action, _here.folder, _here.urls

    def __call__(self, item: Any) -> Any:
        if _here.folder is None:
            self._begin()
        try:
            return self.action(item)
        finally:
            _settle()

    def _begin(self) -> None:
        """In another process, perhaps of another machine."""
        assert self.folder is not None
        _here.folder, listing = self.folder, self.folder / "versions.json"
        known = json.loads(listing.read_text()) if listing.exists() else None
        if known is None:
            _sweep()
        self.folder.mkdir(parents=True, exist_ok=True)
        _hold()
        for url, whole in self.urls.items():
            path = _listed(url, known is None)
            if whole:
                fetch(path)
        if known is not None:
            _here.versions = {Path(name): version for name, version in known.items()}
        _here.urls = self.urls
        _here.fetched.clear()


@contextmanager
def elsewhere() -> Iterator[None]:
    """For the length of a command: at its end, however it ends, what was written and not sent yet is sent."""
    try:
        yield
    finally:
        folder = _here.folder
        try:
            if folder is not None:
                _send([*_here.written, *_here.kept])
        finally:
            if _here.held is not None:
                os.close(_here.held)
            _here.__init__()  # type: ignore[misc]
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _hold() -> None:
    assert _here.folder is not None
    _folders.append(_here.folder)
    if fcntl is not None:
        _here.held = os.open(_here.folder, os.O_RDONLY)
        fcntl.flock(_here.held, fcntl.LOCK_SH)


def _sweep() -> None:
    """Remove what commands left whose processes are no more, also those that worked here for another machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if fcntl is not None else ():
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                if time.time() - folder.stat().st_mtime > 60:  # a younger one may be about to be held
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _is_ours(path: Path) -> bool:
    return _here.folder is not None and path.absolute().is_relative_to(_here.folder)


def _system(protocol: str, url: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol, use_listings_cache=False)  # other processes write there too
    except (ImportError, ValueError) as error:
        mend = f"pip install {PACKAGES[protocol]}" if protocol in PACKAGES else "see fsspec's list of implementations"
        raise UserError(f"{url}: nothing here reads {protocol}:// ({_reason(error)}); {mend}") from error


def _listed(url: str, look: bool = True) -> Path:
    """The path that stands for `url`; with `look`, empty files for what is there, and for what lies beside a file."""
    assert _here.folder is not None
    found = URL.match(url)
    assert found is not None
    protocol = found[1]
    system = _system(protocol, url)
    there = str(system._strip_protocol(url))
    path = _here.folder / protocol / re.sub(r"^[a-z]+://", "", there).lstrip("/")
    above, _, name = there.rpartition("/")
    _here.anchors[path.parent] = protocol, above
    path.parent.mkdir(parents=True, exist_ok=True)
    if not look:
        return path
    try:
        if system.isdir(there):
            path.mkdir(exist_ok=True)
            files = system.find(there, detail=True)
        else:
            files = {}
            for entry in system.ls(above, detail=True) if system.isdir(above) else []:
                own = entry["name"].rstrip("/").rpartition("/")[2].lstrip(".")
                if entry["type"] == "file" and own.startswith(name.partition(".")[0]):
                    files[entry["name"]] = entry
                elif entry["type"] == "directory" and own.startswith(f"{name}."):
                    files |= system.find(entry["name"], detail=True)
    except Exception as error:
        raise UserError(f"{url}: cannot be listed ({_reason(error)})") from error
    cut = [f"{up}/{one[1 : -len(PART) - 1]}" for up, _, one in (n.rpartition("/") for n in files) if _is_part(one)]
    for file, about in files.items():
        if any(file == result or file.startswith(f"{result}/") for result in cut) or _is_part(file.rpartition("/")[2]):
            continue
        local = path.parent / file.removeprefix(above).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.touch()
        if (mark := next((about[key] for key in VERSIONS if about.get(key) is not None), None)) is not None:
            _here.versions[local] = f"{protocol} {about.get('size')} {mark}"
    return path


def _is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(f".{PART}")


def _there(path: Path) -> tuple[Any, str]:
    """The file system of a path below the folder, and the path there."""
    path = path.absolute()
    anchor = max((a for a in _here.anchors if path.is_relative_to(a)), key=lambda a: len(a.parts))
    protocol, above = _here.anchors[anchor]
    return _system(protocol, protocol), f"{above}/{path.relative_to(anchor).as_posix()}"


def _send(paths: list[Path]) -> None:
    """Send files and folders; until all are, hidden files beside them say that they may be cut off."""
    begun = []
    try:
        for path in dict.fromkeys(path for path in paths if path.exists()):
            system, there = _there(path)
            above, _, name = there.rpartition("/")
            system.makedirs(above, exist_ok=True)
            if not path.name.startswith("."):
                system.pipe_file(f"{above}/.{name}.{PART}", b"")
                begun.append((system, f"{above}/.{name}.{PART}"))
            if not path.is_dir():
                system.put_file(str(path), there)
                continue
            if system.exists(there):
                system.rm(there, recursive=True)
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                target = f"{there}/{file.relative_to(path).as_posix()}"
                system.makedirs(target.rpartition("/")[0], exist_ok=True)
                system.put_file(str(file), target)
        for system, part in begun:
            system.rm_file(part)
    except Exception as error:
        raise UserError(f"{paths[0]}: cannot be sent ({_reason(error)}); run the same command again") from error


def _settle() -> None:
    """An item is done: what it wrote is sent, what it read or wrote is empty again."""
    paths = [*_here.written]
    _here.written.clear()
    try:
        if paths:
            _send(paths)
    finally:
        for path in [*_here.fetched, *paths]:
            for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
                with suppress(FileNotFoundError):
                    os.truncate(file, 0)
        _here.fetched.clear()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0].rstrip(": ")[:300]
