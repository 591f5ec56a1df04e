"""Convolutions that mix a sequence (B, N, C) along N, in the layout that attention and linear layers use."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def depthwise_sequence(
    x: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c k"],
    left: int,
    right: int,
    dilation: int = 1,
) -> Float[Tensor, "b m c"]:
    """Depthwise convolution over a sequence without a transposed copy.

        y[t, c] = sum_j weight[c, j] * x[t + j * dilation - left, c],    x = 0 outside 0..N-1

    x: (B, N, C); weight: (C, K); left, right: zeros put before and after. Returns (B, N + left + right - (K-1) *
    dilation, C). Cost: O(N * C * K) time, O(N * C) memory.

    A sequence (B, N, C) is already a channels-last picture of one row, so a 2-D depthwise kernel runs on it as it lies;
    a dilation folds its phases into rows. `conv1d` does the rest: training (its gradients are faster), dilations on a
    GPU, and half precision on a CPU, where the picture form can hang in torch 2.14.
    """
    batch, frames, channels = x.shape
    width = weight.shape[1]
    learning = torch.is_grad_enabled() and weight.requires_grad
    if learning or (dilation > 1 if x.is_cuda else x.dtype in (torch.float16, torch.bfloat16)):
        padded = F.pad(x.transpose(1, 2), (left, right))
        return F.conv1d(padded, weight.unsqueeze(1), dilation=dilation, groups=channels).transpose(1, 2)
    surplus = -(frames + left + right) % dilation
    rows = F.pad(x, (0, 0, left, right + surplus)).unsqueeze(1)
    if dilation > 1:
        rows = rows.view(batch, -1, dilation, channels).transpose(1, 2).contiguous()
    y = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, None, None].contiguous(), groups=channels)
    out = frames + left + right - (width - 1) * dilation
    return y.permute(0, 3, 2, 1).reshape(batch, -1, channels)[:, :out]


def prepend_history(x: Float[Tensor, "b n c"], frames: int, state: dict, key: object) -> Float[Tensor, "b m c"]:
    """x with the last `frames` frames of the chunks before it (zeros at the start) in front; `state[key]` keeps them.

    x: (B, N, C), returns (B, frames + N, C).
    """
    past = state.get(key)
    joined = torch.cat([x.new_zeros(x.shape[0], frames, x.shape[2]) if past is None else past, x], dim=1)
    state[key] = joined[:, joined.shape[1] - frames :]
    return joined


def token_shift(
    x: Float[Tensor, "b n c"], state: dict | None = None, key: object = "token_shift"
) -> Float[Tensor, "b n c"]:
    """Delay the first half of the channels by one frame (zeros at frame 0); the second half stays.

    x: (B, N, C). With `state` (see `prepend_history`) the frame before the chunk comes from the chunk before it.
    Peng et al., RWKV, describe such a shift; the MossFormer release uses this half-and-half form. Cost O(N * C).
    """
    half = x.shape[-1] // 2
    late, now = x[..., :half], x[..., half:]
    late = F.pad(late[:, :-1], (0, 0, 1, 0)) if state is None else prepend_history(late, 1, state, key)[:, :-1]
    return torch.cat([late, now], dim=-1)


class ConvProjection(nn.Module):
    """Linear projection whose output also sees its neighbours in time: MossFormer's convolution module.

        h = SiLU(Linear(norm(x)));    y = Dropout(h + DW(h))

    DW is a depthwise convolution of `kernel_size` frames without bias. x: (B, N, dim) -> (B, N, dim_out).
    Cost O(N * dim_out * (dim + kernel_size)). Source: Zhao and Ma, MossFormer (ICASSP 2023), section 2.

    Args:
        dim, dim_out: channels in and out.
        norm: module applied to the input's channels (`ScaleNorm(dim)` or `nn.LayerNorm(dim)`).
        kernel_size: odd number of frames of the depthwise convolution.
        causal: pad only to the left, so that no frame sees a later one (needed for `state`).
        dropout: rate of the dropout behind the sum.

    Raises ValueError for an even or non-positive `kernel_size`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        norm: nn.Module,
        kernel_size: int = 17,
        causal: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be an odd number of frames, at least 1")
        self.norm = norm
        self.linear = nn.Linear(dim, dim_out)
        self.depthwise = nn.Parameter(torch.empty(dim_out, kernel_size))
        self.dropout = nn.Dropout(dropout)
        self.kernel_size, self.causal = kernel_size, causal
        nn.init.uniform_(self.depthwise, -(kernel_size**-0.5), kernel_size**-0.5)

    def pointwise(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """h of the formula: what one frame gives by itself; zero where `mask` is False."""
        h = F.silu(self.linear(self.norm(x)))
        return h if mask is None else h * mask.unsqueeze(-1)

    def convolve(self, h: Float[Tensor, "b n d"], left: int, right: int) -> Float[Tensor, "b m d"]:
        """h + DW(h) with `left` and `right` frames of zeros round h; the sum is one tap of the kernel."""
        centre = self.kernel_size - 1 if self.causal else self.kernel_size // 2
        taps = self.depthwise + F.one_hot(torch.tensor(centre, device=h.device), self.kernel_size)
        return self.dropout(depthwise_sequence(h, taps.to(h.dtype), left, right))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
    ) -> Float[Tensor, "b n d"]:
        """x: (B, N, dim). `mask`: True at real frames; the others do not reach them. `state`: history of a stream."""
        h = self.pointwise(x, mask)
        reach = self.kernel_size - 1
        if state is not None:
            return self.convolve(prepend_history(h, reach, state, self), 0, 0)
        return self.convolve(h, reach, 0) if self.causal else self.convolve(h, reach // 2, reach // 2)
