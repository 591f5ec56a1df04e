"""The selective scan and the networks on it, beside their plain PyTorch forms, transformers and mambapy, in one run.

    python benchmarks/scans.py scan       # B 1, D 192, N 16, L 3136: time and memory, forward and training step
                                          # (that of transformers, the last row, takes minutes)
    python benchmarks/scans.py growth     # time against length, 1k to 64k, and its exponent
    python benchmarks/scans.py models     # Vim-tiny at 224 and VMamba-T forward, with the plain scan in its place

One thread; the shortest of several runs of processor time counts, so that other work on the machine disturbs little.
Memory is the rise of a forked process's resident size (Linux). mambapy takes part where it is installed
(`uv run --with mambapy`).
"""

import argparse
import importlib
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import nearfar.vision  # noqa: F401  registers vim and vmamba
from nearfar.ops.recurrence import directional_mamba
from nearfar.ops.recurrence.mamba import selective_scan


def loop_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The reference: decays and inputs of all positions as tensors, then a loop over positions."""
    decay = torch.exp(torch.einsum("bne,es->bnes", dt, A))
    push = torch.einsum("bne,bns,bne->bnes", dt, B, u)
    h, rows = torch.zeros_like(push[:, 0]), []
    for a, x, c in zip(decay.unbind(1), push.unbind(1), C.unbind(1)):  # slices would each fill a gradient of full size
        h = a * h + x
        rows.append(torch.einsum("bes,bs->be", h, c))
    return torch.stack(rows, 1)


def plain_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Any = None, **more: Any) -> Any:
    """`selective_scan` by that loop, with copies in each direction's order, as the networks' plain forms do it."""
    dt = dt + more["dt_bias"] if more.get("dt_bias") is not None else dt
    dt = F.softplus(dt) if more.get("softplus") else dt
    groups, order = B.shape[2], more.get("order")
    u = u.repeat(1, 1, groups) if u.shape[-1] < dt.shape[-1] else u
    parts, D = [], more.get("D")
    for g, (ug, dtg, Ag) in enumerate(zip(u.chunk(groups, -1), dt.chunk(groups, -1), A.chunk(groups, 0))):
        visit = slice(None) if order is None else order[g]
        y = loop_scan(ug[:, visit], dtg[:, visit], Ag, B[:, visit, g], C[:, visit, g])
        parts.append(y if order is None else y[:, order[g].argsort()])
    y = torch.cat(parts, -1)
    return (y if D is None else y + D * u), None


def best(run: Callable[[], Any], repeats: int = 3) -> float:
    """Milliseconds of processor time."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def peak_memory(run: Callable[[], Any]) -> float:
    """MB by which the resident memory of a child process rises in `run`."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        run()
        risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
        os.write(writer, repr(risen).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return float(pipe.read())


def inputs(length: int, dim: int = 192, states: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    dt = F.softplus(torch.randn(1, length, dim) - 3)
    A = -torch.arange(1.0, states + 1).expand(dim, -1).contiguous()
    return torch.randn(1, length, dim), dt, A, torch.randn(1, length, states), torch.randn(1, length, states)


def scan() -> None:
    given = inputs(3136)
    forms: dict[str, Callable[..., Tensor]] = {"loop": loop_scan, "ours": lambda *a: selective_scan(*a)[0]}
    try:
        pscan = importlib.import_module("mambapy.pscan").pscan

        def parallel(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            h = pscan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None])
            return (h @ C[..., None])[..., 0]

        forms["mambapy"] = parallel
    except ImportError:
        print("mambapy: not installed")
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        swap = lambda t: t.mT.contiguous()  # noqa: E731
        forms["transformers"] = lambda u, dt, A, B, C: swap(
            mamba_selective_scan(swap(u), swap(dt), A, swap(B), swap(C), return_last_state=True)[0]
        )
    except ImportError:
        print("transformers: has no mamba_selective_scan")
    want = loop_scan(*given)
    print(f"{'form':14}{'error':>10}{'forward ms':>12}{'MB':>8}{'step ms':>10}{'MB':>8}")
    for name, form in forms.items():
        with torch.no_grad():
            error = float((form(*given) - want).norm() / want.norm())
            forward, memory = best(lambda f=form: f(*given)), peak_memory(lambda f=form: f(*given))
        print(f"{name:14}{error:10.1e}{forward:12.1f}{memory:8.1f}", end="", flush=True)
        leaves = [t.clone().requires_grad_() for t in given]
        step = lambda f=form, leaves=leaves: f(*leaves).sum().backward()  # noqa: E731
        print(f"{best(step, 1):10.1f}{peak_memory(step):8.1f}", flush=True)


def growth() -> None:
    lengths, times = [1024 * 2**i for i in range(7)], {"forward": list[float](), "step": list[float]()}
    for length in lengths:
        given = inputs(length)
        leaves = [t.clone().requires_grad_() for t in given]
        with torch.no_grad():
            times["forward"].append(best(lambda g=given: selective_scan(*g)))
        times["step"].append(best(lambda g=leaves: selective_scan(*g)[0].sum().backward()))
        print(f"L {length:6d}  forward {times['forward'][-1]:9.1f} ms  step {times['step'][-1]:9.1f} ms", flush=True)
    for what, taken in times.items():
        slope = np.polyfit(np.log(lengths), np.log(taken), 1)[0]
        print(f"{what} grows as L to the power {slope:.3f}")


def models() -> None:
    for name in ("vim_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_v0"):
        model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            ours, y = best(lambda m=model, x=x: m(x), 2), model(x)
            with mock.patch.object(directional_mamba, "selective_scan", plain_scan):
                plain, want = best(lambda m=model, x=x: m(x), 1), model(x)
        error = float((y - want).norm() / want.norm())
        print(
            f"{name:22} plain {plain:8.0f} ms  ours {ours:8.0f} ms  {plain / ours:5.1f} x  error {error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scan", "growth", "models"])
    torch.set_num_threads(1)
    {"scan": scan, "growth": growth, "models": models}[parser.parse_args().what]()
