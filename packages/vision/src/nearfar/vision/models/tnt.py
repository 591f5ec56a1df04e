"""TNT and PyramidTNT: small tokens ("words") inside every patch ("sentence"), each with a transformer of its own.

Han et al., "Transformer in Transformer" (NeurIPS 2021) and "PyramidTNT" (2022). timm has TNT with the same weights and
in the form of its first port (`tnt_s_legacy_*`); neither timm nor transformers has PyramidTNT. Here the tables of
positions are resized, so any size works.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio, rename
from nearfar.ops.attention.self_attention import PooledAttention, SelfAttention
from nearfar.ops.common.layers import DropPath
from nearfar.ops.common.tables import Derived
from nearfar.ops.tokens.words import WordEmbedding, WordMerging, WordsToSentences, cut
from nearfar.vision.models.pyramid import drop_path_rates
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import (
    Block,
    Mlp,
    Positions,
    State,
    TokenHead,
    TokenModel,
    init_linear,
    pair,
    picture_size,
    split_positions,
)
from nearfar.vision.tracing import whole

PATCH = 16
"""Side of TNT's patches."""

WORDS = 4
"""Words along each side of a patch."""


class InnerBlock(nn.Module):
    """The transformer of a sentence's words, (B N, M, c); norms are over words, or over the sentence's vector."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, qkv_bias: bool, *, norm_sentence: bool
    ) -> None:
        super().__init__()
        width = WORDS**2 * dim if norm_sentence else dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.norm_sentence = norm_sentence

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.flatten(1)).view(x.shape) if self.norm_sentence else norm(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.normed(self.norm1, x)))
        return x + self.drop_path(self.mlp(self.normed(self.norm2, x)))


class TNTBlock(nn.Module):
    """Words through their transformer, sentences gain a projection of their words, then a transformer block.

    Args:
        dim, word_dim: channels of sentences and of words.
        num_heads, word_heads: heads of both.
        legacy: as in timm's first port, a norm of each word before the projection, which has a bias and no norm after.
    """

    def __init__(
        self,
        dim: int,
        word_dim: int,
        num_heads: int,
        word_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        *,
        qkv_bias: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.inner = InnerBlock(word_dim, word_heads, mlp_ratio, drop_path, qkv_bias, norm_sentence=False)
        settings = {"norm_each": True, "bias": True, "norm_out": False} if legacy else {}
        self.exchange = WordsToSentences(dim, word_dim, WORDS**2, **settings)
        self.outer = Block(dim, SelfAttention(dim, num_heads, qkv_bias=qkv_bias), mlp_ratio, drop_path, eps=1e-5)

    def forward(self, words: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        words = self.inner(words)
        prefix = sentences.shape[1] - words.shape[0] // sentences.shape[0]
        return words, self.outer(self.exchange(words, sentences, prefix))


class TNT(TokenModel):
    """Patches as sentences of 4 x 4 words; inner and outer transformers side by side.

    Input (B, in_chans, H, W) with sides that are multiples of 16.

    Args:
        dim, depth, num_heads: channels, blocks and heads of sentences.
        word_dim, word_heads: channels and heads of words.
        num_classes: classes; 0 for the pooled token.
        img_size: size of the pictures that the position table is made for.
        legacy: the form of timm's first port: words come from a convolution over the whole picture; see `TNTBlock`.
        no_embed_class: the class token has no position of its own.
        Others as in `ConViT`.
    """

    CARD = Card(
        "TNT",
        "2103.00112",
        "transformers of words inside every patch and of patches",
        6.1e-7,
        weights="official, timm, timm's first port",
        small={
            "nearfar_tnt_s_patch16_224": {"dim": 96, "depth": 4, "num_heads": 4, "word_dim": 12, "word_heads": 2},
        },
    )

    RULES = (
        (r"(patch_embed|pixel_embed)\.", "words."),
        (r"proj_norm1\.|norm1_proj\.", "start.norm1."),
        (r"proj\.", "start.proj."),
        (r"proj_norm2\.|norm2_proj\.", "start.norm2."),
        (r"(blocks\.\d+)\.(?:inner_norm1|norm_in)\.", r"\1.inner.norm1."),
        (r"(blocks\.\d+)\.(?:inner_attn|attn_in)\.", r"\1.inner.attn."),
        (r"(blocks\.\d+)\.(?:inner_norm2|norm_mlp_in)\.", r"\1.inner.norm2."),
        (r"(blocks\.\d+)\.(?:inner_mlp|mlp_in)\.", r"\1.inner.mlp."),
        (r"(blocks\.\d+)\.(?:proj_norm1|norm1_proj)\.", r"\1.exchange.norm1."),
        (r"(blocks\.\d+)\.proj\.", r"\1.exchange.proj."),
        (r"(blocks\.\d+)\.(?:proj_norm2|norm2_proj)\.", r"\1.exchange.norm2."),
        (r"(blocks\.\d+)\.(?:outer_norm1|norm_out)\.", r"\1.outer.norm1."),
        (r"(blocks\.\d+)\.(?:outer_attn|attn_out)\.", r"\1.outer.attn."),
        (r"(blocks\.\d+)\.(?:outer_norm2|norm_mlp)\.", r"\1.outer.norm2."),
        (r"(blocks\.\d+)\.(?:outer_mlp|mlp)\.", r"\1.outer.mlp."),
        (r"(inner_pos|pixel_pos)$", "word_pos"),
        (r"patch_pos$", "outer_pos"),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )
    IGNORE = (r"outer_tokens$",)
    UNSHAPED = ("num_heads", "word_heads")
    FIRST_CONV = "words.proj"

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        word_dim: int = 24,
        word_heads: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 224,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        legacy: bool = False,
        no_embed_class: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.words = WordEmbedding(in_chans, word_dim, PATCH, WORDS, isolated=not legacy)
        self.word_pos = nn.Parameter(torch.empty(1, WORDS**2, word_dim))
        self.start = WordsToSentences(dim, word_dim, WORDS**2, bias=True)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        for table in (self.word_pos, self.cls_token):
            nn.init.trunc_normal_(table, std=0.02)
        grid = tuple(n // PATCH for n in pair(img_size))
        self.pos_embed = Positions(dim, grid, prefix=0 if no_embed_class else 1)
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        settings = {"qkv_bias": qkv_bias, "legacy": legacy}
        self.blocks = nn.ModuleList(
            TNTBlock(dim, word_dim, num_heads, word_heads, mlp_ratio, rate, **settings) for rate in rates
        )
        self.norm = nn.LayerNorm(dim)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.dynamic_img_pad = dynamic_img_pad
        self.finish(num_classes, in_chans, img_size, PATCH, [dim] * depth)
        self.apply(init_linear)

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return PATCH

    def embed(self, x: Tensor) -> State:
        height, width = x.shape[-2:]
        size = (height // self.patch_size, width // self.patch_size)
        words = whole(self.words, x) + self.word_pos
        sentences = whole(self.pos_embed, self.start.gain(words, x.shape[0]), size)
        return self.with_prefix(sentences), size, words

    def apply_block(self, index: int, state: State) -> State:
        sentences, size, words = state
        words, sentences = self.run(self.blocks[index], words, sentences)
        return sentences, size, words

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"word_pos"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^cls_token|^pos_embed|^words\.|^word_pos|^start\."
        return {**super().group_matcher(coarse), "stem": stem}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = merged(rename(state, cls.RULES))
        if (table := state.get("word_pos")) is not None and table.ndim == 4:  # timm's (1, c, 4, 4)
            state["word_pos"] = table.flatten(2).mT
        return split_positions(state, "outer_pos", prefix=1)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        word_dim, in_chans, *_ = state["words.proj.weight"].shape
        dim, patch = len(state["norm.weight"]), PATCH
        heads = {v.settings["dim"]: (v.settings["num_heads"], v.settings["word_heads"]) for v in TNTS.values()}
        num_heads, word_heads = heads.get(dim, (None, None))
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_heads": num_heads,
            "word_dim": word_dim,
            "word_heads": word_heads,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "mlp_ratio": ratio(len(state["blocks.0.outer.mlp.fc1.bias"]), dim),
            "qkv_bias": "blocks.0.outer.attn.qkv.bias" in state,
            "legacy": len(state["blocks.0.exchange.norm1.weight"]) == word_dim,
            "no_embed_class": "pos_embed.prefix" not in state,
        }


def merged(state: Mapping[str, Tensor], within: str = "") -> dict[str, Tensor]:
    """`state` with queries, keys and values in one matrix, where they are published as qk and v, or as q and kv.

    `within`: only in modules whose name matches.
    """
    found = dict(state)
    for name in state:
        if match := re.fullmatch(rf"({within}.*attn)\.(qk|q)\.(weight|bias)", name):
            rest = f"{match[1]}.{'v' if match[2] == 'qk' else 'kv'}.{match[3]}"
            if rest in found:
                found[f"{match[1]}.qkv.{match[3]}"] = torch.cat((found.pop(name), found.pop(rest)))
    return found


class PairPositions(Positions):
    """A table of every query cell and every pooled key cell of a grid for each head, added to the logits.

    (heads, h, w, h / r, w / r, 1); on another grid it is resized over the keys, then the queries, as in `Positions`.
    """

    def __init__(self, num_heads: int, grid: tuple[int, int], reduction: int) -> None:
        super().__init__(1, grid, antialias=True)
        self.reduction = reduction
        keys = tuple(n // reduction for n in grid)
        self.grid = nn.Parameter(torch.randn(num_heads, *grid, *keys, 1))
        self.kept = Derived()

    def resized(self, table: Tensor, size: tuple[int, int]) -> Tensor:
        keys = tuple(n // self.reduction for n in size)
        resize = lambda x, size: F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)  # noqa: E731
        over_keys = resize(table[..., 0].float().flatten(1, 2), keys)
        over_queries = resize(over_keys.unflatten(1, table.shape[1:3]).permute(0, 3, 4, 1, 2).flatten(1, 2), size)
        return over_queries.unflatten(1, keys).permute(0, 3, 4, 1, 2)[..., None].to(table.dtype)

    def bias(self, size: tuple[int, int]) -> Tensor:
        """The table for a grid of `size`, (1, heads, N, M)."""
        if tuple(size) == self.size:
            return self.grid.flatten(3).flatten(1, 2)[None]
        resize = lambda: self.resized(self.grid, size).flatten(3).flatten(1, 2)[None]  # noqa: E731
        return self.kept.get(self.grid, tuple(size), resize)


class PyramidBlock(nn.Module):
    """A transformer block with pooled keys; with words, they come first and sentences gain their projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        mlp_ratio: float,
        drop_path: float,
        qkv_bias: bool,
        word_dim: int = 0,
        word_heads: int = 1,
    ) -> None:
        super().__init__()
        self.inner = self.exchange = None
        if word_dim:
            self.inner = InnerBlock(word_dim, word_heads, mlp_ratio, drop_path, qkv_bias, norm_sentence=True)
            self.exchange = WordsToSentences(dim, word_dim, WORDS**2)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PooledAttention(dim, num_heads, reduction, qkv_bias=qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, words: Tensor, sentences: Tensor, size: tuple[int, int], pairs: PairPositions
    ) -> tuple[Tensor, Tensor]:
        if self.inner is not None:
            words = self.inner(words)
            sentences = self.exchange(words, sentences)
        sentences = sentences + self.drop_path(self.attn(self.norm1(sentences), size, bias=pairs.bias(size)))
        return words, sentences + self.drop_path(self.mlp(self.norm2(sentences)))


