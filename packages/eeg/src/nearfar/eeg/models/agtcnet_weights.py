"""AGTCNet's published layouts: the Keras file and the state dict, under our names."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nearfar.core.errors import CheckpointError

_STATISTICS = ("weight", "bias", "running_mean", "running_var")

_NORMS = {"ctconv.1": "ctc.norm", "gcat_norm": "gcat_norm", "chpool_norm": "gcap.norm", "mha_norm": "tce.norm"}

_LINEAR = {"mha_output": "tce.output", "classifier": "final_layer"}

_QKV = ("mha_query", "mha_key", "mha_value")


def published_names(heads: int) -> list[str]:
    """Names of the published state dict with `heads` graph attention heads. Graph attention alone has those that begin
    with `gcat.`, without it."""
    scores = [f"gcat.attn_{role}.{head}" for role in ("src", "dst") for head in range(heads)]
    convs = ["gcat.weight_src_dst", "gcat.val", *scores, "tconv", "tce_conv"]
    return [
        *("pos_scale", "ctconv.0.weight", "gcat.prelu_alpha", "gcat.bias", "chpool.weight"),
        *(f"{conv}.{part}.weight" for conv in convs for part in ("depthwise", "pointwise")),
        *(f"{norm}.{part}" for norm in (*_NORMS, *(f"{conv}.bn" for conv in convs)) for part in _STATISTICS),
        *(f"{name}.{part}" for name in (*_QKV, *_LINEAR) for part in ("weight", "bias")),
    ]


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict (`published_names`) under AGTCNet's own names: renamed, reshaped, joined; strict.

    Raises CheckpointError that lists every missing and unexpected name.
    """
    _check_names(state)
    filters, bias = len(state["ctconv.0.weight"]), state["gcat.bias"]
    own = {f"gcat.{name}": value for name, value in published_gcat(state, filters, "gcat.").items()}
    own["ctc.weight"] = state["ctconv.0.weight"]
    own["gcap.weight"] = state["chpool.weight"].flatten(1).unflatten(0, (filters + len(bias), -1))
    own["tce.positions.scale"] = state["pos_scale"].reshape(())
    for part in ("weight", "bias"):
        own[f"tce.qkv.{part}"] = torch.cat([state[f"{name}.{part}"] for name in _QKV])
        own |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for theirs, ours in _LINEAR.items()}
    for part in _STATISTICS:
        own |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for theirs, ours in _NORMS.items()}
    own |= _separable(state, "gtc", [["tconv"]], len(state["chpool.weight"]))
    return own | _separable(state, "tce.conv", [["tce_conv"]], len(state["tconv.pointwise.weight"]))


def published_gcat(state: Mapping[str, Tensor], in_channels: int, prefix: str = "") -> dict[str, Tensor]:
    """`published_state` for the graph attention alone, whose published names begin with `prefix`."""
    slope, bias = state[f"{prefix}prelu_alpha"].squeeze(0), state[f"{prefix}bias"]
    scores = [[f"{prefix}attn_{role}.{head}" for role in ("src", "dst")] for head in range(slope.shape[-1])]
    return (
        {"attention.slope": slope, "bias": bias}
        | _separable(state, "weight", [[f"{prefix}weight_src_dst"]], in_channels)
        | _separable(state, "value", [[f"{prefix}val"]], in_channels)
        | _separable(state, "score", scores, len(bias))
    )


