"""DeepLab v2, v3 and v3+ on the ResNet of the Caffe models.

Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully Connected
CRFs" (TPAMI 2018); "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017); "Encoder-Decoder with Atrous
Separable Convolution for Semantic Image Segmentation" (2018). The CRF is `nearfar.ops.graph.dense_crf.DenseCRF`.

Photographs go in as BGR 0..255 minus `MEAN_BGR`, without further scaling.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, count, loaded, read, rename
from nearfar.core.errors import CheckpointError
from nearfar.medical.models.caffe import read_caffemodel
from nearfar.ops.aggregation.multi_scale import multi_scale_scores
from nearfar.ops.common.conv_norm_act import INTERPOLATION, ConvNormAct
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.convolution.aspp import ASPP, SummedASPP
from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_softmax

MEAN_BGR = (104.008, 116.669, 122.675)
"""Mean blue, green and red of the training photographs, subtracted from 0..255 values."""

MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

MOMENTUM = 1e-3
"""Share of a batch in the running statistics, as published."""


class Bottleneck(nn.Module):
    """relu(increase(conv3x3(reduce(x))) + shortcut(x)), widths out/4, out/4, out.

    The stride is in the first 1x1, as in the Caffe models; torchvision strides in the 3x3, so the weights of one give
    other numbers in the other. The shortcut is a strided 1x1 in a stage's first block, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int, first: bool, dims: int) -> None:
        super().__init__()
        width, common = out_channels // 4, {"momentum": MOMENTUM, "dims": dims}
        self.reduce = ConvNormAct(in_channels, width, stride=stride, **common)
        self.conv3x3 = ConvNormAct(width, width, 3, dilation=dilation, **common)
        self.increase = ConvNormAct(width, out_channels, activation=None, **common)
        self.shortcut = (
            ConvNormAct(in_channels, out_channels, stride=stride, activation=None, **common) if first else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.increase(self.conv3x3(self.reduce(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem 7x7 stride 2, ceil-mode max pool, four stages of 256, 512, 1024, 2048 channels; returns their four maps.

    `strides` and `dilations` are per stage; `multi_grid` multiplies the dilations of the last stage's blocks.
    """

    def __init__(
        self,
        depths: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        multi_grid: Sequence[int] | None = None,
        in_channels: int = 3,
        width: int = 64,
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths are {tuple(depths)}; give four numbers, each at least 1")
        if multi_grid is not None and len(multi_grid) != depths[3]:
            raise ValueError(f"multi_grid {tuple(multi_grid)} needs one number for each of {depths[3]} blocks")
        self.stem = ConvNormAct(in_channels, width, 7, stride=2, momentum=MOMENTUM, dims=dims)
        self.pool = MAX_POOLS[dims](3, 2, 1, ceil_mode=True)
        self.stages, channels = nn.ModuleList(), width
        for i, (depth, stride, dilation) in enumerate(zip(depths, strides, dilations)):
            out = width * 4 * 2**i
            grid = multi_grid if multi_grid is not None and i == 3 else [1] * depth
            blocks = [
                Bottleneck(out if k else channels, out, 1 if k else stride, dilation * grid[k], k == 0, dims)
                for k in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            channels = out

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.pool(self.stem(x)), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class _DeepLab(nn.Module):
    """What the versions share: resizing to the input, frozen batch norms, parameter groups."""

    dims: int
    frozen_norm: bool
    head_names: tuple[str, ...]

    def resize(self, scores: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(scores, x.shape[2:], mode=INTERPOLATION[self.dims], align_corners=False)

    def train(self, mode: bool = True) -> "_DeepLab":
        super().train(mode)
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def parameter_groups(self, lr: float = 2.5e-4, weight_decay: float = 5e-4) -> Iterator[dict[str, Any]]:
        """SGD groups of the published recipe: heads learn 10 times as fast, their biases 20 times without decay.

        The affine parameters of batch norms are in no group where `frozen_norm` is set, as published.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for prefix, module in self.named_modules():
            head = prefix.split(".")[0] in self.head_names
            if self.frozen_norm and isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                bias = name == "bias"
                key = ((20.0 if bias else 10.0) if head else 1.0, 0.0 if head and bias else weight_decay)
                groups.setdefault(key, []).append(parameter)
        for (factor, decay), parameters in groups.items():
            yield {"params": parameters, "lr": lr * factor, "weight_decay": decay}


class DeepLabV2(_DeepLab):
    """ResNet of output stride 8 with the summed atrous pyramid as classifier, on several sizes of the input.

    Args:
        num_classes: classes, background included.
        in_channels: image channels.
        depths: blocks per stage; (3, 4, 23, 3) is ResNet-101.
        rates: dilations of the classifier; (12,) is LargeFOV.
        scales: sizes that join the full one by maximum; () for a single size.
        full_size: scores are resized (linearly) to the input's size; otherwise they stay on the 1/8 grid, as published.
        frozen_norm: batch norms stay in eval mode in training, as published; for training from pretrained weights.
        width: channels of the stem; the published models have 64.
        dims: 2 or 3 (1 works too).

    `forward(x)`: (B, C, *S) to class scores (B, K, *S). In training with `scales`: the list of scores of the full
    size, of each scale on its own 1/8 grid, and the maximum, of which the published loss is the sum of the
    cross-entropies. Any input size works. With 21 classes 44,048,532 parameters.
    """

    CARD = Card(
        "DeepLab v2 with dense CRF",
        "1606.00915",
        "parallel dilated convolutions over a dilated residual network; a fully connected CRF after it",
        7.2e-6,
        weights="PyTorch reproduction, `.caffemodel`",
        networks={"deeplab_v2": {}},
        dims=(1, 2, 3),
    )

    head_names = ("aspp",)

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        depths: Sequence[int] = (3, 4, 23, 3),
        rates: Sequence[int] = (6, 12, 18, 24),
        scales: Sequence[float] = (0.5, 0.75),
        *,
        full_size: bool = True,
        frozen_norm: bool = False,
        width: int = 64,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = ResNet(depths, (1, 2, 1, 1), (1, 1, 2, 4), None, in_channels, width, dims)
        self.aspp = SummedASPP(32 * width, num_classes, rates, dims=dims)
        self.scales, self.full_size, self.frozen_norm, self.dims = tuple(scales), full_size, frozen_norm, dims

    def scores(self, x: Tensor) -> Tensor:
        """Class scores of one size on the 1/8 grid."""
        return self.aspp(self.backbone(x)[-1])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not self.scales:
            scores = self.scores(x)
        else:
            every = multi_scale_scores(self.scores, x, self.scales)
            if self.training:
                return every
            scores = every[-1]
        return self.resize(scores, x) if self.full_size else scores

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> "DeepLabV2":
        """The model of a published checkpoint, in eval mode: classes, depths and sizes are read from its tensors.

        Takes the PyTorch reproduction's state dicts (names with the prefix `base.` are multi-scale models) and the
        original `.caffemodel` files. `settings` go to the constructor; `rates` of four branches default to 6 to 24.
        """
        if isinstance(source, str | Path) and Path(source).suffix == ".caffemodel":
            source = caffe_state(read_caffemodel(source))
        state = read(source)
        if any(name.startswith("base.") for name in state):
            state = rename(state, [(r"^base\.", "")], anywhere=True)
        else:
            settings.setdefault("scales", ())
        state = published_state(state)
        branches = count(state, r"aspp\.branches\.(\d+)\.weight")
        if "aspp.branches.0.weight" not in state or state["aspp.branches.0.weight"].ndim < 3:
            raise CheckpointError("no DeepLab v2: there is no aspp.c0.weight")
        if "rates" not in settings:
            known = {1: (12,), 4: (6, 12, 18, 24)}
            if branches not in known:
                raise CheckpointError(f"the classifier has {branches} branches; name their `rates`")
            settings["rates"] = known[branches]
        return loaded(cls(len(state["aspp.branches.0.bias"]), **(_trunk_settings(state) | settings)), state)


class DeepLabV3(_DeepLab):
    """ResNet with multi-grid and the concatenated atrous pyramid; v3+ with a decoder that brings back stage-1 detail.

    v3: ASPP -> 1x1 256 -> 1x1 classes. v3+ (`decoder=True`): the 256 channels are resized to the first stage's grid
    (1/4), joined with 48 channels made of that stage, 3x3 256 twice, 1x1 classes, always resized to the input.

    Args:
        num_classes, in_channels, depths, full_size, frozen_norm, width, dims: as in `DeepLabV2`.
        output_stride: 16 or 8.
        rates: dilations of the pyramid; None for (6, 12, 18) at output stride 16 and twice that at 8.
        multi_grid: factors on the dilations of the last stage's blocks.
        decoder: v3+.

    With 21 classes 58,040,661 parameters, v3+ 59,344,309.
    """

    CARD = Card(
        "DeepLab v3, v3+",
        "1706.05587",
        "dilated convolutions beside image pooling; v3+: with a decoder",
        7.2e-6,
        weights="PyTorch reproduction",
        networks={"deeplab_v3": {}, "deeplab_v3plus": {"decoder": True}},
        dims=(1, 2, 3),
    )

    head_names = ("aspp", "project", "classifier", "reduce", "refine")
    STAGES = {16: ((1, 2, 2, 1), (1, 1, 1, 2)), 8: ((1, 2, 1, 1), (1, 1, 2, 4))}

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        depths: Sequence[int] = (3, 4, 23, 3),
        output_stride: int = 16,
        rates: Sequence[int] | None = None,
        multi_grid: Sequence[int] = (1, 2, 4),
        *,
        decoder: bool = False,
        full_size: bool = True,
        frozen_norm: bool = False,
        width: int = 64,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if output_stride not in self.STAGES:
            raise ValueError(f"output_stride is {output_stride}; allowed are 8 and 16")
        if rates is None:
            rates = [96 // output_stride * k for k in (1, 2, 3)]
        self.backbone = ResNet(depths, *self.STAGES[output_stride], multi_grid, in_channels, width, dims)
        common = {"momentum": MOMENTUM, "dims": dims}
        self.aspp = ASPP(32 * width, 256, rates, **common)
        self.project = ConvNormAct(256 * (len(rates) + 2), 256, **common)
        if decoder:
            self.reduce = ConvNormAct(4 * width, 48, **common)
            self.refine = nn.Sequential(ConvNormAct(304, 256, 3, **common), ConvNormAct(256, 256, 3, **common))
        self.classifier = CONVOLUTIONS[dims](256, num_classes, 1)
        self.decoder, self.full_size, self.frozen_norm, self.dims = decoder, full_size, frozen_norm, dims

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        y = self.project(self.aspp(maps[-1]))
        if self.decoder:
            y = torch.cat([self.resize(y, maps[0]), self.reduce(maps[0])], 1)
            return self.resize(self.classifier(self.refine(y)), x)
        scores = self.classifier(y)
        return self.resize(scores, x) if self.full_size else scores

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> "DeepLabV3":
        """The v3 or v3+ model of a published state dict, with or without the prefix `base.`, in eval mode.

        Output stride and rates leave no trace in the tensors: give them where they are not those of the defaults.
        """
        state = published_state(rename(read(source), [(r"^base\.", "")], anywhere=True))
        if "project.conv.weight" not in state:
            raise CheckpointError("no DeepLab v3: there is no fc1.conv.weight")
        decoder = "reduce.conv.weight" in state
        last = state["classifier.weight"]
        return loaded(cls(len(last), decoder=decoder, **(_trunk_settings(state) | settings)), state)


def refine_scores(scores: Tensor, image: Tensor, crf: DenseCRF | None = None) -> Tensor:
    """Probabilities (B, K, *S) after the CRF: softmax of `scores`, resized to `image` where sizes differ, mean field.

    `image` (B, C, *S) is the raw picture in the unit of the CRF's `color_std` (0..255). The published evaluation
    passed the mean-subtracted picture cast to bytes instead, so negative values wrapped round.
    """
    if scores.shape[2:] != image.shape[2:]:
        mode = INTERPOLATION[image.ndim - 2]
        scores = F.interpolate(scores, image.shape[2:], mode=mode, align_corners=False)
    return (crf or DenseCRF())(unary_from_softmax(scores.softmax(1)), image)


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "deeplab_v2_resnet101": DeepLabV2,
    "deeplab_v3_resnet101": DeepLabV3,
    "deeplab_v3plus_resnet101": lambda *args, **kwargs: DeepLabV3(*args, decoder=True, **kwargs),
}
"""Published networks by name, and their 21-class parameter counts: 44,048,532, 58,040,661, 59,344,309."""

RULES = (
    (r"^layer1\.conv1\.", "backbone.stem."),
    (r"^layer(\d+)\.block(\d+)\.", lambda m: f"backbone.stages.{int(m[1]) - 2}.{int(m[2]) - 1}."),
    (r"^aspp\.(?:stages\.)?c(\d+)\.", r"aspp.branches.\1."),
    (r"^aspp\.stages\.imagepool\.conv\.", "aspp.pool."),
    (r"^fc1\.", "project."),
    (r"\.bn\.", ".norm."),
)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of the PyTorch reproduction, without its prefix `base.`.

    What comes after `fc1` is told apart by shape: v3 has a 1x1 classifier; v3+ a 1x1 reduction with batch norm, two
    3x3 layers of 304 and 256 inputs, and the classifier.
    """
    renamed = rename(state, RULES, anywhere=True)  # type: ignore[arg-type]
    ours = re.compile(r"(backbone|aspp|project)\.")
    layers: dict[str, str] = {}
    for name, tensor in renamed.items():
        if not ours.match(name) and tensor.ndim >= 3:
            prefix, with_norm = re.sub(r"(\.conv)?\.weight$", "", name), name.endswith(".conv.weight")
            if not with_norm or f"{prefix}.norm.weight" not in renamed:
                layers[name.removesuffix("weight")] = "classifier."
            elif tensor.shape[-1] == 1:
                layers[prefix + "."] = "reduce."
            else:
                layers[prefix + "."] = "refine.0." if tensor.shape[1] == 304 else "refine.1."
    result = {}
    for name, tensor in renamed.items():
        prefix = next((p for p in layers if name.startswith(p)), None)
        result[name if prefix is None else layers[prefix] + name.removeprefix(prefix)] = tensor
    return result


def _trunk_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stem = state["backbone.stem.conv.weight"]
    return {
        "depths": [count(state, rf"backbone\.stages\.{i}\.(\d+)\.") for i in range(4)],
        "in_channels": stem.shape[1],
        "width": stem.shape[0],
        "dims": stem.ndim - 2,
    }


def caffe_state(blobs: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The original Caffe model's layers (name -> blobs) in the names of the PyTorch reproduction, with `base.`.

    BatchNorm layers hold mean and variance times a factor, their third blob; the Scale layer that follows holds the
    affine part. The copies of the network for the other image sizes (`..._res05`, `..._res075`) share its weights and
    are left out.
    """
    state: dict[str, Tensor] = {}
    units = {"branch1": "shortcut", "branch2a": "reduce", "branch2b": "conv3x3", "branch2c": "increase"}
    for layer, values in blobs.items():
        if re.search(r"_res0\d+$", layer) or not values:
            continue
        match = re.fullmatch(r"(res|bn|scale)(\d)([a-z])(\d*)_(branch\w+)", layer)
        if match and match[5] in units:
            block = int(match[4]) + 1 if match[4] else ord(match[3]) - ord("a") + 1
            kind, unit = match[1], f"base.layer{match[2]}.block{block}.{units[match[5]]}"
        elif layer in ("conv1", "bn_conv1", "scale_conv1"):
            kind = {"conv1": "res", "bn_conv1": "bn", "scale_conv1": "scale"}[layer]
            unit = "base.layer1.conv1"
        elif match := re.fullmatch(r"fc1_\w+_c(\d)", layer):
            prefix = f"base.aspp.c{match[1]}"
            state |= {f"{prefix}.weight": values[0], f"{prefix}.bias": values[1].flatten()}
            continue
        else:
            raise CheckpointError(f"layer {layer} has weights but belongs to no DeepLab v2 on a ResNet")
        if kind == "res":
            state[f"{unit}.conv.weight"] = values[0]
        elif kind == "bn":
            factor = values[2].flatten()[0]
            factor = 0 if factor == 0 else 1 / factor
            state[f"{unit}.bn.running_mean"] = values[0].flatten() * factor
            state[f"{unit}.bn.running_var"] = values[1].flatten() * factor
        else:
            state[f"{unit}.bn.weight"], state[f"{unit}.bn.bias"] = values[0].flatten(), values[1].flatten()
    return state
