"""Folding norms into the linear maps beside them, for inference."""

import torch
from torch import Tensor, nn

from nearfar.ops.common.layers import LayerScale


def batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel of a batch norm in eval mode: y = scale x + shift."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def scale_of_norm(norm: nn.modules.batchnorm._BatchNorm, dims: int = 2) -> LayerScale:
    """A batch norm in eval mode as one multiply-add."""
    scale, shift = batch_norm_affine(norm)
    layer = LayerScale(len(scale), dims=dims).to(scale)
    layer.weight.copy_(scale.reshape(layer.weight.shape))
    layer.bias.copy_(shift)
    return layer


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Move a batch norm in eval mode into the convolution before it."""
    scale, shift = batch_norm_affine(norm)
    conv.weight *= scale.reshape(-1, *(1,) * (conv.weight.ndim - 1))
    conv.bias = nn.Parameter(shift if conv.bias is None else conv.bias * scale + shift)


@torch.no_grad()
def fold_into_next(norm: nn.modules.batchnorm._BatchNorm, conv: nn.Module) -> None:
    """Move a batch norm in eval mode into the pointwise convolution or linear map that follows it."""
    scale, shift = batch_norm_affine(norm)
    weight = conv.weight.flatten(1)
    added = weight @ shift
    conv.bias = nn.Parameter(added if conv.bias is None else conv.bias + added)
    conv.weight.copy_((weight * scale).reshape(conv.weight.shape))
