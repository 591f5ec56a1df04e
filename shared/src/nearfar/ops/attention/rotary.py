"""Rotary position embedding on interleaved pairs of channels."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=32)
def rotary_table(
    frames: int,
    dim: int,
    theta: float = 10000.0,
    offset: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """cos and sin of p * theta^(-2i/dim) for positions p = offset .. offset+frames-1 and i = 0 .. dim/2-1.

    Returns two tensors (frames, dim/2). Angles are reduced in float64, so hour-long streams keep their precision.

    Raises ValueError for an odd or non-positive dim.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; rotation needs an even number of channels, at least 2")
    with torch.inference_mode(False):  # a table made in inference mode could not be used in training
        rates = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.arange(offset, offset + frames, dtype=torch.float64)[:, None] * rates
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Float[Tensor, "*s c"], cos: Float[Tensor, "*t d"], sin: Float[Tensor, "*t d"]) -> Float[Tensor, "*s c"]:
    """Turn channel pairs (2i, 2i+1): (a, b) -> (a cos - b sin, b cos + a sin); channels past 2 d pass unchanged.

    x: (..., C); cos, sin: (..., d) with 2 d <= C, broadcast against x. Su et al., RoFormer (2021), eq. 34.
    Cost O(N * d).
    """
    turned = 2 * cos.shape[-1]
    a, b = x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([pairs, x[..., turned:]], dim=-1)
