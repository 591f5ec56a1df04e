"""Geometry survives: every orientation and format; bad files are named."""

import gzip
import itertools
import struct
from pathlib import Path

import highdicom
import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from nearfar.core.errors import UserError
from nearfar.medical.data.scans import (
    Scan,
    read_about,
    read_header,
    read_labels,
    read_scan,
    resize_labels,
    write_dicom_seg,
    write_labels,
)

RNG = np.random.default_rng(0)


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


AFFINES = {
    "".join(codes): nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (5, 6, 7))
    @ np.diag([0.7, 1.5, 4.0, 1])
    for codes in [*itertools.permutations("RAS"), *itertools.permutations("LPS"), ("L", "A", "S"), ("S", "P", "R")]
}
AFFINES["oblique"] = np.vstack([np.c_[rotation(20) * [0.8, 0.8, 5.0], [-30.5, 12.25, 99.0]], [0, 0, 0, 1]])


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd"])
def test_the_grid_is_kept(tmp_path: Path, name: str, ending: str) -> None:
    affine = AFFINES[name].copy()
    affine[:3, 3] += [10.0, -20.0, 5.5]
    data = RNG.integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 4)
    nib.save(image, tmp_path / "ct.nii.gz")
    scan = read_scan(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(scan.image[0], data)
    labels = (scan.canonical()[0] > 0).astype(np.uint8)
    assert nib.aff2axcodes(affine) == tuple(scan.orientation)
    assert sorted(scan.canonical_spacing()) == pytest.approx(sorted(scan.spacing))
    path = write_labels(tmp_path / f"seg{ending}", scan.from_canonical(labels), scan)
    back = read_scan(path)
    np.testing.assert_array_equal(read_labels(path, scan), data > 0)
    np.testing.assert_allclose(back.affine, scan.affine, atol=1e-4)
    if ending != ".nrrd":
        ours, theirs = nib.load(path).header, image.header
        np.testing.assert_array_equal(ours.get_sform(), theirs.get_sform())
        np.testing.assert_array_equal(ours.get_qform(), theirs.get_qform())
        assert (ours["qform_code"], ours["sform_code"]) == (1, 4)
        assert ours.get_zooms() == theirs.get_zooms()


def test_canonical_is_what_nibabel_makes(tmp_path: Path) -> None:
    for name, affine in AFFINES.items():
        data = RNG.random((5, 6, 7)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, affine), tmp_path / f"{name}.nii")
        scan, closest = read_scan(tmp_path / f"{name}.nii"), nib.as_closest_canonical(nib.Nifti1Image(data, affine))
        np.testing.assert_array_equal(scan.canonical()[0], closest.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(scan.canonical_spacing(), closest.header.get_zooms(), rtol=1e-5)


def test_nrrd_keeps_its_header(tmp_path: Path) -> None:
    header = {
        "space": "left-posterior-superior",
        "space directions": np.array([[0.0, 0.9, 0.0], [-0.9, 0.0, 0.0], [0.0, 0.0, 2.5]]),
        "space origin": np.array([4.0, 5.0, -6.0]),
        "kinds": ["domain"] * 3,
    }
    data = RNG.random((4, 5, 6)).astype(np.float32)
    nrrd.write(str(tmp_path / "a.nrrd"), data, header)
    scan = read_scan(tmp_path / "a.nrrd")
    np.testing.assert_allclose(scan.affine @ [1, 0, 0, 1], [-4, -5.9, -6, 1])
    write_labels(tmp_path / "b.nrrd", np.ones((4, 5, 6), int), scan)
    written = nrrd.read_header(str(tmp_path / "b.nrrd"))
    assert written["space"] == header["space"]
    np.testing.assert_array_equal(written["space directions"], header["space directions"])
    np.testing.assert_array_equal(written["space origin"], header["space origin"])


@pytest.mark.parametrize("turn", [0.0, 15.0])
def test_a_dicom_series_round_trips(tmp_path: Path, dicom_series, turn: float) -> None:
    volume = RNG.integers(-1000, 1000, (6, 5, 4))
    directions = rotation(turn)
    dicom_series(tmp_path / "ct", volume, directions, (0.7, 0.8, 3.0))
    scan = read_scan(tmp_path / "ct")
    np.testing.assert_array_equal(scan.image[0], volume)
    point = np.array([2.0, 3.0, 1.0])
    in_lps = directions @ (point * [0.7, 0.8, 3.0]) + [1, 2, 3]
    np.testing.assert_allclose(scan.affine @ [*point, 1], [-in_lps[0], -in_lps[1], in_lps[2], 1], atol=1e-5)
    labels = (volume > 0) + (volume > 500)
    path = write_labels(tmp_path / "seg.nii.gz", labels, scan)
    np.testing.assert_array_equal(read_labels(path, scan), labels)
    seg = highdicom.seg.segread(write_dicom_seg(tmp_path / "seg.dcm", labels, scan, {1: "organ", 2: "tumour"}))
    assert [s.segment_label for s in (seg.get_segment_description(i) for i in (1, 2))] == ["organ", "tumour"]
    stored = seg.get_volume(combine_segments=True)
    affine = np.diag([-1, -1, 1, 1]) @ stored.affine  # (slice, row, column) to RAS
    for number in (1, 2):
        ours, theirs = np.argwhere(labels == number), np.argwhere(stored.array == number)
        place = lambda points, matrix: {tuple(np.round((matrix @ [*p, 1])[:3], 3) + 0.0) for p in points}  # noqa: E731
        assert place(ours, scan.affine) == place(theirs, affine)


def test_bad_series_are_named(tmp_path: Path, dicom_series) -> None:
    volume = np.zeros((4, 4, 6))
    dicom_series(tmp_path / "gap", volume, np.eye(3), (1, 1, 2.0), skip=(3,))
    with pytest.raises(UserError, match=r"gap: a slice is missing.*4 mm apart"):
        read_scan(tmp_path / "gap")
    for _ in range(2):
        dicom_series(tmp_path / "mixed", volume, np.eye(3), (1, 1, 2.0))
    with pytest.raises(UserError, match="2 series mixed"):
        read_scan(tmp_path / "mixed")
    uid = generate_uid()
    for _ in range(2):
        dicom_series(tmp_path / "twice", volume, np.eye(3), (1, 1, 2.0), uid=uid)
    with pytest.raises(UserError, match="share their position"):
        read_scan(tmp_path / "twice")
    sheared = np.eye(3)
    sheared[1, 2] = 0.3
    dicom_series(tmp_path / "tilted", volume, sheared, (1, 1, 2.0))
    with pytest.raises(UserError, match="gantry"):
        read_scan(tmp_path / "tilted")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no DICOM images"):
        read_scan(tmp_path / "none")


def test_pictures(tmp_path: Path) -> None:
    color = RNG.integers(0, 255, (7, 9, 3)).astype(np.uint8)
    Image.fromarray(color).save(tmp_path / "photo.png")
    scan = read_scan(tmp_path / "photo.png")
    np.testing.assert_array_equal(scan.image, np.moveaxis(color, -1, 0))
    labels = RNG.integers(0, 3, (7, 9))
    path = write_labels(tmp_path / "mask.png", labels, scan)
    np.testing.assert_array_equal(read_labels(path, scan), labels)
    palette = Image.fromarray(labels.astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "palette.png"), labels)
    with pytest.raises(UserError, match="colour picture"):
        read_labels(tmp_path / "photo.png")
    Image.fromarray(color[..., 0]).save(tmp_path / "gray.tif")
    assert read_scan(tmp_path / "gray.tif").image.shape == (1, 7, 9)


