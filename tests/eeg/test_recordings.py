"""Reading recordings: formats, names, units, events, trials; and every bad input by name."""

import logging
import struct
from pathlib import Path

import edfio
import mne
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from nearfar.core.errors import UserError
from nearfar.eeg.annotations import event_counts
from nearfar.eeg.conventions import standard_montage, standard_name
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Recording, bad_channels, find_recordings, read_recording, select_channels
from nearfar.eeg.trials import load_trials, trials_array

EVENTS = {"left_hand": "T1", "right_hand": "T2"}
PLAIN = Preprocessing(tmax=2.0, reference=None)


def write_edf(path: Path, raw: mne.io.BaseRaw, physical_range=(-3200, 3200)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mne.export.export_raw(path, raw, fmt="edf", physical_range=physical_range, overwrite=True, verbose="ERROR")
    return path


def write_bdf(path: Path, raw: mne.io.BaseRaw) -> Path:
    kinds = {"sampling_frequency": raw.info["sfreq"], "physical_dimension": "uV"}
    signals = [edfio.BdfSignal(x * 1e6, label=name, **kinds) for name, x in zip(raw.ch_names, raw.get_data())]
    notes = [edfio.EdfAnnotation(note["onset"], note["duration"], str(note["description"])) for note in raw.annotations]
    edfio.Bdf(signals, annotations=notes).write(path)
    return path


def write_fif(path: Path, raw: mne.io.BaseRaw) -> Path:
    raw.save(path, overwrite=True, verbose="ERROR")
    return path


def write_brainvision(path: Path, raw: mne.io.BaseRaw) -> Path:
    mne.export.export_raw(path, raw, fmt="brainvision", overwrite=True, verbose="ERROR")
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_edf, "a.edf"), (write_bdf, "a.bdf"), (write_fif, "a_raw.fif"), (write_brainvision, "a.vhdr")],
)
def test_formats_keep_amplitude_timing_and_events(make_raw, tmp_path, write, name):
    raw = make_raw()
    done = read_recording(write(tmp_path / name, raw))
    assert done.ch_names == raw.ch_names
    assert done.info["sfreq"] == 160
    np.testing.assert_allclose(done.get_data(), raw.get_data(), atol=6e-8)  # half a step of 16 bits over 6.4 mV
    events = {"T1": 3, "T2": 3} if name != "a.vhdr" else {"Comment/T1": 3, "Comment/T2": 3}
    assert event_counts(done) == events
    epochs = PLAIN.cut(done, dict(zip(("left_hand", "right_hand"), events)))
    np.testing.assert_allclose(epochs.metadata["onset"], [5, 12, 20, 27, 35, 42], atol=1e-9)
    for trial, onset in zip(epochs.get_data(), epochs.metadata["onset"]):
        np.testing.assert_allclose(trial, raw.get_data()[:, int(onset * 160) :][:, :320], atol=6e-8)
    places = done.get_montage().get_positions()["ch_pos"]
    np.testing.assert_allclose(places["C3"], standard_places()["C3"], atol=1e-9)


def standard_places():
    info = mne.create_info(["C3", "C4", "Cz"], 100, "eeg").set_montage(standard_montage())
    return info.get_montage().get_positions()["ch_pos"]


# Names, types, positions


@given(
    st.sampled_from([name for name in standard_montage().ch_names if name not in ("T3", "T4", "T5", "T6")]),
    st.sampled_from(["", "EEG ", "EEG-", "eeg_", " "]),
    st.sampled_from(["", "..", ".", " ", "-Ref", "-LE", "-A1", "-M1M2"]),
    st.sampled_from([str, str.upper, str.lower]),
)
def test_names_are_brought_into_the_standard_spelling(name, before, after, case):
    assert standard_name(before + case(name) + after) == name


def test_other_names_stay():
    for name in ("EEG 001", "C3-C4", "Resp", "EEG-0", "BIP1"):
        assert standard_name(f" {name} ") == name
    assert [standard_name(name) for name in ("T3", "t4", "EEG T5-Ref", "T6..")] == ["T7", "T8", "P7", "P8"]


