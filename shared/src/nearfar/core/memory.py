"""Memory in bytes: what a user allows, and what this process holds."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from nearfar.core.errors import UserError


def parse_memory(text: str) -> int:
    """Bytes from "2G", "512M", "800k" or a plain number (powers of 1024). Raises UserError for anything else."""
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    stripped = text.strip().lower().removesuffix("b").removesuffix("i")
    try:
        shift = units.get(stripped[-1:], 0)
        value = int(float(stripped[:-1] if shift else stripped) * 2**shift)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise UserError(f"--memory {text}: must be a positive size such as 800M or 2G")
    return value


def refuse_memory(budget: int, shares: Mapping[str, float]) -> UserError:
    """The error that `budget` bytes are too few: what is needed, and by what."""
    need = f"{math.ceil(sum(max(0, share) for share in shares.values()) / 2**20)}M"
    parts = ", ".join(f"{name} {math.ceil(max(0, share) / 2**20)}M" for name, share in shares.items())
    return UserError(f"--memory: {budget >> 20}M are too few, {need} are needed ({parts})")


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def resident_memory(peak: bool = False) -> int:
    """Bytes of memory that this process holds, or the most that it has held since it started.

    Off Linux both are the peak, as `getrusage` gives it; there a process begins with its parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        name = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(name))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
