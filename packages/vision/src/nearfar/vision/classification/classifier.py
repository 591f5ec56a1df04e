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
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_data_config,
)
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from nearfar.core.cards import Card
from nearfar.core.checkpoints import identify as identify_one
from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import CheckpointError, UserError, some
from nearfar.core.hub import unreachable
from nearfar.core.model_folder import KINDS, TrainedOn, read, trained_on, writing
from nearfar.core.reading import check_announced, reading
from nearfar.core.statistics import FEWEST, bootstrap_interval, percentile_interval
from nearfar.vision.data.images import Pictures
from nearfar.vision.models.pyramid import Backbone
from nearfar.vision.models.registry import MODELS, VARIANTS

LINEAR = "linear"
"""Name of `PixelLinear`, which comparisons take as their floor."""


def small_forms() -> dict[str, dict[str, Any]]:
    """Reduced variants for pictures of 64 pixels and minutes on a CPU: `small-NAME` -> settings, of every system."""
    kinds = sorted(set(MODELS.values()), key=lambda kind: kind.__name__)
    return {f"small-{name}": dict(form) for kind in kinds for name, form in card_of(kind).small.items()}


def plain_forms() -> list[str]:
    """`plain-NAME` for every `small-NAME` that has a counterpart without what its system adds."""
    kinds = sorted(set(MODELS.values()), key=lambda kind: kind.__name__)
    return [f"plain-{name}" for kind in kinds for name in card_of(kind).plain]


def form_of(name: str) -> tuple[str, dict[str, Any]] | None:
    """What `small-NAME` and `plain-NAME` stand for: a model of timm's registry and settings; None for other names."""
    kind, _, base = name.partition("-")
    card = card_of(MODELS[base]) if base in MODELS else Card("", "", "", 0.0)
    if kind == "small" and base in card.small:
        return base, dict(card.small[base])
    if kind == "plain" and base in card.plain:
        model, settings = card.plain[base]
        return model, dict(settings)
    return None


def card_of(kind: type) -> Card:
    """A model's card, an empty one where it has none."""
    return getattr(kind, "CARD", None) or Card(kind.__name__, "", "", 0.0)