def test_types_by_name_and_renaming(make_raw, tmp_path):
    raw = make_raw(("Fc3.", "EEG C3-Ref", "X7", "VEOG", "EOG left", "ECG", "EMG-arm", "Status"))
    path = write_edf(tmp_path / "a.edf", raw)
    done = read_recording(path, rename={"X7": "c4"})
    assert done.ch_names[:3] == ["FC3", "C3", "C4"]
    assert done.get_channel_types() == ["eeg"] * 3 + ["eog", "eog", "ecg", "emg", "stim"]
    with pytest.raises(UserError, match=r"a\.edf: no channel C9 to rename; it has Fc3\."):
        read_recording(path, rename={"C9": "C4"})


def test_one_electrode_twice_is_refused(make_raw, tmp_path):
    path = write_edf(tmp_path / "a.edf", make_raw(("C3-Ref", "C3-LE", "Cz")))
    with pytest.raises(UserError, match=r"a\.edf: channels C3-Ref, C3-LE are one electrode; tell them apart"):
        read_recording(path)


def test_positions_of_the_file_are_kept(make_raw, tmp_path):
    raw = make_raw()
    own = {name: place + 0.003 for name, place in standard_montage().get_positions()["ch_pos"].items()}
    raw.set_montage(mne.channels.make_dig_montage(own, coord_frame="head"), on_missing="ignore")
    done = read_recording(write_fif(tmp_path / "a_raw.fif", raw))
    np.testing.assert_allclose(done.info["chs"][3]["loc"][:3], own["C3"], atol=1e-6)


def test_the_caps_own_numbering_gets_no_ear_positions(make_raw, tmp_path):
    done = read_recording(write_edf(tmp_path / "a.edf", make_raw(("A1", "A2", "A3", "B1"))))
    assert done.get_montage() is None


def test_triggers_become_annotations(make_raw, tmp_path):
    raw = make_raw(cues={})
    stim = np.zeros((1, raw.n_times))
    for onset, code in ((5.0, 7), (12.0, 8), (20.0, 7)):
        stim[0, round(onset * 160) : round(onset * 160) + 10] = code
    raw.add_channels([mne.io.RawArray(stim, mne.create_info(["STI 014"], 160, "stim"), verbose="ERROR")], True)
    path = write_fif(tmp_path / "a_raw.fif", raw.crop(2.0))
    done = read_recording(path)
    assert event_counts(done) == {"7": 2, "8": 1}
    epochs = PLAIN.cut(done, {"left": "7", "right": "8"})
    np.testing.assert_allclose(epochs.metadata["onset"], [3, 10, 18])
    assert epochs.events[:, 2].tolist() == [1, 2, 1]


def test_triggers_of_a_biosemi_file(make_raw, tmp_path):
    raw = make_raw(cues={})
    status = np.full(raw.n_times, 0x010000)  # the amplifier's own bits
    status[800:810] += 5
    status[1600:1610] += 6
    signals = [
        edfio.BdfSignal(x * 1e6, 160, label=name, physical_dimension="uV", physical_range=(-262144, 262143))
        for name, x in zip(raw.ch_names, raw.get_data())
    ]
    signals.append(
        edfio.BdfSignal.from_digital(status.astype(np.int32), 160, label="Status", physical_range=(-8388608, 8388607))
    )
    edfio.Bdf(signals).write(tmp_path / "a.bdf")
    epochs = load_trials(tmp_path / "a.bdf", preprocessing=PLAIN, events={"left": "5", "right": "6"})
    assert epochs.metadata["onset"].tolist() == [5, 10]
    assert epochs.ch_names == raw.ch_names


