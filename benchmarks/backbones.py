"""Time nearfar's backbones against timm's and transformers' in one run.

    python benchmarks/backbones.py [--device cuda] [--repeats 5] [--models NAME ...] [--csv results.csv]
    python benchmarks/backbones.py --pairs

Forward passes of 1 and 8 pictures at 224 in inference mode, and one training step of 8 pictures at 64 (64 for all,
so that convolutional and attention networks share a size). Models take turns within every repeat, so that a slow
moment of the machine falls on all; of two calls in a turn the second is timed, as a model in use finds its weights in
the caches; the median counts. Forward passes of one picture, which a slow moment changes most, take five times as many
repeats. MACs are counted by torch's FlopCounterMode, halved, and those of a fused form are the plain form's. "MAC
ratio" is the time per MAC in units of timm's ConvNeXt-T. Memory is what a call adds to the weights; of the fused layers
only their results show there.

--pairs times each of `SAME_WEIGHTS` beside the peer whose weights it holds, at the size that those were trained for,
plain and fused. A ratio is the peer's time, or memory, over ours in the same turn: above 1 ours is better. Times are of
the processor on a CPU with one thread, memory is the plain form's. Beside the median stand the lowest and the highest
ratio of all turns.
"""

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
import transformers
from torch import Tensor, nn

from nearfar.vision.cost import macs, peak_memory
from nearfar.vision.models.convnext import ConvNeXt
from nearfar.vision.models.registry import MODELS

OURS = ("nearfar_convnext_tiny", "hornet_tiny_7x7", "hornet_tiny_gf", "lsnet_t", "attnet_xxs", "attnet_t1",
        "transxnet_t", "overlock_xt", "rmt_t", "biformer_tiny", "nearfar_halonet26t")  # fmt: skip
SAME_WEIGHTS = {
    "nearfar_volo_d1_224": "volo_d1_224",
    "nearfar_convit_tiny": "convit_tiny",
    "nearfar_convit_small": "convit_small",
    "nearfar_tnt_s_patch16_224": "tnt_s_patch16_224",
    "nearfar_tnt_s_legacy_patch16_224": "tnt_s_legacy_patch16_224",
    "nearfar_halonet26t": "halonet26t",
    "nearfar_sehalonet33ts": "sehalonet33ts",
    "nearfar_halonet50ts": "halonet50ts",
    "nearfar_eca_halonext26ts": "eca_halonext26ts",
    "nearfar_haloregnetz_b": "haloregnetz_b",
    "nearfar_halonet_h1": "halonet_h1",
    "cvt_13": "transformers CvT-13",
}
"""Ours and the model, of timm where no other library is named, whose weights it holds."""

BASE = "timm convnext_tiny"
"""The model in whose units ratios are."""

FIXED_SIZE = ("swin", "vit")
"""Models of timm whose size is fixed at construction."""

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "efficientnet_b0", "vit_small_patch16_224")


class Logits(nn.Module):
    """A transformers classifier that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def models(only: Sequence[str] = ()) -> dict[str, nn.Module]:
    """All models, or those named; our ConvNeXt-T, plain and fused, holds its peer's weights."""
    torch.manual_seed(0)
    convnext = timm.create_model("convnext_tiny", ls_init_value=1.0)
    found: dict[str, nn.Module] = {"timm convnext_tiny": convnext}
    theirs = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=1000))
    found["transformers convnext"] = Logits(theirs)
    for name in PEERS[1:]:
        found[f"timm {name}"] = timm.create_model(name)
    for name in OURS:
        if "convnext" in name:
            found[name] = ConvNeXt.from_published(convnext.state_dict())
        else:
            found[name] = timm.create_model(name)
    found |= {f"{name} fused": copy.deepcopy(found[name]).fuse() for name in OURS}
    return {name: model for name, model in found.items() if not only or name in (BASE, *only)}


def pair(ours: str) -> tuple[nn.Module, nn.Module, int]:
    """The peer of `SAME_WEIGHTS`, our model with its weights, and the side of the pictures that it was trained on."""
    peer = SAME_WEIGHTS[ours]
    if peer.startswith("transformers"):
        theirs = transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=1000))
        # theirs has another activation than the published weights were trained with
        return Logits(theirs), MODELS[ours].from_published(theirs.state_dict(), activation="gelu"), 224
    theirs = timm.create_model(peer)
    return theirs, MODELS[ours].from_published(theirs.state_dict()), theirs.default_cfg["input_size"][-1]


