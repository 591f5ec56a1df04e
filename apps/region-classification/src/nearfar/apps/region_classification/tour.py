"""The chapter of `nearfar tour` on regions."""

from pathlib import Path

import torch

from nearfar.core.plots import new_figure, style
from nearfar.core.report import Report
from nearfar.vision.classification.regions import answers, score_regions, train_regions
from nearfar.vision.data.plates import AMBIGUOUS, CLASSES, plates
from nearfar.vision.models.rvernet import RveRNet, Single


def small_backbone() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32 * 4 * 8, 24),
    )  # fmt: skip


def chapter(report: Report, folder: Path) -> None:
    """Name a digit by what stands beside it, on pictures made of scikit-learn's."""
    (x, masks, y), (test_x, test_masks, truth) = plates(600, 0), plates(300, 1)
    views, test_views = ((p * m, p * (1 - m)) for p, m in ((x, masks), (test_x, test_masks)))
    rows = []
    for name, model in (
        ("the region alone", Single(small_backbone(), 4)),
        ("region and context", RveRNet(small_backbone(), small_backbone(), 4, 32)),
    ):
        train_regions(model, views, y, epochs=8, learning_rate=3e-3, flip=0.0)
        scores = score_regions(answers(model, test_views), truth, AMBIGUOUS)
        rows.append({"model": name, **scores})
    report.section("Regions: what context is good for")
    report.text(
        "Two handwritten digits a picture, on a piece of a photograph; the left one is to be named. An 8 beside a 1 "
        "and an 8 beside a 4 are two classes, which the 8 alone cannot tell apart."
    )
    with style():
        figure = new_figure(6, 1.5)
        for i, axes in enumerate(figure.subplots(1, 4)):
            first = int((truth == i).nonzero()[0])
            axes.imshow(test_views[0][first].movedim(0, -1) + 0.5 * test_views[1][first].movedim(0, -1))
            axes.set_title(CLASSES[i], fontsize=8)
            axes.axis("off")
    report.figure(figure, "One of each class; what is not the region is shown at half its brightness.")
    report.table(rows, "The look-alikes are in the columns `ambiguous`; half is chance there.")
