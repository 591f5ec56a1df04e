"""Order of entries by their values, the same everywhere."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ranked(x: Float[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Indices of each row's entries, the largest first; equal ones keep their order. Cost O(N log N) a row.

    An exported program has `topk` in its place: ONNX has no stable sort, and its TopK puts the first of equals first.
    """
    if torch.compiler.is_exporting():
        return x.topk(x.shape[-1], dim=-1).indices
    return x.argsort(dim=-1, descending=True, stable=True)


def largest_mask(x: Float[Tensor, "*b n"], count: int) -> Bool[Tensor, "*b n"]:
    """Which entries of each row are its `count` largest; of equal ones the first. Cost O(N) a row, O(N log N) on a GPU.

    On a CPU NumPy's partition, where it is there, finds the smallest of them, in a third of the time of torch's topk.
    """
    if not 1 <= count <= x.shape[-1]:
        raise ValueError(f"count is {count}; rows have {x.shape[-1]} entries")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, ranked(x)[..., :count], True)
    if count == x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    least, next_largest = at_the_edge(x.detach(), count)
    if not (least == next_largest).any():
        return x >= least
    more, same = x > least, x == least  # equal ones, more than there is room for
    return more | (same & (same.cumsum(-1, dtype=torch.int32) <= count - more.sum(-1, keepdim=True)))


def at_the_edge(x: Float[Tensor, "*b n"], count: int) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b 1"]]:
    """The `count`-th largest entry of each row, and the next one."""
    work = x.contiguous().clone()
    # numbers that are not negative have the order of the integers of the same bits, which takes half the time
    keys = work.view(torch.int32) if x.dtype == torch.float32 and x.numel() and x.min() >= 0 else work
    try:
        keys.numpy().partition(-count)
    except (RuntimeError, TypeError):  # no NumPy, or a type that it has not
        largest = x.topk(count + 1, dim=-1).values
        return largest[..., -2, None], largest[..., -1, None]
    return work[..., -count, None], work[..., :-count].amax(-1, keepdim=True)
