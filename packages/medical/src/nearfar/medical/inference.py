"""Segmenting images of any size by overlapping windows in bounded memory: classes are decided as the windows go by."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from scipy import ndimage
from torch import Tensor

from nearfar.core.files import temporary_folder
from nearfar.core.finite import check_finite

Predictor = Callable[[Tensor], Any]
Region = tuple[slice, ...]

LAYOUTS = ("monai", "nnunet")

WINDOW_MEMORY = 384 * 2**20


def segment(
    image: Tensor,
    predictor: Predictor,
    roi_size: Sequence[int],
    *,
    threshold: float | None = None,
    decide: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """The label map (*S) of an image (C, *S), decided region by region: no array of classes times volume is made.

    The label is the class of the largest averaged score (the lowest of equals); with `threshold`, for networks of one
    output, whether the averaged score exceeds it (0 for logits); with `decide`, what it makes of scores (K, *region).
    uint8 up to 256 classes, int32 above. `settings` are those of `window_scores`, to which the result is equal by
    construction.
    """
    labels: Tensor | None = None
    for region, scores in window_scores(image, predictor, roi_size, **settings):
        if labels is None:
            dtype = torch.uint8 if decide is None and len(scores) <= 256 else torch.int32
            labels = torch.zeros(image.shape[1:], dtype=dtype)
        if decide is not None:
            decided = decide(scores)
        else:
            decided = scores[0] > threshold if threshold is not None else scores.argmax(0)
        labels[region] = decided.to(labels.dtype).cpu()
    assert labels is not None
    return labels


@torch.no_grad()
def window_scores(
    image: Any,
    predictor: Predictor,
    roi_size: Sequence[int],
    *,
    overlap: float = 0.5,
    mode: str = "gaussian",
    layout: str = "monai",
    sigma_scale: float = 0.125,
    batch_size: int = 1,
    flips: Sequence[int] = (),
    memory: int | None = WINDOW_MEMORY,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Region, Tensor]]:
    """Averaged scores of an image (C, *S), region by region: yields (slices of S, scores (K, *region)), each once.

    Windows lie as in `monai.inferers.sliding_window_inference` (padding of images smaller than a window and Gaussian
    weights included), whose numbers these are up to the order of summation. The edges of the windows cut the image
    into cells; a cell is kept from the first window that covers it to the last, then yielded and forgotten. With the
    windows going along the longest axis, what is kept is at most the overlap times the cross-section, however long the
    image. `memory` bounds that too: cells beyond it wait in a temporary file, so the peak does not grow
    with the classes either, but for the network's own output for `batch_size` windows.

    Args:
        image: a tensor on any device, or what gives parts of one, such as `preparation.ScaledImage`; goes to `device`
            window by window.
        predictor: (B, C, *roi) to (B, K, *roi), or a list or dict whose first value is that.
        roi_size: window, one size per axis.
        overlap: share of a window that the next one covers again, 0 <= overlap < 1.
        mode: "gaussian" or "constant" weights within a window; `sigma_scale` of the former.
        layout: "monai", or "nnunet", whose windows lie at even distances and whose Gaussian is about voxel n // 2.
        flips: axes to mirror for test-time augmentation; scores are averaged over all 2^len(flips) combinations.
        memory: bytes for kept cells, 384 MB by default; None for no bound.
        progress: called with (windows done, windows in all).

    Raises:
        ValueError: for sizes, overlap, mode or flips out of range, or a predictor that changes the window's size.
        DivergedError: where the predictor's scores are not finite.
    """
    size, dims = list(image.shape[1:]), image.ndim - 1
    if len(roi_size) != dims or min(roi_size) < 1:
        raise ValueError(f"roi_size is {tuple(roi_size)}; it must be {dims} positive numbers")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; it must lie in [0, 1)")
    if mode not in ("gaussian", "constant"):
        raise ValueError(f"mode is {mode!r}; allowed are 'gaussian' and 'constant'")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed are {', '.join(LAYOUTS)}")
    if any(not 0 <= axis < dims for axis in flips):
        raise ValueError(f"flips are {tuple(flips)}; axes are 0..{dims - 1}")
    device = torch.device(device) if device is not None else image.device
    before = [max(0, r - n) // 2 for r, n in zip(roi_size, size)]
    after = [max(0, r - n) - b for r, n, b in zip(roi_size, size, before)]
    if any(before + after):
        pads = [p for b, a in zip(reversed(before), reversed(after)) for p in (b, a)]
        image = F.pad(image[(slice(None), *[slice(None)] * dims)], pads)
    place_windows = _even_starts if layout == "nnunet" else _starts
    starts = [place_windows(n, r, overlap) for n, r in zip(image.shape[1:], roi_size)]
    order = sorted(range(dims), key=lambda axis: -image.shape[axis + 1])  # the longest axis is the outermost loop
    windows = [
        tuple(combination[order.index(axis)] for axis in range(dims))
        for combination in itertools.product(*(starts[axis] for axis in order))
    ]
    cuts = [sorted({0, *s, *(a + r for a in s)}) for s, r in zip(starts, roi_size)]
    covering = [_cells(window, roi_size, cuts) for window in windows]
    uses: dict[tuple[int, ...], list[int]] = {}
    for i, cells in enumerate(covering):
        for cell in cells:
            uses.setdefault(cell, []).append(i)
    if layout == "nnunet" and mode == "gaussian":
        weights = _peak(roi_size, sigma_scale).to(device)
    else:
        weights = compute_importance_map(
            tuple(roi_size), mode=mode, sigma_scale=sigma_scale, device=device, dtype=torch.float32
        )
        weights = weights.clamp(min=max(float(weights.min()), 1e-3))

    def region(cell: tuple[int, ...]) -> Region:
        return tuple(slice(axis[i], axis[i + 1]) for axis, i in zip(cuts, cell))

    with _CellStore(memory) as store:
        for first in range(0, len(windows), batch_size):
            numbers = range(first, min(first + batch_size, len(windows)))
            places = [tuple(slice(a, a + r) for a, r in zip(windows[i], roi_size)) for i in numbers]
            batch = torch.stack([image[(slice(None), *place)] for place in places]).to(device)
            scores = check_finite(_predict(predictor, batch, flips), "the network's scores")
            if scores.shape[0] != len(batch) or scores.shape[2:] != batch.shape[2:]:
                raise ValueError(f"the predictor made {tuple(scores.shape)} of {tuple(batch.shape)}; sizes must agree")
            scores = scores.float() * weights if scores.dtype != torch.float32 else scores.mul_(weights)
            for i, place, own in zip(numbers, places, scores):
                for cell in covering[i]:
                    where = region(cell)
                    inside = tuple(slice(w.start - p.start, w.stop - p.start) for w, p in zip(where, place))
                    part = own[(slice(None), *inside)]
                    kept = store.pop(cell)
                    total = part.clone() if kept is None else kept.to(part.device).add_(part)
                    if uses[cell][-1] == i:
                        weight = _covered_weight(where, [windows[k] for k in uses[cell]], weights)
                        cropped = _crop(where, before, size)
                        if cropped is not None:
                            target, inner = cropped
                            yield target, (total / weight)[(slice(None), *inner)]
                    else:
                        store.put(cell, total, next(k for k in uses[cell] if k > i))
                    del total, kept, part
            del scores, batch, own
            if progress is not None:
                progress(numbers[-1] + 1, len(windows))


@torch.no_grad()
def segment_item(
    item: dict[str, Any], network: torch.nn.Module, inferer: Any, postprocessing: Callable[[Any], Any], device: Any
) -> Any:
    """One item of a MONAI data set through a bundle's inferer and postprocessing; what `run` of our bundles calls."""
    scores = inferer(item["image"][None].to(device), network.eval())[0].cpu()
    return postprocessing({**item, "pred": scores})


