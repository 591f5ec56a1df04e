"""What a model costs: multiply-accumulates, memory, time of a forward pass."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def macs(model: nn.Module, size: int, in_chans: int = 3) -> float:
    """Multiply-accumulates of one picture, of a model before `fuse`: what torch's FlopCounterMode counts, halved."""
    x = torch.zeros(1, in_chans, size, size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


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


def cost(model: nn.Module, size: int, device: str = "cpu", batch: int = 16) -> dict[str, float]:
    """Multiply-accumulates of a picture; pictures a second and memory, weights included, of a forward pass."""
    model = model.to(device).eval()
    x = torch.randn(batch, 3, size, size, device=device)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    times = []
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            model(x)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        peak = weights + peak_memory(lambda: model(x), device)
    return {
        "MMACs": macs(model, size) / 1e6,
        "pictures/s": batch / statistics.median(times[1:]),
        "memory (MiB)": peak / 2**20,
    }
