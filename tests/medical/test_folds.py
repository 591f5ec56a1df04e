"""Cross-validation, the folds as one, the largest part, and how well the quality flag is calibrated."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.medical.data.cases import make_splits
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.folds import FoldEnsemble, agreement, calibrate, degraded, largest_part, load, train_folds
from nearfar.medical.recipe import Recipe


def write_blobs(folder: Path, number: int, noise: float = 5.0) -> None:
    rng = np.random.default_rng(0)
    for i in range(number):
        labels = np.zeros((20, 20, 10), np.uint8)
        labels[4 + i % 4 : 14, 4:14, 2:8] = 1
        image = 100 * labels + rng.normal(0, noise, labels.shape)
        for kind, values in (("images", image.astype(np.float32)), ("labels", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.diag([1, 1, 2, 1])), folder / kind / f"p{i}.nii.gz")
    (folder / "labels.json").write_text('{"1": "blob"}')


def test_the_largest_part_alone() -> None:
    labels = np.zeros((8, 8, 8), int)
    labels[:3, :3, :3], labels[5:7, 5:7, 5:7], labels[0, 7, 0] = 1, 1, 2
    kept = largest_part(labels, [1])
    assert (kept == 1).sum() == 27
    assert (kept == 2).sum() == 1
    assert agreement([labels, kept], {1: "a", 2: "b"}) == {"a": pytest.approx(2 * 27 / (27 + 35)), "b": 1.0}


def test_calibration_is_measured_on_cases_left_out() -> None:
    """Agreement that tells the Dice: bad cases are caught; agreement at random: they are not."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([rng.uniform(0.8, 0.95, 30), rng.uniform(0.2, 0.6, 10)])
    rows = [{"agreement": {"a": float(t + rng.normal(0, 0.02))}, "dice": {"a": float(t)}} for t in truth]
    good = calibrate(rows, 0.7)
    assert (good["bad_cases"], good["caught"], good["false_alarms"]) == (10, 1.0, 0)
    assert good["error"] < 0.03
    shuffled = rng.permutation([row["agreement"]["a"] for row in rows])
    useless = calibrate([{**r, "agreement": {"a": float(a)}} for r, a in zip(rows, shuffled)], 0.7)
    assert useless["caught"] < 0.5
    assert useless["error"] > 0.1
    assert calibrate(rows[:3]) == {}
    copies = [{**row, "copy": "noise"} for row in rows[3:]]
    assert calibrate([*rows[:3], *copies]) == {}  # copies are no cases
    twins = [{"agreement": {"a": a}, "dice": {"a": d}, "patient": p} for a, d, p in
             [(0.5, 0.2, "x"), (0.5, 0.2, "x"), (0.5, 0.8, "y"), (0.5, 0.8, "z"), (0.5, 0.8, "w")]]  # fmt: skip
    assert calibrate(twins, 0.5)["caught"] == 0  # the other scan of the patient does not tell


def test_degraded_copies_are_blurred_and_noisy() -> None:
    image = np.random.default_rng(0).normal(10, 3, (2, 24, 20)).astype(np.float32)
    copies = dict(degraded(image, side=2))
    assert [name.split()[0] for name in copies] == ["blur", "blur", "noise", "noise"]
    stds = [copy.std() / image.std() for copy in copies.values()]
    assert stds[1] < stds[0] < 0.5
    assert 1.05 < stds[2] < stds[3] == pytest.approx(np.sqrt(1 + 1.5**2), rel=0.1)
    assert all(copy.dtype == np.float32 and copy.shape == image.shape for copy in copies.values())


def test_folds_are_trained_joined_and_watched(tmp_path: Path) -> None:
    write_blobs(tmp_path / "data", 8)
    collection = find_cases(tmp_path / "data")
    settings = {"features": (4, 8), "strides": [1, 2]}
    recipe = Recipe(
        "nnunet_plain", settings, roi=(16, 16, 8), spacing=(1.0, 1.0, 2.5), resample="cubic", loss="nnunet",
        epochs=2, patches_per_epoch=12, learning_rate=1e-2,
    )  # fmt: skip
    splits, said = make_splits(collection.cases[:4], 2), []
    ensemble, summary = train_folds(
        collection, recipe, tmp_path / "m", splits, calibration=collection.cases[4:], device="cpu", say=said.append
    )
    assert summary[0]["cases"] == 4  # every case, by the fold that has not seen it
    assert summary[0]["dice"] > 0.5
    assert any("validation dice" in line and "minutes left" in line for line in said)
    again = load(tmp_path / "m")
    assert isinstance(again, FoldEnsemble)
    scan = collection.scan(collection.cases[4])
    labels, quality = again.with_quality(scan, probabilities=tmp_path / "p.npy")
    np.testing.assert_array_equal(labels, ensemble(scan, memory=2**28))
    assert 0 <= quality["mean"] <= 1
    assert {"flag", "agreement", "calibration"} <= set(quality)
    assert (quality["calibration"]["cases"], quality["calibration"]["copies"]) == (4, 16)
    shares = np.load(tmp_path / "p.npy")
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-5)
    if not again.largest:
        assert ((shares[1] > 0.5) == (labels == 1)).mean() > 0.999
    with pytest.raises(ValueError, match="calibrate"):
        train_folds(collection, recipe, tmp_path / "x", splits, calibration=collection.cases[:1])
    content = json.loads((tmp_path / "m/ensemble.json").read_text())
    content["folds"]["fold_0"] = "other"
    (tmp_path / "m/ensemble.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not the model"):
        load(tmp_path / "m")
