"""Occlusion curves, RISE, patch selectivity, readers of SMD and ROD, and Patch Mixing in a recipe."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.vision.classification.training import ClassifierModule, Recipe
from nearfar.vision.robustness.measures import (
    OCCLUSIONS,
    occlusion_curve,
    other_class,
    patch_selectivity,
    rise,
)
from nearfar.vision.robustness.occluded import is_right, open_rod, open_smd, read_mask


def brightest_quarter(x: torch.Tensor) -> torch.Tensor:
    """A classifier of which of two halves is brighter."""
    return 4 * torch.stack((x[..., :16].mean((1, 2, 3)), x[..., 16:].mean((1, 2, 3))), 1)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(12) % 2
    x = torch.full((12, 3, 32, 32), 0.1)
    for i, label in enumerate(labels):
        x[i, :, :, 16 * label : 16 * label + 16] = 0.9
    return x, labels


def test_occlusion_curves() -> None:
    x, labels = pictures()
    for attack in OCCLUSIONS:
        rows = occlusion_curve(brightest_quarter, x, labels, attack, [(0.0, 1), (0.3, 8), (1.0, 8)], seeds=(0, 1))
        assert rows[0]["accuracy"] == 1
        assert rows[2]["accuracy"] < 1, attack
        assert rows[2]["low"] <= rows[2]["accuracy"] <= rows[2]["high"]
    assert all(labels[other_class(labels)] != labels)
    with pytest.raises(UserError, match="one class"):
        other_class(torch.zeros(3).long())
    with pytest.raises(ValueError, match="allowed are replacement, drop, permutation"):
        occlusion_curve(brightest_quarter, x, labels, "rain", [(0.1, 4)])
    with pytest.raises(ValueError, match="divide"):
        occlusion_curve(brightest_quarter, x, labels, "drop", [(0.1, 5)])


def test_measures_of_maps() -> None:
    mask = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    mask[:, :, :, 16:] = True
    assert patch_selectivity(torch.ones(2, 32, 32), mask).tolist() == pytest.approx([0, 0])
    assert patch_selectivity(torch.zeros(2, 32, 32), mask).isnan().all()
    x, labels = pictures()
    contrast = rise(brightest_quarter, x[:2], labels[:2], contrast=1 - labels[:2], masks=50)
    assert contrast.sum((1, 2)).tolist() == pytest.approx([1, 1], rel=1e-4)
    same, again = (
        rise(brightest_quarter, x[:1], labels[:1], masks=50, generator=torch.Generator().manual_seed(5)) for _ in "ab"
    )
    assert torch.equal(same, again)


def cue_counter(x: torch.Tensor) -> torch.Tensor:
    """A classifier of three classes: a red cue at one corner speaks for the first, a green one at the other for the
    second, and the rest of the picture says nothing."""
    red, green = x[:, 0, 4:12, 4:12].mean((1, 2)), x[:, 1, 20:28, 20:28].mean((1, 2))
    return torch.stack((8 * red, 8 * green, torch.full_like(red, 2.0)), 1)


def test_rise_finds_a_planted_cue_and_the_contrast_tells_two_classes_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 32, 32, generator=generator).expand(2, -1, -1, -1).clone()
    x[:, 0, 4:12, 4:12], x[:, 1, 20:28, 20:28] = 1, 1  # both cues in one picture
    both, classes = [(8, 8), (24, 24)], torch.tensor([0, 1])
    maps = rise(cue_counter, x, classes, masks=1500, cells=4)
    for i, found in enumerate(maps):
        row, column = divmod(int(found.argmax()), 32)
        assert max(abs(row - both[i][0]), abs(column - both[i][1])) <= 5, "the maximum is on the class's own cue"
    contrast = rise(cue_counter, x, classes, contrast=1 - classes, masks=1500, cells=4)
    own, other = contrast[0, :16, :16].sum(), contrast[0, 16:, 16:].sum()
    assert own > 0.5
    assert other < 0.02, "what speaks for the other class is gone"
    assert contrast[1, 16:, 16:].sum() > 0.5
    shuffled = rise(lambda part: cue_counter(part.roll(13, 3)), x[:1], classes[:1], masks=1500, cells=4)
    assert int(shuffled[0].argmax()) % 32 > 20, "a classifier that looks elsewhere has its map elsewhere"
    mask = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    mask[:, :, 20:28, 20:28] = True
    selectivity = patch_selectivity(contrast, mask)
    assert selectivity[0] > 0.9
    assert selectivity[1] < -2


def tar(path: Path, names: list[str], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for i, name in enumerate(names):
            stream = io.BytesIO()
            value = 255 if "mask" in name else 10 * i
            Image.new("RGB", (8, 6), (value,) * 3).save(stream, "PNG")
            entry = tarfile.TarInfo(name)
            entry.size = stream.tell()
            stream.seek(0)
            archive.addfile(entry, stream)


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_occlusion_sets(tmp_path: Path, ending: str, mode: str) -> None:
    tar(tmp_path / f"smd_1.{ending}", ["images/n02/b.png", "images/n01/a.png", "masks/n01/a_mask.png"], mode)
    found, masks = open_smd(tmp_path, ["n01", "n02"])
    assert found.labels == [1, 0]
    assert [np.asarray(found[i][0]).max() for i in (0, 1)] == [0, 10]
    (name,) = masks
    assert name.endswith("n01/a.png")
    assert read_mask(masks[name]).all()
    with pytest.raises(UserError, match="lie in no folder of a known class"):
        open_smd(tmp_path, ["n03"])
    (tmp_path / "rod").mkdir()
    tar(tmp_path / f"rod/rod.{ending}", ["ROD/mug/1.png", "ROD/ball/2.png"], mode)
    objects = {"mug": ["cup", "coffee mug"], "ball": ["soccer ball"]}
    classes = ["coffee mug", "cup", "soccer ball"]
    rod = open_rod(tmp_path / "rod", classes, objects)
    assert rod.labels == [1, 2]
    assert is_right([0, 0], rod, objects) == [True, False]
    with pytest.raises(UserError, match="soccer ball are none"):
        open_rod(tmp_path / "rod", classes[:2], objects)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        open_smd(broken, ["n01"])


def test_the_recipe_switches_it_on() -> None:
    recipe = Recipe(size=32, patch_mixing=0.5, mixup=0.2)
    assert recipe.patch_grids == (4, 8)
    assert Recipe().patch_grids == (7, 14)
    with pytest.raises(ValueError, match="divide size=32"):
        Recipe(size=32, patch_mixing=0.5, patch_grid=5)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        Recipe(patch_mixing=1.5)
    with pytest.raises(ValueError, match="patch_mixing"):
        Recipe(token_labels="maps", patch_mixing=0.5)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return self.weight.expand(len(x), 2)

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    module = ClassifierModule(Spy(), recipe, 2, 1)
    module.log = lambda *_, **__: None
    x = torch.arange(4.0)[:, None, None, None].repeat(1, 3, 32, 32)
    for _ in range(20):
        module.training_step((x, torch.tensor([0, 1, 0, 1])), 0)
    whole = sum(bool(torch.isin(found, torch.arange(4.0)).all()) for found in seen)
    assert 0 < whole < 20, "some batches hold whole cells of others, the others blends of mixup"
