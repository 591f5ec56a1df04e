"""AFNO: a vision transformer whose tokens are mixed by an adaptive filter in the Fourier domain.

Guibas et al., "Adaptive Fourier Neural Operators: Efficient Token Mixers for Transformers" (ICLR 2022).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio
from nearfar.ops.common.layers import DropPath
from nearfar.ops.spectral.adaptive import AFNO
from nearfar.vision.models.pyramid import drop_path_rates
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import (
    PatchEmbed,
    Positions,
    State,
    TokenHead,
    TokenModel,
    init_linear,
    pair,
    picture_size,
    split_positions,
)


class MLP(nn.Module):
    """W2 GELU(W1 x), exact GELU, dropout behind both."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class AFNOBlock(nn.Module):
    """y = AFNO(LN1(x)); y + x, then + DP(MLP(LN2(.))); on (B, H, W, C).

    With `double_skip` the residual is taken twice, round the filter and round the MLP; without it once, round both:
    x + DP(MLP(LN2(AFNO(LN1(x))))). The filter adds its own input in either case.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        *,
        mlp_ratio: float = 4.0,
        double_skip: bool = True,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        **filter_settings: Any,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.filter = AFNO(dim, num_blocks, **filter_settings)
        self.mlp = MLP(dim, int(mlp_ratio * dim), drop_rate)
        self.double_skip, self.drop_path = double_skip, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(self.norm1(x).movedim(-1, 1)).movedim(1, -1)
        if self.double_skip:
            x = y = x + y
        return x + self.drop_path(self.mlp(self.norm2(y)))


class AFNOTransformer(TokenModel):
    """Patches with learned positions, `AFNOBlock`s, norm, mean over patches, classifier; no class token.

    Input (B, in_chans, H, W) with sides that are multiples of the patch, any grid.

    Args:
        dim, depth, num_blocks: channels, blocks, blocks of the filter's MLP.
        num_classes: classes; 0 for the pooled features.
        img_size: size of the pictures that the position table is made for.
        double_skip: see `AFNOBlock`; the published code has it off unless asked, the papers' figures most likely on.
        hidden_factor, threshold, modes, fraction: of the filter, see `AFNO`.
        drop_path_rate: stochastic depth of the last block's MLP; grows linearly from 0.
        drop_rate: dropout behind the positions, in the MLPs and before the classifier.
        global_pool, dynamic_img_pad: as in `ConViT`.
    """

    CARD = Card(
        title="AFNO",
        paper="2111.13587",
        what="a complex MLP shared by all frequencies, between Fourier transforms",
        error=8e-07,
        weights="FourCastNet's, physicsnemo's",
        small={"afno_256_patch4": {"dim": 64, "depth": 3}},
        plain={
            "afno_256_patch4": (
                "vit_tiny_patch16_224",
                {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
                | {"class_token": False, "global_pool": "avg", "fc_norm": False},
            )
        },
    )

    RULES = ((r"head\.(weight|bias)$", r"head.fc.\1"),)

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_blocks: int = 8,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        double_skip: bool = True,
        hidden_factor: int = 1,
        threshold: float = 0.01,
        modes: str = "afno",
        fraction: float = 1.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        grid = tuple(n // patch_size for n in pair(img_size))
        self.pos_embed = Positions(dim, grid)
        self.pos_drop = nn.Dropout(drop_rate)
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList(
            AFNOBlock(
                dim,
                num_blocks,
                mlp_ratio=mlp_ratio,
                double_skip=double_skip,
                drop_rate=drop_rate,
                drop_path=rate,
                hidden_factor=hidden_factor,
                threshold=threshold,
                modes=modes,
                fraction=fraction,
                grid=grid if modes == "lowpass" else None,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = TokenHead(dim, num_classes, 0, global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth, num_prefix_tokens=0)
        self.apply(init_linear)

    def embed(self, x: Tensor) -> State:
        tokens, size = super().embed(x)
        return self.pos_drop(tokens), size

    def apply_block(self, index: int, state: State) -> State:
        tokens, size = state
        return self.run(self.blocks[index], tokens.unflatten(1, size)).flatten(1, 2), size

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return split_positions(super().published_state(state), "pos_embed")

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        _, blocks, inner, hidden = state["blocks.0.filter.w1"].shape
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_blocks": blocks,
            "hidden_factor": hidden // inner,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
        }


# the paper's 15.3 thousand million operations are no count of multiply-accumulates of this network
AFNOS = {
    "afno_small_patch4": Variant({"dim": 384, "num_blocks": 8, "img_size": 224}, 16.7, None),
    "afno_256_patch4": Variant({"dim": 256, "num_blocks": 4, "img_size": 224}, 8.19, None, (Weights("untrained"),)),
}

register(AFNOTransformer, AFNOS)