def published_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Constructor arguments that the shapes of a published state dict tell, and `length`, the pooled time steps."""
    _check_names(state)
    shape = {name: tuple(value.shape) for name, value in state.items()}
    filters, _, kernel = shape["ctconv.0.weight"]
    channels, gtc_filters = shape["gcat.bias"][0], shape["tconv.pointwise.weight"][0]
    return {
        "n_chans": shape["chpool.weight"][-1],
        "n_outputs": shape["classifier.weight"][0],
        "length": shape["classifier.weight"][1] // gtc_filters,
        "ctc_filters": filters,
        "ctc_kernel": kernel,
        "gcat_channels": channels,
        "gcat_heads": shape["gcat.prelu_alpha"][-1],
        "gcat_temporal_kernel": shape["gcat.weight_src_dst.depthwise.weight"][2],
        "gcat_attention_kernel": shape["gcat.attn_src.0.depthwise.weight"][2],
        "gcap_depth_multiplier": shape["chpool.weight"][0] // (filters + channels),
        "gtc_filters": gtc_filters,
        "gtc_kernel": shape["tconv.depthwise.weight"][2],
        "tce_kernel": shape["tce_conv.depthwise.weight"][2],
        "separable_depth_multiplier": shape["gcat.weight_src_dst.depthwise.weight"][0] // filters,
    }


def _merged(weight: Tensor, *axes: int) -> Tensor:
    """Axes permuted, then the first two, channel and multiplier, made one: a depthwise convolution's weight."""
    return weight.permute(axes).flatten(0, 1).unsqueeze(1)


_AS_IS = lambda w: w  # noqa: E731

_PROJECTION = {"kernel": (".weight", lambda w: w.flatten(1).T), "bias": (".bias", torch.Tensor.flatten)}

_KERAS: dict[str, dict[str, tuple[str, Callable[[Tensor], Tensor]]]] = {
    "conv1d": {"kernel": (".weight", lambda w: w.permute(2, 1, 0))},
    "batch_normalization": {
        "gamma": (".weight", _AS_IS),
        "beta": (".bias", _AS_IS),
        "moving_mean": (".running_mean", _AS_IS),
        "moving_variance": (".running_var", _AS_IS),
    },
    "separable_conv2d": {
        "depthwise_kernel": (".depthwise.weight", lambda w: _merged(w, 2, 3, 0, 1)),
        "pointwise_kernel": (".pointwise.weight", lambda w: w.permute(3, 2, 0, 1)),
    },
    "separable_conv1d": {
        "depthwise_kernel": (".depthwise.weight", lambda w: _merged(w, 1, 2, 0)),
        "pointwise_kernel": (".pointwise.weight", lambda w: w.permute(2, 1, 0)),
    },
    "depthwise_conv2d": {"depthwise_kernel": (".weight", lambda w: _merged(w, 2, 3, 1, 0))},
    "p_re_lu": {"alpha": (".prelu_alpha", _AS_IS)},
    "gcat": {"bias": (".bias", _AS_IS)},
    "positional_encoding": {"scale": ("", lambda w: w.reshape(()))},
    "query": _PROJECTION,
    "key": _PROJECTION,
    "value": _PROJECTION,
    "attention_output": {"kernel": (".weight", lambda w: w.flatten(0, 1).T), "bias": (".bias", _AS_IS)},
    "dense": {"kernel": (".weight", lambda w: w.T), "bias": (".bias", _AS_IS)},
}
"""Kind of Keras layer -> array -> (ending of the published name, to torch's layout)."""


