"""Finding the cases of a folder: public data sets by their layout, any pair of image and label folders, loose scans."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.medical.scans import NIFTI, NRRD, PICTURES, Scan, read_labels, read_scan


@dataclass(frozen=True)
class Case:
    """One image with its label map. `group` is the patient: cases of one group never part over a split.

    `images` are the files of the channels (one for most data); `part` is "train", "test" or "".
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str = ""
    part: str = ""


@dataclass
class Collection:
    """The cases of a folder, what their label values mean, and how the data set stores them.

    `binary`: masks are grey pictures, foreground from 128 on. `ignore`: a label value that does not count.
    """

    layout: str
    cases: list[Case]
    labels: dict[int, str] = field(default_factory=dict)
    binary: bool = False
    ignore: int | None = None

    def read(self, case: Case) -> tuple[Scan, np.ndarray | None]:
        """The scan of a case, channels stacked, and its labels on the same grid (None where it has none)."""
        if case.images[0].suffix in (".npz", ".h5"):
            return _read_arrays(case)
        scan = read_scan(case.images[0])
        for path in case.images[1:]:
            other = read_scan(path)
            if other.shape != scan.shape:
                raise UserError(f"{path}: shape {other.shape} differs from {case.images[0].name}'s {scan.shape}")
            scan.image = np.concatenate([scan.image, other.image])
        labels = None if case.label is None else read_labels(case.label, None if self.binary else scan)
        if labels is not None and self.binary:
            if labels.shape != scan.shape:
                raise UserError(f"{case.label}: shape {labels.shape} differs from its image's {scan.shape}")
            labels = (labels > (127 if labels.max(initial=0) > 1 else 0)).astype(np.int32)
        if labels is not None and self.labels:
            allowed = {0, *self.labels, *([] if self.ignore is None else [self.ignore])}
            if unknown := sorted(set(np.unique(labels).tolist()) - allowed):
                raise UserError(f"{case.label}: holds labels {unknown} outside the declared ones {sorted(self.labels)}")
        return scan, labels


