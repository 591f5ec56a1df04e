"""Contracts of MossFormer: any published variant from its settings and shapes."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.audio.separation.mossformer import MossFormer, _detect_recurrent, detect, published_state
from nearfar.audio.separation.pit import pit_si_sdr
from nearfar.core.checkpoints import load_state_dict
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.joint import GatedAttentionBlock, JointAttention
from nearfar.ops.recurrence.fsmn import DilatedDenseFSMN, GatedFSMN


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The operator, block or model that a contract describes, with the contract's state."""
    settings, variant = contract.settings, contract.variant
    contract.document("dropout", "sample_rate", "layout")
    scale_norm, layer_norm = r"ScaleNorm eps 1e-0?5", r"LayerNorm.* eps 1e-0?5"
    contract.require_text(
        block_norm=scale_norm,
        outer_norm=r"GroupNorm\(1\) eps 1e-0?8",
        final_block_norm=r"LayerNorm eps 1e-0?6",
        recurrent_norm=r"channel LayerNorm eps 1e-0?5|LayerNorm over channels eps 1e-0?5",
        unit_norm=layer_norm,
        channel_norm=layer_norm,
        mask_activation="ReLU",
        prelu="bottleneck: one slope; FSMN: one slope per channel",
    )
    block = {
        "group_size": settings.get("group_size", 256),
        "rotary_dim": settings.get("rotary_dim", 32),
        "theta": float(settings.get("rotary_theta", 10000.0)),
    }
    causal = "attention" if settings.get("causal", variant.endswith("-causal")) else False
    if variant.startswith("op-si-snr-pit"):
        contract.require(zero_mean=True, eps=1e-8, num_speakers=contract.inputs[0]["shape"][-1])
        speakers = contract.inputs[0]["shape"][-1]
        moved = [*range(1, speakers), 0]
        return _PermutedPit(
            settings.get("estimate", f"target[..., {moved}] * linspace(0.4, 1.2, {speakers}) + 0.5 * noise + 0.1")
        )
    if variant.startswith("op-joint-attention"):
        shapes = {spec["name"]: spec["shape"] for spec in contract.inputs}
        contract.require(query_key_dim=shapes["quad_q"][-1], value_dim=shapes["v"][-1])
        return _TwoStreams(JointAttention(**block, causal=bool(causal))).eval()
    if not variant.startswith("op-"):
        contract.require(token_shift=True, rotary_dim=32, rotary_theta=10000)
        _, found = detect(published_state(contract.state()))
        contract.require(
            num_speakers=found["num_speakers"],
            encoder_kernel=found["kernel_size"],
            encoder_stride=found["kernel_size"] // 2,
            encoder_filters=found["num_filters"],
            model_dim=found["dim"],
            num_blocks=found["depth"],
            query_key_dim=found["query_key_dim"],
            expansion_factor=found["expansion_factor"],
            depthwise_kernel=found["conv_kernel_size"],
        )
        _require_memory(contract, found)
        model = MossFormer.from_published(
            contract.state(),
            sample_rate=settings.get("sample_rate", 8000),
            masking=not _maps(contract),
            group_size=block["group_size"],
            causal=causal,
        )
        return _AsReleased(model, contract.outputs).eval()
    if variant.startswith("op-dilated-dense-fsmn"):
        inside = "gated_fsmn.fsmn.conv."  # where such a net stands in the published models
        state = published_state({inside + name: value for name, value in contract.state().items()})
        state = {name.removeprefix("fsmn.memory."): value for name, value in state.items()}
        channels, _, taps = state["convs.0"].shape
        depth = sum(name.startswith("convs.") for name in state)
        contract.require(dilations=[2**i for i in range(depth)], depth=depth, channels=channels, groups=channels)
        contract.require(order=(taps + 1) // 2, taps=taps)
        contract.require_text(norm=r"InstanceNorm affine eps 1e-0?5", activation="PReLU per channel")
        net = DilatedDenseFSMN(channels, (taps + 1) // 2, depth)
        load_state_dict(net, state)
        return _AsPicture(net).eval()
    state = published_state(contract.state())
    if variant.startswith("op-gated-fsmn"):
        dim = state["reduce.weight"].shape[1]
        found = _detect_recurrent(state, "")
        _require_memory(contract, found)
        contract.require(dim=dim, inner_channels=found["inner"], depthwise_kernel=state["u.depthwise"].shape[1])
        module: nn.Module = GatedFSMN(
            dim,
            found["inner"],
            found["order"],
            found["fsmn_depth"],
            found["hidden"],
            kernel_size=state["u.depthwise"].shape[1],
        )
    elif variant.startswith("op-block"):
        dim = state["to_out.linear.weight"].shape[0]
        contract.require(dim=dim, query_key_dim=state["gamma"].shape[1])
        contract.require(expansion_factor=state["to_hidden.linear.weight"].shape[0] / dim)
        contract.require(depthwise_kernel=state["to_hidden.depthwise"].shape[1])
        contract.require_text(norm=scale_norm)
        module = GatedAttentionBlock(
            dim,
            query_key_dim=state["gamma"].shape[1],
            expansion_factor=state["to_hidden.linear.weight"].shape[0] / dim,
            kernel_size=state["to_hidden.depthwise"].shape[1],
            shift=settings.get("token_shift", True),
            causal=causal,
            **block,
        )
    else:
        raise UserError(f"{contract.path}: no MossFormer operator is called {variant}")
    load_state_dict(module, state)
    return module.eval()


def _require_memory(contract: Contract, found: Mapping[str, Any]) -> None:
    """Hold the settings of the recurrent blocks, where there are any, against the shapes."""
    if "fsmn_depth" not in found:
        return
    contract.require(
        recurrent_inner_channels=found["inner"],
        fsmn_hidden=found["hidden"],
        fsmn_order=found["order"],
        fsmn_taps=2 * found["order"] - 1,
        fsmn_depth=found["fsmn_depth"],
        fsmn_dilations=[2**i for i in range(found["fsmn_depth"])],
    )


def _maps(contract: Contract) -> bool:
    """Whether the net's output is decoded itself: as a setting says in one word or another, else as the name does."""
    settings = contract.settings
    for name in settings:
        value = settings.values_by_name[name]
        if isinstance(value, bool) and ("mapping" in name or re.search("(skip|no|without)_mask", name)):
            return settings[name]
        if isinstance(value, bool) and "mask" in name:
            return not settings[name]
        if value in ("mapping", "masking"):
            return settings[name] == "mapping"
    return any(word in contract.variant for word in ("mapping", "whamr"))


class _TwoStreams(nn.Module):
    """Joint attention with its two value streams apart."""

    def __init__(self, attention: JointAttention):
        super().__init__()
        self.attention = attention

    def forward(self, quad_q: Tensor, lin_q: Tensor, quad_k: Tensor, lin_k: Tensor, v: Tensor, u: Tensor) -> dict:
        both = self.attention(quad_q, lin_q, quad_k, lin_k, torch.cat([v, u], dim=-1))
        return dict(zip(("att_v", "att_u"), both.split([v.shape[-1], u.shape[-1]], dim=-1)))


class _AsPicture(nn.Module):
    """The dilated dense net on (B, C, T, 1)."""

    def __init__(self, net: DilatedDenseFSMN):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.squeeze(-1).mT).mT.unsqueeze(-1)


class _AsReleased(nn.Module):
    """The model with its voices as one of the releases returns them: a list of (B, T), or (B, T, K)."""

    def __init__(self, model: MossFormer, outputs: list[dict[str, Any]]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, mix: Tensor) -> Any:
        voices = self.model(mix.reshape(-1, mix.shape[-1]))
        if len(self.outputs) > 1 or self.outputs[0]["name"] != "out":
            return list(voices.unbind(1))
        return voices if self.outputs[0]["shape"] == list(voices.shape) else voices.mT


class _PermutedPit(nn.Module):
    """PIT on an estimate made of permuted and scaled targets, plus noise and offset. Inputs (B, T, K)."""

    def __init__(self, description: str):
        super().__init__()
        numbers = (
            r"target\[\.\.\., \[([\d, ]+)\]\] \* linspace\(([\d.]+), ([\d.]+), (\d+)\) \+ ([\d.]+) \* noise \+ ([\d.]+)"
        )
        found = re.fullmatch(numbers + r"(\s.*)?", description)
        if found is None:
            raise UserError(f"the estimate is described as {description!r}, which is not understood")
        self.order = [int(n) for n in found[1].split(",")]
        self.first, self.last, self.noise, self.offset = map(float, found.group(2, 3, 5, 6))
        self.speakers = int(found[4])

    def forward(self, target: Tensor, noise: Tensor) -> dict[str, Tensor]:
        scale = torch.linspace(self.first, self.last, self.speakers, device=target.device, dtype=target.dtype)
        estimate = target[..., self.order] * scale + self.noise * noise + self.offset
        loss, index = pit_si_sdr(estimate.mT, target.mT)
        return {"neg_si_snr": loss, "target_index": index}