def evaluation_transform(size: int, crop_pct: float = 0.875, crop_mode: str = "center") -> Callable:
    """Shorter side to floor(size / crop_pct), bicubic, centre crop (or the whole picture squashed), normalization."""
    return create_transform(size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic")


VIEWS = ("one", "flip", "ten", "random")
"""Views of a picture whose probabilities are averaged: itself; also its mirror image; the four corners and the centre
of the picture before the crop, and their mirror images. "random" is the one view that NiNformer's published code scores
by accident: a crop of the picture's size out of it and a border of an eighth of it, perhaps mirrored."""


def views_transform(size: int, crop_pct: float, crop_mode: str, views: str) -> Callable:
    """`evaluation_transform` to (views, 3, size, size)."""
    if views not in VIEWS:
        raise UserError(f"views is {views!r}; allowed are {', '.join(VIEWS)}")
    if views == "ten" and crop_mode != "center":
        raise UserError(f"ten views are crops, and crop_mode is {crop_mode!r}; use flip")
    plain = evaluation_transform(size, crop_pct, crop_mode)
    assert isinstance(plain, transforms.Compose)
    steps = plain.transforms
    if views == "ten":
        resize, _, *rest = steps
        each = transforms.Compose(rest)
        return transforms.Compose([resize, transforms.TenCrop(size), transforms.Lambda(partial(_each_view, each))])
    if views == "random":
        steps = [*steps[:2], transforms.RandomCrop(size, size // 8), transforms.RandomHorizontalFlip(), *steps[2:]]
    return transforms.Compose([*steps, partial(_flipped, views == "flip")])


def _each_view(transform: Callable, crops: Sequence[Any]) -> Tensor:
    return torch.stack([transform(crop) for crop in crops])


def _flipped(too: bool, x: Tensor) -> Tensor:
    return torch.stack((x, x.flip(-1)) if too else (x,))


class PixelLinear(nn.Module):
    """Multinomial logistic regression on the pixels, averaged over a grid of 16 x 16: what a network has to beat."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(3 * 16**2, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Renormalized(nn.Module):
    """A model of pictures normalized its own way (timm's, for example) as one of ImageNet's mean and deviation."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalized = model
        ours = [torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        theirs = [torch.tensor(v)[:, None, None] for v in (mean, std)]
        self.register_buffer("scale", ours[1] / theirs[1], persistent=False)
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x * self.scale + self.shift)


def create_model(
    name: str,
    num_classes: int,
    size: int,
    *,
    drop_path: float | None = None,
    dropout: float | None = None,
    layer_scale: float | None = None,
    aux_head: bool = False,
) -> nn.Module:
    """A classifier of pictures of `size` pixels by name: of timm's registry, `small-...`, `plain-...` or `LINEAR`.

    `layer_scale` (None: the model's own) and `aux_head` count for those of our models that have them. Raises UserError
    for an unknown name, a size below the model's stride, and `drop_path` where the model (LSNet) has none.
    """
    if name == LINEAR:
        return PixelLinear(num_classes)
    form = form_of(name)
    timm_name, settings = form or (name, {})
    base = timm_name.partition(".")[0]
    if not timm.is_model(timm_name):
        raise UserError(f"{name}: no such model; `nearfar image-classification models` lists ours, timm's serve too")
    wanted: dict[str, Any] = {"drop_path_rate": drop_path, "drop_rate": dropout}
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
        return timm.create_model(timm_name, num_classes=num_classes, **{**settings, **wanted})
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
    settings: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of our models that neither the name nor shapes tell, such as another keep rate."""
    multilabel: bool = False
    """Whether a picture may show several of the classes, or none."""
    views: str = "one"
    """Of `VIEWS`: how many views of a picture are averaged."""
    trained_on: TrainedOn = field(default_factory=TrainedOn)

    @torch.inference_mode()
    def scores(
        self,
        pictures: Pictures,
        batch_size: int = 64,
        device: str = "cpu",
        num_workers: int = 0,
        views: str | None = None,
    ) -> Tensor:
        """Class probabilities, (pictures, classes); a row of NaN where the model gives no finite scores.

        `views`: of `VIEWS`; None for the classifier's own. The random ones are the same in every call.
        """
        views = views or self.views
        transform = views_transform(self.size, self.crop_pct, self.crop_mode, views)
        data = pictures.subset(range(len(pictures)), transform)
        model = self.model.to(device).eval()
        batches = DataLoader(data, batch_size, num_workers=num_workers)
        with torch.random.fork_rng(devices=[], enabled=views == "random"):
            if views == "random":
                torch.manual_seed(0)
            return torch.cat(
                [
                    self.probabilities(model(x.to(device).flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1).cpu()
                    for x, _ in batches
                ]
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class on its own with `multilabel`, else of one of them."""
        return logits.float().sigmoid() if self.multilabel else logits.float().softmax(1)

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `classifier.json` to `folder`, and for a registered model timm's `config.json`.

        With the latter `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the trained model.
        """
        record = {key: value for key, value in vars(self).items() if key not in ("model", "trained_on")}
        with writing(folder, "classifier", record, self.trained_on) as place:
            save_state_dict(self.model, place / "model.safetensors")
            if hasattr(self.model, "pretrained_cfg"):
                size = (3, self.size, self.size)
                shape = {"input_size": size, "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}
                save_config_for_hf(
                    self.model,
                    str(place / "config.json"),
                    {"pretrained_cfg": shape, "label_names": self.classes},
                    model_args=getattr(self.model, "created_with", None),
                )

    @classmethod
    def load(cls, folder: str | Path) -> "Classifier":
        """What `save` wrote. Raises UserError where it is no such folder, CheckpointError where the weights differ."""
        path, weights = Path(folder) / KINDS["classifier"], Path(folder) / "model.safetensors"
        record = read(folder, "classifier")
        with reading(path, "damaged", "train again"):
            record = {field.name: record[field.name] for field in fields(cls) if field.name in record}
            record["trained_on"] = trained_on(folder)
            cls(nn.Identity(), **record)
            size, crop = record["size"], record["crop_pct"]
            if type(size) is not int or not (isinstance(record["name"], str) and 0 < size < 2**15 and 0.01 < crop <= 1):
                raise ValueError("name, size or crop is out of range")
            classes, words = record["classes"], record.get("descriptions", {})
            if not isinstance(classes, list) or not classes or not isinstance(words, dict):
                raise ValueError("classes and descriptions are names and their meaning")
            if not isinstance(record.get("settings", {}), dict):
                raise ValueError("settings are names and values")
            if type(record.get("multilabel", False)) is not bool or record.get("views", "one") not in VIEWS:
                raise ValueError("multilabel or views is out of range")
            if not all(isinstance(text, str) for text in (*classes, *words, *words.values())):
                raise ValueError("a class or its description is no text")
            if words and not set(classes) <= set(words):
                raise ValueError(f"descriptions lack {some(sorted(set(classes) - set(words)))}")
            check_announced(path, len(classes), size=weights.stat().st_size)  # each has a row of weights
            evaluation_transform(record["size"], record["crop_pct"], record["crop_mode"])
        name, form = form_of(record["name"]) or (record["name"].partition(".")[0], {})
        if name in MODELS:  # shapes tell the sizes, the name what shapes do not
            known = MODELS[name].built_as(VARIANTS[name], form)
            with reading(weights, "is no checkpoint of its model", "copy the folder again", CheckpointError):
                model = MODELS[name].rebuilt(weights, known | record.get("settings", {}))
        else:
            with reading(path, "describes no model", "copy the folder again"):
                model = create_model(record["name"], len(classes), size)
            with reading(weights, "does not fit its description", "copy the folder again", CheckpointError):
                load_state_dict(model, read_state_dict(weights))
        if getattr(model, "num_classes", len(classes)) != len(classes) or size < getattr(model, "min_size", 1):
            raise UserError(f"{path}: damaged, its classes or size do not fit its weights; train again")
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
                if len(names := info.label_names()) != model.num_classes:  # of a selection that nobody has written down
                    return cls(
                        model, f"{base}.{weights.tag}", [str(i) for i in range(model.num_classes)], weights.size,
                        weights.crop_pct, weights.crop_mode,
                    )  # fmt: skip
                return cls(
                    model,
                    f"{base}.{weights.tag}",
                    names,
                    weights.size,
                    weights.crop_pct,
                    weights.crop_mode,
                    info.label_descriptions(as_dict=True),  # type: ignore[arg-type]
                )
        tags = ", ".join(f"{w.tag} ({w.num_classes} classes)" for w in published) or "none"
        raise UserError(f"{path}: has {model.num_classes} classes; published weights of {base}: {tags}")

    @classmethod
    def from_timm(cls, name: str) -> "Classifier":
        """An ImageNet classifier of timm with its published weights. Raises UserError where they cannot be had."""
        if not timm.is_model(name):
            raise UserError(f"hub:{name}: timm has no model of this name")
        try:
            model = timm.create_model(name, pretrained=True).eval()
        except (RuntimeError, OSError) as error:
            why = unreachable(name, True, error)
            raise UserError(f"hub:{name}: its published weights cannot be had ({why})") from error
        config, subset = resolve_data_config(model=model), infer_imagenet_subset(model)
        if subset is None:
            raise UserError(f"{name}: its {model.num_classes} classes are none of ImageNet's; train it first")
        return cls(
            Renormalized(model, config["mean"], config["std"]),
            name,
            ImageNetInfo(subset).label_names(),
            config["input_size"][-1],
            config["crop_pct"],
            config["crop_mode"],
        )


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


def evaluate_multilabel(
    scores: Tensor, truth: Tensor, classes: Sequence[Any], threshold: float = 0.5, resamples: int = 500, seed: int = 0
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Mean average precision, its 95 % bootstrap interval over pictures, F1; and a row of figures for each class.

    Classes without a picture have no average precision, and the means go over the others; the rows show them. A row of
    `scores` that is not finite is wrong in every class. `truth`: zeros and ones, (pictures, classes). `resamples`: of
    the bootstrap, 0 for no interval. F1, precision and recall are those of probabilities of at least `threshold`.
    """
    answered = torch.isfinite(scores).all(1, keepdim=True)
    y = truth.numpy().astype(int)
    p = torch.where(answered, scores.double(), 1 - truth.double()).numpy()
    given = np.asarray(y.any(0))
    if not given.any():
        raise UserError("none of the pictures has a class, so there is nothing to score")
    precision, recall, f1, _ = precision_recall_fscore_support(y, p >= threshold, average=None, zero_division=0.0)
    found = [float(average_precision_score(y[:, c], p[:, c])) if given[c] else None for c in range(len(classes))]
    low, high = float("nan"), float("nan")
    if resamples and len(y) >= FEWEST:
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(len(y), np.full(len(y), 1 / len(y)), resamples)
        replicates = np.stack([average_precisions(p[:, c], y[:, c], counts) for c in np.flatnonzero(given)])
        with np.errstate(invalid="ignore"):
            means = np.nansum(replicates, 0) / np.isfinite(replicates).sum(0)
        low, high = (float(v) for v in percentile_interval(means[np.isfinite(means)]))
    rows = [
        {"class": name, "pictures": int(y[:, c].sum()), "AP": found[c], "F1": f1[c], "precision": precision[c],
         "recall": recall[c]}
        for c, name in enumerate(classes)
    ]  # fmt: skip
    return {
        "pictures": len(y),
        "mAP": float(np.mean([ap for ap in found if ap is not None])),
        "low": low,
        "high": high,
        "F1": float(f1[given].mean()),
        "all right": float(((p >= threshold) == y).all(1).mean()),
        "classes": int(given.sum()),
    }, rows


def average_precisions(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision of one class where picture n counts `counts[r, n]` times, for every r; NaN without positives.

    The sum over thresholds of (rise of recall) * precision, equal scores taken together, as scikit-learn's.
    """
    order = np.argsort(-scores, kind="stable")
    scores, truth, counts = scores[order], truth[order], counts[:, order]
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # of equal scores
    right, number = (np.cumsum(c, 1)[:, last] for c in (counts * truth, counts))
    rise = np.diff(right, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):
        return (rise * right / np.maximum(number, 1)).sum(1) / right[:, -1]
