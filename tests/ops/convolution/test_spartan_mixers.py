"""SpaRTAN's spatial and channel mixer against their formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.convolution.reinforced import ReinforcedMixer
from nearfar.ops.tokens.wave_mixer import WaveMixer

SIZES = [(7,), (5, 6), (3, 4, 5)]


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-12)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def settle(module: nn.Module) -> nn.Module:
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "norm.weight", "norm.bias", "gamma")):
            tensor.uniform_(-1, 1)
    return module.double().eval()


def convolve(x: torch.Tensor, layer: nn.Module, dilation: int = 1, groups: int = 1) -> torch.Tensor:
    padding = dilation * (layer.weight.shape[-1] // 2)
    function = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return function(x, layer.weight, layer.bias, padding=padding, dilation=dilation, groups=groups)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    across = lambda v: v.reshape(1, -1, *(1,) * (x.ndim - 2))  # noqa: E731
    scaled = (x - across(norm.running_mean)) / across(norm.running_var + 1e-6).sqrt()
    return scaled * across(norm.weight) + across(norm.bias)


def excited(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    mean = x.flatten(2).mean(2)
    hidden = torch.relu(mean @ layer.squeeze.weight.flatten(1).T + layer.squeeze.bias)
    gate = torch.sigmoid(hidden @ layer.expand.weight.flatten(1).T + layer.expand.bias)
    return x * gate.reshape(*gate.shape, *(1,) * (x.ndim - 2))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_spatial_mixer_is_its_formula(size: tuple[int, ...], dense: bool) -> None:
    op = settle(ReinforcedMixer(16, dense=dense, dims=len(size)))
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    groups = 1 if dense else 8
    y = convolve(x, op.proj_in)
    y = y + op.gamma * (y - y.flatten(2).mean(2).reshape(2, 8, *(1,) * len(size)))
    near = gelu(normed(convolve(y, op.h_conv.conv, groups=groups), op.h_conv.norm))
    far = convolve(y, op.l_conv[0], 2, groups)
    far = gelu(normed(convolve(far, op.l_conv[1].conv, 2, groups), op.l_conv[1].norm))
    slow = convolve(torch.cat((excited(near, op.h_attn), excited(far, op.l_attn)), 1), op.proj_out)
    agree(op(x), slow, [x, *op.parameters()])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_channel_mixer_is_its_formula(size: tuple[int, ...], grouped: bool) -> None:
    """Position by position for the largest channel, with complex numbers for the turn."""
    dim, ratio = 4, 3
    op = settle(WaveMixer(dim, ratio, grouped=grouped, dims=len(size)))
    x = torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
    t, p = gelu(convolve(x, op.theta)), convolve(x, op.proj)
    mixed = torch.zeros_like(t)
    for b, *place in itertools.product(range(2), *map(range, size)):
        at = (b, slice(None), *place)
        channel = int(x[at].argmax())
        mixed[at] = p[at] * t[at] + p[at][channel] * t[at][channel]
    turned = torch.view_as_complex(mixed.movedim(1, -1).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(turned * torch.view_as_complex(op.complex)).flatten(-2).movedim(-1, 1)
    groups = dim if grouped else dim * ratio
    y = gelu(normed(convolve(turned, op.conv.conv, groups=groups), op.conv.norm))
    agree(op(x), convolve(excited(y, op.attn), op.proj_out), [x, *op.parameters()])


@torch.no_grad()
def test_equal_channels_resolve_to_the_lowest() -> None:
    """Where channels 1 and 2 are the largest and equal, the output is that of a slightly larger channel 1."""
    op = settle(WaveMixer(4, 2))
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    x[:, 1:3] = 3.0
    nudged = x.clone()
    nudged[:, 1] += 1e-9
    torch.testing.assert_close(op(x), op(nudged), atol=1e-6, rtol=0)
    nudged[:, 2] += 2e-9
    assert (op(x) - op(nudged)).norm() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("op", [ReinforcedMixer(8), WaveMixer(8, 2)], ids=["spatial", "channel"])
def test_shifts_pass_through_away_from_the_border(op: nn.Module) -> None:
    op = settle(op)
    x = torch.zeros(1, 8, 24, 24, dtype=torch.float64)
    x[..., 9:12, 9:12] = torch.randn(1, 8, 3, 3)
    y, moved = op(x), op(x.roll((2, 3), (2, 3)))
    inner = slice(8, 16)
    torch.testing.assert_close(moved.roll((-2, -3), (2, 3))[..., inner, inner], y[..., inner, inner])


@torch.no_grad()
def test_half_precision_turns_in_single() -> None:
    op = settle(WaveMixer(8, 2)).float()
    x = torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low = op(x)
    torch.testing.assert_close(low.float(), op(x), atol=0.1, rtol=0.1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        ReinforcedMixer(12)
    with pytest.raises(ValueError, match="at least 2"):
        WaveMixer(8, 1)
    with pytest.raises(ValueError, match="pairs are turned"):
        WaveMixer(5, 3)
    with pytest.raises(ValueError, match="dims is 0"):
        WaveMixer(8, 2, dims=0)
