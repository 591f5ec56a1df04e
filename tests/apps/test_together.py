"""Two processes that torchrun starts train one model, in every app that trains: one writes, they end together."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.apps.jobs import JOBS, Job
from tests.apps.test_stopping import checkpoints, hidden, made

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("nearfar")
STILL = sys.executable, Path(__file__).with_name("still.py")


@pytest.fixture(params=[name for name in JOBS if name != "recall"])
def job(request) -> Job:
    found = JOBS[request.param]
    if found.app not in entry_points(group="nearfar.apps").names:
        pytest.skip(f"{found.app} is not installed")
    return found


def together(command: list[str], place: Path, program: tuple = (PROGRAM,), count: int = 2) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with (place / "messages.txt").open("a") as messages:
        return subprocess.Popen(
            [*([*launcher, "--no-python"] if count > 1 else []), *program, *command],
            stdout=messages,
            stderr=messages,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def finish(command: list[str], place: Path, *how: Any) -> None:
    assert together(command, place, *how).wait(600) == 0, (place / "messages.txt").read_text()


def second_process(launcher: subprocess.Popen) -> int:
    """The process number of the second of the two (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher.pid and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    raise AssertionError("no second process")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found as on Linux")
def test_two_processes_train_and_go_on_to_the_same(job: Job, tmp_path: Path) -> None:
    data = job.make(tmp_path / "data")
    finish(job.train(data, tmp_path / "whole", 4), tmp_path)
    record = json.loads(next((tmp_path / "whole").rglob("run.json")).read_text())
    assert record["finished"]
    assert record["made_from"]["number of processes"] == "2"
    command = job.train(data, tmp_path / "killed", 4)
    running = together(command, tmp_path)
    while not checkpoints(tmp_path / "killed"):
        assert running.poll() is None, (tmp_path / "messages.txt").read_text()
        time.sleep(0.02)
    os.kill(second_process(running), signal.SIGKILL)
    assert running.wait(60) != 0
    finish(command, tmp_path)
    first, second = made(tmp_path / "whole"), made(tmp_path / "killed")
    assert first, "nothing was made"
    assert first == second
    assert hidden(tmp_path / "killed") == []


def test_two_processes_equal_one_with_twice_the_batch(job: Job, tmp_path: Path) -> None:
    """With the model whole in both, and shared out between them."""
    data = job.make(tmp_path / "data")
    ways = [("one", 1, ()), ("ddp", 2, ()), ("fsdp", 2, ("--strategy", "fsdp"))]
    for name, count, options in ways:
        same = {
            # whole batches of windows, so that none stays out in two processes; Muon multiplies in bfloat16
            JOBS["language-model"]: ["context=67", "optimizer=adamw"],
            JOBS["grid-forecast"]: ["validation_share=0.18"],
            JOBS["lra"]: ["warmup=1"],  # that anything is learnt
        }.get(job, [])
        settings = [word for setting in (f"batch_size={8 // count}", *same) for word in ("--set", setting)]
        command = job.train(data, tmp_path / name, 1, *settings, *options)
        finish(command, tmp_path, STILL, count)
    one = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one").rglob("best.safetensors")}
    assert one
    for name, *_ in ways[1:]:
        for path, whole in one.items():
            first, second = load_file(whole), load_file(tmp_path / name / path)
            assert set(first) == set(second)
            for key, value in first.items():
                np.testing.assert_allclose(second[key], value, rtol=0, atol=1e-5, err_msg=f"{name}: {path}: {key}")


README = re.compile(r"^ *(torchrun .* nearfar ([a-z-]+) train (\S+) .*)$", re.MULTILINE)

APPS = ("image-classification", "language-model", "speech-separation", "speaker-verification", "medical-segmentation",
        "motor-imagery")  # fmt: skip


@pytest.mark.parametrize("name", APPS)
def test_under_torchrun_as_the_readme_prints_it(name: str, tmp_path: Path) -> None:
    """On little data, with settings behind the line that make the job small."""
    text = (Path(__file__).parents[2] / "apps" / name / "README.md").read_text()
    line, app, source = next(found.groups() for found in README.finditer(text))
    assert app == name
    job = JOBS[name]
    folder = tmp_path / source.rstrip("/")
    if folder.suffix:
        shutil.copy(job.make(tmp_path / "data")[0], folder)
    else:
        job.make(folder)
    settings = [word for setting in (*job.settings, job.length(1)) for word in ("--set", setting)]
    done = subprocess.run(
        [*shlex.split(line), "--device", "cpu", *job.options, *settings],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    assert [(r["finished"], r["made_from"]["number of processes"]) for r in records] == [(True, "2")]


def test_two_processes_of_one_machine_by_an_option(tmp_path: Path) -> None:
    job = JOBS["language-model"]
    command = job.train(job.make(tmp_path / "data"), tmp_path / "out", 1, "--devices", "2")
    done = subprocess.run(
        [Path(sys.executable).with_name("nearfar"), *command], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("validation_loss") == 2  # two tables, of the first process alone
    record = json.loads((tmp_path / "out" / job.run / "run.json").read_text())
    assert record["made_from"]["number of processes"] == "2"
