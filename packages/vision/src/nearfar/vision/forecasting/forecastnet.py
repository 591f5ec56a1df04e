"""ForecastNet: the next state of gridded fields from the present one, by AFNO blocks on patches.

With its published settings it is FourCastNet: Pathak et al., "FourCastNet: A Global Data-driven High-resolution Weather
Model using Adaptive Fourier Neural Operators" (2022, arXiv 2202.11214).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfar.core.checkpoints import count, fit_shapes, load_state_dict, ratio, read
from nearfar.core.errors import CheckpointError
from nearfar.ops.common.tables import Derived
from nearfar.vision.models.afno import AFNOBlock


class ForecastNet(nn.Module, PyTorchModelHubMixin):
    """Fields (B, in_channels, H, W) on a grid to the fields (B, out_channels, H, W) one step later.

    Patches of P x P are embedded by one convolution, get a learned position each, pass the `AFNOBlock`s and are put
    back by a linear map without bias; there is no final norm. H and W are multiples of P. On another grid than
    `image_size` the positions are resized bicubically. FFTs treat the grid as periodic in both directions.

    Args:
        image_size: (H, W) that the positions are made for.
        in_channels, out_channels: fields that go in and come out; None for as many as go in.
        patch_size: P, one number or (rows, columns).
        dim, depth, num_blocks, mlp_ratio: of the blocks.
        hidden_factor, threshold, modes, fraction: of the filter, see `AFNO`; with modes="lowpass" the kept waves are
            those of `image_size` on every grid.
        drop_rate, drop_path_rate: dropout in the MLPs and of whole MLPs, growing linearly over the blocks.
        precipitation: a last 3x3 convolution, periodic along rows and zero-padded at the poles, and ReLU.
        residual: the network gives the change of the first out_channels fields, as an extension of ours.

    Raises:
        ValueError: a grid that the patch does not divide, more channels out than in with `residual`.
    """

    def __init__(
        self,
        image_size: Sequence[int] = (720, 1440),
        in_channels: int = 20,
        out_channels: int | None = None,
        patch_size: int | Sequence[int] = 8,
        dim: int = 768,
        depth: int = 12,
        num_blocks: int = 8,
        *,
        mlp_ratio: float = 4.0,
        hidden_factor: int = 1,
        threshold: float = 0.01,
        modes: str = "fourcastnet",
        fraction: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        precipitation: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[0], patch_size[1])
        self.image_size = (image_size[0], image_size[1])
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.residual = residual
        if residual and self.out_channels > in_channels:
            raise ValueError(f"residual=True changes fields that go in; out_channels={out_channels} > {in_channels}")
        grid = self.grid_of(self.image_size)
        self.patch_embed = nn.Conv2d(in_channels, dim, self.patch_size, self.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(dim, *grid))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            AFNOBlock(
                dim,
                num_blocks,
                mlp_ratio=mlp_ratio,
                drop_rate=drop_rate,
                drop_path=rate,
                hidden_factor=hidden_factor,
                threshold=threshold,
                modes=modes,
                fraction=fraction,
                grid=grid if modes == "lowpass" else None,
            )
            for rate in rates
        )
        self.head = nn.Linear(dim, self.out_channels * math.prod(self.patch_size), bias=False)
        self.conv = nn.Conv2d(self.out_channels, self.out_channels, 3) if precipitation else None
        self.resized = Derived()
        self.grad_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) linear maps and positions; with `residual` a net that starts with no change."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.residual:
            nn.init.zeros_(self.head.weight)

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Patches (rows, columns) of a grid (H, W)."""
        (height, width), (p1, p2) = size, self.patch_size
        if height < p1 or width < p2 or height % p1 or width % p2:
            raise ValueError(
                f"a grid of {height} x {width} is no multiple of the patches of {p1} x {p2}; crop or pad the fields "
                f"(for example to {max(height // p1, 1) * p1} x {max(width // p2, 1) * p2})"
            )
        return height // p1, width // p2

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The learned positions (dim, rows, columns), resized where the grid is another one."""
        table = self.pos_embed
        if tuple(table.shape[1:]) == grid:
            return table
        resize = lambda: F.interpolate(table[None], grid, mode="bicubic", align_corners=False)[0]  # noqa: E731
        return self.resized.get(table, grid, resize)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"input is {tuple(x.shape)}; the net takes (B, {self.in_channels}, H, W)")
        rows, columns = self.grid_of(x.shape[2:])
        tokens = self.pos_drop(self.patch_embed(x) + self.positions((rows, columns))).movedim(1, -1).contiguous()
        for block in self.blocks:
            recompute = self.grad_checkpointing and self.training
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        p1, p2 = self.patch_size
        pixels = self.head(tokens).unflatten(-1, (p1, p2, self.out_channels))  # channel fastest
        y = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        if self.residual:
            y = y + x[:, : self.out_channels]
        if self.conv is not None:
            y = F.pad(F.pad(y, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
            y = torch.relu(self.conv(y))
        return y

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @classmethod
    def from_published(cls, source: str | Path | Mapping[str, Tensor], **settings: Any) -> Self:
        """The network that a checkpoint of FourCastNet or physicsnemo's AFNO holds, in eval mode, or one of our own.

        Names and shapes determine all but the grid's sides, `image_size`: where it is not given, a grid twice as wide
        as high is taken, else a square one. The final norm in FourCastNet's files is not used there and is left out.
        `settings` are constructor arguments that take precedence.

        Raises:
            CheckpointError: tensors are missing, superfluous or misshapen (all are listed), or the grid is neither.
        """
        state = cls.published_state(read(source))
        try:
            found = cls.published_settings(state, settings.get("image_size"))
        except (KeyError, IndexError) as error:
            where = "the state dict" if isinstance(source, Mapping) else source
            raise CheckpointError(f"{where}: is no checkpoint of {cls.__name__} (no {error})") from error
        model = cls(**{**found, **settings})
        if state["pos_embed"].ndim == 3 and state["pos_embed"].shape != model.pos_embed.shape:
            table = state["pos_embed"]  # (1, N, C) as published
            if table.shape[1] == math.prod(model.pos_embed.shape[1:]):
                state["pos_embed"] = table[0].T.reshape(model.pos_embed.shape)
        load_state_dict(model, fit_shapes(model, state))
        return model.eval()

    @staticmethod
    def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names for the tensors of any published layout."""
        renamed = {}
        for name, value in state.items():
            name = name.removeprefix("backbone.").replace("patch_embed.proj.", "patch_embed.")
            if name not in ("norm.weight", "norm.bias"):
                renamed[name] = value
        return renamed

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor], image_size: Sequence[int] | None = None) -> dict[str, Any]:
        """Constructor arguments that names and shapes determine, and the grid."""
        dim, channels, p1, p2 = state["patch_embed.weight"].shape
        w1 = state["blocks.0.filter.w1"]
        if image_size is None:
            table = state["pos_embed"]
            published = table.shape[0] == 1 and table.shape[2] == dim
            rows, columns = cls.guess_grid(table.shape[1]) if published else table.shape[1:]
            image_size = (rows * p1, columns * p2)
        return {
            "image_size": tuple(image_size),
            "in_channels": channels,
            "out_channels": len(state["head.weight"]) // (p1 * p2),
            "patch_size": p1 if p1 == p2 else (p1, p2),
            "dim": dim,
            "depth": count(state, r"blocks\.(\d+)\."),
            "num_blocks": w1.shape[1],
            "hidden_factor": w1.shape[3] // w1.shape[2],
            "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.bias"]), dim),
            "precipitation": "conv.weight" in state,
        }

    @staticmethod
    def guess_grid(tokens: int) -> tuple[int, int]:
        """(rows, columns) of so many patches: twice as wide as high, or square."""
        for rows, columns in ((math.isqrt(tokens // 2), 2 * math.isqrt(tokens // 2)), (math.isqrt(tokens),) * 2):
            if rows * columns == tokens:
                return rows, columns
        raise CheckpointError(f"{tokens} positions are no grid of a x 2a or a x a; say image_size=(H, W)")


FORECASTERS: dict[str, dict[str, Any]] = {
    "fourcastnet": {},
    "fourcastnet_precipitation": {"out_channels": 1, "precipitation": True},
    "afno_physicsnemo": {"patch_size": 16, "dim": 256, "depth": 4, "num_blocks": 16},
}
"""Published settings; physicsnemo's are its defaults, which leave the grid and the channels to the user."""


def forecast_net(name: str = "fourcastnet", **settings: Any) -> ForecastNet:
    """A network with published settings, or with `settings` in their place."""
    if name not in FORECASTERS:
        raise ValueError(f"name is {name!r}; allowed are {', '.join(FORECASTERS)}")
    return ForecastNet(**{**FORECASTERS[name], **settings})
