"""Whether a map explains anything: tests of saliency maps against the model, the picture and chance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torch import Tensor, nn

from nearfar.core.statistics import bootstrap_interval
from nearfar.vision.explain.gradients import as_images, call, evaluating, logits_of, weights_of
from nearfar.vision.explain.methods import Explanation

MapOf = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, pictures, classes) -> maps (B, H, W)."""


def blurred(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """The pictures under a Gaussian of `size` pixels, zeros beyond the edge: where insertion starts from."""
    at = torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = torch.outer(kernel, kernel)
    weight = (kernel / kernel.sum()).expand(images.shape[1], 1, size, size)
    return F.conv2d(images, weight, padding=size // 2, groups=images.shape[1])


@dataclass
class Curves:
    """Probability of the class while pixels come and go in the map's order, (B, steps + 1), and the areas, (B,)."""

    insertion: Tensor
    deletion: Tensor

    @property
    def insertion_area(self) -> Tensor:
        return area(self.insertion)

    @property
    def deletion_area(self) -> Tensor:
        return area(self.deletion)


def area(curve: Tensor) -> Tensor:
    """By trapezia, from 0 to 1."""
    return (curve.sum(1) - (curve[:, 0] + curve[:, -1]) / 2) / (curve.shape[1] - 1)


@torch.no_grad()
def insertion_deletion(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int | None = None, batch_size: int = 32
) -> Curves:
    """RISE's tests (Petsiuk et al. 2018): delete pixels in the map's order, to zeros, or insert them into the blurred
    picture; a good map has a small area under deletion and a large one under insertion.

    `steps`: parts of H W / steps pixels; None for W of them, as published. Ties keep the pixels' order.
    """
    number, height, width = maps.shape
    if maps.shape[0] != len(images) or maps.shape[1:] != images.shape[2:]:
        raise ValueError(f"maps is {tuple(maps.shape)} for pictures {tuple(images.shape)}; they must agree")
    steps = width if steps is None else steps
    if not 1 <= steps <= height * width:
        raise ValueError(f"steps is {steps}; needs 1 to {height * width}")
    weights = weights_of(model)
    images = as_images(images, weights)
    ranks = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the first pixel to go
    limits = torch.linspace(0, height * width, steps + 1, device=maps.device).round()
    start = blurred(images)
    curves = [[], []]  # type: list[list[Tensor]]
    with evaluating(model), torch.no_grad():
        for i in range(number):
            taken = (ranks[i][None] < limits[:, None]).reshape(-1, 1, height, width)
            for curve, (old, new) in zip(curves, ((start[i], images[i]), (images[i], torch.zeros_like(images[i])))):
                parts = [
                    logits_of(call(model, torch.where(part, new, old), weights), model).softmax(1)[:, target[i]]
                    for part in taken.split(batch_size)
                ]
                curve.append(torch.cat(parts))
    return Curves(torch.stack(curves[0]), torch.stack(curves[1]))


def boxes_mask(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """A mask (H, W) of boxes (left, top, right, bottom) in pixels. ValueError for boxes outside the picture."""
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]):
            raise ValueError(f"box {(left, top, right, bottom)}: is outside {size[1]} x {size[0]} pixels, or empty")
        mask[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
    return mask


def pointing(maps: Tensor, masks: Tensor, tolerance: float = 15.0) -> Tensor:
    """The pointing game: whether the map's highest pixel, the first of several, is less than `tolerance` pixels from
    the mask, (B,).

    Args:
        maps, masks: (B, H, W).
    """
    if maps.shape != masks.shape:
        raise ValueError(f"masks is {tuple(masks.shape)}, maps {tuple(maps.shape)}; they must agree")
    zone = hit_zone(masks, tolerance)
    return zone.flatten(1).gather(1, maps.cpu().flatten(1).argmax(1, keepdim=True))[:, 0]


def hit_zone(masks: Tensor, tolerance: float = 15.0) -> Tensor:
    """The places (B, H, W) that count as hits in the pointing game; their share is the accuracy of pointing blindly."""
    zones = []
    for mask in masks.cpu().bool():
        if not mask.any():
            raise ValueError("a mask is empty: there is nothing to point at")
        near = torch.from_numpy(ndimage.distance_transform_edt(~mask.numpy()) < tolerance)
        zones.append(near if tolerance > 0 else mask)
    return torch.stack(zones)


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's positive part that lies in the mask, (B,); 0 where it has none."""
    positive = maps.clamp(min=0).flatten(1)
    inside = (positive * masks.flatten(1).to(positive.dtype)).sum(1)
    return inside / positive.sum(1).clamp(min=torch.finfo(positive.dtype).tiny)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of maps (B, H, W), (B,); 0 where one of a pair is constant and says nothing."""
    values = []
    for a, b in zip(first.flatten(1).cpu().numpy(), second.flatten(1).cpu().numpy(), strict=True):
        same = np.ptp(a) == 0 or np.ptp(b) == 0
        values.append(0.0 if same else float(stats.spearmanr(a, b).statistic))
    return torch.tensor(values, dtype=torch.float64)


def randomization(
    model: nn.Module, images: Tensor, target: Tensor, maps_of: MapOf, *, cascading: bool = True, groups: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The sanity check of Adebayo et al. (2018): maps of a model whose weights are shuffled, from the classifier down.

    A row for each of `groups` parts of the layers: its first layer, and the rank correlation of the maps with those of
    the trained model, mean over the pictures. A map that explains the model loses it. Weights are shuffled within each
    tensor, so that their scale stays. The model itself does not change.

    Args:
        cascading: shuffle all parts from the classifier to this one; else this one alone.
    """
    import copy

    if groups < 1:
        raise ValueError(f"groups is {groups}; needs at least 1")
    names = [name for name, p in model.named_parameters() if p.numel() > 1]
    parts = [part.tolist() for part in np.array_split(np.array(names[::-1]), min(groups, len(names)))]
    before = maps_of(model, images, target)
    rows, shuffled = [], copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        shuffled = shuffled if cascading else copy.deepcopy(model)
        parameters = dict(shuffled.named_parameters())
        with torch.no_grad():
            for name in part:
                values = parameters[name].flatten().clone()
                order = torch.randperm(values.numel(), generator=generator).to(values.device)
                parameters[name].copy_(values[order].reshape(parameters[name].shape))
        after = maps_of(shuffled, images, target)
        rows.append({"down to": part[-1], "correlation": float(rank_correlation(before, after).mean())})
    return rows


def class_sensitivity(model: nn.Module, images: Tensor, maps_of: MapOf) -> Tensor:
    """Rank correlation of the maps of the most and the least likely class, (B,): lower is better; 1 for a map that does
    not depend on the class."""
    weights = weights_of(model)
    with evaluating(model), torch.no_grad():
        logits = logits_of(call(model, as_images(images, weights), weights), model)
    return rank_correlation(maps_of(model, images, logits.argmax(1)), maps_of(model, images, logits.argmin(1)))


@torch.no_grad()
def completeness(model: nn.Module, images: Tensor, found: Explanation) -> Tensor:
    """How far the pixels' shares, and what biases took, are from what they should sum to, as a share of it, (B,).

    For relevance the class's logit; for other shares the logit less that of a picture of zeros. ValueError for a method
    that does not share anything out.
    """
    if found.attributions is None:
        raise ValueError(f"{found.method}: gives no shares of the score, so nothing has to sum up")
    total = found.attributions.flatten(1).sum(1)
    expected = found.scores
    if found.absorbed is not None:
        total = total + found.absorbed
    else:
        weights = weights_of(model)
        with evaluating(model), torch.no_grad():
            empty = logits_of(call(model, as_images(torch.zeros_like(images), weights), weights), model)
        expected = expected - empty.gather(1, found.target[:, None])[:, 0]
    return (total - expected).abs() / expected.abs().clamp(min=1e-12)


def edges(images: Tensor) -> Tensor:
    """What a map would be that shows edges whatever the model: the size of the picture's gradient, (B, H, W)."""
    grey = images.float().mean(1, keepdim=True)
    kernel = grey.new_tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    weight = torch.stack((kernel, kernel.T))[:, None]
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), weight).square().sum(1).sqrt()


