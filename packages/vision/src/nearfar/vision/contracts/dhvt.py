"""Contracts of DHVT: any published variant from its settings and shapes."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.head_tokens import HeadTokenAttention
from nearfar.ops.convolution.overlapping import ChannelGatedFeedForward, OverlappingPatches
from nearfar.vision.models.dhvt import DHVT, DHVTBlock


class OnSquare(nn.Module):
    """A module of tokens behind a class token and their square grid, called with the tokens alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1] - 1)
        return self.module(x, (side, side))


class Tokens(nn.Module):
    """The stem with its map as tokens."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).flatten(2).mT


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, one block, its attention or feed-forward, or the stem, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document("tokens", "position_embedding")
    contract.require(image_size=contract.inputs[0]["shape"][-1])
    contract.require(block_norm_eps=1e-6, head_token_norm_eps=1e-5, bn_eps=1e-5)
    if "conv3.weight" in state:
        dim, hidden = state["conv3.weight"].shape[:2]
        kernel = state["conv2.weight"].shape[-1]
        contract.require(dim=dim, hidden=hidden, kernel_size=kernel)
        return OnSquare(loaded(ChannelGatedFeedForward(dim, hidden, kernel), state)).eval()
    if "ht_proj.weight" in state:
        heads, dim = state["pos_embed"].shape[-2:]
        contract.require(dim=dim, num_heads=heads, qkv_bias="qkv.bias" in state)
        return loaded(HeadTokenAttention(dim, heads, qkv_bias="qkv.bias" in state), state)
    if "proj.0.0.weight" in state:
        patch = 2 ** sum(f"proj.{2 * i}.0.weight" in state for i in range(8))
        dim = state["post_affine.alpha"].numel()
        contract.require(patch_size=patch, embed_dim=dim)
        return Tokens(loaded(OverlappingPatches(dim, patch, state["proj.0.0.weight"].shape[1]), state)).eval()
    if "attn.ht_proj.weight" in state:
        heads, dim = state["attn.pos_embed"].shape[-2:]
        contract.require(num_heads=heads)
        block = DHVTBlock(dim, heads, len(state["mlp.conv1.bias"]), qkv_bias="attn.qkv.bias" in state)
        return OnSquare(loaded(block, state)).eval()
    model = DHVT.from_published(state)
    found = DHVT.published_settings(DHVT.published_state(state))
    names = {"patch_size": "patch_size", "embed_dim": "dim", "num_classes": "num_classes", "qkv_bias": "qkv_bias"}
    names |= {"depth": "depth", "num_heads": "num_heads"}
    contract.require(**{theirs: found[ours] for theirs, ours in names.items()})
    if abs(settings.get("mlp_ratio", found["mlp_ratio"]) - found["mlp_ratio"]) > 1e-6:
        raise UserError(f"{contract.path}: mlp_ratio is {settings['mlp_ratio']}, the state has {found['mlp_ratio']}")
    return model
