"""Reading and writing scans with their geometry: NIfTI, DICOM series, NRRD, pictures.

A volume is held as its file orders it; its affine maps voxel indices to millimetres in RAS+ (nibabel's convention).
Label maps are written on exactly that grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import nrrd
import numpy as np
import pydicom
from nibabel.orientations import apply_orientation, io_orientation
from PIL import Image
from pydicom.errors import InvalidDicomError

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import UNIFORM, check_announced, check_picture, reading

NIFTI = (".nii", ".nii.gz")

NRRD = (".nrrd", ".nhdr")

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass
class Scan:
    """An image (C, *S) in float32 and where its voxels lie.

    `affine` (4, 4) is None for pictures, whose axes are (row, column). `source` is what its format needs to write
    something on the same grid.
    """

    path: Path
    image: np.ndarray
    affine: np.ndarray | None = None
    kind: str = "picture"
    source: Any = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel along each axis, in mm; 1 for pictures."""
        if self.affine is None:
            return (1.0,) * (self.image.ndim - 1)
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Directions in which the axes grow, such as RAS or LPS; "rows, columns" for pictures."""
        return "rows, columns" if self.affine is None else "".join(nib.aff2axcodes(self.affine))

    def canonical(self) -> np.ndarray:
        """The image (C, *S) with its axes permuted and flipped so that they come nearest to RAS+; no resampling."""
        if self.affine is None:
            return self.image
        order = io_orientation(self.affine)
        return np.stack([apply_orientation(channel, order) for channel in self.image])

    def canonical_spacing(self) -> tuple[float, ...]:
        """`spacing` in the order of `canonical`."""
        if self.affine is None:
            return self.spacing
        order = io_orientation(self.affine)[:, 0].astype(int)
        return tuple(self.spacing[int(np.flatnonzero(order == axis)[0])] for axis in range(3))

    def to_canonical(self, labels: np.ndarray) -> np.ndarray:
        """A map on this scan's grid, in the order of `canonical`."""
        return labels if self.affine is None else apply_orientation(labels, io_orientation(self.affine))

    def from_canonical(self, labels: np.ndarray) -> np.ndarray:
        """A map in the order of `canonical`, on this scan's grid: the exact inverse of `to_canonical`."""
        if self.affine is None:
            return labels
        order = io_orientation(self.affine)
        back = np.zeros_like(order)
        for axis, (target, flip) in enumerate(order):
            back[int(target)] = (axis, flip)
        return apply_orientation(labels, back)


def read_scan(path: str | Path, channels: int = 1) -> Scan:
    """Read a volume or picture by its name; a folder is a DICOM series. NIfTI volumes may have `channels` as 4th axis.

    Raises UserError that names the file for anything unreadable: truncated data, 4-D where 3-D is expected, NaN
    voxels, mixed series, missing slices ...
    """
    path = Path(path)
    if path.is_dir():
        scan = _read_dicom(path)
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    elif path.name.lower().endswith(NIFTI):
        scan = _read_nifti(path, channels)
    elif path.suffix.lower() in NRRD:
        scan = _read_nrrd(path)
    elif path.suffix.lower() in PICTURES:
        scan = Scan(path, np.moveaxis(_picture(path, "RGB"), -1, 0).astype(np.float32))
    elif path.suffix.lower() == ".dcm":
        raise UserError(f"{path}: a single DICOM file; give the folder that holds the whole series")
    else:
        raise UserError(f"{path}: not a format that is read here ({', '.join(NIFTI + NRRD + PICTURES)}, DICOM folder)")
    if not scan.image.size:
        raise UserError(f"{path}: the image is empty {scan.shape}")
    if scan.affine is not None:
        _check_affine(path, scan.affine)
    if not np.isfinite(scan.image).all():
        raise UserError(f"{path}: {int((~np.isfinite(scan.image)).sum())} voxels are NaN or infinite")
    return scan


