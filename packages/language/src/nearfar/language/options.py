"""What the apps on sequence mixers have in common on their command line."""

from pathlib import Path
from typing import Annotated

import typer

from nearfar.language.registry import import_mixers


def imports(
    mixers: Annotated[
        list[Path] | None,
        typer.Option("--import", help="Python file that is run for its tables MIXERS and STATE_MIXERS (repeatable)."),
    ] = None,
) -> None:
    """The callback of an app that takes mixers of the user's own."""
    for path in mixers or ():
        import_mixers(path)
