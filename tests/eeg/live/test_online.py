import mne
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.alignment import ExponentialMovingStandardizer
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.live.scores import live_error, pseudo_online, score_events, stream_error
from nearfar.eeg.live.steps import AverageReference, CausalDecimator, CausalFilter
from nearfar.eeg.live.stream import Decisions, Rule, StreamDecoder, decode, windows
from nearfar.eeg.models import baselines
from nearfar.eeg.preprocessing import Preprocessing

SFREQ = 100.0


class Rough:
    """Three classes from each window by itself, and a record of the windows."""

    def __init__(self):
        self.seen = []

    def predict_proba(self, X):
        assert X.dtype == np.float32
        self.seen.append(X)
        features = np.stack([X[:, 0, -1], X[:, 1, 0], X[:, 0].std(1) - X[:, 1].std(1)], axis=1).astype(float)
        features = np.exp(3 * features / np.abs(features).max(1, keepdims=True))
        return features / features.sum(1, keepdims=True)


def noise(channels=3, times=1500, seed=0):
    return 10 * np.random.default_rng(seed).normal(size=(channels, times)).cumsum(1) + 50


def steps():
    return [
        CausalFilter.band(SFREQ, 1, 40),
        CausalDecimator(2),
        AverageReference(),
        ExponentialMovingStandardizer(factor_new=0.01, init_block_size=None),
    ]


# Windows and steps


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 25))
def test_windows_are_the_slices_of_a_loop(times, n_times, step):
    data = np.arange(2 * times).reshape(2, times)
    starts, found = windows(data, n_times, step)
    expected = list(range(0, times - n_times + 1, step))
    assert starts.tolist() == expected
    assert found.shape == (len(expected), 2, n_times)
    for start, window in zip(expected, found, strict=True):
        np.testing.assert_array_equal(window, data[:, start : start + n_times])
    assert not len(expected) or np.shares_memory(found, data)


def in_chunks(step, data, sizes):
    cuts = np.cumsum(sizes)
    return np.concatenate([step.push(chunk) for chunk in np.split(data, cuts[cuts < data.shape[1]], axis=1)], axis=1)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 90), min_size=20, max_size=20), st.integers(0, 3))
def test_steps_do_not_depend_on_chunks(sizes, which):
    data = noise(times=700)
    np.testing.assert_array_equal(in_chunks(steps()[which], data, sizes), steps()[which].push(data))


def test_filter_is_that_of_scipy_and_starts_without_a_transient():
    data = noise()
    band = CausalFilter.band(SFREQ, 8, 30)
    zi = signal.sosfilt_zi(band.sos)[:, None] * data[None, :, :1]
    np.testing.assert_array_equal(band.push(data), signal.sosfilt(band.sos, data, axis=1, zi=zi)[0])
    flat = CausalFilter.band(SFREQ, 1, None).push(np.full((2, 300), 1e4))
    assert np.abs(flat).max() < 1e-4
    for edges in ((None, None), (10, 5), (5, 5), (1, 50), (0, 10)):
        with pytest.raises(ValueError, match="need 0 < low < high"):
            CausalFilter.band(SFREQ, *edges)


def test_decimation_keeps_low_and_removes_high_frequencies():
    time = np.arange(4000) / SFREQ
    low, high = (np.sin(2 * np.pi * f * time)[None] for f in (2, 20))
    kept = CausalDecimator(4).push(low)[:, 250:]
    assert kept.shape == (1, 750)
    assert kept.std() == pytest.approx(np.sqrt(0.5), rel=0.02)
    assert CausalDecimator(4).push(high)[:, 250:].std() < 0.01
    np.testing.assert_array_equal(CausalDecimator(1).push(low), low)
    with pytest.raises(ValueError, match="positive integer"):
        CausalDecimator(0)


def test_average_reference():
    data = noise(channels=5)
    np.testing.assert_allclose(AverageReference().push(data), data - data.mean(0), rtol=1e-12)


