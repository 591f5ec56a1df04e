"""What happens to real pictures: blur, resizing, noise and JPEG, twice over (Wang et al., Real-ESRGAN, 2021)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

Range = tuple[float, float]

SIDES = (7, 21)
"""Least and largest side of a blur kernel, always odd."""


@dataclass(frozen=True)
class Order:
    """One round of blur, resizing, noise and JPEG; every `Range` is drawn from uniformly.

    `blur`: the share of pictures that are blurred at all; of these `sinc` ring, and the others have a Gaussian kernel,
    a generalized one or one with a plateau, round or not, by `kernels` (round and not, of each of these). `sigma`: of
    the kernels, in pixels. `resize`: shares of batches that grow, shrink and stay, `factor` by how much. `gaussian`:
    the share of pictures with Gaussian noise of `noise` / 255, the others have Poisson noise `poisson` times as strong
    as the picture's own number of levels gives; of both the share `grey` is the same in all channels. `quality`: of
    JPEG.
    """

    blur: float = 1.0
    sinc: float = 0.1
    kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: Range = (0.2, 3.0)
    generalized: Range = (0.5, 4.0)
    plateau: Range = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    factor: Range = (0.15, 1.5)
    gaussian: float = 0.5
    noise: Range = (1.0, 30.0)
    poisson: Range = (0.05, 3.0)
    grey: float = 0.4
    quality: Range = (30.0, 95.0)

    def __post_init__(self) -> None:
        for name in ("blur", "sinc", "gaussian", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share is in [0, 1]")
        for name, count in (("kernels", 6), ("resize", 3)):
            shares = getattr(self, name)
            if len(shares) != count or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
                raise ValueError(f"{name} is {shares}; it takes {count} shares that sum to 1")
        for name in ("sigma", "generalized", "plateau", "factor", "noise", "poisson", "quality"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}; it must rise and be above 0")
        if not self.factor[0] <= 1 <= self.factor[1] or self.quality[1] > 100:
            raise ValueError(f"factor is {self.factor}, quality {self.quality}; they span 1 and end at 100 at most")


@dataclass(frozen=True)
class Degradation:
    """Pictures (B, 3, H, W) in [0, 1] made small and bad: two rounds of `Order`, a last resizing, ringing and JPEG.

    The last resizing comes before JPEG for half of the batches, after it for the others; `ringing` of the pictures get
    a last sinc filter beside it. Outputs are rounded to 8 bits. Every picture has its own kernels, noise and quality;
    sizes in between are those of a batch. All is drawn from one generator, so that its seed determines the result. The
    defaults are Real-ESRGAN's; it draws the kind of noise, too, once a batch.
    """

    first: Order = field(default_factory=Order)
    second: Order = field(
        default_factory=lambda: Order(
            blur=0.8,
            sigma=(0.2, 1.5),
            resize=(0.3, 0.4, 0.3),
            factor=(0.3, 1.2),
            noise=(1.0, 25.0),
            poisson=(0.05, 2.5),
        )
    )
    ringing: float = 0.8

    @torch.no_grad()
    def __call__(
        self, high: Float[Tensor, "b 3 h w"], scale: int, generator: Generator | None = None
    ) -> Float[Tensor, "b 3 p q"]:
        """`high`, its sides multiples of `scale`, at 1 / scale of its sides. `generator`: on the device of `high`.

        Raises ValueError for sides that `scale` does not divide, or below 12 pixels.
        """
        height, width = high.shape[2:]
        if height % scale or width % scale or min(height, width) < 12:
            raise ValueError(f"pictures are {height} x {width}; sides must be at least 12 and multiples of {scale}")
        draw = _Draw(len(high), high.device, generator)
        x = high
        for order, base in ((self.first, 1), (self.second, scale)):
            x = filtered(x, _kernels(order, draw))
            factor = _factor(order, draw) / base
            # sizes are those of the true picture, not of what the first round left
            x = _resized(x, (max(12, round(height * factor)), max(12, round(width * factor))), draw)
            x = _noisy(x, order, draw)
            if base == 1:
                x = jpeg(x.clamp(0, 1), draw.uniform(order.quality))
        last = sinc_kernels(draw.sides(), draw.uniform((math.pi / 3, math.pi)))
        last = torch.where(draw.chance(self.ringing)[:, None, None], last, _delta(last))
        quality, size = draw.uniform(self.second.quality), (height // scale, width // scale)
        if draw.coin():
            x = jpeg(filtered(_resized(x, size, draw), last).clamp(0, 1), quality)
        else:
            x = filtered(_resized(jpeg(x.clamp(0, 1), quality), size, draw), last)
        return (x.clamp(0, 1) * 255).round() / 255


class _Draw:
    """Random numbers for a batch of `count` pictures, all from one generator."""

    def __init__(self, count: int, device: torch.device, generator: Generator | None) -> None:
        self.count, self.device, self.generator = count, device, generator

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def uniform(self, span: Range) -> Float[Tensor, " b"]:
        return span[0] + (span[1] - span[0]) * self.rand(self.count)

    def chance(self, share: float) -> Tensor:
        return self.rand(self.count) < share

    def coin(self) -> bool:
        return bool(self.rand(1) < 0.5)

    def which(self, shares: Sequence[float], count: int | None = None) -> Tensor:
        """Indices drawn by their shares, one a picture."""
        edges = torch.tensor(shares, device=self.device).cumsum(0)[:-1]
        return torch.bucketize(self.rand(self.count if count is None else count), edges, right=True)

    def sides(self) -> Tensor:
        """Odd sides of kernels."""
        low, high = SIDES
        return low + 2 * (self.rand(self.count) * ((high - low) // 2 + 1)).long()


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIDES[1], device=device) - SIDES[1] // 2.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _normalized(kernels: Tensor, sides: Tensor) -> Float[Tensor, "b k k"]:
    """Kernels cut to their sides, with a sum of one."""
    x, y = _grid(kernels.device)
    inside = torch.maximum(x.abs(), y.abs()) <= (sides[:, None, None] // 2)
    kernels = kernels * inside
    return kernels / kernels.sum((1, 2), keepdim=True)


def _delta(like: Tensor) -> Tensor:
    delta = torch.zeros_like(like)
    delta[:, SIDES[1] // 2, SIDES[1] // 2] = 1
    return delta


def gaussian_kernels(
    sides: Tensor, sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, kind: Tensor, beta: Tensor
) -> Float[Tensor, "b k k"]:
    """With r^2 the squared distance in units of the sigmas along turned axes: exp(-r^2 / 2) for `kind` 0,
    exp(-r^(2 beta) / 2) for 1, and a plateau 1 / (1 + r^(2 beta)) for 2."""
    x, y = _grid(sides.device)
    sigma_x, sigma_y, angle, kind, beta = (t[:, None, None] for t in (sigma_x, sigma_y, angle, kind, beta))
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    power = ((along / sigma_x).square() + (across / sigma_y).square()).pow(torch.where(kind == 0, 1.0, beta))
    return _normalized(torch.where(kind == 2, 1 / (1 + power), torch.exp(-power / 2)), sides)


def sinc_kernels(sides: Tensor, cutoff: Tensor) -> Float[Tensor, "b k k"]:
    """The round low-pass filter w J1(w r) / (2 pi r) of cut-off frequency w = `cutoff`, which rings."""
    x, y = _grid(sides.device)
    radius, cutoff = torch.hypot(x, y), cutoff[:, None, None]
    kernels = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    return _normalized(torch.where(radius == 0, cutoff.square() / (4 * math.pi), kernels), sides)


def _kernels(order: Order, draw: _Draw) -> Float[Tensor, "b k k"]:
    sides, which = draw.sides(), draw.which(order.kernels)
    kind, turned = which // 2, which % 2 == 1
    sigma_x, sigma_y = draw.uniform(order.sigma), draw.uniform(order.sigma)
    angle = draw.uniform((-math.pi, math.pi))
    betas = []
    for low, high in (order.generalized, order.plateau):  # below and above 1 equally often
        lower, upper = draw.uniform((low, max(low, 1.0))), draw.uniform((min(high, 1.0), high))
        betas.append(torch.where(draw.chance(0.5), lower, upper))
    beta = torch.where(kind == 1, betas[0], betas[1])
    found = gaussian_kernels(
        sides, sigma_x, torch.where(turned, sigma_y, sigma_x), torch.where(turned, angle, 0.0), kind, beta
    )
    share = draw.rand(draw.count)
    lowest = torch.where(sides < 13, math.pi / 3, math.pi / 5)
    ringing = sinc_kernels(sides, lowest + (math.pi - lowest) * share)
    found = torch.where(draw.chance(order.sinc)[:, None, None], ringing, found)
    return torch.where(draw.chance(order.blur)[:, None, None], found, _delta(found))


def filtered(x: Float[Tensor, "b c h w"], kernels: Float[Tensor, "b k k"]) -> Float[Tensor, "b c h w"]:
    """Each picture convolved with its own kernel, its borders reflected."""
    batch, channels = x.shape[:2]
    half = kernels.shape[-1] // 2
    x = F.pad(x, [half] * 4, mode="reflect" if min(x.shape[2:]) > half else "replicate")
    weight = kernels.flip(1, 2).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(x.flatten(0, 1)[None], weight, groups=batch * channels)[0].unflatten(0, (batch, channels))


def _factor(order: Order, draw: _Draw) -> float:
    """How many times larger a batch becomes."""
    which = int(draw.which(order.resize, 1))
    low, high = ((1.0, order.factor[1]), (order.factor[0], 1.0), (1.0, 1.0))[which]
    return float(low + (high - low) * draw.rand(1))


def _resized(x: Tensor, size: tuple[int, int], draw: _Draw) -> Tensor:
    mode = ("area", "bilinear", "bicubic")[int(draw.which((1 / 3, 1 / 3, 1 / 3), 1))]
    return F.interpolate(x, size, mode=mode, **({} if mode == "area" else {"align_corners": False}))


def _noisy(x: Tensor, order: Order, draw: _Draw) -> Tensor:
    """With Gaussian or Poisson noise, of one channel or of each."""
    batch, _, height, width = x.shape
    grey = draw.chance(order.grey)[:, None, None, None]
    normal = torch.where(grey, draw.randn(batch, 1, height, width), draw.randn(batch, 3, height, width))
    normal = normal * (draw.uniform(order.noise) / 255)[:, None, None, None]
    eight = (x.clamp(0, 1) * 255).round()
    luma = (eight * eight.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).round()
    counted = []
    for values in (luma, eight):
        # as many photons at white as there are levels, up to a power of two
        seen = torch.zeros(batch, 256, device=x.device).scatter_(1, values.flatten(1).long(), 1.0).sum(1)
        photons = torch.exp2(seen.log2().ceil())[:, None, None, None]
        counted.append(torch.poisson(values / 255 * photons, draw.generator) / photons - values / 255)
    shot = torch.where(grey, counted[0], counted[1]) * draw.uniform(order.poisson)[:, None, None, None]
    return (x + torch.where(draw.chance(order.gaussian)[:, None, None, None], normal, shot)).clamp(0, 1)


LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)  # fmt: skip
"""The tables of quantization that the JPEG standard gives as examples (annex K) and encoders use."""


def jpeg(x: Float[Tensor, "b 3 h w"], quality: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [0, 1] as they come back from JPEG of each one's quality, 1 .. 100, with halved chroma.

    As libjpeg scales the standard's tables, but for its integer arithmetic and its smooth enlarging of chroma.
    """
    height, width = x.shape[2:]
    x = F.pad(x * 255, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = x.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], 1)
    quality = quality.round().clamp(1, 100)
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)[:, None, None, None]

    def coded(plane: Tensor, table: Sequence[Sequence[int]]) -> Tensor:
        steps = ((x.new_tensor(table) * percent + 50) / 100).floor().clamp(1, 255)[:, :, None, None]
        cosine = _cosine(plane)
        blocks = plane.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        found = (cosine @ blocks @ cosine.mT / steps).round() * steps
        return (cosine.mT @ found @ cosine).transpose(3, 4).flatten(4, 5).flatten(2, 3)

    luma = coded(luma[:, None] - 128, LUMA)[:, 0] + 128
    chroma = F.interpolate(coded(F.avg_pool2d(chroma, 2), CHROMA), scale_factor=2, mode="nearest")
    blue, red = luma + 1.772 * chroma[:, 0], luma + 1.402 * chroma[:, 1]
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    found = torch.stack([red, green, blue], 1)[..., :height, :width]
    return (found / 255).clamp(0, 1)


