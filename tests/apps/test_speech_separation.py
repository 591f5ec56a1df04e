"""The speech-separation app on recordings that the tests make: every command, and every kind of bad input."""

import csv
import io
import json
import resource
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import av
import numpy as np
import pytest
import soundfile
import torch

from nearfar.audio.separation.mossformer import MossFormer
from nearfar.core.cli import root as cli
from nearfar.core.memory import resident_memory

pytestmark = pytest.mark.skipif(
    "speech-separation" not in entry_points(group="nearfar.apps").names, reason="the app is not installed"
)
RATE = 8000


def sound(pitch, seconds, seed=0, rate=RATE):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    envelope = np.interp(t, np.arange(0, seconds + 1, 0.2), rng.uniform(0, 1, len(np.arange(0, seconds + 1, 0.2))))
    return (0.2 * envelope * np.sign(np.sin(2 * np.pi * pitch * t))).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    MossFormer(num_filters=16, dim=12, depth=1, group_size=32, query_key_dim=8).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "talk.wav"
    soundfile.write(path, sound(110, 6) + sound(190, 6, 1), RATE)
    return path


def run(*arguments):
    return cli.run(["speech-separation", *map(str, arguments)])


def error(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_separate_writes_voices_a_page_and_what_was_found(recording, model, tmp_path, capsys):
    assert run("separate", recording, "-o", tmp_path / "out", "--model", model, "--speakers", 2, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    folder = tmp_path / "out/talk"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["index.html", "separation.json", "spectrograms.png", "voice1.wav", "voice2.wav"]
    for k in (1, 2):
        info = soundfile.info(folder / f"voice{k}.wav")
        assert (info.samplerate, info.frames) == (RATE, 6 * RATE)
    assert shown[0]["speakers"] == 2
    assert shown[0]["real_time_factor"] > 0
    page = (folder / "index.html").read_text()
    assert page.count("<audio") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    before = (folder / "voice1.wav").stat().st_mtime_ns
    assert run("separate", recording, "-o", tmp_path / "out", "--model", model, "--speakers", 2) == 0
    assert (folder / "voice1.wav").stat().st_mtime_ns == before  # done is done


def test_consistency_and_levels(recording, model, tmp_path, capsys):
    assert run("separate", recording, "-o", tmp_path / "c", "--model", model, "--speakers", 2, "--consistency") == 0
    voices = [soundfile.read(tmp_path / f"c/talk/voice{k}.wav")[0] for k in (1, 2)]
    np.testing.assert_allclose(sum(voices), soundfile.read(recording)[0], atol=1e-4)
    assert run("separate", recording, "-o", tmp_path / "p", "--model", model, "--speakers", 2, "--level", "peak") == 0
    assert np.abs(soundfile.read(tmp_path / "p/talk/voice1.wav")[0]).max() == pytest.approx(0.9, abs=1e-3)
    assert run("separate", recording, "-o", tmp_path / "r", "--model", model, "--speakers", 2, "--level", "rms") == 0
    voice, mix = soundfile.read(tmp_path / "r/talk/voice1.wav")[0], soundfile.read(recording)[0]
    assert np.std(voice) == pytest.approx(np.std(mix), rel=0.02)


@pytest.mark.parametrize(("rate", "channels", "ending"), [(44100, 2, "flac"), (16000, 1, "ogg"), (8000, 3, "wav")])
def test_any_rate_and_channel_count(model, tmp_path, capsys, rate, channels, ending):
    mix = sound(110, 3, 0, rate) + sound(190, 3, 1, rate)
    soundfile.write(tmp_path / f"x.{ending}", np.stack([mix] * channels, axis=1), rate)
    done = run("separate", tmp_path / f"x.{ending}", "-o", tmp_path / "o", "--model", model, "--format", "flac")
    assert done == 0
    info = soundfile.info(tmp_path / "o/x/voice1.flac")
    assert (info.samplerate, info.channels) == (rate, 1)
    assert abs(info.frames - 3 * rate) <= 1
    assert (f"is at {rate} Hz, the model at {RATE}" in error(capsys)) is (rate > RATE)


def test_a_folder_goes_on_past_bad_files_and_names_them(model, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "good.wav", sound(110, 2), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, "FLOAT")
    soundfile.write(folder / "cut.wav", sound(110, 2), RATE)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:9000])
    (folder / "text.flac").write_text("no sound")
    assert run("separate", folder, "-o", tmp_path / "out", "--model", model) == 1
    text = error(capsys)
    assert "4 of 5 failed" in text
    for words in ("silent.wav: silent", "nan.wav: holds a value", "cut.wav: truncated", "text.flac: "):
        assert words in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name[0] != ".") == ["failures.json", "good"]