# The rule


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6),
    st.floats(0, 0.8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.7, 2.0]),
    st.sampled_from([None, 0, 2]),
)
def test_rule_equals_a_plain_loop(seed, threshold, smoothing, dwell, refractory, idle):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3) / 2, size=25)
    p = np.repeat(p, rng.integers(1, 5, size=25), axis=0)
    p[rng.random(len(p)) < 0.03] = np.nan
    times = np.arange(len(p)) * 0.25
    found = Rule(threshold, smoothing, dwell, refractory, idle).apply(p, times)
    decisions, row, last = [], None, -np.inf
    for i in range(len(p)):
        mean = p[max(0, i - smoothing + 1) : i + 1].mean(0)
        np.testing.assert_allclose(found.probabilities[i], mean)
        choice = -1
        if np.isfinite(mean).all() and found.probabilities[i].max() >= threshold and mean.argmax() != idle:
            choice = int(mean.argmax())
        decisions.append(choice)
        held = decisions[-1] if len(decisions) >= dwell and len(set(decisions[-dwell:])) == 1 else -1
        command = -1
        if held != -1 and held != row and times[i] - last >= refractory:
            command, last = held, times[i]
        row = held
        assert (found.decisions[i], found.commands[i]) == (choice, command)


def test_rule_refuses_nonsense():
    for options in ({"threshold": 1.5}, {"smoothing": 0}, {"dwell": 0}, {"refractory": -1.0}):
        with pytest.raises(ValueError, match="must"):
            Rule(**options)


# Streams


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 200), min_size=5, max_size=60),
    st.integers(1, 80),
    st.integers(1, 120),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.5]),
    st.booleans(),
)
def test_streamed_equals_whole(sizes, n_times, step, smoothing, dwell, refractory, prepared):
    data = noise()
    options = {"steps": steps() if prepared else [], "rule": Rule(0.4, smoothing, dwell, refractory, idle=2)}
    whole, live = Rough(), Rough()
    expected = decode(whole, data, n_times, step, SFREQ, **options)
    stream = StreamDecoder(live, n_times, step, SFREQ, **options)
    cuts = np.cumsum(sizes)
    parts = [stream.push(chunk) for chunk in np.split(data, cuts[cuts < data.shape[1]], axis=1)]
    parts = [part for part in parts if len(part)]
    np.testing.assert_array_equal(np.concatenate(live.seen), np.concatenate(whole.seen))
    for name in ("times", "probabilities", "decisions", "commands"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(expected, name))
    assert (expected.decisions != -1).any() or n_times == 1


def test_a_decision_comes_with_the_sample_that_completes_its_window():
    stream = StreamDecoder(Rough(), 50, 20, SFREQ)
    data = noise(times=200)
    arrived = [len(stream.push(data[:, i : i + 1])) for i in range(200)]
    assert np.flatnonzero(arrived).tolist() == list(range(49, 200, 20))


def test_memory_does_not_grow():
    stream = StreamDecoder(Rough(), 50, 7, SFREQ, rule=Rule(smoothing=3, dwell=2))
    for _ in range(200):
        stream.push(noise(times=13))
    assert stream._buffer.base is None
    assert stream._buffer.shape[1] < 50
    assert len(stream._recent) == 4


@pytest.mark.parametrize("end", [400, 777, 1200])
def test_no_window_sees_samples_after_its_end(end):
    data = noise()
    changed = data.copy()
    changed[:, end:] += 1e3 * np.random.default_rng(1).normal(size=changed[:, end:].shape)
    options = {"steps": steps(), "rule": Rule(0.4, smoothing=3, dwell=2, refractory=1.0)}
    first, second = (decode(Rough(), x, 60, 5, SFREQ / 2, **options) for x in (data, changed))
    before = first.times * 2 * SFREQ / 2 <= end
    assert before.any()
    assert not before.all()
    for name in ("probabilities", "decisions", "commands"):
        a, b = (getattr(x, name) for x in (first, second))
        np.testing.assert_array_equal(a[before], b[before])
        assert name != "probabilities" or not np.array_equal(a[~before], b[~before])


def test_a_network_streams_as_it_decodes_the_whole():
    network = baselines.network("EEGNet", 3, 2, 100, SFREQ).eval()

    class Classifier:
        def predict_proba(self, X):
            with torch.no_grad():
                return network(torch.from_numpy(X)).softmax(1).numpy()

    error = stream_error(Classifier(), noise(), 100, 10, SFREQ / 2, steps=steps(), rule=Rule(smoothing=3))
    assert error < 1e-5


def test_stream_error_tells_a_decoder_that_looks_beyond_its_window():
    class Leaking:
        def predict_proba(self, X):
            return np.stack([1 / (1 + X[:, 0, 0] ** 2), 1 - 1 / (1 + X[:, 0, 0] ** 2)], axis=1) * (X - X.mean(0)).max()

    assert stream_error(Leaking(), noise(), 50, 10, SFREQ) > 1e-3