def test_what_of_a_picture_is_not_read_is_said(tmp_path: Path) -> None:
    gray = RNG.integers(0, 255, (20, 24), dtype=np.uint8)
    page = Image.fromarray(gray)
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page] * 2)
    for read in (read_scan, read_header, read_labels):
        with pytest.raises(UserError, match="holds 3 pictures"):
            read(tmp_path / "stack.tif")
    veiled = Image.fromarray(np.stack([gray, np.full_like(gray, 255)], -1), "LA")
    veiled.save(tmp_path / "gray.png")
    scan = read_scan(tmp_path / "gray.png")
    assert (scan.image.shape, scan.notes) == ((1, 20, 24), [])
    np.testing.assert_array_equal(scan.image[0], gray)
    veiled.putalpha(100)
    veiled.save(tmp_path / "veiled.png")
    assert "transparent" in read_scan(tmp_path / "veiled.png").notes[0]
    exif = page.getexif()
    exif[0x0112] = 6
    page.save(tmp_path / "turned.jpg", exif=exif)
    for read in (read_scan, read_header):
        assert "EXIF orientation (6) is not applied" in read(tmp_path / "turned.jpg").notes[0]


def test_bad_files_are_named(tmp_path: Path) -> None:
    def save(name: str, data: np.ndarray, affine=None) -> Path:
        nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), tmp_path / name)
        return tmp_path / name

    good = save("good.nii.gz", RNG.random((20, 20, 20)).astype(np.float32))
    scan = read_scan(good)
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:3000])
    packed = gzip.decompress(good.read_bytes())
    (tmp_path / "short.nii").write_bytes(packed[:5000])
    (tmp_path / "text.nii").write_text("hello")
    (tmp_path / "text.nrrd").write_text("hello")
    (tmp_path / "text.png").write_text("hello")
    holes = np.zeros((4, 4, 4), np.float32)
    holes[0, 0, :2] = np.nan
    cases = {
        tmp_path / "cut.nii.gz": "damaged",
        tmp_path / "short.nii": "damaged",
        tmp_path / "text.nii": "damaged",
        tmp_path / "text.nrrd": "damaged",
        tmp_path / "text.png": "damaged",
        save("nan.nii", holes): "2 voxels are NaN",
        save("four.nii", np.zeros((4, 4, 4, 2), np.float32)): "has 4 axes",
        tmp_path / "absent.nii": "no such file",
        tmp_path: "no DICOM images",
    }
    for path, reason in cases.items():
        with pytest.raises(UserError, match=reason) as caught:
            read_scan(path)
        assert str(path) in str(caught.value)
    for path, reason in (
        (save("small.nii", np.zeros((4, 4, 4), np.uint8)), "shape"),
        (save("moved.nii", np.zeros((20, 20, 20), np.uint8), np.diag([1, 1, 2, 1])), "affine differs"),
        (good, "no whole numbers"),
    ):
        with pytest.raises(UserError, match=reason):
            read_labels(path, scan)


