"""Recordings of speakers: finding them in the layouts of customary corpora, judging their quality, embedding them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.audio.sound import Samples, read_samples
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.quality import Gate, Quality, measure_quality
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.fingerprint import content_digest, source_digest
from nearfar.core.finite import check_finite
from nearfar.core.reading import read_arrays, reading


@dataclass(frozen=True)
class Embedded:
    """An utterance's embedding, before normalization, and its quality."""

    embedding: NDArray[np.float32]
    quality: Quality


def model_digest(model: SpeakerEncoder) -> str:
    """A digest of the model's settings and weights: the same embedding comes from the same digest."""
    digest = hashlib.sha256(
        json.dumps([model.frontend.settings, model.head.settings], sort_keys=True, default=str).encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Embedder:
    """Recordings to embeddings, each whole and on its own, with a cache on disk.

    A recording longer than `max_seconds` is embedded in equal parts of at most that length and their normalized
    embeddings are averaged, so memory does not grow with its length.

    Args:
        model: in evaluation mode.
        cache: folder of embeddings by model, code, `max_seconds`, `mix_channels` and content of the file; None keeps
            none. Interrupted work goes on there.
        gate: recordings that do not pass it are refused; None lets all pass.
        max_seconds: longest part that the model sees at once.
        mix_channels: average the channels of recordings with several.
    """

    def __init__(
        self,
        model: SpeakerEncoder,
        cache: str | Path | None = None,
        gate: Gate | None = None,
        max_seconds: float = 60.0,
        mix_channels: bool = False,
    ) -> None:
        self.model, self.gate = model.eval(), gate
        self.max_seconds, self.mix_channels = max_seconds, mix_channels
        code = "" if cache is None else source_digest(Embedder, type(model), type(model.frontend), type(model.head))
        self.cache = None if cache is None else Path(cache) / f"{model_digest(model)[:16]}-{code[:16]}"
        self.device = next(model.parameters()).device

    def embed_samples(self, samples: Samples) -> NDArray[np.float32]:
        """Samples `(n,)` at the model's rate to an embedding `(E,)`. Raises UserError where they are too few.

        Raises DivergedError where the embedding is not finite.
        """
        least = self.model.frontend.min_samples
        if len(samples) < least:
            raise UserError(f"{len(samples)} samples are too few, the model needs {least}")
        parts = np.array_split(
            samples, max(1, int(np.ceil(len(samples) / (self.max_seconds * self.model.sample_rate))))
        )
        with torch.inference_mode():
            found = [
                self.model(torch.from_numpy(part)[None].to(self.device))[0].float().cpu().numpy() for part in parts
            ]
        check_finite(np.stack(found), "the model's embedding")
        if len(found) == 1:
            return found[0]
        return np.mean([embedding / np.linalg.norm(embedding) for embedding in found], 0)

    def __call__(self, path: str | Path) -> Embedded:
        """Embed a file. Raises UserError where it cannot be read, is too short, or does not pass the gate."""
        stored = None
        if self.cache is not None:
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file")
            digest = content_digest(Path(path))
            how = f"{self.max_seconds:g}s{'-mixed' if self.mix_channels else ''}"
            stored = self.cache / digest[:2] / f"{digest}-{how}.npz"
        found = None if stored is None else _load_embedded(stored)
        if found is None:
            rate = self.model.sample_rate
            samples = read_samples(path, rate, mix_channels=self.mix_channels)
            quality = measure_quality(samples, rate)
            if self.gate is not None:
                self.gate.check(path, quality)  # before the costly part
            try:
                found = Embedded(self.embed_samples(samples), quality)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if stored is not None:
                with atomic_path(stored) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, embedding=found.embedding, **asdict(found.quality))
        elif self.gate is not None:
            self.gate.check(path, found.quality)
        return found


def _load_embedded(path: Path) -> Embedded | None:
    if not path.is_file():
        return None
    try:
        with reading(path, "is no embedding"):
            arrays = read_arrays(path, "an embedding")
            quality = Quality(*(float(arrays[name]) for name in Quality.__dataclass_fields__))
            return Embedded(check_finite(arrays["embedding"], str(path)), quality)
    except UserError:
        return None  # it is made again
