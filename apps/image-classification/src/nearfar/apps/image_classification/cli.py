"""`nearfar image-classification`: train, evaluate, use and compare picture classifiers."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from torch import nn

from nearfar.core.cli import console, messages, raise_failures, table, track
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.report import Report
from nearfar.core.training import read_recipe
from nearfar.vision.backbone import MODELS, VARIANTS
from nearfar.vision.classification import (
    LINEAR,
    SMALL,
    Classifier,
    Recipe,
    create_model,
    evaluate_scores,
    find_recipe,
    loaders,
    train_classifier,
)
from nearfar.vision.cost import cost
from nearfar.vision.pictures import SUFFIXES, MissingSplit, Pictures, open_pictures, read_picture, split_pictures

app = typer.Typer(
    help="Learn to tell pictures apart: `models` lists what there is, `compare` tries several on your own pictures "
    "under one budget, `train` makes a classifier, `evaluate` scores it, `predict` uses it.\n\n"
    "Pictures come from a folder with one folder per class, the same in a zip file, WebDataset tars, or a Hugging Face "
    "image data set on disk.",
    no_args_is_help=True,
)

Data = Annotated[Path, typer.Argument(help="Labelled pictures: folder, zip file, tar file or data set on disk.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
Workers = Annotated[int, typer.Option(help="Processes that read pictures.")]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the recipe, NAME=VALUE, for example epochs=50. Repeat.")
]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", help="YAML file with settings, or a published recipe, for example hornet_1k.")
]


@app.command()
def models(as_json: Machine = False, pattern: Annotated[str, typer.Argument(help="Part of the name.")] = "") -> None:
    """List nearfar's models: parameters, multiply-accumulates, published accuracy, where the weights are."""
    rows = []
    for name, variant in VARIANTS.items():
        if pattern not in name:
            continue
        for weights in variant.weights:
            source = weights.url or (":".join(weights.hf_hub) if weights.hf_hub else "")
            rows.append(
                {
                    "model": name,
                    "system": MODELS[name].__name__,
                    "params (M)": variant.params,
                    "GMACs": "" if variant.gmacs is None else variant.gmacs,
                    "weights": weights.tag,
                    "pixels": weights.size,
                    "top-1 (published)": "" if weights.top1 is None else weights.top1,
                    "checkpoint": source,
                }
            )
    if not rows:
        raise UserError(f"{pattern}: no model of this name; `models` without a name lists all")
    show(rows, as_json)


@app.command("train")
def train_command(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run. Run again to go on.")],
    model: Annotated[str, typer.Option(help="A model of `models`, or any of timm's.")] = "nearfar_convnext_atto",
    recipe: RecipeFile = None,
    settings: Settings = None,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    device: Device = "cpu",
    workers: Workers = 0,
    as_json: Machine = False,
) -> None:
    """Train a classifier and write it, its metrics and its settings to a folder."""
    resolved = read_recipe(Recipe, find_recipe(recipe), settings or ())
    learn, hold, failures = training_data(data, resolved)
    classifier, history = train_classifier(
        model, learn, hold, resolved, output, weights=weights, num_workers=workers, accelerator=device,
        show_progress=messages.is_terminal,
    )  # fmt: skip
    best = max(history, key=lambda row: row["accuracy"])
    row = {"model": model, "classes": len(classifier.classes), "pictures": len(learn)}
    row |= {"best epoch": int(best["epoch"]) + 1, "validation accuracy": best["accuracy"], "folder": str(output)}
    show([row], as_json)
    raise_failures(failures, len(learn) + len(hold) + len(failures))


