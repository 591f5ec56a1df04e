"""The mixer gate and the Fourier gate against their formulas, and the mixing matrices on other grids."""

import math

import pytest
import torch
from torch import nn

from nearfar.ops.tokens.mixer_gate import FourierGate, MixerBlock, MixerGate, resize_tokens


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-12)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def normed(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("bounded", [False, True])
def test_mixer_gate_is_its_formula(bounded: bool) -> None:
    op = MixerGate(6, 5, 7, 8, bounded=bounded).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    m, (w1, _, _, w2, _), (v1, _, _, v2, _) = op.mixer, op.mixer.token_mix, op.mixer.channel_mix
    y = normed(x, m.token_norm)
    hidden = gelu(torch.einsum("tn,bnc->btc", w1.weight, y) + w1.bias[:, None])
    y = x + torch.einsum("nt,btc->bnc", w2.weight, hidden) + w2.bias[:, None]
    y = y + gelu(normed(y, m.channel_norm) @ v1.weight.T + v1.bias) @ v2.weight.T + v2.bias
    slow = (x @ op.proj.weight.T + op.proj.bias) * (torch.tanh(y) if bounded else y)
    agree(op(x), slow, [x, *op.parameters()])


@pytest.mark.parametrize(("n", "c"), [(5, 6), (8, 3), (1, 4)])
def test_fourier_gate_is_its_sum(n: int, c: int) -> None:
    op = FourierGate(c).double()
    x = torch.randn(2, n, c, dtype=torch.float64, requires_grad=True)
    rows, columns = (torch.outer(torch.arange(k), torch.arange(k)).double() / k for k in (n, c))
    angles = 2 * math.pi * (rows[:, None, :, None] + columns[None, :, None, :])  # n, c, p, q
    gate = torch.einsum("bpq,ncpq->bnc", x, angles.cos())
    agree(op(x), (x @ op.proj.weight.T + op.proj.bias) * gate, [x, *op.parameters()])


@torch.no_grad()
def test_the_exported_fourier_gate_has_no_complex_numbers() -> None:
    op, x = FourierGate(6).eval(), torch.randn(2, 5, 6)
    program = torch.export.export(op, (x,))
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    torch.testing.assert_close(program.module()(x), op(x), atol=1e-4, rtol=1e-5)


def test_resized_matrices_mix_a_constant_field_alike() -> None:
    torch.manual_seed(0)
    block = MixerBlock(4, 12, 10, 6)
    same = MixerBlock(4, 12, 10, 6)
    same.load_state_dict(block.state_dict())
    x = torch.randn(2, 12, 4)
    same.resize((3, 4), (3, 4))
    torch.testing.assert_close(same(x), block(x))
    block.resize((3, 4), (6, 4))
    assert block(torch.randn(2, 24, 4)).shape == (2, 24, 4)
    rows = torch.ones(3, 12)
    constant = resize_tokens(rows, (3, 4), (6, 8), total=True)
    torch.testing.assert_close(constant.sum(1), rows.sum(1))
    torch.testing.assert_close(resize_tokens(rows, (3, 4), (5, 2)), torch.ones(3, 10))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="token_hidden is 0"):
        MixerGate(4, 4, 0, 4)
    with pytest.raises(ValueError, match="dim is 0"):
        FourierGate(0)
    with pytest.raises(ValueError, match="5 tokens; the mixing matrices are made for 4"):
        MixerGate(4, 4, 4, 4)(torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="do not lie on a grid"):
        resize_tokens(torch.zeros(2, 12), (3, 3), (4, 4))
