"""Scaling intensities and spacing of a scan before a network, and undoing it after."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.medical.data.scans import Scan, resize_labels
from nearfar.medical.models.deeplab import MEAN_BGR

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
