"""Training a separation model: PIT with SI-SDR on mixtures from disk or drawn on the fly."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

from nearfar.audio.separation.mixtures import pad_batch
from nearfar.audio.separation.mossformer import MossFormer, create_model
from nearfar.audio.separation.pit import pit_si_sdr, training_loss
from nearfar.core.errors import UserError
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.model_folder import TrainedOn, writing
from nearfar.core.training import data_loader, train, warmup_cosine


@dataclass(frozen=True)
class Recipe:
    """A training run. The defaults are those of MossFormer2's released training script, except where noted.

    variant: "mossformer-s", "mossformer-m", "mossformer-l" or "mossformer2"; model: constructor settings over it, e.g.
        {dim: 64, depth: 4} or {causal: true}.
    filters: how encoder and decoder start: "random" as released, or "fourier", see `set_fourier_filters`.
    rate: Hz. num_speakers: voices per mixture.
    epochs; mixtures_per_epoch: only for mixtures drawn on the fly. batch_size; accumulate: batches per step.
    seconds: length of training crops. speeds: percent of the speed, drawn per voice; [] for none (the released
        MossFormer2 script has none, the hub's MossFormer recipe has 95, 100, 105).
    fill: chain short utterances of a speaker; overlap, rooms, hiss: voices that are silent for a part, simulated rooms
        and noise, all of drawn mixtures: see `DrawnMixtures`.
    learning_rate, weight_decay: Adam's. clip: largest norm of the gradient. schedule: "plateau" multiplies the rate by
        `factor` after `plateau` epochs without a better validation value, "cosine" warms up over 5 % of the steps and
        then falls to 0; patience: end after so many epochs without a better one.
    threshold: leave out items below this loss in dB (null: keep all; the hub's recipe has -30).
    seed; precision: Lightning's, "32-true", "bf16-mixed"; num_workers: of the data loader. compile: training steps by
        torch.compile: a minute or two of compiling, which needs a C++ compiler; they are then faster on a CPU too.
    """

    variant: str = "mossformer2"
    model: Mapping[str, Any] = field(default_factory=dict)
    filters: Literal["random", "fourier"] = "random"
    rate: int = 8000
    num_speakers: int = 2
    epochs: int = 120
    mixtures_per_epoch: int = 20000
    batch_size: int = 1
    accumulate: int = 4
    seconds: float = 2.0
    speeds: tuple[int, ...] = ()
    fill: bool = False
    overlap: float = 1.0
    rooms: float = 0.0
    hiss: float = 0.0
    learning_rate: float = 1.5e-4
    weight_decay: float = 1e-5
    clip: float = 10.0
    schedule: Literal["plateau", "cosine"] = "plateau"
    factor: float = 0.5
    plateau: int = 5
    patience: int = 10
    threshold: float | None = None
    seed: int = 0
    precision: str = "32-true"
    num_workers: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("num_speakers", "epochs", "batch_size", "accumulate", "plateau", "patience", "rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0 or self.seconds <= 0 or not 0 < self.factor < 1:
            raise ValueError("learning_rate and seconds must be positive and factor between 0 and 1")
        if self.filters not in ("random", "fourier"):
            raise ValueError(f"filters must be random or fourier, got {self.filters!r}")
        if self.schedule not in ("plateau", "cosine"):
            raise ValueError(f"schedule must be plateau or cosine, got {self.schedule!r}")
        if not (0 < self.overlap <= 1 and 0 <= self.rooms <= 1 and 0 <= self.hiss <= 1):
            raise ValueError("overlap, rooms and hiss are shares between 0 and 1, overlap more than 0")

    def build(self) -> MossFormer:
        """A freshly initialized model. Raises UserError for a setting that it does not have."""
        settings = {"num_speakers": self.num_speakers, "sample_rate": self.rate, **self.model}
        try:
            model = create_model(self.variant, **settings)
        except TypeError as error:
            raise UserError(f"model: {error}") from error
        if self.filters == "fourier":
            set_fourier_filters(model)
        return model


@torch.no_grad()
def set_fourier_filters(model: MossFormer) -> None:
    """Set encoder and decoder to windowed sinusoids of both signs, which give the mixture back under masks of one.

    Of N filters, N / 2 are the rows of the Hartley transform of that size, cut to a frame: a tight frame. With half a
    sine as window in the encoder and in the decoder, frames that overlap by half add up to the signal. A short training
    then need not find a transform first.

    Raises ValueError where N is odd or below two frames' samples.
    """
    filters, size = model.encoder.weight.shape
    if filters % 2 or filters < 2 * size:
        raise ValueError(f"num_filters is {filters}; for Fourier filters it must be even and at least {2 * size}")
    at, frequency = torch.arange(size) + 0.5, torch.arange(filters // 2)[:, None]
    angle = 4 * math.pi * frequency * at / filters
    wave = (angle.cos() + angle.sin()) * (2 / filters) ** 0.5 * torch.sin(math.pi * at / size)
    model.encoder.weight.copy_(torch.cat([wave, -wave]))
    model.decoder.weight.copy_(torch.cat([wave, -wave]).mT)


def seen_by(*sets: Any) -> TrainedOn:
    """Hashes of the recordings (mixtures, sources, single voices) and speakers of `sets`, as far as they tell them."""
    paths, speakers = [], []
    for part in sets:
        for mixture in getattr(part, "mixtures", ()):
            paths += [mixture.mix, *mixture.sources]
        for speaker, found in getattr(part, "voices", {}).items():
            paths += found
            speakers.append(speaker)
    return TrainedOn.of(map(content_digest, paths), speakers)


class SeparationTraining(pl.LightningModule):
    """The model with its loss and optimizer. Logs `loss` and `si_sdri` (validation, dB over the mixture)."""

    def __init__(self, model: MossFormer, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.compiled = torch.compile(model.forward, dynamic=False) if recipe.compile else None

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        mix, sources, lengths = batch
        losses, _ = pit_si_sdr(self._separate(mix, lengths), sources, lengths)
        loss = training_loss(losses, self.recipe.threshold)
        self.log("loss", losses.mean().detach(), on_step=False, on_epoch=True, batch_size=len(mix))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        mix, sources, lengths = batch
        losses, _ = pit_si_sdr(self._separate(mix, lengths), sources, lengths)
        plain, _ = pit_si_sdr(mix.unsqueeze(1).expand_as(sources), sources, lengths)
        self.log("si_sdri", (plain - losses).mean(), batch_size=len(mix), sync_dist=True)

    def _separate(self, mix: Tensor, lengths: Tensor) -> Tensor:
        padded = bool((lengths < mix.shape[-1]).any())
        forward = self.compiled if self.compiled and self.training and not padded else self.model
        return forward(mix, lengths if padded else None).float()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )
        if self.recipe.schedule == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            cosine = warmup_cosine(optimizer, max(1, steps // 20), steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
        plateau = ReduceLROnPlateau(optimizer, "max", factor=self.recipe.factor, patience=self.recipe.plateau)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "si_sdri"}}


def train_separation(
    recipe: Recipe,
    train_set: Dataset,
    validation_set: Dataset,
    folder: str | Path | None = None,
    *,
    start: MossFormer | None = None,
    seen: TrainedOn | None = None,
    device: str = "auto",
    show_progress: bool = False,
    **trainer_options: Any,
) -> tuple[MossFormer, list[dict[str, float]]]:
    """Train and return the model with its best weights (by validation SI-SDRi) and one row of metrics per epoch.

    folder: keeps the run, which an interrupted call takes up again (see `nearfar.core.training.train`), and the
        finished model in `folder/model`, for `from_pretrained`. start: a model to fine-tune instead of a new one, and
        seen: what that was trained on.
    """
    torch.manual_seed(recipe.seed)
    model = recipe.build() if start is None else start
    module = SeparationTraining(model, recipe)
    loader = {"num_workers": recipe.num_workers, "collate_fn": pad_batch, "seed": recipe.seed}
    history = train(
        module,
        data_loader(train_set, recipe.batch_size, shuffle=True, **loader),
        data_loader(validation_set, recipe.batch_size, **loader),
        epochs=recipe.epochs,
        monitor="si_sdri",
        patience=recipe.patience,
        seed=recipe.seed,
        folder=folder,
        settings=asdict(recipe),
        data={} if start is None else {"starting weights": data_digest(start.state_dict())},
        show_progress=show_progress,
        device=device,
        precision=recipe.precision,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip,
        **trainer_options,
    )
    if folder is not None:
        about, seen = {"recipe": asdict(recipe)}, (seen or TrainedOn()) | seen_by(train_set, validation_set)
        with writing(Path(folder) / "model", "separation model", about, seen) as place:
            model.save_pretrained(place)
    return model.eval(), history
