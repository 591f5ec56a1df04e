"""Recordings as labs have them: triggers of every behaviour, channels that are no EEG, joined runs, other formats."""

import logging
import struct

import mne
import numpy as np
import pytest
from scipy.io import savemat

from nearfar.core.errors import UserError
from nearfar.eeg.annotations import event_counts, segments
from nearfar.eeg.models.graphs import electrode_graph
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Recording, find_recordings, read_recording, select_channels
from nearfar.eeg.trials import load_trials, trials_array

RATE = 160.0
PLAIN = Preprocessing(tmax=2.0)


def triggered(make_raw, *channels, kind="stim"):
    """A recording without annotations and with these trigger channels, name -> values."""
    values = dict(channels)
    length = len(next(iter(values.values())))
    raw = make_raw(seconds=length / RATE, cues={})
    info = mne.create_info(list(values), RATE, kind)
    raw.add_channels([mne.io.RawArray(np.stack(list(values.values())), info, verbose="ERROR")], force_update_info=True)
    return raw


def levels(*pairs):
    """Values held: (value, samples), ..."""
    return np.concatenate([np.full(count, float(value)) for value, count in pairs])


TRIGGERS = {
    "pulses": (levels((0, 500), (1, 8), (0, 500), (2, 8), (0, 500)), {"1": 1, "2": 1}),
    "pulses of one sample": (levels((0, 500), (1, 1), (0, 500), (2, 1), (0, 500)), {"1": 1, "2": 1}),
    "held levels": (levels((1, 400), (2, 400), (1, 400), (2, 400)), {"1": 1, "2": 2}),
    "held levels from rest": (levels((0, 100), (1, 400), (2, 400), (1, 400)), {"1": 2, "2": 1}),
    "codes back to back": (levels((0, 500), (1, 20), (2, 20), (0, 500)), {"1": 1, "2": 1}),
    "overlapping bits": (levels((0, 500), (1, 20), (9, 20), (8, 20), (0, 500), (8, 20), (0, 90)), {"1": 1, "8": 2}),
    "a bit within another": (levels((0, 500), (1, 20), (9, 5), (1, 20), (0, 500)), {"1": 1, "8": 1}),
    "bits at one sample": (
        levels((0, 500), (1, 9), (9, 9), (8, 9), (0, 500), (9, 9), (0, 90)),
        {"1": 2, "8": 2},
    ),
    "lines that switch one after the other": (levels((0, 500), (1, 1), (3, 9), (0, 500)), {"3": 1}),
    "millionths": (1e-6 * levels((0, 500), (1, 8), (0, 500), (2, 8), (0, 500)), {"1": 1, "2": 1}),
    "volts of a line": (levels((0.3, 500), (4.6, 8), (0.3, 500), (4.7, 8), (0.3, 500)), {"1": 2}),
}


@pytest.mark.parametrize("kind", TRIGGERS)
def test_trigger_channels_of_every_behaviour(make_raw, kind):
    values, expected = TRIGGERS[kind]
    notes = []
    raw = read_recording(triggered(make_raw, ("Trigger", values)), notes=notes)
    assert event_counts(raw) == expected
    assert any("Trigger" in note for note in notes)


def test_a_trigger_stands_at_its_sample(make_raw):
    raw = read_recording(triggered(make_raw, ("STI", TRIGGERS["pulses"][0])))
    np.testing.assert_allclose(raw.annotations.onset - raw.first_time, [500 / RATE, 1008 / RATE])


def test_lines_of_their_own_are_all_read(make_raw):
    left, right = np.zeros(2000), np.zeros(2000)
    left[[300, 900]] = 1
    right[[600, 1200]] = 1
    port = levels((0, 1500), (4, 5), (0, 100), (5, 5), (0, 390))
    raw = read_recording(triggered(make_raw, ("left", left), ("right", right), ("port", port)))
    assert event_counts(raw) == {"left": 2, "port/4": 1, "port/5": 1, "right": 2}
    notes = []
    raw = read_recording(triggered(make_raw, ("STI 014", port), ("STI 001", left)), notes=notes)
    assert event_counts(raw) == {"4": 1, "5": 1}
    assert any("not from STI 001" in note for note in notes)
    raw = read_recording(triggered(make_raw, ("STI 014", 0 * port), ("STI 001", left)))  # a composite that was not used
    assert event_counts(raw) == {"1": 2}


