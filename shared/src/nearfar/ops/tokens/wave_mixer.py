"""SpaRTAN's channel mixer: an expansion whose channel pairs are turned and stretched like complex numbers."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.conv_norm_act import ConvNormAct
from nearfar.ops.common.dims import CONVOLUTIONS, check_dims
from nearfar.ops.common.precision import full_precision
from nearfar.ops.convolution.reinforced import ChannelExcitation


class WaveMixer(nn.Module):
    """Wo SE(GELU(BN(conv3(z . f)))), f = p t + p_j t_j, t = GELU(Wt x), p = Wp x, j the largest channel of x.

    The wave channel mixer of SpaRTAN (arXiv 2507.10999). t and p have n = r C channels, and t_j, p_j are channel j of
    them at each position, j in 0..C-1 as the published code reads it. z . f takes the channels (2i, 2i + 1) of f as
    real and imaginary part and multiplies them by the complex number z_i, in float32 at least; here in real arithmetic.
    conv3 is depthwise, or has C `grouped` groups of r channels. No gradient goes through j, and where two channels are
    equal the lowest counts. `forward` maps (B, C, *S) to the same; cost 3 r C^2 + 9 n (or 9 n r) a position.

    Args:
        dim: channels C.
        expand_ratio: r, at least 2.
        grouped: groups of r channels in the convolution instead of single channels.
        eps: of the batch norm.
        dims: grid axes.

    Raises:
        ValueError: a ratio below 2, fewer than 4 channels, an odd number of hidden channels.
    """

    def __init__(
        self, dim: int, expand_ratio: int = 4, *, grouped: bool = False, eps: float = 1e-6, dims: int = 2
    ) -> None:
        super().__init__()
        check_dims(dims)
        if expand_ratio < 2:
            raise ValueError(f"expand_ratio is {expand_ratio}; it must be at least 2")
        if dim < 4 or dim * expand_ratio % 2:
            raise ValueError(f"dim is {dim}; it must be at least 4, and dim * expand_ratio even: pairs are turned")
        hidden, conv = dim * expand_ratio, CONVOLUTIONS[dims]
        self.theta, self.proj = conv(dim, hidden, 1), conv(dim, hidden, 1)
        self.complex = nn.Parameter(torch.randn(hidden // 2, 2))
        self.conv = ConvNormAct(
            hidden, hidden, 3, groups=dim if grouped else hidden, activation=nn.GELU, eps=eps, dims=dims
        )
        self.attn = ChannelExcitation(hidden, dim // 4, dims)
        self.proj_out = conv(hidden, dim, 1)

    def turn(self, x: Float[Tensor, "b n *s"]) -> Float[Tensor, "b n *s"]:
        """z . x on channel pairs."""
        with full_precision(x):
            x32 = x if x.dtype == torch.float64 else x.float()
            re, im = self.complex.to(x32.dtype).reshape(-1, 2, *(1,) * (x.ndim - 2)).unbind(1)
            a, b = x32.unflatten(1, (-1, 2)).unbind(2)
            turned = torch.stack((torch.addcmul(a * re, b, im, value=-1), torch.addcmul(b * re, a, im)), 2)
        return turned.flatten(1, 2).to(x.dtype)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        channel = x.detach().argmax(1, keepdim=True)  # the first of equal ones, in torch and in ONNX
        t, p = F.gelu(self.theta(x)), self.proj(x)
        mixed = torch.addcmul(p.gather(1, channel) * t.gather(1, channel), p, t)
        return self.proj_out(self.attn(self.conv(self.turn(mixed))))
