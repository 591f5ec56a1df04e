"""What a model costs: multiply-accumulates, memory, time of a forward pass."""

import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nearfar.core.tensor_memory import peak_memory


@torch.no_grad()
def macs(model: nn.Module, size: int, in_chans: int = 3) -> float:
    """Multiply-accumulates of one picture, of a model before `fuse`: what torch's FlopCounterMode counts, halved."""
    x = torch.zeros(1, in_chans, size, size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


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
