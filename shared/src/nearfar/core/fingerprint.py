"""Digests of settings, data and the code behind them, to tell whether a stored result is still true."""

import ast
import functools
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.files import file_digest
from nearfar.core.remote import fetch


def data_digest(*values: Any) -> str:
    """A digest of what data hold: numbers of arrays and tensors, contents of files, texts, and attributes of objects.

    A path stands for the content of its file, wherever the file lies; an object with a method `content_digest` for what
    that returns. Files are read once per process while their size and time stay.
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        _describe(value, digest, set(), {}, contents=True)
    return digest.hexdigest()


def source_digest(*kinds: type) -> str:
    """A digest of the source of the modules that define `kinds`, and of all of nearfar or the user's that these import.

    What stands in no file, such as a class typed into a notebook, and installed libraries do not count.
    """
    return _source_digest(frozenset(kind.__module__ for kind in kinds))


@functools.lru_cache(maxsize=64)
def _source_digest(modules: frozenset[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    sources, _ = _sources(modules)
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name])
    return digest.hexdigest()


@functools.lru_cache(maxsize=2**20)
def _file_digest(path: Path, size: int, changed: int) -> str:
    return file_digest(path)


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder; kept for the process while size and time stay."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        lines = "".join(f"{p.relative_to(path)}\0{content_digest(p)}\n" for p in inside)
        return hashlib.sha256(lines.encode()).hexdigest()
    fetch(path)
    status = path.stat()
    return _file_digest(path.absolute(), status.st_size, status.st_mtime_ns)


def code_digest(value: Any) -> str:
    """A digest of anything, such as an unfitted estimator: of its settings and of the code that it runs.

    Settings are the values of its attributes, at any depth. Code is the source, as it is on disk, of the modules that
    define its classes and functions, and of every module of nearfar or of the user's that these import, anywhere in
    the file; of installed libraries it is the version.

    Raises `UserError` for code that stands in no file, such as a class typed into a notebook.
    """
    digest, modules = hashlib.blake2b(digest_size=16), set[str]()
    _describe(value, digest, modules, {})
    for line in _code(modules):
        digest.update(line)
    return digest.hexdigest()


def _describe(
    value: Any, digest: Any, modules: set[str], seen: dict[int, tuple[int, Any]], contents: bool = False
) -> None:
    """Add `value` to the digest, whatever it is, and the modules of its classes and functions to `modules`.

    contents: paths are files whose content counts, and addresses of objects do not.
    """

    def text(*parts: Any) -> None:
        digest.update("\0".join(map(str, (*parts, ""))).encode())

    if contents and isinstance(value, Path) and value.exists():
        return text("file", content_digest(value))
    if value is None or isinstance(value, int | float | complex | str | bytes | np.generic | Path | range | slice):
        return text(type(value).__name__, repr(value))
    if id(value) in seen:
        return text("again", seen[id(value)][0])
    seen[id(value)] = (len(seen), value)  # holding the value keeps its id from being given to another
    if contents and hasattr(value, "content_digest"):
        return text(type(value).__name__, value.content_digest())
    if contents and isinstance(getattr(value, "_fingerprint", None), str):  # a table of the package datasets
        return text("table", value._fingerprint)
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        text("array", value.dtype, value.shape)
        return digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    if isinstance(value, Mapping):
        parts: Sequence[Any] = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple | np.ndarray):
        parts = list(value)
    elif isinstance(value, set | frozenset):
        parts = sorted(value, key=repr)
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, type | FunctionType):
        modules.add(value.__module__)
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        defaults = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)]
        text(value.__module__, value.__qualname__)
        parts = [] if isinstance(value, type) else [cells, defaults, value.__code__.co_code]
    elif hasattr(value, "__dict__"):
        parts = [*type(value).__mro__, vars(value)]
    else:
        parts = [*type(value).__mro__, re.sub(" at 0x[0-9a-fA-F]+", "", repr(value)) if contents else repr(value)]
    text(type(value).__name__, len(parts))
    for part in parts:
        _describe(part, digest, modules, seen, contents)
    return None


def _code(modules: set[str]) -> list[bytes]:
    """What stands for the code of `modules` and all they import: sources (ours, the user's) and library versions."""
    homeless = [name for name in modules if _is_ours(name.partition(".")[0]) and _source(name) is None]
    if homeless:
        raise UserError(
            f"the code of module {homeless[0]} is in no file, so nothing tells whether stored results still hold; "
            "move it to a Python file or do without a cache"
        )
    sources, libraries = _sources(modules)
    distributions = _distributions()
    found = sorted({d for top in libraries for d in distributions.get(top, [])})
    return [f"python {sys.version}".encode(), *(f"{name} {version(name)}".encode() for name in found)] + [
        part for name in sorted(sources) for part in (name.encode(), sources[name])
    ]


def _sources(modules: Iterable[str]) -> tuple[dict[str, bytes], set[str]]:
    """The sources, by name, of `modules` and of all of ours or the user's that they import; libraries that they use."""
    sources: dict[str, bytes] = {}
    libraries: set[str] = set()
    waiting = sorted(modules)
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if not _is_ours(top):
            libraries.add(top)
        elif name not in sources and (path := _source(name)) is not None:
            sources[name] = path.read_bytes()
            waiting += _imports(name, path.name == "__init__.py", sources[name])
    return sources, libraries


_distributions = functools.cache(packages_distributions)


@functools.cache
def _is_ours(top: str) -> bool:
    """Whether a top-level package is nearfar or the user's own, not Python's and not an installed library."""
    if top in ("nearfar", "__main__"):
        return True
    if top in sys.stdlib_module_names:
        return False
    spec = getattr(sys.modules.get(top), "__spec__", None) or importlib.util.find_spec(top)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    installed = [sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib")]
    return any(not any(Path(place).is_relative_to(path) for path in installed) for place in places)


def _source(name: str) -> Path | None:
    """The Python file of a module; None where `name` is none, such as a function that is imported from one."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    if name not in sys.modules:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _imports(name: str, package: bool, source: bytes) -> list[str]:
    """Names that a module's source imports, at any depth; `from a import b` gives both `a` and `a.b`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found
