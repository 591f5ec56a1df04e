"""Training of segmentation networks: patches, augmentation, schedules, and the scores of the cases held out."""

import dataclasses
import inspect
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import monai.transforms
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.core.errors import UserError
from nearfar.core.files import locked, temporary_folder, write_json
from nearfar.core.finite import check_finite
from nearfar.core.model_folder import TrainedOn
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.medical.data.cases import Case, Collection, case_digest, check_split
from nearfar.medical.inference import _predict
from nearfar.medical.losses import SegmentationLoss
from nearfar.medical.metrics import summarize
from nearfar.medical.preparation import Channel, ChannelSurvey, Preparation
from nearfar.medical.recipe import Recipe
from nearfar.medical.refinement import crf_grid, search_crf, to_bytes
from nearfar.medical.segmenter import Segmenter

MAX_PLACES = 20_000
"""Voxels of a class in a case that patches are centred on."""

IGNORED = -1
"""Class index of voxels that do not count."""


def augmentation(entries: Sequence[Mapping[str, Any]] | None, dims: int) -> monai.transforms.Compose:
    """MONAI's dictionary transforms for items of `image` (C, *S) and `label` (1, *S), from `Recipe.augment`.

    `OneOf` and `Compose` take `transforms`, a list like `entries` itself. Raises UserError for unknown names or
    settings.
    """
    if entries is None:
        entries = [{"RandFlipd": {"prob": 0.5, "spatial_axis": axis}} for axis in range(dims)]

    def build(entry: Mapping[str, Any]) -> Any:
        try:
            ((name, settings),) = entry.items()
            kind, settings = getattr(monai.transforms, name), dict(settings or {})
            if "transforms" in settings:
                return kind(transforms=[build(e) for e in settings.pop("transforms")], **settings)
            both = not kind.__module__.startswith("monai.transforms.intensity")
            settings.setdefault("keys", ["image", "label"] if both else ["image"])
            if both and "mode" in inspect.signature(kind).parameters:
                settings.setdefault("mode", ("bilinear", "nearest"))
            return kind(**settings)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"augment {entry}: {error}") from error

    return monai.transforms.Compose([build(entry) for entry in entries])


