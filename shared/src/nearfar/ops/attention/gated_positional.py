"""Self-attention that each head blends, by a learned gate, with a look at fixed distances."""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.heads import check_heads, to_heads
from nearfar.ops.common.layers import linear_map
from nearfar.ops.common.precision import full_precision
from nearfar.ops.common.tables import Derived


class GatedPositionalAttention(nn.Module):
    """W_o ((1 - g) softmax(q k^T / sqrt(d)) + g P) v per head, g = sigmoid(gate), P_ij = softmax_j(w . (r, |r|^2)).

    d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases" (2021). r is key j
    minus query i, in cells, last axis first. An exponential of a sum over the axes is a product, and so is its
    normalizer: P is the Kronecker product of one row-stochastic n x n matrix an axis, applied one after the other.
    The published code makes the N x N table, for square grids, in every layer and call, and divides by the row sums,
    which are 1. (B, C, *S) to the same; 1 to 3 axes, any grid; `causal` (one axis) masks both softmaxes. Matrices are
    computed in float32 at least. Cost O(N^2 C) for the content, O(N n C) for P, with n the longest side; memory O(N C).

    Weights of the positions start so that head p of m^dims, m = floor(heads^(1/dims)), looks at the p-th of the m^dims
    offsets around the query (last axis slowest): w = strength (2 offset, -1), a Gaussian of variance 1 / (2 strength).
    W_v starts as the identity. Other heads start at random, gates at 1.

    Args:
        dim: channels C. num_heads: heads.
        locality_strength: strength, positive; None for a random start of all.

    Raises ValueError for heads that do not divide `dim` or a strength that is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 9,
        *,
        qkv_bias: bool = False,
        locality_strength: float | None = 1.0,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_heads(dim, num_heads)
        if locality_strength is not None and locality_strength <= 0:
            raise ValueError(f"locality_strength is {locality_strength}; it must be positive, or None")
        self.num_heads, self.dims, self.causal = num_heads, dims, causal
        self.locality_strength = locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.pos_proj = nn.Linear(dims + 1, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.proj = nn.Linear(dim, dim)
        self.kept = Derived()
        self.reset_locality()

    @torch.no_grad()
    def reset_locality(self) -> None:
        """The start described above, for W_v and the weights of the positions; the other weights stay."""
        if self.locality_strength is None:
            return
        nn.init.eye_(self.v.weight)
        side = 1
        while (side + 1) ** self.dims <= self.num_heads:
            side += 1
        offsets = itertools.product([i - (side - 1) / 2 for i in range(side)], repeat=self.dims)
        for head, offset in enumerate(offsets):
            weights = torch.tensor([*(2 * n for n in offset), -1.0])
            self.pos_proj.weight[head] = self.locality_strength * weights

    def gates(self) -> Float[Tensor, "heads"]:
        """g of every head: 1 looks at positions alone, 0 at content alone."""
        return self.gating_param.sigmoid()

    def positional(self, size: tuple[int, ...]) -> list[Float[Tensor, "heads n n"]]:
        """P of a grid of `size` as the row-stochastic matrix of each axis, whose Kronecker product it is."""
        with full_precision(self.pos_proj.weight):
            flat = self.kept.get(self.pos_proj.parameters(), (size,), lambda: self.build(size))
        return [m.unflatten(1, (n, n)) for m, n in zip(flat.split([n * n for n in size], dim=1), size, strict=True)]

    def build(self, size: tuple[int, ...]) -> Float[Tensor, "heads m"]:
        """The matrices of all axes, flat, one after the other."""
        (weight, bias), matrices = linear_map(self.pos_proj), []
        for axis, n in enumerate(size):
            at = torch.arange(n, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
            r = at - at[:, None]
            slope, curve = weight[:, self.dims - 1 - axis, None, None], weight[:, -1, None, None]
            # the bias has no effect; with it in, its gradient is zero instead of missing
            logits = slope * r + curve * r.square() + bias[:, None, None]
            if self.causal:
                logits = logits.masked_fill(r > 0, -torch.inf)
            matrices.append(logits.softmax(-1).flatten(1))
        return torch.cat(matrices, dim=1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        size = x.shape[2:]
        tokens = x.flatten(2).mT
        q, k = (to_heads(part, self.num_heads) for part in self.qk(tokens).chunk(2, dim=-1))
        v = to_heads(self.v(tokens), self.num_heads)
        near = v
        for axis, matrix in enumerate(self.positional(tuple(size))):
            before, n = math.prod(size[:axis]), size[axis]
            rows = near.reshape(*v.shape[:2], before, n, -1)
            near = matrix.to(v.dtype)[:, None] @ rows
        far = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y = torch.lerp(far, near.reshape(v.shape), self.gates().to(v.dtype)[:, None, None])
        return self.proj(y.transpose(1, 2).flatten(2)).mT.unflatten(2, size)

    def attention_map(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b heads n n"]:
        """The blended weights, rows summing to one."""
        size = tuple(x.shape[2:])
        q, k = (to_heads(part, self.num_heads) for part in self.qk(x.flatten(2).mT).chunk(2, dim=-1))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if self.causal:
            logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        table, *others = self.positional(size)
        for matrix in others:
            table = torch.einsum("hij,hkl->hikjl", table, matrix).flatten(3).flatten(1, 2)
        gate = self.gates()[:, None, None]
        return (1 - gate) * logits.softmax(-1) + gate * table
