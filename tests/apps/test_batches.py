"""The batch commands in worker processes: the same files as in one process, and a bad file costs itself alone."""

import json
import shutil
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from nearfar.core.cli.root import run
from tests.apps.jobs import JOBS

pytestmark = pytest.mark.slow

COMMANDS = {
    "image-classification": ["predict", "{model}", "{data}", "-o", "{out}/p.csv"],
    "motor-imagery": ["predict", "{model}", "{data}", "-o", "{out}"],
    "speaker-verification": ["embed", "{data}", "-m", "{model}", "-o", "{out}/x.npz"],
    "speech-separation": ["separate", "{data}", "-o", "{out}", "--model", "{model}/model", "--speakers", "2"],
    "super-resolution": ["upscale", "{data}", "--model", "{model}", "-o", "{out}"],
    "medical-segmentation": ["predict", "{data}", "--model", "{model}", "-o", "{out}"],
    "tile-classification": ["predict", "{model}", "{data}", "-o", "{out}"],
}
PLACES = {
    "image-classification": ("dark", "bad.png"), "motor-imagery": ("", "bad_raw.fif"),
    "speaker-verification": ("s0", "bad.wav"), "speech-separation": ("s0", "bad.wav"),
    "super-resolution": ("held", "bad.png"), "medical-segmentation": ("images", "bad.png"),
    "tile-classification": ("across", "bad.png"),
}  # fmt: skip
"""Where in the job's data the files are that the command gets, and a name for a bad one."""


def prepared(name: str, place: Path) -> tuple[Path, Path, str]:
    """A model, a folder of some files of which one is bad, and the name of that."""
    job, data, model, files = JOBS[name], place / "data", place / "model", place / "files"
    assert run(job.train(job.make(data), model, 1)) == 0
    inside, bad = PLACES[name]
    shutil.copytree(data / inside, files)
    for file in sorted(files.iterdir())[4:]:
        file.unlink()
    if len(good := list(files.iterdir())) == 1:
        shutil.copy(good[0], good[0].with_name(f"second_{good[0].name}"))
    (files / bad).write_bytes(b"nothing of the kind")
    return model, files, bad


@pytest.mark.parametrize("name", COMMANDS)
def test_on_urls_what_is_done_is_not_done_again(name: str, tmp_path: Path, capsys) -> None:
    model, files, bad = prepared(name, tmp_path)
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    system.put(str(model), "/in/model", recursive=True)
    system.put(str(files), "/in/files", recursive=True)
    words = [w.format(model="memory://in/model", data="memory://in/files", out="memory://out") for w in COMMANDS[name]]
    written = []
    for _ in range(2):
        capsys.readouterr()
        assert run([name, *words]) == 1
        assert f"memory://in/files/{bad}" in capsys.readouterr().err
        there = system.find("/out", detail=True)
        failures = next(path for path in there if path.endswith("failures.json"))
        assert [row["item"] for row in json.loads(system.cat(failures))] == [f"memory://in/files/{bad}"]
        again = ("failures.json", ".csv", "x.npz", ".jsonl")  # the tables of all, and the rows that they are made of
        written.append({path: about["created"] for path, about in there.items() if not path.endswith(again)})
    assert written[0] == written[1]
    assert not list(Path(tempfile.gettempdir()).glob("nearfar-elsewhere-*/memory/out"))
    system.store.clear()


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_in_worker_processes(name: str, engine: str, tmp_path: Path, capsys) -> None:
    model, files, bad = prepared(name, tmp_path)
    for out, options in (("one", ()), ("two", ("--workers", "2", "--engine", engine))):
        words = [w.format(model=model, data=files, out=tmp_path / out) for w in COMMANDS[name]]
        (tmp_path / out).mkdir()
        capsys.readouterr()
        device = [] if name == "motor-imagery" else ["--device", "cpu"]
        assert run([name, *words, *device, *options]) == 1
        assert bad in capsys.readouterr().err
    for path in sorted((tmp_path / "one").rglob("*")):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        inside = path.relative_to(tmp_path / "one").parts
        if path.is_dir() or any(part.startswith(".") or part.endswith(".cache") for part in inside):
            continue
        if path.suffix == ".npz":
            with np.load(path) as ours, np.load(other) as theirs:
                assert all((ours[key] == theirs[key]).all() for key in ("names", "embeddings"))
        elif path.suffix == ".wav":  # its header has the time
            assert (soundfile.read(other)[0] == soundfile.read(path)[0]).all()
        elif path.suffix in (".png", ".tsv", ".gz"):
            assert other.read_bytes() == path.read_bytes(), path
        elif path.suffix == ".csv":
            rows, others = ([line.split(",")[:3] for line in p.read_text().splitlines()] for p in (path, other))
            assert rows == others
    failures = [*(tmp_path / "two").glob("*failures.json")]
    assert [Path(row["item"]).name for row in json.loads(failures[0].read_text())] == [bad]
