"""Live sessions: recorded, decoded, replayed to the last bit; streams that stop, return, change; kills."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import mne
import mne_bids
import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.live.audit import audit
from nearfar.eeg.live.session import Live, Recorder, Session, decoder_rule, replay, run
from nearfar.eeg.live.sinks import Lines, Udp
from nearfar.eeg.live.sources import BoardSource, Chunk, Continuity, FileSource
from nearfar.eeg.live.stream import Rule, decode
from nearfar.eeg.models import baselines
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Recording

NAMES = ("FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz")
SETTINGS = {"tmax": 1.0, "l_freq": 4.0, "h_freq": 40.0, "causal": True}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("decoder"), NAMES, 160.0)


def make_decoder(folder, names, rate):
    settings = Preprocessing(**SETTINGS | {"h_freq": min(40.0, 0.4 * rate)})
    network = baselines.network("EEGNet", len(names), 2, round(rate), rate).eval()
    made = Decoder(network, ["left_hand", "right_hand"], settings, list(names), {"sfreq": rate})
    return made.save(folder)


class Scripted:
    """Chunks of a list, as a stream would give them."""

    def __init__(self, chunks, rate=160.0, names=NAMES, kind="lsl"):
        self.name, self.ch_names, self.rate, self.unit, self.about = "made", list(names), rate, "uV", {"kind": kind}
        self.chunks, self.now, self.closed = list(chunks), 0.0, False

    def read(self):
        if not self.chunks:
            return None
        chunk = self.chunks.pop(0)
        if isinstance(chunk, Exception):
            raise chunk
        self.now = chunk.arrived
        return chunk

    def clock(self):
        return self.now

    def close(self):
        self.closed = True


def chunks(data, rate=160.0, size=8, shift=lambda k: 0.0, late=lambda k: 0.0):
    """Chunks of data; `shift` of a chunk's stamps, and how much later it arrives."""
    for k, at in enumerate(range(0, data.shape[1], size)):
        part = data[:, at : at + size]
        times = 100 + np.arange(at, at + part.shape[1]) / rate + shift(k)
        yield Chunk(part, times, 100 + (at + size) / rate + late(k))


def noise(seconds, rate=160.0, channels=8, seed=0):
    return 10 * np.random.default_rng(seed).normal(size=(channels, round(seconds * rate))).astype(np.float32)


def test_a_file_is_decoded_live_as_offline_and_again(make_raw, decoder, tmp_path):
    recording = Recording(tmp_path / "a_raw.fif", "1", raw=make_raw(NAMES, seconds=20))
    found = []
    counts = run(FileSource(recording, speed=np.inf), tmp_path / "s", decoder, every=0.05, sinks=[found.append])
    model = Decoder.load(decoder)
    prepared = model.preprocessing.apply(recording.raw).get_data() * 1e6
    offline = decode(model, prepared, 160, 8, 160.0, batch_size=1)
    assert counts["decisions"] == len(offline) == len(found)
    shares = np.array([list(one["probabilities"].values()) for one in found])
    np.testing.assert_array_equal(shares, offline.probabilities)
    assert [one["sample"] for one in found] == (np.rint(offline.times * 160).astype(int) - 1).tolist()
    again = replay(tmp_path / "s")
    assert again.same
    assert not again.changed
    session = Session.read(tmp_path / "s")
    raw = mne.io.read_raw_fif(tmp_path / "s/session_raw.fif", verbose="ERROR")
    np.testing.assert_allclose(raw.get_data(), recording.raw.get_data(), rtol=1e-12)
    assert [text for _, text in session.markers()] == ["T1", "T2"]  # of 20 s
    np.testing.assert_allclose(raw.annotations.onset, [5.0, 12.0], atol=0.01)


