"""Gated spatial convolution: SegMamba's block before its scans."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import CONVOLUTIONS, check_dims


class GatedSpatialConv(nn.Module):
    """GSC (Xing et al. 2024, arXiv 2401.13560, section 2.2): two 3-wide convolutions beside a pointwise one, then a
    pointwise one over their sum, round the identity.

    f(x, W) = relu(norm(W * x)), norm the instance norm without parameters, eps 1e-5;
    `out = x + f(f(f(x, W1), W2) + f(x, W3), W4)`.

    The released code adds the two branches, and so does this. Cost O(N d^2 (2 3^dims + 2)).

    Args:
        dim: channels d.
        dims: axes of the grid.
    """

    def __init__(self, dim: int, *, dims: int = 3):
        super().__init__()
        check_dims(dims)
        conv = CONVOLUTIONS[dims]
        self.conv1, self.conv2 = conv(dim, dim, 3, padding=1), conv(dim, dim, 3, padding=1)
        self.side, self.join = conv(dim, dim, 1), conv(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        step = lambda conv, t: F.relu(F.instance_norm(conv(t), eps=1e-5))  # noqa: E731
        return x + step(self.join, step(self.conv2, step(self.conv1, x)) + step(self.side, x))
