"""Reading and writing scans with their geometry: NIfTI, DICOM series, NRRD, pictures.

A volume is held as its file orders it; its affine maps voxel indices to millimetres in RAS+ (nibabel's convention).
Label maps are written on exactly that grid.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.openers import ImageOpener
from nibabel.orientations import io_orientation
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import check_announced, check_picture, reading
from nearfar.medical.data.dicom import read_series, write_dicom_seg
from nearfar.medical.data.scan import SAME, Scan, grid_distance, no_image

__all__ = [
    "NIFTI",
    "NRRD",
    "PICTURES",
    "SAME",
    "SLAB",
    "Scan",
    "grid_distance",
    "label_type",
    "linear_slabs",
    "read_about",
    "read_header",
    "read_labels",
    "read_scan",
    "resize_labels",
    "whole_numbers",
    "write_dicom_seg",
    "write_labels",
    "write_probabilities",
]

NIFTI = (".nii", ".nii.gz")

NRRD = (".nrrd", ".nhdr")

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")

EXIF_ORIENTATION = 0x0112
"""Tag of a picture that says how it is to be turned to be shown."""

UNITS = {"meter": 1000.0, "micron": 0.001}
"""Millimetres in the units of length of NIfTI, where they are others."""

NRRD_UNITS = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "meter": 1000.0, "um": 0.001, "\u00b5m": 0.001,
              "micron": 0.001, "": 1.0}  # fmt: skip
"""Millimetres in the space units of NRRD."""

LEAST_SIDE, LARGEST_SIDE = 0.02, 50.0
"""Millimetres below or above which the sides of a voxel are thought to be in another unit."""

SLAB = 1 << 23
"""Voxels that are worked on at once."""


def read_scan(path: str | Path, channels: int = 1) -> Scan:
    """Read a volume or picture by its name; a folder is a DICOM series. NIfTI volumes may have `channels` as 4th axis.

    Where a file contradicts itself or leaves something open a rule decides, and the scan's `notes` say how: the sform
    before the qform before the voxel sizes alone; units of length as declared; axes that are not at right angles stay.

    Raises UserError that names the file for anything unreadable: truncated data, 4-D where 3-D is expected, NaN
    voxels, mixed series, missing slices ...
    """
    scan = _read(Path(path), channels)
    scan.image = scan.image.astype(np.float32, copy=False)
    return scan


def read_header(path: str | Path, channels: int = 1) -> Scan:
    """As `read_scan` by what stands in headers alone: no voxel is read, and the image is NaN that takes no memory."""
    return _read(Path(path), channels, data=False)


def _read(path: Path, channels: int = 1, exact: bool = False, data: bool = True) -> Scan:
    """As `read_scan`; with `exact` the values of NIfTI and NRRD stay of the type that they are stored in.

    Without `data` the image is none, as in `read_header`.
    """
    if path.is_dir() or (path.suffix.lower() in (".dcm", ".ima") and path.is_file()):
        scan = read_series(path, data)
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    elif path.name.lower().endswith(NIFTI):
        scan = _read_nifti(path, channels, exact, data)
    elif path.suffix.lower() in NRRD:
        scan = _read_nrrd(path, data)
    elif path.suffix.lower() in PICTURES:
        notes: list[str] = []
        pixels = np.moveaxis(_picture(path, "RGB", data, notes), -1, 0)
        scan = Scan(path, pixels.astype(np.float32) if data else pixels, notes=notes)
    else:
        raise UserError(f"{path}: not a format that is read here ({', '.join(NIFTI + NRRD + PICTURES)}, DICOM folder)")
    if not scan.image.size:
        raise UserError(f"{path}: the image is empty {scan.shape}")
    if scan.affine is not None:
        _check_affine(path, scan.affine)
        scan.notes += _odd_sides(scan.affine)
        axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
        tilt = np.degrees(np.arcsin(np.abs(axes.T @ axes - np.eye(3)).max().clip(0, 1)))
        if tilt > 0.1:
            scan.notes.append(
                f"its axes are off right angles by {tilt:.2g} degrees; spacing is that along each axis, so distances "
                "and volumes are those of voxels without the shear"
            )
    if data and scan.image.dtype.kind == "f":
        planes = (scan.image[..., i] for i in range(scan.image.shape[-1]))
        if wrong := sum(plane.size - int(np.isfinite(plane).sum()) for plane in planes):
            raise UserError(f"{path}: {wrong} voxels are NaN or infinite")
    return scan


def read_labels(path: str | Path, like: Scan | None = None, tolerance: float = SAME) -> np.ndarray:
    """A label map as integers of any size and sign; with `like`, it must lie on that scan's grid.

    That is, have the same shape, and corners within `tolerance` voxels. Pictures are read as they are stored: palette
    indices, not colours. Values that are no whole numbers, or too large for their floating type to tell from their
    neighbours, are refused.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURES and path.is_file():
        values, affine = _picture(path), None
        if values.ndim == 3:
            colors = values[..., :-1] if values.shape[-1] in (2, 4) else values  # the last is how opaque
            if (colors[..., :1] != colors).any():
                raise UserError(f"{path}: a colour picture; a mask has one value for each pixel")
            values = colors[..., 0]
    else:
        scan = _read(path, exact=True)
        values, affine = scan.image[0], scan.affine
        if len(scan.image) != 1:
            raise UserError(f"{path}: a label map has one channel, this has {len(scan.image)}")
    labels = whole_numbers(path, values)
    if like is not None:
        if labels.shape != like.shape:
            raise UserError(f"{path}: shape {labels.shape} differs from its image's {like.shape} ({like.path.name})")
        if affine is not None and like.affine is not None:
            apart = grid_distance(like.affine, affine, like.shape)
            if apart > tolerance:
                raise UserError(
                    f"{path}: its affine differs from its image's ({like.path.name}) by up to {apart:.3g} voxels at "
                    "the corners; resample one onto the other"
                )
    return labels


