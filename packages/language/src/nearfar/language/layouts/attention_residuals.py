"""Published layouts of transformers with or without attention residuals: flash-linear-attention's, and Kimi Linear's.

Attention Residuals (Kimi Team 2026, arXiv 2603.15031); Kimi Linear (arXiv 2510.26692), in transformers' layout, in that
of its first release (separate convolutions, numbered experts), and with the names that Kimi K3 gives to its residuals.
"""

import re
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, rename
from nearfar.core.errors import CheckpointError
from nearfar.language.cards import Shapes
from nearfar.language.configuration import MixerConfig

NAME = "attention-residuals"

CARD = Card(
    "Attention Residuals",
    "2603.15031",
    "softmax attention over depth in place of the residual sum; Kimi delta attention",
    2.0e-6,
    "flash-linear-attention's layout and Kimi Linear's",
)

RULES = (
    (r"model\.embeddings\.", "model.embed_tokens."),
    (r"(model\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"(model\.layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
    (r"(model\.layers\.\d+)\.mlp_norm\.", r"\1.post_attention_layernorm."),
    (r"(model\.layers\.\d+)\.block_sparse_moe\.", r"\1.mlp."),
    (r"(model\.layers\.\d+)\.self_attention_res_", r"\1.attn_res_"),
    (r"model\.output_attn_res_", "model.res_"),
    (r"(model\.layers\.\d+\.self_attn)\.(dt_bias|A_log|f_[ab]_proj)", r"\1.forget_gate.\2"),
)
"""Names of all these layouts -> one set of names."""


def one_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under transformers' names for Kimi Linear; residuals under flash-linear-attention's."""
    state = rename(state, RULES)
    ours = dict(state)
    for name in state:
        if m := re.match(r"(.*\.self_attn)\.q_conv1d\.weight$", name):
            parts = [ours.pop(f"{m[1]}.{kind}_conv1d.weight", None) for kind in "qkv"]
            if any(part is None for part in parts):
                raise CheckpointError(f"{m[1]} lacks one of the convolutions q_conv1d, k_conv1d and v_conv1d")
            ours[f"{m[1]}.conv1d.weight"] = torch.cat(parts)
        if m := re.match(r"(.*\.mlp)\.experts\.0\.(w1|gate_proj)\.weight$", name):
            gate, up, down = ("w1", "w3", "w2") if m[2] == "w1" else ("gate_proj", "up_proj", "down_proj")
            experts = count(state, rf"{re.escape(m[1])}\.experts\.(\d+)\.")
            take = lambda kind: torch.stack([ours.pop(f"{m[1]}.experts.{e}.{kind}.weight") for e in range(experts)])  # noqa: E731, B023
            ours[f"{m[1]}.experts.gate_up_proj"] = torch.cat([take(gate), take(up)], 1)
            ours[f"{m[1]}.experts.down_proj"] = take(down)
    return ours


def below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def mixer(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The mixer of a layer, by the tensors of its `self_attn`."""
    if "conv1d.weight" in shapes:
        heads = max(shapes["forget_gate.A_log"], default=1)
        width, taps = shapes["q_proj.weight"][0] // heads, shapes["conv1d.weight"][-1]
        return {
            "type": "kda",
            "num_heads": heads,
            "head_dim": width,
            "conv_size": taps,
            "gate_bias": "g_b_proj.bias" in shapes,
            "eps": settings.get("rmsnorm_eps", 1e-5),
            "negative": bool(settings.get("allow_neg_eigval", False)),
            "lower_bound": settings.get("lower_bound"),
        }
    if "kv_b_proj.weight" in shapes:
        rank, queries = shapes["kv_a_layernorm.weight"][0], shapes["q_proj.weight"][0]
        shared = shapes["kv_a_proj_with_mqa.weight"][0] - rank
        both, values = shapes["kv_b_proj.weight"][0], shapes["o_proj.weight"][1]
        heads = (queries - both + values) // shared
        sizes = {"rank": rank, "shared_dim": shared, "head_dim": (both - values) // heads, "value_dim": values // heads}
        return {"type": "latent-attention", "num_heads": heads, **sizes, "eps": settings.get("kv_norm_eps", 1e-6)}
    queries, keys = shapes["q_proj.weight"][0], shapes["k_proj.weight"][0]
    heads = settings.get("heads", settings.get("num_heads"))
    if heads is None:
        raise CheckpointError("its heads are not told; give heads=, the number of query heads")
    width = queries // heads
    base = settings.get("rope_base", settings.get("rope_theta"))
    if base is None:
        told = re.search(r"base\D*([\d.]+)", str(settings.get("rope", "")))
        base = float(told[1]) if told else 10000.0
    return {
        "type": "rotary-attention",
        "num_heads": heads,
        "num_kv_heads": keys // width,
        "head_dim": width,
        "base": base,
        "bias": "q_proj.bias" in shapes,
    }


def state_mixer(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What follows the mixer, by the tensors of its `mlp`."""
    if "experts.gate_up_proj" not in shapes:
        return {"type": "glu", "activation": "silu", "hidden": shapes["gate_proj.weight"][0]}
    experts, hidden = shapes["experts.gate_up_proj"][0], shapes["experts.gate_up_proj"][1] // 2
    shared = shapes.get("shared_experts.gate_proj.weight", (0,))[0] // hidden
    top = settings.get("experts_per_token", settings.get("num_experts_per_token"))
    if top is None:
        raise CheckpointError("how many experts a token visits is not told; give experts_per_token=")
    told = re.search(r"times ([\d.]+)", str(settings.get("router", "")))
    scale = settings.get("routed_scaling_factor", float(told[1].rstrip(".")) if told else 1.0)
    return {
        "type": "experts",
        "hidden": hidden,
        "num_experts": experts,
        "top": top,
        "shared": shared,
        "scale": scale,
    }


ATTENTION = (
    (r"o_norm\.", "norm."),
    (r"conv1d\.", "conv."),
    (r"forget_gate\.", ""),
    (r"kv_a_proj_with_mqa\.", "kv_a."),
    (r"kv_a_layernorm\.", "kv_norm."),
    (r"kv_b_proj\.", "kv_b."),
    (r"o_proj\.", "out_proj."),
)
"""Published name below `self_attn` -> ours."""

EXPERTS = (
    (r"gate\.weight$", "router.weight"),
    (r"gate\.e_score_correction_bias$", "correction"),
    (r"experts\.gate_up_proj$", "gate_up"),
    (r"experts\.down_proj$", "down"),
    (r"shared_experts\.down_proj\.", "shared_down."),
)


def layer_state(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer under our names, residuals left out."""
    attention, mlp = below(layer, "self_attn."), below(layer, "mlp.")
    ours = {f"mixer.{name}": value for name, value in rename(attention, ATTENTION).items()}
    if "mixer.A_log" in ours:
        ours["mixer.A_log"] = ours["mixer.A_log"].flatten()
    if "experts.gate_up_proj" in mlp:
        both = [mlp.pop(f"shared_experts.{kind}.weight", None) for kind in ("gate_proj", "up_proj")]
        if both[0] is not None and both[1] is not None:
            mlp["shared_gate_up.weight"] = torch.cat(both)
        mlp = rename(mlp, EXPERTS)
        mlp.setdefault("correction", torch.zeros(len(mlp["router.weight"])))
    elif {"gate_proj.weight", "up_proj.weight", "down_proj.weight"} <= set(mlp):
        value, gate = mlp.pop("up_proj.weight"), mlp.pop("gate_proj.weight")
        mlp = {"fc1.weight": torch.cat([value, gate]), "fc2.weight": mlp.pop("down_proj.weight"), **mlp}
    ours |= {f"state_mixer.{name}": value for name, value in mlp.items()}
    for name, value in layer.items():
        if not name.startswith(("self_attn.", "mlp.", "attn_res_", "mlp_res_")):
            new = name.replace("input_layernorm.", "norm1.").replace("post_attention_layernorm.", "norm2.")
            ours[new] = value
    return ours


def translate(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], shapes: Shapes | None = None
) -> tuple[MixerConfig, dict[str, Tensor]]:
    """The config of a published checkpoint and its tensors under our names.

    `settings` give what names and shapes do not tell: heads (of rotary attention), rmsnorm_eps, rope_theta,
    experts_per_token, routed_scaling_factor, and the block size of attention residuals in sub-layers,
    attnres_block_size_in_sublayers (Kimi K3's attn_res_block_size, in layers, also).
    """
    state = one_layout({name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")})
    if "model.embed_tokens.weight" not in state or "model.layers.0.input_layernorm.weight" not in state:
        raise CheckpointError("has no model.embed_tokens (or model.embeddings) or no layers with a norm before them")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    number = count(shapes, r"model\.layers\.(\d+)\.")
    layers = [below(state, f"model.layers.{i}.") for i in range(number)]
    own = [{name: tuple(value.shape) for name, value in layer.items()} for layer in layers]
    residual: dict[str, Any] | str = "plain"
    if "model.res_proj.weight" in state:
        size = settings.get("attnres_block_size_in_sublayers", settings.get("attnres_block_size"))
        if size is None and "attn_res_block_size" in settings:
            size = 2 * settings["attn_res_block_size"]
        if size is None:
            raise CheckpointError("the block size is not told; give attnres_block_size_in_sublayers= (1 for full)")
        residual = {"type": "attention", "block_size": size}
    eps = settings.get("rmsnorm_eps", settings.get("rms_norm_eps", 1e-6))
    vocabulary, dim = shapes["model.embed_tokens.weight"]
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    told = settings.get("tie_embeddings", settings.get("tie", settings.get("tie_word_embeddings")))
    tie = head is state["model.embed_tokens.weight"] if told is None else bool(told)
    config = MixerConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        num_hidden_layers=number,
        mixers=[mixer(below(layer, "self_attn."), ChainMap({"rmsnorm_eps": eps}, settings)) for layer in own],
        state_mixer=[state_mixer(below(layer, "mlp."), settings) for layer in own],
        residual=residual,
        norm="rmsnorm",
        norm_eps=eps,
        tie_word_embeddings=tie,
    )
    ours = {"model.embed_tokens.weight": head if tie else state["model.embed_tokens.weight"], "lm_head.weight": head}
    for i, layer in enumerate(layers):
        ours |= {f"model.layers.{i}.{name}": value for name, value in layer_state(layer).items()}
        for place, kind in enumerate(("attn", "mlp")):
            ours |= depth_state(below(layer, f"{kind}_res_"), 2 * i + place)
    ours |= depth_state(below(state, "model.res_"), 2 * number)
    used = ("model.embed_tokens.", "lm_head.", "model.layers.", "model.res_")
    return config, ours | {name: value for name, value in state.items() if not name.startswith(used)}


def depth_state(found: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Query and key norm of the aggregation `number`."""
    names = {"proj.weight": "query", "norm.weight": "norm_weight"}
    return {f"model.depth.{number}.{names.get(name, name)}": value.flatten() for name, value in found.items()}
