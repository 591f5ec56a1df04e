"""SiT: a diffusion transformer whose token mixer is attention or the attentive convolution, with its samplers.

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers" (2024), in
the variants of Yu et al., "Attentive Convolution" (2025). The network predicts the velocity of the straight path
x_t = t x_1 + (1 - t) x_0 from noise x_0 to a latent picture x_1, dx/dt = x_1 - x_0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, fit_shapes, load_state_dict, read
from nearfar.core.errors import CheckpointError
from nearfar.ops.convolution.atconv import TokenATConv

MIXERS = ("atconv", "attention", "hybrid")


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, C), qkv with bias; cost O(N^2 C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads(x))
        return self.proj(out.transpose(1, 2).flatten(2))

    def attention_map(self, x: Tensor) -> Tensor:
        """The attention weights, (B, heads, N, N), rows summing to one."""
        query, key, _ = self.heads(x)
        return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)


class MLP(nn.Module):
    """W2 GELU_tanh(W1 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimeEmbedding(nn.Module):
    """W2 SiLU(W1 [cos(t f), sin(t f)]), f_j = 10000^(-j / 128), j = 0..127; t in [0, 1] is not scaled."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.mlp[0].in_features // 2
        rates = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
        angles = t.float()[:, None] * rates
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """A table of classes, with one more row for "no label" where labels are dropped in training."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, one shift and scale per sample and channel."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """x + a1 Mixer(LN(x) (1 + s1) + b1), then x + a2 MLP(LN(x) (1 + s2) + b2); (b1, s1, a1, b2, s2, a2) = W SiLU(c)."""

    def __init__(self, dim: int, num_heads: int, mixer: str, mlp_ratio: float, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads) if mixer == "attention" else TokenATConv(dim, activation=activation)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """W (LN(x) (1 + s) + b), to the values of a patch; (b, s) = V SiLU(c)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class Patches(nn.Module):
    """(B, C, H, W) to tokens of p x p patches, row by row."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def position_table(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine table, (side^2, dim): half the width for the column, half for the row; sines, then cosines."""
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = torch.arange(side, dtype=torch.float64)[:, None] * rates
    axis = torch.cat((place.sin(), place.cos()), dim=1)
    column = axis[None].expand(side, -1, -1)
    row = axis[:, None].expand(-1, side, -1)
    return torch.cat((column, row), dim=-1).reshape(side**2, dim).float()


class SiT(nn.Module, PyTorchModelHubMixin):
    """Velocity of a latent picture: `forward(x, t, y)` with x (B, C, S, S), t (B) in [0, 1], y (B) classes.

    With `mixer="atconv"` every block mixes tokens by the attentive convolution, and zero padding is all the position
    information there is; "attention" and "hybrid" (attention in blocks 1, 3, ..., the convolution in 2, 4, ...) add a
    fixed sine table. The network has 2 C output channels where `learn_sigma` is set; the second half is dropped.

    Args:
        input_size: S, side of the latent picture: 32 for 256 pixels, 64 for 512.
        depth, dim, num_heads: blocks, width, heads of the attention.
        mixer: "atconv", "attention" or "hybrid".
        patch_size, in_channels, mlp_ratio, num_classes: as named.
        label_dropout: share of labels dropped in training, which guidance needs.
        activation: of the attentive kernel, see `ATConv`; the REPA copy of the code takes "silu".

    Raises:
        ValueError: an unknown mixer, heads that do not divide `dim`, a width that 4 does not divide, a size that the
            patch does not divide.
    """

    CARD = Card(
        "SiT with attentive convolution",
        "2510.20092",
        "diffusion transformer with attention, attentive convolution or both; ODE and SDE samplers",
        6.1e-7,
    )

    def __init__(
        self,
        input_size: int = 32,
        depth: int = 28,
        dim: int = 1152,
        num_heads: int = 16,
        mixer: str = "atconv",
        *,
        patch_size: int = 2,
        in_channels: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        label_dropout: float = 0.1,
        learn_sigma: bool = True,
        activation: str = "gelu_tanh",
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer is {mixer!r}; allowed are {', '.join(MIXERS)}")
        if dim % 4 or input_size % patch_size:
            raise ValueError(f"dim={dim} must be a multiple of 4 and input_size={input_size} of the patch {patch_size}")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.x_embedder = Patches(patch_size, in_channels, dim)
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = LabelEmbedding(num_classes, dim, label_dropout)
        tokens = (input_size // patch_size) ** 2
        self.pos_embed = None if mixer == "atconv" else nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=False)
        mixers = [("attention", "atconv")[i % 2] if mixer == "hybrid" else mixer for i in range(depth)]
        self.blocks = nn.ModuleList(SiTBlock(dim, num_heads, m, mlp_ratio, activation) for m in mixers)
        self.final_layer = FinalLayer(dim, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier linear maps, N(0, 0.02) embeddings, zeros where a block is to start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        last = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*last, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
        if self.pos_embed is not None:
            side = math.isqrt(self.pos_embed.shape[1])
            self.pos_embed.copy_(position_table(self.pos_embed.shape[2], side))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows, columns = (n // self.patch_size for n in x.shape[-2:])
        tokens = self.x_embedder(x)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        p = self.patch_size
        grid = patches.reshape(-1, rows, columns, p, p, patches.shape[-1] // p**2)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)[:, : self.in_channels]

    def guided(self, x: Tensor, t: Tensor, y: Tensor, guidance: float = 4.0, guided_channels: int = 3) -> Tensor:
        """Classifier-free guidance on a batch [x; x] with labels [y; none]: u + s (c - u) on the first channels.

        Both halves of the result hold the guided channels; the others stay each half's own. The published code
        guides three of four latent channels.
        """
        half = x[: len(x) // 2]
        velocity = self(torch.cat((half, half)), t, y)
        with_label, without = velocity[:, :guided_channels].chunk(2)
        mixed = without + guidance * (with_label - without)
        return torch.cat((torch.cat((mixed, mixed)), velocity[:, guided_channels:]), dim=1)

    def velocity(
        self, guidance: float, guided_channels: int, labels: Tensor, reverse_time: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, t) -> dx/dt for time from noise (0) to picture (1), guided where `guidance` is not 1."""
        none = torch.full_like(labels, self.num_classes)

        def field(x: Tensor, t: Tensor) -> Tensor:
            time = (1 - t if reverse_time else t).to(torch.float32).expand(len(x))
            inputs = x.to(self.final_layer.linear.weight.dtype)
            if guidance == 1:
                v = self(inputs, time, labels)
            else:
                doubled, times = torch.cat((inputs, inputs)), torch.cat((time, time))
                v = self.guided(doubled, times, torch.cat((labels, none)), guidance, guided_channels)[: len(x)]
            return (-v if reverse_time else v).to(x.dtype)

        return field

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        labels: Tensor,
        method: str = "dopri5",
        *,
        steps: int = 250,
        guidance: float = 1.0,
        guided_channels: int = 3,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        last_step: float = 0.04,
        reverse_time: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latent pictures from `noise` (B, C, S, S) and `labels` (B).

        Args:
            method: "dopri5", the adaptive ODE solver of Dormand and Prince; "heun" and "euler", fixed steps of the
                same ODE; "sde", Euler-Maruyama with diffusion 2 (1 - t), ended by one mean step of `last_step`.
            steps: number of steps (the adaptive solver chooses its own).
            guidance: classifier-free guidance scale; 1 for none. Needs a model trained with `label_dropout`.
            atol, rtol: tolerances of the adaptive solver.
            reverse_time: the network counts time from picture to noise, as models of the REPA code do.
            generator: random numbers of the "sde" method.

        Raises:
            ValueError: an unknown method, or guidance on a model without a row for "no label".
        """
        if guidance != 1 and self.y_embedder.embedding_table.num_embeddings == self.num_classes:
            raise ValueError("guidance needs a model trained with label_dropout; this one has no row for 'no label'")
        field = self.velocity(guidance, guided_channels, labels, reverse_time)
        x = noise.double() if noise.device.type != "mps" else noise
        time = lambda t: torch.tensor(t, dtype=x.dtype, device=x.device)  # noqa: E731
        if method == "dopri5":
            x = _dopri5(lambda x, t: field(x, time(t)), x, atol, rtol)
        elif method in ("euler", "heun"):
            for i in range(steps):
                t, dt = i / steps, 1 / steps
                v = field(x, time(t))
                if method == "heun":
                    v = (v + field(x + dt * v, time(t + dt))) / 2
                x = x + dt * v
        elif method == "sde":
            dt = (1 - last_step) / (steps - 1)
            for i in range(steps):
                t = i * dt
                v = field(x, time(t))
                drift = v + (t * v - x)  # velocity + (1 - t) score
                if i == steps - 1:
                    x = x + last_step * drift
                else:
                    wiener = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                    x = x + dt * drift + math.sqrt(2 * (1 - t) * dt) * wiener
        else:
            raise ValueError(f"method is {method!r}; allowed are 'dopri5', 'heun', 'euler' and 'sde'")
        return x.to(noise.dtype)

    def loss(self, pictures: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the velocity at uniform random times, for latent pictures (B, C, S, S)."""
        t = torch.rand(len(pictures), generator=generator, device=pictures.device)
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        blend = t[:, None, None, None]
        return F.mse_loss(self(blend * pictures + (1 - blend) * noise, t, labels), pictures - noise)

    @classmethod
    def from_published(cls, source: str | Path | Mapping[str, Tensor], **settings: Any) -> Self:
        """The model that a published checkpoint holds, in eval mode; its names and shapes determine everything but
        `num_heads`, which is 64 channels a head unless given (72 in the XL size).

        Training-only projectors of the REPA code are left out, and its activation is taken where the attentive
        convolution's maps are 1x1 convolutions.
        """
        state = {name: value for name, value in read(source).items() if not name.startswith("projectors.")}
        try:
            found = cls.published_settings(state)
        except KeyError as error:
            raise CheckpointError(f"is no checkpoint of SiT (no {error})") from error
        model = cls(**{**found, **{name: value for name, value in settings.items() if value is not None}})
        load_state_dict(model, fit_shapes(model, state))
        return model.eval()

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that names and shapes determine, and the customary number of heads."""
        depth = count(state, r"blocks\.(\d+)\.")
        dim, channels, patch = state["x_embedder.proj.weight"].shape[:3]
        attention = [f"blocks.{i}.attn.qkv.weight" in state for i in range(depth)]
        kernel = next((v for name, v in state.items() if name.endswith("attn.kernel_proj.weight")), None)
        rows = len(state["y_embedder.embedding_table.weight"])
        unlabelled = rows % 2 if rows > 1 else 0
        settings: dict[str, Any] = {
            "depth": depth,
            "dim": dim,
            "num_heads": dim // 72 if dim % 72 == 0 and dim % 64 == 0 and dim > 1024 else max(dim // 64, 1),
            "mixer": "attention" if all(attention) else "hybrid" if any(attention) else "atconv",
            "patch_size": patch,
            "in_channels": channels,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / dim,
            # a table of 1001 is 1000 classes and "no label"; an even number, or one row, has no such row
            "num_classes": rows - unlabelled,
            "label_dropout": 0.1 if unlabelled else 0.0,
            "learn_sigma": len(state["final_layer.linear.bias"]) == 2 * channels * patch**2,
            "activation": "silu" if kernel is not None and kernel.ndim == 4 else "gelu_tanh",
        }
        if "pos_embed" in state:
            settings["input_size"] = patch * math.isqrt(state["pos_embed"].shape[1])
        return settings


SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
"""Depth, width and heads of the published sizes, all with patches of 2 x 2."""


def sit(size: str = "xl", mixer: str = "atconv", **settings: Any) -> SiT:
    """A published size, "s", "b", "l" or "xl"."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; allowed are {', '.join(SIZES)}")
    depth, dim, num_heads = SIZES[size]
    return SiT(depth=depth, dim=dim, num_heads=num_heads, mixer=mixer, **settings)


# Dormand and Prince (1980): nodes are not needed beyond the row sums
_STAGES: tuple[Sequence[float], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)

_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dopri5(field: Callable[[Tensor, float], Tensor], x: Tensor, atol: float, rtol: float) -> Tensor:
    """x(1) of dx/dt = field(x, t) from x(0), with the 5(4) pair and steps that keep the error within tolerance."""
    t, step = 0.0, 0.05
    slopes = [field(x, 0.0)]
    while t < 1:
        step = min(step, 1 - t)
        for row in _STAGES:
            ahead = x + step * sum(a * k for a, k in zip(row, slopes, strict=True) if a)
            slopes.append(field(ahead, t + step * sum(row)))
        miss = step * sum(e * k for e, k in zip(_ERROR, slopes, strict=True) if e)
        scale = atol + rtol * torch.maximum(x.abs(), ahead.abs())
        error = float((miss / scale).square().mean().sqrt())
        if error <= 1:
            t, x = (1.0 if step == 1 - t else t + step), ahead
            slopes = slopes[-1:]
        else:
            slopes = slopes[:1]
        step *= min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        if step < 1e-8:
            raise RuntimeError(
                f"the solver's step fell below 1e-8 at t={t:.4f}; the velocity is not finite or too rough"
            )
    return x
