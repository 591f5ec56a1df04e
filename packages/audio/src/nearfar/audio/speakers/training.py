"""Training speaker models: crops of labelled recordings, a margin loss, validation by EER on speakers kept apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import Dataset

from nearfar.audio.augment import Augmentation, change_speed
from nearfar.audio.corpora import Utterance, chosen_channel
from nearfar.audio.sound import Recording, Samples, read_samples, without_silence
from nearfar.audio.speakers.frontends import KaldiFbank, SelfSupervised
from nearfar.audio.speakers.ltdnn import ECAPA, LAP, LTDNN, SpeakerEncoder, SpeakerHead
from nearfar.audio.speakers.scoring.backend import pair_scores
from nearfar.audio.speakers.scoring.calibration import draw_trials
from nearfar.audio.speakers.scoring.rates import eer
from nearfar.core.errors import UserError
from nearfar.core.finite import check_finite
from nearfar.core.leakage import Side, check_apart
from nearfar.core.processes import process_count
from nearfar.core.sharing import gathered
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.ops.losses.margin_softmax import AAMSoftmax, margin_ramp


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run; the YAML recipes hold these names.

    Model: `head` is "ecapa" (on filter banks), "ltdnn-ecapa", "ltdnn-d3net" or "lap" (on a `backbone`, a folder or
    hub:NAME); `num_layers` keeps the first transformer layers; `tune` frees the top n layers, or "all"; `normalize`
    None follows the backbone's preprocessor; `channels`, `num_mels`, `sample_rate`, `floor`, `top_db` and `high_freq`
    are of the filter-bank model (see `KaldiFbank`; a floor of 10 is about what rounding to 16 bits leaves, and did best
    of 1e-7 to 1e4 on validation speakers with gates, zeros and gains).
    Data: crops of `crop_seconds`; `crops_per_utterance` per epoch; `speeds` other than 1 make new speakers; `noise` and
    `responses` are folders for augmentation, applied with `augment_probability`; what devices and lines do (gain,
    codecs, noise, gates, lost packets, `nearfar.audio.augment.degrade`) happens with `degrade_probability`, with
    `surroundings` after rooms, noise, narrow bands and shorter stretches; digital silence is dropped; of recordings
    with several channels `channel` (1, 2 ...) is taken, or with `mix_channels` their mean; with neither they are
    refused, for two channels are often two speakers; `validation` is the share of the speakers that is kept apart to
    choose the epoch.
    Loss: AAM-softmax with `margin` (ramped up over `margin_epochs`), `scale`, `sub_centers`, `top_k`, `penalty`.
    Optimization: `epochs` (0 leaves the network untrained, to compare with), Adam, `schedule` "cosine" (10 % warm-up)
    or "onecycle", `learning_rate` for the head and `backbone_learning_rate` for what is tuned of the backbone,
    gradient norm at most `clip`.
    """

    head: Literal["ecapa", "ltdnn-ecapa", "ltdnn-d3net", "lap"] = "ecapa"
    backbone: str | None = None
    num_layers: int | None = None
    tune: int | str = 0
    normalize: bool | None = None
    span_out: bool = False
    channels: int = 512
    num_mels: int = 80
    sample_rate: int = 16000
    floor: float = 10.0
    top_db: float | None = None
    high_freq: float | None = None
    embedding_dim: int = 192
    crop_seconds: float = 3.0
    crops_per_utterance: int = 1
    speeds: tuple[float, ...] = (1.0,)
    noise: str | None = None
    responses: str | None = None
    augment_probability: float = 0.6
    degrade_probability: float = 0.0
    surroundings: bool = False
    channel: int | None = None
    mix_channels: bool = False
    validation: float = 0.1
    margin: float = 0.2
    margin_epochs: float = 0.0
    scale: float = 30.0
    sub_centers: int = 1
    top_k: int = 0
    penalty: float = 0.06
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 1e-3
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 0.0
    schedule: Literal["cosine", "onecycle"] = "cosine"
    clip: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "speeds", tuple(self.speeds))
        for name, default in vars(type(self)).items():  # whole numbers are floats too
            if isinstance(default, float) and not name.startswith("_"):
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.head not in ("ecapa", "ltdnn-ecapa", "ltdnn-d3net", "lap"):
            raise ValueError(f"head must be ecapa, ltdnn-ecapa, ltdnn-d3net or lap, got {self.head!r}")
        if (self.head == "ecapa") != (self.backbone is None):
            raise ValueError("the head 'ecapa' reads filter banks, the others need a backbone")
        if self.schedule not in ("cosine", "onecycle"):
            raise ValueError(f"schedule must be cosine or onecycle, got {self.schedule!r}")
        if 1.0 not in self.speeds:
            raise ValueError(f"speeds must hold 1.0, got {self.speeds}")
        if not 0 <= self.validation < 1 or self.crop_seconds <= 0 or self.epochs < 0 or self.batch_size < 2:
            raise ValueError("needs 0 <= validation < 1, crop_seconds > 0, epochs >= 0 and batch_size >= 2")
        if self.channel is not None and (self.channel < 1 or self.mix_channels):
            raise ValueError(f"channel counts from 1 and goes without mix_channels, got {self.channel}")
        if self.span_out and self.head == "ecapa":
            raise ValueError("span_out needs a backbone")