def test_resizing_labels() -> None:
    labels = np.zeros((10, 12, 8), np.uint8)
    labels[2:8, 3:9, 2:6] = 3
    labels[4:6, 5:7, 3:5] = 7
    assert (resize_labels(resize_labels(labels, (20, 24, 16)), (10, 12, 8)) == labels).all()
    assert set(np.unique(resize_labels(labels, (13, 15, 9)))) == {0, 3, 7}
    assert resize_labels(labels, labels.shape) is labels


def test_labels_of_any_integer(tmp_path: Path) -> None:
    data = np.zeros((4, 5, 6), np.float32)
    data[1] = 1
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    for value in (255, 256, 70000, -1, -40000, 2**24 + 1, 2**40):
        labels = data.astype(np.int64) * value
        for ending in (".nii.gz", ".nrrd"):
            path = write_labels(tmp_path / f"b{ending}", labels, scan, {"model": "m"})
            np.testing.assert_array_equal(read_labels(path, scan), labels)
            assert read_about(path) == {"model": "m"}
    picture = Scan(tmp_path / "p.png", data[None, ..., 0])
    np.testing.assert_array_equal(
        read_labels(write_labels(tmp_path / "p.png", (data[..., 0] * 300).astype(int), picture, {"model": "m"})),
        data[..., 0] * 300,
    )
    assert read_about(tmp_path / "p.png") == {"model": "m"}
    for value in (-1, 70000):
        with pytest.raises(UserError, match="PNG holds labels"):
            write_labels(tmp_path / "p.png", (data[..., 0] * value).astype(int), picture)
    for kind, value, reason in (
        (np.float32, 0.9882, "no whole numbers"),
        (np.float32, 2.0**25, "cannot tell them"),
        (np.float64, 2.0**60, "cannot tell them"),
        (np.uint64, 2**63, "labels go up to"),
    ):
        nib.save(nib.Nifti1Image((data * 1).astype(kind) * kind(value), np.eye(4), dtype=kind), tmp_path / "c.nii")
        with pytest.raises(UserError, match=reason):
            read_labels(tmp_path / "c.nii")


