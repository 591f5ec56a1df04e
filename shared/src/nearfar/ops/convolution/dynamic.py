"""Depthwise convolution whose kernel was computed from the input: one per sample, or one per position."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearfar.ops.common.dims import check_odd


def sample_depthwise(
    x: Float[Tensor, "b c *s"], kernel: Float[Tensor, "b c *k"], bias: Float[Tensor, "b c"] | None = None
) -> Float[Tensor, "b c *s"]:
    """out[b, c] = x[b, c] convolved with kernel[b, c] (+ bias[b, c]), zero-padded to the same size.

    1, 2 or 3 axes, odd kernel sizes. Cost C k^dims multiply-adds per position and sample. Runs as one grouped
    convolution with the batch among the groups; while a graph is exported, where the number of groups would have to
    be constant, as windows times kernel, which needs k^dims times the memory.

    Raises:
        ValueError: an even kernel size, or a rank outside 1..3.
    """
    batch, channels, *size = x.shape
    window = kernel.shape[2:]
    for length in window:
        check_odd(kernel_size=length)
    if len(size) not in (1, 2, 3) or len(window) != len(size):
        raise ValueError(f"map of {len(size)} axes and kernel of {len(window)}; both must have the same 1 to 3")
    if torch.compiler.is_exporting():
        padded = F.pad(x, [n // 2 for n in reversed(window) for _ in range(2)])
        for axis, length in enumerate(window):
            padded = padded.unfold(2 + axis, length, 1)
        taps = padded.reshape(batch, channels, math.prod(size), math.prod(window))
        out = (taps @ kernel.reshape(batch, channels, -1, 1)).reshape(x.shape)
        return out if bias is None else out + bias.reshape(batch, channels, *[1] * len(size))
    grouped = x.reshape(1, batch * channels, *size)
    if len(size) == 2 and x.device.type == "cpu" and not torch.is_grad_enabled():  # faster forward, slower backward
        grouped = grouped.contiguous(memory_format=torch.channels_last)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    out = convolve(
        grouped,
        kernel.reshape(batch * channels, 1, *window),
        None if bias is None else bias.reshape(-1),
        padding=tuple(length // 2 for length in window),
        groups=batch * channels,
    )
    return out.reshape(x.shape)


def position_depthwise(
    x: Float[Tensor, "b c *s"], kernel: Float[Tensor, "b n t *s"], *, causal: bool = False
) -> Float[Tensor, "b c *s"]:
    """out[b, c, i] = sum_t x[b, c, i + offset(t)] kernel[b, c mod n, t, i], zero-padded.

    Every position has its own kernel of t = k^dims taps (row-major), and channel c takes kernel c mod n (interleaved,
    not in runs). 1, 2 or 3 axes; with `causal` (one axis) the taps lie at and before the position. Cost C k^dims
    multiply-adds per position; runs as k^dims shifted multiply-adds, which need no k^dims-fold memory.

    Raises:
        ValueError: taps that are no odd length to the power of the axes, channels that n does not divide, causal
            with more than one axis.
    """
    channels, *size = x.shape[1:]
    kernels, taps = kernel.shape[1:3]
    dims = len(size)
    length = round(taps ** (1 / dims))
    if length**dims != taps or length % 2 == 0:
        raise ValueError(f"kernel has {taps} taps; with {dims} axes it must be an odd length to the power {dims}")
    if channels % kernels:
        raise ValueError(f"{channels} channels cannot share {kernels} kernels evenly")
    if causal and dims != 1:
        raise ValueError(f"causal=True needs one axis, the map has {dims}")
    before, after = (length - 1, 0) if causal else (length // 2, length // 2)
    # channels last, as those run together in memory whatever the size of the map
    windows = F.pad(x.movedim(1, -1), [0, 0] + [before, after] * dims).unflatten(-1, (-1, kernels))
    for axis in range(dims):
        windows = windows.unfold(1 + axis, length, 1)
    views = [windows]  # one per tap, row-major: (b, *s, c / n, n)
    for _ in size:
        views = [view for each in views for view in each.unbind(3 + dims)]
    weights = kernel.movedim((2, 1), (0, -1)).contiguous().unsqueeze(-2).unbind()  # (b, *s, 1, n)
    out = views[0] * weights[0]
    for view, weight in zip(views[1:], weights[1:], strict=True):
        out = torch.addcmul(out, view, weight)
    return out.flatten(-2).movedim(-1, 1)
