"""Initialization and activation as Keras defines them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def selu_(x: Tensor) -> Tensor:
    """SELU(x) = scale (max(x, 0) + alpha (exp(min(x, 0)) - 1)), which overwrites x (Klambauer et al. 2017, 1706.02515).

    The same as `F.selu`, whose CPU kernel evaluates expm1 and takes six times as long; the difference is one rounding
    of values near 0. Only the result is kept for the gradient.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return F.selu(x, inplace=True)
    if torch.compiler.is_compiling():
        return SELU_SCALE * (x.clamp(min=0) + SELU_ALPHA * (x.clamp(max=0).exp() - 1))
    return _Selu.apply(x)


class _Selu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        in_memory = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
        parts = in_memory.view(-1).split(2**18) if in_memory.is_contiguous() else [x]
        for part in parts:  # of a size that stays in the cache over the five passes
            negative = part.clamp(max=0).exp_().sub_(1)
            part.clamp_(min=0).add_(negative, alpha=SELU_ALPHA).mul_(SELU_SCALE)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return torch.ops.aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1.0, True, y)  # from the result alone


def glorot_uniform_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill `weight` uniformly in +-sqrt(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
