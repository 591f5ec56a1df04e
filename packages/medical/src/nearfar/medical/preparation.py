"""Scaling intensities and spacing of a scan before a network, and undoing it after."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.medical.data.scans import SLAB, Scan, linear_slabs, resize_labels
from nearfar.medical.models.deeplab import MEAN_BGR

INTENSITIES = ("auto", "zscore", "ct", "minmax", "unit", "none", "bytes", "caffe")

ABSOLUTE = ("ct", "unit", "none", "caffe")
"""Schemes under which another unit of the intensities makes another image."""

NAMED = {"ct": "ct", "nonorm": "none", "rescale_to_0_1": "minmax", "rgb_to_0_1": "unit", "r": "unit", "g": "unit",
         "b": "unit", "rgb": "unit", "red": "unit", "green": "unit", "blue": "unit"}  # fmt: skip
"""Scheme of a channel by its name in `channel_names`; any other is "zscore"."""

SAMPLE = 1 << 20
"""Voxels by which quantiles are taken at most."""


def scheme_of(name: str) -> str:
    """How the intensities of a channel of this name are scaled: "CT", "CT (contrast)" and "ct_1" as CT."""
    plain = name.strip().casefold()
    words = plain.replace("-", " ").replace("_", " ").replace("(", " ").replace(",", " ").split()
    return NAMED.get(plain) or ("ct" if words and words[0] in ("ct", "cect", "ncct", "cbct", "ldct") else "zscore")


@dataclass(frozen=True)
class Channel:
    """What the training cases tell of one channel.

    Args:
        intensity: how it is scaled, see `Preparation`.
        low, high, mean, std: 0.5 and 99.5 percentile, mean and deviation of the labelled voxels.
        range: lowest 0.5 and highest 99.5 percentile of a training scan; `width`: the least distance between the two.
    """

    intensity: str = "zscore"
    name: str = ""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    range: tuple[float, float] | None = None
    width: float = 0.0

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Channel":
        """From what `asdict` made of one."""
        limits = content.get("range")
        return cls(**{**content, "range": None if limits is None else tuple(limits)})

    as_dict = asdict


class ChannelSurvey:
    """Collects what `Channel` holds over the training cases, a sample of each."""

    def __init__(self) -> None:
        self.foreground: list[list[np.ndarray]] = []
        self.quantiles: list[list[tuple[float, float]]] = []

    def add(self, scan: Scan, labels: np.ndarray, ignore: int | None = None) -> None:
        """Take a case in. Raises UserError for a constant channel."""
        check_not_constant(scan)
        while len(self.foreground) < len(scan.image):
            self.foreground.append([])
            self.quantiles.append([])
        inside = labels != 0 if ignore is None else (labels != 0) & (labels != ignore)
        places = np.flatnonzero(inside)
        places = places[:: max(1, -(-len(places) // 100_000))]
        for i, channel in enumerate(scan.image):
            self.foreground[i].append(channel[np.unravel_index(places, labels.shape)])
            self.quantiles[i].append(quantiles(channel))

    def channels(self, names: Sequence[str], intensity: str) -> tuple[Channel, ...]:
        """What was found. Raises UserError where CT has no labelled voxel or one value in all of them."""
        result = []
        for i, (parts, limits) in enumerate(zip(self.foreground, self.quantiles)):
            values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
            name = names[i] if i < len(names) else ""
            scheme = scheme_of(name) if intensity == "auto" else intensity
            found: dict[str, Any] = {}
            if len(values):
                low, high = np.percentile(values, [0.5, 99.5])
                mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
                found = {"low": float(low), "high": float(high), "mean": float(mean), "std": float(std)}
            if scheme == "ct" and not (found and found["low"] < found["high"]):
                raise UserError(f"channel {name or i}: has no labelled voxels of differing intensity to scale CT by")
            lows, highs = zip(*limits)
            width = min(high - low for low, high in limits)
            result.append(Channel(scheme, name, **found, range=(min(lows), max(highs)), width=width))
        return tuple(result)


def quantiles(channel: np.ndarray) -> tuple[float, float]:
    """0.5 and 99.5 percentile of what is no padding, by a regular sample; lowest and highest where they are equal."""
    outside = padding(channel)
    values = channel.ravel() if outside is None else channel[~outside]
    low, high = np.percentile(values[:: max(1, len(values) // SAMPLE)], [0.5, 99.5])
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))


def check_not_constant(scan: Scan) -> None:
    """Raise UserError where a channel has one value everywhere."""
    for i, channel in enumerate(scan.image):
        if (value := float(channel.flat[0])) == float(channel.min()) == float(channel.max()):
            which = f"channel {i + 1} is" if len(scan.image) > 1 else "it is"
            raise UserError(f"{scan.path}: {which} {value:g} everywhere, so there is nothing to see; leave it out")


def padding(channel: np.ndarray) -> np.ndarray | None:
    """Mask of the voxels that were never measured; None where there are none.

    That is the value that at least half of the image's corners share: everywhere where nothing is lower, else only what
    is joined to the image's border. What lies in the box of the rest is looked at again, for padding within padding: of
    a value lower than the one before and than all that is left.
    """
    result: np.ndarray | None = None
    before = 0.0
    box: tuple[slice, ...] = (slice(None),) * channel.ndim
    for _ in range(3):
        inner = channel[box]
        corners = inner[np.ix_(*[(0, -1) if n > 1 else (0,) for n in inner.shape])].ravel()
        values, counts = np.unique(corners, return_counts=True)
        value = values[counts.argmax()]
        if counts.max() < max(2, len(corners) / 2):
            break
        mask = inner == value
        if result is not None and not value == inner[~result[box]].min() < before:
            break
        before = value
        if result is None and value > inner.min():
            border = np.zeros_like(mask)
            for axis in range(mask.ndim):
                if mask.shape[axis] > 2:
                    for end in (0, -1):
                        where = tuple(end if a == axis else slice(None) for a in range(mask.ndim))
                        border[where] = mask[where]
            mask = ndimage.binary_propagation(border, mask=mask)
        if result is not None:
            mask |= result[box]
        if not mask.any() or mask.all():
            break
        if result is None:
            result = mask
        else:
            result[box] = mask
        new = _box(~mask)
        if all(s.stop - s.start == n for s, n in zip(new, inner.shape)):
            break
        box = tuple(
            slice(s.start + b.indices(n)[0], s.stop + b.indices(n)[0]) for s, b, n in zip(new, box, channel.shape)
        )
    return result


def content_box(image: np.ndarray) -> tuple[slice, ...]:
    """The box of an image (C, *S) outside which all channels are padding."""
    boxes = [None if (outside := padding(channel)) is None else _box(~outside) for channel in image]
    if any(box is None for box in boxes):
        return tuple(slice(0, n) for n in image.shape[1:])
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes))  # type: ignore[arg-type]


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The box of the true voxels of a mask."""
    found = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        found.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(found)


