"""`nearfar region-classification`: name regions of pictures, from what they show and from what surrounds them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.cli.console import console, messages, show, track
from nearfar.core.cli.options import (
    Device,
    Devices,
    Fresh,
    Json,
    Nodes,
    Precision,
    RunFolder,
    Settings,
    Strategy,
    recipe_option,
)
from nearfar.core.errors import UserError, some
from nearfar.core.files import write_csv, write_json
from nearfar.core.model_folder import TrainedOn, read, trained_on, writing
from nearfar.core.reading import reading
from nearfar.core.recipes import read_recipe
from nearfar.vision.classification.regions import RegionRecipe, answers, score_regions, train_regions
from nearfar.vision.data.regions import Region, Views, coco_regions, cut_out, id_regions
from nearfar.vision.models.rvernet import RveRNet, Single

app = typer.Typer(
    help="Name regions of pictures: an object whose look alone does not tell what it is, by what lies around it.\n\n"
    "Regions come from a folder of pictures and either a folder of PNG masks whose values are numbers of "
    "categories, with a JSON file of their names, or a COCO annotation file.",
    no_args_is_help=True,
)

KIND = "region classifier"

PicturesFolder = Annotated[Path, typer.Argument(help="Folder of pictures.")]
Masks = Annotated[Path, typer.Argument(help="Folder of PNG masks with the pictures' names, or a COCO annotation file.")]
Names = Annotated[
    Path | None, typer.Option("--names", help='JSON file of categories, {"1": "rice"}, for a folder of masks.')
]
Model = Annotated[Path, typer.Argument(help="Folder that `train` wrote.")]


@app.command("train")
def train_command(
    pictures: PicturesFolder,
    masks: Masks,
    output: RunFolder,
    names: Names = None,
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
    """Train on every region, and write the model. Views are held in memory."""
    chosen = read_recipe(RegionRecipe, recipe, settings or ())
    regions = open_regions(pictures, masks, names)
    classes = sorted({region.category for region in regions})
    if len(classes) < 2:
        raise UserError(f"{masks}: has regions of {some(classes)} alone; at least two categories are needed")
    views = Views.published(chosen.size) if chosen.published else Views(chosen.size)
    inputs = load_views(regions, views)
    labels = torch.tensor([classes.index(region.category) for region in regions])
    torch.manual_seed(chosen.seed)
    record = {"roi": chosen.roi, "extra": chosen.extra, "classes": classes, "size": chosen.size}
    record |= {"mean": list(views.mean), "std": list(views.std)}
    model = build(record)
    losses = train_regions(
        model, inputs, labels, epochs=chosen.epochs, batch_size=chosen.batch_size, learning_rate=chosen.learning_rate,
        seed=chosen.seed, paired=views.paired, flip=views.flip, folder=output, settings=asdict(chosen), device=device,
        fresh=fresh, show_progress=messages.is_terminal,
    )  # fmt: skip
    with writing(output, KIND, record, TrainedOn.of(digests(regions))) as place:
        save_state_dict(model, place / "model.safetensors")
    show([{"regions": len(regions), "classes": len(classes), "loss": losses[-1], "folder": str(output)}], as_json)


@app.command()
def evaluate(
    model: Model,
    pictures: PicturesFolder,
    masks: Masks,
    names: Names = None,
    ambiguous: Annotated[list[str] | None, typer.Option(help="Categories that look alike. Repeat.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of the scores.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model on regions whose categories are known: accuracy with a 95 % interval, macro F1, look-alikes."""
    network, record = load(model)
    regions = open_regions(pictures, masks, names)
    known = record["classes"]
    if unknown := sorted({r.category for r in regions} - set(known)) or sorted(set(ambiguous or ()) - set(known)):
        raise UserError(f"{masks}: the model in {model} does not know {some(unknown)}; it knows {some(known)}")
    scores = answers(network, load_views(regions, views_of(record)))
    labels = torch.tensor([known.index(region.category) for region in regions])
    try:
        row: dict[str, Any] = score_regions(scores, labels, [known.index(name) for name in ambiguous or ()])
    except ValueError as error:
        raise UserError(f"{masks}: {error}") from error
    seen = trained_on(model).seen(digests(regions))
    if any(seen):
        row["marked"] = f"{sum(seen)} of {len(seen)} regions seen in training"
    if output is not None:
        write_json(output, row)
    show([row], as_json)


@app.command()
def predict(
    model: Model,
    pictures: PicturesFolder,
    masks: Masks,
    names: Names = None,
    top: Annotated[int, typer.Option(help="Categories for each region.", min=1)] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, CSV.")] = Path("regions.csv"),
    as_json: Json = False,
) -> None:
    """Name regions: picture, what the mask calls it, category, probability, alternatives in further rows."""
    network, record = load(model)
    regions = open_regions(pictures, masks, names)
    best = answers(network, load_views(regions, views_of(record))).exp().topk(min(top, len(record["classes"])), 1)
    rows = [
        {"picture": r.name, "region": r.category, "rank": rank, "category": record["classes"][c], "probability": p}
        for r, values, indices in zip(regions, best.values.tolist(), best.indices.tolist(), strict=True)
        for rank, (p, c) in enumerate(zip(values, indices, strict=True), start=1)
    ]
    write_csv(output, rows)
    show(rows if as_json else rows[:20], as_json)
    if not as_json:
        console.print(f"{len(regions)} regions: {output}", soft_wrap=True)


def open_regions(pictures: Path, masks: Path, names: Path | None) -> list[Region]:
    """The regions of a folder of masks with names, or of a COCO file."""
    for path in (pictures, masks):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if masks.is_file():
        regions = coco_regions(pictures, masks)
    elif names is None:
        raise UserError(f"{masks}: a folder of masks needs --names, a JSON file of its categories")
    else:
        with reading(names, 'cannot be read as {"1": "rice", ...}'):
            categories = {int(number): str(name) for number, name in json.loads(names.read_text("utf-8")).items()}
        regions = id_regions(pictures, masks, categories)
    if not regions:
        raise UserError(f"{masks}: has no regions")
    return regions


def digests(regions: Sequence[Region]) -> list[str]:
    """Of each region's pixels and mask."""
    return [sha256(r.picture().tobytes() + np.packbits(r.mask()).tobytes()).hexdigest() for r in regions]


def load_views(regions: Sequence[Region], views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    """Both views of every region."""
    pairs = []
    for region in track(list(regions), "cutting out"):
        mask = region.mask()
        if mask.all():
            raise UserError(f"{region.name}: {region.category} is the whole picture; nothing surrounds it")
        pairs.append(views(*cut_out(region.picture(), mask, f"{region.name}, {region.category}")))
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def views_of(record: dict[str, Any]) -> Views:
    return Views(record["size"], tuple(record["mean"]), tuple(record["std"]))


def build(record: dict[str, Any]) -> RveRNet | Single:
    classes = len(record["classes"])
    if record["extra"] == "none":
        return Single(record["roi"], classes)
    return RveRNet(record["roi"], record["extra"], classes)


def load(folder: Path) -> tuple[RveRNet | Single, dict[str, Any]]:
    """What `train` wrote."""
    record = read(folder, KIND)
    with reading(folder, "damaged", "train again"):
        model = build(record)
        views_of(record)
        load_state_dict(model, read_state_dict(folder / "model.safetensors"))
    return model.eval(), record
