"""Based: linear attention whose feature map is the second-order Taylor expansion of exp."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.kernels import kernel
from nearfar.ops.common.streaming import State, StreamingMixer, in_pieces, real_positions, wide

FUSED_LENGTH = 2048  # fla's kernel is quadratic in the length
QUADRATIC_LENGTH = 512  # to here the quadratic view alone is as fast as chunks; to half of it in training, for memory


def taylor_features(x: Tensor, compressed: bool = False) -> Tensor:
    """phi with `phi(q) . phi(k) = 1 + s + s^2 / 2`, s = q . k / sqrt(f): second-order exp of the scaled product.

    `(..., f)` to `(..., 1 + f + f^2)`: 1, x / f^(1/4), and all products x_i x_j / sqrt(2 f) row by row.
    `compressed` keeps each product i <= j once, those of two different channels times sqrt 2: the same inner
    products from 1 + f + f (f + 1) / 2 features.
    """
    f = x.shape[-1]
    square = x[..., :, None] * x[..., None, :] * (2 * f) ** -0.5
    if compressed:
        i, j = torch.triu_indices(f, f, device=x.device)
        square = square[..., i, j] * (1 + (i != j).to(x.dtype) * (2**0.5 - 1))
    else:
        square = square.flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x * f**-0.25, square], -1)


class Based(StreamingMixer):
    """Taylor linear attention: `y_t = sum_{s<=t} w_ts v_s / (sum_{s<=t} w_ts + 1e-12)`, `w = 1 + z + z^2 / 2`.

    z = q_t . k_s / sqrt(f), so w = phi(q_t) . phi(k_s) >= 1/2 and the sum has a recurrent form. Based (Arora et al.
    2024, arXiv 2402.18668). No biases.

    Parallel form: chunks of `chunk` positions, quadratic inside a chunk, through the running sums before it; to 512
    positions (256 in training) the purely quadratic view. The published linear view materializes the outer products of
    every position. Cost O(N d (f^2 / 2 + chunk)).
    On CUDA fla's quadratic kernel (eps 1e-6) takes texts of up to 2048 positions where it is installed.
    State: sums of phi(k) v and phi(k), h (1 + f + f (f + 1) / 2) (d / h + 1) numbers.

    Args:
        dim: channels d.
        num_heads: heads h; must divide `dim`.
        feature_dim: width f of a query or key.
        chunk: positions of a longer sequence, or of `extend`, that are worked on quadratically.
    """

    eps = 1e-12

    def __init__(self, dim: int, num_heads: int = 1, feature_dim: int = 16, chunk: int = 128):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if feature_dim < 1 or chunk < 1:
            raise ValueError(f"feature_dim={feature_dim} and chunk={chunk} must be at least 1")
        self.dim, self.num_heads, self.feature_dim, self.chunk = dim, num_heads, feature_dim, chunk
        self.q_proj = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        fused = kernel(x, "fla.ops.based", "parallel_based", tensor_cores=True)
        if fused is not None and x.shape[1] <= FUSED_LENGTH and self.feature_dim <= 128:
            q, k, v = (t.transpose(1, 2).contiguous().to(x.dtype) for t in self.heads(x)[:3])
            return self.output(fused(q, k, v).transpose(1, 2), x)
        if x.shape[1] > max(self.chunk, QUADRATIC_LENGTH // (2 if torch.is_grad_enabled() else 1)):
            return in_pieces(self.extend, x)
        q, k, v, unchanged = self.heads(x)
        with unchanged:
            top, bottom = attend(q, k, v)
            y = top / (bottom + self.eps)
        return self.output(y, x)

    def extend(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        q, k, v, unchanged = self.heads(x)
        with unchanged:
            y, state = self.advance(q, k, v, state, real_positions(x, lengths))
        return self.output(y, x), state

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, real: Tensor | None
    ) -> tuple[Tensor, State]:
        """The formula, from and to a state. q, k `(B, h, N, f)`, v `(B, h, N, d / h)`, real `(B, N)`."""
        phi = taylor_features(k, compressed=True)
        if real is not None:
            phi = phi * real[:, None, :, None]
        if state is None:
            shape = (*k.shape[:2], phi.shape[-1])
            state = (v.new_zeros(*shape, v.shape[-1]), v.new_zeros(shape))
        before = torch.cat([state[0], state[1][..., None]], -1)  # the denominator is one more channel of values
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        n, pad = v.shape[2], -v.shape[2] % self.chunk
        if n <= self.chunk:
            after = before + phi.mT @ values
            top, bottom = attend(q, k, v)
            carried = taylor_features(q, compressed=True) @ before
        else:
            q, k, v, phi, values = (
                F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, self.chunk)) for t in (q, k, v, phi, values)
            )
            running = torch.cat([before[:, :, None], phi.mT @ values], 2).cumsum(2)
            after = running[:, :, -1]
            top, bottom = attend(q, k, v)
            carried = taylor_features(q, compressed=True) @ running[:, :, :-1]
            top, bottom, carried = (t.flatten(2, 3)[:, :, :n] for t in (top, bottom, carried))
        y = (top + carried[..., :-1]) / (bottom + carried[..., -1:] + self.eps)
        return y, (after[..., :-1], after[..., -1])

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.autocast]:
        """q, k `(B, h, N, f)` and v `(B, h, N, d / h)` in the type of the sums, and the context for these."""
        dtype, unchanged = wide(x)
        q, k, v = (
            rearrange(p(x), "b n (h c) -> b h n c", h=self.num_heads).to(dtype)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v, unchanged

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(rearrange(y, "b h n c -> b n (h c)").to(x.dtype))

    def state_size(self, length: int) -> int:
        f = self.feature_dim
        return self.num_heads * (1 + f + f * (f + 1) // 2) * (self.dim // self.num_heads + 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Quadratic view of one chunk: `sum w v` and `sum w` over s <= t, w = 1 + z + z^2 / 2. Shapes `(..., N, c)`."""
    root = (q * (2 * q.shape[-1]) ** -0.5) @ k.transpose(-1, -2) + 0.5**0.5  # (z + 1) / sqrt 2
    w = torch.tril(root * root + 0.5)
    return w @ v, w.sum(-1, keepdim=True)