def build_model(recipe: Recipe) -> SpeakerEncoder:
    """The model of a recipe, its head (and filter-bank network) with random weights. Raises UserError."""
    if recipe.backbone is None:
        head = ECAPA(recipe.num_mels, recipe.channels, recipe.embedding_dim)
        return SpeakerEncoder(
            KaldiFbank(recipe.num_mels, recipe.sample_rate, recipe.floor, recipe.top_db, recipe.high_freq), head
        )
    frontend = SelfSupervised.from_pretrained(recipe.backbone, recipe.num_layers, recipe.normalize)
    sizes: dict[str, Any] = {
        "hidden_size": frontend.hidden_size,
        "num_states": frontend.num_states,
        "embedding_dim": recipe.embedding_dim,
    }
    heads: Mapping[str, Callable[..., SpeakerHead]] = {
        "lap": lambda **sizes: LAP(
            num_heads=math.gcd(16, sizes["hidden_size"]) if sizes["hidden_size"] != 768 else 12, **sizes
        ),
        "ltdnn-ecapa": lambda **sizes: LTDNN(form="ecapa", **sizes),
        "ltdnn-d3net": lambda **sizes: LTDNN(form="d3net", **sizes),
    }
    return SpeakerEncoder(frontend, heads[recipe.head](**sizes), recipe.span_out)


class Crops(Dataset):
    """Random crops of labelled recordings: `(samples (n,), class)`, class = speaker + number of speakers * speed.

    A recording shorter than a crop is repeated (wrap padding). Only the crop is read from disk.
    """

    def __init__(self, utterances: Sequence[Utterance], recipe: Recipe, rate: int) -> None:
        self.utterances, self.recipe, self.rate = list(utterances), recipe, rate
        self.speakers = sorted({str(utterance.speaker) for utterance in utterances})
        self.classes = {speaker: number for number, speaker in enumerate(self.speakers)}
        self.augment = Augmentation(
            recipe.noise,
            recipe.responses,
            recipe.augment_probability,
            recipe.degrade_probability,
            recipe.surroundings,
        )

    @property
    def num_classes(self) -> int:
        return len(self.speakers) * len(self.recipe.speeds)

    def __len__(self) -> int:
        return len(self.utterances) * self.recipe.crops_per_utterance

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        utterance = self.utterances[index % len(self.utterances)]
        number = int(torch.randint(len(self.recipe.speeds), ()))
        speed = self.recipe.speeds[number]
        seconds, size = self.recipe.crop_seconds * speed, round(self.recipe.crop_seconds * self.rate)
        samples = self._crop(utterance, seconds)
        if speed != 1.0:
            samples = change_speed(samples, speed)
        samples = self.augment(fit_length(samples, size), self.rate)
        heard = _heard(samples, self.rate)  # a gate has made silence
        samples = fit_length(heard if len(heard) else samples, size)
        return torch.from_numpy(samples), self.classes[str(utterance.speaker)] + len(self.speakers) * number

    def _crop(self, utterance: Utterance, seconds: float) -> Samples:
        """A stretch of the utterance without its digital silence, or the whole where there is none else."""
        whole = utterance_seconds(utterance)
        start = max(0.0, whole - seconds) * float(torch.rand(()))
        try:
            samples = _heard(read_utterance(utterance, self.rate, start, seconds, self.recipe.mix_channels), self.rate)
        except UserError:  # a stretch of silence; `usable` has read the recording
            samples = np.empty(0, np.float32)
        if not len(samples):
            samples = _heard(read_utterance(utterance, self.rate, mix_channels=self.recipe.mix_channels), self.rate)
        return samples


