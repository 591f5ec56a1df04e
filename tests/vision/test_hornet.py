"""HorNet: contracts, the surface, the GF filters at other sizes, the pyramid neck."""

from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch

from nearfar.vision.hornet import HorFPNConv, HorNet, build_contract
from tests.vision.base import BackboneTester, check_contract, close, contracts, randomise


class TestHorNet(BackboneTester):
    model = HorNet
    name = "hornet_tiny_7x7"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "orders": (2, 3), "filters": (None, None)}
    # the published 209, 211 and 216 M do not go with the 21841 classes of the pre-training (nor with 1000)
    other_count: ClassVar = {
        "hornet_large_7x7": 226575121,
        "hornet_large_gf": 228322129,
        "hornet_large_gf_384": 233839441,
    }


class TestHorNetGF(TestHorNet):
    name = "hornet_tiny_gf"
    least: ClassVar = {**TestHorNet.least, "filters": (None, (4, 3))}

    def test_published_variants(self) -> None:
        pytest.skip("one list holds the variants of both forms")


@pytest.mark.parametrize("path", contracts("hornet"))
def test_contract(path: Path) -> None:
    check_contract(path, build_contract)


@torch.no_grad()
def test_a_checkpoint_keeps_its_filter_size() -> None:
    larger = randomise(HorNet((1, 1, 1, 1), (8, 16, 32, 64), filters=(None, None, (24, 13), (12, 7)), num_classes=4))
    loaded = HorNet.from_published(larger.state_dict())
    assert loaded.stages[2].blocks[0].gnconv.dwconv.complex_weight.shape[1:3] == (24, 13)
    for size in (384, 224):
        x = torch.randn(1, 3, size, size)
        close(loaded(x), larger(x), 1e-6)


@pytest.mark.parametrize(
    ("filter_size", "project", "channels"), [(None, True, 8), ((32, 17), True, 8), (None, False, 16)]
)
def test_pyramid_neck(filter_size: tuple[int, int] | None, project: bool, channels: int) -> None:
    neck = HorFPNConv(12, 8, 2, filter_size, project=project, norm=torch.nn.BatchNorm2d, activation=torch.nn.ReLU)
    y = neck(torch.randn(2, 12, 10, 14))
    assert y.shape == (2, channels, 10, 14)
    assert (y >= 0).all()


def test_an_order_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ValueError, match="allowed orders are 1 to 3"):
        timm.create_model("hornet_tiny_7x7", dims=(12, 24, 48, 12))
