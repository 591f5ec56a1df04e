"""The vision chapter of `nearfar tour`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from nearfar.apps.image_classification.explain import overlays
from nearfar.core.report import Report
from nearfar.vision.classification.classifier import Classifier, evaluation_transform
from nearfar.vision.classification.comparison import PLOT, compare
from nearfar.vision.classification.training import Recipe
from nearfar.vision.data.images import Pictures, split_pictures
from nearfar.vision.explain.checks import judge
from nearfar.vision.explain.methods import explain

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
    explanations(report, Classifier.load(folder / MODELS[0]), every.subset(hold))


def explanations(report: Report, trained: Classifier, pictures: Pictures) -> None:
    """Where the first network's answers come from, and whether the maps of it say more than noise and edges do."""
    seen = pictures.subset(range(4), evaluation_transform(trained.size, trained.crop_pct, trained.crop_mode))
    x = torch.stack([seen[i][0] for i in range(len(seen))])
    found = [explain(trained.model, x, method=name) for name in ("normgrad", "grad_cam", "gradient", "relevance")]
    verdicts = [judge(trained.model, x, e.maps, e.target, steps=16, number=3) for e in found]
    rows = [
        {
            "method": e.method, "beats noise": f"{int(v.beats_random.sum())} of {len(x)}",
            "beats edges": f"{int(v.beats_edges.sum())} of {len(x)}",
        }
        for e, v in zip(found, verdicts, strict=True)
    ]  # fmt: skip
    report.section("Where its answers come from")
    report.text(
        f"{trained.name} on four digits. A map is held against three maps of smooth noise and the picture's own "
        "edges, by how fast the answer comes and goes with the pixels that it ranks first."
    )
    panels = [
        (e.method, e.maps[0], {"score": float(v.score[0]), "noise": float(v.random[0]), "edges": float(v.edges[0])})
        for e, v in zip(found, verdicts, strict=True)
    ]
    report.figure(
        overlays(x[0], panels), "The first digit; score of the map, in brackets of the best noise and of edges."
    )
    report.table(rows)
