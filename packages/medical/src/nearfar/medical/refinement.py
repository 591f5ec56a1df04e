"""The CRF on scans: within a memory budget by slabs, and the search for its settings on validation cases."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.core.memory import refuse_memory
from nearfar.medical.metrics import score_case, summarize
from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_softmax


def crf_bytes(voxels: int, labels: int, channels: int, axes: int) -> int:
    """Memory that the CRF takes for so many voxels at most, reached on images of pure noise; scans take a third."""
    return voxels * (250 * (axes + channels + 1) + 60 * labels)


@torch.no_grad()
def refine(
    probabilities: Tensor | np.ndarray,
    image: Tensor,
    crf: DenseCRF,
    spacing: Sequence[float] | None = None,
    *,
    memory: int | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """The label map (*S) after the CRF on probabilities (K, *S), which may be mapped from a file, and image (C, *S).

    The CRF joins every voxel with every other, so it wants all of them in memory. Where `crf_bytes` says that this
    would pass `memory` bytes, the image is cut along its longest axis into slabs that fit, each refined with a margin
    of twice the largest standard deviation, or a quarter of the slab where that is less: near the whole, not equal.

    Raises:
        UserError: for a budget that does not hold a single slice.
    """
    labels, *size = probabilities.shape
    axis = max(range(len(size)), key=size.__getitem__)
    depth = size[axis]
    if memory is not None:
        plane = crf_bytes(math.prod(size) // size[axis], labels, len(image), len(size))
        depth = min(depth, memory // plane)
        if depth < 1:
            shares = {f"the CRF on one slice of {'x'.join(map(str, size))}": plane}
            raise refuse_memory(memory, shares)
    widest = np.max([np.max(crf.spatial_std), np.max(crf.bilateral_std)]) / (spacing[axis] if spacing else 1)
    margin = 0 if depth == size[axis] else min(math.ceil(2 * widest), depth // 4)
    result = np.zeros(size, np.uint8 if labels <= 256 else np.int32)
    for start in range(0, size[axis], depth - 2 * margin):
        stop = min(start + depth - 2 * margin, size[axis])
        low, high = max(start - margin, 0), min(stop + margin, size[axis])
        where = (slice(None), *[slice(low, high) if a == axis else slice(None) for a in range(len(size))])
        part = torch.from_numpy(np.array(probabilities[where], np.float32))[None].to(device)
        q = crf.to(device)(unary_from_softmax(part), image[where][None].float().to(device), spacing)[0]
        decided = q.argmax(0).cpu().numpy()
        keep = tuple(slice(start - low, stop - low) if a == axis else slice(None) for a in range(len(size)))
        result[tuple(slice(start, stop) if a == axis else slice(None) for a in range(len(size)))] = decided[keep]
    return result


def to_bytes(image: Tensor) -> Tensor:
    """Each channel of (C, *S) stretched to 0..255, the scale of the CRF's colour deviation."""
    flat = image.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    view = (-1, *[1] * (image.ndim - 1))
    return 255 * (image - low.view(view)) / (high - low).clamp_min(1e-6).view(view)


def crf_grid(unit: float) -> list[dict[str, Any]]:
    """The 48 settings that `search_crf` goes over by default; `unit`: the smallest voxel side, in mm."""
    names = ("spatial_weight", "spatial_std", "bilateral_weight", "bilateral_std", "color_std")
    values = ((0.5, 2.0), (unit, 3 * unit), (0.5, 2.0), (3 * unit, 15 * unit), (5.0, 15.0, 40.0))
    return [{"iterations": 5, **dict(zip(names, chosen))} for chosen in itertools.product(*values)]


def search_crf(
    items: Sequence[tuple[Tensor, Tensor, Tensor]],
    grid: Iterable[Mapping[str, Any]],
    spacings: Sequence[Sequence[float] | None] | None = None,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The CRF settings of `grid` with the best mean Dice over (probabilities (K, *S), image (C, *S), labels (*S)).

    Returns the best settings (constructor arguments of `DenseCRF`; None where the best is no CRF) and a row of scores
    for each, the first without a CRF. Use validation cases: settings chosen on the test set are not honest.
    """
    names = {k: str(k) for k in range(1, len(items[0][0]))}

    def mean_dice(label_maps: Sequence[np.ndarray]) -> float:
        rows = [
            {"case": i, "label": r["label"], "dice": r["dice"]}
            for i, (found, (_, _, truth)) in enumerate(zip(label_maps, items))
            for r in score_case(found, truth.numpy(), names)
        ]
        return summarize(rows)[-1]["dice"]

    rows: list[dict[str, Any]] = [{"settings": None, "dice": mean_dice([p.argmax(0).numpy() for p, _, _ in items])}]
    for settings in grid:
        crf = DenseCRF(**settings)
        maps = [refine(p, i, crf, s) for (p, i, _), s in zip(items, spacings or [None] * len(items))]
        rows.append({"settings": dict(settings), "dice": mean_dice(maps)})
    return max(rows, key=lambda row: row["dice"])["settings"], rows