def test_triggers_beside_annotations_are_told(make_raw):
    raw = make_raw(seconds=1000 / RATE, cues={"go": [2.0]})
    stim = mne.io.RawArray(levels((0, 500), (1, 500))[None], mne.create_info(["TRIG"], RATE, "stim"), verbose="ERROR")
    raw.add_channels([stim], force_update_info=True)
    notes = []
    assert event_counts(read_recording(raw, notes=notes)) == {"go": 1}
    assert any("TRIG are not read" in note for note in notes)


# names, edges, bad stretches


def test_class_names_with_slashes_are_whole_names(make_raw):
    raw = make_raw(cues={"left": [5.0, 20.0], "left/imagined": [12.0, 27.0, 40.0]})
    epochs = load_trials(Recording(None, "1", raw=raw), preprocessing=PLAIN)
    assert np.bincount(trials_array(epochs)[1]).tolist() == [2, 3]
    only = load_trials(Recording(None, "1", raw=raw), preprocessing=PLAIN, events={"a": "left"})
    assert len(only) == 2


@pytest.mark.parametrize("name", ["boundary", "EDGE boundary", "BAD boundary", "New Segment/", "-99"])
def test_no_trial_crosses_an_edge_and_no_edge_is_a_class(make_raw, caplog, name):
    raw = make_raw(cues={"go": [5.0, 20.0], "stop": [12.0, 30.0]})
    raw.annotations.append(raw.annotations.onset[0] - 5.0 + 20.5, 0.0, name)
    read = read_recording(raw)
    assert event_counts(read) == {"go": 2, "stop": 2}
    assert segments(read) == [(0, 3280), (3280, 9600)]
    epochs = load_trials(Recording(None, "1", raw=raw), preprocessing=PLAIN)
    assert set(epochs.event_id) == {"go", "stop"}
    assert len(epochs) == 3
    assert "1 of 4 trials left out" in caplog.text


@pytest.mark.parametrize("duration", [0.0, 7.0])  # EEGLAB tells how much was cut out
@pytest.mark.parametrize("settings", [{"l_freq": 4.0, "h_freq": 38.0}, {"notch": 50.0}])
def test_filters_begin_anew_at_an_edge(make_raw, settings, duration):
    raw = make_raw()
    jump = np.where(np.arange(raw.n_times) < 4800, 0.0, 500e-6)
    whole = mne.io.RawArray(raw.get_data() + jump, raw.info, verbose="ERROR")
    whole.set_annotations(mne.Annotations([30.0], duration, ["boundary"]))
    settings = Preprocessing(reference=None, **settings)
    filtered = settings.apply(whole).get_data()
    for start, stop in ((0, 4800), (4800, 9600)):
        alone = mne.io.RawArray(whole.get_data()[:, start:stop], raw.info, verbose="ERROR")
        np.testing.assert_allclose(filtered[:, start:stop], settings.apply(alone).get_data(), atol=1e-12)


def test_two_cues_at_one_time(make_raw, caplog):
    raw = make_raw(cues={"left": [5.0, 5.0, 20.0], "right": [12.0, 27.0]})
    epochs = load_trials(Recording(None, "1", raw=raw), preprocessing=PLAIN)
    assert len(epochs) == 4
    assert "1 are there twice" in caplog.text
    raw = make_raw(cues={"left": [5.0, 20.0], "button": [5.0, 20.0]})
    with pytest.raises(UserError, match=r"cues of left and button at one time, .* 5\.000 s"):
        load_trials(Recording(None, "1", raw=raw), preprocessing=PLAIN)
    assert len(load_trials(Recording(None, "1", raw=raw), preprocessing=PLAIN, events={"left": "left"})) == 2


# marker files


