"""Losses by their formulas; a network trained on real scans against a stated baseline; any network by name."""

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.filters import frangi

from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError, UserError
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.data.scans import Scan, read_scan
from nearfar.medical.losses import SegmentationLoss
from nearfar.medical.metrics import score_case
from nearfar.medical.networks import create_network, load_published
from nearfar.medical.preparation import Preparation
from nearfar.medical.recipe import Recipe
from nearfar.medical.refinement import crf_bytes, refine, search_crf
from nearfar.medical.samples import threshold_baseline, write_brain
from nearfar.medical.segmenter import Segmenter
from nearfar.medical.training import Patches, augmentation, train_segmenter
from nearfar.ops.graph.dense_crf import DenseCRF


@pytest.mark.parametrize("name", ["dice_ce", "nnunet", "transunet", "binary", "structure", "cross_entropy"])
def test_losses_prefer_the_truth(name: str) -> None:
    labels = torch.zeros(2, 40, 40, dtype=torch.long)
    labels[:, 10:25, 8:30] = 1
    one_hot = F.one_hot(labels, 2).movedim(-1, 1).float()
    right = one_hot[:, 1:] * 20 - 10 if name in ("binary", "structure") else one_hot * 20
    loss = SegmentationLoss(name)
    assert loss(right, labels) < 0.05 < loss(-right, labels)
    both = loss([right, right], labels)
    assert both == pytest.approx(float(loss(right, labels)) * (1 if name == "nnunet" else 2), abs=1e-6)


def test_transunet_loss_formula() -> None:
    logits, labels = torch.randn(3, 4, 9, 9), torch.randint(0, 4, (3, 9, 9))
    p, g = logits.softmax(1), F.one_hot(labels, 4).movedim(-1, 1).float()
    axes = (0, 2, 3)
    dice = 1 - (2 * (p * g).sum(axes) + 1e-5) / ((p**2).sum(axes) + (g**2).sum(axes) + 1e-5)
    expected = 0.4 * F.cross_entropy(logits, labels) + 0.6 * dice.mean()
    torch.testing.assert_close(SegmentationLoss("transunet")(logits, labels), expected)


def test_squashed_scores_cannot_reach_a_small_loss() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    logits = torch.stack([torch.full((1, 8, 8), 50.0), *[torch.full((1, 8, 8), -50.0)] * 8], 1)
    assert SegmentationLoss("cross_entropy")(logits, labels) < 1e-6
    floor = math.log(1 + 8 / math.e)
    assert float(SegmentationLoss("cross_entropy", squash=True)(logits, labels)) == pytest.approx(floor, rel=1e-4)


def test_ignored_pixels_do_not_count() -> None:
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    labels[0, :2] = 255
    expected = F.cross_entropy(logits[:, :, 2:], labels[:, 2:])
    torch.testing.assert_close(SegmentationLoss("cross_entropy", ignore=255)(logits, labels), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dims", "settings"),
    [
        ("smp.Unet", 2, {"encoder_name": "resnet18"}),
        ("monai.BasicUNet", 3, {}),
        ("monai.DynUNet", 3, {}),
        ("monai.SwinUNETR", 3, {"feature_size": 12}),
        ("deeplab_v3plus", 2, {"depths": [1, 1, 1, 3], "width": 8}),
        ("deeplab_v2", 3, {"depths": [1, 1, 1, 1], "width": 8}),
    ],
)
def test_networks_by_name_run_in_the_pipeline(tmp_path: Path, name: str, dims: int, settings: dict) -> None:
    recipe = Recipe(network=name, settings=settings, roi=(64 if "Swin" in name else 32, 32, 32)[:dims])
    segmenter = Segmenter.create(recipe, {3: "a", 7: "b"}, 1)
    affine = np.diag([-1.0, 1, 2, 1])
    nib.save(nib.Nifti1Image(np.random.rand(32, 40, 6).astype(np.float32), affine), tmp_path / "a.nii")  # noqa: NPY002
    scan = read_scan(tmp_path / "a.nii")
    labels = segmenter(scan)
    assert labels.shape == scan.shape
    assert set(np.unique(labels)) <= {0, 3, 7}
    segmenter.save(tmp_path / "model")
    np.testing.assert_array_equal(Segmenter.load(tmp_path / "model")(scan), labels)


