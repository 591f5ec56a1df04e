"""The 15 corruptions of ImageNet-C, and saturation: on batches of pictures, reproducible by a generator.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019).
Brightness, contrast, saturation, pixelation, defocus and JPEG compute what the published code computes; the others
draw from the same distributions with a generator of their own, in other order. Three differ in kind: glass blur takes
every pixel from a random near place at once instead of swapping pixels one after the other; frost is a made texture of
ridges instead of photographs; fog is a sum of octaves of noise instead of the diamond-square fractal.

The published parameters are for pictures of 224 pixels. For others lengths (radii, shifts) scale with the shorter side.
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

Corruption = Callable[[Tensor, int, Generator], Tensor]
"""(B, 3, H, W) in [0, 1], severity 0 to 4, generator -> the same shape, not yet clipped."""


def corrupt(x: Tensor, kind: str, severity: int = 5, generator: Generator | None = None) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] after a corruption of `KINDS`, clipped and cut to 8 bits as published.

    `generator`: a CPU generator; None starts one from 0, so that the same call gives the same pictures. Raises
    ValueError for an unknown kind, a severity outside 1 .. 5, or pictures of another shape.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity is {severity}; allowed are 1 to 5")
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"pictures are {tuple(x.shape)}, {x.dtype}; needed are (B, 3, H, W) in [0, 1]")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return (KINDS[kind](x, severity - 1, generator).clamp(0, 1) * 255).floor() / 255


def corrupt_patches(
    x: Tensor, mask: Tensor, kind: str, severity: int = 5, generator: Generator | None = None, *, scope: str = "image"
) -> Tensor:
    """`x` with the places of `mask` (B, 1, H, W) taken from the corrupted pictures.

    scope: "image" corrupts the whole picture; "patch" the rectangle around the mask alone, whose edges and mean then
    count for blurs and contrast. Raises ValueError as `corrupt`, for a mask of another size, and another scope.
    """
    if scope not in ("image", "patch"):
        raise ValueError(f"scope is {scope!r}; allowed are 'image' and 'patch'")
    if mask.shape != (x.shape[0], 1, *x.shape[2:]):
        raise ValueError(f"mask is {tuple(mask.shape)}; for pictures {tuple(x.shape)} it must be (B, 1, H, W)")
    if scope == "image":
        return torch.where(mask, corrupt(x, kind, severity, generator), x)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    out = x.clone()
    for i in range(len(x)):  # every picture has its own rectangle
        rows, columns = mask[i, 0].any(1).nonzero()[:, 0], mask[i, 0].any(0).nonzero()[:, 0]
        if len(rows):
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            crop = x[i : i + 1, :, *box]
            out[i, :, *box] = torch.where(mask[i, :, *box], corrupt(crop, kind, severity, generator)[0], crop[0])
    return out


# noise


def _normal(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32).to(like)


def gaussian_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * _normal(x, generator)


def shot_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    photons = (60, 25, 12, 5, 3)[level]
    return torch.poisson((x.cpu().float() * photons), generator=generator).to(x) / photons


def impulse_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    """Salt and pepper: of every value, with this chance, 0 or 1."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    drawn = _uniform(tuple(x.shape), x, generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x)).to(x)


# blurs


def scaled(length: float, x: Tensor) -> int:
    """A length in pixels at 224, for the size of `x`."""
    side = min(x.shape[-2:])
    return round(length) if side == 224 else max(1, round(length * side / 224))


@lru_cache(maxsize=64)
def mirrored(n: int, before: int, after: int) -> Tensor:
    """Indices -before .. n - 1 + after, mirrored at the first and last position as often as needed."""
    at = torch.arange(-before, n + after)
    if n == 1:
        return torch.zeros_like(at)
    period = at.remainder(2 * n - 2)
    return torch.minimum(period, 2 * n - 2 - period)


def pad_mirrored(x: Tensor, rows: int, columns: int) -> Tensor:
    """Mirrored by any number of rows and columns at every edge."""
    row = mirrored(x.shape[-2], rows, rows).to(x.device)
    return x[..., row[:, None], mirrored(x.shape[-1], columns, columns).to(x.device)]


@lru_cache(maxsize=32)
def disk(radius: int, softness: float) -> Tensor:
    """A disk of sum one whose edge is softened by a Gaussian."""
    reach, taps = (8, 1) if radius <= 8 else (radius, 2)
    at = torch.arange(-reach, reach + 1)
    inside = (at[:, None] ** 2 + at**2 <= radius**2).float()
    gauss = torch.exp(-(torch.arange(-taps, taps + 1, dtype=torch.float64) ** 2) / (2 * softness**2))
    gauss = (gauss / gauss.sum()).float()
    soft = pad_mirrored((inside / inside.sum())[None, None], taps, taps)
    return F.conv2d(F.conv2d(soft, gauss[None, None, :, None]), gauss[None, None, None])[0, 0]


