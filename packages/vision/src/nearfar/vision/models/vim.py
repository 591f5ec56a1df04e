"""Vim: a column of bidirectional Mamba blocks over patches, with the class token in their middle.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (2024, arXiv
2401.09417). Runs without CUDA extensions and takes pictures of any size that the patches fill.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, rename
from nearfar.ops.common.layers import DropPath
from nearfar.ops.recurrence.directional_mamba import DirectionalMamba, released_mamba
from nearfar.vision.models.pyramid import drop_path_rates
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import (
    PatchEmbed,
    Positions,
    TokenHead,
    TokenModel,
    init_linear,
    pair,
    split_positions,
)


class VimBlock(nn.Module):
    """x + DP(bidirectional Mamba(RMSNorm(x))).

    The released code carries x as two tensors, the sum so far and the last branch, which it adds in the next norm.
    """

    def __init__(self, dim: int, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = DirectionalMamba(dim, "bidirectional", "mean", **mixer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class Vim(TokenModel):
    """Patches, the class token before the middle one, learned positions, blocks, RMSNorm, linear classifier.

    Input (B, in_chans, H, W) with sides that are multiples of the patch. Between blocks the class token stays in the
    middle; features give it first, as all token models do.

    Args:
        dim, depth: channels, blocks.
        num_classes: classes; 0 for the pooled token.
        img_size: size of the pictures that the position table is made for.
        patch_size, stride: of the patch convolution; the fine-tuned models with overlapping patches have stride 8.
        d_state, d_conv, expand: of the Mamba blocks.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling name, see `TokenHead`.
        dynamic_img_pad: pad other sides with zeros instead of refusing them.
        scan: False puts the identity in the scans' place, for ablation.
    """

    CARD = Card(
        "Vim",
        "2401.09417",
        "selective scans of the patches forwards and backwards",
        8.7e-6,
        weights="released layout",
        small={"vim_tiny": {"dim": 64, "depth": 4, "img_size": 64, "patch_size": 8, "stride": 8}},
    )

    RULES = (
        (r"layers\.", "blocks."),
        (r"norm_f\.", "norm."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        dim: int = 192,
        depth: int = 24,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "token",
        dynamic_img_pad: bool = False,
        scan: bool = True,
    ) -> None:
        super().__init__()
        self.stride = patch_size if stride is None else stride
        if not 1 <= self.stride <= patch_size or patch_size % self.stride:
            raise ValueError(f"stride is {stride}; it must divide the patch size {patch_size}")
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.patch_embed.proj.stride = (self.stride, self.stride)
        self.patch_size = patch_size
        self.pos_embed = Positions(dim, self.grid(pair(img_size)), prefix=1)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.dynamic_img_pad = dynamic_img_pad
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "scan": scan}
        self.blocks = nn.ModuleList(VimBlock(dim, rate, **mixer) for rate in rates)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = TokenHead(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth, [self.stride] * depth)
        self.head.apply(init_linear)
        with torch.no_grad():
            for block in self.blocks:  # as many branches as blocks are added up
                block.mixer.out_proj.weight /= depth**0.5

    def grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return tuple((n - self.patch_size) // self.stride + 1 for n in img_size)

    def with_prefix(self, patches: Tensor) -> Tensor:
        token = (self.cls_token + self.pos_embed.prefix).expand(patches.shape[0], -1, -1)
        middle = patches.shape[1] // 2
        return torch.cat((patches[:, :middle], token, patches[:, middle:]), dim=1)

    def split(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        middle = (tokens.shape[1] - 1) // 2
        return tokens[:, middle : middle + 1], torch.cat((tokens[:, :middle], tokens[:, middle + 1 :]), dim=1)

    def conclude(self, tokens: Tensor) -> Tensor:
        return self.norm(torch.cat(self.split(tokens, -1), dim=1))

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {n for n, _ in self.named_parameters() if n.endswith(("A_log", ".D"))}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = rename(released_mamba(state), cls.RULES)
        if "pos_embed" in state:  # the class token's row stands in the middle
            table = state["pos_embed"]
            middle = (table.shape[1] - 1) // 2
            parts = table[:, middle : middle + 1], table[:, :middle], table[:, middle + 1 :]
            state["pos_embed"] = torch.cat(parts, dim=1)
        return split_positions(state, "pos_embed", prefix=1)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        _, height, width, _ = state["pos_embed.grid"].shape
        a_log = state["blocks.0.mixer.scan.A_log"]
        stride = patch // 2 if (height, width) == (27, 27) and patch == 16 else patch  # released with overlap
        size = tuple((n - 1) * stride + patch for n in (height, width))
        return {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": size[0] if height == width else size,
            "patch_size": patch,
            "stride": stride,
            "d_state": a_log.shape[-1],
            "d_conv": state["blocks.0.mixer.conv.weight"].shape[-1],
            "expand": a_log.shape[1] // dim,
        }


def _size(dim: int, params: float, top1: float | None) -> Variant:
    settings = {"dim": dim, "img_size": 224, "patch_size": 16, "stride": 16}
    return Variant(settings, params, None, (Weights("in1k", top1),))


# Base's accuracy was only recalled and is left out
VIMS = {
    "vim_tiny": _size(192, 7.15, 76.1),
    "vim_small": _size(384, 25.8, 80.3),
    "vim_base": _size(768, 98, None),
}

register(Vim, VIMS)
