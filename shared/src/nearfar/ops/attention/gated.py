"""Mega's layer: a long memory, then gated single-head attention inside chunks; and its feed-forward network."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, advance, shift_in, wide
from nearfar.ops.common.tables import cached_table

ATTENTIONS = ("softmax", "laplace", "relu2")
LAPLACE_MEAN, LAPLACE_STD = 0.707107, 0.282095


class SimpleBias(nn.Module):
    """Relative bias with a number for each distance: `b[i, j] = r[M - 1 + j - i]`, M the longest chunk."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        self.max_length = max_length
        self.bias = nn.Parameter(torch.empty(2 * max_length - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bias, std=0.02)

    def forward(self, length: int) -> Float[Tensor, " lags"]:
        """The bias of the distances j - i = 1 - length .. length - 1."""
        if length > self.max_length:
            raise ValueError(
                f"{length} positions attend to each other, more than the bias's max_length={self.max_length}"
            )
        return self.bias[self.max_length - length : self.max_length + length - 1]


class RotaryBias(nn.Module):
    """Relative bias of two learnt vectors: `b[i, j] = <R_i alpha, R_j beta>`, both from N(0, 0.02).

    R_p rotates channels k and k + z/2 by p 10000^(-k/(z/2)), so only j - i counts: one number per distance, O(N z),
    where the published code multiplies the rotated vectors of all pairs, O(N^2 z).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim={dim} must be even and at least 2: rotation turns pairs of channels")
        self.alpha, self.beta = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def forward(self, length: int) -> Float[Tensor, " lags"]:
        """The bias of the distances j - i = 1 - length .. length - 1."""
        cos, sin = _waves(length, len(self.alpha), self.alpha.device, self.alpha.dtype)
        (a, b), (c, d) = self.alpha.chunk(2), self.beta.chunk(2)
        return cos @ (a * c + b * d) + sin @ (b * c - a * d)


@cached_table
def _waves(length: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosine and sine, `(2, 2 length - 1, dim / 2)`, of each distance times each speed."""
    distance = torch.arange(1 - length, length, dtype=torch.float64)
    speed = torch.exp(torch.arange(dim // 2, dtype=torch.float64) * (-math.log(10000.0) / (dim // 2)))
    angle = distance[:, None] * speed
    return torch.stack([angle.cos(), angle.sin()]).to(device, dtype)


BIASES = {"simple": SimpleBias, "rotary": RotaryBias}


def toeplitz(lags: Tensor) -> Tensor:
    """The matrix `M[i, j] = lags[n - 1 + j - i]`, `(n, n)`, of `(2 n - 1)` numbers."""
    n = (len(lags) + 1) // 2
    return lags.unfold(0, n, 1).flip(0)


class ChunkAttention(nn.Module):
    """Single-head attention with a relative bias, whole or inside chunks of c positions; positions restart in each.

        softmax:  A = softmax(q k^T / sqrt(z) + b)
        laplace:  A = (1 + erf((w - mean) / (std sqrt 2))) / 2,   w = q k^T / n + b,   mean 0.7071, std 0.2821
        relu2:    A = relu(w)^2

    n is the number of keys that a query may see: the row's with `causal`, else all real ones. y = A v. Mega (Ma et al.
    2022, arXiv 2209.10655, section 3.2). The last chunk may be short. Cost O(N c (z + v)).

    Args:
        dim: width z of queries and keys.
        chunk: c; None: the whole sequence.
        kind: one of the above.
        bias: "simple" or "rotary".
        max_length: longest chunk (or sequence) of the simple bias; None: `chunk`.
        causal: see only positions up to one's own.
        dropout: rate on A in training.
    """

    def __init__(
        self,
        dim: int,
        chunk: int | None = None,
        kind: str = "softmax",
        bias: str = "rotary",
        max_length: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in ATTENTIONS or bias not in BIASES:
            raise ValueError(
                f"kind={kind!r} must be one of {', '.join(ATTENTIONS)} and bias={bias!r} of {', '.join(BIASES)}"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1, or None for the whole sequence")
        if bias == "simple" and max_length is None and chunk is None:
            raise ValueError("the simple bias needs max_length (or a chunk), it is None")
        if bias == "simple" and max_length is not None and chunk is not None and chunk > max_length:
            raise ValueError(f"chunk={chunk} is longer than the simple bias's max_length={max_length}")
        self.dim, self.chunk, self.kind, self.causal, self.dropout = dim, chunk, kind, causal, dropout
        self.bias = SimpleBias(max_length or chunk) if bias == "simple" else RotaryBias(dim)

    def forward(
        self,
        q: Float[Tensor, "b n z"],
        k: Float[Tensor, "b n z"],
        v: Float[Tensor, "b n v"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """`mask`: True at real positions; the others are not seen (a chunk without any real one sees itself)."""
        n = q.shape[1]
        size = n if self.chunk is None else min(self.chunk, n)
        pad = -n % size
        if pad and not self.causal and mask is None:
            mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(1, (-1, size)) for t in (q, k, v))
        if mask is not None:
            mask = F.pad(mask, (0, pad)).unflatten(1, (-1, size))[:, :, None]
            mask = mask | ~mask.any(-1, keepdim=True)
        visible = _lower(size, q.device) if self.causal else None
        if mask is not None:
            visible = mask if visible is None else mask & visible
        return self.attend(q, k, v, toeplitz(self.bias(size)), visible).flatten(1, 2)[:, :n]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor | None) -> Tensor:
        """q `(B, C, m, z)`, k, v `(B, C, n, ...)`; bias and visible broadcast to `(B, C, m, n)`."""
        p = self.dropout if self.training else 0.0
        if self.kind == "softmax":
            bias = bias.to(q.dtype)
            if visible is not None:
                bias = torch.where(visible, bias, -torch.inf)
            if bias.dim() > 2:
                bias = bias.expand(*q.shape[:-1], k.shape[-2])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        scores = q @ k.mT
        if self.causal and visible is not None:  # positions count from the chunk's beginning, padding is behind
            count = visible.sum(-1, keepdim=True).clamp(min=1)
        else:
            count = k.shape[-2] if visible is None else visible.sum(-1, keepdim=True).clamp(min=1)
        dtype, unchanged = wide(scores)
        with unchanged:
            w = scores.to(dtype) / count + bias.to(dtype)
            if self.kind == "laplace":
                weights = 0.5 * (1 + torch.erf((w - LAPLACE_MEAN) / (LAPLACE_STD * math.sqrt(2))))
            else:
                weights = torch.relu(w).square()
            if visible is not None:
                weights = weights * visible
        return F.dropout(weights.to(v.dtype), p) @ v

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The next piece. State: the keys and values of the open chunk (or all), and the tokens seen `(B,)`."""
        if not self.causal:
            raise ValueError("two-sided attention needs the whole chunk, so it cannot stream")
        b, n, c = len(q), q.shape[1], self.chunk
        if state is None:
            empty = [t.new_zeros(b, 0 if c is None else c, t.shape[-1]) for t in (k, v)]
            state = (*empty, torch.zeros(b, dtype=torch.long, device=q.device))
            if c is None or n <= c:
                y = self(q, k, v)
                return y, self.remember(k, v, state, lengths)
        old_k, old_v, seen = state
        if c is None:
            m = old_k.shape[1]
            own = seen[:, None] + torch.arange(n, device=q.device)
            keys = seen[:, None] - m + torch.arange(m + n, device=q.device)
            first = torch.zeros_like(own)
        else:
            own = (seen % c)[:, None] + torch.arange(n, device=q.device)
            if n > c:
                return self.by_chunks(q, k, v, state, own), self.remember(k, v, state, lengths)
            slots = torch.arange(c, device=q.device).expand(b, c)
            keys = torch.cat([torch.where(slots < own[:, :1], slots, -1), own], 1)
            first = own // c * c
        visible = (keys[:, None] <= own[..., None]) & (keys[:, None] >= first[..., None])
        span = int(keys.shape[1]) if c is None else c
        lags = self.bias(span)
        bias = lags[(keys[:, None] - own[..., None] + span - 1).clamp(0, 2 * span - 2)]
        k_all, v_all = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        y = self.attend(*(t[:, None] for t in (q, k_all, v_all, bias, visible)))[:, 0]
        return y, self.remember(k, v, state, lengths)

    def by_chunks(self, q: Tensor, k: Tensor, v: Tensor, state: State, own: Tensor) -> Tensor:
        """A piece longer than a chunk: laid out behind what its first chunk already holds."""
        old_k, old_v, _ = state
        width = -(-(self.chunk + q.shape[1]) // self.chunk) * self.chunk

        def lay(new: Tensor, old: Tensor | None) -> Tensor:
            out = new.new_zeros(len(new), width, new.shape[-1])
            if old is not None:
                out = torch.cat([old, out[:, self.chunk :]], 1)
            return out.scatter(1, own[..., None].expand_as(new), new)

        y = self(lay(q, None), lay(k, old_k), lay(v, old_v))
        return y.gather(1, own[..., None].expand(-1, -1, y.shape[-1]))

    def remember(self, k: Tensor, v: Tensor, state: State, lengths: Tensor | None) -> State:
        old_k, old_v, seen = state
        after = advance(seen, k, lengths)
        if self.chunk is None:
            keep = old_k.shape[1] + k.shape[1]
            return shift_in(old_k, k, keep, lengths), shift_in(old_v, v, keep, lengths), after
        c, n = self.chunk, k.shape[1]
        # slot s of the chunk that is open afterwards: from the old one, or from the piece
        source = (after // c * c)[:, None] + torch.arange(c, device=k.device) - seen[:, None]
        index = torch.where(source < 0, source + (seen % c)[:, None], source.clamp(max=n - 1) + c)[..., None]
        return *(
            torch.cat([old, new], 1).gather(1, index.expand(-1, -1, new.shape[-1]))
            for old, new in ((old_k, k), (old_v, v))
        ), after


@cached_table
def _lower(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


class ScalarNorm(nn.Module):
    """`g x / sqrt(mean(x^2) + eps)` with one number g: Mega's ScaleNorm."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), eps=self.eps) * self.weight


class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch norm over the batch and the positions of `(B, N, C)`, padding included, as published."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


NORMS = {
    "layernorm": nn.LayerNorm,
    "rmsnorm": nn.RMSNorm,
    "scalenorm": ScalarNorm,
    "batchnorm": SequenceBatchNorm,
}


def make_norm(name: str, dim: int) -> nn.Module:
    """One of `NORMS` over `dim` channels, eps 1e-5."""
    if name not in NORMS:
        raise ValueError(f"norm={name!r} must be one of {', '.join(NORMS)}")
    return NORMS[name](dim, eps=1e-5)


class Dropout(nn.Module):
    """Dropout on `(B, N, C)`: of single numbers, or of whole channels over all positions."""

    def __init__(self, p: float, channels: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout rate is {p}; it must be in [0, 1)")
        self.p, self.channels = p, channels

    def forward(self, x: Tensor) -> Tensor:
        if self.channels and self.training and self.p:
            return x * F.dropout(torch.ones_like(x[:, :1]), self.p)
        return F.dropout(x, self.p, self.training)


class MegaLayer(StreamingMixer):
    """Moving-average gated attention: Mega's layer, residual included, with an exchangeable long memory.

        xn = norm(x);   V = silu(W_v xn);   m = dropout(memory(xn))
        u, (Z, R), hx = W_m m, split in d, z + v, d;   u = sigmoid(u);   Z, R = silu(.)
        Q = Z gamma_0 + beta_0;   K = Z gamma_1 + beta_1;   H = attention(Q, K, dropout(V))
        h = silu(hx + W_h (H R));   y = x + u (dropout(h) - x)

    All maps have biases. With `prenorm=False` xn = x, and y is normed instead. Mega (Ma et al. 2022, arXiv 2209.10655,
    section 3.3) takes `DampedEMA` as memory; TCNCA (arXiv 2312.05605) a dilated convolution network at the same place,
    `nearfar.ops.convolution.tcn.TCNMixer`. Cost: the memory's, and O(N (d v + c (z + v))) with chunks of c.
    State: the memory's, and keys and values of the open chunk, (z + v) c numbers.

    Args:
        dim: channels d.
        memory: maps `(B, N, d)` to the same, taking `(x, mask)`; a `StreamingMixer` if the layer is to stream.
        attention_dim, value_dim: z and v; None: v = 2 d.
        chunk, attention, bias, max_length, causal: of `ChunkAttention`.
        norm: of `NORMS`. prenorm: see above.
        dropout: on m and h. attention_dropout: on the weights. hidden_dropout: on V.
        feature_dropout: drop whole channels instead of numbers.
    """

    residual_included = True
    no_weight_decay = ("gamma", "beta")

    def __init__(
        self,
        dim: int,
        memory: nn.Module,
        attention_dim: int = 128,
        value_dim: int | None = None,
        chunk: int | None = None,
        attention: str = "softmax",
        bias: str = "rotary",
        max_length: int | None = None,
        causal: bool = True,
        norm: str = "layernorm",
        prenorm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feature_dropout: bool = False,
    ):
        super().__init__()
        value_dim = 2 * dim if value_dim is None else value_dim
        if min(dim, attention_dim, value_dim) < 1:
            raise ValueError(f"dim={dim}, attention_dim={attention_dim} and value_dim={value_dim} must be at least 1")
        self.dim, self.attention_dim, self.value_dim, self.prenorm = dim, attention_dim, value_dim, prenorm
        self.memory = memory
        self.attention = ChunkAttention(attention_dim, chunk, attention, bias, max_length, causal, attention_dropout)
        self.norm = make_norm(norm, dim)
        self.v_proj = nn.Linear(dim, value_dim)
        self.m_proj = nn.Linear(dim, attention_dim + value_dim + 2 * dim)
        self.h_proj = nn.Linear(value_dim, dim)
        self.gamma, self.beta = (nn.Parameter(torch.empty(2, attention_dim)) for _ in range(2))
        self.dropout, self.hidden_dropout = Dropout(dropout, feature_dropout), Dropout(hidden_dropout, feature_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps and gamma from N(0, 0.02), biases and beta 0; memory, bias and norm reset themselves."""
        for linear in (self.v_proj, self.m_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """`mask`: True at real positions; others see only them. Padding behind a causal text needs none."""
        normed = self.norm(x) if self.prenorm else x
        v, (q, k, u, r, hx) = self.values(normed), self.gates(self.memory(normed, mask))
        return self.output(x, self.attention(q, k, v, mask), u, r, hx)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        held, memory = (None, None) if state is None else (state[:3], state[3:])
        normed = self.norm(x) if self.prenorm else x
        m, memory = self.memory.extend(normed, memory, lengths)
        v, (q, k, u, r, hx) = self.values(normed), self.gates(m)
        y, held = self.attention.extend(q, k, v, held, lengths)
        return self.output(x, y, u, r, hx), (*held, *memory)

    def values(self, normed: Tensor) -> Tensor:
        return self.hidden_dropout(F.silu(self.v_proj(normed)))

    def gates(self, m: Tensor) -> tuple[Tensor, ...]:
        """Q, K, u, R and hx of the memory's output."""
        d, z, v = self.dim, self.attention_dim, self.value_dim
        u, zr, hx = self.m_proj(self.dropout(m)).split([d, z + v, d], -1)
        z, r = F.silu(zr).split([z, v], -1)
        q, k = (torch.addcmul(b, z, g) for g, b in zip(self.gamma.unbind(0), self.beta.unbind(0)))
        return q, k, torch.sigmoid(u), r, hx

    def output(self, x: Tensor, y: Tensor, u: Tensor, r: Tensor, hx: Tensor) -> Tensor:
        h = self.dropout(F.silu(hx + self.h_proj(y * r)))
        out = x + u * (h - x)
        return out if self.prenorm else self.norm(out)

    def state_size(self, length: int) -> int:
        chunk = self.attention.chunk
        held = length if chunk is None else min(length, chunk)
        return held * (self.attention_dim + self.value_dim) + self.memory.state_size(length)


class MemoryAttention(StreamingMixer):
    """The layer without its gates: `y = x + W_h attention(W_q m, W_k m, W_v x)` with m = memory(x).

    With a `TCNMixer` as memory this is what the paper of TCNCA (arXiv 2312.05605) calls a simplified model, for
    associative recall. Inferred: no code of it was released and its abstract does not say what is left out.
    """

    residual_included = True

    def __init__(
        self,
        dim: int,
        memory: nn.Module,
        attention_dim: int = 128,
        chunk: int | None = None,
        attention: str = "softmax",
        bias: str = "rotary",
        max_length: int | None = None,
        causal: bool = True,
        norm: str = "layernorm",
    ):
        super().__init__()
        self.dim, self.attention_dim = dim, attention_dim
        self.norm, self.memory = make_norm(norm, dim), memory
        self.attention = ChunkAttention(attention_dim, chunk, attention, bias, max_length, causal)
        self.q_proj, self.k_proj = (nn.Linear(dim, attention_dim) for _ in range(2))
        self.v_proj, self.h_proj = (nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        normed = self.norm(x)
        m = self.memory(normed, mask)
        return x + self.h_proj(self.attention(self.q_proj(m), self.k_proj(m), self.v_proj(normed), mask))

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        held, memory = (None, None) if state is None else (state[:3], state[3:])
        normed = self.norm(x)
        m, memory = self.memory.extend(normed, memory, lengths)
        y, held = self.attention.extend(self.q_proj(m), self.k_proj(m), self.v_proj(normed), held, lengths)
        return x + self.h_proj(y), (*held, *memory)

    def state_size(self, length: int) -> int:
        chunk = self.attention.chunk
        held = length if chunk is None else min(length, chunk)
        return held * (self.attention_dim + self.dim) + self.memory.state_size(length)


class NormedFeedForward(nn.Module):
    """Mega's feed-forward network, residual included: `y = x + W_2 silu(W_1 norm(x))`, with biases.

    With `prenorm=False` x enters as it is and y is normed. Dropout after the activation (`hidden_dropout`) and after
    W_2. Maps from N(0, 0.02), biases 0.

    Args:
        dim: channels. hidden: width between the maps; None: 2 dim. norm: of `NORMS`.
    """

    residual_included = True

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        norm: str = "layernorm",
        prenorm: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feature_dropout: bool = False,
    ):
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        if min(dim, hidden) < 1:
            raise ValueError(f"dim={dim} and hidden={hidden} must be at least 1")
        self.prenorm = prenorm
        self.norm = make_norm(norm, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout, self.hidden_dropout = Dropout(dropout, feature_dropout), Dropout(hidden_dropout, feature_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        h = self.hidden_dropout(F.silu(self.fc1(self.norm(x) if self.prenorm else x)))
        out = x + self.dropout(self.fc2(h))
        return out if self.prenorm else self.norm(out)
