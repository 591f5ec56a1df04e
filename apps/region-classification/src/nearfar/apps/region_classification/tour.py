"""The chapter of `nearfar tour` on regions."""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from nearfar.core.report import Report
from nearfar.vision.classification.regions import answers, score_regions, train_regions
from nearfar.vision.models.rvernet import RveRNet, Single


def plates(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scikit-learn's digits, two a picture: views of the left one and of its surroundings (B, 3, 16, 32), classes.

    Classes 0 and 1 are an 8 beside a 1 and beside a 4; 2 and 3 are a 0 and a 6 beside either. Even and odd seeds share
    no digit.
    """
    data, generator = load_digits(), np.random.default_rng(seed)
    pictures, labels = np.zeros((number, 3, 16, 32), np.float32), generator.integers(4, size=number)
    for i, label in enumerate(labels):
        beside = (1, 4)[label] if label < 2 else generator.choice([1, 4])
        for digit, left in (((8, 8, 0, 6)[label], 0), (beside, 16)):
            chosen = generator.choice(np.flatnonzero(data.target == digit)[seed % 2 :: 2])
            pictures[i, :, :, left : left + 16] = np.kron(data.images[chosen] / 16, np.ones((2, 2)))
    x = torch.from_numpy(pictures)
    inside = (torch.arange(32) < 16).float()
    return x * inside, x * (1 - inside), torch.from_numpy(labels)


def small_backbone() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32 * 4 * 8, 24),
    )  # fmt: skip


def chapter(report: Report, folder: Path) -> None:
    """Name a digit by what stands beside it, on pictures made of scikit-learn's."""
    roi, extra, y = plates(600, 0)
    test_roi, test_extra, truth = plates(300, 1)
    rows = []
    for name, model in (
        ("the region alone", Single(small_backbone(), 4)),
        ("region and context", RveRNet(small_backbone(), small_backbone(), 4, 32)),
    ):
        train_regions(model, (roi, extra), y, epochs=8, learning_rate=3e-3, flip=0.0)
        scores = score_regions(answers(model, (test_roi, test_extra)), truth, (0, 1))
        rows.append({"model": name, **scores})
    report.section("Regions: what context is good for")
    report.text(
        "Two handwritten digits a picture, the left one is to be named. An 8 beside a 1 and an 8 beside a 4 are two "
        "classes, which the 8 alone cannot tell apart."
    )
    report.table(rows, "The look-alikes are in the columns `ambiguous`; half is chance there.")
