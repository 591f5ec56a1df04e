"""The speaker-verification app: every command on recordings that the tests make, and every kind of bad input."""

import csv
import json
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from nearfar.apps.speaker_verification.cli import app
from nearfar.audio.speakers.scoring.rates import eer
from nearfar.audio.speakers.scoring.trials import read_scores
from nearfar.audio.synthesis import synthesize
from nearfar.core.cli.batch import BatchError
from nearfar.core.errors import UserError

RATE = 8000
LENIENT = ["--min-speech", "0.2", "--min-snr", "0"]
TINY = [
    "channels=16", "num_mels=24", "sample_rate=8000", "embedding_dim=8", "crop_seconds=0.5", "crops_per_utterance=4",
    "batch_size=24", "epochs=7", "learning_rate=5e-3", "scale=15", "margin=0.1", "margin_epochs=3", "validation=0.3",
    "speeds=[1.0]", "degrade_probability=0",
]  # fmt: skip


def run(*arguments):
    """The app in this process; a UserError comes through."""
    app([str(a) for a in arguments], standalone_mode=False)


def options(settings):
    return [word for setting in settings for word in ("--set", setting)]


def voice(speaker, number, seconds=1.0):
    """A buzz in syllables; the formant is the speaker's, pitch and noise vary."""
    rng = np.random.default_rng(int(100 * speaker) + number)
    pitch, t = rng.uniform(90, 200), np.arange(int(seconds * RATE)) / RATE
    formant = 400 + 60 * speaker
    buzz = sum(
        np.sin(2 * np.pi * k * pitch * t) * np.exp(-(((k * pitch - formant) / 500) ** 2))
        for k in range(1, int(3800 / pitch))
    )
    syllables = np.clip(np.sin(2 * np.pi * 3 * t + rng.uniform(0, 6)), 0, None)
    samples = 0.1 * buzz * syllables + rng.uniform(0.002, 0.02) * rng.standard_normal(len(t))
    return samples.clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for speaker in range(12):
        for number in range(6):
            path = root / f"s{speaker:02}" / f"{number}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, voice(speaker, number), RATE)
    return root


@pytest.fixture(scope="module")
def test_folder(tmp_path_factory):
    """Six speakers between those of the corpus, and a trial list of all their pairs."""
    root = tmp_path_factory.mktemp("test")
    names = []
    for speaker in range(6):
        for number in range(4):
            path = root / f"t{speaker}" / f"{number}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, voice(2 * speaker + 0.5, 50 + number), RATE)
            names.append(f"t{speaker}/{number}.wav")
    lines = [f"{int(a[:2] == b[:2])} {a} {b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    (root / "trials.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    run("train", corpus, "-o", folder, "--device", "cpu", *options(TINY))
    return folder


def test_train_writes_a_calibrated_model_and_a_page(model):
    assert {"config.json", "model.safetensors", "scoring.json", "calibration.json", "report.html"} <= {
        path.name for path in model.iterdir()
    }
    config = json.loads((model / "config.json").read_text())
    assert config["trained_on"]["speakers"] == 8
    assert "data:image/png" in (model / "report.html").read_text()


def test_score_evaluate_calibrate(model, test_folder, tmp_path, capsys):
    scores = tmp_path / "scores.txt"
    score = ["score", test_folder / "trials.txt", "--root", test_folder, "-o", scores, "-m", model]
    run(*score)
    lines = scores.read_text().splitlines()
    assert len(lines) == 24 * 23 // 2
    assert len(list((tmp_path / "scores.txt.cache").rglob("*.npz"))) == 24  # each recording once
    before = scores.read_text()
    run(*score)
    assert scores.read_text() == before
    run("evaluate", scores, "-o", tmp_path / "eval", "--root", test_folder, "--draws", "50", "--far", "0.1")
    figures = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert figures["eer_nist"] < 0.25  # a tiny network of seven epochs; guessing is 0.5
    assert figures["interval_resamples"] == "speakers"
    assert figures["eer_nist_low"] <= figures["eer_nist"] <= figures["eer_nist_high"]
    assert {"det.png", "scores.png", "det.csv", "errors.csv", "report.html"} <= {
        path.name for path in (tmp_path / "eval").iterdir()
    }
    assert "data:audio/wav" in (tmp_path / "eval" / "report.html").read_text()
    assert "EER (NIST" in capsys.readouterr().out
    run("calibrate", scores, "-m", model)
    assert "Cllr" in capsys.readouterr().out
    run(*score[:5], tmp_path / "llr.txt", *score[6:], "--llr")
    run(
        "evaluate", tmp_path / "llr.txt", "-o", tmp_path / "llr", "--draws", "0"
    )  # the record says that it holds ratios
    calibrated = json.loads((tmp_path / "llr" / "evaluation.json").read_text())
    assert calibrated["eer_nist"] == pytest.approx(figures["eer_nist"], abs=1e-12)
    assert calibrated["scored_by"].startswith("cosine after subtracting the training mean")
    assert calibrated["cllr"] < calibrated["min_cllr"] + 0.2
    with open(tmp_path / "llr.txt.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(lines)
    assert all(float(row["low"]) <= float(row["llr"]) <= float(row["high"]) for row in rows)
    with pytest.raises(UserError, match="holds log-likelihood ratios"):
        run("calibrate", tmp_path / "llr.txt", "-m", model)


def test_trials_of_the_training_are_marked(model, corpus, test_folder, tmp_path, capsys):
    lines = ["1 s00/0.wav s00/1.wav", "0 s00/0.wav s01/0.wav", "1 s02/0.wav s02/1.wav", "0 s01/0.wav s02/1.wav"]
    (tmp_path / "trials.txt").write_text("\n".join(lines))
    score = ["score", tmp_path / "trials.txt", "--root", corpus, "-o", tmp_path / "seen", "-m", model]
    with pytest.raises(UserError, match=r"trained on 5 of 5 recordings .* --allow-leakage"):
        run(*score, "--norm", "none", "--keep-cohort-speakers")
    run(*score, "--norm", "none", "--keep-cohort-speakers", "--allow-leakage")
    capsys.readouterr()
    run("evaluate", tmp_path / "seen", "-o", tmp_path / "eval", "--draws", "0")
    assert "4 of 4 seen in training" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "evaluation.json").read_text())["marked"] == "4 of 4 seen in training"
    run("verify", corpus / "s00/0.wav", test_folder / "t0/0.wav", "-m", model, "--json", "--no-gate")
    assert json.loads(capsys.readouterr().out)["marked"] == "1 of 2 seen in training"


