"""LSL streams on this machine: mne-lsl's player there and back; streams that stop, return, change, share a name."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.live.session import Session, replay, run
from nearfar.eeg.live.sinks import Outlet
from nearfar.eeg.live.sources import Continuity, StreamSource, find_streams
from nearfar.eeg.models import baselines
from nearfar.eeg.preprocessing import Preprocessing

pytest.importorskip("mne_lsl")

NAMES = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"]

PLAYER = """
import sys, time
import mne, numpy as np
from nearfar.eeg.live.sources import lsl
lsl()
from mne_lsl.player import PlayerLSL
players = []
for spec in sys.argv[2:]:
    channels, rate, seconds = (float(part) for part in spec.split("x"))
    data = 1e-5 * np.random.default_rng(0).normal(size=(int(channels), int(rate * seconds)))
    raw = mne.io.RawArray(data, mne.create_info([f"E{k}" for k in range(int(channels))], rate, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations(np.arange(1.0, seconds), 0.1, "a"))
    # a chunk is sent every 50 ms; at its end the player sends all of the recording at once, so that readers end first
    player = PlayerLSL(raw, max(1, int(rate // 20)), name=f"player-{spec}", source_id=spec, annotations=True)
    players.append(player.start())
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
"""


def make_decoder(folder, names, rate, wanted=None):
    settings = Preprocessing(tmax=1.0, l_freq=4.0, h_freq=40.0, sfreq=wanted, causal=True)
    network = baselines.network("EEGNet", len(names), 2, settings.n_times(rate), wanted or rate).eval()
    Decoder(network, ["left_hand", "right_hand"], settings, list(names), {"sfreq": wanted or rate}).save(folder)
    return folder


def round_trip(tmp_path, spec, seconds, wanted=None):
    """A session of a player's stream: every sample is there, in order, and its decisions are those of the replay."""
    channels, rate, length = (float(part) for part in spec.split("x"))
    assert seconds < length
    names = [f"E{k}" for k in range(int(channels))]
    decoder = make_decoder(tmp_path / "decoder", names, rate, wanted)
    source = StreamSource(f"player-{spec}", markers=f"player-{spec}-annotations", timeout=20)
    assert (source.unit, source.rate, source.ch_names) == ("V", rate, names)
    counts = run(source, tmp_path / "session", decoder, every=0.1, seconds=seconds)
    session = Session.read(tmp_path / "session")
    sent = 1e-5 * np.random.default_rng(0).normal(size=(int(channels), int(rate * length)))
    first = int(np.flatnonzero((session.samples[0] == sent.T).all(1))[0])
    places = (first + np.arange(len(session.samples))) % sent.shape[1]
    np.testing.assert_array_equal(session.samples, sent[:, places].T)
    assert counts["samples"] >= seconds * rate
    assert counts["decisions"] > 5 * (seconds - 1)
    again = replay(tmp_path / "session")
    assert again.same, again.differences[:2]
    assert any(line.get("marker") == "a" for line in session.log)
    assert any(line.get("event") == "offset" for line in session.log)
    return counts


@pytest.fixture(scope="module")
def player():
    specs = ("22x160x20", "64x1000x20")
    with subprocess.Popen([sys.executable, "-c", PLAYER, "600", *specs], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield specs
        process.kill()


@pytest.mark.parametrize(("number", "wanted"), [(0, None), (1, 250.0)])
def test_there_and_back(player, tmp_path, number, wanted):
    round_trip(tmp_path, player[number], 3.0, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["22x1600x90", "64x1600x90", "22x10000x90", "64x10000x90"])
def test_nothing_is_lost_in_five_minutes_at_ten_times(tmp_path, spec):
    """300 s of 160 (1000) Hz in 30 s: what a second of the recording holds comes in a tenth of one."""
    with subprocess.Popen([sys.executable, "-c", PLAYER, "600", spec], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        counts = round_trip(tmp_path, spec, 30.0, float(spec.split("x")[1]) / 10)
        process.kill()
    assert counts["lost"] == 0


class Sender:
    """An outlet of this process that sends noise until it is closed."""

    def __init__(self, name, source_id, rate=160.0, names=NAMES, units="microvolts"):
        from nearfar.eeg.live.sources import lsl

        library = lsl()
        info = library.StreamInfo(name, "EEG", len(names), rate, "float32", source_id)
        info.set_channel_names(list(names))
        info.set_channel_units(units)
        self.outlet, self.rate, self.going, self.value = library.StreamOutlet(info), rate, True, {}
        order = np.array([NAMES.index(n) if n in NAMES else k for k, n in enumerate(names)])
        scale = np.arange(1, len(names) + 1)[order].astype(np.float32)
        self.thread = threading.Thread(target=self._send, args=(scale,), daemon=True)
        self.thread.start()

    def _send(self, scale):
        rng = np.random.default_rng(0)
        while self.going:
            count = int(self.rate / 20)
            self.outlet.push_chunk((scale * rng.normal(10, 1, size=(count, 1))).astype(np.float32) + 0 * scale)
            time.sleep(0.05)

    def close(self):
        self.going = False
        self.thread.join()
        del self.outlet


def test_two_streams_of_one_name_are_refused_with_their_source_ids():
    senders = [Sender("twin", "cap-1"), Sender("twin", "cap-2")]
    try:
        with pytest.raises(UserError, match=r"2 streams have the name twin.*source id: cap-1.*cap-2"):
            StreamSource("twin", timeout=10)
        source = StreamSource("twin", source_id="cap-2", timeout=10)
        assert source.about["source_id"] == "cap-2"
        assert source.unit == "uV"
        source.close()
        listed = [row for row in find_streams() if row["name"] == "twin"]
        assert [row["source_id"] for row in listed] == ["cap-1", "cap-2"]
        with pytest.raises(UserError, match=r"no stream has the stype nonsense; there are: .*twin"):
            StreamSource(stype="nonsense", timeout=1)
    finally:
        for sender in senders:
            sender.close()
    with pytest.raises(UserError, match="name a stream"):
        StreamSource()


def test_a_stream_without_units_is_asked_for_them():
    sender = Sender("bare", "cap-3", units="none")
    try:
        with pytest.raises(UserError, match="no one unit"):
            StreamSource("bare", timeout=10)
        source = StreamSource("bare", unit="uV", timeout=10)
        assert source.unit == "uV"
        source.close()
    finally:
        sender.close()


def record(tmp_path, name, change, patience=20.0, seconds=None):
    """Record a sender that after a second is closed, and then whatever `change` opens."""
    first, later = Sender(name, f"{name}-id"), []
    source = StreamSource(name, patience=patience, timeout=10)

    def act():
        time.sleep(1.0)
        first.close()
        time.sleep(1.0)
        later.extend(change())

    thread = threading.Thread(target=act)
    thread.start()
    try:
        run(source, tmp_path / "s", seconds=seconds)
    finally:
        thread.join()
        for sender in later:
            sender.close()
        return Session.read(tmp_path / "s")  # noqa: B012


def test_a_stream_that_returns_goes_on_in_the_first_order_after_a_gap(tmp_path):
    session = record(tmp_path, "back", lambda: [Sender("back", "back-id", names=NAMES[::-1])], seconds=2.0)
    events = [line["event"] for line in session.events()]
    assert {"lost", "returned", "order", "gap"} <= set(events), session.events()
    last = len(events) - 1 - events[::-1].index("gap")  # one before it tells what the broken connection held
    assert events.index("lost") < events.index("returned") < events.index("order") < last
    gap = session.events()[last]
    assert 0.5 < gap["seconds"] < 60
    assert gap["lost"] == round(gap["seconds"] * 160)
    means = np.asarray(session.samples[gap["sample"] :]).mean(0)
    np.testing.assert_allclose(means / means[0], np.arange(1, 9), rtol=1e-4)
    assert "EDGE gap" in session.raw().annotations.description


BURSTS = """
import os, sys
import numpy as np
from nearfar.eeg.live.sources import lsl
info = lsl().StreamInfo("bursts", "EEG", 2, 100.0, "float64", "bursts-id")
info.set_channel_names(["C3", "C4"])
info.set_channel_units("microvolts")
outlet, sent = lsl().StreamOutlet(info), 0
print("ready", flush=True)
for line in sys.stdin:
    if not (count := int(line)):
        os._exit(0)
    numbers = np.arange(sent, sent + count, dtype=float)
    outlet.push_chunk(np.stack([numbers, numbers], 1), lsl().local_clock())
    sent += count
"""


@pytest.fixture
def bursts():
    """A process that sends as many samples at once as it is told, their numbers, and a source that listens to it."""
    with subprocess.Popen(
        [sys.executable, "-c", BURSTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        source = StreamSource("bursts", timeout=20, patience=4.0)
        inlet = source._inlet

        def send(count):
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            until = time.monotonic() + 30
            while inlet.samples_available < count and time.monotonic() < until:
                time.sleep(0.01)
            if not count:  # until liblsl knows that it has ended
                process.wait(30)
                time.sleep(2.0)

        yield source, send
        process.kill()


def came(chunks):
    return np.concatenate([chunk.samples[0] for chunk in chunks])


@pytest.mark.ci
def test_a_burst_that_was_read_in_part_outlives_its_sender(bursts):
    """As mne-lsl's player sends one at the end of its recording: far more than is read at a time."""
    source, send = bursts
    send(20_000)
    chunks = [source.read()]
    assert chunks[0].samples.shape[1] == 4096
    send(0)
    while (chunk := source.read()) is not None:
        chunks.append(chunk)
    np.testing.assert_array_equal(came(chunks), np.arange(20_000))
    assert sum(chunk.lost for chunk in chunks) == 0
    assert [note["event"] for chunk in chunks for note in chunk.notes] == ["offset", "lost", "ended"]


@pytest.mark.ci
def test_what_a_broken_connection_held_is_counted(bursts, tmp_path, monkeypatch):
    source, send = bursts
    send(300)
    read = source.read
    lately = [read()]
    monkeypatch.setattr(source, "read", lambda: lately.pop() if lately else read())
    send(20_000)
    send(0)
    counts = run(source, tmp_path / "s")
    assert (counts["samples"], counts["lost"], counts["gaps"]) == (300, 20_000, 1)
    lost = [line for line in Session.read(tmp_path / "s").events() if line.get("lost")]
    assert [(line["event"], line["lost"], line["sample"]) for line in lost] == [("gap", 20_000, 300)]


@pytest.mark.ci
def test_a_clock_that_does_not_answer_and_silence_lose_nothing(bursts, monkeypatch):
    source, send = bursts
    monkeypatch.setattr(source._inlet, "time_correction", lambda timeout: (_ for _ in ()).throw(TimeoutError))
    send(100)
    chunks = [source.read()]
    assert "did not answer" in chunks[0].notes[0]["reason"]
    source._heard -= 3.0  # so long nothing came
    chunks.append(source.read())
    send(20_000)
    while sum(chunk.samples.shape[1] for chunk in chunks) < 20_100:
        chunks.append(source.read())
    np.testing.assert_array_equal(came(chunks), np.arange(20_100))
    assert sum(chunk.lost for chunk in chunks) == 0
    events = [note["event"] for chunk in chunks for note in chunk.notes if note["event"] != "offset"]
    assert events == ["lost", "returned"]
    source.close()


def test_the_time_of_samples_that_are_known_to_be_lost_is_no_step():
    watch = Continuity(100.0)
    assert watch.push(np.arange(10) / 100, 0.1) == []
    assert watch.push(np.zeros(0), 0.2, lost=200) == []
    assert watch.push(2.1 + np.arange(10) / 100, 2.2, lost=0) == []
    found = watch.push(7.2 + np.arange(10) / 100, 7.3, lost=100)
    assert [(each["event"], each["lost"]) for each in found] == [("gap", 400)]


@pytest.mark.parametrize("change", ["rate", "channels", "never"])
def test_a_stream_that_returns_as_another_or_never_ends_the_session(tmp_path, change):
    others = {
        "rate": lambda: [Sender("other", "other-id", rate=250.0)],
        "channels": lambda: [Sender("other", "other-id", names=NAMES[:6])],
        "never": list,
    }
    session = record(tmp_path, "other", others[change], patience=20.0 if change != "never" else 2.0)
    assert len(session.times) > 80
    last = session.events()[-1]
    assert last["event"] == "ended"
    told = {"rate": "250 Hz where it had 8", "channels": "6 channels", "never": "did not return"}[change]
    assert told in last["reason"]


def test_decisions_go_out_as_a_stream():
    outlet = Outlet(["a", "b"], "answers")
    from nearfar.eeg.live.sources import lsl

    found = [info for info in lsl().resolve_streams(timeout=5.0, name="answers") if info.name == "answers"]
    inlet = lsl().StreamInlet(found[0])
    inlet.open_stream(timeout=5.0)
    assert inlet.get_sinfo(timeout=5.0).get_channel_names() == ["decision", "command", "a", "b"]
    given = {"decision": "b", "command": None, "probabilities": {"a": 0.25, "b": 0.75}, "time": 12.5}
    outlet(given)
    values, at = inlet.pull_sample(timeout=5.0)
    assert values.tolist() == [1.0, -1.0, 0.25, 0.75]
    assert at == 12.5
