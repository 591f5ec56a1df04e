"""Contracts of AFFNet: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from nearfar.core.checkpoints import count, loaded, rename
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.spectral.adaptive import AdaptiveFrequencyFilter
from nearfar.vision.models.affnet import ACTIVATIONS, AFFBlock, AFFNet, FilterBlock


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, one block of either kind, or the filter, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document("mode")  # the size's name
    contract.require_text(conv_norm="BatchNorm.* eps 1e-0?5")
    contract.require_text(block_norm=r"(?!.*eps (?!1e-0?5\b)).*")
    threshold = settings.get("softshrink", 0.01)
    contract.require_text(activation=".*(relu|silu|swish).*")
    activation = "relu" if "relu" in str(settings.get("activation", "SiLU")).lower() else "silu"
    words = str(settings.get("block_norm", "GroupNorm")).lower()
    norm = "group" if "group" in words or "layer_norm_2d" in words else "pixel"
    act = ACTIVATIONS[activation]
    if "w1" in state:
        _, blocks, width, _ = state["w1"].shape
        contract.require(dim=blocks * width, spectral_blocks=blocks)
        return loaded(AdaptiveFrequencyFilter(blocks * width, blocks, activation=act, threshold=threshold), state)
    if "filter.w1" in state or "conv_proj.block.conv.weight" in state:
        state = rename(state, [(r"(^|\.)block\.", r"\1")], anywhere=True)
        inner = "" if "filter.w1" in state else "global_rep.0."
        _, blocks, width, _ = state[f"{inner}filter.w1"].shape
        hidden = len(state[f"{inner}mlp.conv_3x3.conv.weight"])
        contract.require(dim=blocks * width, spectral_blocks=blocks, ffn_dim=hidden)
        if not inner:
            model = FilterBlock(blocks * width, hidden, blocks, act, norm, 1)
        else:
            depth = count(state, r"global_rep\.(\d+)\.") - 1
            contract.require(blocks=depth)
            model = AFFBlock(blocks * width, depth, hidden, blocks, act, norm)
        model = loaded(model, state)
    else:
        model = AFFNet.from_published(state, activation=activation, norm=norm)
        found = AFFNet.published_settings(AFFNet.published_state(state))
        contract.require(
            stem=found["stem_width"],
            stage_dims=list(found["dims"]),
            mv2_blocks=list(found["mv2_blocks"]),
            aff_blocks=list(found["aff_blocks"]),
            spectral_blocks=found["num_blocks"],
            num_classes=found["num_classes"],
            last_expansion=(found["last_dim"] or min(4 * found["dims"][-1], 960)) / found["dims"][-1],
        )
        for name, ours in (("expand_ratio", "expand_ratio"), ("ffn_ratio", "ffn_ratio")):
            if abs(settings.get(name, found[ours]) - found[ours]) > 1e-6:
                raise UserError(f"{contract.path}: {name} is {settings[name]}, the state has {found[ours]}")
    for module in model.modules():
        if isinstance(module, AdaptiveFrequencyFilter):
            module.threshold = threshold
    return model
