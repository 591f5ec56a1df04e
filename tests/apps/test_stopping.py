"""Trainings that are stopped, killed, started twice or started with other data, as a user sees them, in every app.

The apps are imported once, by a server that forks a process for each command.
"""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.apps.jobs import JOBS, Job, call

ENDLESS = 100_000
"""Epochs that no test waits for."""

SERVER = multiprocessing.get_context("forkserver")


class Command:
    """A command in a process of its own."""

    def __init__(self, arguments: list[str], place: Path) -> None:
        self.messages = place / f"messages-{time.monotonic_ns()}.txt"
        self.process = SERVER.Process(target=call, args=(arguments, str(self.messages)))
        self.process.start()

    def wait(self, seconds: float = 600) -> int:
        """Its exit status."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"does not end: {self.said()}")
        return self.process.exitcode

    def stop(self, number: int = signal.SIGTERM) -> int:
        os.kill(self.process.pid, number)
        return self.wait()

    def said(self) -> str:
        return " ".join(self.messages.read_text().split()) if self.messages.exists() else ""

    def wait_for(self, found, what: str) -> None:
        """Wait until `found()`; the process must not end before."""
        for _ in range(6000):
            if found():
                return
            assert self.process.is_alive(), f"ended before {what}: {self.said()}"
            time.sleep(0.05)
        raise AssertionError(f"no {what}")


def checkpoints(out: Path) -> list[tuple[Path, int]]:
    """The checkpoints with their times of writing."""
    found = []
    for path in out.rglob("last.ckpt"):
        with suppress(FileNotFoundError):  # another takes its place
            found.append((path, path.stat().st_mtime_ns))
    return found


def hidden(out: Path) -> list[str]:
    """Left-overs of what was stopped or killed."""
    return [path.name for path in out.rglob(".*") if not path.name.endswith(".made-from.json")]


def made(out: Path) -> dict[str, object]:
    """What a training leaves, but for times: all weights and rows."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*.safetensors")):
        found[str(path.relative_to(out))] = {name: value.tobytes() for name, value in load_file(path).items()}
    for path in sorted(out.rglob("results.csv")):
        with path.open(newline="") as stream:
            rows = [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(stream)]
        found[str(path.relative_to(out))] = rows
    return found


@pytest.fixture(params=[pytest.param(name, id=name) for name in JOBS])
def job(request) -> Job:
    found = JOBS[request.param]
    if found.app not in entry_points(group="nearfar.apps").names:
        pytest.skip(f"{found.app} is not installed")
    modules = [point.value.split(":")[0] for point in entry_points(group="nearfar.apps")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    SERVER.set_forkserver_preload(["tests.apps.jobs", "lightning.pytorch", "nearfar.core.training", *modules])
    return found


@pytest.mark.slow
def test_a_training_is_stopped_and_started_twice(job: Job, tmp_path: Path) -> None:
    data, out = job.make(tmp_path / "data"), tmp_path / "out"
    endless = job.train(data, out, ENDLESS)
    training = Command(endless, tmp_path)
    training.wait_for(lambda: checkpoints(out), "a checkpoint")
    second = Command(endless, tmp_path)
    assert second.wait() == 2
    assert f"another process {'sweeps' if job.app == 'recall' else 'trains'} in this folder" in second.said()
    assert training.stop() == 128 + signal.SIGTERM
    assert "interrupted" in training.said()
    assert "Traceback" not in training.said()
    assert checkpoints(out)
    assert hidden(out) == []

    def go_on() -> Command:
        """The same command again, until it has written a checkpoint of its own."""
        before, command = checkpoints(out), Command(endless, tmp_path)
        command.wait_for(lambda: checkpoints(out) not in ([], before), "a new checkpoint")
        return command

    assert go_on().stop(signal.SIGINT) == 128 + signal.SIGINT
    assert hidden(out) == []
    killed = go_on()
    killed.process.kill()  # the lock dies with it
    assert killed.wait() == -signal.SIGKILL
    assert go_on().stop() == 128 + signal.SIGTERM
    assert hidden(out) == []


def goes_on_to_the_same(job: Job, place: Path, epochs: int, *more: str) -> None:
    data = job.make(place / "data")
    whole = Command(job.train(data, place / "whole", epochs, *more), place)
    assert whole.wait() == 0, whole.said()
    command = job.train(data, place / "killed", epochs, *more)
    killed = Command(command, place)
    killed.wait_for(lambda: checkpoints(place / "killed"), "a checkpoint")
    killed.process.kill()
    assert killed.wait() == -signal.SIGKILL
    resumed = Command(command, place)
    assert resumed.wait() == 0, resumed.said()
    first, second = made(place / "whole"), made(place / "killed")
    assert first
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name
    assert hidden(place / "killed") == []


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same(job: Job, tmp_path: Path) -> None:
    goes_on_to_the_same(job, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image-classification", "language-model"])
def test_a_killed_training_goes_on_within_a_pass(name: str, tmp_path: Path) -> None:
    """A single epoch of four parts: a checkpoint is of within it."""
    goes_on_to_the_same(JOBS[name], tmp_path, 1, "--set", "parts=4", "--set", "batch_size=2")
    rows = next((tmp_path / "killed").rglob("metrics.csv")).read_text().splitlines()
    assert len(rows) == 1 + 4


@pytest.mark.slow
def test_two_trainings_at_once_do_not_meet(job: Job, tmp_path: Path) -> None:
    data = job.make(tmp_path / "data")
    both = [Command(job.train(data, tmp_path / name, 2), tmp_path) for name in ("a", "b")]
    assert [command.wait() for command in both] == [0, 0], [command.said() for command in both]
    assert made(tmp_path / "a") == made(tmp_path / "b")


@pytest.mark.slow
def test_other_data_and_diverged_runs_are_refused(tmp_path: Path) -> None:
    job = JOBS["language-model"]
    data, out = job.make(tmp_path / "data"), tmp_path / "out"
    assert Command(job.train(data, out, 1), tmp_path).wait() == 0
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    text = tmp_path / "other" / "text.txt"
    text.write_text(text.read_text().replace("odd", "ODD"))
    other = Command(job.train([str(text)], out, 1), tmp_path)
    assert other.wait() == 2
    assert "holds a run with other data, validation data" in other.said()
    assert json.loads((out / "run" / "run.json").read_text())["finished"]
    extra = ("--set", "learning_rate=1e30", "--set", "clip=1e30")
    diverged = Command(job.train(data, tmp_path / "diverged", 2, *extra), tmp_path)
    assert diverged.wait() == 2
    assert "training diverged" in diverged.said()
    assert not list((tmp_path / "diverged").rglob("*.safetensors"))
