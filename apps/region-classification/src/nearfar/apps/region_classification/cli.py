"""`nearfar region-classification`: name regions of pictures, from what they show and from what surrounds them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL.Image import Image

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
from nearfar.core.files import file_digest, write_csv, write_json
from nearfar.core.hub import HUB
from nearfar.core.model_folder import TrainedOn, read, trained_on, writing
from nearfar.core.reading import reading
from nearfar.core.recipes import read_recipe
from nearfar.vision.classification.regions import (
    POOLED,
    Network,
    RegionRecipe,
    Taught,
    answers,
    build_network,
    normalizations,
    score_regions,
    train_regions,
)
from nearfar.vision.data.prompts import Sam, in_boxes, prompted_regions
from nearfar.vision.data.regions import Region, Views, coco_regions, cut_out, id_regions, permuted, translocated

app = typer.Typer(
    help="Name regions of pictures: an object whose look alone does not tell what it is, by what lies around it.\n\n"
    "Regions come from a folder of pictures and a folder of PNG masks whose values are numbers of categories, with a "
    "JSON file of their names; or a COCO annotation file; or a CSV table of boxes and points, by which regions are cut "
    "out by colour, or by a SAM whose weights are at hand.",
    no_args_is_help=True,
)

KIND = "region classifier"

PicturesFolder = Annotated[Path, typer.Argument(help="Folder of pictures.")]
Masks = Annotated[
    Path,
    typer.Argument(
        help="Folder of PNG masks with the pictures' names, a COCO annotation file, or a CSV table with the columns "
        "picture, category and left, top, right, bottom (pixels) or x, y, inside (1 or 0)."
    ),
]
Names = Annotated[
    Path | None, typer.Option("--names", help='JSON file of categories, {"1": "rice"}, for a folder of masks.')
]
Model = Annotated[Path, typer.Argument(help="Folder that `train` wrote.")]
SamOption = Annotated[
    str | None,
    typer.Option("--sam", help="Folder of a SAM of transformers, or hub:NAME, for a table of boxes and points."),
]


@app.command("train")
def train_command(
    pictures: PicturesFolder,
    masks: Masks,
    output: RunFolder,
    names: Names = None,
    sam: SamOption = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of a region classifier to learn from, by `--set distillation=soft`, hard or deit."),
    ] = None,
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
    if (chosen.distillation != "none") != (teacher is not None):
        raise UserError(
            f"--teacher {teacher}: distillation is {chosen.distillation}; the one needs the other, as in "
            "--teacher FOLDER --set distillation=soft"
        )
    regions = open_regions(pictures, masks, names, sam, device)
    classes = sorted({region.category for region in regions})
    if len(classes) < 2:
        raise UserError(f"{masks}: has regions of {some(classes)} alone; at least two categories are needed")
    torch.manual_seed(chosen.seed)
    distilled = chosen.distillation == "deit"
    model = build_network(chosen.roi, chosen.extra, len(classes), distilled)
    record = {"roi": chosen.roi.removeprefix(HUB), "extra": chosen.extra.removeprefix(HUB), "classes": classes}
    record |= {"size": chosen.size, "distilled": distilled}
    if chosen.published:
        views = Views.published(chosen.size)
    else:
        own, *others = normalizations(model)
        views = Views(chosen.size, *own, extra_mean=(others or [own])[0][0], extra_std=(others or [own])[0][1])
    record |= {name: list(getattr(views, name) or ()) for name in NORMALIZATION}
    inputs = load_views(regions, views, chosen.extra)
    learning: dict[str, Any] = {}
    made_from, seen = {}, TrainedOn.of(digests(regions))
    if teacher is not None:
        learning = taught_by(teacher, classes, regions, chosen)
        made_from = {"teacher": file_digest(teacher / "model.safetensors")}
        seen |= trained_on(teacher)  # what it tells of, its student knows, too
    labels = torch.tensor([classes.index(region.category) for region in regions])
    losses = train_regions(
        model, inputs, labels, epochs=chosen.epochs, batch_size=chosen.batch_size, learning_rate=chosen.learning_rate,
        seed=chosen.seed, paired=views.paired, flip=views.flip, folder=output, settings=asdict(chosen), device=device,
        fresh=fresh, show_progress=messages.is_terminal, data=made_from, **learning,
    )  # fmt: skip
    with writing(output, KIND, record, seen) as place:
        save_state_dict(model, place / "model.safetensors")
    show([{"regions": len(regions), "classes": len(classes), "loss": losses[-1], "folder": str(output)}], as_json)


@app.command()
def evaluate(
    model: Model,
    pictures: PicturesFolder,
    masks: Masks,
    names: Names = None,
    sam: SamOption = None,
    ambiguous: Annotated[list[str] | None, typer.Option(help="Categories that look alike. Repeat.")] = None,
    disturb: Annotated[
        str | None, typer.Option(help="Test of robustness: permuted (patches of 16 pixels) or translocated views.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of the scores.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model on regions whose categories are known: accuracy with a 95 % interval, macro F1, look-alikes."""
    network, record = load(model)
    if disturb is not None and disturb not in DISTURBANCES:
        raise UserError(f"--disturb {disturb}: one of {', '.join(DISTURBANCES)}")
    regions = open_regions(pictures, masks, names, sam)
    known = record["classes"]
    if unknown := sorted({r.category for r in regions} - set(known)) or sorted(set(ambiguous or ()) - set(known)):
        raise UserError(f"{masks}: the model in {model} does not know {some(unknown)}; it knows {some(known)}")
    scores = answers(network, load_views(regions, views_of(record), record["extra"], disturb))
    labels = torch.tensor([known.index(region.category) for region in regions])
    try:
        row: dict[str, Any] = score_regions(scores, labels, [known.index(name) for name in ambiguous or ()])
    except ValueError as error:
        raise UserError(f"{masks}: {error}") from error
    seen = trained_on(model).seen(digests(regions))
    if disturb is not None:
        row["views"] = disturb
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
    sam: SamOption = None,
    top: Annotated[int, typer.Option(help="Categories for each region.", min=1)] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, CSV.")] = Path("regions.csv"),
    as_json: Json = False,
) -> None:
    """Name regions: picture, what the mask calls it, category, probability, alternatives in further rows."""
    network, record = load(model)
    regions = open_regions(pictures, masks, names, sam, named=False)
    best = (
        answers(network, load_views(regions, views_of(record), record["extra"]))
        .exp()
        .topk(min(top, len(record["classes"])), 1)
    )
    rows = [
        {"picture": r.name, "region": r.category, "rank": rank, "category": record["classes"][c], "probability": p}
        for r, values, indices in zip(regions, best.values.tolist(), best.indices.tolist(), strict=True)
        for rank, (p, c) in enumerate(zip(values, indices, strict=True), start=1)
    ]
    write_csv(output, rows)
    show(rows if as_json else rows[:20], as_json)
    if not as_json:
        console.print(f"{len(regions)} regions: {output}", soft_wrap=True)


