"""Contracts of ConvNeXt: any published variant from its settings and shapes."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nearfar.core.checkpoints import loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.ops.common.layers import ChannelNorm
from nearfar.ops.convolution.convnext import ConvNeXtBlock
from nearfar.vision.models.convnext import ConvNeXt


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one norm, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(output_stride=32)
    if state.keys() == {"weight", "bias"}:
        dim = len(state["weight"])
        norm = ChannelNorm(dim) if contract.inputs[0]["shape"][1] == dim else nn.LayerNorm(dim, eps=1e-6)
        return loaded(with_eps(norm, settings), state)
    place = "stages.0.blocks.0."
    block = ConvNeXt.published_state({place + name: value for name, value in state.items()})
    block = {name.removeprefix(place): value for name, value in block.items()}
    if "dwconv.weight" in block:
        dim, _, *kernel = block["dwconv.weight"].shape
        scale = 1e-6 if "gamma" in block else None
        operator = ConvNeXtBlock(dim, kernel[0], ratio(len(block["pwconv1.bias"]), dim), scale, dims=len(kernel))
        return loaded(with_eps(operator, settings), block)
    # feature extractors have no head, and transformers' a norm for each level that they give
    renamed = ConvNeXt.published_state(state)
    normed = [int(name.split(".")[1]) for name in renamed if re.match(r"feature_norms\.\d+\.weight", name)]
    first = re.compile(r"stages\.\d+\.blocks\.0\.norm\.weight")
    dims = [len(value) for name, value in renamed.items() if first.fullmatch(name)]
    norms = {f"feature_norms.{i}": dim for i, dim in enumerate(dims)}
    for name, dim in norms.items() if normed else zip(["head.norm"], dims[-1:], strict=False):
        if f"{name}.weight" not in renamed:
            state |= {f"{name}.weight": torch.ones(dim), f"{name}.bias": torch.zeros(dim)}
    return with_eps(ConvNeXt.from_published(state), settings).contract_form(contract, normed)


def with_eps(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """`model` with the eps that a contract's settings give its norms."""
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm) and norm.eps == 1e-6:
            norm.eps = settings.get("norm_eps", norm.eps)
    if isinstance(model, ConvNeXt) and "final_norm_eps" in settings:
        model.head.norm.eps = settings["final_norm_eps"]
    return model
