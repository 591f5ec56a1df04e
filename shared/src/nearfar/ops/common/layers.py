"""Small layers that many operators share."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import CONVOLUTIONS, check_dims, check_odd


def linear_map(layer: nn.Module) -> tuple[Float[Tensor, "o i"], Float[Tensor, "o"] | None]:
    """Weight and bias of a linear layer or a convolution of one position.

    What wraps such a layer (the adapters of peft, quantized weights) computes with more than the weight that it shows:
    it is applied to the unit vectors.
    """
    own = layer._parameters.get("weight")  # not by attribute, which torch.fx would take for a value that it traces
    if own is not None and own.is_floating_point():
        return layer.weight.flatten(1), layer.bias
    size = layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[1]
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))  # packed weights are none
    units = torch.cat([like.new_zeros(1, size), torch.eye(size, dtype=like.dtype, device=like.device)])
    bias, *rows = layer(units.view(*units.shape, *(1,) * (getattr(layer.weight, "ndim", 2) - 2))).flatten(1)
    return (torch.stack(rows) - bias).mT, bias


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channel axis of `(B, C, *S)`: y_c = w_c (x_c - mean_c x) / sqrt(var_c x + eps) + b_c.

    The variance is biased. Runs as `F.layer_norm` on the channels-last view, so a channels-last map is normalized
    without a copy and any other comes out channels-last. `eps` defaults to 1e-6.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if not (compiled and x.is_cpu and x.shape[0] == 1):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        # inductor gives the one sample of a turned map a stride of 0, for which convolutions know no fast layout: with
        # the large kernels of (1, 56, 56, 56) behind it 31 ms in place of 8 (EPYC, Zen 4, one thread)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, 1, correction=0, keepdim=True)
        weight, bias = (t.view(-1, *(1,) * (x.ndim - 2)) for t in (self.weight, self.bias))
        return torch.addcmul(bias, (wide - mean) * torch.rsqrt(variance + self.eps), weight).to(x.dtype)


class LayerScale(nn.Module):
    """w_c x_c + b_c on (B, C, *S); w starts at `init`, b at 0."""

    def __init__(self, dim: int, init: float | int = 1.0, *, dims: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, *(1,) * dims), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return torch.addcmul(self.bias.reshape(self.weight.shape), x, self.weight)


class GELU(nn.GELU):
    """Exact GELU that may write over its input where no gradient is needed: for what a layer has just computed.

    A channels-last map passes as `(B, *S, C)`: torch has oneDNN's kernel for contiguous tensors alone. Of (1, 896, 14,
    14) that takes 91 us in place of 122 to 242, and with ATEN_CPU_CAPABILITY=default of (8, 896, 14, 14) 1.1 ms in
    place of 10.9 (EPYC, Zen 4, one thread).
    """

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):  # a proxy of torch.fx
            return super().forward(x)
        last = x.ndim > 2 and x.stride(1) == 1 and not x.is_contiguous()
        y = x.movedim(1, -1) if last else x
        y = super().forward(y) if torch.is_grad_enabled() else torch.ops.aten.gelu_(y)
        return y.movedim(-1, 1) if last else y


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
    Cost: C k^dims multiply-adds per position. Taps that no position of a small map reaches are left out: for a 7 x 7
    kernel on (8, 768, 2, 2) both passes take 1.6 ms in place of 21.6 (EPYC, Zen 4, one thread).
    """

    def __init__(self, dim: int, kernel_size: int, *, dims: int = 2, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_odd(kernel_size=kernel_size)
        conv = CONVOLUTIONS[dims](dim, dim, kernel_size, groups=dim, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        self.padding = 0 if causal else kernel_size // 2
        self.dilation = 1
        self.left = kernel_size - 1 if causal else 0

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        if self.weight[0].numel() == 1:  # a scale per channel: single-threaded CPUs convolve group by group
            scale = self.weight[:, 0]
            return x * scale if self.bias is None else torch.addcmul(self.bias.reshape(scale.shape), x, scale)
        weight, padding, dilation = self.weight, self.padding * self.dilation, self.dilation
        if self.left:
            x = F.pad(x, (self.left, 0))
        elif not torch.compiler.is_compiling() and min(x.shape[2:]) <= padding:
            reach = [min(self.padding, (n - 1) // dilation) for n in x.shape[2:]]
            for axis, n in enumerate(reach, 2):
                weight = weight.narrow(axis, self.padding - n, 2 * n + 1)
            padding = [n * dilation for n in reach]
        return self.convolve(x, weight, self.bias, padding=padding, dilation=dilation, groups=len(weight))

    def dilate(self, dilation: int) -> None:
        """Set the taps `dilation` positions apart."""
        if self.left:
            raise ValueError("a causal convolution is not dilated here")
        self.dilation = dilation

    def extra_repr(self) -> str:
        dim, _, *kernel = self.weight.shape
        return f"{dim}, kernel_size={tuple(kernel)}, causal={bool(self.left)}, bias={self.bias is not None}"
