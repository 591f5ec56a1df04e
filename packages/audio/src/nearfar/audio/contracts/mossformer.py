"""Contracts of MossFormer: any published variant from its settings and shapes."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.audio.separation.mossformer import MossFormer, _detect_recurrent, published_state
from nearfar.audio.separation.pit import pit_si_sdr
from nearfar.core.checkpoints import load_state_dict
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.joint import GatedAttentionBlock, JointAttention
from nearfar.ops.recurrence.fsmn import DilatedDenseFSMN, GatedFSMN


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The operator, block or model that a contract describes, with the contract's state."""
    settings, variant = contract.settings, contract.variant
    block = {
        "group_size": settings.get("group_size", 256),
        "rotary_dim": settings.get("rotary_dim", 32),
        "theta": float(settings.get("rotary_theta", 10000.0)),
    }
    causal = "attention" if settings.get("causal", variant.endswith("-causal")) else False
    if variant.startswith("op-si-snr-pit"):
        contract.require(zero_mean=True, eps=1e-8)
        return _PermutedPit(str(settings.get("estimate", "")))
    if variant.startswith("op-joint-attention"):
        return _TwoStreams(JointAttention(**block, causal=bool(causal))).eval()
    if not variant.startswith("op-"):
        contract.require(token_shift=True, rotary_dim=32, rotary_theta=10000)
        contract.require(encoder_stride=settings.get("encoder_kernel", 16) // 2)
        contract.require(fsmn_dilations=[2**i for i in range(settings.get("fsmn_depth", 2))])
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
        contract.require(dilations=[2**i for i in range(depth)])
        net = DilatedDenseFSMN(channels, (taps + 1) // 2, depth)
        load_state_dict(net, state)
        return _AsPicture(net).eval()
    state = published_state(contract.state())
    if variant.startswith("op-gated-fsmn"):
        dim = state["reduce.weight"].shape[1]
        found = _detect_recurrent(state, "")
        contract.require(fsmn_dilations=[2**i for i in range(found["fsmn_depth"])])
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


def _maps(contract: Contract) -> bool:
    """Whether the net's output is decoded itself: as a setting says in one word or another, else as the name does."""
    for name, value in contract.settings.items():
        if isinstance(value, bool) and ("mapping" in name or re.search("(skip|no|without)_mask", name)):
            return value
        if isinstance(value, bool) and "mask" in name:
            return not value
        if value in ("mapping", "masking"):
            return value == "mapping"
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
            r"target\[\.\.\., \[([\d, ]+)\]\] \* linspace\(([\d.]+), ([\d.]+), \d+\) \+ ([\d.]+) \* noise \+ ([\d.]+)"
        )
        found = re.search(numbers, description)
        self.order = [int(n) for n in found[1].split(",")] if found else None
        self.first, self.last, self.noise, self.offset = (
            map(float, found.groups()[1:]) if found else (0.4, 1.2, 0.5, 0.1)
        )

    def forward(self, target: Tensor, noise: Tensor) -> dict[str, Tensor]:
        speakers = target.shape[-1]
        moved = target.roll(-1, dims=-1) if self.order is None else target[..., self.order]
        scale = torch.linspace(self.first, self.last, speakers, device=target.device, dtype=target.dtype)
        estimate = moved * scale + self.noise * noise + self.offset
        loss, index = pit_si_sdr(estimate.mT, target.mT)
        return {"neg_si_snr": loss, "target_index": index}
