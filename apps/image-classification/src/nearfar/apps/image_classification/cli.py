"""`nearfar image-classification`: train, evaluate, use and compare picture classifiers."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn

from nearfar.core.cli.batch import raise_failures
from nearfar.core.cli.console import console, messages, table, track
from nearfar.core.devices import choose_device
from nearfar.core.errors import UserError, some
from nearfar.core.files import atomic_path, write_csv, write_json
from nearfar.core.finite import is_finite
from nearfar.core.plots import COLORS, new_figure, style
from nearfar.core.report import Report
from nearfar.vision.classification.classifier import LINEAR, SMALL, Classifier, evaluate_scores
from nearfar.vision.cost import cost
from nearfar.vision.data.images import MissingSplit, Pictures, is_picture, open_pictures, read_picture, split_pictures
from nearfar.vision.models.registry import MODELS, VARIANTS

if TYPE_CHECKING:  # Lightning takes seconds to import, and only training needs it
    from nearfar.vision.classification.training import Recipe

app = typer.Typer(
    help="Learn to tell pictures apart: `models` lists what there is, `compare` tries several on your own pictures "
    "under one budget, `train` makes a classifier, `evaluate` scores it, `predict` uses it.\n\n"
    "Pictures come from a folder with one folder per class, the same in a zip file, WebDataset tars, or a Hugging Face "
    "image data set on disk.",
    no_args_is_help=True,
)

Data = Annotated[Path, typer.Argument(help="Labelled pictures: folder, zip file, tar file or data set on disk.")]


Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or mps.", callback=lambda name: choose_device(name, "--device"))
]
Trained = Annotated[
    Path, typer.Argument(help="Folder that `train` wrote, or a published ImageNet checkpoint of one of `models`.")
]
Published = Annotated[
    str | None,
    typer.Option(
        "--model", help="Whose checkpoint it is, where names and shapes do not tell: MODEL.WEIGHTS as `models` lists."
    ),
]
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
    from nearfar.core.recipes import read_recipe
    from nearfar.vision.classification.training import Recipe, find_recipe, train_classifier

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
    classifier: Trained,
    data: Data,
    split: Annotated[str | None, typer.Option(help="Folder inside the data, for example test.")] = None,
    model: Published = None,
    device: Device = "cpu",
    workers: Workers = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for scores.json and page.html.")] = None,
    as_json: Machine = False,
) -> None:
    """Score a classifier on labelled pictures, with a 95 % interval."""
    trained = open_classifier(classifier, model)
    every = open_pictures(data, split)
    index = {name: i for i, name in enumerate(trained.classes)}
    if unknown := [name for name in every.classes if name not in index]:
        raise UserError(
            f"{data}: has {len(every.classes)} classes, of which the classifier in {classifier} does not know "
            f"{some(unknown)}; it knows {len(index)}: {some(trained.classes)}"
        )
    every.labels = [index[every.classes[label]] for label in every.labels]
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
    result = {"model": trained.name, "pixels": trained.size, "crop": trained.crop_pct}
    result |= evaluate_scores(torch.cat((scores, wrong)), [*pictures.labels, *lost])
    result["unreadable"] = missed
    odd = [name for name, row in zip(pictures.names, scores, strict=True) if not is_finite(row)]
    failures += [f"{name}: the model's scores are not finite" for name in odd]
    if output is not None:
        write_json(output / "scores.json", result)
        Report(f"{trained.name} on {Path(data).name}").table([result]).figure(
            confusion(scores, pictures.labels, trained.classes),
            "Share of each class's pictures (row) that are given each class (column).",
        ).write(output / "page.html")
    show([result], as_json)
    raise_failures(failures, len(pictures) + missed)


@app.command()
def predict(
    classifier: Trained,
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, CSV.")] = Path("predictions.csv"),
    top: Annotated[int, typer.Option(help="Classes per picture.")] = 1,
    model: Published = None,
    device: Device = "cpu",
    as_json: Machine = False,
) -> None:
    """Name what pictures show, and write a table: file, class, probability."""
    trained = open_classifier(classifier, model)
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files += sorted(p for p in path.rglob("*") if is_picture(p.relative_to(path))) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{some(paths)}: no pictures there")
    found = Pictures([str(f) for f in files], [-1] * len(files), trained.classes, lambda i: read_picture(files[i]))
    pictures, failures = found.readable(lambda r: track(r, "reading"))
    rows: list[dict[str, Any]] = []
    if len(pictures):
        scores = trained.scores(pictures, device=device)
        best = scores.topk(min(top, len(trained.classes)), dim=1)
        for name, values, indices in zip(pictures.names, best.values.tolist(), best.indices.tolist(), strict=True):
            if not is_finite(values):
                failures.append(f"{name}: the model's scores are not finite, so no class is named")
                continue
            for rank, (value, index) in enumerate(zip(values, indices, strict=True), start=1):
                label = trained.classes[index]
                row = {"file": name, "rank": rank, "class": label, "probability": value}
                rows.append(row | ({"description": trained.descriptions[label]} if trained.descriptions else {}))
        write_csv(output, rows)
        show(rows if as_json else rows[:20], as_json)
        if not as_json:
            console.print(f"{len(pictures)} pictures: {output}", soft_wrap=True)
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
    from nearfar.core.recipes import read_recipe
    from nearfar.vision.classification.training import Recipe, find_recipe

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
    recipe: "Recipe",
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
    from nearfar.vision.classification.training import train_classifier

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
        except (UserError, RuntimeError) as error:
            if refused is None:
                raise
            refused.append(str(error) if name in str(error) else f"{name}: {error}")
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
    figure = plot(rows, device)
    with atomic_path(output / "plot.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    report = Report("Models compared", f"{len(learn)} pictures to learn from, {len(scorer)} to score on.")
    report.table(rows).figure(figure, PLOT).write(output / "page.html")
    return rows


PLOT = (
    "Accuracy, with its 95 % bootstrap interval, against pictures a second and against memory, weights included, of a "
    "forward pass with 16 pictures. Up and right, and up and left, is better."
)


def plot(rows: list[dict[str, Any]], device: str) -> Figure:
    """Accuracy against throughput and against memory, one mark per model."""
    with style():
        figure = new_figure(10, 4.2)
        fast, small = figure.subplots(1, 2, sharey=True)
        for i, row in enumerate(rows):
            error = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
            look = {
                "fmt": "osD^vP*X"[i % len(COLORS)],
                "color": COLORS[i % len(COLORS)],
                "capsize": 3,
                "label": row["model"],
            }
            fast.errorbar(row["pictures/s"], row["accuracy"], yerr=error, **look)
            small.errorbar(row["memory (MiB)"], row["accuracy"], yerr=error, **look)
        fast.set(ylabel="accuracy")
        for axes, column in ((fast, "pictures/s"), (small, "memory (MiB)")):
            values = [row[column] for row in rows]
            axes.set(xscale="log", xlabel=f"{column}, forward pass of 16 ({device})")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
            axes.xaxis.set_minor_formatter("{x:g}" if max(values) < 30 * min(values) else "")
        figure.legend(*fast.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def within(
    seconds: float, name: str, learn: Pictures, recipe: "Recipe", folder: Path, device: str, workers: int
) -> "Recipe":
    """`recipe` with as many epochs as fit into `seconds`, by the time of a few steps; those of a run already begun."""
    from nearfar.vision.classification.training import loaders, new_model

    if (folder / "run.json").is_file():
        begun = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
        return replace(recipe, epochs=begun["epochs"], warmup_epochs=begun["warmup_epochs"])
    model = new_model(name, len(learn.classes), recipe).to(device)
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


def training_data(data: Path, recipe: "Recipe") -> tuple[Pictures, Pictures, list[str]]:
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


def open_classifier(path: Path, model: str | None) -> Classifier:
    """The classifier in a folder of `train`, or in a published checkpoint, of the model `model` if it is given."""
    if path.is_file():
        return Classifier.from_published(path, model)
    if model is not None:
        raise UserError(f"--model {model}: is for checkpoint files; {path} is none")
    return Classifier.load(path)


def confusion(scores: torch.Tensor, labels: list[int], names: list[str]) -> Figure:
    """Shares of predicted classes for every true class."""
    classes = len(names)
    counts = torch.zeros(classes, classes)
    answered = torch.isfinite(scores).all(1)
    given = (torch.tensor(labels)[answered], scores[answered].argmax(1))
    counts.index_put_(given, torch.tensor(1.0), accumulate=True)
    figure = new_figure(5, 5)
    axes = figure.subplots()
    axes.imshow(counts / counts.sum(1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    if classes <= 30:
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
    axes.set(xlabel="given", ylabel="true")
    return figure


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as a table, or as JSON for programs."""
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        console.print(table(rows))
