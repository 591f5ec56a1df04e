"""Causal attention as large language models have it: grouped keys with rotary positions, and keys from a latent."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.streaming import State, StreamingMixer, advance, shift_in
from nearfar.ops.recurrence.retnet import rotate_halves


def visible_keys(past: int, new: int, seen: Tensor) -> Tensor:
    """Which of `past + new` keys each new query sees, `(B, 1, new, past + new)`; `seen` `(B,)` tells real past ones."""
    query = torch.arange(past, past + new, device=seen.device)[:, None]
    key = torch.arange(past + new, device=seen.device)
    return ((key <= query) & (key >= past - seen[:, None, None]))[:, None]


class RotaryAttention(StreamingMixer):
    """Causal attention with rotary positions and, with fewer key heads than query heads, keys shared by groups.

    `softmax(R q (R k)^T / sqrt(d_h)) v`, R the rotation of channels i and i + d_h / 2 by position base^(-2 i / d_h).
    Su et al. 2021 (arXiv 2104.09864), Ainslie et al. 2023 (arXiv 2305.13245), as Llama and its kin have it.
    Cost O(N^2 d). State: all keys and values, 2 N d_h times the key heads.

    Args:
        dim: channels d. num_heads, num_kv_heads: of queries and of keys; None: as many. head_dim: d_h; None: d / heads.
        base: of the rotation. bias: in the maps of q, k, v.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        base: float = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        kv = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv < 1 or num_heads % kv or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} must divide dim={dim} and num_kv_heads={kv} must divide num_heads")
        head_dim = dim // num_heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2 or base <= 0:
            raise ValueError(f"head_dim={head_dim} must be even for the rotation and base={base} positive")
        self.num_heads, self.num_kv_heads, self.head_dim, self.base = num_heads, kv, head_dim, base
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, kv * head_dim, bias=bias) for _ in range(2))
        self.out_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.heads(x, torch.arange(x.shape[1], device=x.device)[None])
        return self.attend(q, k, v, None)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        if state is None:
            empty = x.new_zeros(len(x), 0, self.num_kv_heads, self.head_dim)
            state = (empty, empty, torch.zeros(len(x), dtype=torch.long, device=x.device))
        old_k, old_v, seen = state
        m, n = old_k.shape[1], x.shape[1]
        q, k, v = self.heads(x, seen[:, None] + torch.arange(n, device=x.device))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = torch.cat([old_k.to(k.dtype), k], 1), torch.cat([old_v.to(v.dtype), v], 1)
        y = self.attend(q, keys.transpose(1, 2), values.transpose(1, 2), visible_keys(m, n, seen))
        state = (shift_in(old_k, k, m + n, lengths), shift_in(old_v, v, m + n, lengths), advance(seen, x, lengths))
        return y, state

    def heads(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, `(B, heads, N, d_h)`."""
        q, k, v = (
            rearrange(p(x), "b n (h c) -> b h n c", c=self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (rotate_halves(t.to(wide), position, self.base).to(t.dtype) for t in (q, k))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        shared = self.num_heads != self.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=shared)
        return self.out_proj(rearrange(y, "b h n c -> b n (h c)"))

    def state_size(self, length: int) -> int:
        return 2 * length * self.num_kv_heads * self.head_dim


class LatentAttention(StreamingMixer):
    """Multi-head latent attention without positions: keys and values of all heads come from one narrow latent.

        (c, k_s) = W_a x, c <- RMSNorm(c);   (k_h, v_h) = W_b c;   `softmax(q_h . (k_h, k_s) / sqrt(d_k)) v_h`

    The key's second part k_s is shared by the heads; in Kimi Linear (arXiv 2510.26692) it is not rotated, although it
    keeps the name of a rotary part. DeepSeek-V2 (arXiv 2405.04434). No biases. Cost O(N^2 h (d_k + d_v)).
    State: c and k_s of all positions, N (rank + shared_dim); a single new position attends inside the latent, so its
    cost is that of the state, not of the keys.

    Args:
        dim: channels. num_heads: h. rank: width of c. head_dim: of k_h. shared_dim: of k_s. value_dim: of v_h.
        eps: of the norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        rank: int = 512,
        head_dim: int = 128,
        shared_dim: int = 64,
        value_dim: int = 128,
        eps: float = 1e-6,
    ):
        super().__init__()
        if min(dim, num_heads, rank, head_dim, shared_dim, value_dim) < 1:
            raise ValueError(
                f"dim={dim}, num_heads={num_heads}, rank={rank}, head_dim={head_dim}, shared_dim={shared_dim} and "
                f"value_dim={value_dim} must be at least 1"
            )
        self.num_heads, self.rank, self.head_dim, self.shared_dim = num_heads, rank, head_dim, shared_dim
        self.value_dim, self.scale = value_dim, (head_dim + shared_dim) ** -0.5
        self.q_proj = nn.Linear(dim, num_heads * (head_dim + shared_dim), bias=False)
        self.kv_a = nn.Linear(dim, rank + shared_dim, bias=False)
        self.kv_norm = nn.RMSNorm(rank, eps=eps)
        self.kv_b = nn.Linear(rank, num_heads * (head_dim + value_dim), bias=False)
        self.out_proj = nn.Linear(num_heads * value_dim, dim, bias=False)

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q `(B, h, N, d_k)`, and c and k_s side by side `(B, N, rank + shared)`."""
        c, shared = self.kv_a(x).split([self.rank, self.shared_dim], -1)
        q = rearrange(self.q_proj(x), "b n (h c) -> b h n c", h=self.num_heads)
        return q, torch.cat([self.kv_norm(c).to(shared.dtype), shared], -1)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, latent = self.latent(x)
        return self.attend(q, latent, None)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        q, new = self.latent(x)
        if state is None:
            state = (new[:, :0], torch.zeros(len(x), dtype=torch.long, device=x.device))
        old, seen = state
        visible = visible_keys(old.shape[1], x.shape[1], seen)
        both = torch.cat([old.to(new.dtype), new], 1)
        few = x.shape[1] == 1 and type(self.kv_b) is nn.Linear  # a wrapped one's weight is not the whole map
        y = self.inside(q, both, visible) if few else self.attend(q, both, visible)
        return y, (shift_in(old, new, both.shape[1], lengths), advance(seen, x, lengths))

    def attend(self, q: Tensor, latent: Tensor, visible: Tensor | None) -> Tensor:
        c, shared = latent.split([self.rank, self.shared_dim], -1)
        k, v = rearrange(self.kv_b(c), "b n (h c) -> b h n c", h=self.num_heads).split(
            [self.head_dim, self.value_dim], -1
        )
        k = torch.cat([k, shared[:, None].expand(-1, self.num_heads, -1, -1)], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.scale)
        return self.out_proj(rearrange(y, "b h n c -> b n (h c)"))

    def inside(self, q: Tensor, latent: Tensor, visible: Tensor) -> Tensor:
        """The same for few queries: they are carried into the latent, where all heads share keys and values."""
        w_k, w_v = (
            self.kv_b.weight.to(q.dtype).unflatten(0, (self.num_heads, -1)).split([self.head_dim, self.value_dim], 1)
        )
        own, shared = q.split([self.head_dim, self.shared_dim], -1)
        q = torch.cat([own @ w_k, shared], -1)
        weights = (q @ latent[:, None].mT * self.scale).masked_fill(~visible, -torch.inf).softmax(-1)
        y = (weights @ latent[:, None, :, : self.rank]) @ w_v.mT
        return self.out_proj(rearrange(y, "b h n c -> b n (h c)"))

    def state_size(self, length: int) -> int:
        return length * (self.rank + self.shared_dim)
