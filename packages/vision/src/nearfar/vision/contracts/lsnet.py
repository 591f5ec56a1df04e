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
    if not state:
        return SmallKernelAggregation()
    if "attention_biases" in state:
        heads, offsets = state["attention_biases"].shape
        dim = state["qkv.c.weight"].shape[1]
        key_dim = (len(state["qkv.c.weight"]) - dim) // (2 * heads)
        operator = OffsetBiasAttention(dim, heads, key_dim, math.isqrt(offsets))
        return loaded(operator, state, (r"attention_bias_idxs$",))
    if "conv1.c.weight" in state:
        return loaded(RepVGGDepthwise(len(state["conv1.c.weight"])), state)
    for prefix, operator_class in (("lkp.", LSConv), ("", LargeKernelPerception)):
        if f"{prefix}cv1.c.weight" in state:
            dim = state[f"{prefix}cv1.c.weight"].shape[1]
            kernels = _kernel_shape(state, prefix, dim) | given
            large = state[f"{prefix}cv2.c.weight"].shape[-1]
            return loaded(operator_class(dim, large, kernels["small_kernel"], kernels["share"]), state)
    if "ffn.m.pw1.c.weight" in state:
        return block_contract(state, given)
    return LSNet.from_published(state, **given).contract_form(contract)


def block_contract(state: Mapping[str, Tensor], given: Mapping[str, int]) -> nn.Module:
    """One block with its published state."""
    place = "stages.0.blocks.0."
    renamed = LSNet.published_state({place + name: value for name, value in state.items()})
    block = {name.removeprefix(place): value for name, value in renamed.items()}
    dim, attention, kernels = block["ffn.pw1.c.weight"].shape[1], None, {}
    if "mixer.attention_biases" in block:
        heads, offsets = block["mixer.attention_biases"].shape
        key_dim = (len(block["mixer.qkv.c.weight"]) - dim) // (2 * heads)
        attention = OffsetBiasAttention(dim, heads, key_dim, math.isqrt(offsets))
    elif "mixer.lkp.cv2.c.weight" in block:
        kernels = {"large_kernel": block["mixer.lkp.cv2.c.weight"].shape[-1], **_kernel_shape(block, "mixer.lkp.", dim)}
    operator = LSBlock(dim, int("se.fc1.weight" not in block), attention, **kernels | given)
    return loaded(operator, block, LSNet.IGNORE)