@app.command()
def evaluate(
    classifier: Annotated[Path, typer.Argument(help="Folder that `train` wrote.")],
    data: Data,
    split: Annotated[str | None, typer.Option(help="Folder inside the data, for example test.")] = None,
    device: Device = "cpu",
    workers: Workers = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for scores.json and page.html.")] = None,
    as_json: Machine = False,
) -> None:
    """Score a classifier on labelled pictures, with a 95 % interval."""
    trained = Classifier.load(classifier)
    pictures = open_pictures(data, split)
    if pictures.classes != trained.classes:
        raise UserError(
            f"{data}: has {len(pictures.classes)} classes ({', '.join(pictures.classes[:5])} ...), the classifier in "
            f"{classifier} knows {len(trained.classes)} ({', '.join(trained.classes[:5])} ...); they must be the same"
        )
    every = pictures
    pictures, failures = every.readable(lambda r: track(r, "checking"))
    if not len(pictures):
        raise UserError(f"{data}: none of its {len(every)} pictures can be read")
    scores = trained.scores(pictures, device=device, num_workers=workers)
    # a picture that cannot be read is a wrong answer, not a picture less
    read = set(pictures.names)
    lost = [label for name, label in zip(every.names, every.labels, strict=True) if name not in read]
    missed = len(lost)
    wrong = torch.zeros(missed, scores.shape[1])
    wrong[range(missed), lost] = -1
    result = evaluate_scores(torch.cat((scores, wrong)), [*pictures.labels, *lost])
    result["unreadable"] = missed
    if output is not None:
        write_json(output / "scores.json", result)
        Report(f"{trained.name} on {Path(data).name}").table([result]).figure(
            confusion(scores, pictures), "Share of each class's pictures (row) that are given each class (column)."
        ).write(output / "page.html")
    show([result], as_json)
    raise_failures(failures, len(pictures) + missed)


@app.command()
def predict(
    classifier: Annotated[Path, typer.Argument(help="Folder that `train` wrote.")],
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, CSV.")] = Path("predictions.csv"),
    top: Annotated[int, typer.Option(help="Classes per picture.")] = 1,
    device: Device = "cpu",
    as_json: Machine = False,
) -> None:
    """Name what pictures show, and write a table: file, class, probability."""
    trained = Classifier.load(classifier)
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{paths[0]}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    found = Pictures([str(f) for f in files], [-1] * len(files), trained.classes, lambda i: read_picture(files[i]))
    pictures, failures = found.readable(lambda r: track(r, "reading"))
    rows: list[dict[str, Any]] = []
    if len(pictures):
        best = trained.scores(pictures, device=device).topk(min(top, len(trained.classes)), dim=1)
        for name, values, indices in zip(pictures.names, best.values.tolist(), best.indices.tolist(), strict=True):
            for rank, (value, index) in enumerate(zip(values, indices, strict=True), start=1):
                rows.append({"file": name, "rank": rank, "class": trained.classes[index], "probability": value})
        write_csv(output, rows)
    show(rows, as_json)
    raise_failures(failures, len(files))


@app.command()
def compare(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, the plot and the page.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to compare. Repeat. Default: small forms of all systems, a small CNN of timm, a linear model."
        ),
    ] = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seconds: Annotated[
        float | None, typer.Option(help="Training time of each model: as many epochs as fit, at most the recipe's.")
    ] = None,
    device: Device = "cpu",
    workers: Workers = 0,
    as_json: Machine = False,
) -> None:
    """Train several models on your pictures under one budget: accuracy, throughput, memory, a plot."""
    resolved = read_recipe(Recipe, find_recipe(recipe), settings or ())
    names = model or [LINEAR, "test_resnet", *SMALL]
    learn, hold, failures = training_data(data, resolved)
    refused: list[str] = []
    rows = run_comparison(
        names, learn, hold, resolved, output, device=device, workers=workers, seconds=seconds, refused=refused
    )
    show(rows, as_json)
    console.print(f"Page: {output / 'page.html'}", soft_wrap=True) if not as_json else None
    raise_failures([*failures, *refused], len(learn) + len(hold) + len(failures) + len(refused))


