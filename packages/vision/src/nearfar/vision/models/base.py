"""What every nearfar picture model has, whatever its features: timm's surface and published checkpoints."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from nearfar.core.checkpoints import Rule, fit_shapes, load_state_dict, read, rename, save_state_dict
from nearfar.core.errors import CheckpointError, some
from nearfar.core.finite import check_weights
from nearfar.core.reading import read_json, reading
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.fused import FusedConv2d, FusedLinear
from nearfar.vision.models.fusing import fuse_sequence
from nearfar.vision.models.registry import MODELS, VARIANTS, Variant, plain
from nearfar.vision.tracing import whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What became of the tensors when a checkpoint was loaded; as text, one line for each kind."""

    kept: list[str]
    adapted: list[str]
    """Resized, or summed to other input channels."""
    fresh: list[str]
    """Not from the checkpoint: a classifier for other classes, or what the model computes itself."""
    left_out: list[str]
    """Tensors of the checkpoint that the model does not take."""

    def __str__(self) -> str:
        kinds = {name.replace("_", " "): names for name, names in vars(self).items() if names}
        listed = lambda kind, names: "" if kind == "kept" else f": {some(names)}"  # noqa: E731
        return "\n".join(f"{kind} {len(names)} tensors{listed(kind, names)}" for kind, names in kinds.items())


