"""Attention over the neighbours of a graph's nodes, and the graph-convolutional attention built on it."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nearfar.ops.convolution.separable import SeparableConv


class NeighbourAttention(nn.Module):
    """Additive attention of every node over the nodes that have an edge to it, separately at every time step.

        e[i, j, h, t] = PReLU(source[h, i, t] + target[h, j, t]; slope[i, j, h])          for every edge i -> j
        a[., j, h, t] = softmax over the sources i of j
        y[c, j, t]    = 1/H sum_h sum_i a[i, j, h, t] values[h, c, i, t]

    source, target: (B, H, N, T); values: (B, H, C, N, T) -> (B, C, N, T). The slope, one per (source, target, head),
    starts at 0 (ReLU) and may have any sign. Every node is a source of itself, whatever the adjacency says, so every
    softmax has a term. Weights are dropped out with rate `dropout` in training. Source: the score of graph attention
    networks (Velickovic et al. 2018, arXiv 1710.10903, eq. 3), with AGTCNet's slopes and its mean over heads.

    The graph is fixed: from the adjacency (N, N), rows sources, columns targets, nonzero an edge, tables of every
    node's K sources (K the largest in-degree, self included; shorter lists are padded and masked) are made once. Only
    edges are computed: O(B H N K (C + 1) T) time, O(B H N K T) memory beside values and result. A graph whose K is
    above N/2, and an adjacency given with a call, take the dense form, which masks the other pairs: O(B H N^2 (C + 1)
    T) and O(B H N^2 T). Both give the same numbers. Published code knows the dense form only and masks by adding
    -1e10, which half precision cannot hold; here masked scores are -inf, of weight exactly 0.

    Args:
        adjacency: (N, N) of 0 and 1. num_heads: H. dropout: rate on the attention weights.

    Raises ValueError for an adjacency that is not square or holds other values, or num_heads below 1.
    """

    sources: Tensor
    absent: Tensor
    readers: Tensor
    reader_slots: Tensor
    unread: Tensor
    adjacency: Tensor

    def __init__(self, adjacency: Tensor, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1] or len(adjacency) == 0:
            raise ValueError(f"adjacency has shape {tuple(adjacency.shape)}; expected (nodes, nodes)")
        if not ((adjacency == 0) | (adjacency == 1)).all():
            raise ValueError("adjacency must hold 0 and 1 only; a weighted graph has to be thresholded first")
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}; it must be at least 1")
        edges = (adjacency == 1).fill_diagonal_(True)
        n = len(edges)
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.slope = nn.Parameter(torch.zeros(n, n, num_heads))
        sources, exists = _neighbours(edges.T)  # (N, K): the sources of every target
        readers, reads = _neighbours(edges)  # (N, R): the targets of every source
        slot = torch.zeros(n, n, dtype=torch.long)  # [j, i]: place of source i in the list of target j
        target, place = exists.nonzero(as_tuple=True)
        slot[target, sources[target, place]] = place
        reader_slots = readers * sources.shape[1] + slot[readers, torch.arange(n)[:, None]]
        tables = {"sources": sources, "absent": ~exists, "readers": readers, "reader_slots": reader_slots}
        for name, table in (tables | {"unread": ~reads, "adjacency": edges}).items():
            self.register_buffer(name, table, persistent=False)
        self.sparse = 2 * sources.shape[1] <= n

    def forward(
        self,
        source: Float[Tensor, "b h n t"],
        target: Float[Tensor, "b h n t"],
        values: Float[Tensor, "b h c n t"],
        adjacency: Shaped[Tensor, "b n n"] | None = None,
    ) -> Float[Tensor, "b c n t"]:
        """adjacency: a graph for every sample instead of the fixed one, 1 an edge and any other value none."""
        if adjacency is not None or not self.sparse:
            return self.dense(source, target, values, adjacency)
        nodes = torch.arange(len(self.sources), device=source.device)
        scores = source.index_select(2, self.sources.flatten()).unflatten(2, self.sources.shape)
        slope = self.slope[self.sources, nodes[:, None]].permute(2, 0, 1)
        weights = self.weights(scores + target.unsqueeze(3), slope, self.absent[:, :, None], dim=3)
        return self.gather(weights.to(values.dtype), values)

    def dense(self, source: Tensor, target: Tensor, values: Tensor, adjacency: Tensor | None) -> Tensor:
        edges = self.adjacency
        if adjacency is not None:
            edges = ((adjacency == 1) | torch.eye(len(edges), dtype=torch.bool, device=edges.device)).unsqueeze(1)
        scores = source.unsqueeze(3) + target.unsqueeze(2)
        weights = self.weights(scores, self.slope.permute(2, 0, 1), ~edges.unsqueeze(-1), dim=2)
        return torch.einsum("bhijt,bhcit->bcjt", weights.to(values.dtype), values) / self.num_heads

    def weights(self, scores: Tensor, slope: Tensor, absent: Tensor, dim: int) -> Tensor:
        """Attention weights of scores (B, H, *pairs, T), softmax over the pair axis `dim`."""
        pairs = scores.shape[1:-1]
        scores = F.prelu(scores.flatten(1, 3), slope.flatten().to(scores.dtype)).unflatten(1, pairs)
        return self.dropout(scores.masked_fill_(absent, -math.inf).softmax(dim))

    def gather(self, weights: Tensor, values: Tensor) -> Tensor:
        """1/H sum_h sum_k weights[h, j, k, t] values[h, c, sources[j, k], t]: (B, C, N, T)."""
        if torch.compiler.is_compiling() or values.device.type not in ("cpu", "cuda"):
            neighbours = values[:, :, :, self.sources]  # (B, H, C, N, K, T), which the compiler never builds
            return (weights.unsqueeze(2) * neighbours).sum((1, 4)) / self.num_heads
        return _NeighbourMean.apply(weights, values, self.sources, self.readers, self.reader_slots, self.unread)


class _NeighbourMean(torch.autograd.Function):
    """The weighted sum over neighbours as one pass over the edges: an embedding bag for every node and time step.

    The bag's table are the values, one row of C channels per (sample, node, time, head). The gradient of the values is
    the same sum along the reversed edges, so nothing of the size of the gathered values exists in either direction.
    """

    @staticmethod
    def forward(ctx, weights, values, sources, readers, reader_slots, unread):
        ctx.save_for_backward(weights, values, sources, readers, reader_slots, unread)
        b, h, c, n, t = values.shape
        index = _rows(sources, b, t, h).flatten(-2)
        y = _bags(index, _channels_last(values), _bag_weights(weights, h))
        return y.view(b, n, t, c).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weights, values, sources, readers, reader_slots, unread = ctx.saved_tensors
        b, h, c, n, t = values.shape
        grad = grad.permute(0, 2, 3, 1).reshape(-1, c)
        grad_weights = grad_values = None
        if ctx.needs_input_grad[0]:
            index = _rows(sources, b, t, h).flatten(-2)
            with torch.enable_grad():
                bag_weights = _bag_weights(weights.detach(), h).requires_grad_()
                y = _bags(index, _channels_last(values.detach()), bag_weights)
            (grad_weights,) = torch.autograd.grad(y, bag_weights, grad)
            grad_weights = grad_weights.div_(h).view(b, n, t, h, -1).permute(0, 3, 1, 4, 2)
            del index, bag_weights, y
        if ctx.needs_input_grad[1]:
            read = weights.flatten(2, 3).index_select(2, reader_slots.flatten()).unflatten(2, readers.shape)
            bag_weights = _bag_weights(read.masked_fill_(unread[:, :, None], 0), h)
            del read
            index = _rows(readers, b, t, 1).expand(b, n, t, h, -1)
            grad_values = _bags(index, grad, bag_weights).view(b, n, t, h, c).permute(0, 3, 4, 1, 2)
        return grad_weights, grad_values, None, None, None, None


class GraphConvAttention(nn.Module):
    """Graph-convolutional attention (GCAT): graph attention whose projections are convolutions over time.

        w = SepConv_K(x), v = SepConv_K(x)                      H C' channels each, every node by itself
        source_h = SepConv_k(w_h), target_h = SepConv_k(w_h)    one channel per head
        y = NeighbourAttention(source, target, v) + bias

    x: (B, C, N, *S) -> (B, C', N, *S), N nodes with a series (or a grid of one or two axes) S each. The attention is
    computed at every time step; only the convolutions carry anything along time. `causal` pads them before, so that no
    later step is seen. SepConv is `SeparableConv` (batch norm and SELU included); the heads' score convolutions run as
    one. Source: AGTCNet, arXiv 2506.21338, as its released code computes it.

    Cost per step: O(N K C H C') for the projections and O(H N D (C' + 1)) for the attention, D the largest in-degree.

    Args:
        in_channels: C. out_channels: C', of each head and of the result. adjacency: (N, N), see `NeighbourAttention`.
        num_heads: H. kernel_size: K, score_kernel_size: k, a size or one per axis of S.
        depth_multiplier: m of all separable convolutions. dropout: rate on the attention weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        adjacency: Tensor,
        num_heads: int = 2,
        kernel_size: int | tuple[int, ...] = 8,
        score_kernel_size: int | tuple[int, ...] = 2,
        depth_multiplier: int = 4,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        kernel = (1, kernel_size) if isinstance(kernel_size, int) else (1, *kernel_size)
        score_kernel = (1, score_kernel_size) if isinstance(score_kernel_size, int) else (1, *score_kernel_size)
        width = num_heads * out_channels
        self.attention = NeighbourAttention(adjacency, num_heads, dropout)
        self.weight = SeparableConv(in_channels, width, kernel, depth_multiplier, causal=causal)
        self.value = SeparableConv(in_channels, width, kernel, depth_multiplier, causal=causal)
        self.score = SeparableConv(
            width, 2 * num_heads, score_kernel, depth_multiplier, groups=num_heads, branches=2, causal=causal
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(
        self, x: Float[Tensor, "b c n *s"], adjacency: Shaped[Tensor, "b n n"] | None = None
    ) -> Float[Tensor, "b d n *s"]:
        """adjacency: a graph for every sample instead of the fixed one, 1 an edge and any other value none."""
        heads, steps = self.attention.num_heads, x.shape[3:]
        scores = self.score(self.weight(x)).flatten(3).unflatten(1, (heads, 2))
        values = self.value(x).flatten(3).unflatten(1, (heads, -1))
        y = self.attention(scores[:, :, 0], scores[:, :, 1], values, adjacency)
        return (y + self.bias[:, None, None]).unflatten(3, steps)


def _neighbours(edges: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of every row's edges, and which of them exist: shorter lists are padded with the row itself."""
    longest = int(edges.sum(1).max())
    order = edges.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    exists = edges.gather(1, order)
    return order.where(exists, torch.arange(len(edges))[:, None]), exists


def _rows(nodes: Tensor, batch: int, steps: int, heads: int) -> Tensor:
    """(B, N, T, H, K): place of (b, nodes[n, k], t, h) in a table with one row per (sample, node, step, head)."""
    n = len(nodes)
    dtype = torch.int32 if batch * n * steps * heads < 2**31 else torch.int64
    b, t, h = (torch.arange(size, dtype=dtype, device=nodes.device) for size in (batch, steps, heads))
    first = (b[:, None, None] * n + nodes.to(dtype)) * (steps * heads)  # (B, N, K)
    return first[:, :, None, None] + (t[:, None] * heads + h)[:, :, None]


def _channels_last(values: Tensor) -> Tensor:
    """(B, H, C, N, T) as a table of rows (B N T H, C)."""
    return values.permute(0, 3, 4, 1, 2).reshape(-1, values.shape[2])


def _bag_weights(weights: Tensor, heads: int) -> Tensor:
    """(B, H, N, K, T) as (B, N, T, H, K), in memory too, divided by the number of heads."""
    return weights.permute(0, 2, 4, 1, 3).clone(memory_format=torch.contiguous_format).div_(heads)


def _bags(index: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `table`: one bag per entry of the leading axes of `index` (..., items)."""
    size = index.shape[-1]
    return F.embedding_bag(index.reshape(-1, size), table, mode="sum", per_sample_weights=weights.view(-1, size))
