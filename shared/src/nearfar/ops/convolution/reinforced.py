"""SpaRTAN's spatial mixer: a near and a dilated branch of convolutions on a map whose deviations are reinforced."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims


class ChannelExcitation(nn.Module):
    """x * sigmoid(E relu(S mean(x))), the mean over all positions; S to `hidden` channels and E back, with biases."""

    def __init__(self, dim: int, hidden: int, dims: int = 2) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least 1")
        self.squeeze, self.expand = CONVOLUTIONS[dims](dim, hidden, 1), CONVOLUTIONS[dims](hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        pooled = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return x * torch.sigmoid(self.expand(torch.relu(self.squeeze(pooled))))


class ReinforcedMixer(nn.Module):
    """Wo [SE(h(z)); SE(l(z))] + bias, z = y + gamma (y - mean y), y = Wi x of C / 2 channels.

    The spatial mixer of SpaRTAN (arXiv 2507.10999). h is a 3x3 convolution with batch norm and GELU; l a bare 3x3
    convolution of dilation 2, then one with batch norm and GELU, which together reach 9 positions. `dense`
    convolutions, or depthwise ones. gamma starts at 1e-5. `forward` maps (B, C, *S) to the same; cost per position
    C^2 + 27 C^2 / 4 (dense) or C^2 + 14 C (depthwise) in two dimensions. The means run over the map, so not causal.

    Args:
        dim: channels C, a multiple of 8.
        dense: convolutions over all channels instead of each on its own.
        eps: of the batch norms.
        dims: grid axes.

    Raises:
        ValueError: a `dim` that 8 does not divide, dims other than 1, 2, 3.
    """

    def __init__(self, dim: int, *, dense: bool = False, eps: float = 1e-6, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        if dim % 8:
            raise ValueError(f"dim is {dim}; it must be a multiple of 8, as half of it is squeezed to an eighth")
        half = dim // 2
        groups = 1 if dense else half
        conv = CONVOLUTIONS[dims]

        def unit(dilation: int) -> ConvNormAct:
            return ConvNormAct(half, half, 3, dilation=dilation, groups=groups, activation=nn.GELU, eps=eps, dims=dims)

        self.proj_in = conv(dim, half, 1)
        self.gamma = nn.Parameter(torch.full((1, half, *(1,) * dims), 1e-5))
        self.h_conv = unit(1)
        self.l_conv = nn.Sequential(conv(half, half, 3, padding=2, dilation=2, groups=groups, bias=False), unit(2))
        self.h_attn, self.l_attn = (ChannelExcitation(half, half // 4, dims) for _ in range(2))
        self.proj_out = conv(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        x = self.proj_in(x)
        x = torch.addcmul(x, self.gamma, x - x.mean(tuple(range(2, x.ndim)), keepdim=True))
        near, far = self.h_attn(self.h_conv(x)), self.l_attn(self.l_conv(x))
        return self.proj_out(torch.cat((near, far), dim=1))
