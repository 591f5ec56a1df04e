"""Attention with a bias that is a sum over axes, without a tensor of queries by keys."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.ops.common.tables import cached_table


@cached_table
def coordinates(size: tuple[int, ...], device: torch.device) -> Int[Tensor, "n a"]:
    """Where every position of a grid lies, row-major."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in size)).reshape(-1, len(size))


@cached_table
def places(size: tuple[int, ...], device: torch.device) -> Float[Tensor, "n s"]:
    """(prod(size), sum(size)): for every position of a grid and every axis a one where it lies along that axis."""
    index = coordinates(size, device).unbind(1)
    lies = [at[:, None] == torch.arange(n, device=device) for at, n in zip(index, size, strict=True)]
    return torch.cat(lies, 1).float()


def extend(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    bias: Float[Tensor, "*c n s"],
    place: Float[Tensor, "*e m s"],
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h m e"]]:
    """Q, K with Q K^T = scale query key^T + bias place^T, in d + s channels.

    bias holds for every query what its logit gains from a key at each place of each axis, place (see `places`) where
    every key lies; so a bias of the form sum_a f_a(query, key's place along a) costs s channels instead of a tensor of
    n x m values, and plain attention kernels compute it exactly.
    """
    bias = bias.to(query.dtype).expand(*query.shape[:-1], -1)
    place = place.to(key.dtype).expand(*key.shape[:-1], -1)
    return torch.cat([query * scale, bias], -1), torch.cat([key, place], -1)


def attend(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h m d"], value: Float[Tensor, "b h m e"]
) -> Float[Tensor, "b h n e"]:
    """softmax(query key^T) value of extended queries and keys, in fused kernels where there are any.

    The kernels of a CPU want values as wide as keys; the zeros added here do not make them slower than the keys are.
    """
    width = value.shape[-1]
    padded = F.pad(value, (0, max(key.shape[-1] - width, 0)))
    return F.scaled_dot_product_attention(query, key, padded, scale=1.0)[..., :width]
