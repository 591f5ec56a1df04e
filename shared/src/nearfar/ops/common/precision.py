"""Running a part in full precision under autocast; whether bfloat16 can be trusted on this processor."""

import os
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context in which autocast does not lower what follows; it changes nothing where autocast is off."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


BFLOAT16_ISA = "AVX512_CORE_BF16"
"""The instruction set whose bfloat16 convolutions of oneDNN are right where those for AMX are not."""

SUSPECTS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (8, (1, 8)), (8, (1, 12)), (8, (1, 16)), (2, (1, 32)), (4, (1, 16)), (8, (12,)), (16, (1, 8)), (8, (1, 7)),
)  # fmt: skip
"""(input channels, kernel) of the convolutions that are tried: few channels and long kernels, and others."""


def guard_bfloat16(environment: MutableMapping[str, str] = os.environ, amx: bool | None = None) -> bool:
    """Keep oneDNN from AMX, unless the user has chosen an instruction set; whether it was done.

    oneDNN 3.12, of torch 2.14, gives garbage for bfloat16 convolutions with few input channels and long kernels on
    processors with AMX. It looks at ONEDNN_MAX_CPU_ISA once, at its first computation in a process.
    """
    if amx is None:
        amx = torch.cpu._is_amx_tile_supported()
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    if not amx or any(name in environment for name in names):
        return False
    environment[names[0]] = BFLOAT16_ISA
    return True


@torch.no_grad()
def bfloat16_error() -> float:
    """The largest relative error of bfloat16 convolutions on this processor: about 0.004 where they are right."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", enabled=False):
        for channels, kernel in SUSPECTS:
            conv = torch.conv2d if len(kernel) == 2 else torch.conv1d
            size = (8, 64) if len(kernel) == 2 else (64,)
            x = torch.randn(2, channels, *size, generator=generator).bfloat16()
            weight = torch.randn(16, channels, *kernel, generator=generator).bfloat16()
            right = conv(x.double(), weight.double())
            worst = max(worst, float((conv(x, weight).double() - right).norm() / right.norm()))
    return worst


@cache
def check_bfloat16() -> None:
    """Raise RuntimeError where this processor's bfloat16 convolutions are wrong; the check runs once in a process."""
    if not (error := bfloat16_error()) < 0.02:
        raise RuntimeError(
            f"bfloat16 convolutions are off by {100 * error:.0f} % here, a fault of oneDNN on this processor; set "
            f"ONEDNN_MAX_CPU_ISA={BFLOAT16_ISA} before Python starts, or compute in float32"
        )
