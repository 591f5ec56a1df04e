"""Order of entries by their values, the same everywhere."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ranked(x: Float[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Indices of each row's entries, the largest first; equal ones keep their order. Cost O(N log N) a row.

    An exported program has `topk` in its place: ONNX has no stable sort, and its TopK puts the first of equals first.
    """
    if torch.compiler.is_exporting():
        return x.topk(x.shape[-1], dim=-1).indices
    return x.argsort(dim=-1, descending=True, stable=True)
