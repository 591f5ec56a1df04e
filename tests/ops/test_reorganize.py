"""Token reorganization: the oracle goes over tokens; the trail puts every token back."""

import inspect
import math

import pytest
import torch

from nearfar.ops.common.ranking import ranked
from nearfar.ops.tokens.reorganize import TokenTrail, keep_count, received_scores, reorganize, summary_scores


def oracle(x, scores, count, fuse):
    rows = []
    for tokens, row in zip(x, scores):
        others, order = tokens[1:], sorted(range(len(row)), key=lambda i: -row[i].item())
        parts = [tokens[:1], *(others[i : i + 1] for i in order[:count])]
        if fuse and count < len(row):
            parts.append(sum(row[i] * others[i] for i in order[count:])[None])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_oracle_forward_and_gradient(count, fuse):
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    (y, kept, rest), expected = reorganize(x, scores, count, fuse=fuse), oracle(x, scores, count, fuse)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert kept.shape == (2, count)
    assert (rest.diff(dim=1) > 0).all()
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), (x, scores), allow_unused=True),
        torch.autograd.grad(expected.square().sum(), (x, scores), allow_unused=True),
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_scores_are_the_attention_of_the_class_token_and_what_tokens_receive():
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    a = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(summary_scores(q, k), a[:, :, 0, 1:].mean(1))
    torch.testing.assert_close(received_scores(q, k, rows=2), a.mean((1, 2)))


def test_counts():
    assert keep_count(0.7, 196) == 138
    assert keep_count(0.7, 10) == math.ceil(0.7 * 10)
    assert keep_count(5, 3) == 3
    assert keep_count(5, 9) == 5
    assert keep_count(1.0, 9) == 9
    for bad in (0, 0.0, -1, 1.5):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            keep_count(bad, 9)


@pytest.mark.parametrize("fuse", [True, False])
def test_the_trail_puts_every_token_back(fuse):
    """Tokens carry their own number: kept ones come back at home, fused ones share, dropped ones keep their value."""
    n = 12
    x = torch.cat([torch.full((1, 1, 1), -1.0), torch.arange(n).view(1, n, 1).float()], 1)
    trail = TokenTrail.start(1, n, x.device)
    for count in (7, 3):
        scores = torch.rand(1, x.shape[1] - 1)
        before = x
        x, kept, rest = reorganize(x, scores, count, fuse=fuse)
        trail = trail.follow(kept, rest, before[:, 1:], fuse)
    dense = trail.dense(x[:, 1:])[0, :, 0]
    home = torch.arange(n).float()
    if fuse:
        fused = x[0, -1, 0]
        assert (dense == fused).sum() >= n - 7
        assert torch.all((dense == home) | (dense == fused))
    else:
        assert torch.equal(dense, home), "a dropped token shows what it was"
    assert [k.shape[1] for k in trail.kept] == [7, 3]


def test_all_kept_is_the_same_tensor():
    x = torch.randn(2, 5, 3)
    y, kept, rest = reorganize(x, torch.rand(2, 4), 4)
    assert y is x
    assert kept.tolist() == [[0, 1, 2, 3]] * 2
    assert rest.shape == (2, 0)


def test_equal_entries_keep_their_order_exported_or_not():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 1.0]]).repeat(2, 1)
    want = torch.tensor([[1, 2, 4, 3, 0, 5]]).repeat(2, 1)
    assert torch.equal(ranked(x), want)

    class Ranked(torch.nn.Module):
        def forward(self, x):
            return ranked(x)

    program = torch.export.export(Ranked(), (x,))
    assert "topk" in str(program.graph)
    distinct = torch.rand(2, 6)
    assert torch.equal(program.module()(distinct), ranked(distinct))


def test_counts_of_a_free_number_of_tokens():
    """While exporting in whole numbers, equal to those of float64 or refused."""
    count = inspect.unwrap(keep_count)  # the run-time checks know no symbolic sizes

    class Kept(torch.nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.keep = keep

        def forward(self, x):
            return x[:, : count(self.keep, x.shape[1])]

    def exported(keep):
        return torch.export.export(
            Kept(keep), (torch.rand(1, 50),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},), strict=False
        ).module()

    program = exported(0.7)
    for n in (10, 49, 180, 196):
        assert program(torch.rand(1, n)).shape[1] == keep_count(0.7, n)
    with pytest.raises(ValueError, match=r"keep is 0\.07: rounding makes its counts irregular"):
        exported(0.07)
