"""The parts of D-Mixer against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.convolution.dmixer import (
    DMixer,
    IDConv,
    MultiScaleFFN,
    OverlappingReductionAttention,
    resize_table,
)


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def settle(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.uniform_(-1, 1)
    return module.double().eval()


@pytest.mark.parametrize("size", [(11,), (9, 5), (4, 6, 5)])
def test_idconv_is_its_formula(size: tuple[int, ...]) -> None:
    operator = settle(IDConv(8, 3, 3, dims=len(size)))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    share = operator.proj(pool(x, 3)).reshape(2, 3, 8, *[3] * len(size)).softmax(1)
    kernel = (share * operator.weight).sum(1)
    share = operator.proj(pool(x, 1)).reshape(2, 3, 8).softmax(1)
    bias = (share * operator.bias).sum(1)
    slow = [convolve(a[None], k[:, None], b, padding=1, groups=8) for a, k, b in zip(x, kernel, bias, strict=True)]
    agree(operator(x), torch.cat(slow), [x, *operator.parameters()])


@pytest.mark.parametrize(("size", "ratio"), [((7, 7), 1), ((8, 12), 2), ((9, 7), 4)])
def test_attention_is_its_softmax(size: tuple[int, int], ratio: int) -> None:
    operator = settle(OverlappingReductionAttention(6, 3, ratio))
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    y = x
    if ratio > 1:
        conv, norm = operator.sr[0].conv, operator.sr[0].bn
        y = F.gelu(norm(F.conv2d(x, conv.weight, stride=ratio, padding=(ratio + 3) // 2, groups=6)))
        y = operator.sr[1].bn(y * operator.sr[1].conv.weight[:, 0])
    y = y + F.conv2d(y, operator.local_conv.weight, operator.local_conv.bias, padding=1, groups=6)
    n, m = math.prod(size), y.shape[2] * y.shape[3]
    position = torch.randn(1, 3, n, m, dtype=torch.float64, requires_grad=True)
    key, value = operator.kv(y).flatten(2).split(6, 1)
    query, out = operator.q(x).flatten(2), []
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        weights = (query[:, part].mT @ key[:, part] / math.sqrt(2) + position[:, head]).softmax(-1)
        torch.testing.assert_close(operator.attention_map(x, position)[:, head], weights)
        out.append(value[:, part] @ weights.mT)
    agree(operator(x, position), torch.cat(out, 1).reshape(x.shape), [x, position, *operator.parameters()])


def test_tables_of_other_sizes() -> None:
    table = torch.randn(1, 2, 16, 4, dtype=torch.float64)
    assert resize_table(table, (4, 4), (2, 2)) is table
    flat = resize_table(table, (3, 5), (2, 3))
    torch.testing.assert_close(flat, F.interpolate(table, (15, 6), mode="bicubic"))
    # a table that depends on the key's row alone still does, in every query, after a spatial resize
    rows = torch.tensor([0.0, 1.0])[None, None, None, :, None].expand(1, 2, 16, 2, 2).reshape(1, 2, 16, 4)
    spatial = resize_table(rows, (3, 5), (2, 3), "spatial").reshape(2, 15, 2, 3)
    torch.testing.assert_close(spatial, spatial[:, :1, :, :1].expand(2, 15, 2, 3))
    torch.testing.assert_close(resize_table(table, (4, 4), (2, 2), "spatial"), table)


def test_mixer_joins_its_halves() -> None:
    operator = settle(DMixer(16, 3, num_heads=2, sr_ratio=2))
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    mixed = torch.cat((operator.local_unit(x[:, :8]), operator.global_unit(x[:, 8:])), 1)
    torch.testing.assert_close(operator(x), mixed + operator.proj(mixed))
    before = operator(x)
    operator.fuse()
    torch.testing.assert_close(operator(x), before)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_multi_scale_ffn(dims: int) -> None:
    operator = settle(MultiScaleFFN(4, 10, (1, 3, 5), dims=dims))
    x = torch.randn(2, 4, *[5, 4, 3][:dims], dtype=torch.float64, requires_grad=True)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    u = operator.fc1[2](F.gelu(convolve(x, operator.fc1[0].weight)))
    parts = []
    for conv, start, end in zip(operator.dwconv.proj, (0, 4, 7), (4, 7, 10), strict=True):
        size = conv.weight.shape[-1]
        parts.append(convolve(u[:, start:end], conv.weight, conv.bias, padding=size // 2, groups=end - start))
    y = operator.norm(F.gelu(torch.cat(parts, 1) + u))
    slow = operator.fc2[1](convolve(y, operator.fc2[0].weight))
    agree(operator(x), slow, [x, *operator.parameters()])
    before = operator(x)
    operator.fuse()
    torch.testing.assert_close(operator(x), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IDConv(8, 4), "kernel_size is 4"),
        (lambda: IDConv(8, groups=1), "groups is 1"),
        (lambda: OverlappingReductionAttention(8, 3), "num_heads=3"),
        (lambda: OverlappingReductionAttention(8, sr_ratio=0), "sr_ratio is 0"),
        (lambda: OverlappingReductionAttention(8, table="round"), "round"),
        (lambda: DMixer(7), "dim is 7"),
        (lambda: MultiScaleFFN(8, 3), "hidden is 3"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
