"""How a batch of rows becomes a batch of texts: padding taken out, packed documents apart."""

from typing import Any

import torch
from torch import Tensor


class Layout:
    """Moves the real tokens of `(B, N)` rows to one row per text, at its front, and results back.

    A text is a row's real tokens, or with `starts` `(B, N)` each document that begins at a True (and the row's first
    tokens). Every mixer then sees unbroken texts, and `lengths` says how long they are.
    """

    def __init__(self, real: Tensor, starts: Tensor | None = None) -> None:
        rows, columns = real.shape
        begins = torch.zeros_like(real) if starts is None else starts & real & (real.cumsum(1) > 1)
        begins[:, 0] = True  # of an empty row too, so that every row has a text
        text = begins.flatten().cumsum(0) - 1
        order = real.flatten().cumsum(0) - 1  # among all real tokens
        count = int(text[-1]) + 1
        self.lengths = torch.zeros(count, dtype=torch.long, device=real.device)
        self.lengths.index_add_(0, text, real.flatten().long())
        before = self.lengths.cumsum(0) - self.lengths
        self.width = max(1, int(self.lengths.max()))
        place = text * self.width + (order - before[text]).clamp(min=0)
        source = torch.zeros(count * self.width, dtype=torch.long, device=real.device)
        flat = real.flatten()
        source[place[flat]] = flat.nonzero()[:, 0]
        self.source, self.place = source, place.view(rows, columns)
        self.last = text.view(rows, columns)[:, -1]
        self.packed = count > rows

    def pack(self, x: Tensor) -> Tensor:
        """`(B, N, ...)` to `(texts, longest, ...)`."""
        return x.flatten(0, 1)[self.source].unflatten(0, (len(self.lengths), self.width))

    def undo(self, x: Tensor) -> Tensor:
        """`(texts, longest, ...)` to `(B, N, ...)`; a padded position gets what the real one before it has."""
        return x.flatten(0, 1)[self.place]


def document_starts(
    shape: tuple[int, int],
    real: Tensor | None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
) -> Tensor | None:
    """Where documents begin, `(B, N)`, as packing collators tell it; None where no row holds a second one.

    position_ids `(B or 1, N)` that restart at 0, document numbers seq_idx `(B, N)`, or the cumulative lengths of the
    documents in a single row. Position ids that jump otherwise are an error.
    """
    rows, columns = shape
    found = []
    if position_ids is not None:
        check_shape("position_ids", position_ids, shape)
        position_ids = position_ids.expand(rows, columns)
        jump = torch.zeros(shape, dtype=torch.bool, device=position_ids.device)
        jump[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if real is not None:  # positions of padding say nothing, nor does the step out of it
            inside = real.clone()
            inside[:, 1:] &= real[:, :-1]
            jump &= inside
        if jump.any():
            wrong = jump & (position_ids != 0)
            if wrong.any():
                row, column = (int(i) for i in wrong.nonzero()[0])
                raise ValueError(
                    f"position_ids of row {row} jump from {int(position_ids[row, column - 1])} to "
                    f"{int(position_ids[row, column])}; they must count up and may restart at 0 for a new document"
                )
            found.append(jump)
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, shape)
        seq_idx = seq_idx.expand(rows, columns)
        change = torch.zeros(shape, dtype=torch.bool, device=seq_idx.device)
        change[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        if change.any():
            found.append(change)
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q.flatten().long()
        if rows != 1 or int(ends[0]) != 0 or int(ends[-1]) != columns:
            raise ValueError(
                f"cu_seq_lens_q runs from {int(ends[0])} to {int(ends[-1])}; it needs one row, here the shape is "
                f"{tuple(shape)}, and must run from 0 to its length"
            )
        change = torch.zeros(shape, dtype=torch.bool, device=ends.device)
        inner = ends[1:-1]
        change[0, inner[(inner > 0) & (inner < columns)]] = True
        if change.any():
            found.append(change)
    if not found:
        return None
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise ValueError("position_ids, seq_idx and cu_seq_lens_q place the documents differently")
    return found[0]


def check_shape(name: str, given: Tensor, shape: tuple[int, int]) -> None:
    if given.dim() != 2 or given.shape[1] != shape[1] or given.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} has shape {tuple(given.shape)}, it must be {tuple(shape)}")


IGNORED = {"num_items_in_batch", "cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""What trainers, `generate` and collators hand over and what says nothing that is not said otherwise."""


def check_arguments(given: dict[str, Any]) -> None:
    """Raise ValueError for an argument that the model would otherwise ignore in silence."""
    unknown = [
        name for name, value in given.items() if name not in IGNORED and value is not None and value is not False
    ]
    if unknown:
        raise ValueError(f"the model does not know {', '.join(sorted(unknown))}")