def read_labels(path: str | Path, like: Scan | None = None, tolerance: float = 1e-3) -> np.ndarray:
    """A label map as integers; with `like`, it must lie on that scan's grid (same shape, affine to `tolerance` mm).

    Pictures are read as they are stored: palette indices, not colours.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURES and path.is_file():
        values, affine = _picture(path), None
        if values.ndim == 3:
            if (values[..., :1] != values[..., :3]).any():
                raise UserError(f"{path}: a colour picture; a mask has one value for each pixel")
            values = values[..., 0]
    else:
        scan = read_scan(path)
        values, affine = scan.image[0], scan.affine
        if len(scan.image) != 1:
            raise UserError(f"{path}: a label map has one channel, this has {len(scan.image)}")
    labels = np.rint(values).astype(np.int32)
    if np.abs(labels - values).max(initial=0) > 1e-3:
        raise UserError(f"{path}: holds values that are no whole numbers, so it is no label map")
    if like is not None:
        if labels.shape != like.shape:
            raise UserError(f"{path}: shape {labels.shape} differs from its image's {like.shape} ({like.path.name})")
        if affine is not None and like.affine is not None and not np.allclose(affine, like.affine, atol=tolerance):
            raise UserError(
                f"{path}: its affine differs from its image's ({like.path.name}) by up to "
                f"{np.abs(affine - like.affine).max():.3g}; resample one onto the other"
            )
    return labels


def write_labels(path: str | Path, labels: np.ndarray, like: Scan) -> Path:
    """Write a label map (*S) on the grid of `like`, atomically. The name's ending decides: NIfTI, NRRD or PNG."""
    path = Path(path)
    if labels.shape != like.shape:
        raise ValueError(f"labels {labels.shape} are not on the grid of {like.path.name} {like.shape}")
    dtype = np.uint8 if labels.max(initial=0) <= 255 else np.int16
    return _write_map(path, labels.astype(dtype), like)


def write_probabilities(path: str | Path, values: np.ndarray, like: Scan) -> Path:
    """Write one map of float32 values (*S) on the grid of `like`, as NIfTI or NRRD."""
    return _write_map(Path(path), values.astype(np.float32), like)


def _write_map(path: Path, values: np.ndarray, like: Scan) -> Path:
    name = path.name.lower()
    with atomic_path(path) as temporary:
        if name.endswith(NIFTI):
            if like.affine is None:
                raise UserError(f"{path}: {like.path.name} is a picture; write PNG")
            with reading(path, f"cannot be written on the grid of {like.path}", "its header is odd; convert it again"):
                nib.save(_nifti(values, like), temporary)
        elif path.suffix.lower() == ".nrrd":
            nrrd.write(str(temporary), values, _nrrd_header(like), index_order="F")
        elif path.suffix.lower() == ".png" and values.ndim == 2 and values.dtype == np.uint8:
            Image.fromarray(values).save(temporary)
        else:
            raise UserError(f"{path}: label maps are written as .nii, .nii.gz or .nrrd, those of pictures as .png")
    return path


def write_dicom_seg(path: str | Path, labels: np.ndarray, like: Scan, names: dict[int, str]) -> Path:
    """Write a label map as a DICOM segmentation object that refers to the series `like` was read from."""
    if like.kind != "dicom":
        raise UserError(f"{path}: a DICOM segmentation needs a DICOM series as input, {like.path.name} is none")
    codes = highdicom.sr.CodedConcept
    tissue = codes("85756007", "SCT", "Tissue")
    present = {number: name for number, name in names.items() if number > 0}
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=i,
            segment_label=name,
            segmented_property_category=tissue,
            segmented_property_type=tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name="nearfar", version="1", family=codes("123110", "DCM", "Artificial Intelligence")
            ),
        )
        for i, name in enumerate(present.values(), 1)
    ]
    masks = np.stack([labels == number for number in present], -1)  # (X, Y, Z, segments)
    pixels = masks.transpose(2, 1, 0, 3).astype(np.uint8)
    segmentation = highdicom.seg.Segmentation(
        source_images=like.source,
        pixel_array=pixels,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=highdicom.UID(),
        series_number=100,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="nearfar",
        manufacturer_model_name="nearfar",
        software_versions="1",
        device_serial_number="1",
        omit_empty_frames=False,
    )
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)
    return Path(path)


