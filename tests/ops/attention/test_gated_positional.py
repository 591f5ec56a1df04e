"""Gated positional self-attention against the table of all pairs, and its start."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from nearfar.ops.attention.gated_positional import GatedPositionalAttention


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs, retain_graph=True),
        torch.autograd.grad((slow * probe).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def randomized(operator: GatedPositionalAttention) -> GatedPositionalAttention:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.4)
    return operator.double()


def slow_weights(operator: GatedPositionalAttention, x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, N), from the features of every pair."""
    places = list(itertools.product(*(range(n) for n in x.shape[2:])))
    features = torch.zeros(len(places), len(places), x.ndim - 1, dtype=x.dtype)
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        r = [b - a for a, b in zip(query, key, strict=True)]
        features[i, j] = torch.tensor([*r[::-1], sum(n * n for n in r)])
    positional = operator.pos_proj(features).movedim(2, 0)
    q, k = (t.unflatten(2, (operator.num_heads, -1)).transpose(1, 2) for t in operator.qk(x.flatten(2).mT).chunk(2, 2))
    content = q @ k.mT / math.sqrt(q.shape[-1])
    if operator.causal:
        past = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        positional, content = positional.where(past, -torch.inf), content.where(past, -torch.inf)
    gate = 1 / (1 + (-operator.gating_param).exp())[:, None, None]
    return (1 - gate) * content.softmax(-1) + gate * positional.softmax(-1)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 4), {}),
        ((3, 5), {"qkv_bias": True}),
        ((1, 6), {}),
        ((7,), {"dims": 1}),
        ((7,), {"dims": 1, "causal": True}),
        ((2, 3, 4), {"dims": 3}),
    ],
)
def test_gated_attention_is_its_formula(size: tuple[int, ...], settings: dict[str, Any]) -> None:
    operator = randomized(GatedPositionalAttention(8, 2, **settings))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    weights = slow_weights(operator, x)
    v = operator.v(x.flatten(2).mT).unflatten(2, (2, -1)).transpose(1, 2)
    slow = operator.proj((weights @ v).transpose(1, 2).flatten(2)).mT.unflatten(2, size)
    agree(operator(x), slow, [x, *operator.parameters()])
    inputs = [x, operator.pos_proj.weight, operator.gating_param]
    agree(operator.attention_map(x), weights, inputs)


def test_kept_matrices_follow_the_weights_and_the_grid() -> None:
    operator = randomized(GatedPositionalAttention(8, 2)).eval()
    with torch.no_grad():
        for size in ((3, 4), (4, 3), (3, 4)):
            x = torch.randn(1, 8, *size, dtype=torch.float64)
            torch.testing.assert_close(operator.attention_map(x), slow_weights(operator, x))
        operator.pos_proj.weight.mul_(2)
        torch.testing.assert_close(operator.attention_map(x), slow_weights(operator, x))


def test_heads_start_as_the_taps_of_a_convolution() -> None:
    operator = GatedPositionalAttention(18, 9, locality_strength=50.0)
    with torch.no_grad():
        operator.gating_param.fill_(50)  # positions alone
        operator.proj.weight.copy_(torch.eye(18))
        operator.proj.bias.zero_()
    x = torch.randn(1, 18, 5, 6)
    y = operator(x)
    for head, (down, right) in enumerate((h1 - 1, h2 - 1) for h2, h1 in itertools.product(range(3), repeat=2)):
        part = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(y[:, part, 1:4, 1:5], x[:, part, 1 + down : 4 + down, 1 + right : 5 + right])


def test_surplus_heads_start_at_random() -> None:
    operator = GatedPositionalAttention(10, 5)
    assert (operator.pos_proj.weight[:4, 2] == -1).all()
    assert operator.pos_proj.weight[4, 2] > -1
    torch.testing.assert_close(operator.gates(), torch.full((5,), 0.7310586))
    torch.testing.assert_close(operator.v.weight, torch.eye(10))
    assert (GatedPositionalAttention(10, 5, locality_strength=None).pos_proj.weight[:, 2] > -1).all()


def test_it_does_not_look_ahead() -> None:
    operator = randomized(GatedPositionalAttention(4, 2, dims=1, causal=True))
    x = torch.randn(1, 4, 9, dtype=torch.float64)
    for cut in range(1, 9):
        changed = x.clone()
        changed[..., cut:] += 1
        torch.testing.assert_close(operator(changed)[..., :cut], operator(x)[..., :cut], atol=1e-12, rtol=0)


def test_positions_stay_in_float32_under_autocast() -> None:
    operator, x = GatedPositionalAttention(8, 4), torch.randn(1, 8, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        matrices = operator.positional((20, 20))
        assert operator(x).dtype == torch.bfloat16
    for matrix, want in zip(matrices, operator.positional((20, 20)), strict=True):
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix, want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3"),
        ({"locality_strength": 0.0}, "must be positive"),
        ({"causal": True}, "dims"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedPositionalAttention(8, **{"num_heads": 2, **settings})
