"""Contracts of TransXNet: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from nearfar.core.checkpoints import loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.ops.convolution.dmixer import DMixer, IDConv, MultiScaleFFN, OverlappingReductionAttention
from nearfar.vision.models.transxnet import TransXBlock, TransXNet


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one operator, that a contract describes."""
    state, settings = contract.state(), contract.settings
    tables = [spec["shape"] for spec in contract.inputs[1:]]
    contract.document("layer_scale_init", "drop_path_rate", "layout")
    contract.require_text(norm=r"GroupNorm ?\(1( group)?\).* eps 1e-0?5")
    reducer = next((value for name, value in state.items() if name.endswith("sr.0.conv.weight")), None)
    reduction = 1 if reducer is None else reducer.shape[-1] - 3
    if "weight" in state:
        groups, dim, kernel_size = state["weight"].shape[:3]
        squeeze, biased = dim // len(state["proj.0.conv.weight"]), "bias" in state
        contract.require(dim=dim, kernel_size=kernel_size, groups=groups, reduction=squeeze, bias=biased)
        return loaded(IDConv(dim, kernel_size, groups, squeeze, biased), state)
    attention = any(name in state for name in ("kv.weight", "local_unit.weight", "token_mixer.local_unit.weight"))
    heads = settings.get("heads", tables[0][1] if tables else 1) if attention else 0
    if attention:
        contract.require(sr_ratio=reduction, **({"heads": tables[0][1]} if tables else {}))
    if "kv.weight" in state:
        dim = len(state["q.weight"])
        contract.require(dim=dim)
        return loaded(OverlappingReductionAttention(dim, heads, reduction), state)
    for place in ("", "token_mixer."):
        if f"{place}local_unit.weight" not in state:
            continue
        groups, half, kernel_size = state[f"{place}local_unit.weight"].shape[:3]
        contract.require(dim=2 * half, kernel_size=kernel_size, groups=groups)
        # several reductions lead to one width, and a width that differs from the state's does not load
        mixer = DMixer(2 * half, kernel_size, groups, heads, reduction, settings.get("reduction", 8))
        contract.document("reduction")
        if not place:
            return loaded(mixer, state)
        expansion = ratio(len(state["mlp.norm.weight"]), 2 * half)
        contract.require(mlp_ratio=expansion)
        return loaded(TransXBlock(2 * half, mixer, expansion, 1e-5, 0.0, 0.0), state)
    if "fc1.0.weight" in state:
        hidden, dim = state["fc1.0.weight"].shape[:2]
        sizes = tuple(v.shape[-1] for name, v in state.items() if name.startswith("dwconv.") and v.ndim == 4)
        contract.require(dim=dim, hidden=hidden, scales=sizes)
        return loaded(MultiScaleFFN(dim, hidden, sizes), state)
    found = TransXNet.published_settings(TransXNet.published_state(state))
    contract.require(**{name: value for name, value in found.items() if name != "feature_norms"})
    contract.require(
        idconv_kernel=found["kernel_size"],
        idconv_groups=found["groups"],
        heads=found["num_heads"],
        position_table_image_size=found["table_size"],
        fork_feat=found["feature_norms"],
    )
    contract.require_text(stem=r"7x7 stride 4 pad 3 \+ BN", downsample=r"3x3 stride 2 pad 1 \+ BN")
    return TransXNet.from_published(state).contract_form(contract)
