"""SpaRTAN: contracts, the surface, the flat published layout."""

from typing import ClassVar

import pytest
import torch

from nearfar.core.errors import UserError
from nearfar.vision.contracts.spartan import build_contract
from nearfar.vision.models.spartan import SpaRTAN, SpaRTANBlock
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestSpaRTAN(BackboneTester):
    model = SpaRTAN
    name = "spartan_tiny"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 24), "expand_ratios": (2, 2, 2, 2)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "expand_ratios": (2, 2)}
    macs_tolerance = 0.03


@torch.no_grad()
def test_flat_layout() -> None:
    model = randomize(SpaRTAN((1, 2, 1), (8, 16, 24), (3, 2, 2), num_classes=4))
    published, flat = {}, {}
    order = ["stages.0.blocks.0.", "stages.1.downsample.", "stages.1.blocks.0.", "stages.1.blocks.1."]
    order += ["stages.2.downsample.", "stages.2.blocks.0."]
    flat = {place: f"layers.{i}." for i, place in enumerate(order)}
    for name, value in model.state_dict().items():
        for place, layer in flat.items():
            name = name.replace(place, layer)
        name = name.replace("stem.", "conv.").replace("head.fc.", "linear.")
        published[name.replace("l_conv.0.", "l_conv.0.conv.")] = value
    x = torch.randn(1, 3, 64, 64)
    loaded = SpaRTAN.from_published({"model": {f"module.{name}": value for name, value in published.items()}})
    close(loaded(x), model(x), 1e-6)
    assert [len(stage.blocks) for stage in loaded.stages] == [1, 2, 1]
    assert [block.cmixer.conv.conv.groups for block in (loaded.stages[0].blocks[0], loaded.stages[2].blocks[0])] == [
        24,
        24,
    ]


def test_drop_path_does_not_reach_its_rate() -> None:
    model = SpaRTAN((1, 3), (8, 16), (2, 2), drop_path_rate=0.4)
    rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@torch.no_grad()
def test_contract_of_a_block() -> None:
    for early in (True, False):
        block = randomize(SpaRTANBlock(16, 2, early))
        x = torch.randn(1, 16, 6, 7)
        close(build_contract(described(shapes_of(block), {}, [tuple(x.shape)]))(x), block(x), 1e-6)
    model = randomize(SpaRTAN(**TestSpaRTAN.tiny, num_classes=3))
    with pytest.raises(UserError, match="depths"):
        build_contract(described(shapes_of(model), {"depths": [1, 1, 3, 1]}))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        SpaRTAN((1, 1), (8,), (2, 2))
    with pytest.raises(ValueError, match="multiple of 8"):
        SpaRTAN((1,), (12,), (2,))
    with pytest.raises(ValueError, match="at least 2"):
        SpaRTAN((1,), (16,), (1,))