def test_eeglab_files(make_raw, tmp_path):
    raw = make_raw()
    events = [{"type": name, "latency": 160 * onset + 1} for name, onset in (("T1", 5.0), ("T2", 12.0), ("T1", 20.0))]
    savemat(
        tmp_path / "a.set",
        {
            "EEG": {
                "data": raw.get_data() * 1e6,
                "srate": 160.0,
                "nbchan": 9,
                "pnts": raw.n_times,
                "trials": 1,
                "xmin": 0.0,
                "xmax": 60.0,
                "chanlocs": [{"labels": name} for name in raw.ch_names],
                "event": events,
                "epoch": [],
                "icawinv": [],
                "icasphere": [],
                "icaweights": [],
            }
        },
    )
    epochs = load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS)
    assert epochs.metadata["onset"].tolist() == [5, 12, 20]
    np.testing.assert_allclose(epochs.get_data()[1], raw.get_data()[:, 1920:2240], atol=1e-12)


# Units


def test_numbers_that_cannot_be_volts_are_refused_and_mended_on_request(make_raw, tmp_path):
    raw = make_raw()
    path = write_fif(tmp_path / "a_raw.fif", raw.copy().apply_function(lambda x: x * 1e6))
    with pytest.raises(UserError, match=r"a_raw\.fif: EEG of 10 V cannot be volts; say what .* unit= \(V, mV, uV"):
        read_recording(path)
    np.testing.assert_allclose(read_recording(path, unit="uV").get_data(), raw.get_data(), rtol=1e-6)
    with pytest.raises(UserError, match="unit must be one of V, mV, uV"):
        read_recording(path, unit="mv")
    with pytest.raises(UserError, match="cannot be volts"):
        read_recording(raw, unit="uV")  # 1e-11 V


# Finding


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_subject_session_and_run_by_name_or_folder(tmp_path):
    names = {
        "eegmmidb/S002/S002R12.edf": ("S002", "3", "12"),
        "eegmmidb/S002/S002R04.edf": ("S002", "1", "4"),
        "2a/A03E.gdf": ("A03", "E", ""),
        "bids/sub-anna/ses-2/eeg/sub-anna_ses-2_task-mi_run-01_eeg.vhdr": ("anna", "2", "01"),
        "bids/sub-anna/eeg/sub-anna_task-mi_eeg.set": ("anna", "1", "1"),
        "lab/p7/day1/first.bdf": ("p7", "day1", "first"),
        "lab/p10/day1/raw.fif.gz": ("p10", "day1", "raw"),
        "flat/first.edf": ("flat", "1", "first"),
    }
    for name in names:
        touch(tmp_path / name)
    found = {
        each.path.relative_to(tmp_path).as_posix(): (each.subject, each.session, each.run)
        for folder in ("eegmmidb", "2a", "bids", "lab", "flat")
        for each in find_recordings(tmp_path / folder)
    }
    assert found == names
    order = [each.path.name for each in find_recordings([tmp_path / "lab", tmp_path / "eegmmidb"])]
    assert order == ["first.bdf", "raw.fif.gz", "S002R04.edf", "S002R12.edf"]
    alone = find_recordings(tmp_path / "lab/p7/day1/first.bdf")[0]
    assert (alone.subject, alone.session) == ("day1", "1")


def test_what_is_no_recording_is_passed_over(tmp_path):
    for name in ("a_raw.fif", "a_raw-1.fif", "b_split-01_raw.fif", "b_split-02_raw.fif"):
        touch(tmp_path / name)
    touch(tmp_path / "derivatives/c.edf")
    touch(tmp_path / "notes.txt")
    assert [each.path.name for each in find_recordings(tmp_path)] == ["a_raw.fif", "b_split-01_raw.fif"]
    assert len(find_recordings([tmp_path, tmp_path / "a_raw.fif"])) == 2  # given twice, taken once


# Trials


