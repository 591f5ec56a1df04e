"""Recordings of speakers: finding them in the layouts of customary corpora, judging their quality, embedding them."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.audio.corpora import Utterance, chosen_channel
from nearfar.audio.sound import Samples, stream_samples, without_silence
from nearfar.audio.speakers.encoders import EmbeddingTable, ForeignEncoder
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.quality import Gate, Quality, QualityMeter
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.fingerprint import content_digest, source_digest
from nearfar.core.finite import check_finite
from nearfar.core.memory import refuse_memory
from nearfar.core.reading import read_arrays, reading
from nearfar.core.tensor_memory import held_memory, peak_memory

SURPLUS, RESERVE = 2.0, 200 << 20
"""What kernels and the allocator take beyond the tensors: a factor, and bytes for their code, for sound and pages."""


@dataclass(frozen=True)
class Embedded:
    """An utterance's embedding, before normalization, and its quality."""

    embedding: NDArray[np.float32]
    quality: Quality


class Embedder:
    """Recordings to embeddings, each whole and on its own, with a cache on disk.

    Digital silence (a gate's, a lost packet's, an editor's) is dropped first, so a recording and the same with zeros
    agree; so is DC. A recording longer than `max_seconds` is embedded in equal parts of at most that length and their
    normalized embeddings are averaged, so memory does not grow with its length.

    Args:
        model: in evaluation mode.
        cache: folder of embeddings by model, code, `max_seconds`, channel and content of the file; None keeps
            none. Interrupted work goes on there.
        gate: recordings that do not pass it are refused; None lets all pass.
        max_seconds: longest part that the model sees at once.
        mix_channels: average the channels of recordings with several.
        channel: of recordings with several, 1, 2 ...; an utterance's own goes first.
    """

    KEPT = 600
    """Seconds of a recording that are kept between judging and embedding it; a longer one is decoded twice."""

    def __init__(
        self,
        model: SpeakerEncoder | ForeignEncoder,
        cache: str | Path | None = None,
        gate: Gate | None = None,
        max_seconds: float = 60.0,
        mix_channels: bool = False,
        channel: int | None = None,
    ) -> None:
        self.model, self.gate = model.eval(), gate
        self.max_seconds, self.mix_channels, self.channel = max_seconds, mix_channels, channel
        parts = [type(model.frontend), type(model.head)] if isinstance(model, SpeakerEncoder) else []
        code = "" if cache is None else source_digest(Embedder, type(model), *parts)
        self.cache = None if cache is None else Path(cache) / f"{model.digest[:16]}-{code[:16]}"
        self.device = next(model.parameters(), torch.empty(0)).device

    @property
    def digest(self) -> str:
        """Of the model, see `nearfar.audio.speakers.encoders.Encoder`."""
        return self.model.digest

    def keep_within(self, budget: int) -> None:
        """Shorten `max_seconds` so that `held_memory` stays below `budget` bytes; what the model holds is measured.

        Raises UserError where a part of 2 s is too much, and for models of others, whose memory is not seen.
        """
        if not isinstance(self.model, SpeakerEncoder):
            raise UserError("--memory: is for models of `train`, what others hold is not seen")
        rate, measured = self.model.sample_rate, []
        for seconds in (2, 4):
            sound = torch.randn(1, seconds * rate, device=self.device)
            with torch.inference_mode():
                measured.append(SURPLUS * peak_memory(partial(self.model, sound), self.device.type))
        each = (measured[1] - measured[0]) / 2
        kept = 4 * rate * self.KEPT
        held = held_memory(self.device) + RESERVE
        left = budget - held - kept - measured[0]
        if left < 0:
            raise refuse_memory(budget, {"the program": held, "sound": kept, "2 s in the model": measured[0]})
        self.max_seconds = min(self.max_seconds, 2 + left / each)

    def embed_samples(self, samples: Samples) -> NDArray[np.float32]:
        """Samples `(n,)` at the model's rate to an embedding `(E,)`. Raises UserError where they are too few.

        Raises DivergedError where the embedding is not finite.
        """
        kept = np.concatenate(list(without_silence([np.asarray(samples, np.float32)], self.model.sample_rate)))
        return self._embed([kept], len(kept), float(kept.mean(dtype=np.float64)) if len(kept) else 0.0)

    def _embed(self, blocks: Iterable[Samples], total: int, mean: float) -> NDArray[np.float32]:
        """blocks: `total` samples without digital silence. mean: of all of them."""
        least = self.model.min_samples
        if total < least:
            raise UserError(f"{total} samples are too few, the model needs {least}")
        count = max(1, int(np.ceil(total / (self.max_seconds * self.model.sample_rate))))
        found = []
        with torch.inference_mode():
            for part in _parts(blocks, total, count):
                whole = torch.from_numpy(part - np.float32(mean))[None].to(self.device)
                found.append(self.model(whole)[0].float().cpu().numpy())
        check_finite(np.stack(found), "the model's embedding")
        if len(found) == 1:
            return found[0]
        return np.mean([embedding / np.linalg.norm(embedding) for embedding in found], 0)

    def __call__(self, source: str | Path | Utterance) -> Embedded:
        """Embed a file, or an utterance of one.

        Raises UserError where it cannot be read, is too short, or does not pass the gate.
        """
        utterance = source if isinstance(source, Utterance) else Utterance(str(source), Path(source))
        path = utterance.path
        channel = chosen_channel(utterance, self.channel)
        stored = None
        if self.cache is not None:
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            digest = content_digest(path)
            which = "mixed" if channel is None and self.mix_channels else f"channel {channel}"
            how = hashlib.sha256(f"{self.max_seconds:g} {which} {utterance.start} {utterance.seconds}".encode())
            stored = self.cache / digest[:2] / f"{digest}-{how.hexdigest()[:12]}.npz"
        found = None if stored is None else _load_embedded(stored)
        if found is None:
            rate = self.model.sample_rate

            def blocks() -> Iterator[Samples]:
                read = stream_samples(path, rate, utterance.start, utterance.seconds, self.mix_channels, channel)
                return without_silence(_counted(read, taken), rate)

            taken: list[int] = []
            meter, kept, total, whole = QualityMeter(rate), list[Samples](), 0, 0.0
            for block in blocks():
                meter.add(block)
                total, whole = total + len(block), whole + float(block.sum(dtype=np.float64))
                if total <= self.KEPT * rate:
                    kept.append(block)
            if not total:
                raise UserError(f"{path}: is silent, no sample differs from the one before")
            quality = meter.result((sum(taken) - total) / rate)
            if self.gate is not None:
                self.gate.check(path, quality)  # before the costly part
            try:
                again = kept if total <= self.KEPT * rate else blocks()
                found = Embedded(self._embed(again, total, whole / total), quality)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if stored is not None:
                with atomic_path(stored) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, embedding=found.embedding, **asdict(found.quality))
        elif self.gate is not None:
            self.gate.check(path, found.quality)
        return found


