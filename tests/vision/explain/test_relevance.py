"""Relevance is conserved, its rules are what they say, and context-aware saliency keeps what stands out."""

import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.vision.explain.context_aware import ContextAware, context_aware_saliency, salient_relevance
from nearfar.vision.explain.relevance import RULES, Rules, relevance
from tests.vision.base import randomize
from tests.vision.models.test_hornet import TestHorNet as HorNetTest

NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 32),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=5), 64),
    "convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=5), 32),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5), 32),
    "torchvision_vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 2), num_heads=(2, 4), embed_dim=16,
                                  img_size=56, num_classes=5), 56),
    "squeeze_excite": (lambda: timm.create_model("regnety_002", num_classes=5), 32),
    "hornet": (lambda: timm.create_model("hornet_tiny_7x7", num_classes=5, **HorNetTest.tiny), 32),
    "attnet": (lambda: timm.create_model("attnet_xxs", num_classes=5), 32),
    "convit": (
        lambda: timm.create_model("nearfar_convit_tiny", depth=2, local_layers=1, img_size=32, num_classes=5), 32),
    "evit": (lambda: timm.create_model("evit_deit_tiny", depth=2, img_size=32, reduce_at=(1,), num_classes=5), 32),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_sums_to_the_logit(name: str) -> None:
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = randomize(build()).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    found = relevance(model, x, 3)
    torch.testing.assert_close(found.score, model(x)[:, 3].detach(), rtol=1e-6, atol=1e-9)  # values stay
    assert found.pixels.abs().sum() > 0
    assert float(found.lost.max()) < 0.01, found.lost


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["torchvision:alexnet", "torchvision:vgg16", "torchvision:resnet18", "convnext_tiny", "vit_tiny_patch16_224",
     "swin_tiny_patch4_window7_224", "hornet_tiny_7x7", "attnet_xxs", "nearfar_convnext_atto", "nearfar_convit_tiny"],
)  # fmt: skip
def test_relevance_sums_to_the_logit_of_whole_networks(name: str) -> None:
    torch.manual_seed(0)
    place, _, own = name.rpartition(":")
    model = randomize(torchvision.models.get_model(own) if place else timm.create_model(own))
    found = relevance(model, torch.randn(1, 3, 224, 224))
    assert float(found.lost.max()) < 0.01, found.lost


def linear_net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    return net.double(), torch.randn(1, 3, 2, 2, dtype=torch.float64)


def stepwise(net: nn.Module, x: Tensor, target: int, kind: str) -> Tensor:
    """The textbook's loop over layers and numerators z_ij, of linear layers."""
    inputs, y = [], x
    for layer in net:
        inputs.append(y)
        y = layer(y)
    R = torch.zeros_like(y)
    R[0, target] = y[0, target]
    for layer, a in zip(reversed(net), reversed(inputs), strict=True):
        if isinstance(layer, nn.Linear):
            z = a[0] * layer.weight  # (outputs, inputs)
            b = layer.bias
            up, down = z.clamp(min=0), z.clamp(max=0)
            if kind == "epsilon":
                shares = z / (z.sum(1) + b)[:, None]
            elif kind == "gamma":
                raised = a[0] * (layer.weight + 0.25 * layer.weight.clamp(min=0))
                shares = raised / (raised.sum(1) + b + 0.25 * b.clamp(min=0))[:, None]
            elif kind == "z_plus":
                shares = up / up.sum(1, keepdim=True)
            else:
                alpha = 2 if kind == "alpha2_beta1" else 1
                shares = alpha * up / (up.sum(1) + b.clamp(min=0))[:, None]
                if alpha == 2:
                    shares = shares - down / (down.sum(1) + b.clamp(max=0))[:, None]
            R = (R[0] @ shares)[None]
        elif isinstance(layer, nn.Flatten):
            R = R.reshape(a.shape)
    return R


@pytest.mark.parametrize("kind", ["epsilon", "gamma", "z_plus", "alpha2_beta1", "alpha1_beta0"])
def test_rules_are_the_textbook_s(kind: str) -> None:
    net, x = linear_net()
    got = relevance(net, x, 1, Rules(linear=kind, epsilon=1e-30)).pixels
    torch.testing.assert_close(got, stepwise(net, x, 1, kind).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pixels", ["box", "square", "flat"])
def test_rules_of_pixels(pixels: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    found = relevance(net, x, 0, Rules(pixels=pixels, low=(-3,) * 3, high=(3,) * 3))
    w, hidden = net[0].weight.detach().flatten(1), net[0](x).detach().flatten()
    R = net[3].weight.detach()[0] * hidden.clamp(min=0)
    terms = {
        "box": x.flatten() * w + 3 * w.clamp(min=0) - 3 * w.clamp(max=0),
        "square": w.square(),
        "flat": torch.ones_like(w),
    }[pixels]
    want = (R[:, None] * terms / terms.sum(1, keepdim=True)).sum(0).reshape(x.shape)
    torch.testing.assert_close(found.pixels, want, rtol=1e-7, atol=1e-9)
    assert float(found.lost) < 1e-6


def test_batch_norm_is_folded_into_its_convolution() -> None:
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)))
    folded = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(net[0], net[1]), *net[2:])
    x = torch.randn(1, 3, 6, 6)
    for rules in RULES.values():
        torch.testing.assert_close(relevance(net, x, 0, rules).pixels, relevance(folded, x, 0, rules).pixels)


