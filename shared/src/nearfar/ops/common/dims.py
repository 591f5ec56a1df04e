"""The layers of 1, 2 and 3 dimensions by number, and checks of what they take."""

from torch import nn

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
