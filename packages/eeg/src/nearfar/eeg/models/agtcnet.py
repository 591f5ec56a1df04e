"""AGTCNet: attentive graph-temporal convolutional network for motor-imagery EEG (2025, arXiv 2506.21338)."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Self
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from braindecode.models.base import EEGModuleMixin
from braindecode.models.util import models_dict
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nearfar.core.cards import Card
from nearfar.core.checkpoints import load_state_dict, read_state_dict
from nearfar.core.errors import CheckpointError
from nearfar.eeg.models.agtcnet_weights import _check_channels, keras_state, published_sizes, published_state
from nearfar.eeg.models.graphs import channel_names, electrode_graph
from nearfar.ops.aggregation.channel_pooling import ChannelPooling
from nearfar.ops.attention.positions import ScaledPositions
from nearfar.ops.common.folding import batch_norm_affine
from nearfar.ops.common.keras import glorot_uniform_, selu_
from nearfar.ops.convolution.separable import SeparableConv
from nearfar.ops.graph.attention import GraphConvAttention


class ChannelConv(nn.Module):
    """Every channel by itself: convolution over time, batch norm, average pooling. (B, N, T) -> (B, C, N, T').

    T' = floor((T - kernel_size + 1 - pool) / stride) + 1. All three are linear once the statistics are fixed, so in
    eval mode they are one strided convolution with kernel_size + pool - 1 taps. The result is channels_last.
    """

    def __init__(self, channels: int, kernel_size: int, pool: int, stride: int) -> None:
        super().__init__()
        self.pool, self.stride = pool, stride
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.norm = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)
        glorot_uniform_(self.weight, kernel_size, kernel_size * channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _ = x.shape
        x = x.reshape(batch * channels, 1, -1)
        if self.training:
            x = F.avg_pool1d(self.norm(F.conv1d(x, self.weight)), self.pool, self.stride)
        else:
            scale, shift = batch_norm_affine(self.norm)
            box = self.weight.new_full((1, 1, self.pool), 1 / self.pool)
            weight = F.conv1d(self.weight * scale[:, None, None], box, padding=self.pool - 1)
            x = F.conv1d(x, weight, shift, stride=self.stride)
        return x.unflatten(0, (batch, channels)).transpose(1, 2).contiguous(memory_format=torch.channels_last)


class TemporalContext(nn.Module):
    """Attention over the last few time steps, then a convolution, each added to its input. (B, C, L) -> (B, C, L).

    y = x + positions; y += dropout(BN(MHA(y, y))); y += dropout(SepConv(y)).
    """

    def __init__(
        self,
        channels: int,
        length: int,
        num_heads: int,
        head_dim: int,
        kernel_size: int,
        depth_multiplier: int,
        attention_drop: float,
        drop: tuple[float, float],
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads, self.attention_drop = num_heads, attention_drop
        self.positions = ScaledPositions(length, channels)
        self.qkv = nn.Linear(channels, 3 * width)
        self.output = nn.Linear(width, channels)
        self.norm = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)
        self.conv = SeparableConv(channels, channels, (kernel_size,), depth_multiplier)
        self.attention_dropout, self.conv_dropout = nn.Dropout(drop[0]), nn.Dropout(drop[1])
        glorot_uniform_(self.qkv.weight, channels * num_heads, channels * head_dim)  # Keras' fans of (C, heads, dim)
        glorot_uniform_(self.output.weight, width, num_heads * channels)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(x.mT)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.attention_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop).transpose(1, 2).flatten(2)
        x = x.mT + self.attention_dropout(self.norm(self.output(y).mT))
        return x + self.conv_dropout(self.conv(x))


class AGTCNet(
    EEGModuleMixin,
    nn.Module,
    license="apache-2.0",
    library_name="nearfar-eeg",
    docs_url="https://arxiv.org/abs/2506.21338",
    repo_url=None,
):
    """AGTCNet, a braindecode model: (batch, n_chans, n_times) in microvolts -> logits (batch, n_outputs).

    Every channel is filtered in time by the same filters (CTC); electrodes exchange information over a graph of
    neighbours, by an attention whose projections are temporal convolutions (GCAT); a learnt pooling takes the
    electrodes together (GCAP); a temporal convolution and a small attention over time finish (GTC, TCE). Published in
    four configurations (`VARIANTS`) of 74 to 87 thousand parameters. The published code ends in a softmax; this model
    ends before it.

    The graph is part of the model. It is made from `chs_info` by a rule of `nearfar.eeg.models.graphs`, or
    given as an adjacency. Weights belong to its electrodes, in their order: loading them into a model of other
    electrodes or another graph raises CheckpointError.

    After each step of any `torch.optim` optimizer that holds the model's parameters, `apply_constraints` runs by
    itself (a hook on optimizers, so it does not matter who trains); the forward is never altered by it.

    Parameters
    ----------
    graph : str or array (n_chans, n_chans)
        Rule ("auto", "10-10", "nearest", "radius"), or an adjacency of 0 and 1, rows sources and columns targets.
    ctc_filters, ctc_kernel, ctc_pool, ctc_pool_stride : int
        Filters per channel, their taps, and the average pooling after them, in samples.
    gcat_channels, gcat_heads, gcat_temporal_kernel, gcat_attention_kernel : int
        Graph attention: channels and number of heads, taps of its projections and of its scores.
    gcap_depth_multiplier : int
        Spatial filters per feature.
    gtc_filters, gtc_kernel, gtc_pool : int
        Temporal convolution, and the average pooling before and after it.
    tce_heads, tce_key_dim, tce_kernel : int
        Heads of the temporal attention, their size, and the taps of the last convolution.
    separable_depth_multiplier : int
        Depth multiplier of all separable convolutions.
    drop_prob : float
        Dropout after GCAT and after both poolings of GTC.
    graph_drop_prob, attention_drop_prob : float
        Dropout on the weights of the graph attention and of the temporal attention.
    tce_drop_prob : tuple of float
        Dropout after the temporal attention and after the last convolution.
    class_names : sequence of str
        What the outputs mean, in their order; None where that is not told. Saved with the model.

    Raises
    ------
    ValueError
        Fewer samples than the poolings need (65 with the defaults), no channels to make a graph from, a graph of
        another size.
    UserError
        Names or positions that the rule needs are missing.

    Notes
    -----
    Per trial: O(N T) convolutions and O(E T) attention for N channels and E edges. Batch norms as in Keras (eps 1e-3,
    momentum 0.01), Glorot-uniform weights with Keras' fans, biases zero.
    """

    CARD = Card(
        "AGTCNet",
        "2506.21338",
        "graph convolution with attention over electrodes, temporal convolution with attention",
        4.6e-7,
        weights="the authors' Keras files",
    )

    _HUB_NOTES_TEMPLATE = ""  # braindecode's text shows imports from braindecode

    def __init__(
        self,
        n_chans: int | None = None,
        n_outputs: int | None = None,
        n_times: int | None = None,
        chs_info: list[dict[str, Any]] | None = None,
        input_window_seconds: float | None = None,
        sfreq: float | None = None,
        graph: str | ArrayLike = "auto",
        ctc_filters: int = 8,
        ctc_kernel: int = 32,
        ctc_pool: int = 4,
        ctc_pool_stride: int = 2,
        gcat_channels: int = 16,
        gcat_heads: int = 2,
        gcat_temporal_kernel: int = 8,
        gcat_attention_kernel: int = 2,
        gcap_depth_multiplier: int = 2,
        gtc_filters: int = 96,
        gtc_kernel: int = 8,
        gtc_pool: int = 4,
        tce_heads: int = 2,
        tce_key_dim: int = 8,
        tce_kernel: int = 2,
        separable_depth_multiplier: int = 4,
        drop_prob: float = 0.25,
        graph_drop_prob: float = 0.2,
        attention_drop_prob: float = 0.6,
        tce_drop_prob: tuple[float, float] = (0.3, 0.2),
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        super().__init__(
            n_outputs=n_outputs if self.class_names is None else n_outputs or len(self.class_names),
            n_chans=n_chans,
            chs_info=chs_info,
            n_times=n_times,
            input_window_seconds=input_window_seconds,
            sfreq=sfreq,
        )
        if self.class_names is not None and not len(set(self.class_names)) == len(self.class_names) == self.n_outputs:
            raise ValueError(f"class_names are {self.class_names}; give one name to each of {self.n_outputs} outputs")
        self.channels = None if chs_info is None else channel_names(chs_info)
        adjacency = self._adjacency(graph)
        least = (gtc_pool**2 - 1) * ctc_pool_stride + ctc_pool + ctc_kernel - 1
        if self.n_times < least:
            raise ValueError(f"n_times is {self.n_times}; AGTCNet's filters and poolings need at least {least} samples")
        length = pooled_steps(self.n_times, ctc_kernel, ctc_pool, ctc_pool_stride, gtc_pool)
        multiplier, features = separable_depth_multiplier, ctc_filters + gcat_channels
        self.ctc = ChannelConv(ctc_filters, ctc_kernel, ctc_pool, ctc_pool_stride)
        self.gcat = GraphConvAttention(
            ctc_filters,
            gcat_channels,
            adjacency,
            gcat_heads,
            gcat_temporal_kernel,
            gcat_attention_kernel,
            multiplier,
            graph_drop_prob,
        )
        self.gcat_norm = nn.BatchNorm2d(gcat_channels, eps=1e-3, momentum=0.01)
        self.gcap = ChannelPooling(self.n_chans, features, gcap_depth_multiplier)
        self.pool, self.drop = nn.AvgPool1d(gtc_pool), nn.Dropout(drop_prob)
        self.gtc = SeparableConv(features * gcap_depth_multiplier, gtc_filters, (gtc_kernel,), multiplier)
        self.tce = TemporalContext(
            gtc_filters, length, tce_heads, tce_key_dim, tce_kernel, multiplier, attention_drop_prob, tce_drop_prob
        )
        self.final_layer = self._head(gtc_filters * length)
        _MODELS.add(self)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n_chans, n_times) microvolts -> logits (batch, n_outputs)."""
        if x.shape[1:] != (self.n_chans, self.n_times):
            raise ValueError(
                f"input has shape {tuple(x.shape)}; this model takes (batch, {self.n_chans}, {self.n_times})"
            )
        x = self.ctc(x)
        y = self.drop(selu_(self.gcat_norm(self.gcat(x))))
        x = self.gcap(torch.cat([x, y], dim=1))
        x = self.drop(self.pool(x))
        x = self.drop(self.pool(self.gtc(x)))
        return self.final_layer(self.tce(x).mT.flatten(1))

    @classmethod
    def from_published(
        cls,
        weights: str | PathLike[str] | Mapping[str, Tensor],
        *,
        n_outputs: int | None = None,
        n_times: int | None = None,
        sfreq: float | None = None,
        chs_info: list[dict[str, Any]] | None = None,
        graph: str | ArrayLike = "auto",
        class_names: Sequence[str] | None = None,
        **settings: Any,
    ) -> Self:
        """The model with published weights, in eval mode; every tensor of the file is accounted for.

        `weights` is a file that the released Keras code wrote (`run-1-best_model.h5`; its licence forbids passing the
        weights on, so you need a download of your own), or the same weights as a torch state dict or file with the
        names of `published_names`. Sizes come from the shapes. Window, rate and electrodes come from the entry of
        `VARIANTS` that fits, or from the caller; `settings` go to the constructor. The outputs are in the order of the
        variant's classes (`model.class_names`), or in that of `class_names`, which must be the same classes: the head
        is then reordered by name. For weights of no published configuration `class_names` are what its outputs mean.

        Raises CheckpointError where

        - a tensor is missing, left over or misshapen;
        - `class_names` are other classes than the published configuration's;
        - `n_outputs` or `n_times` are given and are not the file's (for other classes, call `reset_head` afterwards);
        - `chs_info` names other electrodes than the published configuration of that size, or another order, unless
          `graph` is an adjacency, which says that these are weights of another montage;
        - the file fits no published configuration and `chs_info` and `n_times` are not given.
        """
        name = str(weights) if isinstance(weights, str | PathLike) else "the state dict"
        state = weights if isinstance(weights, Mapping) else read_state_dict(weights)
        try:
            if any("kernel" in key for key in state):
                state = keras_state(state)
            sizes = published_sizes(state) | settings
            n_chans, classes, length = (sizes.pop(key) for key in ("n_chans", "n_outputs", "length"))
            fitting = [variant for variant in VARIANTS.values() if len(variant["chs_info"]) == n_chans]
            if fitting and chs_info is None:
                chs_info = fitting[0]["chs_info"]
            elif fitting and isinstance(graph, str):
                _check_channels(channel_names(fitting[0]["chs_info"]), channel_names(chs_info))
            variant = next((v for v in fitting if pooled_steps(v["n_times"], **sizes) == length), {})
            n_times, sfreq = n_times or variant.get("n_times"), sfreq or variant.get("sfreq")
            theirs = next((v["class_names"] for v in fitting if v["n_outputs"] == classes), class_names)
            if class_names is not None and sorted(class_names) != sorted(theirs):
                raise CheckpointError(f"tells {', '.join(theirs)} apart, not {', '.join(class_names)}")
            if n_times is None or (chs_info is None and isinstance(graph, str)):
                raise CheckpointError(
                    f"has {n_chans} channels and {length} pooled time steps, which is no published configuration; "
                    "give chs_info and n_times"
                )
            if n_outputs not in (None, classes):
                raise CheckpointError(f"tells {classes} classes apart, n_outputs={n_outputs} was asked for")
            if (steps := pooled_steps(n_times, **sizes)) != length:
                raise CheckpointError(f"has weights for {length} pooled time steps, n_times={n_times} gives {steps}")
            model = cls(n_chans, classes, n_times, chs_info, sfreq=sfreq, graph=graph, class_names=theirs, **sizes)
            load_state_dict(model, published_state(state) | {"_extra_state": model.get_extra_state()})
            if class_names is not None:
                model.reorder_classes(class_names)
        except (CheckpointError, RuntimeError, IndexError) as error:  # the last two from shapes that do not divide
            raise CheckpointError(f"{name}: {error}") from error
        return model.eval()

    def reset_head(self, n_outputs: int) -> None:
        """Put a newly initialized layer for `n_outputs` classes in the place of the last one."""
        self._set_n_outputs(n_outputs)
        self.final_layer = self._head(self.final_layer.in_features).to(self.final_layer.weight)
        self._name_classes(None)

    @torch.no_grad()
    def reorder_classes(self, class_names: Sequence[str]) -> None:
        """Bring the outputs into the order of `class_names`, in place; ValueError for other classes than its own."""
        if self.class_names is None or sorted(class_names) != sorted(self.class_names):
            own = "no names" if self.class_names is None else ", ".join(self.class_names)
            raise ValueError(f"the outputs have {own}, not {', '.join(class_names)}")
        order = [self.class_names.index(name) for name in class_names]
        self.final_layer.weight.copy_(self.final_layer.weight[order])
        self.final_layer.bias.copy_(self.final_layer.bias[order])
        self._name_classes(list(class_names))

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """The limits that training keeps, in place; runs by itself after each optimizer step.

        Spatial filters (GCAP) have an L2 norm of at most 1 over the electrodes, the last layer's weights of at most
        0.25 per class, and the scale of the position table stays in [0, 1].
        """
        self.gcap.constrain()
        self.final_layer.weight.renorm_(2, 0, 0.25)
        self.tce.positions.constrain()

    def get_extra_state(self) -> Tensor:
        """Electrodes, graph and classes, as UTF-8 JSON in a uint8 tensor: part of the state dict."""
        edges = self.gcat.attention.adjacency.nonzero().tolist()
        told = {"channels": self.channels, "edges": edges}
        told |= {} if self.class_names is None else {"classes": self.class_names}
        content = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
        return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights of other electrodes, another graph or other classes with CheckpointError."""
        theirs = json.loads(bytes(state.tolist()))
        ours = json.loads(bytes(self.get_extra_state().tolist()))
        if theirs["channels"] and ours["channels"]:
            _check_channels(theirs["channels"], ours["channels"])
        if theirs["edges"] != ours["edges"]:
            raise CheckpointError(
                "the weights were trained on another electrode graph "
                f"({len(theirs['edges'])} edges, this model has {len(ours['edges'])}); build the model with that graph"
            )

        if theirs.get("classes") and self.class_names and theirs["classes"] != self.class_names:
            raise CheckpointError(
                f"the weights tell {', '.join(theirs['classes'])} apart, in this order, not "
                f"{', '.join(self.class_names)}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _MODELS.add(self)  # copies and unpickled models are constrained too

    def _adjacency(self, graph: str | ArrayLike) -> Tensor:
        if isinstance(graph, str):
            if self.channels is None:
                raise ValueError(
                    "AGTCNet makes its electrode graph from chs_info (for example raw.info['chs']); "
                    "give chs_info, or an adjacency as graph"
                )
            return torch.as_tensor(electrode_graph(self.chs_info, graph))
        adjacency = torch.as_tensor(np.asarray(graph))
        if adjacency.shape != (self.n_chans, self.n_chans):
            raise ValueError(
                f"graph has shape {tuple(adjacency.shape)}, expected ({self.n_chans}, {self.n_chans}) for the channels"
            )
        self._remember(graph=(adjacency == 1).int().tolist())  # what save_pretrained writes has to be JSON
        return adjacency

    def _name_classes(self, class_names: list[str] | None) -> None:
        self.class_names = class_names
        self._remember(class_names=class_names)

    def _remember(self, **settings: Any) -> None:
        for config in (getattr(self, "_hub_mixin_config", None), getattr(self, "_braindecode_init_kwargs", None)):
            if config is not None:
                config |= settings

    def _head(self, features: int) -> nn.Linear:
        head = nn.Linear(features, self.n_outputs)
        glorot_uniform_(head.weight, features, self.n_outputs)
        nn.init.zeros_(head.bias)
        return head


def pooled_steps(
    n_times: int, ctc_kernel: int = 32, ctc_pool: int = 4, ctc_pool_stride: int = 2, gtc_pool: int = 4, **_: Any
) -> int:
    """Time steps that AGTCNet's temporal attention sees of `n_times` samples."""
    return ((n_times - ctc_kernel + 1 - ctc_pool) // ctc_pool_stride + 1) // gtc_pool // gtc_pool


models_dict.setdefault("AGTCNet", AGTCNet)  # so that braindecode's classifiers find it by name

_MODELS: WeakSet[AGTCNet] = WeakSet()


def _constrain_stepped(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """After any optimizer's step: the constraints of the models whose parameters it holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in _MODELS:
        if any(id(p) in held for p in model.parameters()):
            model.apply_constraints()


register_optimizer_step_post_hook(_constrain_stepped)

_BCICIV2A = "Fz FC3 FC1 FCz FC2 FC4 C5 C3 C1 Cz C2 C4 C6 CP3 CP1 CPz CP2 CP4 P1 Pz P2 POz"

_EEGMMIDB = (
    "FC5 FC3 FC1 FCz FC2 FC4 FC6 C5 C3 C1 Cz C2 C4 C6 CP5 CP3 CP1 CPz CP2 CP4 CP6 Fp1 Fpz Fp2 AF7 AF3 AFz AF4 AF8 "
    "F7 F5 F3 F1 Fz F2 F4 F6 F8 FT7 FT8 T7 T8 T9 T10 TP7 TP8 P7 P5 P3 P1 Pz P2 P4 P6 P8 PO7 PO3 POz PO4 PO8 O1 Oz O2 Iz"
)


def _variant(channels: str, sfreq: float, n_times: int, classes: str) -> dict[str, Any]:
    chs_info, names = [{"ch_name": name} for name in channels.split()], classes.split()
    outputs = {"n_outputs": len(names), "class_names": names}
    return outputs | {"n_times": n_times, "sfreq": sfreq, "chs_info": chs_info}


_HANDS = "left_hand right_hand"

VARIANTS: dict[str, dict[str, Any]] = {
    "bciciv2a-3s": _variant(
        _BCICIV2A, 125, 375, "left_hand right_hand feet tongue"
    ),  # 0 to 3 s after the cue, the headline configuration
    "bciciv2a-long": _variant(_BCICIV2A, 125, 562, _HANDS + " feet tongue"),  # -0.5 to 4 s
    "eegmmidb-4class": _variant(_EEGMMIDB, 160, 640, _HANDS + " hands feet"),  # 0 to 4 s
    "eegmmidb-2class": _variant(_EEGMMIDB, 160, 640, _HANDS),
}
"""The published configurations: `AGTCNet(**VARIANTS["bciciv2a-3s"])`. The channels and the classes are in
the weights' order."""
