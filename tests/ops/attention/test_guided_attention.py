"""Position and channel attention and the guided parts against the formulas, masks, half precision."""

import pytest
import torch
from torch import Tensor

from nearfar.ops.attention.guided import AttentionLayer, GuidedStack, PyramidFusion, SemanticModule
from nearfar.ops.attention.position_channel import ChannelAttention, PositionAttention

SIZES = {1: (12,), 2: (4, 5), 3: (2, 3, 4)}


def slow_position(module: PositionAttention, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    q, k, v = (
        torch.einsum("oc,bcn->bon", layer.weight.flatten(1), flat) + layer.bias[:, None]
        for layer in (module.query, module.key, module.value)
    )
    energy = torch.einsum("bci,bcj->bij", q, k)
    if module.causal:
        energy = energy.masked_fill(torch.ones_like(energy[0]).triu(1).bool(), -torch.inf)
    return (module.gamma * torch.einsum("bij,bcj->bci", energy.softmax(-1), v)).view_as(x) + x


def slow_channel(module: ChannelAttention, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    energy = flat @ flat.mT
    attention = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
    return (module.gamma * (attention @ flat)).view_as(x) + x


def check(module: torch.nn.Module, slow, x: Tensor) -> None:
    x.requires_grad_()
    ours, theirs = module(x), slow(module, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    direction = torch.randn_like(ours)
    inputs = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad((ours * direction).sum(), inputs), torch.autograd.grad((theirs * direction).sum(), inputs)
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dims", "causal"), [(1, False), (1, True), (2, False), (3, False)])
def test_position_attention(dims: int, causal: bool) -> None:
    module = PositionAttention(16, dims=dims, causal=causal).double()
    torch.nn.init.constant_(module.gamma, 0.7)
    check(module, slow_position, torch.randn(2, 16, *SIZES[dims], dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channel_attention(dims: int) -> None:
    module = ChannelAttention().double()
    torch.nn.init.constant_(module.gamma, 0.7)
    check(module, slow_channel, 0.3 * torch.randn(2, 6, *SIZES[dims], dtype=torch.float64))


def test_both_start_as_the_identity() -> None:
    x = torch.randn(1, 8, 5, 6)
    torch.testing.assert_close(PositionAttention(8)(x), x)
    torch.testing.assert_close(ChannelAttention()(x), x)


def test_position_attention_is_equivariant_to_permutations() -> None:
    module = PositionAttention(8, dims=1)
    torch.nn.init.ones_(module.gamma)
    x, order = torch.randn(1, 8, 10), torch.randperm(10)
    torch.testing.assert_close(module(x[..., order]), module(x)[..., order])


def test_channel_attention_survives_half_precision() -> None:
    module = ChannelAttention()
    torch.nn.init.ones_(module.gamma)
    x = 3 * torch.randn(1, 4, 200, 200)  # energies of 360,000: beyond what float16 holds
    assert torch.isfinite(module(x.half())).all()
    torch.testing.assert_close(module.half()(x.half()).float(), module.float()(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_guided_stack(dims: int) -> None:
    size = (8,) * dims
    stack = GuidedStack(8, 2, dims=dims).eval()
    maps = [torch.randn(2, 16, *size) for _ in range(2)]
    attended, codes, reconstructions = stack(maps)
    assert [y.shape for y in attended] == [(2, 8, *size)] * 2
    assert [c.shape for c in codes] == [(2, 64, *(2,) * dims)] * 2
    code, rebuilt = stack.semantic(maps[1])  # one semantic module serves all scales
    torch.testing.assert_close(codes[1], code)
    torch.testing.assert_close(reconstructions[1], rebuilt)
    expected = stack.out[1]((stack.position[1](maps[1]) + stack.channel[1](maps[1])) * stack.guide[1](rebuilt))
    torch.testing.assert_close(attended[1], expected)


def test_fusion_brings_all_to_the_first_grid() -> None:
    fusion = PyramidFusion((4, 6, 8), 5).eval()
    down, fused = fusion([torch.randn(1, 4, 12, 8), torch.randn(1, 6, 6, 4), torch.randn(1, 8, 3, 2)])
    assert [d.shape for d in down] == [(1, 5, 12, 8)] * 3
    torch.testing.assert_close(fused, fusion.fuse(torch.cat([down[2], down[1], down[0]], 1)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="qk_dim"):
        PositionAttention(4)
    with pytest.raises(ValueError, match="causal"):
        PositionAttention(8, causal=True)
    with pytest.raises(ValueError, match="multiples of 4"):
        SemanticModule(4)(torch.zeros(1, 4, 6, 8))
    with pytest.raises(ValueError, match="dims"):
        AttentionLayer(4, 4, torch.nn.Identity(), dims=5)


def test_gradients_of_exact_products_are_those_in_float64():
    """In eval mode the largest product is subtracted in place, which must not reach the gradient."""
    torch.manual_seed(0)
    layer = PositionAttention(16).eval()
    torch.nn.init.constant_(layer.gamma, 0.5)
    wide = PositionAttention(16).double()
    wide.load_state_dict(layer.state_dict())
    x, weight = torch.randn(1, 16, 6, 6), torch.randn(1, 16, 6, 6)
    found = torch.autograd.grad((layer(x) * weight).sum(), list(layer.parameters()))
    right = torch.autograd.grad((wide(x.double()) * weight.double()).sum(), list(wide.parameters()))
    for a, b in zip(found, right):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
