"""Scaling intensities and spacing of a scan before a network, and undoing it after."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from skimage.transform import resize
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.medical.data.scans import SLAB, Scan, linear_slabs, resize_labels
from nearfar.medical.models.deeplab import MEAN_BGR

CROPS, RESAMPLINGS, ORIENTATIONS = ("padding", "nonzero"), ("linear", "cubic"), ("ras", "stored")

ANISOTROPIC = 3.0
"""Ratio of voxel sides from which on the coarse axis is resampled for itself, by nearest neighbour, as nnU-Net does."""

INTENSITIES = ("auto", "zscore", "zscore_nonzero", "ct", "minmax", "unit", "none", "bytes", "caffe")

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
    step = max(1, int((channel.size / SAMPLE) ** (1 / channel.ndim)))
    where = (slice(None, None, step),) * channel.ndim
    values = channel[where].ravel() if outside is None else channel[where][~outside[where]]
    low, high = np.percentile(values, [0.5, 99.5]) if len(values) else (0.0, 0.0)
    if low < high:
        return float(low), float(high)
    inside = True if outside is None else ~outside
    return float(channel.min(initial=np.inf, where=inside)), float(channel.max(initial=-np.inf, where=inside))


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
        if result is not None and not value == inner.min(initial=np.inf, where=~result[box]) < before:
            break
        before = value
        if result is None and value > inner.min():
            border = np.zeros_like(mask)
            for axis in range(mask.ndim):
                if mask.shape[axis] > 2:
                    for end in (0, -1):
                        where = tuple(end if a == axis else slice(None) for a in range(mask.ndim))
                        border[where] = mask[where]
            mask = joined_to(border, mask)
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


def joined_to(seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The voxels of `mask` joined to one of `seeds` by their faces, found plane by plane, forth and back."""
    if mask.ndim < 3:
        return ndimage.binary_propagation(seeds, mask=mask)
    found, order, changed = seeds, list(range(mask.shape[-1])), True
    while changed:
        changed = False
        for before, k in zip([None, *order], order):
            start = found[..., k] if before is None else found[..., k] | (found[..., before] & mask[..., k])
            grown = ndimage.binary_propagation(start, mask=mask[..., k]) if start.any() else start
            if (grown != found[..., k]).any():
                found[..., k], changed = grown, True
        order = order[::-1]
    return found


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


@dataclass(frozen=True)
class Scaling:
    """(clip(x, low, high) - shift) / scale of a channel, after padding got the value `floor`, where it has one."""

    low: float = -np.inf
    high: float = np.inf
    shift: float = 0.0
    scale: float = 1.0
    floor: float | None = None

    def __call__(self, part: np.ndarray, outside: np.ndarray | None) -> np.ndarray:
        """Of a part of the channel in float32; `outside` is the padding in that part."""
        if outside is not None:
            part = np.where(outside, np.float32(0.0 if self.floor is None else self.floor), part)
        return (np.clip(part, self.low, self.high) - np.float32(self.shift)) / np.float32(self.scale)


