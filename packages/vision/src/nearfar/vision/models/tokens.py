"""Models of tokens: a class or other prefix tokens beside a grid of patches, with the surface of timm's own ViTs.

A model file holds a subclass of `TokenModel` that builds `patch_embed`, `pos_embed`, `cls_token`, `blocks`, `norm` and
`head`, and ends like a pyramid's with its variants and `register`. Where tokens live in stages of falling resolution
the stages take the place of the blocks.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, global_pool_nlc, resample_patch_embed
from timm.models._features import feature_take_indices
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from nearfar.core.errors import CheckpointError
from nearfar.ops.common.fused import FusedLinear
from nearfar.ops.common.layers import GELU, DropPath
from nearfar.ops.common.tables import Derived
from nearfar.vision.models.base import PictureModel
from nearfar.vision.models.fusing import ACTIVATIONS
from nearfar.vision.models.pyramid import linear
from nearfar.vision.tracing import is_traced, whole

POOLS = ("token", "avg", "avgmax", "max", "map", "")
"""timm's names of how tokens become one vector; "map" is attention of a learned query, "" keeps the tokens."""

State = tuple[Any, ...]
"""What passes from block to block: tokens (B, P + N, C), the grid (h, w), and whatever else the model's blocks keep."""


class PatchEmbed(nn.Module):
    """A convolution of stride `patch_size`: (B, C_in, H, W) to patches (B, N, C), row-major, and their grid."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 16) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return x.flatten(2).mT, tuple(x.shape[-2:])


class Positions(nn.Module):
    """A learned table for the patches of a grid, (1, h, w, C), and for `prefix` tokens, (1, P, C).

    On another grid the patches' table is resized bicubically, in float32; with `antialias` as timm does, whose kernel
    differs also where the grid grows, without it as plain interpolation does.
    """

    def __init__(self, dim: int, grid: tuple[int, int], prefix: int = 0, *, antialias: bool = True) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.empty(1, *grid, dim))
        self.prefix = nn.Parameter(torch.empty(1, prefix, dim)) if prefix else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)
        self.antialias = antialias
        self.kept = Derived()

    @property
    def size(self) -> tuple[int, int]:
        """The table's own grid."""
        return tuple(self.grid.shape[1:3])

    def at(self, size: tuple[int, int]) -> Tensor:
        """The patches' table for a grid of `size`, (1, N, C)."""
        if not torch.compiler.is_exporting() and tuple(size) == self.size:  # a file is for any size: it always resizes
            return self.grid.flatten(1, 2)
        return self.kept.get(self.grid, tuple(size), lambda: self.resized(self.grid, size).flatten(1, 2))

    def resized(self, table: Tensor, size: tuple[int, int]) -> Tensor:
        """A table (1, h, w, C) for a grid of `size`."""
        maps = table.permute(0, 3, 1, 2).float()
        maps = F.interpolate(maps, size, mode="bicubic", align_corners=False, antialias=self.antialias)
        return maps.permute(0, 2, 3, 1).to(table.dtype)

    @torch.no_grad()
    def set_size(self, size: tuple[int, int]) -> None:
        """Resize the table itself."""
        if tuple(size) != self.size:
            self.grid = nn.Parameter(self.resized(self.grid, size).contiguous(), self.grid.requires_grad)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        return patches + self.at(size)


def split_positions(state: dict[str, Tensor], name: str, prefix: int = 0, to: str = "pos_embed") -> dict[str, Tensor]:
    """`state` with a published table `name`, (1, P + N, C), split into those of `Positions` under the name `to`.

    Raises CheckpointError where the patches do not fill a square.
    """
    if name not in state:
        return state
    state = dict(state)
    table = state.pop(name)
    side = math.isqrt(table.shape[1] - prefix)
    if side * side != table.shape[1] - prefix:
        raise CheckpointError(
            f"{name} has {table.shape[1] - prefix} patches, which are no square; resize it to one before loading"
        )
    state[f"{to}.grid"] = table[:, prefix:].unflatten(1, (side, side))
    if prefix:
        state[f"{to}.prefix"] = table[:, :prefix]
    return state


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return x * torch.sigmoid(1.702 * x)
        return torch.mul(x, 1.702).sigmoid_().mul_(x)