def whole_numbers(path: Path, values: np.ndarray) -> np.ndarray:
    """Stored label values as int32, or int64 where they need it. Raises UserError where they are no whole numbers."""
    if values.dtype.kind == "f":
        largest = 2.0 ** (1 + np.finfo(values.dtype).nmant)
        wrong = "holds values that are no whole numbers, so it is no label map"
        parts = [values[..., i] for i in range(values.shape[-1])]
        if any(np.abs(np.rint(part) - part).max(initial=0) > 1e-3 for part in parts):
            raise UserError(f"{path}: {wrong}")
        if max(np.abs(part).max(initial=0) for part in parts) >= largest:
            raise UserError(
                f"{path}: holds labels from {largest:.0f} on as {values.dtype}, which cannot tell them from their "
                "neighbours; store them as integers"
            )
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if high > np.iinfo(np.int64).max:
        raise UserError(f"{path}: holds the label {high}; labels go up to {np.iinfo(np.int64).max}")
    small = np.iinfo(np.int32).min <= low and high <= np.iinfo(np.int32).max
    kind: Any = np.int32 if small else np.int64
    if values.dtype.kind != "f":
        return values.astype(kind)
    labels = np.empty_like(values, dtype=kind)
    for i in range(values.shape[-1]):
        labels[..., i] = np.rint(values[..., i])
    return labels


def label_type(low: int, high: int) -> Any:
    """The smallest integer type that holds all labels from `low` to `high`."""
    types = (np.uint8, np.uint16, np.int32, np.int64) if low >= 0 else (np.int16, np.int32, np.int64)
    return next(t for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max)


def write_labels(path: str | Path, labels: np.ndarray, like: Scan, about: Mapping[str, Any] | None = None) -> Path:
    """Write a label map (*S) on the grid of `like`, atomically. The name's ending decides: NIfTI, NRRD or PNG.

    It is stored in the smallest type that holds every label. `about` is kept in the file, see `read_about`.
    """
    path = Path(path)
    if labels.shape != like.shape:
        raise ValueError(f"labels {labels.shape} are not on the grid of {like.path.name} {like.shape}")
    kind = label_type(int(labels.min(initial=0)), int(labels.max(initial=0)))
    return _write_map(path, labels.astype(kind, copy=False), like, about)


def read_about(path: str | Path) -> dict[str, Any]:
    """What `write_labels` kept in a file as `about`; nothing where there is none."""
    path = Path(path)
    texts: list[Any] = []
    with reading(path, "its header cannot be read"):
        if path.name.lower().endswith(NIFTI):
            extensions = getattr(nib.load(path).header, "extensions", ())  # type: ignore[attr-defined]
            texts = [e.get_content() for e in extensions if e.get_code() == COMMENT]
        elif path.suffix.lower() == ".nrrd":
            with path.open("rb") as stream:
                texts = [nrrd.read_header(stream).get("nearfar", "")]
        elif path.suffix.lower() == ".png":
            with Image.open(path) as picture:
                texts = [picture.info.get("nearfar", "")]
    for text in texts:
        try:
            found = json.loads(text.rstrip(b"\0") if isinstance(text, bytes) else str(text))
        except ValueError:
            continue  # a comment of someone else's
        if isinstance(found, dict) and "nearfar" in found:
            return dict(found["nearfar"])
    return {}


