"""SI-SDR and PIT against torchmetrics, brute force and the recordings."""

from itertools import permutations

import numpy as np
import pytest
import soundfile
import torch
from torchmetrics.functional.audio import permutation_invariant_training, scale_invariant_signal_distortion_ratio

from nearfar.audio.separation.pit import best_permutation, pairwise_si_sdr, pit_si_sdr, si_sdr, training_loss


def test_si_sdr_equals_torchmetrics_and_ignores_scale_and_offset():
    noise, target = torch.randn(2, 3, 4000, dtype=torch.float64)
    estimate = target + noise  # at ratios far below 0 dB the epsilon of the formula shows
    expected = scale_invariant_signal_distortion_ratio(estimate, target, zero_mean=True)
    torch.testing.assert_close(si_sdr(estimate, target), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(si_sdr(7 * estimate + 3, target), si_sdr(estimate, target), rtol=1e-6, atol=1e-6)


def test_padding_does_not_count():
    estimate, target = torch.randn(2, 3, 400, dtype=torch.float64)
    lengths = torch.tensor([400, 250, 30])
    ours = si_sdr(estimate, target, lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(ours[i], si_sdr(estimate[i, :n], target[i, :n]))


@pytest.mark.parametrize("speakers", [2, 3, 4, 5])
def test_the_assignment_is_the_best_of_all(speakers):
    cost = torch.randn(6, speakers, speakers)
    index = best_permutation(cost)
    totals = cost.gather(2, index[..., None]).sum((1, 2))
    for item, total in zip(cost, totals):
        best = min(sum(item[i, p] for i, p in enumerate(order)) for order in permutations(range(speakers)))
        torch.testing.assert_close(total, best)


@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_pit_equals_torchmetrics_and_passes_gradients(speakers):
    target = torch.randn(2, speakers, 800)
    estimate = (target.flip(1) + 0.3 * torch.randn_like(target)).requires_grad_()
    loss, index = pit_si_sdr(estimate, target)
    best, _ = permutation_invariant_training(
        estimate, target, scale_invariant_signal_distortion_ratio, eval_func="max", zero_mean=True
    )
    torch.testing.assert_close(loss, -best, rtol=1e-4, atol=1e-4)
    assert (index == torch.arange(speakers).flip(0)).all()
    loss.sum().backward()
    assert estimate.grad.abs().sum() > 0


def test_pairwise_has_estimates_in_rows():
    estimates, targets = torch.randn(2, 2, 100), torch.randn(2, 3, 100)
    pairs = pairwise_si_sdr(estimates, targets)
    assert pairs.shape == (2, 2, 3)
    torch.testing.assert_close(pairs[1, 0, 2], si_sdr(estimates[1, 0], targets[1, 2]))


def test_training_leaves_out_what_is_already_separated():
    losses = torch.tensor([-40.0, -10.0, -20.0], requires_grad=True)
    training_loss(losses).backward()
    assert losses.grad.tolist() == [0.0, 0.5, 0.5]
    assert training_loss(losses).item() == -15
    assert training_loss(losses, None).item() == pytest.approx(-70 / 3)
    assert training_loss(torch.tensor([-40.0])).item() == 0


def test_silence_and_equality_stay_finite():
    sound = torch.randn(1, 100)
    for estimate, target in ((sound, sound), (sound, 0 * sound), (0 * sound, sound)):
        assert si_sdr(estimate, target).isfinite().all()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 5\)"):
        pit_si_sdr(torch.zeros(1, 2, 5), torch.zeros(1, 3, 5))


def test_real_mixtures(shared_data):
    folder = shared_data("libri2mix")
    for n in range(24):
        mix, *sources = (
            torch.from_numpy(soundfile.read(folder / f"item{n}_{part}.wav", dtype="float32")[0])
            for part in ("mix", "source1", "source2")
        )
        targets = torch.stack(sources)[None]
        both = mix.expand(1, 2, -1)
        unprocessed = -pit_si_sdr(both, targets)[0]
        expected = scale_invariant_signal_distortion_ratio(both, targets, zero_mean=True).mean()
        torch.testing.assert_close(unprocessed[0], expected, rtol=1e-3, atol=1e-3)
        assert -12 < unprocessed < 6  # two people at similar levels: the mixture is a poor estimate of each
        swapped, index = pit_si_sdr(targets.flip(1) + 0.01 * both, targets)
        assert index.tolist() == [[1, 0]]
        assert -swapped > 20
        assert np.isfinite(-swapped.item())
