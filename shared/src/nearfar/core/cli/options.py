"""Options that commands of several apps share."""

from typing import Annotated

import typer

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Forget the run that the folder holds and start anew, e.g. with other data.")
]
