"""Contracts of EViT: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, ratio, rename
from nearfar.core.contracts import Contract
from nearfar.ops.attention.self_attention import SelfAttention
from nearfar.vision.models.evit import EViT, ReorganisingBlock


class WithTrail(nn.Module):
    """Logits and the indices that every reorganisation kept."""

    def __init__(self, model: EViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens, trail = self.model.trail(x)
        return {"logits": self.model.forward_head(tokens)} | {f"kept_index_{i}": k for i, k in enumerate(trail.kept)}


class OneBlock(nn.Module):
    """A block on tokens: those after it and the indices that it kept."""

    def __init__(self, block: ReorganisingBlock, keep: float, fuse: bool) -> None:
        super().__init__()
        self.block, self.keep, self.fuse_tokens = block, keep, fuse

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens, kept, _, _ = self.block.reduce(x, self.keep, self.fuse_tokens)
        return {"tokens": tokens, "index": kept}


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network with the tokens it kept, or one reorganising block."""
    settings, state = contract.settings, contract.state()
    contract.require(layer_norm_eps=1e-6, class_token=True, block_numbering="from 0")
    if "cls_token" in state:
        model = EViT.from_published(
            state,
            keep_rate=settings.get("keep_rate", 1.0),
            reduce_at=settings.get("reorganise_in_blocks", (3, 6, 9)),
            fuse=settings.get("fuse_inattentive_tokens", False),
            **({"num_heads": settings["num_heads"]} if "num_heads" in settings else {}),
        )
        contract.require(
            image_size=model.img_size[0],
            patch_size=model.patch_size,
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.embed_dim,
            qkv_bias=model.blocks[0].attn.qkv.bias is not None,
            classes=model.num_classes,
        )
        return WithTrail(model) if contract.outputs[0]["name"] != "out" else model
    state = rename(state, [(r"block\.", "")])
    dim, hidden = len(state["norm1.weight"]), len(state["mlp.fc1.bias"])
    bias = "attn.qkv.bias" in state
    contract.require(dim=dim, mlp_ratio=hidden / dim, qkv_bias=bias)
    block = ReorganisingBlock(dim, SelfAttention(dim, settings["heads"], qkv_bias=bias), ratio(hidden, dim))
    return OneBlock(loaded(block, state), settings["keep_rate"], settings["fuse"]).eval()
