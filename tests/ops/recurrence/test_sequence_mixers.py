"""Each sequence mixer against its obvious slow form, in float64, outputs and gradients."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nearfar.core.tensor_memory import peak_memory
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.causal import ExplicitLongConv, ShortConv, fast_length, fft_convolution
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.recurrence import based, rwkv4
from nearfar.ops.recurrence.based import Based, taylor_features
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba, selective_scan
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4TimeMix
from nearfar.ops.tokens.selective_lookup import SelectiveLookup

D, N = 6, 75


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(module, oracle, x=None):
    """Outputs and the gradients of input and parameters agree to 1e-9."""
    x = torch.randn(2, N, D) if x is None else x
    x.requires_grad_()
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    ours, theirs = module(x), oracle(module, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(ours)
    a = torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True)
    b = torch.autograd.grad((theirs * weight).sum(), wanted, allow_unused=True)
    for one, two in zip(a, b):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9 * float(1 + two.abs().max()))


def slow_attention(m, x):
    q, k, v = m.qkv(x).chunk(3, -1)
    out = torch.zeros_like(x)
    c = D // m.num_heads
    for h in range(m.num_heads):
        part = slice(h * c, h * c + c)
        rows = []
        for i in range(x.shape[1]):
            first = 0 if m.window is None else max(0, i - m.window)
            scores = (q[:, i, None, part] * k[:, first : i + 1, part]).sum(-1) / math.sqrt(c)
            rows.append((scores.softmax(-1)[..., None] * v[:, first : i + 1, part]).sum(1))
        out = torch.cat([out[..., : h * c], torch.stack(rows, 1), out[..., h * c + c :]], -1)
    return m.out_proj(out)


@pytest.mark.parametrize("window", [None, 1, 8, 74])
def test_attention(window):
    same(CausalAttention(D, num_heads=2, window=window), slow_attention)


def slow_convolution(x, taps):
    """y[t] = sum_s taps[s] x[t-s], taps (d, K)."""
    return torch.stack(
        [sum(taps[:, s] * x[:, t - s] for s in range(min(t + 1, taps.shape[1]))) for t in range(x.shape[1])],
        1,
    )


@pytest.mark.parametrize("n", [1, 2, 7, 64, 75, 100])
def test_fft_convolution_does_not_wrap(n):
    x, taps = torch.randn(2, n, 3), torch.randn(3, n)
    torch.testing.assert_close(fft_convolution(x.mT, taps).mT, slow_convolution(x, taps), rtol=1e-9, atol=1e-9)


def test_fast_lengths_are_long_enough():
    for n in range(1, 3000):
        assert n <= fast_length(n) < 2 * n + 1


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("kernel_size", [3, 12, -1])
def test_base_conv(kernel_size, activation):
    def oracle(m, x):
        if kernel_size > 0:
            u = slow_convolution(x, m.conv.weight[:, 0].flip(-1)) + m.conv.bias
        else:
            u = slow_convolution(x, m.conv.taps(N)) + x
        gate = m.projection(x)
        return (F.silu(u) * F.silu(gate) if activation else u * gate) + x

    same(BaseConv(D, kernel_size, max_length=90, activation=activation), oracle)


def test_the_published_transform_leaks_and_ours_does_not():
    x = torch.randn(1, 20, 4)
    late = x.clone()
    late[:, -1] += 1
    leaks = ExplicitLongConv(4, 64, wrap=True)
    assert (leaks(late) - leaks(x))[:, 0].abs().max() > 1e-3
    tight = ExplicitLongConv(4, 64)
    tight.load_state_dict(leaks.state_dict())
    assert (tight(late) - tight(x))[:, :-1].abs().max() < 1e-12
    full = torch.randn(1, 64, 4)
    torch.testing.assert_close(leaks(full), tight(full))
    with pytest.raises(ValueError, match="wrap"):
        leaks.extend(x)


def test_hyena():
    def oracle(m, x):
        u = slow_convolution(m.in_proj(x), m.short.weight[:, 0].flip(-1)) + m.short.bias
        x1, x2, v = u.chunk(3, -1)
        v = v * x1
        return m.out_proj((slow_convolution(v, m.filter.taps(N)) + m.filter.bias * v) * x2)

    same(Hyena(D, max_length=90, order=8), oracle)


def test_taylor_features_are_the_second_order_exponential():
    q, k = torch.randn(5, 7), torch.randn(5, 7)
    s = (q * k).sum(-1) / math.sqrt(7)
    for compressed in (False, True):
        phi = [taylor_features(t, compressed) for t in (q, k)]
        assert phi[0].shape[-1] == (1 + 7 + 28 if compressed else 1 + 7 + 49)
        torch.testing.assert_close((phi[0] * phi[1]).sum(-1), 1 + s + s * s / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [8, 25, 200])
def test_based(chunk, monkeypatch):
    def oracle(m, x):
        q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
        rows = []
        for t in range(N):
            s = (q[:, t, None] * k[:, : t + 1]).sum(-1) / math.sqrt(5)
            w = 1 + s + s * s / 2
            rows.append((w[..., None] * v[:, : t + 1]).sum(1) / (w.sum(1)[..., None] + 1e-12))
        return m.out_proj(torch.stack(rows, 1).flatten(2))

    same(Based(D, num_heads=2, feature_dim=5, chunk=chunk), oracle)
    monkeypatch.setattr(based, "QUADRATIC_LENGTH", 0)  # so that chunks are taken at this length too
    same(Based(D, num_heads=2, feature_dim=5, chunk=chunk), oracle)


@pytest.mark.parametrize("chunk", [8, 25, 200])
def test_retention(chunk):
    def oracle(m, x):
        q, k, v = (p(x).unflatten(-1, (m.num_heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
        c = q.shape[-1]
        angle = torch.arange(N)[:, None] * 10000.0 ** (-torch.arange(c // 2) / (c // 2))
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def rotated(t):
            z = torch.complex(t[..., : c // 2], t[..., c // 2 :]) * turn
            return torch.cat([z.real, z.imag], -1)

        q, k = rotated(q) / math.sqrt(c), rotated(k)
        gamma = 1 - 2.0 ** (-5 - torch.arange(m.num_heads))
        rows = []
        for t in range(N):
            w = (q[:, t, None] * k[:, : t + 1]).sum(-1) * gamma ** (t - torch.arange(t + 1))[:, None]
            rows.append((w[..., None] * v[:, : t + 1]).sum(1))
        o = torch.stack(rows, 1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm
        return m.out_proj(o.flatten(2) * F.silu(m.g_proj(x)))

    same(Retention(12, num_heads=3, chunk=chunk), oracle, torch.randn(2, N, 12))


def slow_wkv(decay, bonus, k, v):
    num = den = torch.zeros_like(k[:, 0])
    out = []
    for t in range(k.shape[1]):
        e = torch.exp(k[:, t])
        own = torch.exp(bonus) * e
        out.append((num + own * v[:, t]) / (den + own))
        num, den = torch.exp(decay) * num + e * v[:, t], torch.exp(decay) * den + e
    return torch.stack(out, 1)


def test_rwkv4_time_mix():
    def oracle(m, x):
        late = F.pad(x[:, :-1], (0, 0, 1, 0))
        k, v, r = (
            p(x * mix + late * (1 - mix)) for p, mix in ((m.key, m.mix_k), (m.value, m.mix_v), (m.receptance, m.mix_r))
        )
        return m.output(torch.sigmoid(r) * slow_wkv(-torch.exp(m.time_decay), m.time_first, k, v))

    same(RWKV4TimeMix(D), oracle, torch.randn(2, 300, D))


def test_rwkv4_survives_keys_that_overflow_an_exponential():
    m = RWKV4TimeMix(D).float()
    with torch.no_grad():
        m.key.weight.mul_(3000)
    y = m(torch.randn(1, 100, D, dtype=torch.float32))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("n", [1, 16, 17, 300])
def test_rwkv4_gradients_are_those_of_the_steps(n):
    """Of rates, keys, values and the sums before, through outputs and the sums after; keys from tiny to huge."""
    k, v = 30 * torch.randn(2, n, D), torch.randn(2, n, D)
    given = [-torch.rand(D), torch.randn(D), k, v, torch.randn(2, D), torch.rand(2, D), torch.randn(2, D)]
    given = [t.requires_grad_() for t in given]
    weights = torch.randn(2, n, D), *torch.randn(2, 2, D)

    def gradients(average):
        wkv, top, bottom, m = average(*given)
        results = wkv, top * (m - 30).exp(), bottom * (m - 30).exp()
        return torch.autograd.grad(sum((y * w).sum() for y, w in zip(results, weights)), given)

    for ours, steps in zip(gradients(rwkv4._WeightedAverage.apply), gradients(rwkv4.plain_average)):
        torch.testing.assert_close(ours, steps, rtol=1e-9, atol=1e-12)


def test_rwkv4_needs_little_memory():
    """At most six tensors of the text's length at a time, as a loop over positions needs."""
    mixer, x = RWKV4TimeMix(64).float(), torch.randn(1, 512, 64, dtype=torch.float32)
    with torch.no_grad():
        assert peak_memory(lambda: mixer(x)) < 6 * x.nbytes
    assert peak_memory(lambda: mixer(x).sum().backward()) < 22 * x.nbytes


