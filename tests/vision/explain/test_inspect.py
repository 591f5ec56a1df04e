"""Attention maps of timm's models, and every map laid on the picture where it belongs."""

import pytest
import timm
import torch

from nearfar.core.errors import UserError
from nearfar.vision.explain.attention import attention_maps, draw_attention, grid, place
from nearfar.vision.generation.sit import SiT
from tests.vision.base import randomize
from tests.vision.models.test_lsnet import TestLSNet as LSNetTest
from tests.vision.models.test_overlock import TestOverLoCK as OverLoCKTest
from tests.vision.models.test_transxnet import TestTransXNet as TransXNetTest


@torch.no_grad()
def test_maps_of_a_vision_transformer_are_its_softmax() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).train()
    x = torch.randn(2, 3, 64, 64)
    maps = attention_maps(model, x)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    assert model.training
    assert all(block.attn.fused_attn for block in model.blocks)
    first = model.eval().blocks[0]
    tokens = first.norm1(model._pos_embed(model.patch_embed(x)))
    query, key, _ = first.attn.qkv(tokens).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(maps["blocks.0.attn"], (query @ key.mT / 8).softmax(-1))


def test_weights_lie_where_their_keys_are() -> None:
    """A query at (row 3, column 5) of 4 x 6 that looks at itself alone, after a class token."""
    model = torch.nn.Module()
    model.num_prefix_tokens = 1
    heat = place(torch.eye(25), torch.nn.Identity(), model, (0.99, 0.99), [64, 96])
    assert heat.shape == (4, 6)
    assert heat[3, 5] == 1
    model.num_prefix_tokens = 0
    reduced = torch.zeros(24, 6)
    reduced[:, 4] = 1  # six reduced keys are 2 x 3
    heat = place(reduced, torch.nn.Identity(), model, (0.1, 0.1), [64, 96])
    assert heat.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert [grid(n, [32, 64]) for n in (8, 32, 7)] == [(2, 4), (4, 8), (1, 7)]


@torch.no_grad()
def test_kernels_lie_in_their_windows() -> None:
    model = randomize(timm.create_model("overlock_xt", num_classes=5, **OverLoCKTest.tiny))
    x = torch.randn(1, 3, 160, 192)
    name, weights = next(iter(attention_maps(model, x).items()))
    layer = model.get_submodule(name)
    assert layer.kernel_size == 7
    heat = place(weights[0].mean(0), layer, model, (0.95, 0.5), [160, 192])  # row 9 of 10, column 6 of 12
    want = torch.zeros(10, 12)
    want[3:10, 3:10] = weights[0].mean(0)[9 * 12 + 6].reshape(7, 7)
    torch.testing.assert_close(heat, want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings", "panels"),
    [
        ("lsnet_t", LSNetTest.tiny, 1),
        ("transxnet_t", TransXNetTest.tiny, 4),
        ("overlock_xt", OverLoCKTest.tiny, 3),
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": (64, 96)}, 2),
    ],
)
def test_pictures_of_every_family_with_maps(name: str, settings: dict, panels: int) -> None:
    figure = draw_attention(randomize(timm.create_model(name, **settings)), torch.randn(2, 3, 64, 96), at=(0.2, 0.9))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == panels + 1
    assert titles[0] == "picture"
    assert all(" x even" in title for title in titles[1:])
    figure.draw_without_rendering()


@torch.no_grad()
def test_pictures_of_a_diffusion_transformer_and_of_none() -> None:
    model = SiT(8, 2, 32, 2, "attention", num_classes=2)
    latent, picture = torch.randn(1, 4, 8, 8), torch.rand(3, 64, 64)
    figure = draw_attention(model, latent, torch.tensor([0.5]), torch.tensor([1]), picture=picture)
    assert len(figure.axes) == 4  # picture, two layers, an empty place
    with pytest.raises(UserError, match="ConvNeXt: no layer of it has attention or selection maps"):
        draw_attention(timm.create_model("nearfar_convnext_atto"), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "settings", "panels"),
    [
        ("nearfar_convit_tiny", {"depth": 3, "local_layers": 2, "img_size": 64}, 3),
        ("nearfar_volo_d1_224", {"depths": (1, 1), "img_size": 64}, 4),
        ("cvt_13", {"depths": (1, 1, 1)}, 3),
        ("nearfar_tnt_s_patch16_224", {"depth": 1, "img_size": 64}, 1),
        ("pyramid_tnt_ti_192", {"depths": (1, 1, 1, 1), "img_size": 64}, 4),
    ],
)
def test_pictures_of_token_models(name: str, settings: dict, panels: int) -> None:
    model, x = timm.create_model(name, **settings).eval(), torch.randn(1, 3, 64, 96)
    for weights in attention_maps(model, x).values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    figure = draw_attention(model, x)
    assert sum(bool(axes.get_title()) for axes in figure.axes) == panels + 1


def test_prefix_tokens_may_join_late() -> None:
    model = timm.create_model("nearfar_convit_tiny", depth=2, local_layers=1, img_size=64).eval()
    maps = attention_maps(model, torch.randn(1, 3, 64, 64))
    first, second = maps["blocks.0.attn"][0, 0], maps["blocks.1.attn"][0, 0]
    assert (len(first), len(second)) == (16, 17)
    for weights, row in ((first, first[10]), (second, second[11, 1:])):
        found = place(weights, torch.nn.Identity(), model, (0.6, 0.6), [64, 64])
        torch.testing.assert_close(found, row.reshape(4, 4))


def test_outlook_weights_lie_around_their_centre() -> None:
    model = timm.create_model("nearfar_volo_d1_224", depths=(1, 1), img_size=64).eval()
    weights = attention_maps(model, torch.randn(1, 3, 64, 64))["stages.0.0.attn"][0].mean(0)
    found = place(weights, model.stages[0][0].attn, model, (0.6, 0.6), [64, 64])
    assert found.shape == (8, 8)
    torch.testing.assert_close(found[3:6, 3:6], weights[10, 4].reshape(3, 3))
    assert found.sum() == pytest.approx(1, rel=1e-5)
