"""What every nearfar backbone of several resolutions has: timm's surface and published checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfar.core.contracts import Contract
from nearfar.ops.common.folding import batch_norm_affine
from nearfar.ops.common.layers import DepthwiseConv
from nearfar.vision.models.base import PictureModel
from nearfar.vision.tracing import is_traced, whole


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of (B, C) or (B, C, *S)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (B, C) or (B, C, *S), got {tuple(input.shape)}")


class Stage(nn.Module):
    """One resolution: an optional downsampling layer, then blocks in sequence."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.ahead: nn.Module | None = None  # zeros for a downsampling layer that has lost its stride
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.ahead is None:
            x = whole(self.downsample, x)
        else:
            x = whole(self.downsample[1], self.ahead(whole(self.downsample[0], x)))
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = whole(block, x)
        return x


class Head(nn.Module):
    """Classifier: pool, norm, dropout, linear; with `norm_first`: norm, pool, dropout, linear.

    With `global_pool=""` it classifies every position: (B, num_classes, H, W).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        norm: nn.Module,
        *,
        norm_first: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.norm_first = dim, norm_first
        self.norm = norm
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` classes; 0 for none, whose output is the pooled features."""
        if global_pool is not None:
            self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            if self.pool.feat_mult() != 1:
                raise ValueError(
                    f"global_pool is {global_pool!r}, which changes the width; allowed: avg, max, avgmax, ''"
                )
        like = next(self.norm.parameters(), torch.empty(0))
        self.fc = linear(self.dim, num_classes).to(like)

    @torch.no_grad()
    def fuse(self) -> Self:
        """Fold a batch norm before the classifier into it, for inference; the outputs stay the same."""
        if isinstance(self.norm, BatchNorm) and isinstance(self.fc, nn.Linear) and not self.norm_first:
            scale, shift = batch_norm_affine(self.norm)
            self.fc.bias += self.fc.weight @ shift
            self.fc.weight *= scale
            self.norm = nn.Identity()
        return self

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool(self.norm(x)) if self.norm_first else self.norm(self.pool(x))
        x = self.drop(x)
        if pre_logits or isinstance(self.fc, nn.Identity):
            return x
        return self.fc(x.movedim(1, -1)).movedim(-1, 1) if self.pool.is_identity() else self.fc(x)


