"""Cross-validation: every fold trained, all cases scored by the model that has not seen them, the folds together.

A folder of folds holds `fold_0`, `fold_1` ... (model folders), `splits.json`, `cross_validation.json` and, written
last, `ensemble.json`: the folds' digests, the labels cut to their largest part, the calibration of the quality flag.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from nearfar.core.errors import UserError
from nearfar.core.files import temporary_folder, write_csv, write_json
from nearfar.core.made_from import model_digest
from nearfar.core.reading import reading
from nearfar.medical.data.cases import Case, Collection
from nearfar.medical.data.scans import Scan
from nearfar.medical.metrics import dice, summarize
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import train_segmenter

NAME = "ensemble.json"
TOLD = ("bad", "cases", "copies", "bad_cases", "caught", "false_alarms", "error")
LEAST = 4
"""Calibration cases from which on a quality is predicted."""


def largest_part(labels: np.ndarray, values: Iterable[int]) -> np.ndarray:
    """A label map in which each of `values` keeps its largest part (by faces and corners) alone; 0 takes the rest."""
    labels = labels.copy()
    for value in values:
        parts, count = ndimage.label(labels == value, np.ones((3,) * labels.ndim))
        if count > 1:
            sizes = np.bincount(parts.ravel())[1:]
            labels[(parts > 0) & (parts != 1 + sizes.argmax())] = 0
    return labels


def agreement(maps: Sequence[np.ndarray], values: Mapping[int, str]) -> dict[str, float]:
    """Mean Dice between each two of several label maps, by label; 1 where no map has it."""
    found = {}
    for value, name in values.items():
        if value:
            pairs = [dice(a == value, b == value) for a, b in combinations(maps, 2)]
            found[name] = float(np.mean([1.0 if np.isnan(p) else p for p in pairs]))
    return found


class FoldEnsemble:
    """The segmenters of all folds as one: the mean of their logits decides; see the module.

    Called like a `Segmenter`; `with_quality` also says how good the result probably is.
    """

    def __init__(
        self, folds: Sequence[Segmenter], largest: Sequence[int] = (), quality: Mapping[str, Any] | None = None
    ) -> None:
        if len(folds) < 2:
            raise ValueError(f"there are {len(folds)} folds; 2 at least make an ensemble")
        first = self.first = folds[0]
        self.folds, self.largest, self.quality = list(folds), list(largest), dict(quality or {})
        self.labels, self.regions, self.recipe, self.crf = first.labels, first.regions, first.recipe, None
        self.trained_on = reduce(or_, (fold.trained_on for fold in folds))

    @classmethod
    def load(cls, folder: str | Path) -> "FoldEnsemble":
        """Read what `train_folds` wrote; raises UserError where folds are missing or others than those it was."""
        folder = Path(folder)
        with reading(folder / NAME, "is no description of trained folds", "run train --folds all again"):
            content = json.loads((folder / NAME).read_text(encoding="utf-8"))
            digests, largest = dict(content["folds"]), [int(v) for v in content["largest"]]
            quality = dict(content["quality"])
        for name, digest in digests.items():
            if model_digest(folder / name) != digest:
                raise UserError(f"{folder / name}: is not the model that {NAME} names; run train --folds all again")
        return cls([Segmenter.load(folder / name) for name in digests], largest, quality)

    def __call__(self, scan: Scan, **options: Any) -> np.ndarray:
        return self.with_quality(scan, **options)[0]

    def with_quality(self, scan: Scan, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """The label map of a scan, and its predicted Dice by label (nothing without a calibration).

        The options are those of `join`.
        """
        labels, maps = self.join(scan, **options)
        return labels, predicted(self.quality, maps, self.labels) if self.quality else {}

    def join(
        self,
        scan: Scan,
        *,
        memory: int | None = None,
        crf: Any = None,
        probabilities: Path | None = None,
        **options: Any,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The label map by the mean of the folds' logits, and that of each fold.

        `probabilities`: a .npy file for them. The rest as in `Segmenter`.
        """
        if crf is not None:
            raise UserError("the CRF is for one model; name a fold's folder, or run without it")
        need = 0 if memory is None else self.first.check_memory(scan, memory, lazy=False)
        if memory is not None:
            options["memory"] = max(1, memory - need)
        maps: list[np.ndarray] = []
        with temporary_folder() as place:
            total: np.ndarray | None = None
            for fold in self.folds:
                with fold.scores(fold.prepare(scan), in_memory=memory is None, **options) as scores:
                    if total is None:
                        new = np.zeros if memory is None else _mapped(place / "sum")
                        total = new(scores.shape, np.float32)
                    for own, part in zip(total, scores):
                        own += part / len(self.folds)
                    maps.append(fold.decide(scores, scan))
            assert total is not None
            labels = self.first.decide(total, scan)
            if probabilities is not None:
                self.first.write_probabilities(probabilities, total, scan)
        return largest_part(labels, self.largest), maps


