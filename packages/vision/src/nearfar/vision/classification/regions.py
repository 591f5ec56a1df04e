"""Naming regions of pictures: distillation, training of RveRNet and its rivals, and their scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.finite import check_weights
from nearfar.core.statistics import bootstrap_interval

DISTILLATIONS = ("none", "soft", "hard", "deit")


@dataclass(frozen=True)
class Distillation:
    """What a student learns from a teacher's logits beside the labels.

    Args:
        kind: `soft`, T^2 KL(teacher / T || student / T) (Hinton et al. 2015); `hard`, the cross-entropy of its
            answer; `deit`, the same on a second classifier of the student's own, which reads the distillation token
            (Touvron et al. 2021): the student gives (class, distillation) logits, and their mean answers; `none`.
        weight: share of the teacher, in [0, 1].
        temperature: T of `soft`.
    """

    kind: str = "none"
    weight: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in DISTILLATIONS or not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise ValueError(
                f"needs kind of {', '.join(DISTILLATIONS)}, weight in [0, 1], temperature > 0; got {self.kind!r}, "
                f"{self.weight}, {self.temperature}"
            )

    def loss(self, student: Tensor | tuple[Tensor, Tensor], labels: Tensor, teacher: Tensor | None = None) -> Tensor:
        """(1 - weight) of the labels' cross-entropy and `weight` of the teacher's part."""
        heads = student if isinstance(student, tuple) else (student, student)
        if (self.kind == "deit") != isinstance(student, tuple):
            raise ValueError(f"kind is {self.kind!r}; the student gives {len(set(map(id, heads)))} classifiers")
        own = F.cross_entropy(heads[0], labels)
        if self.kind == "none":
            return own
        if teacher is None or teacher.shape != heads[1].shape:
            given = None if teacher is None else tuple(teacher.shape)
            raise ValueError(f"the teacher's logits are {given}; needs {tuple(heads[1].shape)}")
        if self.kind == "soft":
            t = self.temperature
            log_p, log_q = (F.log_softmax(x / t, 1) for x in (heads[1], teacher.detach()))
            taught = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * t * t
        else:
            taught = F.cross_entropy(heads[1], teacher.argmax(1))
        return (1 - self.weight) * own + self.weight * taught


def warm_ramp(rate: float, steps: int, share: float = 0.1) -> Callable[[int], float]:
    """The published schedule, step -> learning rate: linear over the first `share` of all steps, then half a cosine.

    The released code counts epochs as if they were steps, so its rate stays on the ramp: with 30 epochs of 366 steps it
    is 0 in the first epoch and 1.06e-4 in the last, of 4e-3.
    """
    if steps < 1 or not 0 <= share < 1:
        raise ValueError(f"needs steps >= 1 and share in [0, 1), got {steps}, {share}")
    warm = max(1, round(steps * share))

    def at(step: int) -> float:
        if step < warm:
            return rate * step / warm
        return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return at


def train_regions(
    model: nn.Module, inputs: tuple[Tensor, Tensor], labels: Tensor, *, epochs: int = 10, batch_size: int = 32,
    learning_rate: float = 1e-3, seed: int = 0, paired: bool = True, flip: float = 0.5,
    distillation: Distillation | None = None, teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Train on pairs of tensors held in memory, (views, views) or (pictures, masks): the loss of every epoch.

    Views are mirrored together, unless `paired` is False, as published. All randomness follows from the seed.
    """
    learn = distillation or Distillation()
    if (learn.kind != "none") != (teacher is not None):
        raise ValueError(f"distillation is {learn.kind!r}, teacher is {teacher}; one needs the other")
    if not len(labels):
        raise ValueError("there is nothing to learn from")
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], learning_rate)
    steps = epochs * -(-len(labels) // batch_size)
    rate, step, losses = warm_ramp(learning_rate, steps), 0, []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for part in torch.randperm(len(labels), generator=generator).split(batch_size):
            views = [x[part].clone() for x in inputs]
            chance = torch.rand(2, len(part), generator=generator) < flip
            for view, mirrored in zip(views, (chance[0], chance[0] if paired else chance[1]), strict=True):
                view[mirrored] = view[mirrored].flip(-1)
            taught = None
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(*views)
            for group in optimiser.param_groups:
                group["lr"] = rate(step + 1)
            optimiser.zero_grad()
            loss = learn.loss(model(*views), labels[part], taught)
            loss.backward()
            optimiser.step()
            total, step = total + float(loss.detach()) * len(part), step + 1
        losses.append(total / len(labels))
    check_weights(model.state_dict(), type(model).__name__)
    model.eval()
    return losses


@torch.inference_mode()
def answers(model: nn.Module, inputs: tuple[Tensor, Tensor], batch_size: int = 64) -> Tensor:
    """Log-probabilities (B, classes)."""
    model.eval()
    return torch.cat([model(a, b) for a, b in zip(*(x.split(batch_size) for x in inputs), strict=True)])


def macro_f1(truth: np.ndarray, given: np.ndarray, classes: Sequence[int]) -> float:
    """The mean over `classes` of F1 = 2 TP / (2 TP + FP + FN); 0 for one that neither occurs nor is answered."""
    each = []
    for label in classes:
        hits = int(((truth == label) & (given == label)).sum())
        named = int((truth == label).sum() + (given == label).sum())
        each.append(2 * hits / named if named else 0.0)
    return float(np.mean(each))


def score_regions(scores: Tensor, labels: Tensor, ambiguous: Sequence[int] = (), seed: int = 0) -> dict[str, float]:
    """Accuracy with its 95 % bootstrap interval, F1 averaged over the classes that occur or are answered, and of the
    `ambiguous` classes: F1 averaged over them, and the accuracy on their regions."""
    given, truth = scores.argmax(1).numpy(), labels.numpy()
    right = (given == truth).astype(float)
    low, high = bootstrap_interval(right, resamples=2000, seed=seed)
    result = {
        "regions": len(right), "accuracy": float(right.mean()), "low": low, "high": high,
        "macro F1": macro_f1(truth, given, np.union1d(truth, given).tolist()),
    }  # fmt: skip
    if ambiguous:
        if not np.isin(truth, list(ambiguous)).any():
            raise ValueError(f"ambiguous is {list(ambiguous)}; no region has one of these classes")
        result["ambiguous F1"] = macro_f1(truth, given, ambiguous)
        result["ambiguous accuracy"] = float(right[np.isin(truth, list(ambiguous))].mean())
    return result
