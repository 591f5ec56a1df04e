"""Picture classifiers in use: models by name, evaluation as published, scores; `training` makes them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nearfar.core.cards import Card
from nearfar.core.checkpoints import identify as identify_one
from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.model_folder import TrainedOn, read, trained_on, writing
from nearfar.core.statistics import bootstrap_interval
from nearfar.vision.data.images import Pictures
from nearfar.vision.models.pyramid import Backbone
from nearfar.vision.models.registry import MODELS, VARIANTS

LINEAR = "linear"
"""Name of `PixelLinear`, which comparisons take as their floor."""


def small_forms() -> dict[str, dict[str, Any]]:
    """Reduced variants for pictures of 64 pixels and minutes on a CPU: `small-NAME` -> settings, of every system."""
    kinds = sorted(set(MODELS.values()), key=lambda kind: kind.__name__)
    return {f"small-{name}": dict(form) for kind in kinds for name, form in card_of(kind).small.items()}


def card_of(kind: type) -> Card:
    """A model's card, an empty one where it has none."""
    return getattr(kind, "CARD", None) or Card(kind.__name__, "", "", 0.0)


def evaluation_transform(size: int, crop_pct: float = 0.875, crop_mode: str = "center") -> Callable:
    """Shorter side to floor(size / crop_pct), bicubic, centre crop (or the whole picture squashed), normalization."""
    return create_transform(size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic")


class PixelLinear(nn.Module):
    """Multinomial logistic regression on the pixels, averaged over a grid of 16 x 16: what a network has to beat."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(3 * 16**2, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def create_model(
    name: str,
    num_classes: int,
    size: int,
    *,
    drop_path: float | None = None,
    layer_scale: float | None = None,
    aux_head: bool = False,
) -> nn.Module:
    """A classifier of pictures of `size` pixels by name: of timm's registry (any), `small-...` or `LINEAR`.

    `layer_scale` (None: the model's own) and `aux_head` count for those of our models that have them. Raises UserError
    for an unknown name, a size below the model's stride, and `drop_path` where the model (LSNet) has none.
    """
    if name == LINEAR:
        return PixelLinear(num_classes)
    timm_name, base = name.removeprefix("small-"), name.removeprefix("small-").partition(".")[0]
    form = card_of(MODELS[base]).small.get(base) if timm_name != name and base in MODELS else None
    if not timm.is_model(timm_name) or (timm_name != name and form is None):
        raise UserError(f"{name}: no such model; `nearfar image-classification models` lists ours, timm's serve too")
    wanted: dict[str, Any] = {"drop_path_rate": drop_path}
    if base in VARIANTS:
        takes = inspect.signature(MODELS[base]).parameters
        has_scale = form is not None or VARIANTS[base].settings.get("layer_scale", 1) is not None
        wanted["layer_scale"] = layer_scale if "layer_scale" in takes and has_scale else None
        wanted["aux_head"] = aux_head or None if "aux_head" in takes else None
        wanted["img_size"] = size if "img_size" in takes else None
        if size < (least := MODELS[base].min_size):
            raise UserError(f"{name}: takes pictures of at least {least} pixels, its largest stride; size is {size}")
    elif (published := timm.get_pretrained_cfg(timm_name)) and published.fixed_input_size:
        wanted["img_size"] = size
    wanted = {key: value for key, value in wanted.items() if value is not None}
    try:
        return timm.create_model(timm_name, num_classes=num_classes, **{**(form or {}), **wanted})
    except (TypeError, AssertionError) as error:  # what models of timm say to settings that they do not take
        raise UserError(f"{name}: cannot be made with {wanted} ({error})") from error


def identify(state: Mapping[str, Tensor], what: str = "the state dict") -> Backbone:
    """The nearfar model that a checkpoint holds, in any known layout, with its weights.

    Exactly one class has to account for every tensor; else a CheckpointError says the reason of each.
    """
    kinds = {kind.__name__: kind for kind in MODELS.values()}
    return identify_one({name: partial(kind.from_published, state) for name, kind in kinds.items()}, what)[1]


@dataclass
class Classifier:
    """A trained model with what it takes to use it: class names (and what they mean), input size, crop."""

    model: nn.Module
    name: str
    classes: list[str]
    size: int
    crop_pct: float
    crop_mode: str = "center"
    descriptions: dict[str, str] = field(default_factory=dict)
    trained_on: TrainedOn = field(default_factory=TrainedOn)

    @torch.inference_mode()
    def scores(self, pictures: Pictures, batch_size: int = 64, device: str = "cpu", num_workers: int = 0) -> Tensor:
        """Class probabilities, (pictures, classes); a row of NaN where the model gives no finite scores."""
        data = pictures.subset(range(len(pictures)), evaluation_transform(self.size, self.crop_pct, self.crop_mode))
        model = self.model.to(device).eval()
        batches = DataLoader(data, batch_size, num_workers=num_workers)
        return torch.cat([model(x.to(device)).float().softmax(1).cpu() for x, _ in batches])

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `classifier.json` to `folder`."""
        record = {key: value for key, value in vars(self).items() if key not in ("model", "trained_on")}
        with writing(folder, "classifier", record, self.trained_on) as place:
            save_state_dict(self.model, place / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> "Classifier":
        """What `save` wrote. Raises UserError where it is no such folder, CheckpointError where the weights differ."""
        try:
            record = read(folder, "classifier")
            record = {field.name: record[field.name] for field in fields(cls) if field.name in record}
            record["trained_on"] = trained_on(folder)
            cls(nn.Identity(), **record)
            if not (isinstance(record["name"], str) and record["size"] > 0 and 0 < record["crop_pct"] <= 1):
                raise ValueError("name, size or crop is out of range")
            evaluation_transform(record["size"], record["crop_pct"], record["crop_mode"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(
                f"{Path(folder) / 'classifier.json'}: damaged ({type(error).__name__}: {error}); train again"
            ) from error
        weights, name = Path(folder) / "model.safetensors", record["name"].removeprefix("small-").partition(".")[0]
        if name in MODELS:  # shapes tell the sizes, the name what shapes do not
            form = card_of(MODELS[name]).small.get(name, {}) if record["name"].startswith("small-") else {}
            known = MODELS[name].built_as(VARIANTS[name], form)
            return cls(MODELS[name].rebuilt(weights, known), **record)
        model = create_model(record["name"], len(record["classes"]), record["size"])
        load_state_dict(model, read_state_dict(weights))
        return cls(model.eval(), **record)

    @classmethod
    def from_published(cls, path: str | Path, name: str | None = None) -> "Classifier":
        """A published ImageNet checkpoint of a nearfar model, with its published input size and crop.

        `name`: variant, with or without the tag of its weights (`nearfar_convnext_tiny.fb_in22k_ft_in1k_384`). Without
        a name the variant is read from the checkpoint; without a tag the first weights of as many classes count.
        """
        state = read_state_dict(path)
        model = identify(state, str(path))
        kind = type(model)
        found = kind.variant(kind.published_settings(kind.published_state(state)))
        base, _, tag = (name or found or "").partition(".")
        if MODELS.get(base) is not kind:
            raise UserError(
                f"{path}: is a checkpoint of {kind.__name__}, {f'not of {base}' if base else 'of no published size'}"
            )
        published = [weights for weights in VARIANTS[base].weights if weights.tag != "untrained"]
        for weights in published:
            if weights.num_classes == model.num_classes and tag in ("", weights.tag):
                info = ImageNetInfo("imagenet-1k" if model.num_classes == 1000 else "imagenet-22k")
                return cls(
                    model,
                    f"{base}.{weights.tag}",
                    info.label_names(),
                    weights.size,
                    weights.crop_pct,
                    weights.crop_mode,
                    info.label_descriptions(as_dict=True),  # type: ignore[arg-type]
                )
        tags = ", ".join(f"{w.tag} ({w.num_classes} classes)" for w in published) or "none"
        raise UserError(f"{path}: has {model.num_classes} classes; published weights of {base}: {tags}")


def evaluate_scores(scores: Tensor, labels: Sequence[int], seed: int = 0) -> dict[str, float]:
    """Accuracy, its 95 % bootstrap interval, top-5 of more than five classes, the mean of the classes' accuracies.

    A row of `scores` that is not finite is a wrong answer. The interval is NaN for fewer than six pictures.
    """
    truth = torch.as_tensor(labels)
    order = scores.argsort(dim=1, descending=True)
    answered = torch.isfinite(scores).all(1)
    first = ((order[:, 0] == truth) & answered).double().numpy()
    among = (order[:, :5] == truth[:, None]).any(1) & answered
    top5 = {"top5": float(among.double().mean())} if scores.shape[1] > 5 else {}
    low, high = bootstrap_interval(first, resamples=2000, seed=seed)
    per_class = [first[(truth == c).numpy()].mean() for c in sorted(set(labels))]
    return {
        "pictures": len(first),
        "accuracy": float(first.mean()),
        "low": low,
        "high": high,
        **top5,
        "balanced": float(np.mean(per_class)),
    }
