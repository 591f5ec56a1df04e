"""Processes that work together on one training: which one this is, how many there are, how they are started.

torchrun and SLURM's srun tell each process its place; `start_processes` does so on one machine. The commands
of one job differ in nothing else.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from nearfar.core.errors import UserError

LAUNCHERS = (
    ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE"),  # the last only where srun was given it
)
"""Variables that tell how many processes there are, which one this is, how many are here: of torchrun, of srun."""

STRATEGIES = ("ddp", "fsdp")
"""How processes train one model: each has it whole, or each keeps a part of it, of its gradients and of what the
optimizer remembers, and all parts meet for the length of a step."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

_chosen = {"strategy": STRATEGIES[0], "precision": PRECISIONS[0]}


def place() -> tuple[int, int, int]:
    """How many processes work together, which this is, and how many are on this machine."""
    for count, rank, here in LAUNCHERS:
        if int(os.environ.get(count, 1)) > 1 and rank in os.environ:
            number = int(os.environ[count])
            nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) if here.startswith("SLURM") else 1
            if number % nodes:
                raise UserError(f"{number} processes on {nodes} machines: all machines must have as many")
            return number, int(os.environ[rank]), int(os.environ.get(here, number // nodes))
    return 1, 0, 1


def process_count() -> int:
    """How many processes work together (torchrun, srun); 1 where this one is alone."""
    return place()[0]


def process_rank() -> int:
    """Which of the processes that work together this one is; 0 where it is alone."""
    return place()[1]


def choose(**settings: str) -> None:
    """`strategy`, one of `STRATEGIES`, or `precision`, of `PRECISIONS`, of the next training. Raises UserError."""
    for name, value in settings.items():
        known = {"strategy": STRATEGIES, "precision": PRECISIONS}[name]
        if value not in known:
            raise UserError(f"--{name} {value}: must be {', '.join(known[:-1])} or {known[-1]}")
        _chosen[name] = value


def chosen_precision() -> str:
    return _chosen["precision"]


def sharded() -> bool:
    """Whether each process keeps a part of the model alone. Raises UserError where there is one process."""
    if _chosen["strategy"] == "fsdp" and process_count() == 1:
        raise UserError("--strategy fsdp: shares one model out; give --devices, or start it with torchrun or srun")
    return _chosen["strategy"] == "fsdp"


def check_nodes(number: int) -> None:
    """Raises UserError where a launcher has not started the command on so many machines."""
    count, _, here = place()
    if number not in (1, count // here):
        raise UserError(
            f"--num-nodes {number}: {count} processes were started, {here} of them on this machine; torchrun or srun "
            "starts the command on all machines"
        )


def start_processes(devices: int) -> None:
    """Run this command in `devices` processes of this machine and exit as they do; returns where it runs so already.

    The first that fails ends the others; signals are passed on. Raises UserError where a launcher has started another
    number, or there are fewer GPUs.
    """
    count, _, here = place()
    if count > 1:
        if devices not in (1, here):
            raise UserError(f"--devices {devices}: the launcher has started {here} processes on this machine")
        return
    if devices == 1:
        return
    import torch

    if 0 < torch.cuda.device_count() < devices:
        raise UserError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"NODE_RANK": 0, "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // devices)}
    children = []
    for rank in range(devices):
        told = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        # in sessions of their own, so that Ctrl-C at a terminal reaches each of them once, from here
        child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | told, start_new_session=True)
        children.append(child)
    status = _wait(children)
    raise SystemExit(status)


def _wait(children: list[subprocess.Popen]) -> int:
    """The status of the first process, or of the one that failed before; all have ended then."""
    sent = signal.SIGTERM
    try:
        while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
            time.sleep(0.1)
    except KeyboardInterrupt as stop:
        sent = getattr(stop, "number", signal.SIGINT)
    failed = next((status for child in children if (status := child.poll())), 0)
    deadline = time.monotonic() + 30
    for child in children:
        if child.poll() is None:
            child.send_signal(sent)
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    status = failed or children[0].returncode
    return status if status >= 0 else 128 - status


def check_together(words: Sequence[str]) -> None:
    """Raises UserError where several processes run a command, the first of its `words`, that is no training."""
    if process_count() > 1 and "train" not in words[:3]:
        raise UserError(f"{' '.join(words[:2])}: only `train` is shared out among processes; start this alone")