def brainvision(make_raw, folder):
    from tests.eeg.test_recordings import write_brainvision

    return write_brainvision(folder / "a.vhdr", make_raw())


def test_a_missing_marker_file_is_told(make_raw, tmp_path):
    path = brainvision(make_raw, tmp_path)
    path.with_suffix(".vmrk").unlink()
    notes = []
    assert not event_counts(read_recording(path, notes=notes))
    assert any("marker file a.vmrk is not there" in note for note in notes)
    with pytest.raises(UserError, match="no events"):
        load_trials(path, preprocessing=PLAIN)


def test_renamed_files_are_named(make_raw, tmp_path):
    path = brainvision(make_raw, tmp_path)
    path.with_suffix(".vmrk").rename(tmp_path / "b.vmrk")
    path.rename(tmp_path / "b.vhdr")
    with pytest.raises(UserError, match=r"names a\.vmrk for the markers, .* b\.vmrk is"):
        read_recording(tmp_path / "b.vhdr")
    path.with_suffix(".eeg").rename(tmp_path / "b.eeg")
    with pytest.raises(UserError, match=r"names a\.eeg for the signals, .* b\.eeg is"):
        read_recording(tmp_path / "b.vhdr")


# channels that are no EEG


ODD = ("Markers", "TRIG1", "STIM 1", "DIN1", "Digital Aux", "Event", "Counter", "ACC-X", "GSR", "Sample Index", "Resp")


@pytest.mark.parametrize("name", [*ODD, "Channel 9", "X7", "foo"])
def test_what_is_no_eeg_is_set_aside_and_named(make_raw, name):
    rng = np.random.default_rng(0)
    data = 1e-5 * rng.normal(size=(6, 9600))
    data[-1] = 0
    for start in range(800, 9000, 900):
        data[-1, start : start + 200] = 1 + start % 2
    notes = []
    raw = read_recording(make_raw(("FC3", "FC4", "C3", "Cz", "C4", name), data=data), notes=notes)
    assert raw.get_channel_types()[-1] != "eeg"
    assert raw.get_channel_types()[:5] == ["eeg"] * 5
    assert any(name in note and "set aside" in note for note in notes)
    kept = read_recording(make_raw(("FC3", "FC4", "C3", "Cz", "C4", name), data=data), types={name: "eeg"})
    assert kept.get_channel_types()[-1] == "eeg"


@pytest.mark.parametrize("kind", ["ramp", "counter that wraps", "accelerometer in g", "pulses over noise"])
def test_signals_that_are_no_eeg(make_raw, kind):
    data = 1e-5 * np.random.default_rng(0).normal(size=(6, 9600))
    times = np.arange(9600)
    data[-1] = {
        "ramp": 1e-6 * times,
        "counter that wraps": 1e-6 * (times % 256),
        "pulses over noise": 1e-5 * np.random.default_rng(2).normal(size=9600) + 5 * (times % 960 < 32),
        "accelerometer in g": 0.05 * np.sin(times / 7) + 0.02 * np.random.default_rng(1).normal(size=9600),
    }[kind]
    assert (
        read_recording(make_raw(("FC3", "FC4", "C3", "Cz", "C4", "P9x"), data=data)).get_channel_types()[-1] == "misc"
    )


def test_real_eeg_is_kept(make_raw, shared_data):
    notes = []
    raw = read_recording(shared_data("eegmmidb/S001") / "S001R04.edf", notes=notes)
    assert set(raw.get_channel_types()) == {"eeg"}
    coarse = np.round(make_raw().get_data() * 1e6 / 3) * 3e-6  # few steps of an old amplifier
    assert set(read_recording(make_raw(data=coarse)).get_channel_types()) == {"eeg"}


