"""Mamba-2's state space duality (SSD): a selective scan with one decay per head, as matrix products over chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.ops.common.streaming import wide


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t` per head (Dao & Gu 2024, arXiv 2405.21060, sec. 6).

    Inside a chunk the output is `(L o C B^T) (dt x)` with L_ts = exp(c_t - c_s), s <= t, c the running sum of dt A:
    never above 1, so no length and no decay overflows. States pass between chunks only. Causal. In float32 or better.
    Cost O(N H (chunk (P + S) + P S)).

    Args:
        x: `(B, N, H, P)` input of H heads.
        dt: `(B, N, H)` step sizes, after softplus; 0 leaves the state alone.
        A: `(H,)`, negative.
        B, C: `(B, N, G, S)`, each group for H / G neighbouring heads.
        state: h before the first position `(B, H, P, S)`; None: zeros.
        chunk: positions per chunk; the result does not depend on it.

    Returns:
        y `(B, N, H, P)` in x's type, and the last state `(B, H, P, S)`.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    b, n, heads, p = x.shape
    groups, s = B.shape[2:]
    if heads % groups:
        raise ValueError(f"{groups} groups do not divide {heads} heads")
    dtype, unchanged = wide(x)
    chunk = min(chunk, n)
    pad = -n % chunk  # steps of dt = 0: they leave the state alone
    with unchanged:
        push, dt, B, C = (F.pad(t.to(dtype), (*(0, 0) * (t.dim() - 2), 0, pad)) for t in (x, dt, B, C))
        push = (push * dt[..., None]).unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))  # b c t g h p
        B, C = (t.unflatten(1, (-1, chunk)) for t in (B, C))  # b c t g s
        log_decay = (dt * A.to(dtype)).unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)).cumsum(2)  # b c t g h
        later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()[..., None, None]
        steps = (log_decay[:, :, :, None] - log_decay[:, :, None]).masked_fill(~later, -torch.inf).exp()
        weights = torch.einsum("bctgs,bcugs->bctug", C, B)[..., None] * steps
        y = torch.einsum("bctugh,bcughp->bctghp", weights, push)
        ends = log_decay[:, :, -1:]
        gained = torch.einsum("bctgs,bctghp->bcghps", B, push * (ends - log_decay).exp()[..., None])
        if state is None:
            state = torch.zeros(b, heads, p, s, dtype=dtype, device=x.device)
        h, before = state.to(dtype).unflatten(1, (groups, -1)), []
        for decay, gain in zip(ends[:, :, 0].exp().unbind(1), gained.unbind(1)):
            before.append(h)
            h = decay[..., None, None] * h + gain
        carried = torch.einsum("bctgs,bcghps->bctghp", C, torch.stack(before, 1))
        y = y + carried * log_decay.exp()[..., None]
    return y.flatten(3, 4).flatten(1, 2)[:, :n].to(x.dtype), h.flatten(1, 2)