class Mlp(nn.Module):
    """W_2 act(W_1 x); exact GELU by default."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation or GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    @torch.no_grad()
    def fuse(self) -> Self:
        """Run the activation inside the first map."""
        if isinstance(self.act, QuickGELU):  # x sigmoid(a x) = silu(a x) / a
            self.fc1.weight *= 1.702
            self.fc1.bias *= 1.702
            self.fc2.weight /= 1.702
            self.act = nn.SiLU()
        if type(self.act) in ACTIVATIONS:
            self.fc1 = FusedLinear(self.fc1, ACTIVATIONS[type(self.act)])
            self.act = nn.Identity()
        return self


class Block(nn.Module):
    """x + DP(attn(LN(x))) / s, then x + DP(mlp(LN(x))) / s; `attn` maps tokens to tokens, s is `skip_lambda`.

    With `on_grid` it maps a grid (B, C, h, w) to itself and `forward` takes the tokens' grid (h, w) too.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        *,
        eps: float = 1e-6,
        on_grid: bool = False,
        skip_lambda: float = 1.0,
    ) -> None:
        super().__init__()
        self.on_grid, self.skip_lambda = on_grid, skip_lambda
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        normed = self.norm1(x)
        y = self.attn(normed.mT.unflatten(2, size)).flatten(2).mT if self.on_grid else self.attn(normed)
        return self.add_mlp(x + self.branch(y))

    def branch(self, y: Tensor) -> Tensor:
        """What a branch's result adds."""
        y = self.drop_path(y)
        return y if self.skip_lambda == 1 else y / self.skip_lambda

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.branch(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module) -> None:
    """Truncated normal (std 0.02) weights and zero biases for linear maps; convolutions keep torch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TokenHead(nn.Module):
    """Classifier of tokens (B, P + N, C): pool, dropout, linear; the pools are `POOLS`."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        prefix: int = 1,
        *,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        self.dim, self.prefix, self.num_heads = dim, prefix, num_heads
        self.attn_pool: nn.Module | None = None
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` classes (0: none); a change to "map" starts a new query."""
        old = next(self.parameters(), torch.empty(0))
        if global_pool is not None:
            allowed = POOLS if self.prefix else POOLS[1:]
            if global_pool not in allowed:
                raise ValueError(f"global_pool is {global_pool!r}; allowed are {', '.join(map(repr, allowed))}")
            if global_pool != "map":
                self.attn_pool = None
            elif self.attn_pool is None:
                pool = AttentionPoolLatent(self.dim, num_heads=self.num_heads, norm_layer=nn.LayerNorm)
                self.attn_pool = pool.to(old)
            self.global_pool = global_pool
        self.fc = linear(self.dim, num_classes).to(old)

    def pool(self, x: Tensor) -> Tensor:
        if self.attn_pool is not None:
            return self.attn_pool(x[:, self.prefix :])
        return global_pool_nlc(x, self.global_pool, self.prefix)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.pool(x))
        return x if pre_logits else self.fc(x)


class TokenModel(PictureModel):
    """A picture classifier whose features are tokens: P prefix tokens, then the patches of a grid, row-major.

    Inputs are (B, in_chans, H, W) with sides that are multiples of `patch_size`, of any size: positions are resized to
    the input's grid (kept while it stays the same). Other sides are refused, since their last pixels would be lost;
    with `dynamic_img_pad` the input gains zeros at its lower and right edge instead, as in timm.

    A subclass builds its parts and calls `finish`. The loop over blocks is here; `embed` makes the first state from the
    picture, `apply_block` the next one, `conclude` the features from the last; `split` takes prefix and patches apart.
    Models of stages name their module list
    in `LAYERS` and give `finish` one width and stride for each.
    """

    CLASSIFIERS: ClassVar[tuple[str, ...]] = ("head.fc",)
    FIRST_CONV: ClassVar[str] = "patch_embed.proj"
    LAYERS: ClassVar[str] = "blocks"
    """Name of the module list that is applied one by one, a feature level each."""
    default_indices: ClassVar[tuple[int, ...]] = (-3, -2, -1)
    min_size: ClassVar[int] = 16

    patch_embed: nn.Module
    cls_token: nn.Parameter | None
    pos_embed: Positions | None
    norm: nn.Module
    head: TokenHead

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = self.pos_embed = None
        self.dynamic_img_pad = False

    def finish(
        self,
        num_classes: int,
        in_chans: int,
        img_size: int | tuple[int, int],
        patch_size: int,
        dims: Sequence[int],
        strides: Sequence[int] | None = None,
        num_prefix_tokens: int = 1,
    ) -> None:
        """Record what timm asks a model for; `dims` and `strides` (by default the patch) of each block or stage."""
        self.num_classes, self.in_chans = num_classes, in_chans
        self.img_size, self.patch_size = pair(img_size), patch_size
        self.num_features = self.head_hidden_size = self.embed_dim = dims[-1]
        self.num_prefix_tokens, self.has_class_token = num_prefix_tokens, self.cls_token is not None
        strides = strides or [patch_size] * len(dims)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"{self.LAYERS}.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.grad_checkpointing = False

    @classmethod
    def feature_indices(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        return cls.default_indices

    @classmethod
    def last_stride(cls, settings: Mapping[str, Any]) -> int:
        takes = signature(cls).parameters
        return settings.get("stride") or settings.get("patch_size") or takes["patch_size"].default

    # from picture to tokens

    def embed(self, x: Tensor) -> State:
        """The state before the first block: patches with positions behind the class token, and the grid."""
        patches, size = whole(self.patch_embed, x)
        if self.pos_embed is not None:
            patches = whole(self.pos_embed, patches, size)
        return self.with_prefix(patches), size

    def with_prefix(self, patches: Tensor) -> Tensor:
        """Patches behind the class token, which gains its own position where the table has one."""
        if self.cls_token is None:
            return patches
        token = self.cls_token
        if self.pos_embed is not None and self.pos_embed.prefix is not None:
            token = token + self.pos_embed.prefix
        return torch.cat((token.expand(patches.shape[0], -1, -1), patches), dim=1)

    def apply_block(self, index: int, state: State) -> State:
        """The state after block `index`."""
        tokens, *rest = state
        return self.run(self.layers[index], tokens), *rest

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`; with gradient checkpointing it runs again in the backward pass."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return whole(block, *inputs)

    def conclude(self, tokens: Tensor) -> Tensor:
        """The features: tokens after the last block through the final norm."""
        return self.norm(tokens)

    def split(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Prefix tokens and patches of the tokens after block `index`."""
        return tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self, self.LAYERS)

    def forward_blocks(
        self, state: State, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, tuple[int, int]]]]:
        """Tokens after the last block (or block `last`), and tokens and grid after each block of `take`."""
        taken = []
        for i in range(len(self.layers) if last is None else last + 1):
            state = self.apply_block(i, state)
            if i in take:
                taken.append((state[0], state[1]))
        return state[0], taken

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the final norm, (B, P + N, C)."""
        return self.conclude(self.forward_blocks(self.embed(self.prepare(x)))[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The patches after the blocks `indices` (all by default; an int n: the last n), as timm defines it.

        Args:
            return_prefix_tokens: give pairs (patches, prefix tokens) instead of patches.
            norm: through the final norm, where the level has its width.
            stop_early: go no further than the last of `indices`.
            output_fmt: "NCHW" for maps, "NLC" for tokens.
            intermediates_only: leave out the first result, the tokens after the final norm.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed are 'NCHW' and 'NLC'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        state = self.embed(self.prepare(x))
        final, taken = self.forward_blocks(state, take, last if stop_early or intermediates_only else None)
        found: list[Any] = []
        for i, (tokens, size) in zip(sorted(set(take)), taken, strict=True):
            fits = norm and self.feature_info[i]["num_chs"] == self.num_features
            prefix, patches = self.split(self.norm(tokens) if fits else tokens, i)
            if output_fmt == "NCHW":
                patches = patches.mT.unflatten(2, size).contiguous()
            found.append((patches, prefix) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.conclude(final), found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` in the words of DINO, for the last `n` blocks or the blocks `n`."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the levels `indices` do not need; returns their absolute indices.

        With `prune_head` the tokens of the last of them are what the model then gives, until `reset_classifier`.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        setattr(self, self.LAYERS, self.layers[: last + 1])
        width = self.feature_info[last]["num_chs"]
        if prune_norm or width != self.num_features:
            self.norm = nn.Identity()
        if prune_head:
            self.num_prefix_tokens = self.prefix_at(last)
            if not self.num_prefix_tokens:
                self.cls_token, self.has_class_token = None, False
            self.num_classes, self.num_features = 0, width
            self.head_hidden_size = self.embed_dim = width
            head = TokenHead(width, 0, self.num_prefix_tokens, global_pool="", num_heads=self.head.num_heads)
            self.head = head.train(self.training)
        return take

    def prefix_at(self, index: int) -> int:
        """How many prefix tokens there are after block `index`."""
        return self.num_prefix_tokens

    # sizes

    def prepare(self, x: Tensor) -> Tensor:
        """The input, checked, and padded where the model may."""
        if is_traced(x):  # a graph is for any size
            return pad_to(x, self.patch_size)
        self.check_input(x)
        return pad_to(x, self.patch_size)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError for an input that the model cannot take whole."""
        if x.ndim != 4 or (not self.dynamic_img_pad and any(n % self.patch_size for n in x.shape[-2:])):
            raise ValueError(
                f"input is {tuple(x.shape)}; {type(self).__name__} takes (B, C, H, W) with H and W multiples of "
                f"{self.patch_size} (others with dynamic_img_pad=True, which adds zeros)"
            )
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(f"input is {tuple(x.shape)}; H and W must be at least {self.min_size}")

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resize the position table to the grid of `img_size`, and the patch kernel to `patch_size`, as timm does."""
        if patch_size is not None and pair(patch_size) != pair(self.patch_size):
            self.set_patch_size(patch_size)
        size = self.img_size if img_size is None else pair(img_size)
        if any(n % self.patch_size for n in size):
            raise ValueError(f"img_size is {size}; its sides must be multiples of {self.patch_size}")
        self.img_size = size
        if self.pos_embed is not None:
            self.pos_embed.set_size(self.grid(size))

    def set_patch_size(self, patch_size: int | tuple[int, int]) -> None:
        """Resample the kernel of a plain patch convolution."""
        height, width = pair(patch_size)
        if not isinstance(self.patch_embed, PatchEmbed) or height != width:
            raise ValueError(f"patch_size is {patch_size}; {type(self).__name__} keeps its {self.patch_size}")
        proj = self.patch_embed.proj
        weight = resample_patch_embed(proj.weight, [height, width])
        proj.weight = nn.Parameter(weight, proj.weight.requires_grad)
        proj.kernel_size = proj.stride = (height, width)
        self.patch_size = height
        for info in self.feature_info:
            info["reduction"] = height

    def grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of the position table for pictures of `img_size`."""
        return img_size[0] // self.patch_size, img_size[1] // self.patch_size

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in `PictureModel`; a position table of another grid is resized."""
        state = dict(state)
        for name, module in self.named_modules():
            table = state.get(f"{name}.grid")
            if isinstance(module, Positions) and table is not None and tuple(table.shape[1:3]) != module.size:
                state[f"{name}.grid"] = module.resized(table, module.size)
        return super().fit_state(state)

    # what timm asks a model for

    def no_weight_decay(self) -> set[str]:
        names = {name for name, _ in self.named_parameters()}
        return {n for n in names if n.startswith("pos_embed.") or n in ("cls_token", "dist_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning-rate decay: tokens and patches, every block, norm and head."""
        stem = r"^cls_token|^dist_token|^pos_embed|^patch_embed"
        return {"stem": stem, "blocks": [(rf"^{self.LAYERS}\.(\d+)", None), (r"^norm", (99999,))]}


@fx.wrap
def pad_to(x: Tensor, multiple: int) -> Tensor:
    """`x` with zeros at its lower and right edge, its sides multiples of `multiple`."""
    down, right = (-n % multiple for n in x.shape[-2:])
    return F.pad(x, (0, right, 0, down)) if down or right else x


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def picture_size(table: Tensor, patch: int) -> int | tuple[int, int]:
    """Side, or height and width, of the pictures that a table of positions (1, h, w, C) was made for."""
    height, width = table.shape[1:3]
    return patch * height if height == width else (patch * height, patch * width)
