"""Where to compute."""

import torch

from nearfar.core.errors import UserError


def choose_device(name: str, option: str = "--device") -> str:
    """`auto` (the fastest), cpu, cuda or mps to a device that is there. Raises UserError that names `option`."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device in there if there[device]]
    if name == "auto":
        return found[0]
    if name not in found:
        raise UserError(f"{option} {name}: not here; this machine has {', '.join(found)}")
    return name
