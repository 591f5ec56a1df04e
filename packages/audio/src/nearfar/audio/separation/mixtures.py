"""Mixtures to learn and measure separation on: the corpora people have, their own folders, and mixing on the fly."""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.audio.augment import add_reverberation, change_speed, colored_noise, room_response
from nearfar.audio.corpora import find_utterances
from nearfar.audio.sound import SUFFIXES, Recording, resample
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv
from nearfar.core.fingerprint import content_digest
from nearfar.core.leakage import Side, check_apart
from nearfar.core.reading import reading

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Mixture:
    """One mixture on disk and its sources, all of one rate."""

    name: str
    mix: Path
    sources: tuple[Path, ...]

    def read(self) -> tuple[Samples, Samples, int]:
        """The mixture (n,), the sources (K, n) and the rate; n is the shortest of their lengths."""
        sounds = []
        for path in (self.mix, *self.sources):
            with Recording(path) as recording:
                recording.refuse_channels("write the one that is meant to a file of its own")
                sounds.append((recording.read(0, recording.frames), recording.rate))
        if len({rate for _, rate in sounds}) > 1:
            raise UserError(f"{self.mix}: the files of this mixture have different rates")
        length = min(len(sound) for sound, _ in sounds)
        return sounds[0][0][:length], np.stack([sound[:length] for sound, _ in sounds[1:]]), sounds[0][1]


