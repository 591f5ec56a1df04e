"""Gaussian filtering of points in a feature space on the permutohedral lattice, in linear time."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class PermutohedralLattice:
    """Approximates `y_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j` for points with features f in R^d (j = i included).

    Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (2010). Each point lies in
    a simplex of the lattice A*_d, d + 1 vertices of which it is a barycentric mean. Values are *splatted* to those
    vertices with the barycentric weights, *blurred* along the d + 1 lattice directions one after the other with
    (1/2, 1, 1/2), and *sliced* back with the same weights, times 1 / (1 + 2^-d). Only vertices that some point touches
    exist: a neighbour that does not counts as zero and is not created, as in the C++ library behind DenseCRF. The
    result is not the Gaussian sum (a few per cent off where points are dense, more where they are scattered).

    The table depends on the features alone: build it once, filter as often as needed. A batch shares one table, each
    item with vertices of its own. Vertex keys are mixed-radix numbers in 64 bits, exact and without a hash table: all
    coordinates of a vertex are congruent modulo d + 1, and stepping in a lattice direction adds a constant to the key.

    Costs O(N d^2) to build and O((N + M) d C) to filter C channels, M <= N (d + 1) vertices. Splat, blur and slice are
    each one weighted gather (`embedding_bag`), so the order of summation is fixed and results repeat, also on a GPU.

    Args:
        features: (B, N, d), already divided by the standard deviations. No gradient flows into them.

    Raises:
        ValueError: for features that are no finite numbers, or spread so far that a key does not fit 63 bits.
    """

    def __init__(self, features: Float[Tensor, "b n d"]) -> None:
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values")
        features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        self.batch, self.points, self.dim = features.shape
        d, device = self.dim, features.device
        nearest, rank, weight = self._embed(features.flatten(0, 1).mT.contiguous())

        # vertex r of a simplex: coordinate i is (d + 1) a_i + r, with a_i = nearest_i, one lower where rank_i > d - r
        nearest = nearest[:d].long()
        nearest -= nearest.amin(1, keepdim=True) - 2  # so that a >= 1: the step to a neighbour may lower it by one
        radices = [d + 1, *(nearest.amax(1) + 2).tolist()]
        if self.batch * math.prod(radices) >= 2**63:
            raise ValueError(
                f"the features span {radices[1:]} lattice cells, more than a 63-bit key holds; "
                "use fewer features or larger standard deviations"
            )
        dtype = (
            torch.int32 if self.batch * math.prod(radices) < 2**31 else torch.int64
        )  # half the bits sort twice as fast
        strides = [math.prod(radices[:i]) for i in range(d + 2)]
        key = torch.arange(self.batch, dtype=dtype, device=device).repeat_interleave(self.points) * strides[-1]
        for column, stride in zip(nearest.to(dtype), strides[1:]):
            key.add_(column, alpha=stride)
        # from vertex r to r + 1 every coordinate grows by one, and the one of rank d - r falls by d + 1
        steps = key.new_tensor([*strides[1:-1], 0])[:, None].expand(-1, len(key))
        steps = 1 - torch.empty_like(steps).scatter_(0, d - rank, steps)
        keys = [key]
        for step in steps[:d]:
            keys.append(keys[-1] + step)

        # one sort gives the vertices that exist and, for each, the entries that touch it
        ordered, order = torch.cat(keys).sort(stable=True)
        is_first = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
        keys, starts = ordered[is_first], is_first.nonzero().flatten()
        self.vertices = len(keys)
        vertex = torch.empty_like(order, dtype=torch.int32)
        vertex[order] = is_first.cumsum(0, dtype=torch.int32) - 1
        self.slice_index = vertex.view(d + 1, -1).mT.flatten()
        self.slice_offset = torch.arange(0, len(order), d + 1, dtype=torch.int32, device=device)
        self.splat_index = (order % (self.batch * self.points)).int()
        # the last row, which no point touches, stands for "there is no such vertex"
        self.splat_offset = F.pad(starts.int(), (0, 1), value=len(order))
        # one pair of weights for the filter and one for its transpose: they differ once `scaled`
        self.slice_weight = [(weight / (1 + 2.0**-d)).mT.flatten()] * 2
        self.splat_weight = [weight.flatten()[order]] * 2
        self.blur_index = self._neighbours(keys, strides)
        self.blur_offset = torch.arange(0, 3 * self.vertices + 3, 3, dtype=torch.int32, device=device)
        self.blur_weight = features.new_tensor([1.0, 0.5, 0.5]).repeat(self.vertices + 1)

    def _embed(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest 0-coloured vertex / (d + 1), rank of each coordinate and barycentric weights, each (d + 1, P)."""
        d = self.dim
        scale = [math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
        scaled = features * features.new_tensor(scale)[:, None]
        # e_0 = sum_i s_i; e_j = sum_{i >= j} s_i - j s_{j-1}
        elevated = F.pad(scaled.flip(0).cumsum(0).flip(0), (0, 0, 0, 1))
        elevated[1:] -= scaled * torch.arange(1, d + 1, device=features.device)[:, None]
        nearest = torch.round(elevated / (d + 1))
        residual = elevated - nearest * (d + 1)
        nearest = nearest.int()
        rank = nearest.sum(0, dtype=torch.long).repeat(d + 1, 1)
        for i in range(d):  # of equal residuals the later coordinate has the higher rank
            lower = residual[i] < residual[i + 1 :]
            rank[i] += lower.sum(0)
            rank[i + 1 :] += ~lower
        shift = (rank < 0).int() - (rank > d).int()
        nearest += shift
        rank += (d + 1) * shift

        v = (elevated - nearest * (d + 1)) / (d + 1)
        weight = v.new_zeros(d + 2, v.shape[1])
        weight.scatter_add_(0, d - rank, v)
        weight.scatter_add_(0, d + 1 - rank, -v)
        weight[0] += 1 + weight[d + 1]
        return nearest, rank, weight[: d + 1]

    def _neighbours(self, keys: Tensor, strides: list[int]) -> Tensor:
        """(d + 1, 3 (M + 1)): a vertex and its two neighbours in each direction; M stands for "there is none"."""
        d, m = self.dim, len(keys)
        wraps = keys % (d + 1) == 0
        wrap = wraps.to(keys.dtype) * (d + 1 - sum(strides[1:-1]))
        table = torch.full((d + 1, m + 1, 3), m, dtype=torch.int32, device=keys.device)
        table[:, :m, 0] = torch.arange(m, dtype=torch.int32, device=keys.device)
        for j in range(d):
            target = keys + wrap + (strides[j + 1] - 1)
            place = torch.searchsorted(keys, target, out_int32=True).clamp_(max=m - 1)
            own = (keys[place] == target).nonzero().flatten()
            place = place[own]
            table[j, own, 1] = place
            table[j, place, 2] = own.int()
        # in the last direction the key falls by one: the key before it, unless the colour wraps round
        own = ((keys[1:] - keys[:-1] == 1) & ~wraps[1:]).nonzero().flatten() + 1
        place = own - 1
        wrapping = wraps.nonzero().flatten()
        target = (keys + wrap)[wrapping] - 1
        found = torch.searchsorted(keys, target).clamp_(max=m - 1)
        same = keys[found] == target
        own, place = torch.cat([own, wrapping[same]]), torch.cat([place, found[same]])
        table[d, own, 1] = place.int()
        table[d, place, 2] = own.int()
        return table.flatten(1)

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "PermutohedralLattice":
        """The filter `after * filter(before * values)` at no extra cost per call; before, after: (B, N), None for 1."""
        result = copy.copy(self)
        pair = [None if factor is None else factor.flatten() for factor in (before, after)]
        splat, slices = [], []
        for first, last, own_splat, own_slice in zip(pair, pair[::-1], self.splat_weight, self.slice_weight):
            splat.append(own_splat if first is None else own_splat * first[self.splat_index])
            slices.append(own_slice if last is None else own_slice * last.repeat_interleave(self.dim + 1))
        if before is after:
            splat[1], slices[1] = splat[0], slices[0]
        result.splat_weight, result.slice_weight = splat, slices
        return result

    def filter(self, values: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The filtered values, in their dtype. Differentiable in `values`, any number of times."""
        if values.shape[:2] != (self.batch, self.points):
            raise ValueError(f"values are {tuple(values.shape)}, the lattice holds {self.batch} x {self.points} points")
        filtered = _Filter.apply(values.flatten(0, 1).to(self.slice_weight[0].dtype), self, False)
        return filtered.view_as(values).to(values.dtype)

    def _apply(self, values: Tensor, reverse: bool) -> Tensor:
        """The filter of `(B N, C)`, or its transpose.

        On a CPU, more than 2^23 numbers go in parts of 8 channels and more: larger blocks (32 MB) leave the caches and
        are taken from the system anew by every operation. 21 channels over 788,300 vertices take 209 ms where they take
        274 in one part (EPYC, Zen 4, one thread).
        """
        rows = max(self.vertices, len(values))
        parts = min(values.shape[1] // 8, -(-rows * values.shape[1] // 2**23))
        if parts < 2 or values.is_cuda:
            return self._apply_part(values, reverse)
        out = torch.empty_like(values)
        for part, result in zip(values.tensor_split(parts, 1), out.tensor_split(parts, 1)):
            result.copy_(self._apply_part(part, reverse))
        return out

    def _apply_part(self, values: Tensor, reverse: bool) -> Tensor:
        nodes = _sums(values.contiguous(), self.splat_index, self.splat_offset, self.splat_weight[reverse])
        for index in self.blur_index.flip(0) if reverse else self.blur_index:
            nodes = _sums(nodes, index, self.blur_offset, self.blur_weight)
        return _sums(nodes, self.slice_index, self.slice_offset, self.slice_weight[reverse])


def _sums(rows: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of `rows[index]` from each offset to the next."""
    return F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weight)


class _Filter(torch.autograd.Function):
    """Splat and slice are each other's transpose and each blur is symmetric: the transpose blurs in reverse order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: PermutohedralLattice, reverse: bool) -> Tensor:
        ctx.lattice, ctx.reverse = lattice, reverse
        return lattice._apply(values, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Filter.apply(grad, ctx.lattice, not ctx.reverse), None, None
