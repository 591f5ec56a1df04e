"""The Fourier transform of real signals, with a real transform as its gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rfft(x: Tensor, n: int) -> Tensor:
    """`torch.fft.rfft(x, n)` over the last axis: `(..., N)` to `(..., n // 2 + 1)`, complex.

    torch computes the gradient by a complex transform of n points; here it is the inverse real one, which costs half
    and less: over (1, 256, 2048), n = 4096, forward and backward take 6 ms in place of 14 (one thread of an EPYC,
    Zen 3). A compiler, which sees through torch's own, is given that one.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.fft.rfft(x, n)
    return _RealFFT.apply(x, n)


class _RealFFT(torch.autograd.Function):
    """X_k = sum_t x_t e^(-2 pi i k t / n), k <= n / 2; the gradient is Re sum_k g_k e^(2 pi i k t / n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, n: int) -> Tensor:
        return torch.fft.rfft(x, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.length, ctx.n = inputs[0].shape[-1], inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # the inverse transform counts every frequency twice, but for 0 and n / 2
        twice = grad.clone()
        twice[..., :: ctx.n // 2 if ctx.n % 2 == 0 else ctx.n] *= 2
        x = torch.fft.irfft(twice, ctx.n, norm="forward")[..., : ctx.length] / 2
        return F.pad(x, (0, max(0, ctx.length - ctx.n))), None
