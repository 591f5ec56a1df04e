"""Training a `MixerForCausalLM` on text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nearfar.core.errors import UserError
from nearfar.core.model_folder import TrainedOn, writing
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.language.configuration import MixerConfig
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.registry import IMPORTED


@dataclass
class Recipe:
    """A model and how to train it.

    Args:
        mixers, hidden_size, num_hidden_layers, state_mixer, residual, norm, dropout, learned_positions,
        max_position_embeddings: of the model, see `MixerConfig`; the last is at least `context`.
        tokenizer: "bytes", a folder, or hub:NAME.
        context: tokens per example.
        batch_size: examples per step.
        epochs: passes over the text; the weights of the one with the best validation loss are kept.
        parts: of a pass. After each its state is saved and the validation loss taken, as after a whole one, so that a
            pass of days goes on within.
        optimizer: "muon" for the matrices of the blocks (Jordan 2024; updates scaled to AdamW's size, as in Moonlight,
            arXiv 2502.16982) and AdamW for the rest, or "adamw" for all.
        learning_rate: the peak, after `warmup` steps; then a cosine down to a fiftieth. AdamW alone wants about a
            fifth of Muon's.
        weight_decay: on matrices only.
        clip: largest norm of the gradient.
        validation_share: share of the text, at its end, that is held out.
        seed: of everything.
    """

    mixers: list = field(default_factory=lambda: ["base-conv", "mamba"])
    hidden_size: int = 128
    num_hidden_layers: int = 6
    state_mixer: str | dict = "mlp"
    residual: str | dict = "plain"
    norm: str = "layernorm"
    dropout: float = 0.1
    learned_positions: bool = False
    max_position_embeddings: int = 2048
    tokenizer: str = "bytes"
    context: int = 256
    batch_size: int = 8
    epochs: int = 5
    parts: int = 1
    optimizer: str = "muon"
    learning_rate: float = 1e-2
    warmup: int = 50
    weight_decay: float = 0.3
    clip: float = 1.0
    validation_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self.learning_rate = float(self.learning_rate)
        if min(self.context, self.batch_size, self.epochs, self.parts, self.warmup) < 1 or self.learning_rate <= 0:
            raise ValueError("context, batch_size, epochs, parts, warmup and learning_rate must be positive")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer={self.optimizer!r} must be muon or adamw")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must lie between 0 and 1")

    def model(self, tokenizer: PreTrainedTokenizerBase) -> MixerForCausalLM:
        """The untrained model."""
        names = ("mixers", "hidden_size", "num_hidden_layers", "state_mixer", "residual", "norm", "dropout")
        torch.manual_seed(self.seed)
        config = MixerConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=max(self.max_position_embeddings, self.context),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            learned_positions=self.learned_positions,
            **{name: getattr(self, name) for name in names},
        )
        return MixerForCausalLM(config)


class Windows(Dataset):
    """A text cut into pieces of `context` tokens, each with the token after it as last target."""

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.tokens[start : start + self.context + 1].long()


def text_marks(tokens: Tensor, length: int = 32, one_in: int = 64) -> list[str]:
    """Hashes of about one in `one_in` of the stretches of `length` tokens, chosen by what they hold.

    So a text that holds a piece of another has marks in common with it, wherever in it the piece lies.
    """
    found: set[int] = set()
    for start in range(0, len(tokens), 2**20):  # in pieces, so that memory does not grow with the text
        found.update(_marks(tokens[start : start + 2**20 + length - 1], length, one_in))
    return [f"{mark:016x}" for mark in sorted(found)]


def _marks(tokens: Tensor, length: int, one_in: int) -> list[int]:
    values = np.asarray(tokens).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    mixed = np.zeros(max(0, len(values) - length + 1), np.uint64)
    with np.errstate(over="ignore"):
        for i in range(length):
            mixed = mixed * np.uint64(0x100000001B3) + (values[i : i + len(mixed)] ^ (values[i : i + len(mixed)] >> 29))
        mixed ^= mixed >> np.uint64(32)
    return np.unique(mixed[mixed % np.uint64(one_in) == 0]).tolist()


def listed(found: Any) -> list[Any]:
    """Lightning hands over a single optimizer or schedule bare."""
    return found if isinstance(found, list) else [found]


class LanguageModule(pl.LightningModule):
    """Cross-entropy of the next token; Muon and AdamW, or AdamW alone, with warm-up and cosine."""

    def __init__(self, model: MixerForCausalLM, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.model, self.recipe, self.steps = model, recipe, steps
        self.automatic_optimization = False  # Lightning steps one optimizer by itself, not two

    def loss(self, batch: Tensor) -> Tensor:
        inputs, targets, documents = batch[:, :-1], batch[:, 1:], None
        end = self.model.config.eos_token_id
        if end is not None and (inputs == end).any():  # nothing passes from a document to the one behind it
            ended = inputs == end
            documents, targets = ended.cumsum(1) - ended.long(), targets.masked_fill(ended, -100)
        logits = self.model(inputs, seq_idx=documents).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch: Tensor) -> None:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch))
        extra = self.model.model.auxiliary_loss
        self.manual_backward(loss if extra is None else loss + extra)
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.recipe.clip)
        for optimizer, schedule in zip(listed(self.optimizers()), listed(self.lr_schedulers())):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("validation_loss", self.loss(batch), prog_bar=True, batch_size=len(batch))

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LambdaLR]]:
        recipe, muon = self.recipe, []
        if recipe.optimizer == "muon":
            muon = [m.weight for m in self.model.model.layers.modules() if isinstance(m, nn.Linear)]
        known = {id(p) for p in muon}
        decayed, kept = split_by_decay(self.model)
        matrices, vectors = ([p for p in group if id(p) not in known] for group in (decayed, kept))
        options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizers: list[Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95), **options)]
        if muon:
            optimizers.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **options))
        return optimizers, [warmup_cosine(o, recipe.warmup, self.steps, floor=0.02) for o in optimizers]


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that weight decay is for, matrices, and the others: vectors, and what a module names in
    `no_weight_decay` (decays, queries over depth, scales kept as matrices)."""
    named: dict[int, tuple[nn.Parameter, bool]] = {}
    for module in model.modules():
        spared = (*getattr(module, "no_weight_decay", ()), "A_log")
        for name, parameter in module.named_parameters(recurse=False):
            named.setdefault(id(parameter), (parameter, parameter.dim() > 1 and name not in spared))
    return [p for p, decayed in named.values() if decayed], [p for p, decayed in named.values() if not decayed]


