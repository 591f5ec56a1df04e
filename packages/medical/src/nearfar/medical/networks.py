"""The networks that can be trained and used by name."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import monai.networks.nets
import segmentation_models_pytorch as smp
from torch import nn

from nearfar.core.cards import Card, models
from nearfar.core.checkpoints import Checkpoint, identify, read
from nearfar.core.errors import UserError
from nearfar.core.hub import pretrained_setting


def networks() -> dict[str, tuple[type[nn.Module], Card]]:
    """Name -> class and card of nearfar's own networks."""
    return {name: (kind, kind.CARD) for kind in models("nearfar.medical.models") for name in kind.CARD.networks}  # type: ignore[attr-defined]


def load_published(source: Checkpoint, **settings: Any) -> nn.Module:
    """The network of nearfar's that a released checkpoint holds, with its weights, in eval mode.

    Exactly one class has to account for every tensor; `settings` say what shapes do not tell, as its `from_published`
    takes them. Raises CheckpointError with the reason of each where there is none, or more than one.
    """
    is_path = isinstance(source, str | Path)
    content = source if is_path and Path(source).suffix == ".caffemodel" else read(source)  # type: ignore[arg-type]
    kinds = {kind.__name__: kind for kind in models("nearfar.medical.models") if hasattr(kind, "from_published")}
    attempts = {name: partial(kind.from_published, content, **settings) for name, kind in kinds.items()}
    return identify(attempts, str(source) if is_path else "the state dict")[1]


MONAI_DEFAULTS: dict[str, dict[str, Any]] = {
    "DynUNet": {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3},
    "BasicUNet": {"features": (16, 16, 32, 64, 128, 16)},
}
"""Settings of MONAI networks where none are given: nnU-Net's shape, and a U-Net that trains in minutes."""


def create_network(
    name: str, num_classes: int, in_channels: int, dims: int, settings: Mapping[str, Any], *, fetch: bool = True
) -> nn.Module:
    """A network by name: ours (`networks`), `smp.Unet` ... (2-D), or `monai.DynUNet`, `monai.SwinUNETR` ...

    `settings` go to its constructor, before them those of `MONAI_DEFAULTS`. Weights are fetched where they ask for it,
    `pretrained: hub:timm` or smp's `encoder_weights: hub:imagenet`, and not at all without `fetch`.
    Raises UserError for an unknown name or settings that the network refuses.
    """
    settings = pretrained_setting(settings, fetch)
    try:
        if name in (own := networks()):
            network, card = own[name]
            if dims not in card.dims:
                raise ValueError(f"takes {' or '.join(map(str, card.dims))} axes, roi has {dims}")
            axes = {"dims": dims} if len(card.dims) > 1 else {}
            return network(num_classes, in_channels, **axes, **card.networks[name], **settings)
        library, _, kind = name.partition(".")
        if library == "smp" and hasattr(smp, kind):
            if dims != 2:
                raise ValueError("segmentation_models_pytorch is 2-D")
            options = {"encoder_weights": None, **settings}
            return getattr(smp, kind)(in_channels=in_channels, classes=num_classes, **options)
        if library == "monai" and hasattr(monai.networks.nets, kind):
            options = {**MONAI_DEFAULTS.get(kind, {}), **settings}
            build = getattr(monai.networks.nets, kind)
            return build(spatial_dims=dims, in_channels=in_channels, out_channels=num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"network {name}: {str(error).splitlines()[0]}") from error
    raise UserError(f"network {name}: unknown; there are {', '.join(networks())}, smp.<architecture>, monai.<network>")