COMPILED = """
import torch
from nearfar.ops.recurrence.rwkv4 import RWKV4TimeMix

mixer, x = RWKV4TimeMix(16), torch.randn(2, 40, 16)
compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    torch.testing.assert_close(compiled(x), mixer(x))
gradients = [torch.autograd.grad(run(x).sum(), mixer.key.weight) for run in (compiled, mixer)]
torch.testing.assert_close(*gradients)
"""


def test_rwkv4_compiles_as_one_graph():
    """In a process of its own, without the checks of shapes, which cannot be traced."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_h3():
    def oracle(m, x):
        q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
        n = m.d_state
        shift = torch.stack([sum(m.shift.B[:, i] * m.shift.C[:, i + t] for i in range(n - t)) for t in range(n)], 1)
        k = slow_convolution(k, shift) + m.D_k * k
        p = m.diagonal
        A = torch.complex(-torch.exp(p.log_real), p.imag)
        dt = torch.exp(p.log_dt)[:, None]
        B, C = torch.view_as_complex(p.B), torch.view_as_complex(p.C)
        step, c = (1 + dt * A / 2) / (1 - dt * A / 2), B * C * dt / (1 - dt * A / 2)
        w = m.head_dim
        state = torch.zeros(2, D // w, w, w, n // 2, dtype=torch.complex128)
        rows = []
        for t in range(N):
            kv = k[:, t].view(2, -1, w, 1) * v[:, t].view(2, -1, 1, w)
            state = state * step[:, None, None] + kv[..., None]
            y = 2 * (state * c[:, None, None]).sum(-1).real + m.D[:, None, None] * kv
            rows.append((q[:, t].view(2, -1, w, 1) * y).sum(2).mT.flatten(1))
        return m.out_proj(torch.stack(rows, 1))

    same(H3(D, d_state=8, head_dim=3), oracle)


def slow_scan(u, dt, A, B, C, state):
    out = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("n", [1, 5, 8, 64, 75, 200])
def test_selective_scan(n):
    shapes = [(2, n, 4), (2, n, 4), (4, 3), (2, n, 3), (2, n, 3), (2, 4, 3)]
    u, dt, A, B, C, h = (torch.randn(s) for s in shapes)
    dt, A = dt.abs(), -A.abs()
    given = [t.requires_grad_() for t in (u, dt, A, B, C, h)]
    ours, theirs = selective_scan(*given), slow_scan(*given)
    weights = [torch.randn_like(t) for t in theirs]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    one = torch.autograd.grad(sum((t * w).sum() for t, w in zip(ours, weights)), given)
    two = torch.autograd.grad(sum((t * w).sum() for t, w in zip(theirs, weights)), given)
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_selective_scan_in_groups_is_one_scan_per_group():
    u, dt = torch.randn(2, 20, 6), torch.rand(2, 20, 6)
    A, B, C = -torch.rand(6, 3), torch.randn(2, 20, 2, 3), torch.randn(2, 20, 2, 3)
    y, h = selective_scan(u, dt, A, B, C)
    for g in range(2):
        c = slice(3 * g, 3 * g + 3)
        yg, hg = selective_scan(u[..., c], dt[..., c], A[c], B[:, :, g], C[:, :, g])
        torch.testing.assert_close(y[..., c], yg)
        torch.testing.assert_close(h[:, c], hg)
    with pytest.raises(ValueError, match="4 groups"):
        selective_scan(u, dt, A, torch.randn(2, 20, 4, 3), torch.randn(2, 20, 4, 3))


def test_selective_scan_does_not_overflow_on_strong_decay():
    u, dt = torch.randn(1, 500, 2), torch.full((1, 500, 2), 50.0)
    y, h = selective_scan(u, dt, -torch.full((2, 4), 16.0), torch.randn(1, 500, 4), torch.randn(1, 500, 4))
    assert torch.isfinite(y).all()
    assert torch.isfinite(h).all()


def test_mamba():
    def oracle(m, x):
        u, z = m.in_proj(x).chunk(2, -1)
        u = F.silu(slow_convolution(u, m.conv.weight[:, 0].flip(-1)) + m.conv.bias)
        r, B, C = m.x_proj(u).split([m.dt_rank, m.d_state, m.d_state], -1)
        dt = torch.log1p(torch.exp(m.dt_proj(r)))
        y, _ = slow_scan(u, dt, -torch.exp(m.A_log), B, C, torch.zeros(2, 2 * D, m.d_state))
        return m.out_proj((y + m.D * u) * F.silu(z))

    same(Mamba(D, d_state=4), oracle)


def test_selective_lookup_selects_the_largest_selections():
    m = SelectiveLookup(D, num_heads=2).eval()
    x = torch.randn(3, 48, D)
    p = torch.sigmoid(m.selection(x))
    full = x + p * m.attention(x)
    rank = p.squeeze(-1).argsort(1, descending=True).argsort(1)
    expected = torch.where(rank[..., None] < 7, full, x)  # 7 = ceil(sqrt(48))
    copy = x.clone()
    torch.testing.assert_close(m(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(x, copy)
    with pytest.raises(ValueError, match="threshold"):
        m.extend(x)


def test_selective_lookup_trains_towards_few_selections():
    m = SelectiveLookup(D)
    x = torch.randn(2, 49, D)
    y, auxiliary = m.train_pass(x)
    torch.testing.assert_close(m(x), y)
    p = torch.sigmoid(m.selection(x))
    assert auxiliary.item() == pytest.approx(1e-3 * max(0.0, p.mean().item() - 1 / 7))
    auxiliary.backward()
    assert m.selection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("before", [0, "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_short_convolutions_that_onednn_computes(kernel_size, before, bias):
    """Of many float32 numbers: outputs, gradients and their gradients as of the shifted sum in float64."""
    before = kernel_size - 1 if before == "all" else 0
    slow, fast = ShortConv(64, kernel_size, bias), ShortConv(64, kernel_size, bias).float()
    fast.load_state_dict(slow.state_dict())
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 300, 64, dtype=torch.float32)
    found = []
    for module, dtype in ((slow, torch.float64), (fast, torch.float32)):
        inputs = [x.to(dtype).requires_grad_(), *module.parameters()]
        y = module.convolve(inputs[0], before)
        first = torch.autograd.grad(y.pow(2).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        found.append([y, *first, *second])
    for right, ours in zip(*found):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4 * float(right.detach().abs().max()))


def test_taps_are_kept_while_parameters_stay():
    for conv in (ExplicitLongConv(D, 40), Hyena(D, max_length=40, order=8).filter):
        x = torch.randn(2, 33, D)
        with torch.no_grad():
            before = conv(x)
            assert conv.known_taps(33).data_ptr() == conv.known_taps(35).data_ptr()
            next(conv.parameters()).mul_(2)
            after = conv(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, conv(x).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("taps", [(7, 40), (40,), (1, 40)])
@pytest.mark.parametrize("skip", [1.5, (7, 1)])
def test_long_convolutions_of_many_channels_in_parts(taps, skip):
    x, taps = torch.randn(2, 7, 30_000), torch.randn(taps)
    skip = torch.randn(skip) if isinstance(skip, tuple) else skip
    with torch.no_grad():
        parts = fft_convolution(x, taps, skip)
    torch.testing.assert_close(parts, fft_convolution(x, taps, skip), rtol=1e-9, atol=1e-9)