def scaling(
    channel: np.ndarray,
    outside: np.ndarray | None,
    scheme: str,
    known: Channel = Channel(),
    window: Sequence[float] | None = None,
    whole: tuple[float, float] = (0.0, 1.0),
    index: int = 0,
) -> Scaling:
    """How a channel is scaled; `outside` is what does not count in it, `whole` the range of all channels."""
    low, high, shift, scale = -np.inf, np.inf, 0.0, 1.0
    inside = True if outside is None else ~outside
    if window is not None:
        low, high = window
        shift, scale = low, high - low
    elif scheme == "ct":
        low, high, shift, scale = known.low, known.high, known.mean, max(known.std, 1e-6)
    elif scheme == "unit":
        scale = 255.0
    elif scheme == "bytes":
        shift, scale = whole[0], max(whole[1] - whole[0], 1e-6) / 255
    elif scheme == "caffe":
        shift = MEAN_BGR[index]
    elif scheme == "minmax":
        shift = float(channel.min(initial=np.inf, where=inside))
        scale = max(float(channel.max(initial=-np.inf, where=inside)) - shift, 1e-6)
    elif scheme in ("zscore", "zscore_nonzero"):
        shift, scale = _mean_std(channel, outside)
    floor = None
    if outside is not None:
        lowest = low if np.isfinite(low) else float(channel.min(initial=np.inf, where=inside))
        floor = shift if scheme == "zscore_nonzero" else lowest
    return Scaling(low, high, shift, scale, floor)


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
    result = torch.from_numpy(ScaledImage(np.asarray(image), window, intensity, channels, masks).whole())
    if isinstance(image, Tensor):  # MONAI's carry what was done to them
        return torch.empty_like(image, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(result)
    return result


class ScaledImage:
    """An image (C, *S) with its intensities scaled, of which parts are made when they are asked for.

    As `scale_intensities`; an index like that of a tensor gives a tensor.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        source: np.ndarray,
        window: Sequence[float] | None = None,
        intensity: str = "zscore",
        channels: Iterable[Channel | Mapping[str, Any]] = (),
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        known = [c if isinstance(c, Channel) else Channel.read(c) for c in channels]
        whole = (float(source.min()), float(source.max())) if intensity == "bytes" else (0.0, 1.0)
        self.source = source[::-1] if intensity == "caffe" else source
        self.shape, self.ndim = source.shape, source.ndim
        self.masks: list[np.ndarray | None] = []
        self.scalings: list[Scaling] = []
        for i, channel in enumerate(self.source):
            scheme = known[i].intensity if known else "zscore" if intensity == "auto" else intensity
            outside = None
            if window is not None or scheme in ("zscore", "ct", "minmax", "zscore_nonzero"):
                outside = padding(channel) if masks is None else masks[i]
            self.masks.append(outside)
            own = known[i] if known else Channel()
            self.scalings.append(scaling(channel, outside, scheme, own, window, whole, i))

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        parts = []
        for channel, outside, scale in list(zip(self.source, self.masks, self.scalings))[where[0]]:
            parts.append(scale(channel[where[1:]], None if outside is None else outside[where[1:]]))
        return torch.from_numpy(np.stack(parts))

    def whole(self) -> np.ndarray:
        """All of it, made slab by slab."""
        out = np.empty(self.shape, np.float32)
        step = max(1, SLAB // max(1, math.prod(self.shape[1:-1])))
        for start in range(0, self.shape[-1], step):
            for channel, outside, scale, target in zip(self.source, self.masks, self.scalings, out):
                part = slice(start, start + step)
                target[..., part] = scale(channel[..., part], None if outside is None else outside[..., part])
        return out


def _mean_std(channel: np.ndarray, outside: np.ndarray | None) -> tuple[float, float]:
    """Mean and deviation of what is not `outside`, summed up plane by plane in float64."""
    planes = range(channel.shape[-1])

    def inside(i: int) -> np.ndarray:
        plane = channel[..., i]
        return (plane if outside is None else plane[~outside[..., i]]).astype(np.float64)

    number = channel.size if outside is None else channel.size - int(outside.sum())
    mean = sum(float(inside(i).sum()) for i in planes) / number
    square = sum(float(((inside(i) - mean) ** 2).sum()) for i in planes)
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

    Then the grid: `spacing` (mm, in pictures pixels, None keeps the scan's), or `resize`, the size of each plane, by
    cubic splines as the TransUNet family does. With `planes`, for networks of two axes, the axis with the largest voxel
    side comes last where that is more than 1.5 times the next, else the last stays; a `spacing` of two is that of the
    planes.

    nnU-Net does some of it otherwise: `orient` "stored" keeps the axes of the file; `crop` "nonzero" cuts to the box
    of what is not 0 in some channel, and nothing else counts as padding ("zscore_nonzero" then takes mean and deviation
    of what is not 0, holes filled, and leaves 0 around); `resample` "cubic" takes cubic splines, the coarse axis by
    nearest neighbour where its side is more than 3 times the smallest, and scores go back to the scan's grid instead of
    labels.
    """

    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    intensity: str = "zscore"
    resize: tuple[int, int] | None = None
    channels: tuple[Channel, ...] = ()
    planes: bool = False
    orient: str = "ras"
    crop: str = "padding"
    resample: str = "linear"

    @classmethod
    def of(cls, recipe: Any, channels: Sequence[Channel] = ()) -> "Preparation":
        """That of a `Recipe`."""
        return cls(
            recipe.spacing, recipe.window, recipe.intensity, recipe.resize, tuple(channels), len(recipe.roi) == 2,
            recipe.orient, recipe.crop, recipe.resample,
        )  # fmt: skip

    def image(self, scan: Scan, lazy: bool = False) -> Any:
        """(C, *S) float32, ready for the network; with `lazy` a `ScaledImage` of it where nothing is resampled."""
        if self.intensity == "caffe" and len(scan.image) != 3:
            raise UserError(f"{scan.path}: has {len(scan.image)} channels; intensity caffe is for photographs of three")
        turned = self._turned(scan)
        box, axis = self.box(scan), self.axis(scan)
        cut = np.moveaxis(turned[(slice(None), *box)], axis + 1, -1)
        if self.crop == "nonzero":
            schemes = [c.intensity for c in self.channels] or [self.intensity] * len(turned)
            filled = ndimage.binary_fill_holes((cut != 0).any(0)) if "zscore_nonzero" in schemes else None
            masks = [~filled if filled is not None and scheme == "zscore_nonzero" else None for scheme in schemes]
        else:
            masks = [None if (m := padding(channel)) is None else np.moveaxis(m[box], axis, -1) for channel in turned]
        size, lazily = self.size(scan, box), ScaledImage(cut, self.window, self.intensity, self.channels, masks)
        if lazy and size == cut.shape[1:]:
            return lazily
        image = torch.from_numpy(lazily.whole())
        if size == tuple(image.shape[1:]):
            return image
        result = np.empty((len(image), *size), np.float32)
        sides = _last(self._spacing(scan), axis)
        for channel, out in zip(image.numpy(), result):
            if self.resample == "cubic":
                out[...] = resampled(channel, size, sides, 3)
            elif self.resize is None:
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
        if self.crop == "nonzero":
            seen = (self._turned(scan) != 0).any(0)
            return _box(seen) if seen.any() else tuple(slice(0, n) for n in seen.shape)
        if self.resize is not None or scan.affine is None:
            return tuple(slice(0, n) for n in self._shape(scan))
        return content_box(self._turned(scan))

    def _turned(self, scan: Scan) -> np.ndarray:
        return scan.image if self.orient == "stored" else scan.canonical()

    def _shape(self, scan: Scan) -> tuple[int, ...]:
        return scan.shape if self.orient == "stored" else scan.canonical_shape()

    def _spacing(self, scan: Scan) -> tuple[float, ...]:
        return scan.spacing if self.orient == "stored" else scan.canonical_spacing()

    def axis(self, scan: Scan) -> int:
        """The canonical axis that comes last in the prepared image."""
        last = len(scan.shape) - 1
        if not self.planes or last < 2 or scan.kind == "array" or self.orient == "stored":
            return last
        given = self.spacing is not None and len(self.spacing) == 3
        return widest(self.spacing if given else self._spacing(scan))  # type: ignore[arg-type]

    def size(self, scan: Scan, box: tuple[slice, ...] | None = None) -> tuple[int, ...]:
        """The prepared grid's size."""
        cut = tuple(s.stop - s.start for s in (self.box(scan) if box is None else box))
        if self.resize is not None:
            return (*self.resize, *_last(cut, self.axis(scan))[2:])
        if self.spacing is not None:
            sides, wanted = self._spacing(scan), list(self.spacing)
            if self.planes and len(wanted) == 2 < len(cut):
                wanted.insert(axis := self.axis(scan), sides[axis])
            if len(wanted) != len(cut):
                raise UserError(f"{scan.path}: has {len(cut)} axes, the spacing {self.spacing} {len(self.spacing)}")
            cut = tuple(max(1, round(n * old / new)) for n, old, new in zip(cut, sides, wanted))
        return _last(cut, self.axis(scan))

    def grid_spacing(self, scan: Scan) -> tuple[float, ...]:
        """Size of a voxel of the prepared grid."""
        box, axis = self.box(scan), self.axis(scan)
        sides, cut = _last(self._spacing(scan), axis), _last(tuple(s.stop - s.start for s in box), axis)
        return tuple(old * n / new for old, n, new in zip(sides, cut, self.size(scan, box)))

    def labels(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the scan on the prepared grid."""
        box = self.box(scan)
        turned = labels if self.orient == "stored" else scan.to_canonical(labels)
        cut = np.moveaxis(turned[box], self.axis(scan), -1)
        return np.ascontiguousarray(self._resample(cut, self.size(scan, box)))

    def restore(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the prepared grid on the scan's own; 0 in the padding that was cut off."""
        box, axis = self.box(scan), self.axis(scan)
        return self._placed(self._resample(labels, _last(tuple(s.stop - s.start for s in box), axis)), scan, box, axis)

    def _placed(
        self, back: np.ndarray, scan: Scan, box: tuple[slice, ...], axis: int, outside: float = 0.0
    ) -> np.ndarray:
        """A map of the box on the scan's own grid, `outside` around it."""
        back = np.moveaxis(back, -1, axis)
        if back.shape != self._shape(scan):
            whole = np.full(self._shape(scan), outside, back.dtype)
            whole[box], back = back, whole
        return back if self.orient == "stored" else scan.from_canonical(back)

    def scores_back(self, scores: Any, scan: Scan, outside: float = 0.0) -> Iterator[np.ndarray]:
        """Each of the scores (K, *S) of the prepared grid, one by one, on the scan's own; `outside` in what was cut."""
        box, axis = self.box(scan), self.axis(scan)
        size, sides = _last(tuple(s.stop - s.start for s in box), axis), self.grid_spacing(scan)
        for each in scores:
            values = np.asarray(each, np.float32)
            if size != values.shape and self.resample == "cubic":
                values = resampled(values, size, sides, 1)
            elif size != values.shape:
                out = np.empty(size, np.float32)
                for where, slab in linear_slabs(values, size):
                    out[where] = slab
                values = out
            yield self._placed(values, scan, box, axis, outside)

    def _resample(self, labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        if self.resize is None or tuple(size) == labels.shape:
            return resize_labels(labels, size)
        return ndimage.zoom(labels, [new / old for new, old in zip(size, labels.shape)], order=0)


def resampled(image: np.ndarray, size: Sequence[int], sides: Sequence[float], order: int) -> np.ndarray:
    """An array (*S) on another grid of the same extent by splines of `order`, in float32.

    `sides` are those of its voxels. Where the largest is more than 3 times the smallest, or is so afterwards, and one
    axis has it, the planes across that axis are resampled for themselves and the axis by nearest neighbour.
    """
    if tuple(size) == image.shape:
        return image.astype(np.float32, copy=False)
    new = [side * n / m for side, n, m in zip(sides, image.shape, size)]
    options = {"order": order, "mode": "edge", "anti_aliasing": False, "preserve_range": True, "clip": True}
    for given in (sides, new):
        if max(given) > ANISOTROPIC * min(given):
            coarse = [axis for axis, side in enumerate(given) if side == max(given)]
            break
    else:
        coarse = []
    if len(coarse) != 1 or image.ndim < 3:
        return resize(image.astype(np.float32, copy=False), tuple(size), **options).astype(np.float32)
    (axis,) = coarse
    planes = np.moveaxis(image, axis, 0)
    flat = [n for a, n in enumerate(size) if a != axis]
    if list(planes.shape[1:]) != flat:
        planes = np.stack([resize(np.asarray(p, np.float32), flat, **options) for p in planes])
    place = (np.arange(size[axis]) + 0.5) * (len(planes) / size[axis]) - 0.5
    nearest = np.floor(place + 0.5).astype(int).clip(0, len(planes) - 1)
    return np.moveaxis(planes[nearest], 0, axis).astype(np.float32)


def widest(sides: Sequence[float]) -> int:
    """The axis with the largest voxel side where that is more than 1.5 times the next, else the last."""
    axis = int(np.argmax(sides))
    return axis if sides[axis] > 1.5 * sorted(sides)[-2] else len(sides) - 1


def _last(values: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """`values` with that of `axis` at the end."""
    return (*values[:axis], *values[axis + 1 :], values[axis])
