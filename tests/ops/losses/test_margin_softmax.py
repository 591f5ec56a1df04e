"""The margin softmax against a slow form that works with angles."""

import math

import pytest
import torch

from nearfar.ops.losses.margin_softmax import AAMSoftmax, margin_ramp


def slow_logits(loss, embedding, label):
    rows = []
    for x, y in zip(embedding, label.tolist()):
        cosines = []
        for j in range(loss.weight.shape[2]):
            centers = [w[:, j] for w in loss.weight]
            cosines.append(max((x @ w / x.norm() / w.norm() for w in centers), key=lambda c: c.item()))
        others = sorted((j for j in range(len(cosines)) if j != y), key=lambda j: -cosines[j].item())
        row = []
        for j, cosine in enumerate(cosines):
            theta = torch.acos(cosine)
            if j == y:
                past = theta + loss.margin >= math.pi
                value = cosine - loss.margin * math.sin(loss.margin) if past else torch.cos(theta + loss.margin)
            elif loss.margin > 0 and j in others[: loss.top_k]:
                value = torch.cos(theta - loss.penalty)
            else:
                value = cosine
            row.append(loss.scale * value)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 0.5, "scale": 20.0},
        {"sub_centers": 3},
        {"sub_centers": 2, "top_k": 3, "penalty": 0.06},
        {"margin": 0.0, "top_k": 3},
    ],
)
def test_equals_the_slow_form_forward_and_gradient(options):
    torch.manual_seed(1)
    loss = AAMSoftmax(6, 8, **options).double()
    embedding = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 3, 7, 2, 2])
    with torch.no_grad():
        embedding[0] = -loss.weight[0, :, 0]  # so that the margin passes pi
        embedding[0, 0] += 0.01 * loss.weight[0, :, 0].norm()
    logits, value = loss(embedding, label)
    slow = slow_logits(loss, embedding, label)
    torch.testing.assert_close(logits, slow, rtol=0, atol=1e-9)
    want = -slow.log_softmax(1)[range(5), label].mean()
    for ours, theirs in zip(
        torch.autograd.grad(value, [embedding, loss.weight]), torch.autograd.grad(want, [embedding, loss.weight])
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_margin_raises_the_loss_and_gradients_stay_finite_at_a_perfect_match():
    loss = AAMSoftmax(4, 3, margin=0.0, scale=1.0)
    embedding = loss.weight[0, :, 1].detach().clone()[None].requires_grad_()
    label = torch.tensor([1])
    without = loss(embedding, label)[1]
    loss.margin = 0.3
    value = loss(embedding, label)[1]
    value.backward()
    assert value > without
    assert torch.isfinite(embedding.grad).all()


def test_is_computed_in_full_precision_under_autocast():
    loss = AAMSoftmax(8, 5)
    embedding, label = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = loss(embedding, label)
    torch.testing.assert_close(logits, loss(embedding, label)[0])


def test_margin_ramp():
    assert [margin_ramp(p, 0.3, 0.0, 20.0) for p in (0.0, 10.0, 20.0, 40.0)] == [0.0, pytest.approx(0.15), 0.3, 0.3]
    assert margin_ramp(3.0, 0.3, 5.0, 10.0) == 0.0
    assert margin_ramp(5.0, 0.3, 5.0, 5.0) == 0.3
    with pytest.raises(ValueError, match="before"):
        margin_ramp(0.0, 0.3, 5.0, 4.0)


@pytest.mark.parametrize(
    "options", [{"num_classes": 1}, {"margin": 2.0}, {"scale": 0.0}, {"sub_centers": 0}, {"top_k": 5}]
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match=r"needs|must"):
        AAMSoftmax(**{"embedding_dim": 4, "num_classes": 5} | options)
