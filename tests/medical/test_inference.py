"""Windows: equal to MONAI's and to the whole image, for any size, overlap, weights, budget and mirroring."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference

from nearfar.medical import inference
from nearfar.medical.inference import segment, window_scores


def average_scores(image: torch.Tensor, *arguments, **settings) -> torch.Tensor:
    """The whole image's scores, put together from the regions."""
    regions = list(window_scores(image, *arguments, **settings))
    whole = torch.full((len(regions[0][1]), *image.shape[1:]), torch.nan)
    for region, scores in regions:
        whole[(slice(None), *region)] = scores
    return whole


@pytest.fixture
def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv3d(2, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv3d(6, 5, 5, padding=2)
    )


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize("size", [(20, 17, 31), (8, 30, 12), (5, 9, 40)])
def test_equals_monai(network, overlap: float, mode: str, size: tuple[int, ...]) -> None:
    image, roi = torch.randn(2, *size), (8, 12, 16)
    expected = sliding_window_inference(image[None], roi, 3, network, overlap, mode)[0]
    settings = {"overlap": overlap, "mode": mode, "batch_size": 2}
    for memory in (None, 20_000):
        torch.testing.assert_close(
            average_scores(image, network, roi, memory=memory, **settings), expected, rtol=1e-4, atol=1e-5
        )
    labels = segment(image, network, roi, memory=20_000, **settings)
    assert labels.dtype == torch.uint8
    top = expected.topk(2, 0).values
    clear = top[0] - top[1] > 1e-4
    assert (labels == expected.argmax(0))[clear].all()


@torch.no_grad()
def test_two_axes_and_one_output() -> None:
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    image = torch.randn(1, 33, 50)
    expected = sliding_window_inference(image[None], (16, 16), 1, network, 0.5, "gaussian")[0, 0]
    found = segment(image, network, (16, 16), threshold=0.0)
    assert ((found == 1) == (expected > 0))[expected.abs() > 1e-5].all()


@torch.no_grad()
def test_a_pointwise_network_has_no_seams() -> None:
    network = torch.nn.Conv2d(2, 4, 1)
    image = torch.randn(2, 41, 29)
    whole = network(image[None])[0]
    torch.testing.assert_close(average_scores(image, network, (16, 8)), whole, rtol=1e-5, atol=1e-5)
    assert (segment(image, network, (16, 8)) == whole.argmax(0)).all()


def test_every_region_comes_once(network) -> None:
    count = torch.zeros(20, 17, 31)
    for region, _ in window_scores(torch.randn(2, 20, 17, 31), network, (8, 8, 8), overlap=0.6):
        count[region] += 1
    assert (count == 1).all()


@torch.no_grad()
def test_mirroring_is_the_mean_over_all_flips(network) -> None:
    image = torch.randn(2, 12, 12, 12)
    expected = 0
    for k in range(4):
        for axes in itertools.combinations((1, 2, 3), k):
            expected = expected + network(image.flip(axes)[None])[0].flip(axes) / 8
    found = average_scores(image, network, (12, 12, 12), flips=(0, 1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [64, 256])
def test_memory_grows_neither_with_the_length_nor_with_the_classes(length: int, monkeypatch) -> None:
    """Counts the bytes of partial sums that are held, which is what the budget bounds."""
    peak = 0

    class Counting(inference._CellStore):
        def put(self, *arguments) -> None:
            nonlocal peak
            super().put(*arguments)
            peak = max(peak, self.bytes)

    monkeypatch.setattr(inference, "_CellStore", Counting)
    peaks = {}
    for classes, memory in ((2, None), (20, None), (20, 100_000)):
        peak = 0
        network = lambda x, k=classes: x[:, :1].expand(-1, k, -1, -1, -1).clone()  # noqa: E731
        segment(torch.randn(1, length, 16, 16), network, (16, 8, 8), memory=memory)
        peaks[classes, memory] = peak
    # a slab of half a window's length: 8 x 16 x 16 voxels, and what a row of windows adds to it
    assert peaks[2, None] < 2 * 4 * 16 * 16 * 16 * 2
    assert peaks[20, None] == 10 * peaks[2, None]
    assert peaks[20, 100_000] <= 100_000


def test_multi_output_networks_and_progress() -> None:
    seen = []
    image = torch.randn(1, 20, 20)
    for pack in (lambda s: [s, None], lambda s: {"out": s}):
        segment(image, lambda x, p=pack: p(x.repeat(1, 3, 1, 1)), (8, 8), progress=lambda a, b: seen.append((a, b)))
    assert seen[-1][0] == seen[-1][1] == 16


def test_bad_arguments() -> None:
    image = torch.zeros(1, 8, 8)
    for settings, match in (
        ({"overlap": 1.0}, "overlap"),
        ({"mode": "linear"}, "gaussian"),
        ({"flips": (2,)}, "flips"),
    ):
        with pytest.raises(ValueError, match=match):
            segment(image, lambda x: x, (4, 4), **settings)
    with pytest.raises(ValueError, match="roi_size"):
        segment(image, lambda x: x, (4, 4, 4))
    with pytest.raises(ValueError, match="sizes must agree"):
        segment(image, lambda x: F.max_pool2d(x, 2), (4, 4))
