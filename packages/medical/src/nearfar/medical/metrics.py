"""Scores of label maps under named conventions, and their aggregation over cases.

The conventions differ in what an absent structure counts, in the distance's percentile and in its unit:

- `nearfar`: HD95 of both directions together, in mm. One of prediction and truth empty: the worst value (0; for HD95
  the image's diagonal). Both empty: no score.
- `synapse_legacy`: HD95 likewise, but in voxels. Only the truth empty: Dice 1, HD95 0. A missed organ, or both empty:
  Dice 0, HD95 0.
- `brats`: as the BraTS challenge counted until 2022: HD95 in mm; both empty: Dice 1, HD95 0; one empty: Dice 0, HD95
  373.13, the diagonal of its 240 x 240 x 155 voxels of 1 mm.
- `brats_lesions`: as the challenge counts since 2023, by lesion. Lesions of the truth are the parts that grow together
  when it is dilated three times (18 neighbours); each is compared with all connected parts (26 neighbours) of the
  prediction that touch it, so dilated. Dice is the mean over the truth's lesions of more than 50 mm3 and the parts of
  the prediction that touch none, which count 0 (HD95: 374, as missed lesions do); both empty: Dice 1, HD95 0. HD95 is
  the larger of the two directions', by voxels of the border; the challenge weighs them by the surface elements' area.
- `segmamba`: as SegMamba's script counts BraTS: HD95 at 1 mm per voxel. Any empty: Dice 0, HD95 50.
- `monai`: HD95 is the larger of the two directions'. Truth empty: NaN; a missed structure: Dice 0, HD95 NaN.

A mean over cases that drops NaN lets a network that misses a structure look better; only `nearfar` never does so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_surface_dice
from scipy import ndimage

from nearfar.core.statistics import bootstrap_interval, holm, paired_test

CONVENTIONS = ("nearfar", "synapse_legacy", "brats", "brats_lesions", "segmamba", "monai")

BRATS_WORST = float(np.linalg.norm((240, 240, 155)))

BRATS_MISSED, BRATS_DILATION, BRATS_LEAST = 374.0, 3, 50.0
"""HD95 of a missed or invented lesion, dilations that join lesions, and the mm3 that a lesion must exceed."""

Array = np.ndarray


def dice(prediction: Array, truth: Array) -> float:
    """2 |P and G| / (|P| + |G|) of two masks; NaN where both are empty."""
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else float("nan")


def iou(prediction: Array, truth: Array) -> float:
    """|P and G| / |P or G| of two masks; NaN where both are empty."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else float("nan")


def border(mask: Array) -> Array:
    """The mask's voxels with a neighbour (4 in two, 6 in three axes) outside it; the image's edge counts as outside."""
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))


def surface_distances(prediction: Array, truth: Array, spacing: Sequence[float] | None = None) -> tuple[Array, Array]:
    """Distances from each border voxel of the one mask to the nearest of the other, in both directions.

    In the unit of `spacing`, in voxels without. Both masks must be non-empty. Everything happens in the masks' joint
    bounding box, which changes nothing and makes it many times faster.
    """
    if not prediction.any() or not truth.any():
        raise ValueError("surface distances need two masks that are not empty")
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    p, g = (np.pad(mask[box], 1) for mask in (prediction, truth))
    p, g = border(p), border(g)
    to_truth = ndimage.distance_transform_edt(~g, sampling=spacing)[p]
    to_prediction = ndimage.distance_transform_edt(~p, sampling=spacing)[g]
    return to_truth, to_prediction


def hausdorff(
    prediction: Array,
    truth: Array,
    spacing: Sequence[float] | None = None,
    percentile: float = 95,
    convention: str = "medpy",
) -> float:
    """Percentile of the surface distances: "medpy" of both directions together, "monai" the larger of the two.

    NaN where a mask is empty: what that counts is the convention's matter.
    """
    if convention not in ("medpy", "monai"):
        raise ValueError(f"convention is {convention!r}; allowed are 'medpy' and 'monai'")
    if not prediction.any() or not truth.any():
        return float("nan")
    there, back = surface_distances(prediction, truth, spacing)
    if convention == "medpy":
        return float(np.percentile(np.hstack([there, back]), percentile))
    return float(max(np.percentile(there, percentile), np.percentile(back, percentile)))


