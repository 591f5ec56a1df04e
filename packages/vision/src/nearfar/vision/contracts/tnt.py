"""Contracts of TNT and PyramidTNT: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.ops.attention.self_attention import PooledAttention
from nearfar.ops.tokens.words import WordMerging
from nearfar.vision.models.tnt import TNT, WORDS, PyramidTNT, TNTBlock


class OnGrid(nn.Module):
    """An operator on the grid that the settings name."""

    def __init__(self, operator: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.operator, self.grid = operator, grid

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.operator(x, self.grid, *more)


class Named(nn.Module):
    """A block's words and sentences by their names."""

    def __init__(self, block: TNTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, words: Tensor, sentences: Tensor) -> dict[str, Tensor]:
        return dict(zip(("words", "sentences"), self.block(words, sentences), strict=True))


def build_contract(contract: Contract) -> Callable[..., Any]:
    """TNT, PyramidTNT, one block of TNT, pooled attention or the merging of words, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(layernorm_eps=1e-5, batchnorm_eps=1e-5, activation="exact GELU")
    # shapes tell the stem's form and where words and tables are; the number of sentences is the input's
    contract.document("stem", "inner_blocks", "relative_position", "head", "sentences")
    if "conv.0.weight" in state:
        out_dim, dim = state["conv.0.weight"].shape[:2]
        contract.require(dim_in=dim, dim_out=out_dim, stride=2, words=[WORDS, WORDS])
        state = {name.replace("conv.0.", "conv."): value for name, value in state.items()}
        return OnGrid(loaded(WordMerging(dim, out_dim, WORDS), state), tuple(settings["grid"]))
    if "kv.weight" in state:
        dim = len(state["proj.bias"])
        contract.require(dim=dim, qkv_bias="q.bias" in state)
        operator = PooledAttention(dim, settings["heads"], settings["reduction"], qkv_bias="q.bias" in state)
        return OnGrid(loaded(operator, state), tuple(settings["grid"]))
    if {"inner_norm1.weight", "norm_in.weight"} & state.keys():
        renamed = TNT.published_state({f"blocks.0.{name}": value for name, value in state.items()})
        block = {name.removeprefix("blocks.0."): value for name, value in renamed.items()}
        dim, word_dim = len(block["outer.norm1.weight"]), len(block["inner.norm1.weight"])
        contract.require(
            outer_dim=dim,
            inner_dim=word_dim,
            words=WORDS**2,
            mlp_ratio=ratio(len(block["outer.mlp.fc1.bias"]), dim),
            qkv_bias="outer.attn.qkv.bias" in block,
            class_token=True,
        )
        sentences = contract.inputs[-1]["shape"][1] - 1
        contract.require(mlp_ratio=ratio(len(block["outer.mlp.fc1.bias"]), dim), sentences=sentences)
        built = TNTBlock(
            dim,
            word_dim,
            settings["outer_heads"],
            settings["inner_heads"],
            ratio(len(block["outer.mlp.fc1.bias"]), dim),
            qkv_bias="outer.attn.qkv.bias" in block,
            legacy=len(block["exchange.norm1.weight"]) == word_dim,
        )
        return Named(loaded(built, block))
    heads = {"num_heads": settings.get("outer_heads"), "word_heads": settings.get("inner_heads")}
    heads = {name: n[0] if isinstance(n, list) else n for name, n in heads.items() if n is not None}
    if "patch_embed.common_conv.0.weight" not in state:
        model = TNT.from_published(state, **heads)
        block = model.blocks[0]
        contract.require(
            patch_size=model.patch_size,
            inner_stride=model.patch_size // WORDS,
            words_per_patch=WORDS**2,
            depth=len(model.blocks),
            outer_dim=model.embed_dim,
            inner_dim=model.word_pos.shape[2],
            mlp_ratio=block.outer.mlp.fc1.out_features / model.embed_dim,
            qkv_bias=block.outer.attn.qkv.bias is not None,
            num_classes=model.num_classes,
            image_size=list(model.img_size),
        )
        return model
    model = PyramidTNT.from_published(state, **heads)
    blocks = [stage.blocks[0] for stage in model.stages]
    contract.require(
        depths=[len(stage.blocks) for stage in model.stages],
        outer_dims=[info["num_chs"] for info in model.feature_info],
        inner_dims=[block.inner.attn.proj.out_features for block in blocks],
        outer_heads=[block.attn.num_heads for block in blocks],
        inner_heads=[block.inner.attn.num_heads for block in blocks],
        kv_reduction=[block.attn.reduction for block in blocks],
        words_per_patch=WORDS**2,
        mlp_ratio=blocks[0].mlp.fc1.out_features / blocks[0].mlp.fc1.in_features,
        qkv_bias=blocks[0].attn.q.bias is not None,
        num_classes=model.num_classes,
        image_size=list(model.img_size),
    )
    return model
