"""LSNet: contracts, the surface, distillation, attention tables at other sizes."""

import re
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch

from nearfar.core.contracts import Contract, shipped
from nearfar.ops.attention.offset_bias import OffsetBiasAttention
from nearfar.vision.contracts.lsnet import build_contract
from nearfar.vision.models.lsnet import LSBlock, LSNet
from tests.vision.base import (
    BackboneTester,
    close,
    described,
    randomize,
    shapes_of,
)


class TestLSNet(BackboneTester):
    model = LSNet
    name = "lsnet_t"
    tiny: ClassVar = {"depths": (0, 1, 2, 2), "dims": (16, 32, 48, 64)}
    sizes = ((64, 64), (70, 97), (128, 96))
    least: ClassVar = {"depths": (2, 2), "dims": (16, 32)}


def test_distilled_form(tmp_path: Path) -> None:
    model = randomize(timm.create_model("lsnet_t_distill", num_classes=5, **TestLSNet.tiny))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, y = model.forward_features(x), model(x)
        close(y, (model.head(features) + model.head_dist(features)) / 2, 1e-6)
        model.save_pretrained(tmp_path)
        close(LSNet.from_pretrained(tmp_path)(x), y, 1e-6)
        assert LSNet.from_published(model.state_dict(), num_classes=3)(x).shape == (2, 3)
        close(LSNet.from_published(model.state_dict()).fuse()(x), y, 1e-5)
    label, teacher = model.train()(x)
    assert label.shape == teacher.shape == (2, 5)
    (label.sum() + teacher.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(7)
    assert model.eval()(x).shape == (2, 7)


@torch.no_grad()
def test_resolution_of_a_checkpoint_is_kept() -> None:
    larger = randomize(LSNet((0, 1, 1, 2), (16, 32, 48, 64), num_classes=3, resolution=5))
    loaded = LSNet.from_published(larger.state_dict())
    assert loaded.stages[3].blocks[1].mixer.attention_biases.shape == (4, 25)
    x = torch.randn(1, 3, 288, 288)
    close(loaded(x), larger(x), 1e-6)


@torch.no_grad()
def test_weights_loaded_after_eval_count() -> None:
    source = randomize(timm.create_model("lsnet_t", num_classes=3, **TestLSNet.tiny))
    late = timm.create_model("lsnet_t", num_classes=3, **TestLSNet.tiny).eval()
    x = torch.randn(1, 3, 64, 64)
    late(x)
    late.load_state_dict(source.state_dict())
    close(late(x), source(x), 1e-6)


@torch.no_grad()
def test_indices_of_a_published_file_are_computed_here(tmp_path: Path) -> None:
    source = randomize(timm.create_model("lsnet_t", num_classes=3, **TestLSNet.tiny))
    table = source.stages[3].blocks[1].mixer.attention_biases
    index = {"blocks4.3.mixer.m.attention_bias_idxs": torch.zeros(16, 16, dtype=torch.long)}
    torch.save({"model": {**source.state_dict(), **index}}, tmp_path / "lsnet.pth")
    overlay = {"file": str(tmp_path / "lsnet.pth"), "num_classes": 3}
    loaded = timm.create_model(
        "lsnet_t", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **TestLSNet.tiny
    )
    assert torch.equal(loaded.stages[3].blocks[1].mixer.attention_biases, table)


def test_attention_tables_take_no_weight_decay() -> None:
    model = timm.create_model("lsnet_t", **TestLSNet.tiny)
    assert model.no_weight_decay() == {"stages.3.blocks.1.mixer.attention_biases"}


def folded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state after the published code's own fusing of convolutions with the norms after them."""

    def affine(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-5).sqrt()
        return scale, state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale

    out = {name: value for name, value in state.items() if "num_batches" not in name}
    for name in [name for name in state if name.endswith(".c.weight")]:
        place = name.removesuffix(".c.weight")
        scale, shift = affine(f"{place}.bn")
        out |= {f"{place}.weight": state[name] * scale[:, None, None, None], f"{place}.bias": shift}
    for name in [name for name in out if name.endswith(".mixer.conv.weight")]:
        place = name.removesuffix(".conv.weight")
        kernel = out[name].clone()
        kernel[:, 0, 1, 1] += out[f"{place}.conv1.weight"].flatten() + 1
        out |= {f"{place}.weight": kernel, f"{place}.bias": out[f"{place}.conv.bias"] + out[f"{place}.conv1.bias"]}
    for head in ("head", "head_dist"):
        if f"{head}.l.weight" in state:
            scale, shift = affine(f"{head}.bn")
            weight = state[f"{head}.l.weight"]
            out |= {f"{head}.weight": weight * scale, f"{head}.bias": state[f"{head}.l.bias"] + weight @ shift}
    gone = (r"\.(c|conv|conv1|l)\.", r"(?<!mixer)\.bn\.")
    return {name: value for name, value in out.items() if not any(re.search(pattern, name) for pattern in gone)}


@torch.no_grad()
def test_checkpoints_in_the_fused_form() -> None:
    contract = Contract.load(next(p for p in shipped("lsnet") if p.stem == "lsnet--t-shallow"))
    state = contract.state()
    x = torch.randn(1, 3, 64, 64)
    loaded = LSNet.from_published(folded(state))
    assert len(folded(state)) < len(state) / 2
    close(loaded(x), LSNet.from_published(state)(x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["depthwise", "convolution", "attention"])
def test_contract_of_a_block(kind: str) -> None:
    attention = OffsetBiasAttention(32, 4, 16, 3) if kind == "attention" else None
    block = randomize(LSBlock(32, int(kind != "depthwise"), attention, large_kernel=5, small_kernel=5, share=16))
    published = {
        re.sub(r"^(ffn|mixer(?=\.(?:att|qkv|dw|proj)))\.", r"\1.m.", name): shape
        for name, shape in shapes_of(block).items()
    }
    x = torch.randn(1, 32, 3, 3) if attention else torch.randn(1, 32, 9, 8)
    contract = described(published, {"small_kernel": 5, "channels_per_kernel_share": 16}, [tuple(x.shape)])
    state = contract.state()
    own = {
        name: state[re.sub(r"^(ffn|mixer(?=\.(?:att|qkv|dw|proj)))\.", r"\1.m.", name)]
        for name in block.state_dict()
        if "num_batches" not in name
    }
    block.load_state_dict(own, strict=False)
    close(build_contract(contract)(x), block(x), 1e-5)


@torch.no_grad()
def test_contract_of_the_stages() -> None:
    shapes = shapes_of(LSNet(**TestLSNet.tiny, num_classes=3))
    got = build_contract(described(shapes, outputs=4))(torch.randn(1, 3, 128, 64))
    assert [tuple(level.shape[1:]) for level in got] == [(16, 16, 8), (32, 8, 4), (48, 4, 2), (64, 2, 1)]
    got = build_contract(described(shapes, {"out_indices": [1, 2]}, outputs=2))(torch.randn(1, 3, 128, 64))
    assert [level.shape[1] for level in got] == [32, 48]
