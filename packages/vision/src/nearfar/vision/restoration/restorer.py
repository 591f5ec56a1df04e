"""What every super-resolution network has: scale, any picture size, published checkpoints, the table of variants."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from nearfar.core.checkpoints import Checkpoint, Rule, loaded, read, rename
from nearfar.core.errors import CheckpointError


@dataclass(frozen=True)
class RestorerVariant:
    """A published size of a system."""

    settings: dict[str, Any]
    """Constructor arguments."""
    params: int
    """Published parameters, as the paper rounds them."""


class Restorer(nn.Module, PyTorchModelHubMixin):
    """A network that enlarges pictures `scale` times: (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale H, scale W).

    The output is not clamped. `save_pretrained` writes a folder with the constructor's arguments and the weights as
    safetensors, `from_pretrained` reads it.
    """

    RULES: ClassVar[tuple[Rule, ...]] = ()
    """How published names become ours, applied in order to the start of every name; our own names stay as they are."""
    IGNORE: ClassVar[tuple[str, ...]] = ()
    """Published tensors that the model computes itself."""
    VARIANTS: ClassVar[dict[str, RestorerVariant]] = {}
    context: int | None = None
    """Pixels of the input around a position that its output depends on; None where it depends on all of them."""
    tiled: ClassVar[str] = ""
    """What tiles change where no overlap makes them exact."""
    multiple: int = 1
    """Tiles have to begin at a multiple of this many pixels for their inside to be that of the whole picture."""

    scale: int
    in_chans: int

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that the names and shapes of a (renamed) state dict determine."""
        raise NotImplementedError

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under our names, without what the model computes itself; our own passes through."""
        kept = {name: value for name, value in state.items() if not any(re.match(p, name) for p in cls.IGNORE)}
        return rename(kept, cls.RULES)

    @classmethod
    def from_published(cls, source: Checkpoint, **settings: Any) -> Self:
        """The model that a published checkpoint holds, in eval mode: a file or its content, in any published layout.

        Names and shapes determine the variant; `settings` are constructor arguments that take precedence.

        Raises CheckpointError where tensors are missing, superfluous or misshapen; every one is listed.
        """
        state = cls.published_state(read(source))
        try:
            found = cls.published_settings(state)
        except (KeyError, IndexError, ValueError) as error:
            where = "the state dict" if isinstance(source, Mapping) else source
            raise CheckpointError(f"{where}: is no checkpoint of {cls.__name__} (no {error})") from error
        return loaded(cls(**(found | settings)), state)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError for what is not (B, in_chans, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(f"input is {tuple(x.shape)}; {type(self).__name__} takes (B, {self.in_chans}, H, W)")


class Upsampler(nn.Sequential):
    """3 x 3 convolutions and pixel shuffles: twice for every factor two of `scale`, or three times at once."""

    def __init__(self, dim: int, scale: int, activation: Callable[[], nn.Module] | None = None) -> None:
        factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        if scale < 2 or (scale != 3 and 2 ** len(factors) != scale):
            raise ValueError(f"scale is {scale}; allowed are 3 and powers of two from 2")
        layers: list[nn.Module] = []
        for factor in factors:
            layers += [nn.Conv2d(dim, dim * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
            layers += [activation()] if activation else []
        super().__init__(*layers)


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """x (B, C, H, W) reflected at its bottom and right to height x width, again and again where it is too small."""
    while x.shape[2] < height or x.shape[3] < width:
        rows = min(height - x.shape[2], max(x.shape[2] - 1, 1))
        columns = min(width - x.shape[3], max(x.shape[3] - 1, 1))
        for axis, amount in ((2, rows), (3, columns)):
            if amount > 0:
                margin = (0, 0, 0, amount) if axis == 2 else (0, amount, 0, 0)
                x = F.pad(x, margin, mode="reflect" if x.shape[axis] > 1 else "replicate")
    return x
