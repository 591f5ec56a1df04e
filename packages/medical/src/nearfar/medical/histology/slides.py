"""What a tile classifier says of a whole slide: a table of tiles, an answer, a heat map, GeoJSON; in bounded memory."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json
from nearfar.core.memory import refuse_memory
from nearfar.core.plots import COLORS, new_figure
from nearfar.medical.data.slides import CACHE, Slide, open_slide
from nearfar.medical.data.tiles import Tile, aggregate
from nearfar.medical.histology.classifier import TileClassifier

BATCH = 32
"""Tiles at once, where no memory is given."""

THUMBNAIL = 2048
FIXED = CACHE + 32 * THUMBNAIL**2
"""Bytes that a slide takes beside the tiles of a batch: decoded parts of the file, thumbnail, mask of tissue."""

MOST_MAPS = 9
"""Classes of which a heat map is drawn."""


@dataclass
class SlideAnswer:
    """The tiles of a slide by (top, left) of the finest level, with the side of each there, and what they show.

    `probabilities` (N, K) has NaN for the tiles in `broken`, which could not be read: place -> what is wrong.
    """

    path: Path
    side: int
    places: np.ndarray
    probabilities: np.ndarray
    broken: dict[int, str]
    how: str
    note: str = ""

    def slide(self) -> np.ndarray:
        """Class probabilities (K,) of the slide, of the tiles that could be read."""
        good = self.probabilities[~np.isnan(self.probabilities[:, 0])]
        return aggregate(torch.from_numpy(good), self.how).numpy()


def tile_cost(classifier: TileClassifier, device: str = "cpu") -> int:
    """About what bytes a tile takes in the network at most.

    Three times the largest inputs and outputs of a part of it, and all that its backbone hands on.
    """
    largest, kept = 0, 0

    def sizes(values: Any) -> int:
        if isinstance(values, Tensor):
            return values.numel() * values.element_size()
        return sum(map(sizes, values)) if isinstance(values, list | tuple) else 0

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest, kept
        largest = max(largest, sizes(inputs) + sizes(output))
        kept = max(kept, sizes(output)) if isinstance(output, list | tuple) else kept

    handles = [module.register_forward_hook(look) for module in classifier.network.modules()]
    side = max(classifier.recipe.size, classifier.sides[1])
    try:
        classifier.probabilities([np.zeros((side, side, 3), np.uint8)], device)
    finally:
        for handle in handles:
            handle.remove()
    return 3 * largest + kept + 16 * side**2


def batch_for(classifier: TileClassifier, memory: int | None, device: str = "cpu") -> int:
    """Tiles at once within `memory` bytes, which count a slide's parts and the batch, not the program and the network.

    Raises UserError where not even one fits.
    """
    if memory is None:
        return BATCH
    cost = tile_cost(classifier, device)
    if memory < FIXED + cost:
        raise refuse_memory(memory, {"slide": FIXED, "a tile": cost})
    return min(BATCH, (memory - FIXED) // cost)


def side_on(slide: Slide, classifier: TileClassifier, mpp: float | None, tile: int | None) -> tuple[int, int, str]:
    """Pixels of the finest level that a tile spans, pixels of the tile, and a note where a resolution is not known.

    Raises UserError where the model's resolution is known and the slide's is not, or where it is too coarse.
    """
    pixels = tile or classifier.side
    wanted, there = classifier.recipe.mpp, mpp or slide.mpp
    if wanted is None:
        told = "" if there is None else f" of {there:g} microns"
        return (
            pixels,
            pixels,
            f"{slide.path}: the model does not tell its resolution; the finest pixels{told} are taken",
        )
    if there is None:
        raise UserError(f"{slide.path}: does not tell its microns per pixel, the model needs {wanted:g}; give --mpp")
    if there > 1.2 * wanted:
        raise UserError(f"{slide.path}: its finest pixels are {there:g} microns, the model needs {wanted:g}")
    return round(pixels * wanted / there), pixels, ""


def classify_slide(
    classifier: TileClassifier,
    path: str | Path,
    *,
    how: str = "mean",
    least: float = 0.5,
    tile: int | None = None,
    mpp: float | None = None,
    batch: int = BATCH,
    device: str = "cpu",
    track: Callable[[Sequence[Any]], Iterable[Any]] = lambda places: places,
) -> SlideAnswer:
    """Cut a slide into tiles where it holds tissue, and classify them.

    Args:
        how: from tiles to the slide, see `aggregate`.
        least: share of a tile that tissue must cover.
        tile: pixels of a tile at the model's resolution. None: those of the training.
        mpp: microns per pixel of the finest level, where the file does not tell or is wrong.

    A tile that cannot be read is left empty, and named. Raises UserError where none can be read, where there is no
    tissue, or where the file is no slide.
    """
    with open_slide(path) as slide:
        side, pixels, note = side_on(slide, classifier, mpp, tile)
        places = slide.places(side, least)
        found = np.full((len(places), len(classifier.classes)), np.nan, np.float32)
        broken: dict[int, str] = {}
        read: list[tuple[int, np.ndarray]] = []

        def flush() -> None:
            found[[i for i, _ in read]] = classifier.probabilities([pixels for _, pixels in read], device).numpy()
            read.clear()

        for i, (top, left) in enumerate(track(places)):
            try:
                read.append((i, slide.square(top, left, side, pixels)))
            except UserError as error:
                broken[i] = str(error)
            if len(read) == batch:
                flush()
        if read:
            flush()
    if len(broken) == len(places):
        raise UserError(f"{path}: none of its {len(places)} tiles can be read; the first: {broken[0]}")
    return SlideAnswer(Path(path), side, np.asarray(places), found, broken, how, note)


def classify_slides(
    classifier: TileClassifier,
    slides: Sequence[Tile],
    track: Callable[[Sequence[Tile]], Iterable[Tile]] = lambda slides: slides,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """Class probabilities (N, K) of labelled slides, NaN of those that cannot be read, and a line for each fault.

    `options` are those of `classify_slide`.
    """
    scores, failures = np.full((len(slides), len(classifier.classes)), np.nan), []
    for i, slide in enumerate(track(slides)):
        try:
            answer = classify_slide(classifier, slide.path, **options)
        except UserError as error:
            failures.append(str(error))
            continue
        scores[i] = answer.slide()
        if answer.broken:
            failures.append(f"{slide.path}: {len(answer.broken)} of {len(answer.places)} tiles cannot be read")
    return scores, failures


def slide_files(base: Path) -> tuple[Path, Path, Path]:
    """What `write_answer` writes beside the answer: table, heat map, GeoJSON."""
    return tuple(base.with_name(f"{base.name}{end}") for end in ("_tiles.csv", "_heatmap.png", ".geojson"))  # type: ignore[return-value]


def write_answer(answer: SlideAnswer, classes: Sequence[str], base: Path) -> dict[str, Any]:
    """Write `base`_tiles.csv, _heatmap.png, .geojson and, last, .json, the slide's answer, which is returned."""
    tiles, picture, squares = slide_files(base)
    with atomic_path(tiles) as temporary:
        _write_table(temporary, answer, classes)
    with atomic_path(squares) as temporary:
        _write_geojson(temporary, answer, classes)
    with open_slide(answer.path) as slide:
        figure = heat_map(slide, answer, classes)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=150)
    values = answer.slide()
    row: dict[str, Any] = {"slide": str(answer.path), "class": classes[int(values.argmax())]}
    row |= {f"p({name})": float(p) for name, p in zip(classes, values, strict=True)}
    row |= {"tiles": len(answer.places), "broken": len(answer.broken)}
    if answer.broken:
        row["first broken"] = next(iter(answer.broken.values()))
    write_json(base.with_name(f"{base.name}.json"), row | {"note": answer.note})
    return row


