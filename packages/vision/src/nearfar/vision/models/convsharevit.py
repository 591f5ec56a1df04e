"""ConvShareViT: a vision transformer whose linear maps are convolutions of a token's features, for optical processors.

"ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical
Accelerators" (arXiv 2504.11517). No code of it is published; the network here is read from its description, with sizes
of our own, and claims none of its figures. `to_optical` turns any vision transformer into this form, exactly.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count
from nearfar.ops.common.layers import DropPath
from nearfar.ops.convolution.shared import Optical4f, SharedConv, picture_of
from nearfar.vision.models.pyramid import drop_path_rates
from nearfar.vision.models.registry import Variant, Weights, register
from nearfar.vision.models.tokens import PatchEmbed, Positions, TokenHead, TokenModel, init_linear, pair, picture_size

PARTS = ("qkv", "proj", "mlp")
"""The maps of a block that may be convolutions."""


def feature_map(
    dim: int, out: int, kernel_size: int | None, padding: str, tokens: int | None, convolve: bool = True
) -> nn.Module:
    """A map of `dim` features to `out` as a convolution of their picture, or a linear one."""
    if not convolve:
        return nn.Linear(dim, out)
    picture = picture_of(dim)
    kernel = picture if kernel_size is None else (min(kernel_size, picture[0]), min(kernel_size, picture[1]))
    probe = SharedConv(picture, 1, kernel, padding=padding)
    if out % probe.out_features:
        raise ValueError(
            f"kernels of {kernel} with padding={padding!r} give {probe.out_features} features each, which do not "
            f"divide {out}"
        )
    return SharedConv(picture, out // probe.out_features, kernel, padding=padding, tokens=tokens)


class ConvShareBlock(nn.Module):
    """x + DP(P softmax(q k^T / sqrt(d)) v), then x + DP(W2 GELU(W1 x)), pre-norm; q, k, v, P, W may be convolutions."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        kernel_size: int | None,
        padding: str,
        tokens: int | None,
        parts: Sequence[str],
        drop_path: float,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        hidden = int(mlp_ratio * dim)
        make = lambda i, o, part: feature_map(i, o, kernel_size, padding, tokens, part in parts)  # noqa: E731
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v = (make(dim, dim, "qkv") for _ in range(3))
        self.proj = make(dim, dim, "proj")
        self.fc1, self.fc2 = make(dim, hidden, "mlp"), self.narrowing(hidden, dim, kernel_size, padding, tokens, parts)
        self.drop_path = DropPath(drop_path)

    @staticmethod
    def narrowing(
        hidden: int, dim: int, kernel_size: int | None, padding: str, tokens: int | None, parts: Sequence[str]
    ) -> nn.Module:
        """The second map of the MLP, with kernels as large as the picture where smaller ones cannot narrow it."""
        if "mlp" in parts and kernel_size is not None:
            kernel = tuple(min(kernel_size, n) for n in picture_of(hidden))
            probe = SharedConv(picture_of(hidden), 1, kernel, padding=padding)
            if dim % probe.out_features:
                kernel_size, padding = None, "valid"
        return feature_map(hidden, dim, kernel_size, padding, tokens, "mlp" in parts)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop_path(self.proj(y))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


_SMALL = {"dim": 64, "depth": 4, "num_heads": 4}


