"""Attention over depth: mixtures against the definition, blocks against a list of sources, two phases against one."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from nearfar.ops.aggregation.depth_attention import FEW, DepthAttention, DepthResiduals

D = 12


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module


def slow(m, sources):
    """Token by token would be the same: nothing but sums over channels."""
    outs, width = [], D // m.num_heads
    for h in range(m.num_heads):
        part = slice(h * width, (h + 1) * width)
        logits = []
        for i, v in enumerate(sources):
            if m.query_kind == "scalar":
                logits.append(m.query[i, h] + torch.zeros_like(v[..., 0]))
                continue
            key = v
            if m.norm_weight is not None:
                key = m.norm_weight * v / torch.sqrt((v**2).mean(-1, keepdim=True) + m.eps)
            w = m.query if m.query_kind == "static" else sources[-1] @ m.query.T
            logits.append((w * key)[..., part].sum(-1))
        logits = torch.stack(logits)
        p = torch.sigmoid(logits) if m.sigmoid else torch.exp(logits) / torch.exp(logits).sum(0)
        outs.append(sum(weight[..., None] * v[..., part] for weight, v in zip(p, sources)))
    return torch.cat(outs, -1)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_heads": 3},
        {"query": "input"},
        {"query": "input", "num_heads": 2, "norm": False},
        {"query": "scalar", "max_sources": 6, "num_heads": 2},
        {"sigmoid": True},
        {"norm": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("grid", [(), (7,), (2, 3, 4)])
def test_mixture(how, count, grid):
    attend = shaken(DepthAttention(D, eps=0.1, **how))
    sources = [torch.randn(2, *grid, D, requires_grad=True) for _ in range(count)]
    ours, theirs = attend(sources), slow(attend, sources)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    wanted, weight = [*sources, *attend.parameters()], torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True) for y in (ours, theirs))
    for one, two in zip(a, b):
        one = torch.zeros_like(two) if one is None else one
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_new_queries_give_the_mean_and_one_source_comes_back():
    sources = [torch.randn(3, D) for _ in range(4)]
    torch.testing.assert_close(DepthAttention(D)(sources), torch.stack(sources).mean(0))
    torch.testing.assert_close(shaken(DepthAttention(D))(sources[:1]), sources[0])


def test_half_precision_mixes_in_float32():
    attend = shaken(DepthAttention(D)).float()
    sources = [torch.randn(3, D).bfloat16() for _ in range(5)]
    ours = attend(sources)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, attend([v.float() for v in sources]).bfloat16())


def run(embedding, attends, layers, size, **how):
    residuals = DepthResiduals(embedding, attends, size, **how)
    for layer in layers:
        residuals.add(torch.tanh(residuals.next_input() @ layer))
    return residuals.next_input()


def slow_run(embedding, attends, layers, size, window=None):  # noqa: RET503
    """The state of the paper, spelt out."""
    blocks, partial = [], embedding
    for j in range(len(layers) + 1):
        sources = blocks + ([] if partial is None else [partial])
        if window is not None and len(sources) > window + 1:
            sources = [sources[0], *sources[-window:]]
        h = slow(attends[j], sources)
        if j == len(layers):
            return h
        if j % size == 0:
            blocks, partial = [*blocks, partial], None
        y = torch.tanh(h @ layers[j])
        partial = y if partial is None else partial + y


@pytest.mark.parametrize("size", [1, 2, 4, 10, 12])
@pytest.mark.parametrize("how", [{}, {"two_phase": True}, {"window": 2}], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_blocks(size, how, heads):
    attends = [shaken(DepthAttention(D, eps, heads)) for eps in torch.linspace(0.01, 0.5, 11).tolist()]
    layers = [torch.randn(D, D, requires_grad=True) for _ in range(10)]
    embedding = torch.randn(2, 5, D, requires_grad=True)
    ours = run(embedding, attends, layers, size, **how)
    theirs = slow_run(embedding, attends, layers, size, how.get("window"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    wanted, weight = [embedding, *layers, *(p for a in attends for p in a.parameters())], torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True) for y in (ours, theirs))
    for one, two in zip(a, b):
        one, two = (torch.zeros(1) if g is None else g for g in (one, two))
        torch.testing.assert_close(
            one.expand_as(two) if one.numel() == 1 else one, two.expand_as(one), rtol=1e-8, atol=1e-9
        )


def test_without_gradients_two_phases_are_the_same():
    attends, layers = [shaken(DepthAttention(D)) for _ in range(7)], [torch.randn(D, D) for _ in range(6)]
    x = torch.randn(2, 5, D)
    with torch.no_grad():
        expected = run(x, attends, layers, 4)
        torch.testing.assert_close(run(x, attends, layers, 4, two_phase=True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 10, 12])
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (1,)], ids=str)
def test_few_tokens_without_gradients(size, shape):
    attends = [shaken(DepthAttention(D, eps=0.1)) for _ in range(11)]
    layers, x = [torch.randn(D, D) for _ in range(10)], torch.randn(*shape, D)
    with torch.no_grad():
        torch.testing.assert_close(run(x, attends, layers, size), slow_run(x, attends, layers, size))
        residuals = [DepthResiduals(t, attends, size) for t in (x, x.expand(FEW + 1, *x.shape))]
        for r in residuals:
            r.weights = []
            for layer in layers:
                r.add(r.next_input() @ layer)
            r.next_input()
    assert [r.spare is None for r in residuals] == [False, True]
    for few, many in zip(*(r.weights for r in residuals)):
        torch.testing.assert_close(few, many[:, 0])


def test_few_tokens_see_changed_queries_and_leave_other_forms_alone():
    attends, layers = [shaken(DepthAttention(D)) for _ in range(7)], [torch.randn(D, D) for _ in range(6)]
    x = torch.randn(1, 3, D)
    with torch.no_grad():
        register_parametrization(attends[2], "query", nn.Tanh())
        before = run(x, attends, layers, 4)
        for change in (
            lambda: attends[3].query.mul_(-2),
            lambda: attends[2].parametrizations.query.original.add_(1),
            lambda: setattr(attends[1], "eps", 0.3),
        ):
            change()
            after = run(x, attends, layers, 4)
            torch.testing.assert_close(after, slow_run(x, attends, layers, 4))
            assert not torch.allclose(before, after)
            before = after


def test_passes_of_few_tokens_leave_each_other_alone():
    """One after the other, side by side, after one that broke off, and in inference mode."""
    attends, layers = [shaken(DepthAttention(D)) for _ in range(7)], [torch.randn(D, D) for _ in range(6)]
    inputs = torch.randn(3, 1, 1, D).unbind()
    with torch.no_grad():
        first, second, third = (run(x, attends, layers, 4) for x in inputs)
        residuals = [DepthResiduals(x, attends, 4) for x in inputs]
        DepthResiduals(inputs[0], attends, 4).next_input()
        for layer in layers:
            for r in residuals:
                r.add(torch.tanh(r.next_input() @ layer))
        outputs = [r.next_input() for r in residuals]
    with torch.inference_mode():
        outputs += [run(x, attends, layers, 4) for x in inputs]
    with torch.no_grad():
        outputs += [run(x, attends, layers, 4) for x in inputs]
        exact = [slow_run(x, attends, layers, 4) for x in inputs]
    for output, want in zip([first, second, third, *outputs], 4 * exact, strict=True):
        torch.testing.assert_close(output, want)


def test_few_tokens_in_half_precision_are_summed_in_float32():
    attends, layers = [shaken(DepthAttention(D)).float() for _ in range(7)], [torch.randn(D, D) for _ in range(6)]
    x = torch.randn(1, 3, D).bfloat16()
    with torch.no_grad():
        few = run(x, attends, [layer.bfloat16() for layer in layers], 4)
        exact = run(x.float(), attends, [layer.bfloat16().float() for layer in layers], 4)
    assert few.dtype == torch.bfloat16
    assert (few.float() - exact).norm() < 2e-2 * exact.norm()


def test_large_logits_do_not_overflow():
    attends = [DepthAttention(D) for _ in range(5)]
    with torch.no_grad():
        for attend in attends:
            attend.query.fill_(1e4)
    layers = [torch.randn(D, D).float() for _ in range(4)]
    out = run(torch.randn(2, D).float(), [a.float() for a in attends], layers, 2)
    assert out.isfinite().all()


def test_weights_can_be_read():
    attends = [shaken(DepthAttention(D)) for _ in range(5)]
    residuals = DepthResiduals(torch.randn(2, 3, D), attends, 2)
    residuals.weights = []
    for _ in range(4):
        residuals.add(residuals.next_input() * 0.5)
    residuals.next_input()
    assert [len(p) for p in residuals.weights] == [1, 2, 2, 3, 3]
    assert all(torch.allclose(p.sum(0), torch.ones(2, 3, 1)) for p in residuals.weights)
    with pytest.raises(ValueError, match="all have been made"):
        residuals.next_input()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DepthAttention(12, num_heads=5),
        lambda: DepthAttention(12, query="dynamic"),
        lambda: DepthAttention(12, query="scalar"),
        lambda: DepthAttention(12, max_sources=3),
        lambda: DepthResiduals(torch.zeros(1, D), [], 3),
        lambda: DepthResiduals(torch.zeros(1, D), [], 0),
        lambda: DepthResiduals(torch.zeros(1, D), [], 2, window=0),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_more_sources_than_scalars_are_refused():
    with pytest.raises(ValueError, match="max_sources=2"):
        DepthAttention(D, query="scalar", max_sources=2)([torch.zeros(1, D)] * 3)
