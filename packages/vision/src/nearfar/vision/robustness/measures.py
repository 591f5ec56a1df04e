"""Measures: fooling rate on what all models get right, accuracy against lost information, RISE, patch selectivity."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nearfar.core.errors import UserError
from nearfar.core.statistics import bootstrap_interval
from nearfar.ops.tokens.patch_mixing import mix_cells, permute_cells, random_cells
from nearfar.vision.robustness.attack import Scores


def common_correct(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """(B,): whether every model gives the picture its label, on which alone fooling rates compare."""
    return torch.stack([found.argmax(1) == labels for found in logits.values()]).all(0)


def fooling_rate(fooled: Tensor, seed: int = 0) -> dict[str, float]:
    """The share of pictures whose answer changed, in per cent, with intervals over pictures and over seeds.

    `fooled`: (pictures,) or (seeds, pictures), of pictures that all compared models got right. `low` and `high` are a
    95 % bootstrap interval over pictures of their mean over seeds, NaN below six pictures; `sd` is over seeds, NaN for
    one. Raises UserError for no pictures.
    """
    runs = np.atleast_2d(fooled.double().numpy())
    if not runs.shape[1]:
        raise UserError("no picture is given its label by all models, so no fooling rate can be told")
    low, high = bootstrap_interval(runs.mean(0), resamples=2000, seed=seed)
    sd = float(runs.mean(1).std(ddof=1)) if len(runs) > 1 else math.nan
    return {
        "pictures": runs.shape[1],
        "fooling rate (%)": 100 * float(runs.mean()),
        "low": 100 * low,
        "high": 100 * high,
        "sd over seeds": 100 * sd,
    }


def other_class(labels: Tensor, generator: Generator | None = None) -> Tensor:
    """For every picture the index of a random one of another class. Raises UserError where all are of one class."""
    different = labels[:, None] != labels
    if not different.any(1).all():
        raise UserError("the pictures are all of one class, so none is out of another's context")
    return torch.multinomial(different.float(), 1, generator=generator)[:, 0]


def replace_patches(
    x: Tensor, labels: Tensor, share: float, cells: int, generator: Generator | None = None, offset: int = 0
) -> Tensor:
    """Out-of-context patches: floor(share N) cells of the grid from pictures of other classes of the batch."""
    mask = random_cells(len(x), cells**2, share, generator)
    others = x[other_class(labels, generator)]
    return mix_cells(x, others, mask.to(x.device), (cells, cells), (offset, offset))


def drop_patches(x: Tensor, labels: Tensor, share: float, cells: int, generator: Generator | None = None) -> Tensor:
    """floor(share N) cells of the grid black; `x` is pixels in [0, 1], for 0 after normalization would be grey."""
    mask = random_cells(len(x), cells**2, share, generator)
    return mix_cells(x, torch.zeros_like(x), mask.to(x.device), (cells, cells))


def permute_patches(x: Tensor, labels: Tensor, share: float, cells: int, generator: Generator | None = None) -> Tensor:
    """All cells of the grid in random order; `share` and `labels` do not count."""
    return permute_cells(x, (cells, cells), generator)


OCCLUSIONS: dict[str, Callable[..., Tensor]] = {
    "replacement": replace_patches,
    "drop": drop_patches,
    "permutation": permute_patches,
}
"""The three patch attacks of Patch Mixing: the true label stays whatever share is lost."""


@torch.inference_mode()
def occlusion_curve(
    scores: Scores,
    x: Tensor,
    labels: Tensor,
    attack: str,
    points: Sequence[tuple[float, int]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """Top-1 at each (share of cells lost, cells along a side): accuracy, its interval over pictures, sd over seeds.

    `x`: (B, 3, H, W) in [0, 1]. What loses nothing is the same for every seed and is scored once. Raises ValueError for
    an unknown attack or a grid that does not divide the pictures.
    """
    if attack not in OCCLUSIONS:
        raise ValueError(f"attack is {attack!r}; allowed are {', '.join(OCCLUSIONS)}")
    rows = []
    for share, cells in points:
        runs = list[np.ndarray]()
        for seed in seeds:
            changed = OCCLUSIONS[attack](x, labels, share, cells, torch.Generator().manual_seed(seed))
            if runs and torch.equal(changed, x):
                runs.append(runs[0])
                continue
            answers = torch.cat([scores(part).argmax(1) for part in changed.split(batch_size)])
            runs.append((answers == labels).double().cpu().numpy())
        right = np.stack(runs)
        low, high = bootstrap_interval(right.mean(0), resamples=2000)
        rows.append(
            {
                "attack": attack,
                "share": share,
                "grid": cells,
                "accuracy": float(right.mean()),
                "low": low,
                "high": high,
                "sd over seeds": float(right.mean(1).std(ddof=1)) if len(seeds) > 1 else math.nan,
            }
        )
    return rows


@torch.inference_mode()
def rise(
    scores: Scores,
    x: Tensor,
    classes: Tensor,
    *,
    contrast: Tensor | None = None,
    masks: int = 4000,
    cells: int = 7,
    keep: float = 0.5,
    batch_size: int = 64,
    generator: Generator | None = None,
) -> Tensor:
    """(B, H, W): RISE, sum_i f_c(x m_i) m_i / (n E[m]), of masks of s x s cells, each kept with a chance, enlarged with
    straight lines to s + 1 cells a side and cut at a random place; f is the softmax.

    Petsiuk et al. (BMVC 2018). `contrast`: classes c' whose map is subtracted; what is negative becomes 0 and the rest
    sums to one: contrastive RISE as read from the words "a contrastive version of RISE", for its formula is not
    published. Masks are shared by the pictures of the batch; places are stratified, which lowers the variance. E[m] is
    the mean of the masks drawn. Cost n forward passes a picture.

    Raises ValueError for no masks, no cells, a chance outside (0, 1], or classes of another number than pictures.
    """
    if masks < 1 or cells < 1 or not 0 < keep <= 1:
        raise ValueError(f"masks={masks} and cells={cells} must be at least 1 and keep={keep} in (0, 1]")
    if len(classes) != len(x) or (contrast is not None and len(contrast) != len(x)):
        raise ValueError(f"{len(x)} pictures need as many classes")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    height, width = x.shape[-2:]
    sides = math.ceil(height / cells), math.ceil(width / cells)
    # places: one in each of n equal steps of both axes, in an order of its own
    steps = [
        (torch.randperm(masks, generator=generator) + torch.rand(masks, generator=generator)) / masks for _ in sides
    ]
    places = [(step * side).long().clamp(max=side - 1) for step, side in zip(steps, sides, strict=True)]
    total = [torch.zeros(x.shape[0], height, width, device=x.device) for _ in range(1 if contrast is None else 2)]
    mean = torch.zeros(height, width, device=x.device)
    for first in range(0, masks, batch_size):
        number = min(batch_size, masks - first)
        kept = (torch.rand(number, 1, cells, cells, generator=generator) < keep).float()
        large = F.interpolate(kept, [(cells + 1) * side for side in sides], mode="bilinear", align_corners=False)
        at = [place[first : first + number] for place in places]
        rows = (at[0][:, None] + torch.arange(height))[:, :, None]
        columns = (at[1][:, None] + torch.arange(width))[:, None]
        part = large[torch.arange(number)[:, None, None], 0, rows, columns].to(x.device)
        mean += part.sum(0)
        for i, picture in enumerate(x):  # a picture's masks fill the batch
            found = scores(picture * part[:, None]).float().softmax(1)
            for result, wanted in zip(total, (classes, contrast), strict=False):
                assert wanted is not None
                result[i] += torch.einsum("n,nhw->hw", found[:, wanted[i]], part)
    maps = [result / mean.clamp(min=1e-6) for result in total]
    if contrast is None:
        return maps[0]
    positive = (maps[0] - maps[1]).clamp(min=0)
    return positive / positive.sum((1, 2), keepdim=True).clamp(min=1e-12)


def patch_selectivity(maps: Tensor, mask: Tensor) -> Tensor:
    """(B,): 1 - (share of the map on out-of-context places) / (their share of the area); 1 where none of it is there,
    0 where it makes no difference.

    `maps` (B, H, W) not negative, `mask` (B, 1, H, W). The measure is inferred, as its formula is not published. NaN
    where a map is empty or nothing (or everything) is out of context.
    """
    if mask.shape != (len(maps), 1, *maps.shape[1:]):
        raise ValueError(f"mask is {tuple(mask.shape)}; for maps {tuple(maps.shape)} it must be (B, 1, H, W)")
    inside, area = (maps * mask[:, 0]).sum((1, 2)), mask[:, 0].float().mean((1, 2))
    whole = maps.sum((1, 2))
    told = (whole > 0) & (area > 0) & (area < 1)
    return torch.where(told, 1 - inside / whole.clamp(min=1e-12) / area.clamp(min=1e-12), torch.nan)
