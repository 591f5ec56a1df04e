"""Context-mixing dynamic convolution (ContMix) and the re-parameterized large kernels that go with it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.ops.common.dims import Conv2d, check_odd
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath, LayerScale, linear_map
from nearfar.ops.common.pooling import pool_to
from nearfar.ops.common.tables import cached_table
from nearfar.ops.convolution.reparam import DilatedReparam, ResidualDepthwise, fuse_pair


class ChannelGate(nn.Module):
    """x * sigmoid(W2 GELU(W1 mean(x))), hidden max(16, C // 8): squeeze and excitation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(16, dim // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), Conv2d(dim, hidden, 1), GELU(), Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x * self.proj(x)


class GlobalResponseNorm(nn.Module):
    """(gamma n + 1) x + beta, n = g / (mean_c g + 1e-6), g_c = ||x_c|| over the positions; gamma, beta start at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        energy = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        share = energy / (energy.mean(1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, x, self.gamma * share + 1)


class RepConvBlock(nn.Module):
    """LS(x') + W2 GRN(ResDW3(GELU(W1 SE(BN(DilatedReparam(LN(x'))))))) with x' = ResDW3(x).

    OverLoCK's basic block (2025). W1: C -> r C and W2 back are 1x1 and biased; LS is the identity where `layer_scale`
    is None. With `res_scale=False` the scale is on the branch instead: x' + LS(...).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float | int = 4.0,
        layer_scale: float | int | None = None,
        drop_path: float | int = 0.0,
        res_scale: bool = True,
        merged: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.res_scale = res_scale
        self.dwconv = ResidualDepthwise(dim, 3)
        self.proj = nn.Sequential(
            ChannelNorm(dim),
            DilatedReparam(dim, kernel_size, merged),
            nn.BatchNorm2d(dim),
            ChannelGate(dim),
            Conv2d(dim, hidden, 1),
            GELU(),
            ResidualDepthwise(hidden, 3),
            GlobalResponseNorm(hidden),
            Conv2d(hidden, dim, 1),
            DropPath(drop_path),
        )
        self.ls = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = self.dwconv(x)
        y = self.proj(x)
        return self.ls(x) + y if self.res_scale else x + self.ls(y)

    def fuse(self) -> "RepConvBlock":
        """Merge the large kernel with the norm after it."""
        fuse_pair(self.proj, 1)
        return self


class GridPool(nn.Module):
    """Average over a `size` x `size` grid of cells, as adaptive pooling; two small matrix products."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c p q"]:
        return pool_to(x, (self.size, self.size))


@cached_table
def window_start(length: int, kernel: int, device: torch.device) -> Int[Tensor, "n"]:
    """First index of the window of every position: centred, and shifted inward at the borders."""
    return (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)


@cached_table
def window_index(length: int, kernel: int, device: torch.device) -> Int[Tensor, "n k"]:
    """Indices in the window of every position."""
    return window_start(length, kernel, device)[:, None] + torch.arange(kernel, device=device)


@cached_table
def bias_index(length: int, kernel: int, device: torch.device) -> Int[Tensor, "n k"]:
    """Entry of a table of 2 k - 1 offsets for every tap of every position: offset of the tap, plus k - 1."""
    here = torch.arange(length, device=device)[:, None]
    return window_index(length, kernel, device) - here + kernel - 1


@cached_table
def band_index(length: int, kernel: int, device: torch.device) -> Int[Tensor, "nn"]:
    """Where (position, column) of a row's band matrix finds its weight in (position, taps and a zero), flattened."""
    column = torch.arange(length, device=device)
    tap = column - window_start(length, kernel, device)[:, None]
    tap = torch.where((tap >= 0) & (tap < kernel), tap, kernel)
    return (column[:, None] * (kernel + 1) + tap).flatten()


def clamped_window_sum(
    weights: Float[Tensor, "b g h k w k"], value: Float[Tensor, "b g c h w"]
) -> Float[Tensor, "b g c h w"]:
    """out[.., i, j] = sum_(p, q) weights[.., i, p, j, q] value[.., window row p of i, window column q of j].

    Windows of k x k are clamped, not padded: at a border they shift inward, so that every position sees k^2 others.
    All positions of a row share their window's rows, so that a row is one product of its (W, k W) band matrix of
    weights with the k rows of values. Cost N k W C, memory N k W per head and N k C for the values; no loop.

    Raises:
        ValueError: a map smaller than the window.
    """
    kernel, (height, width) = weights.shape[-1], value.shape[-2:]
    if not torch.compiler.is_exporting() and min(height, width) < kernel:
        raise ValueError(f"the map of {height} x {width} is smaller than the window of {kernel} x {kernel}")
    device = value.device
    band = F.pad(weights, (0, 1)).flatten(-2).index_select(-1, band_index(width, kernel, device))
    band = band.unflatten(-1, (width, width)).transpose(3, 4).flatten(4)  # b g h w (k w)
    rows = value.index_select(3, window_index(height, kernel, device).flatten())
    rows = rows.unflatten(3, (height, kernel)).permute(0, 1, 3, 4, 5, 2).flatten(3, 4)  # b g h (k w) c
    return (band @ rows).permute(0, 1, 4, 2, 3)


