"""VM-UNet: a U-Net of VMamba's first visual state space blocks (Ruan & Xiang 2024, arXiv 2402.02491)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.ops.common.layers import ChannelNorm, DropPath
from nearfar.ops.recurrence.directional_mamba import SS2D, released_ss2d
from nearfar.ops.tokens.patches import PatchExpand, PatchMerge

EPS = 1e-5


class VSSBlock(nn.Module):
    """x + SS2D(LN(x)), with stochastic depth."""

    def __init__(self, dim: int, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, EPS)
        self.mixer = SS2D(dim, **mixer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class VMUNet(nn.Module):
    """VM-UNet, 2-D.

    Encoder: 4x4 patches, four levels of VSS blocks with patch merging between them. Decoder: the deepest level's
    blocks; then per level patch expansion of x + skip and blocks, the skip being what went into the encoder's level.
    Last a fourfold patch expansion and a 1x1 convolution.

    Args:
        num_classes: classes, background included; 1 for a binary mask.
        in_channels: one channel goes in three times, as published; any other number as it is.
        dims_per_level: widths, finest first.
        depths, decoder_depths: blocks per level, in the order of the data.
        d_state: states per channel.
        drop_path: stochastic depth of the last encoder and the first decoder block.
        scan: False puts the identity in the scans' place, for ablation.
        dims: axes of the image, 2.

    `forward(x)`: (B, C, H, W) to logits (B, K, H, W); H and W are multiples of 32. (The released network puts a sigmoid
    on a single output and cuts odd maps, so that its mask is smaller than such an image.)
    """

    CARD = Card(
        "VM-UNet",
        "2402.02491",
        "a U-Net of selective scans in four directions",
        6.9e-7,
        weights="released layout; starts from VMamba's",
        networks={"vmunet": {}},
        dims=(2,),
    )

    def __init__(
        self,
        num_classes: int = 1,
        in_channels: int = 3,
        dims_per_level: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        *,
        d_state: int = 16,
        drop_path: float = 0.2,
        scan: bool = True,
        dims: int = 2,
    ) -> None:
        super().__init__()
        widths = list(dims_per_level)
        if dims != 2:
            raise ValueError(f"VM-UNet is 2-D, dims is {dims}")
        if not len(widths) == len(depths) == len(decoder_depths):
            raise ValueError(
                f"dims_per_level, depths and decoder_depths have {len(widths)}, {len(depths)} and "
                f"{len(decoder_depths)} levels; they must have as many"
            )
        if any(b != 2 * a for a, b in pairwise(widths)):
            raise ValueError(f"dims_per_level is {widths}; patch merging doubles the width from level to level")
        self.size_multiple = 4 * 2 ** (len(widths) - 1)
        self.repeat = in_channels == 1
        self.patch_embed = nn.Conv2d(3 if self.repeat else in_channels, widths[0], 4, stride=4)
        self.patch_norm = ChannelNorm(widths[0], EPS)
        options = {"d_state": d_state, "scan": scan}
        stack = lambda width, rates: nn.Sequential(*(VSSBlock(width, rate, **options) for rate in rates))  # noqa: E731
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.encoder = nn.ModuleList(stack(w, r.tolist()) for w, r in zip(widths, rates))
        self.merges = nn.ModuleList(PatchMerge(w, EPS, odd="refuse") for w in widths[:-1])
        rates = torch.linspace(drop_path, 0, sum(decoder_depths), device="cpu").split(list(decoder_depths))
        self.decoder = nn.ModuleList(stack(w, r.tolist()) for w, r in zip(widths[::-1], rates))
        self.expands = nn.ModuleList(PatchExpand(w, w // 2, 2, EPS) for w in widths[:0:-1])
        self.last_expand = PatchExpand(widths[0], widths[0] // 4, 4, EPS)
        self.head = nn.Conv2d(widths[0] // 4, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if any(n % self.size_multiple for n in x.shape[2:]):
            raise ValueError(
                f"the image is {tuple(x.shape[2:])}; height and width must be multiples of {self.size_multiple}"
            )
        x = self.patch_norm(self.patch_embed(x.repeat(1, 3, 1, 1) if self.repeat else x))
        skips = []
        for i, blocks in enumerate(self.encoder):
            skips.append(x)
            x = blocks(x)
            if i < len(self.merges):
                x = self.merges[i](x)
        x = self.decoder[0](x)
        for expand, blocks in zip(self.expands, self.decoder[1:]):
            x = blocks(expand(x + skips.pop()))
        return self.head(self.last_expand(x))

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> "VMUNet":
        """The network of a released state dict, in eval mode; classes and sizes are read from it.

        A network for grey images is released with three input channels: give `in_channels=1` for it.
        """
        state = published_state(read(source))
        try:
            widths = [state["patch_embed.bias"].shape[0]]
            widths += [len(state[f"merges.{i}.reduction.weight"]) for i in range(count(state, r"merges\.(\d+)\."))]
            found = {
                "num_classes": len(state["head.bias"]),
                "in_channels": state["patch_embed.weight"].shape[1],
                "dims_per_level": widths,
                "depths": [count(state, rf"encoder\.{i}\.(\d+)\.") for i in range(len(widths))],
                "decoder_depths": [count(state, rf"decoder\.{i}\.(\d+)\.") for i in range(len(widths))],
                "d_state": state["encoder.0.0.mixer.scan.A_log"].shape[-1],
            }
        except KeyError as error:
            raise CheckpointError(f"no VM-UNet: {error} is missing") from error
        return loaded(cls(**(found | settings)), state)

    def load_vmamba(self, source: Checkpoint) -> list[str]:
        """Start encoder and mirrored decoder from a VMamba classifier, as the released training does.

        Level i of the classifier goes to level i of the encoder and to the decoder's level of the same width, block by
        block. Returns the names of the parameters that stay as they are.
        Raises CheckpointError where nothing fits.
        """
        state = published_state(read(source))
        levels = len(self.encoder)
        mirrored = {
            rename({name: value}, [(r"^encoder\.(\d+)\.", lambda m: f"decoder.{levels - 1 - int(m[1])}.")]).popitem()
            for name, value in state.items()
            if name.startswith("encoder.")
        }
        own = self.state_dict()
        fitting = {k: v for k, v in (state | dict(mirrored)).items() if k in own and own[k].shape == v.shape}
        if not any(".mixer." in name for name in fitting):
            raise CheckpointError("no block of this checkpoint fits VM-UNet; it needs a VMamba of the first form (v0)")
        self.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]


VARIANTS: dict[str, dict[str, Any]] = {
    "vmunet_isic": {"num_classes": 1, "in_channels": 3},
    "vmunet_synapse": {"num_classes": 9, "in_channels": 1},
}
"""The published networks. 27.43 M parameters; Dice on ISIC 2017 89.03, ISIC 2018 89.71, Synapse 81.08 (recalled, not
verified; later versions of the paper quote other values). Code Apache-2.0."""


# ---------------------------------------------------------------------------------------------------------------------
# Published layout

RULES = (
    (r"^vmunet\.", ""),
    (r"^patch_embed\.norm\.", "patch_norm."),
    (r"^patch_embed\.(proj|0)\.", "patch_embed."),
    (r"^patch_embed\.2\.", "patch_norm."),
    (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"^layers_up\.(\d+)\.upsample\.", lambda m: f"expands.{int(m[1]) - 1}."),
    (r"^layers\.(\d+)\.blocks\.", r"encoder.\1."),
    (r"^layers_up\.(\d+)\.blocks\.", r"decoder.\1."),
    (r"\.(ln_1|norm)\.(weight|bias)$", r".norm.\2"),
    (r"\.(self_attention|op)\.", ".mixer."),
    (r"^final_up\.", "last_expand."),
    (r"^final_conv\.", "head."),
)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a released VM-UNet, or for the backbone of a released VMamba of the first form."""
    return rename(released_ss2d(state), RULES, anywhere=True)
