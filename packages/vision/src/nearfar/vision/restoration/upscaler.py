"""Enlarging picture files: in bounded memory, with their transparency, bits and profile, going on after a stop."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, locked, write_json
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.finite import is_finite
from nearfar.core.made_from import model_digest
from nearfar.core.memory import resident_memory
from nearfar.core.reading import reading
from nearfar.vision.restoration.files import PictureFile, check_target, write_file
from nearfar.vision.restoration.networks import load_restorer
from nearfar.vision.restoration.restorer import Restorer
from nearfar.vision.restoration.tiles import Tiling, bands, choose_tiling


class Upscaler:
    """A network that enlarges picture files."""

    def __init__(self, model: Restorer, digest: str) -> None:
        self.model, self.digest = model.eval(), digest

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu", *, half: bool = False) -> "Upscaler":
        """From a checkpoint file or a folder, see `load_restorer`; `half` computes in bfloat16."""
        model = load_restorer(source).to(device)
        return cls(model.bfloat16() if half else model, model_digest(source))

    def tiling(self, picture: PictureFile, memory: int | None, tiling: Tiling | None = None) -> Tiling:
        """Tiles for a picture: those given, else the largest for which all stays within `memory` bytes.

        Raises UserError where `memory` does not hold what the process, the picture and its enlarged form take.
        """
        height, width = picture.pixels.shape[:2]
        if tiling is not None or memory is None:
            return tiling or Tiling(max(height, width), 0)
        base = resident_memory()
        output = picture.pixels.nbytes * self.model.scale**2
        if base + output >= memory:
            raise UserError(
                f"--memory: the process and the picture hold {base / 2**20:.0f} MB, the enlarged picture "
                f"{output / 2**20:.0f} MB; {memory / 2**20:.0f} MB leave nothing for the model's work"
            )
        return choose_tiling(self.model, (height, width), memory - base - output)

    def __call__(
        self,
        picture: PictureFile,
        target: Path,
        tiling: Tiling | None = None,
        *,
        memory: int | None = None,
        ensemble: bool = False,
        quality: int = 95,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tiling:
        """Enlarge `picture` into the file `target`; returns the tiles, which `tiling()` chooses unless they are given.

        Grey pictures are computed as RGB of equal channels and averaged, transparency in a pass of its own. Rows of
        tiles that are done lie in a hidden folder beside the target until all are, and a call with the same picture,
        network and settings goes on there, with the tiles that were chosen then. `progress` is called with the rows of
        tiles that are done, and all.

        Raises UserError where the format cannot hold the picture, or where outputs are not finite.
        """
        check_target(picture, target)
        height, width, channels = picture.pixels.shape
        scale = self.model.scale
        passes = [slice(0, channels - 1), slice(channels - 1, channels)] if picture.alpha else [slice(0, channels)]
        work = target.with_name(f".{target.name}.upscaling")
        with locked(work, "enlarges"):
            given = None if tiling is None else vars(tiling)
            state = _State(work, data_digest([content_digest(picture.path), self.digest, given, memory, ensemble]))
            tiling = state.tiling = state.tiling or self.tiling(picture, memory, tiling)
            rows = len(tiling.spans(height, self.model.multiple))
            shape = (height * scale, width * scale, channels)
            out = state.open(shape, picture.pixels.dtype)
            for index, part in enumerate(passes):
                if index < state.index:
                    continue
                planes = torch.tensor(picture.pixels[..., part]).permute(2, 0, 1)
                grey = len(planes) == 1
                planes = planes.expand(self.model.in_chans, -1, -1) if grey else planes
                going_on: dict[str, Any] = {"done": state.done, "begun": state.begun} if index == state.index else {}
                for band in bands(self.model, planes, tiling, peak=picture.peak, ensemble=ensemble, **going_on):
                    if not is_finite(band.rows):
                        raise UserError(f"{picture.path}: the network's outputs are not finite")
                    values = band.rows.mean(0, keepdim=True) if grey else band.rows
                    out[band.first : band.first + values.shape[1], :, part] = _quantized(values, picture)
                    last = band.done == rows
                    state.save(out, index + last, 0 if last else band.done, None if last else band.begun)
                    progress(index * rows + band.done, len(passes) * rows)
            try:
                write_file(target, out, picture, quality=quality)
            except OSError as error:
                raise UserError(
                    f"{target}: cannot be written ({error}); what is computed is kept, run it again"
                ) from error
            del out
            shutil.rmtree(work)
        return tiling


def _quantized(values: Tensor, picture: PictureFile) -> np.ndarray:
    """(C, k, W) in [0, 1] as (k, W, C) in the picture's own numbers; overshoots are cut off there."""
    whole = picture.pixels.dtype.kind != "f"
    found = values.clamp(0, 1).permute(1, 2, 0) * picture.peak
    return (found.round() if whole else found).numpy().astype(picture.pixels.dtype)


class _State:
    """How far a picture is, in a folder: rows that are done, and the sums that the next row of tiles goes on from."""

    def __init__(self, folder: Path, made_from: str) -> None:
        self.folder, self.made_from = folder, made_from
        self.index, self.done, self.begun = 0, 0, None
        self.tiling: Tiling | None = None
        if not (folder / "state.json").is_file():
            return
        with reading(folder, "is no picture that can be gone on with", "remove it"):
            found = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if found["made_from"] == made_from and (folder / "rows").is_file():
                self.index, self.done, self.tiling = found["pass"], found["done"], Tiling(**found["tiling"])
                if self.done:
                    with np.load(folder / found["sums"], allow_pickle=False) as sums:
                        self.begun = torch.from_numpy(sums["sums"])

    def open(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap:
        """The enlarged picture, on disk."""
        path, size = self.folder / "rows", math.prod(shape) * dtype.itemsize
        if not (self.index or self.done):
            with path.open("wb") as file:  # a full disk would otherwise end the process when a row is written
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    elif shutil.disk_usage(self.folder).free < size:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    file.truncate(size)
                except OSError as error:
                    file.close()
                    path.unlink()
                    raise UserError(
                        f"{self.folder.parent}: {error.strerror}; the enlarged picture takes {size / 2**20:.0f} MB "
                        "there until it is written, and then once more"
                    ) from error
        return np.memmap(path, dtype, "r+", shape=shape)

    def save(self, out: np.memmap, index: int, done: int, begun: Tensor | None) -> None:
        out.flush()
        sums = f"sums-{index}-{done}.npz"
        if begun is not None:
            with atomic_path(self.folder / sums) as temporary:
                np.savez(temporary, sums=begun.numpy())
        found = {"made_from": self.made_from, "tiling": vars(self.tiling), "pass": index, "done": done, "sums": sums}
        write_json(self.folder / "state.json", found, exact=True)
        for old in self.folder.glob("sums-*.npz"):
            if old.name != sums:
                old.unlink()
