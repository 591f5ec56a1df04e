"""Self-attention inside overlapping patches of a map, whose results are averaged where patches overlap."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import ChannelNorm
from nearfar.ops.common.tables import cached_table

AT_ONCE = 2**20
"""Numbers of the queries that are worked on together."""


class OverlappingPatchAttention(nn.Module):
    """x plus attention inside patches that overlap by `overlap` positions, averaged over the patches of a position.

    Square patches of p = `patch_size` stand at a step of p - overlap, the last of each axis moved back to end at the
    border. With z = norm(x), in patch P with heads of widths qk_dim / num_heads (q, k) and dim / num_heads (v),

        y_i^P = x_i + W_o sum_{j in P} softmax_j(q_i . k_j / sqrt(qk_dim / num_heads)) v_j,   y_i = mean_P y_i^P.

    x: (B, C, H, W), H and W at least p -> (B, C, H, W), channels-last. Linear maps have no bias. Cost: O(H W p^2 C).
    Source: Liu et al., CATANet (CVPR 2025), LRSA. The released code divides by two once per neighbouring pair, so
    that a row or column that three patches share comes out at 3/4: `averaging="published"` computes that.

    Raises ValueError for widths that the heads do not divide, an overlap outside [0, p / 2] or an unknown averaging.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        num_heads: int,
        patch_size: int,
        overlap: int = 2,
        *,
        averaging: str = "mean",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if dim % num_heads or qk_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide dim = {dim} and qk_dim = {qk_dim}")
        if not 0 <= overlap <= patch_size // 2:
            raise ValueError(f"overlap is {overlap}; it must be in [0, patch_size / 2 = {patch_size // 2}]")
        if averaging not in ("mean", "published"):
            raise ValueError(f"averaging is {averaging!r}; allowed are 'mean' and 'published'")
        self.num_heads, self.patch_size, self.overlap, self.averaging = num_heads, patch_size, overlap, averaging
        self.scale = (qk_dim // num_heads) ** -0.5
        self.norm = ChannelNorm(dim, eps=eps)
        self.q = nn.Linear(dim, qk_dim, bias=False)
        self.k = nn.Linear(dim, qk_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        size, (height, width) = self.patch_size, x.shape[2:]
        if min(height, width) < size:
            raise ValueError(f"the map is {height} x {width}; its sides must be at least patch_size = {size}")
        rows, columns = (patch_places(side, size, self.overlap, x.device) for side in (height, width))
        z = self.norm(x).movedim(1, -1)
        heads = []
        for linear in (self.q, self.k, self.v):
            cut = linear(z).index_select(1, rows).index_select(2, columns)
            cut = cut.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)  # (B, rows, columns, p, p, C)
            heads.append(cut.flatten(3, 4).flatten(0, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        y = attend(*heads, scale=self.scale).transpose(1, 2).flatten(2)
        y = y.reshape(len(x), len(rows) // size, len(columns) // size, size, size, -1).transpose(2, 3).flatten(1, 2)
        y = self.average(self.average(self.out(y).flatten(2, 3), 1, height), 2, width)
        if self.averaging == "mean":
            return x + y.movedim(-1, 1)
        cover = [self.shares(side, x).sum(0) for side in (height, width)]
        return x * (cover[0][:, None] * cover[1]) + y.movedim(-1, 1)

    def average(self, patches: Float[Tensor, "b m n c"], axis: int, side: int) -> Float[Tensor, "b p q c"]:
        """Rows (axis 1) or columns (2) of all patches, one after the other, added up to an axis of `side`."""
        total = torch.zeros((), dtype=patches.dtype, device=patches.device)
        sources = patch_sources(side, self.patch_size, self.overlap, patches.device)
        for source, share in zip(sources, self.shares(side, patches)):
            shape = [1] * patches.ndim
            shape[axis] = side
            total = total + patches.index_select(axis, source) * share.view(shape)
        return total

    def shares(self, side: int, like: Tensor) -> Float[Tensor, "k n"]:
        """Weight of each source of `patch_sources` at each position."""
        published = self.averaging == "published"
        return patch_shares(side, self.patch_size, self.overlap, published, like.dtype, like.device)


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "#b h m d"], v: Float[Tensor, "#b h m e"], scale: float
) -> Float[Tensor, "b h n e"]:
    """softmax(q k^T scale) v where queries and values have different widths: the fused kernels want one.

    Zeros fill the narrower up, which changes no product; on a GPU to a multiple of eight. Without gradients a CPU works
    on some of the batch at a time, which keeps what is filled up in its caches.
    """
    some = max(1, AT_ONCE // q[0].numel())
    if (
        q.is_cpu
        and len(q) > some
        and len(k) == len(q)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    ):
        out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        for i in range(0, len(q), some):
            out[i : i + some] = attend(*(t[i : i + some] for t in (q, k, v)), scale=scale)
        return out
    width, common = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if q.is_cuda:
        common += -common % 8
    q, k, v = (F.pad(t, (0, common - t.shape[-1])) if t.shape[-1] < common else t for t in (q, k, v))
    k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]


def patch_starts(side: int, size: int, overlap: int) -> list[int]:
    """First position of every patch along an axis."""
    step = size - overlap
    regular = list(range(0, side - size + 1, step))
    return regular if regular[-1] + size == side else [*regular, side - size]


@cached_table
def patch_places(side: int, size: int, overlap: int, device: torch.device) -> Tensor:
    """The positions of all patches along an axis, one patch after the other."""
    starts = torch.tensor(patch_starts(side, size, overlap), device=device)
    return (starts[:, None] + torch.arange(size, device=device)).flatten()


@cached_table
def patch_sources(side: int, size: int, overlap: int, device: torch.device) -> Tensor:
    """Where the values of each position stand among `patch_places`: (most patches of one position, side).

    A position of fewer patches repeats its first, with a share of nothing.
    """
    found = owners(side, size, overlap)
    most = max(map(len, found))
    return torch.tensor([[own[k] if k < len(own) else own[0] for own in found] for k in range(most)], device=device)


@cached_table
def patch_shares(
    side: int, size: int, overlap: int, published: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What each of `patch_sources` weighs: one divided by their number, or halved per pair as published."""
    found = owners(side, size, overlap)
    starts = patch_starts(side, size, overlap)
    step = size - overlap
    halves = [0] * side
    for i, start in enumerate(starts[1:], 1):
        for place in range(start, i * step + overlap):
            halves[place] += 1
    weight = [0.5 ** halves[i] if published else 1 / len(own) for i, own in enumerate(found)]
    most = max(map(len, found))
    shares = [[w if k < len(own) else 0.0 for w, own in zip(weight, found)] for k in range(most)]
    return torch.tensor(shares, dtype=dtype, device=device)


def owners(side: int, size: int, overlap: int) -> list[list[int]]:
    """For every position its places among `patch_places`."""
    found: list[list[int]] = [[] for _ in range(side)]
    for i, start in enumerate(patch_starts(side, size, overlap)):
        for offset in range(size):
            found[start + offset].append(i * size + offset)
    return found