def test_clipping_and_very_short_input_are_handled(model, tmp_path, capsys):
    soundfile.write(tmp_path / "loud.wav", np.clip(20 * sound(110, 2), -1, 1), RATE)
    soundfile.write(tmp_path / "short.wav", sound(110, 1)[100:900], RATE)
    soundfile.write(tmp_path / "few.wav", sound(110, 1)[:7] + 0.1, RATE)
    files = [tmp_path / f"{name}.wav" for name in ("loud", "short", "few")]
    assert run("separate", *files, "-o", tmp_path / "o", "--model", model) == 1
    said = error(capsys)
    assert "clipped" in said
    assert "7 samples (0.000875 s) are too few to separate" in said
    assert soundfile.info(tmp_path / "o/short/voice1.wav").frames == 800
    assert not (tmp_path / "o/few").exists()


def test_channels_are_chosen_and_a_talker_a_side_is_offered(model, tmp_path, capsys):
    left, right = sound(110, 3), sound(190, 3, 1)
    soundfile.write(tmp_path / "phone.wav", np.stack([left, right + 0.1], 1), RATE, "FLOAT")
    separate = ["separate", tmp_path / "phone.wav", "--model", model, "--json"]
    assert run(*separate, "-o", tmp_path / "a") == 2
    assert "with a talker a side" in (said := error(capsys))
    assert "--channel each" in said
    assert run(*separate, "-o", tmp_path / "a", "--channel", "each") == 0
    for number, voice in enumerate((left, right), 1):
        written = soundfile.read(tmp_path / f"a/phone/voice{number}.wav", dtype="float32")[0]
        np.testing.assert_allclose(written, voice - voice.mean(), atol=1e-6)
    soundfile.write(tmp_path / "right.wav", right, RATE, "FLOAT")
    assert run(*separate, "-o", tmp_path / "b", "--channel", "2") == 0
    assert run("separate", tmp_path / "right.wav", "--model", model, "-o", tmp_path / "b") == 0
    voices = [soundfile.read(tmp_path / f"b/{name}/voice1.wav")[0] for name in ("phone", "right")]
    np.testing.assert_allclose(*voices, atol=1e-5)  # DC does not count
    capsys.readouterr()
    soundfile.write(tmp_path / "phone.wav", np.stack([left, -left], 1), RATE, "FLOAT")
    assert run(*separate, "-o", tmp_path / "c") == 2
    assert "correlation -1.00" in error(capsys)
    assert run(*separate, "-o", tmp_path / "c", "--channel", "3") == 2
    assert "there is no channel 3" in error(capsys)


def test_flac_never_clips(model, tmp_path, capsys):
    soundfile.write(tmp_path / "hot.wav", 8 * (sound(110, 3) + sound(190, 3, 1)), RATE, "FLOAT")
    for ending, options in (("wav", []), ("flac", ["--format", "flac"])):
        assert run("separate", tmp_path / "hot.wav", "-o", tmp_path / ending, "--model", model, "--speakers", 2,
                   "--level", "rms", *options) == 0  # fmt: skip
    wav, flac = (
        np.stack([soundfile.read(tmp_path / f"{e}/hot/voice{k}.{e}")[0] for k in (1, 2)]) for e in ("wav", "flac")
    )
    assert np.abs(wav).max() > 1.2
    assert np.abs(flac).max() == pytest.approx(0.999, abs=1e-3)
    np.testing.assert_allclose(flac * np.abs(wav).max() / np.abs(flac).max(), wav, atol=1e-4)
    assert "dB lower, so that none clips" in error(capsys)


def test_stream_writes_as_many_samples(recording, model, tmp_path):
    done = run("separate", recording, "-o", tmp_path / "o", "--model", model, "--stream", "--window", 2, "--hop", 0.5)
    assert done == 0
    assert soundfile.info(tmp_path / "o/talk/voice2.wav").frames == 6 * RATE
    assert json.loads((tmp_path / "o/talk/separation.json").read_text())["speakers"] == 2


