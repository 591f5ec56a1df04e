"""RetNet's multi-scale retention: linear attention with one fixed decay per head."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.kernels import kernel, loses_gradients
from nearfar.ops.common.streaming import State, StreamingMixer, advance, in_pieces, real_positions, wide


def rotate_halves(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions, half split: channels i and i + c/2 turn by `position * base^(-2i/c)`.

    x: `(B, h, N, c)`; position: `(B or 1, N)` integers.
    """
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = position[:, None, :, None] * speed
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Retention(StreamingMixer):
    """Multi-scale retention: `o_t = sum_{s<=t} gamma_h^(t-s) (q_t . k_s) v_s / sqrt(d_k)`, `gamma_h = 1 - 2^(-5-h)`.

    q and k carry rotary positions; each head's output is divided by its root mean square, weighted, gated by
    silu(W_g x) and mapped back. Values are `expand` times as wide as x. No biases. RetNet (Sun et al. 2023,
    arXiv 2307.08621), in the form that flash-linear-attention gives it.

    Parallel form: chunks, quadratic inside, a state (d_k x d_v per head) carried from chunk to chunk.
    Cost O(N d (chunk + d_k)). On CUDA fla's kernel takes over where it is installed.
    State: h d_k d_v = expand d^2 / h numbers, and the position.

    Args:
        dim: channels d.
        num_heads: heads h; must divide `dim` into an even width.
        expand: width of the values over d.
        chunk: positions that are worked on quadratically.
        eps: of the norm.
    """

    def __init__(self, dim: int, num_heads: int = 2, expand: int = 2, chunk: int = 64, eps: float = 1e-5):
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"num_heads={num_heads} must divide dim={dim} into an even width for the rotation")
        if expand < 1 or chunk < 1:
            raise ValueError(f"expand={expand} and chunk={chunk} must be at least 1")
        self.dim, self.num_heads, self.expand, self.chunk, self.eps = dim, num_heads, expand, chunk, eps
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, expand * dim, bias=False)
        self.g_proj = nn.Linear(dim, expand * dim, bias=False)
        self.norm = nn.Parameter(torch.empty(expand * dim // num_heads))
        self.out_proj = nn.Linear(expand * dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Norm weights 1; the linear maps reset themselves."""
        nn.init.ones_(self.norm)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return in_pieces(self.extend, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        b, n, _ = x.shape
        q, k, v = (
            rearrange(p(x), "b n (h c) -> b h n c", h=self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        dtype, unchanged = wide(x)
        if state is None:
            state = (
                torch.zeros(b, self.num_heads, q.shape[-1], v.shape[-1], dtype=dtype, device=x.device),
                torch.zeros(b, dtype=torch.long, device=x.device),
            )
        memory, seen = state
        position = seen[:, None] + torch.arange(n, device=x.device)
        with unchanged:
            q, k = (rotate_halves(t.to(dtype), position) for t in (q, k))
            q, v = q * q.shape[-1] ** -0.5, v.to(dtype)
            head = torch.arange(self.num_heads, device=x.device, dtype=dtype)
            rate = torch.log1p(-(2.0 ** (-5 - head)))  # log gamma, one per head
            fused = kernel(x, "fla.ops.retention", "chunk_retention", tensor_cores=True)
            wrong = fused is not None and torch.is_grad_enabled() and loses_gradients(x.device)
            if fused is not None and lengths is None and n > 1 and not wrong:
                parts = (t.transpose(1, 2).to(x.dtype) for t in (q, k, v))
                o, after = fused(*parts, scale=1.0, initial_state=memory, output_final_state=True)
                o = o.transpose(1, 2).to(dtype)
            else:
                o = self.retain(q, k, v, memory, rate)
                after = self.remember(k, v, memory, rate, lengths)
            o = F.rms_norm(o, o.shape[-1:], self.norm.to(dtype), self.eps)
        o = rearrange(o, "b h n c -> b n (h c)").to(x.dtype)
        return self.out_proj(o * F.silu(self.g_proj(x))), (after, advance(seen, x, lengths))

    def retain(self, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, rate: Tensor) -> Tensor:
        """Outputs `(B, h, N, d_v)` given the memory `(B, h, d_k, d_v)` before the first position."""
        n = q.shape[2]
        size = min(self.chunk, n)
        q, k, v = (F.pad(t, (0, 0, 0, -n % size)).unflatten(2, (-1, size)) for t in (q, k, v))
        step = torch.arange(size, device=q.device)
        lag = (step[:, None] - step).clamp(min=0)
        decay = torch.tril(torch.exp(rate[:, None, None] * lag))
        inside = ((q @ k.transpose(-1, -2)) * decay[:, None]) @ v
        fade = torch.exp(rate[:, None] * (size - 1 - step))
        written = (k * fade[:, None, :, None]).transpose(-1, -2) @ v  # what each chunk adds to the memory
        read = q * torch.exp(rate[:, None] * (step + 1))[:, None, :, None]
        whole = torch.exp(rate * size)[:, None, None]
        memories = [memory]
        for chunk in written.unbind(2)[:-1]:
            memories.append(whole * memories[-1] + chunk)
        return (inside + read @ torch.stack(memories, 2)).flatten(2, 3)[:, :, :n]

    @staticmethod
    def remember(k: Tensor, v: Tensor, memory: Tensor, rate: Tensor, lengths: Tensor | None) -> Tensor:
        """The memory after each row's real positions."""
        b, _, n, _ = k.shape
        end = torch.full((b,), n, device=k.device) if lengths is None else lengths
        age = end[:, None] - 1 - torch.arange(n, device=k.device)
        fade = torch.exp(rate[:, None] * age.clamp(min=0)[:, None, :])
        if lengths is not None:
            fade = fade * real_positions(age, lengths)[:, None, :]
        kept = torch.exp(rate * end[:, None])[..., None, None] * memory
        return kept + (k * fade[..., None]).transpose(-1, -2) @ v

    def state_size(self, length: int) -> int:
        return self.expand * self.dim * self.dim // self.num_heads
