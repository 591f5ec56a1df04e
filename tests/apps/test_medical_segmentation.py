"""The medical app from data to report on real scans, and every kind of bad input."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.apps.medical_segmentation import cli, pages
from nearfar.core.cli.batch import BatchError
from nearfar.core.errors import UserError
from nearfar.core.recipes import read_recipe, shipped_recipes
from nearfar.core.training import data_loader
from nearfar.medical import refinement, samples, training
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.data.scan import Scan
from nearfar.medical.recipe import Recipe
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import Patches, _Module

SMALL = ("epochs=1", "patches_per_epoch=4", "roi=[16,32,32]", "settings={features: [4, 4, 8, 8, 8, 4]}")


def run(*arguments: object) -> None:
    cli.app([str(a) for a in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def brain(tmp_path_factory) -> Path:
    return samples.write_brain(tmp_path_factory.mktemp("data"), resolution=4)


@pytest.fixture(scope="module")
def model(brain: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run("train", brain, "-o", folder, "--device", "cpu", *(a for s in SMALL for a in ("--set", s)))
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
    assert capsys.readouterr().out.count("unbounded agree on 100.0000%") == 2
    for name in ("left", "right"):
        ours, image = (nib.load(p) for p in (tmp_path / f"out/{name}.nii.gz", brain / f"images/{name}.nii.gz"))
        assert ours.shape == image.shape
        np.testing.assert_array_equal(ours.affine, image.affine)
        assert (tmp_path / f"out/{name}_overlay.png").stat().st_size > 1000
    before = (tmp_path / "out/left.nii.gz").stat().st_mtime_ns
    run("predict", brain / "images", "--model", model, "-o", tmp_path / "out")
    assert (tmp_path / "out/left.nii.gz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r": the model was trained on 1 of the 2 cases.*--held-out"):
        run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores")
    run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores", "--held-out")
    assert json.loads((tmp_path / "scores/summary.json").read_text())["summary"][-1]["cases"] == 1
    run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores", "--tolerance", "4", "--training-cases")
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary["summary"][-1]["cases"] == 2
    assert {"nsd", "hd95_low"} <= set(summary["summary"][0])
    assert summary["marked"] == "1 of 2 seen in training"  # the other was held out
    page = (tmp_path / "scores/index.html").read_text()
    assert "1 of 2 seen in training" in page
    assert "false positive" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (tmp_path / "out/left.nii.gz").unlink()
    with pytest.raises(BatchError, match="left: has no prediction"):
        run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores", "--training-cases")


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


def test_refine_within_a_budget(brain: Path, tmp_path: Path) -> None:
    truth = np.asarray(nib.load(brain / "labels/left.nii.gz").dataobj).astype(int)
    noisy = np.eye(3)[truth] + np.random.default_rng(0).random((*truth.shape, 3))
    np.save(tmp_path / "p.npy", np.moveaxis(noisy / noisy.sum(-1, keepdims=True), -1, 0).astype(np.float32))
    found = []
    for name, extra in (("whole", ()), ("slabs", ("--memory", "40M"))):
        run("refine", tmp_path / "p.npy", brain / "images/left.nii.gz", "-o", tmp_path / f"{name}.nii.gz",
            "--spatial-std", 4, "--bilateral-std", 12, "--color-std", 15, "--bilateral-weight", 1, *extra)  # fmt: skip
        found.append(np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj))
    assert 0.99 < (found[0] == found[1]).mean() < 1
    with pytest.raises(UserError, match="on one slice"):
        run("refine", tmp_path / "p.npy", brain / "images/left.nii.gz", "-o", tmp_path / "x.nii.gz", "--memory", "1M")


def test_search_sets_the_crf_that_predict_uses(brain: Path, model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(model, tmp_path / "model")
    whole = refinement.crf_grid(4.0)
    assert len(whole) == 48
    monkeypatch.setattr(training, "crf_grid", lambda unit: [whole[0], whole[-1]])
    run("search", brain, "--model", tmp_path / "model")
    rows = (tmp_path / "model/crf.csv").read_text().splitlines()
    assert len(rows) == 1 + 3
    best = max((line.split(",") for line in rows[1:]), key=lambda cells: float(cells[0]))
    chosen = cli.Segmenter.load(tmp_path / "model").crf
    assert (chosen is None) == (best[1] == "no CRF")
    with pytest.raises(UserError, match="no fold 9"):
        run("search", brain, "--model", tmp_path / "model", "--fold", 9)
    run("predict", brain / "images/left.nii.gz", "--model", model, "-o", tmp_path / "out", "--crf")
    assert "general ones are used" in capsys.readouterr().out
    assert (tmp_path / "out/left.nii.gz").exists()


@torch.no_grad()
def test_export_is_a_bundle_that_monai_runs(brain: Path, model: Path, tmp_path: Path) -> None:
    run("export", model, "-o", tmp_path / "bundle")
    monai.bundle.run(
        config_file=str(tmp_path / "bundle/configs/inference.json"),
        meta_file=str(tmp_path / "bundle/configs/metadata.json"),
        bundle_root=str(tmp_path / "bundle"),
        dataset_dir=str(brain / "images"),
        output_dir=str(tmp_path / "theirs"),
    )
    run("predict", brain / "images", "--model", model, "-o", tmp_path / "ours")
    for name in ("left", "right"):
        ours, theirs = (nib.load(tmp_path / f) for f in (f"ours/{name}.nii.gz", f"theirs/{name}_seg.nii.gz"))
        np.testing.assert_allclose(ours.affine, theirs.affine)
        assert (np.asarray(ours.dataobj) == np.asarray(theirs.dataobj)).mean() > 0.9999


def test_one_output_pictures_and_a_second_method(tmp_path: Path) -> None:
    """Binary masks: a network of one output, pictures as they are named, paired comparison of two methods."""
    rng = np.random.default_rng(0)
    for i in range(4):
        truth = np.zeros((48, 64), np.uint8)
        truth[10:30, 10 + i : 40] = 255
        for kind, pixels in (
            ("images", np.stack([truth // 2 + rng.integers(0, 99, truth.shape)] * 3, -1)),
            ("masks", truth),
        ):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / kind / f"a.{i}.png")
    sets = (
        "settings={features: [8, 8, 16, 16, 16, 8]}",
        "roi=[32,32]",
        "loss=binary",
        "epochs=6",
        "learning_rate=5e-3",
    )
    sets += ("patches_per_epoch=32", "batch_size=4")
    run(
        "train",
        tmp_path / "data",
        "-o",
        tmp_path / "m",
        "--folds",
        2,
        "--device",
        "cpu",
        *(a for s in sets for a in ("--set", s)),
    )
    assert cli.Segmenter.load(tmp_path / "m").network.final_conv.out_channels == 1
    run("predict", tmp_path / "data", "--model", tmp_path / "m", "-o", tmp_path / "one")
    run("predict", tmp_path / "data", "--model", tmp_path / "m", "-o", tmp_path / "two", "--crf", "--memory", "64M")
    assert sorted(p.name for p in (tmp_path / "one").glob("*.png"))[:2] == ["a.0.png", "a.0_overlay.png"]
    run(
        "evaluate",
        tmp_path / "one",
        tmp_path / "data",
        "-o",
        tmp_path / "s",
        "--against",
        tmp_path / "two",
        "--training-cases",
    )
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert summary["summary"][0]["dice"] > 0.8
    assert {"difference", "low", "high", "p"} <= set(summary["against"][0])
    run("predict", tmp_path / "data/images", "--model", tmp_path / "m")  # beside the pictures, which are no input again
    run("predict", tmp_path / "data/images", "--model", tmp_path / "m")
    assert len(list((tmp_path / "data/images").glob("*_seg.png"))) == 4
    with pytest.raises(UserError, match="several scans would be written to"):
        run(
            "predict",
            tmp_path / "data/images/a.0.png",
            tmp_path / "data/masks/a.0.png",
            "--model",
            tmp_path / "m",
            "-o",
            tmp_path,
        )


@pytest.mark.parametrize("name", shipped_recipes(cli.RECIPES))
def test_recipes_make_patches_and_schedules(name: str) -> None:
    recipe = read_recipe(Recipe, name, folder=cli.RECIPES)
    shape = recipe.roi if recipe.resize is None else recipe.resize
    channels = 3 if recipe.intensity == "caffe" else 1
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, shape).astype(np.uint8)
    images, targets = next(
        iter(data_loader(Patches([(rng.random((channels, *shape), np.float32), labels)], recipe), 2))
    )
    assert images.shape[1:] == (channels, *recipe.roi)
    assert targets.shape[1:] == recipe.roi
    assert set(targets.unique().tolist()) <= {0, 1}
    network = torch.nn.Conv2d(1, 2, 1)
    segmenter = Segmenter(network, {1: "a"}, recipe, 1)
    assert _Module(segmenter, 100, None).configure_optimizers()


@pytest.mark.ci
def test_comparison_has_ablations_equal_steps_and_paired_tests(brain: Path, tmp_path: Path, capsys) -> None:
    narrow = "{dims_per_level: [4, 8], depths: [1, 1], decoder_depths: [1, 1], d_state: 1}"
    (tmp_path / "narrow.yaml").write_text(f"network: vmunet\nsettings: {narrow}\nlearning_rate: 1e-2\nepochs: 9\n")
    settings = ("epochs=2", "patches_per_epoch=32", "roi=[32,64]", "settings={features: [4, 4, 8, 8, 8, 4]}")
    words = [word for one in settings for word in ("--set", one)]
    call = (
        "compare",
        brain,
        "-o",
        tmp_path / "out",
        "--recipe",
        "brain",
        "--network",
        tmp_path / "narrow.yaml",
        *words,
    )
    run(*call, "--slabs", 8, "--device", "cpu")
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert {row["network"] for row in found["networks"]} == {"brain", "narrow", "narrow-identity"}
    assert found["budget"]["epochs"] == 2
    pairs = [(row["network"], row["against"]) for row in found["paired"]]
    assert pairs == [("narrow", "brain"), ("narrow-identity", "brain"), ("narrow", "narrow-identity")]
    assert len({row["items"] for row in [*found["networks"], *found["paired"]]}) == 1
    for name in ("brain", "narrow", "narrow-identity"):
        records = [json.loads((tmp_path / f"out/{name}/fold_{k}/run/run.json").read_text()) for k in (0, 1)]
        assert all(len(record["history"]) == 2 for record in records)
        assert sorted(case for record in records for case in record["settings"]["cases"]) == ["left", "right"]
        assert records[0]["settings"]["settings"].get("scan", True) is (name != "narrow-identity")
    best = found["networks"][0]["network"]
    assert f"{best} is best" in (tmp_path / "out/index.html").read_text()
    capsys.readouterr()
    run(*call, "--device", "cpu", "--json")  # by patient: two are too few; nothing is trained again
    again = json.loads(capsys.readouterr().out)
    assert [row["Dice"] for row in again["networks"]] == [row["Dice"] for row in found["networks"]]
    assert all(row["low"] is None or np.isnan(row["low"]) for row in again["networks"])
    assert "too few" in again["verdict"]


def test_comparison_refuses(brain: Path, tmp_path: Path) -> None:
    for other, message in (("brain", "compared with itself"), ("nothing-there", "nothing-there")):
        with pytest.raises(UserError, match=message):
            run("compare", brain, "-o", tmp_path, "--recipe", "brain", "--network", other)
    with pytest.raises(UserError, match="vessels: each is compared once"):
        run("compare", brain, "-o", tmp_path, "--network", "vessels", "--network", "vessels.yaml")
    with pytest.raises(UserError, match=r"roi is \[48, 112\]; vmunet takes multiples of \[32, 32\]: \[64, 128\]"):
        run("train", brain, "-o", tmp_path, "--recipe", "vmunet-small", "--set", "roi=[48,112]", "--set", "resize=null")
    enc = "settings={features: [4, 8], patch_size: [4, 4]}"
    with pytest.raises(UserError, match=r"roi is \[8, 8\]; this umamba_enc takes \[4, 4\] alone"):
        run("train", brain, "-o", tmp_path, "--set", "network=umamba_enc", "--set", enc, "--set", "roi=[8,8]")
    seg = "settings={features: [4, 8, 8, 8], hidden: 8, slices: [48, 8, 4, 2]}"
    with pytest.raises(UserError, match=r"cannot take roi .*48 slices do not divide"):
        run("train", brain, "-o", tmp_path, "--set", "network=segmamba", "--set", seg, "--set", "roi=[32,32,32]")


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
    with pytest.raises(UserError, match="no trained segmenter"):
        run("predict", folder, "--model", tmp_path, "-o", tmp_path / "out")


def test_voxels_unlike_those_of_the_training_are_refused(model: Path, tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((16, 32, 32)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([1.0, 1, 1, 1])), tmp_path / "fine.nii.gz")
    with pytest.raises(UserError, match=r"voxels of 1 x 1 x 1 mm, the model was trained on 4 to 4 mm"):
        run("predict", tmp_path / "fine.nii.gz", "--model", model, "-o", tmp_path / "out")
    with pytest.raises(UserError, match="is the scan itself"):
        run("predict", tmp_path / "fine.nii.gz", "--model", model, "-o", tmp_path)


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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_planned_folds_from_the_command_line(brain: Path, tmp_path: Path, capsys) -> None:
    """plan, train --folds all, predict with probabilities and a page, on a brain of 4 mm."""
    run("plan", brain, "-o", tmp_path / "plan.yaml", "--minutes", "0.05", "--axes", "3")
    assert "median of the voxel sides" in (tmp_path / "plan.yaml").read_text()
    sets = ("epochs=1", "patches_per_epoch=4", "roi=[16,16,16]", "settings={features: [4, 8], strides: [1, 2]}")
    run("train", brain, "-o", tmp_path / "m", "--recipe", tmp_path / "plan.yaml", "--folds", "all", "--device", "cpu",
        *(a for s in sets for a in ("--set", s)))  # fmt: skip
    said = capsys.readouterr()
    assert "every case, by the fold that has not seen it" in said.out
    assert "no quality flag" in said.err
    assert json.loads((tmp_path / "m/cross_validation.json").read_text())["summary"][-1]["cases"] == 2
    run("predict", brain / "images", "--model", tmp_path / "m", "-o", tmp_path / "out", "--save-probabilities",
        "--page", tmp_path / "look.html")  # fmt: skip
    shares = np.load(tmp_path / "out/left_probabilities.npy")
    labels = np.asarray(nib.load(tmp_path / "out/left.nii.gz").dataobj)
    assert (shares.argmax(0) == labels)[labels > 0].mean() > 0.999
    assert (tmp_path / "look.html").stat().st_size < 2**20
    with pytest.raises(UserError, match="trained on 2 of the 2 cases"):  # by one fold or the other
        run("evaluate", tmp_path / "out", brain, "-o", tmp_path / "scores")
    with pytest.raises(UserError, match="--folds some"):
        run("train", brain, "-o", tmp_path / "n", "--folds", "some")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_the_page_runs_in_a_browser(brain: Path, tmp_path: Path) -> None:
    collection = find_cases(brain)
    case = collection.cases[0]
    scan, truth = collection.read(case)
    found = np.roll(truth, 2, 1)
    rows = [{"case": case.name, **row} for row in collection.score(found, truth, scan.spacing)]
    page = pages.evaluation_page(
        tmp_path / "page.html", rows, rows, [(case.name, scan, found, truth)], "nearfar", collection.labels
    )
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    shown = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-ready="1"' in shown
    assert shown.count("<canvas") == 3
    assert re.search(r"axial, slice \d+ of 48, -?\d+\.\d mm \(L left, A up\)", shown)


def test_a_page_is_bounded(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((1, 100, 100, 100)).astype(np.float32)
    scan = Scan(tmp_path / "x.nii", image, np.eye(4), "nrrd")
    labels = (image[0] > 0.5).astype(np.uint8)
    markup = pages.viewer(scan, labels, "a", labels, {1: "x"}, most=300_000)
    assert len(markup) < 450_000
    assert "voxel is shown, to bound the page" in markup


@torch.no_grad()
def test_a_bundle_of_regions_that_overlap(tmp_path: Path) -> None:
    """MONAI runs it to the label map of `predict`."""
    torch.manual_seed(0)
    regions = {"whole": (1, 2), "core": (2,)}
    settings = {"features": (4, 4, 4, 4, 4, 4), "norm": ("group", {"num_groups": 2})}
    recipe = Recipe(settings=settings, roi=(16, 16, 16))
    model = Segmenter.create(recipe, {1: "edge", 2: "core"}, 1, regions=regions, order=(1, 2))
    model.save(tmp_path / "model")
    (tmp_path / "scans").mkdir()
    image = np.random.default_rng(0).normal(0, 1, (20, 24, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([-1.0, -1, 2, 1])), tmp_path / "scans/a.nii.gz")
    run("export", tmp_path / "model", "-o", tmp_path / "bundle")
    folders = {"bundle_root": "bundle", "dataset_dir": "scans", "output_dir": "theirs"}
    monai.bundle.run(
        config_file=str(tmp_path / "bundle/configs/inference.json"),
        meta_file=str(tmp_path / "bundle/configs/metadata.json"),
        **{name: str(tmp_path / folder) for name, folder in folders.items()},
    )
    run("predict", tmp_path / "scans", "--model", tmp_path / "model", "-o", tmp_path / "ours")
    ours, theirs = (np.asarray(nib.load(tmp_path / f).dataobj) for f in ("ours/a.nii.gz", "theirs/a_seg.nii.gz"))
    assert len(np.unique(ours)) > 1
    assert (ours == theirs).mean() > 0.9999


def test_a_model_of_nnunet_becomes_one_of_ours(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "medical/data/nnunet"
    run("from-nnunet", folder / "plain", "-o", tmp_path / "m")
    run("predict", folder / "c5_0000.nii.gz", "--model", tmp_path / "m", "-o", tmp_path / "out", "--mirror")
    found = np.asarray(nib.load(tmp_path / "out/c5_0000.nii.gz").dataobj)
    assert (found != np.load(folder / "plain/result.npz")["labels"]).sum() <= 2
    run("from-plan", folder / "resenc/plans.json", "-o", tmp_path / "r.yaml", "--placement", "none")
    assert read_recipe(Recipe, str(tmp_path / "r.yaml")).network == "nnunet_resenc"
