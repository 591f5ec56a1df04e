"""What the commands share: options, opening of classifiers, tables."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.core.cli.console import console, table
from nearfar.core.errors import UserError
from nearfar.vision.classification.classifier import Classifier

Data = Annotated[Path, typer.Argument(help="Labelled pictures: folder, zip file, tar file or data set on disk.")]
Trained = Annotated[
    Path, typer.Argument(help="Folder that `train` wrote, or a published ImageNet checkpoint of one of `models`.")
]
Published = Annotated[
    str | None,
    typer.Option(
        "--model", help="Whose checkpoint it is, where names and shapes do not tell: MODEL.WEIGHTS as `models` lists."
    ),
]


def open_classifier(path: Path, model: str | None) -> Classifier:
    """The classifier in a folder of `train`, or in a published checkpoint, of the model `model` if it is given."""
    if path.is_file():
        return Classifier.from_published(path, model)
    if model is not None:
        raise UserError(f"--model {model}: is for checkpoint files; {path} is none")
    return Classifier.load(path)


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as a table, or as JSON for programs."""
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        console.print(table(rows))
