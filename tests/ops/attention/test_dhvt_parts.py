"""Head-token attention, the overlapping stem and the channel-gated feed-forward against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.attention.head_tokens import HeadTokenAttention
from nearfar.ops.convolution.overlapping import ChannelGatedFeedForward, OverlappingPatches


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def settle(module: nn.Module) -> nn.Module:
    """Eval mode with running statistics, scales and shifts that are nowhere neutral, in double."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.numel() == max(tensor.shape):
            tensor.uniform_(-1, 1)
    return module.double().eval()


def normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    across = lambda v: v.reshape(1, -1, *(1,) * (x.ndim - 2))  # noqa: E731
    return (x - across(norm.running_mean)) / across(norm.running_var + norm.eps).sqrt() * across(norm.weight) + across(
        norm.bias
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_head_token_attention_is_its_formula(heads: int) -> None:
    dim, n = 12, 7
    op = settle(HeadTokenAttention(dim, heads))
    x = torch.randn(2, n, dim, dtype=torch.float64, requires_grad=True)
    d = dim // heads
    rows = []
    for h in range(heads):
        made = op.ht_proj(x.mean(1)[:, h * d : (h + 1) * d])
        made = torch.cat([op.ht_norm(made[:, i * d : (i + 1) * d]) for i in range(heads)], 1)
        rows.append(0.5 * made * (1 + torch.erf(made / math.sqrt(2))) + op.pos_embed[h])
    joined = torch.cat((x, torch.stack(rows, 1)), 1)
    q, k, v = op.qkv(joined).chunk(3, -1)
    outs = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(d), -1)
        outs.append(weights @ v[..., part])
    mixed = op.proj(torch.cat(outs, -1))
    slow = torch.cat((mixed[:, :1] + mixed[:, n:].mean(1, keepdim=True), mixed[:, 1:n]), 1)
    agree(op(x), slow, [x, *op.parameters()])
    assert op.attention_map(x).shape == (2, heads, n + heads, n + heads)


def test_attention_permutes_with_its_patches() -> None:
    op = HeadTokenAttention(8, 2).double()
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(9)))
    torch.testing.assert_close(op(x[:, order]), op(x)[:, order])


@pytest.mark.parametrize(("patch", "size"), [(2, (6,)), (2, (6, 5)), (4, (9, 8)), (8, (8, 17)), (4, (5, 4, 8))])
def test_stem_is_its_formula(patch: int, size: tuple[int, ...]) -> None:
    op = settle(OverlappingPatches(8, patch, 2, dims=len(size)))
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    y = op.pre_affine.alpha * x + op.pre_affine.beta
    steps = int(math.log2(patch))
    for i in range(steps):
        conv, norm = op.proj[2 * i]
        y = normed(convolve(y, conv.weight, stride=2, padding=1), norm)
        if i < steps - 1 or patch == 2:
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    agree(op(x), op.post_affine.alpha * y + op.post_affine.beta, [x, *op.parameters()])
    assert op(x).shape[2:] == tuple(-(-n // patch) for n in size)


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_feed_forward_is_its_formula(grid: tuple[int, ...], classes: int) -> None:
    op = settle(ChannelGatedFeedForward(8, 12, dims=len(grid)))
    n = math.prod(grid)
    x = torch.randn(2, classes + n, 8, dtype=torch.float64, requires_grad=True)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    gelu = lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))  # noqa: E731
    patches = x[:, classes:].transpose(1, 2).reshape(2, 8, *grid)
    u = gelu(normed(convolve(patches, op.conv1.weight, op.conv1.bias), op.bn1))
    v = gelu(normed(convolve(u, op.conv2.weight, op.conv2.bias, padding=1, groups=12), op.bn2))
    z = normed(convolve(u + v, op.conv3.weight, op.conv3.bias), op.bn3).flatten(2)
    slow = z.transpose(1, 2)
    if classes:
        gate = op.excitation(gelu(op.compress(z.mean(2))))
        slow = torch.cat((x[:, :1] * gate[:, None], slow), 1)
    parameters = [p for name, p in op.named_parameters() if classes or ("compress" not in name and "excit" not in name)]
    agree(op(x, grid), slow, [x, *parameters])
    before = op(x, grid)
    op.fuse()
    torch.testing.assert_close(op(x, grid), before)


def test_a_grid_of_one_row_is_a_line() -> None:
    line, plane = settle(ChannelGatedFeedForward(8, dims=1)), settle(ChannelGatedFeedForward(8))
    state = dict(line.state_dict())
    for name, value in plane.state_dict().items():
        if value.ndim == 4:
            wide = torch.zeros_like(value)
            wide[:, :, value.shape[2] // 2] = state[name]
            state[name] = wide
    plane.load_state_dict(state)
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plane(x, (1, 7)), line(x, (7,)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="must divide dim=10"):
        HeadTokenAttention(10, 4)
    with pytest.raises(ValueError, match="patch_size is 6"):
        OverlappingPatches(8, 6)
    with pytest.raises(ValueError, match="multiple of 8"):
        OverlappingPatches(12, 16)
    with pytest.raises(ValueError, match="dim is 3"):
        ChannelGatedFeedForward(3)
    with pytest.raises(ValueError, match="kernel_size is 4"):
        ChannelGatedFeedForward(8, kernel_size=4)
    with pytest.raises(ValueError, match="no grid of"):
        ChannelGatedFeedForward(8)(torch.zeros(1, 11, 8), (3, 3))
