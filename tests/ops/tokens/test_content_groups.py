"""Attention inside groups of like tokens: the oracle sorts, pads and loops over groups."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.tokens.content_groups import ContentGroupAttention


def softmax_attention(layer, q, k, v):
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(0, 1) for t in (q, k, v))
    return ((q @ k.mT * layer.scale).softmax(-1) @ v).transpose(0, 1).flatten(1)


def oracle(layer, x):
    outputs = []
    for tokens in x:
        n = len(tokens)
        centre = [int(F.cosine_similarity(token[None], layer.centres).argmax()) for token in tokens]
        order = sorted(range(n), key=lambda i: centre[i])
        size = min(n, layer.group_size)
        long = list(order)
        while len(long) < n + 2 * size:  # mirrored again and again
            long += long[::-1][:n] if len(long) % (2 * n) == n else order
        out = torch.zeros_like(tokens)
        q, k, v = layer.q(tokens), layer.k(tokens), layer.v(tokens)
        far = softmax_attention(layer, q, layer.centre_k(layer.centres), layer.centre_v(layer.centres))
        for start in range(0, n, size):
            seen = long[start : start + 2 * size]
            for i in order[start : start + size]:
                out[i] = softmax_attention(layer, q[i : i + 1], k[seen], v[seen])[0] + far[i]
        outputs.append(layer.out(out))
    return torch.stack(outputs)


def make(**settings):
    layer = ContentGroupAttention(6, 4, 2, num_centres=3, **{"group_size": 4, **settings}).double().eval()
    layer.initialized.fill_(True)
    return layer


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 16])
def test_oracle_forward_and_gradient_at_every_length(n):
    layer = make()
    x = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), oracle(layer, x)
    assert (y - expected).norm() <= 1e-9 * expected.norm()
    wanted = [x, layer.k.weight, layer.centre_v.weight]
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    ):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12


def test_one_group_does_not_know_positions():
    layer, x = make(group_size=64), torch.randn(1, 9, 6, dtype=torch.float64)
    order = torch.randperm(9)
    assert torch.allclose(layer(x[:, order]), layer(x)[:, order])


def test_centres_are_learned_and_stay_in_evaluation():
    torch.manual_seed(0)
    layer = ContentGroupAttention(6, 4, 2, num_centres=2, group_size=8)
    ends = F.normalize(torch.randn(2, 6), dim=-1)
    x = (ends[torch.arange(40) % 2] + 0.05 * torch.randn(40, 6))[None]
    layer.train()(x)
    assert bool(layer.initialized)
    found = F.normalize(layer.centres, dim=-1) @ ends.T
    assert found.max(0).values.min() > 0.98, "both directions are found"
    before = layer.centres.clone()
    layer(-x)
    assert not torch.equal(before, layer.centres)
    assert torch.allclose(before, layer.centres, atol=0.01), "they move slowly"
    before = layer.centres.clone()
    layer.eval()(x)
    assert torch.equal(before, layer.centres)


def test_training_passes_gradients_to_the_tokens_through_the_centres():
    layer = ContentGroupAttention(4, 4, 1, num_centres=2, group_size=4).train()
    for module in (layer.q, layer.k, layer.v):
        torch.nn.init.zeros_(module.weight)
    x = torch.randn(1, 8, 4, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads is 3"):
        ContentGroupAttention(6, 4, 3, 2, 4)
    with pytest.raises(ValueError, match="at least 1"):
        ContentGroupAttention(6, 4, 2, 0, 4)


def test_two_that_share_a_batch_learn_the_centres_of_the_whole():
    """`batch_sum` adds what two threads bring, as it would of two processes."""
    torch.manual_seed(0)
    whole = ContentGroupAttention(8, 8, 2, 3, 4).double().train()
    x = torch.randn(4, 12, 8, dtype=torch.float64)
    parts, meeting, brought = [copy.deepcopy(whole) for _ in range(2)], threading.Barrier(2, timeout=30), {}

    def half(number):
        turn = itertools.count()

        def batch_sum(value):
            brought[now := next(turn), number] = value
            meeting.wait()
            return brought[now, 0] + brought[now, 1]

        parts[number].batch_sum = batch_sum
        return [parts[number](x[2 * number : 2 * number + 2]) for _ in range(2)][-1]

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(half, range(2))))
    wanted = [whole(x) for _ in range(2)][-1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts[1].centres, whole.centres, rtol=0, atol=1e-9)
    for output in (found, wanted):
        output.square().sum().backward()
    for name, weight in whole.named_parameters():
        both = sum(dict(part.named_parameters())[name].grad for part in parts)
        torch.testing.assert_close(both, weight.grad, rtol=0, atol=1e-9, msg=name)
