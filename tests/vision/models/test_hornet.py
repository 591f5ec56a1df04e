"""HorNet: contracts, the surface, the GF filters at other sizes, the pyramid neck."""

from typing import ClassVar

import pytest
import timm
import torch

from nearfar.vision.contracts.hornet import build_contract
from nearfar.vision.models.hornet import HorBlock, HorFPNConv, HorNet
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestHorNet(BackboneTester):
    model = HorNet
    name = "hornet_tiny_7x7"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "orders": (2, 3), "filters": (None, None)}


class TestHorNetGF(TestHorNet):
    name = "hornet_tiny_gf"
    least: ClassVar = {**TestHorNet.least, "filters": (None, (4, 3))}

    test_published_macs = test_published_macs_of_every_variant = None  # one list holds the variants of both forms


@torch.no_grad()
def test_a_checkpoint_keeps_its_filter_size() -> None:
    larger = randomize(HorNet((1, 1, 1, 1), (8, 16, 32, 64), filters=(None, None, (24, 13), (12, 7)), num_classes=4))
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


@torch.no_grad()
@pytest.mark.parametrize("filter_size", [None, (6, 4)])
def test_contract_of_a_block(filter_size: tuple[int, int] | None) -> None:
    block = randomize(HorBlock(24, 3, filter_size, mlp_ratio=15 / 11, layer_scale=None if filter_size else 1e-6))
    x = torch.randn(1, 24, 6, 7)
    close(build_contract(described(shapes_of(block), {"mlp_ratio": 15 / 11}, [tuple(x.shape)]))(x), block(x), 1e-6)


@torch.no_grad()
def test_a_contract_without_scale_has_the_published_default() -> None:
    shapes = {"proj_in.weight": (16, 8, 1, 1), "proj_in.bias": (16,), "pws.0.weight": (8, 4, 1, 1), "pws.0.bias": (8,)}
    shapes |= {"proj_out.weight": (8, 8, 1, 1), "proj_out.bias": (8,)}
    shapes |= {"dwconv.weight": (12, 1, 5, 5), "dwconv.bias": (12,)}
    assert build_contract(described(shapes)).scale == 1
    assert build_contract(described(shapes, {"scale": "1/3"})).scale == pytest.approx(1 / 3)


@torch.no_grad()
def test_contract_of_a_pyramid() -> None:
    model = HorNet((1, 1, 1, 1), (8, 16, 32, 64), filters=(None, None, (4, 3), None), num_classes=0, feature_norms=True)
    published = {
        name.replace("feature_norms.", "norm").replace(".blocks", ""): shape for name, shape in shapes_of(model).items()
    }
    got = build_contract(described(published, outputs=4))(torch.randn(1, 3, 64, 64))
    assert [tuple(level.shape[1:]) for level in got] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
