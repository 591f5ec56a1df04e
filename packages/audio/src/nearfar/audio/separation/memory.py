"""How long a window may be so that separating it stays within a memory budget."""

from nearfar.audio.separation.mossformer import MossFormer, MossFormer2
from nearfar.core.memory import refuse_memory
from nearfar.core.tensor_memory import held_memory

LEAST_WINDOW = 4.0
"""Seconds; shorter windows are not chosen, the quality suffers."""

SURPLUS, RESERVE = 1.25, 128 << 20
"""What kernels and the allocator take beyond the tensors: a factor; and bytes for sound, embeddings and pages."""


def frame_bytes(model: MossFormer, frames_at_once: int | None = None) -> tuple[float, float]:
    """Most bytes of float32 tensors that the model holds at one time: per frame of its input, and beside that.

    With N filters, width D, hidden width W, query width A, K voices and groups of P the attention holds about
    N + 3 D + 4 W + 6 A + P numbers per frame, a recurrent block N + 2 D + 14 times its inner width, and what follows
    the blocks N + D + K (2 N + 2 D). Swept over pieces, only a piece at a time has the first.
    """
    block = model.blocks[0]
    filters, dim, group = model.encoder.out_features, model.dim, block.attention.group_size
    attention = filters + 3 * dim + 4 * block.to_hidden.linear.out_features + 6 * block.gamma.shape[1] + group
    others = filters + dim + model.num_speakers * 2 * (filters + dim)
    if isinstance(model, MossFormer2):
        others = max(others, filters + 2 * dim + 14 * model.recurrent[0].reduce.out_features)
    if frames_at_once is None:
        return 4 * max(attention, others), 0
    return 4 * others, 4 * attention * (max(frames_at_once, group) + 64)


def fit_window(model: MossFormer, budget: int, window: float) -> tuple[float, int | None]:
    """The window in s, at most `window`, and the `frames_at_once` with which the process stays below `budget` bytes.

    First the attention is swept over pieces of one group (same numbers, more time), where the model is not causal; then
    the window is shortened, to `LEAST_WINDOW` at the utmost. On a GPU the budget is that of the device's tensors.

    Raises UserError where the budget is too small, saying what would do.
    """
    device = next(model.parameters()).device
    held = held_memory(device)
    group = model.blocks[0].attention.group_size
    frames = model.sample_rate / model.stride  # per second
    seconds, least = 0.0, 0.0
    for frames_at_once in (None, group) if model.causal is False else (None,):
        each, fixed = (SURPLUS * part for part in frame_bytes(model, frames_at_once))
        seconds = (budget - held - RESERVE - fixed) / (each * frames)
        if seconds >= window:
            return window, frames_at_once
        least = fixed + each * frames * min(LEAST_WINDOW, window)
    if seconds < min(LEAST_WINDOW, window):
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        shares = {
            "the program": held - weights,
            "the model's weights": weights,
            f"{min(LEAST_WINDOW, window):g} s of sound in the model": least,
            "sound and pages": RESERVE,
        }
        raise refuse_memory(budget, shares)
    return seconds, frames_at_once
