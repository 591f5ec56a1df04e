"""Linear maps of tokens as convolutions with one set of kernels for all tokens, electronic and in a 4f light path."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from nearfar.ops.common.tables import cached_table

PADDINGS = ("valid", "same")


def picture_of(features: int) -> tuple[int, int]:
    """The most nearly square (height, width) of so many pixels, height <= width: 192 features are 12 x 16."""
    if features < 1:
        raise ValueError(f"features is {features}; it must be at least 1")
    height = max(h for h in range(1, math.isqrt(features) + 1) if features % h == 0)
    return height, features // height


class SharedConv(nn.Module):
    """y[b, n, o] = x[b, n] * K[o] + bias[o] (correlation) for every token's features seen as an h x w picture.

    The layer of ConvShareViT (arXiv 2504.11517), from its description; no code of it is published. With padding
    "valid" and kernels as large as the picture it is exactly a linear map of h w features with the flattened kernels
    as rows, and runs as one; with smaller kernels a structured linear map of m (h - kh + 1) (w - kw + 1) outputs; with
    "same" it mixes only neighbouring features, m h w outputs. `tokens` gives every token kernels of its own.
    `forward` maps (*B, N, h w) to (*B, N, m h' w'), kernel after kernel, each picture row-major. Nothing passes between
    tokens. In light a token costs m kh kw h' w'; here shared kernels are laid out as one matrix, m h' w' h w a token,
    which on pictures of 8 to 32 pixels a side takes a half to a thirtieth of the time of so small convolutions.

    Args:
        picture: (h, w).
        kernels: m.
        kernel_size: (kh, kw); None for the whole picture. Odd with "same".
        padding: "valid" or "same".
        bias: one number a kernel (and token, where they are not shared).
        tokens: N, for kernels that are not shared; None to share them.

    Raises:
        ValueError: a kernel larger than its picture, an even one with "same", another padding.
    """

    def __init__(
        self,
        picture: Sequence[int],
        kernels: int,
        kernel_size: Sequence[int] | None = None,
        *,
        padding: str = "valid",
        bias: bool = True,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.picture = (picture[0], picture[1])
        self.kernel_size = self.picture if kernel_size is None else (kernel_size[0], kernel_size[1])
        if padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}; allowed are {', '.join(PADDINGS)}")
        if kernels < 1 or any(not 1 <= k <= n for k, n in zip(self.kernel_size, self.picture, strict=True)):
            raise ValueError(f"{kernels} kernels of {self.kernel_size} do not fit pictures of {self.picture}")
        if padding == "same" and any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size is {self.kernel_size}; with padding='same' it must be odd")
        self.kernels, self.padding, self.tokens = kernels, padding, tokens
        conv = nn.Conv2d(1, kernels * (tokens or 1), self.kernel_size, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias

    @property
    def in_features(self) -> int:
        return self.picture[0] * self.picture[1]

    @property
    def out_picture(self) -> tuple[int, int]:
        """(h', w') of one output picture."""
        if self.padding == "same":
            return self.picture
        return self.picture[0] - self.kernel_size[0] + 1, self.picture[1] - self.kernel_size[1] + 1

    @property
    def out_features(self) -> int:
        return self.kernels * self.out_picture[0] * self.out_picture[1]

    @property
    def is_linear(self) -> bool:
        """Whether the kernels are shared and as large as the picture, so that this is a plain linear layer."""
        return self.padding == "valid" and self.kernel_size == self.picture and self.tokens is None

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} features are no picture of {self.picture}")
        if self.is_linear:
            return F.linear(x, self.weight.flatten(1), self.bias)
        if self.tokens is None:
            bias = None if self.bias is None else self.bias.repeat_interleave(self.out_features // self.kernels)
            return F.linear(x, self.matrix(), bias)
        before = x.shape[:-1]
        pad = tuple(k // 2 for k in self.kernel_size) if self.padding == "same" else 0
        if len(before) < 1 or before[-1] != self.tokens:
            raise ValueError(f"{tuple(x.shape)} has not the {self.tokens} tokens that have kernels here")
        y = x.reshape(-1, self.tokens, *self.picture)
        y = F.conv2d(y, self.weight, self.bias, padding=pad, groups=self.tokens)
        return y.reshape(*before, self.out_features)

    def matrix(self) -> Float[Tensor, "d c"]:
        """The matrix of the linear map, for shared kernels."""
        if self.tokens is not None:
            raise ValueError("kernels that are not shared have one matrix a token")
        taps = _taps(self.picture, self.kernel_size, self.padding, self.weight.device)
        return F.pad(self.weight.flatten(1), (0, 1))[:, taps].flatten(0, 1)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear, picture: Sequence[int] | None = None) -> "SharedConv":
        """The convolutional form of a linear layer, with the same numbers."""
        picture = picture_of(layer.in_features) if picture is None else (picture[0], picture[1])
        if picture[0] * picture[1] != layer.in_features:
            raise ValueError(f"picture {picture} has not the layer's {layer.in_features} features")
        conv = cls(picture, layer.out_features, bias=layer.bias is not None).to(layer.weight)
        conv.weight.copy_(layer.weight.reshape(conv.weight.shape))
        if layer.bias is not None:
            conv.bias.copy_(layer.bias)
        return conv.train(layer.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The linear layer that gives the same numbers, for shared kernels."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(self.weight)
        layer.weight.copy_(self.weight.flatten(1) if self.is_linear else self.matrix())
        if self.bias is not None:
            layer.bias.copy_(self.bias.repeat_interleave(self.out_features // self.kernels))
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"picture={self.picture}, kernels={self.kernels}, kernel_size={self.kernel_size}, padding={self.padding}, "
            f"bias={self.bias is not None}, tokens={self.tokens}"
        )


@cached_table
def _taps(picture: tuple[int, int], kernel_size: tuple[int, int], padding: str, device: torch.device) -> Tensor:
    """Which weight of a flattened kernel joins an output (row) to an input (column); kh kw where none does."""
    near = []
    for n, k in zip(picture, kernel_size, strict=True):
        pad = k // 2 if padding == "same" else 0
        near.append(torch.arange(n) - torch.arange(n + 2 * pad - k + 1)[:, None] + pad)
    rows, columns = near[0][:, None, :, None], near[1][None, :, None, :]
    inside = (rows >= 0) & (rows < kernel_size[0]) & (columns >= 0) & (columns < kernel_size[1])
    taps = torch.where(inside, rows * kernel_size[1] + columns, math.prod(kernel_size))
    return taps.flatten(2).flatten(0, 1).to(device)


class Optical4f(nn.Module):
    """A `SharedConv` as a 4f light path does it: lens, mask in the Fourier plane, lens, camera; the same numbers.

    A modulator shows a picture as amplitude, which cannot be negative: x = x+ - x- and K = K+ - K- pass apart and the
    camera's pictures are subtracted, up to four passes for a picture and kernel (two where no picture has a negative
    value). The light path convolves truly, so the kernels are flipped; a lens is a forward transform, so the second
    one turns the picture by 180 degrees, which is undone in reading. `masks` are the complex transmissions in the
    Fourier plane, kernel by kernel, over an aperture of at least h + kh - 1 by w + kw - 1 pixels, so that nothing
    wraps round; `amplitude` and `phase` are what a modulator is set to. The camera reads the modulus.

    An ideal path (no diffraction of free space, lenses without aberration), differentiable through the pictures.
    With `bits`, modulator and camera have 2^bits levels between 0 and the largest value; with `photons`, the camera
    counts so many at the largest value, with Poisson noise on the intensity. `forward` maps as the convolution does.

    Args:
        conv: the layer, with shared kernels.
        bits: levels of modulator and camera; None for exact.
        photons: mean count of the brightest pixel; None for no noise.

    Raises:
        ValueError: kernels that are not shared, bits below 1, photons that are not positive.
    """

    masks: Complex[Tensor, "signs m rows columns"]

    def __init__(self, conv: SharedConv, *, bits: int | None = None, photons: float | int | None = None) -> None:
        super().__init__()
        if conv.tokens is not None:
            raise ValueError("kernels that are not shared would need one light path a token; give shared ones")
        if (bits is not None and bits < 1) or (photons is not None and photons <= 0):
            raise ValueError(f"bits is {bits} and photons {photons}; both must be positive, or None")
        self.bits, self.photons = bits, photons
        self.picture, self.out_picture = conv.picture, conv.out_picture
        self.kernel_size, self.padding = conv.kernel_size, conv.padding
        self.aperture = tuple(n + k - 1 for n, k in zip(conv.picture, conv.kernel_size, strict=True))
        with torch.no_grad():
            kernels = conv.weight.detach()[:, 0].flip(-2, -1)
            signs = torch.stack((kernels.clamp(min=0), (-kernels).clamp(min=0)))
            self.register_buffer("masks", torch.fft.fft2(signs, s=self.aperture))
            self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    @property
    def amplitude(self) -> Float[Tensor, "signs m rows columns"]:
        return self.masks.abs()

    @property
    def phase(self) -> Float[Tensor, "signs m rows columns"]:
        """Radians between -pi and pi."""
        return self.masks.angle()

    def passes(self, x: Float[Tensor, "*b c"]) -> int:
        """Exposures that these tokens take: tokens x kernels x signs of pictures and kernels."""
        signs = (2 if bool((x < 0).any()) else 1) * self.masks.shape[0]
        return x.shape[:-1].numel() * self.masks.shape[1] * signs

    def expose(self, pictures: Float[Tensor, "t h w"]) -> Float[Tensor, "t signs m rows columns"]:
        """What the camera reads for non-negative pictures behind every mask, turned back, before cropping."""
        field = torch.fft.fft2(self.levels(pictures), s=self.aperture)
        field = torch.fft.fft2(
            field[:, None, None] * self.masks, norm="forward"
        )  # a second lens: turned by 180 degrees
        read = field.abs()
        if self.photons is not None:
            brightest = read.detach().amax().clamp(min=torch.finfo(read.dtype).tiny)
            counts = torch.poisson((read.detach() / brightest).square() * self.photons)
            read = read + ((counts / self.photons).sqrt() * brightest - read.detach())
        return torch.roll(self.levels(read).flip(-2, -1), (1, 1), (-2, -1))

    def levels(self, x: Tensor) -> Tensor:
        """x in steps of the largest value over 2^bits - 1; gradients pass as if exact."""
        if self.bits is None:
            return x
        step = x.detach().amax().clamp(min=torch.finfo(x.dtype).tiny) / (2**self.bits - 1)
        return x + ((x / step).round() * step - x).detach()

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        pictures = x.reshape(-1, *self.picture)
        read = self.expose(pictures.clamp(min=0))
        if bool((pictures < 0).any()):
            read = read - self.expose((-pictures).clamp(min=0))
        y = read[:, 0] - read[:, 1]
        start = [k // 2 if self.padding == "same" else k - 1 for k in self.kernel_size]
        for axis, (first, n) in enumerate(zip(start, self.out_picture, strict=True)):
            y = y.narrow(axis + 2, first, n)
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y.reshape(*x.shape[:-1], -1)
