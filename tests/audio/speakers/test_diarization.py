"""Who spoke when, on sounds whose talkers the test composes; RTTM; error rates against counting by hand."""

import tracemalloc

import numpy as np
import pytest

from nearfar.audio.speakers.diarization import (
    Turn,
    diarize,
    error_rate,
    merge_turns,
    overlap_seconds,
    read_rttm,
    speech_regions,
    windows_at_once,
    write_rttm,
)
from nearfar.audio.speakers.encoders import ForeignEncoder
from nearfar.audio.speakers.quality import QualityMeter
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError

RATE = 8000


def talk(speaker, seconds, seed=0):
    """Noise in the band of a speaker, in syllables."""
    rng, count = np.random.default_rng([speaker, seed]), int(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / RATE)
    spectrum *= np.exp(-(((frequency - 400 - 600 * speaker) / 250) ** 2))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * np.arange(count) / RATE)
    sound = np.fft.irfft(spectrum, count) * syllables
    return (0.2 * sound / np.abs(sound).max()).astype(np.float32)


def embed(samples):
    power = np.abs(np.fft.rfft(samples[: len(samples) // 80 * 80].reshape(-1, 80), axis=1)[:, :40]) ** 2
    level = np.log(power.mean(0) + 1e-2)
    return level - level.mean()


@pytest.fixture(scope="module")
def system():
    system = SpeakerSystem(ForeignEncoder(embed, RATE, "bands", "bands"))
    speakers = [n // 8 for n in range(40)]
    x = np.stack([embed(talk(speaker, 1.5, 100 + n)) for n, speaker in enumerate(speakers)]).astype(np.float32)
    system.calibrate(x, [str(s) for s in speakers])
    return system


def compose(turns, seconds):
    sound = 1e-4 * np.random.default_rng(0).standard_normal(int(seconds * RATE)).astype(np.float32)
    for number, turn in enumerate(turns):
        start = int(turn.start * RATE)
        part = talk(int(turn.speaker), turn.end - turn.start, number)
        sound[start : start + len(part)] += part
    return sound


def in_blocks(sound, size=3 * RATE + 7):
    return lambda: (sound[start : start + size] for start in range(0, len(sound), size))


TURNS = [
    Turn(0.5, 6, "0"),
    Turn(7, 12, "1"),
    Turn(12, 18, "2"),
    Turn(19, 24, "0"),
    Turn(25, 31, "1"),
    Turn(31, 36, "3"),
]


def test_talkers_are_counted_and_found_whatever_the_blocks(system):
    sound = compose(TURNS, 37)
    found = diarize(in_blocks(sound), system)
    assert len(found.voices) == 4
    error = error_rate(TURNS, found.turns, 37)
    assert error["der"] < 0.08, error
    again = diarize(in_blocks(sound, 1000), system)
    assert [t.speaker for t in again.turns] == [t.speaker for t in found.turns]
    np.testing.assert_allclose([(t.start, t.end) for t in again.turns], [(t.start, t.end) for t in found.turns])
    assert len(diarize(in_blocks(sound), system, at_once=20).voices) == 4  # every fourth window
    assert len(diarize(in_blocks(sound), system, speakers=2).voices) == 2
    assert found.turns[0].start == pytest.approx(0.5, abs=0.1)


def test_one_talker_is_one(system):
    assert len(diarize(in_blocks(compose([Turn(1, 14, "2"), Turn(15, 29, "2")], 30)), system).voices) == 1


def test_overlap_is_heard_through_a_separator(system):
    turns = [Turn(0.5, 10, "0"), Turn(6, 18, "3")]
    sound = compose(turns, 19)

    def by_band(samples, rate):
        spectrum = np.fft.rfft(samples)
        low = np.fft.rfftfreq(len(samples), 1 / rate) < 1300
        return np.stack([np.fft.irfft(spectrum * part, len(samples)) for part in (low, ~low)]).astype(np.float32)

    alone, split = diarize(in_blocks(sound), system, speakers=2), diarize(in_blocks(sound), system, 2, by_band)
    assert alone.overlap == 0
    assert split.overlap == pytest.approx(4, abs=1.5)  # windows of 2 s
    missed = [error_rate(turns, found.turns, 19)["missed_detection"] for found in (alone, split)]
    assert missed[1] < missed[0] - 0.1


def test_no_speech_is_refused_and_no_calibration_is_needed(system):
    with pytest.raises(UserError, match="nothing in it is speech"):
        diarize(in_blocks(np.zeros(RATE, np.float32)), system)
    bare = SpeakerSystem(system.model)
    assert len(diarize(in_blocks(compose(TURNS, 37)), bare).voices) == 4


def test_digital_silence_is_no_speech():
    meter = QualityMeter(RATE)
    meter.add(
        np.concatenate([np.zeros(5 * RATE, np.float32), compose([Turn(1, 3, "0")], 4), np.zeros(RATE, np.float32)])
    )
    ((start, end),) = speech_regions(meter)
    assert (start, end) == (pytest.approx(6, abs=0.15), pytest.approx(8, abs=0.15))


def test_turns_and_overlap_by_hand():
    turns = [Turn(0, 2, "a"), Turn(2, 3, "a"), Turn(1, 2.5, "b"), Turn(5, 6, "a")]
    assert merge_turns(turns) == [Turn(0, 3, "a"), Turn(1, 2.5, "b"), Turn(5, 6, "a")]
    assert overlap_seconds(merge_turns(turns)) == pytest.approx(1.5)


def test_error_rate_by_hand():
    """Of 10 s, 1 s is missed, 1 s is someone else's and 2 s too many are found."""
    reference = [Turn(0, 6, "a"), Turn(6, 10, "b")]
    found = [Turn(0, 5, "x"), Turn(6, 7, "x"), Turn(7, 12, "y")]
    error = error_rate(reference, found, 12)
    assert error["speech"] == pytest.approx(10)
    assert error["missed_detection"] == pytest.approx(0.1)
    assert error["confusion"] == pytest.approx(0.1)
    assert error["false_alarm"] == pytest.approx(0.2)
    assert error["der"] == pytest.approx(0.4)
    assert error_rate(reference, found, 12, collar=0.5)["speech"] == pytest.approx(8)


def test_rttm_round_trip_and_damage(tmp_path):
    turns = [Turn(0.5, 2.25, "anna"), Turn(1.0, 3.0, "bö")]
    write_rttm(tmp_path / "a.rttm", turns, "call")
    assert read_rttm(tmp_path / "a.rttm") == {"call": turns}
    (tmp_path / "b.rttm").write_text(
        ";; note\nSPKR-INFO x 1 <NA> <NA> <NA> unknown a <NA>\nSPEAKER x 1 0 1.5 <NA> <NA> a\n"
    )
    assert read_rttm(tmp_path / "b.rttm") == {"x": [Turn(0, 1.5, "a")]}
    for text in ("SPEAKER x 1 zero 1 <NA> <NA> a", "SPEAKER x 1 0", "SPEAKER x 1 0 nan <NA> <NA> a", ";; nothing"):
        (tmp_path / "c.rttm").write_text(text)
        with pytest.raises(UserError, match=r"c\.rttm"):
            read_rttm(tmp_path / "c.rttm")
    with pytest.raises(UserError, match="no name with blanks"):
        write_rttm(tmp_path / "d.rttm", [Turn(0, 1, "two words")], "call")


def test_the_budget_bounds_what_is_clustered_together():
    assert windows_at_once(2 << 30, 7200, 192) == 4000
    assert 200 <= windows_at_once(64 << 20, 7200, 192) < 4000
    with pytest.raises(UserError, match="are too few"):
        windows_at_once(8 << 20, 7200, 192)


def test_memory_grows_only_by_levels_and_embeddings(system):
    """Numbers held at most, for 2 and for 12 minutes of sound that is never there as a whole."""
    part = compose(TURNS, 40)

    def peak(repeats):
        tracemalloc.start()
        diarize(lambda: (part for _ in range(repeats)), system, speakers=4, at_once=100)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    short, long = peak(3), peak(18)
    kept = 10 * 60 * (16 / 0.01 + 12 * 40 / 0.5)  # of ten minutes, as `windows_at_once` counts
    assert long - short < 2 * kept + (1 << 20)
    assert long < 4 * len(part) * 18  # less than the sound itself
