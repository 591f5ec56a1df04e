"""Layers for inference: the numbers of the layers they were made from, whatever runs them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.common.fused import FusedConv2d, FusedLinear
from nearfar.ops.common.layers import GELU, DepthwiseConv

CONVOLUTIONS = {
    "pointwise": lambda: nn.Conv2d(6, 8, 1),
    "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    "grouped": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=3),
    "depthwise": lambda: DepthwiseConv(6, 5),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "swish"])
def test_convolution(kind: str, activation: str) -> None:
    conv = CONVOLUTIONS[kind]()
    fused = FusedConv2d(conv, activation)
    act = {"none": lambda y: y, "gelu": F.gelu, "relu": F.relu, "swish": F.silu}[activation]
    for size in ((7, 9), (12, 5), (7, 9)):
        x = torch.randn(2, 6, *size)
        want = act(conv(x))
        torch.testing.assert_close(fused(x), want)  # with gradients: the plain layer
        with torch.no_grad():
            torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5)
            other = torch.randn_like(want)
            torch.testing.assert_close(fused(x, add=other), want + other, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(fused(x), want.detach(), rtol=1e-5, atol=1e-5)
    double = fused.double()(x.double())
    torch.testing.assert_close(double.float(), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_linear(activation: str) -> None:
    linear = nn.Linear(6, 10)
    fused = FusedLinear(linear, activation)
    for shape in ((3, 6), (2, 4, 5, 6)):
        x = torch.randn(shape)
        want = F.gelu(linear(x)) if activation == "gelu" else linear(x)
        torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_changed_weights_and_copies_count() -> None:
    fused, x = FusedConv2d(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 6, 6)
    before = fused(x)
    twin = copy.deepcopy(fused)
    fused.weight.mul_(2)
    assert not torch.allclose(fused(x), before)
    torch.testing.assert_close(twin(x), before)
    fused.load_state_dict(twin.state_dict())
    torch.testing.assert_close(fused(x), before)


def test_weights_made_in_inference_mode_are_not_packed_at_every_call() -> None:
    with torch.inference_mode():
        conv, linear = nn.Conv2d(6, 8, 1), nn.Linear(6, 8)
        for plain, fused in ((conv, FusedConv2d(conv)), (linear, FusedLinear(linear))):
            x = torch.randn(2, 6, 4, 6)
            torch.testing.assert_close(fused(x), plain(x))
            assert fused.packed.kept is None
            with torch.profiler.profile() as profile:
                fused(x)
            assert not [event.key for event in profile.key_averages() if "reorder" in event.key]


def test_gelu_writes_over_its_input_only_without_gradients() -> None:
    values = torch.randn(3, 4)
    with torch.no_grad():
        x = values.clone()
        assert GELU()(x) is x
        torch.testing.assert_close(x, F.gelu(values))
    x = values.clone().requires_grad_()
    GELU()(x).sum().backward()
    torch.testing.assert_close(x.detach(), values, rtol=0, atol=0)
    assert x.grad is not None
