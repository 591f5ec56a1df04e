"""From scans to label maps: preparation, networks by name, training, and a trained segmenter in a folder."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import temporary_folder
from nearfar.core.model_folder import KINDS, TrainedOn, read, trained_on, writing
from nearfar.core.reading import check_sizes, reading
from nearfar.medical.data.scans import Scan
from nearfar.medical.inference import WINDOW_MEMORY, segment, window_scores
from nearfar.medical.networks import create_network
from nearfar.medical.preparation import Preparation
from nearfar.medical.recipe import Recipe
from nearfar.medical.refinement import refine, to_bytes
from nearfar.ops.graph.dense_crf import DenseCRF


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
        self.trained_on = TrainedOn()
        self.labels = dict(labels)
        self.values = list(values) if values is not None else [0, *(v for v in self.labels if v)]
        self.preparation = Preparation(recipe.spacing, recipe.window, recipe.intensity, recipe.resize)

    @classmethod
    def create(cls, recipe: Recipe, labels: Mapping[int, str], in_channels: int, *, fetch: bool = True) -> "Segmenter":
        """A segmenter with fresh weights, or with fetched ones where the recipe asks for them and `fetch` is set.

        Class k of the network is the k-th label value.
        """
        classes = 1 + len([v for v in labels if v])
        if recipe.binary and classes != 2:
            raise UserError(f"loss {recipe.loss} is for one label, the data have {classes - 1}")
        outputs = 1 if recipe.binary else classes
        network = create_network(recipe.network, outputs, in_channels, len(recipe.roi), recipe.settings, fetch=fetch)
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
        options: dict[str, Any] = {"overlap": overlap, "mirror": mirror, "device": device, "progress": progress}
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
        content = {
            "recipe": dataclasses.asdict(self.recipe),
            "labels": {str(k): v for k, v in self.labels.items()},
            "in_channels": self.in_channels,
            "crf": self.crf,
            "spacing_seen": self.spacing_seen,
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
            segmenter = cls.create(recipe, labels, content["in_channels"], fetch=False)
            segmenter.crf, segmenter.spacing_seen = content.get("crf"), content.get("spacing_seen")
            segmenter.trained_on = trained_on(folder)
        with reading(weights, "does not fit its description", "copy the folder again"):
            load_state_dict(segmenter.network, read_state_dict(weights))
        return segmenter


class _Planes(nn.Module):
    """A 2-D network as one over volumes of a single plane: (B, C, H, W, 1) to (B, K, H, W, 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[..., 0])[..., None]
