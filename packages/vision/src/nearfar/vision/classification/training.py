"""Training picture classifiers with the published recipes' parts, which are timm's.

RandomResizedCrop, flip, RandAugment, colour jitter and random erasing; Mixup and CutMix; label smoothing; AdamW with
layer decay, warm-up and cosine; stochastic depth; an exponential moving average of the weights.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

from nearfar.core.checkpoints import load_state_dict, read_state_dict
from nearfar.core.errors import UserError, some
from nearfar.core.fingerprint import content_digest
from nearfar.core.finite import check_finite
from nearfar.core.leakage import Side, check_apart
from nearfar.core.model_folder import TrainedOn
from nearfar.core.processes import place, sharded
from nearfar.core.sharing import gathered
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.ops.tokens.patch_mixing import PatchMixing
from nearfar.vision.classification.classifier import (
    VIEWS,
    Classifier,
    create_model,
    evaluate_multilabel,
    evaluation_transform,
    identify,
    views_transform,
)
from nearfar.vision.classification.token_labels import TokenLabelled, TokenLabelLoss
from nearfar.vision.classification.token_training import set_keep_rate, taught_loss, train_predictors
from nearfar.vision.data.images import Pictures
from nearfar.vision.models.base import PictureModel
from nearfar.vision.models.sparsifiner import Sparsifiner

logging.getLogger("timm").setLevel(logging.WARNING)


MEASURES = ("accuracy", "balanced", "mAP", "F1")
"""What may choose the epoch; the first two of pictures with one class each, the others of several."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults suit fine-tuning or short runs on small data; the published ones are in `RECIPES`."""

    size: int = 224
    """Side of the training crop, and of the picture in evaluation."""
    epochs: int = 30
    parts: int = 1
    """Of an epoch: after each its state is saved and the validation pictures are scored, as after a whole one."""
    batch_size: int = 64
    accumulate: int = 1
    """Batches per step of the optimizer."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    learning_rate_batch: int = 0
    """Pictures per step that `learning_rate` is meant for; with another number it is scaled in proportion. 0: never."""
    min_learning_rate: float = 1e-6
    """Learning rate at the end."""
    weight_decay: float = 0.05
    warmup_epochs: float = 3
    cooldown_epochs: int = 0
    """Epochs at `min_learning_rate` after `epochs`."""
    layer_decay: float | None = None
    drop_path: float | None = None
    dropout: float | None = None
    """Of models that have it; None leaves the model's."""
    layer_scale: float | None = 1.0
    """Initial scale of the residual branches: the published 1e-6 needs hundreds of epochs. None leaves the model's."""
    head_scale: float = 1.0
    """Factor on a fresh classifier's weights."""
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_share: float = 1.0
    """Of the batches that mixup or cutmix mixes."""
    patch_mixing: float = 0.0
    """Largest share of a picture's grid that Patch Mixing replaces, 0.5 for example: in half of the batches, which then
    have neither mixup nor cutmix. 0 for none."""
    patch_grid: int = 0
    """Cells along each side for Patch Mixing; 0 for 7 and 14, or where they do not divide `size` for 4 and 8."""
    randaugment: str = ""
    """timm's notation, for example rand-m9-mstd0.5-inc1, or one of AutoAugment's policies: cifar10, imagenet, svhn."""
    color_jitter: float = 0.0
    erasing: float = 0.0
    crop_scale: float = 0.35
    """Smallest share of the picture's area that a training crop has (0.08 as published)."""
    padded_crop: int = 0
    """Zeros around the picture from which a training crop of its own size is cut, in place of a resized crop: 4 as
    published on CIFAR; 0 for resized crops."""
    repeats: int = 0
    """Views of a picture per epoch (repeated augmentation): 3 as published, 0 for off."""
    ema: float = 0.0
    """Decay of the averaged weights, which are then the ones that are kept; 0 for none."""
    clip: float | None = None
    """Largest gradient norm, or factor of the adaptive clipping."""
    clip_mode: str = "norm"
    """norm, or agc: adaptive clipping of every unit's gradient by the norm of its weights, the classifier left out."""
    auxiliary: float = 0.4
    """Weight of the second head's loss, in models that have one in training."""
    token_labels: str = ""
    """Folder of label maps (see `make-token-labels`) for models that classify patches; nothing for none."""
    token_weight: float = 0.5
    """Weight of the patches' loss beside the picture's."""
    token_truth: int = 0
    """1: the picture's soft label is blended with its true class, for fine-tuning at larger sizes."""
    keep_rate: float | None = None
    """Share of the patches that each reduction of an EViT keeps; None leaves the model's."""
    keep_warmup: float = 0
    """Epochs at which all are kept: 10 as published for a training from the start."""
    keep_shrink: float = 0
    """Epoch until which the share falls to `keep_rate`, along a cosine: 100 as published; 0 for `keep_rate` throughout,
    as in fine-tuning."""
    teacher: str = ""
    """Folder of a dense classifier of the same classes that an EViT or a Sparsifiner learns from; nothing for none."""
    teacher_weight: float = 0.5
    reconstruction_epochs: int = 0
    """First epochs, in which a Sparsifiner's predictors alone learn the teacher's attention: 5 as published."""
    interpolation: str = "bicubic"
    """Of training crops; random draws bilinear or bicubic."""
    crop_pct: float = 1.0
    """Share of the shorter side that the evaluation crop covers; 0.875 for most published weights."""
    crop_mode: str = "center"
    """center, or squash: the whole picture is warped to the square."""
    views: str = "one"
    """Views of a picture that the finished classifier averages: one, flip, or ten (corners and centre, mirrored)."""
    class_weights: str = ""
    """balanced: rare classes count more in the loss, in inverse proportion to their pictures (with several classes a
    picture, what has a class counts as much as what has not); nothing for none."""
    choose_by: str = ""
    """What chooses the epoch: accuracy, or balanced, the mean of the classes' accuracies; mAP or F1, means over the
    classes, where pictures have several. Nothing for accuracy and mAP."""
    choose_on: str = ""
    """test: the test pictures choose the epoch, as many published figures were made; scores on them are then marked as
    of pictures seen in training. Nothing for pictures held out."""
    validation: float = 0.1
    """Share of the training pictures that chooses the epoch, where the data have no split of their own for it."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) != (field.type is str):
                raise ValueError(f"{field.name} must be {'text' if field.type is str else 'a number'}, got {value!r}")
        for name in ("size", "epochs", "parts", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.repeats and self.parts > 1:
            raise ValueError(f"repeats is {self.repeats} and parts {self.parts}; repeats needs whole epochs (parts=1)")
        if self.clip_mode not in ("norm", "agc"):
            raise ValueError(f"clip_mode is {self.clip_mode!r}; allowed are norm and agc")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        for name, allowed in (
            ("views", VIEWS[:3]),
            ("class_weights", ("", "balanced")),
            ("choose_by", ("", *MEASURES)),
            ("choose_on", ("", "test")),
        ):
            if getattr(self, name) not in allowed:
                listed = ", ".join(word or "nothing" for word in allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {listed}")
        if self.token_labels and (self.mixup or self.cutmix or self.patch_mixing or self.repeats or self.padded_crop):
            raise ValueError(
                "token_labels goes with neither mixup nor cutmix nor patch_mixing nor repeats nor padded_crop; boxes "
                "change places"
            )
        if self.padded_crop < 0 or not 0 <= self.mixing_share <= 1:
            raise ValueError(f"padded_crop {self.padded_crop} is below 0 or mixing_share {self.mixing_share} no share")
        if self.keep_rate is not None and not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {self.keep_rate}")
        if self.keep_shrink and not 0 <= self.keep_warmup < self.keep_shrink:
            raise ValueError(f"keep_warmup={self.keep_warmup} must lie before keep_shrink={self.keep_shrink}")
        if self.reconstruction_epochs and not self.teacher:
            raise ValueError("reconstruction_epochs needs a teacher")
        if not 0 <= self.patch_mixing <= 1:
            raise ValueError(f"patch_mixing must be in [0, 1], got {self.patch_mixing}")
        if self.patch_mixing and (bad := [cells for cells in self.patch_grids if cells < 1 or self.size % cells]):
            raise ValueError(f"patch_grid must divide size={self.size}, got {bad[0]}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, got {self.batch_size}")

    @property
    def patch_grids(self) -> tuple[int, ...]:
        """Cells along each side that Patch Mixing draws from."""
        if self.patch_grid:
            return (self.patch_grid,)
        return (7, 14) if self.size % 14 == 0 else (4, 8)


POLICIES = {policy.value: policy for policy in AutoAugmentPolicy}
"""AutoAugment's policies (Cubuk et al. 2019), in torchvision's form."""


def augmentation(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings of timm's `create_transform`."""
    return {
        "input_size": recipe.size,
        "scale": (recipe.crop_scale, 1.0),
        "auto_augment": None if recipe.randaugment in POLICIES else recipe.randaugment or None,
        "color_jitter": recipe.color_jitter or None,
        "re_prob": recipe.erasing,
        "re_mode": "pixel",
        "interpolation": recipe.interpolation,
    }