def _heard(samples: Samples, rate: int) -> Samples:
    return np.concatenate(list(without_silence([samples], rate)))


def utterance_seconds(utterance: Utterance) -> float:
    """How long it is."""
    with Recording(utterance.path) as recording:
        whole = recording.frames / recording.rate - utterance.start
    return whole if utterance.seconds is None else min(whole, utterance.seconds)


def read_utterance(
    utterance: Utterance,
    rate: int,
    start: float = 0.0,
    seconds: float | None = None,
    mix_channels: bool = False,
) -> Samples:
    """Samples of an utterance, or of a stretch of it.

    Raises UserError where there are several channels and neither the utterance names one nor `mix_channels` is true.
    """
    if utterance.seconds is not None:
        seconds = min(utterance.seconds - start, math.inf if seconds is None else seconds)
    return read_samples(utterance.path, rate, utterance.start + start, seconds, mix_channels, utterance.channel)


def fit_length(samples: Samples, size: int) -> Samples:
    """Cut, or repeat from the start, to `size` samples."""
    return np.resize(samples, size).astype(np.float32)


class Whole(Dataset):
    """Whole recordings, one after the other, at most `max_seconds` of each: `(samples, index)`."""

    def __init__(
        self, utterances: Sequence[Utterance], rate: int, max_seconds: float = 20.0, mix_channels: bool = False
    ) -> None:
        self.utterances, self.rate, self.max_seconds = list(utterances), rate, max_seconds
        self.mix_channels = mix_channels

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        utterance = self.utterances[index]
        samples = read_utterance(utterance, self.rate, 0.0, self.max_seconds, self.mix_channels)
        return torch.from_numpy(_heard(samples, self.rate)), index


