"""The medical chapter of `nearfar tour`."""

from pathlib import Path

import numpy as np

from nearfar.apps.medical_segmentation import pages
from nearfar.core.report import Report
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.metrics import score_case
from nearfar.medical.recipe import Recipe
from nearfar.medical.samples import threshold_baseline, write_brain
from nearfar.medical.training import train_segmenter
from nearfar.ops.graph.dense_crf import DenseCRF


def chapter(report: Report, folder: Path) -> None:
    """Train a small network on one half of the MNI152 brain, segment the other half, compare."""
    collection = find_cases(write_brain(folder / "data", resolution=4))
    left, right = collection.cases
    recipe = Recipe(
        settings={"features": [16, 16, 32, 32, 64, 16], "norm": ["group", {"num_groups": 4}]},
        roi=(32, 64),
        epochs=12,
        patches_per_epoch=240,
        batch_size=8,
        learning_rate=5e-3,
        foreground=0.3,
    )
    segmenter, _ = train_segmenter(collection, recipe, folder / "model", train_cases=[right], device="cpu")
    (scan, truth), (other, other_truth) = collection.read(left), collection.read(right)
    found = segmenter(scan)
    results = {
        "nearest mean intensity": threshold_baseline(scan.image[0], other.image[0], other_truth),
        "U-Net on slices": found,
        "U-Net, then CRF": segmenter(scan, crf=DenseCRF(3, 0.5, 4.0, 0.5, 12.0, 10.0)),
    }
    rows = []
    for name, labels in results.items():
        scores = score_case(labels, truth, collection.labels, scan.spacing)
        row = {"method": name} | {f"Dice {r['label']}": r["dice"] for r in scores}
        rows.append(row | {"HD95 mm": float(np.mean([r["hd95"] for r in scores]))})
    report.section("Medical segmentation: grey and white matter")
    report.text(
        "The MNI152 template, an average T1 scan of 152 people, as nilearn carries it. A network is trained on "
        "slices of the right half and segments the left: mirror-like, so easier than another person's brain. The "
        "tissue maps follow the template's intensity closely, so intensity alone is a strong baseline here."
    )
    report.table(rows)
    report.figure(pages.png(pages.overlay(scan, found)), "The left half with the network's grey and white matter.")
    report.html(pages.STYLE + pages.SCRIPT)
    report.html(pages.viewer(scan, found, "All slices of prediction and truth", truth, collection.labels))
