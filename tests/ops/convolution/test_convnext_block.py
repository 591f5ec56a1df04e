"""The ConvNeXt block against its formula, in 1, 2 and 3 dimensions, and its parts."""

import pytest
import torch
from torch.nn.functional import gelu, pad

from nearfar.ops.common.layers import ChannelNorm, DepthwiseConv, DropPath
from nearfar.ops.convolution.convnext import ConvNeXtBlock


def slow_depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, left: int) -> torch.Tensor:
    """Sum over the taps of the shifted, zero-padded map; `left` zeros come first on every axis."""
    sizes, kernel = x.shape[2:], weight.shape[2:]
    padded = pad(x, [n for k in reversed(kernel) for n in (left, k - 1 - left)])
    out = torch.zeros_like(x)
    for tap in torch.cartesian_prod(*[torch.arange(k) for k in kernel]).reshape(-1, len(kernel)).tolist():
        window = padded[(..., *[slice(t, t + n) for t, n in zip(tap, sizes, strict=True)])]
        out = out + window * weight[(slice(None), 0, *tap)].reshape(-1, *[1] * len(sizes))
    return out if bias is None else out + bias.reshape(-1, *[1] * len(sizes))


def slow_block(block: ConvNeXtBlock, x: torch.Tensor, left: int) -> torch.Tensor:
    dims = x.ndim - 2
    y = slow_depthwise(x, block.dwconv.weight, block.dwconv.bias, left)
    mean = y.mean(1, keepdim=True)
    per_channel = lambda v: v.reshape(-1, *[1] * dims)  # noqa: E731
    y = (y - mean) / ((y - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()
    y = y * per_channel(block.norm.weight) + per_channel(block.norm.bias)
    y = gelu(torch.einsum("oc,bc...->bo...", block.pwconv1.weight, y) + per_channel(block.pwconv1.bias))
    y = torch.einsum("oc,bc...->bo...", block.pwconv2.weight, y) + per_channel(block.pwconv2.bias)
    return x + y * per_channel(block.gamma)


@pytest.mark.parametrize(("size", "causal"), [((11,), False), ((11,), True), ((6, 9), False), ((4, 5, 3), False)])
def test_block_is_its_formula(size: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(0)
    block = ConvNeXtBlock(6, 5, mlp_ratio=2.5, layer_scale=0.7, dims=len(size), causal=causal).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    fast, slow = block(x), slow_block(block, x, left=4 if causal else 2)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    inputs = [x, *block.parameters()]
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_causal_block_does_not_see_the_future() -> None:
    block = ConvNeXtBlock(4, 7, layer_scale=1.0, dims=1, causal=True).double()
    x = torch.randn(1, 4, 20, dtype=torch.float64)
    later = x.clone()
    later[..., 12:] = 0
    torch.testing.assert_close(block(x)[..., :12], block(later)[..., :12])
    assert not torch.allclose(block(x)[..., 12], block(later)[..., 12])


def test_a_map_of_one_row_is_a_sequence() -> None:
    flat = ConvNeXtBlock(4, 7, layer_scale=1.0, dims=1)
    square = ConvNeXtBlock(4, 7, layer_scale=1.0, dims=2)
    with torch.no_grad():
        square.load_state_dict({**flat.state_dict(), "dwconv.weight": square.dwconv.weight})
        square.dwconv.weight[..., 3, :] = flat.dwconv.weight
    x = torch.randn(2, 4, 15)
    torch.testing.assert_close(square(x[:, :, None])[:, :, 0], flat(x))


def test_fused_block_gives_the_same() -> None:
    block = ConvNeXtBlock(8, layer_scale=0.3)
    torch.nn.init.normal_(block.norm.weight)
    torch.nn.init.normal_(block.norm.bias)
    x = torch.randn(1, 8, 9, 9)
    before = block(x)
    block.fuse()
    block.fuse()
    torch.testing.assert_close(block(x), before, atol=1e-5, rtol=1e-5)
    assert block.gamma is None


def test_drop_path_keeps_the_mean_and_whole_samples() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert ((y == 0) | (y == 1 / 0.75)).all()
    assert (y == y[:, :1, :1]).all()
    assert drop.eval()(x) is x


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"dims": 4}, "dims is 4"),
        ({"causal": True}, "causal"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ],
)
def test_bad_arguments(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNeXtBlock(8, **settings)


def test_channel_norm_takes_any_rank() -> None:
    norm = ChannelNorm(6)
    x = torch.randn(3, 6, 4, 5)
    torch.testing.assert_close(norm(x)[:, :, 1, 2], norm(x[:, :, 1, 2]))
    assert DepthwiseConv(6, 3)(x).shape == x.shape
