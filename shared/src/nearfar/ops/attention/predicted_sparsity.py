"""Attention over the pairs of tokens that a cheap low-rank predictor picks for each input."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfar.ops.common.heads import check_heads, from_heads
from nearfar.ops.common.layers import linear_map
from nearfar.ops.common.ranking import largest_mask
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
        present: Int[Tensor, "b n"] | None = None,
    ) -> Connectivity:
        """`active`: the tokens that pruning has left; the others are zeros in both factors and picked by none.

        `present`: q and k hold these tokens alone, the summary token and those that pruning has left, by their places.
        """
        if present is None and q.shape[2] != self.num_tokens:
            raise ValueError(f"the input has {q.shape[2]} tokens; this predictor is for {self.num_tokens}")
        # pairs are picked by comparing sums that nearly tie: no autocast, and float32 at least
        with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
            return self.connect(q, k, active, reconstruct, present)

    def connect(
        self, q: Tensor, k: Tensor, active: Tensor | None, reconstruct: bool, present: Tensor | None
    ) -> Connectivity:
        heads, n = q.shape[1], q.shape[2]
        precise = torch.promote_types(q.dtype, torch.float32)
        reduce, basis = self.reduce.to(precise), self.effective_basis(reconstruct).to(precise)
        if present is not None:
            reduce, basis = reduce[present][:, None], basis.T[present].mT[:, None]
        q, k, dtype = q[:, :, 1:].to(precise), k.to(precise), q.dtype
        budget = min(n, math.ceil(self.keep_rate * self.num_tokens))
        if active is not None:
            seen = F.pad(active, (1, 0), value=True)
            k, reduce = k * seen[:, None, :, None], reduce * seen[:, None, :, None]
            budget = min(budget, int(seen.sum(1).min()))
        # (W_q q + b_q) ((W_k k + b_k)^T P) without the reduced queries and keys of every token
        (w_q, b_q), (w_k, b_k) = ([t.to(precise) for t in linear_map(layer)] for layer in (self.q, self.k))
        pooled = (reduce if reduce.ndim == 2 else reduce[:, 0]).mT @ from_heads(k)  # all heads have the same P
        low = w_k @ pooled.unflatten(2, (heads, -1)).permute(0, 2, 3, 1) + b_k[:, None] * reduce.sum(-2, keepdim=True)
        logits = (q @ (w_q.T @ low) + (b_q @ low)[..., None, :]) * heads**-0.5
        if active is not None:
            logits = logits * active[:, None, :, None]
        g = logits.softmax(-1)
        if not reconstruct and self.coefficients < g.shape[-1]:
            g = g * self.largest(g, self.coefficients)
        a = g @ basis.expand(*g.shape[:2], -1, -1)  # head by head: one product of all rows takes twice the time
        ranked = a.detach()
        if active is not None:
            ranked = torch.where(seen[:, None, None], ranked, float("-inf"))
        mask = F.pad(self.largest(ranked, budget), (0, 0, 1, 0), value=True)
        return Connectivity(g.to(dtype), a.to(dtype), mask)

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

    def largest(self, x: Float[Tensor, "*b n"], count: int) -> Bool[Tensor, "*b n"]:
        """Where the `count` largest entries of each row are; of equal ones the first, or torch's own choice."""
        if self.stable:
            return largest_mask(x.detach(), count)
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(count, dim=-1).indices, True)

    def effective_basis(self, reconstruct: bool = False) -> Float[Tensor, "r n"]:
        """W: the basis without signs and small entries, or as it is while attention is reconstructed."""
        basis = self.basis.T
        return basis if reconstruct else F.hardshrink(basis.abs(), self.threshold)


class PredictedSparseAttention(nn.Module):
    """W_o softmax over the kept pairs (q k^T / sqrt(d)) v, the pairs picked by a `ConnectivityPredictor` per head.

    (B, N, C) to the same. A dense kernel with a mask, since gathering each query's keys moves more than it saves: the
    released code makes all N x N products too. What is truly left out are the tokens that pruning has removed, with
    `present`: the numbers are those of the masked form. Cost O(N^2 C).
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
        self,
        x: Float[Tensor, "b n c"],
        active: Bool[Tensor, "b m"] | None = None,
        dense: bool = False,
        present: Int[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Connectivity, Float[Tensor, "b m"]]:
        """The output, what the predictor said, and the mean attention of the summary token to the others.

        dense: all pairs, for the phase in which the predictor learns (its approximation is then the dense one).
        present: x holds these tokens alone, by their places, the summary token first. It still attends to the others,
        whose keys and values are zero, in the published form: a key of zero stands for them all.
        """
        q, k, v = self.heads(x, active)
        found = self.predictor(q, k, active, dense, present)
        mask, gone = None if dense else found.mask, 0 if present is None else self.predictor.num_tokens - x.shape[1]
        summary = (q[:, :, :1] * k).sum(-1)[:, :, None] * q.shape[-1] ** -0.5
        if gone:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
            summary = F.pad(summary, (0, 1), value=math.log(gone))
            mask = F.pad(torch.ones_like(found.mask) if mask is None else mask, (0, 1))
        scores = summary.softmax(-1).mean(1)[:, 0, 1 : x.shape[1]]
        if mask is not None and (gone or not torch.compiler.is_exporting()):
            # torch turns a mask of truths into one of numbers in many times the time
            mask = mask.view(torch.uint8).to(q.dtype).sub_(1).mul_(torch.finfo(q.dtype).max)
            if gone:
                mask[:, :, 0, -1] = math.log(gone)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(from_heads(y)), found, scores

    def attention_map(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n n"]:
        """The weights, zero outside the kept pairs."""
        q, k, _ = self.heads(x)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        return logits.masked_fill(~self.predictor(q, k).mask, float("-inf")).softmax(-1)
