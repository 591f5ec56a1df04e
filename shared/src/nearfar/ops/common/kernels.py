"""Other packages' CUDA kernels, used where they are installed: flash-linear-attention (`fla`) and `mamba_ssm`.

An operator asks `kernel` for a function and runs its own form, which needs none of them, where it gets None.
`one_node` tells when a compiled graph takes that form as a kernel of ours.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

enabled = True
"""Set to False to run the plain forms everywhere."""


def kernel(x: Tensor, module: str, name: str, tensor_cores: bool = False) -> Callable[..., Any] | None:
    """The function `name` of `module` for work on `x`; None off CUDA, or where the package is missing.

    `tensor_cores`: the kernel multiplies float32 in TF32 (errors near 1e-3), so float32 gets it only under autocast or
    where torch was told to accept that (`torch.set_float32_matmul_precision("high")`). No kernel takes float64.
    """
    if not (enabled and x.is_cuda) or x.dtype == torch.float64:
        return None
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if tensor_cores and exact and not torch.is_autocast_enabled("cuda"):
        return None
    return installed(module, name)


@functools.cache
def loses_gradients(device: torch.device) -> bool:
    """Whether the backward pass of fla's chunked kernels is wrong: Triton 3.4 to 3.7.0 on Hopper (fla issue 640)."""
    triton = TorchVersion(installed("triton", "__version__") or "0")
    return torch.cuda.get_device_capability(device)[0] == 9 and (3, 4) <= triton < (3, 7, 1)


@functools.cache
def installed(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def one_node(x: Tensor) -> bool:
    """Whether an operator's steps are to be one node of a graph, which is compiled for a CPU without gradients."""
    inference = x.is_cpu and not torch.is_grad_enabled()
    return inference and torch.compiler.is_compiling() and not torch.compiler.is_exporting()