class Patches(Dataset):
    """Random patches of prepared cases (image (C, *S), labels (*S)); deterministic where the generators are seeded.

    Outside an image the patch is zero and its label `outside`. A share `foreground` of the patches is centred: on one
    of the case's classes, each as likely as the others, and then on one of its voxels.
    """

    def __init__(
        self,
        items: Sequence[tuple[np.ndarray, np.ndarray]],
        recipe: Recipe,
        outside: int = 0,
        required: bool = True,
    ) -> None:
        self.items, self.recipe, self.outside = list(items), recipe, outside
        self.augment = augmentation(recipe.augment, len(recipe.roi))
        draw = np.random.default_rng(recipe.seed)
        self.places = []
        for _, labels in self.items:
            classes = []
            for value in np.unique(labels):
                if value > 0 and value != (outside or IGNORED):
                    found = np.flatnonzero(labels == value)
                    found = draw.choice(found, MAX_PLACES) if len(found) > MAX_PLACES else found
                    classes.append(np.stack(np.unravel_index(found, labels.shape), 1))
            self.places.append(classes)
        if required and not any(self.places):
            raise UserError("the training cases hold no labelled voxel: there is nothing to learn")

    def __len__(self) -> int:
        return self.recipe.patches_per_epoch

    def __getitem__(self, _: int) -> tuple[Tensor, Tensor]:
        number = random.randrange(len(self.items))
        (whole, all_labels), classes, recipe = self.items[number], self.places[number], self.recipe
        scale = random.choice(recipe.scales) if recipe.scales else 1.0
        window = [*(round(r / scale) for r in recipe.roi), *[1] * (all_labels.ndim - len(recipe.roi))]
        pads = [max(0, w - n) for w, n in zip(window, all_labels.shape)]
        centre = None
        if classes and random.random() < recipe.foreground:
            places = random.choice(classes)
            centre = places[random.randrange(len(places))]
        where = []
        for axis, (w, n) in enumerate(zip(window, all_labels.shape)):
            room = max(0, n - w)
            start = random.randint(0, room) if centre is None else int(centre[axis]) - w // 2
            where.append(slice(min(max(start, 0), room), min(max(start, 0), room) + min(w, n)))
        image = torch.from_numpy(np.array(whole[(slice(None), *where)]))
        labels = torch.from_numpy(np.array(all_labels[tuple(where)]))[None].float()
        if any(pads):
            both = [v for p in reversed(pads) for v in (p // 2, p - p // 2)]
            image, labels = F.pad(image, both), F.pad(labels, both, value=self.outside)
        if all_labels.ndim > len(recipe.roi):
            image, labels = image[..., 0], labels[..., 0]
        if tuple(labels.shape[1:]) != recipe.roi:
            linear = {2: "bilinear", 3: "trilinear"}[len(recipe.roi)]
            image = F.interpolate(image[None], recipe.roi, mode=linear, align_corners=False)[0]
            labels = F.interpolate(labels[None], recipe.roi, mode="nearest-exact")[0]
        self.augment.set_random_state(random.getrandbits(31))
        item = self.augment({"image": image, "label": labels})
        image, labels = (monai.utils.convert_to_tensor(item[key], track_meta=False) for key in ("image", "label"))
        return image.contiguous(), labels[0].round().long()


class _Module(pl.LightningModule):
    def __init__(self, segmenter: Segmenter, steps: int, ignore: int | None) -> None:
        super().__init__()
        self.network, self.recipe, self.steps = segmenter.network, segmenter.recipe, steps
        table = None
        self.counts: dict[int, Any] = {}
        if segmenter.regions:
            inside = [[value in region for region in segmenter.regions.values()] for value in segmenter.values]
            table = torch.tensor(inside)
        self.table = table
        try:
            self.loss = SegmentationLoss(
                segmenter.recipe.loss, squash=segmenter.recipe.squash, ignore=ignore, regions=table
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        try:
            outputs = self.network(images)
        except ValueError as error:
            raise UserError(f"{self.recipe.network} cannot take roi {list(self.recipe.roi)}: {error}") from error
        if isinstance(outputs, Tensor) and outputs.ndim == labels.ndim + 2:  # MONAI's deep supervision stacks heads
            outputs = list(outputs.unbind(1))
        loss = self.loss(outputs, labels)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        scores = _predict(self.network, images, ())
        keep = labels != IGNORED
        if self.table is not None:
            pairs = [(scores[:, k] > 0, self.table.to(labels.device)[labels.clamp_min(0), k])
                     for k in range(scores.shape[1])]  # fmt: skip
        elif self.recipe.binary:
            pairs = [(scores[:, 0] > 0, labels == 1)]
        else:
            found = scores.argmax(1)
            pairs = [(found == k, labels == k) for k in range(1, scores.shape[1])]
        for k, (p, g) in enumerate(pairs):
            both = torch.stack([(p & g & keep).sum(), ((p & keep).sum() + (g & keep).sum())]).double()
            self.counts[k] = self.counts.get(k, 0) + both

    def on_validation_epoch_end(self) -> None:
        every = [float(2 * both / total) for both, total in self.counts.values() if total > 0]
        self.counts = {}
        if every:
            self.log("validation_dice", float(np.mean(every)), batch_size=1)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups: Any = self.network.parameters()
        if hasattr(self.network, "parameter_groups"):
            groups = list(self.network.parameter_groups(recipe.learning_rate, recipe.weight_decay))
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer]
        schedulers = torch.optim.lr_scheduler
        try:
            optimizer = kind(
                groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **recipe.optimizer_settings
            )
            if isinstance(recipe.schedule, Mapping):
                ((name, settings),) = recipe.schedule.items()
                return {"optimizer": optimizer, "lr_scheduler": getattr(schedulers, name)(optimizer, **settings)}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"optimizer or schedule of the recipe: {error}") from error
        if recipe.schedule == "constant":
            return optimizer
        if recipe.schedule == "poly":
            schedule: Any = schedulers.PolynomialLR(optimizer, self.steps, 0.9)
        else:
            schedule = warmup_cosine(optimizer, min(10, self.steps // 10 + 1), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Said(pl.Callback):
    """Says after the first epoch, and after every tenth of them, how it goes and how long it takes."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say, self.started, self.first = say, time.monotonic(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        if trainer.global_rank or (done != self.first + 1 and done % max(1, epochs // 10)):
            return
        left = (time.monotonic() - self.started) / (done - self.first) * (epochs - done)
        words = [f"{name.replace('_', ' ')} {float(value):.4f}" for name, value in trainer.callback_metrics.items()]
        self.say(f"epoch {done} of {epochs}: {', '.join(words)}; about {left / 60:.1f} minutes left")


def train_segmenter(
    collection: Collection,
    recipe: Recipe,
    folder: str | Path,
    *,
    train_cases: Sequence[Case],
    validation_cases: Sequence[Case] = (),
    show_progress: bool = False,
    say: Callable[[str], Any] = lambda text: None,
    keep: Callable[[Case, np.ndarray], Any] = lambda case, labels: None,
    **trainer_options: Any,
) -> tuple[Segmenter, list[dict[str, Any]]]:
    """Train on `train_cases`; returns the segmenter and the summary of scores on `validation_cases`.

    The folder gets the run's record (see `nearfar.core.training.train`; an interrupted run goes on), the model and
    `validation.json`. Prepared cases lie in a temporary folder in it, so memory does not grow with their number. A
    patient on both sides is refused. `say` gets a line for what a rule had to decide about a case, `keep` the label map
    that is scored of each of the validation cases.
    """
    folder = Path(folder)
    check_split(collection.cases, [c.name for c in train_cases], [c.name for c in validation_cases])
    if not collection.labels:
        raise UserError("the data do not say what their label values mean; declare them")
    with locked(folder, "trains"), temporary_folder(folder, "prepared") as cache:
        items, channels, spacing = _prepare(collection, train_cases, recipe, cache, say)
        pl.seed_everything(recipe.seed, verbose=False)
        trained = {"regions": collection.regions, "order": collection.order} if collection.order else {}
        segmenter = Segmenter.create(recipe, collection.labels, len(channels), **trained)
        segmenter.spacing_seen, segmenter.channels = spacing, channels
        ignore = None if collection.ignore is None else IGNORED
        patches = Patches(items, recipe, ignore or 0)
        held = _prepare(collection, validation_cases, recipe, cache, say, channels)[0] if validation_cases else []
        if held:
            plain = dataclasses.replace(recipe, augment=[], scales=(), foreground=1.0)
            plain.patches_per_epoch = min(recipe.patches_per_epoch, max(2 * recipe.batch_size, len(held)))
            watched: Any = data_loader(Patches(held, plain, ignore or 0, required=False), recipe.batch_size)
        else:
            watched = None
        loader = data_loader(patches, recipe.batch_size, shuffle=True, seed=recipe.seed)
        steps = recipe.epochs * -(-len(loader) // recipe.accumulate)
        train(
            _Module(segmenter, steps, ignore),
            loader,
            watched,
            epochs=recipe.epochs,
            callbacks=[_Said(say)],
            seed=recipe.seed,
            folder=folder / "run",
            settings={**dataclasses.asdict(recipe), "cases": [c.name for c in train_cases], **trained},
            show_progress=show_progress,
            accumulate_grad_batches=recipe.accumulate,
            **trainer_options,
        )
        segmenter.network.cpu().eval()
        with torch.inference_mode():
            first, _ = patches[0]
            check_finite(_predict(segmenter.network, first[None], ()), "training diverged: the trained scores")
        segmenter.trained_on = TrainedOn.of(map(case_digest, train_cases), (c.group or c.name for c in train_cases))
        segmenter.save(folder)
    summary = score_cases(segmenter, collection, validation_cases, keep)
    write_json(folder / "validation.json", summary)
    return segmenter, summary


def score_cases(
    segment: Callable[[Any], np.ndarray],
    collection: Collection,
    cases: Sequence[Case],
    keep: Callable[[Case, np.ndarray], Any] = lambda case, labels: None,
) -> list[dict[str, Any]]:
    """The summary (see `metrics.summarize`) of the labelled ones among `cases`, under the convention `nearfar`.

    `keep` gets each label map.
    """
    rows = []
    for case in cases:
        scan, labels = collection.read(case)
        if labels is not None:
            keep(case, found := segment(scan))
            rows += [{"case": case.name, **r} for r in collection.score(found, labels, scan.spacing)]
    return summarize(rows) if rows else []


def tune_crf(
    segmenter: Segmenter,
    collection: Collection,
    cases: Iterable[Case],
    device: str = "cpu",
    track: Callable[[Sequence[Any]], Iterable[Any]] = lambda grid: grid,
) -> tuple[list[dict[str, Any]], int]:
    """Set the segmenter's CRF to the best of `refinement.crf_grid` on labelled validation cases, or to none.

    Returns a row of settings and mean Dice for each, the first without a CRF, and the number of cases. Raises
    UserError without any case.
    """
    items, spacings = crf_items(segmenter, collection, cases, device)
    if not items:
        raise UserError("none of the cases is here with labels")
    grid = crf_grid(min(min(s) for s in spacings))
    segmenter.crf, rows = search_crf(items, track(grid), spacings)
    return rows, len(items)


def crf_items(
    segmenter: Segmenter, collection: Collection, cases: Iterable[Case], device: str = "cpu"
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[tuple[float, ...]]]:
    """What `refinement.search_crf` takes of the labelled ones among `cases`: items, and the spacing of each."""
    items, spacings = [], []
    for case in cases:
        scan, labels = collection.read(case)
        if labels is None:
            continue
        image = segmenter.prepare(scan)
        prepared = segmenter.preparation.labels(labels, scan)
        index = sum(k * (prepared == value) for k, value in enumerate(segmenter.values))
        with segmenter.probabilities(image, device=device) as scores:
            items.append((torch.from_numpy(scores), to_bytes(image), torch.from_numpy(index)))
        spacings.append(segmenter.preparation.grid_spacing(scan))
    return items, spacings


def _prepare(
    collection: Collection,
    cases: Sequence[Case],
    recipe: Recipe,
    cache: Path,
    say: Callable[[str], Any],
    known: tuple[Channel, ...] | None = None,
) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[Channel, ...], list[list[float]] | None]:
    """(image, class index) of each case, mapped from files in `cache`; channels; least and largest voxel sides.

    `known`: the channels, where other cases tell them.
    """
    survey, sides, part = ChannelSurvey(), [], "" if known is None else "held-"
    for case in cases:
        scan, labels = collection.read(case)
        if labels is None:
            raise UserError(f"{case.name}: has no labels to train on")
        for note in scan.notes:
            say(f"{case.name}: {note}")
        if survey.quantiles and len(scan.image) != len(survey.quantiles):
            raise UserError(
                f"{case.name}: has {len(scan.image)} channels, the training cases before it {len(survey.quantiles)}; "
                "they must not differ in their number of channels"
            )
        survey.add(scan, labels, collection.ignore)
        if scan.kind not in ("picture", "array"):
            sides.append(scan.canonical_spacing())
    channels = survey.channels(collection.channel_names, recipe.intensity) if known is None else known
    preparation = Preparation.of(recipe, channels)
    values = np.array([0, *(v for v in collection.labels if v)])
    kind = np.uint8 if len(values) < 256 and collection.ignore is None else np.int32
    order, items = np.argsort(values), []
    for number, case in enumerate(cases):
        scan, labels = collection.read(case)
        assert labels is not None
        prepared = preparation.labels(labels, scan)
        turned = labels if recipe.orient == "stored" else scan.to_canonical(labels)
        if cut := int((labels != 0).sum()) - int((turned[preparation.box(scan)] != 0).sum()):
            say(f"{case.name}: {cut} labelled voxels lie in the padding around the image; they are not learned")
        index = order[np.searchsorted(values[order], prepared).clip(max=len(values) - 1)].astype(kind)
        if collection.ignore is not None:
            index[prepared == collection.ignore] = IGNORED
        for what, array in (("image", preparation.image(scan).numpy()), ("label", index)):
            np.save(cache / f"{part}{number}-{what}.npy", array)
        names = [cache / f"{part}{number}-{what}.npy" for what in ("image", "label")]
        items.append(tuple(np.load(name, mmap_mode="r") for name in names))
    seen = [[min(axis), max(axis)] for axis in zip(*sides)] if sides else None
    return items, channels, seen
