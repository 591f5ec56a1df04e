"""Batches that go on past bad items."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from nearfar.core import remote
from nearfar.core.cli.console import Item, clean, track
from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.core.memory import machine_memory

Result = TypeVar("Result")

TOGETHER = 64
"""Items that are done at once where an action can."""


@dataclass(frozen=True)
class Places:
    """Where the items of a batch are worked on."""

    workers: int = 0
    """Processes; 0 or 1: this one, on one machine."""
    engine: str = "local"
    """`local`, or `ray`, see `nearfar.core.cluster`."""
    seconds: float | None = None
    """Most time for an item, in a process of its own."""

    @property
    def here(self) -> bool:
        """Whether all is done in this process."""
        return self.engine == "local" and self.workers < 2 and self.seconds is None


class BatchError(UserError):
    """Some items of a batch failed; the others are done. Exit status 1."""


def run_batch(
    items: Iterable[Item],
    action: Callable[[Item], Result],
    description: str,
    name: Callable[[Item], str] = str,
    places: Places = Places(),
    failed: Path | None = None,
    each: Callable[[Item, Result], object] | None = None,
    together: Callable[[Sequence[Item]], Sequence[Result]] | None = None,
) -> tuple[list[Result], list[str]]:
    """Apply `action` to each item with a progress bar, going on past those that fail, in whatever way.

    Returns the results of the good items, in their order, and one line per failure that starts with the item's `name`;
    what is no UserError is named by its kind (readers should say it better). Write what the results are for, then call
    `raise_failures`. In other processes, see `nearfar.core.workers.spread`, one that takes more than its share of the
    machine's memory is ended, and its item named.

    `failed`: a JSON file of the failures, `[{item, kind, error}]`, that is there only where there are some. `each` is
    called in this process with every good item as it is done. `together` does what `action` does for some items at
    once, where that is faster and all is done in this process.
    """
    items = list(items)
    if remote.used():
        if not places.here:
            remote.check_shared()
        action, together = remote.Carried(action), None if together is None else remote.Carried(together)
    done: Iterable[tuple[int, Result | None, Exception | None]]
    if places.engine == "ray":
        from nearfar.core import cluster

        done = cluster.spread(items, action, max(places.workers, 1), places.seconds)
    elif not places.here:
        from nearfar.core import workers

        number = max(places.workers, 1)
        done = workers.spread(items, action, number, places.seconds, machine_memory() // number)
    else:
        done = _here(items, action, together)
    found: dict[int, tuple[Result | None, Exception | None]] = {}
    for index, result, error in track(done, description, len(items)):
        found[index] = result, error
        if each is not None and error is None:
            each(items[index], cast(Result, result))
        remote.flush()
    results = [cast(Result, found[i][0]) for i in range(len(items)) if found[i][1] is None]
    errors = [(name(items[i]), error) for i in range(len(items)) if (error := found[i][1]) is not None]
    failures = [failure(*one) for one in errors]
    if failed is not None and errors and (len(items) > 1 or failed.exists()):  # one item is no batch
        lines = zip(errors, failures, strict=True)
        table = [{"item": item, "kind": type(error).__name__, "error": line} for (item, error), line in lines]
        write_json(failed, table)
    elif failed is not None and not errors:
        failed.unlink(missing_ok=True)
    return results, failures


def _here(
    items: list[Item],
    action: Callable[[Item], Result],
    together: Callable[[Sequence[Item]], Sequence[Result]] | None,
) -> Iterator[tuple[int, Result | None, Exception | None]]:
    size = 1 if together is None else TOGETHER
    for start in range(0, len(items), size):
        some = items[start : start + size]
        results: Sequence[Result] | None = None
        if together is not None and len(some) > 1:
            with suppress(Exception):  # that of one of them, which is found below
                results = together(some)
        for place, item in enumerate(some):
            yield start + place, *(_tried(action, item) if results is None else (results[place], None))


def _tried(action: Callable[[Item], Result], item: Item) -> tuple[Result | None, Exception | None]:
    try:
        return action(item), None
    except Exception as error:
        return None, error


def failure(name: str, error: Exception) -> str:
    """What is wrong with the item `name`, which stands first."""
    text, name = str(error).strip(), " ".join(name.split())
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}".rstrip(": ").split("\n")[0][:300]
    return clean(text if text.startswith(name) else f"{name}: {text}")


def raise_failures(failures: Sequence[str], total: int) -> None:
    """End a batch of `total` items with BatchError that lists its failures, if there are any.

    One item is no batch: its failure is a plain UserError (exit status 2).
    """
    if failures and total == 1:
        raise UserError(failures[0])
    if failures:
        raise BatchError(f"{len(failures)} of {total} failed:\n  " + "\n  ".join(failures))
