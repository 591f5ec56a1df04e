"""What is wrong, or looks wrong, with the scans and labels of a data set, and the command that mends it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

import numpy as np
from scipy import ndimage

from nearfar.core.errors import UserError
from nearfar.medical.data.cases import Case, Collection, case_digest
from nearfar.medical.preparation import padding, quantiles

BINS, SIZE = 64, 32
"""Of a histogram; voxels along each axis of the small copy by which scans are compared."""

FAR = 3.5
"""Robust deviations (1.4826 times the median absolute one) from the median from which on a case is an outlier."""

SIMILAR = 0.98
"""Correlation of two small copies from which on they may be of one patient."""


@dataclass
class Finding:
    """One thing to look at: how bad ("error" or "look"), in which case, what, and the command that mends it."""

    grade: str
    case: str
    what: str
    mend: str = ""


@dataclass
class Examined:
    """What was seen of a case."""

    name: str
    orientation: str = ""
    shape: tuple[int, ...] = ()
    sides: tuple[float, ...] = ()
    picture: np.ndarray | None = None
    histogram: np.ndarray | None = None
    range: tuple[float, float] = (0.0, 0.0)
    numbers: dict[str, float] = field(default_factory=dict)
    small: np.ndarray | None = None
    mirror: float = 0.0
    shift: tuple[float, ...] = ()


def examine(collection: Collection) -> tuple[list[Examined], list[Finding]]:
    """Look at every voxel of every case."""
    seen, found = list[Examined](), list[Finding]()
    digests: dict[str, str] = {}
    for case in collection.cases:
        try:
            scan, labels = collection.read(case)
        except UserError as error:
            found.append(Finding("error", case.name, str(error), _mend_of(str(error), case)))
            continue
        one = Examined(case.name, scan.orientation, scan.shape, scan.spacing)
        found += [Finding("look", case.name, note, _mend_of(note, case)) for note in scan.notes]
        if (before := digests.setdefault(case_digest(case), case.name)) != case.name:
            found.append(Finding("error", case.name, f"has the same image as {before}", f"rm {_path(case)}"))
        channel = scan.canonical()[0]
        one.range = quantiles(channel)
        inside = channel[~mask] if (mask := padding(channel)) is not None else channel.ravel()
        one.histogram = np.histogram(inside, BINS, one.range)[0] / max(1, inside.size)
        one.numbers = {"lowest": one.range[0], "highest": one.range[1], "mean": float(inside.mean())}
        one.numbers |= {"deviation": float(inside.std()), "voxel mm3": float(np.prod(scan.spacing))}
        one.numbers["volume ml"] = float(np.prod(scan.spacing)) * channel.size / 1000
        if one.range[0] == one.range[1]:
            found.append(Finding("error", case.name, f"is {one.range[0]:g} everywhere", f"rm {_path(case)}"))
        else:
            one.small = _small(channel)
            middle = channel if channel.ndim == 2 else np.flip(channel[..., channel.shape[2] // 2].T, 0)
            shown = np.clip(255 * (middle - one.range[0]) / (one.range[1] - one.range[0]), 0, 255)
            one.picture = np.repeat(shown.astype(np.uint8)[..., None], 3, -1)[:320, :320]
        if labels is not None:
            turned = scan.to_canonical(labels)
            for value, name in collection.labels.items():
                if value:
                    one.numbers[f"{name}, share"] = float((labels == value).mean())
            if not (labels != 0).any():
                found.append(Finding("look", case.name, "has no labelled voxel", "check that its label map is its own"))
            elif (shift := label_shift(channel, turned)) is not None:
                one.shift = shift
                sides = scan.canonical_spacing()
                told = ", ".join(f"{s:+d}" for s in shift)
                found.append(
                    Finding(
                        "look", case.name,
                        f"its label map fits the image's edges better when moved by ({told}) voxels (of "
                        f"{'x'.join(f'{s:.3g}' for s in sides)} mm, along right, front, up)",
                        _python(case, f"shift({', '.join(map(str, shift))})") if case.label else "",
                    )
                )  # fmt: skip
        seen.append(one)
    return seen, found + _outliers(seen, collection) + _pairs(seen, collection) + _sides(seen, collection)


def label_shift(channel: np.ndarray, labels: np.ndarray, reach: int = 3) -> tuple[int, ...] | None:
    """The move, up to `reach` voxels along one axis, by which a label map's borders fit the image's edges better.

    None where leaving it is best, or the best is not much better (a tenth of the mean edge under the border).
    """
    edges = ndimage.gaussian_gradient_magnitude(channel.astype(np.float32), 1)
    border = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        first, last = (tuple(s if a == axis else slice(None) for a in range(labels.ndim))
                       for s in (slice(None, -1), slice(1, None)))  # fmt: skip
        border[first] |= labels[first] != labels[last]
    places = np.argwhere(border)
    places = places[:: max(1, len(places) // 100_000)]

    def mean(move: Sequence[int]) -> float:
        moved = places + move
        kept = ((moved >= 0) & (moved < labels.shape)).all(1)
        return float(edges[tuple(moved[kept].T)].mean()) if kept.any() else 0.0

    stay, best = mean([0] * labels.ndim), (0.0, (0,) * labels.ndim)
    for axis in range(labels.ndim):
        for step in range(-reach, reach + 1):
            move = [step if a == axis else 0 for a in range(labels.ndim)]
            best = max(best, (mean(move), tuple(move)))
    far = max(map(abs, best[1])) > 1 or labels.ndim == 2
    return best[1] if any(best[1]) and far and best[0] > 1.1 * stay else None


def _small(channel: np.ndarray) -> np.ndarray:
    """A copy of `SIZE` voxels along each axis, mean 0, deviation 1."""
    coarse = channel[tuple(slice(None, None, max(1, n // (2 * SIZE))) for n in channel.shape)].astype(np.float32)
    small = ndimage.zoom(coarse, [SIZE / n for n in coarse.shape], order=1)
    return (small - small.mean()) / max(float(small.std()), 1e-6)


def _outliers(seen: Sequence[Examined], collection: Collection) -> list[Finding]:
    found = []
    names = sorted({name for one in seen for name in one.numbers})
    for name in names:
        values = np.array([one.numbers.get(name, np.nan) for one in seen])
        if np.isfinite(values).sum() < 5:
            continue
        middle = float(np.nanmedian(values))
        spread = 1.4826 * float(np.nanmedian(np.abs(values - middle)))
        for one, value in zip(seen, values):
            if np.isfinite(value) and abs(value - middle) > FAR * max(spread, 1e-3 * abs(middle), 1e-12):
                what = f"{name} is {value:.4g}, the others' median {middle:.4g}"
                found.append(Finding("look", one.name, what, "look at it; leave it out of the folder if it is wrong"))
    return found


def _pairs(seen: Sequence[Examined], collection: Collection) -> list[Finding]:
    """Cases whose images are so alike that they may be of one patient, and are not grouped."""
    groups = {case.name: case.group or case.name for case in collection.cases}
    found = []
    for i, one in enumerate(seen):
        for other in seen[:i]:
            if one.small is None or other.small is None or groups[one.name] == groups[other.name]:
                continue
            alike = float((one.small * other.small).mean()) if one.small.shape == other.small.shape else 0.0
            if alike > SIMILAR:
                what = f"looks like {other.name} (correlation {alike:.3f}): one patient?"
                mend = "write a CSV of case,patient and give it as --groups patients.csv"
                found.append(Finding("look", one.name, what, mend))
    return found


def _sides(seen: Sequence[Examined], collection: Collection) -> list[Finding]:
    """Cases that fit the mean of the others much better when mirrored left to right."""
    threes = [one for one in seen if one.small is not None and one.small.ndim == 3]
    found = []
    for one in threes:
        others = [o.small for o in threes if o is not one and o.small is not None]
        if len(others) < 4:
            break
        mean = np.mean(others, 0)
        as_it_is, mirrored = (float((v * mean).mean()) for v in (one.small, one.small[::-1]))  # type: ignore[index]
        one.mirror = mirrored - as_it_is
        if mirrored > as_it_is + 0.05:
            case = next(c for c in collection.cases if c.name == one.name)
            what = f"fits the others better mirrored left to right ({as_it_is:.3f} to {mirrored:.3f})"
            found.append(Finding("look", one.name, what, _python(case, "mirror()")))
    return found


def _path(case: Case) -> str:
    return quote(str(case.images[0]))


def _mend_of(text: str, case: Case) -> str:
    """The command for what a reader said."""
    if "sform" in text and "qform" in text and "differ" in text:
        return _python(case, 'form("sform")')
    if "codes are 0" in text:
        return _python(case, 'form("sform")')
    if "as unit" in text:
        return _python(case, 'unit("mm")')
    if found := re.search(r"mm; if that is in (meter|micron)s", text):
        return _python(case, f'unit("{found[1]}")')
    if "right angles" in text or "affine differs" in text or "another grid" in text:
        return _python(case, "resample()")
    if "NaN" in text:
        return _python(case, "fill_nan()")
    return ""


def _python(case: Case, action: str) -> str:
    """A call of `nearfar medical-segmentation mend` for the files of a case."""
    name, _, argument = action.rstrip(")").partition("(")
    file = case.label if name in ("shift", "resample") and case.label is not None else case.images[0]
    value = argument.strip('"').replace(" ", "")
    words = f"--{name.replace('_', '-')}" + (f"={value}" if value else "")
    like = f" --like {_path(case)}" if name == "resample" else ""
    target = file.with_name(f"mended_{file.name}")
    return f"nearfar medical-segmentation mend {quote(str(file))} -o {quote(str(target))} {words}{like}"


def table(seen: Sequence[Examined]) -> list[dict[str, Any]]:
    """A row of numbers for each case."""
    names = list(dict.fromkeys(name for one in seen for name in one.numbers))
    return [{"case": one.name, **{name: one.numbers.get(name) for name in names}} for one in seen]
