"""Two hours of talk through the commands that read recordings, each within 2 GiB."""

import json
import subprocess
import sys
from itertools import cycle

import numpy as np
import pytest
import soundfile

from nearfar.audio.sound import resample
from nearfar.audio.speakers.diarization import read_rttm

RATE, SECONDS = 16000, 7200
RUN = """
import sys
from nearfar.apps.{app}.cli import app
from nearfar.core.memory import resident_memory
app(sys.argv[1:], standalone_mode=False)
print(resident_memory(peak=True))
"""


@pytest.fixture(scope="module")
def hours(shared_data, tmp_path_factory):
    """Two recordings of the same people, who talk in another order: sentences in turn, and two at once."""
    folder = tmp_path_factory.mktemp("hours")
    found = sorted(shared_data("libri2mix").glob("*.wav"))
    for name, order in {"one": found, "other": found[::-1]}.items():
        with soundfile.SoundFile(folder / f"{name}.wav", "w", RATE, 1, "PCM_16") as out:
            sounds = cycle([resample(*soundfile.read(path, dtype="float32"), RATE) for path in order])
            while out.tell() < SECONDS * RATE:
                out.write(next(sounds)[: SECONDS * RATE - out.tell()])
    return folder


def peak(app, *words):
    code = RUN.format(app=app)
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1]), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["2G", "1500M"])
def test_verify(hours, memory):
    held, printed = peak("speaker_verification", "verify", hours / "one.wav", hours / "other.wav", "--memory", memory)
    assert held < {"2G": 2 << 30, "1500M": 1500 << 20}[memory]
    assert "ikelihood" in printed


@pytest.mark.slow
def test_diarize(hours, tmp_path):
    words = ["diarize", hours / "one.wav", "-o", tmp_path / "one.rttm", "--memory", "2G"]
    assert peak("speaker_verification", *words)[0] < 2 << 30
    (turns,) = read_rttm(tmp_path / "one.rttm").values()
    assert max(turn.end for turn in turns) > SECONDS - 10


@pytest.mark.slow
def test_separate(hours, tmp_path):
    words = ["separate", hours / "one.wav", "-o", tmp_path, "--speakers", "2", "--memory", "2G"]
    assert peak("speech_separation", *words)[0] < 2 << 30
    for name in ("voice1.wav", "voice2.wav"):
        header = soundfile.info(tmp_path / "one" / name)
        assert (header.frames, header.samplerate) == (SECONDS * RATE, RATE)
        assert np.abs(soundfile.read(tmp_path / "one" / name, start=(SECONDS - 60) * RATE)[0]).max() > 0
    assert json.loads((tmp_path / "one" / "separation.json").read_text())["speakers"] == 2
