"""Where to compute, and whether bfloat16 is right there."""

import logging
from functools import cache

import torch

from nearfar.core.errors import UserError
from nearfar.ops import BFLOAT16_GUARDED
from nearfar.ops.common.precision import BFLOAT16_ISA, check_bfloat16


def choose_device(name: str, option: str = "--device") -> str:
    """`auto` (the fastest), cpu, cuda or mps to a device that is there. Raises UserError that names `option`."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device in there if there[device]]
    if name == "auto":
        return found[0]
    if name not in found:
        raise UserError(f"{option} {name}: not here; this machine has {', '.join(found)}")
    return name


def check_precision(precision: str, device: str) -> None:
    """To be called before anything is computed in `precision`, Lightning's or torch's name of it.

    Raises UserError where that is bfloat16 on a processor whose bfloat16 convolutions are wrong; says once in a process
    where they are right because AMX is not used.
    """
    if not ("bf16" in precision or "bfloat16" in precision) or choose_device(device) != "cpu":
        return
    try:
        check_bfloat16()
    except RuntimeError as error:
        raise UserError(f"precision {precision}: {error}") from error
    if BFLOAT16_GUARDED:
        _say_guarded()


@cache
def _say_guarded() -> None:
    logging.getLogger("nearfar").warning(
        "bfloat16 on this processor: AMX is not used, because oneDNN's convolutions are wrong with it "
        f"(ONEDNN_MAX_CPU_ISA={BFLOAT16_ISA} was set); checked, and right so"
    )
