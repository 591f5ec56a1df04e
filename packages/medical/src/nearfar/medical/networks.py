"""The networks that can be trained and used by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import monai.networks.nets
import segmentation_models_pytorch as smp
from torch import nn

from nearfar.core.errors import UserError
from nearfar.medical.models.deeplab import DeepLabV2, DeepLabV3
from nearfar.medical.models.guided_attention import GuidedAttention
from nearfar.medical.models.macmd import MACMD
from nearfar.medical.models.segmamba import SegMamba
from nearfar.medical.models.umamba import UMamba
from nearfar.medical.models.vmunet import VMUNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "deeplab_v2": DeepLabV2,
    "deeplab_v3": DeepLabV3,
    "deeplab_v3plus": lambda *a, **k: DeepLabV3(*a, decoder=True, **k),
    "guided_attention": GuidedAttention,
    "macmd": MACMD,
    "segmamba": SegMamba,
    "umamba_bot": partial(UMamba, placement="bottleneck"),
    "umamba_enc": partial(UMamba, placement="encoder"),
    "vmunet": VMUNet,
}

MONAI_DEFAULTS: dict[str, dict[str, Any]] = {
    "DynUNet": {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3},
    "BasicUNet": {"features": (16, 16, 32, 64, 128, 16)},
}
"""Settings of MONAI networks where none are given: nnU-Net's shape, and a U-Net that trains in minutes."""


def create_network(name: str, num_classes: int, in_channels: int, dims: int, settings: Mapping[str, Any]) -> nn.Module:
    """A network by name: ours (`NETWORKS`), `smp.Unet` ... (2-D), or `monai.DynUNet`, `monai.SwinUNETR` ...

    `settings` go to its constructor, before them those of `MONAI_DEFAULTS`.
    Raises UserError for an unknown name or settings that the network refuses.
    """
    try:
        if name in NETWORKS:
            extra = {"dims": dims} if name != "macmd" else {}
            if name == "macmd" and dims != 2:
                raise ValueError("macmd is 2-D")
            return NETWORKS[name](num_classes, in_channels, **extra, **settings)
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
    raise UserError(f"network {name}: unknown; there are {', '.join(NETWORKS)}, smp.<architecture>, monai.<network>")
