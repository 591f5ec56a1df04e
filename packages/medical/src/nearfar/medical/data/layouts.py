"""The usual layouts of segmentation data sets."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom.misc

from nearfar.core.errors import UserError, some
from nearfar.core.reading import read_json, reading
from nearfar.medical.data.cases import Case, Collection
from nearfar.medical.data.groups import teller
from nearfar.medical.data.scans import NIFTI, NRRD, PICTURES


def find_cases(folder: str | Path) -> Collection:
    """Recognize the layout of `folder` and list its cases; see `LAYOUTS`.

    Raises UserError where nothing in it can be read here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for layout in LAYOUTS:
        if (found := layout(folder)) is not None and found.cases:
            counts = Counter((case.part, case.name) for case in found.cases)
            if twice := [name for (_, name), count in counts.items() if count > 1]:
                raise UserError(f"{folder}: has several cases of one name ({some(twice)}); give each its own")
            return _by_patient(found) if layout in (_dataset_json, _pairs) else found
    raise UserError(
        f"{folder}: no scans found; expected one of the layouts nnU-Net, Medical Segmentation Decathlon, ACDC, "
        "Synapse, BTCV, BraTS, CHAOS, Pascal VOC, CHASE_DB1, DRIVE, ISIC, BUSI, Kvasir or CVC, folders `images` and "
        "`labels`, or scans"
    )


BINARY = ((0, 127, 0), (128, 255, 1))
"""Grey values of masks with one label."""

READABLE = (*NIFTI, *NRRD, *PICTURES)


