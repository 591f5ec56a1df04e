"""LSNet: contracts, the surface, distillation, attention tables at other sizes."""

from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch

from nearfar.vision.lsnet import LSNet, build_contract
from tests.vision.base import BackboneTester, check_contract, close, contracts, randomise


class TestLSNet(BackboneTester):
    model = LSNet
    name = "lsnet_t"
    tiny: ClassVar = {"depths": (0, 1, 2, 2), "dims": (16, 32, 48, 64)}
    sizes = ((64, 64), (70, 97), (128, 96))
    least: ClassVar = {"depths": (2, 2), "dims": (16, 32)}


def test_distilled_form(tmp_path: Path) -> None:
    model = randomise(timm.create_model("lsnet_t_distill", num_classes=5, **TestLSNet.tiny))
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


@pytest.mark.parametrize("path", contracts("lsnet"))
def test_contract(path: Path) -> None:
    check_contract(path, build_contract)


@torch.no_grad()
def test_resolution_of_a_checkpoint_is_kept() -> None:
    larger = randomise(LSNet((0, 1, 1, 2), (16, 32, 48, 64), num_classes=3, resolution=5))
    loaded = LSNet.from_published(larger.state_dict())
    assert loaded.stages[3].blocks[1].mixer.attention_biases.shape == (4, 25)
    x = torch.randn(1, 3, 288, 288)
    close(loaded(x), larger(x), 1e-6)


@torch.no_grad()
def test_weights_loaded_after_eval_count() -> None:
    source = randomise(timm.create_model("lsnet_t", num_classes=3, **TestLSNet.tiny))
    late = timm.create_model("lsnet_t", num_classes=3, **TestLSNet.tiny).eval()
    x = torch.randn(1, 3, 64, 64)
    late(x)
    late.load_state_dict(source.state_dict())
    close(late(x), source(x), 1e-6)


def test_attention_tables_take_no_weight_decay() -> None:
    model = timm.create_model("lsnet_t", **TestLSNet.tiny)
    assert model.no_weight_decay() == {"stages.3.blocks.1.mixer.attention_biases"}
