"""Attention over the layers of a deep network, one decision per frame."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import Conv2d


class LayerGate(nn.Module):
    """Multi-head, frame-dependent gates over the layer axis, then the maximum over layers.

    The channels of `x (B, h k, L, T)` are h heads of k. Per frame and head, with a and m (both of length L) the mean
    and the maximum over the head's k channels::

        gate = sigmoid(f(a) + f(m)),   f(z) = relu(z W1 + b1) W2 + b2
        y    = max over layers of gate * x

    W1 `(h, L, hidden)` and W2 `(h, hidden, L)` belong to the head; f is the same for a and m. Layer-aware TDNN
    (arXiv 2409.07770), and LAP (arXiv 2512.22148).
    Cost is O(T L h (k + hidden)): linear in time.

    Args:
        num_layers: L, fixed by the shapes of the weights.
        num_heads: h.
        hidden: width inside f; L // 2 in the published models.
        dropout: on the gates, in training.

    Shapes: `(B, C, L, T)` to `(B, C, T)`, C a multiple of `num_heads`.
    """

    def __init__(self, num_layers: int, num_heads: int = 8, hidden: int | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        hidden = num_layers // 2 if hidden is None else hidden
        if num_layers < 2 or hidden < 1 or num_heads < 1:
            raise ValueError(
                f"needs num_layers >= 2, num_heads >= 1 and hidden >= 1, got {num_layers}, {num_heads}, {hidden}"
            )
        self.num_layers, self.num_heads = num_layers, num_heads
        self.w1 = nn.Parameter(torch.empty(num_heads, num_layers, hidden))
        self.b1 = nn.Parameter(torch.zeros(num_heads, 1, hidden))
        self.w2 = nn.Parameter(torch.empty(num_heads, hidden, num_layers))
        self.b2 = nn.Parameter(torch.zeros(num_heads, 1, num_layers))
        self.dropout = nn.Dropout(dropout)
        for weight in (self.w1, self.w2):
            for head in weight:
                nn.init.xavier_uniform_(head)

    def gates(self, x: Float[Tensor, "b c l t"]) -> Float[Tensor, "b h l t"]:
        """The gates themselves, between 0 and 1: which layers each frame listens to."""
        if x.shape[1] % self.num_heads or x.shape[2] != self.num_layers:
            raise ValueError(
                f"expected (B, a multiple of {self.num_heads}, {self.num_layers}, T), got {tuple(x.shape)}"
            )
        heads = x.unflatten(1, (self.num_heads, -1))
        logits = 2 * self.b2.mT
        for pooled in (heads.mean(2), heads.amax(2)):
            logits = logits + self.w2.mT @ torch.relu(self.w1.mT @ pooled + self.b1.mT)
        return torch.sigmoid(logits)

    def forward(self, x: Float[Tensor, "b c l t"]) -> Float[Tensor, "b c t"]:
        gate = self.dropout(self.gates(x))
        heads = x.unflatten(1, (self.num_heads, -1))
        return (heads * gate.unsqueeze(2)).amax(3).flatten(1, 2)


class LayerAttentionPool(nn.Module):
    """Pool a map (layer, time) over its layers: `BN(W_o gate(W_i BN(x)))` with `LayerGate` in the middle.

    BN over channels, W_i and W_o 1x1 convolutions without bias. In evaluation mode the first BN is folded into W_i,
    which saves a pass over the map; the numbers are those of the unfolded form up to rounding.
    Layer-aware TDNN (arXiv 2409.07770); its code lays the heads out by two copies of the map, this one by none.

    Args:
        in_dim: channels C of the map.
        out_dim: channels of the result (512 in the paper), a multiple of `num_heads`.
        num_layers: L.
        num_heads: h (8).
        dropout: on the gates (0.1).

    Shapes: `(B, in_dim, L, T)` to `(B, out_dim, T)`. Frames do not mix, so no mask is needed.

    Raises:
        ValueError: where `out_dim` is no multiple of `num_heads`.
    """

    def __init__(self, in_dim: int, out_dim: int, num_layers: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        if out_dim % num_heads:
            raise ValueError(f"out_dim ({out_dim}) must be a multiple of num_heads ({num_heads})")
        self.norm_in = nn.BatchNorm2d(in_dim)
        self.proj_in = Conv2d(in_dim, out_dim, 1, bias=False)
        self.gate = LayerGate(num_layers, num_heads, dropout=dropout)
        self.proj_out = nn.Conv1d(out_dim, out_dim, 1, bias=False)
        self.norm_out = nn.BatchNorm1d(out_dim)

    def forward(self, x: Float[Tensor, "b c l t"]) -> Float[Tensor, "b d t"]:
        if self.training:
            x = self.proj_in(self.norm_in(x))
        else:
            norm, weight = self.norm_in, self.proj_in.weight
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
            folded = weight * scale[:, None, None]
            x = nn.functional.conv2d(x, folded, weight.flatten(1) @ shift)
        return self.norm_out(self.proj_out(self.gate(x)))
