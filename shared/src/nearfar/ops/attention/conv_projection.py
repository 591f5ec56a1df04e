"""Attention whose queries, keys and values come from depthwise convolutions of the token map."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims, check_odd
from nearfar.ops.common.heads import check_heads, from_heads, to_heads
from nearfar.ops.common.tables import cached_table


class ConvProjectionAttention(nn.Module):
    """W_o softmax(q k^T / sqrt(C)) v with p = W_p BN_p(DW_p(map)), p in {q, k, v}.

    Wu et al., "CvT: Introducing Convolutions to Vision Transformers" (2021), section 3.2. DW are depthwise convolutions
    without bias, of stride `stride_q` for q and `stride_kv` for k and v; strided maps have ceil(n / stride) cells an
    axis. The scale is the published code's, by the full width C instead of a head's. Tokens (B, P + N, C): P prefix
    tokens (a class token), which pass by convolution and norm, then N of a grid of `size`, row-major; to the same
    (with stride_q > 1 to that many fewer). 1 to 3 axes. With `causal` (one axis) convolutions see the past only and
    query i the keys at stride_kv j <= stride_q i; prefix tokens then see each other alone.
    Cost O(N^2 C / stride^dims), memory O(N C).

    Raises ValueError for heads that do not divide `dim`, an even kernel, a stride below 1, fewer tokens than cells.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int = 3,
        stride_q: int = 1,
        stride_kv: int = 2,
        *,
        qkv_bias: bool = True,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_odd(kernel_size=kernel_size)
        check_heads(dim, num_heads)
        if min(stride_q, stride_kv) < 1:
            raise ValueError(f"stride_q is {stride_q} and stride_kv {stride_kv}; both must be at least 1")
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.causal, self.left, self.strides = causal, (kernel_size - 1) * causal, (stride_q, stride_kv)

        def projection(stride: int) -> nn.Sequential:
            padding = 0 if causal else kernel_size // 2
            conv = CONVOLUTIONS[dims](dim, dim, kernel_size, stride, padding, groups=dim, bias=False)
            return nn.Sequential(conv, BATCH_NORMS[dims](dim))

        self.conv_q, self.conv_k, self.conv_v = (projection(stride) for stride in (stride_q, stride_kv, stride_kv))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "b n c"], size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Queries, keys, values, each (B, heads, tokens, d), and the number of prefix tokens."""
        prefix = x.shape[1] - math.prod(size)
        if prefix < 0:
            raise ValueError(f"{x.shape[1]} tokens are fewer than the {tuple(size)} cells of the grid")
        grid = x[:, prefix:].mT.unflatten(2, size)
        if self.left:
            grid = F.pad(grid, (self.left, 0))

        parts = ((self.conv_q, self.q), (self.conv_k, self.k), (self.conv_v, self.v))
        q, k, v = (self.project(x[:, :prefix], grid, *part) for part in parts)
        return q, k, v, prefix

    def project(self, prefix: Tensor, grid: Tensor, conv: nn.Module, linear: nn.Module) -> Tensor:
        """One of queries, keys and values, (B, heads, tokens, d)."""
        tokens = conv(grid).flatten(2).mT
        if prefix.shape[1]:
            tokens = torch.cat((prefix, tokens), dim=1)
        return to_heads(linear(tokens), self.num_heads)

    def mask(self, q: Tensor, k: Tensor, prefix: int) -> Tensor | None:
        return causal_mask(q.shape[2], k.shape[2], prefix, *self.strides, q.device) if self.causal else None

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, ...]) -> Float[Tensor, "b m c"]:
        q, k, v, prefix = self.heads(x, size)
        y = F.scaled_dot_product_attention(q, k, v, self.mask(q, k, prefix), scale=self.scale)
        return self.proj(from_heads(y))

    def attention_map(self, x: Float[Tensor, "b n c"], size: tuple[int, ...]) -> Float[Tensor, "b heads q k"]:
        """The weights, rows summing to one; the keys are the prefix tokens and the cells of the strided grid."""
        q, k, _, prefix = self.heads(x, size)
        logits = q @ k.mT * self.scale
        mask = self.mask(q, k, prefix)
        return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)


@cached_table
def causal_mask(queries: int, keys: int, prefix: int, stride_q: int, stride_kv: int, device: torch.device) -> Tensor:
    """(queries, keys), true where the query may look."""
    at = lambda n, stride: stride * (torch.arange(n, device=device) - prefix).clamp(min=-1)  # noqa: E731
    return at(keys, stride_kv) <= at(queries, stride_q)[:, None]
