"""Convolutions and linear maps that call oneDNN with their activation, on a CPU without gradients."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import DepthwiseConv
from nearfar.ops.common.tables import Derived

FUSED_ACTIVATIONS = {"none": nn.Identity(), "gelu": nn.GELU(), "relu": nn.ReLU(), "swish": nn.SiLU()}
"""Activations that can run inside a convolution, by oneDNN's names."""


def runs_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a fused layer may call oneDNN itself: inference in float32 on a CPU, outside tracing and autocast.

    Weights made in inference mode do not tell when they change, so what is packed of them could not be kept.
    """
    return (
        not torch.compiler.is_compiling()  # first: a graph would break at what comes
        and x.is_cpu
        and not weight.is_inference()
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def fused_linear(
    layer: "FusedConv2d | FusedLinear", x: Float[Tensor, "*b c"], add: Float[Tensor, "*b d"] | None = None
) -> Float[Tensor, "*b d"]:
    """activation(W x + b) + add over the last axis in oneDNN's kernel, with the layer's weights packed."""
    weight, pack = layer.weight, torch.ops.mkldnn._reorder_linear_weight
    packed = layer.packed.get(weight, (), lambda: pack(weight.detach().flatten(1)))
    run = torch.ops.mkldnn._linear_pointwise
    if add is not None and layer.activation == "none":
        return run.binary(x, add, packed, layer.bias, "add")
    y = run.default(x, packed, layer.bias, layer.activation, [], "none")
    return y if add is None else y + add


class FusedConv2d(nn.Module):
    """activation(convolution(x)) + add of (B, C, H, W), for inference, with the weights of `conv`; `add` is optional.

    On a CPU in float32 the activation runs inside oneDNN's kernel and the weights are kept a second time in the layout
    that the kernel wants; maps are channels-last. Everywhere else it is the convolution, then the activation.
    """

    def __init__(self, conv: nn.Module, activation: str = "none") -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        size = self.weight.shape[2:]
        self.stride = list(getattr(conv, "stride", (1, 1)))
        if isinstance(conv, DepthwiseConv):
            self.dilation = [conv.dilation] * 2
            self.padding = [conv.dilation * (n // 2) for n in size]
        else:
            self.dilation, self.padding = list(conv.dilation), list(conv.padding)
        self.groups = len(self.weight) if isinstance(conv, DepthwiseConv) else conv.groups
        self.activation = activation
        self.order = (self.padding, self.stride, self.dilation, self.groups)
        self.pointwise = (*size, *self.stride, *self.padding, self.groups) == (1, 1, 1, 1, 0, 0, 1)
        self.packed = Derived()

    def forward(
        self, x: Float[Tensor, "b c h w"], add: Float[Tensor, "b d p q"] | None = None
    ) -> Float[Tensor, "b d p q"]:
        if not runs_onednn(x, self.weight) or x.shape[2:] == (1, 1):  # one position: plain code starts faster
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            y = FUSED_ACTIVATIONS[self.activation](y)
            return y if add is None else y + add
        if self.pointwise:
            return fused_linear(self, x.movedim(1, -1), None if add is None else add.movedim(1, -1)).movedim(-1, 1)
        weight = self.packed.get(self.weight, tuple(x.shape), lambda: self.pack(x))
        x = x.contiguous(memory_format=torch.channels_last)
        run = torch.ops.mkldnn._convolution_pointwise
        if add is None or self.activation != "none":
            y = run.default(x, weight, self.bias, *self.order, self.activation, [], "none")
            return y if add is None else y + add
        add = add.contiguous(memory_format=torch.channels_last)
        return run.binary(x, add, weight, self.bias, *self.order, "add", None, None, [], None)

    def pack(self, x: Tensor) -> Tensor:
        """The weights in the layout that is best for maps of x's size."""
        return torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *self.order, list(x.shape))


class FusedLinear(nn.Module):
    """activation(W x + b) over the last axis, for inference, with the weights of `linear`; see `FusedConv2d`."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation = activation
        self.packed = Derived()

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        if runs_onednn(x, self.weight):
            return fused_linear(self, x)
        return FUSED_ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))
