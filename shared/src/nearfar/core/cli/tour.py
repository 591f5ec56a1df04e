"""`nearfar tour`: a short real job in every installed domain."""

import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from nearfar.core.cli.batch import raise_failures, run_batch
from nearfar.core.cli.console import console
from nearfar.core.entry_points import load_entry_point
from nearfar.core.errors import UserError


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
