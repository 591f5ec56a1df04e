"""Zoology's mixers.

Zoology: Measuring and Improving Recall in Efficient Language Models (Arora, Eyuboglu et al., ICLR 2024, arXiv
2312.04927); Based (arXiv 2402.18668).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nearfar.core.cards import Card
from nearfar.core.errors import CheckpointError
from nearfar.language.blocks import GLU, MLP, Identity
from nearfar.language.cards import Mixer, Published, Shapes, Told
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4ChannelMix, RWKV4TimeMix
from nearfar.ops.tokens.selective_lookup import SelectiveLookup

CARD = Card(
    "Zoology's mixers",
    "2312.04927",
    "attention, convolutions and recurrences side by side: what each recalls",
    4.3e-7,
    weights="checkpoints of the released code",
)

# attention


def full(shapes: Shapes, told: Told) -> dict[str, Any]:
    if told.window:
        raise CheckpointError("a window is told")
    return attention(shapes, told)


def sliding(shapes: Shapes, told: Told) -> dict[str, Any]:
    if not told.window:
        raise CheckpointError("no window is told")
    return attention(shapes, told) | {"window": told.window}


def attention(shapes: Shapes, told: Told) -> dict[str, Any]:
    if "selecting.weight" in shapes:
        raise CheckpointError("selects, which is selective lookup")
    return {"num_heads": told.heads, "bias": "Wqkv.bias" in shapes, "out_bias": "out_proj.bias" in shapes}


def selection(shapes: Shapes, told: Told) -> dict[str, Any]:
    if "softmax" in told.text and "sigmoid" not in told.text:
        raise CheckpointError(f"selection by softmax is not known: {told.text.strip()}")
    k = told.settings.get("k")
    return {"num_heads": told.heads} | ({"k": k} if isinstance(k, int | float) else {})


# convolutions


def base_conv(shapes: Shapes, told: Told) -> dict[str, Any]:
    activation = str(told.settings.get("activation", "silu" in told.text)).lower()
    choice: dict[str, Any] = {"activation": activation not in ("false", "none", "identity")}
    if "conv.conv.weight" in shapes:
        return choice | {"kernel_size": shapes["conv.conv.weight"][-1]}
    explicit = "conv.filter" in shapes
    length = shapes["conv.filter"][-1] if explicit else shapes["conv.pos_emb.z"][1]
    wrap = explicit and told.settings.get("wrap", True)
    return choice | {"kernel_size": -1, "implicit": not explicit, "max_length": length, "wrap": wrap}


def hyena(shapes: Shapes, told: Told) -> dict[str, Any]:
    _, length, features = shapes["filter_fn.pos_emb.z"]
    inner = len([n for n in shapes if re.fullmatch(r"filter_fn\.implicit_filter\.\d+\.weight", n)]) - 2
    order, taps = shapes["filter_fn.implicit_filter.0.weight"][0], shapes["short_filter.weight"][-1]
    sizes = {"max_length": length, "order": order, "features": features, "kernel_size": taps, "inner": inner}
    fading = {name: told.settings[name] for name in ("target", "shift") if name in told.settings}
    percents = [told.settings.get(name, usual) for name, usual in (("slow_decay_pct", 1.5), ("fast_decay_pct", 0.3))]
    return {**sizes, **fading, "decay": percents}


def hyena_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The filter's linear maps, every second of the published layers, numbered; the last has no bias.

    The published layers between them are one and the same sine, saved under a name for each.
    """
    ours, linear = {}, 0
    for name, value in state.items():
        if re.match(r"filter_fn\.implicit_filter\.\d+\.(weight|bias)", name):
            is_last = name.endswith("weight") and name.replace("weight", "bias") not in state
            ours[f"filter.layers.{linear}.{name.rsplit('.', 1)[1]}" if not is_last else "filter.last.weight"] = value
            linear += name.endswith("bias")
        else:
            ours[re.sub(r"filter_fn\.implicit_filter\.\d+\.freq", "filter.frequency", name)] = value
    return ours


# recurrences