def _cosine(like: Tensor) -> Float[Tensor, "8 8"]:
    """The orthonormal discrete cosine transform of eight values."""
    place = torch.arange(8, device=like.device, dtype=like.dtype)
    matrix = torch.cos((2 * place + 1) * place[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def sharpened(
    x: Float[Tensor, "b c h w"], weight: float = 0.5, side: int = 51, threshold: float = 10 / 255
) -> Float[Tensor, "b c h w"]:
    """The targets of Real-ESRGAN: `weight` of what a Gaussian of `side` taps removes is added where it is large.

    m = blur(|x - blur(x)| > threshold);  y = m clip(x + weight (x - blur(x))) + (1 - m) x, sigma as OpenCV takes it.
    """
    taps = torch.arange(side, device=x.device, dtype=x.dtype) - side // 2
    taps = torch.exp(-(taps / (0.3 * ((side - 1) * 0.5 - 1) + 0.8)).square() / 2)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, -1)

    def blur(y: Tensor) -> Tensor:
        y = F.pad(y, [side // 2] * 4, mode="reflect" if min(y.shape[2:]) > side // 2 else "replicate")
        y = F.conv2d(y, taps[..., None], groups=y.shape[1])
        return F.conv2d(y, taps[:, :, None], groups=y.shape[1])

    lost = x - blur(x)
    mask = blur((lost.abs() > threshold).to(x.dtype))
    return mask * (x + weight * lost).clamp(0, 1) + (1 - mask) * x
