"""Contracts of the vision backbones among the state space models in medicine: Vim and VMamba."""

from collections.abc import Callable
from typing import Any

from nearfar.core.contracts import Contract
from nearfar.vision.models.vim import Vim
from nearfar.vision.models.vmamba import VMamba


def build_contract(contract: Contract) -> Callable[..., Any] | None:
    """The backbone that a contract describes; None for what the medical package builds."""
    state = contract.state()
    if "layers.0.mixer.in_proj.weight" in state and "cls_token" in state:
        sizes = {name: contract.settings[name] for name in ("stride", "img_size") if name in contract.settings}
        model = Vim.from_published(state, **sizes)
        dim, states = model.embed_dim, model.blocks[0].mixer.scan.A_log.shape[-1]
        contract.require(patch=model.patch_size, depth=len(model.blocks), d_state=states, embed_dim=dim)
        contract.require(num_classes=model.num_classes)
        contract.require_text(norm="RMSNorm eps 1e-0?5", cls_token="middle.*", bidirectional="v2, halved")
        return model
    if any(name.startswith(("patch_embed.", "layers.0.")) for name in state) and "layers.0.blocks.0.norm.weight" in (
        name.replace("ln_1", "norm") for name in state
    ):
        found = VMamba.published_settings(VMamba.published_state(state))
        contract.document("norm")  # where the channels stand
        contract.require(
            dims=found["dims"] if isinstance(contract.settings.get("dims"), list) else found["dims"][0],
            **{
                name: found[name]
                for name in ("depths", "num_classes", "d_state", "ssm_ratio", "conv_bias", "mlp_ratio")
            },
        )
        patches = "two 3x3 stride 2.*" if found["stem"] == "convolutions" else "4x4 stride 4"
        merging = any(name.endswith("downsample.reduction.weight") for name in state)
        contract.require_text(
            gate="silu.*" if found["gate"] else "none",
            dt_rank=r"auto|ceil\(dim/16\)" if found["dt_rank"] is None else str(found["dt_rank"]),
            patch_embed=patches,
            downsample="patch merging.*" if merging else "3x3 stride 2",
        )
        return VMamba.from_published(state).contract_form(contract)
    return None
