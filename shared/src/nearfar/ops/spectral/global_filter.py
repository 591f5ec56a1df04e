"""A filter that is local in one half of the channels and global, through the Fourier transform, in the other."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import ChannelNorm, DepthwiseConv
from nearfar.ops.common.tables import Derived
from nearfar.ops.spectral.fourier import from_half_spectrum, half_spectrum


class GlobalLocalFilter(nn.Module):
    """out = LN(interleave(DW3x3(a), irfft2(K * rfft2(b)))), with (a, b) the channel halves of LN(x).

    The global-local filter of HorNet (Rao et al. 2022, section 3.2), whose global half is GFNet's filter (2021):
    a circular convolution with a kernel as large as the map. K is one complex (height, width) table per channel,
    stored as real pairs (C/2, h, w, 2) so that autocast, `.half()` and gradient buckets leave it whole. A map of
    H x W needs h = H and w = W // 2 + 1; for any other, the real and imaginary parts of K are resized bilinearly
    with aligned corners, as the published code does (kept per size while no gradient is needed). The transforms are
    orthonormal and run in float32 at least. Output channel 2i is local, 2i + 1 global.
    `forward` maps (B, C, H, W) to (B, C, H, W); cost O(C N log N). Not causal.

    Args:
        dim: channels C, even.
        height, width: size (h, w) of K; w counts the non-negative frequencies.

    Raises:
        ValueError: an odd `dim`, or a size below 1.
    """

    def __init__(self, dim: int, height: int = 14, width: int = 8) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim is {dim}; it must be even, one half is local and one global")
        if height < 1 or width < 1:
            raise ValueError(f"height and width are {height} and {width}; both must be at least 1")
        self.pre_norm = ChannelNorm(dim)
        self.dw = DepthwiseConv(dim // 2, 3, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, height, width, 2))
        nn.init.trunc_normal_(self.complex_weight, std=0.02)
        self.post_norm = ChannelNorm(dim)
        self._resized = Derived()

    def filter(self, height: int, width: int) -> Float[Tensor, "c h w 2"]:
        """K for a spectrum of `height` x `width`, real and imaginary parts last."""
        weight = self.complex_weight
        if weight.shape[1:3] == (height, width):
            return weight
        return self._resized.get(weight, (height, width), lambda: self._resize(height, width))

    def _resize(self, height: int, width: int) -> Tensor:
        parts = self.complex_weight.permute(3, 0, 1, 2)
        parts = F.interpolate(parts, size=(height, width), mode="bilinear", align_corners=True)
        return parts.permute(1, 2, 3, 0).contiguous()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        height, width = x.shape[-2:]
        local, spread = self.pre_norm(x).chunk(2, dim=1)
        local = self.dw(local)
        # none of the following is lowered by autocast
        spread = spread.contiguous() if spread.dtype == torch.float64 else spread.float().contiguous()
        kernel = self.filter(height, width // 2 + 1).to(spread.dtype).contiguous()
        if torch.compiler.is_exporting():  # ONNX runtimes have no complex numbers
            real, imaginary = half_spectrum(spread)
            a, b = kernel.unbind(-1)
            spread = from_half_spectrum(real * a - imaginary * b, real * b + imaginary * a, width)
        else:
            spectrum = torch.fft.rfft2(spread, norm="ortho") * torch.view_as_complex(kernel)
            spread = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
        mixed = torch.stack((local, spread.to(local.dtype)), dim=2).flatten(1, 2)
        return self.post_norm(mixed)