def test_a_gap_begins_anew_and_a_clock_jump_does_not(decoder, tmp_path):
    data = noise(8)
    cases = {
        "gap": (lambda k: 2.0 * (k >= 80), lambda k: 2.0 * (k >= 80)),
        "clock": (lambda k: 3600.0 * (k >= 80), lambda k: 0.0),
        "back": (lambda k: -50.0 * (k >= 80), lambda k: 0.0),
        "none": (lambda k: 0.05 * (k % 7), lambda k: 0.05 * (k % 7)),
    }
    made = {}
    for name, (shift, late) in cases.items():
        counts = run(Scripted(chunks(data, shift=shift, late=late)), tmp_path / name, decoder, every=0.1)
        session = Session.read(tmp_path / name)
        assert replay(tmp_path / name).same
        made[name] = [one["probabilities"] for one in session.decisions()]
        wanted = {"gap": (1, 320, 0), "clock": (0, 0, 1), "back": (0, 0, 1), "none": (0, 0, 0)}[name]
        assert (counts["gaps"], counts["lost"], counts["clocks"]) == wanted
        events = [line for line in session.events() if line["event"] in ("gap", "clock")]
        assert [line["sample"] for line in events] == [640] * (name != "none")
    assert made["clock"] == made["back"] == made["none"]
    assert len(made["gap"]) < len(made["none"])
    assert "EDGE gap" in Session.read(tmp_path / "gap").raw().annotations.description
    whole = Decoder.load(decoder).preprocessing.apply(Session.read(tmp_path / "gap").raw())
    second = decode(Decoder.load(decoder), whole.get_data()[:, 640:] * 1e6, 160, 16, 160.0, batch_size=1)
    np.testing.assert_allclose(
        [list(share.values()) for share in made["gap"][-len(second) :]], second.probabilities, atol=1e-6
    )


def test_losses_that_a_board_tells_and_overruns_are_counted(decoder, tmp_path):
    parts = list(chunks(noise(4)))
    parts[30] = Chunk(parts[30].samples, parts[30].times, parts[30].arrived, lost=5)
    source = Scripted(parts)
    counts = run(source, tmp_path / "s", decoder)
    assert (counts["lost"], counts["gaps"]) == (5, 1)
    assert source.closed
    slow = Scripted(chunks(noise(4)))
    slow.clock = lambda: slow.now + 0.3
    assert run(slow, tmp_path / "t", decoder)["overruns"] == 80


def test_continuity_by_hand():
    one = Continuity(100.0)
    times = np.arange(100) / 100
    assert not one.push(times, 1.0)
    assert one.push(times + 3, 4.0) == [{"at": 0, "event": "gap", "seconds": pytest.approx(2.0), "lost": 200}]
    assert [each["event"] for each in one.push(np.concatenate([times[:50] + 4, times[:50] + 9]), 5.0)] == ["clock"]


def test_flat_input_and_artefacts_abstain_and_say_so(decoder, tmp_path):
    data = noise(6)
    data[2, 320:480] = 0
    data[4, 700] = 4000
    model = Decoder.load(decoder)
    model.metrics["gate"] = 500.0
    model.save(tmp_path / "gated")
    counts = run(Scripted(chunks(data)), tmp_path / "s", tmp_path / "gated")
    told = {one["abstained"] for one in Session.read(tmp_path / "s").decisions() if one["abstained"]}
    assert "C3 flat" in told
    assert any(text.startswith("artefact: C4 swings") for text in told)
    assert counts["abstained"] == sum(bool(one["abstained"]) for one in Session.read(tmp_path / "s").decisions())
    assert replay(tmp_path / "s").same


def test_an_error_of_the_source_leaves_a_session_that_can_be_read(decoder, tmp_path):
    parts = [*chunks(noise(3)), UserError("stream made: returned with 7 channels")]
    with pytest.raises(UserError, match="7 channels"):
        run(Scripted(parts), tmp_path / "s", decoder)
    session = Session.read(tmp_path / "s")
    assert len(session.times) == 480
    assert session.events()[-1]["reason"].endswith("7 channels")
    with pytest.raises(UserError, match="holds a session already"):
        run(Scripted(chunks(noise(1))), tmp_path / "s", decoder)
    with pytest.raises(UserError, match="exactly once"):
        run(Scripted(chunks(noise(1)), names=[f"E{k}" for k in range(8)]), tmp_path / "t", decoder)
    assert not (tmp_path / "t" / "session.json").exists()


