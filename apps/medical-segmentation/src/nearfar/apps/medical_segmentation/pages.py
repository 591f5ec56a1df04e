"""Overlay pictures and the evaluation's page, with a slice viewer that needs no server."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from nearfar.core.files import atomic_path
from nearfar.core.plots import COLORS
from nearfar.core.report import Report
from nearfar.medical.data.scans import Scan


def overlay(scan: Scan, labels: np.ndarray, index: int | None = None) -> np.ndarray:
    """RGB bytes of a slice with the labels in colour; axial, upright, by default where most is labelled."""
    image, labels = scan.canonical(), scan.to_canonical(labels)
    if image.ndim == 4:
        index = int((labels > 0).sum((0, 1)).argmax()) if index is None else index
        image = np.flip(image[..., index].swapaxes(1, 2), 1)
        labels = np.flip(labels[..., index].T, 0)
    gray = image[:3] if len(image) >= 3 and scan.affine is None else np.repeat(image[:1], 3, 0)
    low, high = np.percentile(gray, [0.5, 99.5])
    shown = np.clip((np.moveaxis(gray, 0, -1) - low) / max(high - low, 1e-6), 0, 1)
    for i, value in enumerate(v for v in np.unique(labels) if v):
        mask = labels == value
        shown[mask] = 0.55 * shown[mask] + 0.45 * np.array(to_rgb(COLORS[i % len(COLORS)]))
    return (255 * shown).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of RGB pixels, enlarged to at least 320 wide."""
    picture = Image.fromarray(pixels)
    factor = max(1, -(-320 // picture.width))
    buffer = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_overlay(path: Path, scan: Scan, labels: np.ndarray) -> None:
    """Write the overlay of the slice with most labels."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(overlay(scan, labels)))


def viewer(scan: Scan, labels: np.ndarray, title: str, slices: int = 24) -> str:
    """Markup of a slider over axial slices with overlay; everything is in the page."""
    depth = scan.canonical().shape[-1] if scan.affine is not None else 1
    chosen = np.unique(np.linspace(0, depth - 1, min(slices, depth)).round().astype(int)) if depth > 1 else [None]
    sources = ["data:image/png;base64," + base64.b64encode(png(overlay(scan, labels, i))).decode() for i in chosen]
    name = "v" + str(abs(hash(title)))
    middle = len(sources) // 2
    return (
        f'<figure><img id="{name}" src="{sources[middle]}" alt="{escape(title, quote=True)}"><br>'
        f'<input type="range" min="0" max="{len(sources) - 1}" value="{middle}" aria-label="slice" '
        f"oninput='document.getElementById(\"{name}\").src={json.dumps(sources)}[this.value]'>"
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def evaluation_page(
    path: Path,
    summary: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    worst: Sequence[tuple[str, Scan, np.ndarray, np.ndarray]],
    convention: str,
) -> Path:
    """Write the page of an evaluation: summary with intervals, worst cases to look through, every case."""
    report = Report(
        "Segmentation scores",
        f"Convention: {convention}. Intervals are 95 % bootstrap intervals over cases. A missed structure counts as "
        "the worst value under the convention `nearfar`; others say what they do in `evaluate --help`.",
    )
    report.section("Summary").table(summary)
    if worst:
        report.section("Worst cases")
    for name, scan, prediction, truth in worst:
        report.html(viewer(scan, prediction, f"{name}: prediction"))
        report.html(viewer(scan, truth, f"{name}: truth"))
    report.section("Every case").table(rows)
    return report.write(path)
