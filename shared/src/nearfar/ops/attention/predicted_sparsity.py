"""Attention over the pairs of tokens that a cheap low-rank predictor picks for each input."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.common.heads import check_heads, from_heads
from nearfar.ops.common.ranking import ranked
from nearfar.ops.tokens.mixer_gate import resize_tokens


class Connectivity(NamedTuple):
    """What a predictor says of H heads and N tokens, the first of which is the summary token and takes no part."""

    coefficients: Float[Tensor, "b h m r"]
    """Of each query (M = N - 1) on the basis; sparse but in the reconstruction phase."""
    approximate: Float[Tensor, "b h m n"]
    """The approximate attention, coefficients times basis."""
    mask: Bool[Tensor, "b h n n"]
    """The pairs that are kept; the summary token's row is full."""


class ConnectivityPredictor(nn.Module):
    """Which pairs of N tokens are worth their attention, from a rank-R factorization that depends on the input.

    With q, k (B, H, N, d), learned P, Q (N, R) and linear maps W_q, W_k from d to `reduced_channels`,

        G = softmax((W_q q) ((W_k k)^T P) H^{-1/2}),  of which each row keeps its `coefficients` largest entries
        W = |Q^T|, entries up to `threshold` set to 0
        A = G W,  and the mask keeps the ceil(keep_rate N) largest entries of each row, the lowest index first on a tie

    for every query but the summary token. The scale is the number of heads, not their width: so the released code has
    it, and weights depend on it. The mask passes no gradient. With `reconstruct`, the phase that trains the predictor,
    G is dense and W = Q^T as it is.

    Wei et al., Sparsifiner (CVPR 2023), section 3. The released code leaves ties to torch.topk, as `stable=False` does;
    rows of tokens that pruning has removed are ties throughout. N is fixed (see `resize`). Not causal.
    Cost O(H N R (d + N)).

    Raises ValueError for sizes below 1 or rates outside (0, 1].
    """

    def __init__(
        self,
        head_dim: int,
        num_tokens: int,
        reduced_tokens: int,
        reduced_channels: int,
        *,
        keep_rate: float = 0.25,
        coefficients: int = 8,
        threshold: float = 0.02,
        share: bool = False,
        stable: bool = True,
    ) -> None:
        super().__init__()
        if min(num_tokens, reduced_tokens, reduced_channels, coefficients) < 1:
            raise ValueError("num_tokens, reduced_tokens, reduced_channels and coefficients must be at least 1")
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate is {keep_rate}; it must be in (0, 1]")
        self.keep_rate, self.coefficients, self.threshold, self.stable = keep_rate, coefficients, threshold, stable
        self.num_tokens = num_tokens
        self.q = nn.Linear(head_dim, reduced_channels)
        self.k = nn.Linear(head_dim, reduced_channels)
        self.reduce = nn.Parameter(torch.empty(num_tokens, reduced_tokens))
        self.basis = self.reduce if share else nn.Parameter(torch.empty(num_tokens, reduced_tokens))
        for weight in (self.q.weight, self.k.weight, self.reduce, self.basis):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (self.q, self.k):
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        active: Bool[Tensor, "b m"] | None = None,
        reconstruct: bool = False,
    ) -> Connectivity:
        """`active`: the tokens that pruning has left; the others are zeros in both factors and picked by none."""
        heads, n = q.shape[1], q.shape[2]
        if n != self.num_tokens:
            raise ValueError(f"the input has {n} tokens; this predictor is for {self.num_tokens}")
        # pairs are picked by comparing sums that nearly tie: in float64 the choice is the same on any processor
        precise = torch.float32 if q.device.type == "mps" else torch.float64
        reduced_q, reduced_k = (
            F.linear(t.to(precise), m.weight.to(precise), m.bias.to(precise)) for t, m in ((q, self.q), (k, self.k))
        )
        if active is not None:
            seen = F.pad(active, (1, 0), value=True)
            reduced_q, reduced_k = (t * seen[:, None, :, None] for t in (reduced_q, reduced_k))
        g = (reduced_q[:, :, 1:] @ (reduced_k.mT @ self.reduce.to(precise)) * heads**-0.5).softmax(-1)
        if not reconstruct and self.coefficients < g.shape[-1]:
            top = self.largest(g, self.coefficients)
            g = torch.zeros_like(g).scatter(-1, top, g.gather(-1, top))
        a = g @ self.effective_basis(reconstruct).to(precise)
        ranked, budget = a.detach(), math.ceil(self.keep_rate * n)
        if active is not None:
            ranked = ranked.masked_fill(~seen[:, None, None], float("-inf"))
            budget = min(budget, int(seen.sum(1).min()))
        picked = self.largest(ranked, budget)
        mask = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, picked, True)
        return Connectivity(g.to(q.dtype), a.to(q.dtype), F.pad(mask, (0, 0, 1, 0), value=True))

    @torch.no_grad()
    def resize(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Make P and Q fit the summary token and a row-major grid `after` in place of `before`; the rank stays.

        Interpolated linearly, P scaled so that a sum over smooth keys stays what it was: an extension of ours.
        """
        shared = self.basis is self.reduce
        for name in ("reduce", "basis"):
            old = getattr(self, name)
            grid = resize_tokens(old[1:].T, before, after, total=name == "reduce").T
            setattr(self, name, nn.Parameter(torch.cat((old[:1], grid)), old.requires_grad))
        if shared:
            self.basis = self.reduce
        self.num_tokens = len(self.reduce)

    def largest(self, x: Float[Tensor, "*b n"], count: int) -> Tensor:
        """Indices of the `count` largest entries of each row; of equal ones the first, or torch's own choice."""
        if self.stable:
            return ranked(x)[..., :count]
        return x.topk(count, dim=-1).indices

    def effective_basis(self, reconstruct: bool = False) -> Float[Tensor, "r n"]:
        """W: the basis without signs and small entries, or as it is while attention is reconstructed."""
        basis = self.basis.T
        return basis if reconstruct else basis.abs() * (basis.abs() > self.threshold)


class PredictedSparseAttention(nn.Module):
    """W_o softmax over the kept pairs (q k^T / sqrt(d)) v, the pairs picked by a `ConnectivityPredictor` per head.

    (B, N, C) to the same. A dense kernel with a mask: at the few hundred tokens of these models it is faster than
    gathering keys, and the numbers are the same. The released code makes all N x N products too. Cost O(N^2 C).
    """

    def __init__(self, dim: int, num_heads: int, predictor: ConnectivityPredictor, *, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.predictor = predictor

    def heads(
        self, x: Float[Tensor, "b n c"], active: Bool[Tensor, "b m"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, N, d); zeros for tokens that pruning has removed."""
        qkv = self.qkv(x)
        if active is not None:
            qkv = qkv * F.pad(active, (1, 0), value=True)[..., None]
        return tuple(qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def forward(
        self, x: Float[Tensor, "b n c"], active: Bool[Tensor, "b m"] | None = None, dense: bool = False
    ) -> tuple[Float[Tensor, "b n c"], Connectivity, Float[Tensor, "b m"]]:
        """The output, what the predictor said, and the mean attention of the summary token to the others.

        dense: all pairs, for the phase in which the predictor learns (its approximation is then the dense one).
        """
        q, k, v = self.heads(x, active)
        found = self.predictor(q, k, active, dense)
        mask = None if dense else found.mask
        y = F.scaled_dot_product_attention(q, k, v, mask)
        logits = (q[:, :, :1] @ k.mT) * q.shape[-1] ** -0.5
        scores = logits.softmax(-1).mean(1)[:, 0, 1:]
        return self.proj(from_heads(y)), found, scores

    def attention_map(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n n"]:
        """The weights, zero outside the kept pairs."""
        q, k, _ = self.heads(x)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        return logits.masked_fill(~self.predictor(q, k).mask, float("-inf")).softmax(-1)
