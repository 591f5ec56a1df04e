"""The degradation of real pictures: against slow forms and Pillow's JPEG, its seed, its settings."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from nearfar.vision.restoration.degradation import (
    Degradation,
    Order,
    _Draw,
    _kernels,
    filtered,
    gaussian_kernels,
    jpeg,
    sharpened,
    sinc_kernels,
)
from nearfar.vision.restoration.metrics import psnr

PICTURE = torch.from_numpy(data.astronaut()[:128, 100:228].copy()).permute(2, 0, 1).float() / 255


def test_the_seed_determines_everything_and_each_picture_has_its_own():
    degrade, high = Degradation(), PICTURE.expand(4, -1, -1, -1)
    for seed in range(6):
        one, two = (degrade(high, 2, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert one.shape == (4, 3, 64, 64)
        assert torch.equal(one, two)
        assert torch.equal(one, (one * 255).round() / 255)
        assert len({float(picture.double().std()) for picture in one}) == 4
        assert not torch.equal(one, degrade(high, 2, torch.Generator().manual_seed(seed + 100)))
    for scale in (3, 4):
        assert degrade(high[:1, :, :96, :60], scale).shape == (1, 3, 96 // scale, 60 // scale)
    with pytest.raises(ValueError, match="multiples of 3"):
        degrade(high, 3)


def test_it_still_shows_the_picture():
    """Worse than bicubic resizing, and nearer to it than to its mirror image."""
    degrade, high = Degradation(), PICTURE.expand(16, -1, -1, -1)
    low = degrade(high, 2, torch.Generator().manual_seed(0))
    small = torch.nn.functional.interpolate(high, scale_factor=0.5, mode="area")
    right, wrong = ((low - other).square().mean() for other in (small, small.flip(3)))
    assert 1e-4 < right < wrong / 4


def test_kernels_by_their_formulas():
    sides, kind = torch.tensor([7, 21, 13]), torch.tensor([0, 1, 2])
    sigma_x, sigma_y, angle, beta = (
        torch.tensor(t) for t in ([1.0, 2.0, 3.0], [1.0, 0.7, 1.5], [0.0, 0.6, -1.0], [9, 0.8, 1.4])
    )
    found = gaussian_kernels(sides, sigma_x, sigma_y, angle, kind, beta)
    ringing = sinc_kernels(sides, torch.tensor([1.2, 2.0, 3.0]))
    for b, side in enumerate(sides.tolist()):
        turn = np.array([[math.cos(angle[b]), -math.sin(angle[b])], [math.sin(angle[b]), math.cos(angle[b])]])
        inverse = np.linalg.inv(turn @ np.diag([float(sigma_x[b]) ** 2, float(sigma_y[b]) ** 2]) @ turn.T)
        slow = np.zeros((21, 21))
        for i in range(21):
            for j in range(21):
                place = np.array([j - 10, i - 10])
                if abs(place).max() <= side // 2:
                    squared = float(place @ inverse @ place)
                    shapes = (
                        math.exp(-squared / 2),
                        math.exp(-(squared ** float(beta[b])) / 2),
                        1 / (1 + squared ** float(beta[b])),
                    )
                    slow[i, j] = shapes[b]
        np.testing.assert_allclose(found[b], slow / slow.sum(), atol=1e-6)
        assert float(ringing[b].sum()) == pytest.approx(1, abs=1e-5)
        assert ringing[b].min() < 0, "a sinc rings"
        assert (ringing[b] != 0).any(0).sum() == side
    drawn = _kernels(Order(), _Draw(500, torch.device("cpu"), torch.Generator().manual_seed(0)))
    assert 0.03 < ((drawn < -1e-6).flatten(1).any(1)).float().mean() < 0.2
    x = torch.rand(2, 3, 30, 25)
    blurred = filtered(x, found[:2])
    direct = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x[1:, :1], [10] * 4, mode="reflect"), found[1].flip(0, 1)[None, None]
    )
    torch.testing.assert_close(blurred[1:, :1], direct)


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_is_that_of_an_encoder(quality: int):
    buffer = io.BytesIO()
    pixels = (PICTURE * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
    ours = jpeg(PICTURE[None], torch.tensor([float(quality)]))[0]
    assert psnr(ours, theirs, 1.0) > 33
    assert psnr(ours, theirs, 1.0) > psnr(ours, PICTURE, 1.0) + 2
    batch = jpeg(PICTURE[None, :, :50, :39].expand(2, -1, -1, -1), torch.tensor([float(quality), 5.0]))
    torch.testing.assert_close(batch[0], jpeg(PICTURE[None, :, :50, :39], torch.tensor([float(quality)]))[0])
    assert not torch.equal(batch[0], batch[1])


def test_sharpening_leaves_flat_parts():
    flat = torch.full((1, 3, 64, 64), 0.4)
    torch.testing.assert_close(sharpened(flat), flat)
    edge = flat.clone()
    edge[..., 32:] = 0.7
    found = sharpened(edge)
    assert found[..., 32].mean() > 0.75
    assert found[..., 31].mean() < 0.35
    assert found.min() >= 0
    assert found.max() <= 1


def test_settings_that_make_no_sense():
    for changes, message in (
        ({"blur": 1.5}, "a share is in"), ({"kernels": (1.0,)}, "6 shares that sum to 1"),
        ({"resize": (0.5, 0.5, 0.5)}, "3 shares"), ({"noise": (3.0, 1.0)}, "must rise"),
        ({"quality": (5.0, 101.0)}, "end at 100"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            replace(Order(), **changes)