def test_trials_of_several_files(make_raw, tmp_path):
    for name, seed in (("S001R04.edf", 1), ("S001R08.edf", 2), ("S002R06.edf", 3)):
        write_edf(tmp_path / name, make_raw(seed=seed))
    epochs = load_trials(tmp_path, preprocessing=PLAIN)
    X, y, classes = trials_array(epochs)
    assert classes == ["left_hand", "right_hand", "hands", "feet"]
    assert (X.shape, X.dtype, y.dtype) == ((18, 9, 320), np.float32, np.int64)
    assert y.tolist() == [0, 1] * 6 + [2, 3] * 3
    metadata = epochs.metadata
    assert list(metadata) == ["subject", "session", "run", "file", "onset"]
    assert metadata["subject"].tolist() == ["S001"] * 12 + ["S002"] * 6
    assert metadata["session"].tolist() == ["1"] * 6 + ["2"] * 6 + ["1"] * 6
    assert metadata["run"].tolist() == ["4"] * 6 + ["8"] * 6 + ["6"] * 6
    assert metadata["file"].unique().tolist() == [
        str(tmp_path / name) for name in ("S001R04.edf", "S001R08.edf", "S002R06.edf")
    ]
    assert metadata["onset"].tolist() == [5, 12, 20, 27, 35, 42] * 3
    second = make_raw(seed=2).get_data() * 1e6
    np.testing.assert_allclose(X[7], second[:, 12 * 160 : 14 * 160], atol=0.06)


def test_events_by_name_and_events_found(make_raw, tmp_path):
    path = write_edf(
        tmp_path / "a.edf", make_raw(cues={"left": [5.0], "LEFT": [12.0], "right": [20.0], "rest": [30.0]})
    )
    epochs = load_trials(path, preprocessing=PLAIN, events={"right_hand": "right", "left_hand": ["left", "LEFT"]})
    assert epochs.event_id == {"right_hand": 1, "left_hand": 2}  # in the order given
    assert epochs.events[:, 2].tolist() == [2, 2, 1]
    epochs = load_trials(path, preprocessing=PLAIN)
    assert list(epochs.event_id) == ["rest", "LEFT", "left", "right"]  # the customary first, then by the alphabet
    assert load_trials(path, preprocessing=PLAIN, events={"cue": "left"}).event_id == {"cue": 1}


def test_movements_done_and_imagined_are_not_mixed(make_raw, tmp_path):
    for name in ("S001R03.edf", "S001R04.edf"):
        write_edf(tmp_path / name, make_raw())
    epochs = load_trials(tmp_path, preprocessing=PLAIN)
    assert list(epochs.event_id) == ["left_hand", "right_hand", "left_hand_execution", "right_hand_execution"]


def test_channel_sets_that_differ(make_raw, tmp_path):
    first, second = ("C3", "Cz", "C4", "Pz"), ("Cz", "C4", "C3", "Fz")
    write_edf(tmp_path / "a.edf", make_raw(first, seed=1))
    write_edf(tmp_path / "b.edf", make_raw(second, seed=2))
    with pytest.raises(UserError, match=r"b\.edf: channels differ .*a\.edf: it lacks Pz and has besides Fz; give"):
        load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS)
    epochs = load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS, channels="common")
    assert epochs.ch_names == ["C3", "Cz", "C4"]
    expected = make_raw(second, seed=2).get_data()[[2, 0, 1], 5 * 160 : 7 * 160]
    np.testing.assert_allclose(epochs.get_data()[6], expected, atol=6e-8)
    epochs = load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS, channels=["C4", "C3"])
    assert epochs.ch_names == ["C4", "C3"]
    with pytest.raises(UserError, match=r"b\.edf: no channel Pz; it has Cz, C4, C3, Fz"):
        load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS, channels=["C3", "Pz"])


def test_the_same_channels_in_another_order_are_put_in_order(make_raw, tmp_path):
    write_edf(tmp_path / "a.edf", make_raw(("C3", "Cz", "C4"), seed=1))
    write_edf(tmp_path / "b.edf", make_raw(("C4", "C3", "Cz"), seed=2))
    epochs = load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS)
    assert epochs.ch_names == ["C3", "Cz", "C4"]
    expected = make_raw(("C4", "C3", "Cz"), seed=2).get_data()[[1, 2, 0], 5 * 160 : 7 * 160]
    np.testing.assert_allclose(epochs.get_data()[6], expected, atol=6e-8)