def test_streams_refuse_what_would_spoil_them():
    stream = StreamDecoder(Rough(), 50, 10, SFREQ, steps=steps())
    data = noise()
    before = stream.push(data[:, :300])
    with pytest.raises(UserError, match="had 3 channels, the new chunk has 2"):
        stream.push(data[:2])
    after = stream.push(data[:, 300:])  # as if nothing had happened
    whole = decode(Rough(), data, 50, 10, SFREQ, steps=steps())
    np.testing.assert_array_equal(np.concatenate([before.probabilities, after.probabilities]), whole.probabilities)
    with pytest.raises(ValueError, match="channels, times"):
        stream.push(data[0])
    with pytest.raises(ValueError, match="at least 1"):
        StreamDecoder(Rough(), 50, 0, SFREQ)
    with pytest.raises(UserError, match="window needs 50"):
        decode(Rough(), data[:, :20], 50, 10, SFREQ)


def spoil(data, kind):
    bad = data.copy()
    if kind == "railed":
        bad[1, 500:700] = np.where(np.arange(200) % 20 < 10, 3e3, -3e3)
    else:
        bad[1, 500:700] = {"flat": 12.0, "nan": np.nan, "inf": np.inf, "-inf": -np.inf}[kind]
    return bad


SAID = {"flat": "flat", "railed": "railed", "nan": "not finite", "inf": "not finite", "-inf": "not finite"}


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("prepared", [False, True])
def test_spoilt_input_abstains_and_says_so(kind, prepared):
    data = spoil(noise(), kind)
    options = {"steps": steps() if prepared else []}
    rate = SFREQ / 2 if prepared else SFREQ
    n_times, step = (50, 5) if prepared else (100, 10)
    found = decode(Rough(), data, n_times, step, rate, **options)
    starts, ends = found.times - 1.0, found.times
    touched = (ends > 5.3) & (starts < 6.7)
    assert set(found.reasons[touched]) == {f"channel 2 {SAID[kind]}"}
    assert (found.decisions[touched] == -1).all()
    assert np.isnan(found.probabilities[touched]).all()
    clean = (ends < 5.0) | (starts > 7.1)
    assert set(found.reasons[clean]) == {""}
    assert np.isfinite(found.probabilities[clean]).all()
    stream = StreamDecoder(Rough(), n_times, step, rate, **options)
    parts = [stream.push(chunk) for chunk in np.split(data, range(37, 1500, 37), axis=1)]
    parts = [part for part in parts if len(part)]
    for name in ("probabilities", "decisions", "reasons"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(found, name))


def test_an_answer_that_is_not_finite_is_no_decision_and_said():
    class Sometimes:
        def predict_proba(self, X):
            return np.where(np.arange(len(X))[:, None] % 2, np.nan, [0.9, 0.1])

    made = decode(Sometimes(), np.random.default_rng(0).normal(0, 10, (3, 200)), 100, 20, 100.0)
    assert made.reasons.tolist() == ["", "the decoder's answer is not finite"] * 3
    assert made.decisions.tolist() == [0, -1] * 3


def test_a_stream_that_is_flat_from_the_start():
    stream = StreamDecoder(Rough(), 50, 10, SFREQ, rule=Rule(smoothing=2))
    first = stream.push(np.zeros((3, 120)))
    assert set(first.reasons) == {"channel 1, channel 2, channel 3 flat"}
    later = stream.push(noise(times=300))
    assert np.isfinite(later.probabilities[-1]).all()
    assert (later.decisions[-5:] != -1).all()


def test_averages_over_a_window_that_abstains_say_so():
    found = decode(Rough(), spoil(noise(), "nan"), 50, 50, SFREQ, rule=Rule(smoothing=3))
    assert "averaged with a window that abstains" in set(found.reasons)
    assert (found.decisions[found.reasons != ""] == -1).all()


class Trained(Rough):
    ch_names, sfreq = ("C3", "Cz", "C4"), SFREQ


