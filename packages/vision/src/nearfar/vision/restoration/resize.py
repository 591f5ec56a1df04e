"""Bicubic resizing as MATLAB's `imresize` computes it, by which super-resolution's test sets were made."""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def imresize(
    image: Shaped[Tensor, "*b h w"],
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    *,
    antialias: bool = True,
    mode: Literal["float", "uint8"] = "float",
    edge: Literal["mirror", "repeat"] = "mirror",
) -> Shaped[Tensor, "*b p q"]:
    """`image` enlarged or reduced with Keys' cubic kernel (a = -1/2), as MATLAB's `imresize(image, scale)`.

    Position k of an axis reads u = (k + 1/2) / f - 1/2; where f < 1 and `antialias`, the kernel is stretched by 1 / f.
    Weights are normalized. The axis of the smaller factor comes first, rows where they are equal.

    Args:
        image: any numbers in "float" mode; 0 .. 255 in "uint8" mode.
        scale: the factor f of both axes; the sides become ceil(side * f). Or `size`: (height, width), each its factor.
        mode: "uint8" rounds and clips to 0 .. 255 after each axis, as MATLAB does with 8-bit pictures; "float" never.
        edge: past the border the picture is mirrored, its edge included, as MATLAB does today, or its edge repeated, as
            in the low-resolution pictures of Set5 and Set14 (`image_SRF_2`, `image_SRF_4`), which come out to the bit.

    Returns the picture in the dtype of `image`. Computed in float64, with 4 max(1, 1 / f) reads a pixel.

    Raises ValueError unless exactly one of `scale` and `size` is given and the picture is not empty.
    """
    if (scale is None) == (size is None) or image.ndim < 2 or 0 in image.shape:
        raise ValueError("imresize takes a picture (..., H, W) that is not empty, and either a scale or a size")
    for name, value, allowed in (("mode", mode, ("float", "uint8")), ("edge", edge, ("mirror", "repeat"))):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {allowed[0]!r} and {allowed[1]!r}")
    sides = image.shape[-2:]
    if size is None:
        if not scale > 0:  # type: ignore[operator]
            raise ValueError(f"scale is {scale}; it must be above 0")
        # ceil of a product that is whole but for rounding, such as 0.1 * 30
        size = tuple(math.ceil(side * scale - 1e-9 * side) for side in sides)  # type: ignore[assignment, operator]
        factors = [float(scale)] * 2  # type: ignore[arg-type]
    else:
        factors = [new / side for new, side in zip(size, sides)]
    whole = mode == "uint8"
    x = image.to(torch.float64)
    for axis in sorted((0, 1), key=lambda axis: factors[axis]):
        x = resize_axis(x, axis - 2, size[axis], factors[axis], antialias, edge)  # type: ignore[index]
        if whole:
            x = (x + 0.5).floor().clamp(0, 255)
    if not image.is_floating_point() and not whole:
        x = x.round()
    return x.to(image.dtype)


def resize_axis(
    x: Float[Tensor, "*b h w"], axis: int, length: int, factor: float, antialias: bool, edge: str = "mirror"
) -> Float[Tensor, "*b p q"]:
    """One axis of `imresize`."""
    place, weight = taps(x.shape[axis], length, factor, antialias, edge)
    shape = [1] * x.ndim
    shape[axis] = length
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for places, weights in zip(place, weight):
        index = torch.from_numpy(places).to(x.device)
        total = total + x.index_select(axis, index) * torch.from_numpy(weights).to(x.device).view(shape)
    return total


def taps(side: int, length: int, factor: float, antialias: bool, edge: str = "mirror") -> tuple[np.ndarray, np.ndarray]:
    """For every output position the inputs it reads and their weights: two arrays (taps, length)."""
    stretch = factor if antialias and factor < 1 else 1.0
    width = 4 / stretch
    centre = np.arange(length) / factor + (0.5 / factor - 0.5)
    first = np.floor(centre - width / 2)
    place = first[None] + np.arange(math.ceil(width) + 2)[:, None]
    weight = cubic((centre[None] - place) * stretch)
    weight /= weight.sum(0)
    used = (weight != 0).any(1)
    place = place[used].astype(np.int64)
    if edge == "repeat":
        return place.clip(0, side - 1), weight[used]
    place %= 2 * side
    return np.minimum(place, 2 * side - 1 - place), weight[used]


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    t = np.abs(t)
    near, far = (1.5 * t - 2.5) * t**2 + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t <= 1, near, np.where(t <= 2, far, 0.0))