def test_grids_are_compared_by_their_corners(tmp_path: Path) -> None:
    data, affine = np.zeros((4, 5, 600), np.uint8), np.diag([1.0, 1, 2, 1])
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    for moved, stretched, same in ((0.005, 1.0, True), (0.3, 1.0, False), (0, 1.0001, True), (0, 1.0005, False)):
        other = affine.copy()
        other[0, 3], other[2, 2] = moved, 2 * stretched
        nib.save(nib.Nifti1Image(data, other), tmp_path / "b.nii.gz")
        if same:
            assert read_labels(tmp_path / "b.nii.gz", scan).shape == scan.shape
        else:
            with pytest.raises(UserError, match=r"0\.(3|299) voxels at the corners"):
                read_labels(tmp_path / "b.nii.gz", scan)


def test_what_headers_leave_open_is_said(tmp_path: Path) -> None:
    """Sizes of 0, unknown units, voxels that cannot be millimetres, NRRD without a space: a note for each."""
    data = RNG.random((4, 5, 6)).astype(np.float32)

    def notes(name: str, side: float = 1.0, **edits: tuple[int, str, float]) -> str:
        image = nib.Nifti1Image(data, np.diag([side, side, side, 1]))
        nib.save(image, tmp_path / name)
        stored = bytearray((tmp_path / name).read_bytes())
        for place, kind, value in edits.values():
            struct.pack_into(f"<{kind}", stored, place, value)
        (tmp_path / name).write_bytes(bytes(stored))
        return " ".join(read_scan(tmp_path / name).notes)

    qform, sform = (252, "h", 1), (254, "h", 0)
    assert notes("plain.nii") == ""
    assert "voxel sizes of 1 x 1 x 0; 0 is taken as 1" in notes("zero.nii", q=qform, s=sform, side_z=(88, "f", 0.0))
    assert "unknown code 7; taken as mm" in notes("unit.nii", unit=(123, "B", 7))
    assert "if that is in meters" in notes("small.nii", 0.0008)
    assert "if that is in microns" in notes("large.nii", 800.0)
    nrrd.write(str(tmp_path / "bare.nrrd"), data)
    said = read_scan(tmp_path / "bare.nrrd").notes
    assert ["no space" in said[0], "no voxel sizes" in said[1]] == [True, True]
    header = {"space": "RAS", "space directions": np.diag([0.1, 0.1, 0.3]), "space origin": np.ones(3)}
    nrrd.write(str(tmp_path / "cm.nrrd"), data, header | {"space units": ["cm"] * 3})
    scan = read_scan(tmp_path / "cm.nrrd")
    assert scan.spacing == pytest.approx((1, 1, 3))
    assert scan.notes == ["it declares cm as unit; converted to mm"]
    write_labels(tmp_path / "labels.nrrd", np.ones(data.shape, int), scan)
    assert read_labels(tmp_path / "labels.nrrd", scan).all()
    nrrd.write(str(tmp_path / "odd.nrrd"), data, header | {"space units": ["cm", "mm", "s"]})
    with pytest.raises(UserError, match="space units are cm, mm, s"):
        read_scan(tmp_path / "odd.nrrd")
