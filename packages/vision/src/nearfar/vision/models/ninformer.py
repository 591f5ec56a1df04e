"""NiNformer: a transformer without attention, whose tokens are gated by an MLP-Mixer block inside every block.

"NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function" (arXiv 2403.02411).
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, rename
from nearfar.ops.tokens.mixer_gate import FeedForward, FourierGate, MixerBlock, MixerGate
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import PatchEmbed, TokenHead, TokenModel, pair

GATES = ("mixer", "fourier", "none")

LAYOUT = (
    (r"(^|\.)Mixer\.token_mix\.0\.", r"\1mixer.token_norm."),
    (r"(^|\.)Mixer\.token_mix\.2\.net\.", r"\1mixer.token_mix."),
    (r"(^|\.)Mixer\.channel_mix\.0\.", r"\1mixer.channel_norm."),
    (r"(^|\.)Mixer\.channel_mix\.1\.net\.", r"\1mixer.channel_mix."),
    (r"(^|\.)ffn\.net\.", r"\1ffn."),
)
"""The published names of a block's parts and ours."""


class NiNBlock(nn.Module):
    """x + G(LN(x)), then x + F(LN(x)) with one and the same norm; G a gate of all tokens, F a feed-forward."""

    def __init__(
        self,
        dim: int,
        tokens: int,
        hidden: int,
        *,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        gate: str = "mixer",
        bounded: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        widths = token_hidden or hidden, channel_hidden or hidden
        self.mgu: nn.Module
        if gate == "fourier":
            self.mgu = FourierGate(dim)
        elif gate == "mixer":
            self.mgu = MixerGate(dim, tokens, *widths, drop=drop_rate, bounded=bounded)
        else:
            self.mgu = MixerBlock(dim, tokens, *widths, drop=drop_rate)
        self.ffn = FeedForward(dim, hidden, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mgu(self.norm(x))
        return x + self.ffn(self.norm(x))


_SMALL = {"dim": 64, "hidden": 128, "token_hidden": 64}


class NiNformer(TokenModel):
    """Patches, `NiNBlock`s, mean over patches, classifier; no positions, no class token, no last norm.

    The mixer gate ties the network to the grid of `img_size`: other pictures are refused until `set_input_size` has
    interpolated the mixing matrices. With the Fourier gate any grid works.

    Args:
        dim, depth, hidden: channels, blocks, hidden width of feed-forwards and mixers.
        token_hidden, channel_hidden: of the mixers, where they differ from `hidden`.
        num_classes: classes; 0 for the pooled features.
        img_size, patch_size: the grid.
        gate: "mixer", or "fourier", the follow-up's; "none" for the mixer's own output in place of the product with it,
            which the gate is compared with.
        bounded: tanh on the mixer gate, as an extension of ours.
        drop_rate: dropout in every feed-forward; 0.5 in the published training.
        global_pool, dynamic_img_pad: as in `ConViT`.

    Raises:
        ValueError: another gate, a picture that the patch does not divide.
    """

    CARD = Card(
        title="NiNformer",
        paper="2403.02411",
        what="a gate made by an MLP-Mixer block or a Fourier transform, on one grid",
        error=5e-07,
        small={"ninformer_cifar10": _SMALL},
        plain={"ninformer_cifar10": ("ninformer_cifar10", {**_SMALL, "gate": "none"})},
    )

    RULES = ((r"model\.(\d+)\.", r"blocks.\1."), (r"patcher\.", "patch_embed.proj."), (r"classifier\.", "head.fc."))
    min_size = 4

    def __init__(
        self,
        dim: int = 256,
        depth: int = 4,
        hidden: int = 512,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        gate: str = "mixer",
        bounded: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}; allowed are {', '.join(GATES)}")
        if any(n < patch_size or n % patch_size for n in pair(img_size)):
            raise ValueError(f"img_size is {img_size}; its sides must be multiples of patch_size={patch_size}")
        self.dynamic_img_pad, self.gate = dynamic_img_pad, gate
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        tokens = math.prod(n // patch_size for n in pair(img_size))
        self.blocks = nn.ModuleList(
            NiNBlock(
                dim,
                tokens,
                hidden,
                token_hidden=token_hidden,
                channel_hidden=channel_hidden,
                gate=gate,
                bounded=bounded,
                drop_rate=drop_rate,
            )
            for _ in range(depth)
        )
        self.norm = nn.Identity()
        self.head = TokenHead(dim, num_classes, 0, global_pool=global_pool)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth, num_prefix_tokens=0)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        grid = tuple(-(-n // self.patch_size) for n in x.shape[-2:])
        if self.gate != "fourier" and grid != self.grid(self.img_size):
            height, width = (n * self.patch_size for n in grid)
            raise ValueError(
                f"input is {tuple(x.shape)}, a grid of {grid[0]} x {grid[1]} patches; the mixers are made for pictures "
                f"of {self.img_size[0]} x {self.img_size[1]}: resize the pictures, or call "
                f"model.set_input_size(({height}, {width})), which interpolates the mixing matrices"
            )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Interpolate the mixing matrices to the grid of `img_size` (and the patch kernel to `patch_size`)."""
        before = self.grid(self.img_size)
        super().set_input_size(img_size, patch_size)
        after = self.grid(self.img_size)
        if self.gate != "fourier" and after != before:
            for block in self.blocks:
                (block.mgu.mixer if self.gate == "mixer" else block.mgu).resize(before, after)

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(super().published_state(state), LAYOUT, anywhere=True)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        hidden = len(state["blocks.0.ffn.0.bias"])
        mixers = {"mixer": "blocks.0.mgu.mixer.", "none": "blocks.0.mgu."}
        gate = next((gate for gate, mixer in mixers.items() if f"{mixer}token_norm.weight" in state), "fourier")
        settings = {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "hidden": hidden,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "patch_size": patch,
            "gate": gate,
        }
        if gate != "fourier":
            token_hidden, tokens = state[f"{mixers[gate]}token_mix.0.weight"].shape
            channel_hidden = len(state[f"{mixers[gate]}channel_mix.0.bias"])
            settings |= {
                "token_hidden": None if token_hidden == hidden else token_hidden,
                "channel_hidden": None if channel_hidden == hidden else channel_hidden,
            }
            if math.isqrt(tokens) ** 2 == tokens:  # others must be given
                settings["img_size"] = patch * math.isqrt(tokens)
        return settings


def _variant(params: float, classes: int, tag: str, **settings: Any) -> Variant:
    size = settings.get("img_size", 32)
    mean = (0.5, 0.5, 0.5)
    weights = Weights(tag, size=size, crop_pct=1.0, num_classes=classes, mean=mean, std=mean)
    return Variant({"dim": 256, "depth": 4, "hidden": 512, "patch_size": 4, **settings}, params, None, (weights,))


# no weights are published; the size of digits is inferred, and so is the network of the Fourier gate
NINFORMERS = {
    "ninformer_cifar10": _variant(2.652170, 10, "cifar10", img_size=32),
    "ninformer_cifar100": _variant(2.675300, 100, "cifar100", img_size=32),
    "ninformer_mnist": _variant(2.582478, 10, "mnist", img_size=28, in_chans=1),
    "ninformer_fourier": _variant(1.331978, 10, "cifar10", img_size=32, gate="fourier"),
}

register(NiNformer, NINFORMERS)
