"""Adversarial patches: the pixels of a few places, found by gradient ascent, that make a classifier err."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nearfar.vision.robustness.patches import check_grid, given_patches

Scores = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] to logits (B, K)."""

LEVEL = 1 / 255


class OnPixels(nn.Module):
    """A classifier of normalized pictures as one of pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)


@dataclass(frozen=True)
class Attacked:
    """What an attack found: pictures of 8 bits, whether each fools the model, and the steps it took."""

    pictures: Tensor
    fooled: Tensor
    steps: Tensor


def attack(
    scores: Scores,
    x: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    steps: int = 250,
    step_size: float = 2 / 255,
    target: Tensor | None = None,
    bound: float | None = None,
    start: str = "picture",
    restarts: int = 1,
    generator: Generator | None = None,
) -> Attacked:
    """Sign-gradient ascent of the cross-entropy on the pixels of `mask`: x <- clip(x + a sign(grad)), elsewhere x.

    A picture is done at its first success, judged on what 8 bits keep of it. Fu et al. (ECCV 2022) allow 10,000 steps;
    what is published of it leaves the step and the start open. Attack a tempered model with its temperature in `scores`
    (the adaptive attack) before a defence is believed.

    Args:
        scores: the classifier of pixels in [0, 1], for example `OnPixels(model, mean, std)`.
        mask: (B, 1, H, W), true where pixels may change.
        target: classes to be taken for, instead of any wrong one.
        bound: largest change of a pixel, in [0, 1]; None for any value.
        start: "picture", or "noise" (uniform, within the bound); further restarts begin from noise.
        restarts: attempts at a picture.

    Raises ValueError for a mask or targets of another size, a target that is the label, steps or restarts below 1.
    """
    if mask.shape != (x.shape[0], 1, *x.shape[2:]) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {tuple(mask.shape)}, {mask.dtype}; for pictures {tuple(x.shape)} needed (B, 1, H, W)"
        )
    if target is not None and (target.shape != labels.shape or bool((target == labels).any())):
        raise ValueError("target must have a class for every picture, other than its label")
    if start not in ("picture", "noise"):
        raise ValueError(f"start is {start!r}; allowed are 'picture' and 'noise'")
    if steps < 1 or restarts < 1 or step_size <= 0 or (bound is not None and not 0 < bound <= 1):
        raise ValueError(f"steps={steps}, restarts={restarts}, step_size={step_size}, bound={bound} are out of range")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    reach = 1.0 if bound is None else bound
    low, high = (x - reach).clamp(min=0), (x + reach).clamp(max=1)

    def fools(pictures: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = scores(pictures).float()
        wrong = logits.argmax(1) != labels[rows] if target is None else logits.argmax(1) == target[rows]
        return wrong, logits

    found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    taken = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for attempt in range(restarts):
        rows = (~fooled).nonzero()[:, 0]
        if not len(rows):
            break
        now = x[rows]
        if start == "noise" or attempt:
            noise = torch.rand(x.shape, generator=generator).to(x)
            noise = noise if bound is None else x + bound * (2 * noise - 1)
            now = torch.where(mask[rows], to_levels(noise.clamp(low, high))[rows], now)
        for number in range(steps + 1):
            with torch.enable_grad():
                now = now.detach().requires_grad_()
                wrong, logits = fools(now, rows)
                sign = 1 if target is None else -1
                loss = sign * F.cross_entropy(logits, (labels if target is None else target)[rows], reduction="sum")
                gradient = torch.autograd.grad(loss, now)[0] if number < steps else None
            now = now.detach()
            if wrong.any():  # on what 8 bits keep
                kept = to_levels(now[wrong])
                with torch.no_grad():
                    real = fools(kept, rows[wrong])[0]
                done = torch.zeros_like(wrong)
                done[wrong] = real
                found[rows[done]], fooled[rows[done]] = kept[real], True
                taken[rows[done]] += number
                rows, now = rows[~done], now[~done]
                gradient = None if gradient is None else gradient[~done]
            if gradient is None or not len(rows):
                break
            moved = (now + step_size * gradient.sign()).clamp(low[rows], high[rows])
            now = torch.where(mask[rows], moved, now)
        found[rows] = to_levels(now)
        taken[rows] += steps
    return Attacked(found, fooled, taken)


def to_levels(x: Tensor) -> Tensor:
    """The nearest 8-bit values."""
    return (x * 255).round() / 255


def patch_gradients(scores: Scores, x: Tensor, labels: Tensor, patch: int) -> Tensor:
    """(B, rows, columns): the sum of the absolute gradient of the cross-entropy over every patch."""
    check_grid((x.shape[2], x.shape[3]), patch)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(scores(x).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return F.avg_pool2d(gradient.abs().sum(1), patch) * patch**2


def attack_best_position(
    scores: Scores, x: Tensor, labels: Tensor, patch: int, *, positions: int = 4, **options: object
) -> tuple[Attacked, Tensor]:
    """`attack` on single patches of the grid, one after the other, those of the largest gradient first.

    A picture is done at its first success. Returns what was found and the (row, column) of every picture's last patch.
    `options`: of `attack`.
    """
    order = patch_gradients(scores, x, labels, patch)
    rows, columns = order.shape[1:]
    if not 1 <= positions <= rows * columns:
        raise ValueError(f"positions is {positions}; pictures have {rows * columns} patches")
    best = order.flatten(1).topk(positions).indices
    found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    taken, place = torch.zeros(len(x), dtype=torch.long, device=x.device), torch.zeros(len(x), 2, dtype=torch.long)
    for rank in range(positions):
        left = (~fooled).nonzero()[:, 0]
        if not len(left):
            break
        at = [(int(i) // columns, int(i) % columns) for i in best[left, rank]]
        mask = torch.cat([given_patches(1, (x.shape[2], x.shape[3]), patch, [one]) for one in at]).to(x.device)
        part = {k: v[left] if isinstance(v, Tensor) else v for k, v in options.items()}  # targets
        result = attack(scores, x[left], labels[left], mask, **part)  # type: ignore[arg-type]
        found[left], fooled[left] = result.pictures, result.fooled
        taken[left] += result.steps
        place[left.cpu()] = torch.tensor(at)
    return Attacked(found, fooled, taken), place