COMMENT = 6
"""Code of NIfTI's extension for text."""


def write_probabilities(path: str | Path, values: np.ndarray, like: Scan) -> Path:
    """Write one map of float32 values (*S) on the grid of `like`, as NIfTI or NRRD."""
    return _write_map(Path(path), values.astype(np.float32), like)


def _write_map(path: Path, values: np.ndarray, like: Scan, about: Mapping[str, Any] | None = None) -> Path:
    name, text = path.name.lower(), json.dumps({"nearfar": dict(about)}) if about else ""
    with atomic_path(path) as temporary:
        if name.endswith(NIFTI):
            if like.affine is None:
                raise UserError(f"{path}: {like.path.name} is a picture; write PNG")
            with reading(path, f"cannot be written on the grid of {like.path}", "its header is odd; convert it again"):
                image = _nifti(values, like)
                if text:
                    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text.encode()))
                nib.save(image, temporary)
        elif path.suffix.lower() == ".nrrd":
            header = _nrrd_header(like) | ({"nearfar": text} if text else {})
            nrrd.write(str(temporary), values, header, index_order="F")
        elif path.suffix.lower() == ".png" and values.ndim == 2 and values.dtype in (np.uint8, np.uint16):
            info = PngInfo()
            if text:
                info.add_text("nearfar", text)
            Image.fromarray(values).save(temporary, pnginfo=info)
        elif path.suffix.lower() == ".png" and values.ndim == 2:
            raise UserError(f"{path}: PNG holds labels from 0 to 65535; these go beyond, write another format")
        else:
            raise UserError(f"{path}: label maps are written as .nii, .nii.gz or .nrrd, those of pictures as .png")
    return path


def _read_nifti(path: Path, channels: int, exact: bool, read: bool) -> Scan:
    with reading(path, "damaged or no NIfTI file"):
        file: Any = nib.load(path)
        kind = file.header.get_data_dtype()
        if kind.kind not in "iuf":
            what = "colours (RGB)" if kind.names else "complex numbers" if kind.kind == "c" else str(kind)
            raise UserError(f"{path}: its voxels are {what}; a scan has one real number for each, convert it first")
        check_announced(path, math.prod(file.shape) * kind.itemsize, path.name.lower().endswith(".gz"))
        if not read:
            data = no_image(file.shape)
        else:
            data = np.asanyarray(file.dataobj) if exact else np.asarray(file.dataobj, dtype=np.float32)
        affine, notes = _nifti_affine(path, file)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    data = np.moveaxis(data, -1, 0) if data.ndim == 4 and data.shape[-1] == channels else data[None]
    if data.ndim != 4:
        shape = data.shape[1:]
        raise UserError(f"{path}: has {len(shape)} axes {shape}; a volume of three is expected, split it first")
    return Scan(path, data, affine, "nifti", file, notes)


