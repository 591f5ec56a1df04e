"""Mega's published layouts: fairseq's checkpoints, and those of the Mega class that transformers had until version 5.

Mega (Ma et al., ICLR 2023, arXiv 2209.10655).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nearfar.core.checkpoints import count
from nearfar.core.errors import CheckpointError, UserError
from nearfar.language.cards import Shapes
from nearfar.language.configuration import MixerConfig, SequenceClassifierConfig

NAME = "mega"

TRANSFORMERS = {
    "ema_gate.damping_factor": "move.delta",
    "ema_gate.decay_factor": "move.alpha",
    "ema_gate.ema_expansion_matrix": "move.beta",
    "ema_gate.kernel_projection_matrix": "move.gamma",
    "ema_gate.residual_weight": "move.omega",
    "qk_weight": "gamma",
    "qk_bias": "beta",
    "rel_pos_bias.b_param": "rel_pos_bias.beta",
}
"""Name in transformers' old Mega class, below a layer's part -> fairseq's. Recalled, not checked."""

TABLES = re.compile(r"(.*\.)?(_float_tensor|version|num_batches_tracked)$")
"""What is no weight."""


def fairseq_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint (or their shapes) under fairseq's names, without the wrappers round the layers."""
    found = {}
    for name, value in state.items():
        if TABLES.match(name):
            continue
        new = re.sub(r"^((encoder|decoder|mega)\.)+", "", name)
        new = new.replace("embedding_layer.word_embeddings", "embed_tokens")
        for theirs, ours in TRANSFORMERS.items():
            new = re.sub(rf"(^|\.){re.escape(theirs)}$", rf"\g<1>{ours}", new)
        found[re.sub(r"^(embed_tokens)\.embed\.", r"\1.", new)] = value
    return found


