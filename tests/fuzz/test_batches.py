"""One bomb, odd sound or damaged recording among good ones: it is named first on its line, and the others are done."""

import struct
from pathlib import Path

import numpy as np
import pytest

from nearfar.core.cli import root as cli
from tests.fuzz import targets
from tests.fuzz.test_bombs import nifti, png, setting


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What stands on standard error, a line each, as long as it may be."""
    return [line.strip() for line in capsys.readouterr().err.splitlines()]


def named(found: list[str], path: Path) -> bool:
    return sum(line.startswith(f"{path}: ") for line in found) == 1


def test_pictures_to_classify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "model", tmp_path / "in"
    targets.make_classifier(model)
    targets.write(data, {f"{i}.png": targets.encoded("PNG") for i in range(3)})
    bombs = [png(data / "1a.png", 60_000), png(data / "1b.png", 9_000)]
    status = cli.run(["image-classification", "predict", str(model), str(data), "-o", str(tmp_path / "out.csv")])
    found = lines(capsys)
    assert status == 1
    assert all(named(found, bomb) for bomb in bombs)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 3


def test_scans_to_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "model", tmp_path / "in"
    targets.make_segmenter(model)
    targets.write(data, {f"{i}.png": targets.encoded("PNG", "L") for i in range(2)})
    bad = [
        png(data / "bomb.png", 60_000, b"\x08\x00"),
        nifti(data / "odd.nii", setting("dim", [3, *[9999] * 3, *[1] * 4])),
    ]
    status = cli.run(["medical-segmentation", "predict", str(data), "--model", str(model), "-o", str(tmp_path / "out")])
    found = lines(capsys)
    assert status == 1
    assert all(named(found, path) for path in bad)
    assert {path.name for path in (tmp_path / "out").glob("?.png")} == {"0.png", "1.png"}


def odd_sound(path: Path) -> Path:
    """A WAV whose header says a rate that no recording has."""
    import soundfile

    soundfile.write(path, np.sin(np.arange(8000)) / 2, 8000)
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 2**31 - 1)
    path.write_bytes(data)
    return path


def test_sounds_to_separate_and_to_embed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import soundfile

    data = tmp_path / "in"
    data.mkdir()
    for name in ("a", "c"):
        soundfile.write(data / f"{name}.wav", targets.rng().normal(0, 0.1, 8000), 8000)
    bad = odd_sound(data / "b.wav")
    for app, words, make in (
        ("speech-separation", ["separate"], targets.make_separator),
        ("speaker-verification", ["embed"], targets.make_speaker_system),
    ):
        model, output = tmp_path / app, tmp_path / f"{app}-out"
        model.mkdir()
        make(model)
        output = output.with_suffix(".npz") if app == "speaker-verification" else output
        status = cli.run([app, *words, str(data), "-o", str(output), "--model", str(model)])
        found = lines(capsys)
        assert status == 1, found
        assert named(found, bad), found
        if output.suffix:
            assert len(np.load(output)["names"]) == 2
        else:
            assert {path.name for path in output.iterdir() if path.is_dir() and path.name[0] != "."} == {"a", "c"}


def test_recordings_to_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "in"
    targets.write(data, {"a.edf": targets.edf(), "b.gdf": targets.gdf(), "c.edf": targets.edf()})
    content = bytearray(targets.gdf())
    content[236:244] = struct.pack("<q", 2**40)  # records
    (data / "b.gdf").write_bytes(content)
    status = cli.run(["motor-imagery", "inspect", str(data)])
    captured = capsys.readouterr()
    assert status == 1
    assert named([line.strip() for line in captured.err.splitlines()], data / "b.gdf")
    assert captured.out.count("T0 2, T1 1") == 2, "a row for each of the good ones; a narrow table breaks their names"
