"""Contracts of HorNet: any published variant from its settings and shapes."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from nearfar.core.checkpoints import count, loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.convolution.gnconv import GnConv
from nearfar.ops.spectral.global_filter import GlobalLocalFilter
from nearfar.vision.models.hornet import HorBlock, HorNet


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block, gnConv or filter, that a contract describes."""
    state = contract.state()
    contract.require(norm_eps=1e-6)
    contract.document("layer_scale_init", "drop_path_rate", "layout")
    scale = float(Fraction(contract.settings.get("scale", "1" if "proj_in.weight" in state else "1/3")))
    if "complex_weight" in state:
        half, height, width, _ = state["complex_weight"].shape
        contract.require(dim=2 * half, h=height, w=width)
        return loaded(GlobalLocalFilter(2 * half, height, width), state)
    if "proj_in.weight" in state:
        filter, kernel = state.get("dwconv.complex_weight"), state.get("dwconv.weight")
        twice, in_dim = state["proj_in.weight"].shape[:2]
        order, taps = count(state, r"pws\.(\d+)\.") + 1, 7 if kernel is None else kernel.shape[-1]
        contract.require(dim=twice // 2, order=order)
        contract.require_text(dwconv=described(None if filter is None else filter.shape[1:3], taps))
        operator = GnConv(
            twice // 2,
            order,
            taps,
            scale,
            None if filter is None else lambda channels: GlobalLocalFilter(channels, *filter.shape[1:3]),
            in_dim=in_dim,
            out_dim=len(state["proj_out.bias"]) if "proj_out.bias" in state else 0,
        )
        return loaded(operator, state)
    if "gnconv.proj_in.weight" in state:
        dim, filter = len(state["norm1.weight"]), state.get("gnconv.dwconv.complex_weight")
        order, size = count(state, r"gnconv\.pws\.(\d+)\.") + 1, None if filter is None else tuple(filter.shape[1:3])
        hidden = len(state["pwconv1.bias"])
        given = contract.settings.get("mlp_ratio", 0)  # several ratios give one width
        expansion = given if int(given * dim) == hidden else ratio(hidden, dim)
        contract.require(dim=dim, order=order, mlp_ratio=expansion)
        contract.require_text(dwconv=described(size))
        block = HorBlock(
            dim,
            order,
            size,
            scale=scale,
            mlp_ratio=expansion,
            layer_scale=1e-6 if "gamma1" in state else None,
        )
        return loaded(block, state)
    found = HorNet.published_settings(HorNet.published_state(state))
    contract.require(**{name: found[name] for name in found if name not in ("layer_scale", "feature_norms")})
    contract.require(base_dim=found["dims"][0])
    if isinstance(words := contract.settings.get("dwconv"), list):
        for word, size in zip(words, found["filters"], strict=False):
            if len(words) != len(found["filters"]) or not re.fullmatch(described(size), str(word)):
                raise UserError(f"{contract.path}: dwconv is {words}; the state's filters are {found['filters']}")
    return HorNet.from_published(state, scale=scale).contract_form(contract)


def described(size: Sequence[int] | None, taps: int = 7) -> str:
    """How contracts put a gnConv's filter in words: the depthwise kernel, or the global-local filter of a size."""
    return rf"{taps}x{taps}\b.*" if size is None else rf"global-local filter h={size[0]} w={size[1]}\b.*"