def test_electrodes_that_are_typed_misc_are_eeg(make_raw):
    raw = make_raw()
    raw.set_channel_types(dict.fromkeys(raw.ch_names, "misc"))
    notes = []
    assert set(read_recording(raw, notes=notes).get_channel_types()) == {"eeg"}
    assert any("typed misc" in note for note in notes)
    raw.rename_channels({name: f"ch{k}" for k, name in enumerate(raw.ch_names)})
    with pytest.raises(UserError, match=r"no EEG channel; it has ch0 \(misc\).*--types"):
        read_recording(raw)
    assert read_recording(raw, types={"ch0": "eeg", "ch1": "eeg"}).get_channel_types().count("eeg") == 2


@pytest.mark.parametrize(("types", "said"), [({"C9": "eeg"}, "no channel C9"), ({"C3": "brain"}, "no type brain")])
def test_types_that_cannot_be(make_raw, types, said):
    with pytest.raises(UserError, match=said):
        read_recording(make_raw(), types=types)


# small caps


@pytest.mark.parametrize(
    "names",
    ["C3 Cz C4", "Fp1 Fp2 C3 C4 P7 P8 O1 O2", "F3 F4 C3 C4 P3 P4", "C3-P3 C4-P4 Cz-Pz", "Fp1-F7 F7-T7 T7-P7", "C3 C4"],
)
def test_no_electrode_of_a_small_cap_is_alone(names):
    graph = electrode_graph(names.split())
    assert graph.sum(axis=1).min() >= 1
    assert (graph == graph.T).all()
    assert not graph.diagonal().any()


def test_a_graph_without_edges_is_told(caplog):
    electrode_graph(["C3", "Cz", "C4"], "10-10")
    assert "leaves C3, Cz, C4 without a neighbour" in caplog.text


@pytest.mark.parametrize(
    ("names", "averaged"),
    [("C3 Cz C4", False), ("FC3 FCz FC4 C3 Cz C4 CP3 CPz", True), ("C3-P3 C4-P4 " + "F3-C3 F4-C4 " * 3, False)],
)
def test_the_average_reference_only_where_it_makes_sense(names, averaged):
    assert Preprocessing().averages(names.split()) == averaged
    assert Preprocessing(reference="average").averages(names.split())
    assert not Preprocessing(reference=None).averages(names.split())


def test_bipolar_channels_are_read_as_recorded(make_raw):
    raw = make_raw(("C3-P3", "C4-P4", "Cz-Pz"))
    assert read_recording(raw).get_channel_types() == ["eeg"] * 3
    applied = Preprocessing().apply(raw)
    np.testing.assert_array_equal(applied.get_data(), raw.get_data())


# whose a file is


def flat(folder, names):
    for name in names:
        (folder / name).touch()
    return folder


def test_people_in_one_folder(tmp_path, caplog):
    folder = flat(tmp_path, ["anna_run1.edf", "anna_run2.edf", "ben_run1.edf"])
    assert {each.subject for each in find_recordings(folder)} == {folder.name}
    assert "3 recordings count as one subject" in caplog.text
    found = find_recordings(folder, r"(?P<subject>[a-z]+)_run(?P<run>\d)")
    assert [(each.subject, each.session, each.run) for each in found] == [
        ("anna", "1", "1"),
        ("anna", "1", "2"),
        ("ben", "1", "1"),
    ]
    assert [each.subject for each in find_recordings(folder, "^([^_]+)")] == ["anna", "anna", "ben"]
    with pytest.raises(UserError, match="does not match"):
        find_recordings(folder, r"(P\d+)")
    for wrong in ("(", "abc", "(?P<person>a)"):
        with pytest.raises(UserError, match="subject pattern"):
            find_recordings(folder, wrong)


def test_people_of_a_table(tmp_path):
    folder = flat(tmp_path, ["anna_run1.edf", "2-ben.edf"])
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-anna\t30\nben\t31\n", encoding="utf-8")
    assert {each.subject for each in find_recordings(folder)} == {"anna", "ben"}
    (folder / "carl.edf").touch()
    with pytest.raises(UserError, match=r"carl.edf: holds the name of none of the 2 people"):
        find_recordings(folder)
    (folder / "participants.tsv").write_text("name\nanna\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column participant_id"):
        find_recordings(folder)


# other formats


