"""Preprocessing against plain forms of the same formulas, and alignment against its defining properties."""

import json
import logging
import warnings

import mne
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from scipy.signal import butter, filtfilt
from sklearn.base import clone

from nearfar.core.errors import UserError
from nearfar.eeg.alignment import EuclideanAlignment, ExponentialMovingStandardizer, RunningAlignment, StreamAlignment
from nearfar.eeg.annotations import event_counts, quiet
from nearfar.eeg.preprocessing import PRESETS, Preprocessing

EVENTS = {"left_hand": "T1", "right_hand": "T2"}
SETTINGS = [
    Preprocessing(),
    Preprocessing.preset("bciciv2a-long", order="published"),
    Preprocessing(l_freq=4, h_freq=38, notch=50, sfreq=125, reference=("M1", "M2"), standardization="trial"),
]


@pytest.mark.parametrize("preprocessing", SETTINGS)
def test_settings_go_through_json(preprocessing):
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tmin": 1, "tmax": 1}, "before tmax"),
        ({"l_freq": -1}, "l_freq must be positive"),
        ({"l_freq": 30, "h_freq": 8}, "must be below h_freq"),
        ({"reference": "avg"}, "reference must be"),
        ({"standardization": "z"}, "standardization must be"),
        ({"order": "paper"}, "order must be"),
        ({"order": "published", "l_freq": 4.0}, "published order has no l_freq"),
        ({"order": "published", "reference": ("Cz",)}, "published order has no named reference"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**arguments)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="no setting highpass"):
        Preprocessing.from_dict({"highpass": 4})
    with pytest.raises(UserError, match="no preset 'bci'; there are bciciv2a"):
        Preprocessing.preset("bci")


@pytest.mark.parametrize("order", ["continuous", "published"])
@pytest.mark.parametrize(
    ("name", "rate", "n_times"), [("bciciv2a", 250, 375), ("bciciv2a-long", 250, 562), ("eegmmidb", 160, 640)]
)
def test_presets_give_the_published_lengths(make_raw, name, rate, n_times, order):
    preprocessing = Preprocessing.preset(name, order=order)
    raw = make_raw(sfreq=rate)
    epochs = preprocessing.cut(preprocessing.apply(raw), EVENTS)
    assert epochs.get_data().shape == (6, 9, n_times)
    assert preprocessing.n_times() == n_times
    assert abs(epochs.tmin - PRESETS[name]["tmin"]) <= 0.5 / epochs.info["sfreq"] + 1e-9  # on the grid of samples
    assert epochs.info["sfreq"] == PRESETS[name]["sfreq"]
    assert epochs.event_id == {"left_hand": 1, "right_hand": 2}
    assert epochs.events[:, 2].tolist() == [1, 2, 1, 2, 1, 2]
    assert epochs.metadata["onset"].tolist() == [5.0, 12.0, 20.0, 27.0, 35.0, 42.0]
    np.testing.assert_allclose(epochs.get_data().mean(axis=1), 0, atol=1e-15)  # average reference


def test_published_is_the_papers_order_trial_by_trial(make_raw):
    raw = make_raw(sfreq=250.0)
    preprocessing = Preprocessing.preset("bciciv2a", order="published")
    epochs = preprocessing.cut(preprocessing.apply(raw), EVENTS)
    b, a = butter(12, 62.5, fs=250)
    for trial, onset in zip(epochs.get_data(), [5.0, 12.0, 20.0, 27.0, 35.0, 42.0]):
        start = round(onset * 250)
        expected = filtfilt(b, a, raw.get_data()[:, start : start + 750])
        expected = mne.filter.resample(expected, up=125, down=250, npad="auto", window="boxcar")
        np.testing.assert_allclose(trial, expected - expected.mean(axis=0), atol=1e-18)


def test_continuous_filters_the_recording_before_it_cuts(make_raw):
    raw = make_raw(sfreq=250.0)
    preprocessing = Preprocessing(tmax=2, l_freq=8, h_freq=30, notch=50, sfreq=125)
    epochs = preprocessing.cut(preprocessing.apply(raw), EVENTS)
    with mne.use_log_level("ERROR"):
        expected = raw.copy().notch_filter([50, 100]).filter(8, 30).resample(125).set_eeg_reference("average")
        windows = mne.Epochs(expected, *mne.events_from_annotations(expected), 0, 2 - 1 / 125, baseline=None).get_data()
    np.testing.assert_allclose(epochs.get_data(), windows, atol=1e-18)
    assert not raw.info["custom_ref_applied"]  # the input is left alone


