"""Planted evidence: pictures whose class hangs on a cue at a known place, and whether maps point there.

Every picture is noise with four patches of one size and contrast at random places. One is the cue, stripes that run
across or down, which are the two classes; three are distractors, the same in both: diagonal stripes, a chequerboard
and wider diagonals. A map that shows where a patch is, whatever the model, finds the cue at most one time in four.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.vision.explain.checks import edges, pointing, random_maps
from nearfar.vision.explain.context_aware import ContextAware
from nearfar.vision.explain.methods import explain

SIDE, PATCH = 40, 8

SMALL = {"salient_relevance": {"parameters": ContextAware(longer_side=SIDE, neighbours=16)}}
"""Settings of methods for pictures of this size."""


def cues(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, 40, 40), classes (B,) and masks of the cue (B, 40, 40)."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(number, 3, SIDE, SIDE, generator=generator)
    y = torch.randint(2, (number,), generator=generator)
    masks = torch.zeros(number, SIDE, SIDE)
    at = torch.arange(PATCH)
    rows, columns = at[:, None].expand(PATCH, PATCH), at.expand(PATCH, PATCH)
    sign = lambda t: 1.0 - 2.0 * t  # noqa: E731
    stripes = [sign(rows // 2 % 2), sign(columns // 2 % 2)]
    others = [sign((rows + columns) // 2 % 2), sign((rows // 2 + columns // 2) % 2), sign((rows - columns) // 3 % 2)]
    cells = SIDE // (PATCH + 4)
    for i in range(number):
        places = torch.randperm(cells**2, generator=generator)[:4].tolist()
        for cell, pattern in zip(places, (stripes[int(y[i])], *others), strict=True):
            row, column = (
                n * (PATCH + 4) + int(torch.randint(5, (), generator=generator)) for n in divmod(cell, cells)
            )
            x[i, :, row : row + PATCH, column : column + PATCH] += pattern
            if cell == places[0]:
                masks[i, row : row + PATCH, column : column + PATCH] = 1
    return x, y, masks


def cue_network(seed: int, pictures: int = 512, epochs: int = 10) -> nn.Module:
    """A small network that has learned the two classes of this many pictures; of none, one with fresh weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y, _ = cues(pictures, 2 * seed)
    for _ in range(epochs if pictures else 0):
        for part in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def shuffled(net: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with the values of every tensor in another order."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].reshape(p.shape))
    return other


def planted_evidence(
    seed: int, methods: Sequence[str], pictures: int = 200, settings: Mapping[str, Mapping[str, Any]] = SMALL
) -> tuple[float, list[dict[str, Any]]]:
    """The accuracy of a trained network on new pictures, and for each method the share of them whose map has its
    maximum on the cue: of the trained network, of the same with its weights shuffled, and of a fresh one.

    The first two rows are maps that know nothing of a model: smooth noise and the picture's edges.
    """
    net = cue_network(seed)
    networks = {"trained": net, "shuffled": shuffled(net, seed), "fresh": cue_network(seed + 1000, pictures=0)}
    x, y, masks = cues(pictures, 2 * seed + 1)  # odd seeds are those of pictures that no network learns from
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).double().mean())
    share = lambda maps: float(pointing(maps, masks, 0).double().mean())  # noqa: E731
    rows = [
        {"method": name, **dict.fromkeys(networks, share(maps))}
        for name, maps in (("noise", random_maps(x, 1, seed)[0]), ("edges", edges(x)))
    ]
    for name in methods:
        found = {
            kind: share(explain(model, x, y, name, **settings.get(name, {})).maps) for kind, model in networks.items()
        }
        rows.append({"method": name, **found})
    return accuracy, rows
