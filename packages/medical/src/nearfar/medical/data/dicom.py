"""DICOM: series of single slices or of many frames in, segmentation objects out."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from highdicom.color import CIELabColor
from highdicom.sr import CodedConcept
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, pixel_array
from pydicom.pixels.processing import apply_modality_lut
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.plots import COLORS
from nearfar.core.reading import UNIFORM, check_announced, reading
from nearfar.medical.data.scan import LPS_TO_RAS, Scan, no_image

PHYSICAL = ("CT", "PT", "NM")
"""Modalities whose values mean something by themselves; MONOCHROME1 only says how to show them."""

STORAGE = "1.2.840.10008.5.1.4.1.1."
CLASSES = {"2": "CT", "2.1": "CT", "2.2": "CT", "128": "PT", "130": "PT", "20": "NM", "66.4": "SEG"}
"""Modalities by the class of the object, for series that do not say theirs."""

JITTER = 0.1
"""Share of the usual gap between slices that a gap may differ from it."""


@dataclass
class Frame:
    """A slice: its object, its place in it (None where the object is one slice), geometry in LPS."""

    item: Any
    index: int | None
    direction: np.ndarray
    position: np.ndarray
    plane: tuple[float, ...]
    thickness: float | None

    @property
    def name(self) -> str:
        return Path(self.item.filename).name + ("" if self.index is None else f", frame {self.index + 1}")


def read_series(place: Path, data: bool = True) -> Scan:
    """The series in a folder, or in one file of many frames, as a scan; without `data` by its headers alone.

    Raises UserError where slices are missing, share a position, differ in size or direction, or are sheared, and for
    pixels that no installed package decodes.
    """
    frames: list[Frame] = []
    seen: dict[str, list[str]] = {}
    for path in [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file()):
        with reading(path, "damaged DICOM file"):
            try:
                item = pydicom.dcmread(path, stop_before_pixels=not data)
            except InvalidDicomError:
                if path.suffix.lower() in (".dcm", ".ima"):
                    raise
                continue  # something else that lies in the folder
            if "FloatPixelData" in item or "DoubleFloatPixelData" in item:
                raise UserError(f"{path}: holds floating-point pixels (a parametric map), not read here; convert it")
            if ("PixelData" if data else "Rows") not in item:
                continue
            if _modality(item) == "SEG":
                raise UserError(f"{path}: is a DICOM segmentation, no scan; put it elsewhere")
            seen.setdefault(str(item.get("SeriesInstanceUID", "")), []).append(path.name)
            frames += _frames(path, item)
    if not frames:
        raise UserError(f"{place}: no DICOM images in this folder")
    if place.is_file() and frames[0].index is None:
        raise UserError(f"{place}: a single slice; give the folder that holds the whole series")
    if len(seen) > 1:
        counts = ", ".join(f"{len(names)} files such as {names[0]}" for names in seen.values())
        raise UserError(f"{place}: holds {len(seen)} series mixed ({counts}); put each into a folder of its own")
    _check_alike(place, list({id(frame.item): frame.item for frame in frames}.values()))
    notes: list[str] = []
    frames, step = _ordered(place, frames, notes)
    with reading(place, "the pixels of a slice cannot be read"):
        shape = (frames[0].plane[1], frames[0].plane[0], len(frames))
        volume = _volume(frames, notes) if data else no_image(map(int, shape))
    first = frames[0]
    row, column = first.direction[:3], first.direction[3:]
    row_spacing, column_spacing = first.plane[2:]  # between rows, between columns
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * column_spacing, column * row_spacing, step
    affine[:3, 3] = first.position
    return Scan(place, volume[None], LPS_TO_RAS @ affine, "dicom", [frame.item for frame in frames], notes)


def _modality(item: Any) -> str:
    """Of an object, by its class where it does not say it."""
    return str(item.get("Modality", "") or CLASSES.get(str(item.get("SOPClassUID", "")).removeprefix(STORAGE), ""))


def _check_alike(place: Path, items: Sequence[Any]) -> None:
    """Raise UserError where an object is there twice, holds colours, or the values of some mean another thing."""
    names: dict[str, str] = {}
    for item in items:
        uid, name = str(item.get("SOPInstanceUID", "")), Path(item.filename).name
        if uid and names.setdefault(uid, name) != name:
            raise UserError(f"{place}: {name} is the same object as {names[uid]}; take one out")
        kind = str(item.get("PhotometricInterpretation", "MONOCHROME2"))
        if not kind.startswith("MONOCHROME"):
            raise UserError(f"{place}: {name} holds colours ({kind}); a slice of a scan has one number for each pixel")
    said = {
        "which values are bright (PhotometricInterpretation)": lambda item: item.get("PhotometricInterpretation"),
        "whether values are rescaled (RescaleSlope)": lambda item: "RescaleSlope" in item,
        "the modality": _modality,
    }
    for what, told in said.items():
        for item in items:
            if told(item) != told(items[0]):
                first, other = (Path(each.filename).name for each in (items[0], item))
                raise UserError(f"{place}: {first} and {other} differ in {what}; export the series again")


def _frames(path: Path, item: Any) -> list[Frame]:
    count = int(item.get("NumberOfFrames", None) or 1)
    if "PerFrameFunctionalGroupsSequence" not in item:
        if count > 1:
            raise UserError(
                f"{path}: a multi-frame DICOM object that does not say where its frames lie (no functional groups); "
                "export it as an enhanced object or as single slices"
            )
        return [_frame(item, None, lambda name: item)]
    own, shared = item.PerFrameFunctionalGroupsSequence, item.get("SharedFunctionalGroupsSequence") or [{}]
    if len(own) != count:
        raise UserError(f"{path}: announces {count} frames and describes {len(own)}; it is damaged, copy it again")

    def group(frame: Any, name: str) -> Any:
        return (frame.get(name) or shared[0].get(name) or [pydicom.Dataset()])[0]

    return [_frame(item, i, lambda name, frame=frame: group(frame, name)) for i, frame in enumerate(own)]  # type: ignore[misc]


def _frame(item: Any, index: int | None, group: Any) -> Frame:
    """The frame whose attributes stand in the functional group (or object) `group(name)`."""
    with reading(Path(item.filename), "lacks its position, orientation or spacing", "export the series again"):
        direction = np.array(group("PlaneOrientationSequence").ImageOrientationPatient, float).reshape(6)
        position = np.array(group("PlanePositionSequence").ImagePositionPatient, float).reshape(3)
        measures = group("PixelMeasuresSequence")
        down, across = map(float, measures.PixelSpacing)
        plane = (int(item.Rows), int(item.Columns), down, across)
        thick = measures.get("SliceThickness") or measures.get("SpacingBetweenSlices")
        thickness = float(thick) if thick else None
        if not all(np.isfinite(values).all() for values in (direction, position, plane, thickness or 1.0)):
            raise ValueError("a number is not finite")
        turns = direction.reshape(2, 3)
        if np.abs(turns @ turns.T - np.eye(2)).max() > 1e-2:
            raise ValueError(f"orientation {direction.tolist()} is not of two directions at right angles")
        if min(down, across) <= 0:
            raise ValueError(f"pixels are {down:g} x {across:g} mm")
        return Frame(item, index, direction, position, plane, thickness)


def _ordered(place: Path, frames: list[Frame], notes: list[str]) -> tuple[list[Frame], np.ndarray]:
    """The frames in order along their normal, and the step from one to the next, in mm."""
    reference = frames[len(frames) // 2]
    for frame in frames:
        apart = float(np.abs(frame.direction - reference.direction).max())
        if apart > 1e-3 or frame.plane != reference.plane:
            raise UserError(
                f"{place}: the slices differ in orientation, size or pixel spacing ({frame.name} from "
                f"{reference.name}); if it is a localizer, take it out"
            )
    normal = np.cross(reference.direction[:3], reference.direction[3:])
    frames = sorted(frames, key=lambda frame: float(frame.position @ normal))
    thickness = reference.thickness
    if len(frames) == 1:
        if thickness is None:
            notes.append("a single slice that does not say how thick it is; taken as 1 mm")
        return frames, normal * (thickness or 1.0)
    positions = np.stack([frame.position for frame in frames])
    gaps = np.diff(positions, axis=0) @ normal
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise UserError(
            f"{place}: {int((gaps < 1e-3).sum())} slices share their position with another; put each time point or "
            "echo into a folder of its own"
        )
    odd = np.abs(gaps - usual)
    if odd.max() > JITTER * usual + 1e-3:
        where = int(np.argmax(odd))
        what = "a slice is missing" if abs(gaps[where] / usual - round(gaps[where] / usual)) < JITTER else "uneven"
        raise UserError(
            f"{place}: {what}: slices {where + 1} and {where + 2} lie {gaps[where]:.3g} mm apart, "
            f"the others {usual:.3g} mm"
        )
    if odd.max() > 0.02 * usual:
        notes.append(f"its slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart; taken as even")
    if np.abs(step - normal * (step @ normal)).max() > 0.01 * usual:
        raise UserError(f"{place}: the gantry was tilted (slices are sheared); resample the series first")
    return frames, step


def _volume(frames: Sequence[Frame], notes: list[str]) -> np.ndarray:
    """(x, y, z) in float32. Pixel data are let go as they are decoded; nothing is allocated before the first is."""
    volume: np.ndarray | None = None
    for i, frame in enumerate(frames):
        plane = _pixels(frame, notes)
        if volume is None:
            volume = np.empty((len(frames), *plane.shape), np.float32)
        volume[i] = plane
        if frame.index is None:
            del frame.item.PixelData
    assert volume is not None
    for item in {id(frame.item): frame.item for frame in frames if frame.index is not None}.values():
        del item.PixelData
    return volume.transpose(2, 1, 0)


def _pixels(frame: Frame, notes: list[str]) -> np.ndarray:
    item, path = frame.item, Path(frame.item.filename)
    with reading(path, "its pixels cannot be read"):
        _check_decoder(path, item.file_meta.get("TransferSyntaxUID"))
        shape = int(item.Rows), int(item.Columns)
        number = math.prod(shape) * int(item.get("NumberOfFrames", None) or 1)
        if math.prod(shape) > UNIFORM or frame.index is not None:
            check_announced(path, number, compressed=True, size=len(item.PixelData))
        plane = pixel_array(item, index=frame.index)
        if plane.shape != shape:
            raise UserError(f"{path}: its pixels are {plane.shape}; a slice of a scan has one number for each")
        if item.get("PhotometricInterpretation") == "MONOCHROME1":
            if _modality(item) in PHYSICAL:
                note = f"MONOCHROME1: shown dark for high values; {_modality(item)} values are taken as they are"
            else:
                note = "MONOCHROME1: low values are bright; turned round so that high values are"
                bits = int(item.BitsStored)
                plane = (-1 if int(item.PixelRepresentation) else 2**bits - 1) - plane.astype(np.int64)
            if note not in notes:
                notes.append(note)
        scale = item
        if frame.index is not None:
            own, shared = item.PerFrameFunctionalGroupsSequence[frame.index], item.get("SharedFunctionalGroupsSequence")
            name = "PixelValueTransformationSequence"
            scale = (own.get(name) or (shared[0].get(name) if shared else None) or [item])[0]
        if "ModalityLUTSequence" in scale:
            return apply_modality_lut(plane, scale).astype(np.float32)
        slope, intercept = (scale.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
        slope, intercept = (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))
        return plane.astype(np.float32) * slope + intercept


def _check_decoder(path: Path, syntax: Any) -> None:
    """Raise UserError that names the package where none that is installed decodes pixels of this transfer syntax."""
    if syntax is None or not syntax.is_compressed or syntax.is_deflated:
        return
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(f"{path}: its pixels are compressed as {syntax.name}, which nothing here decodes") from None
    if not decoder.is_available:
        raise UserError(
            f"{path}: its pixels are compressed as {syntax.name}; the package python-gdcm decodes them, install "
            "nearfar-medical[dicom]"
        )


CODED = {
    "vena cava": "InferiorVenaCava", "vessel": "BloodVessel", "vessels": "BloodVessel",
    "whole tumor": "Tumor", "tumor core": "Tumor", "enhancing tumor": "Tumor", "necrotic core": "Necrosis",
    "bladder": "UrinaryBladder", "lesions": "Lesion", "adrenal": "AdrenalGland",
}  # fmt: skip
"""Keywords in pydicom's dictionary of SNOMED codes of names that are not spelled as there."""

