"""The batch commands in worker processes: the same files as in one process, and a bad file costs itself alone."""

import json
import shutil
from pathlib import Path

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
}
PLACES = {
    "image-classification": ("dark", "bad.png"), "motor-imagery": ("", "bad_raw.fif"),
    "speaker-verification": ("s0", "bad.wav"), "speech-separation": ("s0", "bad.wav"),
    "super-resolution": ("held", "bad.png"), "medical-segmentation": ("images", "bad.png"),
}  # fmt: skip
"""Where in the job's data the files are that the command gets, and a name for a bad one."""


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_in_worker_processes(name: str, engine: str, tmp_path: Path, capsys) -> None:
    job, data, model = JOBS[name], tmp_path / "data", tmp_path / "model"
    assert run(job.train(job.make(data), model, 1)) == 0
    place, bad = PLACES[name]
    files = tmp_path / "files"
    shutil.copytree(data / place, files)
    for file in sorted(files.iterdir())[4:]:
        file.unlink()
    if len(good := list(files.iterdir())) == 1:
        shutil.copy(good[0], good[0].with_name(f"second_{good[0].name}"))
    (files / bad).write_bytes(b"nothing of the kind")
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
