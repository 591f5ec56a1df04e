"""Attention over tokens, from leading tokens, over pooled keys, and from convolved projections, against formulas."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.attention.conv_projection import ConvProjectionAttention
from nearfar.ops.attention.self_attention import ClassAttention, PooledAttention, SelfAttention


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs, retain_graph=True),
        torch.autograd.grad((slow * probe).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def doubles(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def randomized(operator: nn.Module) -> nn.Module:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.4)
    return operator.double()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, sees: Any = None) -> Any:
    """One head and one query at a time."""
    d = q.shape[2] // heads
    rows = []
    for i in range(q.shape[1]):
        parts = []
        for part in (slice(h * d, (h + 1) * d) for h in range(heads)):
            keys = [j for j in range(k.shape[1]) if sees is None or sees(i, j)]
            logits = (q[:, i, None, part] * k[:, keys, part]).sum(2) * scale
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            parts.append((weights[..., None] * v[:, keys, part]).sum(1))
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_its_formula(causal: bool) -> None:
    operator, x = randomized(SelfAttention(12, 3, qkv_bias=True, causal=causal)), doubles(2, 7, 12)
    q, k, v = F.linear(x, operator.qkv.weight, operator.qkv.bias).split(12, 2)
    slow = operator.proj(attend(q, k, v, 3, 0.5, (lambda i, j: j <= i) if causal else None))
    agree(operator(x), slow, [x, *operator.parameters()])
    weights = operator.attention_map(x)
    v = v.unflatten(2, (3, 4)).transpose(1, 2)
    agree(operator.proj((weights @ v).transpose(1, 2).flatten(2)), slow, [x])


def test_a_bias_shifts_the_logits() -> None:
    operator, x = randomized(SelfAttention(8, 2)), doubles(1, 5, 8)
    bias = doubles(2, 5, 5)
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in operator.qkv(x).chunk(3, 2))
    weights = (q @ k.mT / 2 + bias).softmax(-1)
    agree(operator(x, bias), operator.proj((weights @ v).transpose(1, 2).flatten(2)), [x, bias])
    torch.testing.assert_close(operator.attention_map(x, bias), weights)
    with pytest.raises(ValueError, match="no bias"):
        SelfAttention(8, 2, causal=True).double()(x, bias)


@pytest.mark.parametrize("queries", [1, 2])
def test_class_attention_is_self_attention_of_the_leading_tokens(queries: int) -> None:
    operator, x = randomized(ClassAttention(12, 4, qkv_bias=True, num_queries=queries)), doubles(2, 6, 12)
    k, v = operator.kv(x).chunk(2, 2)
    slow = operator.proj(attend(operator.q(x)[:, :queries], k, v, 4, 3**-0.5))
    agree(operator(x), slow, [x, *operator.parameters()])
    weights = operator.attention_map(x)
    assert weights.shape == (2, 4, queries, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, queries, dtype=torch.float64))


@pytest.mark.parametrize(("size", "reduction"), [((6,), 2), ((5, 7), 2), ((4, 4), 1), ((3, 4, 2), 2)])
def test_pooled_attention_is_its_formula(size: tuple[int, ...], reduction: int) -> None:
    dims, n = len(size), math.prod(size)
    operator, x = randomized(PooledAttention(8, 2, reduction, dims=dims)), doubles(2, n, 8)
    cells = [s // reduction for s in size]
    grid = x.mT.unflatten(2, size)
    means = []
    for cell in itertools.product(*(range(c) for c in cells)):
        part = grid
        for axis, i in enumerate(cell):
            part = part.narrow(2 + axis, i * reduction, reduction)
        means.append(part.flatten(2).mean(2))
    reduced = torch.stack(means, 1) if reduction > 1 else x
    if reduction > 1:
        reduced = operator.norm(operator.linear(reduced))
    bias = doubles(1, 2, n, math.prod(cells))
    q, (k, v) = operator.q(x), operator.kv(reduced).chunk(2, 2)
    agree(operator(x, size), operator.proj(attend(q, k, v, 2, 0.5)), [x, *operator.parameters()])
    weights = operator.attention_map(x, size, bias)
    values = v.unflatten(2, (2, 4)).transpose(1, 2)
    agree(operator(x, size, bias), operator.proj((weights @ values).transpose(1, 2).flatten(2)), [x, bias])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def slow_projection(operator: ConvProjectionAttention, x: torch.Tensor, size: tuple[int, ...], heads: int) -> Any:
    dims, dim = len(size), x.shape[2]
    prefix = x.shape[1] - math.prod(size)
    grid = x[:, prefix:].mT.unflatten(2, size)
    projected = []
    for conv, linear in ((operator.conv_q, operator.q), (operator.conv_k, operator.k), (operator.conv_v, operator.v)):
        stride, k = conv[0].stride[0], conv[0].kernel_size[0]
        left = k - 1 if operator.causal else k // 2
        padded = F.pad(grid, (left, k) * dims)
        cells = []
        for cell in itertools.product(*(range(-(-n // stride)) for n in size)):
            part = padded
            for axis, i in enumerate(cell):
                part = part.narrow(2 + axis, i * stride, k)
            cells.append((part * conv[0].weight[None, :, 0]).flatten(2).sum(2))
        maps = torch.stack(cells, 2)
        shape = (1, dim, 1)
        norm = conv[1]
        maps = (maps - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
        tokens = (maps * norm.weight.view(shape) + norm.bias.view(shape)).mT
        projected.append(linear(torch.cat((x[:, :prefix], tokens), 1)))
    s_q, s_kv = operator.strides
    sees = lambda i, j: (j < prefix) if i < prefix or j < prefix else s_kv * (j - prefix) <= s_q * (i - prefix)  # noqa: E731
    return operator.proj(attend(*projected, heads, dim**-0.5, sees if operator.causal else None))


@pytest.mark.parametrize(
    ("size", "prefix", "settings"),
    [
        ((5, 6), 0, {}),
        ((3, 5), 1, {"stride_kv": 1}),
        ((7, 4), 2, {"kernel_size": 5, "stride_q": 2, "stride_kv": 3}),
        ((9,), 0, {"dims": 1}),
        ((9,), 1, {"dims": 1, "causal": True}),
        ((8,), 0, {"dims": 1, "causal": True, "stride_q": 2}),
        ((3, 4, 2), 1, {"dims": 3}),
    ],
)
def test_conv_projection_is_its_formula(size: tuple[int, ...], prefix: int, settings: dict[str, Any]) -> None:
    operator = randomized(ConvProjectionAttention(6, 2, **settings)).eval()
    for conv in (operator.conv_q, operator.conv_k, operator.conv_v):
        nn.init.normal_(conv[1].running_mean)
        nn.init.uniform_(conv[1].running_var, 0.5, 2)
    x = doubles(2, prefix + math.prod(size), 6)
    slow = slow_projection(operator, x, size, 2)
    agree(operator(x, size), slow, [x, *operator.parameters()])
    weights = operator.attention_map(x, size)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_conv_projection_does_not_look_ahead() -> None:
    operator, x = randomized(ConvProjectionAttention(4, 2, dims=1, causal=True)).eval(), doubles(1, 10, 4)
    for cut in range(1, 10):
        changed = x.detach().clone()
        changed[:, cut:] += 1
        torch.testing.assert_close(operator(changed, (10,))[:, :cut], operator(x, (10,))[:, :cut], atol=1e-12, rtol=0)


def test_conv_projection_on_a_line_is_the_one_axis_form() -> None:
    line, plane = ConvProjectionAttention(6, 2, dims=1).double(), ConvProjectionAttention(6, 2).double()
    state = plane.state_dict()
    for name, value in line.state_dict().items():
        state[name] = F.pad(value[:, :, None], (0, 0, 1, 1)) if value.ndim == 3 else value
    plane.load_state_dict(state)
    x = doubles(2, 9, 6)
    torch.testing.assert_close(plane.eval()(x, (1, 9)), line.eval()(x, (9,)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfAttention(8, 3), "num_heads is 3"),
        (lambda: ClassAttention(8, 2, num_queries=0), "num_queries is 0"),
        (lambda: PooledAttention(8, 2, 0), "reduction is 0"),
        (lambda: PooledAttention(8, 2, 4)(torch.zeros(1, 6, 8), (2, 3)), "no side may be less"),
        (lambda: ConvProjectionAttention(8, 2, 4), "kernel_size is 4"),
        (lambda: ConvProjectionAttention(8, 2, stride_kv=0), "stride_kv 0"),
        (lambda: ConvProjectionAttention(8, 2, causal=True), "dims=1"),
        (lambda: ConvProjectionAttention(8, 2)(torch.zeros(1, 5, 8), (2, 3)), "5 tokens are fewer"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
