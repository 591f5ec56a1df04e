"""Growth of the vision attentions with resolution beside full attention, and HaloNet beside timm's on the same weights.

    python benchmarks/attention_growth.py [--sizes 224 448 896] [--repeats 3] [--plot growth.png] [--halonet]

One layer of 64 channels and 4 heads on the stride-8 map of a square picture, forward in inference mode, one thread.
Layers take turns within every repeat and the fastest counts, in processor time, which other work on the machine changes
little. The exponent b of time ~ pixels^b is fitted over all sizes; full attention has 2 in the limit. BiFormer's
regions either stay 7 x 7, as in the published classifiers, or grow with the picture, as in the published dense models.
`--halonet` times timm's HaloNets and ours at 256 pixels on the same weights instead.
"""

import argparse
import math
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

from nearfar.core.plots import new_figure, style
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention, EnhancedAttention
from nearfar.ops.attention.halo import HaloAttention
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.vision.models.halonet import HaloNet

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "full attention": lambda size: EnhancedAttention(64, 4, kernel_size=0),
    "halo, blocks of 8": lambda size: HaloAttention(64, num_heads=4, pad=True),
    "routing, 7 x 7 regions": lambda size: BiLevelRoutingAttention(64, 4, 7, 4),
    "routing, regions grow": lambda size: BiLevelRoutingAttention(64, 4, 7 * size // 224, 4),
    "Manhattan": lambda size: ManhattanAttention(64, 4),
    "Manhattan, axis by axis": lambda size: ManhattanAttention(64, 4, decomposed=True),
}


def fastest(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest of several calls of each, taken in turns after one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            start = time.process_time()
            action()
            if turn:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: min(values) for name, values in times.items()}


def exponent(sizes: list[int], times: list[float]) -> float:
    """b of time ~ (size^2)^b by least squares of the logarithms."""
    x = torch.tensor([2 * math.log(size) for size in sizes])
    y = torch.tensor(times).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def growth(sizes: list[int], repeats: int, plot: str | None) -> None:
    rows: dict[str, list[float]] = {name: [] for name in LAYERS}
    for size in sizes:
        x = torch.randn(1, 64, size // 8, size // 8).contiguous(memory_format=torch.channels_last)
        layers = {name: build(size).eval() for name, build in LAYERS.items()}
        found = fastest({name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}, repeats)
        for name, value in found.items():
            rows[name].append(value)
    print("layer\t" + "\t".join(f"{size} px ms" for size in sizes) + "\texponent")
    for name, times in rows.items():
        print(name + "\t" + "\t".join(f"{value:.3g}" for value in times) + f"\t{exponent(sizes, times):.2f}")
    if plot:
        with style():
            figure = new_figure(6, 4)
            axes = figure.subplots()
            for name, times in rows.items():
                axes.loglog(sizes, times, "o-", label=f"{name}: pixels^{exponent(sizes, times):.2f}")
            axes.set_xlabel("side of the picture (pixels)")
            axes.set_ylabel("milliseconds")
            axes.legend(fontsize=7)
            figure.savefig(plot)


def halonets(repeats: int) -> None:
    print("model\ttimm ms\tours ms\tratio")
    ratios = []
    for name in ("halonet26t", "eca_halonext26ts", "sehalonet33ts", "halonet50ts", "halonet_h1"):
        theirs = timm.create_model(name).eval()
        ours = HaloNet.from_published(theirs.state_dict())
        x = torch.randn(1, 3, 256, 256)
        times = fastest({"timm": lambda m=theirs, x=x: m(x), "ours": lambda m=ours, x=x: m(x)}, repeats)
        ratios.append(times["timm"] / times["ours"])
        print(f"{name}\t{times['timm']:.4g}\t{times['ours']:.4g}\t{ratios[-1]:.2f}")
    print(f"geometric mean\t\t\t{math.prod(ratios) ** (1 / len(ratios)):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 672, 896])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", help="write a picture of the growth to this file")
    parser.add_argument("--halonet", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.halonet:
            halonets(options.repeats)
        else:
            growth(options.sizes, options.repeats, options.plot)


if __name__ == "__main__":
    main()
