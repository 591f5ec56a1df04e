"""Bi-level routing attention: every region of a grid attends to the few regions that are nearest in meaning."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.layers import DepthwiseConv, linear_map
from nearfar.ops.common.precision import full_precision
from nearfar.ops.common.tables import cached_table

PADDINGS = ("input", "values", "none")

MASKED_RATIO = 4
"""Up to so many times the routed keys, attention to all with a mask is faster than copying the routed ones together."""


class BiLevelRoutingAttention(nn.Module):
    """y = Wo(softmax(q K_I^T / sqrt(C)) V_I + DW_k(v)) over the regions I that the region of q keeps.

    The grid is cut into p regions along each axis. Q_r, K_r are the means of q and k over region r, all heads together
    and without gradient; region r keeps the `topk` regions s with the largest Q_r . K_s. Heads attend apart, but scale
    with the full width C. DW_k is a depthwise convolution of the values over the whole grid (local enhancement).
    q, k, v are one linear map of x, in this order. Zhu et al., BiFormer (2023, arXiv 2303.08810), section 3.2.

    A grid that p does not divide is a matter of `padding`:
    - "input": zeros after the last row and column of x, so that they carry the map's bias and take part everywhere,
      regions of ceil(S / p), as the published first form does (`auto_pad`);
    - "values": zeros after those of q, k, v, regions of max(floor(S / p), 1) positions, of which there may then be more
      or fewer than p; means leave the zeros out, the softmax does not (the published channels-first form);
    - "none": refused, as the published first form does unless told otherwise.
    Where p divides the grid all three are the same. Not causal: a region's choice depends on all of its queries.

    Routed keys and values are copied together where they are few, and otherwise (fewer than `MASKED_RATIO` times as
    many positions as routed keys) masked in attention to all, which the numbers allow and is faster, forwards and
    backwards; with every region kept there is no routing at all. Scores and choice are made in float32 at least: near
    ties flip with rounding. `forward` maps (B, C, *S) to itself. Cost O(N topk N / p^dims C + p^(2 dims) C).

    Args:
        dim, num_heads: channels C and heads.
        regions: p; topk: regions kept, at most all.
        kernel_size: k of the local enhancement, odd; 0 for none.
        qkv_bias: a bias in the map to q, k, v.

    Raises:
        ValueError: heads that do not divide `dim`, counts below 1, another padding; with "none", a grid that p does
            not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        regions: int = 7,
        topk: int = 4,
        kernel_size: int = 5,
        *,
        qkv_bias: bool = True,
        padding: str = "input",
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if regions < 1 or topk < 1:
            raise ValueError(f"regions is {regions} and topk {topk}; both must be at least 1")
        if padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}; allowed are {', '.join(map(repr, PADDINGS))}")
        self.dim, self.num_heads, self.regions, self.topk, self.dims = dim, num_heads, regions, topk, dims
        self.padding = padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = DepthwiseConv(dim, kernel_size, dims=dims) if kernel_size else None
        self.proj = nn.Linear(dim, dim)

    def cut(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Positions of a region along each axis of a grid, and of the grid that whole regions fill."""
        if self.padding == "none" and any(n % self.regions for n in size):
            raise ValueError(
                f"the grid is {size}; regions={self.regions} must divide its sizes, or padding='input' (the published "
                "auto_pad) or 'values'"
            )
        if self.padding == "values":
            region = tuple(max(n // self.regions, 1) for n in size)
            return region, tuple(-(-n // r) * r for n, r in zip(size, region, strict=True))
        region = tuple(-(-n // self.regions) for n in size)
        return region, tuple(self.regions * r for r in region)

    def route(self, x: Float[Tensor, "b *s c"]) -> tuple[Int[Tensor, "b r k"], Float[Tensor, "b r k"]]:
        """Regions that every region keeps, best first, and their scores Q_r . K_s / sqrt(C), for a channels-last x."""
        size = tuple(x.shape[1:-1])
        region, padded = self.cut(size)
        with torch.no_grad(), full_precision(x):
            exact = torch.promote_types(x.dtype, torch.float32)
            # means of q and k are the maps of x's means; what pads x ("input") counts, what pads q and k does not
            counts = (
                math.prod(region) if self.padding != "values" else _counts(size, padded, region, x.device).to(exact)
            )
            means = _sums(_pad(x.to(exact), padded), region) / counts
            weight, bias = (None if t is None else t[: 2 * self.dim].to(exact) for t in linear_map(self.qkv))
            query, key = F.linear(means, weight, bias).chunk(2, -1)
            scores = (query * self.dim**-0.5) @ key.mT
            best = scores.topk(min(self.topk, scores.shape[-1]), dim=-1)
        return best.indices, best.values

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        x = x.movedim(1, -1)
        size = tuple(x.shape[1:-1])
        region, padded = self.cut(size)
        count = math.prod([n // r for n, r in zip(padded, region, strict=True)])
        chosen = self.route(x)[0] if self.topk < count else None
        if self.padding == "input":
            x = _pad(x, padded)
        values = qkv = self.qkv(x)
        if self.padding == "values":
            qkv = _pad(qkv, padded)
        attended = self.attend(qkv, chosen, region)
        if self.padding == "values":
            attended = _crop(attended, size)
        if self.lepe is not None:
            attended = attended + self.lepe(values[..., 2 * self.dim :].movedim(-1, 1)).movedim(1, -1)
        return _crop(self.proj(attended), size).movedim(-1, 1)

    def attend(
        self, qkv: Float[Tensor, "b *s d"], chosen: Int[Tensor, "b r k"] | None, region: tuple[int, ...]
    ) -> Float[Tensor, "b *s c"]:
        """The attention of every region to those it has chosen, or to all; over a padded channels-last grid."""
        size, scale = tuple(qkv.shape[1:-1]), self.dim**-0.5
        positions, kept = math.prod(size), 0 if chosen is None else chosen.shape[-1] * math.prod(region)
        if chosen is None or positions <= MASKED_RATIO * kept:
            query, key, value = qkv.flatten(1, -2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            mask = None if chosen is None else self.mask(chosen, size, region).to(qkv.dtype)
            out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
            return out.transpose(1, 2).flatten(2).unflatten(1, size)
        query = _regions(qkv[..., : self.dim], region).flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        rows = _members(size, region, qkv.device)[chosen]  # (B, regions, topk, positions of a region)
        rows = rows + torch.arange(qkv.shape[0], device=rows.device)[:, None, None, None] * positions
        kv = qkv.flatten(0, -2)[:, self.dim :].index_select(0, rows.flatten())
        kv = kv.unflatten(0, (query.shape[0], -1)).unflatten(-1, (2, self.num_heads, -1))
        key, value = kv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
        return _grid(out.unflatten(0, (qkv.shape[0], -1)), size, region)

    @staticmethod
    def mask(chosen: Int[Tensor, "b r k"], size: tuple[int, ...], region: tuple[int, ...]) -> Float[Tensor, "b 1 n n"]:
        """0 for every query and key whose regions are joined, else -inf; positions in row-major order."""
        batch, count, _ = chosen.shape
        logits = torch.full((batch, count, count), -math.inf, device=chosen.device).scatter(2, chosen, 0.0)
        member = _member(size, region, chosen.device)
        return logits[:, None, member[:, None], member]

    def attention_map(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b 1 r r"]:
        """Where the regions look: 1 / topk for each region that a region keeps, else 0."""
        chosen = self.route(x.movedim(1, -1))[0]
        kept = torch.zeros(*chosen.shape[:2], chosen.shape[1], device=x.device)
        return kept.scatter(2, chosen, 1.0 / chosen.shape[-1])[:, None]


class EnhancedAttention(nn.Module):
    """y = Wo(softmax(q k^T / sqrt(d)) v + DW_k(u)), u the layer's input x or its values v: BiFormer's last stage.

    d = C / heads. q, k, v are one linear map of x, in this order. The published first form enhances the input, the
    channels-first one the values. `forward` maps (B, C, *S) to itself; cost O(N^2 C).

    Args:
        dim, num_heads: channels C and heads.
        kernel_size: k of the local enhancement, odd; 0 for none.
        enhance: "input" or "values".
        qkv_bias: a bias in the map to q, k, v.

    Raises:
        ValueError: heads that do not divide `dim`, another choice of `enhance`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int = 5,
        *,
        enhance: str = "input",
        qkv_bias: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if enhance not in ("input", "values"):
            raise ValueError(f"enhance is {enhance!r}; allowed are 'input' and 'values'")
        self.num_heads, self.enhance = num_heads, enhance
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = DepthwiseConv(dim, kernel_size, dims=dims) if kernel_size else None
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "b c *s"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N, d)."""
        qkv = self.qkv(x.flatten(2).mT)
        return tuple(qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        query, key, value = self.heads(x)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if self.lepe is not None:
            u = x if self.enhance == "input" else value.transpose(1, 2).flatten(2).mT.unflatten(2, x.shape[2:])
            out = out + self.lepe(u).flatten(2).mT
        return self.proj(out).mT.unflatten(2, x.shape[2:])

    def attention_map(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b heads n n"]:
        """The attention weights, rows summing to one."""
        query, key, _ = self.heads(x)
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)


def _pad(x: Num[Tensor, "b *s c"], size: tuple[int, ...]) -> Num[Tensor, "b *t c"]:
    """Zeros after the last positions of a channels-last grid."""
    missing = [want - n for want, n in zip(size, x.shape[1:-1], strict=True)]
    return F.pad(x, (0, 0, *(edge for n in reversed(missing) for edge in (0, n)))) if any(missing) else x


def _crop(x: Num[Tensor, "b *t c"], size: tuple[int, ...]) -> Num[Tensor, "b *s c"]:
    for axis, n in enumerate(size, 1):
        x = x.narrow(axis, 0, n)
    return x


def _regions(x: Num[Tensor, "b *s c"], region: tuple[int, ...]) -> Num[Tensor, "b r n c"]:
    """A channels-last grid as regions of positions, both row-major."""
    dims = len(region)
    x = x.reshape(
        x.shape[0], *(n for s, r in zip(x.shape[1:-1], region, strict=True) for n in (s // r, r)), x.shape[-1]
    )
    x = x.permute(0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
    return x.flatten(1, dims).flatten(2, -2)


def _sums(x: Float[Tensor, "b *s c"], region: tuple[int, ...]) -> Float[Tensor, "b r c"]:
    """The sums of a channels-last grid over its regions."""
    x = x.reshape(
        x.shape[0], *(n for s, r in zip(x.shape[1:-1], region, strict=True) for n in (s // r, r)), x.shape[-1]
    )
    return x.sum(tuple(range(2, 2 * len(region) + 1, 2))).flatten(1, -2)


def _grid(x: Float[Tensor, "b r n c"], size: tuple[int, ...], region: tuple[int, ...]) -> Float[Tensor, "b *s c"]:
    """Regions as a channels-last grid again."""
    dims = len(region)
    x = x.unflatten(2, region).unflatten(1, tuple(s // r for s, r in zip(size, region, strict=True)))
    x = x.permute(0, *(axis for a in range(1, dims + 1) for axis in (a, a + dims)), 2 * dims + 1)
    return x.reshape(x.shape[0], *size, x.shape[-1])


@cached_table
def _members(size: tuple[int, ...], region: tuple[int, ...], device: torch.device) -> Int[Tensor, "r n"]:
    """The positions of every region, counted row-major over the grid."""
    index = torch.arange(math.prod(size), device=device).reshape(1, *size, 1)
    return _regions(index, region)[0, ..., 0]


@cached_table
def _member(size: tuple[int, ...], region: tuple[int, ...], device: torch.device) -> Int[Tensor, " n"]:
    """The region of every position."""
    members = _members(size, region, device)
    index = torch.arange(len(members), device=device)[:, None].expand_as(members)
    return torch.zeros(math.prod(size), dtype=torch.long, device=device).scatter(0, members.flatten(), index.flatten())


@cached_table
def _counts(
    size: tuple[int, ...], padded: tuple[int, ...], region: tuple[int, ...], device: torch.device
) -> Float[Tensor, "r 1"]:
    """How many positions of every region are in the grid."""
    return _sums(_pad(torch.ones(1, *size, 1, device=device), padded), region)[0]
