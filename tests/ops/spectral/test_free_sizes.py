"""What exported graphs compute in place of FFTs and Kronecker products, at sizes that they were not traced at."""

import pytest
import torch
from torch import nn

from nearfar.ops.convolution.dmixer import IDConv
from nearfar.ops.spectral.adaptive import AFNO, AdaptiveFrequencyFilter
from nearfar.ops.spectral.fourier import from_half_spectrum, half_spectrum
from nearfar.ops.spectral.global_filter import GlobalLocalFilter
from tests.vision.base import close, without_shape_checks


@pytest.mark.parametrize("size", [(9, 12), (8, 7), (1, 4), (5, 1)])
def test_half_spectrum_is_the_orthonormal_fft(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    want = torch.fft.rfft2(x, norm="ortho")
    real, imaginary = half_spectrum(x)
    assert torch.allclose(real, want.real, atol=1e-12)
    assert torch.allclose(imaginary, want.imag, atol=1e-12)
    assert torch.allclose(from_half_spectrum(real, imaginary, size[1]), x, atol=1e-12)
    # a spectrum that no real map has: what irfft2 leaves out is left out
    real, imaginary = torch.randn_like(real), torch.randn_like(real)
    want = torch.fft.irfft2(torch.complex(real, imaginary), s=size, norm="ortho")
    assert torch.allclose(from_half_spectrum(real, imaginary, size[1]), want, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        GlobalLocalFilter(8, 6, 4),
        AFNO(8, 2),
        AdaptiveFrequencyFilter(8, 2),
        IDConv(8, 3, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
@torch.no_grad()
def test_exported_for_any_size(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    without_shape_checks(monkeypatch)
    free = torch.export.Dim.DYNAMIC
    axes = ({0: free, 2: free, 3: free},)
    program = torch.export.export(layer.eval(), (torch.randn(2, 8, 10, 14),), dynamic_shapes=axes, strict=False)
    for size in ((10, 14), (9, 7), (16, 16)):
        x = torch.randn(1, 8, *size)
        close(program.module()(x), layer(x), 1e-5)