SPELLING = {"tumour": "tumor", "oedema": "edema", "oesophagus": "esophagus", "grey": "gray", "haem": "hem"}

ABNORMAL = ("Tumor", "Neoplasm", "Lesion", "Edema", "Necrosis", "Mass", "Nodule", "Cyst", "Hemorrhage", "Calcification")

Coded = tuple[CodedConcept, CodedConcept, CodedConcept | None]


def segment_code(name: str) -> Coded | None:
    """SNOMED CT codes of a label by its name: category, type, and side where it has one. None where none is known."""
    words = name.lower().replace("_", " ").replace("-", " ").split()
    for british, american in SPELLING.items():
        words = [word.replace(british, american) for word in words]
    side = next((word for word in words if word in ("left", "right")), None)
    whole, rest = " ".join(words), " ".join(word for word in words if word != side)
    for text, lateral in ((whole, None), (rest, side)):
        keyword = CODED.get(text) or "".join(word.capitalize() for word in text.split())
        for spelled in (keyword, keyword.removesuffix("s")):
            if spelled and (code := getattr(codes.SCT, spelled, None)) is not None:
                abnormal = any(spelled.endswith(word) for word in ABNORMAL)
                category = codes.SCT.MorphologicallyAbnormalStructure if abnormal else codes.SCT.AnatomicalStructure
                concepts = [CodedConcept.from_code(c) for c in (category, code)]
                modifier = None if lateral is None else CodedConcept.from_code(getattr(codes.SCT, lateral.capitalize()))
                return concepts[0], concepts[1], modifier
    return None


