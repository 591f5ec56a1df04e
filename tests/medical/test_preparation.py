"""Intensities by the training cases, padding that never counts, slices along the coarse axis, memory."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nearfar.core.errors import UserError
from nearfar.medical.data import scans
from nearfar.medical.data.scans import Scan, linear_slabs, read_scan, resize_labels
from nearfar.medical.preparation import Channel, ChannelSurvey, Preparation, padding, scheme_of
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import RegionPainter, Segmenter

CT = Channel("ct", "CT", low=0, high=80, mean=40, std=20, range=(-1000, 200), width=900)


def scan(image: np.ndarray, spacing=(1.0, 1.0, 1.0), kind: str = "nrrd") -> Scan:
    return Scan(Path("x"), image, np.diag([*spacing, 1.0]), kind)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(40, 20, (1, 20, 24, 16)).astype(np.float32)


@pytest.mark.parametrize(("intensity", "channels"), [("zscore", ()), ("ct", (CT,)), ("minmax", ())])
def test_padding_never_changes_what_the_network_sees(image: np.ndarray, intensity: str, channels: tuple) -> None:
    preparation = Preparation(intensity=intensity, channels=channels)
    plain = preparation.image(scan(image))
    for value in (-3024, -2000, 0, 5000):
        padded = scan(np.pad(image, ((0, 0), (3, 2), (4, 0), (1, 5)), constant_values=value))
        assert torch.equal(preparation.image(padded), plain)
        back = preparation.restore(np.ones(plain.shape[1:], np.uint8), padded)
        assert back.sum() == image.size
        assert back[3:-2, 4:, 1:-5].all()
    rows, columns = np.mgrid[:20, :24]
    outside = ((rows - 9.5) / 10) ** 2 + ((columns - 11.5) / 12) ** 2 > 1
    circles = []
    for value in (-3024, -2000, 0):
        circle = image.copy()
        circle[:, outside] = value
        circles.append(preparation.image(scan(circle)))
        assert np.array_equal(padding(circle[0]), np.repeat(outside[..., None], 16, 2))
    assert all(torch.equal(circle, circles[0]) for circle in circles)
    assert padding(image[0]) is None


def test_zero_is_a_value_of_ct_like_others() -> None:
    values = np.random.default_rng(0).normal(0, 100, (1, 8, 8, 8)).round().astype(np.float32)
    prepared = Preparation().image(scan(values)).numpy()
    np.testing.assert_allclose(prepared, (values - values.mean()) / values.std(ddof=1), atol=1e-5)


def test_channel_names() -> None:
    names = ("CT", "ct", "CT_portal", "T1", "FLAIR", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "contact")
    expected = ["ct"] * 3 + ["zscore"] * 2 + ["none", "minmax", "unit", "zscore"]
    assert [scheme_of(name) for name in names] == expected


def test_ct_is_scaled_by_the_labelled_voxels_of_all_cases(image: np.ndarray) -> None:
    survey, values = ChannelSurvey(), []
    for shift in (0, 30):
        labels = np.zeros(image.shape[1:], int)
        labels[5:9, 5:9, 5:9] = 7
        survey.add(scan(image + shift), labels)
        values.append((image + shift)[0][labels > 0])
    (channel,) = survey.channels(("CT",), "auto")
    values = np.concatenate(values)
    assert channel.intensity == "ct"
    assert (channel.low, channel.high) == pytest.approx(np.percentile(values, [0.5, 99.5]))
    assert (channel.mean, channel.std) == pytest.approx((values.mean(), values.std()), rel=1e-5)
    prepared = Preparation(channels=(channel,)).image(scan(image))
    expected = (image.clip(channel.low, channel.high) - channel.mean) / channel.std
    np.testing.assert_allclose(prepared, expected, atol=1e-5)
    with pytest.raises(UserError, match="everywhere"):
        survey.add(scan(np.full_like(image, 3)), labels)


@pytest.fixture
def segmenter() -> Segmenter:
    settings = {"features": (4, 4, 4, 4, 4, 4), "norm": ("group", {"num_groups": 2})}
    made = Segmenter.create(Recipe(roi=(16, 16, 16), settings=settings), {1: "a"}, 1)
    made.channels = (CT,)
    made.spacing_seen = [[0.8, 0.8], [0.8, 0.8], [3.0, 3.0]]
    return made


def test_scans_unlike_the_training_are_refused_or_said(segmenter: Segmenter, image: np.ndarray, tmp_path: Path) -> None:
    spacing = (0.8, 0.8, 3.0)
    segmenter.save(tmp_path)
    for model in (segmenter, Segmenter.load(tmp_path)):
        whole = image.copy() * 10 - 500
        good = scan(whole, spacing)
        model(good)
        assert good.notes == []
        for bad, reason in (
            (np.zeros_like(image), "0 everywhere"),
            (np.full_like(image, -1000), "-1000 everywhere"),
            (whole / 1000, "convert it to the unit"),
            (whole + 5000, "convert it to the unit"),
        ):
            with pytest.raises(UserError, match=reason):
                model(scan(bad, spacing))
        far = scan(whole * 4, spacing)
        model(far)
        assert any("results may be wrong" in note for note in far.notes)
        for other in ((3.0, 0.8, 0.8), (6, 6, 6), (0.8, 0.8, 0.8)):
            with pytest.raises(UserError, match=r"trained on 0\.8 to 0\.8 x 0\.8 to 0\.8 x 3 to 3 mm"):
                model(scan(whole, other))


def test_slices_follow_the_spacing() -> None:
    data = np.arange(4 * 5 * 6, dtype=np.float32).reshape(1, 4, 5, 6)
    preparation = Preparation(planes=True)
    for spacing, axis in (((3, 0.8, 0.8), 0), ((0.8, 3, 0.8), 1), ((0.8, 0.8, 3), 2), ((1, 1, 1), 2), ((1.2, 1, 1), 2)):
        one = scan(data, spacing)
        size = np.moveaxis(data[0], axis, -1).shape
        assert tuple(preparation.image(one).shape[1:]) == preparation.size(one) == size
        labels = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
        np.testing.assert_array_equal(preparation.restore(preparation.labels(labels, one), one), labels)
        assert preparation.grid_spacing(one)[-1] == spacing[axis]


def test_slabs_are_the_whole(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(scans, "SLAB", 200)
    values, labels = rng.random((13, 11, 9), np.float32), np.repeat(rng.integers(-2, 3, (13, 11, 9)), 2, 0)
    for size in ((20, 7, 9), (5, 22, 3), (13, 11, 9)):
        whole = F.interpolate(torch.from_numpy(values)[None, None], size, mode="trilinear", align_corners=False)[0, 0]
        found = np.empty(size, np.float32)
        for where, slab in linear_slabs(values, size):
            found[where] = slab
        np.testing.assert_allclose(found, whole, atol=2e-6)
        parts = resize_labels(labels, size)
        monkeypatch.setattr(scans, "SLAB", 1 << 23)
        assert (parts == resize_labels(labels, size)).mean() > 0.99  # ties of random labels may fall either way
        monkeypatch.setattr(scans, "SLAB", 200)


def test_memory_bounds_the_volumes(segmenter: Segmenter, image: np.ndarray) -> None:
    one = scan(image, (0.8, 0.8, 3.0))
    need = segmenter.check_memory(one, 1 << 30)
    assert need == image.size * (4 + 1 + 2 + 2)
    assert segmenter.check_memory(one, 1 << 30, lazy=False) == image.size * (4 + 4 + 2 + 2)
    np.testing.assert_array_equal(segmenter(one, memory=need + 1000), segmenter(one))
    with pytest.raises(UserError, match=r"the scan .*the prepared image"):
        segmenter(one, memory=need - 1)


def test_overlapping_regions_are_painted() -> None:
    nested = RegionPainter([0, 1, 2, 3], {"whole": (1, 2, 3), "core": (2, 3), "active": (3,)}, (1, 2, 3))
    assert nested.table.tolist() == [0, 1, 2, 2, 3, 3, 3, 3]  # later ones over earlier ones
    crossing = RegionPainter([0, 1, 2, 3], {"a": (1, 2), "b": (2, 3)}, (1, 3))
    assert crossing.table.tolist() == [0, 1, 3, 2]  # both: the label that lies in both
    scores = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert crossing(scores).tolist() == [2, 3]


def test_geometry_is_decided_by_rule_and_said(tmp_path: Path) -> None:
    data, path = np.random.default_rng(0).random((6, 7, 8)).astype(np.float32), tmp_path / "a.nii.gz"
    a, b = np.diag([1.0, 1, 2, 1]), np.diag([-1.0, -1, 2, 1])

    def read(sform=None, qform=None, unit: str = "mm", affine=None) -> Scan:
        made = nib.Nifti1Image(data, affine)
        if affine is None:
            made.header["pixdim"][1:4] = [0.7, 0.7, 5]
            made.set_sform(sform, 0 if sform is None else 1)
            if qform is not None:
                made.set_qform(qform, 1)
        made.header.set_xyzt_units(unit)
        nib.save(made, path)
        return read_scan(path)

    both = read(a, b)
    assert (both.orientation, both.spacing) == ("RAS", (1, 1, 2))
    assert "the sform is used" in both.notes[0]
    assert read(a, a).notes == []
    assert (read(None, b).orientation, read(None, b).notes) == ("LPS", [])
    broken = read(np.zeros((4, 4)) + np.diag([0, 0, 0, 1.0]), b)
    assert broken.orientation == "LPS"
    assert "the qform is used" in broken.notes[0]
    none = read()
    assert none.spacing == pytest.approx((0.7, 0.7, 5))
    assert "codes are 0" in none.notes[0]
    shear = a.copy()
    shear[0, 2] = 0.8
    assert "off right angles by 22 degrees" in read(affine=shear).notes[0]
    assert read(affine=np.diag([8e-4, 8e-4, 3e-3, 1]), unit="meter").spacing == pytest.approx((0.8, 0.8, 3))
    assert read(affine=np.diag([800.0, 800, 3000, 1]), unit="micron").spacing == pytest.approx((0.8, 0.8, 3))
    odd = read(affine=np.diag([0.8, 0.8, 3, 1]), unit="meter")
    assert odd.spacing == pytest.approx((0.8, 0.8, 3))
    assert "taken as mm" in odd.notes[0]
