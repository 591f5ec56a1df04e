"""HaloNet: contracts, timm's networks on the same weights, the surface, settings that shapes do not tell."""

from typing import ClassVar

import pytest
import timm
import torch

from nearfar.core.contracts import Contract
from nearfar.core.errors import CheckpointError, UserError
from nearfar.vision.contracts.halonet import build_contract
from nearfar.vision.explain.attention import attention_maps, draw_attention, place
from nearfar.vision.models.halonet import HALONETS, HaloNet
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestHaloNet(BackboneTester):
    model = HaloNet
    name = "nearfar_halonet26t"
    tiny: ClassVar = {
        "depths": (1, 1, 2, 1),
        "dims": (16, 24, 32, 48),
        "mids": (8, 8, 16, 16),
        "attention": ((), (0,), (1,), (0,)),
        "num_heads": (8, 2, 2, 4),
        "block_size": 4,
        "stem_dim": 16,
    }
    least: ClassVar = {"depths": (1, 1), "dims": (16, 24), "mids": (8, 8), "attention": ((), (0,)), "num_heads": (8, 2)}

    def saved_macs(self, model: HaloNet, size: int) -> float:
        """timm's own products of queries with the whole tables, for those with the places of keys here."""
        saved, side = 0, size // 4
        for i, stage in enumerate(model.stages):
            for block in stage.blocks:
                attn = block.self_attn
                queries = (side // 2**i) ** 2
                if attn is None:
                    continue
                w, d, e = attn.window_size, attn.head_dim, attn.value_dim
                here = w * w * (d + 2 * w + max(d + 2 * w, e)) + 2 * w * d
                theirs = w * w * (d + e) + 2 * (2 * w - 1) * d
                saved += (theirs - here) * queries * attn.num_heads
        return saved


@torch.no_grad()
@pytest.mark.parametrize("name", ["sehalonet33ts", "eca_halonext26ts", "haloregnetz_b", "halonet50ts"])
def test_agrees_with_timm(name: str) -> None:
    theirs = randomize(timm.create_model(name, num_classes=7))
    x = torch.randn(1, *theirs.pretrained_cfg["input_size"])
    ours = HaloNet.from_published(theirs.state_dict())
    close(ours(x), theirs(x), 1e-5)
    assert (
        HaloNet.variant(HaloNet.published_settings(HaloNet.published_state(theirs.state_dict()))) == f"nearfar_{name}"
    )
    shapes = {key: shape for key, shape in shapes_of(theirs).items() if "num_batches" not in key}
    variant = HALONETS[f"nearfar_{name}"].settings
    settings = {
        "block": variant["block_size"],
        "halo": variant["halo_size"],
        "activation": "SiLU",
        "channel_attention": {"se": "SE", "eca": "ECA", "": None}[variant["channel_attention"]],
        "group_size": variant["group_size"],
        "stem": "3 convs 3x3" + (", then 3x3 max pool stride 2" if variant["stem"] == "tiered" else ""),
    }
    built = build_contract(described(shapes, settings))
    built.load_state_dict(ours.state_dict())
    close(built(x), theirs(x), 1e-5)
    other = {"channel_attention": "GC"} if variant["channel_attention"] else {"group_size": 32}
    with pytest.raises(UserError, match="its state holds"):
        build_contract(described(shapes, settings | other))


@torch.no_grad()
def test_settings_are_kept() -> None:
    settings = {**TestHaloNet.tiny, "halo_size": 3, "act": "silu", "stem": "tiered_strided", "value_ratio": 2.0}
    settings |= {"channel_attention": "se", "group_size": 4, "head_dim": 3, "final_dim": 40}
    model, x = randomize(HaloNet(**settings, num_classes=3)), torch.randn(1, 3, 64, 96)
    again = HaloNet.from_published(model.state_dict())
    found = HaloNet.published_settings(model.state_dict())
    assert {key: found[key] for key in ("halo_size", "act", "stem", "head_dim", "value_ratio", "group_size")} == {
        "halo_size": 3, "act": "silu", "stem": "tiered_strided", "head_dim": 3, "value_ratio": 2.0, "group_size": 4,
    }  # fmt: skip
    close(again(x), model(x), 1e-6)


def test_what_names_and_shapes_do_not_tell_must_be_said() -> None:
    state = {name: value for name, value in HaloNet(**TestHaloNet.tiny).state_dict().items() if name != "form"}
    with pytest.raises(CheckpointError, match="block_size and halo_size and act; give them"):
        HaloNet.from_published(state)
    assert HaloNet.from_published(state, block_size=6, halo_size=1, act="relu").stages[3].blocks[0].self_attn.pad


@torch.no_grad()
def test_sizes_that_blocks_do_not_divide() -> None:
    strict = randomize(HaloNet(**TestHaloNet.tiny, num_classes=3, pad=False))
    loose = HaloNet.from_published(strict.state_dict())
    x = torch.randn(1, 3, 128, 256)
    close(loose(x), strict(x), 1e-6)
    assert loose(x[..., :100]).shape == (1, 3)
    with pytest.raises(ValueError, match="multiples of block_size=4"):
        strict(x[..., :100])


@torch.no_grad()
def test_maps_lie_in_their_windows() -> None:
    model = randomize(timm.create_model("nearfar_halonet26t", **TestHaloNet.tiny))
    x = torch.randn(1, 3, 64, 96)
    maps = attention_maps(model, x)
    assert [tuple(m.shape) for m in maps.values()] == [(1, 2, 96, 64), (1, 2, 24, 64), (1, 4, 6, 64)]
    name = "stages.1.blocks.0.self_attn"  # stride 2: 8 x 12 queries, 16 x 24 keys, blocks of 4 with a halo of 2
    weights = maps[name][0].mean(0)
    heat = place(weights, model.get_submodule(name), model, (0.99, 0.5), [64, 96])
    assert heat.shape == (16, 24)
    want = torch.zeros(16, 24)
    want[10:16, 10:18] = weights[7 * 12 + 6].reshape(8, 8)[:6]
    torch.testing.assert_close(heat, want)
    assert len([a for a in draw_attention(model, x).axes if a.get_title()]) == 4


def test_contract_of_another_build_is_refused() -> None:
    state = {name: shape for name, shape in shapes_of(HaloNet(**TestHaloNet.tiny)).items() if name != "form"}
    contract = described(state, {"batchnorm_eps": 1e-3})
    with pytest.raises(UserError, match=r"batchnorm_eps is 0\.001; halonet"):
        build_contract(Contract(contract.path, {**contract.content, "system": "halonet"}))
    with pytest.raises(UserError, match="activation is 'gelu'"):
        build_contract(described(state, {"activation": "GELU"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": (16, 24)}, "settings of the stages differ in number"),
        ({"stem": "deep"}, "stem is 'deep'"),
        ({"act": "gelu"}, "act is 'gelu'"),
        ({"channel_attention": "cbam"}, "channel_attention is 'cbam'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloNet(**{**TestHaloNet.tiny, **settings})
