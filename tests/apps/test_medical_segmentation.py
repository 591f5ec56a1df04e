"""The medical app from data to report on real scans, and every kind of bad input."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.apps.medical_segmentation import cli
from nearfar.core.cli import BatchError
from nearfar.core.errors import UserError
from nearfar.medical import samples

SMALL = ("max_epochs=1", "patches_per_epoch=4", "roi=[16,32,32]", "settings={features: [4, 4, 8, 8, 8, 4]}")


def run(*arguments: object) -> None:
    cli.app([str(a) for a in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def brain(tmp_path_factory) -> Path:
    return samples.write_brain(tmp_path_factory.mktemp("data"), resolution=4)


@pytest.fixture(scope="module")
def model(brain: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run("train", brain, "-o", folder, "--accelerator", "cpu", *(a for s in SMALL for a in ("--set", s)))
    return folder


def test_inspect(brain: Path, capsys) -> None:
    run("inspect", brain, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] == {"1": "grey matter", "2": "white matter"}
    assert [case["axes"] for case in found["cases"]] == ["RAS", "RAS"]
    assert found["problems"] == []


def test_train_writes_model_split_and_scores(model: Path) -> None:
    splits = json.loads((model / "splits.json").read_text())
    assert [sorted(s["train"] + s["validation"]) for s in splits] == [["left", "right"]] * 2
    assert json.loads((model / "validation.json").read_text())[-1]["cases"] == 1


def test_predict_evaluate_and_report(brain: Path, model: Path, tmp_path: Path, capsys) -> None:
    run("predict", brain / "images", "--model", model, "-o", tmp_path / "out", "--memory", "1M", "--check")
    assert capsys.readouterr().out.count("agree on 100.000000%") == 2
    for name in ("left", "right"):
        ours, image = (nib.load(p) for p in (tmp_path / f"out/{name}.nii.gz", brain / f"images/{name}.nii.gz"))
        assert ours.shape == image.shape
        np.testing.assert_array_equal(ours.affine, image.affine)
        assert (tmp_path / f"out/{name}_overlay.png").stat().st_size > 1000
    before = (tmp_path / "out/left.nii.gz").stat().st_mtime_ns
    run("predict", brain / "images", "--model", model, "-o", tmp_path / "out")
    assert (tmp_path / "out/left.nii.gz").stat().st_mtime_ns == before
    run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores", "--tolerance", "4")
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary["summary"][-1]["cases"] == 2
    assert {"nsd", "hd95_low"} <= set(summary["summary"][0])
    page = (tmp_path / "scores/index.html").read_text()
    assert 'type="range"' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (tmp_path / "out/left.nii.gz").unlink()
    with pytest.raises(BatchError, match="left: has no prediction"):
        run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores")


def test_refine(tmp_path: Path, capsys) -> None:
    truth = np.zeros((24, 30), np.uint8)
    truth[6:18, 8:22] = 1
    Image.fromarray(np.stack([truth * 150 + 40] * 3, -1)).save(tmp_path / "a.png")
    noisy = np.clip(truth + np.random.default_rng(0).normal(0, 0.6, truth.shape), 0.02, 0.98)
    np.save(tmp_path / "p.npy", np.stack([1 - noisy, noisy]).astype(np.float32))
    run("refine", tmp_path / "p.npy", tmp_path / "a.png", "-o", tmp_path / "mask.png", "--bilateral-std", "20")
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    assert (mask == truth).mean() > max(0.97, ((noisy > 0.5) == truth).mean() + 0.05)
    np.save(tmp_path / "bad.npy", np.ones((2, 24, 30), np.float32))
    with pytest.raises(UserError, match="no probabilities"):
        run("refine", tmp_path / "bad.npy", tmp_path / "a.png", "-o", tmp_path / "x.png")
    np.save(tmp_path / "small.npy", np.ones((2, 4, 4), np.float32))
    with pytest.raises(UserError, match=r"is not \(classes, 24, 30\)"):
        run("refine", tmp_path / "small.npy", tmp_path / "a.png", "-o", tmp_path / "x.png")


@torch.no_grad()
def test_export_is_a_bundle_that_monai_builds(model: Path, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    run("export", model, "-o", tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(tmp_path / "bundle/configs/inference.json")
    parser.read_meta(tmp_path / "bundle/configs/metadata.json")
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(tmp_path / "bundle/models/model.pt", weights_only=True))
    ours = cli.Segmenter.load(model).network
    x = torch.randn(1, 1, 16, 32, 32)
    torch.testing.assert_close(network.eval()(x), ours(x))
    assert parser.get_parsed_content("inferer")(x, network).shape == (1, 3, 16, 32, 32)


def test_a_batch_goes_on_past_bad_scans(brain: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    good = (brain / "images/left.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(good[:2000])
    (folder / "good.nii.gz").write_bytes(good)
    with pytest.raises(BatchError, match=r"1 of 2 failed:\n.*cut\.nii\.gz: damaged") as caught:
        run("predict", folder, "--model", model, "-o", tmp_path / "out")
    assert isinstance(caught.value, BatchError)
    assert (tmp_path / "out/good.nii.gz").exists()
    assert not (tmp_path / "out/cut.nii.gz").exists()
    with pytest.raises(UserError, match="--memory"):
        run("predict", folder, "--model", model, "-o", tmp_path / "out", "--memory", "much")
    with pytest.raises(UserError, match="no trained model"):
        run("predict", folder, "--model", tmp_path, "-o", tmp_path / "out")


def test_problems_in_a_data_folder_are_listed(tmp_path: Path) -> None:
    for kind, data in (("images", np.random.default_rng(0).random((6, 6, 6))), ("labels", np.zeros((6, 6, 6)))):
        (tmp_path / kind).mkdir()
        for name in ("empty", "moved", "odd"):
            values = data.copy()
            if kind == "labels" and name != "empty":
                values[2:4, 2:4, 2:4] = 1 if name == "moved" else 5
            affine = np.diag([1, 1, 2 if (kind, name) == ("labels", "moved") else 1, 1])
            nib.save(nib.Nifti1Image(values.astype(np.float32), affine), tmp_path / kind / f"{name}.nii.gz")
    (tmp_path / "labels.json").write_text('{"1": "organ"}')
    with pytest.raises(BatchError, match="3 of 3 failed") as caught:
        run("inspect", tmp_path)
    for reason in ("no foreground", "affine differs", r"labels [5] outside"):
        assert reason in str(caught.value)