def _rows(answer: SlideAnswer, classes: Sequence[str]) -> Iterator[tuple[int, int, str, list[float] | None]]:
    """(left, top, class, probabilities) of each tile; of a broken one "" and None."""
    for (top, left), values in zip(answer.places.tolist(), answer.probabilities, strict=True):
        if np.isnan(values[0]):
            yield left, top, "", None
        else:
            yield left, top, classes[int(values.argmax())], values.tolist()


def _write_table(path: Path, answer: SlideAnswer, classes: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["x", "y", "side", "class", *(f"p({name})" for name in classes)])
        for left, top, name, values in _rows(answer, classes):
            told = [""] * len(classes) if values is None else [f"{p:.6f}" for p in values]
            writer.writerow([left, top, answer.side, name, *told])


def _write_geojson(path: Path, answer: SlideAnswer, classes: Sequence[str]) -> None:
    """A FeatureCollection of the tiles' squares in pixels of the finest level, as QuPath reads it (drag it in)."""
    colors = {name: [round(255 * c) for c in to_rgb(COLORS[i % len(COLORS)])] for i, name in enumerate(classes)}
    with path.open("w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        for i, (left, top, name, values) in enumerate(_rows(answer, classes)):
            right, bottom = left + answer.side, top + answer.side
            ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
            about: dict[str, Any] = {"objectType": "tile"}
            if values is not None:
                about["classification"] = {"name": name, "color": colors[name]}
                about["measurements"] = {f"p({c})": round(p, 6) for c, p in zip(classes, values, strict=True)}
            feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": about}
            stream.write(("," if i else "") + "\n" + json.dumps(feature))
        stream.write("\n]}\n")


def heat_map(slide: Slide, answer: SlideAnswer, classes: Sequence[str]) -> Figure:
    """Each class's probability over the slide's thumbnail; of many classes, the slide's most likely nine."""
    small = slide.thumbnail(THUMBNAIL // 2)
    shown = np.argsort(-answer.slide(), kind="stable")[:MOST_MAPS]
    shown = np.sort(shown) if len(classes) <= MOST_MAPS else shown
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    height, width = slide.levels[0]
    figure = new_figure(4 * columns, 4 * rows * min(2.0, max(0.5, height / width)))
    grid = np.full((-(-height // answer.side), -(-width // answer.side)), np.nan, np.float32)
    cells = tuple((answer.places // answer.side).T)
    extent = (0, grid.shape[1] * answer.side, grid.shape[0] * answer.side, 0)
    for number, k in enumerate(shown):
        grid[cells] = answer.probabilities[:, k]
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(small, extent=(0, width, height, 0), interpolation="nearest")
        drawn = axes.imshow(grid, matplotlib.colormaps["inferno"], extent=extent, alpha=0.55, vmin=0, vmax=1,
                            interpolation="nearest")  # fmt: skip
        axes.set(
            xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], title=f"{classes[k]}: {answer.slide()[k]:.2f}"
        )
    figure.colorbar(drawn, ax=figure.axes, shrink=0.6, label="probability")
    if len(classes) > MOST_MAPS:
        figure.suptitle(f"the {MOST_MAPS} most likely of {len(classes)} classes")
    return figure