def h3(shapes: Shapes, told: Told) -> dict[str, Any]:
    dim, state = shapes["ssm_k_kernel.kernel.B"]
    return {"d_state": state, "head_dim": dim // shapes["D"][0]}


def mamba(shapes: Shapes, told: Told) -> dict[str, Any]:
    inner, state = shapes["A_log"]
    expand = inner // shapes["out_proj.weight"][0]
    rank, taps = shapes["dt_proj.weight"][1], shapes["conv1d.weight"][-1]
    biases = {"bias": "in_proj.bias" in shapes, "conv_bias": "conv1d.bias" in shapes}
    return {"d_state": state, "d_conv": taps, "expand": expand, "dt_rank": rank, **biases}


MIXERS = {
    "attention": Mixer(
        CausalAttention,
        "2 d N",
        "every key and value",
        published={"zoology": Published(("Wqkv.weight",), full, ((r"Wqkv", "qkv"),))},
    ),
    "selective-lookup": Mixer(
        SelectiveLookup,
        "2 d N",
        "every key and value",
        published={
            "zoology": Published(
                ("Wqkv.weight", "selecting.weight"),
                selection,
                ((r"Wqkv", "attention.qkv"), (r"out_proj", "attention.out_proj"), (r"selecting", "selection")),
            )
        },
    ),
    "sliding-attention": Mixer(
        CausalAttention,
        "2 d w, w: `window`",
        required={"window": 64},
        published={"zoology": Published(("Wqkv.weight",), sliding, ((r"Wqkv", "qkv"),))},
    ),
    "base-conv": Mixer(
        BaseConv,
        "d K (`kernel_size`); -1, long: d N",
        "constant; long: every input",
        published={
            "zoology": Published(
                ("projection.weight",),
                base_conv,
                (
                    (r"conv\.conv\.", "conv."),
                    (r"conv\.mlp\.0\.", "conv.fc1."),
                    (r"conv\.mlp\.2\.", "conv.fc2."),
                    (r"conv\.pos_emb\.z", "conv.positions"),
                ),
                r"conv\.pos_emb\.t$",
            )
        },
    ),
    "based": Mixer(
        Based,
        "h (1 + f + f (f + 1) / 2) (d / h + 1), f: `feature_dim`",
        published={
            "zoology": Published(
                ("proj_q.weight",),
                lambda shapes, told: {
                    "num_heads": told.heads,
                    "feature_dim": shapes["proj_q.weight"][0] // told.heads,
                },
                ((r"proj_([qkv])", r"\1_proj"), (r"proj_o", "out_proj")),
            )
        },
    ),
    "hyena": Mixer(
        Hyena,
        "d N",
        "every input",
        published={
            "zoology": Published(
                ("short_filter.weight", "filter_fn.pos_emb.z", "filter_fn.implicit_filter.0.weight"),
                hyena,
                (
                    (r"short_filter", "short"),
                    (r"filter_fn\.bias", "filter.bias"),
                    (r"filter_fn\.pos_emb\.z", "filter.positions"),
                ),
                r"filter_fn\.(pos_emb\.t|modulation\.deltas)$",
                hyena_names,
            )
        },
    ),
    "h3": Mixer(
        H3,
        "d S, S: `d_state`",
        published={
            "zoology": Published(
                ("ssm_k_D", "ssm_k_kernel.kernel.B", "D"),
                h3,
                (
                    (r"ssm_k_D", "D_k"),
                    (r"ssm_k_kernel\.kernel\.", "shift."),
                    (r"kernel\.kernel\.inv_A_real", "diagonal.log_real"),
                    (r"kernel\.kernel\.A_imag", "diagonal.imag"),
                    (r"kernel\.kernel\.", "diagonal."),
                    (r"output_linear", "out_proj"),
                ),
            )
        },
    ),
    "mamba": Mixer(
        Mamba,
        "2 d S, S: `d_state`",
        published={
            "zoology": Published(
                ("A_log", "dt_proj.weight", "conv1d.weight", "out_proj.weight"), mamba, ((r"conv1d", "conv"),)
            )
        },
    ),
    "retnet": Mixer(Retention, "2 d² / h"),
    "rwkv4": Mixer(
        RWKV4TimeMix,
        "4 d",
        published={"zoology": Published(("time_decay", "time_mix_k"), rules=((r"time_mix_", "mix_"),))},
    ),
}

# state mixers


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


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An MLP's or GLU's maps as ours, a value's and a gate's in one."""
    up, down = feed_forward({name: tuple(value.shape) for name, value in state.items()})
    places = [*((name, "fc1") for name in up), (down, "fc2")]
    ours: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for place, new in places:
            if (name := f"{place}.{kind}") in state:
                before = [ours[f"{new}.{kind}"]] if f"{new}.{kind}" in ours else []
                ours[f"{new}.{kind}"] = torch.cat([*before, state[name]])
    known = {f"{place}.{kind}" for place, _ in places for kind in ("weight", "bias")}
    return ours | {name: value for name, value in state.items() if name not in known}


def mlp(shapes: Shapes, told: Told, gated: bool = False) -> dict[str, Any]:
    up, down = feed_forward(shapes)
    if not down:
        raise CheckpointError("its maps do not fit each other")
    (rows, dim), hidden = shapes[f"{up[0]}.weight"], shapes[f"{down}.weight"][1]
    if gated != (len(up) == 2 or rows == 2 * hidden):
        raise CheckpointError(f"has {'no' if gated else 'a'} gate")
    size = {"hidden": hidden} if hidden % dim else {"mult": hidden // dim}
    bias = f"{down}.bias" in shapes
    return size if bias != gated else size | {"bias": bias}


def glu(shapes: Shapes, told: Told) -> dict[str, Any]:
    return mlp(shapes, told, gated=True)


def nothing(shapes: Shapes, told: Told) -> dict[str, Any]:
    if shapes:
        raise CheckpointError("has no tensors")
    return {}


STATE_MIXERS = {
    "identity": Mixer(Identity, published={"zoology": Published((), nothing)}),
    "mlp": Mixer(MLP, published={"zoology": Published((), mlp, names=joined)}),
    "glu": Mixer(GLU, published={"zoology": Published((), glu, names=joined)}),
    "rwkv4-channel-mix": Mixer(
        RWKV4ChannelMix,
        published={
            "zoology": Published(
                ("time_mix_k", "key.weight", "value.weight"),
                lambda shapes, told: {"mult": shapes["key.weight"][0] // shapes["key.weight"][1]},
                ((r"time_mix_", "mix_"),),
            )
        },
    ),
}