def test_published_sees_nothing_outside_the_trial_and_continuous_does(make_raw):
    raw = make_raw(sfreq=250.0, cues={"T1": [10.0], "T2": [20.0]})
    changed = raw.copy()
    changed._data[0, 10 * 250 - 5] += 1e-3  # 20 ms before the first window
    for order, same in (("published", True), ("continuous", False)):
        preprocessing = Preprocessing.preset("bciciv2a", order=order)
        first, second = (preprocessing.cut(preprocessing.apply(each), EVENTS).get_data() for each in (raw, changed))
        assert np.array_equal(first, second) is same


def test_named_reference(make_raw):
    raw = make_raw(("M1", "M2", "C3", "Cz", "C4"))
    done = Preprocessing(reference=("M1", "M2")).apply(raw)
    assert done.ch_names == ["C3", "Cz", "C4"]
    np.testing.assert_allclose(done.get_data(), raw.get_data()[2:] - raw.get_data()[:2].mean(axis=0), atol=1e-18)
    with pytest.raises(UserError, match="no reference channel TP9; it has M1, M2, C3"):
        Preprocessing(reference=("TP9",)).apply(raw)


def test_trial_standardization_gives_unit_variance(make_raw):
    preprocessing = Preprocessing(standardization="trial")
    data = preprocessing.cut(preprocessing.apply(make_raw()), EVENTS).get_data() * 1e6
    np.testing.assert_allclose(data.mean(axis=2), 0, atol=1e-9)
    np.testing.assert_allclose(data.std(axis=2), 1, rtol=1e-9)


def test_gaps_between_runs_are_filled_and_their_trials_left_out(make_raw, caplog):
    raw = make_raw(cues={"T1": [5.0, 30.5], "T2": [29.0, 50.0]})
    whole = raw.copy()
    raw._data[:, 30 * 160 : 32 * 160] = np.nan
    preprocessing = Preprocessing(tmax=2, l_freq=4, h_freq=30)
    with caplog.at_level(logging.WARNING, "nearfar.eeg"):
        epochs = preprocessing.cut(preprocessing.apply(raw), EVENTS)
    assert epochs.metadata["onset"].tolist() == [5.0, 50.0]
    assert "2 of 4 trials left out: 0 leave the recording, 2 touch a bad stretch or gap" in caplog.text
    expected = preprocessing.cut(preprocessing.apply(whole), EVENTS)[[0, 3]]
    np.testing.assert_allclose(epochs.get_data(), expected.get_data(), atol=1e-18)  # far from the gap nothing changes


def test_trials_at_the_ends_are_left_out(make_raw, caplog):
    raw = make_raw(cues={"T1": [0.2, 20.0], "T2": [30.0, 58.5]})
    with caplog.at_level(logging.WARNING, "nearfar.eeg"):
        epochs = Preprocessing(tmin=-0.5, tmax=2).cut(raw, EVENTS)
    assert epochs.metadata["onset"].tolist() == [20.0, 30.0]
    assert "2 of 4 trials left out: 2 leave the recording" in caplog.text
    with pytest.raises(UserError, match=r"each of the 4 trials .* leaves the recording"):
        Preprocessing(tmin=0, tmax=61).cut(raw, EVENTS)


def test_onsets_count_from_the_first_sample_of_a_cropped_recording(make_raw):
    raw = make_raw()
    cropped = raw.copy().crop(4.0)
    whole, part = Preprocessing().cut(raw, EVENTS), Preprocessing().cut(cropped, EVENTS)
    np.testing.assert_array_equal(whole.get_data(), part.get_data())
    np.testing.assert_allclose(part.metadata["onset"], whole.metadata["onset"] - 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"l_freq": 8, "h_freq": 60},
            "sampled at 100 Hz, which holds nothing above 50 Hz, and the settings need 60 Hz",
        ),
        ({"sfreq": 125}, "need 62.5 Hz"),
        ({"notch": 50}, "need 50 Hz"),
        ({"h_freq": 40, "sfreq": 64}, "must be below half of sfreq"),
    ],
)
def test_a_sampling_rate_below_the_needs_is_refused(make_raw, arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**arguments).apply(make_raw(sfreq=100.0))


