"""Two hours at 16 kHz through the commands of speech within 2 GiB, each in a process of its own."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from nearfar.audio.separation.mossformer import MossFormer
from nearfar.audio.speakers.frontends import KaldiFbank
from nearfar.audio.speakers.ltdnn import ECAPA, SpeakerEncoder

RATE, BUDGET = 16000, 2 << 30


def peak_of(*arguments) -> int:
    """Most bytes that the command's process held."""
    start = [sys.executable, "-c", "from nearfar.core.cli.root import main; main()"]
    process = subprocess.Popen([*start, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return usage.ru_maxrss << 10


@pytest.fixture(scope="module")
def hours(tmp_path_factory):
    """Two voices in turn, in syllables, in noise."""
    path = tmp_path_factory.mktemp("long") / "hours.wav"
    rng, t = np.random.default_rng(0), np.arange(10 * RATE) / RATE
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for number in range(720):
            pitch = (110, 190)[number % 2]
            buzz = sum(np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, 20))
            speech = 0.1 * buzz * np.clip(np.sin(2 * np.pi * 3 * t), 0, None)
            file.write(speech + 0.002 * rng.standard_normal(len(t)))
    return path


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speakers")
    SpeakerEncoder(KaldiFbank(80, RATE, 10.0), ECAPA(80, 64, 64)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_verify_reads_two_hours(hours, voices, tmp_path):
    with soundfile.SoundFile(hours) as file:
        soundfile.write(tmp_path / "short.wav", file.read(20 * RATE), RATE)
    assert peak_of("speaker-verification", "verify", hours, tmp_path / "short.wav", "-m", voices, "--no-gate") < BUDGET


@pytest.mark.slow
def test_diarize_reads_two_hours(hours, voices, tmp_path):
    job = ("speaker-verification", "diarize", hours, "-o", tmp_path / "o.rttm", "-m", voices)
    assert peak_of(*job, "--speakers", 2, "--memory", "2G") < BUDGET


@pytest.mark.slow
def test_separate_writes_two_hours(hours, tmp_path):
    net = MossFormer(num_filters=16, dim=12, depth=1, group_size=32, query_key_dim=8, sample_rate=RATE)
    net.save_pretrained(tmp_path / "net")
    job = ("speech-separation", "separate", hours, "-o", tmp_path / "out", "--model", tmp_path / "net")
    assert peak_of(*job, "--speakers", 2, "--memory", "2G") < BUDGET