def write_xdf(path, data, rate, labels=None, units="microvolts", markers=(), drop=None, streams=1):
    """An XDF file with EEG streams (samples, channels) and a marker stream of (time, text)."""

    def chunk(tag, content):
        return struct.pack("<BIH", 4, len(content) + 2, tag) + content

    def header(number, name, kind, rate, channels, form, desc=""):
        text = (
            f"<?xml version='1.0'?><info><name>{name}</name><type>{kind}</type>"
            f"<channel_count>{channels}</channel_count>"
            f"<nominal_srate>{rate}</nominal_srate><channel_format>{form}</channel_format>{desc}</info>"
        )
        return chunk(2, struct.pack("<I", number) + text.encode())

    def footer(number):
        return chunk(6, struct.pack("<I", number) + b"<?xml version='1.0'?><info></info>")

    labels = labels or []
    told = "".join(f"<channel><label>{label}</label><unit>{units}</unit></channel>" for label in labels)
    desc = f"<desc><channels>{told}</channels></desc>" if labels else "<desc></desc>"
    out = b"XDF:" + chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>")
    times = 100.0 + np.arange(len(data)) / rate
    kept = np.ones(len(data), bool)
    if drop is not None:
        kept[drop] = False
    for number in range(1, streams + 1):
        out += header(number, f"amp{number}", "EEG", rate, data.shape[1], "float32", desc)
        samples = b"".join(
            struct.pack("<Bd", 8, time) + row.astype("<f4").tobytes() for time, row in zip(times[kept], data[kept])
        )
        out += chunk(3, struct.pack("<IBI", number, 4, kept.sum()) + samples)
    out += header(9, "cues", "Markers", 0, 1, "string", "<desc></desc>")
    texts = b"".join(
        struct.pack("<Bd", 8, 100.0 + at) + struct.pack("<BB", 1, len(text)) + text.encode() for at, text in markers
    )
    out += chunk(3, struct.pack("<IBI", 9, 4, len(markers)) + texts)
    for number in (*range(1, streams + 1), 9):
        out += footer(number)
    path.write_bytes(out)
    return path


@pytest.fixture
def microvolts():
    return 10 * np.random.default_rng(0).normal(size=(5000, 4))


MARKS = ((2.0, "left"), (8.0, "right"), (12.0, "left"), (99.0, "late"))


def test_xdf(tmp_path, microvolts):
    pytest.importorskip("pyxdf")
    path = write_xdf(tmp_path / "a.xdf", microvolts, 250.0, ["C3", "Cz", "C4", "TRG"], markers=MARKS)
    assert [each.path for each in find_recordings(tmp_path)] == [path]
    notes = []
    raw = read_recording(path, notes=notes)
    assert raw.get_channel_types() == ["eeg", "eeg", "eeg", "eeg"]
    assert raw.info["sfreq"] == 250
    np.testing.assert_allclose(raw.get_data() * 1e6, microvolts.T, rtol=1e-5)
    assert event_counts(raw) == {"left": 2, "right": 1}
    np.testing.assert_allclose(raw.annotations.onset, [2, 8, 12], atol=0.004)
    assert any("1 of 4 markers of cues lie outside" in note for note in notes)


def test_xdf_with_lost_samples(tmp_path, microvolts):
    pytest.importorskip("pyxdf")
    path = write_xdf(
        tmp_path / "a.xdf", microvolts, 250.0, ["C3", "Cz", "C4", "Pz"], markers=MARKS[:3], drop=slice(2200, 2450)
    )
    notes = []
    raw = read_recording(path, notes=notes)
    assert any("1 gaps in the stream, 1.00 s lost" in note for note in notes)
    assert segments(raw) == [(0, 2200), (2200, 4750)]
    assert len(load_trials(path, preprocessing=PLAIN)) == 2
    np.testing.assert_allclose([onset for onset in raw.annotations.onset if onset > 9], [11.0], atol=0.01)