def _read_nifti(path: Path, channels: int) -> Scan:
    with reading(path, "damaged or no NIfTI file"):
        file: Any = nib.load(path)
        kind = file.header.get_data_dtype()
        if kind.kind not in "iuf":
            what = "colours (RGB)" if kind.names else "complex numbers" if kind.kind == "c" else str(kind)
            raise UserError(f"{path}: its voxels are {what}; a scan has one real number for each, convert it first")
        check_announced(path, math.prod(file.shape) * kind.itemsize, path.name.lower().endswith(".gz"))
        data = np.asarray(file.dataobj, dtype=np.float32)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    data = np.moveaxis(data, -1, 0) if data.ndim == 4 and data.shape[-1] == channels else data[None]
    if data.ndim != 4:
        shape = data.shape[1:]
        raise UserError(f"{path}: has {len(shape)} axes {shape}; a volume of three is expected, split it first")
    return Scan(path, data, np.array(file.affine, float), "nifti", file)


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Raise UserError where voxels have no place, no size, or axes that cannot be told apart."""
    what = "is not finite" if not np.isfinite(affine).all() else ""
    if not what and not 1e-12 < abs(np.linalg.det(affine[:3, :3])) < math.inf:
        what = "is singular, so its voxels have no size"
    if not what and np.isnan(io_orientation(affine)).any():
        what = "has axes that cannot be told apart"
    if what:
        raise UserError(f"{path}: its affine {what}; mend its header or convert it again")


def _nifti(values: np.ndarray, like: Scan) -> Any:
    if like.kind != "nifti":
        plain = nib.Nifti1Image(values, like.affine)
        plain.header.set_xyzt_units("mm")
        plain.set_sform(like.affine, 1)
        plain.set_qform(like.affine, 1)
        return plain
    original = like.source.header
    if math.prod(like.source.shape[3:]) == 1:
        values = values.reshape(like.source.shape)
    image: Any = type(like.source)(values, None, original) if hasattr(original, "get_qform") else None
    if image is None:
        return nib.Nifti1Image(values, like.affine)
    image.header.set_data_dtype(values.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0
    return image


def _read_nrrd(path: Path) -> Scan:
    with reading(path, "damaged or no NRRD file"):
        with path.open("rb") as stream:
            _check_nrrd(path, nrrd.read_header(stream))
        data, header = nrrd.read(str(path), index_order="F")
    if data.ndim != 3:
        raise UserError(f"{path}: has {data.ndim} axes {data.shape}; a volume of three is expected")
    affine = np.eye(4)
    with reading(path, "its header does not place it"):
        if "space directions" in header:
            affine[:3, :3] = np.asarray(header["space directions"], float).T
        elif "spacings" in header:
            affine[:3, :3] = np.diag(header["spacings"])
        affine[:3, 3] = header.get("space origin", (0.0, 0.0, 0.0))
    space = str(header.get("space", "right-anterior-superior")).lower()
    flips = {
        "right-anterior-superior": (1, 1, 1),
        "ras": (1, 1, 1),
        "left-anterior-superior": (-1, 1, 1),
        "las": (-1, 1, 1),
        "left-posterior-superior": (-1, -1, 1),
        "lps": (-1, -1, 1),
    }
    if space not in flips or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path}: its space {space!r} or its directions cannot be placed in a patient")
    affine = np.diag([*flips[space], 1.0]) @ affine
    return Scan(path, data.astype(np.float32)[None], affine, "nrrd", header)


def _check_nrrd(path: Path, header: Any) -> None:
    """Raise UserError where a header announces more than its file holds, or names a file elsewhere for its data."""
    detached = header.get("data file", header.get("datafile"))
    data = path if detached is None else path.parent / str(detached)
    if data.parent != path.parent or not data.is_file():
        raise UserError(f"{path}: its data are in {detached!r}, which is no file beside it; put them together")
    encoding = str(header.get("encoding", "raw")).lower()
    voxels, packed = math.prod(int(n) for n in header["sizes"]), encoding not in ("raw", "ascii", "text", "txt")
    check_announced(path, voxels, packed, data.stat().st_size)  # a byte or more each


def _nrrd_header(like: Scan) -> dict[str, Any]:
    if like.kind == "nrrd":
        kept = ("space", "space directions", "space origin", "kinds", "space units", "spacings", "measurement frame")
        return {name: like.source[name] for name in kept if name in like.source}
    if like.affine is None:
        raise UserError(f"{like.path.name} is a picture; write PNG")
    return {
        "space": "right-anterior-superior",
        "space directions": like.affine[:3, :3].T,
        "space origin": like.affine[:3, 3],
        "kinds": ["domain"] * 3,
    }


def _read_dicom(folder: Path) -> Scan:
    slices: list[Any] = []
    seen: dict[Any, Any] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with reading(path, "damaged DICOM file"):
            try:
                item = pydicom.dcmread(path)
            except InvalidDicomError:
                if path.suffix.lower() in (".dcm", ".ima"):
                    raise
                continue  # something else that lies in the folder
            if "PixelData" not in item:
                continue
            if int(item.get("NumberOfFrames", None) or 1) > 1:
                raise UserError(f"{path}: a multi-frame DICOM object; convert it to NIfTI first")
            seen.setdefault(str(item.get("SeriesInstanceUID", "")), []).append(path.name)
            slices.append(item)
    if not slices:
        raise UserError(f"{folder}: no DICOM images in this folder")
    if len(seen) > 1:
        counts = ", ".join(f"{len(names)} files such as {names[0]}" for names in seen.values())
        raise UserError(f"{folder}: holds {len(seen)} series mixed ({counts}); put each into a folder of its own")
    geometry = [_geometry(item) for item in slices]
    directions, positions = (np.stack(values) for values in list(zip(*geometry))[:2])
    in_plane = [plane for *_, plane, _ in geometry]
    thickness = geometry[0][3]
    if np.abs(directions - directions[0]).max() > 1e-4 or len(set(in_plane)) > 1:
        raise UserError(f"{folder}: the slices differ in orientation, size or pixel spacing")
    row, column = directions[0, :3], directions[0, 3:]
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal)
    slices, positions = [slices[i] for i in order], positions[order]
    steps = np.diff(positions, axis=0)
    step = normal * thickness
    if len(slices) > 1:
        gaps = steps @ normal
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        usual = float(np.median(gaps))
        if gaps.min() < 1e-3:
            raise UserError(f"{folder}: {int((gaps < 1e-3).sum())} slices share their position with another")
        if np.abs(gaps - usual).max() > 0.02 * usual + 1e-3:
            where = int(np.argmax(np.abs(gaps - usual)))
            raise UserError(
                f"{folder}: a slice is missing: slices {where + 1} and {where + 2} lie {gaps[where]:.3g} mm apart, "
                f"the others {usual:.3g} mm"
            )
        if np.abs(step - normal * (step @ normal)).max() > 0.01 * usual:
            raise UserError(f"{folder}: the gantry was tilted (slices are sheared); resample the series first")
    with reading(folder, "the pixels of a slice cannot be read"):
        planes = [_rescaled(s) for s in slices]
    row_spacing, column_spacing = in_plane[0][2:]  # between rows, between columns
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * column_spacing, column * row_spacing, step
    affine[:3, 3] = positions[0]
    volume = np.stack(planes, -1).transpose(1, 0, 2)  # (rows, columns, slices) to (x, y, z)
    return Scan(folder, volume[None].astype(np.float32), LPS_TO_RAS @ affine, "dicom", slices)


def _geometry(item: Any) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], float]:
    """Directions of rows and columns (6,), position (3,), rows, columns and their spacing, thickness of a slice."""
    with reading(Path(item.filename), "lacks its position, orientation or spacing", "export the series again"):
        direction = np.array(item.ImageOrientationPatient, float).reshape(6)
        position = np.array(item.ImagePositionPatient, float).reshape(3)
        down, across = map(float, item.PixelSpacing)
        plane = (int(item.Rows), int(item.Columns), down, across)
        thickness = float(item.get("SliceThickness") or 1.0)
        if not all(np.isfinite(values).all() for values in (direction, position, plane, thickness)):
            raise ValueError("a number is not finite")
        return direction, position, plane, thickness


def _rescaled(item: Any) -> np.ndarray:
    path = Path(item.filename)
    with reading(path, "its pixels cannot be read"):
        slope, intercept = float(item.get("RescaleSlope", 1)), float(item.get("RescaleIntercept", 0))
        shape = int(item.Rows), int(item.Columns)
        if math.prod(shape) > UNIFORM:
            check_announced(path, math.prod(shape), compressed=True, size=len(item.PixelData))
        plane = item.pixel_array
        if plane.shape != shape:
            raise UserError(f"{path}: its pixels are {plane.shape}; a slice of a scan has one number for each")
        return plane.astype(np.float32) * slope + intercept


def _picture(path: Path, mode: str | None = None) -> np.ndarray:
    with reading(path, "damaged or no picture"), Image.open(path) as picture:
        check_picture(picture, path)
        if mode is not None and picture.mode in ("L", "I", "I;16", "F", "1"):
            return np.asarray(picture, dtype=np.float32)[..., None]
        return np.asarray(picture.convert(mode) if mode else picture)


def resize_labels(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A label map on another grid of the same extent: each label's indicator is resized linearly, the largest wins.

    Smoother borders than nearest neighbour; holds two volumes at a time, however many labels there are.
    """
    import torch
    import torch.nn.functional as F

    if tuple(size) == labels.shape:
        return labels
    mode = "trilinear" if labels.ndim == 3 else "bilinear"
    best, result = np.full(tuple(size), -1.0, np.float32), np.zeros(tuple(size), labels.dtype)
    for value in np.unique(labels):
        mask = torch.from_numpy((labels == value).astype(np.float32))[None, None]
        share = F.interpolate(mask, tuple(size), mode=mode, align_corners=False)[0, 0].numpy()
        better = share > best
        result[better], best[better] = value, share[better]
    return result
