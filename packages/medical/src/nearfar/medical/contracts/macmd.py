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
    contract.document("layout")
    contract.require(shift_pixel=1, skip=False, spatial_kernel=7, hd_groups=4, groups=4)
    if "out_head.weight" in state:
        _, channels, _, size = contract.inputs[0]["shape"]
        model = MACMD.from_published(state, in_channels=channels, dilations=dilations)
        contract.require(in_channels=channels, img_size=size)
        require_network(contract, model)
        return model if contract.outputs[0]["name"] == "out" else _Published(model).eval()
    if "dilation_1.weight" in state:
        dim, kernel = len(state["dilation_1.bias"]), state["dilation_1.weight"].shape[-1]
        contract.require(in_channels=dim, out_channels=dim, kernel=kernel, bias=True)
        return loaded(MultiDilatedConv(dim, kernel, dilations), named(_DILATED))
    if "psi.0.weight" in state:
        contract.require(channels=state["psi.0.weight"].shape[1])
        return loaded(ContextGate(state["psi.0.weight"].shape[1], dilations=dilations), named(_GATE))
    if "ca.fc.0.weight" in state:
        hidden, dim = state["ca.fc.0.weight"].shape
        contract.require(channels=dim, reduction=dim // hidden)
        return loaded(EfficientAttention(dim, dim // hidden, dilations), named(_BOTTLENECK))
    if "modulation_proj.0.weight" in state:
        projections = count(state, r"channel_proj\.(\d)\.")
        channels = [state[f"channel_proj.{i}.0.weight"].shape[1] for i in range(projections)]
        dim, hidden = len(state["modulation_proj.0.weight"]), len(state["attention_proj.0.bias"])
        contract.require(in_channels=channels, out_channels=dim)
        return _ManyInputs(loaded(AttentionPooledModulation(channels, dim, dim // hidden), named(_POOL))).eval()
    if "projections.0.weight" in state:
        contract.require(target_size=contract.inputs[-1]["shape"][-1])
        channels = [state[f"projections.{i}.weight"].shape[1] for i in range(count(state, r"projections\.(\d)\."))]
        dim, width = len(state["projections.0.bias"]), len(state["ln1.bias"])
        rate, share = len(state["channel.key_norm.bias"]) // width, settings.get("channel_gamma", 0.25)
        contract.require(in_dims=channels, target_dim=dim, hidden_rate=rate)
        state = {name: value.flatten() if "spatial_mix" in name else value for name, value in state.items()}
        return _ManyInputs(loaded(CrossScaleMix(channels, dim, rate, share), named(_MIX))).eval()
    if "fusion_conv.weight" in state:
        out, joined = state["fusion_conv.weight"].shape[:2]
        parts = len(contract.inputs)
        hidden = len(state["channel_attention.fc.0.weight"])
        contract.require(in_channels=joined // parts, out_channels=out, reduction=out // hidden)
        return loaded(FeatureFusion(joined // parts, out, parts, out // hidden), named(_FUSION))
    out, in_channels = state["proj.conv.weight"].shape[:2]
    state = {k: v for k, v in state.items() if not k.startswith("ln1.")}
    taps, wide = state["conv_local.conv.weight"].shape[-1], len(state["conv_local.conv.weight"])
    contract.require(dim_in=in_channels, dim_out=out, dw_kernel=taps, exp_ratio=wide // in_channels)
    return loaded(UpBlock(in_channels, out, taps), named(_UP))


def require_network(contract: Contract, model: MACMD) -> None:
    """Hold the settings of a whole network against what is built."""
    decoder, encoder = model.decoder, model.encoder
    channels = [encoder.feature_info.channels()[i] for i in model.keep]
    contract.require_text(encoder=model.encoder_name.replace("_", "[-_ ]?").replace("resnet", "resnet[-_ ]?"))
    contract.require(
        embed_dims=channels,
        n_classes=model.heads[0].out_channels,
        decoder_out=model.heads[0].in_channels,
        up_dw_kernel=decoder.ups[0].local.conv.kernel_size[0],
        ccm_hidden_rate=decoder.mix.mix.key_norm.normalized_shape[0] // decoder.mix.norm.normalized_shape[0],
    )
    if model.encoder_name.startswith("pvt"):
        stages = [getattr(encoder, f"stages_{i}").blocks for i in range(4)]
        widths = zip(stages, channels, strict=True)
        contract.require(
            enc_depths=[len(blocks) for blocks in stages],
            enc_heads=[blocks[0].attn.num_heads for blocks in stages],
            enc_mlp_ratios=[blocks[0].mlp.fc1.out_features / width for blocks, width in widths],
            enc_sr_ratios=[blocks[0].attn.sr.kernel_size[0] if blocks[0].attn.sr else 1 for blocks in stages],
        )
    else:
        contract.require(enc_depths=[len(getattr(encoder, f"layer{i}")) for i in range(1, 5)])