def _starts(size: int, roi: int, overlap: float) -> list[int]:
    step = roi if roi == size else max(1, int(roi * (1 - overlap)))
    return sorted({min(a, size - roi) for a in range(0, size - roi + step, step)})


def _even_starts(size: int, roi: int, overlap: float) -> list[int]:
    number = int(np.ceil((size - roi) / (roi * (1 - overlap)))) + 1
    return sorted({int(np.round((size - roi) / max(1, number - 1) * i)) for i in range(number)})


def _peak(roi: Sequence[int], sigma_scale: float) -> Tensor:
    """A Gaussian about voxel n // 2 of each axis, cut off at four deviations, the least value beyond that."""
    weights = torch.ones(())
    for n in roi:
        line = np.zeros(n)
        line[n // 2] = 1
        line = ndimage.gaussian_filter1d(line, n * sigma_scale, mode="constant")
        weights = weights[..., None] * torch.from_numpy(line / line.max())
    weights = (10 * weights).half()  # the least value is that of this type, as there
    return torch.where(weights > 0, weights, weights[weights > 0].min()).float()


def _cells(window: Sequence[int], roi: Sequence[int], cuts: Sequence[list[int]]) -> list[tuple[int, ...]]:
    spans = [range(axis.index(a), axis.index(a + r)) for axis, a, r in zip(cuts, window, roi)]
    return list(itertools.product(*spans))


def _covered_weight(where: Region, windows: Sequence[Sequence[int]], weights: Tensor) -> Tensor:
    inside = [tuple(slice(w.start - a, w.stop - a) for w, a in zip(where, window)) for window in windows]
    return torch.stack([weights[i] for i in inside]).sum(0)


def _crop(where: Region, before: Sequence[int], size: Sequence[int]) -> tuple[Region, Region] | None:
    """(slices in the unpadded image, slices of the cell), None where the cell is padding alone."""
    target, inner = [], []
    for w, b, n in zip(where, before, size):
        start, stop = max(w.start - b, 0), min(w.stop - b, n)
        if start >= stop:
            return None
        target.append(slice(start, stop))
        inner.append(slice(start + b - w.start, stop + b - w.start))
    return tuple(target), tuple(inner)


def _predict(predictor: Predictor, batch: Tensor, flips: Sequence[int]) -> Tensor:
    combinations = [c for k in range(len(flips) + 1) for c in itertools.combinations([a + 2 for a in flips], k)]
    total: Tensor | None = None
    for axes in combinations:
        scores = predictor(batch.flip(axes) if axes else batch)
        while not isinstance(scores, Tensor):
            scores = next(iter(scores.values())) if isinstance(scores, dict) else scores[0]
        scores = scores.flip(axes) if axes else scores
        total = scores if total is None else total.add_(scores)
    assert total is not None
    total = total.as_tensor() if hasattr(total, "as_tensor") else total
    return total / len(combinations) if len(combinations) > 1 else total


class _CellStore:
    """Partial sums by cell; those needed last go to a temporary file where the others would pass `memory` bytes."""

    def __init__(self, memory: int | None) -> None:
        self.memory = memory
        self.kept: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        self.bytes = 0
        self.stack = ExitStack()
        self.folder: Path | None = None
        self.files: dict[tuple[int, ...], tuple[Path, torch.Size]] = {}

    def __enter__(self) -> "_CellStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def pop(self, cell: tuple[int, ...]) -> Tensor | None:
        if cell in self.files:
            path, shape = self.files.pop(cell)
            values = torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(shape)
            path.unlink()
            return values
        if cell not in self.kept:
            return None
        values = self.kept.pop(cell)[1]
        self.bytes -= values.nbytes
        return values

    def put(self, cell: tuple[int, ...], values: Tensor, next_use: int) -> None:
        self.kept[cell] = (next_use, values)
        self.bytes += values.nbytes
        while self.memory is not None and self.bytes > self.memory:
            late = max(self.kept, key=lambda c: self.kept[c][0])
            out = self.pop(late)
            assert out is not None
            if self.folder is None:
                self.folder = self.stack.enter_context(temporary_folder())
            path = self.folder / "-".join(map(str, late))
            out.contiguous().cpu().numpy().tofile(path)
            self.files[late] = (path, out.shape)
