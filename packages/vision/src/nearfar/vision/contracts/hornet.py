"""Contracts of HorNet: any published variant from its settings and shapes."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from nearfar.core.checkpoints import count, loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.ops.convolution.gnconv import GnConv
from nearfar.ops.spectral.global_filter import GlobalLocalFilter
from nearfar.vision.models.hornet import HorBlock, HorNet


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block, gnConv or filter, that a contract describes."""
    state = contract.state()
    contract.require(norm_eps=1e-6)
    scale = float(Fraction(contract.settings.get("scale", "1" if "proj_in.weight" in state else "1/3")))
    if "complex_weight" in state:
        half, height, width, _ = state["complex_weight"].shape
        return loaded(GlobalLocalFilter(2 * half, height, width), state)
    if "proj_in.weight" in state:
        filter, kernel = state.get("dwconv.complex_weight"), state.get("dwconv.weight")
        twice, in_dim = state["proj_in.weight"].shape[:2]
        operator = GnConv(
            twice // 2,
            count(state, r"pws\.(\d+)\.") + 1,
            7 if kernel is None else kernel.shape[-1],
            scale,
            None if filter is None else lambda channels: GlobalLocalFilter(channels, *filter.shape[1:3]),
            in_dim=in_dim,
            out_dim=len(state["proj_out.bias"]) if "proj_out.bias" in state else 0,
        )
        return loaded(operator, state)
    if "gnconv.proj_in.weight" in state:
        dim, filter = len(state["norm1.weight"]), state.get("gnconv.dwconv.complex_weight")
        block = HorBlock(
            dim,
            count(state, r"gnconv\.pws\.(\d+)\.") + 1,
            None if filter is None else tuple(filter.shape[1:3]),
            scale=scale,
            mlp_ratio=ratio(len(state["pwconv1.bias"]), dim),
            layer_scale=1e-6 if "gamma1" in state else None,
        )
        return loaded(block, state)
    return HorNet.from_published(state, scale=scale).contract_form(contract)
