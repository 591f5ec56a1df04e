"""What LV-ViT has beside DeiT: a stem of convolutions, branches that are halved, a second head on every patch.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (NeurIPS 2021).
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.vision.models.pyramid import linear
from nearfar.vision.models.tokens import PatchEmbed, TokenModel

LVVIT_SMALL: dict[str, Any] = {
    "depth": 16,
    "mlp_ratio": 3.0,
    "qkv_bias": False,
    "stem": "conv",
    "aux_head": True,
    "skip_lambda": 2.0,
    "eps": 1e-5,
}
"""LV-ViT-S as settings of a DeiT-S."""


class ConvStem(nn.Module):
    """LV-ViT's patches: three convolutions at half the resolution, then patches of half the size."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 16, hidden: int = 64) -> None:
        super().__init__()
        for i, (channels, size, stride) in enumerate(((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)), 1):
            conv = nn.Conv2d(channels, hidden, size, stride, size // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(hidden))
        self.proj = nn.Conv2d(hidden, dim, patch_size // 2, patch_size // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.proj(F.relu(self.bn3(self.conv3(x))))
        return x.flatten(2).mT, tuple(x.shape[-2:])


def make_stem(stem: str, in_chans: int, dim: int, patch_size: int) -> nn.Module:
    """DeiT's ("patch") or LV-ViT's ("conv"). Raises ValueError for another."""
    if stem not in ("patch", "conv"):
        raise ValueError(f"stem is {stem!r}; allowed are 'patch' and 'conv'")
    return (PatchEmbed if stem == "patch" else ConvStem)(in_chans, dim, patch_size)


def stem_settings(state: Mapping[str, Tensor]) -> tuple[int, int, int, dict[str, Any]]:
    """Width, channels and patch of a checkpoint, and the settings that tell LV-ViT from DeiT."""
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    found: dict[str, Any] = {"stem": "patch", "aux_head": "aux_head.weight" in state}
    if "patch_embed.conv1.weight" in state:
        patch, in_chans = 2 * patch, state["patch_embed.conv1.weight"].shape[1]
        found |= {"stem": "conv", "skip_lambda": 2.0, "eps": 1e-5}  # the last two no shape tells
    return dim, in_chans, patch, found


class LVViTModel(TokenModel):
    """A token model that may have `aux_head`: half its largest value over the patches is added to the logits."""

    CLASSIFIERS = ("head.fc", "aux_head")

    aux_head: nn.Module | None

    @classmethod
    def classifiers(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.CLASSIFIERS if settings.get("aux_head") else cls.CLASSIFIERS[:1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        y = super().forward_head(x, pre_logits)
        if self.aux_head is None or pre_logits or self.num_classes == 0:
            return y
        return y + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def reset_heads(self, num_classes: int, global_pool: str | None) -> None:
        super().reset_heads(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = linear(self.embed_dim, num_classes).to(self.norm.weight)