def test_a_higher_rate_is_fine_where_the_filter_leaves_nothing_to_miss(make_raw):
    done = Preprocessing(h_freq=40, sfreq=125).apply(make_raw(sfreq=100.0))
    assert done.info["sfreq"] == 125


def test_what_cannot_be_filtered_is_refused(make_raw):
    with pytest.raises(UserError, match=r"6\.0 s are too short for l_freq 0\.5 Hz, whose filter spans 6\.6 s"):
        Preprocessing(l_freq=0.5).apply(make_raw(seconds=6, cues={}))
    preprocessing = Preprocessing(sfreq=20, order="published")
    with pytest.raises(UserError, match="unstable from 1000 to 20 Hz"):
        preprocessing.cut(preprocessing.apply(make_raw(sfreq=1000.0, cues={"T1": [5.0]})), {"left_hand": "T1"})
    raw = make_raw()
    raw._data[3, 100:200] = np.nan
    with pytest.raises(UserError, match="NaN in channel C3; leave it out"):
        Preprocessing().apply(raw)


def test_events_that_are_not_there(make_raw):
    raw = make_raw()
    assert event_counts(raw) == {"T1": 3, "T2": 3}
    with pytest.raises(UserError, match=r"none of the events 769, 770; it has T1 \(3\), T2 \(3\)"):
        Preprocessing().cut(raw, {"left": "769", "right": ["770"]})
    with pytest.raises(UserError, match="event T1 is given to two classes, left and right"):
        Preprocessing().cut(raw, {"left": "T1", "right": ["T2", "T1"]})
    with pytest.raises(ValueError, match="put it through apply first"):
        Preprocessing(sfreq=100).cut(raw, EVENTS)


def test_trials_cut_elsewhere(make_raw):
    epochs = Preprocessing(tmin=-1, tmax=3, reference=None).cut(make_raw(), EVENTS)
    done = Preprocessing(tmin=0, tmax=2, sfreq=80, standardization="trial").apply_trials(epochs)
    data = epochs.get_data()[:, :, 160:480]
    expected = mne.filter.resample(data, up=80, down=160, npad="auto", window="boxcar", verbose="ERROR")
    expected = expected - expected.mean(axis=1, keepdims=True)
    expected = expected - expected.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(done.get_data() * 1e6, expected / expected.std(axis=2, keepdims=True), atol=1e-9)
    assert done.event_id == epochs.event_id
    assert done.metadata.equals(epochs.metadata)
    assert done.times[0] == 0
    assert done.info["sfreq"] == 80
    with pytest.raises(UserError, match="l_freq: needs the recording"):
        Preprocessing(l_freq=4).apply_trials(epochs)
    with pytest.raises(UserError, match=r"do not hold the window from 0 to 3\.5 s"):
        Preprocessing(tmax=3.5).apply_trials(epochs)


def test_warnings_go_to_the_log(recwarn, caplog):
    with caplog.at_level(logging.DEBUG, "nearfar.eeg"), quiet():
        warnings.warn("annotation outside the data", RuntimeWarning, stacklevel=1)
    assert not recwarn.list
    assert "annotation outside the data" in caplog.text


# Exponential moving standardization


def _moving_oracle(x, factor_new, eps=1e-4):
    """The weighted sums of the definition, sample by sample."""
    result, centred = np.zeros_like(x), np.zeros_like(x)
    for t in range(x.shape[1]):
        weights = (1 - factor_new) ** np.arange(t, -1, -1.0)
        centred[:, t] = x[:, t] - (x[:, : t + 1] * weights).sum(axis=1) / weights.sum()
        variance = (centred[:, : t + 1] ** 2 * weights).sum(axis=1) / weights.sum()
        result[:, t] = centred[:, t] / np.maximum(np.sqrt(variance), eps)
    return result


def test_moving_standardization_is_its_definition():
    x = np.random.default_rng(0).normal(3, 20, size=(2, 300))
    done = ExponentialMovingStandardizer(0.01, init_block_size=None).push(x)
    np.testing.assert_allclose(done, _moving_oracle(x, 0.01), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.sampled_from([None, 1, 100, 700]))
