"""TransXNet: contracts, the surface, position tables at other sizes, the dense form."""

from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F

from nearfar.ops.convolution.dmixer import DMixer
from nearfar.vision.contracts.transxnet import build_contract
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.models.transxnet import TransXBlock, TransXNet
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestTransXNet(BackboneTester):
    model = TransXNet
    name = "transxnet_t"
    tiny: ClassVar = {
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 32, 32),
        "num_heads": (1, 2, 2, 4),
        "mlp_ratios": (2,) * 4,
    }
    least: ClassVar = {
        "depths": (1, 1),
        "dims": (8, 16),
        "groups": (2, 2),
        "sr_ratios": (2, 1),
        "num_heads": (1, 2),
        "mlp_ratios": (2, 2),
    }
    # the published count is of the form for 224 pixels; the tables are larger here
    other_count: ClassVar = {"transxnet_b_384": 52409402}

    def saved_macs(self, model: TransXNet, size: int) -> float:
        """The published figures leave out the products of the attention."""
        tables = [
            (len(s.blocks), s.blocks[0].norm1.num_channels, t)
            for s, t in zip(model.stages, model.position_tables, strict=True)
        ]
        return -sum(depth * dim * table.shape[2] * table.shape[3] for depth, dim, table in tables)


@torch.no_grad()
def test_dense_checkpoint() -> None:
    model = randomize(timm.create_model("transxnet_t", num_classes=0, feature_norms=True, **TestTransXNet.tiny))
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("feature_norms."):
            _, i, kind = name.split(".")
            name = f"norm{2 * int(i)}.{kind}"
        state[name] = value
    x = torch.randn(1, 3, 64, 96)
    loaded = TransXNet.from_published(state).contract_form()
    for level, norm, got in zip(model.forward_pyramid(x), model.feature_norms, loaded(x), strict=True):
        close(got, F.group_norm(level, 1, norm.weight, norm.bias), 1e-5)


@torch.no_grad()
def test_tables_are_kept_per_size_and_follow_their_weights() -> None:
    model = randomize(timm.create_model("transxnet_t", num_classes=3, **TestTransXNet.tiny))
    sizes = [(64, 64), (96, 64), (64, 64)]
    first = [model(torch.ones(1, 3, *size)) for size in sizes]
    close(first[0], first[2], 1e-6)
    model.position_tables[0].mul_(-3)
    assert not torch.allclose(model(torch.ones(1, 3, 64, 64)), first[0], rtol=1e-4)


@torch.no_grad()
def test_spatial_tables_agree_at_their_own_size() -> None:
    model = randomize(timm.create_model("transxnet_t", num_classes=3, table_size=64, **TestTransXNet.tiny))
    spatial = TransXNet.from_published(model.state_dict(), table="spatial")
    x = torch.randn(1, 3, 64, 64)
    close(spatial(x), model(x), 1e-6)
    x = torch.randn(1, 3, 96, 128)
    assert not torch.allclose(spatial(x), model(x), rtol=1e-4)


def test_attention_maps_of_every_block() -> None:
    model = randomize(timm.create_model("transxnet_t", num_classes=3, **TestTransXNet.tiny)).train()
    maps = attention_maps(model, torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 1, 256, 4), (2, 2, 64, 4), (2, 2, 16, 4), (2, 4, 4, 4)]
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert model.training


@torch.no_grad()
@pytest.mark.parametrize(("sr_ratio", "heads"), [(1, 2), (2, 4)])
def test_contract_of_a_block(sr_ratio: int, heads: int) -> None:
    block = TransXBlock(16, DMixer(16, 5, 3, heads, sr_ratio), 31 / 16, 1e-5, 0.0, 0.0)
    x, table = torch.randn(1, 16, 8, 6), torch.randn(1, heads, 48, 48 // sr_ratio**2)
    contract = described(shapes_of(randomize(block)), inputs=[tuple(x.shape), tuple(table.shape)])
    close(build_contract(contract)(x, table), block(x, table), 1e-6)


@torch.no_grad()
def test_contract_of_the_feature_pyramid() -> None:
    model = TransXNet(**TestTransXNet.tiny, num_classes=0, feature_norms=True, table_size=96)
    contract = described(shapes_of(model), {"fork_feat": True}, outputs=4)
    got = build_contract(contract)(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in got] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (32, 2, 3)]
