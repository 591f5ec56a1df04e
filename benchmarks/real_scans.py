"""Real scans: brain tissue and retinal vessels, trained for minutes, against baselines; what the CRF changes.

    python benchmarks/real_scans.py brain -o runs/brain
    python benchmarks/real_scans.py vessels -o runs/vessels [--data ../shared/data/chasedb1]

brain: the MNI152 template (2 mm) of nilearn's wheel. Trained on the right half, scored on the left; nearest mean
intensity and the CRF are fitted on the right half too. vessels: CHASE_DB1, 8 children to train, 3 to set the CRF, 3 to
test, both eyes of a child on one side; the sigmas and threshold of the Frangi filter are fitted on the training
pictures. A finished training in the folder is not done again.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import frangi

from nearfar.apps.medical_segmentation.common import RECIPES
from nearfar.core.recipes import read_recipe
from nearfar.medical.data.cases import Case, Collection, make_splits
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.data.scans import Scan
from nearfar.medical.recipe import Recipe
from nearfar.medical.refinement import search_crf
from nearfar.medical.samples import threshold_baseline, write_brain
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import crf_items, score_cases, train_segmenter
from nearfar.ops.graph.dense_crf import DenseCRF

SIGMAS = ((2, 3, 4, 5), (3, 4, 5, 6), (4, 6), (5,))


def nearest_mean(collection: Collection, cases: Sequence[Case]) -> Callable[[Scan], np.ndarray]:
    image, labels = (np.concatenate(part) for part in zip(*((s.image[0], t) for s, t in map(collection.read, cases))))
    return lambda scan: threshold_baseline(scan.image[0], image, labels)


def vesselness(scan: Scan, sigmas: Sequence[float]) -> np.ndarray:
    """Frangi's filter on the green channel, without the rim of the field of view."""
    inside = ndimage.binary_erosion(scan.image.sum(0) > 60, iterations=12)
    return frangi(scan.image[1], sigmas=sigmas, black_ridges=True) * inside


def frangi_baseline(collection: Collection, cases: Sequence[Case]) -> Callable[[Scan], np.ndarray]:
    best = (0.0, SIGMAS[0], 0.0)
    read = [collection.read(case) for case in cases]
    for sigmas in SIGMAS:
        maps = [vesselness(scan, sigmas) for scan, _ in read]
        values = np.quantile(np.stack([m.ravel()[::7] for m in maps]), np.linspace(0.8, 0.98, 37))
        for threshold in values:
            found = [m > threshold for m in maps]
            scores = [2 * (f & (t > 0)).sum() / (f.sum() + t.sum()) for f, (_, t) in zip(found, read)]
            best = max(best, (float(np.mean(scores)), sigmas, float(threshold)))
    print(f"Frangi: sigmas {best[1]}, threshold {best[2]:.3g}, Dice {best[0]:.3f} on the training pictures")
    return lambda scan: (vesselness(scan, best[1]) > best[2]).astype(np.int32)


def tuned_crf(segmenter: Segmenter, collection: Collection, cases: Sequence[Case]) -> dict | None:
    items, spacings = crf_items(segmenter, collection, cases)
    names = ("spatial_weight", "spatial_std", "bilateral_weight", "bilateral_std", "color_std")
    unit = min(spacings[0])
    values = ((0.3, 1.0), (unit,), (0.3, 1.0), (5 * unit,), (5.0, 15.0))
    grid = [{"iterations": 5, **dict(zip(names, v))} for v in itertools.product(*values)]
    _, rows = search_crf(items, grid, spacings)
    return max(rows[1:], key=lambda row: row["dice"])["settings"]  # the best CRF, also where none is better


def arguments(text: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("brain", "vessels"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/chasedb1"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments(__doc__)
    recipe = read_recipe(Recipe, options.job, [f"seed={options.seed}"], folder=RECIPES)
    if options.job == "brain":
        collection = find_cases(write_brain(options.output / "data", resolution=2))
        test, train = [[case] for case in collection.cases]
        tune, name, fit = train, "nearest mean intensity", nearest_mean
    else:
        collection = find_cases(options.data)
        folds = [set(split["validation"]) for split in make_splits(collection.cases, 5, 0)]
        test, tune = ([case for case in collection.cases if case.name in fold] for fold in folds[:2])
        train = [case for case in collection.cases if case not in (*test, *tune)]
        name, fit = "Frangi filter", frangi_baseline
    start = time.perf_counter()
    segmenter, _ = train_segmenter(collection, recipe, options.output / "model", train_cases=train, device="cpu")
    seconds = time.perf_counter() - start
    print(
        f"{len(train)} training, {len(test)} test images; training {seconds:.0f} s, {torch.get_num_threads()} threads"
    )
    settings = tuned_crf(segmenter, collection, tune)
    print("CRF:", settings)
    crf = DenseCRF(**settings)
    methods = {name: fit(collection, train), "network": segmenter, "network, CRF": lambda s: segmenter(s, crf=crf)}
    for method, run in methods.items():
        rows = score_cases(run, collection, test)
        scores = (f"{r['label']} {r['dice']:.3f} ({r['dice_low']:.3f} to {r['dice_high']:.3f})" for r in rows)
        print(f"{method:>22}: Dice " + ", ".join(scores), flush=True)


if __name__ == "__main__":
    main()
