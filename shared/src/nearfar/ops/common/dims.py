"""The layers of 1, 2 and 3 dimensions by number, and checks of what they take."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """torch's convolution, faster on channels-last maps on a CPU where pointwise or of few positions; same numbers.

    With one thread and fewer than 16 pictures torch multiplies without oneDNN, and copies the map channels-first and
    back where it must. Here a pointwise convolution is a linear map of the positions, and without gradients several
    pictures of 2^15 numbers and more in all go to oneDNN. Milliseconds of one thread of an EPYC (Zen 4), torch's first:
    (1, 48, 56, 56) to 512 channels 1.97 and 1.64, (1, 384, 7, 7) to 2048 1.15 and 0.97, (8, 96, 28, 28) to 1024 14.7
    and 13.0, (8, 224, 14, 14) to 1194 12.5 and 8.7 (12.1 and 9.2 with ONEDNN_MAX_CPU_ISA=AVX2); both passes in
    training of (8, 384, 2, 2) to 2048 4.6 and 2.7 (17.4 channels-first), of (8, 597, 4, 4) to 224 1.75 and 1.43.

    A wider kernel with eight times as many weights as the map has numbers convolves channels-first, as the weights lie:
    else they and their gradient are turned round. (1, 384, 14, 14) to 768 by 2 x 2 at stride 2 takes 3.5 ms for 7.3,
    both passes of (8, 224, 4, 4) to 448 by 3 x 3 6.3 for 17.2 (2.9 for 6.2 and 5.2 for 13.0 with AVX2).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _lies_by_position(input, self.weight) or self.groups > 1:
            return super().forward(input)
        if not (self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)):
            if 8 * input.numel() >= self.weight.numel():
                return super().forward(input)
            return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)
        if len(input) > 1 and input.numel() >= 2**15 and not torch.is_grad_enabled():
            return torch.mkldnn_convolution(input, self.weight, self.bias, (0, 0), (1, 1), (1, 1), 1)
        y = F.linear(input.movedim(1, -1).flatten(0, 2), self.weight.flatten(1), self.bias)
        return y.unflatten(0, (len(input), *input.shape[2:])).movedim(-1, 1)


def _lies_by_position(x: Tensor, weight: Tensor) -> bool:
    """Whether a map (B, C, H, W) of float32 lies on a CPU with the channels of a position together; not in graphs."""
    return (
        isinstance(x, Tensor)  # and no proxy of torch.fx
        and x.is_cpu
        and x.ndim == 4
        and x.stride(1) == 1
        and x.shape[1] > 1
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


CONVOLUTIONS = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}
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