class PictureModel(nn.Module):
    """A picture classifier with timm's surface and its published checkpoints; `head` ends in the classifier `head.fc`.

    `Backbone` (pyramids of feature maps) and `TokenModel` (tokens of a patch grid) say what the features are.
    """

    RULES: ClassVar[tuple[Rule, ...]] = ()
    """How published names become ours, applied in order to the start of every name; our own names stay as they are."""
    IGNORE: ClassVar[tuple[str, ...]] = ()
    """Published tensors that the model computes itself."""
    UNSHAPED: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that a state dict's shapes do not tell, unless its widths are a published variant's."""
    CLASSIFIERS: ClassVar[tuple[str, ...]] = ("head.fc",)
    FIRST_CONV: ClassVar[str]
    min_size: ClassVar[int] = 32
    fixed_size: ClassVar[bool] = False
    """Whether a model takes pictures of the one size that it was built for."""
    FEATURE_CLASSES: ClassVar[tuple[str, ...]] = ("getter", "fx")
    """timm's ways to features that this kind of model gives."""

    other_classes = False
    """Whether the classes were asked for, so that a checkpoint's classifier for others is left out."""
    loaded: Loaded | None = None
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    head: nn.Module

    @classmethod
    def feature_indices(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """The levels that `features_only` gives by default, for the model with these settings."""
        raise NotImplementedError

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        """Pixels of the input between the last features of the model with these settings."""
        return 32

    @classmethod
    def classifiers(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of `CLASSIFIERS` that the model with these settings has."""
        return cls.CLASSIFIERS[:1]

    def __prepare_scriptable__(self) -> None:
        name = type(self).__name__
        raise NotImplementedError(f"{name}: torch.jit.script does not take it; torch.export and ONNX take any size")

    def set_output_stride(self, stride: int) -> None:
        """Let strides beyond `stride` become dilation, where the model has convolutions alone."""
        if stride != (own := self.feature_info[-1]["reduction"]):
            raise ValueError(
                f"output_stride is {stride}; {type(self).__name__} keeps its {own}: what mixes its positions is no "
                "convolution that could be dilated"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """The features that `forward_head` takes."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the features, or what the classifier would see."""
        return whole(self.head, x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # what timm asks a model for

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` classes (0: none), and `global_pool` if given, where the model lies."""
        before, like = set(self.modules()), next(self.parameters())
        self.num_classes = num_classes
        self.reset_heads(num_classes, global_pool)
        for module in set(self.modules()) - before:
            module.to(like.device, like.dtype).train(self.training)

    def reset_heads(self, num_classes: int, global_pool: str | None) -> None:
        """New heads in place of the old ones."""
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay beside biases and vectors."""
        return set()

    def fuse(self) -> Self:
        """Fold norms, scales and parallel branches into their neighbours, for inference; returns the model itself.

        In eval mode the outputs stay the same up to rounding. Training the fused form is not meant.
        """
        for module in self.eval().modules():
            if module is not self and callable(getattr(module, "fuse", None)):
                module.fuse()
            elif isinstance(module, nn.Sequential):
                fuse_sequence(module)
        for module in self.modules():
            for name, child in module.named_children():
                if type(child) in (nn.Conv2d, Conv2d, nn.Linear):
                    setattr(module, name, (FusedConv2d if isinstance(child, nn.Conv2d) else FusedLinear)(child))
                elif isinstance(fused := getattr(child, "fused", None), FusedConv2d):
                    setattr(module, name, fused)
        return self

    # checkpoints

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under our names; our own passes through."""
        return rename(state, cls.RULES)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that the names and shapes of a (renamed) state dict determine."""
        raise NotImplementedError

    @classmethod
    def from_published(cls, source: str | Path | Mapping[str, Tensor], **settings: Any) -> Self:
        """The model that a published checkpoint holds, with its weights, in eval mode.

        Args:
            source: a checkpoint file or a state dict, in any published layout or our own. Its names and shapes
                determine the variant.
            settings: constructor arguments that take precedence. With another `num_classes` the classifier starts
                afresh; with another `in_chans` the first convolution is adapted as timm does.

        `loaded` of the model says which tensors were kept, adapted and fresh; they are logged too.

        Raises:
            CheckpointError: tensors are missing, superfluous or misshapen; every one is listed.
        """
        return cls.rebuilt(source, {}, **settings)

    @classmethod
    def rebuilt(cls, source: str | Path | Mapping[str, Tensor], known: Mapping[str, Any], **settings: Any) -> Self:
        """`from_published` where it is `known` how the model was built: what shapes do not tell comes from there."""
        state = cls.published_state(read(source))
        try:
            found = cls.published_settings(state)
        except (KeyError, IndexError, ValueError) as error:
            where = "the state dict" if isinstance(source, Mapping) else source
            raise CheckpointError(f"{where}: is no checkpoint of {cls.__name__} (no {error})") from error
        untold = {name for name, value in found.items() if value is None and name in (*known, *cls.UNSHAPED)}
        found = {**known, **{name: value for name, value in found.items() if name not in untold}, **settings}
        if unknown := [name for name in cls.UNSHAPED if found.get(name) is None]:
            raise CheckpointError(f"{cls.__name__}: the shapes do not tell {' and '.join(unknown)}; give them too")
        model = cls(**found)
        model.other_classes = "num_classes" in settings
        model.take_state(state)
        return model.eval()

    def take_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load `state` (under our names), made to fit, every key accounted for; sets `loaded` and gives what fitted.

        Raises CheckpointError for tensors that are missing, superfluous or misshapen, and for a classifier of other
        classes than the model's unless these were asked for.
        """
        fitted, own = self.fit_state(state), self.state_dict()
        load_state_dict(self, fitted, ignore=self.IGNORE)
        replaced = lambda n: n in fitted and fitted[n].data_ptr() == own[n].data_ptr()  # noqa: E731
        fresh = [n for n in own if n not in state or (replaced(n) and not torch.equal(state[n], own[n]))]
        fresh = [name for name in fresh if not name.endswith("num_batches_tracked")]
        adapted = [n for n in own if n in state and n not in fresh and own[n].numel() != state[n].numel()]
        kept = [name for name in own if name in state and name not in (*fresh, *adapted)]
        self.loaded = Loaded(kept, adapted, fresh, [name for name in state if name not in own])
        for line in str(self.loaded).split("\n"):
            log.info("%s: %s", type(self).__name__, line)
        return fitted

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; reads published names too, and leaves out a classifier of others where classes were asked for."""
        own = self.state_dict()
        if strict and not assign and not own.keys() >= state_dict.keys():
            state_dict = self.fit_state(self.published_state(state_dict))
        elif strict and self.other_classes:
            state_dict = self.fit_state(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` (under our names) made to fit this model.

        Shapes as in `fit_shapes`; what the model computes itself (`IGNORE`) is left out; a first convolution for other
        channels is adapted as timm does; a classifier for other classes is left out in favour of the model's own where
        its classes were asked for, and a CheckpointError elsewhere.
        """
        own, fitted = self.state_dict(), fit_shapes(self, state)
        first = f"{self.FIRST_CONV}.weight"
        if first in fitted and fitted[first].shape[1] != own[first].shape[1]:
            fitted[first] = adapt_input_conv(own[first].shape[1], fitted[first])
        for classifier in self.CLASSIFIERS:
            names = [f"{classifier}.weight", f"{classifier}.bias"]
            here = [name for name in names if name in own]
            if here and classifier == self.CLASSIFIERS[0] and names[0] not in fitted and not self.other_classes:
                raise CheckpointError(
                    f"{type(self).__name__}: the checkpoint has no classifier {classifier}; "
                    "give num_classes for a fresh one, 0 for none"
                )
            if here and names[0] not in fitted and self.other_classes:
                fitted.update({name: own[name] for name in here})
            if any(name in fitted and (name not in own or own[name].shape != fitted[name].shape) for name in names):
                if here and not self.other_classes:
                    raise CheckpointError(
                        f"{type(self).__name__}: the checkpoint's classifier {classifier} is for "
                        f"{len(fitted[names[0]])} classes, the model's for {len(own[names[0]])}; give num_classes, "
                        "that of the checkpoint to keep its classifier, another for a fresh one"
                    )
                fitted.update({name: own[name] for name in names if name in own})
                fitted = {name: value for name, value in fitted.items() if name not in names or name in own}
        return {
            name: value
            for name, value in fitted.items()
            if name in own or not any(re.match(pattern, name) for pattern in self.IGNORE)
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors) and, for a registered variant, timm's configuration to `folder`.

        `from_pretrained` reads it back, and so does `timm.create_model("local-dir:FOLDER", pretrained=True)`.
        Raises ValueError after `fuse`: the fused form has other tensors.
        """
        if any(isinstance(module, FusedConv2d | FusedLinear) for module in self.modules()):
            raise ValueError(f"{type(self).__name__} is fused, which no checkpoint can hold; save it before fuse")
        check_weights(self.state_dict(), folder)
        if hasattr(self, "pretrained_cfg"):
            timm.models.save_for_hf(self, str(folder), model_args=self.created_with, safe_serialization=True)
        else:
            save_state_dict(self, Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Self:
        """The model that `save_pretrained` wrote to `folder`, in eval mode; `settings` as in `from_published`."""
        config = Path(folder) / "config.json"
        saved: dict[str, Any] = {}
        with reading(config, "describes no model"):
            saved = read_json(config, "settings of a model") if config.is_file() else {}
            variant = VARIANTS.get(saved.get("architecture", ""))
            known = cls.built_as(variant, saved.get("model_args", {})) if variant else {}
        model = cls.rebuilt(Path(folder) / "model.safetensors", known, **settings)
        if stride := saved.get("model_args", {}).get("output_stride"):
            model.set_output_stride(stride)
        return model

    @classmethod
    def built_as(cls, variant: Variant, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments of `variant` with `changes`; of what shapes do not tell, the defaults too."""
        takes = signature(cls).parameters
        defaults = {name: takes[name].default for name in cls.UNSHAPED}
        given = {**variant.settings, **changes}
        return {**defaults, **{name: value for name, value in given.items() if name in takes}}

    @classmethod
    def variant(cls, settings: Mapping[str, Any]) -> str | None:
        """Name of the registered variant that `settings` describe, if there is one."""
        for name, model in MODELS.items():
            wanted = VARIANTS[name].settings
            if model is cls and all(plain(settings.get(key)) == plain(wanted[key]) for key in wanted):
                return name
        return None
