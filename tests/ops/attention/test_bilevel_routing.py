"""Bi-level routing attention against its formula, query by query."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.attention import bilevel_routing
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention, EnhancedAttention
from tests.ops.attention.test_halo_attention import agree

CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


def enhanced(conv: torch.nn.Module, u: torch.Tensor) -> torch.Tensor:
    return CONVOLVE[u.ndim - 3](u, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=len(conv.weight))


def linear(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.movedim(1, -1), layer.weight, layer.bias).movedim(-1, 1)


def pad(x: torch.Tensor, region: list[int]) -> torch.Tensor:
    return F.pad(x, [e for n, r in zip(x.shape[:1:-1], region[::-1]) for e in (0, -n % r)])


def oracle(layer: BiLevelRoutingAttention, x: torch.Tensor) -> torch.Tensor:
    """Every query for itself, with the keys of the regions that its region keeps."""
    size, dim, p = x.shape[2:], layer.dim, layer.regions
    region = [max(n // p, 1) if layer.padding == "values" else -(-n // p) for n in size]
    if layer.padding == "input":
        x = F.pad(x, [e for n, r in zip(size[::-1], region[::-1]) for e in (0, p * r - n)])
    qkv = linear(layer.qkv, x)
    v_map = qkv[:, 2 * dim :]
    inside = pad(torch.ones_like(qkv[:1, :1]), region)[0, 0]
    qkv = pad(qkv, region)
    grid = [n // r for n, r in zip(qkv.shape[2:], region)]
    cells = list(itertools.product(*map(range, grid)))

    def members(cell: tuple[int, ...]) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(c * r, (c + 1) * r) for c, r in zip(cell, region))))

    out = torch.zeros_like(qkv[:, :dim])
    for number, sample in enumerate(qkv):
        means = {}
        for cell in cells:
            real = [sample[(slice(None), *at)] for at in members(cell) if inside[at]]
            means[cell] = torch.stack(real).mean(0)
        for cell in cells:
            scores = torch.stack([means[cell][:dim] @ means[other][dim : 2 * dim] for other in cells])
            keep = scores.topk(min(layer.topk, len(cells))).indices.tolist()
            keys = torch.stack([sample[(slice(dim, None), *at)] for i in keep for at in members(cells[i])])
            for at in members(cell):
                query = sample[(slice(dim), *at)]
                for head in range(layer.num_heads):
                    part = slice(head * dim // layer.num_heads, (head + 1) * dim // layer.num_heads)
                    weights = (keys[:, :dim][:, part] @ query[part] * dim**-0.5).softmax(0)
                    out[(number, part, *at)] = weights @ keys[:, dim:][:, part]
    for axis, n in enumerate(v_map.shape[2:], 2):
        out = out.narrow(axis, 0, n)
    out = linear(layer.proj, out if layer.lepe is None else out + enhanced(layer.lepe, v_map))
    for axis, n in enumerate(size, 2):
        out = out.narrow(axis, 0, n)
    return out


@pytest.mark.parametrize("ratio", [0, 4])  # copied together, masked
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((3, 6), {"padding": "none"}),
        ((5, 7), {"padding": "input"}),
        ((7, 5), {"padding": "values"}),
        ((2, 7), {"padding": "values"}),
        ((3, 3), {"topk": 9, "qkv_bias": False}),
        ((6, 3), {"topk": 12, "kernel_size": 0}),
        ((8,), {"dims": 1}),
        ((3, 4, 2), {"dims": 3, "regions": 2, "padding": "values"}),
    ],
)
def test_is_its_formula(size: tuple[int, ...], settings: dict, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel_routing, "MASKED_RATIO", ratio)
    layer = BiLevelRoutingAttention(6, 2, **{"regions": 3, "topk": 2, "kernel_size": 3, **settings}).double()
    with torch.no_grad():
        layer.qkv.weight[:12] *= 3  # spreads the scores
    x = torch.randn(max(3 - len(size), 1), 6, *size, dtype=torch.float64, requires_grad=True)
    agree(layer(x), oracle(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("topk", [1, 3, 16])
def test_both_ways_agree(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = BiLevelRoutingAttention(8, 2, 4, topk), torch.randn(2, 8, 11, 8)
    ways = []
    for ratio in (0, 100):
        monkeypatch.setattr(bilevel_routing, "MASKED_RATIO", ratio)
        ways.append(layer(x))
    torch.testing.assert_close(*ways, atol=1e-6, rtol=1e-5)


def test_paddings_agree_where_regions_divide_the_grid() -> None:
    layers = [BiLevelRoutingAttention(8, 2, 4, 3, padding=padding) for padding in ("none", "input", "values")]
    x, states = torch.randn(1, 8, 8, 12), layers[0].state_dict()
    outputs = []
    for layer in layers:
        layer.load_state_dict(states)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_one_pixel_axis_is_one_dimension() -> None:
    flat = BiLevelRoutingAttention(8, 2, 3, 2, 0, dims=1, padding="values")
    grid = BiLevelRoutingAttention(8, 2, 3, 2, 0, padding="values")
    grid.load_state_dict(flat.state_dict())
    x = torch.randn(2, 8, 12)
    torch.testing.assert_close(grid(x[..., None])[..., 0], flat(x), atol=1e-6, rtol=1e-5)


def test_regions_may_change_places() -> None:
    """Without the convolution, whole regions moved about give the same outputs, moved about."""
    layer = BiLevelRoutingAttention(8, 2, 4, 2, 0)
    x = torch.randn(1, 8, 8, 8)
    order = [2, 0, 3, 1]
    swap = lambda t: torch.cat([t[:, :, 2 * i : 2 * i + 2] for i in order], 2)  # noqa: E731
    torch.testing.assert_close(layer(swap(x)), swap(layer(x)), atol=1e-6, rtol=1e-5)


def test_regions_that_are_not_kept_have_no_say() -> None:
    layer = BiLevelRoutingAttention(8, 2, 4, 2, 0)
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    kept = layer.attention_map(x)[0, 0, 5]  # of the region in row 1, column 1
    layer(x)[0, :, 2:4, 2:4].sum().backward()
    reached = (x.grad.abs().sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2)) > 0).flatten()
    kept[5] = 1  # its own queries
    assert torch.equal(reached, kept > 0)


def test_map_of_routes() -> None:
    layer = BiLevelRoutingAttention(8, 2, 4, 3)
    weights = layer.attention_map(torch.randn(2, 8, 9, 12))
    assert weights.shape == (2, 1, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 16))
    assert ((weights > 0).sum(-1) == 3).all()


def test_routes_are_chosen_in_full_precision() -> None:
    layer = BiLevelRoutingAttention(32, 2, 7, 4)
    x = torch.randn(2, 32, 14, 14)
    chosen, scores = layer.route(x.movedim(1, -1))
    with torch.autocast("cpu", torch.bfloat16):
        low, low_scores = layer.route(x.movedim(1, -1))
    assert torch.equal(chosen, low)
    assert low_scores.dtype == torch.float32
    torch.testing.assert_close(scores, low_scores)


@pytest.mark.parametrize("enhance", ["input", "values"])
@pytest.mark.parametrize("size", [(7,), (4, 5), (2, 3, 2)])
def test_enhanced_attention_is_its_formula(size: tuple[int, ...], enhance: str) -> None:
    layer = EnhancedAttention(8, 2, 3, enhance=enhance, dims=len(size)).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    query, key, value = linear(layer.qkv, x).chunk(3, 1)
    heads = []
    for q, k, v in zip(*(part.flatten(2).mT.chunk(2, -1) for part in (query, key, value))):
        heads.append((q @ k.mT / 2).softmax(-1) @ v)
    out = torch.cat(heads, -1).mT.unflatten(2, size) + enhanced(layer.lepe, x if enhance == "input" else value)
    agree(layer(x), linear(layer.proj, out), [x, *layer.parameters()])
    torch.testing.assert_close(layer.attention_map(x).sum(-1), torch.ones(2, 2, x[0, 0].numel()).double())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BiLevelRoutingAttention(8, 3), "num_heads=3 must divide dim=8"),
        (lambda: BiLevelRoutingAttention(8, 2, 0), "regions is 0"),
        (lambda: BiLevelRoutingAttention(8, 2, 7, 0), "topk 0"),
        (lambda: BiLevelRoutingAttention(8, 2, padding="reflect"), "padding is 'reflect'"),
        (lambda: BiLevelRoutingAttention(8, 2, padding="none")(torch.randn(1, 8, 14, 15)), "regions=7 must divide"),
        (lambda: EnhancedAttention(8, 3), "num_heads=3"),
        (lambda: EnhancedAttention(8, enhance="keys"), "enhance is 'keys'"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