def test_m4a_is_read_alone_and_in_a_folder(model, tmp_path):
    mix, folder = sound(110, 3, 0, 44100) + sound(190, 3, 1, 44100), tmp_path / "in"
    folder.mkdir()
    with av.open(str(folder / "phone.m4a"), "w") as container:
        coder = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(mix[None], format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux([*coder.encode(frame), *coder.encode(None)])
    for source in (folder, folder / "phone.m4a"):
        assert run("separate", source, "-o", tmp_path / source.name, "--model", model, "--speakers", 2) == 0
        info = soundfile.info(tmp_path / source.name / "phone/voice2.wav")
        assert info.samplerate == 44100
        assert abs(info.frames - 3 * 44100) < 4096  # AAC pads to its frames


def test_a_budget_and_checks(recording, model, tmp_path, capsys):
    budget = f"{(resident_memory() >> 20) + 1024}M"
    done = run("separate", recording, "-o", tmp_path / "o", "--model", model, "--memory", budget, "--check", "--json")
    assert done == 0
    checks = json.loads(capsys.readouterr().out)[0]["check"]
    assert {row["ought"] for row in checks} == {"equal", "close"}
    assert all(row["relative_error"] < 1e-4 for row in checks if row["ought"] == "equal")
    assert run("separate", recording, "-o", tmp_path / "o", "--model", model, "--check") == 0  # kept with the result
    assert "padded" in capsys.readouterr().out
    assert run("separate", recording, "-o", tmp_path / "p", "--model", model, "--memory", "10M") == 2
    said = error(capsys)
    assert "10M are too few" in said
    assert "(the program" in said
    assert not (tmp_path / "p").exists()


def test_levels_that_sum_back_best(recording, model, tmp_path, capsys):
    call = ["separate", recording, "-o", tmp_path / "o", "--model", model, "--speakers", 2, "--level", "mix", "--json"]
    assert run(*call) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["sum_back_fitted_db"] >= max(found["sum_back_db"], 0)
    mix, voices = soundfile.read(recording)[0], [soundfile.read(tmp_path / f"o/talk/voice{k}.wav")[0] for k in (1, 2)]
    error_db = 10 * np.log10(np.sum(mix**2) / np.sum((mix - sum(voices)) ** 2))
    assert error_db == pytest.approx(found["sum_back_fitted_db"], abs=0.02)


@pytest.mark.parametrize("causal", [True, False])
def test_a_pipe_in_and_a_pipe_out(recording, tmp_path, monkeypatch, capsysbinary, causal):
    torch.manual_seed(0)
    net = MossFormer(num_filters=16, dim=12, depth=1, group_size=32, query_key_dim=8, causal=causal)
    net.save_pretrained(tmp_path / "net")

    def call(output):
        with recording.open("rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            return run("separate", "-", "--stream", "--model", tmp_path / "net", "--window", 2, "-o", output)

    assert call("-") == 0
    voices, rate = soundfile.read(io.BytesIO(capsysbinary.readouterr().out))
    assert (voices.shape, rate) == ((6 * RATE, 2), RATE)
    assert call(tmp_path / "o") == 0
    again = [soundfile.read(tmp_path / f"o/live/voice{k}.wav")[0] for k in (1, 2)]
    np.testing.assert_allclose(np.stack(again, axis=1), voices, atol=1e-6)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "o/live/mixture.wav")[0], soundfile.read(recording)[0])
    assert call(tmp_path / "o") == 2  # never over another recording
    if causal:
        with torch.no_grad():
            whole = net.eval()(torch.from_numpy(soundfile.read(recording, dtype="float32")[0])[None])[0].T
        np.testing.assert_allclose(voices, whole, atol=1e-5)


def test_a_pipe_tells_the_band_that_a_model_loses_beside_the_sound(model, tmp_path, monkeypatch, capsysbinary):
    soundfile.write(tmp_path / "wide.wav", sound(110, 2, 0, 2 * RATE), 2 * RATE)
    with (tmp_path / "wide.wav").open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert run("separate", "-", "--stream", "--model", model, "-o", "-") == 0
    found = capsysbinary.readouterr()
    assert soundfile.read(io.BytesIO(found.out))[1] == 2 * RATE
    assert f"nothing above {RATE // 2} Hz" in " ".join(found.err.decode().split())


