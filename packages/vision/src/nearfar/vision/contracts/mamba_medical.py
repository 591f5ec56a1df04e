"""Contracts of the vision backbones among the state space models in medicine: VMamba."""

from collections.abc import Callable
from typing import Any

from nearfar.core.contracts import Contract
from nearfar.vision.models.vmamba import VMamba


def build_contract(contract: Contract) -> Callable[..., Any] | None:
    """The backbone that a contract describes; None for what the medical package builds."""
    state = contract.state()
    if any(name.startswith(("patch_embed.", "layers.0.")) for name in state) and "layers.0.blocks.0.norm.weight" in (
        name.replace("ln_1", "norm") for name in state
    ):
        return VMamba.from_published(state).contract_form(contract)
    return None
