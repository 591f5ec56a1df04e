"""Salient relevance: of a relevance map what stands out from the rest of it, at several scales, with its context.

Li, Tian et al., "Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise
relevance propagation" (2019). Its second step is the context-aware saliency of Goferman, Zelnik-Manor and Tal (TPAMI
2012), which the released code leaves to their program; the values here are taken from their publication.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.vision.explain.gradients import Target, scaled
from nearfar.vision.explain.relevance import Rules, relevance

CARD = Card(
    "Salient Relevance",
    "1712.08268",
    "explains a classifier: relevance of pixels, and of it what stands out from its context",
    1e-5,
    weights="any classifier's",
)


@dataclass(frozen=True)
class ContextAware:
    """The parameters of `context_aware_saliency`.

    Args:
        longer_side: pixels that the map's longer side is resized to.
        patch: side of a patch in pixels, odd.
        overlap: share of a patch that it has in common with the next one.
        scales: sizes at which patches are looked at, as shares.
        coarser: for every scale, the scales where alike patches are searched, as shares of it.
        smallest: the least share that is searched.
        neighbours: the most alike patches that count, K.
        position: weight c of the patches' distance in space.
        focus: saliency above which a place is a focus.
        chunk: patches compared at once; memory is `chunk` times their number.
    """

    longer_side: int = 250
    patch: int = 7
    overlap: float = 0.5
    scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3)
    coarser: tuple[float, ...] = (1.0, 0.5, 0.25)
    smallest: float = 0.2
    neighbours: int = 64
    position: float = 3.0
    focus: float = 0.8
    chunk: int = 1024

    def __post_init__(self) -> None:
        if self.patch < 1 or self.patch % 2 == 0 or self.longer_side < self.patch or self.neighbours < 1:
            raise ValueError(
                f"needs an odd patch, longer_side of at least it, neighbours >= 1; got {self.patch}, "
                f"{self.longer_side}, {self.neighbours}"
            )
        if not 0 <= self.overlap < 1 or not 0 < self.focus < 1 or self.position < 0 or self.chunk < 1:
            raise ValueError(f"needs 0 <= overlap < 1, 0 < focus < 1, position >= 0, chunk >= 1; got {self}")
        if not self.scales or not self.coarser or not all(0 < s <= 1 for s in (*self.scales, *self.coarser)):
            raise ValueError(f"scales and coarser are shares above 0 up to 1; got {self.scales}, {self.coarser}")

    @property
    def stride(self) -> int:
        return max(1, int(self.patch * (1 - self.overlap)))


@torch.no_grad()
def context_aware_saliency(maps: Tensor, parameters: ContextAware | None = None) -> Tensor:
    """What stands out of maps (B, C, H, W) in [0, 1]: (B, 1, H, W) in [0, 1].

    A patch i at scale r is salient where even the K patches most like it, over scales r, r/2 and r/4, are unlike it:

        d(i, j)  = d_c / (1 + c d_p)     d_c of values (the mean square root, in [0, 1]), d_p of positions, in [0, 1]
        S_i^r    = 1 - exp(-mean of the K smallest d(i, j))

    averaged over scales after each is brought to [0, 1]; then what is far from the foci {S > focus} fades with the
    distance to them. Distances are matrix products, |a|^2 + |b|^2 - 2 a b, `chunk` patches at a time: O(P^2) in the
    number of patches P, 5000 at 250 pixels, and memory O(chunk P).
    """
    parameters = parameters or ContextAware()
    if maps.ndim != 4:
        raise ValueError(f"maps is {tuple(maps.shape)}; needs (B, C, H, W)")
    if maps.amin() < 0 or maps.amax() > 1:
        raise ValueError(f"maps has values {float(maps.amin()):.3g} to {float(maps.amax()):.3g}; needs [0, 1]")
    return torch.cat([_saliency(one[None], parameters) for one in maps])


def _saliency(one: Tensor, p: ContextAware) -> Tensor:
    height, width = one.shape[2:]
    size = [max(p.patch, round(n * p.longer_side / max(height, width))) for n in (height, width)]
    base = _resized(one, size).clamp(0, 1)
    cache: dict[float, tuple[Tensor, Tensor, tuple[int, int]]] = {}

    def patches(scale: float) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Values (P, C k^2), positions in [0, 1] (P, 2) and the grid of the patches at a scale."""
        scale = round(scale, 6)
        if scale not in cache:
            here = _resized(base, [max(p.patch, round(n * scale)) for n in size]).clamp(0, 1)
            values = F.unfold(here, p.patch, stride=p.stride)[0].mT
            axes = [torch.arange(0, n - p.patch + 1, p.stride, device=one.device) for n in here.shape[2:]]
            centres = [(at + p.patch / 2) / max(here.shape[2:]) for at in axes]
            positions = torch.cartesian_prod(*centres).to(values.dtype)
            cache[scale] = values, positions, (len(axes[0]), len(axes[1]))
        return cache[scale]

    total, used = torch.zeros_like(base[:, :1]), 0
    for scale in p.scales:
        values, positions, grid = patches(scale)
        searched = [patches(scale * c) for c in p.coarser if scale * c >= p.smallest - 1e-9] or [patches(scale)]
        found = torch.cat([
            _least(values[i : i + p.chunk], positions[i : i + p.chunk], searched, p)
            for i in range(0, len(values), p.chunk)
        ])  # fmt: skip
        saliency = 1 - torch.exp(-found)
        total += scaled(_resized(saliency.reshape(1, 1, *grid), size).clamp(min=0))
        used += 1
    saliency = total / used
    foci = torch.nonzero(saliency[0, 0] > p.focus).to(saliency.dtype)
    if len(foci):  # distances are those to the nearest focus, in shares of the longer side
        rows, columns = (torch.arange(n, device=one.device, dtype=saliency.dtype) for n in size)
        places = torch.cartesian_prod(rows, columns)
        distance = torch.cat(
            [torch.cdist(places[i : i + p.chunk], foci).amin(1) for i in range(0, len(places), p.chunk)]
        )
        saliency = saliency * (1 - distance.reshape(1, 1, *size) / max(size)).clamp(min=0)
    return _resized(saliency, [height, width]).clamp(0, 1)