def test_plda_and_quality_measures_are_calibrated_and_used(model, test_folder, tmp_path, capsys):
    """`calibrate` takes over how a list was scored; `score --llr` and `verify` follow it."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    score = ["score", test_folder / "trials.txt", "--root", test_folder, "--cache", tmp_path / "cache", "-m", own]
    pair = [test_folder / "t0/0.wav", test_folder / "t0/1.wav"]
    found = {}
    for name, how in {"cosine": [], "plda": ["--backend", "plda"], "quality": ["--quality", "lap"]}.items():
        run(*score, "-o", tmp_path / name, "--backend", "cosine", *how)
        run("calibrate", tmp_path / name, "-m", own)
        run(*score, "-o", tmp_path / f"{name}-llr", "--llr")
        found[name], llr = read_scores(tmp_path / name)[1], read_scores(tmp_path / f"{name}-llr")[1]
        capsys.readouterr()
        run("verify", *pair, "-m", own, "--json", *LENIENT)
        answer = json.loads(capsys.readouterr().out)
        assert answer["llr"] == pytest.approx(llr[0], abs=1e-4)
        assert answer["convention"].startswith("PLDA" if name == "plda" else "cosine")
    assert len(json.loads((own / "calibration.json").read_text())["weights"]) == 9
    np.testing.assert_array_equal(found["cosine"], found["quality"])
    assert np.abs(np.argsort(found["cosine"]) - np.argsort(found["plda"])).max() > 0
    with pytest.raises(UserError, match="needs a cohort"):
        run(*score, "-o", tmp_path / "x", "--quality", "wespeaker")
    for wrong in (["--backend", "svm"], ["--norm", "as"], ["--backend", "plda", "--norm", "as"], ["--quality", "x"]):
        with pytest.raises(UserError, match=r"must be|cohort has 0 rows|not for PLDA"):
            run(*score, "-o", tmp_path / "x", *wrong)
    lines = (tmp_path / "quality").read_text().splitlines()
    (tmp_path / "quality").write_text("\n".join(lines[::-1]))
    with pytest.raises(UserError, match="run `score` again"):
        run("calibrate", tmp_path / "quality", "-m", own)
    run(*score, "-o", tmp_path / "plain", "--no-mean")
    run("calibrate", tmp_path / "plain", "-m", own)
    assert "the model now scores by cosine\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="was scored with another model"):
        run("calibrate", tmp_path / "cosine", "-m", own)


def test_two_models_are_compared_on_the_same_trials(model, corpus, test_folder, tmp_path, capsys):
    """`epochs=0` is the untrained network; `evaluate --against` gives the difference with its paired interval."""
    run("train", corpus, "-o", tmp_path / "zero", "--device", "cpu", *options([*TINY, "epochs=0"]))
    for name, folder in {"trained": model, "untrained": tmp_path / "zero"}.items():
        run("score", test_folder / "trials.txt", "--root", test_folder, "-o", tmp_path / name, "-m", folder)
    lines = (tmp_path / "untrained").read_text().splitlines()
    (tmp_path / "untrained").write_text("\n".join(lines[::-1]))  # the order does not matter
    capsys.readouterr()
    compare = ["evaluate", tmp_path / "trained", "-o", tmp_path / "e", "--against", tmp_path / "untrained"]
    run(*compare, "--draws", "50", "--json")
    figures = json.loads(capsys.readouterr().out)
    difference, low, high = figures["minus"]["figures"]["eer_nist"]
    scores = {name: read_scores(tmp_path / name) for name in ("trained", "untrained")}
    both = [eer(values, trials.labels).value for trials, values in scores.values()]
    assert difference == pytest.approx(both[0] - both[1])
    assert low <= difference <= high < 0  # training helps
    run(*compare, "--draws", "20")
    assert "EER (NIST) minus that of untrained" in capsys.readouterr().out
    (tmp_path / "untrained").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="has 275 trials"):
        run(*compare)


def test_enrolment_maps_average_embeddings_or_scores(model, test_folder, tmp_path):
    (tmp_path / "map.txt").write_text("".join(f"t{s} t{s}/0.wav t{s}/1.wav t{s}/2.wav\n" for s in range(6)))
    (tmp_path / "trials.txt").write_text(
        "".join(f"t{a} t{b}/3.wav {'target' if a == b else 'nontarget'}\n" for a in range(6) for b in range(6))
    )
    (tmp_path / "single.txt").write_text(
        "".join(f"t{a}/{n}.wav t{b}/3.wav\n" for a in range(6) for b in range(6) for n in range(3))
    )
    arguments = ["--root", test_folder, "--cache", tmp_path / "cache", "-m", model]

    def scored(name, *how):
        run("score", tmp_path / name, "-o", tmp_path / "s.txt", *arguments, *how)
        return read_scores(tmp_path / "s.txt")[1]

    mapped = ["--enrollments", tmp_path / "map.txt"]
    of_scores = scored("trials.txt", *mapped, "--average", "scores")
    np.testing.assert_allclose(of_scores, scored("single.txt").reshape(36, 3).mean(1), atol=1e-9)
    of_embeddings = scored("trials.txt", *mapped)
    assert np.abs(of_embeddings - of_scores).max() > 1e-3
    same = np.eye(6, dtype=bool).ravel()
    for values in (of_embeddings, of_scores):
        assert values[same].mean() > values[~same].mean() + 0.1
    with pytest.raises(UserError, match="must be embeddings or scores"):
        scored("trials.txt", *mapped, "--average", "medians")
    (tmp_path / "map.txt").write_text("t0 t0/0.wav\n")
    with pytest.raises(UserError, match="lacks 5 models"):
        scored("trials.txt", *mapped)


def test_verify_answers_in_words_and_numbers(model, test_folder, capsys):
    pair = [test_folder / "t0/0.wav", test_folder / "t0/1.wav"]
    run("verify", *pair, "-m", model, "--json", *LENIENT)
    same = json.loads(capsys.readouterr().out)
    run("verify", pair[0], test_folder / "t5/1.wav", "-m", model, "--json", *LENIENT)
    other = json.loads(capsys.readouterr().out)
    assert same["llr"] > 0 > other["llr"]
    assert other["llr_low"] <= other["llr"] <= other["llr_high"]
    assert "Log-likelihood ratio" in same["sentence"]
    run("verify", *pair, "-m", model, *LENIENT)
    assert "Log-likelihood ratio" in capsys.readouterr().out


def test_poor_recordings_are_refused_not_scored(model, test_folder, tmp_path):
    good = test_folder / "t0/0.wav"
    poor = {
        "silent.wav": (np.zeros(RATE), "is silent"),
        "quiet.wav": (1e-5 * np.random.default_rng(0).standard_normal(3 * RATE), "0.0 s of speech"),
        "hum.wav": (0.5 * np.sin(np.arange(3 * RATE) / 4), "0.0 s of speech"),
        "clipped.wav": (np.clip(30 * voice(1, 1, 3.0), -1, 1), "clipped"),
        "stereo.wav": (np.stack([voice(1, 1), voice(2, 1)], 1), "2 channels"),
    }
    for name, (samples, message) in poor.items():
        soundfile.write(tmp_path / name, samples, RATE, subtype="FLOAT")
        with pytest.raises(UserError, match=message) as caught:
            run("verify", good, tmp_path / name, "-m", model, *LENIENT)
        assert name in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.wav"):
        run("verify", good, tmp_path / "gone.wav", "-m", model, *LENIENT)


def test_enroll_and_identify_with_none_of_these(model, test_folder, tmp_path, capsys):
    gallery = tmp_path / "gallery.npz"
    for speaker in (0, 2, 4):
        files = [test_folder / f"t{speaker}/{n}.wav" for n in range(3)]
        run("enroll", f"person {speaker}", *files, "-g", gallery, "-m", model, *LENIENT)
    with pytest.raises(UserError, match="is in the gallery already"):
        run("enroll", "person 0", test_folder / "t0/3.wav", "-g", gallery, "-m", model, *LENIENT)
    with pytest.raises(UserError, match="given twice"):
        run("enroll", "x", test_folder / "t0/3.wav", test_folder / "t0/3.wav", "-g", gallery, "-m", model, *LENIENT)
    run(
        "enroll",
        "person 0",
        *[test_folder / f"t0/{n}.wav" for n in range(3)],
        "-g",
        gallery,
        "-m",
        model,
        "--replace",
        *LENIENT,
    )
    capsys.readouterr()
    probes = [test_folder / "t0/3.wav", test_folder / "t2/3.wav", test_folder / "t4/3.wav"]
    run("identify", *probes, "-g", gallery, "-m", model, "--far", "0.3", "--json", *LENIENT)
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["nearest"] for row in rows] == ["person 0", "person 2", "person 4"]
    strict = [row["score"] for row in rows]
    run("identify", *probes, "-g", gallery, "-m", model, "--far", "0.05", "--json", *LENIENT)
    again = json.loads(capsys.readouterr().out)["results"]
    assert all(row["threshold"] > rows[0]["threshold"] for row in again)
    for row, score in zip(again, strict):
        assert row["score"] == pytest.approx(score)
        assert (row["speaker"] == "none of these") == (row["score"] <= row["threshold"])
    with pytest.raises(UserError, match="cannot show"):
        run("identify", *probes, "-g", gallery, "-m", model, "--far", "0.0000001", *LENIENT)


def test_a_bad_recording_among_many_loses_only_its_trials(model, test_folder, tmp_path):
    folder = tmp_path / "data"
    for path in test_folder.rglob("*.wav"):
        target = folder / path.relative_to(test_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "t3/2.wav").write_bytes(b"RIFF broken")
    scores = tmp_path / "s.txt"
    with pytest.raises(BatchError, match=r"t3/2\.wav") as caught:
        run("score", test_folder / "trials.txt", "--root", folder, "-o", scores, "-m", model)
    assert "23 trials have no score" in str(caught.value)
    assert len(scores.read_text().splitlines()) == 276 - 23
    assert len((tmp_path / "s.txt.failed").read_text().splitlines()) == 23
    run("evaluate", scores, "--trials", test_folder / "trials.txt", "-o", tmp_path / "e", "--draws", "0")
    counted = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert counted["missing"] == 23
    run("evaluate", scores, "-o", tmp_path / "e", "--draws", "0")
    alone = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert alone["missing"] == 0
    assert counted["eer_nist"] > alone["eer_nist"]  # a trial without a score is an error


def test_scores_without_a_record_few_trials_and_leaks_do_not_calibrate(model, corpus, test_folder, tmp_path, capsys):
    names = [f"t{s}/{n}.wav" for s in range(6) for n in range(4)]
    pairs = [(a, b, a[:2] == b[:2]) for i, a in enumerate(names) for b in names[i + 1 :]]
    own = tmp_path / "model"
    shutil.copytree(model, own)
    before = (own / "calibration.json").read_bytes()

    def written(name, chosen):
        (tmp_path / name).write_text("".join(f"{a} {b} {'target' if y else 'nontarget'}\n" for a, b, y in chosen))
        return tmp_path / name

    rng = np.random.default_rng(0)
    (tmp_path / "foreign").write_text(
        "".join(f"{a} {b} {3 * y + rng.standard_normal()} {'target' if y else 'nontarget'}\n" for a, b, y in pairs)
    )
    with pytest.raises(UserError, match="has no record of how it was made"):
        run("calibrate", tmp_path / "foreign", "-m", own)
    score = ["--root", test_folder, "--cache", tmp_path / "cache", "-m", own]
    few = [p for p in pairs if p[2]][:3] + [p for p in pairs if not p[2]][:3]
    run("score", written("few.txt", few), "-o", tmp_path / "few", *score)
    with pytest.raises(UserError, match="3 targets and 3 non-targets are too few"):
        run("calibrate", tmp_path / "few", "-m", own)
    copies = [p for p in pairs if p[0] == names[0]] * 30  # four people, many trials, one recording on their left
    run("score", written("two.txt", [p for p in copies if p[1][:2] in ("t0", "t1")]), "-o", tmp_path / "two", *score)
    with pytest.raises(UserError, match="2 speakers are too few"):
        run("calibrate", tmp_path / "two", "-m", own)
    (tmp_path / "twin").mkdir()
    shutil.copytree(test_folder, tmp_path / "twin/data")
    shutil.copy(test_folder / "t0/0.wav", tmp_path / "twin/data/t0/other.wav")
    leaky = written("leaky.txt", [*pairs, (names[0], names[0], True), (names[0], "t0/other.wav", True)])
    score[1] = tmp_path / "twin/data"
    with pytest.raises(UserError, match=r"2 trials test a recording against itself.*t0/0\.wav = t0/other\.wav"):
        run("score", leaky, "-o", tmp_path / "leaky", *score)
    run("score", leaky, "-o", tmp_path / "leaky", *score, "--allow-leakage")
    with pytest.raises(UserError, match="against itself"):
        run("calibrate", tmp_path / "leaky", "-m", own)
    assert (own / "calibration.json").read_bytes() == before
    run("calibrate", tmp_path / "leaky", "-m", own, "--allow-leakage")
    assert (own / "calibration.json").read_bytes() != before
    with pytest.raises(UserError, match="holds the same as"):
        run("verify", test_folder / "t0/0.wav", tmp_path / "twin/data/t0/other.wav", "-m", own, *LENIENT)


def test_what_one_command_writes_the_others_read(model, test_folder, tmp_path, capsys):
    """Names with blanks and accents, a BOM, CRLF, tabs, Latin-1: score, evaluate and calibrate agree on all of them."""
    root = tmp_path / "wav"
    for s in range(6):
        for n in range(4):
            (root / f"Böhm, {s}").mkdir(parents=True, exist_ok=True)
            shutil.copy(test_folder / f"t{s}/{n}.wav", root / f"Böhm, {s}" / f"take {n}.wav")
    names = [f"Böhm, {s}/take {n}.wav" for s in range(6) for n in range(4)]
    pairs = [(a, b, int(a[:7] == b[:7])) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = ["label,sample1,sample2", *(f'{y},"{a}","{b}"' for a, b, y in pairs)]
    tabs = [f"{a}\t{b}\t{'same' if y else 'different'}" for a, b, y in pairs]
    forms = {
        "bom.csv": ("\ufeff" + "\r\n".join(rows)).encode(),
        "utf16.txt": "\r\n".join(tabs).encode("utf-16"),
        "latin.txt": "\n".join(tabs).encode("latin-1"),
        "nist.tsv": "\n".join(["modelid\tsegmentid\ttargettype", *tabs]).encode(),
        "nfd.txt": unicodedata.normalize("NFD", "\n".join(tabs)).encode(),
    }
    wanted = None
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        scores = tmp_path / f"{name}.scores"
        arguments = ["--root", root, "--cache", tmp_path / "cache", "-m", model]
        if name == "latin.txt":
            with pytest.warns(UserWarning, match="read as Windows-1252"):
                run("score", tmp_path / name, "-o", scores, *arguments)
        else:
            run("score", tmp_path / name, "-o", scores, *arguments)
        values = read_scores(scores)[1]
        wanted = values if wanted is None else wanted
        np.testing.assert_array_equal(values, wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run("evaluate", scores, "--trials", tmp_path / name, "-o", tmp_path / "e", "--draws", "20")
    assert json.loads((tmp_path / "e/evaluation.json").read_text())["missing"] == 0
    own = tmp_path / "model"
    shutil.copytree(model, own)
    run("calibrate", tmp_path / "bom.csv.scores", "-m", own)
    assert "intervals over speakers" in capsys.readouterr().out


def test_kaldi_segments_and_nist_sides_are_scored(model, test_folder, tmp_path):
    both = np.stack([voice(0.5, 50, 2.0), voice(8.5, 50, 2.0)], 1)
    soundfile.write(tmp_path / "CALL.SPH", both, RATE, format="NIST", subtype="PCM_16")
    soundfile.write(tmp_path / "long.wav", np.concatenate([voice(0.5, 51), voice(8.5, 51)]), RATE)
    (tmp_path / "wav.scp").write_bytes(b"\xef\xbb\xbfrec1 long.wav\r\nrec2\tCALL.SPH\r\n")
    (tmp_path / "segments").write_text("u1 rec1 0.0 1.0\nu2 rec1 1.0 -1\nu3 rec2 0 2 A\nu4 rec2 0 2 B\n")
    (tmp_path / "utt2spk").write_text("u1 x\nu2 y\nu3 x\nu4 y\n")
    (tmp_path / "t.txt").write_text("u1 u3 target\nu1 u4 nontarget\nu2 u4 target\nu2 u3 nontarget\n")
    run("score", tmp_path / "t.txt", "--root", tmp_path, "-o", tmp_path / "s", "-m", model)
    trials, scores = read_scores(tmp_path / "s")
    assert scores[trials.labels == 1].min() > scores[trials.labels == 0].max()
    nist = tmp_path / "nist"
    nist.mkdir()
    shutil.copy(tmp_path / "CALL.SPH", nist / "call.sph")
    for part, s in (("m0", 0.5), ("m8", 8.5)):
        soundfile.write(nist / f"{part}.wav", voice(s, 51), RATE)
    (nist / "t.tsv").write_text("modelid\tsegmentid\tside\n" + "".join(
        f"{m}\tcall\t{side}\n" for m in ("m0", "m8") for side in "ab"))  # fmt: skip
    run("score", nist / "t.tsv", "--root", nist, "-o", nist / "s", "-m", model)
    assert (nist / "s").read_text().splitlines()[0] == "modelid\tsegmentid\tside\tLLR"
    trials, scores = read_scores(nist / "s")
    assert trials.test.tolist() == ["call:a", "call:b"] * 2
    assert scores[0] > scores[1]
    assert scores[3] > scores[2]


def test_stress_says_what_each_condition_costs(model, test_folder, tmp_path, capsys):
    run(
        "stress", test_folder / "trials.txt", "--root", test_folder, "-o", tmp_path / "s", "-m", model, "--draws", "20",
        *(word for name in ("zeros", "noise", "gain", "cut") for word in ("--condition", name)),
    )  # fmt: skip
    assert "100 ms of zeros at the end" in capsys.readouterr().out
    found = json.loads((tmp_path / "s/stress.json").read_text())["conditions"]
    by_name = {row["condition"]: row for row in found}
    assert by_name["zeros"]["eer"] == by_name["clean"]["eer"]  # digital silence is dropped
    assert abs(by_name["zeros"]["shift_same"]) < 0.05
    assert by_name["noise"]["shift_same"] != 0 != by_name["cut"]["shift_other"]
    assert (tmp_path / "s/report.html").is_file()
    with pytest.raises(UserError, match="must be one of zeros"):
        run("stress", test_folder / "trials.txt", "--root", test_folder, "-o", tmp_path / "s", "-m", model,
            "--condition", "fire")  # fmt: skip


def test_dropped_silence_and_chosen_channels_are_said(model, test_folder, tmp_path, capsys):
    first, second = test_folder / "t0/0.wav", tmp_path / "gated.wav"
    samples = soundfile.read(test_folder / "t0/1.wav")[0]
    soundfile.write(second, np.r_[np.zeros(4000), samples, np.zeros(4000)], RATE)
    run("verify", first, test_folder / "t0/1.wav", "-m", model, "--json", *LENIENT)
    plain = json.loads(capsys.readouterr().out)
    run("verify", first, second, "-m", model, "--json", *LENIENT)
    output = capsys.readouterr()
    gated = json.loads(output.out)
    assert "digital silence was dropped from 1 of 2" in " ".join(output.err.split())
    assert gated["qualities"][1]["silence"] == pytest.approx(1.0, abs=0.01)
    assert gated["score"] == pytest.approx(plain["score"], abs=1e-4)
    soundfile.write(tmp_path / "stereo.wav", np.stack([np.roll(samples, 999), samples], 1), RATE)
    run("verify", first, tmp_path / "stereo.wav", "--channel", "2", "-m", model, "--json", *LENIENT)
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(plain["score"], abs=1e-4)


def test_bad_lists_are_refused(model, test_folder, tmp_path):
    def listed(text):
        (tmp_path / "t.txt").write_text(text)
        run("score", tmp_path / "t.txt", "--root", test_folder, "-o", tmp_path / "s.txt", "-m", model)

    with pytest.raises(UserError, match="empty"):
        listed("")
    with pytest.raises(UserError, match=r"1 of 2 recordings are not below .*nobody\.wav"):
        listed("1 t0/0.wav nobody.wav\n")
    (tmp_path / "one.txt").write_text("a b 0.5 target\nc d 0.3 target\n")
    with pytest.raises(UserError, match="needs targets and non-targets"):
        run("evaluate", tmp_path / "one.txt", "-o", tmp_path / "e")
    (tmp_path / "t.txt").write_text("1 t0/0.wav t0/1.wav\n")
    with pytest.raises(UserError, match="is a folder"):
        run("score", tmp_path / "t.txt", "--root", test_folder, "-o", tmp_path, "-m", model)
    (tmp_path / "none.txt").write_text("a b 0.5\n")
    with pytest.raises(UserError, match="has no labels"):
        run("evaluate", tmp_path / "none.txt", "-o", tmp_path / "e")
    with pytest.raises(UserError, match="no speaker model"):
        run("verify", test_folder / "t0/0.wav", test_folder / "t0/1.wav", "-m", tmp_path)


def test_embed_writes_names_and_qualities(model, test_folder, tmp_path):
    run("embed", test_folder, "-o", tmp_path / "e.npz", "-m", model)
    with np.load(tmp_path / "e.npz", allow_pickle=False) as arrays:
        assert arrays["embeddings"].shape == (24, 8)
        assert arrays["names"][0] == "t0/0.wav"
        assert set(arrays["speakers"].tolist()) == {f"t{n}" for n in range(6)}
        assert (arrays["speech"] > 0).all()


@pytest.mark.parametrize("head", ["ltdnn-d3net", "lap"])
def test_a_backbone_folder_drives_the_whole_path(tmp_path, head):
    for speaker in range(4):
        for number in range(3):
            path = tmp_path / "data" / f"s{speaker}" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, voice(3 * speaker, number), RATE)
    backbone = tmp_path / "wavlm"
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    WavLMModel(config).save_pretrained(backbone)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(backbone)
    settings = ["epochs=1", "batch_size=6", "crop_seconds=0.3", "embedding_dim=8", "speeds=[1.0]", "validation=0.5"]
    arguments = ["train", tmp_path / "data", "--backbone", backbone, "--device", "cpu"]
    arguments += options([f"head={head}", *settings])
    run(*arguments, "--recipe", "frozen", "-o", tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config["frontend"]["normalize"] is True
    pair = [tmp_path / "data/s0/0.wav", tmp_path / "data/s1/0.wav"]
    run("verify", *pair, "-m", tmp_path / "one", *LENIENT)
    run(*arguments, "--recipe", "joint", "-o", tmp_path / "two", "--start", tmp_path / "one", "--set", "tune=1")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    changed = {name for name in first if not first[name].equal(second[name])}
    assert any(name.startswith("frontend.backbone.encoder.layers.1.") for name in changed)
    assert not any(name.startswith("frontend.backbone.encoder.layers.0.") for name in changed)


@pytest.mark.slow  # seconds of training: which way it comes out depends on the processor
def test_training_helps_on_people_it_has_not_heard(shared_data, tmp_path, capsys):
    """Real recordings, other people: fewer errors than the same pipeline with the untrained network."""
    data = shared_data("fsdd").parent
    script = Path(__file__).parents[2] / "benchmarks" / "speakers.py"
    subprocess.run([sys.executable, script, data, tmp_path, "--most", "12"], check=True)
    persons = {path.name for path in (tmp_path / "test").iterdir()}
    assert persons == {"fsdd-jackson", "fsdd-nicolas", "fsdd-yweweler", "voices-fr-f", "voices-ru-f"}
    assert not persons & {path.name for path in (tmp_path / "train").iterdir()}
    short = ["channels=32", "crop_seconds=1.0", "epochs=5"]
    for name, settings in {"trained": short, "untrained": [*short, "epochs=0"]}.items():
        train = ["train", tmp_path / "train", "-o", tmp_path / name / "model", "--recipe", "small"]
        run(*train, "--device", "cpu", *options(settings))
        score = ["score", tmp_path / "trials.txt", "--root", tmp_path / "test"]
        run(*score, "-o", tmp_path / name / "scores", "-m", tmp_path / name / "model")
    capsys.readouterr()
    against = ["--against", tmp_path / "untrained/scores"]
    run("evaluate", tmp_path / "trained/scores", "-o", tmp_path / "e", "--draws", "200", "--json", *against)
    figures = json.loads(capsys.readouterr().out)
    difference, low, high = figures["minus"]["figures"]["eer_nist"]
    assert low < difference < high
    assert difference < -0.05


ENCODER = """import numpy as np
def embed(samples):
    bands = np.abs(np.fft.rfft(np.resize(samples, 8000)))[:4000].reshape(100, 40).mean(1)
    return np.log(bands[:40] + 1e-3) - np.log(bands[:40] + 1e-3).mean()
