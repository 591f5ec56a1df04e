"""Zoology's published layout: its state dicts and settings, mapped to ours, and the contracts of its code.

Zoology: Measuring and Improving Recall in Efficient Language Models (Arora, Eyuboglu et al., ICLR 2024, arXiv
2312.04927); Based (arXiv 2402.18668).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict
from nearfar.core.errors import CheckpointError
from nearfar.language.configuration import MixerConfig
from nearfar.language.modeling import MixerForCausalLM

Shapes = Mapping[str, tuple[int, ...]]

RENAMES: dict[str, list[tuple[str, str]]] = {
    "attention": [(r"Wqkv", "qkv")],
    "selective-lookup": [(r"Wqkv", "attention.qkv"), (r"out_proj", "attention.out_proj"), (r"selecting", "selection")],
    "base-conv": [
        (r"conv\.conv\.", "conv."),
        (r"conv\.mlp\.0\.", "conv.fc1."),
        (r"conv\.mlp\.2\.", "conv.fc2."),
        (r"conv\.pos_emb\.z", "conv.positions"),
    ],
    "based": [(r"proj_([qkv])", r"\1_proj"), (r"proj_o", "out_proj")],
    "hyena": [
        (r"short_filter", "short"),
        (r"filter_fn\.bias", "filter.bias"),
        (r"filter_fn\.pos_emb\.z", "filter.positions"),
        (r"filter_fn\.implicit_filter\.\d+\.freq", "filter.frequency"),
    ],
    "h3": [
        (r"ssm_k_D", "D_k"),
        (r"ssm_k_kernel\.kernel\.", "shift."),
        (r"kernel\.kernel\.inv_A_real", "diagonal.log_real"),
        (r"kernel\.kernel\.A_imag", "diagonal.imag"),
        (r"kernel\.kernel\.", "diagonal."),
        (r"output_linear", "out_proj"),
    ],
    "rwkv4": [(r"time_mix_", "mix_")],
    "rwkv4-channel-mix": [(r"time_mix_", "mix_")],
    "mamba": [(r"conv1d", "conv")],
}
"""Mixer -> (published name, as a pattern; our name), the first that fits the beginning of a name applies."""

SQUEEZED = re.compile(r"mix_|positions$|frequency$|shift\.C$|diagonal\.C$")

COMPUTED = re.compile(r".*(pos_emb\.t|modulation\.deltas)$")
"""Tables that our modules compute."""


def recognise(shapes: Shapes, settings: Mapping[str, Any], layer: int = 0) -> dict[str, Any]:
    """The mixer, as a config names it, whose published tensors are `shapes`.

    What shapes cannot tell comes from `settings`: heads, a sliding window, BaseConv's activation, how Hyena's filter
    fades, the lookups of a selection. In the settings of a whole model heads, window and activation may also stand in
    the description of the mixer, as "2 heads" or "window 8", for each layer or for all.
    """
    described = str(settings.get("mixer", "")).lower()
    own = re.search(rf"\blayers? {layer}\b(.*?)(?=\blayers? \d|$)", described, re.DOTALL)
    text = f"{own[1] if own else described} {settings.get('op', '')}".lower()

    def number(pattern: str, default: int) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else default

    heads = int(settings.get("heads", settings.get("num_heads", number(r"(\d+)[\s-]*heads?\b", 1))))
    if "selecting.weight" in shapes:
        if "softmax" in text and "sigmoid" not in text:
            raise CheckpointError(f"selection by softmax is not known: {text.strip()}")
        k = settings.get("k")
        return {"type": "selective-lookup", "num_heads": heads} | ({"k": k} if isinstance(k, int | float) else {})
    if "Wqkv.weight" in shapes:
        biases = {"bias": "Wqkv.bias" in shapes, "out_bias": "out_proj.bias" in shapes}
        given = [settings[name] for name in ("block_size", "window") if isinstance(settings.get(name), int)]
        if "sliding" in text or "window" in text or (given and not own):
            window = given[0] if given else number(r"(?:sliding|window|block)\D{0,24}(\d+)(?![\d\s-]*head)", 0)
            return {"type": "sliding-attention", "num_heads": heads, "window": window, **biases}
        return {"type": "attention", "num_heads": heads, **biases}
    if "proj_q.weight" in shapes:
        return {"type": "based", "num_heads": heads, "feature_dim": shapes["proj_q.weight"][0] // heads}
    if "projection.weight" in shapes:
        activation = str(settings.get("activation", "silu" in text)).lower() not in ("false", "none", "identity")
        choice: dict[str, Any] = {"type": "base-conv", "activation": activation}
        if "conv.conv.weight" in shapes:
            return choice | {"kernel_size": shapes["conv.conv.weight"][-1]}
        explicit = "conv.filter" in shapes
        length = shapes["conv.filter"][-1] if explicit else shapes["conv.pos_emb.z"][1]
        wrap = explicit and settings.get("wrap", True)
        return choice | {"kernel_size": -1, "implicit": not explicit, "max_length": length, "wrap": wrap}
    if "short_filter.weight" in shapes:
        _, length, features = shapes["filter_fn.pos_emb.z"]
        inner = len([n for n in shapes if re.fullmatch(r"filter_fn\.implicit_filter\.\d+\.weight", n)]) - 2
        order = shapes["filter_fn.implicit_filter.0.weight"][0]
        taps = shapes["short_filter.weight"][-1]
        sizes = {"max_length": length, "order": order, "features": features, "kernel_size": taps, "inner": inner}
        fading = {name: settings[name] for name in ("target", "shift") if name in settings}
        percents = [settings.get(name, usual) for name, usual in (("slow_decay_pct", 1.5), ("fast_decay_pct", 0.3))]
        return {"type": "hyena", **sizes, **fading, "decay": percents}
    if "ssm_k_D" in shapes:
        dim, state = shapes["ssm_k_kernel.kernel.B"]
        return {"type": "h3", "d_state": state, "head_dim": dim // shapes["D"][0]}
    if "time_decay" in shapes:
        return {"type": "rwkv4"}
    if "A_log" in shapes:
        inner, state = shapes["A_log"]
        expand = inner // shapes["out_proj.weight"][0]
        rank, taps = shapes["dt_proj.weight"][1], shapes["conv1d.weight"][-1]
        biases = {"bias": "in_proj.bias" in shapes, "conv_bias": "conv1d.bias" in shapes}
        return {"type": "mamba", "d_state": state, "d_conv": taps, "expand": expand, "dt_rank": rank, **biases}
    raise CheckpointError(f"no Zoology mixer has these tensors: {', '.join(shapes)}")


def recognise_state_mixer(shapes: Shapes) -> dict[str, Any] | str:
    """The state mixer whose published tensors are `shapes`; no tensors: the identity."""
    if not shapes:
        return "identity"
    if "time_mix_k" in shapes and "key.weight" in shapes:
        hidden, dim = shapes["key.weight"]
        return {"type": "rwkv4-channel-mix", "mult": hidden // dim}
    up, down = feed_forward(shapes)
    if down:
        (rows, dim), hidden = shapes[f"{up[0]}.weight"], shapes[f"{down}.weight"][1]
        size = {"hidden": hidden} if hidden % dim else {"mult": hidden // dim}
        gated = len(up) == 2 or rows == 2 * hidden
        bias, usual = f"{down}.bias" in shapes, not gated
        return {"type": "glu" if gated else "mlp", **size} | ({} if bias == usual else {"bias": bias})
    raise CheckpointError(f"no Zoology state mixer has these tensors: {', '.join(shapes)}")


def feed_forward(shapes: Shapes) -> tuple[list[str], str]:
    """The linear maps of an MLP or GLU: those into the hidden width, and the one out of it ("" if it is neither).

    A GLU's two maps, the value's before the gate's, are separate tensors or the two halves of one.
    """
    *up, down = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")] or [""]
    sizes = [shapes[f"{name}.weight"] for name in (*up, down)] if up else []
    if len(up) not in (1, 2) or any(len(size) != 2 for size in sizes):
        return [], ""
    (dim, hidden), rows = sizes[-1], sum(size[0] for size in sizes[:-1])
    fits = rows == hidden * len(up) or (len(up) == 1 and rows == 2 * hidden)
    return (up, down) if fits and all(size[1] == dim for size in sizes[:-1]) else ([], "")


def width(shapes: Shapes) -> int:
    """Channels of a mixer, by the map that leads out of it or back."""
    if down := feed_forward(shapes)[1]:
        return shapes[f"{down}.weight"][0]
    for name in ("out_proj.weight", "proj_o.weight", "output_linear.weight", "output.weight", "projection.weight"):
        if name in shapes:
            return shapes[name][0]
    return shapes["receptance.weight"][0]


def our_names(state: Mapping[str, Tensor], mixer: str) -> dict[str, Tensor]:
    """The published tensors of one mixer under our names; of tensors that share a name the last counts."""
    if mixer in ("mlp", "glu"):
        up, down = feed_forward({name: tuple(value.shape) for name, value in state.items()})
        places = [*((name, "fc1") for name in up), (down, "fc2")]
        joined: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            for place, new in places:
                if (name := f"{place}.{kind}") in state:
                    before = [joined[f"{new}.{kind}"]] if f"{new}.{kind}" in joined else []
                    joined[f"{new}.{kind}"] = torch.cat([*before, state[name]])
        known = {f"{place}.{kind}" for place, _ in places for kind in ("weight", "bias")}
        return joined | {name: value for name, value in state.items() if name not in known}
    renames = RENAMES["attention" if mixer == "sliding-attention" else mixer]
    ours = {}
    linear = 0
    for name, value in state.items():
        if COMPUTED.match(name):
            continue
        if mixer == "hyena" and re.match(r"filter_fn\.implicit_filter\.\d+\.(weight|bias)", name):
            is_last = name.endswith("weight") and name.replace("weight", "bias") not in state
            new = f"filter.layers.{linear}.{name.rsplit('.', 1)[1]}" if not is_last else "filter.last.weight"
            linear += name.endswith("bias")
        else:
            new = next((re.sub(old, to, name) for old, to in renames if re.match(old, name)), name)
        if SQUEEZED.search(new):
            value = value.reshape(value.shape[-1] if re.search(r"mix_|frequency$", new) else value.shape[1:])
        ours[new] = value
    return ours


def load_mixer(module: nn.Module, state: Mapping[str, Tensor], mixer: str) -> nn.Module:
    """Load one mixer's published tensors; the table of positions may be left out."""
    load_state_dict(module, our_names(state, mixer), ignore=[r".*positions$"])
    return module.eval()


