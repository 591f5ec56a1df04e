"""Manhattan attention: logits that fall with the distance between positions, at a pace of each head's own."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfar.ops.attention.places import coordinates
from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.layers import DepthwiseConv
from nearfar.ops.common.tables import cached_table

BIAS = 2**21
"""Values of the bias that stand at once, queries by keys of all heads: so many queries attend at a time."""


class ManhattanAttention(nn.Module):
    """y = Wo(softmax(R(q) R(k)^T / sqrt(d) + g_h sum_a |i_a - j_a|) v + DW_k(v)), the bias a sum over the axes a.

    g_h = ln(1 - 2^(-initial - range h / heads)) < 0 for head h = 0 ... heads - 1. R turns the channel pairs
    (2c, 2c + 1) of a head by t 10000^(-c / (d / 2 - 1)), t the row-major index of the position in the whole grid (so
    the turn between vertical neighbours depends on the width). DW_k is a depthwise convolution of the values.
    Fan et al., RMT (2024, arXiv 2309.11523), section 3.2. The paper multiplies the softmax by exp(g_h |.|); its code,
    as this one, adds the logarithm before it. The paper does not count R in.

    `decomposed`: the axes one after another, the last first, each with all other coordinates held, the same q and k,
    and its own part of the bias: y = Wo(A_1 ... A_dims v + DW_k(v)). `causal` (dims=1) attends to the past alone.

    The full form makes the bias of queries by keys for as many queries at a time as keep it below `BIAS` values, and
    again for the backward pass (a compiled graph for all at once). `forward` maps (B, C, *S) to itself. Cost
    O(N^2 C), decomposed O(N sum(S) C); the tables are kept for each size, device and precision.

    Args:
        dim, num_heads: channels C and heads; d = C / heads must be even.
        decay_initial, decay_range: initial and range.
        decomposed: axis by axis.
        kernel_size: k of the local enhancement, odd.

    Raises:
        ValueError: heads that do not divide `dim` into even parts; a decay that is none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        decay_initial: float | int = 2.0,
        decay_range: float | int = 4.0,
        *,
        decomposed: bool = False,
        kernel_size: int = 5,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"num_heads={num_heads} must divide dim={dim} into even parts")
        if decay_initial <= 0 or decay_range < 0:
            raise ValueError(
                f"decay_initial is {decay_initial} and decay_range {decay_range}; they must be above 0 and at least 0"
            )
        self.num_heads, self.head_dim, self.dims, self.causal = num_heads, dim // num_heads, dims, causal
        self.decay_initial, self.decay_range, self.decomposed = decay_initial, decay_range, decomposed
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.lepe = DepthwiseConv(dim, kernel_size, dims=dims, causal=causal)

    def heads(self, x: Float[Tensor, "b *s c"]) -> tuple[Float[Tensor, "b *s h d"], Float[Tensor, "b *s h d"]]:
        """Queries and keys, turned by their positions."""
        cos, sin = _turns(tuple(x.shape[1:-1]), self.head_dim, x.device, x.dtype).unbind(-3)
        query, key = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k))
        return _turn(query, cos, sin), _turn(key, cos, sin)

    def decay(self, length: int, like: Tensor) -> Float[Tensor, "h n n"]:
        """g_h |i - j| along an axis."""
        key = (length, self.num_heads, self.decay_initial, self.decay_range, self.causal, like.device, like.dtype)
        return _decay(*key)

    def bias(self, size: tuple[int, ...], like: Tensor) -> Float[Tensor, "1 h n n"]:
        """g_h sum_a |i_a - j_a| of all positions of a grid."""
        return _table(size, self.num_heads, self.decay_initial, self.decay_range, like.device, like.dtype)

    def full(
        self, query: Float[Tensor, "b *s h d"], key: Float[Tensor, "b *s h d"], value: Float[Tensor, "b *s h e"]
    ) -> Float[Tensor, "b *s h e"]:
        """The full form's attention."""
        size = tuple(query.shape[1:-2])
        query, key, value = (part.flatten(1, -3).transpose(1, 2) for part in (query, key, value))
        count = math.prod(size)
        if torch.compiler.is_exporting():  # ONNX takes apart the fused form with other strides
            out = (query @ key.mT * self.head_dim**-0.5 + self.bias(size, query)).softmax(-1) @ value
        elif torch.compiler.is_compiling() or self.num_heads * count**2 <= BIAS:
            out = F.scaled_dot_product_attention(query, key, value, self.bias(size, query))
        else:
            form = (self.num_heads, self.decay_initial, self.decay_range, query.device, query.dtype)

            def some(q: Tensor, key: Tensor, value: Tensor, at: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, key, value, _rows(at, size, *form))

            step = max(BIAS // (self.num_heads * count), 1)
            pairs = zip(query.split(step, dim=2), coordinates(size, query.device).split(step), strict=True)
            if torch.is_grad_enabled():  # the bias is made again for the backward pass, not kept
                parts = [checkpoint(some, q, key, value, at, use_reentrant=False) for q, at in pairs]
            else:
                parts = [some(q, key, value, at) for q, at in pairs]
            out = torch.cat(parts, dim=2)
        return out.transpose(1, 2).unflatten(1, size)

    def along(self, query: Tensor, key: Tensor, axis: int) -> Float[Tensor, "*b h n n"]:
        """Weights along one axis, the other axes before the heads in their order."""
        query, key = (part.movedim(axis + 1, -2) for part in (query, key))
        scale = self.head_dim**-0.5
        if torch.compiler.is_compiling():  # inductor 2.14 takes scaled queries for those of an attention of four axes
            products = query @ key.mT * scale
        else:
            products = query * scale @ key.mT
        return (products + self.decay(query.shape[-2], query)).softmax(-1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        x = x.movedim(1, -1)
        query, key = self.heads(x)
        value = self.v(x)
        local = self.lepe(value.movedim(-1, 1)).movedim(1, -1)
        value = value.unflatten(-1, (self.num_heads, -1))
        if self.decomposed or self.dims == 1:  # along one axis the bias is no smaller than queries by keys
            for axis in reversed(range(self.dims)):
                value = (self.along(query, key, axis) @ value.movedim(axis + 1, -2)).movedim(-2, axis + 1)
        else:
            value = self.full(query, key, value)
        return self.proj(value.flatten(-2) + local).movedim(-1, 1)

    def attention_map(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b heads n n"]:
        """The weights of every position on every other, rows summing to one; of a decomposed layer their product."""
        query, key = self.heads(x.movedim(1, -1))
        if not self.decomposed and self.dims > 1:
            size = tuple(query.shape[1:-2])
            query, key = (part.flatten(1, -3).transpose(1, 2) for part in (query, key))
            return (query @ key.mT * self.head_dim**-0.5 + self.bias(size, query)).softmax(-1)
        letters = "uvw"[: self.dims]  # of a query; capitals of a key
        shapes = [  # a pass along one axis holds the places of later axes, and those that earlier axes will look at
            f"b{letters[:a].upper()}{letters[a + 1 :]}h{letters[a]}{letters[a].upper()}" for a in range(self.dims)
        ]
        weights = [self.along(query, key, axis) for axis in range(self.dims)]
        product = torch.einsum(f"{','.join(shapes)}->bh{letters}{letters.upper()}", *weights)
        return product.flatten(2, 1 + self.dims).flatten(3)

    def decay_ranges(self, weight: float = 0.5) -> Float[Tensor, " h"]:
        """The Manhattan distance in positions at which the decay alone lowers a weight to `weight`, for every head."""
        if not 0 < weight < 1:
            raise ValueError(f"weight is {weight}; it must lie between 0 and 1")
        return math.log(weight) / decay_rates(self.num_heads, self.decay_initial, self.decay_range).float()


def decay_rates(heads: int, initial: float | int = 2.0, span: float | int = 4.0) -> Float[Tensor, " h"]:
    """g_h of every head, in float64."""
    return torch.log1p(-(2.0 ** (-initial - span * torch.arange(heads, dtype=torch.float64) / heads)))


@cached_table
def _decay(
    length: int,
    heads: int,
    initial: float | int,
    span: float | int,
    causal: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "h n n"]:
    index = torch.arange(length, dtype=torch.float64)
    table = decay_rates(heads, initial, span)[:, None, None] * (index[:, None] - index).abs()
    if causal:
        table = table.masked_fill(index > index[:, None], -math.inf)
    return table.to(device, dtype)


def _rows(
    at: Int[Tensor, "m a"],
    size: tuple[int, ...],
    heads: int,
    initial: float | int,
    span: float | int,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "1 h m n"]:
    """The bias of queries at the coordinates `at`, for all keys of a grid."""
    bias = torch.zeros((), device=device)
    for axis, n in enumerate(size):
        exact = torch.promote_types(dtype, torch.float32)
        along = _decay(n, heads, initial, span, False, device, exact)[:, at[:, axis]]
        bias = bias + along.reshape(heads, -1, *(n if a == axis else 1 for a in range(len(size))))
    return bias.flatten(2).to(dtype)[None]


@cached_table
def _table(size: tuple[int, ...], *form: Any) -> Float[Tensor, "1 h n n"]:
    return _rows(coordinates(size, form[-2]), size, *form)


@cached_table
def _turns(size: tuple[int, ...], dim: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "*s 2 1 d"]:
    """cos and sin of every position's turns, each for both channels of a pair."""
    rates = 10000.0 ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64)
    angles = (torch.arange(math.prod(size), dtype=torch.float64)[:, None] * rates).repeat_interleave(2, -1)
    return torch.stack([angles.cos(), angles.sin()], 1)[:, :, None].unflatten(0, size).to(device, dtype)


def _turn(x: Float[Tensor, "b *s h d"], cos: Float[Tensor, "*s 1 d"], sin: Float[Tensor, "*s 1 d"]) -> Tensor:
    """Channel pairs (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.addcmul(x * cos, torch.stack([-b, a], -1).flatten(-2), sin)
