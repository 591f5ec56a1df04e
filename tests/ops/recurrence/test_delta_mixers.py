"""Linear attention with decays and delta rules: chunks against one step after the other, in float64, with gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from nearfar.ops.recurrence.delta import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    chunked_recurrence,
    decayed_products,
)
from nearfar.ops.recurrence.mamba2 import Mamba2
from nearfar.ops.recurrence.rwkv7 import RWKV7TimeMix

DIM = 12


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(ours, theirs, wanted):
    """Outputs, and gradients of all `wanted`, agree to 1e-9."""
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    weights = [torch.randn_like(one) for one in ours]
    a, b = (torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights)), wanted) for out in (ours, theirs))
    for one, two in zip(a, b):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9 * float(1 + two.abs().max()))


def one_by_one(q, k, v, g, a, b, state):
    out = []
    for t in range(q.shape[-2]):
        state = torch.exp(g[..., t, :])[..., None] * state
        if a is not None:
            u = (a[..., t, :, None] * state).sum(-2)
            state = state + (k if b is None else b)[..., t, :, None] * u[..., None, :]
        state = state + k[..., t, :, None] * v[..., t, None, :]
        out.append((q[..., t, :, None] * state).sum(-2))
    return torch.stack(out, -2), state


@pytest.mark.parametrize("n", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("decays", [1, 5], ids=["per head", "per channel"])
@pytest.mark.parametrize("form", ["linear", "delta", "rank one"])
def test_chunks_equal_single_steps(n, decays, form):
    q, k, a, b = (0.4 * torch.randn(2, 3, n, 5) for _ in range(4))
    v, g, state = torch.randn(2, 3, n, 4), -3 * torch.rand(2, 3, n, decays), torch.randn(2, 3, 5, 4)
    a, b = None if form == "linear" else a, b if form == "rank one" else None
    wanted = [t.requires_grad_() for t in (q, k, v, g, a, b, state) if t is not None]
    ours = chunked_recurrence(q, k, v, g, a, b, state, chunk=8)
    same(ours, one_by_one(q, k, v, g, a, b, state), wanted)


@pytest.mark.parametrize("decays", [1, 4])
def test_a_fast_decay_neither_overflows_nor_blurs_its_neighbours(decays):
    q, k, v = (torch.randn(1, 64, 4) for _ in range(3))
    g = -0.01 * torch.rand(1, 64, decays)
    g[:, 20] = -1e5
    state = torch.randn(1, 4, 4)
    expected, last = one_by_one(q, k, v, g, None, None, state)
    o, after = chunked_recurrence(*(t.float() for t in (q, k, v, g)), state=state.float())
    for ours, theirs in ((o.double(), expected), (after.double(), last)):
        assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_decayed_products():
    q, k, g = torch.randn(8, 3), torch.randn(8, 3), -torch.rand(8, 3)
    expected = torch.zeros(8, 8)
    for t in range(8):
        for s in range(t):
            expected[t, s] = (q[t] * k[s] * torch.exp(g[s + 1 : t + 1].sum(0))).sum()
    torch.testing.assert_close(decayed_products(q, k, g), expected, rtol=1e-12, atol=1e-12)


def convolved(m, x):
    qkv = torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], -1)
    if m.conv is not None:
        taps = m.conv.weight[:, 0]
        padded = F.pad(qkv, (0, 0, taps.shape[1] - 1, 0))
        qkv = F.silu(sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1])))
    keys = m.num_heads * m.key_dim
    return qkv.split([keys, keys, m.num_heads * m.value_dim], -1)


def slow_memory(m, x):
    """Head by head and position by position, as the docstrings have it."""
    out, width, values = [], m.key_dim, m.value_dim
    q, k, v = convolved(m, x)
    for h in range(m.num_heads):
        part, own = slice(h * width, (h + 1) * width), slice(h * values, (h + 1) * values)
        state = torch.zeros(len(x), width, values)
        rows = []
        for t in range(x.shape[1]):
            key, query = k[:, t, part], q[:, t, part] / math.sqrt(width)
            now, gate, beta = x[:, t], 1.0, None
            if isinstance(m, GatedLinearAttention):
                decay = torch.sigmoid(m.gk_proj(now)[:, part]) ** (1 / m.normalizer)
                gate = F.silu(m.g_proj(now)[:, own])
            else:
                key, query = (
                    z / torch.sqrt((z**2).sum(-1, keepdim=True) + e) for z, e in ((key, 1e-6), (query, 1e-6 / width))
                )
                query = query / math.sqrt(width)
                beta = torch.sigmoid(m.b_proj(now)[:, h, None]) * (2 if m.negative else 1)
                decay = torch.ones(1, 1)
            if isinstance(m, GatedDeltaNet):
                decay = torch.exp(-torch.exp(m.A_log[h]) * F.softplus(m.a_proj(now)[:, h, None] + m.dt_bias[h]))
                gate = F.silu(m.g_proj(now)[:, own])
            if isinstance(m, KimiDeltaAttention):
                step = (m.f_b_proj(m.f_a_proj(now)) + m.dt_bias)[:, part]
                rate = torch.exp(m.A_log[h])
                log = -rate * F.softplus(step) if m.lower_bound is None else m.lower_bound * torch.sigmoid(rate * step)
                decay, gate = torch.exp(log), torch.sigmoid(m.g_b_proj(m.g_a_proj(now)))[:, own]
            state = decay[..., None] * state
            new = v[:, t, own]
            if beta is not None:
                new = beta * (new - (key[:, :, None] * state).sum(1))
            state = state + key[:, :, None] * new[:, None]
            o = (query[:, :, None] * state).sum(1)
            rows.append(m.norm.weight * o / torch.sqrt((o**2).mean(-1, keepdim=True) + m.norm.eps) * gate)
        out.append(torch.stack(rows, 1))
    return m.out_proj(torch.cat(out, -1))


def slow_rwkv7(m, x):
    before, out, width = torch.zeros_like(x[:, 0]), [], DIM // m.num_heads
    states = [torch.zeros(len(x), width, width) for _ in range(m.num_heads)]
    for t in range(x.shape[1]):
        now = x[:, t]
        of = dict(zip("rwkvag", (now + (before - now) * mix for mix in m.mix)))
        before = now
        r, k, v = m.r_proj(of["r"]), m.k_proj(of["k"]), m.v_proj(of["v"])
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(m.w_0 + m.w_up(torch.tanh(m.w_down(of["w"])))))
        a = torch.sigmoid(m.a_0 + m.a_up(m.a_down(of["a"])))
        gate = m.g_up(torch.sigmoid(m.g_down(of["g"])))
        kappa, k = k * m.k_k, k * (1 + (a - 1) * m.k_a)
        rows = []
        for h in range(m.num_heads):
            part = slice(h * width, (h + 1) * width)
            unit = kappa[:, part] / kappa[:, part].norm(dim=-1, keepdim=True)
            removed = (unit[:, :, None] * states[h]).sum(1)
            states[h] = (
                decay[:, part, None] * states[h]
                - (a[:, part] * unit)[:, :, None] * removed[:, None]
                + k[:, part, None] * v[:, None, part]
            )
            y = (r[:, part, None] * states[h]).sum(1)
            y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, correction=0) + 64e-5)
            y = y * m.norm.weight[part] + m.norm.bias[part]
            rows.append(y + (r * k)[:, part].mul(m.r_k[h]).sum(-1, keepdim=True) * v[:, part])
        out.append(m.out_proj(gate * torch.cat(rows, -1)))
    return torch.stack(out, 1)


def slow_mamba2(m, x):
    shared = m.groups * m.d_state
    z, xbc, dt = m.in_proj(x).split([m.inner, m.inner + 2 * shared, m.heads], -1)
    taps = m.conv.weight[:, 0]
    padded = F.pad(xbc, (0, 0, taps.shape[1] - 1, 0))
    xbc = F.silu(sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1])) + m.conv.bias)
    out = []
    for h in range(m.heads):
        own, group = slice(h * m.head_dim, (h + 1) * m.head_dim), h // (m.heads // m.groups)
        state, rows = torch.zeros(len(x), m.head_dim, m.d_state), []
        for t in range(x.shape[1]):
            u = xbc[:, t, own]
            b, c = (xbc[:, t, m.inner + i * shared :][:, group * m.d_state :][:, : m.d_state] for i in (0, 1))
            step = F.softplus(dt[:, t, h] + m.dt_bias[h])[:, None]
            decay = torch.exp(-step * torch.exp(m.A_log[h]))[..., None]
            state = decay * state + (step * u)[:, :, None] * b[:, None]
            rows.append((state * c[:, None]).sum(-1) + m.D[h] * u)
        out.append(torch.stack(rows, 1))
    y = torch.cat(out, -1) * F.silu(z)
    return m.out_proj(m.norm.weight * y / torch.sqrt((y**2).mean(-1, keepdim=True) + m.norm.eps))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba2(DIM, d_state=5, head_dim=6, groups=2, chunk=8),
        lambda: DeltaNet(DIM, 2, chunk=8),
        lambda: DeltaNet(DIM, 3, conv_size=0, negative=True, chunk=8),
        lambda: GatedDeltaNet(DIM, 2, chunk=8),
        lambda: GatedDeltaNet(DIM, 2, head_dim=5, expand=1, negative=True),
        lambda: KimiDeltaAttention(DIM, 2, chunk=8),
        lambda: KimiDeltaAttention(DIM, 2, head_dim=4, lower_bound=-5.0, gate_bias=True, chunk=16),
        lambda: GatedLinearAttention(DIM, 2, chunk=8),
        lambda: GatedLinearAttention(DIM, 3, expand_k=1.0, rank=4, normalizer=4.0, conv_size=3),
        lambda: RWKV7TimeMix(DIM, 2, chunk=8),
        lambda: RWKV7TimeMix(DIM, 3, rank=5, gate_rank=7),
    ],
)
def test_mixers_equal_their_formulas(make):
    mixer = make()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 21, DIM, requires_grad=True)
    slow = {RWKV7TimeMix: slow_rwkv7, Mamba2: slow_mamba2}.get(type(mixer), slow_memory)
    same([mixer(x)], [slow(mixer, x)], [x, *mixer.parameters()])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeltaNet(12, 5),
        lambda: DeltaNet(12, 2, chunk=48),
        lambda: DeltaNet(12, 2, conv_size=-1),
        lambda: GatedDeltaNet(12, 0),
        lambda: KimiDeltaAttention(12, 5),
        lambda: KimiDeltaAttention(12, 2, lower_bound=1.0),
        lambda: GatedLinearAttention(12, 4, expand_k=0.6),
        lambda: GatedLinearAttention(12, 4, rank=0),
        lambda: RWKV7TimeMix(12, 5),
        lambda: Mamba2(12, head_dim=5),
        lambda: RWKV7TimeMix(12, 2, rank=0),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match=r"\d"):
        make()