def part(values: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """The entries below the first prefix that has any."""
    for prefix in prefixes:
        if found := {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}:
            return found
    return {}


MIXER_PREFIXES = ("sequence_mixer.mixer.", "sequence_mixer.", "mixer.")


def model_config(shapes: Shapes, settings: Mapping[str, Any]) -> MixerConfig:
    """The config of a whole published model, from its tensors' names and shapes and its settings."""
    count = 1 + max(int(m[1]) for n in shapes if (m := re.match(r"backbone\.layers\.(\d+)\.", n)))
    mixers, state_mixers = [], []
    for i in range(count):
        layer = part(shapes, f"backbone.layers.{i}.")
        mixers.append(recognise(part(layer, *MIXER_PREFIXES), settings, i))
        state_mixers.append(recognise_state_mixer(part(layer, "state_mixer.")))
    if any(s != state_mixers[0] for s in state_mixers):
        raise CheckpointError("the layers have different state mixers")
    if "backbone.layers.0.norm.weight" in shapes:  # a block that is one norm and a mixer, as Mamba's
        state_mixers[0] = "none"
    norms = ["layernorm" if f"{name}.bias" in shapes else "rmsnorm" for name in (first_norm(shapes), "backbone.ln_f")]
    vocabulary, dim = shapes["backbone.embeddings.word_embeddings.weight"]
    positions = shapes.get("backbone.embeddings.position_embeddings.weight")
    lengths = [m["max_length"] for m in mixers if "max_length" in m]
    return MixerConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        num_hidden_layers=count,
        mixers=mixers,
        state_mixer=state_mixers[0],
        norm=norms[0],
        final_norm=norms[1] if norms[1] != norms[0] else None,
        norm_eps=settings.get("layernorm_eps", 1e-5),
        max_position_embeddings=positions[0] if positions else min(lengths, default=2048),
        learned_positions=positions is not None,
        tie_word_embeddings=settings.get("tie_embeddings", True),
    )


