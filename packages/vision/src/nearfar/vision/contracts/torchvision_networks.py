"""Networks of torchvision that explanations' contracts are recorded on, known by names and shapes of their state."""

import re

import torch
import torchvision
from torch import nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError


def network(contract: Contract) -> nn.Module:
    """The network whose state the contract lists, loaded; the one that `network` names first. In evaluation mode."""
    text = str(contract.settings["network"]) if "network" in contract.settings else ""
    known = torchvision.models.list_models(module=torchvision.models)
    named = [name for name in known if re.search(rf"\b{name}\b", text)]
    state, shapes = contract.state(), contract.shapes
    classes = next(shape[0] for name, shape in reversed(shapes.items()) if name.endswith("weight"))
    if (told := re.search(r"(\d+) (?:classes|identities)", text)) and int(told[1]) != classes:
        raise UserError(f"{contract.path}: network is {text!r}; its state has {classes} classes")
    for name in named or known:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, num_classes=classes)
        if {n: tuple(t.shape) for n, t in model.state_dict().items()} == shapes:
            return loaded(torchvision.models.get_model(name, num_classes=classes), state).eval()
    raise UserError(f"{contract.path}: torchvision has no {' or '.join(named) or 'network'} with this state")