def find_mixtures(
    root: str | Path, split: str | None = None, mix: str | None = None, targets: str | None = None
) -> list[Mixture]:
    """The mixtures of a corpus, a folder or a list, in a fixed order.

    root: one of
        - a tree of WSJ0-mix, LibriMix, WHAM! or WHAMR!, at any level down to the split;
        - a folder with `mix`, `s1`, `s2` ... side by side, or with `<name>_mix.wav`, `<name>_source1.wav` ...;
        - a CSV with a header: `ID, mix_wav, s1_wav, s2_wav ...` (speechbrain's) or `id, mix, s1, s2 ...` (ours);
        - a text list, one mixture per line: the path of the mixture, then those of its sources (ClearerVoice's).
    split: the folder to take, e.g. "tr", "cv", "tt", "train-100", "dev", "test".
    mix, targets: which folder holds the mixtures and which the sources ("{}" stands for 1, 2 ...). By default `mix` and
        `s{}`; in LibriMix `mix_clean`; in WHAM! `mix_both`; in WHAMR! `mix_both_reverb` with `s{}_anechoic`, the
        standard task: separate, remove the noise and the reverberation.

    Raises UserError where nothing is recognized, the tree leaves a choice (it is listed), or files are missing.
    """
    root = Path(root)
    if root.is_file():
        return _from_list(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder or list of mixtures")
    if flat := sorted(p for p in root.iterdir() if p.stem.endswith("_mix") and p.suffix.lower() in SUFFIXES):
        return [_flat(path) for path in flat]
    homes = [
        folder
        for folder in [root, *sorted(p for p in root.rglob("*") if p.is_dir() and len(p.relative_to(root).parts) <= 4)]
        if any((folder / name).is_dir() for name in ("s1", "s1_anechoic"))
    ]
    if split is not None:
        homes = [folder for folder in homes if folder.name == split]
    if not homes:
        where = f" with a split {split}" if split else ""
        raise UserError(f"{root}: no mixtures found{where}; expected folders mix*, s1, s2 side by side, or a list")
    if len(homes) > 1:
        raise UserError(
            f"{root}: holds several sets of mixtures, name one of them: "
            + ", ".join(str(folder.relative_to(root)) for folder in homes)
        )
    return _from_tree(homes[0], mix, targets)


def _from_tree(folder: Path, mix: str | None, targets: str | None) -> list[Mixture]:
    present = {p.name for p in folder.iterdir() if p.is_dir()}
    reverberant, wham = "s1_anechoic" in present, folder.name in ("tr", "cv", "tt")
    if mix is None:
        usual = ["mix", "mix_both", "mix_clean"] if wham else ["mix", "mix_clean"]
        mix = next((name for name in (["mix_both_reverb"] if reverberant else usual) if name in present), None)
    targets = targets or ("s{}_anechoic" if reverberant else "s{}")
    if mix not in present:
        choice = ", ".join(sorted(name for name in present if name.startswith("mix"))) or "no folder of mixtures"
        raise UserError(f"{folder}: there is no {mix or 'mix'} in it; there is {choice}")
    homes: list[Path] = []
    while targets.format(len(homes) + 1) in present:
        homes.append(folder / targets.format(len(homes) + 1))
    if len(homes) < 1:
        raise UserError(f"{folder}: there is no {targets.format(1)} in it")
    files = sorted(p for p in (folder / mix).iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder / mix}: holds no sound files")
    found = [Mixture(path.stem, path, tuple(home / path.name for home in homes)) for path in files]
    _refuse_missing(folder, found)
    return found


def _flat(path: Path) -> Mixture:
    name = path.stem.removesuffix("_mix")
    sources: list[Path] = []
    while (source := path.with_name(f"{name}_source{len(sources) + 1}{path.suffix}")).is_file():
        sources.append(source)
    if not sources:
        raise UserError(f"{path}: its sources {name}_source1{path.suffix} ... are missing")
    return Mixture(name, path, tuple(sources))


def _from_list(path: Path) -> list[Mixture]:
    with reading(path, "cannot be read as a list of mixtures"), path.open(newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, skipinitialspace=True)
            header = reader.fieldnames or []
            mixed = next((name for name in ("mix_wav", "mix") if name in header), None)
            columns = [name for name in header if re.fullmatch(r"s\d+(_wav)?", name)]
            if mixed is None or not columns:
                raise UserError(f"{path}: needs columns mix (or mix_wav) and s1, s2 ...; it has {', '.join(header)}")
            key = next((name for name in ("ID", "id") if name in header), mixed)
            rows = [(Path(row[key]).stem, row[mixed], *(row[c] for c in columns)) for row in reader]
        else:
            rows = [(Path(words[0]).stem, *words) for words in map(str.split, file) if words]
    if any(row[1] is None for row in rows):
        raise UserError(f"{path}: a row names no mixture; it is cut off")
    if short := [row[0] for row in rows if len(row) < 3]:
        raise UserError(f"{path}: {short[0]} has no sources; a line is the mixture's path, then those of its sources")
    there = lambda text: Path(text) if Path(text).is_absolute() else path.parent / text  # noqa: E731
    found = [Mixture(str(row[0]), there(row[1]), tuple(there(source) for source in row[2:] if source)) for row in rows]
    if not found:
        raise UserError(f"{path}: lists no mixtures")
    _refuse_missing(path, found)
    return found


def _refuse_missing(where: Path, mixtures: Iterable[Mixture]) -> None:
    missing = [path for mixture in mixtures for path in (mixture.mix, *mixture.sources) if not path.is_file()]
    if missing:
        raise UserError(f"{where}: {len(missing)} files are missing, the first is {missing[0]}")


def check_mixtures(mixtures: Sequence[Mixture]) -> list[dict[str, str | int | float]]:
    """One row per mixture (id, mix, s1 ..., seconds, rate) for a manifest; reads the headers only.

    Raises UserError that lists mixtures whose files differ in rate or by more than 0.1 s in length, or whose number of
    sources differs from the first's.
    """
    rows, bad = [], []
    for mixture in mixtures:
        try:
            headers = [soundfile.info(path) for path in (mixture.mix, *mixture.sources)]
        except (soundfile.LibsndfileError, OSError, ValueError) as error:
            bad.append(f"{mixture.name}: {error}")
            continue
        rates, lengths = {h.samplerate for h in headers}, [h.frames for h in headers]
        rate = headers[0].samplerate
        if len(rates) > 1:
            bad.append(f"{mixture.name}: rates {', '.join(map(str, sorted(rates)))}")
        elif max(lengths) - min(lengths) > 0.1 * rate:
            bad.append(f"{mixture.name}: lengths {min(lengths) / rate:.2f} to {max(lengths) / rate:.2f} s")
        elif len(mixture.sources) != len(mixtures[0].sources):
            bad.append(f"{mixture.name}: {len(mixture.sources)} sources, the first has {len(mixtures[0].sources)}")
        paths = {"mix": str(mixture.mix)} | {f"s{k + 1}": str(path) for k, path in enumerate(mixture.sources)}
        rows.append({"id": mixture.name, **paths, "seconds": min(lengths) / rate, "rate": rate})
    if bad:
        raise UserError(f"{len(bad)} mixtures do not fit together:\n  " + "\n  ".join(bad[:20]))
    return rows


def write_manifest(path: str | Path, mixtures: Sequence[Mixture]) -> Path:
    """Check the mixtures and list them in a CSV that `find_mixtures` reads."""
    return write_csv(path, check_mixtures(mixtures))


def refuse_shared_sources(train: Iterable[Mixture], other: Iterable[Mixture]) -> None:
    """Raises LeakageError where a source recording is on both sides, under whatever name: scores would be too good."""
    parts = [list(dict.fromkeys(source for mixture in part for source in mixture.sources)) for part in (train, other)]
    names = ("the mixtures for training", "those for validation or test")
    contents = [list(map(content_digest, part)) for part in parts]
    train_side, other_side = (Side(name, list(map(str, part)), at) for name, part, at in zip(names, parts, contents))
    check_apart(train_side, other_side)


def find_voices(
    roots: str | Path | Sequence[Path], layout: str = "auto", same: Sequence[Sequence[str]] = ()
) -> dict[str, list[Path]]:
    r"""The utterances of each speaker below one or several folders.

    layout: how paths tell the speaker, see `nearfar.audio.corpora.find_utterances`; a regular expression such as
        r"\d_(?P<speaker>\w+)_\d+\.wav" where no customary layout fits.
    same: names that belong to one person, e.g. [["en-f", "es-f"]]; the first stands for all.

    Raises UserError for fewer than two speakers, or recordings that show no speaker.
    """
    voices: dict[str, list[Path]] = {}
    stand_in = {name: group[0] for group in same for name in group}
    folders = [Path(roots)] if isinstance(roots, str | Path) else list(roots)
    for utterance in (utterance for folder in folders for utterance in find_utterances(folder, layout)):
        if utterance.speaker is None:
            raise UserError(f"{utterance.path}: shows no speaker; put each speaker in a folder, or name a layout")
        voices.setdefault(stand_in.get(utterance.speaker, utterance.speaker), []).append(utterance.path)
    if len(voices) < 2:
        where = ", ".join(map(str, folders))
        raise UserError(f"{where}: utterances of at least two speakers are needed, found {len(voices)}")
    return voices


def split_voices(voices: dict[str, list[Path]], part: str, held_out: float = 0.1) -> dict[str, list[Path]]:
    """The "train", "valid" or "test" share of every speaker's utterances.

    `held_out` of them go to "valid", as many to "test", the rest to "train". An utterance's share follows from its
    name alone, so adding recordings moves none; all speakers are in every share, their utterances are not.
    """
    bounds = {"test": (0.0, held_out), "valid": (held_out, 2 * held_out), "train": (2 * held_out, 1.0)}
    if part not in bounds:
        raise ValueError(f"part is {part!r}; it must be train, valid or test")
    low, high = bounds[part]
    where = lambda path: int(sha256(path.name.encode()).hexdigest()[:8], 16) / 16**8  # noqa: E731
    chosen = {name: [p for p in paths if low <= where(p) < high] for name, paths in voices.items()}
    return {name: paths for name, paths in chosen.items() if paths}


def draw_mixture(
    utterances: Sequence[Samples],
    rng: np.random.Generator,
    length: int | None = None,
    noise: Samples | None = None,
    overlap: float = 1.0,
    snr: tuple[float, float] = (-6.0, 3.0),
) -> tuple[Samples, Samples]:
    """Mix one utterance of each voice as speechbrain's dynamic mixing does: the mixture (n,) and the sources (K, n).

    A random window of the common least length (at most `length`); mean absolute amplitude set to g_1 =
    clip(N(-27.43, 2.57), -45, 0) dB for the first voice, to clip(g_1 + N(-2.51, 2.66), -45, 0) dB for the others;
    everything scaled so that the highest peak is 0.9. Noise is looped or cropped to the length and set to `snr` dB
    against the louder voice (-6 .. +3, as in WHAM!); the sources stay free of it. Of the voices after the first only a
    stretch is heard, at the start or the end, of `overlap` to all of the window.
    """
    size = min([len(u) for u in utterances] + ([length] if length else []))
    sources, first = [], 0.0
    for k, utterance in enumerate(utterances):
        start = int(rng.integers(0, len(utterance) - size + 1))
        piece = utterance[start : start + size].astype(np.float64)
        drawn = rng.normal(-27.43, 2.57) if k == 0 else first + rng.normal(-2.51, 2.66)
        gain = float(np.clip(drawn, -45, 0))
        first = gain if k == 0 else first
        piece = piece / max(np.abs(piece).mean(), 1e-8) * 10 ** (gain / 20)
        if k and overlap < 1:
            heard = round(size * rng.uniform(overlap, 1))
            piece[slice(heard, None) if rng.random() < 0.5 else slice(0, size - heard)] = 0
        sources.append(piece)
    stacked = np.stack(sources)
    mix = stacked.sum(0)
    if noise is not None:
        repeated = np.resize(noise, max(size, len(noise)))
        start = int(rng.integers(0, len(repeated) - size + 1))
        background = repeated[start : start + size].astype(np.float64)
        wanted = np.square(stacked).mean(1).max() / 10 ** (rng.uniform(*snr) / 10)
        mix = mix + background * np.sqrt(wanted / max(np.square(background).mean(), 1e-12))
    scale = 0.9 / max(np.abs(mix).max(), np.abs(stacked).max(), 1e-8)
    return (scale * mix).astype(np.float32), (scale * stacked).astype(np.float32)


class DrawnMixtures(Dataset):
    """Endless mixtures of different speakers' utterances, drawn anew each time (`draw_mixture`).

    voices: utterances of each speaker. count: mixtures per epoch. Speakers are drawn with probability proportional to
    their number of utterances. seconds: longest mixture. fill: append further utterances of the speaker until that
    length is reached, for corpora of short ones. speeds: percent of the speed, drawn for each utterance. noise: files
    to draw a background from. fixed: a seed: the same mixtures each time, for validation. overlap: see `draw_mixture`.
    rooms: probability of a simulated room (0.15 to 0.6 s of reverberation); the sources are the voices as heard in it.
    hiss: probability of white to brown noise at 5 to 30 dB, where there is no other.

    Items: mixture (n,), sources (K, n). Randomness comes from torch's generator, so a data loader's workers differ.
    """

    def __init__(
        self,
        voices: dict[str, list[Path]],
        count: int,
        rate: int = 8000,
        num_speakers: int = 2,
        seconds: float = 4.0,
        fill: bool = False,
        speeds: Sequence[int] = (95, 100, 105),
        noise: Sequence[Path] = (),
        fixed: int | None = None,
        overlap: float = 1.0,
        rooms: float = 0.0,
        hiss: float = 0.0,
    ):
        if len(voices) < num_speakers:
            raise UserError(f"{len(voices)} speakers are too few for mixtures of {num_speakers}")
        self.voices, self.names = voices, sorted(voices)
        share = np.array([len(voices[name]) for name in self.names], dtype=np.float64)
        self.share = share / share.sum()
        self.count, self.rate, self.num_speakers, self.length = count, rate, num_speakers, round(seconds * rate)
        self.fill, self.speeds, self.noise, self.fixed = fill, tuple(speeds), list(noise), fixed
        self.overlap, self.rooms, self.hiss = overlap, rooms, hiss
        self._kept: dict[Path, Samples] = {}

    def __len__(self) -> int:
        return self.count

    def _load(self, path: Path) -> Samples:
        if path not in self._kept:
            with Recording(path) as recording:
                recording.refuse_channels("write the one that is meant to a file of its own")
                sound = resample(recording.read(0, recording.frames), recording.rate, self.rate)
            if sum(len(s) for s in self._kept.values()) < 2**26:  # keep up to 256 MiB decoded
                self._kept[path] = sound
            return sound
        return self._kept[path]

    def _utterance(self, name: str, rng: np.random.Generator) -> Samples:
        speed = int(rng.choice(self.speeds)) if self.speeds else 100
        pieces: list[Samples] = []
        while not pieces or (self.fill and sum(map(len, pieces)) < self.length):
            sound = self._load(self.voices[name][rng.integers(len(self.voices[name]))])
            pieces.append(sound if speed == 100 else change_speed(sound, speed / 100))
        return np.concatenate(pieces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        seed = [self.fixed, index] if self.fixed is not None else int(torch.randint(2**62, ()))
        rng = np.random.default_rng(seed)
        for _ in range(100):
            speakers = rng.choice(self.names, self.num_speakers, replace=False, p=self.share)
            utterances = [self._utterance(str(name), rng) for name in speakers]
            if all(len(u) and np.abs(u).max() > 1e-4 for u in utterances):
                if self.rooms and rng.random() < self.rooms:
                    seconds = rng.uniform(0.15, 0.6)
                    responses = [room_response(self.rate, rng, seconds, rng.uniform(-12, 3)) for _ in utterances]
                    utterances = [add_reverberation(*pair) for pair in zip(utterances, responses)]
                noise, snr = None, (-6.0, 3.0)
                if self.noise:
                    noise = self._load(self.noise[rng.integers(len(self.noise))])
                elif self.hiss and rng.random() < self.hiss:
                    noise, snr = colored_noise(self.length, rng, rng.uniform(0, 2)), (5.0, 30.0)
                mix, sources = draw_mixture(utterances, rng, self.length, noise, self.overlap, snr)
                return torch.from_numpy(mix), torch.from_numpy(sources)
        raise UserError("the recordings of these speakers are silent")


class RecordedMixtures(Dataset):
    """Mixtures on disk. Items: mixture (n,), sources (K, n), cropped at random to `seconds` (None: whole).

    speeds: percent of the speed drawn for each source; the mixture is then their sum, plus what the recorded mixture
    holds beside the sources (noise), at its own speed.

    Raises UserError for a mixture at another rate.
    """

    def __init__(
        self, mixtures: Sequence[Mixture], rate: int = 8000, seconds: float | None = 4.0, speeds: Sequence[int] = ()
    ):
        self.mixtures, self.rate, self.speeds = list(mixtures), rate, tuple(speeds)
        self.length = None if seconds is None else round(seconds * rate)

    def __len__(self) -> int:
        return len(self.mixtures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mix, sources, rate = self.mixtures[index].read()
        if rate != self.rate:
            raise UserError(f"{self.mixtures[index].mix}: is at {rate} Hz, the model needs {self.rate} Hz")
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if self.speeds:
            rest = mix - sources.sum(0)
            changed = [change_speed(source, int(rng.choice(self.speeds)) / 100) for source in sources]
            size = min(len(rest), *map(len, changed))
            sources = np.stack([source[:size] for source in changed])
            mix = sources.sum(0) + rest[:size]
        if self.length is not None and len(mix) > self.length:
            start = int(rng.integers(0, len(mix) - self.length + 1))
            mix, sources = mix[start : start + self.length], sources[:, start : start + self.length]
        return torch.from_numpy(np.ascontiguousarray(mix)), torch.from_numpy(np.ascontiguousarray(sources))


def pad_batch(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtures (B, n), sources (B, K, n) and lengths (B,), padded with zeros to the longest."""
    lengths = torch.tensor([len(mix) for mix, _ in items])
    longest = int(lengths.max())
    pad: Callable[[Tensor], Tensor] = lambda x: torch.nn.functional.pad(x, (0, longest - x.shape[-1]))  # noqa: E731
    return torch.stack([pad(mix) for mix, _ in items]), torch.stack([pad(sources) for _, sources in items]), lengths
