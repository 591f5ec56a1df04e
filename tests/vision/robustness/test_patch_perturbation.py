"""Tempered attention, corruptions, adversarial patches, rollout."""

import copy
import math
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from nearfar.core.errors import UserError
from nearfar.vision.models import convit, cvt, volo  # noqa: F401 - timm knows them then
from nearfar.vision.models.evit import EViT, reorganize_tokens
from nearfar.vision.robustness.attack import OnPixels, attack, attack_best_position, patch_gradients
from nearfar.vision.robustness.corruptions import IMAGENET_C, KINDS, corrupt, corrupt_patches, gaussian_matrix, mirrored
from nearfar.vision.robustness.measures import common_correct, fooling_rate
from nearfar.vision.robustness.patches import given_patches, random_patches, random_squares, squares
from nearfar.vision.robustness.rollout import attention_picture, draw_rollout, rollout
from nearfar.vision.robustness.tempering import attention_layers, temper, temperatures, tempered
from tests.vision.base import close, randomize

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


OTHERS = {
    "swin_tiny_patch4_window7_224": 64,
    "nearfar_convit_tiny": 64,
    "nearfar_volo_d1_224": 64,
    "cvt_13": 64,
    "eva02_tiny_patch14_224": 56,
}


def vit() -> nn.Module:
    return randomize(timm.create_model("deit_tiny_patch16_224", **TINY))


@torch.no_grad()
def test_temperature_is_that_of_the_logits_fused_or_not() -> None:
    model, x = vit().double(), torch.randn(2, 3, 32, 32).double()
    plain = model(x)
    temper(model, 1.5)
    fused = model(x)
    assert not torch.allclose(fused, plain)
    slow = vit().double()
    slow.load_state_dict(model.state_dict())
    for block in slow.blocks:  # the plain form of the definition
        block.attn.forward = types.MethodType(plain_attention, block.attn)
    close(fused, slow(x), 1e-9)
    for block in model.blocks:
        block.attn.fused_attn = False
    close(model(x), fused, 1e-9)
    ours = EViT.from_published(model.state_dict(), keep_rate=1.0, reduce_at=(), num_heads=2, fuse=True).double()
    close(temper(ours, 1.5)(x), fused, 1e-9)
    close(temper(ours, [1.5, 1.0, 1.0])(x), temper(temper(model, 1.0), 1.5, range(1))(x), 1e-9)
    assert temperatures(model) == [1.5, 1.0, 1.0]
    assert torch.equal(temper(model, 1.0)(x), model(x))
    for block in model.blocks:
        block.attn.fused_attn = True
    assert torch.equal(model(x), plain), "bit for bit"
    assert temperatures(copy.deepcopy(temper(model, 2.0))) == [2.0] * 3


def plain_attention(attn: nn.Module, x: torch.Tensor, **_: object) -> torch.Tensor:
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / (1.5 * math.sqrt(q.shape[-1]))).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_temperatures_of_other_transformers() -> None:
    x = torch.randn(1, 3, 64, 64)
    for name, size in OTHERS.items():
        settings = {} if name == "cvt_13" else {"img_size": size}
        model = timm.create_model(name, num_classes=3, **settings).eval()
        layers = attention_layers(model).values()
        for layer in layers:
            for parameter in layer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        picture = x[..., :size, :size]
        plain = model(picture)
        with tempered(model, 3.0):
            warm = model(picture)
            assert not torch.allclose(warm, plain, atol=1e-6), name
            if name.startswith("swin"):
                for layer in layers:
                    layer.fused_attn = not layer.fused_attn
                close(model(picture), warm, 1e-5)
                for layer in layers:
                    layer.fused_attn = not layer.fused_attn
        assert torch.equal(model(picture), plain), name
    switched = reorganize_tokens(vit(), 0.5, (1,))
    small = x[..., :32, :32]
    assert not torch.allclose(switched(small), temper(switched, 2.0)(small))


