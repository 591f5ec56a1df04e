"""The console of every app: results on standard output, progress and messages on standard error.

What comes from a file or a user is shown as it is: no console reads markup, and control characters are left out.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nearfar.core.files import json_text
from nearfar.core.processes import process_rank
from nearfar.core.remote import told

Item = TypeVar("Item")

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for line feed and tab: those of terminals, and those that turn the order of writing round."""


def clean(text: str) -> str:
    """`text` without control characters, which could forge or hide lines on a terminal; URLs as they were given."""
    return told(UNSEEN.sub("", text))


class PlainConsole(Console):
    """A console that takes strings, in tables too, for text: no markup, no emoji codes, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(clean(text), **options | {"markup": False, "emoji": False})

    def __reduce__(self) -> Any:
        """In another process, that one's console takes its place."""
        return _console_of, (self.stderr,)


def _console_of(stderr: bool) -> "PlainConsole":
    return messages if stderr else console


console = PlainConsole(width=None if sys.stdout.isatty() else 160, quiet=process_rank() > 0)
"""Where results go (standard output); of several processes that work together, those of the first."""

messages = PlainConsole(stderr=True, quiet=process_rank() > 0)
"""Where progress goes (standard error), of the first process."""

errors = PlainConsole(stderr=True)
"""Where errors go (standard error), of any process."""


def say(kind: str, text: str, style: str = "red") -> None:
    """One message on standard error, from any process: its kind in colour, then the text."""
    errors.print(Text.assemble((kind, style), " ", clean(text)), soft_wrap=True, highlight=False)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Go through `items` with a progress bar on standard error (none where it is not a terminal)."""
    with progress() as bar:
        size = total if total is not None else len(items) if isinstance(items, Sequence) else None
        yield from bar.track(items, total=size, description=description)


def progress() -> Progress:
    """A progress display in the project's style, shown only on a terminal and removed when done."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Rows as a table, or as JSON for programs, on standard output."""
    if as_json:
        show_json(rows)
    else:
        console.print(table(rows))


def show_json(value: Any) -> None:
    """JSON for programs on standard output, as `nearfar.core.files.json_text` writes it."""
    print(json_text(value))


def table(rows: Sequence[dict[str, Any]], title: str | None = None) -> Table:
    """A rich table of `rows`; the columns are the first row's keys, numbers are set to the right."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column, value in (rows[0] if rows else {}).items():
        shown.add_column(str(column), justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return shown