def test_a_stream_is_taken_by_name_unit_and_rate():
    data = noise()
    whole = decode(Trained(), data, 50, 10, SFREQ).probabilities
    named = StreamDecoder(Trained(), 50, 10, SFREQ, ch_names=["TRG", "EEG C4-Ref", "cz", "C3"], unit="V", rate=SFREQ)
    given = np.concatenate([np.zeros((1, 1500)), data[::-1]]) * 1e-6
    np.testing.assert_allclose(named.push(given).probabilities, whole, rtol=1e-5)
    with pytest.raises(UserError, match="channel Cz not exactly once"):
        StreamDecoder(Trained(), 50, 10, SFREQ, ch_names=["C3", "C4"])
    with pytest.raises(UserError, match="channel C3 not exactly once"):
        StreamDecoder(Trained(), 50, 10, SFREQ, ch_names=["C3", "c3", "Cz", "C4"])
    with pytest.raises(UserError, match="had 3 channels, the new chunk has 4"):
        StreamDecoder(Trained(), 50, 10, SFREQ).push(noise(channels=4))
    with pytest.raises(UserError, match="250 Hz, after the steps 125 Hz"):
        StreamDecoder(Trained(), 50, 10, SFREQ, steps=[CausalDecimator(2)], rate=250)
    with pytest.raises(UserError, match="windows are of 100 Hz, not 50 Hz"):
        StreamDecoder(Trained(), 50, 10, SFREQ / 2)
    with pytest.raises(UserError, match="unit must be one of"):
        StreamDecoder(Trained(), 50, 10, SFREQ, unit="T")


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_samples_that_cannot_be_microvolts_are_refused(scale):
    stream = StreamDecoder(Rough(), 50, 10, SFREQ)
    with pytest.raises(UserError, match="no EEG; say the samples' unit"):
        stream.push(noise() * scale)
    np.testing.assert_array_equal(
        stream.push(noise()).probabilities, decode(Rough(), noise(), 50, 10, SFREQ).probabilities
    )


# The causal chain


def test_the_causal_chain_does_what_the_preprocessing_does():
    names = [f"E{k}" for k in range(8)]
    settings = Preprocessing(l_freq=4, h_freq=30, notch=50, sfreq=100, standardization="exponential-moving")
    kinds = [type(one).__name__ for one in settings.causal_steps(200, names)]
    assert kinds == [
        "CausalFilter",
        "CausalFilter",
        "CausalDecimator",
        "AverageReference",
        "ExponentialMovingStandardizer",
    ]
    assert not Preprocessing().causal_steps(160, names[:3])
    time = np.arange(4000) / 200
    wave = np.stack([np.sin(2 * np.pi * 50 * time), np.sin(2 * np.pi * 10 * time)])
    out = CausalFilter.notch(200, 50).push(wave)[:, 2000:]
    assert out[0].std() < 0.02
    assert out[1].std() == pytest.approx(np.sqrt(0.5), rel=0.02)
    for wrong in (
        {"sfreq": 120},
        {"sfreq": 400},
        {"reference": ("A1",)},
        {"standardization": "trial"},
        {"order": "published"},
    ):
        with pytest.raises(UserError):
            Preprocessing(**wrong).causal_steps(200, names)


def test_the_check_measures_the_whole_chain():
    names = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"]
    network = baselines.network("EEGNet", 8, 2, 128, 64.0).eval()
    settings = Preprocessing(tmax=2, l_freq=8, h_freq=28, sfreq=64)
    decoder = Decoder(network, ["left_hand", "right_hand"], settings, names, {"sfreq": 64.0})
    raw = mne.io.RawArray(noise(8, 6000) * 1e-6, mne.create_info(names, 128.0, "eeg"), verbose="ERROR")
    whole = decode(decoder, settings.apply(raw).get_data() * 1e6, 128, 16, 64.0)
    found = live_error(decoder, raw, whole, 16)
    assert found["streamed - whole"] < 1e-5
    assert found["live - offline"] > 1e-4  # the causal filters are others
    assert 0 <= found["live differs"] <= 1
    same = decode(decoder, raw.get_data() * 1e6, 128, 16, 64.0, steps=settings.causal_steps(128.0, names))
    assert live_error(decoder, raw, same, 16)["live - offline"] < 1e-5
    odd = raw.copy().resample(100.0, verbose="ERROR")
    assert np.isnan(live_error(decoder, odd, whole, 16)["live differs"])
    with pytest.raises(UserError, match="128 Hz, after the steps"):
        StreamDecoder(decoder, 128, 16, 64.0, rate=128.0)


# Scores


def decisions_at(times, commands):
    times, commands = np.array(times, float), np.array(commands, int)
    return Decisions(times, np.zeros((len(times), 2)), commands, commands)