class ConvShareViT(TokenModel):
    """Patches with learned positions, `ConvShareBlock`s, norm, mean over patches, classifier.

    Args:
        dim, depth, num_heads, mlp_ratio: of the blocks.
        kernel_size: side of the kernels; None for the whole picture of a token's features, which is a linear map.
        padding: "valid", or "same", which mixes only neighbouring features.
        shared: one set of kernels for all tokens; otherwise one a token, for the grid of `img_size` alone.
        parts: maps that are convolutions, of `PARTS`.
        num_classes, in_chans, img_size, patch_size, drop_path_rate, drop_rate, global_pool, dynamic_img_pad: as in
            `ConViT`.

    Raises:
        ValueError: kernels whose outputs do not add up to the features wanted, other parts.
    """

    CARD = Card(
        title="ConvShareViT",
        paper="2504.11517",
        what="attention whose maps of features are convolutions that all tokens share",
        error=math.nan,
        small={"convsharevit_cifar": {**_SMALL, "kernel_size": 7}},
        plain={"convsharevit_cifar": ("convsharevit_cifar", {**_SMALL, "parts": ()})},
    )

    min_size = 4

    def __init__(
        self,
        dim: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        num_classes: int = 100,
        in_chans: int = 3,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        kernel_size: int | None = None,
        padding: str = "valid",
        shared: bool = True,
        parts: Sequence[str] = PARTS,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if wrong := set(parts) - set(PARTS):
            raise ValueError(f"parts {', '.join(sorted(wrong))}; allowed are {', '.join(PARTS)}")
        self.dynamic_img_pad, self.shared = dynamic_img_pad, shared
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        grid = tuple(n // patch_size for n in pair(img_size))
        self.pos_embed = Positions(dim, grid)
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList(
            ConvShareBlock(
                dim,
                num_heads,
                mlp_ratio,
                kernel_size=kernel_size,
                padding=padding,
                tokens=None if shared else math.prod(grid),
                parts=parts,
                drop_path=rate,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = TokenHead(dim, num_classes, 0, global_pool=global_pool, drop_rate=drop_rate, num_heads=num_heads)
        self.finish(num_classes, in_chans, img_size, patch_size, [dim] * depth, num_prefix_tokens=0)
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, SharedConv):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        grid = tuple(-(-n // self.patch_size) for n in x.shape[-2:])
        if not self.shared and grid != self.grid(self.img_size):
            raise ValueError(
                f"input is {tuple(x.shape)}; every token has kernels of its own here, for pictures of {self.img_size} "
                "alone: resize the pictures, or build the model with shared=True"
            )

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        first = {
            "qkv": state["blocks.0.q.weight"],
            "proj": state["blocks.0.proj.weight"],
            "mlp": state["blocks.0.fc1.weight"],
        }
        parts = tuple(part for part, weight in first.items() if weight.ndim == 4)
        settings = {
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": in_chans,
            "img_size": picture_size(state["pos_embed.grid"], patch),
            "patch_size": patch,
            "parts": parts,
        }
        if "blocks.0.fc2.weight" in state and state["blocks.0.fc2.weight"].ndim == 2:
            settings["mlp_ratio"] = state["blocks.0.fc2.weight"].shape[1] / dim
        if parts:
            kernel = tuple(first[parts[0]].shape[2:])
            if kernel == picture_of(dim):
                settings["mlp_ratio"] = len(state["blocks.0.fc1.weight"]) / dim
            else:
                settings |= {"kernel_size": max(kernel), "padding": "same" if len(first[parts[0]]) == 1 else "valid"}
        return settings


# the published sizes are not known; this one is ours
CONVSHAREVITS = {
    "convsharevit_cifar": Variant(
        {"dim": 256, "depth": 6, "num_heads": 4, "img_size": 32, "patch_size": 4},
        4.79,
        None,
        (Weights("untrained", size=32, crop_pct=1.0, num_classes=100),),
    )
}

register(ConvShareViT, CONVSHAREVITS)


# conversion of any network of tokens


def to_optical(model: nn.Module, *, skip: Sequence[str] = ("head",)) -> nn.Module:
    """A copy of a vision transformer whose linear layers are convolutions with shared kernels, the same function.

    For models that apply their linear layers to tokens, as plain transformers do (timm's, ours, any other). Every
    `nn.Linear` becomes a `SharedConv` with kernels as large as the picture of its features (12 x 16 for 192), but those
    whose names start with one of `skip`: a classifier sees one vector, not tokens.
    """
    return _replaced(
        model, lambda name, m: type(m) is nn.Linear and not name.startswith(tuple(skip)), SharedConv.from_linear
    )


def to_electronic(model: nn.Module) -> nn.Module:
    """A copy with linear layers in place of the convolutions with shared kernels, the same function."""
    return _replaced(model, lambda _name, m: isinstance(m, SharedConv) and m.tokens is None, SharedConv.to_linear)


def in_light(model: nn.Module, *, bits: int | None = None, photons: float | None = None) -> nn.Module:
    """A copy in which a simulated 4f light path (`Optical4f`) does every convolution with shared kernels."""
    return _replaced(
        model,
        lambda _name, m: isinstance(m, SharedConv) and m.tokens is None,
        lambda conv: Optical4f(conv, bits=bits, photons=photons),
    )


@torch.no_grad()
def optical_passes(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Exposures of the light path that each convolution with shared kernels takes for the input `x`, by its name."""
    passes: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, SharedConv | Optical4f):
            path = module if isinstance(module, Optical4f) else None
            kernels = path.masks.shape[1] if path is not None else module.kernels

            def hook(_module: nn.Module, inputs: tuple[Tensor], name: str = name, kernels: int = kernels) -> None:
                signs = 4 if bool((inputs[0] < 0).any()) else 2
                passes[name] = passes.get(name, 0) + inputs[0].shape[:-1].numel() * kernels * signs

            hooks.append(module.register_forward_pre_hook(hook))
    try:
        model(x)
    finally:
        for handle in hooks:
            handle.remove()
    return passes


def _replaced(model: nn.Module, wanted: Any, make: Any) -> nn.Module:
    """A copy of `model` with `make(module)` in place of every module that is `wanted`, given its name and itself."""
    model = copy.deepcopy(model)
    found = [(name, module) for name, module in model.named_modules() if wanted(name, module)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer to convert")
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, last, make(module))
    return model
