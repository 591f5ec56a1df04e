"""Several networks on the same tiles, folds and budget, and how far they differ over slides."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.statistics import holm, paired_test
from nearfar.medical.data.tiles import Tile, split_by_slide
from nearfar.medical.histology.classifier import TileRecipe
from nearfar.medical.histology.scores import classify_tiles, score_tiles
from nearfar.medical.histology.training import train_tiles


def compare_networks(
    networks: Sequence[str],
    tiles: Sequence[Tile],
    recipe: TileRecipe,
    folder: str | Path,
    *,
    folds: int = 3,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, text: items,
    **options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train each network of the recipe, in all folds, and score every tile by the model that has not seen its slide.

    Returns a row of scores per network, the best balanced accuracy of tiles first, and a row per other network of its
    difference to that one: of the share of a slide's tiles that are named rightly, paired over the slides (patients,
    where they are known), with p corrected by Holm. All see as many tiles in as many steps; seconds are told and not
    made equal. `networks` are names of `create_tile_network`; the recipe's `settings` go to its own network alone,
    which must be one of them. Writes comparison.csv and comparison.json to `folder`, and the models to folders in it.
    """
    if len(set(networks)) < 2 or len(set(networks)) < len(networks):
        raise UserError(f"to compare are at least two networks, each once; got {', '.join(networks) or 'none'}")
    if recipe.settings and recipe.network not in networks:
        raise UserError(f"settings are for network={recipe.network}, which is not among {', '.join(networks)}")
    folder, classes = Path(folder), sorted({tile.label for tile in tiles})
    parts = split_by_slide(tiles, folds, recipe.seed)
    place = {tile.path: i for i, tile in enumerate(tiles)}
    rows, right = [], {}
    groups = sorted({tile.group for tile in tiles})
    for name in networks:
        scores, seconds, parameters = np.full((len(tiles), len(classes)), np.nan), 0.0, 0
        own = dataclasses.replace(recipe, network=name, settings=recipe.settings if name == recipe.network else {})
        for number, (learn, held) in enumerate(track(parts, name)):
            at = folder / name.replace("/", "_") / f"fold_{number}"
            started = time.monotonic()
            classifier, history = train_tiles(learn, own, at, **options)
            seconds += sum(row["seconds"] for row in history) or time.monotonic() - started
            parameters = sum(p.numel() for p in classifier.network.parameters())
            found, failures = classify_tiles(classifier, held, options.get("device", "cpu"))
            if failures:
                raise UserError(failures[0])
            scores[[place[tile.path] for tile in held]] = found
        of_tiles, *of_slides = score_tiles(scores, tiles, classes)[0]
        row = {"network": name, "parameters (M)": parameters / 1e6, "training (s)": seconds, **of_tiles}
        rows.append(row | ({"slide accuracy": of_slides[0]["accuracy"]} if of_slides else {}))
        hit = scores.argmax(1) == [classes.index(tile.label) for tile in tiles]
        right[name] = [np.mean([h for h, tile in zip(hit, tiles, strict=True) if tile.group == g]) for g in groups]
    rows.sort(key=lambda row: -row["balanced"])
    best = rows[0]["network"]
    paired = [
        {"best": best, "other": row["network"], **paired_test(right[best], right[row["network"]])} for row in rows[1:]
    ]
    for row, p in zip(paired, holm([row["p"] for row in paired]), strict=True):
        row["p"] = float(p)
    write_csv(folder / "comparison.csv", rows)
    write_json(folder / "comparison.json", {"networks": rows, "paired": paired, "folds": folds})
    return rows, paired


def verdict(rows: Sequence[dict[str, Any]], paired: Sequence[dict[str, Any]]) -> str:
    """Who wins, in a sentence, and whether the slides can tell it from the next."""
    best, next_one = rows[0], paired[0]
    clear = next_one["p"] < 0.05
    told = "differ" if clear else "cannot be told apart"
    return (
        f"{best['network']} is best, balanced accuracy {best['balanced']:.3f}; over the slides it and "
        f"{next_one['other']} {told} (difference {next_one['difference']:.3f}, p {next_one['p']:.2g})"
    )
