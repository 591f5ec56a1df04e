"""From scans to label maps: preparation, networks by name, training, and a trained segmenter in a folder."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import monai.networks.nets
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.medical.deeplab import MEAN_BGR, DeepLabV2, DeepLabV3
from nearfar.medical.guided_attention import GuidedAttention
from nearfar.medical.inference import WINDOW_MEMORY, segment, window_scores
from nearfar.medical.losses import LOSSES
from nearfar.medical.macmd import MACMD
from nearfar.medical.refinement import refine, to_bytes
from nearfar.medical.scans import Scan, resize_labels
from nearfar.ops.graph.dense_crf import DenseCRF

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "deeplab_v2": DeepLabV2,
    "deeplab_v3": DeepLabV3,
    "deeplab_v3plus": lambda *a, **k: DeepLabV3(*a, decoder=True, **k),
    "guided_attention": GuidedAttention,
    "macmd": MACMD,
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


INTENSITIES = ("zscore", "unit", "bytes", "caffe")


def scale_intensities(image: Tensor, window: Sequence[float] | None = None, intensity: str = "zscore") -> Tensor:
    """Intensities of an image (C, *S) as `Preparation` describes them."""
    if window is not None:
        low, high = window
        return (image.clamp(low, high) - low) / (high - low)
    if intensity == "unit":
        return image / 255
    if intensity == "bytes":
        return 255 * (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)
    if intensity == "caffe":
        return image.flip(0) - image.new_tensor(MEAN_BGR).view(3, *[1] * (image.ndim - 1))
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    for i, channel in enumerate(image):
        inside = channel[channel != 0]
        inside = inside if len(inside) > 1 else channel.flatten()
        out[i] = (channel - inside.mean()) / inside.std().clamp_min(1e-6)
    return out


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before a network sees it, and undone to its labels.

    Volumes are turned to RAS+ (axes permuted and flipped, nothing resampled). Then the grid: `spacing` (mm, None keeps
    the scan's), or `resize`, the size of each plane, by cubic splines as the TransUNet family does. Then intensities:
    `window` (low, high) clips and maps to 0..1, for CT in HU; without it `intensity` decides: "zscore" brings each
    channel to mean 0, deviation 1 over its nonzero voxels (all voxels where none is zero), "unit" divides by 255,
    "bytes" stretches the whole image to 0..255, "caffe" makes BGR and subtracts DeepLab's mean.
    """

    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    intensity: str = "zscore"
    resize: tuple[int, int] | None = None

    def image(self, scan: Scan) -> Tensor:
        """(C, *S) float32, ready for the network."""
        image = torch.from_numpy(np.ascontiguousarray(scan.canonical()))
        size = self.size(scan)
        if self.resize is not None and size != tuple(image.shape[1:]):
            factors = [new / old for new, old in zip(size, image.shape[1:])]
            image = torch.from_numpy(np.stack([ndimage.zoom(c, factors, order=3) for c in image.numpy()]))
        elif size != tuple(image.shape[1:]):
            mode = "trilinear" if image.ndim == 4 else "bilinear"
            image = F.interpolate(image[None], size, mode=mode, align_corners=False)[0]
        if self.intensity == "caffe" and len(image) != 3:
            raise UserError(f"{scan.path}: has {len(image)} channels; intensity caffe is for photographs of three")
        return scale_intensities(image, self.window, self.intensity)

    def size(self, scan: Scan) -> tuple[int, ...]:
        """The prepared grid's size."""
        canonical = tuple(scan.canonical().shape[1:])
        if self.resize is not None:
            return (*self.resize, *canonical[2:])
        if self.spacing is None or scan.affine is None:
            return canonical
        if len(self.spacing) != len(canonical):
            raise UserError(f"{scan.path}: has {len(canonical)} axes, the spacing {self.spacing} {len(self.spacing)}")
        pairs = zip(canonical, scan.canonical_spacing(), self.spacing)
        return tuple(max(1, round(n * old / new)) for n, old, new in pairs)

    def grid_spacing(self, scan: Scan) -> tuple[float, ...]:
        """Size of a voxel of the prepared grid."""
        pairs = zip(scan.canonical_spacing(), scan.canonical().shape[1:], self.size(scan))
        return tuple(old * n / new for old, n, new in pairs)

    def labels(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the scan on the prepared grid."""
        return self._resample(np.ascontiguousarray(scan.to_canonical(labels)), self.size(scan))

    def restore(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the prepared grid on the scan's own."""
        return scan.from_canonical(self._resample(labels, scan.canonical().shape[1:]))

    def _resample(self, labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        if self.resize is None or tuple(size) == labels.shape:
            return resize_labels(labels, size)
        return ndimage.zoom(labels, [new / old for new, old in zip(size, labels.shape)], order=0)


@dataclass
class Recipe:
    """How a network is trained. Patches of `roi` voxels, a share `foreground` of them centred on a labelled voxel.

    A `roi` of two numbers makes a 2-D network, which goes over volumes slice by slice along the last axis (of RAS+).

    Args:
        network, settings: as in `create_network`.
        spacing, window, intensity, resize: as in `Preparation`.
        loss, squash: as in `losses.SegmentationLoss`. "binary" and "structure" make a network of one output.
        optimizer, lr, weight_decay, optimizer_settings: adamw, adam or sgd, and what else it takes.
        schedule: "warmup_cosine", "poly" ((1 - step / steps)^0.9), "constant", or one of torch's schedulers stepped
            once per epoch, `{StepLR: {step_size: 50}}`.
        batch_size, accumulate: patches per pass, passes per step.
        patches_per_epoch, max_epochs: how long.
        scales: sizes of which one is chosen for each patch: its window is `roi / scale` and is resized to `roi`.
        augment: MONAI's dictionary transforms, `[{RandFlipd: {prob: 0.5, spatial_axis: 0}}, ...]`; keys and
            interpolation are filled in. None mirrors each axis with probability 1/2.
    """

    network: str = "monai.BasicUNet"
    settings: dict[str, Any] = field(default_factory=dict)
    roi: tuple[int, ...] = (64, 64, 64)
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    intensity: str = "zscore"
    resize: tuple[int, int] | None = None
    loss: str = "dice_ce"
    squash: bool = False
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer_settings: dict[str, Any] = field(default_factory=dict)
    schedule: str | dict[str, Any] = "warmup_cosine"
    batch_size: int = 2
    accumulate: int = 1
    max_epochs: int = 50
    patches_per_epoch: int = 100
    foreground: float = 0.5
    scales: tuple[float, ...] = ()
    augment: list[dict[str, Any]] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.roi, self.scales = tuple(self.roi), tuple(self.scales)
        if len(self.roi) not in (2, 3) or min(self.roi) < 1:
            raise ValueError(f"roi is {self.roi}; it must be two or three positive numbers")
        if self.optimizer not in ("adamw", "adam", "sgd"):
            raise ValueError(f"optimizer is {self.optimizer!r}; allowed are adamw, adam, sgd")
        if isinstance(self.schedule, str) and self.schedule not in ("warmup_cosine", "poly", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; allowed are warmup_cosine, poly, constant or a mapping")
        if self.intensity not in INTENSITIES:
            raise ValueError(f"intensity is {self.intensity!r}; allowed are {', '.join(INTENSITIES)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; allowed are {', '.join(LOSSES)}")
        if self.spacing is not None and self.resize is not None:
            raise ValueError("spacing and resize both set the grid; give one")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground is {self.foreground}; it must lie between 0 and 1")
        if self.scales and min(self.scales) <= 0:
            raise ValueError(f"scales are {self.scales}; they must be positive")

    @property
    def binary(self) -> bool:
        """Whether the network has one output, the logit of the only label."""
        return self.loss in ("binary", "structure")


class Segmenter:
    """A trained network with all it needs to segment a scan: preparation, label names, window.

    `save` writes a folder of `model.safetensors` and `model.json`; `load` reads it.
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Mapping[int, str],
        recipe: Recipe,
        in_channels: int,
        values: Sequence[int] | None = None,
    ) -> None:
        self.network, self.recipe, self.in_channels = network.eval(), recipe, in_channels
        self.crf: dict[str, Any] | None = None  # settings that `search_crf` chose
        self.spacing_seen: list[float] | None = None  # smallest and largest voxel side of the training scans, mm
        self.labels = dict(labels)
        self.values = list(values) if values is not None else [0, *(v for v in self.labels if v)]
        self.preparation = Preparation(recipe.spacing, recipe.window, recipe.intensity, recipe.resize)

    @classmethod
    def create(cls, recipe: Recipe, labels: Mapping[int, str], in_channels: int) -> "Segmenter":
        """A segmenter with fresh weights. Class k of the network is the k-th label value."""
        classes = 1 + len([v for v in labels if v])
        if recipe.binary and classes != 2:
            raise UserError(f"loss {recipe.loss} is for one label, the data have {classes - 1}")
        outputs = 1 if recipe.binary else classes
        network = create_network(recipe.network, outputs, in_channels, len(recipe.roi), recipe.settings)
        return cls(network, labels, recipe, in_channels)

    def __call__(
        self,
        scan: Scan,
        *,
        overlap: float = 0.5,
        mirror: bool = False,
        memory: int | None = None,
        device: str = "cpu",
        crf: DenseCRF | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """The label map of a scan on its own grid.

        `mirror` averages over the flips of all axes. Classes are decided window by window within `memory` bytes (None:
        384 MB). With `crf` the averaged probabilities are refined by the image within `memory` bytes (None: no bound):
        by slabs from a temporary file where the whole does not fit, see `refinement.refine`.
        """
        image = self.prepare(scan)
        options = {"overlap": overlap, "mirror": mirror, "device": device, "progress": progress}
        options["memory"] = WINDOW_MEMORY if memory is None else memory
        if crf is not None:
            with self.probabilities(image, in_memory=memory is None, **options) as scores:
                spacing = self.preparation.grid_spacing(scan)
                decided = refine(scores, to_bytes(image), crf, spacing, memory=memory, device=device)
        else:
            predictor, roi, settings = self._windows(image, **options)
            threshold = 0.0 if self.recipe.binary else None
            decided = segment(image, predictor, roi, threshold=threshold, **settings).numpy()
        return self.preparation.restore(np.asarray(self.values, np.int32)[decided], scan)

    def prepare(self, scan: Scan) -> Tensor:
        """The image (C, *S) that the network sees; UserError where it is not what the model was trained for."""
        if len(scan.image) != self.in_channels:
            raise UserError(f"{scan.path}: has {len(scan.image)} channels, the model takes {self.in_channels}")
        axes, dims = len(scan.shape), len(self.recipe.roi)
        if axes not in (dims, 3):
            raise UserError(f"{scan.path}: has {axes} axes, the model takes {dims}")
        if self.spacing_seen is not None and self.recipe.spacing is None and self.recipe.resize is None:
            low, high = self.spacing_seen
            if scan.affine is not None and not low / 2 <= min(scan.spacing) <= max(scan.spacing) <= 2 * high:
                sides = " x ".join(f"{s:.3g}" for s in scan.spacing)
                raise UserError(
                    f"{scan.path}: has voxels of {sides} mm, the model was trained on {low:.3g} to {high:.3g} mm; "
                    "resample the scan, or train with `spacing`"
                )
        return self.preparation.image(scan)

    @contextmanager
    def probabilities(self, image: Tensor, *, in_memory: bool = True, **options: Any) -> Iterator[np.ndarray]:
        """Probabilities (K, *S) of a prepared image, while in use in memory or in a temporary file."""
        predictor, roi, settings = self._windows(image, **options)
        shape = (len(self.values), *image.shape[1:])
        with tempfile.TemporaryDirectory(prefix="nearfar-") as folder:
            if in_memory:
                whole = np.empty(shape, np.float32)
            else:
                whole = np.memmap(Path(folder) / "scores", np.float32, "w+", shape=shape)
            for region, scores in window_scores(image, predictor, roi, **settings):
                if self.recipe.binary:
                    scores = F.pad(scores, (0, 0) * (scores.ndim - 1) + (1, 0))  # sigmoid(s) = softmax((0, s))
                whole[(slice(None), *region)] = scores.softmax(0).cpu().numpy()
            yield whole

    def _windows(
        self, image: Tensor, *, overlap: float = 0.5, mirror: bool = False, device: str = "cpu", **options: Any
    ) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
        network, dims = self.network.to(device), len(self.recipe.roi)
        flips = tuple(range(dims)) if mirror else ()
        settings = {"overlap": overlap, "flips": flips, "device": device, **options}
        if image.ndim - 1 == dims:
            return network, self.recipe.roi, settings
        return _Planes(network), (*self.recipe.roi, 1), {**settings, "batch_size": 8}

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `model.json` to `folder`."""
        folder = Path(folder)
        save_state_dict(self.network, folder / "model.safetensors")
        content = {
            "recipe": dataclasses.asdict(self.recipe),
            "labels": {str(k): v for k, v in self.labels.items()},
            "in_channels": self.in_channels,
            "crf": self.crf,
            "spacing_seen": self.spacing_seen,
        }
        return write_json(folder / "model.json", content)

    @classmethod
    def load(cls, folder: str | Path) -> "Segmenter":
        """Read what `save` wrote; raises UserError where it is not there or does not fit."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            recipe = Recipe(**content["recipe"])
            labels = {int(k): v for k, v in content["labels"].items()}
            segmenter = cls.create(recipe, labels, content["in_channels"])
            segmenter.crf, segmenter.spacing_seen = content.get("crf"), content.get("spacing_seen")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: holds no trained model ({error})") from error
        load_state_dict(segmenter.network, read_state_dict(folder / "model.safetensors"))
        return segmenter


class _Planes(nn.Module):
    """A 2-D network as one over volumes of a single plane: (B, C, H, W, 1) to (B, K, H, W, 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[..., 0])[..., None]
