"""Layouts are recognised, labels checked, splits kept apart."""

import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.medical.datasets import Case, check_split, find_cases, make_splits


def volume(path: Path, value: int = 1, size=(4, 5, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(size, np.uint8)
    data[1:3, 1:3, 1:3] = value
    nib.save(nib.Nifti1Image(data, np.diag([1, 2, 3, 1])), path)
    return path


def picture(path: Path, mode: str = "L", value: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, (8, 6))
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.paste(value if mode in "LP" else (value,) * 3, (2, 2, 5, 4))
    image.save(path)
    return path


def build(folder: Path, layout: str) -> None:
    if layout == "nnU-Net":
        for case in ("a_1", "a_2"):
            for channel in (0, 1):
                volume(folder / f"imagesTr/{case}_{channel:04d}.nii.gz", 50)
            volume(folder / f"labelsTr/{case}.nii.gz", 2)
        content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "liver": 1, "tumour": 2}}
        (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 2, "file_ending": ".nii.gz"}))
    elif layout == "Medical Segmentation Decathlon":
        volume(folder / "imagesTr/x.nii.gz")
        volume(folder / "labelsTr/x.nii.gz")
        volume(folder / "imagesTs/y.nii.gz")
        training = [{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}]
        content = {"labels": {"0": "background", "1": "spleen"}, "training": training, "test": ["./imagesTs/y.nii.gz"]}
        (folder / "dataset.json").write_text(json.dumps(content))
    elif layout == "ACDC":
        for name in ("patient001/patient001_frame01", "patient001/patient001_frame12", "patient101/patient101_frame01"):
            volume(folder / f"database/{name}.nii.gz")
            volume(folder / f"database/{name}_gt.nii.gz", 3)
    elif layout == "Synapse (TransUNet)":
        (folder / "train_npz").mkdir(parents=True)
        (folder / "test_vol_h5").mkdir()
        image, label = np.random.rand(6, 6).astype(np.float32), np.eye(6, dtype=np.float32) * 8  # noqa: NPY002
        np.savez(folder / "train_npz/case0005_slice000.npz", image=image, label=label)
        with h5py.File(folder / "test_vol_h5/case0001.npy.h5", "w") as file:
            file["image"], file["label"] = np.stack([image] * 3), np.stack([label] * 3)
    elif layout == "Pascal VOC":
        picture(folder / "JPEGImages/2007_1.jpg", "RGB")
        picture(folder / "SegmentationClass/2007_1.png", "P", 15)
        (folder / "ImageSets/Segmentation").mkdir(parents=True)
        (folder / "ImageSets/Segmentation/train.txt").write_text("2007_1\n")
    elif layout == "CHASE_DB1":
        for eye in "LR":
            picture(folder / f"Image_01{eye}.jpg", "RGB")
            picture(folder / f"Image_01{eye}_1stHO.png")
    elif layout == "DRIVE":
        picture(folder / "training/images/21_training.tif", "RGB")
        picture(folder / "training/1st_manual/21_manual1.gif")
    elif layout == "ISIC":
        picture(folder / "data/ISIC_0000001.jpg", "RGB")
        picture(folder / "truth/ISIC_0000001_segmentation.png")
    elif layout == "Kvasir-SEG":
        picture(folder / "images/a.jpg", "RGB")
        picture(folder / "masks/a.jpg")
    elif layout == "images and labels":
        volume(folder / "images/one.nii.gz", 9)
        volume(folder / "labels/one.nii.gz", 4)
        (folder / "labels.json").write_text('{"4": "thing"}')


EXPECTED = {
    "nnU-Net": (2, 2, 2),
    "Medical Segmentation Decathlon": (2, 1, 1),
    "ACDC": (3, 2, 3),
    "Synapse (TransUNet)": (2, 2, 8),
    "Pascal VOC": (1, 1, 15),
    "CHASE_DB1": (2, 1, 1),
    "DRIVE": (1, 1, 1),
    "ISIC": (1, 1, 1),
    "Kvasir-SEG": (1, 1, 1),
    "images and labels": (1, 1, 4),
}


@pytest.mark.parametrize("layout", EXPECTED)
def test_layouts(tmp_path: Path, layout: str) -> None:
    build(tmp_path, layout)
    collection = find_cases(tmp_path)
    cases, groups, label = EXPECTED[layout]
    assert collection.layout == layout
    assert len(collection.cases) == cases
    labelled = [case for case in collection.cases if case.label]
    assert len({case.group for case in labelled}) == groups or layout == "Synapse (TransUNet)"
    for case in labelled:
        scan, labels = collection.read(case)
        assert labels.shape == scan.shape
        assert set(np.unique(labels)) == {0, label}
    if layout == "nnU-Net":
        assert len(scan.image) == 2


def test_real_retina_pictures(shared_data) -> None:
    collection = find_cases(shared_data("chasedb1"))
    assert (collection.layout, len(collection.cases), len({c.group for c in collection.cases})) == ("CHASE_DB1", 28, 14)
    scan, labels = collection.read(collection.cases[0])
    assert scan.image.shape == (3, 960, 999)
    assert 0.02 < labels.mean() < 0.2


def test_labels_outside_the_declared_ones_are_named(tmp_path: Path) -> None:
    build(tmp_path, "images and labels")
    volume(tmp_path / "labels/one.nii.gz", 7)
    collection = find_cases(tmp_path)
    with pytest.raises(UserError, match=r"one\.nii\.gz: holds labels \[7\]"):
        collection.read(collection.cases[0])
    volume(tmp_path / "labels/one.nii.gz", 4, (4, 5, 7))
    with pytest.raises(UserError, match="shape"):
        collection.read(collection.cases[0])


def test_splits_are_by_patient(tmp_path: Path) -> None:
    cases = [Case(f"p{i // 3}_{i}", (tmp_path,), None, f"p{i // 3}") for i in range(30)]
    splits = make_splits(cases, 5, path=tmp_path / "splits.json")
    assert json.loads((tmp_path / "splits.json").read_text()) == splits
    assert sorted(n for s in splits for n in s["validation"]) == sorted(c.name for c in cases)
    for split in splits:
        check_split(cases, split["train"], split["validation"])
    with pytest.raises(UserError, match="both sides of the split: p0"):
        check_split(cases, ["p0_0"], ["p0_1"])
    with pytest.raises(UserError, match="not there"):
        check_split(cases, ["x"], [])
    with pytest.raises(UserError, match="there are 10"):
        make_splits(cases, 11)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no scans found"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_cases(tmp_path / "absent")
    (tmp_path / "dataset.json").write_text('{"channel_names": {}}')
    with pytest.raises(UserError, match=r"dataset\.json"):
        find_cases(tmp_path)
