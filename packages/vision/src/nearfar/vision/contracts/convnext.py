"""Contracts of ConvNeXt: any published variant from its settings and shapes."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nearfar.core.checkpoints import loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.core.errors import CheckpointError
from nearfar.ops.common.layers import ChannelNorm
from nearfar.ops.convolution.convnext import ConvNeXtBlock
from nearfar.vision.models.convnext import ConvNeXt


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one norm, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(output_stride=32)
    contract.document("layer_scale_init", "drop_path_rate", "layout")
    if state.keys() == {"weight", "bias"}:
        dim = len(state["weight"])
        contract.require(dim=dim)
        norm = ChannelNorm(dim) if contract.inputs[0]["shape"][1] == dim else nn.LayerNorm(dim, eps=1e-6)
        return loaded(with_eps(norm, settings), state)
    place = "stages.0.blocks.0."
    block = ConvNeXt.published_state({place + name: value for name, value in state.items()})
    block = {name.removeprefix(place): value for name, value in block.items()}
    if "dwconv.weight" in block:
        dim, _, *kernel = block["dwconv.weight"].shape
        scale = 1e-6 if "gamma" in block else None
        expansion = ratio(len(block["pwconv1.bias"]), dim)
        contract.require(dim=dim, kernel_size=kernel[0], mlp_ratio=expansion, conv_mlp=block["pwconv1.weight"].ndim > 2)
        contract.require_text(input="NCHW.*", layer_scale="(?!none).+" if scale else "none")
        operator = ConvNeXtBlock(dim, kernel[0], expansion, scale, dims=len(kernel))
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
    try:
        found = ConvNeXt.published_settings(renamed)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{contract.path}: is no checkpoint of ConvNeXt (no {error})") from error
    size, (depth, dim) = found["patch_size"], (found["depths"][0], found["dims"][0])
    contract.require(**{name: found[name] for name in found if name not in ("layer_scale", "feature_norms")})
    contract.require(patch=size, depth=depth, dim=dim)
    contract.require(conv_mlp=renamed["stages.0.blocks.0.pwconv1.weight"].ndim > 2)
    stem = rf"(?!{size}x{size}).*3x3.*" if found["stem_dim"] else rf"{size}x{size} stride {size} conv.*"
    contract.require_text(stem=stem, layer_scale="(?!none).+" if found["layer_scale"] else "none")
    return with_eps(ConvNeXt.from_published(state), settings).contract_form(contract, normed)


def with_eps(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """`model` with the eps that a contract's settings give its norms."""
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm) and norm.eps == 1e-6:
            norm.eps = settings.get("norm_eps", norm.eps)
    if isinstance(model, ConvNeXt) and "final_norm_eps" in settings:
        model.head.norm.eps = settings["final_norm_eps"]
    return model
