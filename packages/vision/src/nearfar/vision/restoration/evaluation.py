"""Scores of super-resolution networks on test sets, as the field's tables have them."""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.vision.restoration.metrics import Protocol, Score, luma, perceptual, psnr, score, ssim
from nearfar.vision.restoration.pairs import crop_to, find_pairs, is_grey, read_rgb, reduced
from nearfar.vision.restoration.resize import imresize
from nearfar.vision.restoration.restorer import Restorer
from nearfar.vision.restoration.tiles import Tiling, upscale


def bicubic(low: Tensor, scale: int) -> Tensor:
    """A picture (3, H, W), uint8, enlarged as MATLAB's `imresize` does, in [0, 1]."""
    return imresize(low, scale, mode="uint8").float() / 255


def bicubic_row(high: Tensor, scale: int) -> Score:
    """The score of a high-resolution picture (3 or 1, H, W), uint8, in the tables' row of bicubic resizing.

    Those rows came before networks for colours: the luma alone, rounded to 8 bits, is reduced and enlarged without
    rounding in between. The channel of a grey picture counts as it is, in 0 .. 255 and not in luma's narrower range.
    """
    grey = high.double() if len(high) == 1 else (255 * luma(high.double() / 255)).round()
    found = imresize(imresize(grey / 255, 1 / scale), float(scale))
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    pair = (found * 255).round().clamp(0, 255)[inside], grey[inside]
    return Score(psnr(*pair), ssim(*pair))


def evaluate(
    model: Restorer | None,
    folder: str | Path,
    scale: int,
    *,
    colour: Literal["y", "rgb"] = "y",
    protocol: Protocol = "8bit",
    tiling: Tiling | None = None,
    ensemble: bool = False,
    metrics: Sequence[str] = (),
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """One row a picture of a test set (see `find_pairs`): PSNR, SSIM, seconds; without a model, of bicubic resizing.

    `metrics`: more of them, see `perceptual`; they are those of the RGB pictures.

    Bicubic resizing is scored on luma as the tables' rows are, see `bicubic_row`; in RGB as a network would be.

    The border of `scale` pixels does not count, and a picture is first cut to a multiple of the scale. Low-resolution
    pictures that the set does not hold are made as MATLAB makes them; the row says so.

    Raises UserError for a pair whose sizes do not fit the scale, or a model of another scale.
    """
    if model is not None and model.scale != scale:
        raise UserError(f"the model enlarges {model.scale} times; the pictures are to be enlarged {scale} times")
    like = "cpu" if model is None else next(model.parameters()).device
    others = {name: perceptual(name, like) for name in metrics}
    rows: list[dict[str, Any]] = []
    for path, small in track(find_pairs(folder, scale)):
        high = crop_to(read_rgb(path), scale)
        low = reduced(high, scale) if small is None else read_rgb(small)
        if tuple(low.shape[1:]) != tuple(side // scale for side in high.shape[1:]):
            raise UserError(
                f"{small}: is {low.shape[2]} x {low.shape[1]}; at scale {scale} of {path.name} it should be "
                f"{high.shape[2] // scale} x {high.shape[1] // scale}"
            )
        began = time.perf_counter()
        if model is None:
            found = bicubic(low, scale)
        else:
            found = upscale(model, low.float() / 255, tiling, ensemble=ensemble)
        seconds = time.perf_counter() - began
        if model is None and colour == "y":
            result, made = bicubic_row(high[:1] if is_grey(path) else high, scale), "luma, made here"
        else:
            result = score(found, high.float() / 255, scale, colour=colour, protocol=protocol)
            made = "made here" if small is None else "of the set"
        row = {"picture": path.name, "PSNR": result.psnr, "SSIM": result.ssim}
        row |= {name: measure(found, high.float() / 255, scale) for name, measure in others.items()}
        rows.append(row | {"seconds": seconds, "low": made})
    return rows


def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """All scores as the tables give them: means over pictures; seconds in all."""
    names = [name for name in rows[0] if name not in ("picture", "seconds", "low")]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    return means | {"seconds": sum(row["seconds"] for row in rows)}


def seam(model: Restorer, picture: Tensor, tiling: Tiling) -> dict[str, float]:
    """How far tiles are from the whole picture (3, H, W) in [0, 1].

    `largest`: the largest difference of an output value. `step`: the largest step between neighbouring pixels across
    the borders of tiles over the largest elsewhere, in the differences; up to 1 no seam shows.
    """
    difference = upscale(model, picture, tiling) - upscale(model, picture)
    steps = []
    for axis, length in ((1, picture.shape[1]), (2, picture.shape[2])):
        jumps = difference.diff(dim=axis).abs().transpose(1, axis).amax((0, 2))
        spans = tiling.spans(length, model.multiple)
        places = {place * model.scale - 1 for span in pairwise(spans) for place in (span[1][0], span[0][1])}
        inside = [place for place in places if 0 <= place < len(jumps)]
        if inside:
            other = torch.ones(len(jumps), dtype=torch.bool)
            other[inside] = False
            steps.append(float(jumps[inside].max() / jumps[other].max().clamp(min=1e-12)))
    return {"largest": float(difference.abs().max()), "step": max(steps, default=1.0)}
