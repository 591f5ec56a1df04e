"""Learnt pooling of the nodes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.aggregation.channel_pooling import ChannelPooling


@pytest.mark.parametrize("training", [True, False])
def test_is_a_weighted_sum_per_feature(training):
    model = ChannelPooling(5, 3, depth_multiplier=2).double().train(training)
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    nn.init.normal_(model.norm.weight)
    x = torch.randn(4, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("bcnt,cjn->bcjt", x, model.weight).flatten(1, 2)
    expected = F.selu(model.norm(expected.unsqueeze(2)).squeeze(2))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weight = torch.randn_like(expected)
    both = [torch.autograd.grad((y * weight).sum(), (x, *model.parameters())) for y in (found, expected)]
    for gradient, other in zip(*both):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-9)


def test_constraint_shortens_long_filters_only():
    model = ChannelPooling(6, 2, max_norm=0.5)
    with torch.no_grad():
        model.weight.copy_(torch.randn_like(model.weight))
        model.weight[0, 0] *= 0.1 / model.weight[0, 0].norm()
    before = model.weight.detach().clone()
    model.constrain()
    torch.testing.assert_close(model.weight.norm(dim=2).flatten(), torch.tensor([0.1, 0.5, 0.5, 0.5]))
    assert torch.equal(model.weight[0, 0], before[0, 0])
    torch.testing.assert_close(F.normalize(model.weight, dim=2), F.normalize(before, dim=2))


def test_starts_as_keras_does():
    bound = math.sqrt(6 / (20 * 12 + 20 * 2))
    assert 0.9 < ChannelPooling(20, 12).weight.abs().max() / bound <= 1


@pytest.mark.parametrize("arguments", [(0, 3), (5, 0), (5, 3, 0), (5, 3, 2, 0.0)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        ChannelPooling(*arguments)