def test_preparation_is_undone_exactly(tmp_path: Path) -> None:
    affine = np.array([[0, -1.5, 0, 3], [0, 0, 2.0, 4], [-1.0, 0, 0, 5], [0, 0, 0, 1]])
    data = np.zeros((10, 12, 8), np.float32)
    data[3:7, 2:6, 1:5] = 100
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "a.nii")
    scan, labels = read_scan(tmp_path / "a.nii"), (data > 0).astype(np.uint8) * 5
    same = Preparation()
    np.testing.assert_array_equal(same.restore(same.labels(labels, scan), scan), labels)
    finer = Preparation(spacing=(0.5, 0.5, 0.5))
    assert finer.image(scan).shape[1:] == finer.size(scan) == (12, 16, 8)  # the box of what is no padding
    np.testing.assert_array_equal(finer.restore(finer.labels(labels, scan), scan), labels)
    scan.image[0, 4, 4, 3] = -10
    windowed = Preparation(window=(0, 50)).image(scan)
    assert (float(windowed.min()), float(windowed.max())) == (0, 1)


@pytest.fixture(scope="module")
def brain(tmp_path_factory) -> Path:
    return write_brain(tmp_path_factory.mktemp("brain"), resolution=4)


def test_learns_brain_tissue(brain: Path, tmp_path: Path) -> None:
    collection = find_cases(brain)
    left, right = collection.cases
    recipe = Recipe(
        settings={"features": [16, 16, 32, 32, 64, 16], "norm": ["group", {"num_groups": 4}]},
        roi=(32, 64),
        epochs=8,
        batch_size=8,
        patches_per_epoch=160,
        learning_rate=5e-3,
        foreground=0.3,
    )
    segmenter, summary = train_segmenter(
        collection, recipe, tmp_path, train_cases=[right], validation_cases=[left], device="cpu"
    )
    (scan, truth), (other, other_truth) = collection.read(left), collection.read(right)
    chance = (scan.image[0] > 0) * np.random.default_rng(0).integers(1, 3, truth.shape)  # tissue drawn at random
    intensity = threshold_baseline(scan.image[0], other.image[0], other_truth)
    dice = lambda labels: np.mean([r["dice"] for r in score_case(labels, truth, collection.labels)])  # noqa: E731
    assert dice(segmenter(scan)) > max(dice(chance) + 0.15, 0.87)
    assert dice(intensity) > 0.8  # the template's tissue maps follow its intensity closely: a strong baseline
    assert summary[-1]["dice"] == pytest.approx(dice(segmenter(scan)))
    refined = segmenter(scan, crf=DenseCRF(2, 1.0, 4.0, 1.0, 12.0, 20.0))
    assert dice(refined) > 0.8 * dice(segmenter(scan))
    with pytest.raises(UserError, match="both sides"):
        train_segmenter(collection, recipe, tmp_path / "x", train_cases=[left], validation_cases=[left])


@pytest.mark.slow
def test_learns_retinal_vessels(shared_data, tmp_path: Path) -> None:
    """Better on another child's eyes than a Frangi filter whose threshold is fitted on the training pictures."""
    collection = find_cases(shared_data("chasedb1"))
    train, test = collection.cases[2:8], collection.cases[:1]
    recipe = Recipe(
        settings={"features": [8, 8, 16, 16, 32, 8], "norm": ["group", {"num_groups": 4}]},
        roi=(64, 64), resize=(240, 250), batch_size=8, patches_per_epoch=96, epochs=6, learning_rate=1e-2,
    )  # fmt: skip
    segmenter, _ = train_segmenter(collection, recipe, tmp_path, train_cases=train, device="cpu")
    maps = [(frangi(s.image[1], sigmas=(2, 3, 4, 5)), t) for s, t in map(collection.read, (*train[:2], *test))]
    dice = lambda found, truth: 2 * (found & truth).sum() / (found.sum() + truth.sum())  # noqa: E731
    fitted = lambda q: sum(dice(m > np.quantile(m, q), t > 0) for m, t in maps[:-1])  # noqa: E731
    quantile = max(np.linspace(0.85, 0.96, 12), key=fitted)
    scan, truth = collection.read(test[0])
    baseline = dice(maps[-1][0] > np.quantile(maps[-1][0], quantile), truth > 0)
    assert 0.3 < baseline < dice(segmenter(scan) > 0, truth > 0) - 0.03