def run_comparison(
    names: list[str],
    learn: Pictures,
    hold: Pictures,
    recipe: Recipe,
    output: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    seconds: float | None = None,
    models: dict[str, nn.Module] | None = None,
    refused: list[str] | None = None,
) -> list[dict[str, Any]]:
    """One row per model; table.csv, plot.png and page.html in `output`. Half of `hold` chooses epochs, half scores.

    A model that the pictures do not suit is named in `refused`, where that is given, and the others go on.
    """
    choose, score = split_pictures(hold, 0.5, recipe.seed)
    chooser, scorer = hold.subset(choose), hold.subset(score)
    rows = []
    for name in track(names, "training"):
        try:
            budget = within(seconds, name, learn, recipe, output / name, device, workers) if seconds else recipe
            classifier, history = train_classifier(
                name, learn, chooser, budget, output / name, num_workers=workers, accelerator=device,
                model=(models or {}).get(name),
            )  # fmt: skip
        except UserError as error:
            if refused is None:
                raise
            refused.append(str(error))
            continue
        scores = classifier.scores(scorer, device=device)
        result = evaluate_scores(scores, scorer.labels)
        rows.append(
            {
                "model": name,
                "accuracy": result["accuracy"],
                "low": result["low"],
                "high": result["high"],
                "params (M)": sum(p.numel() for p in classifier.model.parameters()) / 1e6,
                **cost(classifier.model, recipe.size, device),
                "epochs": len(history),
                "training (s)": round(sum(row["seconds"] for row in history), 1),
            }
        )
    if not rows:
        raise UserError("; ".join(refused or ()))
    write_csv(output / "table.csv", rows)
    figure, axes = plt.subplots(figsize=(6, 4))
    for row in rows:
        error = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        axes.errorbar(row["pictures/s"], row["accuracy"], yerr=error, fmt="o", capsize=3)
        axes.annotate(row["model"], (row["pictures/s"], row["accuracy"]), xytext=(5, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel=f"pictures per second ({device})", ylabel="accuracy")
    figure.tight_layout()
    figure.savefig(output / "plot.png", dpi=120)
    report = Report("Models compared", f"{len(learn)} pictures to learn from, {len(scorer)} to score on.")
    report.table(rows).figure(figure, "Accuracy with 95 % bootstrap interval against throughput.")
    report.write(output / "page.html")
    plt.close(figure)
    return rows


def within(
    seconds: float, name: str, learn: Pictures, recipe: Recipe, folder: Path, device: str, workers: int
) -> Recipe:
    """`recipe` with as many epochs as fit into `seconds`, by the time of a few steps; those of a run already begun."""
    if (folder / "run.json").is_file():
        begun = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
        return replace(recipe, epochs=begun["epochs"], warmup_epochs=begun["warmup_epochs"])
    model = create_model(name, len(learn.classes), recipe).to(device)
    loader, _ = loaders(learn, learn, recipe, workers)
    times = []
    for _, (x, labels) in zip(range(6), loader, strict=False):
        start = time.perf_counter() if not times else before
        out = model(x.to(device))
        nn.functional.cross_entropy(out[0] if isinstance(out, tuple) else out, labels.to(device)).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        times.append(before - start)
    epochs = int(seconds / (sorted(times)[len(times) // 2] * len(loader)))
    epochs = max(1, min(epochs, recipe.epochs))
    return replace(recipe, epochs=epochs, warmup_epochs=min(recipe.warmup_epochs, epochs / 5))


def training_data(data: Path, recipe: Recipe) -> tuple[Pictures, Pictures, list[str]]:
    """Pictures to learn from, pictures to choose the epoch by, and a line for each that cannot be read."""
    try:
        learn = open_pictures(data, "train")
        whole = False
    except MissingSplit:
        learn, whole = open_pictures(data), True
    hold = None
    for name in () if whole else ("val", "validation", "valid", "test"):
        try:
            hold = open_pictures(data, name)
            break
        except MissingSplit:
            continue
    if hold is None:
        first, second = split_pictures(learn, recipe.validation, recipe.seed)
        learn, hold = learn.subset(first), learn.subset(second)
    learn, bad = learn.readable(lambda r: track(r, "checking"))
    hold, also = hold.readable(lambda r: track(r, "checking"))
    if not len(learn) or not len(hold):
        raise UserError(f"{data}: too few readable pictures to learn from")
    return learn, hold, [*bad, *also]


def confusion(scores: torch.Tensor, pictures: Pictures) -> plt.Figure:
    """Shares of predicted classes for every true class."""
    classes = len(pictures.classes)
    counts = torch.zeros(classes, classes)
    for label, guess in zip(pictures.labels, scores.argmax(1).tolist(), strict=True):
        counts[label, guess] += 1
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.imshow(counts / counts.sum(1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    if classes <= 30:
        axes.set_xticks(range(classes), pictures.classes, rotation=90)
        axes.set_yticks(range(classes), pictures.classes)
    axes.set(xlabel="given", ylabel="true")
    figure.tight_layout()
    plt.close(figure)
    return figure


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as a table, or as JSON for programs."""
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        console.print(table(rows))
