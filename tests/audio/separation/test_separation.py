"""Long recordings: windows, tracks without swaps, crossfades, levels, memory; live blocks; files on disk."""

import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from nearfar.audio.separation.live import OnlineSeparator
from nearfar.audio.separation.tracking import VoicePrint, Window, certain_pairs, correlate, describe, track_speakers
from nearfar.audio.separation.windows import (
    ArraySource,
    Stitcher,
    model_separator,
    separate_recording,
    separate_samples,
    window_ranges,
)
from nearfar.audio.sound import Recording, resample, writing
from nearfar.core.errors import UserError

RATE = 8000


def voice(pitch, seconds, seed, formant):
    """A harmonic voice with a slow random envelope: `pitch` in Hz, its energy round `formant` Hz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.03 * np.sin(2 * np.pi * 3 * t + seed))) / RATE
    harmonics = np.arange(1, int(3600 / pitch))
    weight = 1 / (1 + ((harmonics * pitch - formant) / 400) ** 2) + 0.05
    sound = sum(w * np.sin(h * phase + rng.uniform(0, 6)) for h, w in zip(harmonics, weight))
    envelope = np.interp(t, np.arange(0, seconds + 1, 0.15), rng.uniform(0.1, 1, len(np.arange(0, seconds + 1, 0.15))))
    sound = sound * envelope
    return (0.1 * sound / np.sqrt(np.mean(sound**2))).astype(np.float32)


def timeline(turns, seconds):
    """turns: (speaker, start, stop). Returns (speakers, n) sources."""
    voices = [(110, 600), (210, 1500), (150, 2600)]
    sources = np.zeros((1 + max(s for s, _, _ in turns), int(seconds * RATE)), dtype=np.float32)
    for turn, (speaker, start, stop) in enumerate(turns):
        pitch, formant = voices[speaker]
        sound = voice(pitch, stop - start, turn, formant)
        sources[speaker, int(start * RATE) : int(start * RATE) + len(sound)] = sound
    return sources


class Oracle:
    """Returns the true voices of a window of the mixture, the order drawn at random each time (or always swapped)."""

    def __init__(self, sources, mix=None, outputs=None, seed=0, leak=0.0, swap="random"):
        self.sources = sources
        self.mix = sources.sum(0) if mix is None else mix
        self.outputs, self.leak, self.swap, self.calls = outputs or len(sources), leak, swap, 0
        self.rng = np.random.default_rng(seed)

    def find(self, window):
        """Where in the mixture this window was cut."""
        if not window.any():
            return None
        k = int(np.abs(window).argmax())
        for at in np.flatnonzero(self.mix == window[k]) - k:
            if at >= 0 and np.array_equal(self.mix[at : at + len(window)], window):
                return int(at)
        raise AssertionError("a window that is no part of the mixture")

    def __call__(self, window):
        at = self.find(window)
        self.calls += 1
        out = np.zeros((self.outputs, len(window)), dtype=np.float32)
        if at is not None:
            pieces = self.sources[:, at : at + len(window)]
            loudest = np.argsort(-np.square(pieces).sum(1))[: self.outputs]
            out[: len(loudest)] = pieces[np.sort(loudest)] + self.leak * pieces.sum(0)
        if self.swap == "odd":
            return out[::-1] if self.calls % 2 == 0 else out
        return out[self.rng.permutation(self.outputs)]


def swaps(tracks, sources, block=2.0):
    """Blocks of `block` seconds in which a voice is not on the track that it is on most of the time."""
    size, where = int(block * RATE), []
    for a in range(0, sources.shape[1] - size + 1, size):
        for k, source in enumerate(sources[:, a : a + size]):
            if np.square(source).mean() > 1e-5:
                error = [np.square(track[a : a + size] - source).sum() for track in tracks]
                where.append((k, int(np.argmin(error))))
    count = 0
    for k in range(len(sources)):
        homes = [track for speaker, track in where if speaker == k]
        count += sum(track != max(set(homes), key=homes.count) for track in homes)
    return count


def naive_stitch(mix, separate, window=10.0, hop=0.5):
    """What most tools do: windows in the order in which the model gave them."""
    stitcher, out = Stitcher(), []
    for start, stop in window_ranges(len(mix), int(window * RATE), int(hop * window * RATE)):
        out.append(stitcher.add(separate(mix[start:stop]), start))
    return np.concatenate([*out, stitcher.rest()], axis=1)


def previous_window_stitch(mix, separate, window=10.0, hop=0.5):
    """Matching with the window before only, by correlation."""
    stitcher, out, before, last = Stitcher(), [], None, 0
    for start, stop in window_ranges(len(mix), int(window * RATE), int(hop * window * RATE)):
        voices = separate(mix[start:stop])
        if before is not None:
            shared = before[:, start - last :]
            score = shared.astype(float) @ voices[:, : shared.shape[1]].T
            if score[0, 1] + score[1, 0] > score[0, 0] + score[1, 1]:
                voices = voices[::-1]
        out.append(stitcher.add(voices, start))
        before, last = voices, start
    return np.concatenate([*out, stitcher.rest()], axis=1)


CONVERSATION = [(0, 0, 9), (1, 5, 22), (0, 18, 34), (1, 30, 45), (0, 41, 60)]
# solo turns with silences longer than any overlap between them: correlation has nothing to go by
UNFAVOURABLE = [(0, 0, 9), (1, 5, 25), (0, 37, 57), (1, 69, 89), (0, 101, 121), (1, 118, 130)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("turns", [CONVERSATION, UNFAVOURABLE], ids=["conversation", "silences"])
@pytest.mark.parametrize("known", [None, 2])
def test_no_voice_changes_its_track(turns, seed, known):
    sources = timeline(turns, turns[-1][2] + 1)
    tracks, report = separate_samples(sources.sum(0), RATE, Oracle(sources, seed=seed), RATE, speakers=known)
    assert report.speakers == 2
    assert swaps(tracks, sources) == 0
    np.testing.assert_allclose(tracks, sources, atol=1e-5)  # tracks in the order in which the voices begin
    assert report.sum_back_db > 60


def test_where_stitching_in_order_and_matching_the_window_before_both_swap():
    sources = timeline(UNFAVOURABLE, 131)
    mix = sources.sum(0)
    assert swaps(naive_stitch(mix, Oracle(sources, swap="odd")), sources) > 5
    assert swaps(previous_window_stitch(mix, Oracle(sources, swap="odd")), sources) > 5
    tracks, _ = separate_samples(mix, RATE, Oracle(sources, swap="odd"), RATE)
    assert swaps(tracks, sources) == 0


def test_more_voices_than_the_model_gives_at_once():
    turns = [(0, 0, 20), (1, 16, 36), (2, 32, 52), (0, 48, 68), (2, 64, 84)]
    sources = timeline(turns, 85)
    tracks, report = separate_samples(sources.sum(0), RATE, Oracle(sources, outputs=2), RATE, speakers=3)
    assert report.speakers == 3
    assert swaps(tracks, sources) == 0
    assert separate_samples(sources.sum(0), RATE, Oracle(sources, outputs=2), RATE, most=3)[1].speakers == 3


def test_one_voice_is_one_track_even_where_the_model_splits_it():
    alone = timeline([(0, 0, 40)], 41)
    tracks, report = separate_samples(alone[0], RATE, Oracle(alone, outputs=2), RATE)
    assert report.speakers == 1
    np.testing.assert_allclose(tracks, alone, atol=1e-5)
    split = lambda window: np.stack([0.6 * window, 0.4 * window])  # noqa: E731
    tracks, report = separate_samples(alone[0], RATE, split, RATE)
    assert report.speakers == 1
    np.testing.assert_allclose(tracks, alone, atol=1e-5)


def test_leakage_between_the_outputs_does_not_disturb_the_order():
    sources = timeline(UNFAVOURABLE, 131)
    tracks, _ = separate_samples(sources.sum(0), RATE, Oracle(sources, leak=0.02), RATE)
    assert swaps(tracks, sources) == 0


def test_confidence_is_low_exactly_where_nothing_decides():
    same = timeline([(0, 0, 9), (0, 30, 50)], 51)[0]
    sources = np.stack(
        [np.where(np.arange(len(same)) < 20 * RATE, same, 0), np.where(np.arange(len(same)) < 20 * RATE, 0, same)]
    )
    same_sounding = lambda samples, rate: np.ones(3)  # noqa: E731 - an embedding that cannot tell anybody apart
    _, report = separate_samples(sources.sum(0), RATE, Oracle(sources), RATE, embed=same_sounding, speakers=2)
    assert report.confidence < 0.1
    assert len(report.uncertain) >= 1
    sources = timeline(CONVERSATION, 61)
    _, report = separate_samples(sources.sum(0), RATE, Oracle(sources), RATE)
    assert report.confidence > 0.1
    assert report.uncertain == []


def test_real_mixtures_joined_with_silences_pass_without_a_swap(shared_data):
    folder = shared_data("libri2mix")
    items = [[soundfile.read(folder / f"item{n}_source{k}.wav", dtype="float32")[0] for k in (1, 2)] for n in range(10)]
    gap = np.zeros((2, int(1.5 * RATE)), dtype=np.float32)
    joined = np.concatenate([part for sources in items for part in (np.stack(sources), gap)], axis=1)
    ends = np.cumsum([0] + [sources[0].shape[0] + gap.shape[1] for sources in items])
    for window, hop in ((10.0, 0.6), (4.0, 0.5)):
        oracle = Oracle(joined, seed=3)
        tracks, report = separate_samples(joined.sum(0), RATE, oracle, RATE, window=window, hop=hop, speakers=2)
        for a, b in pairwise(ends):  # 20 people on two tracks: within each mixture nobody changes
            assert swaps(tracks[:, a:b], joined[:, a:b], 1.0) == 0
        assert report.sum_back_db > 60


# ------------------------------------------------------------------------------------------------------ rates, levels


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 11025, 6000])
def test_any_rate_goes_in_and_comes_out(rate):
    sources = resample(timeline(CONVERSATION, 61)[:, : 31 * RATE], RATE, rate)
    low = lambda mix: np.stack([0.75 * mix, 0.25 * mix])  # noqa: E731
    tracks, report = separate_samples(sources.sum(0), rate, low, RATE, speakers=1)
    assert tracks.shape == (1, sources.shape[1])
    assert report.sum_back_db > 25  # the resampling is all that differs


def test_levels_are_kept_and_the_residual_shared_on_request():
    sources = timeline(CONVERSATION, 61)[:, : 31 * RATE]
    half = Oracle(sources)
    quiet = lambda window: 0.5 * half(window)  # noqa: E731
    tracks, report = separate_samples(sources.sum(0), RATE, quiet, RATE)
    np.testing.assert_allclose(tracks, 0.5 * sources, atol=1e-5)
    assert report.sum_back_db == pytest.approx(6.02, abs=0.01)
    tracks, report = separate_samples(sources.sum(0), RATE, quiet, RATE, consistency=True)
    np.testing.assert_allclose(tracks.sum(0), sources.sum(0), atol=1e-6)
    assert report.sum_back_db > 100


def test_crossfade_weights_sum_to_one():
    rng = np.random.default_rng(0)
    sound = rng.standard_normal((2, 5000)).astype(np.float32)
    stitcher, out = Stitcher(), []
    ranges = window_ranges(5000, 1000, 600)
    for start, stop in ranges:
        out.append(stitcher.add(sound[:, start:stop], start))
    np.testing.assert_allclose(np.concatenate([*out, stitcher.rest()], axis=1), sound, atol=1e-6)
    assert ranges[-1] == (4000, 5000)


@pytest.mark.parametrize("total", [1, 999, 1000, 1001, 1600, 5003])
@pytest.mark.parametrize("unit", [1, 7])
def test_windows_cover_everything_and_overlap(total, unit):
    ranges = window_ranges(total, 1000, 600, unit)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(start % unit == 0 for start, _ in ranges)
    for (a, b), (c, d) in pairwise(ranges):
        assert a < c < b < d


def test_memory_does_not_grow_with_the_length(tmp_path):
    class Noise:
        rate = RATE

        def __init__(self, seconds):
            self.frames = int(seconds * RATE)

        def read(self, start, stop):
            t = np.arange(start, stop) / RATE
            return (0.1 * np.sin(2 * np.pi * 200 * t) * (1 + np.sin(t))).astype(np.float32)

    def peak(seconds):
        tracemalloc.start()
        halves = lambda mix: np.stack([0.7 * mix, 0.3 * mix])  # noqa: E731
        for _ in separate_recording(Noise(seconds), halves, RATE, tmp_path).blocks():
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(20)  # what is made once
    assert peak(300) < 1.2 * peak(60)


# ---------------------------------------------------------------------------------------------------------- live, model


@pytest.mark.parametrize("block", [160, 8000, 50000])
def test_live_blocks_of_any_size_give_the_same_tracks(block):
    sources = timeline(UNFAVOURABLE, 131)
    mix = sources.sum(0)
    online = OnlineSeparator(Oracle(sources, swap="odd"), RATE, window=8.0)
    out = [online.push(mix[a : a + block]) for a in range(0, len(mix), block)]
    out = np.concatenate([o for o in [*out, online.finish()] if o.shape[1]], axis=1)
    assert out.shape == mix[None].repeat(2, 0).shape
    assert swaps(out, sources) == 0


def test_live_latency_is_one_window_and_memory_stays():
    halves = lambda mix: np.stack([0.7 * mix, 0.3 * mix])  # noqa: E731
    online = OnlineSeparator(halves, RATE, window=2.0)
    came = 0
    for n in range(1, 400):
        came += online.push(np.ones(800, dtype=np.float32)).shape[1]
        assert n * 800 - came < 2.0 * RATE
        assert len(online.held) < 2.0 * RATE
    assert len(online.uncertain) <= 1000


def test_short_live_input():
    online = OnlineSeparator(lambda mix: np.stack([mix, 0 * mix]), RATE)
    assert online.push(np.ones(100, dtype=np.float32)).shape[1] == 0
    assert online.finish().shape == (2, 100)
    assert OnlineSeparator(lambda mix: mix[None], RATE).finish().shape == (0, 0)


def test_a_model_as_separator_takes_less_than_one_frame():
    from nearfar.audio.separation.mossformer import MossFormer

    model = MossFormer(num_filters=8, dim=8, depth=1, group_size=16, query_key_dim=4)
    separate = model_separator(model)
    assert separate(np.ones(5, dtype=np.float32)).shape == (2, 5)
    mix = np.random.default_rng(0).standard_normal(900).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(mix)[None])[0].numpy()
    np.testing.assert_allclose(separate(mix), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ tracking


def test_pairs_are_certain_only_with_a_margin():
    assert certain_pairs(np.array([[0.9, 0.1], [0.0, 0.0]])) == {0: (0, 0.8)}
    assert certain_pairs(np.array([[0.9, 0.85], [0.1, 0.9]])) == {}
    assert set(certain_pairs(np.array([[0.1, 0.9], [0.8, 0.2]]))) == {0, 1}


def test_correlation_is_zero_for_silence_and_opposition():
    a = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    a[1] *= 1e-3
    assert correlate(a, a)[0, 0] == pytest.approx(1)
    assert correlate(a, a)[1, 1] == 0
    assert correlate(a, -a)[0, 0] == 0


def test_voice_print_tells_voices_apart_whatever_the_level():
    embed = VoicePrint()
    low, low2, high = voice(110, 10, 0, 600), voice(110, 10, 1, 600), voice(210, 10, 2, 1500)
    near, far = (
        np.linalg.norm(embed(low, RATE) - embed(low2, RATE)),
        np.linalg.norm(embed(low, RATE) - embed(high, RATE)),
    )
    assert near < embed.threshold < far
    np.testing.assert_allclose(embed(low, RATE), embed(3 * low, RATE), atol=1e-3)
    assert np.isfinite(embed(np.zeros(100, np.float32), RATE)).all()


def test_without_embeddings_the_overlap_alone_decides():
    windows = [
        Window(np.array([True, True]), np.array([5.0, 5.0]), np.array([-1, -1]), np.full((2, 1), np.nan), overlap)
        for overlap in (None, np.array([[0.0, 0.9], [0.9, 0.0]]), np.array([[0.9, 0.0], [0.0, 0.9]]))
    ]
    tracks = track_speakers(windows)
    assert tracks.labels.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert tracks.confidence.min() > 0.8


def test_twins_and_silence_are_described():
    sound = voice(110, 4, 0, 600)
    window = describe(np.stack([0.3 * sound, 0.7 * sound, 1e-4 * sound]), RATE, VoicePrint())
    assert window.active.tolist() == [True, True, False]
    assert window.twin.tolist() == [1, -1, -1]
    assert 1 < window.seconds[1] <= 4


# ---------------------------------------------------------------------------------------------------------------- files


def test_recording_reads_pieces_as_one_channel(tmp_path):
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (44100, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", stereo, 44100, "PCM_24")
    with Recording(tmp_path / "a.flac") as recording:
        assert (recording.rate, recording.channels, recording.frames) == (44100, 2, 44100)
        np.testing.assert_allclose(recording.read(100, 300), stereo[100:300].mean(1), atol=1e-6)
        assert sum(len(block) for block in recording.blocks(0.3)) == 44100


def test_bad_recordings_are_named(tmp_path):
    sound = np.full(8000, 0.1, dtype=np.float32)
    path = tmp_path / "x.wav"
    with pytest.raises(UserError, match="no such file"):
        Recording(path)
    path.write_bytes(b"not a sound at all")
    with pytest.raises(UserError, match=r"x\.wav: cannot be read as sound"):
        Recording(path)
    soundfile.write(path, sound, RATE)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        Recording(path)
    soundfile.write(path, sound[:0], RATE)
    with pytest.raises(UserError, match="holds no sound"):
        Recording(path)
    sound[77] = np.nan
    soundfile.write(path, sound, RATE, "FLOAT")
    with pytest.raises(UserError, match=r"no number .* at 0\.010 s"), Recording(path) as recording:
        recording.read(0, 8000)
    soundfile.write(path, np.zeros(8000, np.float32), RATE)
    with pytest.raises(UserError, match="silent"), Recording(path) as recording:
        separate_recording(recording, lambda mix: mix[None], RATE, tmp_path)


def test_files_are_written_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "one.wav", tmp_path / "two.wav"]
    with pytest.raises(RuntimeError), writing(paths, RATE) as files:
        files.write(np.ones((2, 100), np.float32))
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []
    with writing(paths, RATE) as files:
        files.write(np.full((2, 100), 1.5, np.float32))
    assert soundfile.read(paths[1])[0].max() == 1.5  # float: a level above full scale is kept


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    script = f"""
import resource, signal, numpy as np
from pathlib import Path
from nearfar.audio.sound import writing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with writing([Path({str(tmp_path)!r}) / "a.wav"], 8000) as files:
        for _ in range(20):
            files.write(np.ones((1, 8000), np.float32))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError" in done.stdout, done.stderr
    assert "is the disk full?" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_are_named(tmp_path):
    source = ArraySource(np.ones(8000, np.float32), RATE)
    run = lambda **options: separate_recording(source, lambda mix: mix[None], RATE, tmp_path, **options)  # noqa: E731
    with pytest.raises(ValueError, match=r"window is 0\.5 s"):
        run(window=0.5)
    with pytest.raises(ValueError, match=r"hop is 0\.9"):
        run(hop=0.9)
    with pytest.raises(ValueError, match="speakers is 0"):
        run(speakers=0)
    with pytest.raises(ValueError, match="must return"):
        separate_recording(source, lambda mix: mix, RATE, tmp_path)
    with pytest.raises(UserError, match="one channel"):
        ArraySource(np.ones((2, 8)), RATE)


