"""Planned trainings beside the recipes made by hand.

    python benchmarks/planned.py brain -o runs/planned
    python benchmarks/planned.py vessels -o runs/planned [--data ../shared/data/chasedb1]

The recipe is trained first; the processor time that this takes, in minutes, is what the plan is asked to keep to, and
what both took is printed. brain: the MNI152 template (4 mm) of nilearn's wheel, trained on the right half, scored on
the left. vessels: CHASE_DB1, the first of five folds of children held out. One thread.
"""

import time
from pathlib import Path

import torch
from real_scans import arguments

from nearfar.apps.medical_segmentation.common import RECIPES
from nearfar.core.recipes import read_recipe
from nearfar.medical.data.cases import Collection, make_splits
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.planning import plan
from nearfar.medical.recipe import Recipe
from nearfar.medical.samples import write_brain
from nearfar.medical.training import score_cases, train_segmenter


def trained(collection: Collection, recipe: Recipe, folder: Path, held: set[str]) -> tuple[float, str]:
    """Processor seconds of a training on all cases but `held`, and the Dice on those."""
    train, test = ([c for c in collection.cases if (c.name in held) == side] for side in (False, True))
    start = time.process_time()
    segmenter, _ = train_segmenter(collection, recipe, folder, train_cases=train, device="cpu", fresh=True)
    seconds = time.process_time() - start
    rows = score_cases(segmenter, collection, test)
    return seconds, ", ".join(f"{row['label']} {row['dice']:.4f}" for row in rows)


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    settings, folder = [f"seed={options.seed}"], options.output / options.job
    if options.job == "brain":
        collection = find_cases(write_brain(folder / "data", resolution=4))
        held, settings = {"left"}, [*settings, "roi=[32,64]", "epochs=12"]
    else:
        collection = find_cases(options.data)
        held = set(make_splits(collection.cases, 5, 0)[0]["validation"])
    seconds, scores = trained(
        collection, read_recipe(Recipe, options.job, settings, folder=RECIPES), folder / "recipe", held
    )
    print(f"recipe {options.job}: {seconds:.0f} s; Dice {scores}", flush=True)
    cases = [case for case in collection.cases if case.name not in held]
    content, reasons, _ = plan(collection, cases, minutes=seconds / 60, seed=options.seed)
    seconds, scores = trained(collection, Recipe(**content), folder / "plan", held)
    print(f"plan: {seconds:.0f} s; Dice {scores}\n{reasons['settings']}\n{reasons['epochs']}", flush=True)


if __name__ == "__main__":
    main()
