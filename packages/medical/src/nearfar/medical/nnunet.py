"""nnU-Net v2: its plans as recipes, its trained models as segmenters."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.reading import read_json, reading
from nearfar.medical.data.layouts import labels_json
from nearfar.medical.models.nnunet import NNUNet
from nearfar.medical.models.umamba import read_plans
from nearfar.medical.preparation import Channel
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import Segmenter

SCHEMES = {
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "minmax",
    "RGBTo01Normalization": "unit",
    "ZScoreNormalization": "zscore",
}

SAFE = [
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.dtype,
    *{type(np.dtype(t)) for t in "?bhilqBHILQefd"},
]
"""What nnU-Net's checkpoints hold beside tensors and plain values: numbers of numpy."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net v2, safely: tensors, plain values and numpy's numbers. Raises CheckpointError."""
    with reading(path, "cannot be read as a checkpoint of nnU-Net", "copy it again", CheckpointError):
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"network_weights", "init_args"} - set(content):
            raise CheckpointError(f"{path}: is no checkpoint of nnU-Net v2, it lacks {', '.join(sorted(missing))}")
    return content


def axes_order(plans: Mapping[str, Any], dims: int, name: str) -> list[int]:
    """Axes of nnU-Net's network in the order x, y, z of the file's; its arrays are z, y, x, turned by the plan.

    Raises UserError where a 2-D plan slices across another axis than the last of the file.
    """
    forward = plans.get("transpose_forward", [0, 1, 2])
    if dims == 2 and forward[0] != 0:
        raise UserError(f"{name}: its 2-D network sees slices across axis {forward[0]} of (z, y, x), not across z")
    return sorted(range(dims), key=lambda i: -forward[i + 3 - dims])


def plan_settings(plans: Mapping[str, Any], configuration: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """The recipe of a configuration of nnU-Net's plans, and how its channels are scaled."""
    found = read_plans(plans, configuration, name)
    content = dict(plans["configurations"][configuration])
    while parent := content.pop("inherits_from", None):
        content = {**plans["configurations"][parent], **content}
    dims = found.pop("dims")
    order = axes_order(plans, dims, name)
    turn = lambda values: [values[i] for i in order]  # noqa: E731
    found["kernel_sizes"], found["strides"] = ([turn(v) for v in found[n]] for n in ("kernel_sizes", "strides"))
    roi, kind = turn(found.pop("patch_size")), content.get("architecture", {}).get("network_class_name", "")
    if kind and not kind.endswith((".PlainConvUNet", ".ResidualEncoderUNet")):
        raise UserError(f"{name}: its network is {kind}; PlainConvUNet and ResidualEncoderUNet are read")
    resampling = content.get("resampling_fn_data", "resample_data_or_seg_to_shape")
    if resampling != "resample_data_or_seg_to_shape":
        raise UserError(f"{name}: resamples by {resampling}; resample_data_or_seg_to_shape is read")
    schemes = []
    for scheme, masked in zip(content["normalization_schemes"], content["use_mask_for_norm"], strict=True):
        if scheme not in SCHEMES:
            raise UserError(f"{name}: scales intensities by {scheme}; {', '.join(SCHEMES)} are read")
        schemes.append(SCHEMES[scheme] + ("_nonzero" if SCHEMES[scheme] == "zscore" and masked else ""))
    recipe = {
        "network": "nnunet_resenc" if "Residual" in kind else "nnunet_plain",
        "settings": found,
        "roi": roi,
        "spacing": turn(content["spacing"]) if min(content["spacing"]) > 0 else None,
        "orient": "stored", "crop": "nonzero", "resample": "cubic", "windows": "nnunet",
        "batch_size": int(content.get("batch_size", 2)),
    }  # fmt: skip
    return recipe, schemes


def read_results(folder: str | Path, fold: int | str = 0, checkpoint: str = "checkpoint_final.pth") -> Segmenter:
    """The segmenter that nnU-Net v2 trained in a folder of `plans.json`, `dataset.json` and `fold_N`.

    It prepares scans, lays windows and takes scores back to the scan's grid as nnU-Net does; give it `mirror=True`, as
    nnU-Net's prediction does, for the same label maps. What the model was trained on is not recorded.
    """
    folder = Path(folder)
    plans, data = (read_json(folder / name, f"nnU-Net's {name}") for name in ("plans.json", "dataset.json"))
    content = read_checkpoint(folder / f"fold_{fold}" / checkpoint)
    with reading(folder, "is no folder of a model that nnU-Net v2 trained"):
        configuration = str(content["init_args"]["configuration"])
        recipe, schemes = plan_settings(plans, configuration, str(folder / "plans.json"))
        about = labels_json(folder / "dataset.json", data)
        names = data["channel_names"]
        known = plans.get("foreground_intensity_properties_per_channel", {})
        channels = []
        for i, scheme in enumerate(schemes):
            of = known.get(str(i), {})
            values = {"low": "percentile_00_5", "high": "percentile_99_5", "mean": "mean", "std": "std"}
            numbers = {ours: float(of[theirs]) for ours, theirs in values.items() if theirs in of}
            name = str(names[str(i)] if isinstance(names, Mapping) else names[i])
            channels.append(Channel(scheme, name, **numbers))  # type: ignore[arg-type]
    order = axes_order(plans, len(recipe["roi"]), str(folder))
    state = {name: turned(tensor, order) for name, tensor in content["network_weights"].items()}
    network = NNUNet.from_published(state)
    trained = {"regions": about.get("regions"), "order": about.get("order", ())} if about.get("order") else {}
    segmenter = Segmenter(network, about["labels"], Recipe(**recipe), len(channels), **trained)
    segmenter.channels = tuple(channels)
    outputs = len(segmenter.regions) or len(segmenter.values)
    if network.heads[-1].out_channels != outputs:
        raise UserError(f"{folder}: the network has {network.heads[-1].out_channels} outputs, the labels {outputs}")
    if network.in_channels != len(channels):
        raise UserError(
            f"{folder}: the network takes {network.in_channels} channels, plans.json has {len(channels)}; a network of "
            "a cascade also takes a channel for each label, and cascades are not run here"
        )
    return segmenter


def turned(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor of weights (out, in, *kernel) with the kernel's axes in another order; others as they are."""
    return tensor.permute(0, 1, *(2 + i for i in order)).contiguous() if tensor.ndim == 2 + len(order) else tensor


def read_plan_file(path: str | Path, configuration: str = "3d_fullres") -> dict[str, Any]:
    """The recipe of a configuration of `nnUNetPlans.json`."""
    with reading(path, "cannot be read as nnU-Net's plans"):
        plans = json.loads(Path(path).read_text(encoding="utf-8"))
    return plan_settings(plans, configuration, str(path))[0]
