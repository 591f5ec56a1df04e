"""Processes that work together on one training: which one this is, how many there are, how they are started.

torchrun and SLURM's srun tell each process its place; `start_processes` starts torchrun for one machine. The commands
of one job differ in nothing else.
"""

import os
import sys
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError

LAUNCHERS = (
    ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE"),
)
"""Variables that tell how many processes there are, which one this is, how many are here: of torchrun, of srun."""


def place() -> tuple[int, int, int]:
    """How many processes work together, which this is, and how many are on this machine."""
    for count, rank, here in LAUNCHERS:
        if int(os.environ.get(count, 1)) > 1 and rank in os.environ:
            number = int(os.environ[count])
            return number, int(os.environ[rank]), int(os.environ.get(here, number))
    return 1, 0, 1


def process_count() -> int:
    """How many processes work together (torchrun, srun); 1 where this one is alone."""
    return place()[0]


def process_rank() -> int:
    """Which of the processes that work together this one is; 0 where it is alone."""
    return place()[1]


def trainer_places() -> dict[str, Any]:
    """`devices`, `num_nodes` and `strategy` of Lightning's Trainer for the processes that were started."""
    count, _, here = place()
    if count == 1:
        from lightning.pytorch.plugins.environments import LightningEnvironment

        # alone, also in a SLURM allocation whose other places are not meant
        return {"devices": 1, "num_nodes": 1, "strategy": "auto", "plugins": [LightningEnvironment()]}
    if count % here:
        raise UserError(f"{count} processes, {here} of them on this machine: all machines must have as many")
    return {"devices": here, "num_nodes": count // here, "strategy": "ddp_find_unused_parameters_true"}


def start_processes(devices: int) -> None:
    """Run this command anew in `devices` processes of this machine, under torchrun; returns where it runs so already.

    Raises UserError where a launcher has started another number, or there are fewer GPUs.
    """
    count, _, here = place()
    if devices < 1:
        raise UserError(f"--devices {devices}: must be at least 1")
    if count > 1:
        if devices not in (1, here):
            raise UserError(f"--devices {devices}: the launcher has started {here} processes on this machine")
        return
    if devices == 1:
        return
    import torch

    if 0 < torch.cuda.device_count() < devices:
        raise UserError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices), "--no-python"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words, str(Path(sys.argv[0]).resolve()), *sys.argv[1:]])


def check_alone(command: str) -> None:
    """Raises UserError where several processes work together, which `command` cannot share out."""
    if process_count() > 1:
        raise UserError(f"{command}: shares nothing out among processes; start it alone (only `train` can)")
