"""`nearfar image-classification`: train, evaluate, use and compare picture classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure

from nearfar.apps.image_classification.attention import attention
from nearfar.apps.image_classification.common import (
    Data,
    Published,
    Trained,
    Views,
    known_pictures,
    one_class,
    open_classifier,
)
from nearfar.apps.image_classification.explain import explain_pictures
from nearfar.apps.image_classification.export import export
from nearfar.apps.image_classification.prune import prune
from nearfar.apps.image_classification.robustness import robustness
from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import console, messages, show, track
from nearfar.core.cli.options import (
    Device,
    Devices,
    Engine,
    Fresh,
    Json,
    Nodes,
    Precision,
    RunFolder,
    Settings,
    Strategy,
    Timeout,
    Workers,
    anywhere,
    recipe_option,
)
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.finite import is_finite
from nearfar.core.made_from import KeptRows, model_digest
from nearfar.core.plots import new_figure
from nearfar.core.report import Report
from nearfar.core.workers import Once
from nearfar.vision.classification import RECIPES
from nearfar.vision.classification.classifier import LINEAR, card_of, evaluate_multilabel, evaluate_scores, small_forms
from nearfar.vision.data.images import Pictures, picture_files, read_picture
from nearfar.vision.data.sources import open_pictures, training_pictures
from nearfar.vision.models.registry import MODELS, VARIANTS

app = typer.Typer(
    help="Learn to tell pictures apart: `models` lists what there is, `compare` tries several on your own pictures "
    "under one budget, `train` makes a classifier, `evaluate` scores it, `predict` uses it.\n\n"
    "Pictures come from a folder with one folder per class, a table of files and their classes (CSV), such folders in "
    "a zip file, WebDataset tars, or a Hugging Face image data set on disk.",
    no_args_is_help=True,
)

RecipeFile = Annotated[str | None, recipe_option(RECIPES)]


app.command()(attention)
app.command("explain")(explain_pictures)
app.command()(export)
app.command()(prune)
app.command()(robustness)


@app.command()
def models(as_json: Json = False, pattern: Annotated[str, typer.Argument(help="Part of the name.")] = "") -> None:
    """List nearfar's models: parameters, multiply-accumulates, published accuracy, where the weights are."""
    rows = []
    for name, variant in sorted(VARIANTS.items(), key=lambda item: card_of(MODELS[item[0]]).title):
        if pattern not in name:
            continue
        for weights in variant.weights:
            source = weights.url or (":".join(weights.hf_hub) if weights.hf_hub else "")
            rows.append(
                {
                    "model": name,
                    "system": card_of(MODELS[name]).title,
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
    output: RunFolder,
    model: Annotated[str, typer.Option(help="A model of `models`, or any of timm's.")] = "nearfar_convnext_atto",
    recipe: RecipeFile = None,
    settings: Settings = None,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    workers: Workers = 0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a classifier and write it, its metrics and its settings to a folder."""
    from nearfar.core.recipes import read_recipe
    from nearfar.vision.classification.training import Recipe, train_classifier

    resolved = read_recipe(Recipe, recipe, settings or (), RECIPES)
    learn, hold, failures = training_pictures(
        data, resolved.validation, resolved.seed, lambda r: track(r, "checking"), resolved.choose_on
    )
    classifier, history = train_classifier(
        model, learn, hold, resolved, output, weights=weights, num_workers=workers, device=device,
        show_progress=messages.is_terminal, fresh=fresh,
    )  # fmt: skip
    measure = resolved.choose_by or ("mAP" if learn.multilabel else "accuracy")
    best = max(history, key=lambda row: row[measure])
    row = {"model": model, "classes": len(classifier.classes), "pictures": len(learn)}
    row |= {"best epoch": int(best["epoch"]) + 1, f"validation {measure}": best[measure], "folder": str(output)}
    show([row], as_json)
    raise_failures(failures, len(learn) + len(hold) + len(failures))


@app.command()
def evaluate(
    classifier: Trained,
    data: Data,
    split: Annotated[str | None, typer.Option(help="Folder inside the data, for example test.")] = None,
    model: Published = None,
    views: Views = None,
    device: Device = "auto",
    workers: Workers = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for scores.json and page.html.")] = None,
    as_json: Json = False,
) -> None:
    """Score a classifier on labelled pictures, with a 95 % interval."""
    trained = open_classifier(classifier, model)
    every, pictures, failures = known_pictures(trained, classifier, data, split)
    scores = trained.scores(pictures, device=device, num_workers=workers, views=views)
    # a picture that cannot be read is a wrong answer, not a picture less
    read = set(pictures.names)
    lost = [i for i, name in enumerate(every.names) if name not in read]
    missed = len(lost)
    scored, unreadable = torch.cat((scores, torch.full((missed, scores.shape[1]), torch.nan))), every.subset(lost)
    result = {"model": trained.name, "pixels": trained.size, "crop": trained.crop_pct}
    result |= {"views": views or trained.views} if (views or trained.views) != "one" else {}
    rows: list[dict[str, Any]] = []
    if trained.multilabel:
        found, rows = evaluate_multilabel(
            scored, torch.cat((pictures.targets(), unreadable.targets())), trained.classes
        )
        result |= found
    else:
        result |= evaluate_scores(scored, [*pictures.labels, *unreadable.labels])
    result["unreadable"] = missed
    seen = trained.trained_on.seen(every.digests())
    if any(seen):
        result["marked"] = f"{sum(seen)} of {len(seen)} pictures seen in training"
    odd = [name for name, row in zip(pictures.names, scores, strict=True) if not is_finite(row)]
    failures += [f"{name}: the model's scores are not finite" for name in odd]
    if output is not None:
        write_json(output / "scores.json", result | ({"by class": rows} if rows else {}))
        report = Report(f"{trained.name} on {Path(data).name}").table([result])
        if rows:
            report.table(rows).write(output / "page.html")
        else:
            report.figure(
                confusion(scores, pictures.labels, trained.classes),
                "Share of each class's pictures (row) that are given each class (column).",
            ).write(output / "page.html")
    show([result | ({"by class": rows} if as_json and rows else {})], as_json)
    if rows and not as_json:
        show(rows, as_json)
    raise_failures(failures, len(pictures) + missed)


@app.command("make-token-labels")
def make_token_labels_command(
    teacher: Trained,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the label maps. Run again to go on.")],
    split: Annotated[str | None, typer.Option(help="Folder inside the data, for example train.")] = None,
    model: Published = None,
    size: Annotated[int | None, typer.Option(help="Pixels that the teacher sees; by default its own.")] = None,
    top: Annotated[int, typer.Option(help="Classes kept at every place.", min=1)] = 5,
    device: Device = "auto",
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Let a classifier say what is where in every picture: label maps, for `train --set token_labels=FOLDER`."""
    from nearfar.vision.classification.token_labels import make_token_labels

    pictures, failures = open_pictures(data, split).readable(lambda r: track(r, "checking"))
    if not len(pictures):
        raise UserError(f"{data}: none of its pictures can be read")
    written = make_token_labels(
        one_class(open_classifier(teacher, model), "make-token-labels"), pictures, output, size=size, top=top,
        device=device, num_workers=workers,
        show=lambda batches: track(batches, "labelling"),
    )  # fmt: skip
    show([{"label maps": len(pictures), "written": written, "folder": str(output)}], as_json)
    raise_failures(failures, len(pictures) + len(failures))


@app.command()
def predict(
    classifier: Trained,
    paths: Annotated[
        list[Path], typer.Argument(help="Pictures, or folders that are searched for pictures.", parser=anywhere)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, CSV.", parser=anywhere)] = Path(
        "predictions.csv"
    ),
    top: Annotated[
        int | None, typer.Option(help="Classes per picture, at most. Default: 1, or all where it gives several.", min=1)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least probability of a class where pictures have several. Default 0.5.")
    ] = None,
    model: Published = None,
    views: Views = None,
    device: Device = "auto",
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
    as_json: Json = False,
) -> None:
    """Name what pictures show, and write a table: file, class, probability.

    Where pictures have several classes, all of at least the threshold; a picture of none has one line of rank 0, with
    no class and the probability of the likeliest. Pictures whose answer is known from a call before, with the same
    content, model and options, are not done again; TABLE.failures.json tells what could not be done.
    """
    if views == "random":
        raise UserError("--views random: answers nothing about a picture; it is for `evaluate`")
    once = Once(lambda: open_classifier(classifier, model))
    trained = once()
    if threshold is not None and not (trained.multilabel and 0 <= threshold <= 1):
        raise UserError(f"--threshold {threshold:g}: is a probability, for classifiers of several classes a picture")
    least = (0.5 if threshold is None else threshold) if trained.multilabel else -1.0
    files = picture_files(paths)
    kept = KeptRows(output, model_digest(classifier), variant=model, views=views, device=device)
    known = {file: row for file in files if (row := kept.find(file)) is not None}
    if known and not as_json:
        messages.print(f"{len(known)} of {len(files)} pictures are known from a call before")
    classes = trained.classes

    def several(some: Sequence[Path]) -> list[list[float]]:
        pictures = Pictures([str(f) for f in some], [-1] * len(some), classes, lambda i: read_picture(some[i]))
        scores = once().scores(pictures, device=device, views=views).tolist()
        if odd := [file for file, row in zip(some, scores, strict=True) if not is_finite(row)]:
            raise UserError(f"{odd[0]}: the model's scores are not finite, so no class is named")
        return scores

    def keep(file: Path, row: list[float]) -> None:
        kept.add(file, row)
        known[file] = row

    _, failures = run_batch(
        [file for file in files if file not in known], lambda file: several([file])[0], "predicting",
        places=Places(workers, engine, timeout), failed=output.with_name(f"{output.name}.failures.json"), each=keep,
        together=several,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    if known:
        done = [file for file in files if file in known]
        scores = torch.tensor([known[file] for file in done])
        number = min(top or (len(trained.classes) if trained.multilabel else 1), len(trained.classes))
        best = scores.topk(number, dim=1)
        for name, values, indices in zip(map(str, done), best.values.tolist(), best.indices.tolist(), strict=True):
            if values[0] < least:
                rows.append({"file": name, "rank": 0, "class": "", "probability": values[0]})
            for rank, (value, index) in enumerate(zip(values, indices, strict=True), start=1):
                if value < least:
                    break
                label = trained.classes[index]
                row = {"file": name, "rank": rank, "class": label, "probability": value}
                rows.append(row | ({"description": trained.descriptions[label]} if trained.descriptions else {}))
        write_csv(output, rows)
        show(rows if as_json else rows[:20], as_json)
        if not as_json:
            console.print(f"{len(known)} pictures: {output}", soft_wrap=True)
    raise_failures(failures, len(files))


@app.command()
def compare(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, the plot and the page.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to compare: of `models`, of timm, small-NAME, or plain-NAME, the small one without what its "
            "system adds. Repeat. Default: small forms of all systems, a small CNN of timm, a linear model."
        ),
    ] = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seconds: Annotated[
        float | None, typer.Option(help="Training time of each model: as many epochs as fit, at most the recipe's.")
    ] = None,
    device: Device = "auto",
    workers: Workers = 0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train several models on your pictures under one budget: accuracy, throughput, memory, a plot."""
    from nearfar.core.recipes import read_recipe
    from nearfar.vision.classification.comparison import compare as run_comparison
    from nearfar.vision.classification.training import Recipe

    resolved = read_recipe(Recipe, recipe, settings or (), RECIPES)
    names = model or [LINEAR, "test_resnet", *small_forms()]
    learn, hold, failures = training_pictures(
        data, resolved.validation, resolved.seed, lambda r: track(r, "checking"), resolved.choose_on
    )
    refused: list[str] = []
    rows = run_comparison(
        names, learn, hold, resolved, output, device=device, workers=workers, seconds=seconds, refused=refused,
        fresh=fresh, track=track,
    )  # fmt: skip
    show(rows, as_json)
    console.print(f"Page: {output / 'page.html'}", soft_wrap=True) if not as_json else None
    raise_failures([*failures, *refused], len(learn) + len(hold) + len(failures) + len(refused))


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
