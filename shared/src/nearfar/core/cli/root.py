"""The `nearfar` command: the installed apps, `verify`, `tour`; and what every app's command line shares.

An app registers its typer application in the entry-point group `nearfar.apps` and a chapter of the tour in
`nearfar.tour`. Errors that the user can mend (`UserError`) end in one line and exit status 2; a batch that went on past
bad items ends in a list of them and exit status 1; `--debug`, anywhere on the line, shows the traceback instead.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from nearfar.core.cli.batch import BatchError
from nearfar.core.cli.console import console, messages, say
from nearfar.core.cli.doctor import doctor
from nearfar.core.cli.tour import tour
from nearfar.core.cli.verify import verify
from nearfar.core.entry_points import load_entry_point
from nearfar.core.errors import UserError
from nearfar.core.files import new_start, remove_left
from nearfar.core.processes import check_together, process_count, process_rank
from nearfar.core.remote import elsewhere

PROCESS = f" (process {process_rank()})" if process_rank() else ""
"""Of several that work together, which one an error comes from, unless it is the first."""


def root(arguments: Sequence[str]) -> typer.Typer:
    """The root command for a command line: of the installed apps only the one that is called is imported."""
    app = typer.Typer(
        help="Deep-learning systems that mix near and far, as software. "
        "`nearfar APP --help` explains each app; `--debug` shows the traceback of an error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_root_options)
    app.command(rich_help_panel="Checks")(verify)
    app.command(rich_help_panel="Checks")(doctor)
    app.command(rich_help_panel="Checks")(tour)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for point in sorted(entry_points(group="nearfar.apps"), key=lambda point: point.name):
        if point.name == called:
            app.add_typer(load_entry_point(point), name=point.name)
        else:  # importing every app to print one line of help would take seconds
            summary = point.dist.metadata["Summary"] if point.dist else None
            app.command(point.name, help=summary, rich_help_panel="Apps")(_no_options)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the `nearfar` command on `arguments` (default: the process's) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    new_start()
    if process_count() > 1:  # advice to programmers from torch's own log, which is read when torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        check_together(arguments)
        with warnings.catch_warnings(), stop_signals():
            if not debug:
                warnings.simplefilter("ignore")  # libraries' advice to programmers
            with elsewhere():
                root(arguments)(arguments, prog_name="nearfar")
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None and not isinstance(cause, KeyboardInterrupt):  # typer turns Ctrl-C into an exit
            cause = cause.__context__
        if cause is not None:
            return interrupted(cause)
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt as stop:
        return interrupted(stop)
    except UserError as error:
        if debug:
            raise
        say(f"error{PROCESS}:", str(error))
        return 1 if isinstance(error, BatchError) else 2
    except Exception as error:
        if debug:
            raise
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        say(f"unexpected error{PROCESS}:", f"{reason} (--debug shows where)")
        return 1
    return 0


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end: as Ctrl-C does, with the signal's own exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def stop_signals() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP raise `Stopped`, so that what is begun is left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def stop(number: int, _frame: object) -> None:
        if os.getpid() != process:  # a forked worker ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [n for n in (getattr(signal, name) for name in names) if signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:  # one that is ignored, as by nohup, stays ignored
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def interrupted(stop: KeyboardInterrupt) -> int:
    """Leave nothing half-written, and say that the command was stopped; its exit status."""
    remove_left()
    messages.print("interrupted; finished outputs are kept, run the same command again to go on")
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def main() -> None:
    """Entry point of the `nearfar` script."""
    sys.exit(run())


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"nearfar {version('nearfar-core')}", highlight=False)
        raise typer.Exit


def _root_options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _no_options() -> None:
    pass
