"""Small parts that convolutional blocks share: channel norm, stochastic depth, convolutions of any rank."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Convolution class by the number of grid axes."""

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""Batch norm class by the number of grid axes."""


def check_dims(dims: int, causal: bool = False) -> None:
    """Raise ValueError unless `dims` is 1, 2 or 3, and 1 where the operator is to be causal."""
    if dims not in CONVOLUTIONS:
        raise ValueError(f"dims is {dims}; allowed are 1, 2 and 3")
    if causal and dims != 1:
        raise ValueError(f"causal=True needs dims=1 (a time axis), dims is {dims}")


def check_odd(**sizes: int) -> None:
    """Raise ValueError unless every named size is odd and positive."""
    for name, size in sizes.items():
        if size < 1 or size % 2 == 0:
            raise ValueError(f"{name} is {size}; it must be odd and positive")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channel axis of `(B, C, *S)`: y_c = w_c (x_c - mean_c x) / sqrt(var_c x + eps) + b_c.

    The variance is biased. Runs as `F.layer_norm` on the channels-last view, so a channels-last map is normalised
    without a copy and any other comes out channels-last. `eps` defaults to 1e-6.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerScale(nn.Module):
    """w_c x_c + b_c on (B, C, *S); w starts at `init`, b at 0."""

    def __init__(self, dim: int, init: float | int = 1.0, *, dims: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, *(1,) * dims), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return torch.addcmul(self.bias.reshape(self.weight.shape), x, self.weight)


class GELU(nn.GELU):
    """Exact GELU that may write over its input where no gradient is needed: for what a layer has just computed."""

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return torch.ops.aten.gelu_(x)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, each sample's branch is zeroed with probability `p`.

    Kept samples are divided by 1 - p. The identity in eval mode.
    """

    def __init__(self, p: float | int = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop_path is {p}; it must be in [0, 1)")
        self.p = p

    def forward(self, x: Float[Tensor, "b *s"]) -> Float[Tensor, "b *s"]:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DepthwiseConv(nn.Module):
    """Size-keeping depthwise convolution of rank `dims`; with `causal`, padded on the left only (dims=1).

    Its parameters are those of the convolution itself: `weight` (C, 1, k, ...) and `bias` (C).
    Cost: C k^dims multiply-adds per position.
    """

    def __init__(self, dim: int, kernel_size: int, *, dims: int = 2, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_odd(kernel_size=kernel_size)
        conv = CONVOLUTIONS[dims](dim, dim, kernel_size, groups=dim, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        self.padding = 0 if causal else kernel_size // 2
        self.left = kernel_size - 1 if causal else 0

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        if self.weight[0].numel() == 1:  # a scale per channel: single-threaded CPUs convolve group by group
            scale = self.weight[:, 0]
            return x * scale if self.bias is None else torch.addcmul(self.bias.reshape(scale.shape), x, scale)
        if self.left:
            x = F.pad(x, (self.left, 0))
        return self.convolve(x, self.weight, self.bias, padding=self.padding, groups=len(self.weight))

    def extra_repr(self) -> str:
        dim, _, *kernel = self.weight.shape
        return f"{dim}, kernel_size={tuple(kernel)}, causal={bool(self.left)}, bias={self.bias is not None}"


def batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel of a batch norm in eval mode: y = scale x + shift."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def scale_of_norm(norm: nn.modules.batchnorm._BatchNorm, dims: int = 2) -> LayerScale:
    """A batch norm in eval mode as one multiply-add."""
    scale, shift = batch_norm_affine(norm)
    layer = LayerScale(len(scale), dims=dims).to(scale)
    layer.weight.copy_(scale.reshape(layer.weight.shape))
    layer.bias.copy_(shift)
    return layer


def cached_table(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what `build` returns for its (hashable) arguments: index tables, masks and the like, device included.

    Nothing is kept while a graph is traced. Tables serve in inference mode and in training alike.
    """
    kept = lru_cache(maxsize=64)(build)

    @wraps(build)
    def table(*key: Hashable) -> Tensor:
        if torch.compiler.is_compiling():
            return build(*key)
        with torch.inference_mode(False):
            return kept(*key)

    return table


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context in which autocast does not lower what follows; it changes nothing where autocast is off."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def split_heads(x: Float[Tensor, "b c h w"], num_heads: int) -> Float[Tensor, "b heads n d"]:
    """The channels of a map as heads and its positions as tokens, laid out as attention kernels take it."""
    parts = x.flatten(2).mT.unflatten(2, (num_heads, -1)).transpose(1, 2)
    if parts.device.type == "cpu" and parts.stride(-1) == 1:
        return parts
    # CUDA's kernels refuse odd strides, which `contiguous` leaves where an axis has length one
    return parts.clone(memory_format=torch.contiguous_format)


def join_heads(x: Float[Tensor, "b heads n d"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Heads and tokens as a map again, channels-last."""
    return x.transpose(1, 2).flatten(2).mT.unflatten(2, (height, width))


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Move a batch norm in eval mode into the convolution before it."""
    scale, shift = batch_norm_affine(norm)
    conv.weight *= scale.reshape(-1, *(1,) * (conv.weight.ndim - 1))
    conv.bias = nn.Parameter(shift if conv.bias is None else conv.bias * scale + shift)


@torch.no_grad()
def fold_into_next(norm: nn.modules.batchnorm._BatchNorm, conv: nn.Module) -> None:
    """Move a batch norm in eval mode into the pointwise convolution or linear map that follows it."""
    scale, shift = batch_norm_affine(norm)
    weight = conv.weight.flatten(1)
    added = weight @ shift
    conv.bias = nn.Parameter(added if conv.bias is None else conv.bias + added)
    conv.weight.copy_((weight * scale).reshape(conv.weight.shape))


class Derived:
    """Keeps the last tensor that was computed from a parameter, while that is unchanged and no gradient is needed."""

    def __init__(self) -> None:
        self.kept: tuple[tuple, Tensor] | None = None

    def get(self, parameter: Tensor, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave before for the same parameter values and `key`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or parameter.is_inference():
            return compute()
        key = (*key, parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device)
        if self.kept is None or self.kept[0] != key:
            self.kept = key, compute()
        return self.kept[1]

    def __reduce__(self) -> tuple[type["Derived"], tuple]:
        """A copy starts empty."""
        return Derived, ()


FUSED_ACTIVATIONS = {"none": nn.Identity(), "gelu": nn.GELU(), "relu": nn.ReLU(), "swish": nn.SiLU()}
"""Activations that can run inside a convolution, by oneDNN's names."""


def runs_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a fused layer may call oneDNN itself: inference in float32 on a CPU, outside tracing and autocast.

    Weights made in inference mode do not tell when they change, so what is packed of them could not be kept.
    """
    return (
        x.is_cpu
        and not weight.is_inference()
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
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
        self.padding = [size[0] // 2, size[1] // 2] if isinstance(conv, DepthwiseConv) else list(conv.padding)
        self.dilation = list(getattr(conv, "dilation", (1, 1)))
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
