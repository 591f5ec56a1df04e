"""Temporal convolution networks: stacks of dilated convolutions whose field grows by a factor from layer to layer."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.common.dims import check_dims
from nearfar.ops.common.kernels import one_node
from nearfar.ops.common.streaming import State, StreamingMixer, shift_in

DIRECTIONS = ("causal", "symmetric", "both")


def receptive_field(kernel_size: int, dilations: Sequence[int], layers_per_block: int = 1) -> int:
    """Positions that reach one output: `R = 1 + B (K - 1) sum_i dilation_i` with B layers per block."""
    return 1 + layers_per_block * (kernel_size - 1) * sum(dilations)


def choose_dilations(
    context: int, kernel_size: int, depth: int | None = None, layers_per_block: int = 1
) -> tuple[int, ...]:
    """Dilations 1, f, f^2, ... whose field covers `context` positions without holes, with the smallest integer f.

    Every position of the field reaches the output as long as each dilation is at most the field before it, which
    bounds f by `1 + B (K - 1)`. depth: number of blocks; None: the fewest.

    Raises ValueError where `depth` blocks cannot cover the context, saying how far they reach.
    """
    if min(context, kernel_size, layers_per_block) < 1 or (depth is not None and depth < 1):
        raise ValueError(
            f"context={context}, kernel_size={kernel_size}, depth={depth} and layers_per_block={layers_per_block} "
            "must be at least 1"
        )
    widest = 1 + layers_per_block * (kernel_size - 1)
    if depth is None:
        if widest == 1 and context > 1:
            raise ValueError(f"kernel_size=1 sees one position, whatever the dilations; {context} are wanted")
        depth = 1
        while widest**depth < context:
            depth += 1
    factor = next(
        (
            f
            for f in range(1, widest + 1)
            if receptive_field(kernel_size, [f**i for i in range(depth)], layers_per_block) >= context
        ),
        None,
    )
    if factor is None:
        raise ValueError(
            f"{depth} blocks of {layers_per_block} layers with kernel_size={kernel_size} cover at most "
            f"{widest**depth} positions without holes, fewer than context={context}; take more blocks or taps"
        )
    return tuple(factor**i for i in range(depth))


def dilated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, left: int, right: int, groups: int
) -> Tensor:
    """`F.conv1d` of x `(B, C, N)` with zeros left and right, its phases laid out as the columns of a picture.

    The picture (N / dilation, dilation) has an undilated kernel (K, 1): on a CPU the same time forward as dilated
    `conv1d` and a sixth of it backward. Depthwise, channels lie together in memory, as in the x^T that mixers have
    anyway: (1, 512, 8192) with 20 taps takes 11 ms forward in place of 49 and half the time backward (EPYC, one
    thread). Taps that reach zeros alone are left out.
    """
    depthwise = groups == x.shape[1] == len(weight)
    if depthwise and one_node(x):
        return _compiled_convolution(x.mT, weight, bias, dilation, left, right).mT
    n = x.shape[-1] + left + right - (weight.shape[-1] - 1) * dilation
    if right == 0 and left == (weight.shape[-1] - 1) * dilation and left >= x.shape[-1]:
        taps = max(1, -(-x.shape[-1] // dilation))
        weight, left = weight[..., -taps:], (taps - 1) * dilation
    if x.is_cuda:
        return F.conv1d(F.pad(x, (left, right)), weight, bias, dilation=dilation, groups=groups)
    surplus = -(x.shape[-1] + left + right) % dilation
    if depthwise:
        picture = F.pad(x.mT, (0, 0, left, right + surplus)).unflatten(1, (-1, dilation)).permute(0, 3, 1, 2)
        y = F.conv2d(picture, weight[..., None], bias, groups=groups)
        return y.permute(0, 2, 3, 1).flatten(1, 2)[:, :n].mT
    picture = F.pad(x, (left, right + surplus)).unflatten(-1, (-1, dilation))
    return F.conv2d(picture, weight[..., None], bias, groups=groups).flatten(-2)[..., :n]


@torch.library.custom_op("nearfar::dilated_convolution", mutates_args=())
def _compiled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, left: int, right: int
) -> Tensor:
    """The depthwise form of `(B, N, C)` as one node of a graph without gradients: inductor lays the picture out
    channels first, and takes two to three times as long."""
    return dilated_convolution(x.mT, weight, bias, dilation, left, right, len(weight)).mT.contiguous()


@_compiled_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, left: int, right: int) -> Tensor:
    n = x.shape[1] + left + right - (weight.shape[-1] - 1) * dilation
    return x.new_empty(x.shape[0], n, x.shape[2])


class DilatedStack(nn.Module):
    """Blocks of dilated convolutions: `z <- z + f(z)`, f being B times [convolution, SiLU], then dropout.

    Block i has dilation `dilations[i]` in all its layers. `(B, C, *S)` to the same; with `causal` an output sees only
    positions up to its own (one axis), else as many on both sides. Cost O(N C (C / groups) K^dims B D).

    Args:
        dim: channels C. kernel_size: taps K per axis; odd unless causal. dilations: of the blocks.
        layers_per_block: B. groups: of the convolutions; None: depthwise, 1: dense.
        causal: see above. dims: number of axes. dropout: rate behind each block.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        dilations: Sequence[int],
        layers_per_block: int = 1,
        groups: int | None = None,
        causal: bool = True,
        dims: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        groups = dim if groups is None else groups
        if min(dim, kernel_size, layers_per_block, groups, *dilations, len(dilations)) < 1 or dim % groups:
            raise ValueError(
                f"dim={dim}, kernel_size={kernel_size}, layers_per_block={layers_per_block} and dilations="
                f"{tuple(dilations)} must be at least 1, at least one block, and groups={groups} divide dim"
            )
        if not causal and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd where both sides are seen alike")
        self.dim, self.kernel_size, self.dilations, self.groups = dim, kernel_size, tuple(dilations), groups
        self.layers_per_block, self.causal, self.dims, self.p = layers_per_block, causal, dims, dropout
        shape = (dim, dim // groups, *(kernel_size,) * dims)
        count = layers_per_block * len(self.dilations)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(count))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(dim)) for _ in range(count))
        self.reset_parameters()

    @property
    def receptive_field(self) -> int:
        """Positions along one axis that reach an output."""
        return receptive_field(self.kernel_size, self.dilations, self.layers_per_block)

    @property
    def layers(self) -> list[tuple[int, Tensor, Tensor]]:
        """Dilation, weight and bias of each layer, in order."""
        every = [dilation for dilation in self.dilations for _ in range(self.layers_per_block)]
        return list(zip(every, self.weights, self.biases))

    def reset_parameters(self) -> None:
        """Weights N(0, 1 / fan-in), biases 0."""
        for weight, bias in zip(self.weights, self.biases):
            nn.init.normal_(weight, std=math.prod(weight.shape[1:]) ** -0.5)
            nn.init.zeros_(bias)

    def convolve(self, x: Tensor, dilation: int, weight: Tensor, bias: Tensor) -> Tensor:
        reach = (self.kernel_size - 1) * dilation
        if self.dims == 1:
            left, right = (reach, 0) if self.causal else (reach // 2, reach // 2)
            return dilated_convolution(x, weight, bias, dilation, left, right, self.groups)
        run = F.conv2d if self.dims == 2 else F.conv3d
        return run(x, weight, bias, padding=reach // 2, dilation=dilation, groups=self.groups)

    def forward(self, x: Float[Tensor, "b c *s"], mask: Bool[Tensor, "b *s"] | None = None) -> Float[Tensor, "b c *s"]:
        """`mask`: True at real positions; the others reach no position but themselves."""
        h = x
        for i, (dilation, weight, bias) in enumerate(self.layers, 1):
            h = F.silu(self.convolve(h if mask is None else h * mask[:, None], dilation, weight, bias))
            if i % self.layers_per_block == 0:
                x = h = x + F.dropout(h, self.p, self.training)
        return x


class TCNMixer(StreamingMixer):
    """The long memory of TCNCA: `y = silu(stack(x) + omega x)`, the stack being dilated convolutions over positions.

    Terzic et al. 2023 (arXiv 2312.05605) put a dilated causal convolution network where Mega has its moving average,
    with a larger field from fewer layers than Bai's network, in O(N). No code was released and only the abstract could
    be read, so the rest is inferred: block i has dilation f^i with a free factor f, SiLU and one residual per block,
    depthwise convolutions, so that d K B D + d (B D + 1) parameters stay near the 4 d n + d of the average, whose
    ending, silu with the skip omega, it keeps. K = 17, f = 17, D = 3 see 4913 positions.

    State: for each layer its last (K - 1) f^i inputs. Cost O(N d K B D).

    Args:
        dim: channels d. kernel_size: K. dilation_factor: f. depth: D. layers_per_block: B.
        groups: of the convolutions; None: depthwise, 1: dense.
        direction: "causal"; "symmetric", as many positions on both sides; or "both", a causal stack and another on the
            sequence turned round, summed. Only "causal" streams.
        dilations: of the blocks, instead of factor and depth (see `choose_dilations`).
        dropout: rate behind each block.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 17,
        dilation_factor: int = 17,
        depth: int = 3,
        layers_per_block: int = 1,
        groups: int | None = None,
        direction: str = "causal",
        dilations: Sequence[int] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r} must be one of {', '.join(DIRECTIONS)}")
        if dilations is None:
            if dilation_factor < 1 or depth < 1:
                raise ValueError(f"dilation_factor={dilation_factor} and depth={depth} must be at least 1")
            dilations = [dilation_factor**i for i in range(depth)]
        stack = lambda: DilatedStack(  # noqa: E731
            dim, kernel_size, dilations, layers_per_block, groups, direction != "symmetric", dropout=dropout
        )
        self.dim, self.direction = dim, direction
        self.stack, self.behind = stack(), stack() if direction == "both" else None
        self.omega = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @property
    def receptive_field(self) -> int:
        """Positions that reach an output: on one side, or on both together where `direction` is "symmetric"."""
        return self.stack.receptive_field

    @property
    def streams(self) -> bool:
        return self.direction == "causal"

    def reset_parameters(self) -> None:
        """omega ~ N(0, 1); the stacks reset themselves."""
        nn.init.normal_(self.omega)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        y = self.stack(x.mT, mask)
        if self.behind is not None:
            y = y + self.behind(x.mT.flip(-1), None if mask is None else mask.flip(-1)).flip(-1)
        return F.silu(y.mT + self.omega * x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        if self.direction != "causal":
            raise ValueError(f"direction={self.direction!r} needs the whole sequence, so it cannot stream")
        stack, after = self.stack, []
        z = h = x
        for i, (dilation, weight, bias) in enumerate(stack.layers):
            reach = (stack.kernel_size - 1) * dilation
            past = x.new_zeros(len(x), reach, self.dim) if state is None else state[i]
            after.append(shift_in(past, h, reach, lengths))
            if x.shape[1] == 1:  # only every dilation-th position counts
                both = torch.cat([past[:, ::dilation], h], 1)
                h = F.conv1d(both.mT, weight, bias, groups=stack.groups).mT
            elif state is None:
                h = stack.convolve(h.mT, dilation, weight, bias).mT
            else:
                h = dilated_convolution(torch.cat([past, h], 1).mT, weight, bias, dilation, 0, 0, stack.groups).mT
            h = F.silu(h)
            if (i + 1) % stack.layers_per_block == 0:
                z = h = z + F.dropout(h, stack.p, self.training)
        return F.silu(z + self.omega * x), tuple(after)

    def state_size(self, length: int) -> int:
        return self.dim * (self.receptive_field - 1)


class WeightNormedConv(nn.Module):
    """Causal convolution with `weight = g v / |v|`, g per output channel; `(B, C, N)` to `(B, C', N)`."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(dim_out))
        self.weight_g = nn.Parameter(torch.empty(dim_out, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(dim_out, dim, kernel_size))
        self.dilation = dilation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions N(0, 0.01) and their own lengths, biases uniform within 1 / sqrt(fan-in)."""
        nn.init.normal_(self.weight_v, std=0.01)
        bound = math.prod(self.weight_v.shape[1:]) ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)
        with torch.no_grad():
            self.weight_g.copy_(torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True))

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b d n"]:
        weight = self.weight_g * self.weight_v / torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True)
        reach = (weight.shape[-1] - 1) * self.dilation
        return dilated_convolution(x, weight, self.bias, self.dilation, reach, 0, 1)


class TemporalBlock(nn.Module):
    """`relu(f(x) + x)`, f being twice [weight-normed causal convolution, ReLU, dropout]; 1x1 on x for new widths."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int, dilation: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv1 = WeightNormedConv(dim, dim_out, kernel_size, dilation)
        self.conv2 = WeightNormedConv(dim_out, dim_out, kernel_size, dilation)
        self.downsample = nn.Conv1d(dim, dim_out, 1) if dim != dim_out else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b d n"]:
        h = self.dropout(F.relu(self.conv1(x)))
        h = self.dropout(F.relu(self.conv2(h)))
        return F.relu(h + self.downsample(x))


class TemporalConvNet(nn.Sequential):
    """The classic network: block i has dilation 2^i; it sees `1 + 2 (K - 1) (2^D - 1)` positions.

    Bai, Kolter and Koltun 2018 (arXiv 1803.01271, section 3). `(B, C, N)` to `(B, channels[-1], N)`, causal. The
    published code cuts the surplus that symmetric padding leaves on the right; here nothing is computed there.

    Args:
        dim: channels C. channels: of the blocks. kernel_size: K. dropout: rate behind each convolution.
    """

    def __init__(self, dim: int, channels: Sequence[int], kernel_size: int = 2, dropout: float = 0.2) -> None:
        if min(dim, kernel_size, *channels, len(channels)) < 1:
            raise ValueError(f"dim={dim}, channels={tuple(channels)} and kernel_size={kernel_size} must be at least 1")
        widths = [dim, *channels]
        super().__init__(
            *(
                TemporalBlock(before, after, kernel_size, 2**i, dropout)
                for i, (before, after) in enumerate(zip(widths, channels))
            )
        )