def _least(values: Tensor, positions: Tensor, searched: list[tuple[Tensor, Tensor, Any]], p: ContextAware) -> Tensor:
    """The mean of the K smallest distances of each patch to the patches of the searched scales; itself is not one."""
    parts = []
    for others, places, _ in searched:
        squares = values.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * values @ others.mT
        colour = (squares.clamp(min=0) / values.shape[1]).sqrt()
        parts.append(colour / (1 + p.position * torch.cdist(positions, places)))
    distances = torch.cat(parts, 1)
    k = min(p.neighbours + 1, distances.shape[1])
    nearest = distances.topk(k, dim=1, largest=False).values
    return nearest[:, 1:].mean(1) if k > 1 else nearest[:, 0]


def _resized(x: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bicubic", align_corners=False, antialias=True)


def salient_relevance(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    rules: str | Rules = "epsilon_plus",
    parameters: ContextAware | None = None,
    *,
    weighted: bool = False,
) -> Tensor:
    """Salient relevance of the class, (B, 1, H, W) in [0, 1].

    Args:
        rules: of relevance, see `relevance`.
        weighted: multiply with the relevance that it was found in.

    The relevance's sizes, summed over colours, are cut at their 99th percentile before they are scaled to [0, 1]:
    single pixels leave the rest of a map near 0.
    """
    maps = relevance(model, images, target, rules).pixels.abs().sum(1, keepdim=True)
    high = maps.flatten(1).quantile(0.99, 1).reshape(-1, 1, 1, 1)
    maps = scaled(torch.minimum(maps, high))
    found = context_aware_saliency(maps, parameters)
    return found * maps if weighted else found