def defocus_blur(x: Tensor, level: int, _generator: Generator) -> Tensor:
    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    kernel = disk(scaled(radius, x), softness).to(x)
    reach = len(kernel) // 2
    return F.conv2d(pad_mirrored(x, reach, reach).flatten(0, 1)[:, None], kernel[None, None]).unflatten(0, x.shape[:2])[
        :, :, 0
    ]


@lru_cache(maxsize=64)
def gaussian_matrix(n: int, sigma: float) -> Tensor:
    """(n, n): a Gaussian blur of one axis, cut at 3 standard deviations, mirrored at the edges; rows sum to one."""
    reach = max(1, int(3 * sigma + 0.5))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    index = torch.arange(n)[:, None] + torch.arange(2 * reach + 1)
    columns = mirrored(n, reach, reach)[index]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.scatter_add(1, columns, (weights / weights.sum()).expand(n, -1).contiguous())


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of any width."""
    rows, columns = (gaussian_matrix(n, sigma).to(x) for n in x.shape[-2:])
    return rows @ x @ columns.T


def take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of every picture at its own (B, H, W) rows and columns, the nearest inside the picture."""
    height, width = x.shape[-2:]
    flat = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return x.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, (H, 1) and (1, W)."""
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    return rows[:, None], columns[None]


def glass_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    reach, sigma = scaled(reach, x), max(0.3, sigma * min(x.shape[-2:]) / 224)
    x, (rows, columns) = gaussian_blur(x, sigma), positions(x)
    for _ in range(rounds):
        shift = torch.randint(-reach, reach + 1, (2, len(x), *x.shape[2:]), generator=generator).to(x.device)
        x = take(x, rows + shift[0], columns + shift[1])
    return gaussian_blur(x, sigma)


def smear(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Each picture blurred along its own direction (degrees): half a Gaussian of `sigma` over 2 radius + 1 steps."""
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    rows, columns = positions(x)
    turn = torch.deg2rad(angle.double()).to(x.device)
    out = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), (weights / weights.sum()).tolist(), strict=True):
        down, right = ((step * f(turn)).round().long()[:, None, None] for f in (torch.sin, torch.cos))
        out += weight * take(x, rows + down + 0 * columns, columns + right + 0 * rows)
    return out


def motion_blur(x: Tensor, level: int, generator: Generator) -> Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    angle = torch.rand(len(x), generator=generator) * 90 - 45
    return smear(x, scaled(radius, x), scaled(sigma, x), angle)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of the picture, enlarged to its size with straight lines between pixels."""
    sides = x.shape[-2:]
    inner = [math.ceil(n / factor) for n in sides]
    first = [(n - m) // 2 for n, m in zip(sides, inner, strict=True)]
    crop = x[..., first[0] : first[0] + inner[0], first[1] : first[1] + inner[1]]
    sizes = [round(m * factor) for m in inner]
    return F.interpolate(crop, sizes, mode="bilinear", align_corners=True)[..., : sides[0], : sides[1]]


def zoom_blur(x: Tensor, level: int, _generator: Generator) -> Tensor:
    last, step = ((0.11, 0.01), (0.16, 0.01), (0.21, 0.02), (0.26, 0.02), (0.31, 0.03))[level]
    factors = np.arange(1, 1 + last, step)
    return (x + sum(zoomed(x, float(f)) for f in factors)) / (len(factors) + 1)


# weather


def snow(x: Tensor, level: int, generator: Generator) -> Tensor:
    mean, deviation, zoom, threshold, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = zoomed(mean + deviation * _normal(x[:, :1], generator), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1).to(x)
    angle = -135 + 90 * torch.rand(len(x), generator=generator)
    flakes = smear(flakes, scaled(radius, x), scaled(sigma, x), angle)
    grey = (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]) * 1.5 + 0.5
    return share * x + (1 - share) * torch.maximum(x, grey) + flakes + flakes.rot90(2, (2, 3))


def octaves(x: Tensor, decay: float, generator: Generator) -> Tensor:
    """(B, 1, H, W) noise in [0, 1]: grids of 2, 4, 8 ... cells, each weaker than the one before by `decay`."""
    total = torch.zeros_like(x[:, :1])
    for octave in range(1, 1 + math.ceil(math.log2(max(x.shape[-2:])))):
        cells = _uniform((len(x), 1, 2**octave + 1, 2**octave + 1), x, generator)
        total += decay**-octave * F.interpolate(cells, x.shape[-2:], mode="bilinear", align_corners=True)
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp(min=1e-6)


def frost(x: Tensor, level: int, generator: Generator) -> Tensor:
    kept, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    needles = 1 - (2 * octaves(x, 1.4, generator) - 1).abs()  # ridges where the noise crosses its middle
    cover = octaves(x, 2.0, generator)
    crystal = (needles**4 + 0.5 * cover).clamp(0, 1)
    tint = torch.tensor([0.82, 0.92, 1.0]).to(x)[:, None, None]
    return kept * x + ice * crystal * tint


def fog(x: Tensor, level: int, generator: Generator) -> Tensor:
    strength, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * octaves(x, decay, generator)) * brightest / (brightest + strength)


def hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and value, in [0, 1]."""
    value = x.amax(1)
    spread = value - x.amin(1)
    safe = torch.where(spread == 0, 1.0, spread)
    red, green, blue = x.unbind(1)
    hue = torch.where(red == value, (green - blue) / safe, 0.0)
    hue = torch.where(green == value, 2 + (blue - red) / safe, hue)
    hue = (torch.where(blue == value, 4 + (red - green) / safe, hue) / 6).remainder(1)  # cutting to levels feels it
    saturation = torch.where(value == 0, 0.0, spread / torch.where(value == 0, 1.0, value))
    return hue, saturation, value


def rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `hsv`."""
    sector = (hue * 6).floor()
    f = hue * 6 - sector
    p, q, t = value * (1 - saturation), value * (1 - f * saturation), value * (1 - (1 - f) * saturation)
    table = torch.stack((value, q, p, p, t, value))  # red by sector; green and blue are the same, two and four later
    index = torch.stack([(sector.long() + shift) % 6 for shift in (0, 4, 2)])
    return table.gather(0, index).movedim(0, 1)


def brightness(x: Tensor, level: int, _generator: Generator) -> Tensor:
    hue, saturation, value = hsv(x)
    return rgb(hue, saturation, (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(0, 1))


def saturate(x: Tensor, level: int, _generator: Generator) -> Tensor:
    factor, more = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[level]
    hue, saturation, value = hsv(x)
    return rgb(hue, (saturation * factor + more).clamp(0, 1), value)


def contrast(x: Tensor, level: int, _generator: Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


# digital


def elastic_transform(x: Tensor, level: int, generator: Generator) -> Tensor:
    """A random affine map of three corners, then a smooth random displacement."""
    side = min(x.shape[-2:])
    strength, smooth, jitter = (
        side * n
        for n in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[level]
    )
    height, width = x.shape[-2:]
    middle, reach = torch.tensor([width, height]) / 2, side // 3
    corners = middle + reach * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners + (2 * torch.rand(len(x), 3, 2, generator=generator) - 1) * jitter
    # where each pixel of the result comes from: the map that takes the moved corners to the old ones
    homogeneous = torch.cat((moved, torch.ones(len(x), 3, 1)), 2)
    affine = torch.linalg.solve(homogeneous.double(), corners.double().expand(len(x), -1, -1)).to(x)
    rows, columns = (p.expand(height, width).to(x) for p in positions(x))
    grid = torch.stack((columns, rows, torch.ones_like(rows)), -1) @ affine[:, None]
    shift = strength * gaussian_blur(2 * _uniform((len(x), 2, height, width), x, generator) - 1, smooth)
    # the published order: displaced in the picture that the affine map has made
    turned = sample(x, grid)
    return sample(turned, torch.stack((columns, rows), -1) + shift.movedim(1, -1))


def sample(x: Tensor, at: Tensor) -> Tensor:
    """Pixels at (column, row) positions (B, H, W, 2), straight lines between them, mirrored at the edges."""
    size = torch.tensor([x.shape[-1], x.shape[-2]]).to(at)
    grid = 2 * at / (size - 1).clamp(min=1) - 1
    return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="reflection", align_corners=True)


def through_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each picture through a function of 8-bit pictures."""
    whole = (x.detach().cpu().double() * 255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in whole])
    # half a level more, so that cutting to 8 bits gives the same level in every precision
    return torch.from_numpy((changed.astype(np.float64) + 0.25) / 255).movedim(-1, 1).to(x)


def pixelate(x: Tensor, level: int, _generator: Generator) -> Tensor:
    share, (height, width) = (0.6, 0.5, 0.4, 0.3, 0.25)[level], x.shape[-2:]
    small = max(1, int(width * share)), max(1, int(height * share))
    return through_pillow(x, lambda picture: picture.resize(small, Image.Resampling.BOX).resize((width, height), 0))


def jpeg_compression(x: Tensor, level: int, _generator: Generator) -> Tensor:
    def compress(picture: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=(25, 18, 15, 10, 7)[level])
        return Image.open(stream)

    return through_pillow(x, compress)


KINDS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
    "saturate": saturate,
}
"""The 15 corruptions of ImageNet-C in its order, then saturation, which its extra set has."""

IMAGENET_C = tuple(KINDS)[:15]
"""Names of the 15."""