def find_cases(folder: str | Path) -> Collection:
    """Recognise the layout of `folder` and list its cases; see `LAYOUTS`.

    Raises UserError where nothing in it can be read here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for layout in LAYOUTS:
        if (found := layout(folder)) is not None and found.cases:
            return found
    raise UserError(
        f"{folder}: no scans found; expected one of the layouts nnU-Net, Medical Segmentation Decathlon, ACDC, "
        "Synapse, Pascal VOC, CHASE_DB1, DRIVE, ISIC, Kvasir or CVC, folders `images` and `labels`, or scans"
    )


def make_splits(
    cases: Sequence[Case], folds: int = 5, seed: int = 0, path: str | Path | None = None
) -> list[dict[str, list[str]]]:
    """Cross-validation splits by group (patient), never by slice; written to `path` as JSON where given.

    Raises UserError for fewer groups than folds.
    """
    groups = sorted({case.group or case.name for case in cases})
    if folds < 2 or folds > len(groups):
        raise UserError(f"{folds} folds need at least 2 folds and as many patients; there are {len(groups)}")
    order = np.random.default_rng(seed).permutation(len(groups))
    held = [{groups[i] for i in part} for part in np.array_split(order, folds)]
    splits = [
        {
            "train": [c.name for c in cases if (c.group or c.name) not in out],
            "validation": [c.name for c in cases if (c.group or c.name) in out],
        }
        for out in held
    ]
    if path is not None:
        write_json(path, splits)
    return splits


def check_split(cases: Sequence[Case], train: Iterable[str], validation: Iterable[str]) -> None:
    """Raise UserError where a patient has cases on both sides, or a name is unknown."""
    by_name = {case.name: case.group or case.name for case in cases}
    train, validation = list(train), list(validation)
    if unknown := [name for name in (*train, *validation) if name not in by_name]:
        raise UserError(f"the split names cases that are not there: {', '.join(unknown[:5])}")
    both = {by_name[name] for name in train} & {by_name[name] for name in validation}
    if both:
        raise UserError(f"patients on both sides of the split: {', '.join(sorted(both)[:5])}; split by patient")


# ---------------------------------------------------------------------------------------------------------------------

READABLE = (*NIFTI, *NRRD, *PICTURES)


def _stem(path: Path) -> str:
    name = path.name
    ending = next((e for e in READABLE if name.lower().endswith(e)), path.suffix)
    return name[: len(name) - len(ending)]


def _readable(folder: Path, recursive: bool = False) -> list[Path]:
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(p for p in found if p.is_file() and p.name.lower().endswith(READABLE) and not p.name.startswith("."))


def _dataset_json(folder: Path) -> Collection | None:
    """nnU-Net raw and Medical Segmentation Decathlon: `dataset.json` beside imagesTr, labelsTr, imagesTs."""
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "channel_names" in content:
            channels, ending = len(content["channel_names"]), content["file_ending"]
            labels = {int(v): k for k, v in content["labels"].items() if isinstance(v, int)}
        else:
            labels = {int(k): v for k, v in content["labels"].items()}
            listed = content["training"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no dataset.json of nnU-Net or the Decathlon ({error!r})") from error
    if "channel_names" not in content:
        cases = [
            Case(_stem(Path(p["image"])), (folder / p["image"],), folder / p["label"], _stem(Path(p["image"])), "train")
            for p in listed
        ]
        tests = [p if isinstance(p, str) else p["image"] for p in content.get("test", [])]
        cases += [Case(_stem(Path(p)), (folder / p,), None, _stem(Path(p)), "test") for p in tests]
        return Collection("Medical Segmentation Decathlon", cases, labels)
    cases = []
    for part, images, targets in (("train", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs")):
        first = sorted((folder / images).glob(f"*_0000{ending}")) if (folder / images).is_dir() else []
        for image in first:
            name = image.name.removesuffix(f"_0000{ending}")
            files = tuple(image.with_name(f"{name}_{i:04d}{ending}") for i in range(channels))
            label = folder / targets / f"{name}{ending}"
            cases.append(Case(name, files, label if part == "train" or label.is_file() else None, name, part))
    return Collection("nnU-Net", cases, labels, ignore=content["labels"].get("ignore"))


def _acdc(folder: Path) -> Collection | None:
    cases = []
    for label in sorted(folder.rglob("patient*_frame*_gt.nii.gz")):
        name = label.name.removesuffix("_gt.nii.gz")
        number = int(re.match(r"patient(\d+)", name)[1])  # type: ignore[index]
        part = "train" if number <= 100 else "test"
        cases.append(Case(name, (label.with_name(f"{name}.nii.gz"),), label, f"patient{number:03d}", part))
    return Collection("ACDC", cases, {1: "right ventricle", 2: "myocardium", 3: "left ventricle"})


SYNAPSE = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")


def _synapse(folder: Path) -> Collection | None:
    slices, volumes = sorted(folder.glob("train_npz/*.npz")), sorted(folder.glob("test_vol_h5/*.h5"))
    group = lambda p: re.match(r"(case\d+)", p.name)[1]  # type: ignore[index]  # noqa: E731
    cases = [
        Case(p.name.split(".")[0], (p,), p, group(p), part)
        for part, paths in (("train", slices), ("test", volumes))
        for p in paths
        if re.match(r"case\d+", p.name)
    ]
    return Collection("Synapse (TransUNet)", cases, dict(enumerate(SYNAPSE, 1)))


VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog"),
    *("horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)


def _voc(folder: Path) -> Collection | None:
    root = next(
        (p for p in (folder, folder / "VOC2012", folder / "VOCdevkit/VOC2012") if (p / "JPEGImages").is_dir()), None
    )
    if root is None:
        return None
    cases = []
    for part, name in (("train", "train"), ("test", "val")):
        listed = root / "ImageSets/Segmentation" / f"{name}.txt"
        for stem in listed.read_text().split() if listed.is_file() else ():
            label = root / "SegmentationClass" / f"{stem}.png"
            cases.append(Case(stem, (root / "JPEGImages" / f"{stem}.jpg",), label, stem, part))
    return Collection("Pascal VOC", cases, dict(enumerate(VOC, 1)), ignore=255)


def _chasedb1(folder: Path) -> Collection | None:
    cases = [
        # left and right eye of a child share a group
        Case(p.stem, (p,), p.with_name(f"{p.stem}_1stHO.png"), p.stem[:-1])
        for p in sorted(folder.glob("Image_*.jpg"))
        if p.with_name(f"{p.stem}_1stHO.png").is_file()
    ]
    return Collection("CHASE_DB1", cases, {1: "vessel"}, binary=True)


def _drive(folder: Path) -> Collection | None:
    cases = []
    for part, name in (("train", "training"), ("test", "test")):
        for image in sorted((folder / name / "images").glob("*.tif")):
            number = image.name.split("_")[0]
            label = next(iter(sorted((folder / name / "1st_manual").glob(f"{number}_manual1.*"))), None)
            cases.append(Case(image.stem, (image,), label, number, part))
    return Collection("DRIVE", cases, {1: "vessel"}, binary=True)


def _isic(folder: Path) -> Collection | None:
    images = {p.stem: p for p in sorted(folder.rglob("ISIC_*.jpg"))}
    cases = [
        Case(name, (images[name],), label, name)
        for label in sorted(folder.rglob("ISIC_*_segmentation.png"))
        if (name := label.stem.removesuffix("_segmentation")) in images
    ]
    return Collection("ISIC", cases, {1: "lesion"}, binary=True)


def _polyps(folder: Path) -> Collection | None:
    for images, masks, layout in (("images", "masks", "Kvasir-SEG"), ("Original", "Ground Truth", "CVC-ClinicDB")):
        if (folder / images).is_dir() and (folder / masks).is_dir():
            targets = {_stem(p): p for p in _readable(folder / masks)}
            cases = [
                Case(_stem(p), (p,), targets[_stem(p)], _stem(p))
                for p in _readable(folder / images)
                if _stem(p) in targets
            ]
            return Collection(layout, cases, {1: "polyp"}, binary=True)
    return None


def _pairs(folder: Path) -> Collection | None:
    if not (folder / "images").is_dir() or not (folder / "labels").is_dir():
        return None
    targets = {_stem(p): p for p in _readable(folder / "labels")}
    cases = [Case(_stem(p), (p,), targets.get(_stem(p)), _stem(p)) for p in _readable(folder / "images")]
    declared: dict[int, str] = {}
    if (names := folder / "labels.json").is_file():
        declared = {int(k): str(v) for k, v in json.loads(names.read_text(encoding="utf-8")).items()}
    return Collection("images and labels", cases, declared)


def _loose(folder: Path) -> Collection | None:
    cases = [Case(_name(p, folder), (p,), None, _name(p, folder)) for p in _readable(folder, recursive=True)]
    series = sorted({p.parent for p in folder.rglob("*.dcm")} | {p.parent for p in folder.rglob("IM*") if not p.suffix})
    cases += [Case(_name(p, folder), (p,), None, _name(p, folder)) for p in series if p.is_dir()]
    return Collection("scans without labels", cases)


def _name(path: Path, folder: Path) -> str:
    relative = path.relative_to(folder)
    stem = _stem(path) if path.is_file() else path.name
    return "/".join((*relative.parts[:-1], stem)) if relative.parts else path.resolve().name


LAYOUTS: tuple[Callable[[Path], Collection | None], ...] = (
    _dataset_json,
    _acdc,
    _synapse,
    _voc,
    _chasedb1,
    _drive,
    _isic,
    _polyps,
    _pairs,
    _loose,
)
"""Recognisers, tried in this order."""


def _read_arrays(case: Case) -> tuple[Scan, np.ndarray]:
    path = case.images[0]
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                content: Mapping[str, np.ndarray] = {k: arrays[k] for k in arrays.files}
        else:
            with h5py.File(path) as file:
                content = {k: np.asarray(file[k]) for k in ("image", "label")}
        image = content["image"] if "image" in content else content["img"]
        labels = np.rint(content["label"]).astype(np.int32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, or without image and label ({error})") from error
    if labels.shape != image.shape:
        raise UserError(f"{path}: label {labels.shape} and image {image.shape} differ in shape")
    return Scan(path, image.astype(np.float32)[None], None, "array"), labels
