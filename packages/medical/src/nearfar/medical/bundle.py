"""A trained model as a MONAI bundle."""

import itertools
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json
from nearfar.medical.data.scans import label_type
from nearfar.medical.preparation import widest
from nearfar.medical.segmenter import Segmenter


def slicing_axis(segmenter: Segmenter) -> int:
    """The axis of RAS+ that the bundle of a 2-D network goes along: the one of the training scans.

    Raises UserError where those went along several.
    """
    seen = segmenter.spacing_seen
    axes = {2}
    if len(segmenter.recipe.roi) == 2 and (sides := segmenter.recipe.spacing):
        axes = {widest(sides)}
    elif seen is not None:
        axes = {widest(side) for side in itertools.product(*seen)} if len(segmenter.recipe.roi) == 2 else {2}
    if len(axes) > 1:
        raise UserError("the model goes along several axes, by each scan's spacing; a bundle goes along one")
    return axes.pop()


def write_bundle(segmenter: Segmenter, folder: Path) -> Path:
    """Write configs/metadata.json, configs/inference.json and models/model.pt to `folder`.

    `inference.json` holds the usual entries (network_def, preprocessing, dataset, inferer, postprocessing) in MONAI's
    transforms, and a `run` that segments every scan in `dataset_dir` without needing ignite.
    """
    recipe, dims = segmenter.recipe, len(segmenter.recipe.roi)
    outputs = len(segmenter.regions) or (1 if recipe.binary else len(segmenter.values))
    own = {"orient": "ras", "crop": "padding", "resample": "linear", "windows": "monai"}
    if other := [f"{name} {getattr(recipe, name)}" for name, value in own.items() if getattr(recipe, name) != value]:
        raise UserError(f"MONAI's transforms do not do {', '.join(other)} of the recipe, so it cannot be exported")
    network = {
        "_target_": "nearfar.medical.networks.create_network",
        "name": recipe.network,
        "num_classes": outputs,
        "in_channels": segmenter.in_channels,
        "dims": dims,
        "settings": recipe.settings,
    }
    before: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image", "image_only": True},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    ]
    if recipe.resize is None:
        content = {"_target_": "nearfar.medical.preparation.content_mask", "_mode_": "callable"}
        cut = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "select_fn": content}
        before.append({**cut, "allow_smaller": True})
    window = None if recipe.window is None else list(recipe.window)
    scale: dict[str, Any] = {
        "_target_": "nearfar.medical.preparation.scale_intensities",
        "_mode_": "callable",
        "window": window,
    }
    scale |= {"intensity": recipe.intensity, "channels": [channel.as_dict() for channel in segmenter.channels]}
    before += [
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        {"_target_": "Lambdad", "keys": "image", "func": scale, "track_meta": True},
    ]
    if recipe.spacing is not None:
        before.append({"_target_": "Spacingd", "keys": "image", "pixdim": list(recipe.spacing), "mode": "bilinear"})
    axis = slicing_axis(segmenter)
    if recipe.resize is not None:
        size = list(recipe.resize)
        size.insert(axis, -1)
        before.append({"_target_": "Resized", "keys": "image", "spatial_size": size, "mode": "area"})
    inverse = {"_target_": "Invertd", "keys": "pred", "orig_keys": "image", "transform": "@preprocessing"}
    decide = {"_target_": "AsDiscreted", "keys": "pred", **({"threshold": 0.0} if recipe.binary else {"argmax": True})}
    if segmenter.regions:
        regions = {name: list(inside) for name, inside in segmenter.regions.items()}
        painter = {"_target_": "nearfar.medical.segmenter.RegionPainter", "channel": True, "regions": regions}
        painter |= {"values": list(segmenter.values), "order": list(segmenter.order)}
        decide = {"_target_": "Lambdad", "keys": "pred", "func": painter, "track_meta": True}
    values = {"orig_labels": list(range(len(segmenter.values))), "target_labels": list(segmenter.values)}
    kind = "$np." + np.dtype(label_type(min(segmenter.values), max(segmenter.values))).name
    after = [
        {**inverse, "nearest_interp": False, "to_tensor": True},
        decide,
        {"_target_": "MapLabelValued", "keys": "pred", **values},
        {
            **{"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": "seg"},
            **{"output_ext": ".nii.gz", "resample": False, "separate_folder": False, "output_dtype": kind},
        },
    ]
    windows = {"_target_": "SlidingWindowInferer", "roi_size": list(recipe.roi), "overlap": 0.5, "mode": "gaussian"}
    if dims == 2:
        windows |= {"_target_": "SliceInferer", "spatial_dim": axis, "sw_batch_size": 8}
    inference = {
        "imports": ["$import glob", "$import os", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/segmentations'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$[{'image': f} for f in sorted(glob.glob(@dataset_dir + '/*.nii*'))]",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "checkpoint": "$torch.load(@bundle_root + '/models/model.pt', map_location=@device, weights_only=True)",
        "preprocessing": {"_target_": "Compose", "transforms": before},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": windows,
        "postprocessing": {"_target_": "Compose", "transforms": after},
        "segment": {
            **{"_target_": "nearfar.medical.inference.segment_item", "_mode_": "callable", "network": "@network"},
            **{"inferer": "@inferer", "postprocessing": "@postprocessing", "device": "@device"},
        },
        "initialize": ["$@network.load_state_dict(@checkpoint)"],
        "run": ["$len(list(map(@segment, @dataset)))"],
    }
    named = [*segmenter.regions] or [segmenter.labels.get(v, "background") for v in segmenter.values]
    channels = {str(i): name for i, name in enumerate(named)}
    shape = {"spatial_shape": list(recipe.roi), "dtype": "float32", "is_patch_data": True}
    image = {"type": "image", "format": "magnitude", "num_channels": segmenter.in_channels, "value_range": [], **shape}
    image["channel_def"] = {str(i): "image" for i in range(segmenter.in_channels)}
    result = {"type": "image", "format": "segmentation", "num_channels": outputs, "value_range": [0, 1], **shape}
    metadata = {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by nearfar"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "nearfar-medical": version("nearfar-medical"),
            "python": platform.python_version(),
        },
        "name": recipe.network,
        "task": "segmentation of " + ", ".join(v for k, v in segmenter.labels.items() if k),
        "description": f"A {dims}-D network trained by nearfar medical-segmentation.",
        "authors": "",
        "copyright": "",
        "intended_use": "Research; not a medical device.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": {**result, "channel_def": channels}}},
    }
    write_json(folder / "configs" / "metadata.json", metadata)
    write_json(folder / "configs" / "inference.json", inference)
    with atomic_path(folder / "models" / "model.pt") as temporary:
        torch.save(segmenter.network.state_dict(), temporary)
    return folder
