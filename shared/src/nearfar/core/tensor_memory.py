"""The memory that tensors take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfar.core.memory import resident_memory


class _Live(TorchDispatchMode):
    """Follows the bytes of all tensors that are made while it is on; a view of one from before is none."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        given = {storage._cdata for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None}
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and (storage._cdata in self.live or storage._cdata not in given):
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) and value.layout == torch.strided else None


def held_memory(device: torch.device) -> int:
    """Bytes that count against a budget: of the tensors on a GPU, else of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()


def peak_memory(action: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a call adds at most: allocated by the device, or, on a CPU, of all tensors alive at once."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Live() as follow:
        action()
    return follow.peak