def test_the_stream_agrees_with_braindecode_however_it_is_cut(sizes, block):
    from braindecode.preprocessing import exponential_moving_standardize

    x = np.random.default_rng(1).normal(-5, 30, size=(3, sum(sizes) + 800))
    stream = ExponentialMovingStandardizer(init_block_size=block)
    parts = [stream.push(chunk) for chunk in np.split(x, np.cumsum(sizes), axis=1)]
    expected = exponential_moving_standardize(x, factor_new=1e-3, init_block_size=block, eps=1e-4)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-9)


def test_the_stream_does_not_look_ahead():
    x = np.random.default_rng(2).normal(size=(2, 400))
    changed = x.copy()
    changed[:, 200:] += 100
    first, second = (ExponentialMovingStandardizer(init_block_size=None).push(each) for each in (x, changed))
    np.testing.assert_array_equal(first[:, :200], second[:, :200])
    assert not np.allclose(first[:, 200:], second[:, 200:])


def test_the_first_block_is_held_back():
    stream = ExponentialMovingStandardizer(init_block_size=100)
    assert stream.push(np.zeros((2, 99))).shape == (2, 0)
    assert stream.push(np.ones((2, 5))).shape == (2, 104)
    with pytest.raises(ValueError, match="factor_new"):
        ExponentialMovingStandardizer(factor_new=0)


def test_preprocessing_standardizes_microvolts(make_raw):
    raw = make_raw()
    done = Preprocessing(reference=None, standardization="exponential-moving").apply(raw)
    expected = ExponentialMovingStandardizer().push(raw.get_data() * 1e6)
    np.testing.assert_allclose(done.get_data() * 1e6, expected, atol=1e-9)
    assert 0.8 < done.get_data().std() * 1e6 < 1.2


# Euclidean alignment