def stem(path: Path) -> str:
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
    with reading(path, "is no dataset.json of nnU-Net or the Decathlon", "mend it or take it out"):
        content = read_json(path, "a dataset.json")
        if "channel_names" in content:
            channels, ending = len(content["channel_names"]), content["file_ending"]
            if not re.fullmatch(r"(\.\w+)+", ending) or channels < 1:
                raise ValueError(f"channel_names or file_ending are {content['channel_names']!r} and {ending!r}")
            if not ending.lower().endswith(READABLE):
                raise UserError(f"{path}: its scans end in {ending}, which is not read here; convert them to NIfTI")
            about = labels_json(path, content) | {"channel_names": _in_order(content["channel_names"])}
        else:
            names = _in_order(content.get("modality", {"0": ""}))
            channels = len(names)
            labels = {int(k): str(v) for k, v in content["labels"].items()}
            cases = [
                Case(
                    stem(Path(p["image"])), (folder / p["image"],), folder / p["label"], stem(Path(p["image"])), "train"
                )
                for p in content["training"]
            ]
            tests = [p if isinstance(p, str) else p["image"] for p in content.get("test", [])]
            cases += [Case(stem(Path(p)), (folder / p,), None, stem(Path(p)), "test") for p in tests]
            if not all(str(place).isprintable() for case in cases for place in case.images):
                raise ValueError("a file's name has control characters")
            return Collection("Medical Segmentation Decathlon", cases, labels, channels=channels, channel_names=names)
        if "dataset" in content:  # each case by its files, which may lie anywhere
            cases = [
                Case(name, tuple(folder / p for p in found["images"]), folder / found["label"], name, "train")
                for name, found in content["dataset"].items()
            ]
            if wrong := next((c for c in cases if len(c.images) != channels), None):
                raise UserError(f"{path}: {wrong.name} has {len(wrong.images)} images for {channels} channels")
            if not all(str(place).isprintable() for case in cases for place in case.images):
                raise ValueError("a file's name has control characters")
            return Collection("nnU-Net", cases, **about)
    cases = []
    for part, images, targets in (("train", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs")):
        first = sorted((folder / images).glob(f"*_0000{ending}")) if (folder / images).is_dir() else []
        for image in first:
            name = image.name.removesuffix(f"_0000{ending}")
            files = tuple(image.with_name(f"{name}_{i:04d}{ending}") for i in range(channels))
            if (more := image.with_name(f"{name}_{channels:04d}{ending}")).is_file():
                raise UserError(
                    f"{more}: is a channel that dataset.json does not declare (it has {channels}); declare it"
                )
            label = folder / targets / f"{name}{ending}"
            cases.append(Case(name, files, label if part == "train" or label.is_file() else None, name, part))
    if not cases:
        raise UserError(f"{path}: no file in imagesTr or imagesTs ends in _0000{ending}, as it says; mend file_ending")
    return Collection("nnU-Net", cases, **about)


def _in_order(names: Any) -> tuple[str, ...]:
    """Names of the channels, by their numbers."""
    if isinstance(names, list):
        return tuple(map(str, names))
    return tuple(str(names[key]) for key in sorted(names, key=int))


def labels_json(path: Path, content: Any) -> dict[str, Any]:
    """Labels, the label to ignore, and regions with their order, as nnU-Net's dataset.json declares them."""
    declared = {
        name: (value,) if type(value) is int else tuple(value)
        for name, value in content["labels"].items()
        if name != "ignore"
    }
    if not all(values and all(type(v) is int for v in values) for values in declared.values()):
        raise ValueError("a label is no whole number or list of them")
    ignore = content["labels"].get("ignore")
    if ignore is not None and type(ignore) is not int:
        raise ValueError(f"the label to ignore is {ignore!r}")
    if all(len(values) == 1 for values in declared.values()):
        labels = {values[0]: name for name, values in declared.items()}
        if len(labels) < len(declared) or ignore in labels:
            raise UserError(f"{path}: two names have the same label value")
        return {"labels": labels, "ignore": ignore}
    regions = {name: values for name, values in declared.items() if values != (0,)}
    order = tuple(content.get("regions_class_order") or ())
    if len(order) != len(regions) or not all(type(v) is int for v in order):
        raise UserError(
            f"{path}: trains on regions ({', '.join(regions)}) without saying in regions_class_order, by a label for "
            "each, how they are painted"
        )
    single = {values[0]: name for name, values in regions.items() if len(values) == 1}
    values = sorted({value for region in regions.values() for value in region})
    if strange := sorted(set(order) - set(values)):
        raise UserError(f"{path}: regions_class_order has {strange}, which no region holds")
    labels = {0: "background"} | {v: single.get(v, f"label {v}") for v in values}
    return {"labels": labels, "ignore": ignore, "regions": regions, "order": order}


SCANS = re.compile(
    r"[-_. ]+(?:scan|ses|session|visit|frame|timepoint|time|tp|series|study|exam|acq|run|phase|day|week|month|year|"
    r"follow[-_]?up|baseline|pre|post|left|right|l|r|od|os|ed|es|mr|ct|v|t)[-_]?\d*$",
    re.IGNORECASE,
)
"""The end of a name that tells which of a patient's scans it is."""


def patients_by_name(names: list[str]) -> dict[str, str]:
    """The patient of each case, by its name: what is left without the part that tells the scan.

    `p1_scan2`, `patient001_frame01`, `sub-01_ses-2` and `07_left` are scans of p1, patient001, sub-01 and 07. A number
    of one or two digits after a name that ends in one (`p01_1`, `training03_02`) tells the scan too, where that leaves
    several patients, and some of them with several scans.
    """
    found = {}
    for name in names:
        rest = name
        while (cut := SCANS.sub("", rest)) != rest and cut:
            rest = cut
        found[name] = rest
    if len(set(found.values())) == 1:
        found = {name: name for name in names}
    numbered = {name: re.sub(r"(?<=\d)[-_]\d{1,2}$", "", rest) for name, rest in found.items()}
    counts = Counter(numbered.values())
    return (
        numbered if len(counts) > 1 and max(counts.values()) > 1 and len(counts) < len(set(found.values())) else found
    )


def _by_patient(found: Collection) -> Collection:
    """The collection, its cases grouped by patient where their names tell several scans of one."""
    names = [case.name for case in found.cases]
    patients = patients_by_name(names)
    counts = Counter(patients[name] for name in names)  # a name may stand in the training and in the test part
    if len(counts) == len(names):
        return found
    example = next(patient for patient, count in counts.items() if count > 1)
    scans = [name for name in names if patients[name] == example]
    cases = [replace(case, group=patients[case.name]) for case in found.cases]
    said = (
        f"{len(names)} cases of {len(counts)} patients, by their names ({', '.join(scans[:3])}: {example}); "
        "give --groups where that is wrong"
    )
    return replace(found, cases=cases, notes=[*found.notes, said])


def grouped(found: Collection, groups: str) -> Collection:
    """The collection with patients by a table of cases and patients, or by a pattern whose group is the patient.

    Raises UserError where a case has no patient.
    """
    patient = teller(groups, ("case", "patient"), "case")
    cases = [replace(case, group=patient(case.name)) for case in found.cases]
    return replace(found, cases=cases, notes=[n for n in found.notes if "--groups" not in n])


def read_splits(path: Path, cases: list[Case], apart: Iterable[str] = ()) -> list[dict[str, list[str]]]:
    """Splits as nnU-Net's `splits_final.json` has them: a list of `train` and `val` (or `validation`) names.

    Without those that are kept `apart`. Raises UserError for names that are not there.
    """
    with reading(path, "cannot be read as splits", "write [{train: [...], val: [...]}, ...]"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        splits = [
            {
                "train": list(map(str, s["train"])),
                "validation": list(map(str, s["val"] if "val" in s else s["validation"])),
            }
            for s in content
        ]
        if not splits or not all(split["train"] for split in splits):
            raise ValueError("a split has no training cases")
    known = {case.name for case in cases}
    for number, split in enumerate(splits):
        if unknown := sorted({*split["train"], *split["validation"]} - known):
            raise UserError(f"{path}: fold {number} names cases that are not there: {', '.join(unknown[:5])}")
    apart = set(apart)
    splits = [{side: [name for name in names if name not in apart] for side, names in s.items()} for s in splits]
    if empty := [number for number, split in enumerate(splits) if not split["train"]]:
        raise UserError(
            f"{path}: fold {empty[0]} has no training cases without those kept apart ({some(sorted(apart))})"
        )
    return splits


def _btcv(folder: Path) -> Collection | None:
    """Beyond the Cranial Vault as distributed: img/img0001.nii.gz with label/label0001.nii.gz."""
    root = next((p.parent for p in (folder / "img", *sorted(folder.glob("**/Training/img"))) if p.is_dir()), None)
    if root is None:
        return None
    cases = [
        Case(p.name[3:7], (p,), root / "label" / f"label{p.name[3:]}", p.name[3:7]) for p in _readable(root / "img")
    ]
    return Collection("BTCV", cases, dict(enumerate(BTCV, 1)))


BTCV = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta"),
    *("vena cava", "portal and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland"),
)


def _brats(folder: Path) -> Collection | None:
    """BraTS: one folder for each case, four channels and a segmentation; names of 2023 or of 2018 to 2021."""
    for channels, sign, enhancing in ((("t1n", "t1c", "t2w", "t2f"), "-", 3), (("t1", "t1ce", "t2", "flair"), "_", 4)):
        cases = []
        for first in sorted(folder.rglob(f"*{sign}{channels[0]}.nii.gz")):
            name = first.name.removesuffix(f"{sign}{channels[0]}.nii.gz")
            files = tuple(first.with_name(f"{name}{sign}{c}.nii.gz") for c in channels)
            label = first.with_name(f"{name}{sign}seg.nii.gz")
            cases.append(Case(name, files, label if label.is_file() else None, re.sub(r"-\d{3}$", "", name)))
        if cases:
            labels = {1: "necrotic core", 2: "oedema", enhancing: "enhancing tumour"}
            regions = {"whole tumour": (1, 2, enhancing), "tumour core": (1, enhancing)}
            return Collection("BraTS", cases, labels, regions=regions)
    return None


def _chaos(folder: Path) -> Collection | None:
    """CHAOS: MR (T1 in phase, T2) or CT, DICOM series with the labels as PNG slices."""
    cases = []
    for ground in sorted(p for p in folder.rglob("Ground") if p.is_dir()):
        series = ground.with_name("DICOM_anon")
        series = series / "InPhase" if (series / "InPhase").is_dir() else series
        sequence = ground.parent.name if ground.parent.name in ("T1DUAL", "T2SPIR") else ""
        number = (ground.parents[1] if sequence else ground.parent).name
        cases.append(Case("-".join(filter(None, (number, sequence))), (series,), ground, number))
    if not cases:
        return None
    if any("T1DUAL" in c.name or "T2SPIR" in c.name for c in cases):
        gray = ((0, 0, 0), (55, 70, 1), (110, 135, 2), (175, 200, 3), (240, 255, 4))
        return Collection("CHAOS", cases, dict(enumerate(("liver", "right kidney", "left kidney", "spleen"), 1)), gray)
    return Collection("CHAOS", cases, {1: "liver"}, BINARY)


def _acdc(folder: Path) -> Collection | None:
    cases = []
    for label in sorted(folder.rglob("patient*_frame*_gt.nii.gz")):
        name = label.name.removesuffix("_gt.nii.gz")
        number = int(re.match(r"patient(\d+)", name)[1])  # type: ignore[index]
        part = "train" if number <= 100 else "test"
        cases.append(Case(name, (label.with_name(f"{name}.nii.gz"),), label, f"patient{number:03d}", part))
    return Collection("ACDC", cases, dict(enumerate(HEART, 1)))


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


def _acdc_slices(folder: Path) -> Collection | None:
    """ACDC as slices in npz files, in train, valid and test; the number in a name is the patient's."""
    cases = [
        Case(p.stem, (p,), p, re.search(r"\d+", p.stem)[0], "test" if part == "test" else "train")  # type: ignore[index]
        for part in ("train", "valid", "test")
        for p in sorted((folder / part).glob("*.npz"))
        if re.search(r"\d+", p.stem)
    ]
    return Collection("ACDC (slices)", cases, dict(enumerate(HEART, 1)))


HEART = ("right ventricle", "myocardium", "left ventricle")

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
    cases, listed = [], {}
    for part, list_name in (
        ("train", "Segmentation/train"),
        ("train", "SegmentationAug/train_aug"),
        ("test", "Segmentation/val"),
    ):
        lines = root / "ImageSets" / f"{list_name}.txt"
        with reading(lines, "cannot be read as a list of pictures"):
            text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
        for line in text.splitlines():
            if words := line.split():  # train_aug.txt has "image label" pairs
                name = Path(words[0]).stem
                label = words[1].lstrip("/") if len(words) > 1 else f"SegmentationClass/{name}.png"
                listed[name] = (label, part)
    for name, (label, part) in listed.items():
        cases.append(Case(name, (root / "JPEGImages" / f"{name}.jpg",), root / label, name, part))
    return Collection("Pascal VOC", cases, dict(enumerate(VOC, 1)), ignore=255)


def _chasedb1(folder: Path) -> Collection | None:
    cases = [
        # left and right eye of a child share a group
        Case(p.stem, (p,), p.with_name(f"{p.stem}_1stHO.png"), p.stem[:-1])
        for p in sorted(folder.glob("Image_*.jpg"))
        if p.with_name(f"{p.stem}_1stHO.png").is_file()
    ]
    return Collection("CHASE_DB1", cases, {1: "vessel"}, BINARY)


def _drive(folder: Path) -> Collection | None:
    cases = []
    for part, name in (("train", "training"), ("test", "test")):
        for image in sorted((folder / name / "images").glob("*.tif")):
            number = image.name.split("_")[0]
            label = next(iter(sorted((folder / name / "1st_manual").glob(f"{number}_manual1.*"))), None)
            cases.append(Case(image.stem, (image,), label, number, part))
    return Collection("DRIVE", cases, {1: "vessel"}, BINARY)


def _isic(folder: Path) -> Collection | None:
    images = {p.stem: p for p in sorted(folder.rglob("ISIC_*.jpg"))}
    cases = [
        Case(name, (images[name],), label, name)
        for label in sorted(folder.rglob("ISIC_*_segmentation.png"))
        if (name := label.stem.removesuffix("_segmentation")) in images
    ]
    return Collection("ISIC", cases, {1: "lesion"}, BINARY)


def _masks(folder: Path) -> Collection | None:
    """Pictures beside folders of masks with the same names: Kvasir-SEG, CVC-ClinicDB, PraNet's split, ISIC as PNG."""
    names = (("images", "masks"), ("image", "mask"), ("Original", "Ground Truth"))
    cases = []
    for images, masks in names:
        for root in sorted({p.parent for p in folder.glob(f"**/{images}") if (p.parent / masks).is_dir()}):
            relative = root.relative_to(folder).as_posix().strip(".")
            part = next((p for p in ("train", "test", "val") if p in relative.lower()), "").replace("val", "test")
            targets = {stem(p): p for p in _readable(root / masks)}
            for path in _readable(root / images):
                name, label = stem(path), targets.get(stem(path)) or targets.get(f"{stem(path)}_segmentation")
                if label is not None:
                    cases.append(Case("/".join(filter(None, (relative, name))), (path,), label, name, part))
    return Collection("images and masks", cases, {1: "foreground"}, BINARY)


def _busi(folder: Path) -> Collection | None:
    """Breast ultrasound: benign, malignant and normal pictures, some with several masks."""
    cases = []
    for label in sorted(folder.rglob("*_mask.png")):
        image = label.with_name(label.name.replace("_mask.png", ".png"))
        if image.is_file() and label.parent.name in ("benign", "malignant", "normal"):
            more = tuple(
                p for i in range(1, 9) if (p := label.with_name(label.name.replace(".png", f"_{i}.png"))).is_file()
            )
            cases.append(Case(f"{label.parent.name}/{image.stem}", (image,), label, image.stem, "", more))
    return Collection("BUSI", cases, {1: "tumour"}, BINARY)


def _pairs(folder: Path) -> Collection | None:
    if not (folder / "images").is_dir() or not (folder / "labels").is_dir():
        return None
    targets = {stem(p): p for p in _readable(folder / "labels")}
    cases = [Case(stem(p), (p,), targets.get(stem(p)), stem(p)) for p in _readable(folder / "images")]
    declared: dict[int, str] = {}
    if (names := folder / "labels.json").is_file():
        with reading(names, "is no table of labels", "write it as {value: name, ...}"):
            declared = {int(k): str(v) for k, v in read_json(names, "a table of labels").items()}
    return Collection("images and labels", cases, declared)


def _loose(folder: Path) -> Collection | None:
    files = _readable(folder, recursive=True)
    first = {p: re.sub(r"_0000$", "", stem(p)) for p in files if stem(p).endswith("_0000")}
    channels = {
        p: [p.with_name(p.name.replace(f"{n}_0000", f"{n}_{i:04d}")) for i in range(99)] for p, n in first.items()
    }
    groups = {p: tuple(c for c in found if c.is_file()) for p, found in channels.items()}  # nnU-Net's imagesTs
    inside = {c for found in groups.values() for c in found[1:]}
    cases = [
        Case(_name(p, folder).removesuffix("_0000" if p in groups else ""), groups.get(p, (p,)), None)
        for p in files
        if p not in inside
    ]
    series = [p for p in sorted({p.parent for p in folder.rglob("*") if p.is_file()}) if is_series(p)]
    cases += [Case(_name(p, folder), (p,), None) for p in series]
    return Collection("scans without labels", cases)


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files: by their ending, or by their content where the first has none."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    if any(p.suffix.lower() in (".dcm", ".ima") for p in files):
        return True
    bare = next((p for p in files if not p.suffix or p.suffix[1:].isdigit()), None)
    return bare is not None and bare.name != "DICOMDIR" and pydicom.misc.is_dicom(bare)


def _name(path: Path, folder: Path) -> str:
    relative = path.relative_to(folder)
    name = stem(path) if path.is_file() else path.name
    return "/".join((*relative.parts[:-1], name)) if relative.parts else path.resolve().name


LAYOUTS: tuple[Callable[[Path], Collection | None], ...] = (
    _dataset_json,
    _acdc,
    _synapse,
    _acdc_slices,
    _btcv,
    _brats,
    _chaos,
    _voc,
    _chasedb1,
    _drive,
    _isic,
    _busi,
    _masks,
    _pairs,
    _loose,
)
"""Recognizers, tried in this order."""
