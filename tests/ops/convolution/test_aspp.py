"""Atrous pyramids and multi-scale scores against their formulas, 1 to 3 axes, causality, gradients, folding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.aggregation.multi_scale import multi_scale_scores
from nearfar.ops.common.conv_norm_act import ConvNormAct, fuse
from nearfar.ops.convolution.aspp import ASPP, SummedASPP

SIZES = {1: (23,), 2: (11, 9), 3: (5, 6, 7)}


def naive_dilated(x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
    """Sum over the 3^d taps of the input moved by (k - 1) rate, zero outside."""
    y = 0
    size = x.shape[2:]
    for tap in torch.cartesian_prod(*[torch.arange(3)] * len(size)).view(-1, len(size)).tolist():
        padded = F.pad(x, [rate] * 2 * len(size))
        window = padded[(slice(None), slice(None), *(slice(k * rate, k * rate + n) for k, n in zip(tap, size)))]
        y = y + torch.einsum("oc,bc...->bo...", weight[(slice(None), slice(None), *tap)], window)
    return y


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_summed_pyramid(dims: int) -> None:
    aspp = SummedASPP(3, 4, (1, 2, 4), dims=dims).double()
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64, requires_grad=True)
    expected = sum(
        naive_dilated(x, b.weight, r) + b.bias.view(-1, *[1] * dims) for b, r in zip(aspp.branches, aspp.rates)
    )
    y = aspp(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(y)
    ours, slow = (torch.autograd.grad((v * direction).sum(), x)[0] for v in (y, expected))
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-9)


def test_causal_pyramid_does_not_look_ahead() -> None:
    aspp = SummedASPP(2, 2, (1, 3), dims=1, causal=True)
    x = torch.randn(1, 2, 20)
    changed = x.clone()
    changed[..., 10:] += 1
    assert aspp(x).shape == x.shape
    torch.testing.assert_close(aspp(x)[..., :10], aspp(changed)[..., :10])
    assert not torch.allclose(aspp(x)[..., 10:], aspp(changed)[..., 10:])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_concatenated_pyramid(dims: int) -> None:
    aspp = ASPP(3, 2, (1, 2), dims=dims).double().eval()
    for norm in (m for m in aspp.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64, requires_grad=True)

    def unit(layer: ConvNormAct, value: torch.Tensor) -> torch.Tensor:
        view = (1, -1, *[1] * dims)
        norm = layer.norm
        scaled = (value - norm.running_mean.view(view)) / (norm.running_var.view(view) + 1e-5).sqrt()
        return (scaled * norm.weight.view(view) + norm.bias.view(view)).clamp(min=0)

    pointwise = lambda w, v: torch.einsum("oc,bc...->bo...", w.flatten(1), v)  # noqa: E731
    one, two, three = aspp.branches
    mean = x.flatten(2).mean(-1).view(2, 3, *[1] * dims).expand_as(x)
    expected = torch.cat(
        [
            unit(one, pointwise(one.conv.weight, x)),
            unit(two, naive_dilated(x, two.conv.weight, 1)),
            unit(three, naive_dilated(x, three.conv.weight, 2)),
            unit(aspp.pool, pointwise(aspp.pool.conv.weight, mean)),
        ],
        1,
    )
    y = aspp(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(y)
    ours, slow = (torch.autograd.grad((v * direction).sum(), x)[0] for v in (y, expected))
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-9)
    torch.testing.assert_close(fuse(aspp)(x), y, rtol=0, atol=1e-9)


def test_multi_scale_scores_take_the_maximum() -> None:
    x = torch.randn(1, 2, 17, 14)
    network = lambda v: F.avg_pool2d(v, 2)  # noqa: E731
    full, half, large, best = multi_scale_scores(network, x, (0.5, 0.75))
    assert half.shape[2:] == (4, 3)  # floor(0.5 * 17) = 8, halved by the network
    assert large.shape[2:] == (6, 5)
    others = [F.interpolate(s, full.shape[2:], mode="bilinear") for s in (half, large)]
    torch.testing.assert_close(best, torch.stack([full, *others]).amax(0))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rates"):
        SummedASPP(2, 2, ())
    with pytest.raises(ValueError, match="rates"):
        ASPP(2, 2, (0, 1))
    with pytest.raises(ValueError, match="dims"):
        SummedASPP(2, 2, dims=4)
    with pytest.raises(ValueError, match="causal"):
        SummedASPP(2, 2, causal=True)
    with pytest.raises(ValueError, match="odd"):
        ConvNormAct(2, 2, 4)
    with pytest.raises(ValueError, match="positive"):
        multi_scale_scores(lambda v: v, torch.zeros(1, 1, 4, 4), (0,))
