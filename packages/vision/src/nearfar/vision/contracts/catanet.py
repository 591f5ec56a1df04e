"""Contracts of CATANet: any published variant from its settings and shapes.

They were recorded with the released code's unstable sort on a CPU: tokens of one centre stand in torch's own order.
"""

from collections.abc import Callable
from typing import Any

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.vision.restoration.catanet import CATANet, LocalRegionBlock, TokenAggregationBlock


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, or one of its two blocks; patches are averaged as the released code does."""
    settings, state = contract.settings, contract.state()
    contract.require(layer_norm_eps=1e-5)
    if "first_conv.weight" in state:
        names = {"local_patch": "patch_sizes", "group_size": "group_sizes"}
        given = {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
        model = CATANet.from_published(
            state,
            averaging="published",
            stable=False,
            num_heads=settings.get("heads", 4),
            overlap=settings.get("local_overlap", 2),
            **given,
        )
        tokens = [stage[0] for stage in model.stages]
        contract.require(
            upscale=model.scale,
            in_channels=model.in_chans,
            dim=model.stem.out_channels,
            blocks=len(model.stages),
            qk_dim=tokens[0].attention.q.out_features,
            mlp_dim=tokens[0].ffn.fc1.out_features,
            token_centres=[len(block.attention.centres) for block in tokens],
            centre_iterations=[block.attention.iterations for block in tokens],
        )
        contract.document("base", "input")
        return model
    prefix = "blocks.0.0." if "tab.norm.weight" in state else "blocks.0.1."
    state = rename(state, [("(tab|lrsa)\\.", prefix)])
    state = rename(CATANet.published_state(state), [("stages\\.0\\.[01]\\.", "")])
    dim, heads = len(state["ffn.norm.weight"]), settings.get("heads", 4)
    qk_dim, hidden = len(state["attention.q.weight"]), len(state["ffn.fc1.bias"])
    contract.require(dim=dim, qk_dim=qk_dim, mlp_dim=hidden)
    if prefix.endswith("1."):
        patch, overlap = settings["patch"], settings.get("overlap", 2)
        return loaded(LocalRegionBlock(dim, qk_dim, hidden, heads, patch, overlap, "published"), state)
    centres = len(state["attention.centres"])
    contract.require(centres=centres)
    return loaded(TokenAggregationBlock(dim, qk_dim, hidden, heads, centres, settings["group_size"], False), state)
