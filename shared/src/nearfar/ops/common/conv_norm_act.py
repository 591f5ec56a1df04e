"""Convolution, batch norm, activation: the unit that segmentation networks are made of."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""Name of the linear interpolation by the number of grid axes."""


class ConvNormAct(nn.Module):
    """act(BN(conv(x))) on (B, C, *S); size-keeping padding dilation (kernel_size - 1) / 2 before the stride.

    Args:
        in_channels, out_channels: widths.
        kernel_size, stride, dilation, groups, bias: of the convolution, equal on all axes.
        activation: makes the activation; None for none.
        eps, momentum: of the batch norm; momentum is the share of the new batch's statistics.
        dims: grid axes.

    Raises:
        ValueError: for an even kernel with stride 1, or dims other than 1, 2, 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        activation: Callable[[], nn.Module] | None = nn.ReLU,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if kernel_size % 2 == 0 and stride == 1:
            raise ValueError(f"kernel_size is {kernel_size}; with stride 1 it must be odd")
        self.conv = CONVOLUTIONS[dims](
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation * (kernel_size - 1) // 2,
            dilation,
            groups,
            bias,
        )
        self.norm: nn.Module = BATCH_NORMS[dims](out_channels, eps=eps, momentum=momentum)
        self.act = activation() if activation else nn.Identity()

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *t"]:
        return self.act(self.norm(self.conv(x)))

    @torch.no_grad()
    def fuse(self) -> "ConvNormAct":
        """Fold the batch norm's running statistics into the convolution, for inference. Same output to rounding."""
        if not isinstance(self.norm, nn.Identity):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()
        return self


def fuse(model: nn.Module) -> nn.Module:
    """Fold every `ConvNormAct` of `model` in place, put it in eval mode and return it."""
    for module in model.eval().modules():
        if isinstance(module, ConvNormAct):
            module.fuse()
    return model
