"""Finding the cases of a folder: public data sets by their layout, any pair of image and label folders, loose scans."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nearfar.core.errors import UserError, some
from nearfar.core.files import write_json
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.leakage import Side, check_apart
from nearfar.core.reading import check_hdf5, read_arrays, reading
from nearfar.medical.data.scan import SAME, Scan, grid_distance, no_image
from nearfar.medical.data.scans import read_header, read_labels, read_scan, whole_numbers
from nearfar.medical.metrics import score_case


@dataclass(frozen=True)
class Case:
    """One image with its label map. `group` is the patient: cases of one group never part over a split.

    `images` are the files of the channels (one for most data); `part` is "train", "test" or ""; `more_labels` are
    further masks of the same label.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str = ""
    part: str = ""
    more_labels: tuple[Path, ...] = ()


@dataclass
class Collection:
    """The cases of a folder, what their label values mean, and how the data set stores them.

    Args:
        gray: masks are pictures whose grey values (lowest, highest) stand for a label value.
        ignore: a label value that does not count.
        regions: names of unions of labels that are scored too; they may overlap.
        order: where networks are trained on `regions`, the label that stands for each, later ones over earlier ones.
        channels: of a file; more than one where volumes have a fourth axis.
        channel_names: what each channel is, "CT" or "T1"; see `preparation.scheme_of`.
        notes: what had to be decided about the folder.
    """

    layout: str
    cases: list[Case]
    labels: dict[int, str] = field(default_factory=dict)
    gray: tuple[tuple[int, int, int], ...] = ()
    ignore: int | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    channels: int = 1
    channel_names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def trained_on_regions(self, names: Sequence[str]) -> "Collection":
        """The same with networks trained on regions, which may overlap: of `regions`, or labels by their names.

        A region is painted with its one label that lies in no smaller region of them. Raises UserError for unknown
        names, and where that is not one label.
        """
        known = {name: (value,) for value, name in self.labels.items() if value} | self.regions
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"region {some(unknown)}: unknown; the data declare {some(known, 20)}")
        if len(set(names)) < len(names):
            raise UserError(f"regions {', '.join(names)}: each is named once")
        chosen = {name: known[name] for name in sorted(names, key=lambda name: -len(known[name]))}
        order = []
        for place, (name, values) in enumerate(chosen.items()):
            inner = {value for smaller in list(chosen.values())[place + 1 :] for value in smaller}
            if len(own := [value for value in values if value not in inner]) != 1:
                raise UserError(
                    f"region {name}: one of its labels ({', '.join(map(str, values))}) must lie in no smaller region, "
                    f"to stand for it; {len(own)} do. Name others, or declare regions_class_order in dataset.json"
                )
            order += own
        inside = {value for values in chosen.values() for value in values}
        left = [name for value, name in self.labels.items() if value and value not in inside]
        notes = [f"{some(left)}: in none of the regions, and background to the network"] if left else []
        return replace(self, regions=chosen, order=tuple(order), notes=[*self.notes, *notes])

    def score(
        self, prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], **options: Any
    ) -> list[dict[str, Any]]:
        """Rows of `metrics.score_case`: of the labels and regions, or of the regions alone where those are trained.

        What the truth says to ignore does not count.
        """
        if self.ignore is not None:
            prediction, truth = (np.where(truth == self.ignore, 0, m) for m in (prediction, truth))
        names = self.labels or {int(v): str(v) for v in np.unique(truth) if v}
        rows = score_case(prediction, truth, names, spacing, regions=self.regions, **options)
        return rows[-len(self.regions) :] if self.order else rows

    def read(self, case: Case, data: bool = True) -> tuple[Scan, np.ndarray | None]:
        """The scan of a case, channels stacked, and its labels on the same grid (None where it has none).

        Without `data` the scan comes from headers alone, see `scans.read_header`.
        """
        scan = self.scan(case, data)
        if case.label is None:
            return scan, None
        labels = self.read_label(case.label, scan)
        for path in case.more_labels:
            labels = np.maximum(labels, self.read_label(path, scan))
        if self.labels:
            allowed = {0, *self.labels, *([] if self.ignore is None else [self.ignore])}
            if unknown := sorted(set(np.unique(labels).tolist()) - allowed):
                raise UserError(f"{case.label}: holds labels {unknown} outside the declared ones {sorted(self.labels)}")
        return scan, labels

    def scan(self, case: Case, data: bool = True) -> Scan:
        """The scan of a case, channels stacked; without `data` from headers alone."""
        if case.images[0].suffix in ARRAYS:
            image = _array(case.images[0], "image", "img").astype(np.float32)
            affine = np.eye(4) if image.ndim == 3 else None  # in voxels: these files know no spacing
            return Scan(case.images[0], image[None], affine, "array")
        read = read_scan if data else read_header
        scan = read(case.images[0], self.channels)
        for path in case.images[1:]:
            other = read(path)
            if other.shape != scan.shape or not _same_grid(scan, other):
                raise UserError(
                    f"{path}: lies on another grid ({other.shape}, {_place(other)}) than {case.images[0].name} "
                    f"({scan.shape}, {_place(scan)}); resample one onto the other"
                )
            both = (len(scan.image) + len(other.image), *scan.shape)
            scan.image = np.concatenate([scan.image, other.image]) if data else no_image(both)
            scan.notes += [f"{path.name}: {note}" for note in other.notes if note not in scan.notes]
        return scan

    def read_label(self, path: Path, scan: Scan) -> np.ndarray:
        """The labels of a case as its data set stores them, as label values on the scan's grid."""
        if path.suffix in ARRAYS:
            labels = whole_numbers(path, _array(path, "label"))
        elif path.is_dir():
            labels = _png_slices(path, scan)
        else:
            labels = read_labels(path, None if self.gray else scan)
        if labels.shape != scan.shape:
            raise UserError(f"{path}: shape {labels.shape} differs from its image's {scan.shape} ({scan.path.name})")
        if self.gray:
            mapped = np.full(labels.shape, -1, np.int32)
            bright = labels if labels.max(initial=0) > 1 else labels * 255
            for low, high, value in self.gray:
                mapped[(bright >= low) & (bright <= high)] = value
            if (mapped < 0).any():
                raise UserError(f"{path}: holds grey values {sorted(set(bright[mapped < 0].tolist()))[:5]} of no label")
            labels = mapped
        return labels


