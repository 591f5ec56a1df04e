"""Scores of tiles and of slides: accuracy, balanced accuracy and AUC with intervals over slides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nearfar.core.errors import UserError, some
from nearfar.core.statistics import grouped_intervals
from nearfar.medical.data.tiles import Tile, aggregate, read_tile
from nearfar.medical.histology.classifier import TileClassifier

MEASURES = ("accuracy", "balanced", "AUC")


class _Measures:
    """Accuracy, mean of the classes' accuracies, mean one-against-the-rest AUC of items counted some times each."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        self.right, self.labels = scores.argmax(1) == labels, labels
        self.classes = np.unique(labels)
        self.ranked = []
        for k in self.classes:
            values, place = np.unique(scores[:, k], return_inverse=True)
            self.ranked.append((labels == k, place, len(values)))

    def __call__(self, count: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            each = [(count * self.right)[self.labels == k].sum() / count[self.labels == k].sum() for k in self.classes]
            areas = []
            for mine, place, number in self.ranked:
                above = np.bincount(place, count * mine, number)
                below = np.bincount(place, count * ~mine, number)
                won = (above * (below.cumsum() - below / 2)).sum()  # ties count half
                areas.append(won / (above.sum() * below.sum()))
            return np.array([(count * self.right).sum() / count.sum(), np.mean(each), np.mean(areas)])


def score(
    scores: np.ndarray, labels: np.ndarray, groups: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Measures of items, (N, K) scores and (N,) classes, with 95 % intervals over `groups`, slides or patients.

    Balanced accuracy and AUC are means over the classes that occur; AUC is NaN where there is one alone.
    """
    measure = _Measures(scores, labels)
    values = measure(np.ones(len(labels), np.int64))
    usable = ~np.isnan(values)
    low, high = grouped_intervals(lambda n: measure(n)[usable], groups, resamples=resamples, seed=seed)
    bounds = np.full((2, 3), np.nan)
    bounds[:, usable] = low, high
    row: dict[str, float] = {"items": len(labels)}
    for i, name in enumerate(MEASURES):
        row |= {name: float(values[i]), f"{name}_low": float(bounds[0, i]), f"{name}_high": float(bounds[1, i])}
    return row


def slide_scores(
    scores: np.ndarray, slides: Sequence[str], how: str = "mean", lost: Sequence[bool] | None = None
) -> tuple[list[str], np.ndarray]:
    """The slides and the probabilities (slides, K) of each from those of its tiles.

    `lost`: tiles that could not be read, which say nothing of their slide; a slide of such alone scores worst, NaN.
    """
    names = sorted(set(slides))
    kept = np.ones(len(slides), bool) if lost is None else ~np.asarray(lost)
    rows = np.full((len(names), scores.shape[1]), np.nan)
    known = {name: i for i, name in enumerate(names)}
    place = np.asarray([known[slide] for slide in slides])
    for i in range(len(names)):
        mine = (place == i) & kept
        if mine.any():
            rows[i] = aggregate(torch.from_numpy(scores[mine]), how).numpy()
    return names, rows


def worst(labels: np.ndarray, classes: int) -> np.ndarray:
    """Scores (N, K) that are wrong and behind every other: of what gave no answer."""
    scores = np.full((len(labels), classes), 2.0)
    scores[np.arange(len(labels)), labels] = -1.0
    return scores


def classify_tiles(
    classifier: TileClassifier,
    tiles: Sequence[Tile],
    device: str = "cpu",
    batch: int = 32,
    track: Callable[[Sequence[Any]], Iterable[Any]] = lambda starts: starts,
) -> tuple[np.ndarray, list[str]]:
    """Class probabilities (N, K), NaN of tiles that cannot be read or are of another size, and a line for each."""
    scores, failures = np.full((len(tiles), len(classifier.classes)), np.nan), []
    for start in track(range(0, len(tiles), batch)):
        read = []
        for i in range(start, min(start + batch, len(tiles))):
            try:
                pixels = read_tile(tiles[i].path)
                classifier.check_side(pixels, tiles[i].path)
                read.append((i, pixels))
            except UserError as error:
                failures.append(str(error))
        if read:
            scores[[i for i, _ in read]] = classifier.probabilities([pixels for _, pixels in read], device).numpy()
    return scores, failures


def score_tiles(
    scores: np.ndarray,
    tiles: Sequence[Tile],
    classes: Sequence[str],
    how: str = "mean",
    slide_labels: Mapping[str, str] | None = None,
    resamples: int = 1000,
) -> tuple[list[dict[str, Any]], str]:
    """A row for the tiles and one for the slides, see `score`, and a note.

    A tile without scores, NaN, counts as wrong and ranks last; it says nothing of its slide, and a slide of such alone
    is wrong. A slide's class is that of its tiles, or that of `slide_labels`; slides whose tiles are of several classes
    have no score of their own without these, which the note says.
    """
    known = {name: k for k, name in enumerate(classes)}
    labels = np.asarray([known[tile.label] for tile in tiles])
    lost = np.isnan(scores[:, 0])
    filled = np.where(lost[:, None], worst(labels, len(classes)), scores)
    rows: list[dict[str, Any]] = [{"of": "tiles", **score(filled, labels, [tile.group for tile in tiles], resamples)}]
    names, each = slide_scores(scores, [tile.slide for tile in tiles], how, lost)
    of_slide: dict[str, set[str]] = {}
    group = {tile.slide: tile.group for tile in tiles}
    for tile in tiles:
        of_slide.setdefault(tile.slide, set()).add(tile.label)
    if slide_labels is not None:
        if missing := [name for name in names if slide_labels.get(name) not in known]:
            raise UserError(f"slide {some(missing)}: has no class that the model knows in the table of slides")
        of_slide = {name: {slide_labels[name]} for name in names}
    whole = [i for i, name in enumerate(names) if len(of_slide[name]) == 1]
    mixed = len(names) - len(whole)
    note = f"{mixed} of {len(names)} slides have tiles of several classes and no score as slides" if mixed else ""
    if whole:
        truth = np.asarray([known[next(iter(of_slide[names[i]]))] for i in whole])
        found = each[whole]
        found = np.where(np.isnan(found[:, :1]), worst(truth, len(classes)), found)
        rows.append({"of": "slides", **score(found, truth, [group[names[i]] for i in whole], resamples)})
    return rows, note


def score_slides(
    scores: np.ndarray, slides: Sequence[Tile], classes: Sequence[str], resamples: int = 1000
) -> list[dict[str, Any]]:
    """As `score_tiles`, of slides that were read whole; one without scores, NaN, is wrong and ranks last."""
    labels = np.asarray([list(classes).index(slide.label) for slide in slides])
    filled = np.where(np.isnan(scores[:, :1]), worst(labels, len(classes)), scores)
    return [{"of": "slides", **score(filled, labels, [slide.group for slide in slides], resamples)}]


def short(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `score` with each interval in one column, for people."""
    told = []
    for row in rows:
        line = {name: value for name, value in row.items() if not name.startswith(MEASURES)}
        for name in MEASURES:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            line[name] = row[name]
            line[f"{name} 95 %"] = "-" if np.isnan(low) else f"{low:.3f} to {high:.3f}"
        told.append(line)
    return told


def confusion(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row per class: how many of its items were given each class."""
    given = scores.argmax(1)
    return [
        {"class": name, **{other: int(((labels == k) & (given == j)).sum()) for j, other in enumerate(classes)}}
        for k, name in enumerate(classes)
    ]