def _nifti_affine(path: Path, file: Any) -> tuple[np.ndarray, list[str]]:
    """The affine to mm that the rules choose, and what is to be said of it."""
    header, shape = file.header, file.shape[:3]
    notes: list[str] = []
    if not hasattr(header, "get_qform") or len(shape) < 3:
        return np.array(file.affine, float), notes
    with ImageOpener(str(path)) as stream:  # as it is stored; nibabel mends what it loads
        sides = type(header).from_fileobj(stream, check=False)["pixdim"][1:4]
    forms = {}
    for name in ("sform", "qform"):
        if int(header[f"{name}_code"]) > 0:
            try:
                forms[name] = np.array(getattr(header, f"get_{name}")(), float)
            except Exception as error:  # whatever nibabel says of a broken quaternion
                notes.append(f"its {name} cannot be read ({error})")
    usable = {name: form for name, form in forms.items() if not _wrong_affine(form)}
    if usable:
        chosen, affine = next(iter(usable.items()))
        if "sform" in forms and chosen == "qform":
            notes.append(f"its sform {_wrong_affine(forms['sform'])}; the qform is used")
        if len(usable) == 2 and (apart := grid_distance(usable["sform"], usable["qform"], shape)) > SAME:
            sizes = [" x ".join(f"{v:.3g}" for v in np.linalg.norm(f[:3, :3], axis=0)) for f in usable.values()]
            axes = ["".join(nib.aff2axcodes(f)) for f in usable.values()]
            notes.append(
                f"its sform ({axes[0]}, {sizes[0]}) and qform ({axes[1]}, {sizes[1]}) differ by up to {apart:.3g} "
                "voxels at the corners; the sform is used"
            )
    elif forms:
        affine = next(iter(forms.values()))
    else:
        affine = np.array(header.get_base_affine(), float)
        notes.append(
            "it says nothing of its orientation (sform and qform codes are 0, or unknown ones); voxel sizes are taken "
            "from pixdim and the axes as LAS, as nibabel does, so left and right are not certain"
        )
    if next(iter(usable), "") != "sform" and not (sides > 0).all():
        told = " x ".join(f"{side:.3g}" for side in sides)
        notes.append(f"its pixdim gives voxel sizes of {told}; 0 is taken as 1, and the sign as none")
    code = int(header["xyzt_units"]) & 7
    unit = {1: "meter", 3: "micron"}.get(code)
    if code > 3:
        notes.append(f"its unit of length has the unknown code {code}; taken as mm")
    if unit is not None:
        factor = UNITS[unit]
        largest = float(np.linalg.norm(affine[:3, :3], axis=0).max())
        if factor * largest > 100:
            notes.append(f"it declares {unit} as unit, which makes voxels of {factor * largest:.3g} mm; taken as mm")
        else:
            affine = np.diag([factor, factor, factor, 1.0]) @ affine
            notes.append(f"it declares {unit} as unit; converted to mm")
    return affine, notes