def first_norm(shapes: Shapes) -> str:
    return next((n for n in ("backbone.layers.0.norm1", "backbone.layers.0.norm") if f"{n}.weight" in shapes), "")


def published_state(state: Mapping[str, Tensor], config: MixerConfig) -> dict[str, Tensor]:
    """A whole published state dict under our names."""
    embedding = "backbone.embeddings.word_embeddings.weight"
    ours = {
        "lm_head.weight": state.get("lm_head.weight", state[embedding]),
        "model.embed_tokens.weight": state[embedding],
    }
    ours |= {f"model.norm.{name}": value for name, value in part(state, "backbone.ln_f.").items()}
    if config.tie_word_embeddings:  # one tensor under two names: the last in the file counts
        ours["model.embed_tokens.weight"] = ours["lm_head.weight"]
    if config.learned_positions:
        ours["model.embed_positions.weight"] = state["backbone.embeddings.position_embeddings.weight"]
    known = ("backbone.embeddings.", "backbone.ln_f.", "lm_head.", "backbone.layers.")
    ours |= {name: value for name, value in state.items() if not name.startswith(known)}
    for i in range(config.num_hidden_layers):
        layer, to = part(state, f"backbone.layers.{i}."), f"model.layers.{i}."
        mixer = our_names(part(layer, *MIXER_PREFIXES), config.layer_mixer(i)["type"])
        ours |= {f"{to}mixer.{name}": value for name, value in mixer.items()}
        if isinstance(config.state_mixer, dict):
            after = our_names(part(layer, "state_mixer."), config.state_mixer["type"])
            ours |= {f"{to}state_mixer.{name}": value for name, value in after.items()}
        rest = {n: v for n, v in layer.items() if not n.startswith((*MIXER_PREFIXES, "state_mixer."))}
        ours |= {to + re.sub(r"^norm\.", "norm1.", name): value for name, value in rest.items()}
    return ours


def from_published(checkpoint: str | Path | Mapping[str, Tensor], **settings: Any) -> MixerForCausalLM:
    """A model with the weights of a published Zoology checkpoint, a file or a state dict.

    Its architecture is read from the names and shapes. `settings` give what they do not tell: `heads` (default 1),
    `window` of sliding attention, `activation` of BaseConv, `layernorm_eps`; `wrap=False` makes explicit long
    convolutions causal at every length, and able to stream, where the published code is not.
    """
    state = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_state_dict(checkpoint)
    embedding = state.get("backbone.embeddings.word_embeddings.weight")
    head = state.get("lm_head.weight", embedding)
    settings = {
        "tie_embeddings": head is not None and embedding is not None and torch.equal(head, embedding)
    } | settings
    return load_model(state, {name: tuple(value.shape) for name, value in state.items()}, settings)


def load_model(state: Mapping[str, Tensor], shapes: Shapes, settings: Mapping[str, Any]) -> MixerForCausalLM:
    config = model_config(shapes, settings)
    model = MixerForCausalLM(config)
    load_state_dict(model, published_state(state, config), ignore=[r".*positions$"])
    return model.eval()
