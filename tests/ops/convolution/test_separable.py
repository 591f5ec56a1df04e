"""Separable convolution: the product kernel against the two convolutions it stands for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.common.keras import selu_
from nearfar.ops.convolution.separable import SeparableConv

CASES = {  # in, out, kernel, multiplier, groups, branches
    "agtcnet projection": (4, 6, (1, 8), 4, 1, 1),
    "agtcnet scores": (6, 4, (1, 2), 4, 2, 2),
    "series": (4, 6, (3,), 2, 2, 1),
    "two steps": (4, 6, (7,), 1, 1, 1),
    "two steps, groups and branches": (4, 8, (3, 3), 2, 2, 2),
    "volume": (2, 3, (2, 3, 2), 2, 1, 3),
}


def make(case: tuple, **options) -> SeparableConv:
    size_in, size_out, kernel, multiplier, groups, branches = case
    model = SeparableConv(size_in, size_out, kernel, multiplier, groups, branches, **options).double()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model


def oracle(model: SeparableConv, x: torch.Tensor, groups: int, branches: int, causal: bool) -> torch.Tensor:
    """Group by group and branch by branch: pad, depthwise, pointwise; then batch norm and SELU."""
    kernel = model.depthwise.shape[3:]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    padding = []
    for axis in reversed(range(len(kernel))):
        all_before = causal and axis == len(kernel) - 1
        before = kernel[axis] - 1 if all_before else math.floor((kernel[axis] - 1) / 2)
        padding += [before, 0 if all_before else math.ceil((kernel[axis] - 1) / 2)]
    inputs = x.chunk(groups, dim=1)
    depthwise = model.depthwise.chunk(groups)
    pointwise = iter(model.pointwise.chunk(groups * branches))
    outputs = []
    for g in range(groups):
        for r in range(branches):
            filters = depthwise[g][:, r].flatten(0, 1).unsqueeze(1)
            z = convolve(F.pad(inputs[g], padding), filters, groups=inputs[g].shape[1])
            weight = next(pointwise).flatten(1)
            outputs.append(convolve(z, weight.view(*weight.shape, *(1 for _ in kernel))))
    return F.selu(model.norm(torch.cat(outputs, dim=1)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_factors(case, causal, training):
    model = make(case, causal=causal).train(training)
    x = torch.randn(3, case[0], *(9, 6, 5)[: len(case[2])], dtype=torch.float64, requires_grad=True)
    inputs = (x, *model.parameters())
    expected = oracle(model, x, case[4], case[5], causal)
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    found = model(x)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for gradient, other in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-9)


def test_both_forms_are_used():
    assert make(CASES["agtcnet projection"]).product
    assert not make(CASES["two steps"]).product


def test_channels_last_stays_channels_last():
    model = make(CASES["agtcnet projection"])
    x = torch.randn(2, 4, 5, 20, dtype=torch.float64)
    last = model(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [2, 3, 8])
def test_same_padding_as_keras(kernel):
    # an impulse at 10 seen by filter tap k lands at 10 - k + floor((kernel - 1) / 2)
    model = SeparableConv(1, 1, (kernel,)).eval()
    nn.init.ones_(model.pointwise)
    for tap in range(kernel):
        with torch.no_grad():
            model.depthwise.zero_()[..., tap] = 1
            y = model(F.one_hot(torch.tensor(10), 21).float().view(1, 1, -1))
        assert y.argmax() == 10 - tap + (kernel - 1) // 2


def test_causal_sees_nothing_later():
    model = make(CASES["series"], causal=True).eval()
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    y = model(x)
    x[..., 7:] += 1
    changed = (model(x) != y).any(1)[0]
    assert not changed[:7].any()
    assert changed[7:].any()


def test_starts_as_keras_does():
    model = SeparableConv(16, 32, (2,), depth_multiplier=4)
    assert 0.9 < model.depthwise.abs().max() / math.sqrt(6 / (2 * 16 + 2 * 4)) <= 1
    assert 0.9 < model.pointwise.abs().max() / math.sqrt(6 / (64 + 32)) <= 1


def test_selu_and_its_gradient():
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64, requires_grad=True)
    expected = F.selu(x)
    found = selu_(x.clone())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=0, atol=1e-12
    )


def test_bfloat16_stays_bfloat16():
    x = torch.randn(50, dtype=torch.bfloat16, requires_grad=True)
    y = selu_(x.clone())
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((4, 6, ()), "kernel_size"),
        ((4, 6, (3, 0)), "kernel_size"),
        ((4, 6, (1, 1, 1, 1)), "kernel_size"),
        ((4, 0, (3,)), "out_channels"),
        ((4, 6, (3,), 1, 3), "groups=3"),
        ((4, 6, (3,), 1, 2, 2), "groups \\* branches = 4"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        SeparableConv(*arguments)