def keras_state(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a Keras weight file, by their paths in the file, as a published state dict.

    The last two parts of a path say what an array is: `separable_conv2d_9/depthwise_kernel:0`. Keras numbers the layers
    of a kind in the order in which they are made, through the whole process; so only the order of the numbers counts.

    Raises CheckpointError that lists what is unknown, there twice, missing or of another rank.
    """
    layers: dict[str, dict[int, dict[str, Tensor]]] = {kind: {} for kind in _KERAS}
    problems = []
    for path, value in arrays.items():
        parent, _, leaf = path.removesuffix(":0").rpartition("/")
        kind, number = re.findall(r"^(.*?)(?:_(\d+))?$", parent.rpartition("/")[2])[0]
        if kind not in _KERAS:  # layers of the released code's own, under whatever name
            kind = {"bias": "gcat", "scale": "positional_encoding"}.get(leaf, kind)
        layer = layers.setdefault(kind, {}).setdefault(int(number or 0), {})
        if leaf not in _KERAS.get(kind, {}) or leaf in layer:
            problems.append(f"unexpected {path} {tuple(value.shape)}")
        layer[leaf] = value
    heads = max(1, len(layers["separable_conv2d"]) // 2 - 1)
    graph = ["gcat.weight_src_dst", "gcat.val"]
    graph += [f"gcat.attn_{role}.{head}" for role in ("src", "dst") for head in range(heads)]
    norms = ["ctconv.1", *(f"{conv}.bn" for conv in graph), "gcat_norm", "chpool_norm", "tconv.bn", "mha_norm"]
    names = {
        "conv1d": ["ctconv.0"],
        "batch_normalization": [*norms, "tce_conv.bn"],
        "separable_conv2d": graph,
        "separable_conv1d": ["tconv", "tce_conv"],
        "depthwise_conv2d": ["chpool"],
        "p_re_lu": ["gcat"],
        "gcat": ["gcat"],
        "positional_encoding": ["pos_scale"],
        "query": ["mha_query"],
        "key": ["mha_key"],
        "value": ["mha_value"],
        "attention_output": ["mha_output"],
        "dense": ["classifier"],
    }
    state = {}
    for kind, expected in names.items():
        found = [layers[kind][number] for number in sorted(layers[kind])]
        if len(found) != len(expected):
            problems.append(f"{len(found)} layers {kind}, expected {len(expected)}")
        for name, layer in zip(expected, found):
            for leaf, (ending, to_torch) in _KERAS[kind].items():
                try:
                    state[name + ending] = to_torch(layer[leaf])
                except KeyError:
                    problems.append(f"missing {leaf} of a layer {kind} ({name})")
                except (RuntimeError, IndexError):
                    problems.append(f"{kind}/{leaf} ({name}) has shape {tuple(layer[leaf].shape)}")
    _raise(problems, "is no AGTCNet weight file")
    return state


def _check_names(state: Mapping[str, Tensor]) -> None:
    slope = state.get("gcat.prelu_alpha")
    expected = published_names(2 if slope is None else slope.shape[-1])
    found = [name for name in state if not name.endswith("num_batches_tracked")]
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name} {tuple(state[name].shape)}" for name in found if name not in expected]
    _raise(problems, "does not hold AGTCNet's published weights")


def _check_channels(theirs: list[str], ours: list[str]) -> None:
    if [name.lower() for name in theirs] != [name.lower() for name in ours]:
        raise CheckpointError(
            f"the weights belong to the electrodes {' '.join(theirs)}, in this order, not to {' '.join(ours)}; "
            "pick and order the recording's channels so, or train anew"
        )


def _raise(problems: list[str], what: str) -> None:
    if problems:
        raise CheckpointError(what + ":\n  " + "\n  ".join(problems))


def _separable(state: Mapping[str, Tensor], ours: str, theirs: list[list[str]], in_channels: int) -> dict[str, Tensor]:
    """One SeparableConv from published ones: `theirs` has the branches of each group, of `in_channels` inputs each."""

    def depthwise(name: str) -> Tensor:  # (c m, 1, k) -> (c, m, k) and (c m, 1, k, 1) -> (c, m, 1, k)
        weight = state[f"{name}.depthwise.weight"]
        return (weight.mT if weight.ndim == 4 else weight).unflatten(0, (in_channels, -1)).squeeze(2)

    def pointwise(name: str) -> Tensor:
        return state[f"{name}.pointwise.weight"].flatten(1).unflatten(1, (in_channels, -1))

    names = [name for group in theirs for name in group]
    return {
        f"{ours}.depthwise": torch.cat([torch.stack([depthwise(name) for name in group], 1) for group in theirs]),
        f"{ours}.pointwise": torch.cat([pointwise(name) for name in names]),
    } | {f"{ours}.norm.{part}": torch.cat([state[f"{name}.bn.{part}"] for name in names]) for part in _STATISTICS}
