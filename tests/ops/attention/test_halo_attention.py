"""Halo attention against its formula, position by position."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.attention.halo import HaloAttention


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def pointwise(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (x.ndim - 1))
    return torch.einsum("oc,c...->o...", layer.weight.flatten(1), x) + bias


def oracle(layer: HaloAttention, x: torch.Tensor) -> torch.Tensor:
    """Every query for itself: the keys of its block's window one by one, those outside the grid zeros or left out."""
    size, b, h, s = x.shape[2:], layer.block_size, layer.halo_size, layer.stride
    d, e, w = layer.head_dim, layer.value_dim, layer.window_size
    samples = []
    for sample in x:
        q, kv = pointwise(layer.q, sample), pointwise(layer.kv, sample)
        out = {}
        for index in itertools.product(*(range(0, n, s) for n in size)):
            corner = [n // b * b for n in index]
            heads = []
            for head in range(layer.num_heads):
                query = q[(slice(head * d, (head + 1) * d), *index)]
                logits, values = [], []
                for place in itertools.product(range(w), repeat=len(size)):
                    at = [c - h + n for c, n in zip(corner, place)]
                    inside = all(0 <= a < n for a, n in zip(at, size))
                    if (not inside and layer.border == "mask") or (layer.causal and at[0] > index[0]):
                        continue
                    pair = kv[(slice(head * (d + e), (head + 1) * (d + e)), *at)] if inside else kv.new_zeros(d + e)
                    relative = sum(
                        query @ table[n - (i - c) // s + w - 1]
                        for table, n, i, c in zip(layer.relative, place, index, corner)
                    )
                    scale = d**-0.5
                    logits.append(query @ pair[:d] * scale + relative * (scale if layer.scale_relative else 1))
                    values.append(pair[d:])
                heads.append(torch.stack(logits).softmax(0) @ torch.stack(values))
            out[tuple(n // s for n in index)] = torch.cat(heads)
        grid = [max(key[a] for key in out) + 1 for a in range(len(size))]
        samples.append(torch.stack([out[i] for i in itertools.product(*map(range, grid))], 1).unflatten(1, grid))
    return torch.stack(samples)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 8), {"block_size": 4, "halo_size": 1}),
        ((4, 8), {"block_size": 4, "halo_size": 2, "out_dim": 12, "head_dim": 2, "scale_relative": True}),
        ((8, 4), {"block_size": 4, "halo_size": 1, "stride": 2}),
        ((4, 2), {"block_size": 2, "halo_size": 3, "qkv_bias": True}),
        ((3, 5), {"block_size": 4, "halo_size": 1, "pad": True}),
        ((5, 3), {"block_size": 4, "halo_size": 1, "pad": True, "stride": 2, "border": "mask"}),
        ((6, 3), {"block_size": 3, "halo_size": 1, "border": "mask"}),
        ((4, 4), {"block_size": 2, "halo_size": 0}),
        ((9,), {"block_size": 3, "halo_size": 2, "dims": 1}),
        ((11,), {"block_size": 4, "halo_size": 3, "dims": 1, "causal": True, "pad": True}),
        ((12,), {"block_size": 4, "halo_size": 5, "dims": 1, "causal": True, "border": "mask"}),
        ((2, 4, 2), {"block_size": 2, "halo_size": 1, "dims": 3}),
    ],
)
def test_is_its_formula(size: tuple[int, ...], settings: dict) -> None:
    layer = HaloAttention(5, **{"out_dim": 6, "num_heads": 2, **settings}).double()
    x = torch.randn(max(3 - len(size), 1), 5, *size, dtype=torch.float64, requires_grad=True)
    agree(layer(x), oracle(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("settings", [{"block_size": 3}, {"block_size": 4, "avg_down": True}])
def test_pooled_stride(settings: dict) -> None:
    """Odd blocks are averaged after attention at stride 1."""
    torch.manual_seed(0)
    pooled = HaloAttention(4, 4, 2, halo_size=1, stride=2, **settings)
    plain = HaloAttention(4, 4, 2, halo_size=1, block_size=settings["block_size"])
    plain.load_state_dict(pooled.state_dict())
    x = torch.randn(1, 4, 12, 12)
    torch.testing.assert_close(pooled(x), F.avg_pool2d(plain(x), 2))


def test_one_pixel_axis_is_one_dimension() -> None:
    flat = HaloAttention(6, 6, 2, block_size=4, halo_size=2, dims=1, border="mask")
    grid = HaloAttention(6, 6, 2, block_size=4, halo_size=2, border="mask", pad=True)
    state = flat.state_dict()
    grid.load_state_dict(
        {
            "q.weight": state["q.weight"][..., None],
            "kv.weight": state["kv.weight"][..., None],
            "relative.0": state["relative.0"],
            "relative.1": torch.zeros_like(state["relative.0"]),
        }
    )
    x = torch.randn(2, 6, 12)
    torch.testing.assert_close(grid(x[..., None])[..., 0], flat(x), atol=1e-6, rtol=1e-5)


def test_causal_form_does_not_see_the_future() -> None:
    layer = HaloAttention(6, 6, 2, block_size=4, halo_size=3, dims=1, causal=True)
    x = torch.randn(1, 6, 16)
    later = x.clone()
    later[..., 10:] = 1
    torch.testing.assert_close(layer(x)[..., :10], layer(later)[..., :10])


def test_shifts_by_whole_blocks_commute_inside() -> None:
    layer = HaloAttention(6, 6, 2, block_size=4, halo_size=2)
    x = torch.randn(1, 6, 16, 20)
    moved = layer(torch.roll(x, (4, 8), (2, 3)))
    torch.testing.assert_close(moved[..., 8:12, 12:16], layer(x)[..., 4:8, 4:8], atol=1e-6, rtol=1e-5)


def test_maps_are_the_weights_on_the_window() -> None:
    layer = HaloAttention(4, 4, 1, block_size=4, halo_size=1, border="mask", pad=True)
    x = torch.randn(1, 4, 6, 7)
    weights = layer.attention_map(x)
    assert weights.shape == (1, 1, 42, 36)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 42))
    values = F.pad(layer.kv(x)[:, 4:], (1, 8, 1, 8))
    rows, columns = layer.window((5, 2))
    assert (rows, columns) == (slice(3, 9), slice(-1, 5))
    window = values[0, :, rows.start + 1 : rows.stop + 1, columns.start + 1 : columns.stop + 1].flatten(1)
    torch.testing.assert_close(window @ weights[0, 0, 5 * 7 + 2], layer(x)[0, :, 5, 2], atol=1e-6, rtol=1e-5)


def test_tables_serve_training_after_inference() -> None:
    layer = HaloAttention(4, 4, 2, block_size=2, halo_size=1, border="mask")
    x = torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.relative[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide out_dim=8"),
        ({"block_size": 0}, "block_size is 0"),
        ({"border": "reflect"}, "border is 'reflect'"),
        ({"stride": 3}, "stride is 3"),
        ({"causal": True}, "causal=True needs dims=1"),
        ({"dims": 4}, "dims is 4"),
    ],
)
def test_bad_arguments(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloAttention(8, **settings)


def test_grids_that_blocks_do_not_divide_are_refused_unless_padded() -> None:
    with pytest.raises(ValueError, match="multiples of block_size=8"):
        HaloAttention(8)(torch.randn(1, 8, 8, 12))