NEEDED = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
          "ReferringPhysicianName", "StudyID", "PositionReferenceIndicator")  # fmt: skip
"""Attributes that must be there and may be empty (type 2); anonymizers take them out."""


def _completed(items: Sequence[Any], like: Scan) -> list[Any]:
    """Copies of the slices' objects with what a reference to them needs: empty, or made from what is there."""
    series = str(items[0].get("SeriesInstanceUID", "")) or str(items[0].get("SOPInstanceUID", ""))
    made: dict[str, Any] = dict.fromkeys(NEEDED, "")
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        made[name] = generate_uid(entropy_srcs=[series, name])
    made |= {"SliceThickness": like.spacing[2], "SeriesNumber": 1, "Manufacturer": ""}
    result = []
    for number, item in enumerate(items, 1):
        if "SOPInstanceUID" not in item or "SOPClassUID" not in item:
            raise UserError(f"{item.filename}: has no UID of its own, so no segmentation can refer to it; export it")
        whole = copy.deepcopy(item)
        for name, value in (made | {"InstanceNumber": number}).items():
            if name not in whole:
                setattr(whole, name, value)
        result.append(whole)
    return result


def write_dicom_seg(
    path: str | Path,
    labels: np.ndarray,
    like: Scan,
    names: Mapping[int, str],
    coded: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write a label map as a DICOM segmentation object that refers to the series `like` was read from.

    A segment for each of `names` but 0, in their order, with a colour of its own and codes by its name (`segment_code`,
    "Tissue" where none is known). `coded` gives others by name: `code`, `scheme`, `meaning`, and `color` as #rrggbb.
    """
    if like.kind != "dicom":
        raise UserError(f"{path}: a DICOM segmentation needs a DICOM series as input, {like.path.name} is none")
    present = {number: name for number, name in names.items() if number != 0}
    tissue = CodedConcept.from_code(codes.SCT.Tissue)
    described = []
    for i, ((_, name), color) in enumerate(zip(present.items(), cycle(COLORS)), 1):
        category, kind, side = segment_code(name) or (tissue, tissue, None)
        if own := (coded or {}).get(name):
            with reading(Path(path), f"no code can be made of {dict(own)} for {name!r}", "give code, scheme, meaning"):
                if "code" in own:
                    kind, side = CodedConcept(own["code"], own["scheme"], own["meaning"]), None
                color = own.get("color", color)
        red, green, blue = (int(color.lstrip("#")[k : k + 2], 16) for k in (0, 2, 4))
        segment = highdicom.seg.SegmentDescription(
            segment_number=i,
            segment_label=name[:64],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name="nearfar", version="1", family=CodedConcept("123110", "DCM", "Artificial Intelligence")
            ),
            display_color=CIELabColor.from_rgb(red, green, blue),
        )
        if side is not None:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
        described.append(segment)
    numbers = np.zeros(labels.shape, np.uint8 if len(present) < 256 else np.uint16)
    for i, number in enumerate(present, 1):
        numbers[labels == number] = i
    frames, options = numbers.transpose(2, 1, 0), {}
    items = list(like.source)
    if "PerFrameFunctionalGroupsSequence" in items[0]:
        if len({id(item) for item in items}) > 1:
            raise UserError(
                f"{path}: {like.path.name} is of several multi-frame objects; no segmentation refers to all"
            )
        options, items = _placed(like), items[:1]
    segmentation = highdicom.seg.Segmentation(
        source_images=_completed(items, like),
        pixel_array=np.ascontiguousarray(frames),
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
        omit_empty_frames=bool(numbers.any()),
        **options,
    )
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)
    return Path(path)


def _placed(like: Scan) -> dict[str, Any]:
    """Where the slices of a scan lie, as a segmentation of a multi-frame object says it."""
    assert like.affine is not None
    affine, sizes = LPS_TO_RAS @ like.affine, like.spacing
    row, column = affine[:3, 0] / sizes[0], affine[:3, 1] / sizes[1]
    patient = highdicom.CoordinateSystemNames.PATIENT
    places = [affine[:3, 3] + i * affine[:3, 2] for i in range(like.shape[2])]
    return {
        "pixel_measures": highdicom.PixelMeasuresSequence([sizes[1], sizes[0]], sizes[2]),
        "plane_orientation": highdicom.PlaneOrientationSequence(patient, [*row, *column]),
        "plane_positions": [highdicom.PlanePositionSequence(patient, place) for place in places],
    }
