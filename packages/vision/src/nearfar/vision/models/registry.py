"""Published variants of backbones, made known to timm under their names."""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from nearfar.core.checkpoints import read
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
                "fixed_input_size": model.fixed_size,
                "pool_size": (-(-weights.size // model.last_stride(variant.settings)),) * 2,
                "crop_pct": weights.crop_pct,
                "crop_mode": weights.crop_mode,
                "interpolation": "bicubic",
                "mean": weights.mean,
                "std": weights.std,
                "first_conv": model.FIRST_CONV,
                "classifier": _one_or_more(model.classifiers(variant.settings)),
            }
    module.default_cfgs = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(cfgs)}
    with as_it_stands():
        for name, variant in variants.items():
            VARIANTS[name], MODELS[name] = variant, model
            setattr(module, name, register_model(_entrypoint(name, model, variant)))


def _one_or_more(names: tuple[str, ...]) -> Any:
    return names if len(names) > 1 else names[0]


def _check(name: str, model: type[Any], kwargs: dict[str, Any]) -> None:
    """Raise TypeError or ValueError, in one line, for what timm's scripts may ask and this model has not."""
    if "drop_path_rate" not in signature(model).parameters and kwargs.pop("drop_path_rate", 0):
        raise TypeError(f"{name}: {model.__name__} drops no paths; leave drop_path_rate out")
    way = kwargs.get("feature_cls", "getter")
    if isinstance(way, str) and way not in model.FEATURE_CLASSES:
        allowed = ", ".join(model.FEATURE_CLASSES)
        raise ValueError(f"{name}: feature_cls is {way!r}; the features of {model.__name__} are had by {allowed}")


def _entrypoint(name: str, model: type[Any], variant: Variant) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any) -> nn.Module:
        _check(name, model, kwargs)
        settings = {**variant.settings, **kwargs}
        stride = None if "output_stride" in signature(model).parameters else settings.pop("output_stride", None)
        told: dict[str, Any] = {}

        def make(**settings: Any) -> nn.Module:
            built = model(**settings)
            built.other_classes = "num_classes" in kwargs or bool(kwargs.get("features_only"))
            if stride:
                built.set_output_stride(stride)
            return built

        def fit(state: Mapping[str, Any], built: nn.Module) -> dict[str, Any]:
            fitted = built.take_state(model.published_state(read(state)))
            # it fits now, so timm has nothing to adapt; what its configuration says of the file comes back below
            classes = built.num_classes if f"{model.CLASSIFIERS[0]}.weight" in built.loaded.kept else None
            cfg = built.pretrained_cfg
            told.update(input_size=cfg["input_size"], num_classes=classes or cfg["num_classes"])
            cfg["input_size"] = (built.in_chans, *cfg["input_size"][1:])
            cfg["num_classes"] = 0 if kwargs.get("features_only") else built.num_classes
            return {**built.state_dict(), **fitted}

        try:
            with torch.device(device) if device is not None else nullcontext():
                built = build_model_with_cfg(
                    make,
                    name,
                    pretrained,
                    pretrained_filter_fn=fit,
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
        built.pretrained_cfg.update({key: value for key, value in told.items() if key in built.pretrained_cfg})
        if "classifier" in built.pretrained_cfg:
            built.pretrained_cfg["classifier"] = _one_or_more(model.classifiers(settings))
        if dtype is not None:
            built.to(dtype)
        recorded = {*signature(model).parameters, "output_stride"} - set(TRAINING_SETTINGS)
        built.created_with = {key: plain(value) for key, value in kwargs.items() if key in recorded}
        return built

    create.__name__ = create.__qualname__ = name
    create.__module__ = model.__module__
    create.__doc__ = f"{model.__name__} {name}: {variant.params} M parameters."
    return create
