"""Context mixing and its parts against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.convolution.contmix import (
    ContextMixer,
    ContMixBlock,
    GlobalResponseNorm,
    RepConvBlock,
    clamped_window_sum,
)
from nearfar.ops.convolution.reparam import BRANCHES, DilatedReparam, ResidualDepthwise


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs, allow_unused=True),
        torch.autograd.grad((slow * probe).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def settle(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.uniform_(-1, 1)
    return module.double().eval()


def slow_window_sum(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Position by position; `weights` (B, G, H, W, k, k)."""
    k, (height, width) = weights.shape[-1], value.shape[-2:]
    out = torch.zeros_like(value)
    for i in range(height):
        for j in range(width):
            top, left = min(max(i - k // 2, 0), height - k), min(max(j - k // 2, 0), width - k)
            window = value[..., top : top + k, left : left + k]
            place = torch.zeros_like(out)
            place[..., i, j] = 1
            out = out + place * (weights[:, :, i, j, None] * window).sum((-2, -1))[..., None, None]
    return out


@pytest.mark.parametrize(("size", "kernel"), [((6, 5), 3), ((5, 7), 5), ((5, 5), 5)])
def test_window_sum_is_its_definition(size: tuple[int, int], kernel: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, 3, *size, kernel, kernel, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 3, 4, *size, dtype=torch.float64, requires_grad=True)
    agree(clamped_window_sum(weights.transpose(3, 4), value), slow_window_sum(weights, value), [weights, value])


def slow_mix(m: ContextMixer, source: torch.Tensor, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The formula head by head, for maps that are large enough."""
    (height, width), heads = value.shape[-2:], m.heads
    channels = value.shape[1]
    query = m.weight_query(source) * (channels / heads) ** -0.5
    pooled = F.adaptive_avg_pool2d(context, 7)
    key = m.weight_key[2](m.weight_key[1](pooled))
    d, c = query.shape[1] // heads, channels // heads // 2
    out = []
    for part, (k, table) in enumerate(((m.small_kernel, m.rpb1), (m.kernel_size, m.rpb2))):
        taps = slice(0, m.small_kernel**2) if part == 0 else slice(m.small_kernel**2, None)
        for g in range(heads):
            affinity = torch.einsum("bdhw,bdl->bhwl", query[:, g * d : g * d + d], key[:, g * d : g * d + d].flatten(2))
            logits = (affinity @ m.weight_proj.weight.T + m.weight_proj.bias)[..., taps].unflatten(-1, (k, k))
            rows = []
            for i in range(height):
                for j in range(width):
                    r = min(max(i - k // 2, 0), height - k) - i + k - 1
                    s = min(max(j - k // 2, 0), width - k) - j + k - 1
                    rows.append((logits[:, i, j] + table[g, r : r + k, s : s + k]).flatten(1).softmax(1))
            weights = torch.stack(rows, 1).reshape(len(value), 1, height, width, k, k)
            start = part * channels // 2 + g * c
            out.append(slow_window_sum(weights, value[:, None, start : start + c])[:, 0])
    return torch.cat(out, 1)


def test_context_mixing_is_its_formula() -> None:
    mixer = settle(ContextMixer(8, 6, 1, 7, 3))
    source, context, value = (torch.randn(2, n, 8, 9, dtype=torch.float64, requires_grad=True) for n in (8, 6, 8))
    fast = mixer.mix(source, context, value)
    agree(fast, slow_mix(mixer, source, context, value), [source, context, value, *mixer.parameters()])


@pytest.mark.parametrize(("size", "enlarged"), [((4, 6), (7, 10)), ((9, 5), (12, 7)), ((3, 3), (7, 7))])
def test_small_maps_are_enlarged(size: tuple[int, int], enlarged: tuple[int, int]) -> None:
    mixer = settle(ContextMixer(8, 6, 1, 7, 3))
    maps = [torch.randn(1, n, *size, dtype=torch.float64) for n in (8, 6, 8)]
    larger = [F.interpolate(x, size=enlarged, mode="bilinear") for x in maps]
    want = F.adaptive_avg_pool2d(slow_mix(mixer, *larger), size)
    torch.testing.assert_close(mixer.mix(*maps), want)


@pytest.mark.parametrize("kernel", list(BRANCHES))
def test_merged_kernels_give_the_same(kernel: int) -> None:
    operator = settle(DilatedReparam(3, kernel))
    x = torch.randn(1, 3, 21, 20, dtype=torch.float64)
    before = operator(x)
    operator.fuse()
    operator.fuse()
    torch.testing.assert_close(operator(x), before)
    assert set(operator.state_dict()) == {"lk_origin.weight", "lk_origin.bias"}
    DilatedReparam(3, kernel, merged=True).double().load_state_dict(operator.state_dict())


@pytest.mark.parametrize("dims", [1, 3])
def test_merged_kernels_in_other_dimensions(dims: int) -> None:
    operator = settle(DilatedReparam(3, 5, dims=dims))
    x = torch.randn(1, 3, *[7, 6, 5][:dims], dtype=torch.float64)
    before = operator(x)
    operator.fuse()
    torch.testing.assert_close(operator(x), before)


@pytest.mark.parametrize("res_scale", [True, False])
def test_blocks_fuse(res_scale: bool) -> None:
    for block in (
        RepConvBlock(16, 5, 2, 0.5, res_scale=res_scale),
        ContMixBlock(16, 5, 3, 2, 2, 0.5, res_scale=res_scale),
        ResidualDepthwise(16, 3),
    ):
        settle(block)
        x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
        before = block(x)
        block.fuse()
        torch.testing.assert_close(block(x), before)


def test_response_norm_is_its_formula() -> None:
    norm = settle(GlobalResponseNorm(5))
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    energy = x.square().sum((2, 3)).sqrt()
    share = (energy / (energy.mean(1, keepdim=True) + 1e-6))[..., None, None]
    agree(norm(x), (norm.gamma * share + 1) * x + norm.beta, [x, *norm.parameters()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DilatedReparam(4, 6), "kernel_size is 6"),
        (lambda: ContMixBlock(10), "multiple of 4 num_heads"),
        (lambda: ContMixBlock(16, small_kernel=4), "small_kernel is 4"),
        (lambda: clamped_window_sum(torch.zeros(1, 1, 3, 5, 3, 5), torch.zeros(1, 1, 2, 3, 3)), "smaller than"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
