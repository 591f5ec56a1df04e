"""Contracts of DuoFormer: any published form from its settings and shapes, and its parts."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import count, loaded, rename
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.medical.models.duoformer import (
    ChannelToken,
    DuoFormer,
    MultiScaleTokens,
    PatchAttention,
    ScaleBlock,
    published_state,
)

TOLD = [
    "backbone",
    "scales",
    "depth_scale_blocks",
    "depth_patch_blocks",
    "embed_dim",
    "mlp_ratio",
    "patch_attention",
    "classes",
    "patch_grid",
    "tokens_per_patch",
    "image",
    "activation",
    "stage_channels",
    "order",
    "dim",
    "depth",
    "layout",
    "convs_in_fusion",
    "scale_token",
]
"""Settings that shapes tell, or that describe in words what the system always does."""


class _Maps(nn.Module):
    """A part that reads the stages' maps, finest first, as single arguments."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *maps: Tensor) -> Tensor:
        return self.part(maps)


class _Patches(nn.Module):
    """Scale blocks or patch layers on (B, patches, tokens, dim)."""

    def __init__(self, part: nn.Module, mean: bool = False) -> None:
        super().__init__()
        self.part, self.mean = part, mean

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.part, PatchAttention):
            side = round(x.shape[1] ** 0.5)
            return self.part(x.mean(2) if self.mean else x[:, :, 0], (side, side), first=False)
        return self.part(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its tokens, its scale token, a scale block or the patch layers that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(layernorm_eps=1e-6, qkv_bias=True)
    contract.document(*TOLD)
    heads = settings.get("heads", 8)
    if any(name.startswith("resnet_projector.") for name in state):
        token = settings.get("scale_token", "first")
        known = {"random": "random", "channel": "channel", "mean": "mean", "average": "mean"}
        return DuoFormer.from_published(state, heads, scale_token=known.get(str(token), "first"))
    if "norm1.weight" in state:
        dim = len(state["norm1.weight"])
        block = ScaleBlock(dim, heads, len(state["mlp.fc1.bias"]) / dim)
        rules = [(r"mlp\.fc1\.", "mlp.0."), (r"mlp\.fc2\.", "mlp.2.")]
        return _Patches(loaded(block, rename(state, rules))).eval()
    if "pos_embed" in state:
        rows, dim = state["pos_embed"].shape[1:]
        layers = PatchAttention(dim, heads, count(state, r"blocks\.(\d+)\."), round((rows - 1) ** 0.5))
        state = rename(state, [(r"blocks\.(\d+)\.attn\.", r"layers.\1.")])
        mean = settings.get("scale_token", "channel") not in ("channel", "random", "first")
        return _Patches(loaded(layers, state), mean).eval()
    channels = [spec["shape"][1] for spec in contract.inputs]
    if any(name.startswith("projection.proj_heads") for name in state):
        part = {k.removeprefix("tokens."): v for k, v in published_state(state).items()}
        dim = len(part["heads.0.bias"])
        return _Maps(loaded(MultiScaleTokens(channels, dim), part)).eval()
    if any(name.startswith("chann_proj_all.") for name in state):
        part = {k: v for k, v in published_state(state, len(channels)).items() if k.startswith("channel_token.")}
        part = {k.removeprefix("channel_token."): v for k, v in part.items()}
        depth = count(part, r"fusion\.(\d+)\.")
        return _Maps(loaded(ChannelToken(channels, len(part["fusion.0.0.bias"]), depth), part)).eval()
    raise UserError(f"{contract.path}: {contract.variant} is no part of DuoFormer")
