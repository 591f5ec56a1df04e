"""Contracts of OverLoCK: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from nearfar.core.checkpoints import loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.ops.common.layers import LayerScale
from nearfar.ops.convolution.contmix import ChannelGate, ContMixBlock, GlobalResponseNorm, RepConvBlock
from nearfar.ops.convolution.reparam import BRANCHES, DilatedReparam, ResidualDepthwise
from nearfar.vision.models.overlock import FocusBlock, OverLoCK


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one part of it, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(norm_eps=1e-6, bn_eps=1e-5, key_pool=7)
    contract.document("layer_scale_init", "drop_path_rate", "layout")
    res_scale = settings.get("res_scale", True)
    if "lk_origin.weight" in state:
        dim, _, kernel = state["lk_origin.weight"].shape[:3]
        merged = "lk_origin.bias" in state
        branches = BRANCHES.get(kernel, ())
        contract.require(channels=dim, dim=dim, kernel_size=kernel, reparameterised=merged)
        contract.require(branch_kernels=[k for k, _ in branches], branch_dilations=[d for _, d in branches])
        return loaded(DilatedReparam(dim, kernel, merged), state)
    if "rpb2" in state:
        heads, table = state["rpb2"].shape[0] // 2, state["rpb2"].shape[-1]
        small = (state["rpb1"].shape[-1] + 1) // 2
        both, dim = len(state["norm1.weight"]), state["weight_query.0.weight"].shape[1]
        scale = 1.0 if "ls1.weight" in state else None
        merged = "lepe.0.origin_bn.weight" not in state
        shape: dict[str, Any] = {"kernel_size": (table + 1) // 2, "small_kernel": small, "num_heads": heads}
        shape |= {"mlp_ratio": ratio(len(state["mlp.2.weight"]), dim), "layer_scale": scale}
        shape |= {"res_scale": res_scale, "merged": merged}
        contract.require(dim=dim, real_heads=2 * heads, heads_argument=heads, reparameterised=merged)
        contract.require(**{name: shape[name] for name in ("kernel_size", "small_kernel", "mlp_ratio")})
        if "weight_value.0.weight" in state:
            return loaded(ContMixBlock(dim, **shape), state)
        last = len(contract.outputs) == 1
        first = "x_scale.weight" not in state
        contract.require(context_channels=both - dim, ctx_dim_argument=4 * (both - dim), is_first=first, is_last=last)
        block = FocusBlock(dim, both - dim, **shape, first=first, last=last)
        return loaded(block, state)
    if "proj.1.lk_origin.weight" in state:
        dim, _, kernel = state["proj.1.lk_origin.weight"].shape[:3]
        scale = 1.0 if "ls.weight" in state else None
        merged = "proj.1.origin_bn.weight" not in state
        expansion = ratio(len(state["proj.6.weight"]), dim)
        contract.require(dim=dim, kernel_size=kernel, mlp_ratio=expansion, reparameterised=merged)
        if scale is None:
            contract.document("res_scale")  # it says where the layer scale stands
        return loaded(RepConvBlock(dim, kernel, expansion, scale, 0.0, res_scale, merged), state)
    if "proj.3.weight" in state:
        contract.require(dim=len(state["proj.3.weight"]), channels=len(state["proj.3.weight"]))
        return loaded(ChannelGate(len(state["proj.3.weight"])), state)
    if "gamma" in state:
        contract.require(dim=state["gamma"].numel(), channels=state["gamma"].numel())
        return loaded(GlobalResponseNorm(state["gamma"].numel()), state)
    if "weight" in state:
        dim, *_, kernel = state["weight"].shape
        contract.require(dim=dim, channels=dim, kernel_size=kernel)
        return loaded(LayerScale(dim) if kernel == 1 else ResidualDepthwise(dim, kernel), state)
    found = OverLoCK.published_settings(OverLoCK.published_state(state))
    contract.require(**{name: found[name] for name in found if name not in ("layer_scales", "feature_norms", "depths")})
    contract.require(
        depths=found["depths"],
        base_and_overview_depths=found["depths"],
        real_heads=[2 * heads for heads in found["focus_heads"]],
        head_projection=found["head_dim"],
        reparameterised=found["merged"],
    )
    return OverLoCK.from_published(state, res_scale=res_scale).contract_form(contract)
