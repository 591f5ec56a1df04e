"""The console of every app: results on standard output, progress and messages on standard error."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")

console = Console(width=None if sys.stdout.isatty() else 160)
"""Where results go (standard output)."""

messages = Console(stderr=True)
"""Where progress and errors go (standard error)."""


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Go through `items` with a progress bar on standard error (none where it is not a terminal)."""
    with progress() as bar:
        size = total if total is not None else len(items) if isinstance(items, Sequence) else None
        yield from bar.track(items, total=size, description=description)


def progress() -> Progress:
    """A progress display in the project's style, shown only on a terminal and removed when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )


def table(rows: Sequence[dict[str, Any]], title: str | None = None) -> Table:
    """A rich table of `rows`; the columns are the first row's keys, numbers are set to the right."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column, value in (rows[0] if rows else {}).items():
        shown.add_column(str(column), justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in row.values()))
    return shown
