"""Grouped convolutions of several dilations with exchanged channel groups, and the gates made of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import BATCH_NORMS, CONVOLUTIONS, check_dims, check_odd


class MultiDilatedConv(nn.Module):
    """y = sum_a roll(F_a(x), -a): F_a a convolution in as many groups as there are dilations, roll over the groups.

    MACMD (arXiv 2511.05803), hierarchical dilated convolution. With dilation a = 0 .. g-1 of `dilations` and the
    result F_a cut into g channel groups F_a[b], group m of the output is sum_a F_a[(a + m) mod g]: every output group
    sees every input group, each through another dilation. With bias. (B, C, *S) to the same for 1 to 3 axes; `causal`
    (1 axis) pads on the left alone. Cost: C k^dims per position, summed over g dilations of C / g inputs each.

    Raises:
        ValueError: for channels that g does not divide, an even kernel, or dims and causal that do not go together.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2, 3, 5),
        *,
        dims: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims, causal)
        check_odd(kernel_size=kernel_size)
        groups = len(dilations)
        if not groups or dim % groups:
            raise ValueError(f"dim is {dim}; it must be a multiple of the number of dilations, {groups}")
        self.reach = [d * (kernel_size - 1) if causal else 0 for d in dilations]
        self.convs = nn.ModuleList(
            CONVOLUTIONS[dims](
                dim, dim, kernel_size, padding=0 if causal else d * (kernel_size - 1) // 2, dilation=d, groups=groups
            )
            for d in dilations
        )

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        step = x.shape[1] // len(self.convs)
        y = torch.zeros_like(x)
        for a, (conv, reach) in enumerate(zip(self.convs, self.reach)):
            f = conv(F.pad(x, (reach, 0)) if reach else x)
            y = y + (torch.roll(f, -a * step, 1) if a else f)
        return y


class ContextGate(nn.Module):
    """y = r * sigmoid(BN(conv1(r))), r = relu(BN(MultiDilatedConv(x))); conv1 has one output channel and bias.

    The multi-dilated contextual attention gate of MACMD. (The published code multiplies what looks like the map
    before its ReLU; the ReLU works in place, so it is r.) (B, C, *S) to the same.
    """

    def __init__(self, dim: int, kernel_size: int = 3, dilations: Sequence[int] = (1, 2, 3, 5), *, dims: int = 2):
        super().__init__()
        self.context = MultiDilatedConv(dim, kernel_size, dilations, dims=dims)
        self.context_norm = BATCH_NORMS[dims](dim)
        self.gate = CONVOLUTIONS[dims](dim, 1, 1)
        self.gate_norm = BATCH_NORMS[dims](1)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        r = torch.relu(self.context_norm(self.context(x)))
        return r * torch.sigmoid(self.gate_norm(self.gate(r)))


class ChannelGate(nn.Module):
    """y = x * sigmoid(W2 relu(W1 mean(x))), no biases, C / `reduction` hidden channels (at least 1)."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, dim // reduction)
        self.reduce = nn.Linear(dim, hidden, bias=False)
        self.expand = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(x.flatten(2).mean(-1)))))
        return x * gate.view(*gate.shape, *[1] * (x.ndim - 2))


class SpatialGate(nn.Module):
    """y = x * sigmoid(conv([mean_c x, max_c x])), a size-7 convolution from 2 channels to 1 without bias (CBAM)."""

    def __init__(self, kernel_size: int = 7, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        check_odd(kernel_size=kernel_size)
        self.conv = CONVOLUTIONS[dims](2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class EfficientAttention(nn.Module):
    """Twice [MultiDilatedConv, BN, ReLU], then `ChannelGate`, then `SpatialGate`: MACMD's bottleneck (MEAB)."""

    def __init__(
        self, dim: int, reduction: int = 16, dilations: Sequence[int] = (1, 2, 3, 5), *, dims: int = 2
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(MultiDilatedConv(dim, 3, dilations, dims=dims) for _ in range(2))
        self.norms = nn.ModuleList(BATCH_NORMS[dims](dim) for _ in range(2))
        self.channel = ChannelGate(dim, reduction)
        self.spatial = SpatialGate(dims=dims)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        for conv, norm in zip(self.convs, self.norms):
            x = torch.relu(norm(conv(x)))
        return self.spatial(self.channel(x))
