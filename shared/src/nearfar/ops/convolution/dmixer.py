"""D-Mixer: input-dependent depthwise convolution on half of the channels, attention over a coarse map on the other."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, Conv2d, check_dims, check_odd
from nearfar.ops.common.folding import fold_batch_norm, fold_into_next, scale_of_norm
from nearfar.ops.common.fused import FusedConv2d
from nearfar.ops.common.heads import join_heads, split_heads
from nearfar.ops.common.layers import GELU, DepthwiseConv
from nearfar.ops.common.pooling import pool_to
from nearfar.ops.convolution.dynamic import sample_depthwise


class ConvBN(nn.Module):
    """Convolution without bias, batch norm (eps 1e-5), GELU unless `act` is off. `fuse` folds the norm."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        act: bool = True,
        *,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if kernel_size == stride == 1 and groups == in_dim == dim:
            self.conv: nn.Module = DepthwiseConv(dim, 1, dims=dims, bias=False)
        else:
            self.conv = CONVOLUTIONS[dims](in_dim, dim, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn: nn.Module = BATCH_NORMS[dims](dim)
        self.act = GELU() if act else nn.Identity()
        self.dims = dims

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b d *t"]:
        return self.act(self.bn(self.conv(x)))

    @torch.no_grad()
    def fuse(self) -> "ConvBN":
        """Fold norm and GELU into the convolution, for inference; the outputs stay the same."""
        if isinstance(self.bn, nn.Identity):
            return self
        fold_batch_norm(self.conv, self.bn)
        self.bn = nn.Identity()
        if self.dims == 2:
            self.conv = FusedConv2d(self.conv, "gelu" if isinstance(self.act, nn.GELU) else "none")
            self.act = nn.Identity()
        return self

    @property
    def fused(self) -> nn.Module | None:
        """The one layer that does it all after `fuse`."""
        return self.conv if isinstance(self.conv, FusedConv2d) else None


class IDConv(nn.Module):
    """Depthwise convolution with kernel sum_g a_g W_g, a = softmax_g(P(pool(x))), one kernel per sample and channel.

    Lou et al., "TransXNet" (2025), section III-B. pool averages the map over a K x K grid; P is 1x1 C -> C / r, batch
    norm, GELU, 1x1 C / r -> C G; W_g are G banks of depthwise K x K kernels. The bias is mixed likewise from P of the
    global mean. In training P runs twice a step, so that its batch norm sees both maps, as in the published code.
    `forward` maps (B, C, *S) to (B, C, *S); cost C K^dims per position. Not causal.

    Args:
        dim: channels C.
        kernel_size: K, odd.
        groups: G, the number of banks.
        reduction: r.
        bias: whether there is one.
        dims: number of grid axes, 1, 2 or 3.

    Raises:
        ValueError: an even kernel, fewer than two banks, dims outside 1..3.
    """

    def __init__(
        self, dim: int, kernel_size: int = 7, groups: int = 2, reduction: int = 4, bias: bool = True, *, dims: int = 2
    ) -> None:
        super().__init__()
        check_dims(dims)
        check_odd(kernel_size=kernel_size)
        if groups < 2:
            raise ValueError(f"groups is {groups}; with fewer than 2 banks there is nothing to mix")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups, dim, *(kernel_size,) * dims))
        self.bias = nn.Parameter(torch.empty(groups, dim)) if bias else None
        for bank in (self.weight, self.bias):
            if bank is not None:
                nn.init.trunc_normal_(bank, std=0.02)
        hidden = max(dim // reduction, 1)
        self.proj = nn.Sequential(ConvBN(dim, hidden, 1, dims=dims), CONVOLUTIONS[dims](hidden, dim * groups, 1))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        pooled = pool_to(x, tuple(self.weight.shape[2:]))
        share = self.proj(pooled).unflatten(1, (self.groups, -1)).softmax(1)
        kernel = (share * self.weight).sum(1)
        bias = None
        if self.bias is not None:
            mean = x.mean(tuple(range(2, x.ndim)), keepdim=True)
            share = self.proj(mean).unflatten(1, (self.groups, -1)).softmax(1)
            bias = (share.flatten(2) * self.bias).sum(1).to(x.dtype)
        return sample_depthwise(x, kernel.to(x.dtype), bias)


class OverlappingReductionAttention(nn.Module):
    """softmax(q k^T / sqrt(C / heads) + P) v, with keys and values from a map reduced by an overlapping convolution.

    Lou et al., "TransXNet" (2025), section III-A (OSRA). With R > 1 the map passes a depthwise (R+3)-tap convolution
    of stride R, batch norm and GELU, then a per-channel scale with batch norm; y + DW3(y) of it gives keys and values
    (1x1, C -> 2C). There is no output projection. `forward` takes the map (B, C, H, W) and the additive table P
    (1, heads, N, M) or None, and gives (B, C, H, W); cost O(N^2 C / R^2).

    A table of another size is resized as a picture over its (N, M) axes, bicubically, as the published code does: the
    published numbers need it, although neighbours in that picture are not neighbours in the map. With
    `table="spatial"` it is resized over the four axes that N and M stand for, taken to be squares.

    Args:
        dim: channels C.
        num_heads: heads.
        sr_ratio: R.
        table: "flat" or "spatial".

    Raises:
        ValueError: heads that do not divide `dim`, a ratio below 1, an unknown `table`.
    """

    def __init__(self, dim: int, num_heads: int = 1, sr_ratio: int = 1, table: str = "flat") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio is {sr_ratio}; it must be at least 1")
        if table not in ("flat", "spatial"):
            raise ValueError(f"table is {table!r}; allowed are 'flat' and 'spatial'")
        self.num_heads, self.table = num_heads, table
        self.q = Conv2d(dim, dim, 1)
        self.kv = Conv2d(dim, 2 * dim, 1)
        self.sr = nn.Identity()
        if sr_ratio > 1:
            wide = sr_ratio + 3
            self.sr = nn.Sequential(
                ConvBN(dim, dim, wide, sr_ratio, wide // 2, groups=dim), ConvBN(dim, dim, 1, groups=dim, act=False)
            )
        self.local_conv = DepthwiseConv(dim, 3)

    def heads(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Queries, keys, values, (B, heads, tokens, C / heads), and the reduced map's size."""
        reduced = self.sr(x)
        reduced = reduced + self.local_conv(reduced)
        key, value = self.kv(reduced).chunk(2, dim=1)
        query, key, value = (split_heads(part, self.num_heads) for part in (self.q(x), key, value))
        return query, key, value, tuple(reduced.shape[-2:])

    def forward(
        self, x: Float[Tensor, "b c h w"], position: Float[Tensor, "1 heads n m"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        query, key, value, reduced = self.heads(x)
        if position is not None:
            position = resize_table(position, tuple(x.shape[-2:]), reduced, self.table).to(query.dtype)
            if not torch.is_grad_enabled():  # the fast kernels take no mask that asks for a gradient
                position = position.detach()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=position)
        return join_heads(out, *x.shape[-2:])

    def attention_map(
        self, x: Float[Tensor, "b c h w"], position: Float[Tensor, "1 heads n m"] | None = None
    ) -> Float[Tensor, "b heads n m"]:
        """The attention weights, rows summing to one: for every position its weight on every reduced position."""
        query, key, _, reduced = self.heads(x)
        logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if position is not None:
            logits = logits + resize_table(position, tuple(x.shape[-2:]), reduced, self.table)
        return logits.softmax(-1)


def resize_table(
    table: Float[Tensor, "1 heads n m"], size: tuple[int, ...], reduced: tuple[int, ...], way: str = "flat"
) -> Float[Tensor, "1 heads p q"]:
    """A table for maps of `size` and `reduced` size: see `OverlappingReductionAttention`."""
    wanted = (math.prod(size), math.prod(reduced))
    if table.shape[-2:] == wanted:
        return table
    if way == "flat":
        return F.interpolate(table, size=wanted, mode="bicubic", align_corners=False)
    heads, (n, m) = table.shape[1], (math.isqrt(length) for length in table.shape[-2:])
    over_keys = F.interpolate(
        table.reshape(heads, n * n, m, m), size=reduced, mode="bicubic", align_corners=False
    ).flatten(2)
    over_queries = F.interpolate(
        over_keys.transpose(1, 2).reshape(heads, -1, n, n), size=size, mode="bicubic", align_corners=False
    )
    return over_queries.flatten(2).transpose(1, 2)[None]


class DMixer(nn.Module):
    """z + STE(z), z = [IDConv(x1), OSRA(x2)] of the channel halves x1, x2.

    Lou et al., "TransXNet" (2025), section III. STE, the squeezed token enhancer, is DW3 -> GELU -> BN -> 1x1 to
    max(16, C / `reduction`) -> GELU -> BN -> 1x1 back -> BN, biased. `num_heads` acts on C / 2 channels. Takes and
    gives (B, C, H, W); `position` as in `OverlappingReductionAttention`.

    Raises:
        ValueError: an odd `dim`, and what the two halves refuse.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        groups: int = 2,
        num_heads: int = 1,
        sr_ratio: int = 1,
        reduction: int = 8,
        table: str = "flat",
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim is {dim}; it must be even")
        self.local_unit = IDConv(dim // 2, kernel_size, groups)
        self.global_unit = OverlappingReductionAttention(dim // 2, num_heads, sr_ratio, table)
        squeezed = max(16, dim // reduction)
        self.proj = nn.Sequential(
            DepthwiseConv(dim, 3),
            GELU(),
            nn.BatchNorm2d(dim),
            Conv2d(dim, squeezed, 1),
            GELU(),
            nn.BatchNorm2d(squeezed),
            Conv2d(squeezed, dim, 1),
            nn.BatchNorm2d(dim),
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], position: Float[Tensor, "1 heads n m"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        near, far = x.chunk(2, dim=1)
        mixed = torch.cat((self.local_unit(near), self.global_unit(far, position)), dim=1)
        return mixed + self.proj(mixed)

    def fuse(self) -> "DMixer":
        """Fold the enhancer's inner norms into the convolutions after them, for inference."""
        for i in (2, 5):
            if isinstance(self.proj[i], nn.BatchNorm2d):
                fold_into_next(self.proj[i], self.proj[i + 1])
                self.proj[i] = nn.Identity()
        return self


class MultiScaleFFN(nn.Module):
    """BN W2 BN GELU(u + [DW1, DW3, DW5, DW7](u)), u = BN GELU(W1 x): a feed-forward net with depthwise kernels.

    Lou et al., "TransXNet" (2025), section III-D. The hidden channels are split in equal parts, one per kernel size;
    the first takes the remainder. W1 and W2 are 1x1 convolutions without bias, the depthwise ones are biased.
    (B, C, *S) to (B, hidden or C, *S), 1 to 3 axes.

    Raises:
        ValueError: an even kernel size, fewer hidden channels than kernels, dims outside 1..3.
    """

    def __init__(
        self, dim: int, hidden: int, kernel_sizes: tuple[int, ...] = (1, 3, 5, 7), drop: float = 0.0, *, dims: int = 2
    ) -> None:
        super().__init__()
        check_dims(dims)
        part = hidden // len(kernel_sizes)
        if part < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least the number of kernels, {len(kernel_sizes)}")
        conv, norm = CONVOLUTIONS[dims], BATCH_NORMS[dims]
        self.widths = [hidden - part * (len(kernel_sizes) - 1), *[part] * (len(kernel_sizes) - 1)]
        self.fc1 = nn.Sequential(conv(dim, hidden, 1, bias=False), GELU(), norm(hidden))
        self.dwconv = nn.Module()
        self.dwconv.proj = nn.ModuleList(
            DepthwiseConv(width, size, dims=dims) for width, size in zip(self.widths, kernel_sizes, strict=True)
        )
        self.act = GELU()
        self.norm = norm(hidden)
        self.fc2 = nn.Sequential(conv(hidden, dim, 1, bias=False), norm(dim))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        u = self.fc1(x)
        if isinstance(self.dwconv, FusedConv2d):
            y = self.dwconv(u)
        else:
            parts = u.split(self.widths, dim=1)
            y = self.act(u + torch.cat([conv(part) for conv, part in zip(self.dwconv.proj, parts, strict=True)], dim=1))
        return self.drop(self.fc2(self.drop(self.norm(y))))

    @torch.no_grad()
    def fuse(self) -> "MultiScaleFFN":
        """Fold the norm before W2 into it, and make one depthwise convolution of the shortcut and all kernels."""
        if isinstance(self.norm, nn.Identity):
            return self
        fold_into_next(self.norm, self.fc2[0])
        self.norm = nn.Identity()
        self.fc1[2] = scale_of_norm(self.fc1[2], self.fc1[0].weight.ndim - 2)
        kernels = list(self.dwconv.proj)
        if kernels[0].weight.ndim != 4:
            return self
        wide = DepthwiseConv(sum(self.widths), max(conv.weight.shape[-1] for conv in kernels)).to(kernels[0].weight)
        size = wide.weight.shape[-1]
        wide.weight.copy_(
            torch.cat([F.pad(conv.weight, [(size - conv.weight.shape[-1]) // 2] * 4) for conv in kernels])
        )
        wide.weight[:, 0, size // 2, size // 2] += 1
        wide.bias.copy_(torch.cat([conv.bias for conv in kernels]))
        self.dwconv = FusedConv2d(wide, "gelu")
        return self