@pytest.mark.ci
def test_voices_leave_the_pipe_while_sound_still_comes_and_ctrl_c_keeps_them(tmp_path):
    net = MossFormer(num_filters=16, dim=12, depth=1, group_size=32, query_key_dim=8, causal=True)
    net.save_pretrained(tmp_path / "net")
    options = ["--stream", "--raw", "s16le:8000", "--model", str(tmp_path / "net"), "-o", "-"]
    start = [sys.executable, "-c", "from nearfar.core.cli.root import main; main()"]
    with subprocess.Popen(
        [*start, "speech-separation", "separate", "-", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdin.write((8000 * sound(110, 1)).astype("<i2").tobytes())
        process.stdin.flush()
        first = process.stdout.read(8 * 4000)
        assert len(first) == 8 * 4000  # half a second of it, before the input ends
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0
    voices, _ = soundfile.read(io.BytesIO(first + rest))
    assert len(voices) > 7000


@pytest.mark.parametrize(
    ("limit", "options"), [(100_000, []), (100_000, ["--stream"]), (250_000, [])], ids=["scratch", "voices", "page"]
)
def test_a_full_disk_leaves_nothing_behind(recording, model, tmp_path, capsys, limit, options):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert run("separate", recording, "-o", tmp_path / "o", "--model", model, *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    text = error(capsys)
    assert "cannot be" in text
    assert "/.talk" not in text  # no temporary names
    assert not list((tmp_path / "o").iterdir())


def voices(root):
    for s, pitch in enumerate((90, 150, 230)):
        for u in range(15):
            path = root / f"speaker{s}" / f"u{s}-{u}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sound(pitch, 0.7, 100 * s + u), RATE)
    return root


def test_mix_train_evaluate_separate(tmp_path, capsys):
    root = voices(tmp_path / "voices")
    assert run("mix", root, "-o", tmp_path / "mixtures", "--count", 4, "--seconds", 0.6, "--part", "test") == 0
    assert len(list(csv.DictReader((tmp_path / "mixtures/manifest.csv").open()))) == 4
    small = "model={num_filters: 16, dim: 12, depth: 1, group_size: 32, query_key_dim: 8}"
    sizes = ["--set", small, "--set", "epochs=2", "--set", "mixtures_per_epoch=8", "--set", "batch_size=4"]
    assert run("train", root, "-o", tmp_path / "run", *sizes, "--device", "cpu") == 0
    model = tmp_path / "run/model"
    capsys.readouterr()
    done = run(
        "evaluate", tmp_path / "mixtures", "--model", model, "--metrics", "si_sdri,stoi", "--json",
        "-o", tmp_path / "scores.csv",
    )  # fmt: skip
    assert done == 0
    scores = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in scores["summary"]} == {
        "si_sdr", "si_sdri", "stoi", "separate_si_sdri", "collapsed", "correlation",
    }  # fmt: skip
    assert len(list(csv.DictReader((tmp_path / "scores.csv").open()))) == 4
    assert run("separate", tmp_path / "mixtures/mix/00000.wav", "-o", tmp_path / "o", "--model", model) == 0


def test_training_on_mixtures_on_disk(tmp_path, capsys):
    root = voices(tmp_path / "voices")
    for part, name in (("train", "tr"), ("valid", "cv")):
        made = ["--count", 4, "--seconds", 0.5, "--part", part, "--noise", root / "speaker2"]
        assert run("mix", root, "-o", tmp_path / "set" / name, *made) == 0
    small = "model={num_filters: 16, dim: 12, depth: 1, group_size: 32, query_key_dim: 8}"
    call = ["train", tmp_path / "set", "-o", tmp_path / "run", "--split", "tr", "--validation", "cv", "--set", small]
    call += ["--set", "epochs=1", "--set", "batch_size=4", "--device", "cpu"]
    assert run(*call) == 0
    assert "dB over the mixture" in capsys.readouterr().out
    score = ["evaluate", tmp_path / "set", "--split", "tr", "--model", tmp_path / "run/model", "--json"]
    assert run(*score, "--metrics", "si_sdri") == 0
    assert json.loads(capsys.readouterr().out)["summary"][0]["marked"] == "4 of 4 seen in training"
    assert run(*call, "--set", "num_speakers=3") == 2
    assert "say --set num_speakers=2" in error(capsys)
    assert run(*call, "--targets", "speaker{}") == 2
    assert "no speaker1" in error(capsys)


def test_bad_calls_end_in_one_line(recording, model, tmp_path, capsys):
    cases = [
        (["separate", recording, "-o", tmp_path, "--model", tmp_path / "none"], "no such model"),
        (["separate", tmp_path / "none.wav", "-o", tmp_path, "--model", model], "none.wav"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--speakers", 0], "--speakers 0"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--hop", 0.9], "hop 0.9"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--stream", "--speakers", 2], "--stream"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--speakers", "some"], "--speakers some"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--speakers", 2, "--most", 3], "--most 3"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--memory", "much"], "--memory much"),
        (["separate", "-", "-o", tmp_path, "--model", model], "needs --stream"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--raw", "s16le:8000"], "--raw"),
        (["separate", recording, "-o", tmp_path, "--model", model, "--speaker-model", tmp_path], str(tmp_path)),
        (["mix", tmp_path, "-o", tmp_path / "m"], "no speaker"),
        (["evaluate", tmp_path, "--model", model], "no mixtures found"),
        (["evaluate", tmp_path, "--model", model, "--metrics", "wer"], "unknown wer"),
        (["train", tmp_path, "-o", tmp_path / "r", "--set", "speed=1"], "unknown setting speed"),
    ]
    for arguments, words in cases:
        assert run(*arguments) in (1, 2), arguments
        text = error(capsys)
        assert words in text, text
        assert "Traceback" not in text
