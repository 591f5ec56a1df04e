"""Feed-forward layer with a depthwise convolution between its two linear maps."""

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.layers import GELU, DepthwiseConv


class ConvFFN(nn.Module):
    """y = W2(u + DW_k(u)), u = GELU(W1 x): the feed-forward layer of RMT (Fan et al. 2024).

    `forward` maps (B, C, *S) to itself; cost O(N hidden (2 C + k^dims)). `causal` (dims=1): the convolution looks back.
    """

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int = 3, *, dims: int = 2, causal: bool = False) -> None:
        super().__init__()
        check_dims(dims, causal)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = GELU()
        self.dwconv = DepthwiseConv(hidden_dim, kernel_size, dims=dims, causal=causal)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        u = self.act(self.fc1(x.movedim(1, -1)))
        return self.fc2(u + self.dwconv(u.movedim(-1, 1)).movedim(1, -1)).movedim(-1, 1)
