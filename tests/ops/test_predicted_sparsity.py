"""Predicted sparse attention: the oracle builds the mask row by row."""

import math

import pytest
import torch

from nearfar.ops.attention.predicted_sparsity import ConnectivityPredictor, PredictedSparseAttention
from nearfar.ops.common.ranking import largest_mask, ranked


def make(tokens=9, **settings):
    predictor = ConnectivityPredictor(4, tokens, 5, 2, **{"coefficients": 3, "keep_rate": 0.4, **settings}).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return predictor


def oracle(predictor, q, k):
    batch, heads, n, _ = q.shape
    basis = predictor.basis.T.abs().clone()
    basis[basis <= predictor.threshold] = 0
    mask = torch.ones(batch, heads, n, n, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            low = predictor.k(k[b, h]).T @ predictor.reduce
            for i in range(1, n):
                g = (predictor.q(q[b, h, i]) @ low / heads**0.5).softmax(-1)
                g[g.argsort(descending=True)[predictor.coefficients :]] = 0
                row = (g @ basis).argsort(descending=True)[: math.ceil(predictor.keep_rate * n)]
                mask[b, h, i] = False
                mask[b, h, i, row] = True
    return mask


def test_mask_and_attention_of_the_oracle():
    predictor = make()
    layer = PredictedSparseAttention(8, 2, predictor).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = layer.heads(x)
    mask = oracle(predictor, q, k)
    y, found, scores = layer(x)
    assert torch.equal(found.mask, mask)
    weights = (q @ k.mT / 2).masked_fill(~mask, float("-inf")).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(scores, weights[:, :, 0, 1:].mean(1))
    torch.testing.assert_close(layer.attention_map(x), weights)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), (x, layer.qkv.weight)),
        torch.autograd.grad(expected.square().sum(), (x, layer.qkv.weight)),
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_every_row_keeps_its_budget_and_the_class_row_all():
    predictor = make()
    q, k = torch.randn(2, 3, 9, 4).double(), torch.randn(2, 3, 9, 4).double()
    counts = predictor(q, k).mask.sum(-1)
    assert (counts[:, :, 0] == 9).all()
    assert (counts[:, :, 1:] == math.ceil(0.4 * 9)).all()
    active = torch.tensor([[True] * 2 + [False] * 6] * 2)
    pruned = predictor(q, k, active).mask[:, :, 1:]
    assert not pruned[..., 3:].any(), "no removed token is picked"
    assert (pruned.sum(-1) == 3).all(), "the budget shrinks to what is left"


def test_ties_go_to_the_lowest_index():
    predictor = make(coefficients=1)
    with torch.no_grad():
        predictor.basis.fill_(1.0)
    mask = predictor(torch.randn(1, 2, 9, 4).double(), torch.randn(1, 2, 9, 4).double()).mask
    assert mask[0, :, 1:, :4].all()
    assert not mask[0, :, 1:, 4:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_of_each_row_and_of_equal_ones_the_first(dtype):
    for values in (torch.randint(0, 4, (2, 7, 30)), torch.randn(2, 7, 30), torch.zeros(2, 7, 30)):
        x = values.to(dtype)
        x = x.abs() if values.dtype == torch.int64 else x
        x[0, 0, :20] = -0.0 if values.dtype == torch.int64 else -torch.inf
        for count in (1, 5, 29, 30):
            wanted = torch.zeros_like(x, dtype=torch.bool).scatter(-1, ranked(x)[..., :count], True)
            assert torch.equal(largest_mask(x, count), wanted)
    with pytest.raises(ValueError, match="rows have 30"):
        largest_mask(x, 31)


def test_reconstruction_trains_the_predictor():
    predictor = make()
    layer = PredictedSparseAttention(8, 2, predictor).double()
    x = torch.randn(1, 9, 8).double()
    y, found, _ = layer(x, dense=True)
    q, k, v = layer.heads(x)
    torch.testing.assert_close(y, layer.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)))
    found.approximate.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters())


def test_bad_arguments_and_sizes_are_named():
    with pytest.raises(ValueError, match="keep_rate is 0"):
        ConnectivityPredictor(4, 9, 5, 2, keep_rate=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        ConnectivityPredictor(4, 9, 0, 2)
    with pytest.raises(ValueError, match="is for 9"):
        make()(torch.randn(1, 2, 8, 4).double(), torch.randn(1, 2, 8, 4).double())
