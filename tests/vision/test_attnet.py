"""AttNet: contracts and the surface."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from nearfar.vision.attnet import AttNet, build_contract
from nearfar.vision.backbone import Backbone
from tests.vision.base import BackboneTester, check_contract, close, contracts, randomise


class TestAttNet(BackboneTester):
    model = AttNet
    name = "attnet_t1"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "expansions": (4, 4), "kernel_sizes": (3, 3)}

    def saved_macs(self, model: Backbone, size: int) -> float:
        """The kernel's projection of all positions, where ours projects the nine pooled ones."""
        stages = [(len(stage.blocks), stage.blocks[0].norm_1.weight.numel()) for stage in model.stages]
        return sum(depth * dim**2 * ((size // 2 ** (i + 2)) ** 2 - 9) for i, (depth, dim) in enumerate(stages))


@pytest.mark.parametrize("path", contracts("attentive-convolution"))
def test_contract(path: Path) -> None:
    check_contract(path, build_contract)


@torch.no_grad()
def test_settings_are_read_from_a_checkpoint() -> None:
    source = randomise(
        AttNet((1, 2, 1, 1), (8, 12, 16, 20), 3, expansions=(8, 6, 4, 3), kernel_sizes=(5, 3, 3, 3), mlp_norm=True)
    )
    x = torch.randn(1, 3, 64, 64)
    close(AttNet.from_published(source.state_dict())(x), source(x), 1e-6)
    other = AttNet.from_published(source.state_dict(), norm_variance=True)
    assert not torch.allclose(other(x), source(x), rtol=1e-3)