def training_transform(recipe: Recipe) -> Callable:
    """Random crop, flip, RandAugment or a policy or colour jitter, tensor, normalization, random erasing."""
    transform = create_transform(is_training=True, **augmentation(recipe))
    assert isinstance(transform, transforms.Compose)
    mend_posterize(transform)
    crop, flip, *rest = transform.transforms
    if recipe.padded_crop:
        resize = transforms.Resize(recipe.size, InterpolationMode.BICUBIC)
        crop = transforms.Compose([resize, transforms.RandomCrop(recipe.size, recipe.padded_crop)])
    policy = [AutoAugment(POLICIES[recipe.randaugment])] if recipe.randaugment in POLICIES else []
    return transforms.Compose([crop, flip, *policy, *rest])


def mend_posterize(transform: Any) -> None:
    """Let RandAugment's Posterize give black for 0 bits."""
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """RandAugment asks for 0 bits at times, which new versions of Pillow refuse: black, as before."""
    return ImageOps.posterize(picture, bits) if bits else Image.new(picture.mode, picture.size)


class ClassifierModule(pl.LightningModule):
    """Lightning's view of a classifier in training: loss, optimizer, averaged weights, validation accuracy.

    `weights`: of the classes in the loss. `multilabel`: the targets are vectors of zeros and ones.
    """

    weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_classes: int,
        batches: int,
        teacher: nn.Module | None = None,
        weights: Tensor | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        self.multilabel = multilabel
        self.register_buffer("weights", weights, persistent=False)
        self.model, self.recipe, self.num_classes = model, recipe, num_classes
        self.batches, self.steps = (recipe.parts * n for n in (batches, math.ceil(batches / recipe.accumulate)))
        # a model that is shared out has its weights in parts and its buffers whole, which no one call averages
        options = {"decay": recipe.ema, "use_warmup": True, "foreach": not sharded()}
        self.average = ModelEmaV3(model, **options) if recipe.ema else None
        mixing = recipe.mixup or recipe.cutmix
        self.mix = (
            Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixing_share, label_smoothing=recipe.smoothing,
                num_classes=num_classes, **({"multi_label": True} if multilabel else {}),
            )
            if mixing
            else None
        )  # fmt: skip
        self.mix_patches = (
            PatchMixing(num_classes, (0.0, recipe.patch_mixing), recipe.patch_grids, 1.0, recipe.smoothing)
            if recipe.patch_mixing
            else None
        )
        self.taught_by = [] if teacher is None else [teacher.eval().requires_grad_(False)]  # none of its weights
        if recipe.reconstruction_epochs and not isinstance(model, Sparsifiner):
            raise UserError(f"{type(model).__name__}: has no predictors; reconstruction_epochs is for Sparsifiner")
        truth = bool(recipe.token_truth)
        self.token_loss = TokenLabelLoss(recipe.token_weight, ground_truth=truth) if recipe.token_labels else None
        self.counts: list[Tensor] = []
        self.seen: list[tuple[Tensor, Tensor]] = []

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.multilabel:
            return nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=self.weights)
        if target.ndim == 2:
            return nn.functional.cross_entropy(logits, target, weight=self.weights)
        return nn.functional.cross_entropy(logits, target, self.weights, label_smoothing=self.recipe.smoothing)

    def on_train_batch_start(self, _batch: Any, index: int) -> None:
        recipe = self.recipe
        if recipe.keep_rate is not None:
            epoch = self.current_epoch / recipe.parts + index / self.batches
            for model in (self.model, self.kept):
                set_keep_rate(model, epoch, recipe.keep_rate, recipe.keep_warmup, recipe.keep_shrink)
        if recipe.reconstruction_epochs and index == 0:
            train_predictors(self.model, self.current_epoch < recipe.reconstruction_epochs * recipe.parts)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        x, target = batch
        if self.mix_patches is not None and torch.rand(()) < 0.5:
            x, target = self.mix_patches(x, target)
        elif self.mix is not None and len(x) % 2 == 0:
            x, target = self.mix(x, target)
        elif self.multilabel:
            target = target * (1 - self.recipe.smoothing) + self.recipe.smoothing / 2
        if self.taught_by:
            logits, taught = taught_loss(self.model, x, self.taught_by[0].to(x.device), self.recipe.teacher_weight)
            loss = taught if getattr(self.model, "dense", False) else self.loss(logits, target) + taught
            self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
            return loss
        try:
            out = self.model(x)
        except ValueError as error:
            if len(x) > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "a batch of one picture cannot train this model, whose batch norm compares two; set batch_size to 2 or "
                "more, and to a number that leaves no single picture over"
            ) from error
        if self.token_loss is not None:
            loss = self.token_loss(out, target)
            self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
            return loss
        # (logits, a second head's logits): LSNet's distillation head and OverLoCK's overview
        loss = (
            self.loss(out[0], target) + self.recipe.auxiliary * self.loss(out[1], target)
            if isinstance(out, tuple)
            else self.loss(out, target)
        )
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def on_train_batch_end(self, _out: Any, _batch: Any, index: int) -> None:
        if self.average is not None and (index + 1) % self.recipe.accumulate == 0:
            self.average.update(self.model, step=self.global_step)

    @property
    def kept(self) -> nn.Module:
        """The weights that count: the averaged ones where there are any."""
        return self.model if self.average is None else self.average.module

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        x, target = batch
        scores = check_finite(self.kept(x), "training diverged: the scores of the validation pictures")
        if self.multilabel:
            self.seen.append((scores.float().sigmoid().cpu(), target.cpu()))
        else:
            right = target[scores.argmax(1) == target]
            self.counts.append(torch.stack([t.bincount(minlength=self.num_classes).cpu() for t in (right, target)]))

    def on_validation_epoch_end(self) -> None:
        if self.multilabel:
            every = [pair for seen in gathered(self.seen) for pair in seen]
            scores, truth = (torch.cat(parts) for parts in zip(*every, strict=True))
            self.seen.clear()
            figures, _ = evaluate_multilabel(scores, truth, range(self.num_classes), resamples=0)
            self.log_dict({name: figures[name] for name in MEASURES[2:]})
            return
        right, number = torch.stack(gathered(torch.stack(self.counts).sum(0))).sum(0).double()
        self.counts.clear()
        there = number > 0
        self.log_dict({"accuracy": right.sum() / number.sum(), "balanced": (right[there] / number[there]).mean()})

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.recipe.clip and self.recipe.clip_mode == "agc":
            adaptive_clip_grad(model_parameters(self.model, exclude_head=True), clip_factor=self.recipe.clip)
        elif self.recipe.clip:
            self.clip_gradients(optimizer, self.recipe.clip, "norm")

    def configure_optimizers(self) -> dict[str, Any]:
        recipe = self.recipe
        settings: dict[str, Any] = {"layer_decay": recipe.layer_decay} if recipe.layer_decay else {}
        lr = recipe.learning_rate
        if recipe.learning_rate_batch:
            lr *= recipe.batch_size * recipe.accumulate * self.trainer.world_size / recipe.learning_rate_batch
        optimizer = create_optimizer_v2(self.model, opt="adamw", lr=lr, weight_decay=recipe.weight_decay, **settings)
        for group in optimizer.param_groups:  # the schedule scales the group's own rate
            group["lr"] *= group.get("lr_scale", 1.0)
        warmup, total = (round(epochs * self.steps) for epochs in (recipe.warmup_epochs, recipe.epochs))
        schedule = warmup_cosine(optimizer, warmup, total, floor=min(1.0, recipe.min_learning_rate / lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def new_model(name: str, num_classes: int, recipe: Recipe) -> nn.Module:
    """`create_model` as the recipe asks for it."""
    return create_model(
        name,
        num_classes,
        recipe.size,
        drop_path=recipe.drop_path,
        dropout=recipe.dropout,
        layer_scale=recipe.layer_scale,
        aux_head=recipe.auxiliary > 0,
    )


def train_classifier(
    name: str,
    pictures: Pictures,
    validation: Pictures,
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    model: nn.Module | None = None,
    num_workers: int = 0,
    show_progress: bool = False,
    **trainer_options: Any,
) -> tuple[Classifier, list[dict[str, float]]]:
    """Train a classifier; returns it with its best weights and one row of metrics per epoch, or part of one.

    `validation` chooses the epoch and must share no picture with `pictures`. `weights`: a checkpoint to start from, in
    a published layout for our models. `folder`: see `nearfar.core.training.train`; the classifier is saved there.
    """
    parts = (("the training", pictures), ("the validation pictures", validation))
    check_apart(*(Side(name, part.names, part.digests()) for name, part in parts))
    if pictures.multilabel != validation.multilabel:
        raise UserError("of the training and the validation pictures one part has several classes a picture")
    if pictures.classes != validation.classes:
        raise UserError(f"classes differ: training has {len(pictures.classes)}, validation {len(validation.classes)}")
    classes = len(pictures.classes)
    monitor = check_task(recipe, pictures)
    views_transform(recipe.size, recipe.crop_pct, recipe.crop_mode, recipe.views)
    torch.manual_seed(recipe.seed)
    model = model or new_model(name, classes, recipe)
    if recipe.head_scale != 1:
        for parameter in model.get_classifier().parameters():
            parameter.data.mul_(recipe.head_scale)
    if weights is not None:
        start_from(model, weights)
    grid = token_grid(model, recipe) if recipe.token_labels else (0, 0)
    loader, held = loaders(pictures, validation, recipe, num_workers, grid)
    teacher = read_teacher(recipe.teacher, pictures.classes) if recipe.teacher else None
    module = ClassifierModule(
        model, recipe, classes, len(loader), teacher,
        class_weights(pictures) if recipe.class_weights else None, pictures.multilabel,
    )  # fmt: skip
    history = train(
        module,
        loader,
        held,
        epochs=(recipe.epochs + recipe.cooldown_epochs) * recipe.parts,
        monitor=monitor,
        seed=recipe.seed,
        folder=folder,
        settings={
            "model": name,
            "classes": pictures.classes,
            **asdict(recipe),
        },
        data={
            name: content_digest(Path(path))
            for name, path in (("starting weights", weights), ("teacher", recipe.teacher))
            if path
        },
        show_progress=show_progress,
        accumulate_grad_batches=recipe.accumulate,
        **trainer_options,
    )
    classifier = Classifier(
        module.kept.eval().cpu(), name, pictures.classes, recipe.size, recipe.crop_pct, recipe.crop_mode,
        multilabel=pictures.multilabel, views=recipe.views,
    )  # fmt: skip
    if recipe.keep_rate is not None:
        set_keep_rate(classifier.model, recipe.epochs, recipe.keep_rate, 0, 0)
        classifier.settings["keep_rate"] = classifier.model.keep_rate
    if recipe.reconstruction_epochs:
        train_predictors(classifier.model, False)
        classifier.model.requires_grad_()
    if folder is not None:
        classifier.trained_on = TrainedOn.of([*pictures.digests(), *validation.digests()])
        classifier.save(folder)
    return classifier, history


def check_task(recipe: Recipe, pictures: Pictures) -> str:
    """The measure that chooses the epoch. Raises UserError for settings that do not suit the pictures' labels."""
    single = {"patch_mixing": recipe.patch_mixing, "token_labels": recipe.token_labels, "teacher": recipe.teacher}
    if pictures.multilabel and (unsuited := [name for name, value in single.items() if value]):
        raise UserError(f"{', '.join(unsuited)}: for pictures of one class each; these may have several")
    unweighted = {"token_labels": recipe.token_labels, "teacher": recipe.teacher}
    if recipe.class_weights and (unsuited := [name for name, value in unweighted.items() if value]):
        raise UserError(f"class_weights: not with {', '.join(unsuited)}, whose loss has no weights")
    allowed = MEASURES[2:] if pictures.multilabel else MEASURES[:2]
    if recipe.choose_by not in ("", *allowed):
        kind = "several classes" if pictures.multilabel else "one class each"
        raise UserError(f"choose_by is {recipe.choose_by}; for pictures of {kind} allowed are {', '.join(allowed)}")
    return recipe.choose_by or allowed[0]


def class_weights(pictures: Pictures) -> Tensor:
    """Weights of the classes that make them count the same: N / (classes n_c), of mean 1 over the pictures.

    Where a picture may have several, of its classes against their absence: (N - n_c) / n_c.
    """
    number = pictures.targets().sum(0)
    if empty := [name for name, n in zip(pictures.classes, number.tolist(), strict=True) if not n]:
        raise UserError(f"class_weights: no picture to learn from has the class {some(empty)}, so it has no weight")
    if pictures.multilabel:
        return (len(pictures) - number).clamp(min=1) / number
    return len(pictures) / (len(number) * number)


def read_teacher(folder: str, classes: list[str]) -> nn.Module:
    """The model in a folder of `train`. Raises UserError where it knows other classes."""
    teacher = Classifier.load(folder)
    if teacher.classes != classes:
        raise UserError(f"{folder}: knows other classes than the pictures; a teacher needs the same")
    return teacher.model


def token_grid(model: nn.Module, recipe: Recipe) -> tuple[int, int]:
    """Sets a model to give its patches' logits in training, and says of which grid they are."""
    if getattr(model, "aux_head", None) is None or not hasattr(model, "forward_dense"):
        raise UserError(f"{type(model).__name__}: does not classify patches, so token_labels cannot train it")
    model.token_labels = True
    side = -(-recipe.size // model.feature_info[-1]["reduction"])
    return side, side


def loaders(
    pictures: Pictures,
    validation: Pictures,
    recipe: Recipe,
    num_workers: int = 0,
    grid: tuple[int, int] = (0, 0),
) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training pictures, augmented, and of the validation pictures."""
    world, rank, _ = place()
    data: Any = pictures.subset(range(len(pictures)), training_transform(recipe))
    if recipe.token_labels:
        data = TokenLabelled(pictures, recipe.token_labels, grid, recipe.smoothing, **augmentation(recipe))
        mend_posterize(data.colours)
    held = validation.subset(
        range(len(validation)), evaluation_transform(recipe.size, recipe.crop_pct, recipe.crop_mode)
    )
    batch = min(recipe.batch_size, len(data))
    options: dict[str, Any] = {"drop_last": len(data) > batch * world, "num_workers": num_workers}
    if recipe.repeats:
        sampler = RepeatAugSampler(data, world, rank, num_repeats=recipe.repeats, selected_round=0)
        loader = DataLoader(data, batch, sampler=sampler, **options)
    else:
        loader = data_loader(data, batch, shuffle=True, seed=recipe.seed, parts=recipe.parts, **options)
    return loader, data_loader(held, batch, num_workers=num_workers)


def start_from(model: nn.Module, weights: str | Path) -> None:
    """Load a checkpoint (a file, or a folder that `save_pretrained` or `train` wrote) into `model`.

    A classifier for other classes starts afresh. Raises UserError where the checkpoint is of another kind of model.
    """
    path = Path(weights) / "model.safetensors" if Path(weights).is_dir() else Path(weights)
    state: Mapping[str, Tensor] = read_state_dict(path)
    if isinstance(model, PictureModel):
        if type(found := identify(state, str(path))) is not type(model):
            raise UserError(f"{path}: is a checkpoint of {type(found).__name__}, not of {type(model).__name__}")
        model.other_classes = True  # those of the pictures
        model.take_state(model.published_state(state))
        return
    own = model.state_dict()
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    other = {n for n, value in state.items() if n.startswith(heads) and n in own and own[n].shape != value.shape}
    load_state_dict(model, {name: own[name] if name in other else value for name, value in state.items()})
