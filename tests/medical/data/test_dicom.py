"""DICOM as users have it: anonymised, compressed, enhanced, MONOCHROME1; coded segmentations."""

import copy
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from nearfar.core.errors import UserError
from nearfar.medical.data import dicom
from nearfar.medical.data.dicom import read_series, segment_code
from nearfar.medical.data.scans import read_scan, write_dicom_seg

VOLUME = np.random.default_rng(0).integers(-1000, 1000, (40, 36, 4))  # (x, y, z)


def edited(folder: Path, change) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        item = pydicom.dcmread(path)
        change(item, number)
        item.save_as(path)


@pytest.fixture
def series(tmp_path: Path, dicom_series) -> Path:
    dicom_series(tmp_path / "ct", VOLUME, np.eye(3), (0.7, 0.8, 3.0), in_order=True)
    return tmp_path / "ct"


def test_anonymised_series_are_read_and_segmented(series: Path, tmp_path: Path) -> None:
    gone = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
            "ReferringPhysicianName", "StudyID", "FrameOfReferenceUID", "StudyInstanceUID", "SliceThickness",
            "SeriesNumber", "InstanceNumber")  # fmt: skip
    edited(series, lambda item, _: [delattr(item, name) for name in gone])
    scan = read_scan(series)
    np.testing.assert_array_equal(scan.image[0], VOLUME)
    labels = (VOLUME > 0).astype(np.int32) * 3
    seg = highdicom.seg.segread(write_dicom_seg(tmp_path / "seg.dcm", labels, scan, {0: "background", 3: "liver"}))
    assert seg.get_volume(combine_segments=True).array.sum() == (VOLUME > 0).sum()
    assert not hasattr(scan.source[0], "PatientID")  # the scan itself stays as it was


def test_segments_have_codes_and_colours(series: Path, tmp_path: Path) -> None:
    scan = read_scan(series)
    labels = np.zeros(VOLUME.shape, int)
    labels[0], labels[1], labels[2] = -4, 70000, 5
    names = {0: "background", -4: "left kidney", 70000: "tumour", 5: "thing"}
    own = {"thing": {"code": "1", "scheme": "99X", "meaning": "Thing", "color": "#ff0000"}}
    seg = highdicom.seg.segread(write_dicom_seg(tmp_path / "seg.dcm", labels, scan, names, own))
    found = [seg.get_segment_description(i) for i in (1, 2, 3)]
    assert [f.segment_label for f in found] == ["left kidney", "tumour", "thing"]
    assert [f.segmented_property_type.value for f in found] == ["64033007", "108369006", "1"]
    assert (
        found[0].SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    )
    colors = [tuple(f.RecommendedDisplayCIELabValue) for f in found]
    assert len(set(colors)) == 3
    assert highdicom.color.CIELabColor.from_dicom_value(colors[2]).to_rgb() == (255, 0, 0)
    assert segment_code("oesophagus")[1].meaning == "Esophagus"
    assert segment_code("no such organ") is None
    whole = seg.get_volume(combine_segments=True)
    assert [(whole.array == i).sum() for i in (1, 2, 3)] == [144, 144, 144]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_compressed_series(series: Path, syntax, monkeypatch) -> None:
    if syntax == JPEGLosslessSV1:
        gdcm = pytest.importorskip("gdcm")
        for path in series.iterdir():
            reader, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
            reader.SetFileName(str(path))
            assert reader.Read()
            change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
            change.SetInput(reader.GetImage())
            assert change.Change()
            writer = gdcm.ImageWriter()
            writer.SetFileName(str(path))
            writer.SetFile(reader.GetFile())
            writer.SetImage(change.GetOutput())
            assert writer.Write()
    else:
        if syntax == JPEG2000Lossless:
            pytest.importorskip("openjpeg")
        edited(series, lambda item, _: item.compress(syntax))
    assert pydicom.dcmread(next(series.iterdir())).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_scan(series).image[0], VOLUME)
    monkeypatch.setattr(dicom, "get_decoder", lambda _: type("Decoder", (), {"is_available": False}))
    with pytest.raises(UserError, match=r"compressed as .*python-gdcm.*nearfar-medical\[dicom\]"):
        read_scan(series)


