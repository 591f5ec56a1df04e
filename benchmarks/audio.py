"""Forward time of speaker heads on the hidden states of a base backbone.

    uv run --group bench python benchmarks/audio.py [--device cuda] [--threads 2] [--compile] [--frames 150]

L-TDNN in both forms and LAP at [1, 13, 150, 768] (3 s of speech), against speechbrain's ECAPA_TDNN on the same input
after a weighted sum of the layers. Multiply-accumulates are counted, times are the best of several runs, the models in
turn, all in one process; the ratios are what to read.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nearfar.audio.speakers.ltdnn import LAP, LTDNN


class WeightedSum(nn.Module):
    """A softmax-weighted sum over the layers, then a network on `(B, T, D)`."""

    def __init__(self, num_states: int, network: nn.Module) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_states))
        self.network = network

    def forward(self, states: Tensor) -> Tensor:
        return self.network(torch.einsum("l,bltd->btd", self.weights.softmax(0), states))


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def multiply_accumulates(model: nn.Module, states: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(states)
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    states = torch.randn(options.batch, 13, options.frames, 768, device=options.device)
    models: dict[str, nn.Module] = {
        "ltdnn-ecapa": LTDNN(form="ecapa"),
        "ltdnn-d3net": LTDNN(form="d3net"),
        "lap": LAP(),
    }
    try:
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    except ImportError:
        print("speechbrain is not installed (--group bench): no comparison")
    else:
        models["speechbrain-ecapa"] = WeightedSum(13, ECAPA_TDNN(768, lin_neurons=192))

    found, calls = {}, {}
    with torch.inference_mode():
        for name, model in models.items():
            model = model.to(options.device).eval()
            parameters = sum(p.numel() for p in model.parameters())
            found[name] = {"million_parameters": parameters / 1e6, "gmac": multiply_accumulates(model, states) / 1e9}
            calls[name] = torch.compile(model) if options.compile else model
        for model in 2 * [*calls.values()]:  # to warm up, and to compile
            model(states)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.repeats):
            for name, model in calls.items():
                times[name].append(seconds(lambda model=model: model(states), options.device))
    for name, figures in found.items():
        figures["milliseconds"] = 1000 * min(times[name])
        figures["gmac_per_second"] = figures["gmac"] / min(times[name])
    reference = dict(found.get("speechbrain-ecapa", {}))
    for name, figures in found.items():
        if reference:
            figures |= {f"{key}_ratio": figures[key] / reference[key] for key in ("gmac", "milliseconds")}
        print(f"{name:18s}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(found, stream, indent=2)


if __name__ == "__main__":
    main()