class ContextMixer(nn.Module):
    """Dynamic convolution whose kernel at a position comes from the position's affinity with pooled context.

    Lou and Yu, "OverLoCK" (2025), section 3.3. With G = 2 `num_heads` heads of C / (2 G) channels, queries
    Q = BN(Wq X) (C / G)^(-1/2) and keys K = BN(Wk pool_7x7(Z)): the affinities Q K^T to the 49 regions pass a linear
    map, shared by heads and positions, to s^2 + k^2 logits. Each part gets a relative position bias and a softmax,
    and sums a clamped window of the value: the small window (s x s) serves the first half of the channels, the large
    one (k x k) the second. The scale uses C / G although a head has half as many query channels, as published.

    Maps smaller than k are resized bilinearly until they are not, and the result is averaged back.
    The linear map is applied to the keys before the affinities are formed, which gives the same numbers with fewer
    multiply-adds. Cost N (C^2 + C (s^2 + k^2) / 2 + (s + k) W C / 2). Two-dimensional; not causal, as the regions
    see everything.

    Args:
        dim: channels C of query and value.
        context_dim: channels of the key's source.
        num_heads: half the number of heads G.
        kernel_size, small_kernel: k and s, odd.

    Raises:
        ValueError: even kernels, or channels that 4 `num_heads` does not divide.
    """

    regions = 7

    def __init__(self, dim: int, context_dim: int, num_heads: int, kernel_size: int, small_kernel: int = 5) -> None:
        super().__init__()
        check_odd(kernel_size=kernel_size, small_kernel=small_kernel)
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of 4 num_heads, num_heads is {num_heads}")
        self.heads = 2 * num_heads
        self.kernel_size, self.small_kernel = kernel_size, small_kernel
        self.scale = (dim / self.heads) ** -0.5
        self.rpb1 = nn.Parameter(torch.zeros(self.heads, 2 * small_kernel - 1, 2 * small_kernel - 1))
        self.rpb2 = nn.Parameter(torch.zeros(self.heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        half = dim // 2
        self.weight_query = nn.Sequential(Conv2d(dim, half, 1, bias=False), nn.BatchNorm2d(half))
        self.weight_key = nn.Sequential(
            GridPool(self.regions), Conv2d(context_dim, half, 1, bias=False), nn.BatchNorm2d(half)
        )
        self.weight_proj = nn.Linear(self.regions**2, small_kernel**2 + kernel_size**2)

    def kernels(
        self, source: Float[Tensor, "b c h w"], context: Float[Tensor, "b d p q"]
    ) -> tuple[Float[Tensor, "b g h s w s"], Float[Tensor, "b g h k w k"]]:
        """Small and large kernels of every position, summing to one."""
        height, width = source.shape[-2:]
        query = self.weight_query(source).mul(self.scale).flatten(2).unflatten(1, (self.heads, -1))
        key = self.weight_key(context).flatten(2).unflatten(1, (self.heads, -1))
        weight, bias = linear_map(self.weight_proj)
        key = F.linear(key, weight.to(key.dtype))
        logits = query.transpose(-2, -1) @ key + bias
        parts = logits.split((self.small_kernel**2, self.kernel_size**2), dim=-1)
        kernels = []
        for part, table, k in zip(parts, (self.rpb1, self.rpb2), (self.small_kernel, self.kernel_size), strict=True):
            rows, columns = bias_index(height, k, table.device), bias_index(width, k, table.device)
            bias = table[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(1, self.heads, -1, k * k)
            weights = (part + bias).softmax(-1)
            kernels.append(weights.unflatten(-1, (k, k)).unflatten(2, (height, width)).transpose(3, 4))
        return kernels[0], kernels[1]

    def mix(
        self, source: Float[Tensor, "b c h w"], context: Float[Tensor, "b d h w"], value: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """The mixed value, for query source, key source and value of one size."""
        size = tuple(value.shape[-2:])
        source, context, value = self.enlarge(source, context, value)
        enough = tuple(value.shape[-2:])
        halves = value.unflatten(1, (2, self.heads, -1)).unbind(1)
        kernels = self.kernels(source, context)
        mixed = [clamped_window_sum(k.to(v.dtype), v) for k, v in zip(kernels, halves, strict=True)]
        out = torch.cat([part.flatten(1, 2) for part in mixed], dim=1)
        return out if not torch.compiler.is_exporting() and enough == size else pool_to(out, size)

    def enlarge(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """The maps, bilinearly resized where the large window does not fit: the shorter side becomes k."""
        (height, width), k = maps[0].shape[-2:], self.kernel_size
        if torch.compiler.is_exporting():  # no branch on the size: a map that is large enough is resized to itself
            shorter = torch.sym_min(height, width)
            side = torch.sym_max(shorter, k)
            size = (height * side // shorter, width * side // shorter)
            return tuple(F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps)
        if min(height, width) >= k:
            return maps
        # truncated as the published code does
        size = (k, int(k / height * width)) if height < width else (int(k / width * height), k)
        return tuple(F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps)

    def attention_on_grid(self, weights: Tensor, size: tuple[int, int], at: tuple[int, int]) -> Tensor:
        """The weights (taps) of the position `at` on a grid of `size`."""
        plane = weights.new_zeros(size)
        rows, columns = (window_index(n, self.kernel_size, plane.device)[i] for n, i in zip(size, at, strict=True))
        plane[rows[:, None], columns] = weights.reshape(self.kernel_size, self.kernel_size)
        return plane


class ContMixBlock(ContextMixer):
    """A stand-alone block of context mixing: gated dynamic convolution with a local branch, then a convolutional MLP.

    Lou and Yu, "OverLoCK" (2025). y = LN(ResDW3(x)); m = BN(Wf mix(y, y, BN(Wv y))); m = SE(m + BN(DilatedReparam(y)));
    f = LS1(x') + W BN(SiLU(BN(Wg y)) m) with x' = ResDW3(x); out = LS2(f') + MLP(LN(f')) with f' = ResDW3(f).
    Position tables start truncated normal (0.02). (B, C, H, W) to (B, C, H, W) at any size.

    Args:
        dim, num_heads, kernel_size, small_kernel: see `ContextMixer`; heads are 2 `num_heads`.
        mlp_ratio: expansion of the MLP. layer_scale: initial scale of the shortcuts, None for none.
        drop_path: stochastic depth. res_scale: scales on the shortcuts (True) or on the branches.
        merged: the large kernel in its merged form from the start.
    """

    def __init__(
        self,
        dim: int = 64,
        kernel_size: int = 13,
        small_kernel: int = 5,
        num_heads: int = 2,
        mlp_ratio: float | int = 4.0,
        layer_scale: float | int | None = 1.0,
        drop_path: float | int = 0.0,
        res_scale: bool = True,
        merged: bool = False,
    ) -> None:
        super().__init__(dim, dim, num_heads, kernel_size, small_kernel)
        for table in (self.rpb1, self.rpb2):
            nn.init.trunc_normal_(table, std=0.02)
        self.res_scale = res_scale
        self.dwconv1 = ResidualDepthwise(dim, 3)
        self.norm1 = ChannelNorm(dim)
        self.weight_value = conv_bn(dim)
        self.fusion_proj = conv_bn(dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel_size, merged), nn.BatchNorm2d(dim))
        self.se_layer = ChannelGate(dim)
        self.gate = nn.Sequential(*conv_bn(dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), Conv2d(dim, dim, 1))
        self.dwconv2 = ResidualDepthwise(dim, 3)
        self.norm2 = ChannelNorm(dim)
        self.mlp = conv_mlp(dim, int(mlp_ratio * dim))
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = self.dwconv1(x)
        y = self.norm1(x)
        mixed = self.fusion_proj(self.mix(y, y, self.weight_value(y)))
        mixed = self.gate(y) * self.se_layer(mixed + self.lepe(y))
        x = self.add(x, self.ls1, self.proj(mixed))
        x = self.dwconv2(x)
        return self.add(x, self.ls2, self.mlp(self.norm2(x)))

    def add(self, x: Tensor, scale: nn.Module, branch: Tensor) -> Tensor:
        """Shortcut plus branch, one of them scaled."""
        return scale(x) + self.drop_path(branch) if self.res_scale else x + self.drop_path(scale(branch))

    def fuse(self) -> "ContMixBlock":
        """Merge the large kernel with the norm after it."""
        fuse_pair(self.lepe, 0)
        return self

    def attention_map(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g n m"]:
        """The large kernels, (B, heads, positions, taps of the window), rows summing to one."""
        y = self.norm1(self.dwconv1(x))
        return large_kernels(self, y, y)


def large_kernels(mixer: ContextMixer, source: Tensor, context: Tensor) -> Float[Tensor, "b g n m"]:
    """The large kernels of `mixer` with their taps on the last axis."""
    return mixer.kernels(*mixer.enlarge(source, context))[1].transpose(3, 4).flatten(4).flatten(2, 3)


def conv_bn(dim: int) -> nn.Sequential:
    """1x1 convolution without bias and batch norm."""
    return nn.Sequential(Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))


def conv_mlp(dim: int, hidden: int) -> nn.Sequential:
    """1x1 to `hidden`, GELU, ResDW3, GRN, 1x1 back; biased."""
    return nn.Sequential(
        Conv2d(dim, hidden, 1),
        GELU(),
        ResidualDepthwise(hidden, 3),
        GlobalResponseNorm(hidden),
        Conv2d(hidden, dim, 1),
    )