def train_language_model(
    recipe: Recipe,
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    sources: Sequence[str] = (),
    device: str = "auto",
    precision: str = "32-true",
    show_progress: bool = False,
    fresh: bool = False,
) -> tuple[MixerForCausalLM, list[dict[str, float]]]:
    """Train in `folder/run` (an interrupted run goes on) and save model and tokenizer to `folder`.

    Returns the model and one row of losses per epoch, or part of one, with the training tokens per second.
    """
    model = recipe.model(tokenizer)
    held_out = int(len(tokens) * recipe.validation_share)
    fit, validation = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    parts = [Windows(part, recipe.context) for part in (fit, validation)]
    if not all(len(part) for part in parts):
        raise UserError(
            f"the text has {len(tokens)} tokens; with context {recipe.context} training needs {recipe.context + 1} and "
            f"validation (share {recipe.validation_share:g}) as many again; use more text or a shorter context"
        )
    loaders = [
        data_loader(part, recipe.batch_size, shuffle=shuffle, seed=recipe.seed, parts=recipe.parts)
        for part, shuffle in zip(parts, (True, False))
    ]
    epochs = recipe.epochs * recipe.parts
    module = LanguageModule(model, recipe, epochs * len(loaders[0]))
    history = train(
        module,
        loaders[0],
        loaders[1],
        epochs=epochs,
        monitor="validation_loss",
        mode="min",
        seed=recipe.seed,
        folder=Path(folder) / "run",
        settings=dataclasses.asdict(recipe)
        | {"precision": precision}
        | ({"imported": sorted(IMPORTED.values())} if IMPORTED else {}),
        fresh=fresh,
        show_progress=show_progress,
        device=device,
        precision=precision,
    )
    about = {"recipe": dataclasses.asdict(recipe), "sources": [str(source) for source in sources]}
    with writing(folder, "language model", about, TrainedOn.of(text_marks(tokens))) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    per_epoch = len(parts[0]) // recipe.parts * recipe.context
    return model, [row | {"tokens_per_second": per_epoch / max(row["seconds"], 1e-9)} for row in history]
