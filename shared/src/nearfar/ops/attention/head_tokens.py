"""Self-attention with one more token for every head, made of that head's channels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class HeadTokenAttention(nn.Module):
    """Multi-head attention over N tokens and H head tokens; a leading class token gains the head tokens' mean.

    The head-interacted attention of DHVT (Lu et al., NeurIPS 2022). With m_h the mean over all tokens of head h's
    d = C / H channels: t_h = GELU(LN_d(W m_h + b)) + e_h, where W maps d to C and LN acts on each of the H segments of
    the result. Ordinary attention runs over [x; t]; the first token's output gains the mean of the outputs of t, which
    are then dropped. One call of the fused kernel over N + H tokens. `forward` maps (B, N, C) to (B, N, C); cost
    O((N + H)^2 C). The head tokens see every position, so a causal form would need running means; there is none.

    Args:
        dim: channels C.
        num_heads: heads H.
        qkv_bias: biases of the q, k, v projections.
        attn_drop, drop: dropout of weights and of the output.
        eps: of the head tokens' norm.

    Raises:
        ValueError: heads that do not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        qkv_bias: bool = True,
        attn_drop: float | int = 0.0,
        drop: float | int = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.num_heads, self.attn_drop = num_heads, attn_drop
        head_dim = dim // num_heads
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, dim), std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(head_dim, dim)
        self.ht_norm = nn.LayerNorm(head_dim, eps=eps)
        self.drop = nn.Dropout(drop)

    def with_head_tokens(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n_and_heads c"]:
        described = self.ht_proj(x.mean(1).unflatten(-1, (self.num_heads, -1)))
        tokens = F.gelu(self.ht_norm(described.unflatten(-1, (self.num_heads, -1)))).flatten(2)
        return torch.cat((x, tokens + self.pos_embed), dim=1)

    def heads(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(self.with_head_tokens(x))
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        mixed = F.scaled_dot_product_attention(*self.heads(x), dropout_p=self.attn_drop if self.training else 0.0)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        first = mixed[:, :1] + mixed[:, -self.num_heads :].mean(1, keepdim=True)
        return self.drop(torch.cat((first, mixed[:, 1 : -self.num_heads]), dim=1))

    def attention_map(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads m m"]:
        """The weights over tokens and then head tokens, rows summing to one."""
        query, key, _ = self.heads(x)
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