def smooth_field(names, n_times=9600):
    """A dipole-like potential over the scalp, the same at all electrodes but for a smooth factor."""
    places = standard_montage().get_positions()["ch_pos"]
    direction = np.array([places[name] / np.linalg.norm(places[name]) for name in names])
    sources = np.random.default_rng(0).normal(size=(3, n_times))
    return 1e-5 * (1 + direction) @ sources


def test_missing_and_bad_channels_are_interpolated(make_raw, tmp_path):
    names = ("F3", "Fz", "F4", "C3", "Cz", "C4", "P3", "Pz", "P4", "T7", "T8", "O1", "O2", "FC1", "FC2", "CP1", "CP2")
    data = smooth_field(names)
    kept = [index for index, name in enumerate(names) if name != "Cz"]
    raw = make_raw(tuple(names[index] for index in kept), data=data[kept].copy())
    raw._data[raw.ch_names.index("C3")] = 0
    path = write_edf(tmp_path / "a.edf", raw)
    epochs = load_trials(path, preprocessing=PLAIN, events=EVENTS, channels=names, interpolate=True)
    assert epochs.ch_names == list(names)
    trial = data[:, 5 * 160 : 7 * 160]
    error = np.linalg.norm(epochs.get_data()[0] - trial, axis=1) / np.linalg.norm(trial, axis=1)
    assert error[[names.index("C3"), names.index("Cz")]].max() < 0.1
    assert np.delete(error, [names.index("C3"), names.index("Cz")]).max() < 0.02  # quantized only
    with pytest.raises(UserError, match="9 of 17 channels are missing or bad, too many to interpolate"):
        select_channels(read_recording(path).pick(["F3", "Fz", "F4", "C3", "C4", "P3", "Pz", "P4", "T7"]), names, True)


def test_interpolation_needs_positions(make_raw, tmp_path):
    raw = read_recording(write_edf(tmp_path / "a.edf", make_raw(("C3", "C4", "X1", "X2"))))
    with pytest.raises(UserError, match=r"a\.edf: no position of X1, X2, which interpolation needs"):
        select_channels(raw, ["C3", "C4", "X1", "X2", "Cz"], interpolate=True)
    assert select_channels(raw, ["X1", "C3"]).ch_names == ["X1", "C3"]  # not needed here


def test_recordings_in_memory(make_raw):
    recording = Recording(Path("mine"), "s", raw=make_raw())
    epochs = load_trials(recording, preprocessing=PLAIN, events=EVENTS)
    assert epochs.metadata["file"].unique().tolist() == ["mine"]
    assert epochs.metadata["run"].unique().tolist() == ["1"]


def test_a_reference_that_is_not_kept(make_raw, tmp_path):
    path = write_edf(tmp_path / "a.edf", make_raw(("M1", "C3", "C4")))
    preprocessing = Preprocessing(tmax=2, reference=("M1",))
    whole = load_trials(path, preprocessing=preprocessing, events=EVENTS)
    named = load_trials(path, preprocessing=preprocessing, events=EVENTS, channels=["C3", "C4"])
    assert whole.ch_names == named.ch_names == ["C3", "C4"]
    np.testing.assert_array_equal(whole.get_data(), named.get_data())
    with pytest.raises(UserError, match="M1 cannot be a reference and a channel to keep"):
        load_trials(path, preprocessing=preprocessing, events=EVENTS, channels=["M1", "C3"])


# Bad input


