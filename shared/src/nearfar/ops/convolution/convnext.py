"""The ConvNeXt block: a large depthwise convolution and an inverted bottleneck."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.fused import FusedLinear
from nearfar.ops.common.layers import GELU, DepthwiseConv, DropPath


class ConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * W2 GELU(W1 LN(DW(x)))), with DW a depthwise k x k convolution.

    Liu et al., "A ConvNet for the 2020s" (2022), section 2.6. DW is biased and keeps the size; LN normalizes over
    channels (eps 1e-6); W1: C -> r C and W2: r C -> C are pointwise and biased; GELU is exact; gamma is a vector.
    `forward` maps (B, C, *S) to (B, C, *S). Cost per position: C k^dims + 2 r C^2 multiply-adds, linear in N.

    Published code starts gamma at 1e-6, which makes a fresh deep network almost the identity: for short runs on
    small data take `layer_scale=1.0` or None.

    Args:
        dim: channels C.
        kernel_size: k, odd.
        mlp_ratio: r, the expansion of the pointwise part.
        layer_scale: initial value of gamma; None or 0 for no gamma.
        drop_path: probability to drop the branch of a sample in training.
        dims: number of grid axes, 1, 2 or 3.
        causal: pad DW on the left only (dims=1); everything else is pointwise.

    Raises:
        ValueError: an even kernel, dims outside 1..3, causal with dims > 1, drop_path outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float | int = 4.0,
        layer_scale: float | int | None = 1e-6,
        drop_path: float | int = 0.0,
        *,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.dwconv = DepthwiseConv(dim, kernel_size, dims=dims, causal=causal)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.act = GELU()
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        y = self.norm(self.dwconv(x).movedim(1, -1))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        y = self.drop_path(y.movedim(-1, 1))
        if self.gamma is None:
            return x + y
        return torch.addcmul(x, y, self.gamma.reshape(-1, *(1,) * (x.ndim - 2)))

    @torch.no_grad()
    def fuse(self) -> "ConvNeXtBlock":
        """Fold the norm's affine part and the GELU into W1, gamma into W2, for inference; the outputs stay the same."""
        if self.norm.elementwise_affine:
            fold_norm(self.norm, self.pwconv1)
            self.norm = nn.LayerNorm(self.norm.normalized_shape, self.norm.eps, elementwise_affine=False)
        if self.gamma is not None:
            scale_output(self.pwconv2, self.gamma)
            self.gamma = None
        if isinstance(self.pwconv1, nn.Linear):
            self.pwconv1, self.act = FusedLinear(self.pwconv1, "gelu"), nn.Identity()
        return self


def fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """Move the affine part of `norm` into the linear map that follows it."""
    linear.bias += linear.weight @ norm.bias
    linear.weight *= norm.weight


def scale_output(layer: nn.Module, factor: Tensor | float) -> None:
    """Multiply the output channels of a linear map, convolution or norm by `factor`, in its weights."""
    per_channel = torch.as_tensor(factor, dtype=layer.weight.dtype, device=layer.weight.device)
    layer.weight *= per_channel.reshape(-1, *(1,) * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias *= per_channel
