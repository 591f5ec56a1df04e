"""Contracts of AGTCNet: any published variant from its settings and shapes."""

import inspect

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.eeg.models.agtcnet import AGTCNet
from nearfar.eeg.models.agtcnet_weights import published_gcat, published_sizes
from nearfar.ops.graph.attention import GraphConvAttention


class _PublishedGCAT(nn.Module):
    """The graph attention in the published layout: (B, C, T, N) and an adjacency per sample -> (B, C', T, N)."""

    def __init__(self, gcat: GraphConvAttention) -> None:
        super().__init__()
        self.gcat = gcat

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        return self.gcat(x.mT, adjacency).mT


def build_contract(contract: Contract) -> nn.Module:
    """The contract's model, or its graph attention alone (`op-gcat`), in eval mode with the published state."""
    settings, state = contract.settings, contract.state()
    contract.document("dropouts", "layout")
    contract.require(heads_merge="mean", gcat_heads_merge="mean", batchnorm_eps=1e-3, ctc_padding="valid")
    contract.require(gcat_bias=True, activation="selu")
    contract.require_text(self_loops="True|set on the diagonal", attention_activation="PReLU with a slope per .*")
    if contract.variant.startswith("op-"):
        gcat = GraphConvAttention(
            settings["in_channels"],
            settings["channels"],
            torch.ones(settings["nodes"], settings["nodes"]),
            settings["heads"],
            settings["temporal_kernel"],
            settings["attention_kernel"],
            settings["separable_depth_multiplier"],
        )
        load_state_dict(gcat, published_gcat(state, settings["in_channels"]))
        return _PublishedGCAT(gcat).eval()
    names = settings["channel_order"]
    graph = np.zeros((len(names), len(names)))
    for edge in settings["edges_undirected"]:
        ends = edge.split("-")
        if len(ends) != 2 or not set(ends) <= set(names):
            raise UserError(f"{contract.path}: the edge {edge!r} joins no two electrodes of channel_order")
        i, j = map(names.index, ends)
        graph[i, j] = graph[j, i] = 1
    contract.require(channels=len(names), classes=published_sizes(state)["n_outputs"])
    return AGTCNet.from_published(
        state,
        n_times=settings["samples"],
        chs_info=[{"ch_name": name} for name in names],
        graph=graph,
        **{name: settings[name] for name in inspect.signature(AGTCNet).parameters if name in settings},
    )