def enhanced(series: Path, path: Path, order=(2, 0, 3, 1)) -> Path:
    """One object of many frames, in another order than they lie, with the intercept of each."""
    items = [pydicom.dcmread(p) for p in sorted(series.iterdir())]
    whole = copy.deepcopy(items[0])
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
                 "RescaleIntercept"):  # fmt: skip
        delattr(whole, name)
    whole.NumberOfFrames = len(items)
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = items[0].PixelSpacing, items[0].SliceThickness
    plane.ImageOrientationPatient = items[0].ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([plane])
    whole.SharedFunctionalGroupsSequence, frames = Sequence([shared]), []
    for i in order:
        frame, place, scale = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = items[i].ImagePositionPatient
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1, -1024, "HU"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([place]), Sequence([scale])
        frames.append(frame)
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    whole.PixelData = b"".join(items[i].PixelData for i in order)
    whole.save_as(path)
    return path


def test_enhanced_objects(series: Path, tmp_path: Path) -> None:
    (tmp_path / "enhanced").mkdir()
    path = enhanced(series, tmp_path / "enhanced/all.dcm")
    plain = read_scan(series)
    for place in (path, path.parent):
        scan = read_scan(place)
        np.testing.assert_array_equal(scan.image, plain.image)
        np.testing.assert_allclose(scan.affine, plain.affine)
    labels = (VOLUME > 500).astype(int)
    seg = highdicom.seg.segread(write_dicom_seg(tmp_path / "seg.dcm", labels, scan, {1: "spleen"}))
    stored = seg.get_volume(combine_segments=True)
    affine = np.diag([-1, -1, 1, 1]) @ stored.affine
    place = lambda points, matrix: {tuple(np.round((matrix @ [*p, 1])[:3], 3) + 0.0) for p in points}  # noqa: E731
    assert place(np.argwhere(labels), scan.affine) == place(np.argwhere(stored.array), affine)
    item = pydicom.dcmread(path)
    del item.PerFrameFunctionalGroupsSequence
    item.save_as(path)
    with pytest.raises(UserError, match="does not say where its frames lie"):
        read_scan(path)


def test_monochrome1_is_turned_round_where_values_mean_nothing(series: Path) -> None:
    def change(item: Dataset, _: int) -> None:
        item.PhotometricInterpretation = "MONOCHROME1"

    edited(series, change)
    scan = read_scan(series)
    np.testing.assert_array_equal(scan.image[0], VOLUME)  # Hounsfield units stay
    assert any("MONOCHROME1" in note for note in scan.notes)
    edited(series, lambda item, _: setattr(item, "Modality", "DX"))
    scan = read_scan(series)
    np.testing.assert_array_equal(scan.image[0], 65535 - (VOLUME + 1024) - 1024)
    assert any("turned round" in note for note in scan.notes)


def test_small_jitter_is_said(series: Path) -> None:
    def change(item: Dataset, number: int) -> None:
        x, y, z = item.ImagePositionPatient
        item.ImagePositionPatient = [x, y, float(z) + (0.1 if number == 1 else 0)]

    edited(series, change)
    scan = read_scan(series)
    assert scan.shape == VOLUME.shape
    assert any("taken as even" in note for note in scan.notes)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("SOPInstanceUID", "1.2.3", "is the same object as"),
        ("PhotometricInterpretation", "MONOCHROME1", "differ in which values are bright"),
        ("PhotometricInterpretation", "PALETTE COLOR", "holds colours"),
        ("RescaleSlope", None, "differ in whether values are rescaled"),
        ("ImageOrientationPatient", [1, 0, 0, 0.5, 0.8, 0], "not of two directions at right angles"),
        ("PixelSpacing", [0.7, 0], "pixels are 0.7 x 0 mm"),
    ],
)
def test_slices_that_do_not_belong_together_are_named(series: Path, attribute: str, value, reason: str) -> None:
    def change(item: Dataset, number: int) -> None:
        if attribute == "SOPInstanceUID" and number in (1, 3):
            item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = value
        elif attribute != "SOPInstanceUID" and number == 2:
            delattr(item, attribute) if value is None else setattr(item, attribute, value)

    edited(series, change)
    for data in (True, False):
        with pytest.raises(UserError, match=reason):
            read_series(series, data)


def test_a_series_without_modality_has_that_of_its_class(series: Path) -> None:
    def change(item: Dataset, _: int) -> None:
        item.PhotometricInterpretation = "MONOCHROME1"
        del item.Modality

    edited(series, change)
    np.testing.assert_array_equal(read_scan(series).image[0], VOLUME)