@pytest.mark.parametrize("settings", [{"network": "macmd"}, {"network": "monai.BasicUNet", "intensity": "caffe"}])
def test_slices_are_resized_and_restored(tmp_path: Path, settings: dict) -> None:
    recipe = Recipe(roi=(32, 32), resize=(32, 32), **settings)
    channels = 3 if recipe.intensity == "caffe" else 1
    scan = Scan(tmp_path / "a", np.random.default_rng(0).random((channels, 40, 50), np.float32) * 255)
    prepared = Preparation(None, None, recipe.intensity, recipe.resize).image(scan)
    expected = [ndimage.zoom(c, (32 / 40, 32 / 50), order=3) for c in scan.image]
    if recipe.intensity == "caffe":
        expected = [expected[2] - 104.008, expected[1] - 116.669, expected[0] - 122.675]
        np.testing.assert_allclose(prepared.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert Segmenter.create(recipe, {1: "x"}, channels)(scan).shape == (40, 50)


def test_patches_are_scaled_and_padded_with_the_label_to_ignore() -> None:
    image, labels = np.ones((1, 20, 20), np.float32), np.ones((20, 20), np.uint8)
    recipe = Recipe(roi=(32, 32), scales=(0.5, 1.0, 2.0), patches_per_epoch=30, augment=[], foreground=0.0)
    shares = {
        float((t == 255).float().mean()) for _, t in map(Patches([(image, labels)], recipe, 255).__getitem__, range(30))
    }
    # windows of 64, 32 and 16 voxels hold 20, 20 and 16 of the image
    assert sorted(shares) == pytest.approx([0, 1 - (20 / 32) ** 2, 1 - (10 / 32) ** 2])


def test_augmentation_keeps_labels_whole() -> None:
    entries = [{"RandRotated": {"prob": 1.0, "range_x": 0.5}}, {"RandGaussianNoised": {"prob": 1.0, "std": 1.0}}]
    labels = torch.zeros(1, 24, 24)
    labels[:, 4:18, 6:20] = 3
    moved = augmentation(entries, 2).set_random_state(0)({"image": labels.clone(), "label": labels})
    assert set(moved["label"].unique().tolist()) == {0.0, 3.0}
    assert (moved["label"] != labels).any()
    assert len(moved["image"].unique()) > 100
    for entry in ({"NoSuch": {}}, {"RandFlipd": {"wrong": 1}}):
        with pytest.raises(UserError, match="augment"):
            augmentation([entry], 2)


def test_the_crf_by_slabs_is_near_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 64, 20, 20, generator=generator) * 20
    image[:, 10:50, 5:15, 5:15] += 100
    p = torch.softmax(
        torch.stack([-image[0], image[0] - 120]) / 40 + torch.randn(2, 64, 20, 20, generator=generator), 0
    )
    crf = DenseCRF(3, 1.0, 2.0, 1.0, 4.0, 20.0)
    whole = refine(p, image, crf)
    budget = crf_bytes(24 * 20 * 20, 2, 1, 3)
    slabs = refine(p.numpy(), image, crf, memory=budget)
    assert (slabs == whole).mean() > 0.995
    assert (whole != p.argmax(0).numpy()).mean() > 0.01
    with pytest.raises(UserError, match="--memory"):
        refine(p, image, crf, memory=1000)


def test_crf_search_finds_the_better_setting() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(24, 24, dtype=torch.long)
    truth[6:18, 6:18] = 1
    noisy = truth.float() + 0.8 * torch.randn(24, 24, generator=generator)
    p = torch.sigmoid(4 * (noisy - 0.5))
    items = [(torch.stack([1 - p, p]), truth[None] * 100.0, truth)]
    useless = {"iterations": 0}
    good = {"iterations": 5, "spatial_std": 2.0, "bilateral_std": 20.0, "color_std": 10.0}
    best, rows = search_crf(items, [useless, good])
    assert best == good
    assert rows[0]["dice"] == pytest.approx(rows[1]["dice"])
    assert rows[2]["dice"] > rows[0]["dice"]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="roi"):
        Recipe(roi=(3,))
    with pytest.raises(UserError, match="unknown"):
        create_network("resnet", 2, 1, 2, {})
    with pytest.raises(UserError, match="takes 2 axes, roi has 3"):
        create_network("macmd", 2, 1, 3, {})
    with pytest.raises(UserError, match="no trained segmenter"):
        Segmenter.load("/nonexistent")


