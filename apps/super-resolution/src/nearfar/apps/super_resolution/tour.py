"""The super-resolution chapter of `nearfar tour`."""

from pathlib import Path

from nearfar.core.report import Report


def chapter(report: Report, folder: Path) -> None:
    """Placeholder until weights are there."""
