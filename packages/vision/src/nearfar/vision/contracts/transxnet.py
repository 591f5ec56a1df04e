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
    heads = settings.get("heads", tables[0][1] if tables else 1)
    reducer = next((value for name, value in state.items() if name.endswith("sr.0.conv.weight")), None)
    reduction = 1 if reducer is None else reducer.shape[-1] - 3
    if "weight" in state:
        groups, dim, kernel_size = state["weight"].shape[:3]
        squeeze = dim // len(state["proj.0.conv.weight"])
        return loaded(IDConv(dim, kernel_size, groups, squeeze, "bias" in state), state)
    if "kv.weight" in state:
        dim = len(state["q.weight"])
        return loaded(OverlappingReductionAttention(dim, heads, reduction), state)
    for place in ("", "token_mixer."):
        if f"{place}local_unit.weight" not in state:
            continue
        groups, half, kernel_size = state[f"{place}local_unit.weight"].shape[:3]
        mixer = DMixer(2 * half, kernel_size, groups, heads, reduction, settings.get("reduction", 8))
        if not place:
            return loaded(mixer, state)
        expansion = ratio(len(state["mlp.norm.weight"]), 2 * half)
        return loaded(TransXBlock(2 * half, mixer, expansion, 1e-5, 0.0, 0.0), state)
    if "fc1.0.weight" in state:
        hidden, dim = state["fc1.0.weight"].shape[:2]
        sizes = tuple(v.shape[-1] for name, v in state.items() if name.startswith("dwconv.") and v.ndim == 4)
        return loaded(MultiScaleFFN(dim, hidden, sizes), state)
    return TransXNet.from_published(state).contract_form(contract)
