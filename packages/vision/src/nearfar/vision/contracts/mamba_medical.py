"""Contracts of the vision backbones among the state space models in medicine: Vim and VMamba."""

from collections.abc import Callable
from typing import Any

from nearfar.core.contracts import Contract
from nearfar.vision.models.vim import Vim
from nearfar.vision.models.vmamba import VMamba


def build_contract(contract: Contract) -> Callable[..., Any] | None:
    """The backbone that a contract describes; None for what the medical package builds."""
    names, settings = contract.shapes, contract.settings
    if "layers.0.mixer.in_proj.weight" in names and "cls_token" in names:
        sizes = {name: settings[name] for name in ("stride", "img_size") if name in settings}
        return Vim.from_published(contract.state(), **sizes)
    if any(f"layers.0.blocks.0.{norm}.weight" in names for norm in ("norm", "ln_1")):
        return VMamba.from_published(contract.state()).contract_form(contract)
    return None