def content_mask(image: Tensor) -> Tensor:
    """Mask (1, *S) of the content box of (C, *S), as MONAI's `CropForegroundd` takes it."""
    mask = torch.zeros((1, *image.shape[1:]), dtype=torch.bool)
    mask[0][content_box(np.asarray(image))] = True
    return mask


def scale_intensities(
    image: Any,
    window: Sequence[float] | None = None,
    intensity: str = "zscore",
    channels: Iterable[Channel | Mapping[str, Any]] = (),
    masks: Sequence[np.ndarray | None] | None = None,
) -> Tensor:
    """Intensities of an image (C, *S) as `Preparation` describes them; padding gets the lowest that is none.

    `masks`: what is `padding` in each channel, where the image is a part of a larger one.
    """
    source = np.asarray(image)
    known = [c if isinstance(c, Channel) else Channel.read(c) for c in channels]
    out = np.empty(source.shape, np.float32)
    whole = (float(source.min()), float(source.max())) if intensity == "bytes" else (0.0, 1.0)
    if intensity == "caffe":
        source = source[::-1]
    for i, channel in enumerate(source):
        scheme = known[i].intensity if known else "zscore" if intensity == "auto" else intensity
        outside = None
        if window is not None or scheme in ("zscore", "ct", "minmax"):
            outside = padding(channel) if masks is None else masks[i]
        low, high, shift, scale = -np.inf, np.inf, 0.0, 1.0
        if window is not None:
            low, high = window
            shift, scale = low, high - low
        elif scheme == "ct":
            low, high, shift, scale = known[i].low, known[i].high, known[i].mean, max(known[i].std, 1e-6)
        elif scheme == "unit":
            scale = 255.0
        elif scheme == "bytes":
            shift, scale = whole[0], max(whole[1] - whole[0], 1e-6) / 255
        elif scheme == "caffe":
            shift = MEAN_BGR[i]
        elif scheme in ("zscore", "minmax"):
            inside = channel if outside is None else channel[~outside]
            if scheme == "minmax":
                shift, scale = float(inside.min()), max(float(inside.max()) - float(inside.min()), 1e-6)
            else:
                shift, scale = _mean_std(inside)
        floor = low if np.isfinite(low) else None if outside is None else float(channel[~outside].min())
        step = max(1, SLAB // max(1, channel[..., 0].size))
        for start in range(0, channel.shape[-1], step):
            part = channel[..., start : start + step]
            if outside is not None:
                part = np.where(outside[..., start : start + step], np.float32(floor), part)
            out[i][..., start : start + step] = (np.clip(part, low, high) - np.float32(shift)) / np.float32(scale)
    result = torch.from_numpy(out)
    if isinstance(image, Tensor):  # MONAI's carry what was done to them
        return torch.empty_like(image, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(result)
    return result


def _mean_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and deviation, summed up part by part in float64."""
    number = values.size
    parts = [values] if values.ndim == 1 else [values[..., i] for i in range(values.shape[-1])]
    mean = sum(float(p.sum(dtype=np.float64)) for p in parts) / number
    square = 0.0
    for part in parts:
        for start in range(0, len(part), SLAB):
            square += float(((part[start : start + SLAB].astype(np.float64) - mean) ** 2).sum())
    return mean, max(float(np.sqrt(square / max(1, number - 1))), 1e-6)


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before a network sees it, and undone to its labels.

    Volumes are turned to RAS+ (axes permuted and flipped, nothing resampled) and cut to the box outside which all is
    padding (`padding`), unless `resize` sets the grid.

    Then intensities: `window` (low, high) clips and maps to 0..1, for CT in HU; without it `intensity` decides, which
    `channels` know for each: "zscore" brings each channel to mean 0, deviation 1 over what is no padding, "ct" clips to
    the percentiles of the training cases' labelled voxels and takes their mean and deviation, "minmax" maps to 0..1,
    "unit" divides by 255, "none" leaves them, "bytes" stretches the whole image to 0..255, "caffe" makes BGR and
    subtracts DeepLab's mean. Padding gets the lowest value of the rest, so that it does not matter what it is.

    Then the grid: `spacing` (mm, None keeps the scan's), or `resize`, the size of each plane, by cubic splines as the
    TransUNet family does. With `planes`, for networks of two axes, the axis with the largest voxel side comes last
    where that is more than 1.5 times the next, else the last stays.
    """

    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    intensity: str = "zscore"
    resize: tuple[int, int] | None = None
    channels: tuple[Channel, ...] = ()
    planes: bool = False

    def image(self, scan: Scan) -> Tensor:
        """(C, *S) float32, ready for the network."""
        if self.intensity == "caffe" and len(scan.image) != 3:
            raise UserError(f"{scan.path}: has {len(scan.image)} channels; intensity caffe is for photographs of three")
        turned = scan.canonical()
        box, axis = self.box(scan), self.axis(scan)
        cut = np.moveaxis(turned[(slice(None), *box)], axis + 1, -1)
        masks = [None if (m := padding(channel)) is None else np.moveaxis(m[box], axis, -1) for channel in turned]
        image = scale_intensities(cut, self.window, self.intensity, self.channels, masks)
        size = self.size(scan, box)
        if size == tuple(image.shape[1:]):
            return image
        result = np.empty((len(image), *size), np.float32)
        for channel, out in zip(image.numpy(), result):
            if self.resize is None:
                for where, slab in linear_slabs(channel, size):
                    out[where] = slab
            elif channel.ndim == 2:
                out[...] = ndimage.zoom(channel, [n / o for n, o in zip(size, channel.shape)], order=3)
            else:
                for k in range(size[2]):  # the last axis keeps its size
                    factors = [n / o for n, o in zip(size[:2], channel.shape[:2])]
                    out[..., k] = ndimage.zoom(channel[..., k], factors, order=3)
        return torch.from_numpy(result)

    def box(self, scan: Scan) -> tuple[slice, ...]:
        """The part of the canonical image that is prepared."""
        if self.resize is not None or scan.affine is None:
            return tuple(slice(0, n) for n in scan.canonical_shape())
        return content_box(scan.canonical())

    def axis(self, scan: Scan) -> int:
        """The canonical axis that comes last in the prepared image."""
        last = len(scan.shape) - 1
        if not self.planes or last < 2 or scan.kind == "array":
            return last
        return widest(scan.canonical_spacing() if self.spacing is None else self.spacing)

    def size(self, scan: Scan, box: tuple[slice, ...] | None = None) -> tuple[int, ...]:
        """The prepared grid's size."""
        cut = tuple(s.stop - s.start for s in (self.box(scan) if box is None else box))
        if self.resize is not None:
            return (*self.resize, *_last(cut, self.axis(scan))[2:])
        if self.spacing is not None and scan.affine is not None:
            if len(self.spacing) != len(cut):
                raise UserError(f"{scan.path}: has {len(cut)} axes, the spacing {self.spacing} {len(self.spacing)}")
            pairs = zip(cut, scan.canonical_spacing(), self.spacing)
            cut = tuple(max(1, round(n * old / new)) for n, old, new in pairs)
        return _last(cut, self.axis(scan))

    def grid_spacing(self, scan: Scan) -> tuple[float, ...]:
        """Size of a voxel of the prepared grid."""
        box, axis = self.box(scan), self.axis(scan)
        sides, cut = _last(scan.canonical_spacing(), axis), _last(tuple(s.stop - s.start for s in box), axis)
        return tuple(old * n / new for old, n, new in zip(sides, cut, self.size(scan, box)))

    def labels(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the scan on the prepared grid."""
        box = self.box(scan)
        cut = np.moveaxis(scan.to_canonical(labels)[box], self.axis(scan), -1)
        return np.ascontiguousarray(self._resample(cut, self.size(scan, box)))

    def restore(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the prepared grid on the scan's own; 0 in the padding that was cut off."""
        box, axis = self.box(scan), self.axis(scan)
        back = np.moveaxis(self._resample(labels, _last(tuple(s.stop - s.start for s in box), axis)), -1, axis)
        if back.shape == scan.canonical_shape():
            return scan.from_canonical(back)
        whole = np.zeros(scan.canonical_shape(), labels.dtype)
        whole[box] = back
        return scan.from_canonical(whole)

    def _resample(self, labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        if self.resize is None or tuple(size) == labels.shape:
            return resize_labels(labels, size)
        return ndimage.zoom(labels, [new / old for new, old in zip(size, labels.shape)], order=0)


def widest(sides: Sequence[float]) -> int:
    """The axis with the largest voxel side where that is more than 1.5 times the next, else the last."""
    axis = int(np.argmax(sides))
    return axis if sides[axis] > 1.5 * sorted(sides)[-2] else len(sides) - 1


def _last(values: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """`values` with that of `axis` at the end."""
    return (*values[:axis], *values[axis + 1 :], values[axis])
