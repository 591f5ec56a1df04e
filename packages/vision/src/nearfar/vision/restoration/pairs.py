"""Pictures to learn from and to be scored on: folders of high-resolution pictures, and of pairs."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.core.errors import UserError, some
from nearfar.core.fingerprint import content_digest
from nearfar.vision.data.images import picture_files, read_picture
from nearfar.vision.restoration.resize import imresize

LOW = r"(?i)LR|LR_?bicubic|LR_?bicx?\d|LR_?bic"
"""Names of folders of low-resolution pictures."""
HIGH = r"(?i)HR|GTmod\d+|GT|original"
"""Names of folders of high-resolution pictures."""


def read_rgb(path: Path) -> Tensor:
    """A picture as (3, H, W) in 0 .. 255, uint8; grey ones repeated. Raises UserError where it cannot be read."""
    return torch.from_numpy(np.array(read_picture(path).convert("RGB"))).permute(2, 0, 1)


def is_grey(path: Path) -> bool:
    """Whether a picture's file has one channel."""
    with Image.open(path) as picture:
        return len(picture.getbands()) == 1 and picture.mode != "P"


def crop_to(picture: Tensor, multiple: int) -> Tensor:
    """Without the last rows and columns that `multiple` does not divide."""
    height, width = (side // multiple * multiple for side in picture.shape[-2:])
    return picture[..., :height, :width]


def reduced(picture: Tensor, scale: int) -> Tensor:
    """A picture (3, H, W), uint8, of sides that `scale` divides, reduced as the test sets were: MATLAB's, 8-bit."""
    return imresize(picture, 1 / scale, mode="uint8")


def find_pairs(folder: str | Path, scale: int) -> list[tuple[Path, Path | None]]:
    """High-resolution pictures of a test set and their low-resolution ones, None where the set holds none.

    The layouts people have: `GTmod4` and `LRbicx4` of equal names; `HR` and `LR_bicubic/X4` with an ending such as x4
    or _LRBI_x4; `image_SRF_4` with *_HR.png and *_LR.png; `original`, or pictures alone, which are then reduced here.

    Raises UserError where a picture of a pair is missing, or another scale is asked for than the set has.
    """
    folder = Path(folder)
    names = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    if f"image_SRF_{scale}" in names:
        folder = names[f"image_SRF_{scale}"]
    elif any(name.startswith("image_SRF_") for name in names):
        raise UserError(f"{folder}: has {', '.join(sorted(names))}, none for scale {scale}")
    files = [path for path in picture_files([folder]) if path.parent == folder]
    if high := [path for path in files if path.stem.endswith("_HR")]:
        pairs = [(path, path.with_name(f"{path.stem.removesuffix('HR')}LR{path.suffix}")) for path in high]
        return _complete(folder, pairs)
    tops = [path for name, path in sorted(names.items()) if re.fullmatch(HIGH, name)]
    high_folder = next((p for p in tops if p.name.lower() == f"gtmod{scale}"), next(iter(tops), folder))
    lows = [path for name, path in sorted(names.items()) if re.fullmatch(LOW, name)]
    lows = [p / f"X{scale}" if (p / f"X{scale}").is_dir() else p for p in lows]
    lows = [p for p in lows if not (named := re.search(r"(\d+)$", p.name)) or int(named[1]) == scale]
    high = [path for path in picture_files([high_folder]) if path.parent == high_folder]
    if not lows:
        return [(path, None) for path in high]
    pairs = []
    for path in high:
        tries = [lows[0] / f"{path.stem}{end}{path.suffix}" for end in ("", f"x{scale}", f"_LRBI_x{scale}")]
        pairs.append((path, next((low for low in tries if low.is_file()), tries[0])))
    return _complete(folder, pairs)


def _complete(folder: Path, pairs: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path | None]]:
    if lost := [low.name for _, low in pairs if not low.is_file()]:
        raise UserError(f"{folder}: has no low-resolution picture {some(lost)}")
    return list(pairs)


class Patches(Dataset):
    """Random pairs of patches (3, p, p) and (3, scale p, scale p) in [0, 1], turned and mirrored, `number` an epoch.

    A picture is drawn as often as its area asks. Pictures up to `memory` bytes in all, with their reduced forms, are
    read once.
    """

    def __init__(self, files: Sequence[Path], scale: int, patch_size: int, number: int, memory: int = 2**31) -> None:
        self.files, self.scale, self.patch_size, self.number = list(files), scale, patch_size, number
        self.sizes = []
        for path in self.files:
            with Image.open(path) as picture:
                self.sizes.append((picture.height // scale, picture.width // scale))
            if min(self.sizes[-1]) < patch_size:
                raise UserError(
                    f"{path}: is {self.sizes[-1][1] * scale} x {self.sizes[-1][0] * scale} pixels; patches of "
                    f"{patch_size} at scale {scale} need {patch_size * scale} a side"
                )
        areas = torch.tensor([height * width for height, width in self.sizes], dtype=torch.float64)
        self.shares = areas / areas.sum()
        fits = float(areas.sum()) * 3 * (scale**2 + 1) <= memory
        self.held = [self.read(path) for path in self.files] if fits else None

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """A picture, reduced and whole, uint8."""
        high = crop_to(read_rgb(path), self.scale)
        return reduced(high, self.scale), high

    def content_digest(self) -> str:
        """What the pictures hold, and how they are cut."""
        return "".join(content_digest(path) for path in self.files) + f"{self.scale} {self.patch_size} {self.number}"

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, _index: int) -> tuple[Tensor, Tensor]:
        which = int(torch.multinomial(self.shares, 1))
        low, high = self.read(self.files[which]) if self.held is None else self.held[which]
        top, left = (int(torch.randint(side - self.patch_size + 1, ())) for side in low.shape[1:])
        pair = []
        flips = torch.rand(3) < 0.5
        for picture, factor in ((low, 1), (high, self.scale)):
            y, x, side = (n * factor for n in (top, left, self.patch_size))
            patch = picture[:, y : y + side, x : x + side]
            patch = patch.flip([axis + 1 for axis in (0, 1) if flips[axis]])
            pair.append((patch.mT if flips[2] else patch).float() / 255)
        return pair[0], pair[1]
