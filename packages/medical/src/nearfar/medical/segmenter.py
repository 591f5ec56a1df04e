"""From scans to label maps: preparation, networks by name, training, and a trained segmenter in a folder."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, temporary_folder
from nearfar.core.memory import refuse_memory, resident_memory
from nearfar.core.model_folder import KINDS, TrainedOn, read, trained_on, writing
from nearfar.core.reading import check_sizes, reading
from nearfar.medical.data.scans import Scan, label_type
from nearfar.medical.inference import WINDOW_MEMORY, segment, window_scores
from nearfar.medical.networks import create_network
from nearfar.medical.preparation import ABSOLUTE, Channel, Preparation, check_not_constant, quantiles
from nearfar.medical.recipe import Recipe
from nearfar.medical.refinement import refine, to_bytes
from nearfar.ops.graph.dense_crf import DenseCRF

SURE = 50.0
"""A logit of which e to the power is beyond doubt."""


class Segmenter:
    """A trained network with all it needs to segment a scan: preparation, label names, window.

    With `regions` (name -> label values, which may overlap) its outputs are the logits of each of them, in their order;
    a voxel gets the label that lies in just the regions found there, or, where there is none, that of the last of the
    `order` whose region was found, as nnU-Net paints them. `save` writes a folder of `model.safetensors` and
    `model.json`; `load` reads it.
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Mapping[int, str],
        recipe: Recipe,
        in_channels: int,
        values: Sequence[int] | None = None,
        *,
        regions: Mapping[str, Sequence[int]] | None = None,
        order: Sequence[int] = (),
    ) -> None:
        self.network, self.recipe, self.in_channels = network.eval(), recipe, in_channels
        self.crf: dict[str, Any] | None = None  # settings that `search_crf` chose
        self.spacing_seen: list[list[float]] | None = None  # least and largest voxel side along each axis of RAS+, mm
        self.trained_on = TrainedOn()
        self.labels = dict(labels)
        self.values = list(values) if values is not None else [0, *(v for v in self.labels if v)]
        self.regions = {name: tuple(values) for name, values in (regions or {}).items()}
        self.order = tuple(order)
        self.channels = ()

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What the training cases tell of each channel; empty where it is not known."""
        return self.preparation.channels

    @channels.setter
    def channels(self, channels: Sequence[Channel]) -> None:
        self.preparation = Preparation.of(self.recipe, channels)

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        labels: Mapping[int, str],
        in_channels: int,
        *,
        fetch: bool = True,
        regions: Mapping[str, Sequence[int]] | None = None,
        order: Sequence[int] = (),
    ) -> "Segmenter":
        """A segmenter with fresh weights, or with fetched ones where the recipe asks for them and `fetch` is set.

        Class k of the network is the k-th label value, or output k the k-th of `regions`. Raises UserError for a `roi`
        that the network cannot take.
        """
        classes = 1 + len([v for v in labels if v])
        if recipe.binary and (classes != 2 or regions):
            raise UserError(f"loss {recipe.loss} is for one label, the data have {classes - 1}")
        outputs = len(regions) if regions else 1 if recipe.binary else classes
        network = create_network(recipe.network, outputs, in_channels, len(recipe.roi), recipe.settings, fetch=fetch)
        several = getattr(network, "size_multiple", 1)
        several = (several,) * len(recipe.roi) if isinstance(several, int) else several
        if any(n % m for n, m in zip(recipe.roi, several, strict=True)):
            fits = [-(-n // m) * m for n, m in zip(recipe.roi, several, strict=True)]
            raise UserError(f"roi is {list(recipe.roi)}; {recipe.network} takes multiples of {list(several)}: {fits}")
        alone: Any = getattr(network, "patch_size", None) if getattr(network, "fixed", False) else None
        if alone is not None and alone != recipe.roi:
            raise UserError(f"roi is {list(recipe.roi)}; this {recipe.network} takes {list(alone)} alone")
        return cls(network, labels, recipe, in_channels, regions=regions, order=order)

    def __call__(
        self,
        scan: Scan,
        *,
        overlap: float = 0.5,
        mirror: bool = False,
        memory: int | None = None,
        device: str = "cpu",
        crf: DenseCRF | None = None,
        probabilities: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """The label map of a scan on its own grid.

        `probabilities`: a .npy file for them, see `write_probabilities`; without `crf`. `mirror` averages over the
        flips of all axes. `memory` bytes (None: 384 MB for windows, else no bound) are for the scan, its prepared
        image, the label maps, and with what is left the windows, by which classes are decided.
        With `crf` the averaged probabilities are refined by the image within that, by slabs from a temporary file where
        the whole does not fit, see `refinement.refine`. Raises UserError where `memory` does not hold the volumes.
        """
        options: dict[str, Any] = {"overlap": overlap, "mirror": mirror, "device": device, "progress": progress}
        options["memory"], rest = WINDOW_MEMORY, None
        lazy = memory is not None and crf is None
        if memory is not None:
            rest = memory - self.check_memory(scan, memory, lazy)
            free = max(memory // 8, rest - resident_memory())  # what the program leaves of it, where that is more
            options["memory"] = min(WINDOW_MEMORY, rest, free)
        image = self.prepare(scan, lazy)
        if crf is not None:
            if probabilities is not None:
                raise UserError("probabilities are those before the CRF; save them without it")
            if self.regions:
                raise UserError("the CRF decides between labels; this model's regions overlap, run without it")
            with self.probabilities(image, in_memory=memory is None, **options) as scores:
                spacing = self.preparation.grid_spacing(scan)
                decided = refine(scores, to_bytes(image), crf, spacing, memory=rest, device=device)
        elif probabilities is not None or (
            self.recipe.resample == "cubic" and self.preparation.size(scan) != self._cut(scan)
        ):
            with self.scores(image, in_memory=memory is None, **options) as scores:
                if probabilities is not None:
                    self.write_probabilities(probabilities, scores, scan)
                return self.decide(scores, scan)
        else:
            predictor, roi, settings = self._windows(image, **options)
            threshold = 0.0 if self.recipe.binary else None
            decide = RegionPainter(self.values, self.regions, self.order) if self.regions else None
            decided = segment(image, predictor, roi, threshold=threshold, decide=decide, **settings).numpy()
        del image
        values = np.asarray(self.values, label_type(min(self.values), max(self.values)))
        found = np.empty(decided.shape, values.dtype)
        for plane, numbers in zip(found, decided):  # indices take 8 bytes each
            plane[...] = values[numbers]
        return self.preparation.restore(found, scan)

    def _cut(self, scan: Scan) -> tuple[int, ...]:
        """The size of the prepared grid if nothing were resampled."""
        return replace(self.preparation, spacing=None, resize=None).size(scan)

    def decide(self, scores: Any, scan: Scan) -> np.ndarray:
        """The label map of a scan by logits (K, *S) on its prepared grid, which go back to its own, one by one."""
        best, found, code = None, np.zeros(scan.shape, np.uint8 if len(self.values) <= 256 else np.int32), None
        for k, each in enumerate(self.back(scores, scan)):
            if self.regions:
                code = np.zeros(scan.shape, np.int64) if code is None else code
                code |= (each > 0).astype(np.int64) << k
            elif self.recipe.binary:
                found[each > 0] = 1
            else:
                if best is None:
                    best = each.copy()
                    continue
                better = each > best
                found[better], best[better] = k, each[better]
        if code is not None:
            found = RegionPainter(self.values, self.regions, self.order).table.numpy()[code]
        return np.take(np.asarray(self.values, label_type(min(self.values), max(self.values))), found)

    def back(self, scores: Any, scan: Scan) -> Iterator[np.ndarray]:
        """Each of the logits (K, *S) on the scan's own grid, one by one; background for sure in what was cut off."""
        independent = bool(self.regions) or self.recipe.binary
        for k, each in enumerate(self.preparation.scores_back(scores, scan, -SURE)):
            if not independent and k == 0:  # the logit of the background itself
                each = np.where(each == -SURE, np.float32(SURE), each)
            yield each

    def write_probabilities(self, path: str | Path, scores: Any, scan: Scan) -> Path:
        """Write the probabilities (K, *S) of a scan on its own grid as .npy, classes or regions first, by its logits.

        A network of one output gets two classes, as `refine` takes them.
        """
        planes = len(scores) + self.recipe.binary
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            about = {"descr": "<f4", "fortran_order": False, "shape": (planes, *scan.shape)}
            np.lib.format.write_array_header_1_0(stream, about)
            norm = np.zeros(scan.shape, np.float32) if self.recipe.binary else np.float32(-np.inf)
            if not self.regions:
                for each in self.back(scores, scan):
                    norm = np.logaddexp(norm, each)
            if self.recipe.binary:
                stream.write(np.exp(-norm).tobytes())
            for each in self.back(scores, scan):
                share = 1 / (1 + np.exp(-each)) if self.regions else np.exp(each - norm)
                stream.write(share.astype(np.float32).tobytes())
        return Path(path)

    def check_memory(self, scan: Scan, memory: int, lazy: bool = True) -> int:
        """Bytes that the volumes of a scan take while it is segmented; UserError where that passes `memory`.

        `lazy`: the prepared image is made window by window where nothing is resampled.
        """
        voxels = float(np.prod(scan.shape))
        prepared = voxels
        if self.recipe.spacing is not None:
            sides = list(scan.canonical_spacing())
            if len(self.recipe.spacing) == 2 < len(sides):  # that of the planes
                del sides[self.preparation.axis(scan)]
            prepared = voxels * float(np.prod(sides) / np.prod(self.recipe.spacing))
        elif self.recipe.resize is not None:
            prepared = float(np.prod(self.recipe.resize)) * (scan.shape[-1] if len(scan.shape) == 3 else 1)
        size = np.dtype(label_type(min(self.values), max(self.values))).itemsize
        same = self.recipe.spacing is None and self.recipe.resize is None
        shares = {
            "the scan": 4.0 * voxels * len(scan.image),
            "the prepared image": (1 if lazy and same else 4) * prepared * len(scan.image),
            "padding and label maps": voxels * (1 + size) + prepared * (1 + size),
        }
        if self.recipe.resample == "cubic" and self.recipe.spacing is not None:
            shares["splines, and scores on the scan's grid"] = 16 * max(voxels, prepared)
        need = int(sum(shares.values()))
        if need > memory:
            raise UserError(f"{scan.path}: {refuse_memory(memory, shares)}")
        return need

    def prepare(self, scan: Scan, lazy: bool = False) -> Any:
        """The image (C, *S) that the network sees; UserError where it is not what the model was trained for.

        `lazy`: as in `Preparation.image`.
        """
        if len(scan.image) != self.in_channels:
            raise UserError(f"{scan.path}: has {len(scan.image)} channels, the model takes {self.in_channels}")
        axes, dims = len(scan.shape), len(self.recipe.roi)
        if axes not in (dims, 3):
            raise UserError(f"{scan.path}: has {axes} axes, the model takes {dims}")
        if self.spacing_seen is not None and self.recipe.spacing is None and self.recipe.resize is None:
            sides = scan.canonical_spacing()
            pairs = list(zip(sides, self.spacing_seen))
            if scan.affine is not None and not all(low / 2 <= side <= 2 * high for side, (low, high) in pairs):
                own = " x ".join(f"{s:.3g}" for s in sides)
                seen = [f"{low:.3g} to {high:.3g}" for low, high in self.spacing_seen]
                said = seen[0] if len(set(seen)) == 1 else " x ".join(seen)
                raise UserError(
                    f"{scan.path}: has voxels of {own} mm, the model was trained on {said} mm (along left-right, "
                    "front-back, up-down); resample the scan, or train with `spacing`"
                )
        check_not_constant(scan)
        self._check_range(scan)
        return self.preparation.image(scan, lazy)

    def _check_range(self, scan: Scan) -> None:
        """Refuse intensities in another unit than the training's where that matters, note those far from them."""
        for i, (channel, known) in enumerate(zip(scan.image, self.channels)):
            if known.range is None:
                continue
            low, high = quantiles(channel)
            spread = float(channel.max() - channel.min())  # what is cut off as padding may be air of one value
            (least, most), wide = known.range, known.range[1] - known.range[0]
            what = f"channel {i + 1} has" if len(scan.image) > 1 else "has"
            said = f"{what} intensities of {low:.4g} to {high:.4g}, the model was trained on {least:.4g} to {most:.4g}"
            absolute = self.recipe.window is not None or known.intensity in ABSOLUTE
            if absolute and (high <= least or low >= most or spread < known.width / 20):
                raise UserError(f"{scan.path}: {said}; convert it to the unit of the training data (CT: Hounsfield)")
            if low < least - wide / 2 or high > most + wide / 2 or spread < known.width / 4:
                scan.notes += [note] if (note := f"{said}; results may be wrong") not in scan.notes else []

    @contextmanager
    def probabilities(self, image: Tensor, *, in_memory: bool = True, **options: Any) -> Iterator[np.ndarray]:
        """Probabilities (K, *S) of a prepared image, while in use in memory or in a temporary file."""
        predictor, roi, settings = self._windows(image, **options)
        shape = (len(self.values), *image.shape[1:])
        with temporary_folder() as folder:
            if in_memory:
                whole = np.empty(shape, np.float32)
            else:
                whole = np.memmap(folder / "scores", np.float32, "w+", shape=shape)
            for region, scores in window_scores(image, predictor, roi, **settings):
                if self.recipe.binary:
                    scores = F.pad(scores, (0, 0) * (scores.ndim - 1) + (1, 0))  # sigmoid(s) = softmax((0, s))
                whole[(slice(None), *region)] = scores.softmax(0).cpu().numpy()
            yield whole

    @contextmanager
    def scores(self, image: Tensor, *, in_memory: bool = True, **options: Any) -> Iterator[np.ndarray]:
        """Logits (K, *S) of a prepared image, while in use in memory or in a temporary file."""
        predictor, roi, settings = self._windows(image, **options)
        whole: np.ndarray | None = None
        with temporary_folder() as folder:
            for region, scores in window_scores(image, predictor, roi, **settings):
                if whole is None:
                    shape = (len(scores), *image.shape[1:])
                    new = np.empty if in_memory else lambda s, t: np.memmap(folder / "scores", t, "w+", shape=s)
                    whole = new(shape, np.float32)
                whole[(slice(None), *region)] = scores.cpu().numpy()
            assert whole is not None
            yield whole

    def _windows(
        self, image: Tensor, *, overlap: float = 0.5, mirror: bool = False, device: str = "cpu", **options: Any
    ) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
        network, dims = self.network.to(device), len(self.recipe.roi)
        flips = tuple(range(dims)) if mirror else ()
        settings = {"overlap": overlap, "flips": flips, "device": device, "layout": self.recipe.windows, **options}
        if image.ndim - 1 == dims:
            return network, self.recipe.roi, settings
        return _Planes(network), (*self.recipe.roi, 1), {**settings, "batch_size": 8}

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `model.json` to `folder`."""
        content = {
            "recipe": dataclasses.asdict(self.recipe),
            "labels": {str(k): v for k, v in self.labels.items()},
            "in_channels": self.in_channels,
            "crf": self.crf,
            "spacing_seen": self.spacing_seen,
            "channels": [channel.as_dict() for channel in self.channels],
            "regions": self.regions,
            "order": self.order,
        }
        with writing(folder, "segmenter", content, self.trained_on) as place:
            save_state_dict(self.network, place / "model.safetensors")
        return Path(folder) / "model.json"

    @classmethod
    def load(cls, folder: str | Path) -> "Segmenter":
        """Read what `save` wrote; raises UserError where it is not there or does not fit."""
        folder = Path(folder)
        content = read(folder, "segmenter")
        description, weights = folder / KINDS["segmenter"], folder / "model.safetensors"
        check_sizes(
            description, [content.get("in_channels"), content.get("recipe")], weights, lambda name: name != "seed"
        )
        with reading(description, "holds no trained model", "copy the folder again"):
            recipe = Recipe(**content["recipe"])
            labels = {int(k): str(v) for k, v in content["labels"].items()}
            regions = {str(name): tuple(map(int, values)) for name, values in content.get("regions", {}).items()}
            order = tuple(map(int, content.get("order", ())))
            segmenter = cls.create(recipe, labels, content["in_channels"], fetch=False, regions=regions, order=order)
            segmenter.channels = [Channel.read(channel) for channel in content.get("channels", ())]
            segmenter.crf, seen = content.get("crf"), content.get("spacing_seen")
            old = seen is not None and not isinstance(seen[0], list)  # once one range for all axes
            segmenter.spacing_seen = [list(seen or ())] * 3 if old else seen
            segmenter.trained_on = trained_on(folder)
        with reading(weights, "does not fit its description", "copy the folder again"):
            load_state_dict(segmenter.network, read_state_dict(weights))
        return segmenter


class RegionPainter:
    """From logits (K, *S) of regions to the index of a label value; see `Segmenter`.

    With `channel` to (1, *S), as MONAI's transforms pass images on.
    """

    def __init__(
        self,
        values: Sequence[int],
        regions: Mapping[str, Sequence[int]],
        order: Sequence[int],
        channel: bool = False,
    ) -> None:
        self.channel = channel
        if len(regions) > 16:
            raise UserError(f"there are {len(regions)} regions; up to 16 are taken")
        codes = [sum(1 << k for k, inside in enumerate(regions.values()) if value in inside) for value in values]
        painted = [list(values).index(value) for value in order]
        table = []
        for code in range(1 << len(regions)):
            last = next((painted[k] for k in reversed(range(len(painted))) if code >> k & 1), 0)
            table.append(codes.index(code) if code in codes else last)
        self.table = torch.tensor(table)

    def __call__(self, scores: Tensor) -> Tensor:
        weights = (1 << torch.arange(len(scores), device=scores.device)).view(-1, *[1] * (scores.ndim - 1))
        return self.table.to(scores.device)[((scores > 0) * weights).sum(0, keepdim=self.channel)]


class _Planes(nn.Module):
    """A 2-D network as one over volumes of a single plane: (B, C, H, W, 1) to (B, K, H, W, 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[..., 0])[..., None]
