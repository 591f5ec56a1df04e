"""MATLAB's resizing and the protocol's scores, against slow forms and known values."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from nearfar.core.errors import UserError
from nearfar.vision.restoration.metrics import luma, perceptual, psnr, score, ssim
from nearfar.vision.restoration.resize import imresize


def slow_axis(row, length, factor, antialias=True, edge="mirror"):
    """One row by the definition, tap by tap."""
    stretch = factor if factor < 1 and antialias else 1

    def kernel(t):
        t = abs(t)
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0

    def beyond(i):
        if edge == "repeat":
            return row[min(max(i, 0), len(row) - 1)]
        i %= 2 * len(row)
        return row[i if i < len(row) else 2 * len(row) - 1 - i]

    out = []
    for k in range(1, length + 1):
        u = k / factor + (1 - 1 / factor) / 2
        places = range(math.floor(u - 2 / stretch) - 1, math.ceil(u + 2 / stretch) + 2)
        weights = [kernel(stretch * (u - i)) for i in places]
        out.append(sum(w * beyond(i - 1) for w, i in zip(weights, places)) / sum(weights))
    return out


@settings(max_examples=30, deadline=None)
@given(
    side=st.integers(1, 23),
    factor=st.sampled_from([1 / 2, 1 / 3, 1 / 4, 0.7, 1.0, 2.0, 3.0, 1.7]),
    antialias=st.booleans(),
    edge=st.sampled_from(["mirror", "repeat"]),
)
def test_the_definition(side, factor, antialias, edge):
    row = torch.from_numpy(np.random.default_rng(side).normal(size=side))
    found = imresize(row.expand(3, side), size=None, scale=factor, antialias=antialias, edge=edge)[0]
    expected = slow_axis(row.tolist(), len(found), factor, antialias, edge)
    assert len(found) == math.ceil(round(side * factor, 9))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


def test_eight_bits_round_after_each_axis_and_floats_never():
    image = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8)
    ours = imresize(image, 0.5, mode="uint8")
    assert ours.dtype == torch.uint8
    rows = torch.tensor([slow_axis(column.tolist(), 12, 0.5) for column in image[0].T]).T
    rows = (rows + 0.5).floor().clamp(0, 255)
    columns = torch.tensor([slow_axis(row.tolist(), 10, 0.5) for row in rows])
    assert torch.equal(ours[0], (columns + 0.5).floor().clamp(0, 255).to(torch.uint8))
    steps = imresize(torch.tensor([[0.0, 1.0] * 8] * 4), 2)
    assert steps.min() < 0
    assert steps.max() > 1, "a cubic kernel overshoots, and nothing clips it"


def test_bad_calls_are_named():
    image = torch.zeros(1, 4, 4)
    for call in (lambda: imresize(image), lambda: imresize(image, 2, (8, 8)), lambda: imresize(image[:, :0], 2)):
        with pytest.raises(ValueError, match="either a scale or a size"):
            call()
    with pytest.raises(ValueError, match="scale is -1"):
        imresize(image, -1)
    with pytest.raises(ValueError, match="mode is 'int'"):
        imresize(image, 2, mode="int")
    with pytest.raises(ValueError, match="edge is 'zero'"):
        imresize(image, 2, edge="zero")


def test_scores_against_scikit_image():
    torch.manual_seed(0)
    a = torch.rand(3, 40, 33)
    b = (a + 0.05 * torch.randn(3, 40, 33)).clamp(0, 1)
    theirs = structural_similarity(
        a.numpy()[0].astype(float), b.numpy()[0].astype(float), gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=1.0, full=True,
    )[1][5:-5, 5:-5].mean()  # fmt: skip
    assert ssim(a[:1], b[:1], 1.0) == pytest.approx(theirs, abs=1e-6)
    assert psnr(a, b, 1.0) == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()), abs=1e-4)
    assert psnr(a, a) == math.inf


def test_protocols_borders_and_colours():
    torch.manual_seed(0)
    a, b = torch.rand(3, 30, 30), torch.rand(3, 30, 30)
    eight = score(a, b, 2)
    near = score(a + 0.4 / 255 * torch.randn(3, 30, 30).sign() * 0.5, b, 2)
    assert eight.psnr == pytest.approx(near.psnr, abs=0.1)
    assert score(a * 3 - 1, b, 2) == score((a * 3 - 1).clamp(0, 1), b, 2), "8 bits clip"
    assert score(a * 3 - 1, b, 2, protocol="float") != score((a * 3 - 1).clamp(0, 1), b, 2, protocol="float")
    changed = b.clone()
    changed[:, :2] = 0
    assert score(a, changed, 2) == eight, "the border does not count"
    assert score(a, b, 2, colour="rgb") != eight
    assert score(a[:1], b[:1], 2) == score(a[:1], b[:1], 2, colour="rgb"), "grey has no luma of its own"
    assert float(luma(torch.ones(3, 1, 1))) == pytest.approx(235 / 255, abs=1e-6)
    for bad, message in ((lambda: score(a, b[:, 1:], 2), "its reference"), (lambda: score(a, b, 15), "no pixels"),
                         (lambda: score(a * float("nan"), b, 2), "not finite")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bad()


def test_metrics_of_pyiqa(monkeypatch):
    a, b = torch.rand(3, 20, 20), torch.rand(3, 20, 20)
    with pytest.raises(UserError, match="known are lpips, niqe"):
        perceptual("fid")
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(UserError, match="`pip install pyiqa`, whose licence"):
        perceptual("niqe")

    def create(name, device):
        def metric(*pictures):
            assert all(tuple(t.shape) == (1, 3, 16, 16) for t in pictures)
            assert all(torch.equal(t, (t * 255).round() / 255) for t in pictures)
            return torch.tensor(10.0 * len(pictures))

        return metric

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create))
    assert perceptual("lpips")(a, b, 2) == 20
    assert perceptual("niqe")(a, b, 2) == 10

    def fails(name, device):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=fails))
    with pytest.raises(UserError, match="are its weights there"):
        perceptual("lpips")