def random_maps(images: Tensor, number: int, seed: int = 0) -> Tensor:
    """Smooth noise without meaning, (number, B, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    coarse = torch.rand(number * len(images), 1, 8, 8, generator=generator)
    maps = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return maps.reshape(number, len(images), height, width).to(images.device)


@dataclass
class Verdict:
    """What a map of each picture is worth beside maps that know nothing of the model, (B,) each.

    The score is the area under insertion less that under deletion.
    """

    score: Tensor
    insertion: Tensor
    deletion: Tensor
    random: Tensor
    """The best of the random maps."""
    edges: Tensor

    @property
    def beats_random(self) -> Tensor:
        return self.score > self.random

    @property
    def beats_edges(self) -> Tensor:
        return self.score > self.edges


def judge(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, *, steps: int = 32, number: int = 5, seed: int = 0
) -> Verdict:
    """Hold maps against `number` random ones and against the picture's edges, by insertion and deletion."""

    def areas(m: Tensor) -> tuple[Tensor, Tensor]:
        curves = insertion_deletion(model, images, m, target, steps)
        return curves.insertion_area, curves.deletion_area

    def score(m: Tensor) -> Tensor:
        insertion, deletion = areas(m)
        return insertion - deletion

    insertion, deletion = areas(maps)
    noise = torch.stack([score(m) for m in random_maps(images, number, seed)]).amax(0)
    return Verdict(insertion - deletion, insertion, deletion, noise, score(edges(images)))


def ranks(scores: Mapping[str, Sequence[float]], seed: int = 0) -> list[dict[str, Any]]:
    """Mean rank of each method over pictures, the best is 1 and ties share theirs, with a 95 % bootstrap interval.

    `scores`: method -> one number for each picture, the higher the better. The interval is NaN below six pictures.
    """
    table = np.array([list(values) for values in scores.values()], float)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError("ranks needs one finite score for each method and picture")
    placed = stats.rankdata(-table, axis=0)
    rows = []
    for name, values, given in zip(scores, placed, table, strict=True):
        low, high = bootstrap_interval(values, resamples=2000, seed=seed)
        ties = sum(bool((table[:, i] == given[i]).sum() > 1) for i in range(table.shape[1]))
        rows.append({"method": name, "mean rank": float(values.mean()), "low": low, "high": high, "ties": ties})
    return sorted(rows, key=lambda row: row["mean rank"])