def test_voices_that_were_asked_for_are_never_merged():
    """A poor model's outputs are much alike; both stay, and the report says so."""
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal(10 * RATE).astype(np.float32) for _ in range(2))

    def poor(mix):
        share = np.sqrt(0.5).astype(np.float32)
        pair = np.stack([one, share * one + share * other])[:, : len(mix)]  # correlation 0.71
        return 0.1 * pair

    tracks, report = separate_samples(0.1 * (one + other), RATE, poor, RATE, speakers=2)
    assert (np.sqrt((tracks**2).mean(1)) > 0.05).all()
    assert report.correlation == pytest.approx(0.71, abs=0.02)
    assert report.confidence == pytest.approx(1 - report.correlation, abs=0.02)
    assert not report.collapsed
    same = lambda mix: 0.1 * np.stack([one, 0.8 * one])[:, : len(mix)]  # noqa: E731
    tracks, report = separate_samples(0.1 * one, RATE, same, RATE, speakers=2)
    assert (np.sqrt((tracks**2).mean(1)) > 0.05).all()
    assert report.collapsed
    assert report.confidence < 0.01
    alone, report = separate_samples(0.1 * one, RATE, same, RATE, speakers=1)
    assert len(alone) == 1
    assert not report.collapsed


@pytest.mark.parametrize("samples", [1, 10, 799])
def test_a_few_samples_are_refused(samples):
    with pytest.raises(UserError, match=f"{samples} samples .* too few to separate"):
        separate_samples(np.full(samples, 0.1, np.float32), 8000, lambda mix: np.stack([mix, mix]), 8000)