def test_xdf_that_cannot_be(tmp_path, microvolts):
    pytest.importorskip("pyxdf")
    path = write_xdf(tmp_path / "a.xdf", microvolts, 250.0, streams=2)
    with pytest.raises(UserError, match="2 EEG streams where one is wanted"):
        read_recording(path)
    path = write_xdf(tmp_path / "b.xdf", microvolts, 250.0)
    notes = []
    assert read_recording(path, notes=notes).ch_names == ["Channel 1", "Channel 2", "Channel 3", "Channel 4"]
    assert any("taken for microvolts" in note for note in notes)
    (tmp_path / "c.xdf").write_bytes(b"no")
    with pytest.raises(UserError, match=r"c\.xdf"):
        read_recording(tmp_path / "c.xdf")


def write_openbci(path, microvolts, titles=True):
    lines = [
        "%OpenBCI Raw EXG Data",
        "%Number of channels = 4",
        "%Sample Rate = 200 Hz",
        "%Board = OpenBCI_GUI$BoardGanglion",
    ]
    if titles:
        channels = ", ".join(f"EXG Channel {k}" for k in range(4))
        rest = "Accel Channel 0, Timestamp, Marker Channel, Timestamp (Formatted)"
        lines.append(f"Sample Index, {channels}, {rest}")
    for k, row in enumerate(microvolts):
        values = [k % 256, *np.round(row, 4), 0.01 * np.sin(k), 1.6e9 + k / 200]
        values += [1.0 if k in (1000, 3000) else 0.0, "2026-01-01 00:00:00.000"] if titles else []
        lines.append(", ".join(map(str, values)))
    path.write_text("\n".join([*lines, "12, 3.0"]), encoding="utf-8")
    return path


def test_openbci(tmp_path, microvolts):
    path = write_openbci(tmp_path / "OpenBCI-RAW.txt", microvolts)
    (tmp_path / "notes.txt").write_text("no recording", encoding="utf-8")
    assert [each.path for each in find_recordings(tmp_path)] == [path]
    notes = []
    names = {f"EXG Channel {k}": name for k, name in enumerate(("C3", "Cz", "C4", "Pz"))}
    raw = read_recording(path, rename=names, notes=notes)
    eeg = raw.copy().pick("eeg")
    assert eeg.ch_names == ["C3", "Cz", "C4", "Pz"]
    np.testing.assert_allclose(eeg.get_data() * 1e6, microvolts.T, atol=1e-4)
    assert raw.info["sfreq"] == 200
    assert event_counts(raw) == {"1": 2}
    assert any("1 of 5001 rows are not whole" in note for note in notes)
    assert (
        len(read_recording(write_openbci(tmp_path / "old.txt", microvolts, titles=False)).copy().pick("eeg").ch_names)
        == 4
    )
    (tmp_path / "empty.txt").write_text("%OpenBCI Raw EXG Data\n", encoding="utf-8")
    with pytest.raises(UserError, match="no Sample Rate"):
        read_recording(tmp_path / "empty.txt")


@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_brainflow(tmp_path, microvolts, delimiter):
    table = np.zeros((5000, 15))
    table[:, 0], table[:, 1:5] = np.arange(5000) % 256, microvolts
    table[:, 5:8] = np.random.default_rng(1).normal(size=(5000, 3))
    table[:, 13], table[[1000, 3000], 14] = 1.6e9 + np.arange(5000) / 200, (1, 2)
    np.savetxt(tmp_path / "board.csv", table, "%.6f", delimiter=delimiter)
    raw = read_recording(tmp_path / "board.csv")
    np.testing.assert_allclose(raw.copy().pick("eeg").get_data() * 1e6, microvolts.T, atol=1e-5)
    assert raw.info["sfreq"] == 200
    assert event_counts(raw) == {"1": 1, "2": 1}
    np.savetxt(tmp_path / "other.csv", table[:, :9], delimiter=delimiter)
    with pytest.raises(UserError, match="9 columns, known are 15"):
        read_recording(tmp_path / "other.csv")


def epoched(make_raw):
    return load_trials(Recording(None, "1", raw=make_raw()), preprocessing=PLAIN)


