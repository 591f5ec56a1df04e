"""The `nearfar` command: the installed apps, `verify`, `tour`; and what every app's command line shares.

An app registers its typer application in the entry-point group `nearfar.apps` and a chapter of the tour in
`nearfar.tour`. Errors that the user can mend (`UserError`) end in one line and exit status 2; a batch that went on past
bad items ends in a list of them and exit status 1; `--debug`, anywhere on the line, shows the traceback instead.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nearfar.core.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

console = Console(width=None if sys.stdout.isatty() else 160)
"""Where results go (standard output)."""

messages = Console(stderr=True)
"""Where progress and errors go (standard error)."""


class BatchError(UserError):
    """Some items of a batch failed; the others are done. Exit status 1."""


def run_batch(
    items: Iterable[Item],
    action: Callable[[Item], Result],
    description: str,
    name: Callable[[Item], str] = str,
) -> tuple[list[Result], list[str]]:
    """Apply `action` to each item with a progress bar, going on past those that raise UserError.

    Returns the results of the good items and one line per failure that starts with the item's `name`. Write what the
    results are for, then call `raise_failures`.
    """
    results, failures = [], []
    for item in track(list(items), description):
        try:
            results.append(action(item))
        except UserError as error:
            text = str(error)
            failures.append(text if name(item) in text else f"{name(item)}: {text}")
    return results, failures


def raise_failures(failures: Sequence[str], total: int) -> None:
    """End a batch of `total` items with BatchError that lists its failures, if there are any.

    One item is no batch: its failure is a plain UserError (exit status 2).
    """
    if failures and total == 1:
        raise UserError(failures[0])
    if failures:
        raise BatchError(f"{len(failures)} of {total} failed:\n  " + "\n  ".join(failures))


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
    app.command(rich_help_panel="Checks")(tour)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for point in sorted(entry_points(group="nearfar.apps"), key=lambda point: point.name):
        if point.name == called:
            app.add_typer(load_entry_point(point), name=point.name)
        else:  # importing every app to print one line of help would take seconds
            summary = point.dist.metadata["Summary"] if point.dist else None
            app.command(point.name, help=summary, rich_help_panel="Apps")(_no_options)
    return app


def load_entry_point(point: EntryPoint) -> Any:
    """Import what an entry point names; an environment in which it cannot be imported is a UserError of one line."""
    try:
        return point.load()
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{point.name}: cannot be imported here ({reason}); nearfar needs torch>=2.11,<2.15 and the versions in "
            f"its uv.lock, this environment has torch {version('torch')}"
        ) from error


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the `nearfar` command on `arguments` (default: the process's) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # libraries' advice to programmers
            root(arguments)(arguments, prog_name="nearfar")
    except SystemExit as end:
        cause = end.__context__
        while cause is not None and not isinstance(cause, KeyboardInterrupt):  # typer turns Ctrl-C into an exit
            cause = cause.__context__
        if cause is not None:
            messages.print("interrupted; finished outputs are kept, run the same command again to go on")
            return 130
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        if debug:
            raise
        messages.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1 if isinstance(error, BatchError) else 2
    except Exception as error:
        if debug:
            raise
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        messages.print(
            f"[red]unexpected error:[/] {escape(reason)} (--debug shows where)", soft_wrap=True, highlight=False
        )
        return 1
    return 0


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


def verify(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Contract files or folders of them. Default: those of this repository.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Run each model under torch.compile.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error allowed. (default: the file's own, else 1e-4)")
    ] = None,
) -> None:
    """Check that each model computes what its published code computes.

    Prints one line per contract: system, variant, the output that differs most, its relative error, ok or FAIL.
    Exit status 1 if any failed or is of a system that is not installed.
    """
    import torch  # not at the top: printing help should not wait for it

    from nearfar.core import contracts

    dtypes = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(dtypes)}")
    points = {point.name: point for point in entry_points(group="nearfar.contracts")}
    counts = dict.fromkeys(("ok", "FAIL", "unknown"), 0)
    for path in _contract_files(files):
        contract = contracts.Contract.load(path)
        output, error, verdict = "-", "-", "unknown"
        if contract.system in points:
            try:
                build = load_entry_point(points[contract.system])
                errors = contracts.verify(contract, build, device, dtypes[dtype], compile)
                output = max(errors, key=errors.__getitem__)
                limit = tolerance or contract.tolerance or 1e-4
                error, verdict = f"{errors[output]:.1e}", "ok" if errors[output] < limit else "FAIL"
            except UserError as problem:
                error, verdict = str(problem).split("\n")[0], "FAIL"
            except Exception as problem:  # one model that cannot be built must not hide the others
                error, verdict = f"{type(problem).__name__}: {problem}".split("\n")[0], "FAIL"
        counts[verdict] += 1
        print(f"{contract.system}  {contract.variant}  {output}  {error}  {verdict}", flush=True)
    print(f"{counts['ok']} ok, {counts['FAIL']} failed, {counts['unknown']} unknown")
    if counts["FAIL"] or counts["unknown"]:
        raise typer.Exit(1)


def _contract_files(paths: list[Path] | None) -> list[Path]:
    if not paths:
        paths = [Path(__file__).parents[4] / "tests" / "contracts"]
        if not paths[0].is_dir():
            raise UserError("verify: no contract files come with an installed nearfar; name files or a folder of them")
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise UserError(f"{path}: no contract files (*.json) in this folder")
            found += inside
        else:
            found.append(path)
    return found


def tour(
    output: Annotated[Path, typer.Option(help="Folder for the page and its files.")] = Path("nearfar-tour"),
    only: Annotated[list[str] | None, typer.Option(help="Chapter to run (repeatable). Default: all.")] = None,
) -> None:
    """Run a short real job in every installed domain and write one HTML page of results and pictures.

    Uses data that comes with the dependencies: nothing is downloaded.
    """
    from nearfar.core.report import Report

    points = {point.name: point for point in entry_points(group="nearfar.tour")}
    for name in only or ():
        if name not in points:
            raise UserError(f"--only {name}: no such chapter; installed are {', '.join(sorted(points)) or 'none'}")
    chosen = only or sorted(points)
    if not chosen:
        raise UserError("tour: no app is installed; install one, for example with pip install ./apps/motor-imagery")
    report = Report("A tour of nearfar", "A short real job in every installed domain.")

    def run_chapter(name: str) -> None:
        console.rule(name)
        started = time.monotonic()
        (output / name).mkdir(parents=True, exist_ok=True)
        try:
            load_entry_point(points[name])(report, output / name)
        except Exception as error:
            report.text(f"This chapter did not finish: {error}")
            if isinstance(error, UserError) or len(chosen) == 1:  # alone, `--debug` shows where
                raise
            raise UserError(f"{type(error).__name__}: {error}") from error
        console.print(f"{name}: {time.monotonic() - started:.0f} s", highlight=False)

    _, failures = run_batch(chosen, run_chapter, "tour")
    page = report.write(output / "index.html")
    console.print(f"The page with all results and pictures: {page}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(chosen))