embed.sample_rate = 8000
"""


def test_any_encoder_is_scored_calibrated_and_rejects(test_folder, tmp_path, capsys, monkeypatch):
    """From a function and from the embeddings that it gave: the same scores, ratios and answers."""
    (tmp_path / "encoder_of_this_test.py").write_text(ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = ["--encoder", "encoder_of_this_test:embed"]
    files = sorted(test_folder.rglob("*.wav"))
    run("embed", test_folder, "-o", tmp_path / "table.npz", "--layout", "folder", *encoder)
    table = ["--embeddings", tmp_path / "table.npz"]
    trials, found = test_folder / "trials.txt", {}
    for name, how in {"encoder": [*encoder, "--root", test_folder], "table": table}.items():
        scores, own = tmp_path / f"{name}.txt", tmp_path / f"model-{name}"
        run("score", trials, "-o", scores, *how)
        run("calibrate", scores, *how[:2], "-o", own)
        run("score", trials, "-o", tmp_path / f"{name}-llr.txt", *how, "-m", own, "--llr")
        found[name] = read_scores(tmp_path / f"{name}-llr.txt")[1]
        with pytest.raises(UserError, match="--output"):
            run("calibrate", scores, *how[:2])
        places = [
            test_folder / "t0/0.wav",
            test_folder / "t0/1.wav",
            test_folder / "t5/1.wav",
            test_folder / "t3/1.wav",
        ]
        a, b, c, d = places if name == "encoder" else [place.relative_to(test_folder) for place in places]
        capsys.readouterr()
        run("verify", a, b, *how[:2], "-m", own, "--json", "--no-gate")
        answer = json.loads(capsys.readouterr().out)
        assert answer["llr_low"] <= answer["llr"] <= answer["llr_high"]
        gallery = tmp_path / f"{name}.gallery"
        run("enroll", "zero", a, b, "-g", gallery, *how[:2], *LENIENT)
        run("enroll", "five", c, "-g", gallery, *how[:2], *LENIENT)
        capsys.readouterr()
        run("identify", d, "-g", gallery, *how[:2], "-m", own, "--far", "0.3", "--json", *LENIENT)
        assert json.loads(capsys.readouterr().out)["gallery"] == 2
        with pytest.raises(UserError, match=r"--encoder"):
            run("verify", a, b, "-m", own)
    assert eer(found["encoder"], read_scores(tmp_path / "encoder-llr.txt")[0].labels).value < 0.4
    np.testing.assert_allclose(found["encoder"], found["table"], atol=1e-4)
    np.savez(tmp_path / "other.npz", names=[str(f.relative_to(test_folder)) for f in files], embeddings=np.eye(24))
    with pytest.raises(UserError, match="another encoder"):
        run(
            "score",
            trials,
            "-o",
            tmp_path / "x",
            "--embeddings",
            tmp_path / "other.npz",
            "-m",
            tmp_path / "model-table",
        )
    capsys.readouterr()
    with pytest.raises(UserError, match="--quality needs"):
        run("score", trials, "-o", tmp_path / "x", "--embeddings", tmp_path / "other.npz", "--quality", "lap")
    assert "does not say which encoder made it" in capsys.readouterr().err


@pytest.mark.parametrize("voices", ["people", "synthetic"])
def test_resemblyzer_is_an_encoder(voices, tmp_path, monkeypatch, request):
    """Where its package (group `encoders`) is there: on digits of three people, and on eSpeak's voices."""
    pytest.importorskip("resemblyzer", exc_type=ImportError)
    root = Path(__file__).parents[2]

    def spoken(speaker, number):
        if voices == "synthetic":
            text = f"{number} ships sailed over the northern sea at {number + 3} in the morning"
            return synthesize(text, {"george": "m1", "jackson": "f2", "nicolas": "Andy"}[speaker])
        digits = request.getfixturevalue("shared_data")("fsdd") / "recordings"
        parts = [soundfile.read(digits / f"{digit}_{speaker}_{number}.wav", dtype="float32")[0] for digit in range(8)]
        return np.concatenate(parts), RATE

    for speaker in ("george", "jackson", "nicolas"):
        (tmp_path / speaker).mkdir()
        for number in range(6):
            soundfile.write(tmp_path / speaker / f"{number}.wav", *spoken(speaker, number))
    names = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.wav"))]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    (tmp_path / "trials.txt").write_text("".join(f"{int(a[:4] == b[:4])} {a} {b}\n" for a, b in pairs))
    monkeypatch.syspath_prepend(root)
    run(
        *("score", tmp_path / "trials.txt", "--root", tmp_path, "-o", tmp_path / "s.txt"),
        *("--encoder", "benchmarks.resemblyzer_encoder:embed"),
    )
    trials, scores = read_scores(tmp_path / "s.txt")
    assert eer(scores, trials.labels).value < 0.1


