"""BiFormer: contracts, the surface, builds of the STL layout, routes in checkpoints, the dense form."""

import re
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention
from nearfar.ops.common.layers import DepthwiseConv
from nearfar.vision.contracts.biformer import build_contract
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.models.biformer import BiFormer, BiFormerBlock
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestBiFormer(BackboneTester):
    model = BiFormer
    name = "biformer_tiny"
    tiny: ClassVar = {
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 32, 32),
        "num_heads": (1, 2, 2, 4),
        "mlp_ratios": (2,) * 4,
        "regions": (4, 3, 2, 7),
        "topks": (1, 4, 2, 0),
    }
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "topks": (2, 0), "num_heads": (1, 2)}
    autocast_tolerance = 0.1

    def saved_macs(self, model: BiFormer, size: int) -> float:
        """What masked attention does more than the routed one; published figures agree with counts without depthwise
        convolutions."""
        more = 0
        for i, stage in enumerate(model.stages):
            dim, positions = model.feature_info[i]["num_chs"], (size // (4 * 2**i)) ** 2
            attn = stage.blocks[0].attn
            if isinstance(attn, BiLevelRoutingAttention):
                kept = attn.topk * positions / attn.regions**2
                if positions <= 4 * kept:
                    more += len(stage.blocks) * 2 * positions * (positions - kept) * dim
            for module in stage.modules():
                if isinstance(module, DepthwiseConv):
                    more += positions * module.weight.numel()
        return -more


def published_names(model: BiFormer, channels_first: bool = False, stl: bool = True) -> dict[str, torch.Tensor]:
    """A model's state as the released files of the layout name and shape it."""
    state, last = {}, len(model.stages) - 1
    routed = ("qkv_linear", "output_linear") if channels_first else ("qkv.qkv", "wo")
    for name, value in model.state_dict().items():
        if name.endswith(".attention"):
            continue
        if ".attn." in name and not name.startswith(f"stages.{last}."):
            name = name.replace("attn.qkv", f"attn.{routed[0]}").replace("attn.proj", f"attn.{routed[1]}")
        if channels_first and value.ndim == 2 and not name.startswith("head"):
            value = value[..., None, None]
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
        if not stl:
            name = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", name).replace("mlp.2.", "mlp.3.")
        name = (
            name.replace("head.norm.", "norm.").replace("head.fc.", "head.").replace("feature_norms.", "extra_norms.")
        )
        state[name] = value
    return state


@torch.no_grad()
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_builds_of_the_swin_layout(channels_first: bool, norm: str) -> None:
    form = {"patch_stem": True, "position": False, "channels_first": channels_first, "norm": norm}
    sizes = {**TestBiFormer.tiny, "dims": (32, 64, 64, 64), "num_heads": None, "regions": 7, "topks": (1, 4, 16, 0)}
    model, x = randomize(BiFormer(**sizes, **form, num_classes=5)), torch.randn(2, 3, 224, 224)
    loaded = BiFormer.from_published(published_names(model, channels_first))
    assert loaded.stages[0].blocks[0].attn.padding == ("values" if channels_first else "input")
    assert loaded.stages[3].blocks[0].attn.enhance == ("values" if channels_first else "input")
    y = model(x)
    close(loaded(x), y, 1e-6)
    close(loaded.fuse()(x), y, 1e-5)
    settings = {"topk": [1, 4, 16, "full attention"], "heads": [1, 2, 2, 8], "regions_per_side": 7}
    settings["norm"] = {"batch": "BatchNorm", "layer": "LayerNorm"}[norm]
    shapes = {name: tuple(value.shape) for name, value in published_names(model, channels_first).items()}
    built = build_contract(described(shapes, settings))
    built.load_state_dict(model.state_dict())
    close(built(x), y, 1e-6)
    settings["norm"] = {"batch": "LayerNorm", "layer": "BatchNorm"}[norm]
    with pytest.raises(UserError, match="norm is"):
        build_contract(described(shapes, settings))


@torch.no_grad()
def test_released_names() -> None:
    sizes = {**TestBiFormer.tiny, "dims": (32, 64, 64, 64), "num_heads": None, "regions": 7, "topks": (1, 4, 16, 0)}
    model, x = randomize(BiFormer(**sizes, layer_scale=0.1, num_classes=5)), torch.randn(1, 3, 64, 96)
    close(BiFormer.from_published({"model": published_names(model, stl=False)}["model"])(x), model(x), 1e-6)


@torch.no_grad()
def test_routes_are_kept() -> None:
    model, x = randomize(BiFormer(**TestBiFormer.tiny, num_classes=3)), torch.randn(1, 3, 96, 64)
    again = BiFormer.from_published(model.state_dict())
    found = [(s.blocks[0].attn.num_heads, getattr(s.blocks[0].attn, "topk", 0)) for s in again.stages]
    assert found == [(1, 1), (2, 4), (2, 2), (4, 0)]
    assert [s.blocks[0].attn.regions for s in again.stages[:3]] == [4, 3, 2]
    close(again(x), model(x), 1e-6)
    finer = BiFormer.from_published(model.state_dict(), regions=8)
    assert finer.stages[1].blocks[0].attn.regions == 8
    assert not torch.allclose(finer(x), model(x), rtol=1e-3)


@torch.no_grad()
def test_dense_checkpoint() -> None:
    """The released detection and segmentation backbones: no head, a norm on every output that is not fed on."""
    model = randomize(BiFormer(**TestBiFormer.tiny, num_classes=0, feature_norms=True))
    given = {key: TestBiFormer.tiny[key] for key in ("num_heads", "regions", "topks")}
    x = torch.randn(1, 3, 64, 96)
    loaded = BiFormer.from_published(published_names(model, stl=False), **given).contract_form()
    for level, norm, got in zip(model.forward_pyramid(x), model.feature_norms, loaded(x), strict=True):
        want = F.layer_norm(level.movedim(1, -1), level.shape[1:2], norm.weight, norm.bias, 1e-6).movedim(-1, 1)
        close(got, want, 1e-5)


def test_maps_of_regions_and_positions() -> None:
    model = randomize(timm.create_model("biformer_tiny", **TestBiFormer.tiny))
    maps = attention_maps(model, torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 1, 16, 16), (2, 1, 9, 9), (2, 1, 4, 4), (2, 4, 4, 4)]
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@torch.no_grad()
@pytest.mark.parametrize("position", [True, False])
def test_contract_of_a_block(position: bool) -> None:
    block = randomize(BiFormerBlock(16, BiLevelRoutingAttention(16, 2, 3, 2), 3, position, "layer", 1.0, 0.0))
    x = torch.randn(1, 16, 7, 6)
    shapes = {
        name.replace("attn.qkv", "attn.qkv.qkv").replace("attn.proj", "attn.wo"): shape
        for name, shape in shapes_of(block).items()
    }
    settings = {"heads": 2, "regions_per_side": 3, "topk": 2, "layout": "B C H W"}
    operator = build_contract(described(shapes, settings, inputs=[tuple(x.shape)]))
    block.load_state_dict(operator.operator.state_dict())
    close(operator(x), block(x), 1e-6)


def test_contract_of_another_build_is_refused() -> None:
    contract = described({"proj.weight": (8, 8)}, {"layernorm_eps": 1e-3})
    with pytest.raises(UserError, match=r"layernorm_eps is 0\.001; biformer"):
        build_contract(Contract(contract.path, {**contract.content, "system": "biformer"}))


def test_layer_norms_everywhere() -> None:
    model = BiFormer(**TestBiFormer.tiny, norm="layer", block_norm="layer")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": (8, 16)}, "settings of the stages differ in number"),
        ({"norm": "group"}, "norm is 'group'"),
        ({"num_heads": (3, 2, 2, 4)}, "num_heads=3 must divide dim=8"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiFormer(**{**TestBiFormer.tiny, **settings})