def make_splits(
    cases: Sequence[Case], folds: int = 5, seed: int = 0, path: str | Path | None = None
) -> list[dict[str, list[str]]]:
    """Cross-validation splits by group (patient), never by slice; written to `path` as JSON where given.

    Raises UserError for fewer groups than folds.
    """
    groups = sorted({case.group or case.name for case in cases})
    if folds < 2 or folds > len(groups):
        raise UserError(f"{folds} folds need at least 2 folds and as many patients; there are {len(groups)}")
    order = np.random.default_rng(seed).permutation(len(groups))
    held = [{groups[i] for i in part} for part in np.array_split(order, folds)]
    splits = [
        {
            "train": [c.name for c in cases if (c.group or c.name) not in out],
            "validation": [c.name for c in cases if (c.group or c.name) in out],
        }
        for out in held
    ]
    if path is not None:
        write_json(path, splits)
    return splits


def case_digest(case: Case) -> str:
    """A digest of the content of the case's images."""
    return data_digest([content_digest(path) for path in case.images])


def check_split(cases: Sequence[Case], train: Iterable[str], validation: Iterable[str]) -> None:
    """Raise LeakageError where a patient or an image has cases on both sides, UserError where a name is unknown."""
    by_name = {case.name: case.group or case.name for case in cases}
    train, validation = list(train), list(validation)
    if unknown := [name for name in (*train, *validation) if name not in by_name]:
        raise UserError(f"the split names cases that are not there: {', '.join(unknown[:5])}")
    found = {case.name: case for case in cases}
    first, second = (
        Side(f"the {side} cases", names, [case_digest(found[name]) for name in names], [by_name[n] for n in names])
        for side, names in (("training", train), ("validation", validation))
    )
    check_apart(first, second, group="patient")


ARRAYS = (".npz", ".h5")


def _array(path: Path, *names: str) -> np.ndarray:
    """The first of the arrays `names` in an .npz or .h5 file; slices come last, (S, H, W) to (H, W, S)."""
    with reading(path, f"damaged, or without {' or '.join(names)}"):
        if path.suffix == ".npz":
            arrays = read_arrays(path, "arrays")
            array = arrays[next(n for n in names if n in arrays)]
        else:
            check_hdf5(path)
            with h5py.File(path) as file:
                array = np.asarray(file[next(n for n in names if n in file)])
        if array.ndim not in (2, 3) or array.dtype.kind not in "iufb":
            raise ValueError(f"{array.dtype} {array.shape} is neither a slice nor a volume")
        if not array.size or not np.isfinite(array).all():
            raise ValueError("it is empty, or holds what is NaN or infinite")
    return np.moveaxis(array, 0, -1) if array.ndim == 3 else array


def _png_slices(folder: Path, scan: Scan) -> np.ndarray:
    """Label pictures of a DICOM series, one for each slice, paired with its files in the order of their names."""
    pictures = [p for p in sorted(folder.iterdir()) if p.suffix.lower() == ".png"]
    order = np.argsort(np.argsort([str(s.filename) for s in scan.source]))
    if len(pictures) != len(order):
        raise UserError(f"{folder}: {len(pictures)} label pictures for {len(order)} slices of {scan.path.name}")
    return np.stack([read_labels(pictures[i]).T for i in order], -1)


def _same_grid(first: Scan, second: Scan) -> bool:
    if first.affine is None or second.affine is None:
        return True
    return grid_distance(first.affine, second.affine, first.shape) <= SAME


def _place(scan: Scan) -> str:
    sides = " x ".join(f"{side:.4g}" for side in scan.spacing)
    return sides if scan.affine is None else f"{sides} mm from {', '.join(f'{v:.4g}' for v in scan.affine[:3, 3])}"
