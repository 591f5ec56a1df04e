"""What context is good for: `python benchmarks/regions.py`.

Pictures and masks of `nearfar.vision.data.plates`, handwritten digits on pieces of photographs. For two of the four
classes the region's surroundings decide, for the others they say nothing. Networks of small backbones learn 800
pictures: the region alone, RveRNet's two views, and the whole picture once, pooled inside and outside the region (the
successor of ours); accuracy on 400 others, of no digit seen in training, mean and range over the seeds. Time is that of
ten passes of 64 pictures, as a multiple of the first network's; processor time counts.
"""

import statistics
import time
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from nearfar.core.cli.console import console, table
from nearfar.vision.classification.regions import Network, answers, train_regions
from nearfar.vision.data.plates import AMBIGUOUS, CLASSES, SIZE, plates
from nearfar.vision.models.rvernet import RegionPooling, RveRNet, Single


class Small(nn.Module):
    """A backbone of three convolutions, with classes of its own as RveRNet's have."""

    num_features = 32

    def __init__(self, answers: int = 24) -> None:
        super().__init__()
        widths = (3, 16, 32, self.num_features)
        layers = [
            layer
            for i in range(3)
            for layer in (nn.Conv2d(*widths[i : i + 2], 3, 2 - i // 2, 1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features * SIZE[0] // 4 * SIZE[1] // 4, answers)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


NETWORKS = {
    "region alone": lambda: Single(Small(), len(CLASSES)),
    "region and context (RveRNet)": lambda: RveRNet(Small(), Small(), len(CLASSES), 32),
    "one pass, pooled in and out": lambda: RegionPooling(Small(), len(CLASSES), 32),
}


def inputs_of(network: Network, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    return (x, masks) if isinstance(network, RegionPooling) else (x * masks, x * (1 - masks))


def learned(name: str, seed: int, epochs: int) -> dict[str, float]:
    """Accuracies of a network that learned with this seed, its parameters and time."""
    x, masks, y = plates(800, 2 * seed)
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    train_regions(network, inputs_of(network, x, masks), y, epochs=epochs, learning_rate=3e-3, seed=seed, flip=0.0)
    x, masks, y = plates(400, 2 * seed + 1)
    seen = inputs_of(network, x, masks)
    right = (answers(network, seen).argmax(1) == y).double()
    decides = torch.isin(y, torch.tensor(AMBIGUOUS))
    first = tuple(t[:64] for t in seen)
    answers(network, first)
    start = time.process_time()
    for _ in range(10):
        answers(network, first)
    return {
        "context decides": float(right[decides].mean()),
        "context says nothing": float(right[~decides].mean()),
        "parameters": sum(p.numel() for p in network.parameters()),
        "time": time.process_time() - start,
    }


def main(
    seed: Annotated[list[int] | None, typer.Option(help="Repeat.")] = None, epochs: int = 12, threads: int = 1
) -> None:
    torch.set_num_threads(threads)
    found = {name: [learned(name, one, epochs) for one in seed or (0, 1, 2)] for name in NETWORKS}
    unit = statistics.median(row["time"] for row in next(iter(found.values())))
    rows = []
    for name, each in found.items():
        row = {"network": name}
        for column in ("context decides", "context says nothing"):
            values = [one[column] for one in each]
            row[column] = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        row |= {"parameters": f"{each[0]['parameters']:.0f}"}
        row |= {"time": f"{statistics.median(one['time'] for one in each) / unit:.2f}"}
        rows.append(row)
    console.print(table(rows))


if __name__ == "__main__":
    typer.run(main)