def _mixed_trials(seed=0, trials=30, channels=5, times=200):
    rng = np.random.default_rng(seed)
    domains = np.repeat(["a", "b"], trials // 2)
    mixing = {"a": rng.normal(size=(channels, channels)), "b": 10 * rng.normal(size=(channels, channels))}
    return np.stack([mixing[domain] @ rng.normal(size=(channels, times)) for domain in domains]), domains


def test_alignment_whitens_every_domain():
    X, domains = _mixed_trials()
    aligned = EuclideanAlignment().fit_transform(X, domains=domains)
    for domain in "ab":
        mean = np.mean([x @ x.T / x.shape[1] for x in aligned[domains == domain]], axis=0)
        np.testing.assert_allclose(mean, np.eye(5), atol=1e-9)


def test_alignment_removes_the_scale_and_keeps_the_order_of_trials():
    X, domains = _mixed_trials()
    scaled = X * np.where(domains == "b", 7.0, 1.0)[:, None, None]
    first, second = (EuclideanAlignment().fit_transform(each, domains=domains) for each in (X, scaled))
    np.testing.assert_allclose(first, second, atol=1e-9)
    shuffled = np.random.default_rng(0).permutation(len(X))
    fitted = EuclideanAlignment().fit(X, domains=domains)
    np.testing.assert_allclose(fitted.transform(X[shuffled], domains=domains[shuffled]), first[shuffled], atol=1e-12)


def test_alignment_after_an_average_reference():
    X, _ = _mixed_trials()
    X = X - X.mean(axis=1, keepdims=True)
    for dtype in (np.float64, np.float32):
        aligned = EuclideanAlignment().fit_transform(X.astype(dtype))
        mean = np.mean([x @ x.T / x.shape[1] for x in aligned], axis=0)
        np.testing.assert_allclose(mean, np.eye(5) - 1 / 5, atol=1e-4 if dtype == np.float32 else 1e-9)
        assert aligned.dtype == dtype


def test_full_shrinkage_only_scales():
    X, _ = _mixed_trials()
    aligned = EuclideanAlignment(shrinkage=1.0).fit_transform(X)
    np.testing.assert_allclose(aligned, X / np.sqrt((X**2).mean()), atol=1e-9)
    with pytest.raises(ValueError, match="shrinkage must be in"):
        EuclideanAlignment(shrinkage=2.0).fit(X)


def test_alignment_is_a_scikit_learn_transformer_that_refuses_strangers():
    X, domains = _mixed_trials()
    alignment = clone(EuclideanAlignment(shrinkage=0.1)).fit(X, domains=domains)
    assert alignment.get_params() == {"shrinkage": 0.1}
    assert EuclideanAlignment.transductive
    assert not RunningAlignment.transductive
    with pytest.raises(ValueError, match="no alignment for c; fitted are a, b"):
        alignment.transform(X[:1], domains=["c"])
    with pytest.raises(ValueError, match="one domain for each of 2 trials"):
        alignment.transform(X[:2], domains=["a"])
    with pytest.raises(ValueError, match="finite trials"):
        alignment.fit(X[0])


def test_running_alignment_equals_the_batch_so_far_and_never_looks_ahead():
    X, _ = _mixed_trials()
    running = RunningAlignment(shrinkage=0.2)
    done = [running.push(trial) for trial in X]
    for n in (1, 7, len(X)):
        batch = EuclideanAlignment(shrinkage=0.2).fit(X[:n])
        np.testing.assert_allclose(done[n - 1], batch.transform(X[n - 1 : n])[0], atol=1e-9)
    again = RunningAlignment(shrinkage=0.2)
    changed = [again.push(trial if n < 10 else 100 * trial) for n, trial in enumerate(X)]
    np.testing.assert_array_equal(done[:10], changed[:10])


# alignment of a stream


def aligned_by_hand(x, kind, block, first, memory, shrinkage, limit):
    """Sample after sample, matrix functions by scipy."""

    def covariance(b):
        part = x[:, b * block : (b + 1) * block]
        found = np.cov(part, bias=True)
        return (1 - shrinkage) * found + shrinkage * np.trace(found) / len(x) * np.eye(len(x))

    def mean(before, new, weight):
        new = new * min(1, limit * np.trace(before) / np.trace(new))
        if kind == "euclidean":
            return (1 - weight) * before + weight * new
        root = linalg.sqrtm(before)
        inside = linalg.inv(root) @ new @ linalg.inv(root)
        return root @ linalg.fractional_matrix_power(inside, weight) @ root

    references = [covariance(0)]
    for b in range(1, x.shape[1] // block):
        references.append(mean(references[-1], covariance(b), max(1 / (b + 1), 1 / memory)))
    result = np.empty_like(x)
    for t in range(x.shape[1]):
        result[:, t] = linalg.inv(linalg.sqrtm(references[max(t // block, first) - 1])) @ x[:, t]
    return result


@pytest.mark.parametrize("kind", ["euclidean", "riemannian"])
def test_a_stream_is_aligned_as_by_hand_whatever_its_chunks(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 4)) @ rng.normal(size=(4, 333))
    x[1, 130:140] += 500  # an artefact
    settings = {"block": 20, "first": 3, "memory": 8, "shrinkage": 0.1, "limit": 4.0}
    whole = StreamAlignment(kind, **settings).push(x)
    np.testing.assert_allclose(whole, aligned_by_hand(x, kind, **settings), rtol=1e-9, atol=1e-9)
    for seed in range(3):
        cuts = np.sort(np.random.default_rng(seed).integers(0, 333, size=40))
        stream = StreamAlignment(kind, **settings)
        parts = [stream.push(part) for part in np.split(x, cuts, axis=1) if part.shape[1]]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("kind", ["euclidean", "riemannian"])
def test_other_gains_and_mixtures_become_alike(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 9000))
    mixing = rng.normal(size=(5, 5)) + 3 * np.eye(5)
    one, other = (StreamAlignment(kind, 50, shrinkage=1e-6).push(each)[:, 5000:] for each in (x, mixing @ x))
    for aligned in (one, other):
        np.testing.assert_allclose(np.cov(aligned), np.eye(5), atol=0.15)


def test_a_stream_that_begins_flat_is_aligned_when_it_has_signal():
    x = np.random.default_rng(0).normal(0, 10, size=(3, 1000))
    x[:, :200] = 0
    aligned = StreamAlignment("riemannian", 20).push(x)
    assert not aligned[:, :220].any()
    assert 0.7 < aligned[:, 400:].std() < 1.4
    for wrong in ({"kind": "none"}, {"block": 1}, {"first": 0}, {"shrinkage": 0.0}, {"limit": 0.5}):
        with pytest.raises(ValueError, match=r"must be|need"):
            StreamAlignment(**{"kind": "euclidean", "block": 20} | wrong)
