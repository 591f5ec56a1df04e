"""Files that several tests of the medical package need."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


@pytest.fixture
def dicom_series() -> Callable[..., None]:
    """Writes a CT series."""
    return write_series


def write_series(
    folder: Path, volume: np.ndarray, directions: np.ndarray, spacing, skip=(), uid=None, in_order=False
) -> None:
    """`volume` (x, y, z) as CT slices of int16 values with intercept -1024, in shuffled order of files."""
    folder.mkdir(exist_ok=True)
    uid, study, frame = uid or generate_uid(), generate_uid(), generate_uid()
    for z in range(volume.shape[2]) if in_order else np.random.default_rng(0).permutation(volume.shape[2]):
        if z in skip:
            continue
        item = pydicom.Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = CTImageStorage
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        item.SeriesInstanceUID, item.StudyInstanceUID, item.FrameOfReferenceUID = uid, study, frame
        item.PatientID, item.PatientName, item.PatientBirthDate, item.PatientSex = "1", "A", "", ""
        item.StudyDate = item.StudyTime = item.AccessionNumber = item.StudyID = item.ReferringPhysicianName = ""
        item.Modality, item.InstanceNumber, item.SeriesNumber = "CT", int(z) + 1, 1
        item.Rows, item.Columns = volume.shape[1], volume.shape[0]
        item.PixelSpacing, item.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        item.ImageOrientationPatient = [*directions[:, 0], *directions[:, 1]]
        item.ImagePositionPatient = [float(v) for v in directions[:, 2] * spacing[2] * z + [1.0, 2.0, 3.0]]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 0
        item.RescaleSlope, item.RescaleIntercept = 1, -1024
        item.PixelData = np.ascontiguousarray((volume[:, :, z].T + 1024).astype(np.uint16)).tobytes()
        name = f"IMG-0004-{z:05d}" if in_order else f"{uid[-4:]}-{generate_uid()[-9:]}"
        item.save_as(folder / f"{name}.dcm", enforce_file_format=True)
