"""Causal softmax attention, over everything before or over a sliding window, with a streaming form."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, advance, in_pieces, piece_length, shift_in


class CausalAttention(StreamingMixer):
    """Multi-head causal self-attention: `softmax(q k^T / sqrt(d / h)) v` over the positions up to the query's own.

    One linear map gives q, k and v in this order, each split in heads. With `window=w` position i sees
    i - w .. i, that is w + 1 positions. Zoology (Arora et al. 2024, arXiv 2312.04927); its code adds -10000 above
    the diagonal instead of -inf (the same numbers in float32) and builds the sliding mask by a loop at each call.

    Cost: O(N^2 d), with a window O(N w d) in time, by blocks of w queries that see two blocks of keys.
    State: all keys and values, `2 d N`; with a window the last w, `2 d w`.

    Args:
        dim: channels d.
        num_heads: heads; must divide `dim`.
        window: positions before the query that it sees, None for all of them.
        dropout: rate on the attention weights while training.
        bias, out_bias: biases in the first and in the last linear map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        window: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        out_bias: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1, or None for full attention")
        self.dim, self.num_heads, self.window, self.dropout = dim, num_heads, window, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=out_bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each `(B, h, N, d / h)`."""
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
        return q, k, v

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if self.window is None or 8 * self.window > piece_length(x):  # a piece computes the window before it again
            return self.attend(x)

        def piece(part: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """The outputs of a part, and the inputs that the next one still sees."""
            seen = part if before is None else torch.cat([before, part], 1)
            return self.attend(seen)[:, seen.shape[1] - part.shape[1] :], seen[:, -self.window :]

        return in_pieces(piece, x)

    def attend(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.heads(x)
        p = self.dropout if self.training else 0.0
        if self.window is None or self.window + 1 >= x.shape[1]:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            y = windowed_attention(q, k, v, self.window, p)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        q, k, v = self.heads(x)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # positions on axis 1, as `shift_in` wants them
        if state is None:
            past = 0 if self.window is None else self.window
            empty = k.new_zeros(k.shape[0], past, *k.shape[2:])
            state = (empty, empty, torch.zeros(k.shape[0], dtype=torch.long, device=k.device))
        old_k, old_v, seen = state
        m, n = old_k.shape[1], x.shape[1]
        query = torch.arange(m, m + n, device=x.device)[:, None]
        key = torch.arange(m + n, device=x.device)
        visible = key <= query
        if self.window is not None:
            visible = visible & (key >= query - self.window)
        visible = visible & (key >= m - seen[:, None, None])  # nothing stands before a row's first token
        keys, values = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        y = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible[:, None])
        keep = m + n if self.window is None else self.window
        state = (
            shift_in(old_k, k, keep, lengths),
            shift_in(old_v, v, keep, lengths),
            advance(seen, x, lengths),
        )
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)")), state

    def state_size(self, length: int) -> int:
        """`2 d` per position kept: all of them, or the window's w."""
        return 2 * self.dim * (length if self.window is None else min(self.window, length))


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0) -> Tensor:
    """Causal attention of each query to its own position and the `window` before it, in blocks.

    q, k, v: `(B, h, N, d)`. Queries are cut in blocks of `window`; block i sees blocks i - 1 and i of the keys under
    one mask `(window, 2 window)` that all blocks share. Cost O(N window d), memory O(N window).
    """
    n, pad = q.shape[2], -q.shape[2] % window
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (-1, window))
    k, v = (F.pad(t, (0, 0, window, pad)).unfold(2, 2 * window, window).transpose(-1, -2) for t in (k, v))
    query = torch.arange(window, 2 * window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)
    inside = (key <= query) & (key >= query - window)
    block = torch.arange(q.shape[2], device=q.device)[:, None, None]
    mask = inside & ((block > 0) | (key >= window))  # before the first block there is only padding
    shape = q.shape[:3]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return y.unflatten(0, shape[:2]).flatten(2, 3)[:, :, :n]