class PyramidStem(nn.Module):
    """3x3 convolutions with batch norm and ReLU: words at stride 2, in cells of 4 x 4, and sentences at stride 8."""

    def __init__(self, in_chans: int, word_dim: int, dim: int) -> None:
        super().__init__()

        def convs(*layers: tuple[int, int, int]) -> nn.Sequential:
            steps = [(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)) for a, b, s in layers]
            return nn.Sequential(*(part for step in steps for part in step))

        i = word_dim
        self.common = convs((in_chans, 2 * i, 2))
        self.inner = convs((2 * i, i, 1))
        self.outer = convs((2 * i, 4 * i, 2), (4 * i, 8 * i, 2), (8 * i, dim, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.common(x)
        return cut(self.inner(x), WORDS).flatten(2).mT, self.outer(x)


class PyramidStage(nn.Module):
    """Merging (but in the first stage) and blocks of one resolution, which share a table of positions."""

    def __init__(
        self, merge: tuple[int, int, int, int] | None, blocks: Sequence[nn.Module], positions: PairPositions
    ) -> None:
        super().__init__()
        self.merge_words = self.merge_sentences = None
        if merge:
            word_in, word_out, dim_in, dim_out = merge
            self.merge_words = WordMerging(word_in, word_out, WORDS)
            self.merge_sentences = nn.ModuleDict(
                {"norm": nn.LayerNorm(dim_in), "conv": nn.Conv2d(dim_in, dim_out, 3, 2, padding=1)}
            )
        self.pairs = positions
        self.blocks = nn.ModuleList(blocks)

    def merge(self, words: Tensor, sentences: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Words and sentences of the next grid."""
        words = whole(self.merge_words, words, size)
        maps = self.merge_sentences["norm"](sentences).mT.unflatten(2, size)
        maps = self.merge_sentences["conv"](maps)
        return words, maps.flatten(2).mT, maps.shape[-2:]


class PyramidTNT(TokenModel):
    """Four stages of sentences at strides 8 to 64 with words in their first blocks, mean over sentences, classifier.

    Input (B, in_chans, H, W) with sides that are multiples of 8; grids of odd sides are rounded up between stages.

    Args:
        depths: blocks of each stage; the first has words, and the second too where a stage has more than 6.
        dim, num_heads, word_dim, word_heads: of the first stage; they multiply by 1, 2, 4, 4 over the stages.
        reductions: side of the cells that keys are pooled over, of each stage.
        num_classes: classes; 0 for the pooled sentences.
        img_size: size of the pictures that the position tables are made for.
        Others as in `ConViT`.
    """

    CARD = Card(
        "PyramidTNT",
        "2201.00978",
        "words and sentences in four stages, keys pooled",
        4.2e-7,
        weights="official",
        small={"pyramid_tnt_ti_192": {"depths": (1, 1, 1, 1), "dim": 24, "num_heads": 2, "word_dim": 4}},
    )

    RULES = (
        (r"patch_embed\.common_conv\.", "patch_embed.common."),
        (r"patch_embed\.(inner|outer)_convs\.", r"patch_embed.\1."),
        (r"word_merges\.(\d)\.conv\.0\.", r"word_merges.\1.conv."),
        (r"word_merges\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.merge_words."),
        (r"sentence_merges\.(\d)\.conv\.0\.", r"sentence_merges.\1.conv."),
        (r"sentence_merges\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.merge_sentences."),
        (r"(stages\.\d\.blocks\.\d+)\.inner_(norm1|norm2|attn|mlp)\.", r"\1.inner.\2."),
        (r"(stages\.\d\.blocks\.\d+)\.proj_norm([12])\.", r"\1.exchange.norm\2."),
        (r"(stages\.\d\.blocks\.\d+)\.proj\.", r"\1.exchange.proj."),
        (r"(stages\.\d\.blocks\.\d+)\.outer_(norm1|norm2|attn|mlp)\.", r"\1.\2."),
        (r"inner_pos$", "word_pos"),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )
    UNSHAPED = ("word_heads",)
    FIRST_CONV = "patch_embed.common.0"
    LAYERS = "stages"
    default_indices = (0, 1, 2, 3)
    min_size = 32

    def __init__(
        self,
        depths: Sequence[int] = (2, 6, 3, 2),
        dim: int = 80,
        num_heads: int = 2,
        word_dim: int = 5,
        word_heads: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        reductions: Sequence[int] = (4, 2, 1, 1),
        img_size: int | tuple[int, int] = 192,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or len(reductions) != 4:
            raise ValueError(f"depths {tuple(depths)} and reductions {tuple(reductions)} must be of four stages")
        self.patch_embed = PyramidStem(in_chans, word_dim, dim)
        grids = self.grids(pair(img_size))
        self.pos_embed = Positions(dim, grids[0])
        self.word_pos = nn.Parameter(torch.empty(1, WORDS**2, word_dim))
        nn.init.trunc_normal_(self.word_pos, std=0.02)
        self.stages = nn.ModuleList()
        scales = (1, 2, 4, 4)
        for i, (scale, rates) in enumerate(zip(scales, drop_path_rates(drop_path_rate, depths), strict=True)):
            heads = num_heads * scale
            blocks = []
            for j, rate in enumerate(rates):
                inner = (word_dim * scale, word_heads * scale) if j == 0 or (j == 1 and depths[i] > 6) else ()
                blocks.append(PyramidBlock(dim * scale, heads, reductions[i], mlp_ratio, rate, qkv_bias, *inner))
            before = scales[i - 1]
            merge = (word_dim * before, word_dim * scale, dim * before, dim * scale) if i else None
            self.stages.append(PyramidStage(merge, blocks, PairPositions(heads, grids[i], reductions[i])))
        self.norm = nn.LayerNorm(dim * scales[-1])
        heads = num_heads * scales[-1]
        self.head = TokenHead(
            dim * scales[-1], num_classes, 0, global_pool=global_pool, drop_rate=drop_rate, num_heads=heads
        )
        self.dynamic_img_pad = dynamic_img_pad
        widths = [dim * scale for scale in scales]
        self.finish(num_classes, in_chans, img_size, 8, widths, (8, 16, 32, 64), num_prefix_tokens=0)
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
                nn.init.zeros_(module.bias)

    def grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """The grid of every stage."""
        grids = [(img_size[0] // 8, img_size[1] // 8)]
        for _ in range(3):
            height, width = grids[-1]
            grids.append((-(-height // 2), -(-width // 2)))
        return grids

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        return 64

    def embed(self, x: Tensor) -> State:
        if torch.compiler.is_compiling():  # cuts nothing: the sizes become 8 times a number, which graphs can divide
            height, width = (n // 8 * 8 for n in x.shape[-2:])
            x = x[..., :height, :width]
        words, maps = whole(self.patch_embed, x)
        size = maps.shape[-2:]
        return whole(self.pos_embed, maps.flatten(2).mT, size), size, words + self.word_pos

    def apply_block(self, index: int, state: State) -> State:
        sentences, size, words = state
        stage = self.stages[index]
        if stage.merge_words is not None:
            words, sentences, size = stage.merge(words, sentences, size)
        for block in stage.blocks:
            words, sentences = self.run(block, words, sentences, size, stage.pairs)
        return sentences, size, words

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        super().set_input_size(img_size, patch_size)
        for stage, grid in zip(self.stages, self.grids(self.img_size), strict=False):
            stage.pairs.set_size(grid)

    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("pairs.grid")}
        return super().no_weight_decay() | {"word_pos"} | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^pos_embed|^patch_embed|^word_pos"
        fine = [(r"^stages\.(\d+)\.(?:merge|pairs)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": stem, "blocks": [*([(r"^stages\.(\d+)", None)] if coarse else fine), (r"^norm", (99999,))]}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = merged(rename(state, cls.RULES), r"stages\.\d\.blocks\.\d+\.inner\.")
        state = split_positions(state, "outer_pos")
        if "pos_embed.grid" not in state:
            return state
        side = state["pos_embed.grid"].shape[1]
        for name in [n for n in state if n.endswith(".relative_pos")]:
            table, i, grid = state.pop(name)[0], int(name.split(".")[1]), side
            for _ in range(i):
                grid = -(-grid // 2)
            keys = math.isqrt(table.shape[2])
            state[f"stages.{i}.pairs.grid"] = table.unflatten(2, (keys, keys, 1)).unflatten(1, (grid, grid))
        return state

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        _, height, width, dim = state["pos_embed.grid"].shape
        pairs = [state[f"stages.{i}.pairs.grid"] for i in range(4)]
        sizes = {v.settings["dim"]: v.settings["word_heads"] for v in PYRAMIDS.values()}
        word_dim = state["word_pos"].shape[2]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(4)],
            "dim": dim,
            "num_heads": len(pairs[0]),
            "word_dim": word_dim,
            "word_heads": sizes.get(dim),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["patch_embed.common.0.weight"].shape[1],
            "reductions": [table.shape[1] // table.shape[3] for table in pairs],
            "img_size": 8 * height if height == width else (8 * height, 8 * width),
            "mlp_ratio": ratio(len(state["stages.0.blocks.0.mlp.fc1.bias"]), dim),
            "qkv_bias": "stages.0.blocks.0.attn.q.bias" in state,
        }


_MEAN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_URL = "https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/tnt/"


def _tnt(
    dim: int, heads: int, word_dim: int, word_heads: int, params: float, gmacs: float, weights: Weights
) -> Variant:
    settings = {
        "dim": dim,
        "num_heads": heads,
        "word_dim": word_dim,
        "word_heads": word_heads,
        "legacy": weights.tag == "legacy_in1k",
        "img_size": 224,
    }
    return Variant(settings, params, gmacs, (weights,))


def _weights(tag: str, top1: float | None, file: str = "", hub: str = "") -> Weights:
    url = _URL + file if file else ""
    return Weights(tag, top1, url, (f"timm/{hub}", "model.safetensors") if hub else None, crop_pct=0.9, **_MEAN)


# timm has models of the plain names, with the same weights; Ti is described in the paper only
TNTS = {
    "nearfar_tnt_ti_patch16_224": _tnt(192, 3, 12, 2, 6.1, 1.4, _weights("untrained", None)),
    "nearfar_tnt_s_patch16_224": _tnt(
        384, 6, 24, 4, 23.8, 5.2, _weights("in1k", 81.5, "tnt_s_81.5.pth.tar", "tnt_s_patch16_224.in1k")
    ),
    "nearfar_tnt_s_legacy_patch16_224": _tnt(
        384, 6, 24, 4, 23.76, None, _weights("legacy_in1k", None, hub="tnt_s_legacy_patch16_224.in1k")
    ),
    "nearfar_tnt_b_patch16_224": _tnt(
        640, 10, 40, 4, 65.4, 14.1, _weights("in1k", 82.9, "tnt_b_82.9.pth.tar", "tnt_b_patch16_224.in1k")
    ),
}


def _pyramid(
    size: int, depths: Sequence[int], dim: int, heads: int, word_dim: int, word_heads: int, params: float, gmacs: float
) -> Variant:
    settings = {
        "depths": depths,
        "dim": dim,
        "num_heads": heads,
        "word_dim": word_dim,
        "word_heads": word_heads,
        "img_size": size,
    }
    return Variant(settings, params, gmacs, (Weights("untrained", None, size=size, crop_pct=0.9, **_MEAN),))


# published weights lie on a file share only; accuracies in the paper: 75.2, 82.0, 83.5, 84.1
PYRAMIDS = {
    "pyramid_tnt_ti_192": _pyramid(192, (2, 6, 3, 2), 80, 2, 5, 1, 10.6, 0.6),
    "pyramid_tnt_s_256": _pyramid(256, (2, 8, 4, 2), 128, 4, 8, 2, 32.0, 3.3),
    "pyramid_tnt_m_256": _pyramid(256, (2, 8, 6, 2), 192, 4, 12, 2, 85.0, 8.2),
    "pyramid_tnt_b_256": _pyramid(256, (2, 10, 6, 2), 256, 4, 16, 2, 157, 16.0),
}

register(TNT, TNTS)
register(PyramidTNT, PYRAMIDS)