@pytest.mark.slow
def test_a_published_checkpoint_is_told_by_its_tensors() -> None:
    for system, name in (
        ("duoformer", "DuoFormer"),
        ("multi-scale-guided-attention", "GuidedAttention"),
        ("macmd", "MACMD"),
    ):
        whole = [c for c in map(Contract.load, shipped(system)) if not c.variant.startswith("op-")]
        if whole:
            contract = min(whole, key=lambda c: c.content.get("parameters", 0))
            assert type(load_published(contract.state())).__name__ == name
    with pytest.raises(CheckpointError, match=r"is none of \d+ known"):
        load_published({"weight": torch.zeros(3)})


@pytest.mark.parametrize("name", ["dice_ce", "nnunet", "transunet"])
def test_losses_without_the_ignored_voxels(name: str) -> None:
    """Nothing ignored: the usual loss. Ignored voxels: as if they were not there, whatever the scores."""
    logits, labels = torch.randn(2, 3, 6, 6), torch.randint(0, 3, (2, 6, 6))
    torch.testing.assert_close(
        SegmentationLoss(name, ignore=-1)(logits, labels), SegmentationLoss(name)(logits, labels)
    )
    hidden, other = labels.clone(), logits.clone()
    hidden[:, 3:], other[:, :, 3:] = -1, 50 * torch.randn(2, 3, 3, 6)
    loss = SegmentationLoss(name, ignore=-1)
    torch.testing.assert_close(loss(logits, hidden), loss(other, hidden))
    torch.testing.assert_close(loss(logits, hidden), SegmentationLoss(name)(logits[:, :, :3], labels[:, :3]))
    assert torch.isfinite(loss(logits, torch.full_like(labels, -1)))


def test_regions_and_ignored_voxels_are_trained_and_scored(tmp_path: Path) -> None:
    """nnU-Net's regions: outputs of their own, a label map painted from them, regions scored, what is ignored not."""
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
    for i in range(2):
        labels = np.zeros((24, 24, 8), np.int32)
        labels[4:20, 4:20], labels[8:16, 8:16] = 1, -3
        image = np.choose(labels.clip(-1) + 1, [90, 0, 50]) + rng.normal(0, 3, labels.shape)
        labels[..., :2] = 70000
        for folder, name, data in (("imagesTr", f"c{i}_0000", image.astype(np.float32)), ("labelsTr", f"c{i}", labels)):
            nib.save(nib.Nifti1Image(data, np.diag([1, 1, 3, 1])), tmp_path / folder / f"{name}.nii.gz")
    labels = {"background": 0, "whole": [1, -3], "core": -3, "ignore": 70000}
    content = {"channel_names": {"0": "MR"}, "labels": labels, "regions_class_order": [1, -3]}
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "numTraining": 2, "file_ending": ".nii.gz"}))
    collection = find_cases(tmp_path)
    settings = {"features": (8, 8, 8, 8, 8, 8), "norm": ("group", {"num_groups": 4})}
    recipe = Recipe(settings=settings, roi=(16, 16), epochs=4, batch_size=8, patches_per_epoch=64, learning_rate=1e-2)
    segmenter, summary = train_segmenter(
        collection, recipe, tmp_path / "m", train_cases=collection.cases[:1], validation_cases=collection.cases[1:],
        device="cpu",
    )  # fmt: skip
    assert [row["label"] for row in summary] == ["whole", "core", "mean of labels"]
    assert summary[0]["dice"] > 0.85
    scan = collection.scan(collection.cases[1])
    found = Segmenter.load(tmp_path / "m")(scan)
    assert set(np.unique(found)) <= {0, 1, -3}
    assert segmenter.network.final_conv.out_channels == 2
    np.testing.assert_array_equal(found, segmenter(scan))


def test_patches_are_centred_on_classes_alike() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 32:], labels[5, 5] = 1, 2
    recipe = Recipe(roi=(8, 8), patches_per_epoch=60, augment=[], foreground=1.0)
    patches = Patches([(np.zeros((1, 64, 64), np.float32), labels)], recipe)
    rare = np.mean([bool((patches[i][1] == 2).any()) for i in range(60)])
    assert 0.25 < rare < 0.75  # one voxel of 2049, one class of two
