"""The models that come with the package."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nearfar.apps.speaker_verification.cli import app as speaker_verification
from nearfar.apps.speech_separation.cli import app as speech_separation
from nearfar.audio.checkpoints import load_separator
from nearfar.audio.separation.metrics import evaluate_mixture
from nearfar.audio.separation.mixtures import find_mixtures
from nearfar.audio.separation.windows import model_separator
from nearfar.audio.shipped import (
    DEFAULT_SEPARATOR,
    DEFAULT_SPEAKERS,
    separator_folder,
    shipped_separators,
    shipped_speakers,
    speaker_folder,
)
from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.scoring.rates import eer
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError

ROOT = Path(__file__).parents[2]
GAIN = {"two-voices-8k": 2.2}
"""What the cards say of Libri2Mix, dB."""


@pytest.mark.parametrize("name", shipped_speakers())
def test_each_speaker_model_is_whole_small_calibrated_and_has_a_card(name):
    folder = speaker_folder(name)
    system = SpeakerSystem.load(folder)
    assert system.calibration is not None
    assert system.threshold(0.2).threshold > system.threshold(0.4).threshold
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 << 20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{system.model.sample_rate // 1000} kHz" in card
    assert "EER" in card


def test_the_defaults_are_there_and_other_names_are_refused(tmp_path):
    assert DEFAULT_SPEAKERS in shipped_speakers()
    assert DEFAULT_SEPARATOR in shipped_separators()
    assert speaker_folder(tmp_path) == separator_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match=DEFAULT_SPEAKERS):
        speaker_folder("large")
    with pytest.raises(UserError, match=DEFAULT_SEPARATOR):
        separator_folder("large")


@pytest.mark.parametrize("name", shipped_separators())
def test_each_separator_is_whole_small_and_has_a_card(name):
    folder = separator_folder(name)
    model = load_separator(folder)
    assert not model.training
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 << 20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{model.sample_rate // 1000} kHz" in card
    assert "Libri2Mix" in card


@pytest.mark.parametrize("name", shipped_separators())
def test_voices_of_people_who_took_no_part_are_told_apart_and_none_is_lost(name, shared_data):
    mixtures = find_mixtures(shared_data("libri2mix"))
    separator = model_separator(load_separator(separator_folder(name)))
    rows = [evaluate_mixture(*mixture.read(), separator, ["si_sdri"]) for mixture in mixtures]
    assert np.mean([row["si_sdri"] for row in rows]) > GAIN[name] - 0.3
    assert np.mean([row["separate_si_sdri"] for row in rows]) > GAIN[name] - 0.3
    assert not any(row["collapsed"] for row in rows)


def test_without_a_model_named_a_recording_is_separated_by_the_one_that_comes_along(tmp_path):
    t = np.arange(16000) / 8000
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(440 * t) + 0.1 * np.sin(1900 * t), 8000)
    words = ["separate", tmp_path / "a.wav", "-o", tmp_path / "out", "--speakers", "2", "--speaker-model", "small-8k"]
    speech_separation(list(map(str, words)), standalone_mode=False)
    for voice in ("voice1.wav", "voice2.wav"):
        assert len(soundfile.read(tmp_path / "out" / "a" / voice)[0]) == len(t)


def test_a_shipped_separator_finds_overlap_in_a_talk(shared_data, tmp_path):
    mixture = shared_data("libri2mix") / "item0_mix.wav"
    words = ["diarize", mixture, "-o", tmp_path / "a.rttm", "--separator", DEFAULT_SEPARATOR]
    speaker_verification(list(map(str, words)), standalone_mode=False)
    assert (tmp_path / "a.rttm").read_text(encoding="utf-8").startswith("SPEAKER item0_mix ")
    with pytest.raises(UserError, match=DEFAULT_SEPARATOR):
        speaker_verification([*map(str, words[:-1]), "large"], standalone_mode=False)


@pytest.mark.parametrize("name", shipped_speakers())
def test_people_who_took_no_part_are_told_apart(name, shared_data, tmp_path):
    """Two of fsdd, ten recordings of eight digits each; chance is 0.5."""
    digits = shared_data("fsdd") / "recordings"
    system = SpeakerSystem.load(speaker_folder(name))
    embed, x, speakers = Embedder(system.model), [], []
    for speaker in ("jackson", "nicolas", "yweweler"):
        for number in range(8):
            parts = [soundfile.read(digits / f"{d}_{speaker}_{number}.wav", dtype="float32")[0] for d in range(8)]
            soundfile.write(tmp_path / "a.wav", np.concatenate(parts), 8000)
            x.append(embed(tmp_path / "a.wav").embedding)
            speakers.append(speaker)
    left, right = map(np.array, zip(*combinations(range(len(x)), 2)))
    names = np.array(speakers)
    assert not any(system.trained_on.seen([""] * 3, ["fsdd-jackson", "fsdd-nicolas", "fsdd-yweweler"]))
    scores = system.score(np.stack(x), np.stack(x), left, right)
    assert eer(scores, (names[left] == names[right]).astype(int)).value < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_speakers())
def test_conditions_add_what_the_cards_say(name, shared_data, tmp_path):
    """On the trials of `benchmarks/speakers.py`, whose people took no part in the training."""
    data = shared_data("fsdd").parent
    subprocess.run([sys.executable, ROOT / "benchmarks" / "speakers.py", data, tmp_path / "trials"], check=True)
    words = ["stress", tmp_path / "trials" / "trials.txt", "--root", tmp_path / "trials" / "test", "-m", name]
    speaker_verification([*map(str, words), "-o", str(tmp_path / "stress"), "--draws", "0"], standalone_mode=False)
    rows = json.loads((tmp_path / "stress" / "stress.json").read_text())["conditions"]
    assert {row["condition"] for row in rows} >= {"zeros", "gate", "codec", "noise", "gain", "cut", "resampling"}
    assert rows[0]["eer"] < 0.1
    assert max(row.get("adds", 0.0) for row in rows) < 0.052
