"""The motor-imagery app on recordings that the tests make: every command, and every kind of bad input."""

import json

import mne
import numpy as np
import pandas as pd
import pytest

from nearfar.core import training
from nearfar.core.cli import root as cli

CHANNELS = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"]
RATE = 64.0
TRAINING = ["--set", "epochs=2", "--set", "batch_size=8", "--window", "0", "2", "--device", "cpu"]


def recording(path, seed=0, channels=CHANNELS, names=("left_hand", "right_hand"), rate=RATE, change=None):
    """A FIF or EDF file: 12 cues, a 10 Hz rhythm over C3 or C4 after each, in noise of 10 microvolts."""
    rng = np.random.default_rng(seed)
    cues = 3.0 + 4.0 * np.arange(12)
    data = 10e-6 * rng.standard_normal((len(channels), round(54 * rate)))
    classes = [names[index % len(names)] for index in range(len(cues))]
    for index, cue in enumerate(cues):
        start, times = round(cue * rate), np.arange(round(2 * rate)) / rate
        row = [name for name in ("C3", "C4") if name in channels][index % 2 :][:1]
        for name in row:
            data[channels.index(name), start : start + len(times)] += 30e-6 * np.sin(2 * np.pi * 10 * times)
    if change is not None:
        change(data)
    raw = mne.io.RawArray(data, mne.create_info(channels, rate, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations(cues[: len(classes)], 2.0, classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".edf":
        mne.export.export_raw(path, raw, physical_range=(-500, 500), overwrite=True, verbose="ERROR")
    else:
        raw.save(path, overwrite=True, verbose="ERROR")
    return path


@pytest.fixture
def folder(tmp_path):
    """Two sessions of two subjects."""
    for number, (subject, session) in enumerate((s, t) for s in ("sub-01", "sub-02") for t in ("ses-1", "ses-2")):
        recording(tmp_path / "data" / subject / session / f"{subject}_{session}_task-mi_raw.fif", number)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    file = recording(folder / "train_raw.fif")
    assert cli.run(["motor-imagery", "train", str(file), "-o", str(folder / "decoder"), *TRAINING]) == 0
    return folder / "decoder"


def run(*arguments):
    return cli.run(["motor-imagery", *map(str, arguments)])


def test_inspect_says_what_is_there(folder, capsys):
    recording(folder / "sub-03" / "ses-1" / "sub-03_ses-1_raw.fif", change=lambda data: data[2].fill(0))
    assert run("inspect", folder, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["subject"], row["session"]) for row in rows][:2] == [("01", "1"), ("01", "2")]
    assert rows[0]["events"] == {"left_hand": 6, "right_hand": 6}
    assert rows[0]["problems"] == []
    assert rows[-1]["problems"] == ["C3 flat"]


def test_inspect_goes_on_past_a_bad_file(folder, capsys):
    (folder / "broken.edf").write_bytes(b"0" * 300)
    assert run("inspect", folder) == 1
    captured = capsys.readouterr()
    assert "1 of 5 failed" in captured.err
    assert "broken.edf" in captured.err
    assert "left_hand 6" in captured.out


def test_train_then_predict(decoder, tmp_path, capsys):
    assert {p.name for p in decoder.iterdir()} == {
        "config.json",
        "decoder.json",
        "model.safetensors",
        "report.html",
        "training",
    }
    description = json.loads((decoder / "decoder.json").read_text())
    assert description["classes"] == ["left_hand", "right_hand"]
    assert description["ch_names"] == CHANNELS
    new = recording(tmp_path / "new.edf", seed=5)
    assert run("predict", decoder, new, "-o", tmp_path / "out", "--check") == 0
    table = pd.read_csv(tmp_path / "out" / "new_predictions.tsv", sep="\t")
    assert len(table) == 12
    assert list(table.columns) == ["onset", "duration", "trial_type", "p_left_hand", "p_right_hand", "true"]
    assert table[["p_left_hand", "p_right_hand"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert table["onset"].to_numpy() == pytest.approx(3.0 + 4.0 * np.arange(12), abs=1 / RATE)
    capsys.readouterr()
    assert run("predict", decoder, new, "-o", tmp_path / "out") == 0
    assert "1 recordings had their tables already" in capsys.readouterr().out


def test_predict_all_along_scores_commands_and_draws(decoder, tmp_path, capsys):
    new = recording(tmp_path / "new_raw.fif", seed=5)
    assert run("predict", decoder, new, "-o", tmp_path / "out", "--every", "0.5", "--dwell", "2", "--check") == 0
    table = pd.read_csv(tmp_path / "out" / "new_raw_predictions.tsv", sep="\t", keep_default_na=False)
    assert np.diff(table["onset"]) == pytest.approx(0.5)
    assert set(table["command"]) <= {"left_hand", "right_hand", "n/a"}
    assert (tmp_path / "out" / "new_raw_predictions.png").stat().st_size > 1000
    assert "bits/min" in capsys.readouterr().out


def test_trials_seen_in_training_are_marked(decoder, tmp_path, capsys):
    new = recording(tmp_path / "new_raw.fif", seed=5)
    for every in ([], ["--every", "0.5"]):
        assert (
            run("predict", decoder, decoder.parent / "train_raw.fif", new, "-o", tmp_path / f"o{len(every)}", *every)
            == 0
        )
        assert capsys.readouterr().out.count("12 of 12 seen in training") == 1
    tables = [pd.read_csv(tmp_path / "o0" / f"{name}_raw_predictions.tsv", sep="\t") for name in ("train", "new")]
    assert tables[0]["seen_in_training"].all()
    assert "seen_in_training" not in tables[1]


def test_threshold_abstains(decoder, tmp_path):
    new = recording(tmp_path / "new_raw.fif", seed=5)
    assert run("predict", decoder, new, "-o", tmp_path / "out", "--threshold", "1.0") == 0
    table = pd.read_csv(tmp_path / "out" / "new_raw_predictions.tsv", sep="\t", keep_default_na=False)
    assert (table["trial_type"] == "n/a").all()


def test_predict_goes_on_past_bad_recordings(decoder, tmp_path, capsys):
    recording(tmp_path / "data" / "a_raw.fif")
    recording(tmp_path / "data" / "b_raw.fif", channels=CHANNELS[:5])
    (tmp_path / "data" / "c_raw.fif").write_bytes(b"nothing")
    assert run("predict", decoder, tmp_path / "data", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "2 of 3 failed" in error
    assert "b_raw.fif: no channel CP3, CP4, Pz" in error
    assert "c_raw.fif" in error
    there = sorted(p.name for p in (tmp_path / "out").iterdir() if p.name[0] != ".")
    assert there == ["a_raw_predictions.tsv", "failures.json"]


def test_train_tests_once_and_fine_tunes(decoder, tmp_path, capsys):
    first, second = recording(tmp_path / "a_raw.fif"), recording(tmp_path / "b_raw.fif", seed=7)
    assert run("train", first, "--test", second, "--start", decoder, "-o", tmp_path / "tuned", *TRAINING) == 0
    assert "test accuracy" in capsys.readouterr().out
    description = json.loads((tmp_path / "tuned" / "decoder.json").read_text())
    assert description["training"]["start"] == str(decoder)
    assert description["training"]["history"][0]["lr"] == 5e-4
    assert description["metrics"]["trials"]["test"] == 12
    assert "marked" not in description["metrics"]["test"]
    assert len(description["trained_on"]["items"]) == 12  # the decoder it began from has seen the same
    known = decoder.parent / "train_raw.fif"
    assert run("train", second, "--test", known, "--start", decoder, "-o", tmp_path / "again", *TRAINING) == 0
    assert "12 of 12 seen in training: too good" in " ".join(capsys.readouterr().out.split())


def test_train_refuses_test_trials_that_it_learns_from(tmp_path, capsys):
    file = recording(tmp_path / "a_raw.fif")
    copy = tmp_path / "copy_raw.fif"
    copy.write_bytes(file.read_bytes())
    assert run("train", file, "--test", copy, "-o", tmp_path / "out", *TRAINING) == 2
    assert "same signal" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_writes_tables_pictures_and_a_page(folder, tmp_path, capsys):
    arguments = ["evaluate", folder, "-o", tmp_path / "out", "--models", "AGTCNet,CSP+LDA", *TRAINING]
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "AGTCNet" in out
    assert "CSP+LDA" in out
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == 2 * 2 * 2
    assert set(results["protocol"]) == {"cross-session"}
    figures = {p.name for p in (tmp_path / "out" / "figures").iterdir()}
    assert {"subjects.png", "training-AGTCNet.png", "spatial-AGTCNet.png", "desynchronization.png"} <= figures
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == len([name for name in figures if name.endswith(".png")])
    assert run(*arguments) == 0, "a second run takes the fits from the cache"
    again = pd.read_csv(tmp_path / "out" / "results.csv")
    assert np.allclose(again["accuracy"], results["accuracy"])
    assert np.allclose(again["seconds"], results["seconds"])
    assert run("report", tmp_path / "out", "-o", tmp_path / "both.html") == 0
    assert "cross-session" in (tmp_path / "both.html").read_text()


def test_published_protocol_is_named_as_such(folder, tmp_path, capsys):
    arguments = ["--models", "EEGNet", "--published", "--set", "epochs=21", *TRAINING[2:]]
    assert run("evaluate", folder / "sub-01", "-o", tmp_path / "out", *arguments) == 0
    assert "published cross-session (test-set selection)" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out" / "results.csv")["sma20"].notna().all()
    assert "too good" in (tmp_path / "out" / "report.html").read_text()


def test_interrupted_training_resumes_to_the_same_decoder(tmp_path, monkeypatch):
    file = recording(tmp_path / "a_raw.fif")
    options = ["--set", "epochs=4", "--set", "batch_size=4", *TRAINING[4:]]
    assert run("train", file, "-o", tmp_path / "whole", *options) == 0
    begin = training._Run.on_train_epoch_start

    def interrupt(self, trainer, module):
        begin(self, trainer, module)
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "on_train_epoch_start", interrupt)
        assert run("train", file, "-o", tmp_path / "cut", *options) == 130
    assert not (tmp_path / "cut" / "decoder.json").exists()
    assert run("train", file, "-o", tmp_path / "cut", *options) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def nan_in_c3(data):
    data[2, 100:110] = np.nan


BAD_INPUTS = {
    "truncated EDF": (lambda f: truncate(recording(f / "a.edf")), [], "a.edf"),
    "wrong file type": (lambda f: text(f / "a.edf"), [], "a.edf"),
    "no events": (lambda f: recording(f / "a_raw.fif", names=("BAD_x",)), [], "no events"),
    "unknown event": (lambda f: recording(f / "a_raw.fif"), ["--event", "left_hand=769", "--event", "feet=771"], "769"),
    "malformed event": (lambda f: recording(f / "a_raw.fif"), ["--event", "left_hand"], "write CLASS=NAME"),
    "one class": (lambda f: recording(f / "a_raw.fif", names=("left_hand",)), [], "a decoder needs two"),
    "NaN channel": (lambda f: recording(f / "a_raw.fif", change=nan_in_c3), [], "C3 is NaN"),
    "flat channel": (lambda f: recording(f / "a_raw.fif", change=lambda d: d[2].fill(0)), [], "C3 is flat"),
    "no positions": (
        lambda f: recording(f / "a_raw.fif", channels=[f"X{i}" for i in range(8)]),
        [],
        "position",
    ),
    "other channels": (
        lambda f: (recording(f / "a_raw.fif"), recording(f / "b_raw.fif", channels=CHANNELS[:6])),
        [],
        "b_raw.fif",
    ),
    "rate below the filter": (lambda f: recording(f / "a_raw.fif"), ["--band", "8", "40"], "a_raw.fif"),
    "empty folder": (lambda f: f.mkdir(exist_ok=True), [], "no recordings in this folder"),
    "missing file": (lambda f: None, [], "no such file or folder"),
    "unknown class": (lambda f: recording(f / "a_raw.fif"), ["--classes", "left_hand,tongue"], "no trials of tongue"),
    "unknown run": (lambda f: recording(f / "a_raw.fif"), ["--runs", "99"], "no recording of run 99"),
    "unknown setting": (lambda f: recording(f / "a_raw.fif"), ["--set", "passes=3"], "unknown setting passes"),
    "malformed renaming": (lambda f: recording(f / "a_raw.fif"), ["--rename", "C3"], "write OLD=NEW"),
    "unknown type": (lambda f: recording(f / "a_raw.fif"), ["--types", "C3=brain"], "no type brain"),
    "subject pattern": (lambda f: recording(f / "a_raw.fif"), ["--subject-pattern", "(P[0-9]+)"], "does not match"),
    "unknown reference": (lambda f: recording(f / "a_raw.fif"), ["--reference", "A1"], "no reference channel A1"),
    "too short": (lambda f: recording(f / "a_raw.fif"), ["--window", "0", "0.5"], "65 samples"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3000])


def text(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("this is a letter, not a recording\n" * 20)


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_bad_input_is_one_line_and_status_2(kind, command, tmp_path, capsys):
    make, options, message = BAD_INPUTS[kind]
    make(tmp_path / "data")
    capsys.readouterr()
    window = [] if "--window" in options else ["--window", "0", "2"]
    extra = ["--protocol", "within-session", "--models", "AGTCNet"] if command == "evaluate" else []
    status = run(command, tmp_path / "data", "-o", tmp_path / "out", *window, *extra, "--set", "epochs=1", *options)
    error = capsys.readouterr().err
    assert status == 2, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in error
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "run.json"]
    assert not written, "nothing half-written"


def test_decoder_of_another_montage_is_refused(decoder, tmp_path, capsys):
    other = recording(tmp_path / "a_raw.fif", channels=["F3", "F4", "FC3", "FC4", "C3", "Cz", "C4", "Pz"])
    assert run("predict", decoder, other, "-o", tmp_path / "out") == 2
    assert "a_raw.fif: no channel CP3, CP4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("train", other, "--start", decoder, "-o", tmp_path / "tuned", *TRAINING) == 2
    assert f"was trained on {', '.join(CHANNELS)}" in capsys.readouterr().err
    assert run("predict", tmp_path, other) == 2
    assert "holds no trained decoder, it lacks decoder.json" in capsys.readouterr().err


def test_imagery_of_a_real_subject(shared_data, tmp_path, capsys):
    """Runs 4 and 8 train, run 12 tests: the honest protocol runs to the end and reports what it gets."""
    folder = shared_data("eegmmidb/S001")
    options = ["--classes", "left_hand,right_hand", "--test-session", "3", "--models", "CSP+LDA,TangentSpace"]
    assert run("evaluate", folder, "-o", tmp_path / "out", *options) == 0
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(results["n_test"]) == {15}
    assert set(results["n_train"] + results["n_validation"]) == {30}
    assert (results["chance_bound"] > 0.5).all()
    assert (tmp_path / "out" / "figures" / "desynchronization.png").exists()


def marker(data):
    """The last channel holds the class of each cue, as a marker does."""
    data[-1] = 0
    for index, cue in enumerate(3.0 + 4.0 * np.arange(12)):
        data[-1, round(cue * RATE) + 4 : round(cue * RATE) + 40] = 1 + index % 2


@pytest.mark.parametrize("name", ["Markers", "X9"])
def test_a_marker_that_is_typed_as_eeg_is_set_aside_and_named(name, tmp_path, capsys):
    path = recording(tmp_path / "a_raw.fif", channels=[*CHANNELS, name], change=marker)
    assert run("inspect", path, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["channels"] == 8
    assert any(name in problem and "set aside" in problem for problem in found["problems"])
    assert run("inspect", path, "--json", "--types", f"{name}=eeg", "--rename", "Pz=POz") == 0
    assert json.loads(capsys.readouterr().out)[0]["channels"] == 9


def test_inspect_tells_edges_triggers_and_people(tmp_path, capsys):
    for name in ("anna_1_raw.fif", "ben_1_raw.fif"):
        path = recording(tmp_path / name)
        raw = mne.io.read_raw(path, preload=True, verbose="ERROR")
        raw.annotations.append([10.0, 20.0], [0.0, 1.0], ["boundary", "BAD_muscle"])
        raw.save(path, overwrite=True, verbose="ERROR")
    assert run("inspect", tmp_path, "--json", "--subject-pattern", "(anna|ben)") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["subject"] for each in found] == ["anna", "ben"]
    assert found[0]["events"] == {"left_hand": 6, "right_hand": 6}
    assert {"1 BAD stretches", "1 edges"} <= set(found[0]["problems"])


def test_windows_of_another_rate_are_refused(decoder, tmp_path, capsys):
    other = recording(tmp_path / "b_raw.fif", rate=100.0)
    for options in ([], ["--every", "0.5"], ["--every", "0.5", "--check"]):
        assert run("predict", decoder, other, "-o", tmp_path / "out", *options) == 2
        assert "100 Hz where the decoder" in capsys.readouterr().err.replace("\n", " ")
    assert not list((tmp_path / "out").glob("*.tsv"))


def test_flat_stretches_abstain_and_say_so(decoder, tmp_path, capsys):
    def flatten(data):
        data[2, round(20 * RATE) : round(30 * RATE)] = 1e-5

    path = recording(tmp_path / "flat_raw.fif", seed=3, change=flatten)
    assert run("predict", decoder, path, "-o", tmp_path / "out", "--every", "0.5") == 0
    assert "abstained" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "out" / "flat_raw_predictions.tsv", sep="\t", keep_default_na=False)
    inside = (rows["onset"] > 20) & (rows["onset"] < 27)
    assert set(rows["abstained"][inside]) == {"C3 flat"}
    assert set(rows["trial_type"][inside]) == {"n/a"}
    assert set(rows["abstained"][rows["onset"] < 17]) == {"n/a"}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A session that was calibrated on the cues of a file, and its decoder of covariances."""
    folder = tmp_path_factory.mktemp("calibrated")
    file = recording(folder / "first_raw.fif")
    given = ["--file", file, "--speed", "inf", "--set", "cue=2", "-o", folder / "a", "--bids", folder / "bids"]
    assert run("calibrate", *given) == 0
    return folder / "a"


def test_calibrate_live_replay_audit_export(calibrated, tmp_path, capsys):
    assert (calibrated / "session_raw.fif").is_file()
    assert list((calibrated.parent / "bids").rglob("*_eeg.vhdr"))
    file = recording(tmp_path / "second_raw.fif", 1)
    options = ["--every", "0.125", "--dwell", "4", "--refractory", "1", "--lines", tmp_path / "out.jsonl"]
    assert run("live", calibrated / "decoder", "--file", file, "--speed", "inf", "-o", tmp_path / "s", *options) == 0
    assert "audit" in capsys.readouterr().out
    assert run("replay", tmp_path / "s") == 0
    assert "all are the same to the last bit" in capsys.readouterr().out
    assert run("audit", tmp_path / "s", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["replay"] == "same to the last bit"
    assert found["events"] == 12
    assert found["hits"] > found["wrong"]
    swapped = ["--event", "left_hand=right_hand", "--event", "right_hand=left_hand"]
    assert run("audit", tmp_path / "s", "--json", *swapped) == 0
    other = json.loads(capsys.readouterr().out)
    assert [other[key] for key in ("hits", "wrong", "missed")] == [found[key] for key in ("wrong", "hits", "missed")]
    assert other["bits_per_minute"] < found["bits_per_minute"]
    assert (tmp_path / "s/audit.html").is_file()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == found["decisions"]
    # windows of 1.5 s that lie in a cue of 2 s: a rhythm three times as strong as the noise leaves no doubt
    within = [(line, *divmod((line["sample"] + 1) / RATE - 3.0, 4.0)) for line in lines]
    within = [(line["decision"], int(cue) % 2) for line, cue, past in within if 1.5 <= past <= 2 and 0 <= cue < 12]
    assert len(within) == 12 * 5
    assert all(decision == ("left_hand", "right_hand")[cls] for decision, cls in within)
    more = ["--model", "CSP+LDA", "--also", calibrated, "--set", "cue=2", "--speed", "inf"]
    assert run("calibrate", "--file", file, "-o", tmp_path / "b", *more) == 0
    assert run("export", tmp_path / "b/decoder", "-o", tmp_path / "d.onnx") == 0
    assert "differ from the decoder's by" in " ".join(capsys.readouterr().out.split())
    start = ["--start", calibrated / "decoder", "--set", "cue=2", "--speed", "inf"]
    assert run("calibrate", "--file", file, "-o", tmp_path / "c", *start) == 0
    from nearfar.eeg.decoder import Decoder

    assert len(Decoder.load(tmp_path / "c/decoder").network.learnt) == 24


def test_live_refuses_what_it_cannot_do_in_one_line(calibrated, decoder, tmp_path, capsys):
    file = recording(tmp_path / "a_raw.fif")
    other = recording(tmp_path / "b_raw.fif", rate=100.0)
    for arguments, told in (
        (["live", decoder, "-o", tmp_path / "s"], "name one source"),
        (["live", decoder, "--file", file, "--board", "X", "-o", tmp_path / "s"], "name one source"),
        (["live", decoder, "--file", file, "--speed", "0", "-o", tmp_path / "s"], "above 0"),
        (["live", decoder, "--file", other, "-o", tmp_path / "s"], "100 Hz"),
        (["live", decoder, "--file", file, "--idle", "nothing", "-o", tmp_path / "s"], "no class nothing"),
        (["live", decoder, "--file", file, "--speed", "inf", "-o", calibrated], "holds a session already"),
        (["replay", tmp_path], "holds no session"),
        (["replay", calibrated], "without a decoder"),
        (["audit", tmp_path / "nowhere"], "holds no session"),
        (["calibrate", "--file", file, "--set", "trials=0", "-o", tmp_path / "c"], "trials must be 1 or more"),
    ):
        assert run(*arguments) == 2, arguments
        error = " ".join(capsys.readouterr().err.split())
        assert told in error, error
    assert not (tmp_path / "s" / "session.json").exists()


def test_causal_training_prints_the_difference(tmp_path, capsys):
    first, second = (recording(tmp_path / f"{name}_raw.fif", seed) for seed, name in enumerate("ab"))
    given = [first, "--test", second, "--causal", "--band", "8", "20", "--window", "0", "2", "--set", "network=CSP+LDA"]
    assert run("train", *given, "-o", tmp_path / "d") == 0
    out = capsys.readouterr().out
    assert "cross-validated" in out
    assert "threshold" in out
    assert "with filters of zero phase: test accuracy" in out
    assert run("predict", tmp_path / "d", second, "-o", tmp_path / "p", "--causal", "--every", "0.5", "--check") == 0
    assert "differs" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p/b_raw_predictions.tsv", sep="\t")
    assert len(table) > 50


@pytest.mark.slow
def test_a_real_subject_calibrated_and_decoded_live_as_offline(shared_data, tmp_path, capsys):
    data = shared_data("eegmmidb/S001")
    for name, more in (("S001R04", []), ("S001R08", ["--also", tmp_path / "S001R04"])):
        given = ["--file", data / f"{name}.edf", "--speed", "inf", "-o", tmp_path / name, *more]
        assert run("calibrate", *given) == 0
    decoder, file = tmp_path / "S001R08/decoder", data / "S001R12.edf"
    assert run("live", decoder, "--file", file, "--speed", "inf", "--every", "0.5", "-o", tmp_path / "s") == 0
    assert run("replay", tmp_path / "s") == 0
    train = ["--classes", "left_hand,right_hand", "--causal", "--window", "0.5", "4", "--set", "network=TangentSpace"]
    files = [data / "S001R04.edf", data / "S001R08.edf"]
    assert run("train", *files, *train, "-o", tmp_path / "offline") == 0
    assert run("predict", tmp_path / "offline", file, "--every", "0.5", "-o", tmp_path / "p", "--threshold", "0") == 0
    offline = pd.read_csv(tmp_path / "p/S001R12_predictions.tsv", sep="\t")
    log = [json.loads(line) for line in (tmp_path / "s/log.jsonl").read_text().splitlines()]
    live = [line["probabilities"] for line in log if "decision" in line]
    assert len(live) == len(offline) > 200
    for name in ("left_hand", "right_hand"):
        np.testing.assert_allclose([shares[name] for shares in live], offline[f"p_{name}"], atol=2e-6)