def bad_inputs(make_raw, folder):
    def raw_with(change, **arguments):
        raw = make_raw(**arguments)
        change(raw)
        return raw

    def truncated():
        path = write_edf(folder / "a.edf", make_raw())
        path.write_bytes(path.read_bytes()[:-5000])
        return path

    def foreign(name, content=b"\xff\xd8\xff\xe0 a picture"):
        (folder / name).write_bytes(content)
        return folder / name

    def interrupted():
        path = write_edf(folder / "a.edf", make_raw())
        content = bytearray(path.read_bytes())
        content[192:197] = b"EDF+D"
        return foreign("a.edf", bytes(content))

    def circle():
        path = write_fif(folder / "a_raw.fif", make_raw())
        content = bytearray(path.read_bytes())
        content[48:52] = struct.pack(">i", 36)  # the second tag, at 36, is followed by itself
        return foreign("a_raw.fif", bytes(content))

    def nothing():
        (folder / "empty").mkdir()
        return folder / "empty"

    def edf(**arguments):
        return write_edf(folder / "a.edf", make_raw(**arguments))

    flat = lambda raw: raw.apply_function(lambda x: 0 * x, picks=["C3"])  # noqa: E731
    broken = lambda raw: raw._data[3].__setitem__(slice(500, 600), np.nan)  # noqa: E731
    marked = lambda raw: raw.info["bads"].append("C3")  # noqa: E731
    return {
        "truncated": (truncated, r"a\.edf: truncated, \d+ of \d+ bytes; copy or download it again"),
        "foreign edf": (lambda: foreign("a.edf"), r"a\.edf: not an EDF file; give the recording in its own format"),
        "foreign fif": (lambda: foreign("a_raw.fif"), r"a_raw\.fif: cannot be read as \.fif .*of another type"),
        "circle of tags": (circle, r"a_raw\.fif: its tags lead in a circle; the file may be damaged"),
        "foreign gdf": (lambda: foreign("a.gdf"), r"a\.gdf: cannot be read as \.gdf"),
        "foreign mat": (lambda: foreign("a.mat"), r"a\.mat: not a MATLAB file"),
        "unknown ending": (lambda: foreign("a.jpg"), r"a\.jpg: cannot be read as \.jpg"),
        "interrupted": (interrupted, r"a\.edf: has interruptions \(EDF\+D\)"),
        "empty folder": (nothing, r"empty: no recordings in this folder; known endings are \.edf"),
        "missing": (lambda: folder / "none.edf", r"none\.edf: no such file or folder"),
        "no events": (lambda: edf(cues={}), r"a\.edf: none of the events T1, T2; it has no events at all"),
        "unknown events": (lambda: edf(cues={"769": [5.0]}), r"a\.edf: none of the events T1, T2; it has 769 \(1\)"),
        "one event unknown": (lambda: edf(cues={"T1": [5.0], "x": [9.0]}), r"a\.edf: no event T2; there are T1, x"),
        "flat": (lambda: write_edf(folder / "a.edf", raw_with(flat)), r"a\.edf: channel C3 is flat; leave it out"),
        "nan": (lambda: write_fif(folder / "a_raw.fif", raw_with(broken)), r"a_raw\.fif: channel C3 is NaN; leave"),
        "marked": (lambda: write_fif(folder / "a_raw.fif", raw_with(marked)), r"channel C3 is marked bad"),
        "slow": (lambda: edf(sfreq=50.0), r"a\.edf: sampled at 50 Hz, .* settings need 30 Hz; lower h_freq"),
    }


KINDS = list(bad_inputs(None, None))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_ends_in_one_line_that_names_the_file(make_raw, tmp_path, kind, recwarn, capfd):
    make, message = bad_inputs(make_raw, tmp_path)[kind]
    path = make()
    recwarn.clear()
    with pytest.raises(UserError, match=message) as caught:
        load_trials(path, preprocessing=Preprocessing(tmax=2, l_freq=8, h_freq=30), events=EVENTS)
    assert "\n" not in str(caught.value)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_a_class_without_trials_is_none(make_raw, tmp_path):
    path = write_edf(tmp_path / "a.edf", make_raw(cues={"T1": [5.0, 12.0], "T2": [59.0]}))  # the other at the very end
    assert load_trials(path, preprocessing=PLAIN, events=EVENTS).event_id == {"left_hand": 1}


