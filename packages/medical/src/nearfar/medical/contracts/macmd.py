"""Contracts of MACMD: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import count, loaded, rename
from nearfar.core.contracts import Contract
from nearfar.medical.models.macmd import (
    _BOTTLENECK,
    _DILATED,
    _FUSION,
    _GATE,
    _MIX,
    _POOL,
    _UP,
    DILATIONS,
    MACMD,
    FeatureFusion,
    UpBlock,
)
from nearfar.ops.aggregation.attention_pooling import AttentionPooledModulation
from nearfar.ops.convolution.multi_dilated import ContextGate, EfficientAttention, MultiDilatedConv
from nearfar.ops.tokens.channel_mixer import CrossScaleMix


class _Published(nn.Module):
    def __init__(self, model: MACMD) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.every(x)


class _ManyInputs(nn.Module):
    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *maps: Tensor) -> Any:
        return self.operator(list(maps))


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network or the operator that a contract describes."""
    settings, state = contract.settings, contract.state()
    named = lambda rules: rename(state, rules, anywhere=True)  # noqa: E731
    dilations = settings.get("dilations") or settings.get("hd_dilations") or DILATIONS
    contract.require(shift_pixel=1, skip=False)
    if "out_head.weight" in state:
        model = MACMD.from_published(state, dilations=dilations)
        return model if contract.outputs[0]["name"] == "out" else _Published(model).eval()
    if "dilation_1.weight" in state:
        dim, kernel = len(state["dilation_1.bias"]), state["dilation_1.weight"].shape[-1]
        return loaded(MultiDilatedConv(dim, kernel, dilations), named(_DILATED))
    if "psi.0.weight" in state:
        return loaded(ContextGate(state["psi.0.weight"].shape[1], dilations=dilations), named(_GATE))
    if "ca.fc.0.weight" in state:
        hidden, dim = state["ca.fc.0.weight"].shape
        return loaded(EfficientAttention(dim, dim // hidden, dilations), named(_BOTTLENECK))
    if "modulation_proj.0.weight" in state:
        projections = count(state, r"channel_proj\.(\d)\.")
        channels = [state[f"channel_proj.{i}.0.weight"].shape[1] for i in range(projections)]
        dim, hidden = len(state["modulation_proj.0.weight"]), len(state["attention_proj.0.bias"])
        return _ManyInputs(loaded(AttentionPooledModulation(channels, dim, dim // hidden), named(_POOL))).eval()
    if "projections.0.weight" in state:
        contract.require(target_size=contract.inputs[-1]["shape"][-1])
        channels = [state[f"projections.{i}.weight"].shape[1] for i in range(count(state, r"projections\.(\d)\."))]
        dim, width = len(state["projections.0.bias"]), len(state["ln1.bias"])
        rate, share = len(state["channel.key_norm.bias"]) // width, settings.get("channel_gamma", 0.25)
        state = {name: value.flatten() if "spatial_mix" in name else value for name, value in state.items()}
        return _ManyInputs(loaded(CrossScaleMix(channels, dim, rate, share), named(_MIX))).eval()
    if "fusion_conv.weight" in state:
        out, joined = state["fusion_conv.weight"].shape[:2]
        parts = len(contract.inputs)
        hidden = len(state["channel_attention.fc.0.weight"])
        return loaded(FeatureFusion(joined // parts, out, parts, out // hidden), named(_FUSION))
    out, in_channels = state["proj.conv.weight"].shape[:2]
    state = {k: v for k, v in state.items() if not k.startswith("ln1.")}
    return loaded(UpBlock(in_channels, out, state["conv_local.conv.weight"].shape[-1]), named(_UP))
