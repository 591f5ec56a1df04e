"""`nearfar image-classification explain`: where answers come from, and whether the maps mean anything."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nearfar.apps.image_classification.common import Published, Trained, open_classifier, read_pictures
from nearfar.core.cli.batch import raise_failures
from nearfar.core.cli.console import console, show, track
from nearfar.core.cli.options import Device, Json
from nearfar.core.errors import UserError, some
from nearfar.core.files import write_csv, write_json
from nearfar.core.plots import new_figure, style
from nearfar.core.report import Report
from nearfar.vision.classification.classifier import Classifier, evaluation_transform
from nearfar.vision.data.prompts import object_masks
from nearfar.vision.explain.checks import (
    class_sensitivity,
    completeness,
    energy_inside,
    hit_zone,
    judge,
    pointing,
    randomization,
    ranks,
)
from nearfar.vision.explain.methods import AT_LAYERS, METHODS, Explanation, explain, methods_for

DEFAULT = ("normgrad", "selective_normgrad", "grad_cam", "linear_approximation", "gradient", "relevance")


def explain_pictures(
    classifier: Trained,
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for maps, table and page.html.")] = Path(
        "explanations"
    ),
    method: Annotated[
        list[str] | None, typer.Option(help=f"Repeat. One of {', '.join(METHODS)}; `all` for every one that suits.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Class to explain; by default its answer.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Layer to take maps at; by default chosen. Repeat.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Also shuffle the weights, ask for other classes, sum the shares up."),
    ] = False,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Where the objects are: a folder of PNG masks with the pictures' names (0 elsewhere), or a CSV table "
            "of boxes, picture, left, top, right, bottom. Maps are then asked to point there."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Pixels beside the object that count as a hit.", min=0)] = 15,
    steps: Annotated[int, typer.Option(help="Steps of insertion and deletion.", min=2)] = 32,
    model: Published = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show where answers come from, and hold every map against maps that know nothing of the model.

    A map's score is the area under insertion less that under deletion. It beats chance where it is above five maps of
    smooth noise, and edges where it is above the picture's own edges. With `--masks` it also says whether the map's
    highest pixel lies on the object, what share of the map does, and what share of the picture counts as a hit.
    """
    trained = open_classifier(classifier, model)
    wanted = class_of(trained, target)
    network = trained.model.to(device).eval()
    pictures, failures = read_pictures(paths, trained.classes)
    if not len(pictures):
        raise_failures(failures, len(pictures) + len(failures))
    transform = evaluation_transform(trained.size, trained.crop_pct, trained.crop_mode)
    data = pictures.subset(range(len(pictures)), transform)
    objects = None if masks is None else object_masks([Path(name) for name in pictures.names], masks)
    chosen, notes = choose_methods(method, network, data[0][0][None].to(device))
    rows: list[dict[str, Any]] = []
    scores: dict[str, list[float]] = {name: [] for name in chosen}
    report = Report(
        f"{trained.name}: where its answers come from",
        "Each map is laid on what the classifier sees of the picture. Score: area under insertion less area under "
        "deletion of the class's probability, between -1 and 1; in brackets the best of five maps of noise, and the "
        "picture's edges. A map that does not beat both says nothing about this picture.",
    )
    for i in track(range(len(pictures)), "explaining"):
        name, x = pictures.names[i], data[i][0][None].to(device)
        panels, made = [], []
        try:
            seen = None if objects is None else seen_mask(transform, objects[i])
            for one in chosen:
                layers = layer if one in AT_LAYERS else None
                explained = explain(network, x, wanted, one, layers=layers)
                verdict = judge(network, x, explained.maps, explained.target, steps=steps)
                made.append((one, explained, verdict))
        except (UserError, ValueError) as error:
            failures.append(f"{name}: {error}")
            continue
        for one, explained, verdict in made:
            label = trained.classes[int(explained.target[0])]
            row: dict[str, Any] = {
                "file": name, "class": label, "method": one, "insertion": float(verdict.insertion),
                "deletion": float(verdict.deletion), "score": float(verdict.score),
                "noise": float(verdict.random), "edges": float(verdict.edges),
                "beats noise": bool(verdict.beats_random), "beats edges": bool(verdict.beats_edges),
                "layers": " ".join(explained.layers),
            }  # fmt: skip
            if seen is not None:
                maps = explained.maps.cpu()
                row |= {"hits": bool(pointing(maps, seen, tolerance)), "inside": float(energy_inside(maps, seen))}
                row["by chance"] = float(hit_zone(seen, tolerance).double().mean())
            if check:
                row |= checked(network, x, explained, layer if one in AT_LAYERS else None)
            rows.append(row)
            scores[one].append(row["score"])
            panels.append((one, explained.maps[0].cpu(), row))
        report.section(f"{Path(name).name}: {panels[0][2]['class']}", 3)
        report.figure(overlays(x[0].cpu(), panels), f"{name}. Warm colours: the larger half of the map's values.")
    ranking = ranks(scores) if rows and len(chosen) > 1 else []
    if rows:
        folder = Path(output)
        write_csv(folder / "maps.csv", rows)
        write_json(folder / "ranks.json", ranking)
        report.section("All pictures")
        if ranking:
            report.table(ranking, "Mean rank, 1 is best; 95 % bootstrap interval from six pictures on.")
        report.table(rows).write(folder / "page.html")
    show([{k: v for k, v in row.items() if k != "layers"} for row in rows] if as_json else ranking or rows, as_json)
    if not as_json:
        for note in notes:
            console.print(note, soft_wrap=True)
        for one in chosen:
            mine = [row for row in rows if row["method"] == one]
            beaten = sum(row["beats noise"] and row["beats edges"] for row in mine)
            said = f"{one}: beats noise and edges on {beaten} of {len(mine)} pictures"
            if objects is not None and mine:
                chance = sum(row["by chance"] for row in mine)
                said += f", points at the object on {sum(row['hits'] for row in mine)}, {chance:.1f} by chance"
            console.print(said, soft_wrap=True)
        console.print(f"Page: {output / 'page.html'}", soft_wrap=True)
    raise_failures(failures, len(pictures) + len(failures))


