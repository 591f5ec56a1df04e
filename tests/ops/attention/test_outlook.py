"""Outlook attention against its formula, position by position, and its properties."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.attention.outlook import OutlookAttention


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs, retain_graph=True),
        torch.autograd.grad((slow * probe).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def randomized(operator: OutlookAttention) -> OutlookAttention:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.4)
    return operator.double()


def slow_outlook(operator: OutlookAttention, x: torch.Tensor) -> torch.Tensor:
    dims, k, s, heads = x.ndim - 2, operator.kernel_size, operator.stride, operator.num_heads
    size, d = x.shape[2:], x.shape[1] // heads
    pixels = {at: x[(slice(None), slice(None), *at)] for at in itertools.product(*(range(n) for n in size))}
    y = {at: torch.zeros_like(pixel) for at, pixel in pixels.items()}
    taps = list(itertools.product(range(k), repeat=dims))
    for cell in itertools.product(*(range(math.ceil(n / s)) for n in size)):
        inside = itertools.product(*(range(i * s, min(i * s + s, n)) for i, n in zip(cell, size, strict=True)))
        mean = torch.stack([pixels[at] for at in inside]).mean(0)
        logits = operator.attn(mean).unflatten(1, (heads, k**dims, k**dims))
        start = 0 if operator.causal else k // 2
        places = [tuple(i * s - start + t for i, t in zip(cell, tap, strict=True)) for tap in taps]
        for head, (p, place) in itertools.product(range(heads), enumerate(places)):
            if place not in pixels:
                continue
            seen = range(p + 1) if operator.causal else range(len(places))
            weights = (logits[:, head, p, list(seen)] * d**-0.5).softmax(-1)
            part = slice(head * d, (head + 1) * d)
            for q in seen:
                if places[q] in pixels:  # zeros elsewhere
                    value = operator.v(pixels[places[q]])[:, part]
                    y[place] = y[place] + F.pad(weights[:, q, None] * value, (head * d, (heads - 1 - head) * d))
    rows = torch.stack([operator.proj(y[at]) for at in pixels], dim=2)
    return rows.unflatten(2, tuple(size))


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 5), {}),
        ((5, 4), {"stride": 2}),
        ((2, 3), {"stride": 2, "kernel_size": 5}),
        ((6, 5), {"stride": 3, "kernel_size": 5}),
        ((1, 1), {"stride": 2}),
        ((7,), {"stride": 2, "dims": 1}),
        ((6,), {"dims": 1, "causal": True}),
        ((5,), {"dims": 1, "causal": True, "kernel_size": 2}),
        ((3, 2, 2), {"dims": 3, "stride": 2}),
    ],
)
def test_outlook_is_its_formula(size: tuple[int, ...], settings: dict[str, Any]) -> None:
    operator = randomized(OutlookAttention(4, 2, **settings))
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    # a value without bias is zero outside the grid
    agree(operator(x), slow_outlook(operator, x), [x, *operator.parameters()])


def test_outlook_does_not_look_ahead() -> None:
    operator = randomized(OutlookAttention(4, 2, dims=1, causal=True))
    x = torch.randn(1, 4, 9, dtype=torch.float64)
    for cut in range(1, 9):
        changed = x.clone()
        changed[..., cut:] += 1
        torch.testing.assert_close(operator(changed)[..., :cut], operator(x)[..., :cut], atol=1e-12, rtol=0)


def test_outlook_moves_with_its_input() -> None:
    operator = randomized(OutlookAttention(4, 2, stride=2))
    x = torch.zeros(1, 4, 16, 16, dtype=torch.float64)
    x[..., 4:8, 4:8] = torch.randn(4, 4, 4)
    moved = operator(x.roll((2, 4), (2, 3)))
    torch.testing.assert_close(moved[..., 4:12, 6:14], operator(x)[..., 2:10, 2:10])


def test_outlook_on_a_line_is_the_one_axis_form() -> None:
    """A kernel of the plane whose places above and below see and give nothing."""
    line, plane = randomized(OutlookAttention(4, 2, dims=1)), randomized(OutlookAttention(4, 2))
    with torch.no_grad():
        for name in ("v", "proj"):
            getattr(plane, name).load_state_dict(getattr(line, name).state_dict())
        plane.attn.weight.zero_()
        plane.attn.bias.fill_(-1e4)
        weight, bias = plane.attn.weight.view(2, 9, 9, 4), plane.attn.bias.view(2, 9, 9)
        weight[:, 3:6, 3:6] = line.attn.weight.view(2, 3, 3, 4)
        bias[:, 3:6, 3:6] = line.attn.bias.view(2, 3, 3)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(plane(x[:, :, None])[:, :, 0], line(x))


def test_attention_map_is_what_is_applied() -> None:
    operator = randomized(OutlookAttention(6, 3, stride=2))
    weights = operator.attention_map(torch.randn(2, 6, 5, 8, dtype=torch.float64))
    assert weights.shape == (2, 3, 12, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"stride": 3}, "stride is 3"),
        ({"stride": 2, "dims": 1, "causal": True}, "causal 1"),
        ({"causal": True}, "dims=1"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutlookAttention(8, **{"num_heads": 2, **settings})
