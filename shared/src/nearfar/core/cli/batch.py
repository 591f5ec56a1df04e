"""Batches that go on past bad items."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

from nearfar.core.cli.console import Item, clean, track
from nearfar.core.errors import UserError
from nearfar.core.memory import machine_memory

Result = TypeVar("Result")


class BatchError(UserError):
    """Some items of a batch failed; the others are done. Exit status 1."""


def run_batch(
    items: Iterable[Item],
    action: Callable[[Item], Result],
    description: str,
    name: Callable[[Item], str] = str,
    processes: int = 1,
) -> tuple[list[Result], list[str]]:
    """Apply `action` to each item with a progress bar, going on past those that fail, in whatever way.

    Returns the results of the good items, in their order, and one line per failure that starts with the item's `name`;
    what is no UserError is named by its kind (readers should say it better). Write what the results are for, then call
    `raise_failures`. `processes` above 1: in as many, see `nearfar.core.workers.spread`; one that takes more
    than its share of the machine's memory is ended, and its item named.
    """
    items = list(items)
    done: Iterable[tuple[int, Result | None, Exception | None]]
    if processes > 1 and len(items) > 1:
        from nearfar.core.workers import spread

        done = spread(items, action, processes, memory=machine_memory() // processes)
    else:
        done = ((index, *_tried(action, item)) for index, item in enumerate(items))
    found = {index: (result, error) for index, result, error in track(done, description, len(items))}
    results = [cast(Result, found[i][0]) for i in range(len(items)) if found[i][1] is None]
    failures = [failure(name(items[i]), error) for i in range(len(items)) if (error := found[i][1]) is not None]
    return results, failures


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
