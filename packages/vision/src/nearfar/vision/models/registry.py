"""Published variants of backbones, made known to timm under their names."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from nearfar.core.errors import UserError
from nearfar.vision.waiting import SummoningDict, as_it_stands


@dataclass(frozen=True)
class Weights:
    """One published set of weights of a variant, with how it was evaluated."""

    tag: str
    top1: float | None = None
    """ImageNet-1k validation accuracy in percent, as published."""
    url: str = ""
    hf_hub: tuple[str, str] | None = None
    """(repository, file) on the Hugging Face hub."""
    size: int = 224
    crop_pct: float = 0.875
    crop_mode: str = "center"
    """`center`, or `squash` where the whole picture is warped to the square input."""
    num_classes: int = 1000
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD


@dataclass(frozen=True)
class Variant:
    """A published size of a system."""

    settings: dict[str, Any]
    """Constructor arguments."""
    params: float
    """Published parameters in millions."""
    gmacs: float | None
    """Published multiply-accumulates at the first weights' input size, in thousands of millions."""
    weights: tuple[Weights, ...] = field(default=(Weights("untrained"),))


VARIANTS: dict[str, Variant] = SummoningDict()
"""Every registered nearfar backbone by its timm name."""

MODELS: dict[str, type[Any]] = SummoningDict()
"""The class of every registered backbone."""

TRAINING_SETTINGS = ("num_classes", "drop_rate", "drop_path_rate")
"""Constructor arguments that a saved model does not record beside its variant's name: they make no other network."""


def plain(value: Any) -> Any:
    """Sequences as tuples, so that settings compare."""
    return tuple(plain(v) for v in value) if isinstance(value, list | tuple) else value


def register(model: type[Any], variants: Mapping[str, Variant]) -> None:
    """Make every variant known to timm under its name, with its published weights as tags."""
    module = sys.modules[model.__module__]
    cfgs = {}
    for name, variant in variants.items():
        for weights in variant.weights:
            cfgs[f"{name}.{weights.tag}"] = {
                "url": weights.url,
                **({"hf_hub_id": weights.hf_hub[0], "hf_hub_filename": weights.hf_hub[1]} if weights.hf_hub else {}),
                "num_classes": weights.num_classes,
                "input_size": (3, weights.size, weights.size),
                "min_input_size": (3, model.min_size, model.min_size),
                "fixed_input_size": False,
                "pool_size": None,
                "crop_pct": weights.crop_pct,
                "crop_mode": weights.crop_mode,
                "interpolation": "bicubic",
                "mean": weights.mean,
                "std": weights.std,
                "first_conv": model.FIRST_CONV,
                "classifier": model.CLASSIFIERS if len(model.CLASSIFIERS) > 1 else model.CLASSIFIERS[0],
            }
    module.default_cfgs = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(cfgs)}
    with as_it_stands():
        for name, variant in variants.items():
            VARIANTS[name], MODELS[name] = variant, model
            setattr(module, name, register_model(_entrypoint(name, model, variant)))


def _entrypoint(name: str, model: type[Any], variant: Variant) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        settings = {**variant.settings, **kwargs}
        try:
            built = build_model_with_cfg(
                model,
                name,
                pretrained,
                pretrained_filter_fn=lambda state, built: built.fit_state(model.published_state(state)),
                feature_cfg={"out_indices": model.feature_indices(settings), "feature_cls": "getter"},
                **settings,
            )
        except (OSError, RuntimeError) as error:
            if not pretrained or "state_dict" in str(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{name}: its published weights cannot be had here ({reason}); bring the file and "
                f'give pretrained_cfg_overlay={{"file": FILE}}, or use {model.__name__}.from_published(FILE)'
            ) from error
        recorded = signature(model).parameters.keys() - set(TRAINING_SETTINGS)
        built.created_with = {key: plain(value) for key, value in kwargs.items() if key in recorded}
        return built

    create.__name__ = create.__qualname__ = name
    create.__module__ = model.__module__
    create.__doc__ = f"{model.__name__} {name}: {variant.params} M parameters."
    return create
