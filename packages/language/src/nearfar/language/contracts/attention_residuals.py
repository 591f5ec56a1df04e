"""Contracts of attention residuals: language models of flash-linear-attention, Kimi Linear, and operators."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.language.configuration import MixerConfig
from nearfar.language.contracts.tcnca import Logits
from nearfar.language.layouts import attention_residuals as layout
from nearfar.language.layouts.attention_residuals import CARD as CARD
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.registry import MIXERS, STATE_MIXERS, build
from nearfar.ops.aggregation.depth_attention import DepthAttention

KDA = {"kda_heads": "num_heads", "kda_head_dim": "head_dim", "conv_kernel": "conv_size"}
"""Setting of a contract -> what the mixer's tensors tell."""


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The model or operator of an attention-residuals contract."""
    settings, state = contract.settings, contract.state()
    if any(name.startswith("model.layers.") for name in state):
        model = MixerForCausalLM.translated(layout, state, settings)
        require_model(contract, model.config)
        run = re.findall(r"\d+", str(settings.get("run", "")))
        return Logits(model, prefill=int(run[0]) if run else None)
    if "query" in state:
        return Aggregation(contract)
    prefixed = {f"model.layers.0.self_attn.{name}": value for name, value in state.items()}
    attention = layout.below(layout.one_layout(prefixed), "model.layers.0.self_attn.")
    shapes = {name: tuple(value.shape) for name, value in attention.items()}
    dim = contract.inputs[0]["shape"][-1]
    if "o_proj.weight" in shapes:
        choice, table = layout.mixer(shapes, settings), MIXERS
        told = {n: choice[m] for n, m in KDA.items() if m in choice and choice["type"] == "kda"}
        contract.require(hidden=dim, l2norm_eps=1e-6, **told)
        contract.document("op")
        require_mixer(contract, choice, dim)
        ours = layout.below(layout.layer_state({f"self_attn.{n}": v for n, v in attention.items()}), "mixer.")
        return loaded(build(choice, table, "mixer", dim=dim), ours)
    mlp = layout.below(
        layout.one_layout({f"model.layers.0.mlp.{n}": v for n, v in state.items()}), "model.layers.0.mlp."
    )
    shapes = {name: tuple(value.shape) for name, value in mlp.items()}
    if "gate_proj.weight" in shapes or "experts.gate_up_proj" in shapes:
        choice = layout.state_mixer(shapes, settings)
        ours = layout.below(layout.layer_state({f"mlp.{n}": v for n, v in mlp.items()}), "state_mixer.")
        return loaded(build(choice, STATE_MIXERS, "mixer", dim=dim), ours)
    raise UserError(f"{contract.path}: no operator of attention residuals has the tensors {', '.join(list(state)[:6])}")


def require_model(contract: Contract, config: MixerConfig) -> None:
    """Hold the settings of a whole model against what its tensors tell."""
    first = {choice["type"]: choice for choice in reversed([*config.mixers, *config.state_mixer])}
    rotary, latent, kda = (first.get(kind, {}) for kind in ("rotary-attention", "latent-attention", "kda"))
    glu, experts = first.get("glu", {}), first.get("experts", {})
    block = None if isinstance(config.residual, str) else config.residual["block_size"]
    contract.require(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        sublayers=2 * config.num_hidden_layers,
        heads=(rotary or latent).get("num_heads"),
        kv_heads=rotary.get("num_kv_heads"),
        head_dim=rotary.get("head_dim"),
        intermediate=glu.get("hidden"),
        dense_intermediate=glu.get("hidden"),
        moe_intermediate=experts.get("hidden"),
        experts=experts.get("num_experts"),
        shared_experts=experts.get("shared"),
        kv_lora_rank=latent.get("rank"),
        qk_nope_head_dim=latent.get("head_dim"),
        qk_rope_head_dim=latent.get("shared_dim"),
        v_head_dim=latent.get("value_dim"),
        kda_heads=kda.get("num_heads"),
        kda_head_dim=kda.get("head_dim"),
        conv_kernel=kda.get("conv_size"),
        attnres_block_size_in_sublayers=block,
    )
    mode = "none.*" if block is None else "full" if block == 1 else "block"
    contract.require_text(mode=mode, mlp="SwiGLU.*", rope=r"half-split, base [\d.]+")


def require_mixer(contract: Contract, choice: Mapping[str, Any], dim: int) -> None:
    """Hold the settings of one mixer against what its tensors tell."""
    contract.document("op")
    contract.require(
        hidden=dim,
        kda_heads=choice.get("num_heads"),
        kda_head_dim=choice.get("head_dim"),
        conv_kernel=choice.get("conv_size"),
        l2norm_eps=1e-6,
    )


class Aggregation(nn.Module):
    """One aggregation over the inputs: the mixture, normed where the contract says so, and the depth weights."""

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        state, settings = contract.state(), contract.settings
        contract.require(
            hidden=state["query"].numel(), sources=len(contract.inputs), output_rmsnorm="out_norm.weight" in state
        )
        contract.document("op", "output")
        text = " ".join(str(settings.get(name, "")) for name in ("key_norm", "query"))
        eps = re.search(r"eps ([\d.e-]+)", text)
        factor = re.search(r"multiplied by ([\d.]+)", text)
        self.eps = float(settings.get("eps", eps[1] if eps else 1e-6))
        query = state["query"].flatten() * (float(factor[1]) if factor else 1.0) * settings.get("logit_scale", 1.0)
        normed = "norm.weight" in state
        self.attend = DepthAttention(len(query), self.eps, norm=normed)
        ours = {"query": query} | ({"norm_weight": state["norm.weight"]} if normed else {})
        loaded(self.attend, ours)
        contract.document("output")
        contract.require_text(op="attention residual aggregation")
        normed = "out_norm.weight" in state
        contract.require(hidden=len(query), sources=len(contract.inputs), output_rmsnorm=normed)
        self.out_norm = nn.Parameter(state["out_norm.weight"]) if "out_norm.weight" in state else None

    def forward(self, *sources: Tensor) -> list[Tensor]:
        out, weights = self.attend.mix(sources)
        if self.out_norm is not None:
            out = F.rms_norm(out, out.shape[-1:], self.out_norm, self.eps)
        return [out, weights[..., 0].to(torch.float32)]
