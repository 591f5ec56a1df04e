"""Mega's multi-dimensional damped moving average: by FFT, in chunks with a scan, and step by step."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.ops.common.real_fft import rfft
from nearfar.ops.common.streaming import State, StreamingMixer, shift_in, wide
from nearfar.ops.common.tables import Derived
from nearfar.ops.convolution.causal import fast_length

CHUNK = 64
FORMS = ("fft", "scan")


class DampedEMA(StreamingMixer):
    """`y[t] = silu(sum_l k[l] x[t - l] + omega x[t])`, k a sum of `order` damped exponentials per channel:

        p = sigmoid(delta),  q = 1 - p sigmoid(alpha),  k[l] = sum_j gamma[j] / sqrt(n) p[j] beta[j] q[j]^l

    which as a recurrence is `h_t = q h_{t-1} + p beta x_t`, `sum_j gamma[j] / sqrt(n) h_t[j]`. Two-sided, a second set
    of the same parameters runs from behind, `sum_l k_2[l] x[t + l]`, both with l = 0. Positions where `mask` is False
    reach no other. Mega (Ma et al. 2022, arXiv 2209.10655, section 3).

    Forms with the same numbers, in float32 or better: "fft", O(N d log N), two-sided by one transform for both sides;
    "scan", chunks of 64 positions, matrix products inside and a scan of the states from chunk to chunk, O(N d (64 + 2
    n)); and `extend`, which carries h, d n numbers. Powers of q are products of two short tables, where the published
    code takes d n N exponentials, and in evaluation it keeps a kernel although weights change; here changed weights
    are seen. With `truncation`, only the kernel's first taps count. The published step ignores that; here a stream
    equals the whole, at the price of the last inputs as state.

    Args:
        dim: channels d. order: exponentials n per channel.
        bidirectional: two-sided; cannot stream.
        truncation: taps of the kernel; None: all.
        form: of `forward`.
    """

    no_weight_decay = ("delta", "alpha", "beta", "gamma")

    def __init__(
        self,
        dim: int,
        order: int = 16,
        bidirectional: bool = False,
        truncation: int | None = None,
        form: str = "fft",
    ):
        super().__init__()
        if dim < 1 or order < 1 or (truncation is not None and truncation < 1):
            raise ValueError(f"dim={dim}, order={order} and truncation={truncation} must be at least 1")
        if form not in FORMS or (form == "scan" and truncation is not None):
            raise ValueError(
                f"form={form!r} must be one of {', '.join(FORMS)}; with a truncation only 'fft' is possible"
            )
        self.dim, self.order, self.bidirectional, self.truncation, self.form = (
            dim,
            order,
            bidirectional,
            truncation,
            form,
        )
        rows = 2 * dim if bidirectional else dim
        self.delta, self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(rows, order)) for _ in range(4))
        self.omega = nn.Parameter(torch.empty(dim))
        self.kept = Derived()
        self.reset_parameters()

    @property
    def streams(self) -> bool:
        return not self.bidirectional

    def reset_parameters(self) -> None:
        """delta, alpha ~ N(0, 0.2), beta = +1, -1, +1, ... over j plus N(0, 0.02), gamma, omega ~ N(0, 1)."""
        for parameter, std in (
            (self.delta, 0.2),
            (self.alpha, 0.2),
            (self.beta, 0.02),
            (self.gamma, 1),
            (self.omega, 1),
        ):
            nn.init.normal_(parameter, std=std)
        with torch.no_grad():
            self.beta += 1 - 2 * (torch.arange(self.order, device=self.beta.device) % 2)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """log q, p beta and gamma / sqrt(n), each `(d or 2 d, n)`, in float32 or better."""
        delta, alpha, beta, gamma = (t.to(wide(t)[0]) for t in (self.delta, self.alpha, self.beta, self.gamma))
        p = torch.sigmoid(delta)
        return torch.log1p(-p * torch.sigmoid(alpha)), p * beta, gamma * self.order**-0.5

    def taps(self, length: int) -> Tensor:
        """k, `(d or 2 d, K)` with K = length or the truncation, whichever is less."""
        length = length if self.truncation is None else min(length, self.truncation)

        def compute() -> Tensor:
            log_q, write, read = self.coefficients()
            coarse, fine = powers(log_q, length)
            return ((write * read)[:, None] * coarse @ fine).flatten(1)[:, :length]

        others = tuple((t.data_ptr(), t._version) for t in (self.delta, self.alpha, self.beta))
        return self.kept.get(self.gamma, (length, *others), compute)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        real = x if mask is None else x * mask[..., None]
        dtype, unchanged = wide(x)
        with unchanged:
            u = real.to(dtype).mT
            if self.form == "scan":
                y = self.scan(u)
            else:
                k = self.taps(x.shape[1])
                size = fast_length(x.shape[1] + k.shape[-1] - 1)
                spectrum = rfft(k, size)
                if self.bidirectional:  # a kernel turned round has the conjugate spectrum
                    spectrum = spectrum[: self.dim] + spectrum[self.dim :].conj()
                y = torch.fft.irfft(rfft(u, size) * spectrum, n=size)[..., : x.shape[1]]
        return self.output(y, x)

    def scan(self, u: Tensor) -> Tensor:
        """The convolution of u `(B, d, N)` in chunks, from both sides where two-sided."""
        log_q, write, read = self.coefficients()
        if not self.bidirectional:
            return chunked_average(u, log_q, write, read)[0]
        d = self.dim
        ahead = chunked_average(u, log_q[:d], write[:d], read[:d])[0]
        behind = chunked_average(u.flip(-1), log_q[d:], write[d:], read[d:])[0]
        return ahead + behind.flip(-1)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        if self.bidirectional:
            raise ValueError("a two-sided average needs the whole sequence, so it cannot stream")
        n, (dtype, unchanged) = x.shape[1], wide(x)
        if self.truncation is not None:
            reach = self.truncation - 1
            past = x.new_zeros(len(x), reach, self.dim) if state is None else state[0]
            u = torch.cat([past, x], 1).to(dtype).mT
            with unchanged:
                k = self.taps(reach + 1)
                y = (u * k.flip(-1)).sum(-1, keepdim=True) if n == 1 else valid_convolution(u, k)
            return self.output(y, x), (shift_in(past, x, reach, lengths),)
        with unchanged:
            log_q, write, read = self.coefficients()
            before = torch.zeros(len(x), *log_q.shape, dtype=dtype, device=x.device) if state is None else state[0]
            if n == 1:
                after = torch.exp(log_q) * before + write * x[:, 0, :, None].to(dtype)
                y = (after * read).sum(-1)[..., None]
                if lengths is not None:
                    after = torch.where(lengths[:, None, None] > 0, after, before)
            else:
                y, after = chunked_average(x.to(dtype).mT, log_q, write, read, before)
                if lengths is not None:  # the real positions to the end of the piece, so that all rows share one table
                    late = shift_in(x.new_zeros(len(x), 0, self.dim), x, n, lengths).to(dtype).mT
                    after = chunked_average(late, log_q, write, read)[1]
                    after = after + before * torch.exp(log_q * lengths[:, None, None])
        return self.output(y, x), (after,)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return F.silu(y.mT.to(x.dtype) + self.omega * x)

    def state_size(self, length: int) -> int:
        return self.dim * (self.order if self.truncation is None else self.truncation - 1)


def powers(log_q: Tensor, length: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """q^(chunk a), `(d, A, n)`, and q^r, `(d, n, chunk)`: q^(chunk a + r) is their product."""
    chunk = min(chunk, length)
    fine = torch.arange(chunk, device=log_q.device, dtype=log_q.dtype)
    coarse = torch.arange(0, length, chunk, device=log_q.device, dtype=log_q.dtype)
    return torch.exp(log_q[:, None] * coarse[:, None]), torch.exp(log_q[..., None] * fine)


def chunked_average(
    u: Tensor, log_q: Tensor, write: Tensor, read: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`h_t = q h_{t-1} + write u_t`, `y_t = sum_j read[j] h_t[j]`: y `(B, d, N)` and the last h `(B, d, n)`.

    u `(B, d, N)`; log q, write and read `(d, n)`; state `(B, d, n)`. Inside a chunk a Toeplitz matrix per channel,
    between chunks the states, which doubling steps bring together. Cost O(N d (chunk + 2 n)).
    """
    n = u.shape[-1]
    size = min(chunk, n)
    pad = -n % size  # in front, where zeros write nothing, so that the last state stands at the last position
    parts = F.pad(u, (pad, 0)).unflatten(-1, (-1, size))  # (B, d, A, C)
    steps = torch.arange(size + 1, device=u.device, dtype=log_q.dtype)
    table = torch.exp(log_q[..., None] * steps)  # q^0 .. q^C
    lag = steps[:-1, None] - steps[:-1]
    toeplitz = ((write * read)[:, None] @ table[..., :-1])[:, 0][:, lag.clamp(min=0).long()].tril()
    wrote = parts.movedim(0, 2).flatten(1, 2) @ (write[..., None] * table[..., :-1].flip(-1)).mT
    h = wrote.unflatten(1, (parts.shape[2], -1)).movedim(2, 0)  # (B, d, A, n), what each chunk leaves
    whole, span = log_q * size, 1
    if state is not None:  # fades over the real positions of the first chunk
        first = state * torch.exp(log_q * (size - pad))
        h = torch.cat([h[:, :, :1] + first[:, :, None], h[:, :, 1:]], 2)
    while span < h.shape[2]:
        faded = h[:, :, :-span] * torch.exp(whole * span)[:, None]
        h = torch.cat([h[:, :, :span], h[:, :, span:] + faded], 2)
        span *= 2
    y = (parts.movedim(0, 2).flatten(1, 2) @ toeplitz.mT).unflatten(1, (parts.shape[2], -1)).movedim(2, 0)
    before = F.pad(h[:, :, :-1], (0, 0, 1, 0))
    y = y + before @ (read[..., None] * table[..., 1:])
    y = y.flatten(2)[..., pad:]
    if state is not None:  # in the first chunk
        shown = min(n, size - pad)
        own = torch.einsum("bdn,dnc->bdc", state, read[..., None] * table[..., 1 : shown + 1])
        y = torch.cat([y[..., :shown] + own, y[..., shown:]], -1)
    return y, h[:, :, -1]


def valid_convolution(u: Tensor, k: Tensor) -> Tensor:
    """`y[t] = sum_l k[l] u[t + K - 1 - l]` for u `(B, d, N + K - 1)`, k `(d, K)`: `(B, d, N)`, by FFT."""
    size, reach = fast_length(u.shape[-1]), k.shape[-1] - 1
    y = torch.fft.irfft(rfft(u, size) * rfft(k, size), n=size)
    return y[..., reach : u.shape[-1]]
