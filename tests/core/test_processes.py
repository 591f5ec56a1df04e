"""Several processes train as one: same weights, exact resume, one writer, refusals."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nearfar.core import processes
from nearfar.core.checkpoints import read_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import locked
from nearfar.core.sharing import Share, trainer_places

SCRIPT = Path(__file__).with_name("distributed.py")


def start(folder: Path, *words: str, count: int = 2) -> subprocess.CompletedProcess:
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    return subprocess.run(
        [sys.executable, *together, SCRIPT, folder, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(folder / "final.safetensors")


@pytest.mark.parametrize(
    ("both", "two"),
    [
        pytest.param([], ["batch=4"], id="ddp", marks=pytest.mark.ci),
        pytest.param([], ["batch=4", "fsdp=1"], id="fsdp", marks=pytest.mark.ci),
        pytest.param(["norm=0"], ["batch=2", "accumulate=2"], id="accumulated", marks=pytest.mark.slow),
        pytest.param(["norm=0"], ["batch=2", "accumulate=2", "fsdp=1"], id="accumulated-fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(both, two, tmp_path):
    for folder, words, count in (("one", ["batch=8"], 1), ("two", two, 2)):
        done = start(tmp_path / folder, *both, *words, count=count)
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    losses = [[[float(v) for v in row.split(",")[1:4]] for row in part[1:]] for part in rows]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["finished"]
    assert record["made_from"]["number of processes"] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [pytest.param("fsdp=0", id="ddp"), pytest.param("fsdp=1", id="fsdp")])
def test_killed_process_ends_the_others_and_the_run_goes_on_exactly(fsdp, tmp_path):
    assert start(tmp_path / "whole", "dropout=0.5", fsdp).returncode == 0
    started = time.monotonic()
    cut = start(tmp_path / "cut", "dropout=0.5", "stop=1", fsdp)
    assert cut.returncode != 0
    assert time.monotonic() - started < 200  # a minute at most after the kill; the rest is the start on a busy machine
    assert not (tmp_path / "cut" / "final.safetensors").exists()
    refused = start(tmp_path / "cut", "dropout=0.5", count=1)
    assert refused.returncode == 2
    assert "number of processes" in refused.stderr
    resumed = start(tmp_path / "cut", "dropout=0.5", fsdp)
    assert resumed.returncode == 0, resumed.stderr
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name, value in whole.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.slow
def test_folder_of_another_process_is_refused_once(tmp_path):
    with locked(tmp_path, "trains"):
        done = start(tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("refused: ") == 1
    assert "another process trains in this folder" in done.stderr


@pytest.mark.ci
def test_srun_starts_two_processes(tmp_path):
    """By the variables that srun sets, as SLURM 24's manual has them: CI has no SLURM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"JOB_ID": port, "JOB_NAME": "train", "NTASKS": 2, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1, "NNODES": 1}
    told |= {"NODELIST": "127.0.0.1", "JOB_NODELIST": "127.0.0.1", "NODEID": 0, "TASKS_PER_NODE": 2}
    variables = os.environ | {f"SLURM_{name}": str(value) for name, value in told.items()}
    variables |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    tasks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path / "run", "epochs=2"],
            env=variables | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"]
    assert record["made_from"]["number of processes"] == "2"


def test_launchers_tell_the_place(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")  # of a batch script: no job step of several tasks
    assert processes.place() == (1, 0, 1)
    monkeypatch.setenv("RANK", "1")  # left over in a shell
    assert processes.process_rank() == 0
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert processes.place() == (8, 5, 4)
    monkeypatch.delenv("SLURM_STEP_NUM_NODES")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert processes.place() == (8, 5, 4)
    processes.check_nodes(2)
    with pytest.raises(UserError, match="--num-nodes 3: 8 processes were started, 4 of them on this machine"):
        processes.check_nodes(3)
    places = trainer_places()
    assert (places["devices"], places["num_nodes"]) == (4, 2)
    with pytest.raises(UserError, match="has started 4 processes"):
        processes.start_processes(2)
    processes.start_processes(4)
    processes.check_together(["language-model", "lra", "train", "x"])
    processes.choose(strategy="fsdp")
    assert processes.sharded()
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UserError, match="--strategy fsdp: shares one model out"):
        processes.sharded()
    processes.choose(strategy="ddp")
    for name in ("strategy", "precision"):
        with pytest.raises(UserError, match=f"--{name} fast: must be"):
            processes.choose(**{name: "fast"})
    monkeypatch.setenv("SLURM_PROCID", "5")
    with pytest.raises(UserError, match="image-classification compare: only `train` is shared out"):
        processes.check_together(["image-classification", "compare", "pictures"])


def test_shares_hold_every_item_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found += list(Share(range(7)))
    assert sorted(found) == list(range(7))
    assert list(Share(range(2))) == [0, 1]