def surface_dice(prediction: Array, truth: Array, tolerance: float, spacing: Sequence[float] | None = None) -> float:
    """Normalized surface Dice: share of both surfaces within `tolerance` (mm) of the other, by area of subvoxels.

    NaN where both masks are empty, 0 where one is.
    """
    if not prediction.any() and not truth.any():
        return float("nan")
    if not prediction.any() or not truth.any():
        return 0.0
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    p, g = (torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (prediction, truth))
    spaced = None if spacing is None else [float(s) for s in spacing]
    return float(compute_surface_dice(p, g, [tolerance], include_background=True, spacing=spaced, use_subvoxels=True))


def lesion_scores(
    prediction: Array,
    truth: Array,
    spacing: Sequence[float] | None = None,
    *,
    dilation: int = BRATS_DILATION,
    least: float = BRATS_LEAST,
) -> dict[str, float]:
    """`dice`, `hd95` and counts of lesions (`found`, `missed`, `invented`) of two masks, as `brats_lesions` counts.

    `dilation` and `least` are 3 and 50 for gliomas, 1 and 50 for meningeomas, 1 and 2 for metastases.
    """
    near, joined = (ndimage.generate_binary_structure(truth.ndim, k) for k in (min(2, truth.ndim), truth.ndim))
    grown = ndimage.binary_dilation(truth, near, dilation)
    lesions = ndimage.label(grown, joined)[0]
    parts, count = ndimage.label(prediction, joined)
    unit, touched, pairs = float(np.prod(spacing or [1.0])), set(), []
    for index, box in enumerate(ndimage.find_objects(lesions), 1):
        wide = tuple(slice(max(0, s.start - dilation), s.stop + dilation) for s in box)
        lesion = (lesions[wide] == index) & truth[wide]
        inside = set(np.unique(parts[wide][ndimage.binary_dilation(lesion, near, dilation)]).tolist()) - {0}
        touched |= inside
        volume = float(lesion.sum()) * unit
        if volume > least:
            whole, met = np.zeros_like(truth), np.isin(parts, sorted(inside))
            whole[wide] = lesion
            far = hausdorff(met, whole, spacing, convention="monai") if inside else BRATS_MISSED
            pairs.append((dice(met, whole), far, bool(inside)))
    invented = count - len(touched)
    total = len(pairs) + invented
    if not total:
        return {"dice": 1.0, "hd95": 0.0, "found": 0, "missed": 0, "invented": 0}
    return {
        "dice": sum(pair[0] for pair in pairs) / total,
        "hd95": (sum(pair[1] for pair in pairs) + BRATS_MISSED * invented) / total,
        "found": sum(pair[2] for pair in pairs),
        "missed": sum(not pair[2] for pair in pairs),
        "invented": invented,
    }


