"""PSNR and SSIM as the tables of super-resolution count them."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from nearfar.core.errors import UserError

Protocol = Literal["8bit", "float"]
"""How outputs become numbers: rounded and clipped to 8 bits (the field's tables), or as they are (CATANet's)."""


PERCEPTUAL = ("lpips", "niqe")
"""Metrics of pyiqa that are offered: distance of AlexNet's features, and naturalness without a reference."""


@dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM of one picture."""

    psnr: float
    ssim: float


def luma(image: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 1 h w"]:
    """Y of BT.601 in studio range, (65.481 R + 128.553 G + 24.966 B + 16) / 255, of RGB in [0, 1]; not rounded."""
    red, green, blue = image.unbind(-3)
    return ((65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255).unsqueeze(-3)


def psnr(image: Float[Tensor, "c h w"], reference: Float[Tensor, "c h w"], peak: float = 255.0, floor: float = 0.0):
    """10 log10(peak^2 / (mean squared difference + floor)) in dB, infinite for equal pictures without a floor."""
    error = float((image.double() - reference.double()).square().mean()) + floor
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(peak**2 / error, dtype=torch.float64)))


def ssim(image: Float[Tensor, "c h w"], reference: Float[Tensor, "c h w"], peak: float = 255.0) -> float:
    """Structural similarity of Wang et al. (2004), mean over positions, then channels.

    11 x 11 Gaussian of sigma 1.5, population moments, only positions whose window lies inside the picture,
    C1 = (0.01 peak)^2, C2 = (0.03 peak)^2. Raises ValueError for a picture below 11 pixels a side.
    """
    if min(image.shape[-2:]) < 11:
        raise ValueError(f"the picture is {tuple(image.shape[-2:])}; SSIM needs at least 11 pixels a side")
    axis = torch.arange(11, dtype=torch.float64, device=image.device) - 5
    window = torch.exp(-axis.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = (t.double().unsqueeze(1) for t in (image, reference))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def score(
    image: Shaped[Tensor, "c h w"],
    reference: Shaped[Tensor, "c h w"],
    border: int,
    *,
    colour: Literal["y", "rgb"] = "y",
    protocol: Protocol = "8bit",
) -> Score:
    """PSNR and SSIM of a restored picture as the tables have them.

    Args:
        image, reference: RGB or grey in [0, 1], (3 or 1, H, W). Grey counts as it is, in both colours.
        border: pixels cut from every side first; the tables cut as many as the scale.
        colour: "y" for the luma, "rgb" for the channels.
        protocol: "8bit" clips to [0, 1] and rounds to 8 bits before all else; "float" leaves the numbers alone and
            adds 1e-8 to the mean squared error, as CATANet's code does.

    Raises ValueError for pictures of different shapes, no pixels inside the border, or values that are not finite.
    """
    if image.shape != reference.shape:
        raise ValueError(f"the picture is {tuple(image.shape)}, its reference {tuple(reference.shape)}")
    if min(image.shape[-2:]) <= 2 * border:
        raise ValueError(f"a picture of {tuple(image.shape[-2:])} has no pixels inside a border of {border}")
    if not (image.isfinite().all() and reference.isfinite().all()):
        raise ValueError("the picture holds values that are not finite")
    pair = [image.double(), reference.double()]
    if protocol == "8bit":
        pair = [(t.clamp(0, 1) * 255).round() / 255 for t in pair]
    if border:
        pair = [t[..., border:-border, border:-border] for t in pair]
    if colour == "y" and image.shape[0] == 3:
        pair = [luma(t) for t in pair]
    if protocol == "float":
        a, b = pair
        return Score(psnr(a, b, peak=1.0, floor=1e-8), ssim(a, b, peak=1.0))
    a, b = (255 * t for t in pair)
    return Score(psnr(a, b), ssim(a, b))


def perceptual(name: str, device: str | torch.device = "cpu") -> Callable[[Tensor, Tensor, int], float]:
    """A metric of pyiqa, lower is better: of a picture (3, H, W) in [0, 1], its reference, and the border to cut off.

    The picture is clipped and rounded to 8 bits. Raises UserError for an unknown name, and where pyiqa or its weights
    are missing; pyiqa fetches them itself when a metric is first used.
    """
    if name not in PERCEPTUAL:
        raise UserError(f"--metric {name}: known are {', '.join(PERCEPTUAL)}")
    try:
        pyiqa: Any = importlib.import_module("pyiqa")
    except ImportError as error:
        raise UserError(
            f"--metric {name}: needs pyiqa ({error}); `pip install pyiqa`, whose licence is for non-commercial use"
        ) from error
    try:
        metric = pyiqa.create_metric(name, device=torch.device(device))
    except Exception as error:  # whatever the download of the weights raises
        raise UserError(f"--metric {name}: pyiqa cannot make it, are its weights there? ({error})") from error

    def measure(image: Tensor, reference: Tensor, border: int) -> float:
        pair = [(t.clamp(0, 1) * 255).round() / 255 for t in (image, reference)]
        pair = [t[None, :, border or None : -border or None, border or None : -border or None] for t in pair]
        return float(metric(*(pair if name == "lpips" else pair[:1])))

    return measure
