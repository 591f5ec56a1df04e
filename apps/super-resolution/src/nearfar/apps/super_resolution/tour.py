"""The super-resolution chapter of `nearfar tour`."""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_image

from nearfar.apps.super_resolution.cli import WEIGHTS
from nearfar.core.plots import new_figure, style
from nearfar.core.report import Report
from nearfar.vision.restoration.evaluation import bicubic
from nearfar.vision.restoration.metrics import score
from nearfar.vision.restoration.networks import load_restorer
from nearfar.vision.restoration.pairs import reduced
from nearfar.vision.restoration.tiles import upscale


def chapter(report: Report, folder: Path) -> None:
    """Enlarge a photograph twice, by the small network that comes along and by bicubic resizing."""
    model = load_restorer(WEIGHTS / "x2")
    high = torch.from_numpy(np.ascontiguousarray(load_sample_image("flower.jpg")[100:292, 200:456])).permute(2, 0, 1)
    low = reduced(high, 2)
    found = {"bicubic": bicubic(low, 2), "CATANet, small": upscale(model, low.float() / 255)}
    rows = []
    for name, picture in found.items():
        result = score(picture, high.float() / 255, 2)
        rows.append({"by": name, "PSNR (dB)": result.psnr, "SSIM": result.ssim})
    with style():
        figure = new_figure(9, 2.6)
        shown = {"original": high.float() / 255, **found}
        for axes, (name, picture) in zip(figure.subplots(1, 3), shown.items(), strict=True):
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0))
            axes.set_title(name)
            axes.set_axis_off()
    report.section("Super-resolution")
    report.text(
        "A photograph that scikit-learn carries is reduced to half its sides and enlarged again. It is one of three "
        "that chose the epoch of the network's training; it was not learned from."
    )
    report.figure(figure, "The original, and what half its sides are enlarged to")
    report.table(rows, "Luma, border cut off, 8 bits, as in the field's tables")
