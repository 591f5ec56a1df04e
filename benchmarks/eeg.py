"""AGTCNet against braindecode's networks, and attention over a graph's edges against the dense form, in one run.

    python benchmarks/eeg.py [--device cuda] [--threads 2] [--repeats 9] [--json eeg.json]

Forward (inference mode) and training step (forward, backward, Adam) at 22 x 375 and 64 x 640 samples, batches of 1 and
32; ratios are to AGTCNet. The graph attention is AGTCNet's at 64 electrodes, 303 time steps and 32 trials: "edges" is
scores, softmax and weighted sum alone, "layer" with its convolutions.

Networks take turns within every repeat, so that a slow moment of the machine falls on all; the least time counts, on
one CPU thread as processor time. Memory is what torch has allocated at the peak of a call, beyond what it had before.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import braindecode.models
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity

from nearfar.eeg.models.agtcnet import VARIANTS, AGTCNet
from nearfar.ops.graph.attention import GraphConvAttention

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces each of its runs
PEERS = ("EEGNet", "ATCNet", "EEGConformer", "TCFormer")


def networks(variant: str, device: str) -> dict[str, nn.Module]:
    settings = VARIANTS[variant]
    sizes = {
        "n_chans": len(settings["chs_info"]),
        "n_outputs": 4,
        "n_times": settings["n_times"],
        "sfreq": settings["sfreq"],
    }
    peers = {name: getattr(braindecode.models, name)(**sizes) for name in PEERS}
    return {name: model.to(device) for name, model in {"AGTCNet": AGTCNet(**settings), **peers}.items()}


def forward(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def call() -> None:
        model.eval()(*inputs)

    return call


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    y = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def call() -> None:
        model.train()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def gradients(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], None]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)

    def call() -> None:
        y = model.train()(*inputs)
        torch.autograd.grad(y, [*inputs, *model.parameters()], torch.ones_like(y))

    return call


class Timer:
    def __init__(self, device: str, threads: int) -> None:
        self.cuda = device.startswith("cuda")
        self.clock = time.process_time if threads == 1 and not self.cuda else time.perf_counter

    def once(self, call: Callable[[], None]) -> float:
        start = self.clock()
        call()
        if self.cuda:
            torch.cuda.synchronize()
        return 1000 * (self.clock() - start)

    def in_turns(self, calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
        """Least milliseconds of each call."""
        for call in calls.values():
            self.once(call)
        times = [{name: self.once(call) for name, call in calls.items()} for _ in range(repeats)]
        return {name: min(row[name] for row in times) for name in calls}

    def memory(self, call: Callable[[], None]) -> float:
        """Megabytes that the call adds at its peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate(event.nbytes() for event in events)) / 2**20


def compare_networks(timer: Timer, device: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for variant in ("bciciv2a-3s", "eegmmidb-4class"):
        models = networks(variant, device)
        for batch in (1, 32):
            x = 10 * torch.randn(batch, models["AGTCNet"].n_chans, models["AGTCNet"].n_times, device=device)
            forwards = {name: forward(model, x) for name, model in models.items()}
            steps = {name: training_step(model, x) for name, model in models.items()}
            forward_ms, step_ms = timer.in_turns(forwards, repeats), timer.in_turns(steps, max(3, repeats // 3))
            for name, model in models.items():
                rows.append({
                    "input": f"{x.shape[1]} x {x.shape[2]}",
                    "batch": batch,
                    "model": name,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "forward_ms": forward_ms[name],
                    "forward_ratio": forward_ms[name] / forward_ms["AGTCNet"],
                    "step_ms": step_ms[name],
                    "step_ratio": step_ms[name] / step_ms["AGTCNet"],
                    "forward_mb": timer.memory(forwards[name]),
                    "step_mb": timer.memory(steps[name]),
                })  # fmt: skip
    return rows


def compare_attention(timer: Timer, device: str, repeats: int) -> list[dict[str, Any]]:
    gcat: GraphConvAttention = AGTCNet(**VARIANTS["eegmmidb-4class"]).gcat.to(device)
    with torch.inference_mode():
        x = torch.randn(32, 8, 64, 303, device=device).contiguous(memory_format=torch.channels_last)
        scores = gcat.score(gcat.weight(x)).unflatten(1, (2, 2))
        values = gcat.value(x).unflatten(1, (2, 16))
        source, target = scores[:, :, 0].contiguous(), scores[:, :, 1].contiguous()
    parts = {"edges": (gcat.attention, (source, target, values)), "layer": (gcat, (x,))}
    rows = []
    for part, (module, inputs) in parts.items():
        inputs = tuple(value.clone() for value in inputs)
        found: dict[str, dict[str, float]] = {"sparse": {}, "dense": {}}
        for kind, make in (("forward", forward), ("step", gradients)):
            calls = {
                "sparse": select(gcat, True, make(module, *inputs)),
                "dense": select(gcat, False, make(module, *inputs)),
            }
            for form, ms in timer.in_turns(calls, max(3, repeats // 3)).items():
                found[form] |= {f"{kind}_ms": ms, f"{kind}_mb": timer.memory(calls[form])}
        for form, figures in found.items():
            rows.append({"part": part, "form": form, **figures})
    return rows


def select(gcat: GraphConvAttention, sparse: bool, call: Callable[[], None]) -> Callable[[], None]:
    def selected() -> None:
        gcat.attention.sparse = sparse
        call()

    return selected


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(
            name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    timer = Timer(options.device, options.threads)
    attention = compare_attention(timer, options.device, options.repeats)
    models = compare_networks(timer, options.device, options.repeats)
    device = torch.cuda.get_device_name() if timer.cuda else f"cpu, {options.threads} threads"
    console = Console(width=140)
    show(console, f"Graph attention at 64 electrodes, 303 steps, 32 trials ({device})", attention)
    for part, (sparse, dense) in {"edges": attention[:2], "layer": attention[2:]}.items():
        ratios = {key: dense[key] / sparse[key] for key in sparse if key[-3:] in ("_ms", "_mb")}
        console.print(f"{part}: dense / sparse", ", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in ratios.items()))
    show(console, f"Networks ({device})", models)
    if options.json:
        figures = {"device": device, "torch": torch.__version__, "attention": attention, "networks": models}
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