def layer_settings(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `mega` for the layer with these published tensors; what they do not tell is in `settings`:

    attention ("softmax"), chunk (None), truncation (None), and in the text of `norm` whether it comes before the layer.
    """
    d, z, order = shapes["move.omega"][0], shapes["gamma"][1], shapes["move.gamma"][1]
    simple = "rel_pos_bias.rel_pos_bias" in shapes
    found = {
        "order": order,
        "bidirectional": shapes["move.gamma"][0] == 2 * d,
        "attention_dim": z,
        "value_dim": shapes["v_proj.weight"][0],
        "bias": "simple" if simple else "rotary",
        "attention": settings.get("attention", "softmax"),
        "chunk": settings.get("chunk"),
        "truncation": settings.get("truncation"),
        **norm_settings(shapes, settings),
    }
    if simple:
        found["max_length"] = (shapes["rel_pos_bias.rel_pos_bias"][0] + 1) // 2
    if settings.get("activation", "silu") != "silu":
        raise UserError(f"activation {settings['activation']!r} is not known to Mega's layer, which has silu")
    return found


def norm_settings(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of norm, by its tensors, and whether it comes first."""
    text = str(settings.get("norm", "")).lower()
    if "norm.norm.scalar" in shapes:
        kind = "scalenorm"
    elif "norm.norm.running_mean" in shapes:
        kind = "batchnorm"
    else:
        kind = "layernorm" if "norm.norm.bias" in shapes else "rmsnorm"
    before = settings.get("prenorm", settings.get("normalize_before", "postnorm" not in text))
    return {"norm": kind, "prenorm": bool(before)}


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors of one layer's part, attention or feed-forward, under our names."""
    ours = {}
    for name, value in state.items():
        if name in ("move.delta", "move.alpha", "move.beta"):
            value = value.flatten(1)
        elif name in ("rel_pos_bias.alpha", "rel_pos_bias.beta"):
            value = value.flatten()
        elif name == "norm.norm.scalar":
            name, value = "norm.norm.weight", value.reshape(())
        for theirs, new in (
            ("move.", "memory."),
            ("mx_proj.", "m_proj."),
            ("norm.norm.", "norm."),
            ("rel_pos_bias.rel_pos_bias", "attention.bias.bias"),
            ("rel_pos_bias.", "attention.bias."),
        ):
            if name.startswith(theirs):
                name = new + name.removeprefix(theirs)
                break
        ours[name] = value
    return ours


def below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def model_config(shapes: Shapes, settings: Mapping[str, Any]) -> MixerConfig:
    """The config of a published model, from the names (fairseq's) and shapes of its tensors and its settings."""
    if any("adaptive_softmax" in name or re.match(r"embed_tokens\.embeddings\.", name) for name in shapes):
        raise CheckpointError(
            "the checkpoint has an adaptive softmax or adaptive inputs (WikiText-103), which is not built here; "
            "checkpoints with one embedding (enwik8, Long Range Arena) load"
        )
    layers = count(shapes, r"layers\.(\d+)\.")
    if "layers.0.mega_layer.move.omega" not in shapes:
        raise CheckpointError("the checkpoint has no layers of Mega (layers.0.mega_layer.move.omega ...)")
    parts = [(below(shapes, f"layers.{i}.mega_layer."), below(shapes, f"layers.{i}.nffn.")) for i in range(layers)]
    d = shapes["layers.0.mega_layer.move.omega"][0]
    final = {name.removeprefix("final_norm.norm."): shape for name, shape in shapes.items() if "final_norm." in name}
    prenorm = norm_settings(parts[0][0], settings)["prenorm"]
    kind = norm_settings({f"norm.norm.{name}": shape for name, shape in final.items()}, settings)["norm"]
    about: dict[str, Any] = {
        "hidden_size": d,
        "num_hidden_layers": layers,
        "mixers": [{"type": "mega", **layer_settings(layer, settings)} for layer, _ in parts],
        "state_mixer": [
            {"type": "nffn", "hidden": ffn["fc1.weight"][0], **norm_settings(ffn, settings)} for _, ffn in parts
        ],
        "final_norm": kind if final else "plain-layernorm" if prenorm else "none",
        "vocab_size": shapes["embed_tokens.weight"][0] if len(shapes.get("embed_tokens.weight", ())) == 2 else 0,
    }
    if (classes := shapes.get("sentence_projection_layer.weight")) is None:
        return MixerConfig(
            **about,
            embed_scale=settings.get("embed_scale", math.sqrt(d)),
            tie_word_embeddings=bool(settings.get("tie", settings.get("tie_embeddings", True))),
        )
    hidden = [shapes[f"classifier.{i}.0.weight"] for i in range(sum("classifier" in n for n in shapes) // 2)]
    return SequenceClassifierConfig(
        **about | ({"final_norm": "none"} if not final else {}),
        num_labels=classes[0],
        classifier_hidden=[shape[0] for shape in hidden],
        real_valued=not about["vocab_size"],
        pairs=hidden[0][1] == 2 * d,
        embed_scale=settings.get("embed_scale", 1.0),
        use_cache=False,
    )


def published_state(state: Mapping[str, Tensor], config: MixerConfig) -> dict[str, Tensor]:
    """A whole published state dict (under fairseq's names) under ours."""
    ours = {}
    for name, value in state.items():
        if m := re.match(r"layers\.(\d+)\.(mega_layer|nffn)\.(.*)", name):
            part = "mixer" if m[2] == "mega_layer" else "state_mixer"
            ours |= {f"model.layers.{m[1]}.{part}.{n}": v for n, v in our_names({m[3]: value}).items()}
        elif m := re.match(r"final_norm\.norm\.(.*)", name):
            new = "weight" if m[1] == "scalar" else m[1]
            ours[f"model.norm.{new}"] = value.reshape(()) if m[1] == "scalar" else value
        elif name == "embed_tokens.weight" and config.vocab_size:
            ours["model.embed_tokens.weight"] = value
        elif m := re.match(r"embed_tokens\.(weight|bias)$", name):
            ours[f"embed_values.{m[1]}"] = value.flatten()
        elif name in ("output_projection.weight", "lm_head.weight"):
            ours["lm_head.weight"] = value
        elif m := re.match(r"classifier\.(\d+)\.0\.(weight|bias)$", name):
            ours[f"classifier.{m[1]}.{m[2]}"] = value
        else:
            ours["out.weight" if name == "sentence_projection_layer.weight" else name] = value
    if isinstance(config, SequenceClassifierConfig):
        return ours | ({} if config.vocab_size else {"model.embed_tokens.weight": torch.empty(0, config.hidden_size)})
    ours.setdefault("lm_head.weight", ours["model.embed_tokens.weight"])
    if config.tie_word_embeddings:  # one tensor under two names: the last in the file counts
        ours["model.embed_tokens.weight"] = ours["lm_head.weight"]
    return ours


def translate(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], shapes: Shapes | None = None
) -> tuple[MixerConfig, dict[str, Tensor]]:
    """The config of a published checkpoint, a `SequenceClassifierConfig` for Long Range Arena, and its tensors.

    Sizes come from names and shapes. `settings` give what they do not tell: attention ("softmax", "laplace", "relu2"),
    chunk, truncation, prenorm, embed_scale (of language models sqrt(d)), tie.
    """
    state = fairseq_names(state)
    config = model_config({name: tuple(value.shape) for name, value in state.items()}, settings)
    return config, published_state(state, config)