class PictureConv2d(nn.Conv2d):
    """A backbone's first convolution: its map lies with the channels of a position together, the layout of channel
    norms, on a CPU outside of traced graphs.

    With gradients the map is turned round, not the picture, of which training would keep the copy.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "PictureConv2d":
        """One with the parameters of `conv`."""
        form = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
        made = cls(conv.in_channels, conv.out_channels, *form, conv.bias is not None, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input) or torch.compiler.is_compiling() or not input.is_cpu:
            return super().forward(input)
        if torch.is_grad_enabled():
            return super().forward(input).contiguous(memory_format=torch.channels_last)
        return super().forward(input.contiguous(memory_format=torch.channels_last))


def linear(dim: int, num_classes: int) -> nn.Module:
    """A linear classifier with truncated-normal weights (std 0.02), or the identity for no classes."""
    if not num_classes:
        return nn.Identity()
    layer = nn.Linear(dim, num_classes)
    init_weights(layer)
    return layer


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) weights and zero biases for every convolution and linear map."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | DepthwiseConv):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop-path rates that grow linearly from 0 to `rate` over all blocks, split by stage."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu").tolist()
    return [[rates.pop(0) for _ in range(depth)] for depth in depths]


class Backbone(PictureModel):
    """A picture classifier and feature pyramid with timm's surface.

    A subclass builds `stem`, `stages` and `head` and calls `finish`; where its features are more than the outputs of
    its stages it overrides `forward_pyramid`. Inputs are `(B, in_chans, H, W)` with H, W of at least `min_size`;
    strided layers floor or pad other sizes than multiples of the stride as the published code does.
    """

    FIRST_CONV: ClassVar[str] = "stem.0"
    FEATURE_CLASSES = ("getter", "hook", "fx")

    stem: nn.Module
    stages: nn.ModuleList
    head: nn.Module

    def finish(
        self,
        num_classes: int,
        in_chans: int,
        dims: Sequence[int],
        strides: Sequence[int],
        feature_norms: Sequence[nn.Module] = (),
    ) -> None:
        """Record what timm asks a model for. `dims`, `strides`: channels and stride of each pyramid level."""
        self.set_submodule(self.FIRST_CONV, PictureConv2d.of(self.get_submodule(self.FIRST_CONV)))
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.feature_norms = nn.ModuleList(feature_norms)

    @classmethod
    def levels(cls, settings: Mapping[str, Any]) -> int:
        """How many pyramid levels the model with these settings has."""
        return len(settings["depths"])

    @classmethod
    def feature_indices(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(range(cls.levels(settings)))

    # features

    def forward_pyramid(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Feature maps of every level, or up to level `last`, before any norm."""
        x = whole(self.stem, x)
        levels = []
        for stage in self.stages[: None if last is None else last + 1]:
            x = stage(x)
            levels.append(x)
        return levels

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, C, H / stride, W / stride)."""
        self.check_input(x)
        return self.forward_pyramid(x)[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the levels `indices` (all by default; an int n: the last n), as timm defines it.

        Where the model was built with `feature_norms`, every level passes through its own norm. `norm` is accepted
        for timm's sake: the head's norm belongs to the classifier. `output_fmt` is "NCHW" for maps, "NLC" for tokens.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed are 'NCHW' and 'NLC'")
        self.check_input(x)
        take, last = feature_take_indices(len(self.feature_info), indices)
        levels = self.forward_pyramid(x, last if stop_early or intermediates_only else None)
        normed = self.norm_levels(levels)
        picked = [normed[i] if output_fmt == "NCHW" else normed[i].flatten(2).mT for i in take]
        return picked if intermediates_only else (levels[-1], picked)

    def norm_levels(self, levels: list[Tensor]) -> list[Tensor]:
        """Each level through its own norm, where the model has them."""
        if not len(self.feature_norms):
            return levels
        return [norm(level) for norm, level in zip(self.feature_norms, levels, strict=False)]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the levels `indices` do not need; returns their absolute indices.

        With `prune_head` the last of them is what the model then gives, until `reset_classifier`.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages, self.feature_norms = self.stages[: last + 1], self.feature_norms[: last + 1]
        if prune_head:
            self.num_classes = 0
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head = Head(self.num_features, 0, nn.Identity(), global_pool="").train(self.training)
        return take

    def set_output_stride(self, stride: int) -> None:
        """Let strides beyond `stride` become dilation: the kept positions have the features that they had before.

        For stages of convolutions alone (`dilates`) that start with a convolution as wide as its stride.
        """
        reductions = [info["reduction"] for info in self.feature_info]
        if not self.dilates():
            super().set_output_stride(stride)
            return
        if stride not in reductions:
            raise ValueError(f"output_stride is {stride}; {type(self).__name__} here allows {reductions}")
        dilation = 1
        for stage, info in zip(self.stages, self.feature_info, strict=True):
            if info["reduction"] <= stride:
                continue
            info["reduction"] = stride
            _, conv = stage.downsample  # a norm, and a convolution as wide as its stride, which looks ahead
            ahead = [(n - 1) * dilation for n in conv.kernel_size]
            conv.stride, conv.dilation = (1, 1), (dilation, dilation)
            stage.ahead = nn.ZeroPad2d((0, ahead[1], 0, ahead[0]))
            dilation *= 2
            for conv in (module for module in stage.blocks.modules() if isinstance(module, DepthwiseConv)):
                conv.dilate(dilation)

    def dilates(self) -> bool:
        """Whether strides can become dilation: every map is mixed by convolutions alone."""
        return False

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError for an input that is not (B, C, H, W) or is smaller than the model can take."""
        if is_traced(x):  # a graph is for any size
            return
        if x.ndim != 4 or min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"input is {tuple(x.shape)}; {type(self).__name__} takes (B, C, H, W) with H and W of at least "
                f"{self.min_size}, its largest stride"
            )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning-rate decay: stem, every block (or stage), head."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        }

    def contract_form(self, contract: Contract | None = None, levels: Sequence[int] = ()) -> nn.Module:
        """The model as a contract calls it: logits, or the pyramid where every level has its own norm.

        Also where the contract lists several outputs: those of the stages `out_indices` in its settings, else of
        `levels` if they are as many, else of the last stages.
        """
        if contract is None or contract.outputs[0]["name"] == "out":
            return Pyramid(self) if len(self.feature_norms) else self
        outputs = len(contract.outputs)
        indices = contract.settings.get("out_indices", levels if len(levels) == outputs else range(-outputs, 0))
        stages = range(len(self.feature_info))[-len(self.stages) :]
        return Pyramid(self, [stages[i] for i in indices])


def twelve_layers(block: Callable[[int], int]) -> Callable[[str], tuple[int, ...]]:
    """timm's matcher for layer decay in the way of ConvNeXt, for a network of four stages.

    Stem 0; stages 0 and 1 are 1 and 2; stage 2's downsampling is 3 and its block b is `block(b)`, 3 to 11; stage 3 is
    12; norm and classifier 13.
    """

    def layer(name: str) -> tuple[int, ...]:
        part, *rest = name.split(".")
        if part != "stages":
            return (0,) if part == "stem" else (13,)
        stage = int(rest[0])
        if stage == 2:
            return (block(int(rest[2])) if rest[1] == "blocks" else 3,)
        return ((1, 2, 3, 12)[stage],)

    return layer


class Pyramid(nn.Module):
    """A backbone called for its feature maps, all or those of the levels `indices`."""

    def __init__(self, backbone: Backbone, indices: list[int] | None = None) -> None:
        super().__init__()
        self.backbone, self.indices = backbone, indices

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.backbone.forward_intermediates(x, self.indices, intermediates_only=True)
