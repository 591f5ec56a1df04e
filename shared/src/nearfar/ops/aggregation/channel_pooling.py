"""Learned pooling of a graph's nodes, or a recording's electrodes, into one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.folding import batch_norm_affine
from nearfar.ops.common.keras import glorot_uniform_, selu_


class ChannelPooling(nn.Module):
    """Weighted sums over the nodes, separately per feature, then batch norm and SELU.

        y[c m + j, t] = SELU(BN(sum_n weight[c, j, n] x[c, n, t]))      j < m

    x: (B, C, N, T) -> (B, m C, T); no bias. `constrain()` scales every filter weight[c, j] down to an L2 norm over the
    nodes of `max_norm` at most; call it after each optimizer step, as Keras' max-norm constraint does. Source: the
    depthwise spatial filter of EEGNet (Lawhern et al. 2018), as AGTCNet uses it. Cost O(B m C N T).

    Args:
        num_nodes: N. channels: C. depth_multiplier: m. max_norm: see above.

    Raises ValueError for a size below 1 or a max_norm that is not positive.
    """

    def __init__(self, num_nodes: int, channels: int, depth_multiplier: int = 2, max_norm: float = 1.0) -> None:
        super().__init__()
        if min(num_nodes, channels, depth_multiplier) < 1:
            raise ValueError("num_nodes, channels and depth_multiplier must be at least 1")
        if not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; it must be positive")
        self.weight = nn.Parameter(torch.empty(channels, depth_multiplier, num_nodes))
        self.norm = nn.BatchNorm2d(channels * depth_multiplier, eps=1e-3, momentum=0.01)
        self.max_norm = max_norm
        glorot_uniform_(self.weight, num_nodes * channels, num_nodes * depth_multiplier)

    def forward(self, x: Float[Tensor, "b c n t"]) -> Float[Tensor, "b d t"]:
        weight, shift = self.weight.flatten(0, 1), None
        if not self.training:
            scale, shift = batch_norm_affine(self.norm)
            weight = weight * scale[:, None]
        x = F.conv2d(x, weight[:, None, :, None], shift, groups=len(self.weight))
        return selu_(self.norm(x) if self.training else x).squeeze(2)

    @torch.no_grad()
    def constrain(self) -> None:
        """Scale filters down to `max_norm`, in place."""
        self.weight.flatten(0, 1).renorm_(2, 0, self.max_norm)