class TableEmbedder:
    """What an `Embedder` is, for embeddings that are there already: a recording is its name in the table.

    Nothing is known of its sound, so nothing is gated; `quality` has the seconds where the table has them, else NaN.
    """

    def __init__(self, table: EmbeddingTable) -> None:
        self.table = table
        self.digest = table.digest

    def __call__(self, source: str | Path | Utterance) -> Embedded:
        """Raises UserError where the table has no such name."""
        name = source.name if isinstance(source, Utterance) else str(source)
        seconds = self.table.seconds.get(name, math.nan)
        return Embedded(self.table.find(name), Quality(seconds, seconds, math.nan, math.nan, math.nan))


def _counted(blocks: Iterable[Samples], taken: list[int]) -> Iterator[Samples]:
    for block in blocks:
        taken.append(len(block))
        yield block


def _parts(blocks: Iterable[Samples], total: int, count: int) -> Iterator[Samples]:
    """`total` samples that come in blocks, in `count` parts of equal length (up to one sample)."""
    held, waiting = list[Samples](), iter(blocks)
    for number in range(count):
        size = total // count + (number < total % count)
        while sum(map(len, held)) < size:
            held.append(next(waiting))
        joined = np.concatenate(held)
        yield joined[:size]
        held = [joined[size:]]


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
