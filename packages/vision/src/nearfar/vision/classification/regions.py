"""Naming regions of pictures: distillation, training of RveRNet and its rivals, and their scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from nearfar.core.statistics import bootstrap_interval
from nearfar.core.training import data_loader, train
from nearfar.vision.data.regions import MEAN, STD
from nearfar.vision.models.rvernet import RegionPooling, RveRNet, Single

DISTILLATIONS = ("none", "soft", "hard", "deit")

POOLED = "pooled"
"""Name, in the place of the second backbone, of `RegionPooling`."""

Network = RveRNet | Single | RegionPooling

Teacher = Callable[[Tensor, Tensor], Tensor]
"""(views, views) -> logits or log-probabilities of the student's classes."""


class Taught(nn.Module):
    """A trained network as a teacher of `columns`: those of its classes that the student has, in its order."""

    def __init__(self, network: Network, columns: Sequence[int]) -> None:
        super().__init__()
        self.network, self.columns = network.eval().requires_grad_(False), list(columns)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.network(first, second)[:, self.columns]


def build_network(roi: str, extra: str, classes: int, distilled: bool = False) -> Network:
    """The network of a recipe's names."""
    if extra == "none":
        return Single(roi, classes, distilled)
    if extra == POOLED:
        return RegionPooling(roi, classes, distilled=distilled)
    return RveRNet(roi, extra, classes, distilled=distilled)


def normalizations(network: Network) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Mean and deviation of each backbone's own pictures, ImageNet's where it does not tell."""
    backbones = [network.roi, network.extra] if isinstance(network, RveRNet) else [network.backbone]
    known = [getattr(backbone, "pretrained_cfg", None) or {} for backbone in backbones]
    return [(tuple(k.get("mean", MEAN)), tuple(k.get("std", STD))) for k in known]


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


@dataclass(frozen=True)
class RegionRecipe:
    """Settings of a training.

    `roi`, `extra`: backbones of the region and of its surroundings: mnet, vit, deit, deit-dist, mixer, a name of
    timm's, or `hub:NAME`, timm's with its weights. Extra "none" is the region alone; "pooled" is one backbone, `roi`,
    that sees the whole picture once. `size`: pixels of a view. `published`: views as released, not normalized and each
    mirrored by itself. `distillation`, `teacher_weight`, `temperature`: what is learned from a teacher, see
    `Distillation`.
    """

    roi: str = "mnet"
    extra: str = "mnet"
    size: int = 224
    epochs: int = 30
    batch_size: int = 50
    learning_rate: float = 1e-4
    published: bool = False
    distillation: str = "none"
    teacher_weight: float = 0.5
    temperature: float = 3.0
    seed: int = 0

    @property
    def taught(self) -> Distillation:
        return Distillation(self.distillation, self.teacher_weight, self.temperature)

    def __post_init__(self) -> None:
        for name, least in (("size", 16), ("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.published and self.extra == POOLED:
            raise ValueError("published is true and extra pooled; the published code has no such network")
        if self.distillation not in DISTILLATIONS:
            raise ValueError(f"distillation is {self.distillation!r}; one of {', '.join(DISTILLATIONS)}")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight is {self.teacher_weight}; it must be between 0 and 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")


class RegionModule(pl.LightningModule):
    """The loss of a model on both views, mirrored by chance together or each by itself."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        steps: int,
        paired: bool,
        flip: float,
        distillation: Distillation,
        teacher: Teacher | None,
    ) -> None:
        super().__init__()
        self.model, self.rate, self.steps = model, learning_rate, steps
        self.paired, self.flip, self.distillation = paired, flip, distillation
        self.taught_by = [teacher]  # in a list, so that it is no part of what is saved

    def training_step(self, batch: Sequence[Tensor], _index: int) -> Tensor:
        """`batch`: both views, those that the teacher sees where they are others, labels."""
        *views, labels = batch
        chance = (torch.rand(2, len(labels)) < self.flip).to(labels.device)
        mirrored = (chance[0], chance[0] if self.paired else chance[1])
        views = [torch.where(mirrored[i % 2][:, None, None, None], v.flip(-1), v) for i, v in enumerate(views)]
        taught = None
        if (teacher := self.taught_by[0]) is not None:
            if isinstance(teacher, nn.Module):
                teacher.to(labels.device)
            with torch.no_grad():
                taught = teacher(*views[-2:])
        loss = self.distillation.loss(self.model(*views[:2]), labels, taught)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], self.rate)
        ramp = warm_ramp(self.rate, self.steps)
        schedule = LambdaLR(optimizer, lambda step: ramp(step + 1) / self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_regions(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    paired: bool = True,
    flip: float = 0.5,
    distillation: Distillation | None = None,
    teacher: Teacher | None = None,
    teacher_inputs: tuple[Tensor, Tensor] | None = None,
    folder: str | Path | None = None,
    device: str = "cpu",
    **options: Any,
) -> list[float]:
    """Train on pairs of tensors held in memory, (views, views) or (pictures, masks): the loss of every epoch.

    Views are mirrored together, unless `paired` is False, as published. All randomness follows from the seed. A
    `teacher` sees what its student sees, mirrored alike, or `teacher_inputs` of its own size and normalization.
    `folder` and `options`: see `nearfar.core.training.train`; an interrupted run goes on in its folder.
    """
    learn = distillation or Distillation()
    if (learn.kind != "none") != (teacher is not None):
        raise ValueError(f"distillation is {learn.kind!r}, teacher is {teacher}; one needs the other")
    if not len(labels):
        raise ValueError("there is nothing to learn from")
    if teacher is None and teacher_inputs is not None:
        raise ValueError("teacher_inputs are given without a teacher")
    loader = data_loader(TensorDataset(*inputs, *(teacher_inputs or ()), labels), batch_size, shuffle=True, seed=seed)
    module = RegionModule(model, learning_rate, epochs * len(loader), paired, flip, learn, teacher)
    history = train(module, loader, epochs=epochs, seed=seed, folder=folder, device=device, **options)
    model.cpu().eval()
    return [row["train_loss"] for row in history]


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
