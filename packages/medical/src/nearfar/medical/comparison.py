"""Several networks and their identity ablations on the same cases, folds and steps, and how far they differ."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.reading import read_json
from nearfar.core.statistics import bootstrap_interval, holm, paired_test
from nearfar.medical.data.cases import Case, Collection, make_splits
from nearfar.medical.metrics import summarize
from nearfar.medical.networks import networks
from nearfar.medical.recipe import Recipe
from nearfar.medical.training import train_segmenter

IDENTITY = "-identity"
"""Behind a network's name: the identity in the place of its scans."""


def with_ablations(name: str, recipe: Recipe, others: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """`recipe`, and the same with the network, settings and learning rate of each of `others`, and their ablations.

    A network of ours that has scans is followed by itself without them (`scan: false`).
    """
    if name in others:
        raise UserError(f"{name}: is compared with itself")
    found = {name: recipe}
    for other, lent in others.items():
        part = {key: getattr(lent, key) for key in ("network", "settings", "learning_rate")}
        found[other] = dataclasses.replace(recipe, **part)
    jobs = {}
    for each, own in found.items():
        jobs[each] = own
        kind = networks().get(own.network)
        if kind and "scan" in inspect.signature(kind[0]).parameters and own.settings.get("scan", True):
            jobs[each + IDENTITY] = dataclasses.replace(own, settings={**own.settings, "scan": False})
    if len(jobs) < 2:
        raise UserError(f"{name}: there is nothing to compare it with; name other networks")
    return jobs


def compare_networks(
    collection: Collection,
    cases: Sequence[Case],
    recipes: Mapping[str, Recipe],
    folder: str | Path,
    *,
    folds: int = 2,
    slabs: int = 1,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, text: items,
    **options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train each of `recipes` in all folds and score every case by the model that has not seen its patient.

    Returns a row of scores per network, the best Dice first, and rows of paired tests (p by Holm): of each network
    against the first of `recipes`, and against its own ablation. Items are patients, or, where `slabs` is not 1,
    slabs of each case along its longest axis: for few cases, and then intervals and tests tell of these slabs alone and
    not of other patients. All see as many patches in as many steps; seconds are told and not made equal.

    Writes comparison.csv and comparison.json to `folder`, and the models to folders in it. `options` go to
    `train_segmenter`; what is finished is not trained again.
    """
    if slabs < 1:
        raise ValueError(f"slabs is {slabs}; it must be at least 1")
    budgets = {(r.epochs, r.patches_per_epoch, r.batch_size, r.accumulate, r.roi) for r in recipes.values()}
    if len(budgets) > 1:
        raise ValueError("the recipes differ in epochs, patches, batch or roi: their budgets are not equal")
    folder, splits = Path(folder), make_splits(cases, folds, next(iter(recipes.values())).seed)
    rows, means = list[dict[str, Any]](), dict[str, dict[str, np.ndarray]]()
    for name, recipe in recipes.items():
        whole, items, seconds, parameters = list[dict[str, Any]](), dict[str, list[float]](), 0.0, 0
        for number, split in enumerate(track(splits, name)):
            at = folder / name / f"fold_{number}"
            learn, held = ([case for case in cases if case.name in split[side]] for side in ("train", "validation"))
            segmenter, _ = train_segmenter(collection, recipe, at, train_cases=learn, **options)
            seconds += sum(row["seconds"] for row in read_json(at / "run" / "run.json", "a run's record")["history"])
            parameters = sum(p.numel() for p in segmenter.network.parameters())
            for case in held:
                scan, truth = collection.read(case)
                if truth is None:
                    raise UserError(f"{case.name}: has no labels to score it by")
                found = segmenter(scan)
                whole += [{"case": case.name, **row} for row in collection.score(found, truth, scan.spacing)]
                axis = int(np.argmax(truth.shape))
                parts = zip(*(np.array_split(array, slabs, axis) for array in (found, truth)), strict=True)
                for place, (p, t) in enumerate(parts):
                    scores = [row["dice"] for row in collection.score(p, t, scan.spacing)]
                    item = f"{case.name} {place}" if slabs > 1 else case.group or case.name
                    there = [score for score in scores if not np.isnan(score)]
                    items.setdefault(item, []).append(float(np.mean(there)) if there else np.nan)
        means[name] = {item: np.array(scores) for item, scores in items.items()}
        summary = summarize(whole)
        row: dict[str, Any] = {"network": name, "parameters (M)": parameters / 1e6, "training (s)": round(seconds, 1)}
        rows.append(row | {r["label"]: r["dice"] for r in summary[:-1]} | {"Dice": summary[-1]["dice"]})
    values = _by_item(means)
    for row in rows:
        low, high = bootstrap_interval(values[row["network"]])
        row |= {"by item": float(np.mean(values[row["network"]])), "low": low, "high": high}
        row["items"] = len(values[row["network"]])
    first, *others = recipes
    pairs = [(name, first) for name in others if name != first + IDENTITY]
    pairs += [(name, name + IDENTITY) for name in recipes if name + IDENTITY in recipes]
    paired: list[dict[str, Any]] = [
        {"network": one, "against": other, **paired_test(values[one], values[other])} for one, other in pairs
    ]
    for row, p in zip(paired, holm([row["p"] for row in paired]), strict=True):
        row["p"] = float(p)
    rows.sort(key=lambda row: -row["Dice"])
    write_csv(folder / "comparison.csv", rows)
    steps = next(iter(recipes.values()))
    budget = {"epochs": steps.epochs, "patches_per_epoch": steps.patches_per_epoch, "batch_size": steps.batch_size}
    content = {"networks": rows, "paired": paired, "budget": budget, "folds": folds, "slabs": slabs}
    write_json(folder / "comparison.json", content)
    return rows, paired


def _by_item(scores: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[float]]:
    """The mean score of each item by network, in the same order.

    What holds nothing, and in which no network finds anything, is left out for all; where one does, finding nothing
    counts 1.
    """
    found: dict[str, list[float]] = {name: [] for name in scores}
    for item in next(iter(scores.values())):
        table = np.stack([each[item] for each in scores.values()])
        table = table[:, ~np.isnan(table).all(0)]
        for name, row in zip(found, table, strict=True):
            if row.size:
                found[name].append(float(np.nan_to_num(row, nan=1.0).mean()))
    return found


def verdict(rows: Sequence[Mapping[str, Any]], paired: Sequence[Mapping[str, Any]], first: str) -> str:
    """Who has the highest Dice, in a sentence, and whether the tests tell it from `first`, or `first` from the next."""
    best = rows[0]["network"]
    other = rows[1]["network"] if best == first else first
    told = f"{best} is best, Dice {rows[0]['Dice']:.3f}"
    for row in paired:
        if {row["network"], row["against"]} == {best, other}:
            difference = row["difference"] if row["network"] == best else -row["difference"]
            if np.isnan(row["p"]):
                return f"{told}; {row['items']} items are too few to tell it from {other}"
            word = "differ" if row["p"] < 0.05 else "cannot be told apart"
            return f"{told}; it and {other} {word} (difference {difference:.3f}, p {row['p']:.2g})"
    return told