def _mapped(path: Path) -> Callable[..., np.ndarray]:
    return lambda shape, kind: np.memmap(path, kind, "w+", shape=shape)


def predicted(quality: Mapping[str, Any], maps: Sequence[np.ndarray], labels: Mapping[int, str]) -> dict[str, Any]:
    """Predicted Dice by label, its mean, and whether that is below the calibration's `bad`."""
    found = agreement(maps, labels)
    scores = {name: _line(quality["lines"][name], value) for name, value in found.items()}
    mean = float(np.mean(list(scores.values())))
    told = {k: quality[k] for k in TOLD if k in quality}
    return {"dice": scores, "mean": mean, "flag": mean < quality["bad"], "agreement": found, "calibration": told}


def _line(line: Sequence[float], value: float) -> float:
    return float(np.clip(line[0] + line[1] * value, 0, 1))


def _fitted(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Intercept and slope, which is not below 0: more agreement never predicts worse."""
    spread = float(np.var(x))
    slope = max(0.0, float(np.cov(x, y, ddof=0)[0, 1]) / spread) if spread > 1e-12 else 0.0
    return [float(np.mean(y)) - slope * float(np.mean(x)), slope]


def degraded(image: np.ndarray, side: float = 1.0, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Copies of an image (C, *S), each worse in one way than scans of the training are: blurred, or noisy.

    `side`: voxels along an axis of the image in which the network sees one, by which blur is counted. Noise is counted
    in the deviation of each channel.
    """
    draw = np.random.default_rng(seed)
    for blur in (1.5, 3.0):
        axes = (0.0,) + (blur * side,) * (image.ndim - 1)
        yield f"blur of {blur:g}", ndimage.gaussian_filter(image, axes, truncate=3)
    spread = image.std(tuple(range(1, image.ndim)), keepdims=True)
    for noise in (0.5, 1.5):
        yield f"noise of {noise:g}", image + noise * spread * draw.standard_normal(image.shape, np.float32)


def calibrate(rows: Sequence[Mapping[str, Any]], bad: float | None = None) -> dict[str, Any]:
    """The calibration by cases that no fold was trained on: each of `rows` has `agreement` and `dice` by label.

    A row may name its `patient`, and how it is `degraded`, as `copy`. A line is fitted for each label; how well it does
    is measured with each patient left out of the fit in turn: `error` is the mean absolute one, `bad_cases` are rows
    whose mean Dice is below `bad` (None: the lowest quarter), of which the share `caught` is predicted to be, and
    `false_alarms` are other rows predicted so. `cases` counts rows that are no copies, `copies` the others. Nothing
    below `LEAST` cases.
    """
    rows = [row for row in rows if not all(np.isnan(value) for value in row["dice"].values())]
    copies = sum(bool(row.get("copy")) for row in rows)
    if len(rows) - copies < LEAST:
        return {}
    labels = list(rows[0]["agreement"])

    def lines(chosen: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        fits = {}
        for name in labels:
            pairs = [(r["agreement"][name], r["dice"][name]) for r in chosen if not np.isnan(r["dice"][name])]
            fits[name] = _fitted(*zip(*pairs)) if pairs else [1.0, 0.0]
        return fits

    truth, told = [], []
    patients = [row.get("patient", i) for i, row in enumerate(rows)]
    for row, patient in zip(rows, patients):
        fit = lines([other for other, of in zip(rows, patients) if of != patient])
        truth.append(float(np.nanmean(list(row["dice"].values()))))
        told.append(float(np.mean([_line(fit[name], row["agreement"][name]) for name in labels])))
    limit = float(np.quantile(truth, 0.25)) if bad is None else bad
    worse, flagged = np.array(truth) <= limit if bad is None else np.array(truth) < limit, np.array(told) < limit
    return {
        "lines": lines(rows),
        "bad": limit,
        "cases": len(rows) - copies,
        "copies": copies,
        "bad_cases": int(worse.sum()),
        "caught": float(flagged[worse].mean()) if worse.any() else None,
        "false_alarms": int((flagged & ~worse).sum()),
        "error": float(np.abs(np.array(truth) - told).mean()),
    }


def train_folds(
    collection: Collection,
    recipe: Recipe,
    folder: str | Path,
    splits: Sequence[Mapping[str, Sequence[str]]],
    *,
    calibration: Sequence[Case] = (),
    bad: float | None = None,
    say: Callable[[str], Any] = lambda text: None,
    **options: Any,
) -> tuple[FoldEnsemble, list[dict[str, Any]]]:
    """Train a model for each of `splits` and join them; returns the ensemble and the summary over all held-out cases.

    Each case is scored by the model that has not seen it, without and with every label cut to its largest part, and
    the cut is kept for the labels whose mean Dice it raises. `calibration`: labelled cases of no split, by which the
    quality flag is set, and by copies of them that are `degraded`, since bad scans may be missing among them.
    `options` go to `train_segmenter`.
    """
    folder = Path(folder)
    cases = {case.name: case for case in collection.cases}
    seen = {name for split in splits for name in (*split["train"], *split["validation"])}
    if both := [case.name for case in calibration if case.name in seen]:
        raise ValueError(f"{', '.join(both[:5])}: calibrate, so no fold may hold them")
    folds = []
    plain, cut = list[dict[str, Any]](), list[dict[str, Any]]()

    def keep(case: Case, found: np.ndarray) -> None:
        scan, truth = collection.read(case)
        assert truth is not None
        for rows, labels in ((plain, found), (cut, largest_part(found, [v for v in collection.labels if v]))):
            rows += [{"case": case.name, **row} for row in collection.score(labels, truth, scan.spacing)]

    for k, split in enumerate(splits):
        say(f"fold {k + 1} of {len(splits)}")
        held = [cases[name] for name in split["validation"]]
        trained = [cases[name] for name in split["train"]]
        segmenter, _ = train_segmenter(
            collection, recipe, folder / f"fold_{k}", train_cases=trained, validation_cases=held, say=say, keep=keep,
            **options,
        )  # fmt: skip
        folds.append(segmenter)
    largest = []
    for value, label in collection.labels.items():
        before, after = ([r["dice"] for r in rows if r["label"] == label] for rows in (plain, cut))
        if value and not collection.order and before and np.nanmean(after) > np.nanmean(before) + 1e-6:
            largest.append(value)
            say(f"{label}: its largest part alone is kept, Dice {np.nanmean(before):.4f} to {np.nanmean(after):.4f}")
    kept = [collection.labels[value] for value in largest]
    chosen = [b if a["label"] in kept else a for a, b in zip(plain, cut)]
    ensemble = FoldEnsemble(folds, largest)
    rows = []
    for case in calibration:
        scan, truth = collection.read(case)
        assert truth is not None
        side = float(np.min(np.array(ensemble.first.preparation.grid_spacing(scan))) / min(scan.spacing))
        for name, image in [("", scan.image), *degraded(scan.image, side, recipe.seed)]:
            labels, every = ensemble.join(replace(scan, image=image, notes=[]))
            scores = collection.score(labels, truth, scan.spacing)
            names = set(collection.labels.values())
            measured = {row["label"]: row["dice"] for row in scores if row["label"] in names}
            row = {"case": case.name, "patient": case.group or case.name, "copy": name}
            rows.append(row | {"agreement": agreement(every, collection.labels), "dice": measured})
    ensemble.quality = calibrate(rows, bad)
    if not ensemble.quality:
        say(f"no quality flag: {len(calibration)} cases calibrate it, {LEAST} are needed (--calibrate)")
    summary = summarize(chosen)
    write_csv(folder / "cross_validation.csv", chosen)
    write_json(folder / "cross_validation.json", {"summary": summary, "largest": kept, "calibration": rows})
    digests = {f"fold_{k}": model_digest(folder / f"fold_{k}") for k in range(len(folds))}
    write_json(folder / NAME, {"folds": digests, "largest": largest, "quality": ensemble.quality}, exact=True)
    return ensemble, summary


def load(folder: str | Path) -> Segmenter | FoldEnsemble:
    """The model in a folder, of one fold or of all."""
    return FoldEnsemble.load(folder) if (Path(folder) / NAME).is_file() else Segmenter.load(folder)
