"""The orthonormal Fourier transform of real grids at chosen frequencies, as FFTs or as products with real matrices."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from nearfar.ops.common.tables import cached_table

Frequencies = tuple[tuple[int, ...], ...]
"""Kept frequencies of every grid axis: signed, in the order of the spectrum; on the last axis 0, 1, ..., m - 1."""


def all_frequencies(size: Sequence[int]) -> Frequencies:
    """Every frequency of a real grid: on the last axis the non-negative half, on the others all n of them."""
    return tuple(low_frequencies(n, n // 2 + 1, half=axis == len(size) - 1) for axis, n in enumerate(size))


def low_frequencies(n: int, m: int, *, half: bool) -> tuple[int, ...]:
    """The frequencies f of n points with |f| < m, in the spectrum's order; only f >= 0 where `half`."""
    m = min(m, n // 2 + 1)
    if half:
        return tuple(range(m))
    positive = range(min(m, (n + 1) // 2))
    return (*positive, *range(max(-(m - 1), -(n // 2)), 0))


def analyse(
    x: Float[Tensor, "b c *s"], frequencies: Frequencies, *, matrices: bool = False
) -> tuple[Float[Tensor, "b c *f"], Float[Tensor, "b c *f"]]:
    """Real and imaginary part of X_f = N^(-1/2) sum_p x_p exp(-2 pi i sum_a f_a p_a / n_a) at the kept frequencies.

    FFTs along every axis, each only over what earlier axes keep: O(N log N). With `matrices`, products with cosine
    and sine tables of the kept frequencies, O(N sum_a m_a), in real arithmetic that every exporter takes.
    """
    size = x.shape[2:]
    if matrices:
        real, imaginary = x, torch.zeros_like(x)
        for axis in reversed(range(len(size))):
            real, imaginary = _turn(real, imaginary, axis + 2, size[axis], frequencies[axis], -1.0)
        return real, imaginary
    spectrum = torch.fft.rfft(x, norm="ortho")[..., : len(frequencies[-1])]
    for axis in range(len(size) - 1):
        spectrum = torch.fft.fft(spectrum, dim=axis + 2, norm="ortho")
        if len(frequencies[axis]) < size[axis]:
            spectrum = spectrum.index_select(axis + 2, _places(frequencies[axis], size[axis], x.device))
    return spectrum.real, spectrum.imag


def synthesize(
    real: Float[Tensor, "b c *f"],
    imaginary: Float[Tensor, "b c *f"],
    frequencies: Frequencies,
    size: Sequence[int],
    *,
    matrices: bool = False,
) -> Float[Tensor, "b c *s"]:
    """The real grid of `size` whose spectrum is real + i imaginary at the kept frequencies and 0 at all others.

    As `torch.fft.irfftn` does, the last axis takes its zero (and, for an even size, its highest) frequency as real.
    The inverse of `analyse` where that is a real grid's spectrum. Cost as `analyse`.
    """
    if matrices:
        for axis in range(len(size) - 1):
            real, imaginary = _turn(real, imaginary, axis + 2, size[axis], frequencies[axis], 1.0)
        cosine, sine = _last(size[-1], len(frequencies[-1]), real.dtype, real.device).unbind()
        return real @ cosine - imaginary @ sine
    # torch.complex would keep both parts for the backward pass
    spectrum: Complex[Tensor, "b c *f"] = torch.view_as_complex(torch.stack((real, imaginary), -1))
    for axis in range(len(size) - 1):
        if len(frequencies[axis]) < size[axis]:
            shape = list(spectrum.shape)
            shape[axis + 2] = size[axis]
            places = _places(frequencies[axis], size[axis], real.device)
            spectrum = spectrum.new_zeros(shape).index_copy(axis + 2, places, spectrum)
        spectrum = torch.fft.ifft(spectrum, dim=axis + 2, norm="ortho")
    return torch.fft.irfft(spectrum, n=size[-1], norm="ortho")


def real_fourier(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """Re sum_{p,q} x_pq exp(-2 pi i (n p / N + c q / C)), unnormalized; with real matrices during export."""
    n, c = x.shape[1:]
    if not torch.compiler.is_exporting():
        return torch.fft.fft2(x).real
    rows, columns = (_waves(k, tuple(range(k)), x.dtype, x.device) * math.sqrt(k) for k in (n, c))
    return rows[0] @ x @ columns[0] - rows[1] @ x @ columns[1]


def _turn(
    real: Tensor, imaginary: Tensor, axis: int, n: int, kept: tuple[int, ...], sign: float
) -> tuple[Tensor, Tensor]:
    """(real + i imaginary) times exp(sign 2 pi i f p / n) / sqrt(n), summed over positions (-1) or frequencies (+1)."""
    cosine, sine = _waves(n, kept, real.dtype, real.device).unbind()  # (positions, frequencies)
    if sign > 0:
        cosine, sine = cosine.T, sine.T
    real, imaginary = real.movedim(axis, -1), imaginary.movedim(axis, -1)
    turned = real @ cosine - sign * (imaginary @ sine), imaginary @ cosine + sign * (real @ sine)
    return turned[0].movedim(-1, axis), turned[1].movedim(-1, axis)


@cached_table
def _waves(n: int, kept: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos and sin of 2 pi p f / n over sqrt(n), (2, n, frequencies)."""
    turns = torch.outer(torch.arange(n), torch.tensor(kept, dtype=torch.long)) % n
    angles = turns.double() * (2 * math.pi / n)
    return (torch.stack((angles.cos(), angles.sin())) / math.sqrt(n)).to(device, dtype)


@cached_table
def _last(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos and sin from m non-negative frequencies to n points, (2, m, n); each stands for its negative one, too."""
    twice = torch.tensor([1.0 if f == 0 or 2 * f == n else 2.0 for f in range(m)], dtype=torch.float64)
    waves = _waves(n, tuple(range(m)), torch.float64, torch.device("cpu"))
    return (waves.mT * twice[:, None]).contiguous().to(device, dtype)


@cached_table
def _places(kept: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    return torch.tensor([f % n for f in kept], device=device)


def half_spectrum(x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h f"], Float[Tensor, "b c h f"]]:
    """Real and imaginary part of the orthonormal rfft2 of maps, by products with cosine and sine tables.

    The tables are computed from the sizes, which stay free while a graph is traced. Cost O(N (H + W)).
    """
    height, width = x.shape[-2:]
    cosine, sine = _free_waves(width // 2 + 1, width, x)
    real, imaginary = x @ cosine.T, -(x @ sine.T)
    cosine, sine = _free_waves(height, height, x)
    scale = (height * width) ** -0.5
    return (cosine @ real + sine @ imaginary) * scale, (cosine @ imaginary - sine @ real) * scale


def from_half_spectrum(
    real: Float[Tensor, "b c h f"], imaginary: Float[Tensor, "b c h f"], width: int
) -> Float[Tensor, "b c h w"]:
    """The real maps of `width` of a `half_spectrum`, as irfft2 gives them: what no real map has is left out."""
    height = real.shape[-2]
    cosine, sine = _free_waves(height, height, real)
    real, imaginary = cosine @ real - sine @ imaginary, cosine @ imaginary + sine @ real
    frequency = torch.arange(width // 2 + 1, device=real.device)
    twice = 2.0 - (frequency == 0).to(real.dtype) - (2 * frequency == width).to(real.dtype)
    cosine, sine = _free_waves(width // 2 + 1, width, real)
    scale = (height * width) ** -0.5
    return ((real * twice) @ cosine - (imaginary * twice) @ sine) * scale


def _free_waves(frequencies: int, n: int, like: Tensor) -> tuple[Float[Tensor, "f n"], Float[Tensor, "f n"]]:
    """Cosines and sines of 2 pi f p / n."""
    place = torch.arange(n, device=like.device)
    # a tensor, as exporters take no free size as a number here
    whole = torch.scalar_tensor(n, dtype=place.dtype, device=like.device)
    turns = (torch.arange(frequencies, device=like.device)[:, None] * place) % whole  # exact before the rounding
    angle = turns.to(like.dtype) * (2 * math.pi / n)
    return angle.cos(), angle.sin()