KILLED = """
import sys, time
import numpy as np
sys.path.insert(0, {folder!r})
from test_session import Scripted, chunks, noise
from nearfar.eeg.live.session import run
class Slow(Scripted):
    def read(self):
        time.sleep(0.02)
        return super().read()
run(Slow(chunks(noise(600))), {out!r}, {decoder!r}, sinks=[lambda d: print(d["sample"], flush=True)])
"""


@pytest.mark.ci
def test_kill_leaves_all_that_had_come(decoder, tmp_path):
    code = KILLED.format(folder=os.path.dirname(__file__), out=str(tmp_path / "s"), decoder=str(decoder))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(12):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    session = Session.read(tmp_path / "s")
    assert len(session.times) > last
    np.testing.assert_array_equal(session.samples, noise(600).T[: len(session.times)])
    assert session.decisions()[-1]["sample"] >= last
    assert replay(tmp_path / "s").same
    assert session.save().exists()
    with (tmp_path / "s/log.jsonl").open("ab") as log:
        log.write(b'{"chunk": 8, "arr')  # torn
    with (tmp_path / "s/samples.bin").open("ab") as samples:
        samples.write(b"\0" * 13)
    torn = Session.read(tmp_path / "s")
    assert torn.torn == 13
    np.testing.assert_array_equal(torn.samples, session.samples)


def test_replay_tells_what_is_not_the_same(decoder, tmp_path):
    run(Scripted(chunks(noise(4))), tmp_path / "s", decoder)
    path = tmp_path / "s/log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(k for k, line in enumerate(lines) if "decision" in line)
    lines[number]["probabilities"]["left_hand"] += 1e-12
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = replay(tmp_path / "s")
    assert not found.same
    assert "probabilities" in found.differences[0]
    other = Decoder.load(decoder)
    other.training["sfreq"] = 160.0
    other.metrics["note"] = 1
    other.save(tmp_path / "other")
    assert "decoder" in replay(tmp_path / "s", tmp_path / "other").changed
    run(Scripted(chunks(noise(2))), tmp_path / "plain")
    with pytest.raises(UserError, match="without a decoder"):
        replay(tmp_path / "plain")
    with pytest.raises(UserError, match="holds no session"):
        Session.read(tmp_path)


