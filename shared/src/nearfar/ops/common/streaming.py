"""What every causal sequence mixer shares: a parallel form, a streaming form, and padding handled by counting.

A `StreamingMixer` maps `(B, N, C)` to `(B, N, C)` in two ways that compute the same numbers:

    y = mixer(x)                                        # the whole sequence at once
    y1, state = mixer.extend(x[:, :5])                  # the first piece, no state yet
    y2, state = mixer.extend(x[:, 5:], state)           # any further piece, one position or many

A state is a tuple of tensors, batch first, so that a beam search reorders it with `index_select(0, beams)` and a
file keeps it as it is. Sequences of different lengths share a batch by `lengths`: row b of the piece holds
`lengths[b]` real positions, then padding. As every mixer is causal, padding at the end cannot reach the real
outputs; `lengths` only says where the state of each row stands.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


class StreamingMixer(nn.Module):
    """A causal operator on sequences: `forward` (parallel), `extend` (streaming) and `state_size`."""

    residual_included = False
    """Whether the output is the whole layer's, norm and residual included, not the branch of a residual."""

    @property
    def streams(self) -> bool:
        """Whether `extend` works: not with settings that need the whole sequence."""
        return all(part.streams for part in self.modules() if part is not self and isinstance(part, StreamingMixer))

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence at once, from an empty state."""
        raise NotImplementedError

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """The next piece of a sequence: its outputs and the state after it.

        Args:
            x: `(B, N, C)`, N >= 1.
            state: what the call before returned; None at the start of a sequence.
            lengths: `(B,)` integers 0..N, the real positions of each row (the rest is padding); None: all.
        """
        raise NotImplementedError

    def train_pass(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward` in training, and the auxiliary loss of a mixer that has one."""
        return self(x), None

    def reset_linear(self, num_layers: int) -> None:
        """Give linear maps their first values, where they are others than those of the model of `num_layers` around."""

    def state_size(self, length: int) -> int:
        """Numbers that one sequence of `length` tokens leaves behind, as the literature counts them."""
        raise NotImplementedError


class FullPrecision(nn.Module):
    """A module whose parameters stay in float32 or better when a model around it is turned to half precision: rates
    and phases that are multiplied by positions, where eight bits would be wrong after a few hundred."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullPrecision":
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.float16, torch.bfloat16) else out

        return super()._apply(keep, recurse)


def state_numbers(state: State) -> int:
    """Numbers that a state really holds per sequence, counters left out; a complex number counts as two."""
    floats = [t for t in state if t.is_floating_point() or t.is_complex()]
    return sum(t[0].numel() * (2 if t.is_complex() else 1) for t in floats)


def wide(x: Tensor) -> tuple[torch.dtype, torch.autocast]:
    """The type for sums over a whole text, float32 or x's if wider, and a context that keeps autocast out of them."""
    return torch.promote_types(x.dtype, torch.float32), torch.autocast(x.device.type, enabled=False)


PIECE = 2**19
"""Numbers of the input that `in_pieces` gives at once."""


def piece_length(x: Tensor) -> int:
    """Positions of x `(B, N, ...)` that `in_pieces` gives at once; operators divide it into chunks."""
    return max(1, PIECE // max(1, x[:, :1].numel()) // 256) * 256


def in_pieces(extend: Callable[..., tuple[Any, State]], x: Tensor) -> Any:
    """The outputs of `extend(x, state)`, a tensor or several, from an empty state.

    Without gradients on a CPU it goes piece by piece: what a piece needs stays in the caches, and is too small for the
    C library to give it back after every call and to fault it in anew. Retention of (1, 16384, 256) takes 343 ms in
    place of 596, Mamba 412 in place of 516, a gated convolution of 3 taps 34 in place of 53, sliding attention over 64
    positions 167 in place of 250 (EPYC, Zen 4, one thread).
    """
    size = piece_length(x)
    whole = torch.is_grad_enabled() or not x.is_cpu or torch.compiler.is_compiling()
    if whole or x.shape[1] < 2 * size:
        return extend(x)[0]
    out, state = None, None
    for start in range(0, x.shape[1], size):
        y, state = extend(x[:, start : start + size], state)
        parts = y if isinstance(y, tuple) else (y,)
        if out is None:
            out = tuple(part.new_empty(len(part), x.shape[1], *part.shape[2:]) for part in parts)
        for all_of_it, part in zip(out, parts):
            all_of_it[:, start : start + size] = part
    return out if isinstance(y, tuple) else out[0]


def real_positions(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Mask `(B, N)` of the real positions of `x` (B, N, ...); None where all are real."""
    return None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def shift_in(past: Tensor, new: Tensor, keep: int, lengths: Tensor | None = None) -> Tensor:
    """The last `keep` positions of `past` followed by the real positions of `new`; zeros before the beginning.

    Args:
        past: `(B, M, ...)`, its last position the most recent one.
        new: `(B, N, ...)`, real positions first.
        keep: positions to return.
        lengths: `(B,)` real positions of `new` per row; None: all N.

    Returns:
        `(B, keep, ...)`, again with the most recent position last.
    """
    if lengths is None and new.shape[1] >= keep:
        return new[:, new.shape[1] - keep :].clone()  # alone: a view would hold all of `new`
    both = torch.cat([past, new], dim=1)
    total = both.shape[1]
    if lengths is None:
        if keep > total:
            pad = both.new_zeros(both.shape[0], keep - total, *both.shape[2:])
            return torch.cat([pad, both], dim=1)
        return both[:, total - keep :]
    index = lengths[:, None] + past.shape[1] - keep + torch.arange(keep, device=new.device)
    shape = (*index.shape, *([1] * (both.dim() - 2)))
    picked = both.gather(1, index.clamp(0, total - 1).view(shape).expand(-1, -1, *both.shape[2:]))
    return picked * (index >= 0).view(shape)


def advance(seen: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """The counter of tokens per row `(B,)` after the piece `x`."""
    return seen + (x.shape[1] if lengths is None else lengths)
