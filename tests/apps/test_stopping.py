"""Trainings that are stopped, killed, started twice or started with other data, as a user sees them."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ["hidden_size=16", "num_hidden_layers=1", "context=64", "batch_size=8", "tokenizer=bytes"]
RUN = "import sys; from nearfar.core.cli.root import run; sys.exit(run(sys.argv[1:]))"


def start(text: Path, out: Path, epochs: int, *more: str) -> subprocess.Popen:
    settings = [word for setting in (*SMALL, f"epochs={epochs}") for word in ("--set", setting)]
    command = ["language-model", "train", str(text), "--output", str(out), "--device", "cpu", *settings, *more]
    return subprocess.Popen([sys.executable, "-c", RUN, *command], stderr=subprocess.PIPE, text=True)


def begun(out: Path) -> None:
    """Wait until an epoch is done."""
    for _ in range(3000):
        if (out / "run" / "last.ckpt").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the training did not begin")


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*")]


@pytest.mark.slow
def test_a_training_is_stopped_killed_and_started_twice(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"{i} is {'odd' if i % 2 else 'even'}. " for i in range(1500)))
    training = start(text, out, 100_000)
    begun(out)
    second = start(text, out, 100_000)
    assert second.wait() == 2
    assert "another process trains in this folder" in second.stderr.read()
    training.send_signal(signal.SIGTERM)
    assert training.wait() == 143
    assert "interrupted" in training.stderr.read()
    assert hidden(out) == []
    killed = start(text, out, 100_000)
    time.sleep(20)
    killed.kill()
    killed.wait()
    resumed = start(text, out, 100_000)
    time.sleep(20)
    resumed.send_signal(signal.SIGINT)
    assert resumed.wait() == 130
    assert hidden(out) == []
    shutil.copy(text, tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text(text.read_text().replace("odd", "ODD"))
    other = start(tmp_path / "other.txt", out, 100_000)
    assert other.wait() == 2
    assert "holds a run with other data, validation data" in " ".join(other.stderr.read().split())
    diverged = start(text, tmp_path / "diverged", 2, "--set", "learning_rate=1e30", "--set", "clip=1e30")
    assert diverged.wait() == 2
    assert "training diverged" in diverged.stderr.read()
    assert not list((tmp_path / "diverged").rglob("*.safetensors"))
