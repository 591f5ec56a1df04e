"""Input-dependent sparse attention: only the positions that need a lookup perform one."""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.common.streaming import State, StreamingMixer


class SelectiveLookup(StreamingMixer):
    """`y = x + p o` at the selected positions and `y = x` at the others; o is causal attention, p = sigmoid(w . x).

    Zoology's sigmoid selection (Arora et al. 2024, arXiv 2312.04927, section 5). While training every position is
    selected, and `train_pass` also gives the term `0.001 relu(mean(p) - k / N)`, k = sqrt(N) by default, that teaches
    p to be sparse. Selection picks queries; the keys stay dense.

    In evaluation, `threshold=None` selects the ceil(k) largest p of each sequence, as the released code does.
    That looks at the whole sequence, so it scores a finished text but cannot stream: `extend` refuses it. A number
    selects p >= threshold, position by position: causal and streaming. (The released code writes its selection into
    its input; this one does not.)

    Cost in evaluation O(N k d) for the k selected queries, O(N^2 d) while training or with a threshold. State 2 d N.

    Args:
        dim: channels d.
        num_heads: heads of the attention; must divide `dim`.
        threshold: None, or the p from which a position looks up.
        weight: of the auxiliary term.
        k: lookups per sequence; None for sqrt(N).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        threshold: float | None = None,
        weight: float = 1e-3,
        k: float | int | None = None,
    ):
        super().__init__()
        if k is not None and k <= 0:
            raise ValueError(f"k={k} must be above 0, or None for the square root of the length")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie in 0 .. 1, or be None to select the largest sqrt(N)")
        self.threshold, self.weight, self.k = threshold, weight, k
        self.attention = CausalAttention(dim, num_heads)
        self.selection = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if self.training:
            return self.train_pass(x)[0]
        if self.threshold is not None:
            return self.extend(x)[0]
        p = torch.sigmoid(self.selection(x))
        count = min(math.ceil(self.k or math.sqrt(x.shape[1])), x.shape[1])
        chosen = p.squeeze(-1).topk(count, dim=1).indices.sort(1).values
        return x.scatter_add(1, chosen[..., None].expand(-1, -1, x.shape[2]), self.lookup(x, p, chosen))

    def train_pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y with every position selected, and the auxiliary term, a tensor of one number."""
        p = torch.sigmoid(self.selection(x))
        excess = torch.relu(p.mean() - (self.k or math.sqrt(x.shape[1])) / x.shape[1])
        return x + p * self.attention(x), (self.weight * excess)[None]

    def lookup(self, x: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        """p o at the positions `chosen` (B, k) alone, `(B, k, d)`."""
        attention = self.attention
        q, k, v = attention.heads(x)
        q = q.gather(2, chosen[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        visible = torch.arange(x.shape[1], device=x.device) <= chosen[..., None]
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        o = attention.out_proj(rearrange(o, "b h n d -> b n (h d)"))
        return o * p.gather(1, chosen[..., None])

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        if self.threshold is None:
            raise ValueError(
                "choosing the largest sqrt(N) selections needs the whole sequence; set threshold= to stream"
            )
        p = torch.sigmoid(self.selection(x))
        o, state = self.attention.extend(x, state, lengths)
        return torch.where(p >= self.threshold, x + p * o, x), state

    def state_size(self, length: int) -> int:
        return self.attention.state_size(length)
