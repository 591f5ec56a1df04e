"""Options that commands of several apps share: one name, one meaning, one help text."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nearfar.core.processes import PRECISIONS, STRATEGIES, check_nodes, choose, start_processes
from nearfar.core.recipes import shipped_recipes


def anywhere(text: str) -> Path:
    """A path, or what stands for an fsspec URL, see `nearfar.core.remote`; to be given as `parser`."""
    from nearfar.core.remote import place

    return place(text)


def whole(text: str) -> Path:
    """As `anywhere`, and all of it is fetched at once: for models, tables and lists."""
    from nearfar.core.remote import place

    return place(text, whole=True)


def _device(name: str) -> str:
    from nearfar.core.devices import choose_device  # imports torch

    return choose_device(name, "--device")


def _devices(number: int) -> int:
    start_processes(number)
    return number


def _precision(name: str) -> str:
    choose(precision=name)
    return name


def _strategy(name: str) -> str:
    choose(strategy=name)
    return name


def _nodes(number: int) -> int:
    check_nodes(number)
    return number


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
Nodes = Annotated[
    int,
    typer.Option(
        "--num-nodes",
        min=1,
        help="Machines on which torchrun or srun has started the command: another number is refused.",
        callback=_nodes,
        is_eager=True,
    ),
]
Precision = Annotated[
    str, typer.Option("--precision", help=f"Of the training: {', '.join(PRECISIONS)}.", callback=_precision)
]
RunFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the run and its model; the same command goes on there.")
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]
STRATEGY_HELP = (
    f"Of several processes: {STRATEGIES[0]}, each has the model whole, or {STRATEGIES[1]}, each keeps a part."
)
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        help=STRATEGY_HELP,
        callback=_strategy,
    ),
]
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