def test_channels_of_a_training_corpus_are_chosen_never_averaged_in_silence(tmp_path):
    """Two speakers on two channels: refused by default; `--channel` and `--mix-channels` say what is meant."""
    for speaker in range(6):
        for number in range(2):
            path = tmp_path / "corpus" / f"s{speaker}" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            both = np.stack([voice(speaker, number), voice(speaker + 20, number)], 1)
            soundfile.write(path, both, RATE)
    train = ["train", tmp_path / "corpus", "--device", "cpu", *options([*TINY, "epochs=0"])]
    with pytest.raises(UserError, match=r"holds no|no usable|too few|2 channels"):
        run(*train, "-o", tmp_path / "none")
    means = {}
    for name, how in {"first": ["--channel", 1], "second": ["--channel", 2], "mix": ["--mix-channels"]}.items():
        run(*train, "-o", tmp_path / name, *how)
        means[name] = np.load(tmp_path / name / "scoring.npz")["mean"]
    assert len({tuple(mean.tolist()) for mean in means.values()}) == 3


def test_fusion_is_better_than_its_parts_and_knows_its_systems(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("dev", "eval"):
        labels = rng.integers(0, 2, 2000)
        for system in ("a", "b"):
            values = 1.5 * labels + rng.standard_normal(2000)
            words = np.where(labels, "target", "nontarget")
            lines = (f"e{n} t{n} {value:.5f} {word}" for n, (value, word) in enumerate(zip(values, words)))
            (tmp_path / f"{part}-{system}").write_text("\n".join(lines))
            (tmp_path / f"{part}-{system}.json").write_text(json.dumps({"model": system}))
    a, b = tmp_path / "eval-a", tmp_path / "eval-b"
    run("fuse", tmp_path / "dev-a", tmp_path / "dev-b", "-o", tmp_path / "fusion.json", "--json")
    assert len(json.loads(capsys.readouterr().out)["systems"]) == 3
    run("fuse", a, b, "--fusion", tmp_path / "fusion.json", "-o", tmp_path / "fused")
    rates = [eer(values, trials.labels).value for trials, values in map(read_scores, (a, b, tmp_path / "fused"))]
    assert rates[2] < min(rates[:2]) - 0.03
    for wrong in ([b, a], [a, b, b]):
        with pytest.raises(UserError, match="was made for 2 other systems"):
            run("fuse", *wrong, "--fusion", tmp_path / "fusion.json", "-o", tmp_path / "x")
    (tmp_path / "short").write_text("e0 t0 1.0 target\n")
    with pytest.raises(UserError, match="has 1 trials"):
        run("fuse", a, tmp_path / "short", "-o", tmp_path / "x")


def test_diarize_names_turns_and_gives_the_error_rate(model, tmp_path, capsys):
    """Two voices in turn, named from a gallery; the reference is what was composed."""
    turns = [(1.0, 7.0, 0.5), (8.0, 14.0, 10.5), (15.0, 21.0, 0.5), (22.0, 28.0, 10.5)]
    sound = 1e-3 * np.random.default_rng(0).standard_normal(29 * RATE)
    for number, (start, end, speaker) in enumerate(turns):
        part = voice(speaker, 70 + number, end - start)
        sound[int(start * RATE) : int(start * RATE) + len(part)] += part
    soundfile.write(tmp_path / "call 1.wav", sound, RATE)
    for name, speaker in (("low voice", 0.5), ("high", 10.5)):
        soundfile.write(tmp_path / f"{name}.wav", voice(speaker, 90, 4.0), RATE)
        run("enroll", name, tmp_path / f"{name}.wav", "-g", tmp_path / "gallery.npz", "-m", model, *LENIENT)
    (tmp_path / "true.rttm").write_text(
        "".join(f"SPEAKER call_1 1 {a} {b - a} <NA> <NA> v{v} <NA> <NA>\n" for a, b, v in turns)
    )
    capsys.readouterr()
    run(
        *("diarize", tmp_path / "call 1.wav", "-o", tmp_path / "out.rttm", "-m", model, "--speakers", 2, "--json"),
        *("-g", tmp_path / "gallery.npz", "--far", "0.4", "--reference", tmp_path / "true.rttm", "--memory", "8G"),
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"]["missed_detection"] < 0.2
    assert answer["error"]["der"] < 0.35
    lines = (tmp_path / "out.rttm").read_text().splitlines()
    assert all(line.startswith("SPEAKER call_1 1 ") for line in lines)
    assert len(lines) == answer["turns"]
    renamed = tmp_path / "renamed.rttm"
    renamed.write_text((tmp_path / "true.rttm").read_text().replace("call_1", "another"))
    run("diarize", tmp_path / "call 1.wav", "-o", tmp_path / "out.rttm", "-m", model, "--reference", renamed)
    assert "its one recording is another, taken for call_1" in capsys.readouterr().err
    renamed.write_text(renamed.read_text() + "SPEAKER third 1 0 1 <NA> <NA> v <NA> <NA>\n")
    with pytest.raises(UserError, match="has 2 recordings, none of which is call_1"):
        run("diarize", tmp_path / "call 1.wav", "-o", tmp_path / "out.rttm", "-m", model, "--reference", renamed)
    with pytest.raises(UserError, match="are too few"):
        run("diarize", tmp_path / "call 1.wav", "-o", tmp_path / "x.rttm", "-m", model, "--memory", "10M")
    with pytest.raises(UserError, match="is a folder"):
        run("diarize", tmp_path / "call 1.wav", "-o", tmp_path, "-m", model)
