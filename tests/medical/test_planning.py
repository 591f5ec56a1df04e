"""Plans: nnU-Net's topology and memory rule, reasons, a file that trains."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.core.recipes import read_recipe
from nearfar.medical import samples
from nearfar.medical.data.layouts import find_cases
from nearfar.medical.planning import map_values, plan, target_spacing, topology, write_plan
from nearfar.medical.preparation import Preparation
from nearfar.medical.recipe import Recipe

HERE = Path(__file__).parent / "data" / "nnunet"


@pytest.mark.parametrize(
    ("spacing", "patch", "kind"),
    [([2.0, 1.0, 1.2], [20, 31, 40], "plain"), ([2.0, 1.0, 1.2], [20, 31, 40], "resenc")],
)
def test_topology_is_that_of_a_plan_of_nnunet(spacing: list[float], patch: list[int], kind: str) -> None:
    configuration = json.loads((HERE / kind / "plans.json").read_text())["configurations"]["3d_fullres"]
    theirs = configuration["architecture"]["arch_kwargs"]
    strides, kernels, padded = topology(spacing, patch)
    assert (strides, kernels, padded) == (theirs["strides"], theirs["kernel_sizes"], configuration["patch_size"])


def test_anisotropic_axes_are_pooled_later() -> None:
    strides, kernels, padded = topology([5.0, 0.8, 0.8], [20, 320, 256])  # nnU-Net's plan of prostate MR is alike
    assert strides[:4] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert kernels[0] == [1, 3, 3]
    assert padded == [20, 320, 256]
    spacing, why = target_spacing([[5.0, 0.8, 0.8], [3.0, 0.8, 0.8], [6.0, 0.8, 0.8]], [[20, 400, 400]] * 3)
    assert spacing[0] == pytest.approx(np.percentile([5, 3, 6], 10))
    assert "10th percentile" in why


def test_values_in_the_maps() -> None:
    """By hand: two stages of 4 and 8 channels on 8 x 8, two convolutions each, one level up, three classes."""
    settings = {"features": [4, 8], "strides": [[1, 1], [2, 2]], "blocks_per_stage": [2, 2]}
    settings["decoder_blocks_per_stage"] = [2]
    assert map_values(settings, [8, 8], 3, False) == 2 * 4 * 64 + 2 * 8 * 16 + 64 * (4 * 3 + 3)


def test_a_plan_is_a_recipe_with_reasons(tmp_path: Path) -> None:
    collection = find_cases(samples.write_brain(tmp_path / "brain", resolution=8))
    recipe, reasons, found = plan(collection, collection.cases, minutes=0.2)
    assert set(recipe) == set(reasons)
    assert found.shares["background"] > found.shares["white matter"] > 0
    write_plan(tmp_path / "plan.yaml", recipe, reasons, found, "brain")
    text = (tmp_path / "plan.yaml").read_text()
    assert "median of the voxel sides" in text
    read = read_recipe(Recipe, str(tmp_path / "plan.yaml"))
    assert read.network == "nnunet_plain"
    assert read.spacing == (8.0, 8.0)  # too few minutes for three axes: slices
    assert "slices: in 0.2 minutes 2000 steps" in " ".join(text.replace("#", "").split())
    assert recipe["settings"]["norm_groups"] == 4
    assert 2 <= recipe["batch_size"] <= 4
    assert max(read.settings["features"]) <= 4 * read.settings["features"][0]
    assert read.epochs * read.patches_per_epoch / read.batch_size >= 20
    large, _, _ = plan(collection, collection.cases, memory=8 * 2**30)
    assert large["settings"]["features"][0] == 32
    assert (large["epochs"], large["optimizer"]) == (1000, "sgd")
    flat, _, _ = plan(collection, collection.cases, dims=2, kind="resenc")
    assert len(flat["roi"]) == len(flat["spacing"]) == 2


def test_few_minutes_make_large_pictures_coarser_while_labels_keep_their_dice(tmp_path: Path) -> None:
    """Discs stay what they are at half the size; lines one pixel wide do not, so those pictures stay fine."""
    y, x = np.mgrid[:480, :480]
    shapes = {"discs": (y - 240) ** 2 + (x - 200) ** 2 < 120**2, "lines": (x % 40 == 0) & (y % 3 > 0)}
    for name, mask in shapes.items():
        for i in range(2):
            for kind, values in (("images", np.where(mask, 200, 50 + i)), ("masks", 255 * mask)):
                (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(tmp_path / name / kind / f"p{i}.png")
        collection = find_cases(tmp_path / name)
        recipe, reasons, _ = plan(collection, collection.cases, minutes=0.02)
        if name == "discs":
            assert recipe["spacing"][0] > 1
            assert "times as coarse" in reasons["spacing"]
            preparation = Preparation.of(Recipe(**recipe))
            scan, labels = collection.read(collection.cases[0])
            assert labels is not None
            assert preparation.size(scan) == tuple(round(480 / side) for side in recipe["spacing"])
            scores = np.stack([1.0 - preparation.labels(labels, scan), preparation.labels(labels, scan)])
            found = np.argmax(list(preparation.scores_back(scores, scan)), 0)
            assert (found != labels).mean() < 0.02
        else:
            assert recipe["spacing"] is None