def _odd_sides(affine: np.ndarray) -> list[str]:
    """A note where voxels are so small or large that their unit may be another than mm."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    odd = "meter" if sides.max() < LEAST_SIDE else "micron" if sides.min() > LARGEST_SIDE else ""
    told = " x ".join(f"{side:.3g}" for side in sides)
    return [f"its voxels are {told} mm; if that is in {odd}s, say so in its header"] if odd else []


def _wrong_affine(affine: np.ndarray) -> str:
    """What is wrong with an affine under which voxels have no place, no size, or axes that cannot be told apart."""
    if not np.isfinite(affine).all():
        return "is not finite"
    if not 1e-20 < abs(np.linalg.det(affine[:3, :3])) < math.inf:
        return "is singular, so its voxels have no size"
    return "has axes that cannot be told apart" if np.isnan(io_orientation(affine)).any() else ""


def _check_affine(path: Path, affine: np.ndarray) -> None:
    if what := _wrong_affine(affine):
        raise UserError(f"{path}: its affine {what}; mend its header or convert it again")


def _nifti(values: np.ndarray, like: Scan) -> Any:
    if like.kind != "nifti":
        plain = nib.Nifti1Image(values, like.affine, dtype=values.dtype)
        plain.header.set_xyzt_units("mm")
        plain.set_sform(like.affine, 1)
        plain.set_qform(like.affine, 1)
        return plain
    original = like.source.header
    if math.prod(like.source.shape[3:]) == 1:
        values = values.reshape(like.source.shape)
    if not hasattr(original, "get_qform"):
        return nib.Nifti1Image(values, like.affine, dtype=values.dtype)
    image: Any = type(like.source)(values, None, original, dtype=values.dtype)
    image.header.extensions = type(image.header.extensions)()
    image.header.set_data_dtype(values.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0
    return image


def _read_nrrd(path: Path, read: bool = True) -> Scan:
    with reading(path, "damaged or no NRRD file"):
        with path.open("rb") as stream:
            header = nrrd.read_header(stream)
            _check_nrrd(path, header)
        data = no_image(map(int, header["sizes"])) if not read else nrrd.read(str(path), index_order="F")[0]
    if data.ndim != 3:
        raise UserError(f"{path}: has {data.ndim} axes {data.shape}; a volume of three is expected")
    affine = np.eye(4)
    with reading(path, "its header does not place it"):
        if "space directions" in header:
            affine[:3, :3] = np.asarray(header["space directions"], float).T
        elif "spacings" in header:
            affine[:3, :3] = np.diag(header["spacings"])
        affine[:3, 3] = header.get("space origin", (0.0, 0.0, 0.0))
    notes = []
    if "space" not in header:
        notes.append("it does not say what its axes are (no space); taken as RAS, so left and right are not certain")
    if "space directions" not in header and "spacings" not in header:
        notes.append("it gives no voxel sizes (neither space directions nor spacings); taken as 1 mm")
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
    units = {str(unit).strip().lower() for unit in header.get("space units", ())} or {"mm"}
    factor = NRRD_UNITS.get(next(iter(units))) if len(units) == 1 else None
    if factor is None:
        raise UserError(
            f"{path}: its space units are {', '.join(sorted(units))}; mm, cm, m or um is read, for all axes"
        )
    if factor != 1:
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
        notes.append(f"it declares {units.pop()} as unit; converted to mm")
    return Scan(path, data[None], affine, "nrrd", header, notes)


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


def _picture(path: Path, mode: str | None = None, read: bool = True, notes: list[str] | None = None) -> np.ndarray:
    """The pixels (height, width, channels), of one channel where it is gray; as they are stored without `mode`.

    `notes` get what of the file is not in them. Raises UserError where it holds several pictures.
    """
    with reading(path, "damaged or no picture"), Image.open(path) as picture:
        check_picture(picture, path)
        number = getattr(picture, "n_frames", 1)
        if notes is not None and number > 1 and picture.format == "MPO":
            notes.append(f"a camera's file of {number} pictures (MPO); the first is read")
        elif number > 1:
            raise UserError(f"{path}: holds {number} pictures; split it, or write the stack as one volume (NIfTI)")
        gray = picture.mode in ("L", "LA", "1") or picture.mode[0] in "IF"  # I;16, I;16B ...
        if notes is not None and not gray and any(";16" in str(tile) for tile in picture.tile):
            notes.append("its colours have 16 bits and are read as 8")
        turn = picture.getexif().get(EXIF_ORIENTATION, 1)
        if notes is not None and turn != 1:
            notes.append(f"its EXIF orientation ({turn}) is not applied; pixels are as stored, as its label map's are")
        if not read:
            return no_image((picture.height, picture.width, 1 if gray else 3))
        veiled = "transparency" in picture.info
        if "A" in picture.getbands():
            veiled |= bool((np.asarray(picture.getchannel("A")) < 255).any())
        if notes is not None and veiled:
            notes.append("some of its pixels are transparent; their colours are taken as they are stored")
        if mode is not None and gray:
            return np.asarray(picture.getchannel("L") if picture.mode == "LA" else picture, dtype=np.float32)[..., None]
        return np.asarray(picture.convert(mode) if mode else picture)


def linear_slabs(image: np.ndarray, size: Sequence[int]) -> Iterator[tuple[slice, np.ndarray]]:
    """An array (*S) on another grid of the same extent, linearly: slabs of the first axis, a few at a time.

    Together they are `F.interpolate(..., align_corners=False)`.
    """
    rows = max(1, SLAB // math.prod((1, *size[1:])))
    place = ((np.arange(size[0]) + 0.5) * (len(image) / size[0]) - 0.5).clip(0, len(image) - 1)
    for start in range(0, size[0], rows):
        where = slice(start, min(start + rows, size[0]))
        yield where, _planes_at(image, place[where], size[1:])


def _planes_at(image: np.ndarray, place: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear interpolation of (*S) at places along the first axis, and to `size` along the others."""
    low = place.astype(int)
    share = (place - low).astype(np.float32).reshape(-1, *[1] * (image.ndim - 1))
    slab = (1 - share) * image[low] + share * image[np.minimum(low + 1, len(image) - 1)]
    mode = "bilinear" if image.ndim == 3 else "linear"
    return F.interpolate(torch.from_numpy(slab)[None], tuple(size), mode=mode, align_corners=False)[0].numpy()


def resize_labels(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A label map on another grid of the same extent: each label's indicator is resized linearly, the largest wins.

    Smoother borders than nearest neighbour; works slab by slab, so that memory grows neither with labels nor volume.
    """
    if tuple(size) == labels.shape:
        return labels
    result = np.zeros(tuple(size), labels.dtype)
    scale, rows = len(labels) / size[0], max(1, SLAB // math.prod((1, *size[1:])))
    for start in range(0, size[0], rows):
        stop = min(start + rows, size[0])
        first, last = max(0, math.floor(start * scale - 0.5)), min(len(labels), math.ceil(stop * scale + 0.5) + 1)
        part, best = labels[first:last], np.full((stop - start, *size[1:]), -1.0, np.float32)
        place = ((np.arange(start, stop) + 0.5) * scale - 0.5).clip(0, len(labels) - 1) - first
        for value in np.unique(part):
            share = _planes_at((part == value).astype(np.float32), place, size[1:])
            better = share > best
            result[start:stop][better], best[better] = value, share[better]
    return result
