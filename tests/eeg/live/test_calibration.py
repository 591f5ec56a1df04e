"""Calibration: plans, cues on time, the page in a browser, a decoder from what was recorded, ONNX."""

import json
import shutil
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.export import export_decoder
from nearfar.eeg.live.calibration import PAGE, CuePage, CuePlan, Cues
from nearfar.eeg.live.client import OnnxDecoder
from nearfar.eeg.live.session import Session, run
from nearfar.eeg.live.sources import Chunk
from nearfar.eeg.models import baselines
from nearfar.eeg.models.covariances import DECODERS
from nearfar.eeg.preprocessing import Preprocessing

NAMES = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"]


def test_plan_takes_turns_and_follows_from_its_seed():
    plan = CuePlan(("a", "b", "c"), trials=4, cue=2, rest=1, jitter=0.5, seed=3)
    cues = plan.cues()
    assert cues == plan.cues() != CuePlan(("a", "b", "c"), trials=4, cue=2, rest=1, jitter=0.5, seed=4).cues()
    for block in range(4):
        assert {name for _, name in cues[3 * block : 3 * block + 3]} == {"a", "b", "c"}
    steps = np.diff([at for at, _ in cues])
    assert (steps >= 3).all()
    assert (steps <= 3.5).all()
    assert plan.seconds == pytest.approx(cues[-1][0] + 3)
    for wrong in ({"classes": ("a",)}, {"classes": ("a", "a")}, {"trials": 0}, {"cue": 0}, {"rest": -1}):
        with pytest.raises(ValueError, match="must be"):
            CuePlan(**wrong)


class Person:
    """A cap on somebody who does what the cues say: 12 Hz over C3 or C4 (clock of its own, 160 Hz)."""

    name, rate, unit, about = "person", 160.0, "uV", {"kind": "made"}
    ch_names = NAMES

    def __init__(self):
        self.count, self.rng, self.imagined = 0, np.random.default_rng(0), ""

    def clock(self):
        return self.count / self.rate

    def see(self, name, seen, total):
        self.imagined = name

    def read(self):
        times = np.arange(self.count, self.count + 16) / self.rate
        data = 5 * self.rng.normal(size=(8, 16))
        if self.imagined in ("left_hand", "right_hand"):
            data[2 if self.imagined == "left_hand" else 4] += 8 * np.sin(2 * np.pi * 12 * times)
        self.count += 16
        return Chunk(data.astype(np.float32), times, self.clock())

    def close(self):
        pass


def test_cues_stand_in_the_recording_when_they_were_shown(tmp_path):
    plan = CuePlan(trials=3, cue=2, rest=1, lead=1, seed=1)
    person = Person()
    cues = Cues(plan, person.clock, [person.see])
    run(person, tmp_path / "s", markers=cues.markers, stop=cues.stop)
    session = Session.read(tmp_path / "s")
    found = [(at, name) for at, name in session.markers() if name != "pause"]
    assert [name for _, name in found] == [name for _, name in plan.cues()]
    offsets = np.array([at for at, _ in found]) - np.array([at for at, _ in plan.cues()])
    assert (offsets >= 0).all()
    assert (offsets <= 0.21).all()  # samples come 0.1 s at a time
    assert len(session.times) / 160 == pytest.approx(plan.seconds, abs=0.3)
    assert sum(name == "pause" for _, name in session.markers()) == 6


def test_the_page_shows_each_cue_and_asks_no_one_else():
    assert "http" not in PAGE
    with CuePage() as page:
        assert page.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(page.url) as answer:
            assert answer.read().decode() == PAGE
        threading.Timer(0.2, page, ("left_hand", 1, 30)).start()
        with urllib.request.urlopen(page.url + "cue?after=0") as answer:
            cue = json.load(answer)
        assert cue == {"number": 1, "sign": "←", "name": "left hand", "count": "1 of 30"}
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(page.url + "other")
        port = int(page.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match="choose another"):
            CuePage(port)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_in_a_browser(monkeypatch):
    asked, answer = [], CuePage._after

    def once(page, number):  # the page asks for what follows a cue when it has shown it; then the cues end
        asked.append(number)
        if len(asked) > 1:
            raise ConnectionAbortedError
        return answer(page, number)

    monkeypatch.setattr(CuePage, "_after", once)
    monkeypatch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
    # virtual time stands still while the page waits for an answer, so that a busy machine is no other than an idle one
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000"]
    with CuePage() as page:
        page("right_hand", 7, 30)
        command = ["chromium", *flags, page.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert asked[:2] == ["-1", "1"]
    assert '<div id="sign">→</div>' in done.stdout
    assert "7 of 30" in done.stdout
    assert '<div id="name">ended</div>' in done.stdout


@pytest.mark.parametrize("name", ["EEGNet", pytest.param("AGTCNet", marks=pytest.mark.ci)])
def test_onnx_says_what_the_decoder_says_and_runs_without_torch(name, tmp_path, make_raw):
    settings = Preprocessing(tmax=1.0, l_freq=4.0, h_freq=40.0, causal=True)
    info = make_raw(tuple(NAMES)).info
    network = baselines.network(name, 8, 2, 160, 160.0, info.set_montage("standard_1005")["chs"]).eval()
    decoder = Decoder(network, ["left_hand", "right_hand"], settings, NAMES, {"sfreq": 160.0})
    decoder.metrics["threshold"] = {"threshold": 0.51}
    assert export_decoder(decoder, tmp_path / "d.onnx") < 1e-5
    client = OnnxDecoder(tmp_path / "d.onnx")
    X = np.random.default_rng(1).normal(0, 10, (7, 8, 160)).astype(np.float32)
    np.testing.assert_allclose(client.predict_proba(X), decoder.predict_proba(X), atol=1e-5)
    assert (client.classes, client.threshold, client.preprocessing) == (decoder.classes, 0.51, settings)
    if name == "AGTCNet":
        return
    make_raw(tuple(NAMES), seconds=20).save(tmp_path / "a_raw.fif", verbose="ERROR")
    code = (
        "import sys\nfrom nearfar.eeg.live.client import main\nmain(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    given = [str(tmp_path / "d.onnx"), str(tmp_path / "a_raw.fif"), "--every", "0.1"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(line.split()[-1] in decoder.classes for line in done.stdout.splitlines())
    assert done.stdout


def test_what_onnx_cannot_hold_is_refused(tmp_path):
    network = DECODERS["TangentSpace"](8, 2, 160, 160.0, rank=8, learnt=3)
    decoder = Decoder(network, ["a", "b"], Preprocessing(tmax=1.0), NAMES, {"sfreq": 160.0})
    with pytest.raises(UserError, match="eigenvalues"):
        export_decoder(decoder, tmp_path / "d.onnx")
    with pytest.raises(UserError, match="must end in"):
        export_decoder(decoder, tmp_path / "d.bin")
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match="exported decoder"):
        OnnxDecoder(tmp_path / "bad.onnx")
    assert not (tmp_path / "d.onnx").exists()
