"""Reading files that may be damaged, of another kind, or made to harm: one line says what is wrong, nothing hangs.

What a header announces is held against the file's own size before anything is allocated for it.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.remote import fetch

DEFLATE = 1032
"""Bytes that deflate, the compression of zip, gzip, PNG and HDF5, makes of one byte at most."""

UNIFORM = 1 << 24
"""Numbers up to which a picture or a slice may be compressed by whatever factor."""

LEAST_SIZE = 1 << 16
"""What a model's settings may always say."""

UNWRITTEN = 1 << 26
"""Bytes of a data set in HDF5 that may lie in no chunk, and have its fill value."""


@contextmanager
def reading(
    path: str | Path,
    wrong: str,
    mend: str = "it may be damaged, cut off or of another kind; copy it again or leave it out",
    error: type[UserError] = UserError,
) -> Iterator[None]:
    """Whatever goes wrong in the block is a UserError of one line that begins with `path`.

    For the calls that decode what others wrote: their libraries raise anything. A UserError keeps its words and kind.

    Args:
        wrong: what to say of it, such as "cannot be read as a picture"; the reason follows in brackets.
        mend: what to do.
        error: kind of UserError.
    """
    try:
        fetch(path)
        yield
    except UserError as problem:
        if str(problem).startswith(str(UserError(path))):
            raise
        raise type(problem)(f"{path}: {problem}") from problem
    except Exception as problem:
        if isinstance(problem, FileNotFoundError) and not Path(path).exists():
            raise error(f"{path}: no such file ({wrong})") from problem
        raise error(f"{path}: {wrong} ({reason(problem)}); {mend}") from problem


def reason(problem: BaseException) -> str:
    """Kind and message of an exception in one line without control characters."""
    if isinstance(problem, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    first = next((line for line in map(str.strip, str(problem).splitlines()) if line), "")
    shown = "".join(c if c.isprintable() else " " for c in first)
    return f"{type(problem).__name__}: {' '.join(shown.split())[:200]}".rstrip(": ")


def check_announced(path: str | Path, announced: float, compressed: bool = False, size: int | None = None) -> None:
    """Raise UserError where a header announces more bytes than can be in the file.

    Args:
        compressed: by deflate or something weaker.
        size: bytes that there are; None: the file's.
    """
    size = Path(path).stat().st_size if size is None else size
    if not 0 <= announced <= size * (DEFLATE if compressed else 1):
        raise UserError(
            f"{path}: its header announces {announced:,.0f} bytes of data, which {size:,} bytes cannot hold; "
            "it is cut off or damaged, copy it again"
        )


def check_picture(picture: Any, path: str | Path, size: int | None = None) -> None:
    """Raise UserError where the header of a picture (PIL's) announces more pixels than `size` bytes can hold.

    Up to `UNIFORM` pixels it may be as uniform as it likes.
    """
    width, height = picture.size
    if width * height > UNIFORM:
        bits = 1 if picture.mode == "1" else 8 * len(picture.getbands())
        check_announced(path, width * height * bits / 8, compressed=True, size=size)


def read_json(path: str | Path, what: str, mend: str = "it may be damaged; copy it again") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where it is something else."""
    with reading(path, f"cannot be read as {what}", mend):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise UserError(f"{path}: cannot be read as {what} (holds {type(content).__name__}, no object); {mend}")
        return content


def read_arrays(path: str | Path, what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, without pickle. Raises UserError where a header announces more than is there."""
    with reading(path, f"cannot be read as {what}"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                check_announced(
                    path, member.file_size, member.compress_type != zipfile.ZIP_STORED, member.compress_size
                )
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                    shape, _, dtype = (header or np.lib.format.read_array_header_2_0)(stream)
                    check_announced(path, math.prod(shape) * dtype.itemsize, size=member.file_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def is_hdf5(path: str | Path) -> bool:
    return bool(h5py.is_hdf5(path))


def check_hdf5(path: str | Path) -> None:
    """Raise UserError where arrays of an HDF5 file announce more than it holds, or lie in other files."""
    unwritten = 0

    def visit(name: str, item: Any) -> None:
        nonlocal unwritten
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return
        if item.external or item.is_virtual:
            raise UserError(f"{path}: keeps {name} in other files, which are not read; write it into one file")
        stored = item.id.get_storage_size()
        unwritten += max(0, math.prod(item.shape) * item.dtype.itemsize - stored * DEFLATE)
        if unwritten > UNWRITTEN:
            raise UserError(
                f"{path}: {name} announces {math.prod(item.shape):,} numbers, which its {stored:,} bytes cannot hold; "
                "it is damaged or made to harm"
            )

    with h5py.File(path, "r") as file:
        file.visititems(visit)


def whole_numbers(settings: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in nested settings, with its name."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from whole_numbers(value, str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from whole_numbers(value, name)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield name, settings


def check_sizes(path: str | Path, settings: Any, weights: str | Path, known: Callable[[str], bool] = bool) -> None:
    """Raise UserError where a model's settings have a number beyond the bytes of its weights: no such model is built.

    `known`: names that count; all by default.
    """
    size = max(LEAST_SIZE, Path(weights).stat().st_size) if Path(weights).is_file() else 1 << 30
    for name, value in whole_numbers(settings):
        if known(name) and abs(value) > size:
            raise UserError(f"{path}: {name} is {value}, more than its weights have bytes; copy the folder again")
