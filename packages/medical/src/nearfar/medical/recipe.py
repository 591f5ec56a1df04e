"""The settings of a training run."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from nearfar.medical.inference import LAYOUTS
from nearfar.medical.losses import LOSSES
from nearfar.medical.preparation import CROPS, INTENSITIES, ORIENTATIONS, RESAMPLINGS


@dataclass
class Recipe:
    """How a network is trained. Patches of `roi` voxels, a share `foreground` of them centred on a labelled voxel.

    A `roi` of two numbers makes a 2-D network, which goes over volumes slice by slice: along the axis (of RAS+) with
    the largest voxel side where that is more than 1.5 times the next, else along the last.

    Args:
        network, settings: as in `create_network`.
        spacing, window, intensity, resize: as in `Preparation`. "auto" scales each channel by its name in the data's
            `channel_names`, as nnU-Net does: "CT" as CT, "noNorm", "rescale_to_0_1", "rgb_to_0_1"; others by zscore.
        orient, crop, resample: as in `Preparation`.
        windows: how windows lie over an image, "monai" or "nnunet", see `inference.window_scores`.
        loss, squash: as in `losses.SegmentationLoss`. "binary" and "structure" make a network of one output.
        optimizer, learning_rate, weight_decay, optimizer_settings: adamw, adam or sgd, and what else it takes.
        schedule: "warmup_cosine", "poly" ((1 - step / steps)^0.9), "constant", or one of torch's schedulers stepped
            once per epoch, `{StepLR: {step_size: 50}}`.
        foreground: of the patches, how many are centred: on a class of the case drawn first, then on a voxel of it.
        batch_size, accumulate: patches per pass, passes per step.
        patches_per_epoch, epochs: how long.
        scales: sizes of which one is chosen for each patch: its window is `roi / scale` and is resized to `roi`.
        augment: MONAI's dictionary transforms, `[{RandFlipd: {prob: 0.5, spatial_axis: 0}}, ...]`; keys and
            interpolation are filled in. None mirrors each axis with probability 1/2.
    """

    network: str = "monai.BasicUNet"
    settings: dict[str, Any] = field(default_factory=dict)
    roi: tuple[int, ...] = (64, 64, 64)
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    intensity: str = "auto"
    resize: tuple[int, int] | None = None
    orient: str = "ras"
    crop: str = "padding"
    resample: str = "linear"
    windows: str = "monai"
    loss: str = "dice_ce"
    squash: bool = False
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    optimizer_settings: dict[str, Any] = field(default_factory=dict)
    schedule: str | dict[str, Any] = "warmup_cosine"
    batch_size: int = 2
    accumulate: int = 1
    epochs: int = 50
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
        choices = {"orient": ORIENTATIONS, "crop": CROPS, "resample": RESAMPLINGS, "windows": LAYOUTS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if self.resample == "cubic" and self.resize is not None:
            raise ValueError("resample cubic is for `spacing`; `resize` has splines of its own")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; allowed are {', '.join(LOSSES)}")
        if self.spacing is not None and self.resize is not None:
            raise ValueError("spacing and resize both set the grid; give one")
        for name, count in (("window", 2), ("resize", 2), ("spacing", None)):
            values = getattr(self, name)
            if values is None:
                continue
            sound = isinstance(values, list | tuple) and all(isinstance(v, int | float) and isfinite(v) for v in values)
            if not sound or len(values) != (count or len(values)) or not values:
                raise ValueError(f"{name} is {values!r}; it must be {count or 'two or three'} finite numbers")
            if name == "window" and not values[0] < values[1]:
                raise ValueError(f"window is {values!r}; it must go from a lower to a higher number")
            if name != "window" and min(values) <= 0:
                raise ValueError(f"{name} is {values!r}; it must be positive")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground is {self.foreground}; it must lie between 0 and 1")
        if self.scales and min(self.scales) <= 0:
            raise ValueError(f"scales are {self.scales}; they must be positive")

    @property
    def binary(self) -> bool:
        """Whether the network has one output, the logit of the only label."""
        return self.loss in ("binary", "structure")