def test_events_are_scored_as_by_hand():
    found = score_events(
        decisions_at([2, 11, 12, 13, 22, 35.5, 41, 50], [1, -1, 0, 1, 0, 1, 1, 0]),
        onsets=[10, 20, 30, 40],
        labels=[0, 1, 1, 1],
        duration=5,
        total=60,
        n_classes=2,
    )
    # 2: false; 12: hit after 2 s; 13: repeat; 22: wrong; 35.5: half a second late, false; 41: hit after 1 s; 50: false
    bits = metrics.bits_per_selection(2 / 6, 2) * 6
    assert found == {
        "events": 4,
        "hits": 2,
        "wrong": 1,
        "missed": 1,
        "repeats": 1,
        "false": 3,
        "false_per_minute": pytest.approx(3 / (40 / 60)),
        "hit_rate": 0.5,
        "latency": 1.5,
        "bits_per_minute": bits,
    }


def test_scores_of_silence_and_of_perfection():
    options = {"duration": 4, "total": 40, "n_classes": 2}
    silent = score_events(decisions_at([5, 15], [-1, -1]), [4, 14], [0, 1], **options)
    assert (silent["hits"], silent["missed"], silent["hit_rate"], silent["bits_per_minute"]) == (0, 2, 0, 0)
    assert np.isnan(silent["latency"])
    perfect = score_events(decisions_at([5, 15], [0, 1]), [4, 14], [0, 1], **options)
    assert (perfect["hit_rate"], perfect["false"], perfect["bits_per_minute"]) == (1, 0, pytest.approx(3))
    nothing = score_events(decisions_at([5], [1]), [], [], **options)
    assert (nothing["false_per_minute"], nothing["events"]) == (1.5, 0)
    with pytest.raises(ValueError, match="ascend"):
        score_events(decisions_at([5], [1]), [3, 2], [0, 1], **options)


@given(
    st.lists(st.floats(0.1, 100), unique=True, min_size=1, max_size=30).map(sorted),
    st.lists(st.integers(-1, 2), min_size=30, max_size=30),
    st.lists(st.floats(0, 99), unique=True, max_size=8).map(sorted),
    st.floats(0.5, 30),
)
def test_every_event_and_every_command_is_counted_once(times, commands, onsets, duration):
    given_ = decisions_at(times, commands[: len(times)])
    found = score_events(given_, onsets, np.zeros(len(onsets)), duration=duration, total=101, n_classes=3)
    assert found["hits"] + found["wrong"] + found["missed"] == found["events"] == len(onsets)
    assert found["hits"] + found["wrong"] + found["repeats"] + found["false"] == (given_.commands != -1).sum()
    assert found["missed"] >= 0


def test_pseudo_online_finds_power_that_changes_sides():
    """A decoder of band power, trained on trials, answers the cues of a recording that it has not seen."""
    rng = np.random.default_rng(0)
    band = signal.butter(4, (8, 30), "bandpass", fs=SFREQ, output="sos")

    def recording(seed, n=40):
        onsets, labels = 4.0 + 6 * np.arange(n), rng.permutation(np.arange(n) % 2)
        data = np.random.default_rng(seed).normal(size=(4, int(6 * n + 8) * int(SFREQ)))
        data = signal.sosfilt(band, data, axis=1)
        for onset, label in zip(onsets, labels):
            data[label, int(onset * SFREQ) : int((onset + 3) * SFREQ)] *= 5
        raw = mne.io.RawArray(data * 1e-6, mne.create_info(4, SFREQ, "eeg"), verbose="ERROR")
        raw.set_annotations(mne.Annotations(onsets, 0, np.array(["left", "right"])[labels]))
        return raw

    raw = recording(1)
    onsets = (raw.annotations.onset * SFREQ).astype(int)
    idle = onsets - 250
    X = np.stack([raw.get_data()[:, s : s + 100] * 1e6 for s in (*(onsets + 100), *idle)]).astype(np.float32)
    y = np.concatenate([raw.annotations.description == "right", np.full(len(idle), 2)]).astype(int)
    decoder = baselines.tangent_space(SFREQ).fit(X, y)
    rule = Rule(threshold=0.6, smoothing=2, dwell=2, refractory=2.0, idle=2)
    test = recording(2)
    events = {"left": 0, "right": 1}
    found, scores, table = pseudo_online(decoder, test, events, 100, 20, duration=4.0, n_classes=2, rule=rule)
    assert len(found) == (test.n_times - 100) // 20 + 1
    assert table["label"].tolist() == (test.annotations.description == "right").astype(int).tolist()
    assert scores["hit_rate"] > 0.9
    assert scores["false_per_minute"] < 1
    assert 0 < scores["latency"] < 2.5
    assert scores["bits_per_minute"] > 5
    with pytest.raises(UserError, match="none of the events up; it has left, right"):
        pseudo_online(decoder, test, {"up": 0}, 100, 20, duration=4.0, n_classes=2)
