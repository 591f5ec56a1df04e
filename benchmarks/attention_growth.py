"""Growth of the vision attentions with resolution beside full attention.

    python benchmarks/attention_growth.py [--sizes 224 448 672 896] [--repeats 3] [--plot growth.png]

One layer of 64 channels and 4 heads on the stride-8 map of a square picture, forward in inference mode, one thread.
Layers take turns within every repeat and the fastest counts, in processor time, which other work on the machine changes
little. The exponent b of time ~ pixels^b is fitted over all sizes; full attention has 2 in the limit. BiFormer's
regions either stay 7 x 7, as in the published classifiers, or grow with the picture, as in the published dense models.
TNT's words are 16 of 24 channels in each position, here with their exchange alone: its sentences attend in full.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nearfar.core.plots import COLORS, new_figure, style
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention, EnhancedAttention
from nearfar.ops.attention.conv_projection import ConvProjectionAttention
from nearfar.ops.attention.gated_positional import GatedPositionalAttention
from nearfar.ops.attention.halo import HaloAttention
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.ops.attention.outlook import OutlookAttention
from nearfar.ops.tokens.words import WordsToSentences
from nearfar.vision.models.tnt import InnerBlock

DIM, HEADS = 64, 4


class OfTokens(nn.Module):
    """A layer of tokens and their grid, as one of maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).mT, tuple(x.shape[-2:]))


class Words(nn.Module):
    """TNT's words of every position, through their transformer and into the position; the words stay as they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.randn(16, 24)
        self.inner = InnerBlock(24, 4, 4.0, 0.0, False, norm_sentence=False)
        self.exchange = WordsToSentences(DIM, 24, 16)

    def forward(self, x: Tensor) -> Tensor:
        sentences = x.flatten(2).mT
        return self.exchange(self.inner(self.words.expand(sentences.shape[1], -1, -1)), sentences)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "full attention": lambda size: EnhancedAttention(DIM, HEADS, kernel_size=0),
    "CvT: convolved, keys at half the side": lambda size: OfTokens(ConvProjectionAttention(DIM, HEADS)),
    "TNT: words and exchange": lambda size: Words(),
    "VOLO: outlook, 3 x 3": lambda size: OutlookAttention(DIM, HEADS, 3, 2),
    "ConViT: gated positional": lambda size: GatedPositionalAttention(DIM, HEADS),
    "HaloNet: blocks of 8, halo of 3": lambda size: HaloAttention(DIM, num_heads=HEADS, pad=True),
    "BiFormer: 4 of 7 x 7 regions": lambda size: BiLevelRoutingAttention(DIM, HEADS, 7, 4),
    "BiFormer: 4 regions of a number that grows": lambda size: BiLevelRoutingAttention(DIM, HEADS, 7 * size // 224, 4),
    "RMT: Manhattan": lambda size: ManhattanAttention(DIM, HEADS),
    "RMT: Manhattan, axis by axis": lambda size: ManhattanAttention(DIM, HEADS, decomposed=True),
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
        x = torch.randn(1, DIM, size // 8, size // 8).contiguous(memory_format=torch.channels_last)
        layers = {name: build(size).eval() for name, build in LAYERS.items()}
        found = fastest({name: partial(layer, x) for name, layer in layers.items()}, repeats)
        for name, value in found.items():
            rows[name].append(value)
    print("layer\t" + "\t".join(f"{size} px ms" for size in sizes) + "\texponent")
    for name, times in rows.items():
        print(name + "\t" + "\t".join(f"{value:.3g}" for value in times) + f"\t{exponent(sizes, times):.2f}")
    if plot:
        with style():
            figure = new_figure(9, 4.5)
            axes = figure.subplots()
            for i, (name, times) in enumerate(rows.items()):
                look = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else "--"}
                label = f"{name}: pixels^{exponent(sizes, times):.2f}"
                axes.loglog(sizes, times, "osD^vP*X<>"[i], label=label, **look)
            axes.set_xticks(sizes, map(str, sizes), minor=False)
            axes.set_xticks([], minor=True)
            axes.set_xlabel("side of the picture (pixels)")
            axes.set_ylabel("milliseconds")
            figure.legend(loc="outside right upper", fontsize=8, frameon=False)
            figure.savefig(plot, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 672, 896])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", help="write a picture of the growth to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        growth(options.sizes, options.repeats, options.plot)


if __name__ == "__main__":
    main()
