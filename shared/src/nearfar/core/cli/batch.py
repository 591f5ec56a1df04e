"""Batches that go on past bad items."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from nearfar.core.cli.console import Item, clean, track
from nearfar.core.errors import UserError

Result = TypeVar("Result")


class BatchError(UserError):
    """Some items of a batch failed; the others are done. Exit status 1."""


def run_batch(
    items: Iterable[Item],
    action: Callable[[Item], Result],
    description: str,
    name: Callable[[Item], str] = str,
) -> tuple[list[Result], list[str]]:
    """Apply `action` to each item with a progress bar, going on past those that fail, in whatever way.

    Returns the results of the good items and one line per failure that starts with the item's `name`; what is no
    UserError is named by its kind (readers should say it better). Write what the results are for, then call
    `raise_failures`.
    """
    results, failures = [], []
    for item in track(list(items), description):
        try:
            results.append(action(item))
        except Exception as error:
            failures.append(failure(name(item), error))
    return results, failures


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
