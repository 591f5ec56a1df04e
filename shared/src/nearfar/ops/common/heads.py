"""Splitting channels into heads and joining them."""

import torch
from jaxtyping import Float
from torch import Tensor


def split_heads(x: Float[Tensor, "b c h w"], num_heads: int) -> Float[Tensor, "b heads n d"]:
    """The channels of a map as heads and its positions as tokens, laid out as attention kernels take it."""
    parts = x.flatten(2).mT.unflatten(2, (num_heads, -1)).transpose(1, 2)
    if parts.device.type == "cpu" and parts.stride(-1) == 1:
        return parts
    # CUDA's kernels refuse odd strides, which `contiguous` leaves where an axis has length one
    return parts.clone(memory_format=torch.contiguous_format)


def join_heads(x: Float[Tensor, "b heads n d"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Heads and tokens as a map again, channels-last."""
    return x.transpose(1, 2).flatten(2).mT.unflatten(2, (height, width))


def to_heads(x: Float[Tensor, "b n c"], num_heads: int) -> Float[Tensor, "b heads n d"]:
    """Channels as heads, head by head."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def from_heads(x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b n c"]:
    """Heads as channels again."""
    return x.transpose(1, 2).flatten(2)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `num_heads` is positive and divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads is {num_heads}; it must divide dim={dim}")
