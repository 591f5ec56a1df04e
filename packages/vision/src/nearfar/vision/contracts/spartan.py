"""Contracts of SpaRTAN: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.ops.convolution.reinforced import ReinforcedMixer
from nearfar.ops.tokens.wave_mixer import WaveMixer
from nearfar.vision.models.spartan import BARE, SpaRTAN, SpaRTANBlock


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, one block or one mixer that a contract describes."""
    state, settings = rename(contract.state(), BARE, anywhere=True), contract.settings
    contract.document("drop_path", "full_conv_stages")
    contract.require_text(block_norm=r"GroupNorm with 1 group, eps 1e-0?6")
    eps = settings.get("bn_eps", 1e-6)
    if "theta.weight" in state:
        hidden, dim = state["theta.weight"].shape[:2]
        groups = hidden // state["conv.conv.weight"].shape[1]
        contract.require(dim=dim, expand_ratio=hidden // dim, hidden=hidden, conv_groups=groups)
        return loaded(WaveMixer(dim, hidden // dim, grouped=groups != hidden, eps=eps), state)
    if "h_conv.conv.weight" in state:
        half, per_group = state["h_conv.conv.weight"].shape[:2]
        contract.require(dim=2 * half, inner_dim=half, groups=half // per_group)
        return loaded(ReinforcedMixer(2 * half, dense=per_group > 1, eps=eps), state)
    if "cmixer.theta.weight" in state:
        hidden, dim = state["cmixer.theta.weight"].shape[:2]
        block: nn.Module = SpaRTANBlock(dim, hidden // dim, state["smixer.h_conv.conv.weight"].shape[1] > 1, eps=eps)
        return loaded(block, state)
    model = SpaRTAN.from_published(state, eps=eps)
    found = SpaRTAN.published_settings(SpaRTAN.published_state(state))
    contract.require(**{name: found[name] for name in ("depths", "dims", "expand_ratios", "num_classes")})
    return model.contract_form(contract)
