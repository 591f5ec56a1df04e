"""Layouts are recognized, labels checked, splits kept apart."""

import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.medical.data.cases import Case, check_split, make_splits
from nearfar.medical.data.layouts import find_cases, grouped, patients_by_name, read_splits
from nearfar.medical.data.scans import read_labels, write_labels


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
    elif layout == "images and masks":
        for images, masks in (("Kvasir/images", "Kvasir/masks"), ("train/image", "train/mask")):
            picture(folder / images / "a.jpg", "RGB")
            picture(folder / masks / "a.jpg")
        picture(folder / "CVC/Original/1.tif", "RGB")
        picture(folder / "CVC/Ground Truth/1.tif")
    elif layout == "BUSI":
        picture(folder / "benign/benign (1).png", "RGB")
        for ending, box in (("_mask", (2, 2, 5, 4)), ("_mask_1", (6, 4, 8, 6))):
            mask = Image.new("L", (8, 6))
            mask.paste(255, box)
            mask.save(folder / f"benign/benign (1){ending}.png")
    elif layout == "BTCV":
        volume(folder / "Abdomen/RawData/Training/img/img0001.nii.gz", 50)
        volume(folder / "Abdomen/RawData/Training/label/label0001.nii.gz", 13)
    elif layout == "BraTS":
        for channel in ("t1n", "t1c", "t2w", "t2f"):
            volume(folder / f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{channel}.nii.gz", 50)
        volume(folder / "BraTS-GLI-00000-000/BraTS-GLI-00000-000-seg.nii.gz", 3)
    elif layout == "ACDC (slices)":
        for part, name in (
            ("train", "case_002_sliceED_0"),
            ("valid", "case_019_sliceED_0"),
            ("test", "case_001_sliceED_0"),
        ):
            (folder / part).mkdir(parents=True)
            label = np.eye(6, dtype=np.uint8) * 2
            np.savez(folder / part / f"{name}.npz", img=np.ones((6, 6), np.float32), label=label)
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
    "images and masks": (3, 2, 1),
    "BUSI": (1, 1, 1),
    "BTCV": (1, 1, 13),
    "BraTS": (1, 1, 3),
    "ACDC (slices)": (3, 3, 2),
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
    channels = {"nnU-Net": 2, "BraTS": 4}
    if layout in channels:
        assert len(scan.image) == channels[layout]
    if layout == "Synapse (TransUNet)":  # a volume's slices come last, where 2-D networks expect them
        assert scan.shape == (6, 6, 3)
    if layout == "BUSI":
        assert labels.sum() == 6 + 4  # both masks
    if layout == "BraTS":
        assert collection.regions == {"whole tumour": (1, 2, 3), "tumour core": (1, 3)}
        nested = collection.trained_on_regions(["enhancing tumour", "whole tumour", "tumour core"])
        assert list(nested.regions.items()) == [
            ("whole tumour", (1, 2, 3)), ("tumour core", (1, 3)), ("enhancing tumour", (3,)),
        ]  # fmt: skip
        assert (nested.order, nested.notes) == ((2, 1, 3), [])
        (note,) = collection.trained_on_regions(["enhancing tumour"]).notes
        assert note.startswith("necrotic core, oedema: in none of the regions")
        for names, wrong in (
            (["whole"], "region whole: unknown; the data declare necrotic core, .*, whole tumour, tumour core"),
            (["oedema", "oedema"], "each is named once"), (["whole tumour", "enhancing tumour"], "2 do"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=wrong):
                collection.trained_on_regions(names)


def test_volumes_with_a_channel_axis(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    data = np.random.default_rng(0).random((4, 5, 6, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "imagesTr/x.nii.gz")
    volume(tmp_path / "labelsTr/x.nii.gz")
    training = [{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}]
    content = {"labels": {"0": "background", "1": "edema"}, "modality": {"0": "T2", "1": "ADC"}, "training": training}
    nib.save(
        nib.Nifti1Image(np.asarray(nib.load(tmp_path / "labelsTr/x.nii.gz").dataobj), np.eye(4)),
        tmp_path / "labelsTr/x.nii.gz",
    )
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    collection = find_cases(tmp_path)
    scan, labels = collection.read(collection.cases[0])
    np.testing.assert_array_equal(scan.image, np.moveaxis(data, -1, 0))
    assert labels.shape == scan.shape == (4, 5, 6)
    back = read_labels(write_labels(tmp_path / "seg.nii.gz", labels, scan), scan)
    np.testing.assert_array_equal(back, labels)


def test_nnunet_regions_need_an_order(tmp_path: Path) -> None:
    build(tmp_path, "nnU-Net")
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"dataset\.json: trains on regions \(whole, core\) without saying"):
        find_cases(tmp_path)
    content["regions_class_order"] = [1, 2]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    found = find_cases(tmp_path)
    assert (found.regions, found.order) == ({"whole": (1, 2), "core": (2,)}, (1, 2))
    assert found.labels == {0: "background", 1: "label 1", 2: "core"}
    content["labels"] = {"background": 0, "whole": [1], "core": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert find_cases(tmp_path).labels == {0: "background", 1: "whole", 2: "core"}
    volume(tmp_path / "imagesTr/a_1_0002.nii.gz")
    with pytest.raises(UserError, match="does not declare"):
        find_cases(tmp_path)


def test_nnunet_ignore_label_is_not_a_class(tmp_path: Path) -> None:
    build(tmp_path, "nnU-Net")
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"] = {"background": 0, "liver": 1, "ignore": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    collection = find_cases(tmp_path)
    assert (collection.labels, collection.ignore) == ({0: "background", 1: "liver"}, 2)


def test_images_of_nnunet_without_labels_keep_their_channels(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        volume(tmp_path / f"{name}.nii.gz", 7)
    found = find_cases(tmp_path)
    assert [(c.name, len(c.images)) for c in found.cases] == [("a", 2), ("b", 2)]
    assert found.scan(found.cases[0]).image.shape == (2, 4, 5, 6)


def test_chaos(tmp_path: Path, dicom_series) -> None:
    levels = np.array([0, 63, 126, 189, 252], np.uint8)
    labels = np.random.default_rng(0).integers(0, 5, (6, 5, 4))  # (x, y, z)
    ground = tmp_path / "Train_Sets/MR/1/T1DUAL/Ground"
    ground.mkdir(parents=True)
    series = ground.with_name("DICOM_anon") / "InPhase"
    series.parent.mkdir()
    dicom_series(series, labels, np.eye(3), (1.0, 1.0, 3.0), in_order=True)
    for z in range(4):
        Image.fromarray(levels[labels[..., z].T]).save(ground / f"IMG-0004-{z:05d}.png")
    collection = find_cases(tmp_path)
    assert (collection.layout, [c.group for c in collection.cases]) == ("CHAOS", ["1"])
    scan, found = collection.read(collection.cases[0])
    np.testing.assert_array_equal(scan.image[0], labels)
    np.testing.assert_array_equal(found, labels)
    (ground / "IMG-0004-00000.png").unlink()
    with pytest.raises(UserError, match="3 label pictures for 4 slices"):
        collection.read(collection.cases[0])


def test_pascal_voc_with_the_extra_annotations(tmp_path: Path) -> None:
    build(tmp_path, "Pascal VOC")
    for name in ("2008_1", "2009_1"):
        picture(tmp_path / f"JPEGImages/{name}.jpg", "RGB")
        picture(tmp_path / f"SegmentationClassAug/{name}.png", "P", 3)
    picture(tmp_path / "SegmentationClass/2009_1.png", "P", 3)
    (tmp_path / "ImageSets/SegmentationAug").mkdir()
    pairs = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in ("2008_1", "2009_1")]
    (tmp_path / "ImageSets/SegmentationAug/train_aug.txt").write_text("".join(pairs))
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2009_1\n")
    collection = find_cases(tmp_path)
    assert {c.name: c.part for c in collection.cases} == {"2007_1": "train", "2008_1": "train", "2009_1": "test"}
    assert set(np.unique(collection.read(collection.cases[1])[1])) == {0, 3}


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
    for i in range(30):
        (tmp_path / f"{i}.nii").write_text(str(i))
    cases = [Case(f"p{i // 3}_{i}", (tmp_path / f"{i}.nii",), None, f"p{i // 3}") for i in range(30)]
    splits = make_splits(cases, 5, path=tmp_path / "splits.json")
    assert json.loads((tmp_path / "splits.json").read_text()) == splits
    assert sorted(n for s in splits for n in s["validation"]) == sorted(c.name for c in cases)
    for split in splits:
        check_split(cases, split["train"], split["validation"])
    with pytest.raises(UserError, match="patient p0: on both sides"):
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


def test_scans_of_one_patient_are_told_by_their_names() -> None:
    def groups(*names: str) -> list[str]:
        found = patients_by_name(list(names))
        return [found[name] for name in names]

    assert groups("p1_scan1", "p1_scan2", "p2_scan1") == ["p1", "p1", "p2"]
    assert groups("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1") == ["sub-01", "sub-01", "sub-02"]
    assert groups("patient001_frame01", "patient001_frame12", "patient002_frame01")[:2] == ["patient001"] * 2
    assert groups("training01_01", "training01_02", "training02_01") == ["training01", "training01", "training02"]
    for apart in (("a_1", "a_2"), ("liver_0", "liver_1"), ("left", "right"), ("case_00001", "case_00002")):
        assert groups(*apart) == list(apart)
    assert groups("site1_001", "site1_002", "site2_001") == ["site1_001", "site1_002", "site2_001"]


def test_a_case_in_both_parts_is_one_patient(tmp_path: Path) -> None:
    build(tmp_path, "Medical Segmentation Decathlon")
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"test": ["./imagesTr/x.nii.gz"]}))
    found = find_cases(tmp_path)
    assert [(case.part, case.group) for case in found.cases] == [("train", "x"), ("test", "x")]
    assert "2 cases of 1 patients" in found.notes[-1]


def test_patients_and_splits_are_given(tmp_path: Path) -> None:
    build(tmp_path, "nnU-Net")
    found = find_cases(tmp_path)
    (tmp_path / "groups.csv").write_text("case,patient\na_1,x\na_2,x\n")
    assert {c.group for c in grouped(found, str(tmp_path / "groups.csv")).cases} == {"x"}
    assert {c.group for c in grouped(found, r"^(\w)_").cases} == {"a"}
    (tmp_path / "any.csv").write_text('"a_1"; x\na_2;y\n')
    assert [c.group for c in grouped(found, str(tmp_path / "any.csv")).cases] == ["x", "y"]
    wrongs = [("(", "nor a regular expression"), ("a", "one is needed"), ("(b)", "a_1: its name does not tell")]
    for text, reason in (
        ("case,age,patient\na_1,4,x\n", "names no patient of the case a_2; it names a_1"),
        ("name,age,who\na_1,4,x\n", "must have the columns case and patient"),
        ("a_1,x\na_2,y\na_1,z\n", "case a_1 has patient x and z"),
        ("case,age,patient\na_1,4,x,y\n", "has 4 cells for 3 columns"),
        ("", "it is empty"),
    ):
        path = tmp_path / f"{len(wrongs)}.csv"
        path.write_text(text)
        wrongs.append((str(path), reason))
    for wrong, reason in wrongs:
        with pytest.raises(UserError, match=reason):
            grouped(found, wrong)
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a_1"], "val": ["a_2"]}]))
    assert read_splits(path, found.cases) == [{"train": ["a_1"], "validation": ["a_2"]}]
    assert read_splits(path, found.cases, ["a_2"]) == [{"train": ["a_1"], "validation": []}]
    with pytest.raises(UserError, match="fold 0 has no training cases without those kept apart"):
        read_splits(path, found.cases, ["a_1"])
    path.write_text(json.dumps([{"train": ["a_1"], "val": ["b"]}]))
    with pytest.raises(UserError, match="names cases that are not there: b"):
        read_splits(path, found.cases)