def test_tempering_refuses() -> None:
    with pytest.raises(UserError, match="no attention"):
        temper(timm.create_model("test_resnet"), 1.5)
    with pytest.raises(UserError, match="of no kind"):
        temper(timm.create_model("xcit_nano_12_p16_224", depth=1), 1.5)
    for wrong, word in ((0.0, "above 0"), ([1.0, 2.0], "2 temperatures"), (float("nan"), "above 0")):
        with pytest.raises(ValueError, match=word):
            temper(vit(), wrong)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        temper(vit(), 1.5, [3])


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions(kind: str) -> None:
    at = torch.linspace(0, 6, 48)
    x = (0.5 + 0.4 * torch.sin(at[:, None] * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + at)).expand(2, 3, 48, 48)
    seeded = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    found = [corrupt(x, kind, severity, seeded(3)) for severity in (1, 2, 3, 4, 5)]
    for y in found:
        assert y.shape == x.shape
        assert 0 <= y.min() <= y.max() <= 1
        close(y * 255, (y * 255).round(), 1e-5)
    assert torch.equal(found[4], corrupt(x, kind, 5, seeded(3)))
    far = [(y - x).square().mean().item() for y in found]
    assert far[4] > 1e-4
    if kind not in ("saturate", "elastic_transform", "glass_blur"):  # the published severities are not in order there
        assert far[4] > far[0]
    random = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog"}
    assert torch.equal(corrupt(x, kind, 5, seeded(4)), found[4]) == (kind not in random | {"elastic_transform"})
    for size in ((16, 24), (5, 9)):
        assert corrupt(torch.rand(1, 3, *size), kind, 3).shape == (1, 3, *size)


def test_corruptions_against_plain_forms() -> None:
    x = torch.rand(1, 3, 224, 224).mul(255).round().double() / 255
    grey = Image.fromarray((x[0].movedim(0, -1).numpy() * 255).round().astype(np.uint8))
    small = grey.resize((67, 67), Image.Resampling.BOX).resize((224, 224), Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.asarray(small).copy()).movedim(-1, 0)[None]
    assert torch.equal((corrupt(x, "pixelate", 4) * 255).round().to(torch.uint8), pixels)
    means = x.mean((2, 3), keepdim=True)
    assert torch.equal(corrupt(x, "contrast", 3), (((x - means) * 0.2 + means).clamp(0, 1) * 255).floor() / 255)
    noise = corrupt(torch.full((1, 3, 224, 224), 0.5), "gaussian_noise", 2)
    assert abs(noise.std() - 0.12) < 0.003
    salt = corrupt(torch.full((1, 3, 224, 224), 0.5), "impulse_noise", 5)
    assert abs((salt != salt.median()).float().mean() - 0.27) < 0.01
    photons = corrupt(torch.full((1, 3, 224, 224), 0.5), "shot_noise", 1)
    assert abs(photons.std() - math.sqrt(0.5 / 60)) < 0.003
    assert mirrored(4, 5, 5).tolist() == [1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2][0:14]
    close(gaussian_matrix(7, 40.0).sum(1), torch.ones(7).double(), 1e-12)
    assert len(IMAGENET_C) == 15


