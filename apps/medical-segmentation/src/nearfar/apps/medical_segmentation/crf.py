"""`nearfar medical-segmentation search` and `refine`: settings of the CRF, and the CRF on anybody's probabilities."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from nearfar.apps.medical_segmentation.common import Data
from nearfar.core.cli.console import console, table, track
from nearfar.core.cli.options import Device, Memory
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv
from nearfar.core.memory import parse_memory
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.data.scans import read_scan, write_labels
from nearfar.medical.refinement import refine as refine_probabilities
from nearfar.medical.refinement import to_bytes
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import tune_crf
from nearfar.ops.graph.dense_crf import DenseCRF

SpatialWeight = Annotated[float, typer.Option(help="Weight of the CRF's spatial kernel.")]
SpatialStd = Annotated[float, typer.Option(help="Its deviation, in mm (pixels for pictures).")]
BilateralWeight = Annotated[float, typer.Option(help="Weight of the kernel over position and intensity.")]
BilateralStd = Annotated[float, typer.Option(help="Its deviation in position.")]
ColorStd = Annotated[float, typer.Option(help="Its deviation in intensity, of 0..255.")]


def search(
    data: Data,
    model: Annotated[Path, typer.Option(help="Folder that `train` wrote; the settings found go into it.")],
    fold: Annotated[int, typer.Option(help="The fold of its splits.json that was held out.")] = 0,
    device: Device = "auto",
) -> None:
    """Search the CRF's settings on the held-out fold of a model; `predict --crf` then uses them.

    Goes over 48 settings and keeps the best mean Dice, which is that of no CRF where none helps. Scores of the same
    cases are optimistic afterwards: report those of others.
    """
    segmenter, collection = Segmenter.load(model), find_cases(data)
    try:
        held_out = json.loads((model / "splits.json").read_text(encoding="utf-8"))[fold]["validation"]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{model}: has no fold {fold} in its splits.json ({error})") from error
    cases = track([case for case in collection.cases if case.name in held_out], "segmenting")
    try:
        rows, number = tune_crf(segmenter, collection, cases, device, lambda grid: track(grid, "searching", len(grid)))
    except UserError as error:
        raise UserError(f"{data}: {error}; it needs those of fold {fold} of {model}/splits.json") from error
    segmenter.save(model)
    rows = [{"Dice": r["dice"], **(r["settings"] or {"iterations": "no CRF"})} for r in rows]
    write_csv(model / "crf.csv", rows)
    best = sorted(rows[1:], key=lambda row: -row["Dice"])[:5]
    console.print(table([{**dict.fromkeys(best[0], "-"), **row} for row in (rows[0], *best)], f"{number} cases"))
    console.print(f"best: {segmenter.crf or 'no CRF'}", soft_wrap=True, highlight=False)


def refine(
    probabilities: Annotated[Path, typer.Argument(help=".npy of (classes, *grid) probabilities.")],
    image: Annotated[Path, typer.Argument(help="The image they belong to.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Label map to write.")],
    iterations: Annotated[int, typer.Option(help="Mean-field iterations.")] = 10,
    spatial_weight: SpatialWeight = 3.0,
    spatial_std: SpatialStd = 1.0,
    bilateral_weight: BilateralWeight = 4.0,
    bilateral_std: BilateralStd = 67.0,
    color_std: ColorStd = 3.0,
    exact: Annotated[bool, typer.Option("--exact", help="Exact sums instead of the lattice; small grids.")] = False,
    memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Run the fully connected CRF on anybody's probabilities and write the label map on the image's grid.

    Pictures are used as they are (0..255); volumes are stretched to 0..255 first. --memory counts what grows with
    classes and volume.
    """
    scan = read_scan(image)
    try:
        p = np.load(probabilities, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{probabilities}: cannot be read as an array of numbers ({error})") from error
    if p.ndim != len(scan.shape) + 1 or p.shape[1:] != scan.shape:
        raise UserError(f"{probabilities}: shape {p.shape} is not (classes, {', '.join(map(str, scan.shape))})")
    before = np.zeros(scan.shape, np.int32)
    for i in range(scan.shape[0]):  # plane by plane: the file may be larger than the memory
        plane = np.asarray(p[:, i], np.float32)
        if not np.isfinite(plane).all() or plane.min() < 0 or np.abs(plane.sum(0) - 1).max() > 1e-2:
            raise UserError(
                f"{probabilities}: holds no probabilities (they must be positive and sum to 1 at each voxel)"
            )
        before[i] = plane.argmax(0)
    pixels = torch.from_numpy(np.ascontiguousarray(scan.image))
    pixels = pixels if scan.affine is None else to_bytes(pixels)
    try:
        crf = DenseCRF(
            iterations, spatial_weight, spatial_std, bilateral_weight, bilateral_std, color_std,
            mode="exact" if exact else "lattice",
        )  # fmt: skip
        budget = None if memory is None else parse_memory(memory)
        labels = refine_probabilities(p, pixels, crf, scan.spacing, memory=budget, device=device)
    except ValueError as error:
        raise UserError(f"refine: {error}") from error
    write_labels(output, labels, scan)
    changed = float((labels != before).mean())
    console.print(f"{output}: {changed:.2%} of the voxels changed their label", soft_wrap=True, highlight=False)
