"""Preprocessing that does not look ahead: offline it gives the samples that a live stream gives."""

import mne
import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.live.stream import StreamDecoder, decode
from nearfar.eeg.models import baselines
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.trials import trials_array

NAMES = ("FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz", "A1")
CHAINS = [
    {"l_freq": 8.0, "h_freq": 30.0},
    {"l_freq": 4.0, "notch": 50.0, "sfreq": 80.0, "standardization": "exponential-moving"},
    {"h_freq": 40.0, "reference": ("A1", "Pz")},
    {"l_freq": 8.0, "h_freq": 30.0, "alignment": "euclidean"},
    {"l_freq": 8.0, "sfreq": 80.0, "standardization": "exponential-moving", "alignment": "riemannian"},
    {},
]


def settings(**changes):
    return Preprocessing(**{"tmax": 1.0, "causal": True} | changes)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_stream_gives_the_samples_and_decisions_of_the_recording(make_raw, chain):
    raw = make_raw(NAMES, seconds=30)
    ours = settings(**chain)
    whole = ours.apply(raw)
    sfreq = whole.info["sfreq"]
    assert whole.annotations.description.tolist() == raw.annotations.description.tolist()
    network = baselines.network("EEGNet", len(whole.ch_names), 2, ours.n_times(sfreq), sfreq).eval()
    decoder = Decoder(network, ["left_hand", "right_hand"], ours, whole.ch_names, {"sfreq": sfreq})
    offline = decode(decoder, whole.get_data() * 1e6, network.n_times, 8, sfreq, batch_size=1)
    shuffled = [NAMES[k] for k in np.random.default_rng(1).permutation(len(NAMES))]
    stream = StreamDecoder.live(decoder, 8, rate=160.0, ch_names=shuffled, batch_size=1)
    seen = []
    decoder.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].numpy().copy()))
    samples = raw.copy().reorder_channels(shuffled).get_data() * 1e6
    live = [stream.push(part) for part in np.array_split(samples, 41, axis=1)]
    np.testing.assert_array_equal(
        np.concatenate([part.probabilities for part in live if len(part)]), offline.probabilities
    )
    trained = (whole.get_data() * 1e6).astype(np.float32)
    for at, window in zip(range(0, trained.shape[1], 8), seen):
        np.testing.assert_array_equal(window[0], trained[:, at : at + network.n_times])


def test_no_sample_depends_on_later_ones_and_the_zero_phase_form_does(make_raw):
    raw, ours = make_raw(NAMES, seconds=30), settings(l_freq=4.0, h_freq=30.0, sfreq=80.0)
    changed = raw.copy()
    changed._data[:, 1600:] *= 3
    for causal in (True, False):
        one, other = (ours.__class__(**ours.to_dict() | {"causal": causal}).apply(each) for each in (raw, changed))
        same = np.array_equal(one.get_data()[:, :800], other.get_data()[:, :800])
        assert same == causal


def test_each_piece_between_edges_begins_anew(make_raw):
    raw = make_raw(NAMES, seconds=20, cues={"EDGE boundary": [7.01]})
    ours = settings(l_freq=4.0, sfreq=40.0)
    found = ours.apply(raw).get_data()
    cut = round(7.01 * 160)
    first = ours.apply(raw.copy().crop(0, (cut - 1) / 160))
    np.testing.assert_allclose(found[:, : first.n_times - 1], first.get_data()[:, :-1], atol=1e-15)
    skip = -cut % 4
    steps = ours.causal_steps(160.0, NAMES, first=cut)
    part = raw.get_data()[:, cut:] * 1e6
    for step in steps:
        part = step.push(part)
    np.testing.assert_allclose(found[:, -part.shape[1] :], part * 1e-6, atol=1e-15)
    assert found.shape[1] == 800
    assert (cut + skip) % 4 == 0


def test_a_piece_too_short_for_its_standardization_is_bad_and_its_trials_are_left_out(make_raw):
    raw = make_raw(NAMES, seconds=30, cues={"T1": [2.0, 12.0, 20.0], "EDGE boundary": [4.0]})
    whole = settings(standardization="exponential-moving").apply(raw)
    assert "BAD_short" in whole.annotations.description
    trials = settings(standardization="exponential-moving").cut(whole, {"left_hand": "T1"})
    assert trials.metadata["onset"].tolist() == [12.0, 20.0]
    X, _, _ = trials_array(trials)
    assert np.abs(X).max() > 0.5


def test_gaps_are_held_not_drawn_through(make_raw):
    raw = make_raw(NAMES, seconds=10)
    raw._data[:, 400:480] = np.nan
    whole = settings(reference=None).apply(raw)
    np.testing.assert_allclose(whole.get_data()[:, 400:480], np.repeat(raw._data[:, 399:400], 80, axis=1), rtol=1e-12)
    assert "BAD_gap" in whole.annotations.description


def test_what_needs_the_whole_trial_is_refused(make_raw):
    for wrong in ({"order": "published"}, {"standardization": "trial"}):
        with pytest.raises(UserError, match="causal form"):
            settings(**wrong)
    with pytest.raises(UserError, match="whole fraction"):
        settings(sfreq=100.0).apply(make_raw())
    with pytest.raises(UserError, match="no reference channel M1"):
        settings(reference=("M1",)).apply(make_raw())
    epochs = mne.EpochsArray(np.zeros((1, 9, 320)), mne.create_info(list(NAMES), 160.0, "eeg"), verbose="ERROR")
    with pytest.raises(UserError, match="causal"):
        settings().apply_trials(epochs)