def test_decisions_go_out(decoder, tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard:
        heard.bind(("127.0.0.1", 0))
        heard.settimeout(5)
        udp, lines = Udp(heard.getsockname()[1]), Lines(tmp_path / "out.jsonl")
        run(Scripted(chunks(noise(2))), tmp_path / "s", decoder, sinks=[udp, lines])
        first = json.loads(heard.recv(65536))
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert told[0] == first
    assert [one["sample"] for one in told] == [one["sample"] for one in Session.read(tmp_path / "s").decisions()]
    assert set(first["probabilities"]) == {"left_hand", "right_hand"}
    with pytest.raises(UserError, match="this machine alone"):
        Udp(5000, "192.0.2.1")
    with pytest.raises(UserError, match="port"):
        Udp(0)


def test_the_rule_comes_from_the_decoder(decoder):
    model = Decoder.load(decoder)
    model.metrics["threshold"] = {"threshold": 0.7}
    assert decoder_rule(model) == Rule(threshold=0.7)
    assert decoder_rule(model, threshold=0.2, idle="left_hand") == Rule(threshold=0.2, idle=0)
    model.classes = ["rest", "right_hand"]
    assert decoder_rule(model).idle == 0
    with pytest.raises(UserError, match="no class nothing"):
        decoder_rule(model, idle="nothing")


def test_audit_counts_and_writes_a_page(make_raw, decoder, tmp_path):
    cues = {"left_hand": [4.0, 20.0], "right_hand": [12.0]}
    recording = Recording(tmp_path / "a_raw.fif", "1", raw=make_raw(NAMES, seconds=30, cues=cues))
    rule = decoder_rule(Decoder.load(decoder), dwell=3)
    run(FileSource(recording, speed=np.inf), tmp_path / "s", decoder, rule=rule)
    found = audit(tmp_path / "s")
    assert found["replay"] == "same to the last bit"
    assert found["events"] == 3
    assert found["hits"] + found["wrong"] + found["missed"] == 3
    assert found["seconds"] == 30
    assert found["bits_per_minute"] >= 0
    assert found["latency_p99"] >= found["latency"]
    page = (tmp_path / "s/audit.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    for text in ("False activations a minute", "same to the last bit", "Information transfer"):
        assert text in page


def test_bids(make_raw, tmp_path):
    recording = Recording(tmp_path / "a_raw.fif", "1", raw=make_raw(NAMES, seconds=20))
    run(FileSource(recording, speed=np.inf), tmp_path / "s")
    session = Session.read(tmp_path / "s")
    path = session.to_bids(tmp_path / "bids", "01")
    back = mne_bids.read_raw_bids(mne_bids.get_bids_path_from_fname(path), verbose="ERROR")
    np.testing.assert_allclose(back.get_data(), session.raw().get_data(), atol=1e-10)
    assert {"T1", "T2"} <= set(back.annotations.description)
    with pytest.raises(UserError, match="name another run"):
        session.to_bids(tmp_path / "bids", "01")


def test_a_synthetic_board(tmp_path):
    pytest.importorskip("brainflow")
    names = [f"E{k}" for k in range(16)]
    counts = run(BoardSource("SYNTHETIC_BOARD", names), tmp_path / "s", seconds=1.0)
    session = Session.read(tmp_path / "s")
    assert session.rate == 250
    assert len(session.times) >= 250
    assert counts["samples"] == len(session.times)
    assert np.asarray(session.samples).std() > 0
    for wrong, match in (({"board": "NOT_A_BOARD"}, "no board"), ({"nonsense": 1}, "no parameter")):
        with pytest.raises(UserError, match=match):
            BoardSource(**wrong)


def test_recorder_writes_at_once(tmp_path):
    one = Recorder(tmp_path / "s", {"ch_names": ["C3"], "rate": 10.0, "unit": "uV"})
    one.append(np.ones((1, 3), np.float32), np.arange(3.0), 1.0)
    assert len(Session.read(tmp_path / "s").times) == 3
    one.append(np.ones((1, 2), np.float32), np.arange(2.0), 2.0)
    assert len(Session.read(tmp_path / "s").times) == 5
    one.close()


def test_live_tells_samples_after_decimation_and_gaps():
    names = list(NAMES)
    settings = Preprocessing(tmax=1.0, sfreq=40.0, causal=True)
    network = baselines.network("EEGNet", 8, 2, 40, 40.0).eval()
    model = Decoder(network, ["a", "b"], settings, names, {"sfreq": 40.0})
    live = Live(model, names, 160.0, "uV", 4, Rule())
    first = live.push(noise(1.5).astype(float)[:, :237], False)
    assert [one["sample"] for one in first] == [156, 172, 188, 204, 220, 236]
    second = live.push(noise(1.5).astype(float), True)
    assert second[0]["sample"] == 240 + 39 * 4  # 240 is the first multiple of 4 from 237 on


def test_file_source_keeps_pace(make_raw, tmp_path):
    recording = Recording(tmp_path / "a_raw.fif", "1", raw=make_raw(NAMES, seconds=2))
    source, begun = FileSource(recording, speed=10), time.perf_counter()
    while source.read():
        pass
    assert time.perf_counter() - begun >= 0.19
    for wrong in ({"speed": 0}, {"chunk": -1}):
        with pytest.raises(UserError, match="above 0"):
            FileSource(recording, **wrong)