def seen_mask(transform: Callable, mask: NDArray[np.bool_]) -> Tensor:
    """Where the object is (1, H, W) in what the classifier sees. UserError where it lies outside the crop."""
    shades = [transform(Image.fromarray(np.repeat(m[..., None], 3, 2))) for m in mask_and_bounds(mask)]
    inside = (shades[0] - shades[1]).abs() > (shades[0] - shades[2]).abs()
    if not inside[0].any():
        raise UserError("the object lies outside the part of the picture that the classifier sees")
    return inside[:1]


def mask_and_bounds(mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], ...]:
    white = np.full(mask.shape, 255, np.uint8)
    return white * mask, white * 0, white


def class_of(trained: Classifier, target: str | None) -> int | None:
    """The number of a class by its name, or by its number."""
    if target is None:
        return None
    if target in trained.classes:
        return trained.classes.index(target)
    if target.isdecimal() and int(target) < len(trained.classes):
        return int(target)
    raise UserError(f"--target {target}: is none of the {len(trained.classes)} classes: {some(trained.classes)}")


def choose_methods(asked: Sequence[str] | None, network: torch.nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """The methods to run, and what is to be said about those that are not."""
    if unknown := [name for name in asked or () if name not in METHODS and name != "all"]:
        raise UserError(f"--method {unknown[0]}: no such method; one of {', '.join(METHODS)}")
    if not asked or "all" not in asked:
        return list(dict.fromkeys(asked or DEFAULT)), []
    reasons = methods_for(network, x)
    return [n for n, why in reasons.items() if not why], [f"{n} left out: {why}" for n, why in reasons.items() if why]


def checked(
    network: torch.nn.Module, x: Tensor, explained: Explanation, layers: Sequence[str] | None
) -> dict[str, float]:
    """The map against a shuffled model and another class, and what its shares leave out."""
    again = lambda m, images, target: explain(m, images, target, explained.method, layers=layers).maps  # noqa: E731
    shuffled = randomization(network, x, explained.target, again, groups=1)[0]["correlation"]
    row = {"when shuffled": shuffled, "of another class": float(class_sensitivity(network, x, again))}
    if explained.attributions is not None:
        row["unaccounted"] = float(completeness(network, x, explained))
    else:
        row["unaccounted"] = float("nan")
    return row


def overlays(x: Tensor, panels: Sequence[tuple[str, Tensor, dict[str, Any]]]) -> Figure:
    """The picture, and each map on it."""
    low, high = x.amin(), x.amax()
    picture = ((x - low) / (high - low).clamp(min=1e-6)).movedim(0, -1).numpy()
    columns = min(4, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)
    with style():
        figure = new_figure(2.6 * columns, 3.0 * lines)
        axes = np.atleast_1d(figure.subplots(lines, columns)).flatten()
        for axis in axes:
            axis.axis("off")
        axes[0].imshow(picture)
        axes[0].set_title("picture", fontsize=8)
        for axis, (name, heat, row) in zip(axes[1:], panels, strict=False):
            values = heat.numpy()
            top = np.quantile(values, 0.99)
            floor = np.quantile(values, 0.5)
            shown = ((values - floor) / max(top - floor, 1e-12)).clip(0, 1)
            axis.imshow(picture.mean(2), cmap="gray")
            axis.imshow(shown, cmap="inferno", alpha=0.7 * shown, vmin=0, vmax=1)
            axis.set_title(f"{name}\n{row['score']:.3f} ({row['noise']:.3f}, {row['edges']:.3f})", fontsize=7)
    return figure
