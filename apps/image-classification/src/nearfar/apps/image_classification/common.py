"""What the commands share: options, opening of classifiers and of pictures."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nearfar.core.cli.console import track
from nearfar.core.cli.options import whole
from nearfar.core.errors import UserError, some
from nearfar.core.hub import HUB, from_hub
from nearfar.vision.classification.classifier import Classifier
from nearfar.vision.data.images import Pictures, picture_files, read_picture
from nearfar.vision.data.sources import open_pictures

log = logging.getLogger(__name__)

Data = Annotated[
    Path, typer.Argument(help="Labelled pictures: folder, table (CSV), zip file, tar file or data set on disk.")
]
Trained = Annotated[
    Path,
    typer.Argument(
        help="Folder that `train` wrote, or a published ImageNet checkpoint of one of `models`.", parser=whole
    ),
]
Published = Annotated[
    str | None,
    typer.Option(
        "--model", help="Whose checkpoint it is, where names and shapes do not tell: MODEL.WEIGHTS as `models` lists."
    ),
]


Views = Annotated[
    str | None,
    typer.Option(
        help="Views averaged: one, flip or ten (corners and centre, mirrored); to score, also random: one random crop, "
        "as NiNformer's figures were made. Default: the recipe's."
    ),
]


def one_class(trained: Classifier, command: str) -> Classifier:
    """`trained`, where it gives one class a picture. Raises UserError where it gives several."""
    if trained.multilabel:
        raise UserError(f"{command}: is for classifiers of one class a picture; {trained.name} here gives several")
    return trained


def open_classifier(path: Path, model: str | None) -> Classifier:
    """The classifier in a folder of `train`, or in a published checkpoint, of the model `model` if it is given."""
    if path.is_file():
        return Classifier.from_published(path, model)
    if model is not None:
        raise UserError(f"--model {model}: is for checkpoint files; {path} is none")
    return Classifier.load(path)


def open_any(name: str, model: str | None = None) -> Classifier:
    """The classifier in a folder of `train` or a published checkpoint; `hub:NAME` is timm's of that name, with the
    weights that timm fetches unless they are in its cache."""
    if name.startswith(HUB):
        return Classifier.from_timm(name.removeprefix(HUB))
    return open_classifier(Path(from_hub(name, "a model with its weights")[0]), model)


def read_pictures(paths: Sequence[Path], classes: Sequence[str] = ()) -> tuple[Pictures, list[str]]:
    """The pictures in files and folders that can be read, without labels, and a line for each other."""
    files = picture_files(paths)
    found = Pictures([str(f) for f in files], [-1] * len(files), classes, lambda i: read_picture(files[i]))
    return found.readable(lambda r: track(r, "reading"))


def known_pictures(
    trained: Classifier, source: Path | str, data: Path, split: str | None
) -> tuple[Pictures, Pictures, list[str]]:
    """All pictures of `data` under the classifier's class numbers, those that can be read, and a line for each other.

    Raises UserError for classes that the classifier does not know, for pictures of several classes where it gives one,
    and where none can be read.
    """
    every = open_pictures(data, split)
    if unknown := [name for name in every.classes if name not in trained.classes]:
        raise UserError(
            f"{data}: has {len(every.classes)} classes, of which the classifier in {source} does not know "
            f"{some(unknown)}; it knows {len(trained.classes)}: {some(trained.classes)}"
        )
    if every.multilabel and not trained.multilabel:
        raise UserError(f"{data}: its pictures have several classes each; the classifier in {source} gives one")
    if trained.multilabel and not every.multilabel:
        log.warning(
            "%s: its pictures have one class each, of the classifier's several; the others count as absent", data
        )
    every = every.renumbered(trained.classes, trained.multilabel)
    pictures, failures = every.readable(lambda r: track(r, "checking"))
    if not len(pictures):
        raise UserError(f"{data}: none of its {len(every)} pictures can be read")
    return every, pictures, failures
