"""Seeded mutations of small valid files, and what a reader may make of one: a result, or one clear line, soon.

A target makes valid files in a folder and reads the one that was mutated. `survey` is for finding what to mend:

    python -m tests.fuzz.engine TARGET [SEEDS]
"""

import json
import logging
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError

SECONDS = 20
"""The longest that reading a small file may take, far above what any takes."""

GROWTH = 600 << 20
"""Bytes by which the process's peak may grow for a small file."""

NUMBERS = ["-1", "0", "1", "99999999", "4294967295", "2147483648", "nan", "inf", "1e308", "-0", "", "9" * 30, "0.5"]
WORDS = [
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\xe2\x80\xa8", b"\x1b[31m", b'"', b"'", b"[[[[", b"{", b",", b"\r"),
    *(b"\n\n", b"../", b"%s", b"&a *a", b"!!python/object:os.system ", b"\xed\xa0\x80", b"\t", b" "),
]
VALUES: list[Any] = [
    *(None, True, "", "x", "../../etc/passwd", -1, 0, 1, 0.5, 99_999_999, 2**63, 10**40, -(10**9)),
    *(float("nan"), float("inf"), 1e308, [], {}, [[]], [None], {"a": {"b": []}}, "9" * 30, "\x1b[2J", [1] * 50),
]


@dataclass(frozen=True)
class Target:
    """A parser. `make` writes valid files into a folder and returns the names of those to mutate; `read` reads one."""

    make: Callable[[Path], list[str]]
    read: Callable[[Path], Any]


def mutated(data: bytes, name: str, seed: str) -> bytes:
    """One mutant of a file's bytes; JSON is taken apart as often as not."""
    rng = random.Random(seed)
    if Path(name).suffix in (".json", ".jsonl", ".yaml") and rng.random() < 0.6:
        return _mutated_json(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        _mutate(changed, rng)
    return bytes(changed)


def _mutate(data: bytearray, rng: random.Random) -> None:
    if not data:
        data += bytes([rng.randrange(256)])
        return
    size, kind = len(data), rng.random()
    place = rng.randrange(size) if rng.random() < 0.5 else min(size - 1, int(rng.expovariate(1 / 64)))  # headers
    if kind < 0.2:
        data[place] ^= 1 << rng.randrange(8)
    elif kind < 0.35:
        data[place] = rng.choice([0, 255, 127, 128, 32, 10, rng.randrange(256)])
    elif kind < 0.45:
        del data[place:]
    elif kind < 0.55:
        del data[place : place + rng.choice([1, 2, 4, 8, 64, 512])]
    elif kind < 0.65:  # a splice: what stands elsewhere, or here once more
        other, length = rng.choice([place, rng.randrange(size)]), rng.choice([1, 4, 16, 256])
        data[place:place] = bytes(data[other : other + length]) * rng.choice([1, 1, 3, 50])
    elif kind < 0.75:  # numbers of a header, little and big endian
        length = rng.choice([2, 4, 8])
        ends = [b"\xff" * length, bytes(length), b"\x7f" + b"\xff" * (length - 1), b"\xff" * (length - 1) + b"\x7f"]
        data[place : place + length] = rng.choice([*ends, bytes(length - 1) + b"\x80", b"\0\x01" * (length // 2)])
    elif kind < 0.9:
        found = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(data[:20000])))
        if found:
            number = rng.choice(found)
            data[number.start() : number.end()] = rng.choice(NUMBERS).encode()
    else:
        data[place:place] = rng.choice(WORDS)


def _mutated_json(data: bytes, rng: random.Random) -> bytes:
    text = data.decode()
    lines = text.splitlines() if text.count("\n{") else [text]
    row = rng.randrange(len(lines))
    try:
        content = json.loads(lines[row])
    except ValueError:  # YAML
        changed = bytearray(data)
        _mutate(changed, rng)
        return bytes(changed)
    for _ in range(rng.choice([1, 1, 2])):
        content = _mutated_value(content, rng)
    deep = rng.random() < 0.03
    lines[row] = "[" * 100_000 if deep else json.dumps(content)
    return "\n".join(lines).encode()


def _mutated_value(content: Any, rng: random.Random) -> Any:
    places = list(_places(content, content))
    if not places or rng.random() < 0.05:
        return deepcopy(rng.choice(VALUES))
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.2:
        del holder[key]
    elif kind < 0.35:
        holder[key] = rng.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
    elif kind < 0.45 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "0", "-1", f"{key}s", "\x1b[0m", "9" * 20])] = holder.pop(key)
    elif kind < 0.55:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
    else:
        holder[key] = deepcopy(rng.choice(VALUES))
    return content


def _places(value: Any, _root: Any) -> Iterator[tuple[Any, Any]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inside):
        yield value, key
        yield from _places(item, _root)


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded(bytes_more: int = 3 << 30) -> Iterator[None]:
    """At most so many bytes more for the process, so that a bomb is a MemoryError and no dead machine."""
    status = Path("/proc/self/status")
    if not status.is_file():
        yield
        return
    held = next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmData:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + bytes_more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fault(read: Callable[[Path], Any], path: Path, root: Path | None = None) -> str:
    """What is wrong with what `read` makes of `path`; "" where it is a result or one clear line."""
    before, text = peak(), ""
    logging.disable(logging.CRITICAL)
    try:
        with time_limit(), bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except UserError as error:
        text = unclear(str(error), path, root or path.parent)
    except TooLong:
        text = "hangs: " + " < ".join(_places_of(sys.exc_info()[2]))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        text = f"{type(error).__name__}: {str(error)[:150]!r} at {' < '.join(_places_of(error.__traceback__))}"
    finally:
        logging.disable(logging.NOTSET)
    grown = peak() - before
    return text or (f"grows by {grown >> 20} MB" if grown > GROWTH else "")


def _places_of(trace: Any) -> list[str]:
    frames = traceback.extract_tb(trace)
    ours = [f for f in frames if "/nearfar/" in f.filename and "site-packages" not in f.filename]
    return [f"{Path(f.filename).name}:{f.lineno}" for f in (*reversed(ours[-3:]), frames[-1])]


def unclear(text: str, path: Path, root: Path) -> str:
    """Why `text` is no clear line about `path`, or a file in `root` that it leads to; "" where it is one."""
    first, *more = text.split("\n")
    if not first.startswith((str(path), str(root))):
        return f"does not begin with the file's name: {first[:200]!r}"
    if any(not line.startswith("  ") for line in more):  # a list of tensors may follow
        return f"is more than one line: {text[:200]!r}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text.replace(str(path), "")):
        return f"has control characters: {text[:200]!r}"
    rest = first.removeprefix(str(path)).strip(" :,;")
    return "" if len(rest) >= 8 else f"gives no reason: {first!r}"


def mutants(target: Target, folder: Path, seeds: range, name: str) -> Iterator[tuple[str, str]]:
    """(mutant, fault) of the faulty ones among those of `seeds`; the unchanged files come first and must be read."""
    folder = Path(folder)
    good = folder / "good"
    good.mkdir()
    names = target.make(good)
    for file in names:
        shutil.copytree(good, folder / "whole")
        target.read(folder / "whole" / file)
        shutil.rmtree(folder / "whole")
    for seed in seeds:
        file = names[seed % len(names)]
        place = folder / "work"
        shutil.copytree(good, place)
        path = place / file
        path.write_bytes(mutated(path.read_bytes(), file, f"{name}-{seed}"))
        if problem := fault(target.read, path, place):
            yield f"{name}, seed {seed}, {file}", problem
        shutil.rmtree(place, ignore_errors=True)


def survey(name: str, count: int, start: int = 0) -> None:
    from tests.fuzz.targets import TARGETS

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for which, problem in mutants(TARGETS[name], Path(folder), range(start, start + count), name):
            key = re.sub(r"/tmp/\S+|\d+ MB", "...", problem)
            key = re.sub(r": '.*' at", " at", key)[:160]
            if key not in found:
                print(f"{which}: {problem}", flush=True)
            found.setdefault(key, []).append(which)
    print(f"### {name}: {count} mutants, {sum(map(len, found.values()))} faulty, {len(found)} kinds", flush=True)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    survey(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 500, int(sys.argv[3]) if len(sys.argv) > 3 else 0)
