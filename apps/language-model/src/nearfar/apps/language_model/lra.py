"""`nearfar language-model lra`: Long Range Arena."""

from pathlib import Path
from typing import Annotated

import typer

from nearfar.core.cli.console import console, messages, show_json, table
from nearfar.core.cli.options import (
    Device,
    Devices,
    Fresh,
    Json,
    Nodes,
    Precision,
    RunFolder,
    Seed,
    Settings,
    Strategy,
    recipe_option,
)
from nearfar.core.errors import UserError
from nearfar.core.recipes import read_recipe
from nearfar.language.arena import listops
from nearfar.language.arena.tasks import Part
from nearfar.language.arena.training import ArenaRecipe, accuracy, train_on_arena
from nearfar.language.tcnca import SequenceClassifier

app = typer.Typer(
    help="Long Range Arena: `make` writes ListOps, `train` trains Mega or TCNCA on a task's files, `evaluate` scores.",
    no_args_is_help=True,
)
Data = Annotated[Path, typer.Argument(help="Folder with the files of Long Range Arena.")]


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Folder for listops-1000/basic_{train,val,test}.tsv.")],
    train: Annotated[int, typer.Option(help="Training examples.")] = 96000,
    val: Annotated[int, typer.Option(help="Validation examples.")] = 2000,
    test: Annotated[int, typer.Option(help="Test examples.")] = 2000,
    min_length: Annotated[int, typer.Option(help="Lists have more tokens; smaller ones are easier to learn.")] = 500,
    max_length: Annotated[int, typer.Option(help="Lists have fewer tokens.")] = 2000,
    max_depth: Annotated[int, typer.Option(help="Levels of the deepest lists, digits included.")] = 10,
    seed: Seed = 0,
) -> None:
    """Write ListOps, by default as Long Range Arena has it."""
    sizes = {"train": train, "val": val, "test": test}
    try:
        made = listops.make(folder, sizes, seed, min_length=min_length, max_length=max_length, max_depth=max_depth)
    except ValueError as error:
        raise UserError(
            f"--min-length {min_length} --max-length {max_length} --max-depth {max_depth}: {error}"
        ) from error
    for path in made:
        console.print(str(path))


@app.command()
def train(
    data: Data,
    output: RunFolder,
    recipe: Annotated[str | None, recipe_option()] = None,
    settings: Settings = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a classifier; the best validation accuracy chooses its weights."""
    chosen = read_recipe(ArenaRecipe, recipe, settings or ())
    result = train_on_arena(chosen, data, output, device, show_progress=messages.is_terminal, fresh=fresh)
    show_json(result) if as_json else console.print(table([result]))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained classifier.")],
    data: Data,
    task: Annotated[str, typer.Option(help="listops, text, retrieval, image, pathfinder or pathx.")] = "listops",
    part: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Only so many examples.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy on a part of a task, beside that of always answering the commonest class."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: holds no classifier of `lra train`")
    classifier = SequenceClassifier.from_pretrained(model, local_files_only=True).to(device)
    result = {"task": task, "part": part, **accuracy(classifier, Part(task, data, part, limit))}
    if part != "test":
        result["marked"] = "trained on this part" if part == "train" else "this part chose the epoch"
    show_json(result) if as_json else console.print(table([result]))
