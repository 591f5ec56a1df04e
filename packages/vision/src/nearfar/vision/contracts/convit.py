"""Contracts of ConViT: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.ops.attention.gated_positional import GatedPositionalAttention
from nearfar.vision.models.convit import ConViT


class OfTokens(nn.Module):
    """An operator of a grid, called with its tokens; with `weights` it gives its attention."""

    def __init__(self, operator: GatedPositionalAttention, grid: tuple[int, int], weights: bool) -> None:
        super().__init__()
        self.operator, self.grid, self.weights = operator, grid, weights

    def forward(self, x: Tensor) -> Any:
        x = x.mT.unflatten(2, self.grid)
        return {"attention": self.operator.attention_map(x)} if self.weights else self.operator(x).flatten(2).mT


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, gated positional attention, or its weights, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document("position_embedding", "locality_strength")  # how it starts
    if "gating_param" in state:
        heads, dim = len(state["gating_param"]), len(state["proj.bias"])
        contract.require(dim=dim, heads=heads, qkv_bias="v.bias" in state)
        operator = loaded(GatedPositionalAttention(dim, heads, qkv_bias="v.bias" in state), state)
        weights = contract.outputs[0]["name"] == "out.attention"
        return OfTokens(operator, tuple(settings["grid"]), weights)
    model = ConViT.from_published(state)
    heads, depth = model.blocks[0].attn.num_heads, len(model.blocks)
    contract.require_text(class_token=rf"prepended before block index {model.local_layers}")
    contract.require(
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        heads=heads,
        head_dim=model.embed_dim // heads,
        depth=depth,
        gpsa_layers=model.local_layers,
        mhsa_layers=depth - model.local_layers,
        mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.embed_dim,
        qkv_bias=model.blocks[-1].attn.qkv.bias is not None,
        num_classes=model.num_classes,
        image_size=list(model.img_size),
        layernorm_eps=1e-6,
        activation="exact GELU",
    )
    return model
