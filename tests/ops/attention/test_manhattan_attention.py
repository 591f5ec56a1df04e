"""Manhattan attention and the feed-forward layer of RMT against their formulas."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.attention import manhattan
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.ops.convolution.conv_ffn import ConvFFN
from tests.ops.attention.test_bilevel_routing import enhanced, linear
from tests.ops.attention.test_halo_attention import agree


def turned(u: torch.Tensor, time: int) -> torch.Tensor:
    """A head's channels, pair by pair as complex numbers times exp(i time 10000^(-c / (d / 2 - 1)))."""
    pairs = torch.view_as_complex(u.reshape(-1, 2))
    rates = 10000.0 ** -torch.linspace(0, 1, len(pairs), dtype=torch.float64)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(rates), time * rates)).flatten()


def weights(layer: ManhattanAttention, x: torch.Tensor, pairs) -> torch.Tensor:
    """(heads, N, N) of one sample, softmax over the pairs of positions that `pairs` lets through."""
    size = x.shape[1:]
    spots = list(itertools.product(*map(range, size)))
    query, key = (linear(part, x[None])[0].flatten(1) for part in (layer.q, layer.k))
    d = layer.head_dim
    logits = torch.full((layer.num_heads, len(spots), len(spots)), -math.inf, dtype=x.dtype)
    for head in range(layer.num_heads):
        rate = math.log(1 - 2 ** (-layer.decay_initial - layer.decay_range * head / layer.num_heads))
        part = slice(head * d, (head + 1) * d)
        for (i, a), (j, b) in itertools.product(enumerate(spots), repeat=2):
            if pairs(a, b):
                product = turned(query[part, i], i) @ turned(key[part, j], j) * d**-0.5
                logits[head, i, j] = product + rate * sum(abs(m - n) for m, n in zip(a, b))
    return logits.softmax(-1)


