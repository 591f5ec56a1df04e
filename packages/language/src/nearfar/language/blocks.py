"""What follows a sequence mixer at each position, and a norm."""

import torch.nn.functional as F
from torch import Tensor, nn


class Identity(nn.Module):
    """The state mixer that changes nothing; its block still adds the normed residual."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class MLP(nn.Module):
    """`W2 gelu(W1 x)`, exact GELU, hidden width `hidden` or else mult * dim."""

    def __init__(self, dim: int, mult: int = 4, hidden: int | None = None, bias: bool = True):
        super().__init__()
        hidden = hidden or mult * dim
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GLU(nn.Module):
    """`W3 ((W1 x) a(W2 x))`, a the exact GELU or SiLU ("silu"), hidden width `hidden` or else mult * dim."""

    def __init__(
        self, dim: int, mult: int = 4, hidden: int | None = None, bias: bool = False, activation: str = "gelu"
    ):
        super().__init__()
        if activation not in ("gelu", "silu"):
            raise ValueError(f"activation={activation!r} must be gelu or silu")
        hidden = hidden or mult * dim
        self.activation = F.gelu if activation == "gelu" else F.silu
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * self.activation(gate))


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm without weights."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps, elementwise_affine=False)