class SpeakerTraining(pl.LightningModule):
    """A speaker model and its classifier under Lightning; logs `loss`, `accuracy`, `margin` and `val_eer`."""

    def __init__(
        self,
        model: SpeakerEncoder,
        num_classes: int,
        recipe: Recipe,
        steps_per_epoch: int,
        validation: Sequence[Utterance],
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.steps_per_epoch = model, recipe, steps_per_epoch
        self.classifier = AAMSoftmax(
            model.embedding_dim,
            num_classes,
            recipe.margin,
            recipe.scale,
            recipe.sub_centers,
            min(recipe.top_k, num_classes - 1),
            recipe.penalty,
        )
        self.trials = None
        if validation:
            self.trials = draw_trials(
                [u.speaker for u in validation], min(20000, 20 * len(validation)), seed=recipe.seed
            )
        self.embeddings: dict[int, Tensor] = {}

    def on_train_epoch_start(self) -> None:
        self.classifier.margin = margin_ramp(
            float(self.current_epoch), self.recipe.margin, 0.0, float(self.recipe.margin_epochs)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        waveforms, labels = batch
        logits, loss = self.classifier(self.model(waveforms), labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        values = {"loss": loss, "accuracy": accuracy, "margin": self.classifier.margin}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        waveforms, index = batch
        embedding = self.model(waveforms)[0].float().cpu()
        self.embeddings[int(index[0])] = check_finite(embedding, "training diverged: the validation embeddings")

    def on_validation_epoch_end(self) -> None:
        left, right, labels = self.trials
        found = {n: x for part in gathered(self.embeddings) for n, x in part.items()}
        x = torch.stack([found[n] for n in range(len(found))]).numpy()
        self.embeddings.clear()
        self.log("val_eer", eer(pair_scores(x, x, left, right), labels).value)

    def configure_optimizers(self) -> dict[str, Any]:
        recipe = self.recipe
        backbone = [p for p in self.model.frontend.parameters() if p.requires_grad]
        own = {id(p) for p in backbone}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        groups = [{"params": rest, "lr": recipe.learning_rate}]
        if backbone:
            groups.append({"params": backbone, "lr": recipe.backbone_learning_rate})
        optimizer = torch.optim.Adam(groups, weight_decay=recipe.weight_decay)
        steps = recipe.epochs * self.steps_per_epoch
        schedule: LRScheduler
        if recipe.schedule == "onecycle":
            peaks = [group["lr"] for group in groups]
            schedule = OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.1)
        else:
            schedule = warmup_cosine(optimizer, max(1, steps // 10), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def split_speakers(utterances: Sequence[Utterance], share: float, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances for training and, of other speakers, for validation (at least two speakers, unless `share` is 0).

    Raises UserError where an utterance has no speaker or the speakers are too few.
    """
    if lost := [utterance.name for utterance in utterances if utterance.speaker is None]:
        raise UserError(f"{len(lost)} recordings have no speaker, {lost[0]} first: name a layout that tells them")
    speakers = sorted({str(utterance.speaker) for utterance in utterances})
    count = max(2, round(share * len(speakers))) if share else 0
    if len(speakers) - count < 2:
        raise UserError(f"{len(speakers)} speakers are too few: training needs 2 and validation {count}")
    held = set(np.random.default_rng(seed).permutation(speakers)[:count].tolist())
    learn = [utterance for utterance in utterances if str(utterance.speaker) not in held]
    return learn, [utterance for utterance in utterances if str(utterance.speaker) in held]


def choose_channels(utterances: Sequence[Utterance], recipe: Recipe) -> list[Utterance]:
    """The utterances with the recipe's channel, where it names one and they have several and name none."""
    return [replace(utterance, channel=chosen_channel(utterance, recipe.channel)) for utterance in utterances]


def usable(utterances: Sequence[Utterance], rate: int, mix_channels: bool = False) -> tuple[list[Utterance], list[str]]:
    """The utterances that can be read, and one line for each that cannot (missing, damaged, silent, several channels
    of which none is chosen)."""
    good, bad = [], []
    for utterance in utterances:
        try:
            if len(_heard(read_utterance(utterance, rate, 0.0, 20.0, mix_channels), rate)) < rate // 40:
                raise UserError(f"{utterance.path}: is silent in its first 20 s")
        except UserError as error:
            bad.append(str(error))
        else:
            good.append(utterance)
    return good, bad


def train_speaker_model(
    model: SpeakerEncoder,
    learn: Sequence[Utterance],
    validation: Sequence[Utterance],
    recipe: Recipe,
    folder: str | Path | None = None,
    num_workers: int = 0,
    **trainer_options: Any,
) -> list[dict[str, float]]:
    """Train `model` in place by a recipe and leave it with its best weights; returns one row of metrics per epoch.

    The best epoch is the one with the lowest EER on the `validation` speakers, without them the last. With `folder` an
    interrupted run goes on where it was. `trainer_options` go to `nearfar.core.training.train`.
    """
    if recipe.epochs == 0:
        model.eval()
        return []
    check_apart(
        *(
            Side(name, [u.name for u in part], [u.digest for u in part], [u.speaker for u in part])
            for name, part in (("training", learn), ("validation", validation))
        ),
        group="speaker",
    )
    if isinstance(model.frontend, SelfSupervised):
        tune = recipe.tune
        model.frontend.tune("all" if tune == "all" else int(tune))
    crops = Crops(learn, recipe, model.sample_rate)
    loader = data_loader(
        crops,
        max(1, min(recipe.batch_size, len(crops) // process_count())),
        shuffle=True,
        seed=recipe.seed,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )
    module = SpeakerTraining(model, crops.num_classes, recipe, len(loader), validation)
    whole = Whole(validation, model.sample_rate, mix_channels=recipe.mix_channels)
    checked = data_loader(whole, 1, num_workers=num_workers) if validation else None
    history = train(
        module,
        loader,
        checked,
        epochs=recipe.epochs,
        monitor="val_eer" if validation else None,
        mode="min",
        seed=recipe.seed,
        folder=folder,
        settings=asdict(recipe) | {"speakers": len(crops.speakers), "recordings": len(learn)},
        gradient_clip_val=recipe.clip,
        **trainer_options,
    )
    model.eval()
    with torch.inference_mode():
        samples = crops[0][0][None].to(next(model.parameters()).device)
        check_finite(model(samples), "training diverged: the trained model's embedding")
    return history
