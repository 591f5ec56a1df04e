"""Multi-head attention over a sequence of tokens: of all tokens, of a few leading ones, and of pooled keys."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.heads import check_heads, from_heads, to_heads

POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class SelfAttention(nn.Module):
    """W_o softmax(q k^T / sqrt(d) + bias) v per head, with [q k v] = W_qkv x and d = C / heads.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1, as vision transformers have it (one matrix for q, k
    and v, in this order). (B, N, C) to the same; `bias`, where given, is added to the logits and broadcasts over
    (B, heads, N, N). `causal` lets i see j <= i. Cost O(N^2 C), memory O(N C).

    Raises ValueError for heads that do not divide `dim`, and for a bias of a causal layer.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, qkv_bias: bool = False, causal: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, heads, N, d)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Float[Tensor, "b n c"], bias: Tensor | None = None) -> Float[Tensor, "b n c"]:
        if bias is not None and self.causal:
            raise ValueError("a causal layer takes no bias")
        q, k, v = self.heads(x)
        if bias is not None and torch.compiler.is_exporting():  # ONNX takes apart the fused form with other strides
            return self.proj(from_heads((q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v))
        return self.proj(from_heads(F.scaled_dot_product_attention(q, k, v, bias, is_causal=self.causal)))

    def attention_map(self, x: Float[Tensor, "b n c"], bias: Tensor | None = None) -> Float[Tensor, "b heads n n"]:
        """The weights, rows summing to one."""
        q, k, _ = self.heads(x)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if self.causal:
            logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        return (logits if bias is None else logits + bias).softmax(-1)


class ClassAttention(nn.Module):
    """What the leading tokens read from the whole sequence: W_o softmax(q k^T / sqrt(d)) v, q = W_q x_{0..Q-1}.

    Touvron et al., "Going deeper with Image Transformers" (2021), with keys and values from all tokens,
    [k v] = W_kv x. (B, N, C) to (B, Q, C); Q = `num_queries`, the class token alone by default. Cost O(N C^2).

    Raises ValueError for heads that do not divide `dim`, or no queries.
    """

    leading_queries = True
    """The map's rows are of the leading tokens, not of all."""

    def __init__(self, dim: int, num_heads: int = 8, *, qkv_bias: bool = False, num_queries: int = 1) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if num_queries < 1:
            raise ValueError(f"num_queries is {num_queries}; it must be at least 1")
        self.num_heads, self.num_queries = num_heads, num_queries
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, Q, d), keys and values (B, heads, N, d)."""
        k, v = self.kv(x).chunk(2, dim=-1)
        q = self.q(x[:, : self.num_queries])
        return to_heads(q, self.num_heads), to_heads(k, self.num_heads), to_heads(v, self.num_heads)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b q c"]:
        return self.proj(from_heads(F.scaled_dot_product_attention(*self.heads(x))))

    def attention_map(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads q n"]:
        """The weights of the leading tokens on all, rows summing to one."""
        q, k, _ = self.heads(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class PooledAttention(nn.Module):
    """Self-attention of a grid whose keys and values come from averages over r x r cells, with an additive table.

    W_o softmax(q k^T / sqrt(d) + B) v, q = W_q x, [k v] = W_kv LN(W pool_r(x)); with r = 1 keys and values come from x.
    Han et al., "PyramidTNT" (2022): linear spatial reduction attention; the cells are floored, so that rows and
    columns which fill no cell are left out of keys and values, and B, (heads, N, N / r^2), is the caller's. Tokens
    (B, N, C), row-major, of a grid of `size`, to the same; 1 to 3 axes. Cost O(N^2 C / r^dims), memory O(N C).

    Raises ValueError for heads that do not divide `dim`, a reduction below 1, or a grid without a full cell.
    """

    def __init__(self, dim: int, num_heads: int = 8, reduction: int = 1, *, qkv_bias: bool = False, dims: int = 2):
        super().__init__()
        check_dims(dims)
        check_heads(dim, num_heads)
        if reduction < 1:
            raise ValueError(f"reduction is {reduction}; it must be at least 1")
        self.num_heads, self.reduction, self.pool = num_heads, reduction, POOLS[dims]
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.linear = nn.Linear(dim, dim) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "b n c"], size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, N, d), keys and values (B, heads, M, d)."""
        reduced = x
        if self.reduction > 1:
            if min(size) < self.reduction:
                raise ValueError(f"the grid is {tuple(size)}; with reduction={self.reduction} no side may be less")
            cells = self.pool(x.mT.unflatten(2, size), self.reduction)
            reduced = self.norm(self.linear(cells.flatten(2).mT))
        k, v = self.kv(reduced).chunk(2, dim=-1)
        return to_heads(self.q(x), self.num_heads), to_heads(k, self.num_heads), to_heads(v, self.num_heads)

    def forward(
        self, x: Float[Tensor, "b n c"], size: tuple[int, ...], bias: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        q, k, v = self.heads(x, size)
        if bias is not None and torch.compiler.is_exporting():  # ONNX takes apart the fused form with other strides
            return self.proj(from_heads((q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v))
        return self.proj(from_heads(F.scaled_dot_product_attention(q, k, v, bias)))

    def attention_map(
        self, x: Float[Tensor, "b n c"], size: tuple[int, ...], bias: Tensor | None = None
    ) -> Float[Tensor, "b heads n m"]:
        """The weights, rows summing to one."""
        q, k, _ = self.heads(x, size)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        return (logits if bias is None else logits + bias).softmax(-1)
