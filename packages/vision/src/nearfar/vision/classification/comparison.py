"""Several models on the same pictures under one budget."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv
from nearfar.core.leakage import Side, check_apart
from nearfar.core.plots import COLORS, new_figure, style
from nearfar.core.reading import reading
from nearfar.core.report import Report
from nearfar.vision.classification.classifier import evaluate_multilabel, evaluate_scores
from nearfar.vision.classification.training import Recipe, loaders, new_model, train_classifier
from nearfar.vision.cost import cost
from nearfar.vision.data.images import Pictures, split_pictures

Track = Callable[[Iterable[str], str], Iterable[str]]


def compare(
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
    fresh: bool = False,
    track: Track = lambda items, what: items,
) -> list[dict[str, Any]]:
    """One row per model; table.csv, plot.png and page.html in `output`. Half of `hold` chooses epochs, half scores.

    Args:
        names: as in `create_model`.
        learn, hold: pictures to learn from, and others.
        seconds: training time of each model: as many epochs as fit, at most the recipe's.
        models: models that are built already, by name.
        refused: takes a line for each model that the pictures do not suit, and the others go on; None: it is an error.
        fresh: forget the runs that are there.
        track: shows progress.
    """
    choose, score = split_pictures(hold, 0.5, recipe.seed)
    chooser, scorer = hold.subset(choose), hold.subset(score)
    learning = Side("the pictures to learn from", learn.names, learn.digests())
    check_apart(learning, Side("those to score on", scorer.names, scorer.digests()))
    rows = []
    for name in track(names, "training"):
        try:
            if fresh:
                (output / name / "run.json").unlink(missing_ok=True)
            budget = within(seconds, name, learn, recipe, output / name, device, workers) if seconds else recipe
            classifier, history = train_classifier(
                name, learn, chooser, budget, output / name, num_workers=workers, device=device,
                model=(models or {}).get(name),
            )  # fmt: skip
        except (UserError, RuntimeError) as error:
            if refused is None:
                raise
            refused.append(str(error) if name in str(error) else f"{name}: {error}")
            continue
        scores = classifier.scores(scorer, device=device)
        measure = "mAP" if scorer.multilabel else "accuracy"
        if scorer.multilabel:
            result, _ = evaluate_multilabel(scores, scorer.targets(), scorer.classes)
        else:
            result = evaluate_scores(scores, scorer.labels)
        rows.append(
            {
                "model": name,
                measure: result[measure],
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
    "Accuracy (mAP of several classes a picture), with its 95 % bootstrap interval, against pictures a second and "
    "against memory, weights included, of a forward pass with 16 pictures. Up and right, and up and left, is better."
)


def plot(rows: list[dict[str, Any]], device: str) -> Figure:
    """Accuracy, or mAP, against throughput and against memory, one mark per model."""
    measure = "mAP" if "mAP" in rows[0] else "accuracy"
    with style():
        figure = new_figure(10, 4.2)
        fast, small = figure.subplots(1, 2, sharey=True)
        for i, row in enumerate(rows):
            error = [[row[measure] - row["low"]], [row["high"] - row[measure]]]
            look = {
                "fmt": "osD^vP*X"[i % len(COLORS)],
                "color": COLORS[i % len(COLORS)],
                "capsize": 3,
                "label": row["model"],
            }
            fast.errorbar(row["pictures/s"], row[measure], yerr=error, **look)
            small.errorbar(row["memory (MiB)"], row[measure], yerr=error, **look)
        fast.set(ylabel=measure)
        for axes, column in ((fast, "pictures/s"), (small, "memory (MiB)")):
            values = [row[column] for row in rows]
            axes.set(xscale="log", xlabel=f"{column}, forward pass of 16 ({device})")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
            axes.xaxis.set_minor_formatter("{x:g}" if max(values) < 30 * min(values) else "")
        figure.legend(*fast.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def within(
    seconds: float, name: str, learn: Pictures, recipe: Recipe, folder: Path, device: str, workers: int
) -> Recipe:
    """`recipe` with as many epochs as fit into `seconds`, by the time of a few steps; those of a run already begun."""
    if (folder / "run.json").is_file():
        with reading(folder / "run.json", "is no record of a run", "start anew with --fresh"):
            begun = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
            return replace(recipe, epochs=begun["epochs"], warmup_epochs=begun["warmup_epochs"])
    model = new_model(name, len(learn.classes), recipe).to(device)
    loader, _ = loaders(learn, learn, recipe, workers)
    times: list[float] = []
    before = 0.0
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
