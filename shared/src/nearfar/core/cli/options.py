"""Options that commands of several apps share: one name, one meaning, one help text."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nearfar.core.errors import UserError
from nearfar.core.processes import start_processes
from nearfar.core.recipes import shipped_recipes

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def _device(name: str) -> str:
    from nearfar.core.devices import choose_device  # imports torch

    return choose_device(name, "--device")


def _devices(number: int) -> int:
    start_processes(number)
    return number


def _precision(name: str) -> str:
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")
    return name


Devices = Annotated[
    int,
    typer.Option(
        "--devices",
        min=1,
        help="GPUs of this machine, or processes on its CPU, that train together, each with a batch of the recipe's "
        "size; with several machines, torchrun or srun starts them.",
        callback=_devices,
    ),
]
"""To be taken by a command that trains once: the callback starts the processes, each of which runs the command."""
Device = Annotated[str, typer.Option("--device", help="auto (the fastest), cpu, cuda or mps.", callback=_device)]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Whose --workers: this machine's, or the Ray cluster's at RAY_ADDRESS."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Forget the run that the folder holds and start anew, e.g. with other data.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Memory = Annotated[str | None, typer.Option("--memory", help="Most memory to use, such as 800M or 2G.")]
Precision = Annotated[
    str, typer.Option("--precision", help=f"Of the training: {', '.join(PRECISIONS)}.", callback=_precision)
]
RunFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the run and its model; the same command goes on there.")
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the recipe, NAME=VALUE, e.g. epochs=50. Repeat for more."),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=0, help="Most seconds for a file, which is given up then; the others go on."),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=0, help="Processes that read the data or, where each file is worked on by itself, do the work."
    ),
]


def recipe_option(folder: Path | None = None) -> Any:
    """The option --recipe of an app whose recipes lie in `folder`."""
    names = [] if folder is None else shipped_recipes(folder)
    return typer.Option("--recipe", help=f"YAML file with settings{', or ' if names else ''}{', '.join(names)}.")
