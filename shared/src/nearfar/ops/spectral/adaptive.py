"""Mixers whose filter depends on the input: a small complex MLP, the same at every frequency, acts on the spectrum."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.precision import full_precision
from nearfar.ops.spectral.fourier import (
    Frequencies,
    all_frequencies,
    analyse,
    from_half_spectrum,
    half_spectrum,
    low_frequencies,
    synthesize,
)

MODES = ("afno", "fourcastnet", "lowpass")
"""Ways of choosing the frequencies that an AFNO keeps; `kept_frequencies` says how."""


def kept_frequencies(
    size: Sequence[int], modes: str = "afno", fraction: float | int = 1.0, grid: Sequence[int] | None = None
) -> Frequencies:
    """The frequencies of a grid of `size` that a `fraction` p keeps.

    With W the last axis and N the number of positions:
        afno: columns f_W < int(p (N // 2 + 1)), all rows. As N // 2 + 1 is far more than the W // 2 + 1 columns there
            are, a p below 1 may cut nothing in more than one dimension.
        fourcastnet: two axes (H, W). T = H // 2 + 1, m = int(p T): columns f_W < m and rows T - m to T + m - 1 of the
            spectrum in FFT order. So the zero-th row is left out for p < 1 and the kept ones are the fastest waves
            along H; and for p = 1 on a wide grid columns from T on are left out.
        lowpass: |f_a| < int(p (n_a // 2 + 1)) on every axis a, n_a the size of `grid` where that is given.

    Raises:
        ValueError: another `modes`, a fraction outside (0, 1], or `fourcastnet` on other than two axes.
    """
    *others, last = size
    if modes == "lowpass":
        counts = [max(1, int(fraction * (n // 2 + 1))) for n in grid or size]
        return tuple(low_frequencies(n, m, half=axis == len(size) - 1) for axis, (n, m) in enumerate(zip(size, counts)))
    if modes == "afno":
        positions = last
        for n in others:
            positions *= n
        columns = min(int(fraction * (positions // 2 + 1)), last // 2 + 1)
        return (*all_frequencies(size)[:-1], tuple(range(columns)))
    check_modes(modes, fraction, len(size))
    height, width = size
    total = height // 2 + 1
    m = int(fraction * total)
    rows = range(total - m, min(total + m, height))
    return tuple(r if r < (height + 1) // 2 else r - height for r in rows), tuple(range(min(m, width // 2 + 1)))


def check_modes(modes: str, fraction: float | int, dims: int) -> None:
    """Raise ValueError for a selection that `kept_frequencies` does not know."""
    if modes not in MODES:
        raise ValueError(f"modes is {modes!r}; allowed are {', '.join(MODES)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must lie in (0, 1]")
    if modes == "fourcastnet" and dims != 2:
        raise ValueError(f"modes='fourcastnet' is defined on two axes, dims is {dims}; take 'afno' or 'lowpass'")


class SpectralMLP(nn.Module):
    """soft(W2 act(W1 X + b1) + b2) for complex X of C channels in k blocks; act and soft on real and imaginary part.

    soft(r) = sign(r) max(|r| - threshold, 0). w1 (2, k, c, c f), b1 (2, k, c f), w2 (2, k, c f, c), b2 (2, k, c) hold
    real parts at 0 and imaginary parts at 1, c = C / k. A complex product is one real matrix product of twice the
    width, [Re W, -Im W; Im W, Re W] on real parts above imaginary ones, batched over samples and blocks.
    Cost: 8 f C^2 / k multiply-adds a frequency.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int,
        hidden_factor: int,
        activation: Callable[[], nn.Module],
        threshold: float,
    ) -> None:
        super().__init__()
        if num_blocks < 1 or dim % num_blocks:
            raise ValueError(f"num_blocks={num_blocks} must divide dim={dim}")
        if hidden_factor < 1:
            raise ValueError(f"hidden_factor is {hidden_factor}; it must be at least 1")
        if threshold < 0:
            raise ValueError(f"threshold is {threshold}; it must not be negative")
        width = dim // num_blocks
        hidden = width * hidden_factor
        self.w1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, width, hidden))
        self.b1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden))
        self.w2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden, width))
        self.b2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, width))
        self.act = activation()
        self.num_blocks, self.threshold = num_blocks, threshold

    def mix(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary part (B, C, *F) of what the MLP makes of a spectrum."""
        blocks = (self.num_blocks, -1)
        x = torch.cat([part.flatten(2).unflatten(1, blocks) for part in (real, imaginary)], dim=2)
        x = self.act(_as_real(self.w1, x.dtype) @ x + _stacked(self.b1, x.dtype))
        x = _as_real(self.w2, x.dtype) @ x + _stacked(self.b2, x.dtype)
        parts = F.softshrink(x, self.threshold).chunk(2, dim=2)
        return tuple(part.flatten(1, 2).unflatten(2, real.shape[2:]) for part in parts)


def _as_real(weight: Float[Tensor, "2 k i o"], dtype: torch.dtype) -> Float[Tensor, "k twice_o twice_i"]:
    real, imaginary = weight.to(dtype).mT
    return torch.cat((torch.cat((real, -imaginary), 2), torch.cat((imaginary, real), 2)), 1)


def _stacked(bias: Float[Tensor, "2 k o"], dtype: torch.dtype) -> Float[Tensor, "k twice_o 1"]:
    return bias.to(dtype).transpose(0, 1).flatten(1)[..., None]


def _at_least_single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class AFNO(SpectralMLP):
    """y = F^-1(M F(x)) + x, M the `SpectralMLP` at the kept frequencies and 0 at all others; F orthonormal.

    The adaptive Fourier neural operator (Guibas et al., ICLR 2022): a global convolution whose filter the input
    makes; weights do not depend on the grid. The transforms and the MLP run in float32 at least; only kept modes are
    computed. `modes` names how they are chosen (`kept_frequencies`): the two published selections are kept as they
    are, `lowpass` is the one that the word promises. With `grid`, the size that the weights were made for, `lowpass`
    keeps the same waves on every grid and scales the spectrum as on that one, so that a band-limited field gives the
    same output however finely it is sampled; published models have no such scale.

    While a model is exported, and always with `matrices`, the transforms are products with cosine and sine tables.
    `forward` maps (B, C, *S) to (B, C, *S); cost O(C N log N + C^2 M / k) for M kept modes. Circular, so not causal.

    Args:
        dim: channels C.
        num_blocks: blocks k of the MLP, a divisor of C.
        hidden_factor: the MLP's hidden width over C.
        threshold: of the soft shrinkage.
        modes, fraction, grid: the kept frequencies.
        dims: grid axes.
        matrices: real matrix products in place of FFTs.

    Raises:
        ValueError: blocks that do not divide `dim`, unknown modes, a fraction outside (0, 1], a grid without lowpass.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        *,
        hidden_factor: int = 1,
        threshold: float = 0.01,
        modes: str = "afno",
        fraction: float | int = 1.0,
        grid: Sequence[int] | None = None,
        dims: int = 2,
        matrices: bool = False,
    ) -> None:
        super().__init__(dim, num_blocks, hidden_factor, nn.ReLU, threshold)
        check_dims(dims)
        check_modes(modes, fraction, dims)
        if grid is not None and (modes != "lowpass" or len(grid) != dims):
            raise ValueError(f"grid is {tuple(grid)} with modes={modes!r}; it takes modes='lowpass' and {dims} sizes")
        self.modes, self.fraction, self.matrices = modes, fraction, matrices
        self.grid = None if grid is None else tuple(grid)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        size = tuple(x.shape[2:])
        if len(size) == 2 and self.modes == "afno" and self.fraction == 1 and torch.compiler.is_exporting():
            with full_precision(x):  # all frequencies, of any size
                y = from_half_spectrum(*self.mix(*half_spectrum(_at_least_single(x))), size[1])
            return x + y.to(x.dtype)
        frequencies = kept_frequencies(size, self.modes, self.fraction, self.grid)
        matrices = self.matrices or torch.compiler.is_exporting()
        if not all(map(len, frequencies)):
            raise ValueError(f"modes={self.modes!r} with fraction={self.fraction} keep no frequency of {size}")
        scale = 1.0
        if self.grid is not None:
            for n, reference in zip(size, self.grid):
                scale *= (reference / n) ** 0.5
        with full_precision(x):
            real, imaginary = analyse(_at_least_single(x), frequencies, matrices=matrices)
            if scale != 1:
                real, imaginary = real * scale, imaginary * scale
            real, imaginary = self.mix(real, imaginary)
            y = synthesize(real, imaginary, frequencies, size, matrices=matrices)
        return x + (y if scale == 1 else y / scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, modes={self.modes}, fraction={self.fraction}, grid={self.grid}"


class AdaptiveFrequencyFilter(SpectralMLP):
    """y = F^-1(M * F(x)) + x, where the mask M is the `SpectralMLP` of the spectrum F(x) itself; F orthonormal.

    The mixer of AFFNet (Huang et al., ICCV 2023): a circular convolution, as large as the map, whose kernel the
    input makes. Unlike AFNO's, the MLP's output multiplies the spectrum. Runs in float32 at least. The paper writes
    ReLU; the released models have SiLU, the default here.

    While a model is exported, and always with `matrices`, the transforms are products with cosine and sine tables.
    `forward` maps (B, C, *S) to (B, C, *S), any size; cost O(C N log N + C^2 N / k). Circular, so not causal.

    Args:
        dim: channels C.
        num_blocks: blocks k of the MLP, a divisor of C.
        activation: makes the MLP's activation.
        threshold: of the soft shrinkage.
        dims: grid axes.
        matrices: real matrix products in place of FFTs.

    Raises:
        ValueError: blocks that do not divide `dim`, a negative threshold, dims other than 1, 2, 3.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        threshold: float = 0.01,
        dims: int = 2,
        matrices: bool = False,
    ) -> None:
        super().__init__(dim, num_blocks, 1, activation, threshold)
        check_dims(dims)
        self.matrices = matrices

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        size = tuple(x.shape[2:])
        if len(size) == 2 and torch.compiler.is_exporting():  # of any size
            with full_precision(x):
                real, imaginary = half_spectrum(_at_least_single(x))
                a, b = self.mix(real, imaginary)
                y = from_half_spectrum(a * real - b * imaginary, a * imaginary + b * real, size[1])
            return x + y.to(x.dtype)
        frequencies = all_frequencies(size)
        matrices = self.matrices or torch.compiler.is_exporting()
        with full_precision(x):
            real, imaginary = analyse(_at_least_single(x), frequencies, matrices=matrices)
            mask_real, mask_imaginary = self.mix(real, imaginary)
            filtered_real = mask_real * real - mask_imaginary * imaginary
            filtered_imaginary = mask_real * imaginary + mask_imaginary * real
            y = synthesize(filtered_real, filtered_imaginary, frequencies, size, matrices=matrices)
        return x + y.to(x.dtype)
