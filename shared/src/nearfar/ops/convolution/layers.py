"""Small parts that convolutional blocks share: channel norm, stochastic depth, convolutions of any rank."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Convolution class by the number of grid axes."""

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""Batch norm class by the number of grid axes."""


def check_dims(dims: int, causal: bool = False) -> None:
    """Raise ValueError unless `dims` is 1, 2 or 3, and 1 where the operator is to be causal."""
    if dims not in CONVOLUTIONS:
        raise ValueError(f"dims is {dims}; allowed are 1, 2 and 3")
    if causal and dims != 1:
        raise ValueError(f"causal=True needs dims=1 (a time axis), dims is {dims}")


def check_odd(**sizes: int) -> None:
    """Raise ValueError unless every named size is odd and positive."""
    for name, size in sizes.items():
        if size < 1 or size % 2 == 0:
            raise ValueError(f"{name} is {size}; it must be odd and positive")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channel axis of `(B, C, *S)`: y_c = w_c (x_c - mean_c x) / sqrt(var_c x + eps) + b_c.

    The variance is biased. Runs as `F.layer_norm` on the channels-last view, so a channels-last map is normalised
    without a copy and any other comes out channels-last. `eps` defaults to 1e-6.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerScale(nn.Module):
    """w_c x_c + b_c on (B, C, *S); w starts at `init`, b at 0."""

    def __init__(self, dim: int, init: float | int = 1.0, *, dims: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, *(1,) * dims), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return torch.addcmul(self.bias.reshape(self.weight.shape), x, self.weight)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, each sample's branch is zeroed with probability `p`.

    Kept samples are divided by 1 - p. The identity in eval mode.
    """

    def __init__(self, p: float | int = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop_path is {p}; it must be in [0, 1)")
        self.p = p

    def forward(self, x: Float[Tensor, "b *s"]) -> Float[Tensor, "b *s"]:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DepthwiseConv(nn.Module):
    """Size-keeping depthwise convolution of rank `dims`; with `causal`, padded on the left only (dims=1).

    Its parameters are those of the convolution itself: `weight` (C, 1, k, ...) and `bias` (C).
    Cost: C k^dims multiply-adds per position.
    """

    def __init__(self, dim: int, kernel_size: int, *, dims: int = 2, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_odd(kernel_size=kernel_size)
        conv = CONVOLUTIONS[dims](dim, dim, kernel_size, groups=dim, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        self.padding = 0 if causal else kernel_size // 2
        self.left = kernel_size - 1 if causal else 0

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        if self.weight[0].numel() == 1:  # a scale per channel: single-threaded CPUs convolve group by group
            scale = self.weight[:, 0]
            return x * scale if self.bias is None else torch.addcmul(self.bias.reshape(scale.shape), x, scale)
        if self.left:
            x = F.pad(x, (self.left, 0))
        return self.convolve(x, self.weight, self.bias, padding=self.padding, groups=len(self.weight))

    def extra_repr(self) -> str:
        dim, _, *kernel = self.weight.shape
        return f"{dim}, kernel_size={tuple(kernel)}, causal={bool(self.left)}, bias={self.bias is not None}"


def batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel of a batch norm in eval mode: y = scale x + shift."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def cached_table(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what `build` returns for its (hashable) arguments: index tables, masks and the like, device included.

    Nothing is kept while a graph is traced. Tables serve in inference mode and in training alike.
    """
    kept = lru_cache(maxsize=64)(build)

    @wraps(build)
    def table(*key: Hashable) -> Tensor:
        if torch.compiler.is_compiling():
            return build(*key)
        with torch.inference_mode(False):
            return kept(*key)

    return table


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context in which autocast does not lower what follows; it changes nothing where autocast is off."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


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


class Derived:
    """Keeps the last tensor that was computed from a parameter, while that is unchanged and no gradient is needed."""

    def __init__(self) -> None:
        self.kept: tuple[tuple, Tensor] | None = None

    def get(self, parameter: Tensor, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave before for the same parameter values and `key`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or parameter.is_inference():
            return compute()
        key = (*key, parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device)
        if self.kept is None or self.kept[0] != key:
            self.kept = key, compute()
        return self.kept[1]
