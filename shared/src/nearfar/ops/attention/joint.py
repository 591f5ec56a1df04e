"""Joint attention: squared-ReLU attention inside groups of frames plus linear attention over the whole sequence."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.attention.rotary import rotary_table, rotate
from nearfar.ops.common.sequence_norms import ScaleNorm
from nearfar.ops.convolution.sequence import ConvProjection, token_shift


class JointAttention(nn.Module):
    """Local quadratic and global linear attention that share their values; no parameters.

    With all queries and keys rotated (`rotary`), P = `group_size`, N frames and g(t) = floor(t / P):

        local(t)  = sum_{s: g(s) = g(t)} relu(quad_q[t] . quad_k[s] / P)^2 values[s]
        global(t) = lin_q[t] (sum_s lin_k[s]^T values[s]) / N
        y = local + global

    quad_q, lin_q, quad_k, lin_k: (B, N, A); values: (B, N, E) -> (B, N, E). MossFormer passes its two value streams
    side by side, values = [v | u], so one attention matrix serves both. Cost O(N * (P * (A + E) + A * E)); nothing
    grows with N^2. Source: Zhao and Ma, MossFormer (ICASSP 2023), eqs. 4-9; Hua et al., FLASH (2022).

    `causal=True`: s <= t inside the group, and global(t) = lin_q[t] sum_{h < g(t)} M_h with M_h = sum_{s in h}
    lin_k[s]^T values[s] / P: only groups before the present one count. The released code does not divide this sum by
    the number of groups, so it grows along the file; `prefix_mean=True` divides it by g(t), which makes it a mean
    over the frames seen, as the non-causal form is over all frames.

    The released code copies every input to a multiple of P and has no mask: padding a batch there changes results.

    Args:
        group_size: P, frames per group. rotary_dim: channels turned, at most A. theta: base of the rotary angles.
        causal, prefix_mean: see above. dropout: rate on the local attention matrix.

    Raises ValueError for a group_size below 1, an odd rotary_dim, or prefix_mean without causal.
    """

    def __init__(
        self,
        group_size: int = 256,
        rotary_dim: int = 32,
        theta: float = 10000.0,
        causal: bool = False,
        prefix_mean: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}; it must be at least 1 frame")
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and at least 2")
        if prefix_mean and not causal:
            raise ValueError("prefix_mean divides the causal sum over past groups: it needs causal=True")
        self.group_size, self.rotary_dim, self.theta = group_size, rotary_dim, theta
        self.causal, self.prefix_mean = causal, prefix_mean
        self.dropout = nn.Dropout(dropout)

    def rotary(self, x: Float[Tensor, "b n *h a"], offset: int = 0) -> Float[Tensor, "b n *h a"]:
        """Rotary positions offset .. offset+N-1 on axis 1 of queries or keys."""
        dim = min(self.rotary_dim, x.shape[-1])
        cos, sin = rotary_table(x.shape[1], dim, self.theta, offset, x.device, x.dtype)
        heads = (1,) * (x.dim() - 3)
        return rotate(x, cos.view(-1, *heads, dim // 2), sin.view(-1, *heads, dim // 2))

    def summary(
        self, lin_k: Float[Tensor, "b n a"], values: Float[Tensor, "b n e"], count: Tensor | int
    ) -> Float[Tensor, "b a e"]:
        """sum_s lin_k[s]^T values[s] / count of rotated keys, in float32 at least. count: a number, or (B, 1, 1)."""
        root = count**-0.5 if isinstance(count, int) else count.to(values.dtype).rsqrt()
        total = (lin_k * root).mT @ values  # half of the division before the sum: no overflow in float16
        return total.to(torch.promote_types(total.dtype, torch.float32)) * root

    def local(
        self, quad_q: Float[Tensor, "b n a"], quad_k: Float[Tensor, "b n a"], values: Float[Tensor, "b n e"]
    ) -> Float[Tensor, "b n e"]:
        """The local sum of rotated queries and keys; frame 0 must begin a group."""
        frames, size = values.shape[1], self.group_size
        if frames < size:
            size = max(frames, 1)
        surplus = -frames % size
        quad_q, quad_k, values = (
            (F.pad(x, (0, 0, 0, surplus)) if surplus else x).unflatten(1, (-1, size)) for x in (quad_q, quad_k, values)
        )
        # relu(q k / P)^2 = relu(q k / sqrt(P))^2 / P: the matrix stays within float16's range
        scores = F.relu((quad_q * self.group_size**-0.5) @ quad_k.mT).square()
        if self.causal:
            scores = scores.tril()
        return (self.dropout(scores) @ values).flatten(1, 2)[:, :frames] * (1 / self.group_size)

    def forward(
        self,
        quad_q: Float[Tensor, "b n a"],
        lin_q: Float[Tensor, "b n a"],
        quad_k: Float[Tensor, "b n a"],
        lin_k: Float[Tensor, "b n a"],
        values: Float[Tensor, "b n e"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
        frames_at_once: int | None = None,
    ) -> Float[Tensor, "b n e"]:
        """Inputs as above, not yet rotated.

        mask: (B, N), True at real frames, which come first; N above is then each item's own number of them.
        state: a dict that carries a causal stream from one call to the next (rotated keys and values of the begun
            group, the sum over past groups, the frame counter); any chunk lengths give what the whole would.
        frames_at_once: non-causal only: sweep twice over pieces of about so many frames, first to gather the global
            sum, then to apply it. Same numbers; beyond inputs and output the memory no longer grows with N.
        """
        if mask is not None:
            values = values * mask.unsqueeze(-1)
        if self.causal:
            return self._causal(quad_q, lin_q, quad_k, lin_k, values, state)
        if state is not None:
            raise ValueError("a stream cannot see the whole sequence: build JointAttention with causal=True")
        frames = values.shape[1]
        count = frames if mask is None else mask.sum(1).view(-1, 1, 1)
        pieces = self.pieces(frames, frames_at_once)
        if len(pieces) == 1:
            memory = self.summary(self.rotary(lin_k), values, count)
            return self.attend(quad_q, lin_q, quad_k, values, memory, 0)
        memory = values.new_zeros(())
        for a, b in pieces:
            memory = memory + self.summary(self.rotary(lin_k[:, a:b], a), values[:, a:b], count)
        out = torch.empty_like(values)
        for a, b in pieces:
            out[:, a:b] = self.attend(quad_q[:, a:b], lin_q[:, a:b], quad_k[:, a:b], values[:, a:b], memory, a)
        return out

    def attend(
        self,
        quad_q: Float[Tensor, "b n a"],
        lin_q: Float[Tensor, "b n a"],
        quad_k: Float[Tensor, "b n a"],
        values: Float[Tensor, "b n e"],
        memory: Float[Tensor, "b a e"],
        offset: int,
    ) -> Float[Tensor, "b n e"]:
        """local + global for frames offset .. offset+N-1 (offset a multiple of P), the global sum being known."""
        local = self.local(self.rotary(quad_q, offset), self.rotary(quad_k, offset), values)
        lin_q = self.rotary(lin_q, offset)
        return local + lin_q @ memory.to(lin_q.dtype)

    def pieces(self, frames: int, frames_at_once: int | None) -> list[tuple[int, int]]:
        """Ranges of whole groups, at least one group and otherwise at most `frames_at_once` frames each."""
        step = frames if frames_at_once is None else max(1, frames_at_once // self.group_size) * self.group_size
        return [(a, min(a + step, frames)) for a in range(0, frames, max(step, 1))] or [(0, 0)]

    def _causal(
        self, quad_q: Tensor, lin_q: Tensor, quad_k: Tensor, lin_k: Tensor, values: Tensor, state: dict | None
    ) -> Tensor:
        size, frames = self.group_size, values.shape[1]
        if frames == 0:
            return values
        begun: tuple[Tensor, ...] = ()
        past, seen = values.new_zeros(()), 0
        if state is not None and self in state:
            begun, past, seen = state[self]
        quad_q, lin_q, quad_k, lin_k = (self.rotary(x, seen) for x in (quad_q, lin_q, quad_k, lin_k))
        held = seen % size  # frames of the begun group, kept from the calls before
        if held:
            quad_k, lin_k, values = (torch.cat(pair, dim=1) for pair in zip(begun, (quad_k, lin_k, values)))
            quad_q, lin_q = (F.pad(x, (0, 0, held, 0)) for x in (quad_q, lin_q))
        total = held + frames
        groups, first = -(-total // size), seen // size
        local = self.local(quad_q, quad_k, values)

        def grouped(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, groups * size - total)).unflatten(1, (groups, size))

        sums = grouped(lin_k * size**-0.5).mT @ grouped(values * size**-0.5)  # (B, G, A, E)
        sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
        prefix = sums.cumsum(1)
        before = past + torch.cat([torch.zeros_like(sums[:, :1]), prefix[:, :-1]], dim=1)
        if self.prefix_mean:
            number = torch.arange(first, first + groups, device=values.device).clamp(min=1)
            before = before / number.view(-1, 1, 1)
        far = (grouped(lin_q) @ before.to(lin_q.dtype)).flatten(1, 2)[:, :total]
        if state is not None:
            whole = total // size
            if whole:
                past = past + prefix[:, whole - 1 : whole]
            kept = tuple(x[:, whole * size :] for x in (quad_k, lin_k, values))
            state[self] = (kept, past, seen + frames)
        return (local + far)[:, held:]


class GatedAttentionBlock(nn.Module):
    """MossFormer's block: gated single-head attention with convolutions in every projection.

        x' = token_shift(x)
        [v | u] = ConvProjection(x')  (2 * E channels, E = expansion_factor * dim / 2);   z = ConvProjection(x')
        quad_q, lin_q, quad_k, lin_k = z * gamma_h + beta_h,  h = 0..3
        [a_v | a_u] = JointAttention(quad_q, lin_q, quad_k, lin_k, [v | u])
        y = x + ConvProjection((a_u * v) * sigmoid(a_v * u))

    x: (B, N, dim) -> (B, N, dim). Cost O(N * (expansion_factor * dim * (1.5 dim + P + A))), see `JointAttention`.
    Source: Zhao and Ma, MossFormer (ICASSP 2023), figure 2. The token shift is in the released code, not in the paper.

    Args:
        dim: channels. group_size: P. query_key_dim: A. expansion_factor: width of [v | u] over dim.
        rotary_dim, theta: rotary channels and base. kernel_size: of the depthwise convolutions. shift: token shift.
        causal: False; True, where no frame sees a later one and a stream can be carried; or "attention", the
            released code's `causal=True`, which leaves the convolutions symmetric and therefore looks ahead.
        dropout: rate in the projections and on the local attention matrix.

    Raises ValueError for an odd product expansion_factor * dim or another value of `causal`.
    """

    def __init__(
        self,
        dim: int,
        group_size: int = 256,
        query_key_dim: int = 128,
        expansion_factor: float = 4.0,
        rotary_dim: int = 32,
        theta: float = 10000.0,
        kernel_size: int = 17,
        shift: bool = True,
        causal: bool | str = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        width = int(dim * expansion_factor)
        if width < 2 or width % 2:
            raise ValueError(f"expansion_factor * dim is {width}; it is split in two and must be even, at least 2")
        if causal not in (False, True, "attention"):
            raise ValueError(f"causal is {causal!r}; it must be False, True or 'attention'")
        past_only = causal is True
        self.to_hidden = ConvProjection(dim, width, ScaleNorm(dim), kernel_size, past_only, dropout)
        self.to_qk = ConvProjection(dim, query_key_dim, ScaleNorm(dim), kernel_size, past_only, dropout)
        self.gamma = nn.Parameter(torch.randn(4, query_key_dim) * 0.02)
        self.beta = nn.Parameter(torch.zeros(4, query_key_dim))
        self.attention = JointAttention(group_size, rotary_dim, theta, bool(causal), past_only, dropout)
        self.to_out = ConvProjection(width // 2, dim, ScaleNorm(width // 2), kernel_size, past_only, dropout)
        self.shift = shift

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        state: dict | None = None,
        frames_at_once: int | None = None,
    ) -> Float[Tensor, "b n c"]:
        """x: (B, N, dim); mask, state and frames_at_once as in `JointAttention`.

        With `frames_at_once` the projections too are made piece by piece (twice, for the two sweeps), so that
        nothing but the output grows with N.
        """
        if frames_at_once is not None and not self.attention.causal and x.shape[1] > frames_at_once:
            return self._two_sweeps(x, mask, frames_at_once)
        shifted = token_shift(x, state, (self, "shift")) if self.shift else x
        values = self.to_hidden(shifted, mask, state)
        z = self.to_qk(shifted, mask, state)
        attended = self.attention(*self._queries_keys(z), values, mask, state)
        return x + self.to_out(self._gate(values, attended), mask, state)

    def _queries_keys(self, z: Tensor) -> tuple[Tensor, ...]:
        return (z.unsqueeze(2) * self.gamma + self.beta).unbind(2)

    @staticmethod
    def _gate(values: Tensor, attended: Tensor) -> Tensor:
        v, u = values.chunk(2, dim=-1)
        a_v, a_u = attended.chunk(2, dim=-1)
        return (a_u * v) * torch.sigmoid(a_v * u)

    def _two_sweeps(self, x: Tensor, mask: Tensor | None, frames_at_once: int) -> Tensor:
        frames, reach = x.shape[1], self.to_hidden.kernel_size // 2
        pieces = self.attention.pieces(frames, frames_at_once)
        count = frames if mask is None else mask.sum(1).view(-1, 1, 1)

        def project(a: int, b: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            lo, hi = max(a - reach, 0), min(b + reach, frames)
            start = max(lo - 1, 0)  # the token shift needs the frame before
            seen = None if mask is None else mask[:, lo:hi]
            shifted = (token_shift(x[:, start:hi]) if self.shift else x[:, start:hi])[:, lo - start :]
            values = self.to_hidden(shifted, seen)[:, a - lo : b - lo]
            if mask is not None:
                values = values * mask[:, a:b].unsqueeze(-1)
            return values, self._queries_keys(self.to_qk(shifted, seen)[:, a - lo : b - lo])

        memory = x.new_zeros(())
        for a, b in pieces:
            values, (_, _, _, lin_k) = project(a, b)
            memory = memory + self.attention.summary(self.attention.rotary(lin_k, a), values, count)
        out = torch.empty_like(x)
        held = x.new_zeros(x.shape[0], 2 * reach, x.shape[2])  # the output projection's frames, `reach` late
        for a, b in pieces:
            values, (quad_q, lin_q, quad_k, _) = project(a, b)
            attended = self.attention.attend(quad_q, lin_q, quad_k, values, memory, a)
            seen = None if mask is None else mask[:, a:b]
            h = torch.cat([held, self.to_out.pointwise(self._gate(values, attended), seen).to(x.dtype)], dim=1)
            y = self.to_out.convolve(h, 0, reach if b == frames else 0)
            held = h[:, h.shape[1] - 2 * reach :]
            y = y[:, max(reach - a, 0) :]  # from frame 0 on
            start = max(a - reach, 0)
            out[:, start : start + y.shape[1]] = x[:, start : start + y.shape[1]] + y
        return out
