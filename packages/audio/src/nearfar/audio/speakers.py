"""Recordings of speakers: finding them in the layouts of customary corpora, judging their quality, embedding them."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly

from nearfar.audio.ltdnn import SpeakerEncoder
from nearfar.audio.sound import SUFFIXES, Recording
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, file_digest

Samples = NDArray[np.float32]

# Finding -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "voxceleb": r"(?:.*/)?(?P<name>(?P<speaker>id\d{5})/(?P<session>[^/]+)/[^/]+)",
    "librispeech": r"(?:.*/)?(?P<speaker>\d+)/(?P<session>\d+)/(?P=speaker)-(?P=session)-\d+\.\w+",
    "vctk": r"(?:.*/)?(?P<speaker>[ps]\d+)/(?P=speaker)_(?P<number>\d{3})(?P<microphone>_mic\d)?\.\w+",
    "folder": r"(?P<speaker>[^/]+)/(?:(?P<session>[^/]+)/)?.+",
}
"""How paths below the root tell speaker and session, by the name of the layout."""


@dataclass(frozen=True)
class Utterance:
    """A recording by the name that lists use for it, with its speaker and session where they are known."""

    name: str
    path: Path
    speaker: str | None = None
    session: str | None = None


def find_utterances(source: str | Path, layout: str = "auto") -> list[Utterance]:
    """The recordings below a folder, in order of their names.

    `layout`: "voxceleb" (`id1xxxx/<video>/<utterance>`, names begin at the speaker), "librispeech"
    (`<speaker>/<chapter>/...`), "vctk" (without p280, p315, the utterances 000 to 024 and second microphones), "folder"
    (`<speaker>/[<session>/]...`), "kaldi" (a folder with `wav.scp` and `utt2spk`), "audiofolder" (a folder with
    `metadata.csv` or `metadata.jsonl` that names `file_name` and a speaker column), or a regular expression for the
    path below the root with a group `speaker` and, if wanted, `session` and `name`. "auto" looks at the files.

    Raises UserError where nothing is there, a path does not fit the layout, or a list names a file twice.
    """
    root = Path(source)
    if root.is_file() and root.name == "wav.scp":
        root = root.parent
    if not root.is_dir():
        raise UserError(f"{source}: no such folder of recordings")
    if layout == "kaldi" or (layout == "auto" and (root / "wav.scp").is_file()):
        return _kaldi(root)
    tables = [path for name in ("metadata.csv", "metadata.jsonl") if (path := root / name).is_file()]
    if layout == "audiofolder" or (layout == "auto" and tables):
        if not tables:
            raise UserError(f"{root}: an audiofolder has a metadata.csv or metadata.jsonl")
        return _audiofolder(root, tables[0])
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{root}: holds no recordings ({', '.join(SUFFIXES)})")
    below = [path.relative_to(root).as_posix() for path in paths]
    if layout == "auto":
        fits = {name: sum(bool(re.fullmatch(LAYOUTS[name], path)) for path in below) for name in LAYOUTS}
        layout = next((name for name in ("voxceleb", "librispeech", "vctk") if 2 * fits[name] > len(below)), "folder")
    try:
        pattern = re.compile(LAYOUTS.get(layout, layout))
    except re.error as error:
        raise UserError(
            f"layout {layout!r}: is neither {', '.join(LAYOUTS)} nor a regular expression ({error})"
        ) from error
    if "speaker" not in pattern.groupindex:
        raise UserError(f"layout {layout!r}: the expression needs a group (?P<speaker>...)")
    found = []
    for path, name in zip(paths, below):
        match = pattern.fullmatch(name)
        if match is None:
            if layout == "vctk" or (layout == "folder" and "/" not in name):
                if layout == "folder":  # a flat folder: recordings of nobody in particular
                    found.append(Utterance(name, path))
                continue
            raise UserError(f"{path}: does not fit the layout {layout!r}; name another one")
        groups = match.groupdict()
        if layout == "vctk" and (
            groups["speaker"] in ("p280", "p315") or int(groups["number"]) < 25 or groups["microphone"] == "_mic2"
        ):
            continue
        found.append(Utterance(groups.get("name") or name, path, groups["speaker"], groups.get("session")))
    if not found:
        raise UserError(f"{root}: no recording is left under the rules of the layout {layout!r}")
    return found


def _kaldi(root: Path) -> list[Utterance]:
    if not (root / "wav.scp").is_file():
        raise UserError(f"{root}: a Kaldi folder has a wav.scp")
    speakers = _two_columns(root / "utt2spk") if (root / "utt2spk").is_file() else {}
    found = []
    for name, place in _two_columns(root / "wav.scp").items():
        if place.endswith("|"):
            raise UserError(f"{root / 'wav.scp'}: {name} is a command, which is never run; decode it to a file")
        path = Path(place)
        found.append(Utterance(name, path if path.is_absolute() else root / path, speakers.get(name)))
    if speakers and (lost := [utterance.name for utterance in found if utterance.speaker is None]):
        raise UserError(f"{root / 'utt2spk'}: lacks {len(lost)} utterances of wav.scp, {lost[0]} first")
    return found


def _two_columns(path: Path) -> dict[str, str]:
    rows: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, *rest = line.split(maxsplit=1)
        if not rest:
            raise UserError(f"{path}, line {number}: one column, two are needed")
        if name in rows:
            raise UserError(f"{path}, line {number}: {name} is there twice")
        rows[name] = rest[0].strip()
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


def _audiofolder(root: Path, table: Path) -> list[Utterance]:
    text = table.read_text(encoding="utf-8-sig")
    try:
        if table.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{table}: cannot be read ({error})") from error
    if not rows or "file_name" not in rows[0]:
        raise UserError(f"{table}: needs rows with a column file_name")
    column = next((name for name in ("speaker", "speaker_id", "client_id", "label") if name in rows[0]), None)
    names = [str(row["file_name"]) for row in rows]
    if len(set(names)) != len(names):
        raise UserError(f"{table}: names a file twice")
    return [Utterance(n, root / n, None if column is None else str(row[column])) for n, row in zip(names, rows)]


# Reading and judging -----------------------------------------------------------------------------------------------


def read_samples(
    path: str | Path, rate: int, start: float = 0.0, seconds: float | None = None, mix_channels: bool = False
) -> Samples:
    """Samples of a recording, or of a stretch of it, resampled to `rate`.

    Raises UserError for what `Recording` refuses, more than one channel (two channels are often two speakers) unless
    `mix_channels` averages them, a rate below 4 kHz, and digital silence.
    """
    with Recording(path) as recording:
        if recording.channels > 1 and not mix_channels:
            raise UserError(
                f"{path}: has {recording.channels} channels, which may be different speakers; "
                "split them, or mix them with --mix-channels"
            )
        if recording.rate < 4000:
            raise UserError(f"{path}: {recording.rate} Hz is too low for speech")
        first = min(int(start * recording.rate), recording.frames - 1)
        last = recording.frames if seconds is None else min(first + round(seconds * recording.rate), recording.frames)
        samples = recording.read(first, last)
        old = recording.rate
    if not samples.any():
        raise UserError(f"{path}: is silent, every sample is 0")
    if old != rate:
        common = int(np.gcd(old, rate))
        samples = resample_poly(samples, rate // common, old // common).astype(np.float32)
    return samples


@dataclass(frozen=True)
class Quality:
    """What a recording offers a speaker model.

    seconds: its length. speech: seconds that are clearly louder than its quiet parts. snr: level of those over the
    quiet parts, in dB, at most 60. clipped: share of samples at full scale. bandwidth: Hz up to which it has energy.
    """

    seconds: float
    speech: float
    snr: float
    clipped: float
    bandwidth: float


def measure_quality(samples: Samples, rate: int) -> Quality:
    """Judge samples by their levels: frames of 25 ms every 10 ms, split at the middle between quiet and loud.

    The quiet level is the 5th percentile of the frames' levels (at least -90 dB of full scale), the loud one the 95th.
    Where they are less than 6 dB apart (a hum, steady noise) nothing counts as speech. The bandwidth is the highest
    quarter kilohertz whose mean power is within 60 dB of the strongest. These are estimates that need no model: music
    counts as speech too.
    """
    size, shift = rate // 40, rate // 100
    x = np.asarray(samples, np.float64)
    seconds, clipped = len(x) / rate, float(np.mean(np.abs(x) >= 0.999))
    if len(x) < size:
        return Quality(seconds, 0.0, 0.0, clipped, 0.0)
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[::shift]
    power = np.square(frames - frames.mean(1, keepdims=True)).mean(1)
    level = 10 * np.log10(np.maximum(power, 1e-9))
    quiet, loud = np.percentile(level, [5, 95])
    is_speech = level > (quiet + loud) / 2
    if loud - quiet < 6 or loud < -70:
        return Quality(seconds, 0.0, 0.0, clipped, _bandwidth(frames, rate))
    snr = 10 * np.log10(power[is_speech].mean() / max(power[~is_speech].mean(), 1e-9))
    speech = float(is_speech.sum() * shift / rate)
    return Quality(seconds, speech, float(np.clip(snr, 0, 60)), clipped, _bandwidth(frames[is_speech], rate))


def _bandwidth(frames: NDArray[np.float64], rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(frames[:: max(1, len(frames) // 500)] * np.hanning(frames.shape[1]))) ** 2
    mean, step = spectrum.mean(0), rate / frames.shape[1]
    width = max(1, round(250 / step))
    bands = np.array([mean[i : i + width].mean() for i in range(0, len(mean), width)])
    return float(min(rate / 2, (np.flatnonzero(bands >= 1e-6 * bands.max())[-1] + 1) * width * step))


@dataclass(frozen=True)
class Gate:
    """The least that a recording must offer; what does not pass is refused, never scored.

    speech: seconds. snr: dB. clipped: greatest share. bandwidth: Hz.
    """

    speech: float = 1.0
    snr: float = 5.0
    clipped: float = 0.02
    bandwidth: float = 3000.0

    def reasons(self, quality: Quality) -> list[str]:
        """Why a recording does not pass; empty where it does."""
        found = []
        if quality.speech < self.speech:
            found.append(f"{quality.speech:.1f} s of speech in {quality.seconds:.1f} s, {self.speech:g} s are needed")
        elif quality.snr < self.snr:
            found.append(f"speech is only {quality.snr:.0f} dB above the noise, {self.snr:g} dB are needed")
        if quality.clipped > self.clipped:
            found.append(f"{quality.clipped:.1%} of its samples are clipped, {self.clipped:.0%} are allowed")
        if quality.speech and quality.bandwidth < self.bandwidth:
            found.append(f"has sound up to {quality.bandwidth:.0f} Hz only, {self.bandwidth:.0f} Hz are needed")
        return found

    def check(self, path: str | Path, quality: Quality) -> None:
        """Raise UserError with the reasons, where there are any."""
        if reasons := self.reasons(quality):
            raise UserError(f"{path}: refused by the quality gate: {'; '.join(reasons)}")


# Embedding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """An utterance's embedding, before normalisation, and its quality."""

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

    A recording longer than `max_seconds` is embedded in equal parts of at most that length and their normalised
    embeddings are averaged, so memory does not grow with its length.

    Args:
        model: in evaluation mode.
        cache: folder of embeddings by model and content of the file; None keeps none. Interrupted work goes on there.
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
        self.cache = None if cache is None else Path(cache) / model_digest(model)[:16]
        self.device = next(model.parameters()).device

    def embed_samples(self, samples: Samples) -> NDArray[np.float32]:
        """Samples `(n,)` at the model's rate to an embedding `(E,)`. Raises UserError where they are too few."""
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
        if len(found) == 1:
            return found[0]
        return np.mean([embedding / np.linalg.norm(embedding) for embedding in found], 0)

    def __call__(self, path: str | Path) -> Embedded:
        """Embed a file. Raises UserError where it cannot be read, is too short, or does not pass the gate."""
        stored = None
        if self.cache is not None:
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file")
            digest = file_digest(path)
            stored = self.cache / digest[:2] / f"{digest}{'-mixed' if self.mix_channels else ''}.npz"
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
    try:
        with np.load(path, allow_pickle=False) as arrays:
            quality = Quality(*(float(arrays[name]) for name in Quality.__dataclass_fields__))
            return Embedded(arrays["embedding"], quality)
    except (OSError, ValueError, KeyError):
        return None


def locate(
    names: Iterable[str], root: str | Path, known: Sequence[Utterance] = ()
) -> tuple[dict[str, Path], list[str]]:
    """Files of the names in a list: from `known`, else below `root`, with or without their ending.

    Returns the files by name and the names without a file.
    """
    table: dict[str, Any] = {utterance.name: utterance.path for utterance in known}
    found, missing = {}, []
    for name in dict.fromkeys(names):
        options = [table.get(name), Path(root) / name, *(Path(root) / f"{name}{suffix}" for suffix in SUFFIXES)]
        place = next((path for path in options if path is not None and path.is_file()), None)
        if place is None:
            missing.append(name)
        else:
            found[name] = place
    return found, missing
