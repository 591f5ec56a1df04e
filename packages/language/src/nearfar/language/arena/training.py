"""Training and scoring a `SequenceClassifier` on a task of Long Range Arena, by Mega's recipe."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from nearfar.core.errors import UserError
from nearfar.core.training import data_loader, train
from nearfar.language.arena.tasks import TASKS, Part
from nearfar.language.tcnca import SequenceClassifier, create
from nearfar.language.training import split_by_decay

RECIPES: dict[str, dict[str, Any]] = {
    "listops": {"learning_rate": 1e-3, "weight_decay": 0.01, "batch_size": 64, "steps": 90000, "warmup": 3000},
    "text": {"learning_rate": 4e-3, "weight_decay": 0.01, "batch_size": 50, "steps": 25000, "warmup": 10000},
    "retrieval": {"learning_rate": 3e-3, "weight_decay": 0.04, "batch_size": 64, "steps": 92000, "warmup": 10000},
    "image": {"learning_rate": 1e-2, "weight_decay": 0.02, "batch_size": 50, "steps": 180000, "warmup": 9000},
    "pathfinder": {"learning_rate": 1e-2, "weight_decay": 0.01, "batch_size": 128, "steps": 250000, "warmup": 50000},
    "pathx": {"learning_rate": 1e-2, "weight_decay": 0.01, "batch_size": 128, "steps": 125000, "warmup": 25000},
}
"""Mega's settings: Adam with decoupled decay, linear warm-up (Path-X: squared) and decay to 0, clipped at 1."""


@dataclass
class ArenaRecipe:
    """A task and how to train on it; what is None is Mega's (`RECIPES`, `nearfar.language.tcnca.VARIANTS`).

    Args:
        task: listops, text, retrieval, image, pathfinder or pathx.
        model: settings of the model that differ from the task's, for example {num_hidden_layers: 2}.
        learning_rate, weight_decay, batch_size, steps, warmup: see above; warm-up is cut to a tenth of fewer steps.
        limit: only so many training examples.
        seed: of everything.
    """

    task: str = "listops"
    model: dict = field(default_factory=dict)
    learning_rate: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    warmup: int | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} must be one of {', '.join(TASKS)}")
        shorter = self.steps is not None and self.steps < RECIPES[self.task]["steps"]
        for name, value in RECIPES[self.task].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if shorter:
            self.warmup = min(self.warmup, max(1, self.steps // 10))
        if min(self.steps, self.batch_size, self.warmup) < 1 or float(self.learning_rate) <= 0:
            raise ValueError("steps, batch_size, warmup and learning_rate must be positive")


class ArenaModule(pl.LightningModule):
    """Cross-entropy and accuracy of a classifier."""

    def __init__(self, model: SequenceClassifier, recipe: ArenaRecipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        right = (self.model(**batch).logits.argmax(-1) == batch["labels"]).float().mean()
        self.log("validation_accuracy", right, prog_bar=True, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> tuple[list[Optimizer], list[dict[str, Any]]]:
        recipe = self.recipe
        decayed, kept = split_by_decay(self.model)
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=float(recipe.learning_rate), betas=(0.9, 0.98), eps=1e-8)
        power = 2 if recipe.task == "pathx" else 1

        def factor(step: int) -> float:
            if step < recipe.warmup:
                return ((step + 1) / recipe.warmup) ** power
            return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup))

        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]


def train_on_arena(
    recipe: ArenaRecipe,
    data: str | Path,
    folder: str | Path,
    device: str = "auto",
    show_progress: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Train in `folder/run`, save the model of the best validation accuracy to `folder`; returns what came out."""
    parts = {
        name: Part(recipe.task, data, name, recipe.limit if name == "train" else None) for name in ("train", "val")
    }
    torch.manual_seed(recipe.seed)
    model = create(TASKS[recipe.task].model, **recipe.model)
    loaders = [
        data_loader(part, recipe.batch_size, shuffle=name == "train", seed=recipe.seed, collate_fn=part.collate)
        for name, part in parts.items()
    ]
    epochs = max(1, -(-recipe.steps // max(1, len(loaders[0]))))
    history = train(
        ArenaModule(model, recipe),
        *loaders,
        epochs=epochs,
        limit_train_batches=min(recipe.steps, max(1, len(loaders[0]))),  # beyond `steps` the rate is 0
        monitor="validation_accuracy",
        seed=recipe.seed,
        folder=Path(folder) / "run",
        settings={**dataclasses.asdict(recipe), "data": str(data)},
        show_progress=show_progress,
        device=device,
        fresh=fresh,
        gradient_clip_val=1.0,
    )
    model.save_pretrained(folder)
    return {
        "task": recipe.task,
        "parameters": model.num_parameters(),
        "steps": recipe.steps,
        "validation_accuracy": max(row["validation_accuracy"] for row in history),
        "majority": parts["val"].majority(),
    }


@torch.no_grad()
def accuracy(model: SequenceClassifier, part: Part, batch_size: int = 32) -> dict[str, float]:
    """Accuracy in percent on a part, with the majority class's beside it."""
    if model.config.num_labels != part.task.labels:
        raise UserError(f"the model has {model.config.num_labels} classes, the task {part.task.labels}")
    model.eval()
    right = 0
    for batch in DataLoader(part, batch_size, collate_fn=part.collate):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return {"accuracy": 100 * right / len(part), "majority": 100 * part.majority(), "examples": len(part)}