def test_epoched_fif(make_raw, tmp_path):
    epochs = epoched(make_raw)
    epochs.metadata = None
    epochs.save(tmp_path / "a-epo.fif", verbose="ERROR")
    (recording,) = find_recordings(tmp_path)
    back = load_trials(recording, preprocessing=Preprocessing(tmax=1.5), channels=["C3", "Cz"])
    assert len(back) == 6
    assert back.get_data().shape[1:] == (2, 240)
    assert list(back.metadata["file"].unique()) == [str(tmp_path / "a-epo.fif")]
    with pytest.raises(UserError, match="holds 6 trials and no continuous recording"):
        recording.read()


@pytest.mark.parametrize("wrapped", [True, False])
def test_epoched_eeglab(make_raw, tmp_path, wrapped):
    epochs = epoched(make_raw)
    data = epochs.get_data()
    n_epochs, n_channels, n_times = data.shape
    names = {code: name for name, code in epochs.event_id.items()}
    event = np.array(
        [(names[code], 1.0 + k * n_times, k + 1.0) for k, code in enumerate(epochs.events[:, 2])],
        dtype=[("type", object), ("latency", float), ("epoch", float)],
    )
    epoch = np.array(
        [(float(k + 1), names[code], 0.0) for k, code in enumerate(epochs.events[:, 2])],
        dtype=[("event", float), ("eventtype", object), ("eventlatency", float)],
    )
    chanlocs = np.array([(name,) for name in epochs.ch_names], dtype=[("labels", object)])
    eeg = {
        "setname": "a", "nbchan": n_channels, "trials": n_epochs, "pnts": n_times, "srate": RATE, "xmin": 0.0,
        "xmax": (n_times - 1) / RATE, "data": data.transpose(1, 2, 0) * 1e6, "chanlocs": chanlocs, "event": event,
        "epoch": epoch, "icawinv": [], "icasphere": [], "icaweights": [], "urevent": [], "ref": "common",
    }  # fmt: skip
    savemat(tmp_path / "a.set", {"EEG": eeg} if wrapped else eeg, appendmat=False)
    back = load_trials(tmp_path / "a.set", preprocessing=Preprocessing(tmax=1.5))
    assert len(back) == 6
    assert set(back.event_id) == {"T1", "T2"}


def test_latin1_annotations(make_raw, tmp_path):
    from tests.eeg.test_recordings import write_edf

    path = write_edf(tmp_path / "a.edf", make_raw(cues={"fussXX": [5.0, 20.0], "hand": [12.0]}))
    content = path.read_bytes()
    assert content.count(b"fussXX") == 2
    path.write_bytes(content.replace(b"fussXX", b"fu\xdf\x20ab"))
    notes = []
    assert event_counts(read_recording(path, notes=notes)) == {"fuß ab": 2, "hand": 1}
    assert any("Latin-1" in note for note in notes)
    assert event_counts(read_recording(path, encoding="latin1")) == {"fuß ab": 2, "hand": 1}


def test_labels_that_occur_twice_are_told(make_raw, tmp_path):
    from tests.eeg.test_recordings import write_edf

    path = write_edf(tmp_path / "a.edf", make_raw(("C3", "Cz", "C4", "Q1", "Q2")))
    content = bytearray(path.read_bytes())
    at = content.index(b"Q2 ")
    content[at : at + 2] = b"Q1"
    path.write_bytes(bytes(content))
    notes = []
    raw = read_recording(path, notes=notes)
    assert len(set(raw.ch_names)) == 5
    assert any("not unique" in note and "Q1" in note for note in notes)
    assert len(select_channels(raw, ["C3", "Cz", "C4"]).ch_names) == 3


def test_what_mne_warns_of_is_told_and_not_printed(make_raw, tmp_path, caplog, recwarn):
    from tests.eeg.test_recordings import write_fif

    path = write_fif(tmp_path / "badname.fif", make_raw())
    notes = []
    with caplog.at_level(logging.INFO):
        read_recording(path, notes=notes)
    assert any("filename" in note for note in notes)
    assert not [w for w in recwarn if "filename" in str(w.message)]