def score_case(
    prediction: Array,
    truth: Array,
    labels: Mapping[int, str],
    spacing: Sequence[float] | None = None,
    *,
    convention: str = "nearfar",
    tolerance: float | Mapping[int, float] | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """One row per label: `label`, `dice`, `iou`, `hd95`, with `tolerance` (mm) `nsd` too; see the table above.

    Under `brats_lesions` counts of lesions stand in the place of `iou`. Label 0 is background and has no row; each of
    `regions`, a union of labels, has one too. Raises ValueError for shapes that differ, labels outside `labels` or an
    unknown convention.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; allowed are {', '.join(CONVENTIONS)}")
    for name, array in (("prediction", prediction), ("truth", truth)):
        if unknown := sorted(set(np.unique(array).tolist()) - {0, *labels}):
            raise ValueError(f"the {name} holds labels {unknown} that are not declared ({sorted(labels)})")
    unit = None if convention in ("synapse_legacy", "segmamba") else spacing
    diagonal = float(np.linalg.norm(np.array(truth.shape) * np.array(spacing or [1.0] * truth.ndim)))
    parts = [(name, (value,)) for value, name in labels.items() if value]
    rows = []
    for name, values in [*parts, *(regions or {}).items()]:
        p, g = np.isin(prediction, values), np.isin(truth, values)
        found, there = bool(p.any()), bool(g.any())
        if convention == "brats_lesions":
            rows.append({"label": name, **lesion_scores(p, g, spacing)})
            if tolerance is not None:
                limit = tolerance if isinstance(tolerance, int | float) else tolerance[values[0]]
                rows[-1]["nsd"] = surface_dice(p, g, limit, spacing) if found or there else 1.0
            continue
        row: dict[str, Any] = {"label": name, "dice": dice(p, g), "iou": iou(p, g)}
        row["hd95"] = hausdorff(p, g, unit, convention="monai" if convention == "monai" else "medpy")
        if convention == "nearfar" and found != there:
            row["hd95"] = diagonal
        elif convention == "synapse_legacy" and not (found and there):
            row |= {"dice": float(found), "iou": float(found), "hd95": 0.0}
        elif convention == "brats" and not (found and there):
            worst = found or there
            row |= {"dice": float(not worst), "iou": float(not worst), "hd95": BRATS_WORST if worst else 0.0}
        elif convention == "segmamba" and not (found and there):
            row |= {"dice": 0.0, "iou": 0.0, "hd95": 50.0}
        elif convention == "monai" and not there:
            row |= {"dice": float("nan"), "iou": float("nan")}
        if tolerance is not None:
            limit = tolerance if isinstance(tolerance, int | float) else tolerance[values[0]]
            row["nsd"] = surface_dice(p, g, limit, spacing)
            if convention == "brats" and not found and not there:
                row["nsd"] = 1.0
        rows.append(row)
    return rows


def micro_scores(pairs: Sequence[tuple[Array, Array]], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Dice and IoU from one confusion matrix of all pixels of all (prediction, truth) pairs, per label."""
    rows = []
    for value, name in labels.items():
        both = sum(int(((p == value) & (g == value)).sum()) for p, g in pairs)
        size = sum(int((p == value).sum()) + int((g == value).sum()) for p, g in pairs)
        nothing = float("nan")
        row = {"dice": 2 * both / size, "iou": both / (size - both)} if size else {"dice": nothing, "iou": nothing}
        rows.append({"label": name, **row})
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], *, level: float = 0.95, seed: int = 0) -> list[dict[str, Any]]:
    """Per label, and over all (`mean of labels`: first over the labels of a case), the mean over cases of each score.

    `rows` are those of `score_case` with a key `case`. Each score comes with `_std` and a bootstrap interval over
    cases, `_low` and `_high`; `cases` is how many had the structure in prediction or truth. NaN is left out here: the
    convention has decided already whether a case counts.
    """
    names = [k for k in rows[0] if k not in ("case", "label")] if rows else []
    labels = list(dict.fromkeys(row["label"] for row in rows))
    result = []
    for label in [*labels, "mean of labels"]:
        chosen = [row for row in rows if label in (row["label"], "mean of labels")]
        out: dict[str, Any] = {"label": label}
        for name in names:
            by_case: dict[Any, list[float]] = {}
            for row in chosen:
                if not np.isnan(row[name]):
                    by_case.setdefault(row["case"], []).append(row[name])
            values = np.array([np.mean(v) for v in by_case.values()])
            out.setdefault("cases", len(values))
            out[name] = float(values.mean()) if len(values) else float("nan")
            out[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            out[f"{name}_low"], out[f"{name}_high"] = (
                bootstrap_interval(values, level, 2000, seed) if np.isfinite(values).all() else (np.nan, np.nan)
            )
        result.append(out)
    return result


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], score: str = "dice"
) -> list[dict[str, Any]]:
    """Rows of `paired_test` for each label, of two methods' rows (see `summarize`) on the same cases."""
    result = []
    for label in dict.fromkeys(row["label"] for row in first):
        mine, other = ({r["case"]: r[score] for r in rows if r["label"] == label} for rows in (first, second))
        both = [c for c in mine if c in other and not np.isnan(mine[c]) and not np.isnan(other[c])]
        if len(both) > 1:
            found = paired_test([mine[c] for c in both], [other[c] for c in both])
            result.append({"label": label, "cases": found.pop("items"), **found})
    for row, p in zip(result, holm([row["p"] for row in result])):
        row["p_holm"] = float(p)
    return result