def oracle(layer: ManhattanAttention, x: torch.Tensor) -> torch.Tensor:
    values = linear(layer.v, x)
    size, samples = x.shape[2:], []
    for sample, value in zip(x, values):
        if layer.causal:
            passes = [weights(layer, sample, lambda a, b: b <= a)]
        elif layer.decomposed:
            rest = lambda a, axis: a[:axis] + a[axis + 1 :]  # noqa: E731
            passes = [
                weights(layer, sample, lambda a, b, axis=axis, rest=rest: rest(a, axis) == rest(b, axis))
                for axis in range(len(size))
            ]
        else:
            passes = [weights(layer, sample, lambda a, b: True)]
        out = value.flatten(1).unflatten(0, (layer.num_heads, -1)).mT  # (heads, N, d)
        for matrix in reversed(passes):
            out = matrix @ out
        samples.append(out.mT.flatten(0, 1).unflatten(1, size))
    local = F.pad(values, (layer.lepe.left, 0)) if layer.causal else values
    local = F.conv1d(local, layer.lepe.weight, layer.lepe.bias, groups=len(layer.lepe.weight)) if layer.causal else (
        enhanced(layer.lepe, values)
    )  # fmt: skip
    return linear(layer.proj, torch.stack(samples) + local)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((3, 4), {}),
        ((4, 3), {"decomposed": True}),
        ((6,), {"dims": 1}),
        ((6,), {"dims": 1, "causal": True, "kernel_size": 3}),
        ((2, 3, 2), {"dims": 3, "kernel_size": 3}),
        ((2, 3, 2), {"dims": 3, "kernel_size": 3, "decomposed": True}),
        ((1, 5), {"num_heads": 4, "decay_initial": 1, "decay_range": 3}),
    ],
)
def test_is_its_formula(size: tuple[int, ...], settings: dict) -> None:
    layer = ManhattanAttention(8, **{"num_heads": 2, **settings}).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    agree(layer(x), oracle(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize(
    ("size", "settings"),
    [((3, 4), {}), ((3, 4), {"decomposed": True}), ((2, 3, 2), {"dims": 3, "decomposed": True}), ((5,), {"dims": 1})],
)
def test_maps_are_the_weights(size: tuple[int, ...], settings: dict) -> None:
    layer = ManhattanAttention(8, 2, kernel_size=1, **settings).double()
    torch.nn.init.zeros_(layer.lepe.weight)
    torch.nn.init.zeros_(layer.lepe.bias)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    maps = layer.attention_map(x)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    values = linear(layer.v, x).flatten(2).unflatten(1, (2, -1)).mT
    out = linear(layer.proj, (maps @ values).mT.flatten(1, 2).unflatten(2, size))
    torch.testing.assert_close(layer(x), out, atol=1e-9, rtol=1e-9)


def test_few_queries_at_a_time_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ManhattanAttention(8, 2).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64, requires_grad=True)
    whole = layer(x)
    grads = torch.autograd.grad(whole.square().sum(), [x, *layer.parameters()])
    for values in (1, 2 * 35 * 4, 2 * 35 * 34):  # one query at a time, four, all but one
        monkeypatch.setattr(manhattan, "BIAS", values)
        parts = layer(x)
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), [x, *layer.parameters()]), grads)
    layer, kept = ManhattanAttention(8, 2), {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive = layer(torch.randn(1, 8, 16, 16))
    assert alive.shape == (1, 8, 16, 16)
    assert sum(kept.values()) < 2 * 256**2 / 4  # no bias waits for the backward pass


def test_causal_form_does_not_see_the_future() -> None:
    layer = ManhattanAttention(8, 2, dims=1, causal=True)
    x = torch.randn(1, 8, 16)
    later = x.clone()
    later[..., 10:] = 1
    torch.testing.assert_close(layer(x)[..., :10], layer(later)[..., :10])


@pytest.mark.parametrize("decomposed", [False, True])
def test_one_pixel_axis_is_one_dimension(decomposed: bool) -> None:
    flat = ManhattanAttention(8, 2, dims=1, kernel_size=1)
    grid = ManhattanAttention(8, 2, kernel_size=1, decomposed=decomposed)
    grid.load_state_dict({k: v[..., None] if k == "lepe.weight" else v for k, v in flat.state_dict().items()})
    x = torch.randn(2, 8, 12)
    torch.testing.assert_close(grid(x[:, :, None])[:, :, 0], flat(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grid(x[..., None])[..., 0], flat(x), atol=1e-6, rtol=1e-5)


COMPILED = """
import torch
from nearfar.ops.attention.manhattan import ManhattanAttention

for dims in (2, 3):
    layer, x = ManhattanAttention(16, 2, dims=dims).eval(), torch.randn(2, 16, *(8, 7, 6)[:dims])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x))
"""


@pytest.mark.ci
def test_inductor_compiles_it() -> None:
    """In a process of its own, without the checks of shapes, which cannot be traced."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_decay_alone() -> None:
    """With equal logits a weight halves over the distance that `decay_ranges` names."""
    layer = ManhattanAttention(8, 4, 2, 6, dims=1).double()
    for part in (layer.q, layer.k):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    first = layer.attention_map(torch.randn(1, 8, 30, dtype=torch.float64))[0, :, 0]
    ranges = layer.decay_ranges(0.5).double()
    torch.testing.assert_close(first[:, 20] / first[:, 0], 0.5 ** (20 / ranges), atol=1e-6, rtol=1e-5)
    assert (ranges.diff() > 0).all()
    with pytest.raises(ValueError, match=r"weight is 1\.0"):
        layer.decay_ranges(1.0)


@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_ffn_is_its_formula(size: tuple[int, ...]) -> None:
    layer = ConvFFN(4, 12, dims=len(size)).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    u = linear(layer.fc1, x)
    u = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    agree(layer(x), linear(layer.fc2, u + enhanced(layer.dwconv, u)), [x, *layer.parameters()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide dim=8 into even parts"),
        ({"num_heads": 8}, "into even parts"),
        ({"decay_initial": 0}, "decay_initial is 0"),
        ({"decay_range": -1}, "decay_range -1"),
        ({"causal": True}, "causal=True needs dims=1"),
        ({"kernel_size": 4}, "kernel_size is 4"),
    ],
)
def test_bad_arguments(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManhattanAttention(8, **{"num_heads": 2, **settings})