def test_overlapping_windows_add_or_overwrite() -> None:
    """One pixel is the largest of four windows; each gives it a part, the published code keeps the last."""
    net = nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[1.0, 2, 3, 4]]))
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 1
    assert relevance(net, x, 0, Rules()).pixels.sum() == 10
    assert relevance(net, x, 0, Rules(overlap="overwrite")).pixels.sum() == 4


def test_refusals() -> None:
    net, x = linear_net()
    with pytest.raises(ValueError, match="rules is 'deep'"):
        relevance(net, x, 0, "deep")
    with pytest.raises(ValueError, match="conv is 'flat'"):
        Rules(conv="flat")
    with pytest.raises(ValueError, match="overlap is"):
        Rules(overlap="mean")
    with pytest.raises(UserError, match="class 4 is outside"):
        relevance(net, x, 4)
    with pytest.raises(UserError, match="names 2 classes for 1 pictures"):
        relevance(net, x, [0, 1])


def brute(maps: Tensor, p: ContextAware) -> Tensor:
    """Mean of the K smallest distances between all pairs of patches of one scale, a pair at a time."""
    at = [(r, c) for r in range(0, maps.shape[2] - p.patch + 1, p.stride)
          for c in range(0, maps.shape[3] - p.patch + 1, p.stride)]  # fmt: skip
    side = max(maps.shape[2:])
    found = []
    for r, c in at:
        a = maps[0, :, r : r + p.patch, c : c + p.patch]
        distances = []
        for q, d in at:
            if (q, d) != (r, c):
                colour = (a - maps[0, :, q : q + p.patch, d : d + p.patch]).square().mean().sqrt()
                distances.append(float(colour / (1 + p.position * math.hypot(r - q, c - d) / side)))
        found.append(sum(sorted(distances)[: p.neighbours]) / p.neighbours)
    return torch.tensor(found, dtype=maps.dtype)


def test_distances_of_patches_are_those_of_all_pairs() -> None:
    from nearfar.vision.explain.context_aware import _least

    torch.manual_seed(0)
    p = ContextAware(longer_side=15, patch=3, neighbours=5, scales=(1.0,), coarser=(1.0,))
    maps = torch.rand(1, 2, 15, 11, dtype=torch.float64)
    values = nn.functional.unfold(maps, 3, stride=p.stride)[0].mT
    axes = [(torch.arange(0, n - 2, p.stride) + 1.5) / 15 for n in (15, 11)]
    positions = torch.cartesian_prod(*axes).double()
    got = _least(values, positions, [(values, positions, None)], p)
    torch.testing.assert_close(got, brute(maps, p), rtol=1e-7, atol=1e-7)


def test_what_stands_out_is_salient_and_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    maps = 0.05 * torch.rand(1, 1, 48, 64)
    maps[..., 20:28, 40:48] = 1
    small = ContextAware(longer_side=64, neighbours=16)
    found = context_aware_saliency(maps, small)
    assert found.shape == (1, 1, 48, 64)
    assert 0 <= float(found.amin()) <= float(found.amax()) <= 1
    assert found[..., 20:28, 40:48].mean() > 5 * found[..., :12, :20].mean()
    chunked = context_aware_saliency(maps, ContextAware(longer_side=64, neighbours=16, chunk=7))
    torch.testing.assert_close(chunked, found)
    assert not context_aware_saliency(torch.zeros(1, 3, 20, 20), small).any()
    with pytest.raises(ValueError, match=r"needs \[0, 1\]"):
        context_aware_saliency(2 * maps)
    for wrong in ({"patch": 4}, {"overlap": 1.0}, {"scales": ()}, {"focus": 0}):
        with pytest.raises(ValueError):
            ContextAware(**wrong)


def test_salient_relevance_of_a_network() -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model("resnet10t", num_classes=4))
    parameters = ContextAware(longer_side=48, neighbours=16)
    x = torch.randn(2, 3, 48, 48)
    found = salient_relevance(model, x, 1, parameters=parameters)
    assert found.shape == (2, 1, 48, 48)
    weighted = salient_relevance(model, x, 1, parameters=parameters, weighted=True)
    assert (weighted <= found + 1e-6).all()