def open_regions(
    pictures: Path, masks: Path, names: Path | None, sam: str | None, device: str = "cpu", named: bool = True
) -> list[Region]:
    """The regions of a folder of masks with names, of a COCO file, or of a table of boxes and points, whose categories
    must be `named`."""
    for path in (pictures, masks):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    table = masks.suffix.lower() == ".csv"
    if sam is not None and not table:
        raise UserError(f"--sam {sam}: is for a CSV table of boxes and points; {masks} has masks of its own")
    if names is not None and masks.is_file():
        raise UserError(f"--names {names}: is for a folder of masks; {masks} names its categories itself")
    if table:
        segment = in_boxes if sam is None else Sam(sam, "cpu" if device == "auto" else device)
        return prompted_regions(
            pictures, masks, segment, lambda prompts: track(list(prompts), "cutting out"), named=named
        )
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


def taught_by(folder: Path, classes: Sequence[str], regions: Sequence[Region], chosen: RegionRecipe) -> dict[str, Any]:
    """What a student needs of a teacher: how it is followed, it, and what it sees."""
    network, record = load(folder)
    if lacking := sorted(set(classes) - set(record["classes"])):
        raise UserError(f"--teacher {folder}: does not know {some(lacking)}; it knows {some(record['classes'])}")
    if chosen.published and record["extra"] == POOLED:
        raise UserError(
            f"--teacher {folder}: sees whole pictures, whose two views published=true mirrors each by itself"
        )
    return {
        "distillation": chosen.taught,
        "teacher": Taught(network, [record["classes"].index(name) for name in classes]),
        "teacher_inputs": load_views(regions, views_of(record), record["extra"]),
    }


def load_views(
    regions: Sequence[Region], views: Views, extra: str, disturb: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network sees of every region: both views, or the picture and the region's place in it. `disturb`: a name
    of `DISTURBANCES`, the same for both."""
    if extra == POOLED and disturb is not None:
        raise UserError(f"--disturb {disturb}: is for networks of two views; this one sees whole pictures")
    pairs = []
    for i, region in enumerate(track(list(regions), "cutting out")):
        picture, mask = region.picture(), region.mask()
        if mask.all():
            raise UserError(f"{region.name}: {region.category} is the whole picture; nothing surrounds it")
        both = cut_out(picture, mask, f"{region.name}, {region.category}")  # which refuses a mask that does not fit
        if extra == POOLED:
            pairs.append(views.whole(picture, mask))
        elif disturb is None:
            pairs.append(views(*both))
        else:
            pairs.append(views(*(DISTURBANCES[disturb](v, views.size, np.random.default_rng(i)) for v in both)))
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


DISTURBANCES: dict[str, Callable[[Image, int, np.random.Generator], Image]] = {
    "permuted": permuted,
    "translocated": lambda picture, size, _: translocated(picture, size),
}

NORMALIZATION = ("mean", "std", "extra_mean", "extra_std")


def views_of(record: dict[str, Any]) -> Views:
    return Views(record["size"], **{name: tuple(record[name]) or None for name in NORMALIZATION if name in record})


def load(folder: Path) -> tuple[Network, dict[str, Any]]:
    """What `train` wrote."""
    record = read(folder, KIND)
    with reading(folder, "damaged", "train again"):
        model = build_network(
            record["roi"], record["extra"], len(record["classes"]), bool(record.get("distilled", False))
        )
        views_of(record)
        load_state_dict(model, read_state_dict(folder / "model.safetensors"))
    return model.eval(), record
