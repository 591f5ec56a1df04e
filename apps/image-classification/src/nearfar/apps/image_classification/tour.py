"""The vision chapter of `nearfar tour`."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from nearfar.core.report import Report
from nearfar.vision.classification.comparison import PLOT, compare
from nearfar.vision.classification.training import Recipe
from nearfar.vision.data.images import Pictures, split_pictures

MODELS = ["small-nearfar_convnext_atto", "small-attnet_xxs", "small-hornet_tiny_7x7"]
"""Reduced variants that learn in seconds."""


def digits() -> Pictures:
    """The 1797 handwritten digits that come with scikit-learn, enlarged to 32 x 32."""
    data = load_digits()
    pictures = [
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        for image in data.images
    ]
    names = [f"digit {i}" for i in range(len(pictures))]
    return Pictures(names, data.target.tolist(), [str(i) for i in range(10)], lambda i: pictures[i])


def chapter(report: Report, folder: Path) -> None:
    """Tell handwritten digits apart with small networks, on pictures that come with scikit-learn."""
    every = digits()
    learn, hold = split_pictures(every, 0.3, 0)
    recipe = Recipe(
        size=32, epochs=5, batch_size=64, learning_rate=2e-3, warmup_epochs=1, crop_scale=0.7, smoothing=0.0
    )
    rows = compare(MODELS, every.subset(learn), every.subset(hold), recipe, folder)
    report.section("Image classification: handwritten digits")
    report.text(
        f"{len(learn)} digits to learn from, five epochs from nothing, three reduced networks; half of the other "
        f"{len(hold)} choose the epoch and half score."
    )
    report.table(rows)
    report.figure(folder / "plot.png", PLOT)