def test_patches_are_taken_over() -> None:
    x, mask = torch.rand(2, 3, 32, 32), given_patches(2, (32, 32), 8, [(1, 2)])
    for scope in ("image", "patch"):
        y = corrupt_patches(x, mask, "contrast", 5, scope=scope)
        assert torch.equal(torch.where(mask, x, y), x), "all else stays"
    whole = corrupt_patches(x, mask, "contrast", 5)
    assert torch.equal(whole[:, :, 8:16, 16:24], corrupt(x, "contrast", 5)[:, :, 8:16, 16:24])
    crop = corrupt_patches(x, mask, "contrast", 5, scope="patch")
    assert torch.equal(crop[:, :, 8:16, 16:24], corrupt(x[:, :, 8:16, 16:24], "contrast", 5))
    drawn = random_patches(5, (32, 32), 8, 3, torch.Generator().manual_seed(0))
    assert drawn.flatten(1).sum(1).tolist() == [3 * 64] * 5
    moved = random_squares(50, (32, 32), 8, torch.Generator().manual_seed(0), step=8, offset=3)
    corners = moved[:, 0].flatten(1).float().argmax(1)
    assert {int(c) // 32 % 8 for c in corners} == {3}
    assert {int(c) % 32 % 8 for c in corners} == {3}
    for wrong in (
        lambda: given_patches(1, (32, 32), 8, [(4, 0)]),
        lambda: random_patches(1, (32, 32), 64, 1, torch.Generator()),
        lambda: random_patches(1, (32, 32), 8, 17, torch.Generator()),
        lambda: squares(torch.tensor([30]), torch.tensor([0]), (32, 32), 8),
        lambda: corrupt_patches(x, mask[:, :, :8], "fog"),
        lambda: corrupt(x, "rain"),
        lambda: corrupt(x, "fog", 6),
        lambda: corrupt_patches(x, mask, "fog", scope="somewhere"),
    ):
        with pytest.raises(ValueError, match=r"grid|smaller|patches|leaves|mask|kind|severity|scope"):
            wrong()


def test_adversarial_patches() -> None:
    torch.manual_seed(0)
    model = OnPixels(vit(), (0.5,) * 3, (0.25,) * 3).eval()
    x = torch.rand(6, 3, 32, 32).mul(255).round() / 255
    labels = model(x).argmax(1)
    mask = random_patches(6, (32, 32), 8, 2, torch.Generator().manual_seed(1))
    found = attack(model, x, labels, mask, steps=30, step_size=16 / 255)
    assert torch.equal(torch.where(mask, x, found.pictures), x), "nothing outside the patch moves"
    close(found.pictures * 255, (found.pictures * 255).round(), 1e-4)
    assert torch.equal(model(found.pictures).argmax(1) != labels, found.fooled), "judged on 8 bits"
    assert found.fooled.any()
    assert found.steps[found.fooled].max() <= 30
    stronger = attack(model, x, labels, mask, steps=30, step_size=16 / 255, restarts=3)
    assert (stronger.fooled >= found.fooled).all()
    bounded = attack(model, x, labels, mask, steps=10, step_size=4 / 255, bound=8 / 255, start="noise")
    assert (bounded.pictures - x).abs().max() <= 8 / 255 + 1e-6
    target = (labels + 1) % 5
    aimed = attack(model, x, labels, mask, steps=30, step_size=16 / 255, target=target)
    assert torch.equal(model(aimed.pictures).argmax(1) == target, aimed.fooled)
    best, place = attack_best_position(model, x, labels, 8, positions=4, steps=20, step_size=16 / 255)
    assert place.shape == (6, 2)
    changed = (best.pictures != x).any(1).float()
    assert (changed.flatten(1).sum(1) <= 64).all(), "one patch only"
    gradients = patch_gradients(model, x, labels, 8)
    assert gradients.shape == (6, 4, 4)
    with pytest.raises(ValueError, match="mask"):
        attack(model, x, labels, mask[:, :, :16])
    with pytest.raises(ValueError, match="target"):
        attack(model, x, labels, mask, target=labels)


def test_fooling_rate_counts_what_all_get_right() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    right = torch.nn.functional.one_hot(labels, 3).float()
    other = right.clone()
    other[0] = torch.tensor([0.0, 1.0, 0.0])
    both = common_correct({"a": right, "b": other}, labels)
    assert both.tolist() == [False] + [True] * 7
    rate = fooling_rate(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]).bool())
    assert rate["fooling rate (%)"] == pytest.approx(18.75)
    assert rate["sd over seeds"] == pytest.approx(100 * np.std([1 / 8, 2 / 8], ddof=1))
    assert rate["low"] <= rate["fooling rate (%)"] <= rate["high"]
    with pytest.raises(UserError, match="no picture"):
        fooling_rate(torch.zeros(0).bool())


@torch.no_grad()
def test_rollout() -> None:
    model, x = vit().double(), torch.randn(2, 3, 32, 32).double()
    found = rollout(model, x)
    tokens, joint = model._pos_embed(model.patch_embed(x)), torch.eye(17).double()
    for block in model.blocks:
        q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        joint = (0.5 * ((q @ k.mT / 4).softmax(-1).mean(1) + torch.eye(17))) @ joint
        tokens = block(tokens)
    close(found, joint[:, 0, 1:], 1e-9)
    close(attention_picture(model, x).sum((1, 2)), torch.ones(2).double(), 1e-9)
    assert attention_picture(timm.create_model("test_resnet").eval(), x.float()).shape[0] == 2
    assert draw_rollout(model, x, x.sigmoid(), ["a", "b"]).axes
