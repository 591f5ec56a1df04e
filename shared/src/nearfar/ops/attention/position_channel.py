"""Self-attention between all positions of a map and between all its channels, added to the map with learned weight."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import CONVOLUTIONS, check_dims

PRODUCTS = 2**19
"""Products of queries and keys in float64 that stand at once: what a CPU's caches hold."""


class PositionAttention(nn.Module):
    """y_i = x_i + gamma sum_j softmax_j(q_i . k_j) v_j over all positions i, j; gamma starts at 0.

    Fu et al., "Dual Attention Network for Scene Segmentation" (2019), section 3.2: q and k are 1x1 convolutions to
    `qk_dim` channels (C / 8 by default), v one to C, all with bias, and the products are not scaled. (B, C, *S) to
    the same, 1 to 3 axes; `causal` (1 axis) lets i see j <= i. Cost O(N^2 C) time; memory O(N C), since q and k are
    padded with zeros to the width of v, which leaves the products as they are and lets the fused kernels run
    (published code makes the N x N matrix).

    Unscaled products grow to 1e7 in trained networks, where float32 rounds them by whole units and the softmax turns
    that into other positions, by processor and number of threads. So in eval mode the products of float32 maps are made
    in float64, for as many queries at a time as keep them below `PRODUCTS` numbers, and weighed in float32 once the
    largest is subtracted (causal, and in graphs, all is in float64).

    Raises:
        ValueError: for a qk_dim outside 1..dim, or dims and causal that do not go together.
    """

    def __init__(self, dim: int, qk_dim: int | None = None, *, dims: int = 2, causal: bool = False) -> None:
        super().__init__()
        check_dims(dims, causal)
        qk_dim = dim // 8 if qk_dim is None else qk_dim
        if not 1 <= qk_dim <= dim:
            raise ValueError(f"qk_dim is {qk_dim}; it must lie in 1..{dim} (by default dim / 8, so dim >= 8)")
        self.query = CONVOLUTIONS[dims](dim, qk_dim, 1)
        self.key = CONVOLUTIONS[dims](dim, qk_dim, 1)
        self.value = CONVOLUTIONS[dims](dim, dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.causal = causal

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        given = x
        if x.dtype == torch.float32 and not self.training and x.device.type != "mps":
            if not self.causal and not torch.compiler.is_compiling():
                return self.gamma * self.precise(x) + x
            x = x.double()
        q, k, v = (self.project(layer, x).flatten(2).mT[:, None] for layer in (self.query, self.key, self.value))
        missing = v.shape[-1] - q.shape[-1]
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
        y = F.scaled_dot_product_attention(q, k, v.contiguous(), is_causal=self.causal, scale=1.0)
        return self.gamma * y[:, 0].mT.reshape(x.shape).to(given.dtype) + given

    def precise(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """The attended values, the products in float64 and their differences in float32."""
        q, k = (self.project(layer, x.double()) for layer in (self.query, self.key))
        v = self.value(x).flatten(2).mT
        parts = []
        for query in q.mT.split(max(1, PRODUCTS // (len(x) * k.shape[-1])), dim=1):
            products = query @ k
            weights = products.sub_(products.detach().amax(-1, keepdim=True)).to(x.dtype).softmax(-1)
            parts.append(weights.to(v.dtype) @ v)
        return torch.cat(parts, 1).mT.reshape(x.shape).to(x.dtype)

    @staticmethod
    def project(layer: nn.Module, x: Tensor) -> Tensor:
        """The 1x1 convolution `layer` in the precision of `x`, under autocast too where `x` is float64."""
        if x.dtype != torch.float64:
            return layer(x)
        with torch.autocast(x.device.type, enabled=False):
            mixed = torch.einsum("oc,bcn->bon", layer.weight.flatten(1).double(), x.flatten(2))
            return mixed + layer.bias.double()[:, None]


class ChannelAttention(nn.Module):
    """y = x + gamma softmax(-X X^T) X, with X the map as (C, N): each channel looks at those least like itself.

    Fu et al. (2019), section 3.3, with the code's energy max_j E_ij - E_ij, whose softmax is that of -E. There is
    no scale, so with many positions the softmax picks a single channel. Energies are computed in float32 whatever the
    input: they pass what half precision holds. (B, C, *S) to the same, any number of axes. Cost O(N C^2).
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
            y = torch.softmax(-(flat @ flat.mT), -1) @ flat
        return self.gamma * y.view(x.shape).to(x.dtype) + x
