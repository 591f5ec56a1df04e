"""From scans to label maps: preparation, networks by name, training, and a trained segmenter in a folder."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import monai.networks.nets
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.medical.datasets import Case, Collection, check_split
from nearfar.medical.deeplab import DeepLabV2, DeepLabV3
from nearfar.medical.guided_attention import GuidedAttention
from nearfar.medical.inference import average_scores, segment
from nearfar.medical.losses import SegmentationLoss
from nearfar.medical.macmd import MACMD
from nearfar.medical.metrics import score_case, summarise
from nearfar.medical.scans import Scan, resize_labels
from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_softmax

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "deeplab_v2": DeepLabV2,
    "deeplab_v3": DeepLabV3,
    "deeplab_v3plus": lambda *a, **k: DeepLabV3(*a, decoder=True, **k),
    "guided_attention": GuidedAttention,
    "macmd": MACMD,
}


def create_network(name: str, num_classes: int, in_channels: int, dims: int, settings: Mapping[str, Any]) -> nn.Module:
    """A network by name: ours (`NETWORKS`), `smp.Unet` ... (2-D), or `monai.DynUNet`, `monai.SwinUNETR` ...

    `settings` go to its constructor. MONAI's DynUNet without settings has the shape that nnU-Net would start from.
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
            options = dict(settings)
            if kind == "DynUNet" and not options:
                options = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3}
            if kind == "BasicUNet" and not options:
                options = {"features": (16, 16, 32, 64, 128, 16)}
            build = getattr(monai.networks.nets, kind)
            return build(spatial_dims=dims, in_channels=in_channels, out_channels=num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"network {name}: {str(error).splitlines()[0]}") from error
    raise UserError(f"network {name}: unknown; there are {', '.join(NETWORKS)}, smp.<architecture>, monai.<network>")


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before a network sees it, and undone to its labels.

    Volumes are turned to RAS+ (axes permuted and flipped, nothing resampled). Then `spacing` (mm, None keeps the
    scan's), then intensities: `window` (low, high) clips and maps to 0..1, for CT in HU; without it each channel is
    brought to mean 0, deviation 1 over its nonzero voxels, or all voxels where none is zero. `planes`: a 2-D network
    goes over a volume slice by slice along the last axis.
    """

    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    planes: bool = False

    def image(self, scan: Scan) -> Tensor:
        """(C, *S) float32, ready for the network."""
        image = torch.from_numpy(np.ascontiguousarray(scan.canonical()))
        if self.spacing is not None and scan.affine is not None:
            mode = "trilinear" if image.ndim == 4 else "bilinear"
            image = F.interpolate(image[None], self.size(scan), mode=mode, align_corners=False)[0]
        if self.window is not None:
            low, high = self.window
            return ((image.clamp(low, high) - low) / (high - low)).contiguous()
        out = torch.empty_like(image)
        for i, channel in enumerate(image):
            inside = channel[channel != 0]
            inside = inside if len(inside) > 1 else channel.flatten()
            out[i] = (channel - inside.mean()) / inside.std().clamp_min(1e-6)
        return out

    def size(self, scan: Scan) -> tuple[int, ...]:
        """The prepared grid's size."""
        canonical = scan.canonical().shape[1:]
        if self.spacing is None or scan.affine is None:
            return canonical
        if len(self.spacing) != len(canonical):
            raise UserError(f"{scan.path}: has {len(canonical)} axes, the spacing {self.spacing} {len(self.spacing)}")
        pairs = zip(canonical, scan.canonical_spacing(), self.spacing)
        return tuple(max(1, round(n * old / new)) for n, old, new in pairs)

    def labels(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the scan on the prepared grid."""
        return resize_labels(np.ascontiguousarray(scan.to_canonical(labels)), self.size(scan))

    def restore(self, labels: np.ndarray, scan: Scan) -> np.ndarray:
        """A label map of the prepared grid on the scan's own."""
        return scan.from_canonical(resize_labels(labels, scan.canonical().shape[1:]))


@dataclass
class Recipe:
    """How a network is trained. Patches of `roi` voxels, a share `foreground` of them centred on a labelled voxel."""

    network: str = "monai.BasicUNet"
    settings: dict[str, Any] = field(default_factory=dict)
    roi: tuple[int, ...] = (64, 64, 64)
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    loss: str = "dice_ce"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 2
    max_epochs: int = 50
    patches_per_epoch: int = 100
    foreground: float = 0.5
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.roi = tuple(self.roi)
        if len(self.roi) not in (2, 3) or min(self.roi) < 1:
            raise ValueError(f"roi is {self.roi}; it must be two or three positive numbers")
        if self.optimizer not in ("adamw", "adam", "sgd"):
            raise ValueError(f"optimizer is {self.optimizer!r}; allowed are adamw, adam, sgd")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground is {self.foreground}; it must lie between 0 and 1")


RECIPES: dict[str, dict[str, Any]] = {
    "macmd": {
        "network": "macmd", "roi": (224, 224), "loss": "transunet", "lr": 1e-3, "weight_decay": 1e-3,
        "batch_size": 16, "max_epochs": 150,
    },
    "guided_attention": {
        "network": "guided_attention", "roi": (256, 256), "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0,
        "batch_size": 8, "max_epochs": 500,
    },
    "deeplab_v2": {
        "network": "deeplab_v2", "roi": (321, 321), "loss": "cross_entropy", "optimizer": "sgd", "lr": 2.5e-4,
        "weight_decay": 5e-4, "batch_size": 10,
    },
    "nnunet": {
        "network": "monai.DynUNet", "roi": (96, 96, 96), "loss": "nnunet", "optimizer": "sgd", "lr": 1e-2,
        "weight_decay": 3e-5, "batch_size": 2, "max_epochs": 1000, "patches_per_epoch": 500, "foreground": 0.33,
    },
    "small": {},
}  # fmt: skip
"""The papers' settings by name, as far as this engine has them; `small` is a U-Net that trains in minutes."""


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
        self.labels = dict(labels)
        self.values = list(values) if values is not None else [0, *(v for v in self.labels if v)]
        self.preparation = Preparation(recipe.spacing, recipe.window, planes=len(recipe.roi) == 2)

    @classmethod
    def create(cls, recipe: Recipe, labels: Mapping[int, str], in_channels: int) -> "Segmenter":
        """A segmenter with fresh weights. Class k of the network is the k-th label value."""
        classes = 1 + len([v for v in labels if v])
        network = create_network(recipe.network, classes, in_channels, len(recipe.roi), recipe.settings)
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

        `mirror` averages over the flips of all axes. With `crf` the averaged probabilities of all classes are held at
        once and refined by the image; without it classes are decided window by window within `memory` bytes.
        """
        if len(scan.image) != self.in_channels:
            raise UserError(f"{scan.path}: has {len(scan.image)} channels, the model takes {self.in_channels}")
        image, network = self.preparation.image(scan), self.network.to(device)
        dims = len(self.recipe.roi)
        if image.ndim - 1 == dims:
            predictor, roi = network, self.recipe.roi
        elif image.ndim - 1 == 3 and dims == 2:
            predictor, roi = _Planes(network), (*self.recipe.roi, 1)
        else:
            raise UserError(f"{scan.path}: has {image.ndim - 1} axes, the model takes {dims}")
        options: dict[str, Any] = {
            "overlap": overlap,
            "flips": tuple(range(dims)) if mirror else (),
            "memory": memory,
            "device": device,
            "progress": progress,
            "batch_size": 8 if isinstance(predictor, _Planes) else 1,
        }
        if crf is None:
            decided = segment(image, predictor, roi, **options)
        else:
            scores = average_scores(image, predictor, roi, **options)
            unary, spacing = unary_from_softmax(scores.softmax(0)[None]), self._spacing(scan)
            decided = crf.to(device)(unary.to(device), _to_bytes(image)[None].to(device), spacing)[0].argmax(0).cpu()
        values = np.asarray(self.values, np.int32)[decided.numpy()]
        return self.preparation.restore(values, scan)

    def _spacing(self, scan: Scan) -> tuple[float, ...]:
        return self.recipe.spacing or scan.canonical_spacing()

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `model.json` to `folder`."""
        folder = Path(folder)
        save_state_dict(self.network, folder / "model.safetensors")
        content = {
            "recipe": dataclasses.asdict(self.recipe),
            "labels": {str(k): v for k, v in self.labels.items()},
            "in_channels": self.in_channels,
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


def _to_bytes(image: Tensor) -> Tensor:
    """Each channel stretched to 0..255, the scale of the CRF's colour deviation."""
    flat = image.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    view = (-1, *[1] * (image.ndim - 1))
    return 255 * (image - low.view(view)) / (high - low).clamp_min(1e-6).view(view)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Patches(Dataset):
    """Random patches of prepared cases; deterministic where the generators are seeded."""

    def __init__(self, items: Sequence[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
        self.items, self.recipe = list(items), recipe
        self.places = [torch.nonzero(labels > 0) for _, labels in self.items]
        if not any(len(places) for places in self.places):
            raise UserError("the training cases hold no labelled voxel: there is nothing to learn")

    def __len__(self) -> int:
        return self.recipe.patches_per_epoch

    def __getitem__(self, _: int) -> tuple[Tensor, Tensor]:
        number = int(torch.randint(len(self.items), ()))
        (image, labels), places = self.items[number], self.places[number]
        roi = [*self.recipe.roi, *[1] * (labels.ndim - len(self.recipe.roi))]
        pads = [max(0, r - n) for r, n in zip(roi, labels.shape)]
        centred = len(places) and float(torch.rand(())) < self.recipe.foreground
        centre = places[int(torch.randint(len(places), ()))] if centred else None
        where = []
        for axis, (r, n) in enumerate(zip(roi, labels.shape)):
            room = max(0, n - r)
            start = int(torch.randint(room + 1, ())) if centre is None else int(centre[axis]) - r // 2
            where.append(slice(min(max(start, 0), room), min(max(start, 0), room) + min(r, n)))
        image, labels = image[(slice(None), *where)], labels[tuple(where)]
        if any(pads):
            both = [v for p in reversed(pads) for v in (p // 2, p - p // 2)]
            image, labels = F.pad(image, both), F.pad(labels, both)
        if labels.ndim > len(self.recipe.roi):
            image, labels = image[..., 0], labels[..., 0]
        if self.recipe.flip:
            axes = [a for a in range(labels.ndim) if float(torch.rand(())) < 0.5]
            image, labels = image.flip([a + 1 for a in axes]), labels.flip(axes)
        return image.contiguous(), labels.contiguous().long()


class _Module(pl.LightningModule):
    def __init__(self, segmenter: Segmenter, steps: int, ignore: int | None) -> None:
        super().__init__()
        self.network, self.recipe, self.steps = segmenter.network, segmenter.recipe, steps
        self.loss = SegmentationLoss(segmenter.recipe.loss, ignore=ignore)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        outputs = self.network(images)
        if isinstance(outputs, Tensor) and outputs.ndim == labels.ndim + 2:  # MONAI's deep supervision stacks heads
            outputs = list(outputs.unbind(1))
        loss = self.loss(outputs, labels)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups: Any = self.network.parameters()
        if hasattr(self.network, "parameter_groups"):
            groups = list(self.network.parameter_groups(recipe.lr, recipe.weight_decay))
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer]
        extra = {"momentum": 0.9, "nesterov": True} if recipe.optimizer == "sgd" else {}
        optimizer = kind(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, **extra)
        schedule = warmup_cosine(optimizer, min(10, self.steps // 10 + 1), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_segmenter(
    collection: Collection,
    recipe: Recipe,
    folder: str | Path,
    *,
    train_cases: Sequence[Case],
    validation_cases: Sequence[Case] = (),
    show_progress: bool = False,
    **trainer_options: Any,
) -> tuple[Segmenter, list[dict[str, Any]]]:
    """Train on `train_cases`; returns the segmenter and the summary of scores on `validation_cases`.

    The folder gets the run's record (see `nearfar.core.training.train`; an interrupted run goes on), the model and
    `validation.json`. A patient on both sides is refused.
    """
    folder = Path(folder)
    check_split(collection.cases, [c.name for c in train_cases], [c.name for c in validation_cases])
    if not collection.labels:
        raise UserError("the data do not say what their label values mean; declare them")
    values = [0, *(v for v in collection.labels if v)]
    preparation = Preparation(recipe.spacing, recipe.window, planes=len(recipe.roi) == 2)
    prepared, channels = [], set()
    for case in train_cases:
        scan, labels = collection.read(case)
        if labels is None:
            raise UserError(f"{case.name}: has no labels to train on")
        index = np.searchsorted(np.sort(values), preparation.labels(labels, scan))
        index = np.argsort(values)[np.minimum(index, len(values) - 1)]
        if collection.ignore is not None:
            index = np.where(preparation.labels(labels, scan) == collection.ignore, collection.ignore, index)
        prepared.append((preparation.image(scan), torch.from_numpy(index.astype(np.int16))))
        channels.add(len(scan.image))
    if len(channels) != 1:
        raise UserError(f"the training cases differ in their number of channels: {sorted(channels)}")
    pl.seed_everything(recipe.seed, verbose=False)
    segmenter = Segmenter.create(recipe, collection.labels, channels.pop())
    loader = data_loader(Patches(prepared, recipe), recipe.batch_size, shuffle=True, seed=recipe.seed)
    module = _Module(segmenter, recipe.max_epochs * len(loader), collection.ignore)
    train(
        module,
        loader,
        max_epochs=recipe.max_epochs,
        seed=recipe.seed,
        folder=folder / "run",
        settings={**dataclasses.asdict(recipe), "cases": [c.name for c in train_cases]},
        show_progress=show_progress,
        **trainer_options,
    )
    segmenter.network.eval()
    segmenter.save(folder)
    rows = []
    for case in validation_cases:
        scan, labels = collection.read(case)
        if labels is not None:
            scored = score_case(segmenter(scan), labels, collection.labels, scan.spacing)
            rows += [{"case": case.name, **row} for row in scored]
    summary = summarise(rows) if rows else []
    write_json(folder / "validation.json", summary)
    return segmenter, summary


def search_crf(
    items: Sequence[tuple[Tensor, Tensor, Tensor]], grid: Sequence[Mapping[str, Any]], num_classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The CRF settings of `grid` with the best mean Dice over (probabilities (K, *S), image (C, *S), labels (*S)).

    Returns the best settings (constructor arguments of `DenseCRF`) and a row of scores for each of the grid. The first
    row is the result without a CRF. Use validation cases: settings chosen on the test set are not honest.
    """
    names = {k: str(k) for k in range(1, num_classes)}

    def mean_dice(label_maps: Sequence[Tensor]) -> float:
        rows = [
            {"case": i, "label": r["label"], "dice": r["dice"]}
            for i, (found, (_, _, truth)) in enumerate(zip(label_maps, items))
            for r in score_case(found.numpy(), truth.numpy(), names)
        ]
        return summarise(rows)[-1]["dice"]

    rows: list[dict[str, Any]] = [{"settings": None, "dice": mean_dice([p.argmax(0) for p, _, _ in items])}]
    for settings in grid:
        crf = DenseCRF(**settings)
        maps = [crf(unary_from_softmax(p[None]), image[None].float())[0].argmax(0) for p, image, _ in items]
        rows.append({"settings": dict(settings), "dice": mean_dice(maps)})
    best = max(rows[1:], key=lambda row: row["dice"])
    return best["settings"], rows