def test_bad_channels_are_told(make_raw):
    raw = make_raw()
    raw._data[1] = 5e-6
    raw._data[2, 300:310] = np.nan
    raw._data[:, 100:200] = np.nan  # a gap in all is no fault of any
    raw.info["bads"] = ["C3"]
    assert bad_channels(raw) == {"FCz": "flat", "FC4": "NaN", "C3": "marked bad"}


def test_different_rates(make_raw, tmp_path):
    write_edf(tmp_path / "a.edf", make_raw())
    write_edf(tmp_path / "b.edf", make_raw(sfreq=200.0))
    with pytest.raises(UserError, match=r"b\.edf: 200 Hz where .*a\.edf has 160 Hz; give one sfreq to resample to"):
        load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS)
    epochs = load_trials(tmp_path, preprocessing=Preprocessing(tmax=2, sfreq=100), events=EVENTS)
    assert epochs.get_data().shape == (12, 9, 200)


def test_a_batch_goes_on_past_bad_files(make_raw, tmp_path):
    for name, seed in (("a.edf", 1), ("b.edf", 2), ("c.edf", 3), ("d.edf", 4)):
        write_edf(tmp_path / name, make_raw(seed=seed, cues={} if name == "d.edf" else None))
    (tmp_path / "b.edf").write_bytes(b"no recording")
    for channels in (None, "common"):
        failures: list = []
        epochs = load_trials(tmp_path, preprocessing=PLAIN, events=EVENTS, channels=channels, failures=failures)
        assert [Path(name).name for name in epochs.metadata["file"].unique()] == ["a.edf", "c.edf"]
        assert [recording.path.name for recording, _ in failures] == ["b.edf", "d.edf"]
        assert [str(error).split(";")[0].split(": ")[1] for _, error in failures] == [
            "not an EDF file",
            "none of the events T1, T2",
        ]
    with pytest.raises(UserError, match=r"none of 1 recordings can be used; the first: .*b\.edf: not an EDF"):
        load_trials(tmp_path / "b.edf", preprocessing=PLAIN, events=EVENTS, failures=[])


# Real recordings


def test_real_recordings_agree_with_mne(shared_data, recwarn, capfd):
    folder = shared_data("eegmmidb/S001")
    paths = [folder / f"S001R{run:02d}.edf" for run in (4, 8, 12)]
    epochs = load_trials(paths, preprocessing=Preprocessing.preset("eegmmidb"))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    X, y, classes = trials_array(epochs)
    assert (X.shape, classes) == ((45, 64, 640), ["left_hand", "right_hand"])
    assert np.bincount(y).tolist() == [23, 22]
    assert epochs.ch_names[:3] == ["FC5", "FC3", "FC1"]
    assert epochs.ch_names[-1] == "Iz"
    assert epochs.metadata["session"].unique().tolist() == ["1", "2", "3"]
    with mne.use_log_level("ERROR"):
        raw = mne.io.read_raw_edf(paths[1], preload=True).set_eeg_reference("average")
        events, codes = mne.events_from_annotations(raw, {"T1": 0, "T2": 1})
        expected = mne.Epochs(raw, events, codes, 0, 4 - 1 / 160, baseline=None, preload=True)
    second = epochs.metadata["session"].to_numpy() == "2"
    np.testing.assert_allclose(X[second], expected.get_data() * 1e6, atol=1e-3)
    assert y[second].tolist() == expected.events[:, 2].tolist()
    assert 10 < X.std() < 100  # microvolts


def test_real_recordings_are_found_and_logged_quietly(shared_data, caplog):
    with caplog.at_level(logging.INFO, "nearfar.eeg"):
        found = find_recordings(shared_data("eegmmidb"))
    assert [recording.run for recording in found] == [str(run) for run in range(3, 15)]
    assert {recording.subject for recording in found} == {"S001"}
    assert not caplog.records