def pairs(only: Sequence[str], batches: Sequence[int], repeats: int, device: str, layout: torch.memory_format) -> None:
    """Print a line for every model of `SAME_WEIGHTS`, or those named, and every batch; geometric means last."""
    print("model\tpictures\tpeer ms\tours ms\tspeed\tfrom\tto\tfused\tfrom\tto\tmemory")
    means: dict[int, list[tuple[float, ...]]] = {batch: [] for batch in batches}
    for name in only or SAME_WEIGHTS:
        theirs, ours, size = pair(name)
        kinds = [theirs, ours, copy.deepcopy(ours).fuse()]
        kinds = [model.to(device, memory_format=layout).eval() for model in kinds]
        for batch in batches:
            x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
            turns = []
            with torch.inference_mode():
                memory = [peak_memory(lambda m=model, x=x: m(x.clone()), device) for model in kinds[:2]]
                for _ in range(repeats * (5 if batch == 1 else 1)):
                    times = []
                    for model in kinds:
                        model(x)
                        times.append(timed(partial(model, x), device))
                    turns.append(times)
            cells = [f"{statistics.median(times):.4g}" for times in list(zip(*turns, strict=True))[:2]]
            medians = []
            for kind in (1, 2):
                ratios = [times[0] / times[kind] for times in turns]
                medians.append(statistics.median(ratios))
                cells += [f"{value:.2f}" for value in (medians[-1], min(ratios), max(ratios))]
            medians.append(memory[0] / memory[1])
            cells.append(f"{medians[-1]:.2f}")
            print("\t".join((f"{name} ({size})", str(batch), *cells)), flush=True)
            means[batch].append(tuple(medians))
    for batch, rows in means.items():
        plain, fused, memory = (f"{statistics.geometric_mean(column):.2f}" for column in zip(*rows, strict=True))
        print("\t".join(("geometric mean", str(batch), "", "", plain, "", "", fused, "", "", memory)))


def timed(action: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, of the processor on a CPU with one thread."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of SGD on random labels."""
    labels = torch.arange(len(x), device=x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument(
        "--models", nargs="+", default=(), help="only these rows of the table, beside timm's ConvNeXt-T"
    )
    parser.add_argument("--pairs", action="store_true", help="ours beside the models whose weights they hold")
    parser.add_argument("--csv", help="also write the table to this file")
    options = parser.parse_args()
    device = options.device
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    if options.pairs:
        pairs(options.models, options.batches, options.repeats, device, layout)
        return
    entries = {name: model.to(device, memory_format=layout).eval() for name, model in models(options.models).items()}
    rows: dict[str, dict] = {}
    for name, model in entries.items():
        plain = name.removesuffix(" fused")
        gmacs = rows[plain]["gmacs"] if plain in rows else macs(model, 224) / 1e9
        rows[name] = {"model": name, "params_M": sum(p.numel() for p in model.parameters()) / 1e6, "gmacs": gmacs}

    def measure(label: str, actions: dict[str, Callable[[], object]], repeats: int) -> None:
        times: dict[str, list[float]] = {name: [] for name in actions}
        for name, action in actions.items():
            rows[name][f"{label} MiB"] = peak_memory(action, device) / 2**20
        for _ in range(repeats):
            for name, action in actions.items():
                action()
                times[name].append(timed(action, device))
        base = statistics.median(times[BASE])
        for name, values in times.items():
            rows[name][f"{label} ms"] = statistics.median(values)
            rows[name][f"{label} ratio"] = statistics.median(values) / base

    with torch.inference_mode():
        for batch in options.batches:
            x = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=layout)
            repeats = options.repeats * (5 if batch == 1 else 1)
            measure(f"forward {batch}x224", {name: partial(model, x) for name, model in entries.items()}, repeats)
            for row in rows.values():
                row[f"forward {batch}x224 GMAC/s"] = batch * row["gmacs"] / row[f"forward {batch}x224 ms"] * 1e3
                base = rows[BASE][f"forward {batch}x224 GMAC/s"]
                row[f"forward {batch}x224 MAC ratio"] = base / row[f"forward {batch}x224 GMAC/s"]
    x = torch.randn(8, 3, 64, 64, device=device).to(memory_format=layout)
    steps = {}
    for name, model in entries.items():
        if "fused" in name:
            continue
        if name.startswith("timm ") and any(kind in name for kind in FIXED_SIZE):
            model = timm.create_model(name.split()[1], img_size=64).to(device)
        steps[name] = training_step(model.train(), x)
    measure("train 8x64", steps, options.repeats)

    columns = list(rows[BASE])
    print(f"{torch.get_num_threads()} threads, {device}, torch {torch.__version__}, timm {timm.__version__}")
    print("\t".join(columns))
    for row in rows.values():
        print("\t".join(f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
    if options.csv:
        with open(options.csv, "w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    sys.exit(main())
