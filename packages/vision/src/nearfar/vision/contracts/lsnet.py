"""Contracts of LSNet: any published variant from its settings and shapes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.ops.attention.offset_bias import OffsetBiasAttention
from nearfar.ops.convolution.dynamic import position_depthwise
from nearfar.ops.convolution.lsconv import LargeKernelPerception, LSConv, RepVGGDepthwise
from nearfar.vision.models.lsnet import LSBlock, LSNet, _kernel_shape


class SmallKernelAggregation(nn.Module):
    """`position_depthwise` as a module without parameters."""

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        return position_depthwise(x, kernel)


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one operator, that a contract describes."""
    state, settings = contract.state(), contract.settings
    named = {"small_kernel": "small_kernel", "share": "share", "channels_per_kernel_share": "share"}
    given = {ours: settings[name] for name, ours in named.items() if name in settings}
    contract.document("layout")
    if not state:
        x, kernels = (spec["shape"] for spec in contract.inputs)
        size = math.isqrt(kernels[2]) if len(kernels) == 5 else None
        contract.require(channels=x[1], kernels=kernels[1], **({"small_kernel": size} if size else {}))
        contract.require_text(channel_to_kernel=f"c mod {kernels[1]}")
        return SmallKernelAggregation()
    if "attention_biases" in state:
        heads, offsets = state["attention_biases"].shape
        dim = state["qkv.c.weight"].shape[1]
        key_dim = (len(state["qkv.c.weight"]) - dim) // (2 * heads)
        side = math.isqrt(offsets)
        contract.require(dim=dim, heads=heads, key_dim=key_dim, value_dim_per_head=dim // heads, resolution=side)
        return loaded(OffsetBiasAttention(dim, heads, key_dim, side), state, (r"attention_bias_idxs$",))
    if "conv1.c.weight" in state:
        contract.require(dim=len(state["conv1.c.weight"]))
        return loaded(RepVGGDepthwise(len(state["conv1.c.weight"])), state)
    for prefix, operator_class in (("lkp.", LSConv), ("", LargeKernelPerception)):
        if f"{prefix}cv1.c.weight" in state:
            dim = state[f"{prefix}cv1.c.weight"].shape[1]
            kernels = _kernel_shape(state, prefix, dim) | given
            large = state[f"{prefix}cv2.c.weight"].shape[-1]
            contract.require(dim=dim, large_kernel=large)
            return loaded(operator_class(dim, large, kernels["small_kernel"], kernels["share"]), state)
    if "ffn.m.pw1.c.weight" in state:
        return block_contract(contract, state, given)
    found = LSNet.published_settings(LSNet.published_state(state))
    contract.require(**{name: found[name] for name in found if name not in named.values()})
    contract.require(distillation_head=found["distillation"], image_size=contract.inputs[0]["shape"][-1], ffn_ratio=2)
    if "num_heads" in found:
        contract.require(
            heads_last_stage=found["num_heads"], value_dim_per_head=found["dims"][-1] // found["num_heads"]
        )
    return LSNet.from_published(state, **given).contract_form(contract)


def block_contract(contract: Contract, state: Mapping[str, Tensor], given: Mapping[str, int]) -> nn.Module:
    """One block with its published state."""
    place = "stages.0.blocks.0."
    renamed = LSNet.published_state({place + name: value for name, value in state.items()})
    block = {name.removeprefix(place): value for name, value in renamed.items()}
    dim, attention, kernels = block["ffn.pw1.c.weight"].shape[1], None, {}
    if "mixer.attention_biases" in block:
        heads, offsets = block["mixer.attention_biases"].shape
        key_dim = (len(block["mixer.qkv.c.weight"]) - dim) // (2 * heads)
        attention = OffsetBiasAttention(dim, heads, key_dim, math.isqrt(offsets))
        contract.require(heads=heads, key_dim=key_dim, resolution=math.isqrt(offsets))
    elif "mixer.lkp.cv2.c.weight" in block:
        kernels = {"large_kernel": block["mixer.lkp.cv2.c.weight"].shape[-1], **_kernel_shape(block, "mixer.lkp.", dim)}
        contract.require(large_kernel=kernels["large_kernel"])
    contract.require(dim=dim, ffn_ratio=2)
    operator = LSBlock(dim, int("se.fc1.weight" not in block), attention, **kernels | given)
    return loaded(operator, block, LSNet.IGNORE)
