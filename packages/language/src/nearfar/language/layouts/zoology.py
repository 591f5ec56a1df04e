"""Zoology's published layout: its state dicts and settings, mapped to ours.

Zoology: Measuring and Improving Recall in Efficient Language Models (Arora, Eyuboglu et al., ICLR 2024, arXiv
2312.04927).
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import count, identify, loaded, rename
from nearfar.core.errors import CheckpointError, some
from nearfar.language.cards import Mixer, Published, Shapes, Told
from nearfar.language.configuration import MixerConfig
from nearfar.language.registry import MIXERS, STATE_MIXERS, build

NAME = "zoology"


def recognize(
    shapes: Shapes, settings: Mapping[str, Any], dim: int, table: Mapping[str, Mixer] = MIXERS, layer: int = 0
) -> dict[str, Any]:
    """The one mixer of `table`, of width `dim`, that accounts for all published tensors `shapes`, as a config names it.

    What shapes cannot tell comes from `settings`: heads, a sliding window, BaseConv's activation, how Hyena's filter
    fades, the lookups of a selection. In the settings of a whole model heads, window and activation may also stand in
    the description of the mixer, as "2 heads" or "window 8", for each layer or for all.
    """
    told = Told(settings, layer)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def attempt(name: str, layout: Published) -> dict[str, Any]:
        choice = {"type": name, **layout.read(shapes, told)}
        with torch.device("meta"):
            module = build(choice, table, "mixer", dim=dim)
        load_mixer(module, state, table[name])
        return choice

    known = {n: mixer.published[NAME] for n, mixer in table.items() if NAME in mixer.published}
    what = f"layer {layer}, whose tensors are {some(shapes)}"
    return identify({name: partial(attempt, name, layout) for name, layout in known.items()}, what)[1]


def our_names(state: Mapping[str, Tensor], mixer: Mixer) -> dict[str, Tensor]:
    """The published tensors of one mixer under our names."""
    layout = mixer.published[NAME]
    kept = {name: value for name, value in state.items() if not re.match(layout.computed, name)}
    return rename(layout.names(kept), layout.rules)


def load_mixer(module: nn.Module, state: Mapping[str, Tensor], mixer: Mixer) -> nn.Module:
    """Load one mixer's published tensors; the table of positions may be left out."""
    return loaded(module, our_names(state, mixer), ignore=[r".*positions$"])


def part(values: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """The entries below the first prefix that has any."""
    for prefix in prefixes:
        if found := {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}:
            return found
    return {}


MIXER_PREFIXES = ("sequence_mixer.mixer.", "sequence_mixer.", "mixer.")


def model_config(shapes: Shapes, settings: Mapping[str, Any]) -> MixerConfig:
    """The config of a whole published model, from its tensors' names and shapes and its settings."""
    vocabulary, dim = shapes["backbone.embeddings.word_embeddings.weight"]
    layers = count(shapes, r"backbone\.layers\.(\d+)\.")
    mixers, state_mixers = [], []
    for i in range(layers):
        layer = part(shapes, f"backbone.layers.{i}.")
        mixers.append(recognize(part(layer, *MIXER_PREFIXES), settings, dim, layer=i))
        state_mixers.append(recognize(part(layer, "state_mixer."), {}, dim, STATE_MIXERS, i))
    if any(s != state_mixers[0] for s in state_mixers):
        raise CheckpointError("the layers have different state mixers")
    state_mixer = state_mixers[0] if len(state_mixers[0]) > 1 or state_mixers[0]["type"] != "identity" else "identity"
    if "backbone.layers.0.norm.weight" in shapes:  # a block that is one norm and a mixer, as Mamba's
        state_mixer = "none"
    norms = ["layernorm" if f"{name}.bias" in shapes else "rmsnorm" for name in (first_norm(shapes), "backbone.ln_f")]
    positions = shapes.get("backbone.embeddings.position_embeddings.weight")
    lengths = [m["max_length"] for m in mixers if "max_length" in m]
    return MixerConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        num_hidden_layers=layers,
        mixers=mixers,
        state_mixer=state_mixer,
        norm=norms[0],
        final_norm=norms[1] if norms[1] != norms[0] else None,
        norm_eps=settings.get("layernorm_eps", 1e-5),
        max_position_embeddings=positions[0] if positions else min(lengths, default=2048),
        learned_positions=positions is not None,
        tie_word_embeddings=settings["tie_embeddings"],
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
        mixer = our_names(part(layer, *MIXER_PREFIXES), MIXERS[config.layer_mixer(i)["type"]])
        ours |= {f"{to}mixer.{name}": value for name, value in mixer.items()}
        if isinstance(config.state_mixer, dict):
            after = our_names(part(layer, "state_mixer."), STATE_MIXERS[config.state_mixer["type"]])
            ours |= {f"{to}state_mixer.{name}": value for name, value in after.items()}
        rest = {n: v for n, v in layer.items() if not n.startswith((*MIXER_PREFIXES, "state_mixer."))}
        ours |= {to + re.sub(r"^norm\.", "norm1.", name): value for name, value in rest.items()}
    return ours


def translate(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], shapes: Shapes | None = None
) -> tuple[MixerConfig, dict[str, Tensor]]:
    """The config of a published checkpoint and its tensors under our names.

    Its architecture is read from names and `shapes` (of `state`, or more where computed tables are left out of it).
    `settings` give what they do not tell: `heads` (default 1), `window` of sliding attention, `activation` of
    BaseConv, `layernorm_eps`; `wrap=False` makes explicit long convolutions causal at every length, and able to
    stream, where the published code is not.
    """
    shapes = shapes or {name: tuple(value.shape) for name, value in state.items()}
    embedding = "backbone.embeddings.word_embeddings.weight"
    if embedding not in shapes:
        raise CheckpointError(f"has no {embedding}")
    if "tie_embeddings" not in settings:
        head = state.get("lm_head.weight", state[embedding])
        settings = {**settings, "tie_embeddings": torch.equal(head, state[embedding])}
    config = model_config(shapes, settings)
    return config, published_state(state, config)
