"""Who spoke when: a recording of any length and any number of talkers to turns.

    sound -> speech activity -> embeddings of windows -> talkers -> turns

The sound is read twice, in blocks; what is kept of it is a level for every 10 ms and an embedding for every half second
of speech (3 MB and 3 MB an hour with 96 numbers each). Clustering takes at most `at_once` windows together.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from nearfar.audio.sound import Samples
from nearfar.audio.speakers.encoders import ForeignEncoder
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.quality import Quality, QualityMeter
from nearfar.audio.speakers.scoring.backend import unit
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.audio.tables import read_lines
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.finite import check_finite
from nearfar.core.memory import refuse_memory

FRAME, CELL, WINDOW, HOP = 0.01, 0.25, 2.0, 0.5
"""Seconds: of a level, of the smallest stretch that has its own talker, of a window, and from one to the next."""

LIKENESS = 0.7
"""With people in no training 0.6 to 0.7, and windows of 1.5 to 2.5 s, come out alike (`benchmarks/diarization.py`)."""

MOST = 20
"""Talkers that are looked for where their number is not given."""

FAINT, ALIKE = -12.0, 0.6
"""dB under the mixture, and correlation, up to which a separator's second voice counts as an overlap."""


@dataclass(frozen=True)
class Turn:
    """Who speaks from `start` to `end`, in seconds."""

    start: float
    end: float
    speaker: str


@dataclass(frozen=True)
class Diarization:
    """turns: by their start. seconds: of the recording. overlap: seconds in which two speak. quality: of the whole.

    voices: one embedding for each speaker, the mean of its windows.
    """

    turns: list[Turn]
    seconds: float
    overlap: float
    quality: Quality
    voices: dict[str, NDArray[np.float32]]

    def renamed(self, names: Mapping[str, str]) -> "Diarization":
        """With other names for some speakers; two that get one name become one."""
        turns = merge_turns(replace(turn, speaker=names.get(turn.speaker, turn.speaker)) for turn in self.turns)
        voices = {names.get(name, name): voice for name, voice in self.voices.items()}
        return replace(self, turns=turns, voices=voices)


def diarize(
    blocks: Callable[[], Iterable[Samples]],
    system: SpeakerSystem,
    speakers: int | None = None,
    separator: Callable[[Samples, int], Samples] | None = None,
    likeness: float = LIKENESS,
    least: float = 2.0,
    at_once: int = 3000,
    batch: int = 16,
) -> Diarization:
    """Diarize sound that comes in blocks at the model's rate; `blocks()` gives them, each time from the beginning.

    Args:
        speakers: how many there are; None lets `likeness` decide, up to 20.
        separator: (n,) samples and their rate to (K, n) voices; where two of them speak there are two turns.
        likeness: from which two groups of windows are one talker: see `_likeness`.
        least: seconds; whoever speaks less goes to the nearest other talker.
        at_once: windows that are clustered, in 16 bytes times their square; of more, every second, third, ... is, and
            who speaks in hardly any of those is no talker of its own.
        batch: windows that the model sees at once.

    Raises UserError where nothing is speech.
    """
    model = system.model
    if not isinstance(model, SpeakerEncoder | ForeignEncoder):
        raise UserError("diarization needs an encoder that hears the recording, not its embeddings")
    if speakers is not None and speakers < 1:
        raise ValueError(f"speakers must be 1 or more, got {speakers}")
    if not 0 < likeness <= 1:
        raise ValueError(f"likeness must be above 0 and at most 1, got {likeness}")
    rate, meter = model.sample_rate, QualityMeter(model.sample_rate)
    for block in blocks():
        meter.add(block)
    seconds, regions = meter.samples / rate, speech_regions(meter)
    if not regions:
        raise UserError("nothing in it is speech: no part is clearly louder than the rest")
    places = [place for region in regions for place in _windows(*region)]
    cut = _cut(blocks(), places, rate)
    x, second = _embed(cut, model, system.mean, batch, separator)
    centres = _settle(x, _cluster(x, speakers, likeness, at_once), least, speakers)
    turns = _turns(x, places, regions, centres, second)
    order = list(dict.fromkeys(turn.speaker for turn in turns))
    names = {old: f"speaker{number + 1}" for number, old in enumerate(order)}
    mean = np.zeros(model.embedding_dim) if system.mean is None else system.mean
    voices = {names[old]: (centres[int(old)] + mean).astype(np.float32) for old in order}
    named = [replace(turn, speaker=names[turn.speaker]) for turn in turns]
    return Diarization(named, seconds, overlap_seconds(named), meter.result(), voices)


def speech_regions(
    meter: QualityMeter, gap: float = 0.3, least: float = 0.2, pad: float = 0.05
) -> list[tuple[float, float]]:
    """Stretches of speech in seconds: frames above the middle between quiet and loud, digital silence not counted.

    Gaps up to `gap` are closed, shorter stretches than `least` dropped, the others widened by `pad`.
    """
    if not meter.powers:
        return []
    level = 10 * np.log10(np.maximum(np.concatenate(meter.powers), 1e-9))
    sound = level[level > -89]
    if not len(sound):
        return []
    quiet, loud = np.percentile(sound, [5, 95])
    if loud - quiet < 6 or loud < -70:
        return []
    edges = np.flatnonzero(np.diff(np.r_[False, level > (quiet + loud) / 2, False])).reshape(-1, 2) * FRAME
    found: list[tuple[float, float]] = []
    for start, end in edges.tolist():
        if found and start - found[-1][1] <= gap:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    last = meter.samples / meter.rate
    return [(max(0.0, a - pad), min(last, b + pad)) for a, b in found if b - a >= least]


def _windows(start: float, end: float) -> list[tuple[float, float]]:
    """Windows that cover a region; the last ends with it."""
    if end - start <= WINDOW:
        return [(start, end)]
    return [*((t, t + WINDOW) for t in np.arange(start, end - WINDOW, HOP).tolist()), (end - WINDOW, end)]


def _cut(blocks: Iterable[Samples], places: Sequence[tuple[float, float]], rate: int) -> Iterator[Samples]:
    """Samples of each window, all of one length: a shorter one is repeated."""
    size, waiting = round(WINDOW * rate), iter(blocks)
    held, first = np.empty(0, np.float32), 0
    for start, end in places:
        a, b = round(start * rate), round(end * rate)
        while first + len(held) < b and (block := next(waiting, None)) is not None:
            drop = min(max(a - first, 0), len(held))
            held, first = np.concatenate([held[drop:], block]), first + drop
        samples = held[a - first : b - first]
        yield np.resize(samples - samples.mean(dtype=np.float64).astype(np.float32), size)


def _embed(
    windows: Iterable[Samples],
    model: SpeakerEncoder | ForeignEncoder,
    mean: NDArray | None,
    batch: int,
    separator: Callable[[Samples, int], Samples] | None,
) -> tuple[NDArray[np.float32], dict[int, NDArray[np.float32]]]:
    """Centred embeddings of length 1 (n, E), and, by window, those of two voices (2, E) where two speak."""
    device = next(model.parameters(), torch.empty(0)).device
    found, second, held = list[NDArray](), dict[int, NDArray](), list[Samples]()

    def run(samples: Sequence[Samples]) -> NDArray[np.float32]:
        with torch.inference_mode():
            x = model(torch.from_numpy(np.stack(samples).astype(np.float32)).to(device)).float().cpu().numpy()
        return unit(check_finite(x, "the model's embeddings"), mean)

    for number, window in enumerate(windows):
        held.append(window)
        if separator is not None and (voices := _two_voices(separator(window, model.sample_rate), window)) is not None:
            second[number] = run(list(voices))
        if len(held) == batch:
            found.append(run(held))
            held.clear()
    return np.concatenate([*found, *([run(held)] if held else [])]), second


def _two_voices(voices: Samples, mix: Samples) -> Samples | None:
    """The two loudest of a separator's voices where both speak and are not the same; else None."""
    level = np.sqrt(np.mean(voices.astype(np.float64) ** 2, 1))
    two = voices[np.argsort(-level)[:2]]
    whole = float(np.sqrt(np.mean(mix.astype(np.float64) ** 2)))
    if len(two) < 2 or np.sort(level)[-2] < whole * 10 ** (FAINT / 20):
        return None
    alike = abs(float(np.corrcoef(*two)[0, 1]))
    return None if alike > ALIKE else two


def _cluster(x: NDArray, speakers: int | None, likeness: float, at_once: int) -> NDArray:
    """The centres of all talkers: of the tree that Ward's method makes of at most `at_once` windows the cut into
    `speakers`, or the finest one of which no two groups reach `likeness`."""
    step = -(-len(x) // at_once)
    part = x[::step]
    labels = np.zeros(len(part), np.intp)
    if len(part) > 1:
        tree = linkage(part, "ward")
        for count in [speakers] if speakers else range(2, min(MOST, len(x) // 6, len(part)) + 1):
            cut = np.unique(fcluster(tree, count, "maxclust"), return_inverse=True)[1]
            alike = _likeness(part, cut, int(cut.max()) + 1, int(WINDOW / HOP - 1) // step)
            np.fill_diagonal(alike, -np.inf)
            if speakers or alike.max() < likeness:
                labels = cut
    return _means(part, labels, int(labels.max()) + 1)


def _likeness(x: NDArray, groups: NDArray[np.intp], total: int, near: int) -> NDArray:
    """Of groups a and b the mean cosine between their windows over that within them, (total, total).

    c_ab / sqrt(w_a w_b), where w_a is the mean over windows of a that are more than `near` apart, as neighbours share
    sound. It is 1 for two halves of one talker, whatever the length of the windows and the scale of the encoder's
    cosines.
    """
    sums, sizes = np.zeros((total, x.shape[1])), np.bincount(groups, minlength=total)
    np.add.at(sums, groups, x)
    inside, pairs = (sums**2).sum(1), sizes.astype(np.float64) ** 2
    for lag in range(near + 1):
        first, later = groups[: len(x) - lag], groups[lag:]
        same = first == later
        cosines = np.einsum("ne,ne->n", x[: len(x) - lag][same], x[lag:][same])
        times = 2 if lag else 1
        inside -= times * np.bincount(first[same], cosines, minlength=total)
        pairs -= times * np.bincount(first[same], minlength=total)
    within = np.where(pairs > 0, inside / np.maximum(pairs, 1), 1.0).clip(0.1)
    means = sums / sizes[:, None]
    return means @ means.T / np.sqrt(within[:, None] * within)


def _means(x: NDArray, labels: NDArray, count: int) -> NDArray:
    sums = np.zeros((count, x.shape[1]))
    np.add.at(sums, labels, x)
    return unit(sums)


def _settle(x: NDArray, centres: NDArray, least: float, speakers: int | None) -> NDArray:
    """Centres of the windows nearest to them, and, unless their number is given, none of less than `least` seconds."""
    for _ in range(3):
        labels = np.argmax(x @ centres.T, 1)
        talk = np.bincount(labels, minlength=len(centres)) * HOP
        keep = talk > 0 if speakers else talk >= min(least, talk.max())
        labels = np.argmax(x @ centres[keep].T, 1)
        heard = np.bincount(labels, minlength=int(keep.sum())) > 0
        centres = _means(x, labels, len(heard)) if heard.all() else centres[keep]
    return centres


def _turns(
    x: NDArray,
    places: Sequence[tuple[float, float]],
    regions: Sequence[tuple[float, float]],
    centres: NDArray,
    second: Mapping[int, NDArray],
) -> list[Turn]:
    """Talkers of cells: those nearest to the mean of the windows over each, and two where most of them hold two."""
    count = int(regions[-1][1] / CELL) + 2
    scores, covers = np.zeros((count, len(centres))), np.zeros(count)
    pairs = dict[int, list[tuple[int, int]]]()
    for number, (start, end) in enumerate(places):
        cells = slice(int(start / CELL), int(end / CELL) + 1)
        scores[cells] += x[number] @ centres.T
        covers[cells] += 1
        if number in second:
            near = second[number] @ centres.T
            both = int(near[0].argmax()), int(near[1].argmax())
            if both[0] != both[1]:
                for cell in range(cells.start, cells.stop):
                    pairs.setdefault(cell, []).append((min(both), max(both)))
    best = scores.argmax(1)
    turns = []
    for start, end in regions:
        for cell in range(int(start / CELL), int(end / CELL) + 1):
            a, b = max(start, cell * CELL), min(end, (cell + 1) * CELL)
            if b <= a:
                continue
            talkers = {int(best[cell])}
            if 2 * len(found := pairs.get(cell, [])) > covers[cell]:
                talkers |= set(Counter(found).most_common(1)[0][0])
            turns += [Turn(a, b, str(talker)) for talker in talkers]
    return merge_turns(turns)


def merge_turns(turns: Iterable[Turn]) -> list[Turn]:
    """Turns of one speaker that touch or overlap are one; sorted by their start."""
    last: dict[str, Turn] = {}
    done = []
    for turn in sorted(turns, key=lambda turn: (turn.start, turn.end)):
        before = last.get(turn.speaker)
        if before is not None and turn.start <= before.end + 1e-9:
            last[turn.speaker] = replace(before, end=max(before.end, turn.end))
            continue
        if before is not None:
            done.append(before)
        last[turn.speaker] = turn
    return sorted([*done, *last.values()], key=lambda turn: (turn.start, turn.end, turn.speaker))


def overlap_seconds(turns: Sequence[Turn]) -> float:
    """Seconds in which two or more speak."""
    events = sorted([(t.start, 1) for t in turns] + [(t.end, -1) for t in turns])
    total, depth, before = 0.0, 0, 0.0
    for time, step in events:
        total += time - before if depth > 1 else 0.0
        depth, before = depth + step, time
    return total


def windows_at_once(budget: int, seconds: float, embedding_dim: int) -> int:
    """Windows to cluster together within `budget` bytes beside what is kept of `seconds` of sound, at most 4000.

    Raises UserError where fewer than 200 fit.
    """
    kept = seconds * (16 / FRAME + 12 * embedding_dim / HOP)
    free = (budget - kept) / 2
    if free < 16 * 200**2:
        raise refuse_memory(budget, {"levels and embeddings": kept, "clustering": 32 * 200**2})
    return int(min(4000, (free / 16) ** 0.5))


def write_rttm(path: str | Path, turns: Sequence[Turn], name: str) -> None:
    """Write NIST's RTTM. Raises UserError for names with blanks, which RTTM cannot hold."""
    for text in {name, *(turn.speaker for turn in turns)}:
        if not text or len(text.split()) != 1:
            raise UserError(f"{path}: RTTM holds no name with blanks: {text!r}")
    with atomic_path(Path(path)) as temporary:
        lines = (
            f"SPEAKER {name} 1 {turn.start:.3f} {turn.end - turn.start:.3f} <NA> <NA> {turn.speaker} <NA> <NA>\n"
            for turn in turns
        )
        temporary.write_text("".join(lines), encoding="utf-8")


def read_rttm(path: str | Path) -> dict[str, list[Turn]]:
    """Turns by recording; lines of other types than SPEAKER are passed over, as the format wants.

    Raises UserError for a line of too few fields, or times that are none.
    """
    found: dict[str, list[Turn]] = {}
    for number, line in read_lines(Path(path)):
        words = line.split()
        if words[0] != "SPEAKER":
            continue
        try:
            start, seconds, speaker = float(words[3]), float(words[4]), words[7]
            if not (start >= 0 and seconds >= 0 and isfinite(start + seconds)):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"{path}, line {number}: is no turn; `SPEAKER file 1 start seconds <NA> <NA> name <NA> <NA>` is needed"
            ) from None
        if seconds > 0:
            found.setdefault(words[1], []).append(Turn(start, start + seconds, speaker))
    if not found:
        raise UserError(f"{path}: holds no turn (lines SPEAKER ...)")
    return {name: sorted(turns, key=lambda turn: turn.start) for name, turns in found.items()}


def error_rate(
    reference: Sequence[Turn], found: Sequence[Turn], seconds: float, collar: float = 0.0, skip_overlap: bool = False
) -> dict[str, float]:
    """Diarization error rate by pyannote.metrics, and its parts, as shares of the reference's speech.

    collar: seconds that are not scored on each side of the reference's boundaries. seconds: of the recording.
    Raises UserError where pyannote.metrics is not installed.
    """
    try:
        from pyannote.core import Annotation, Segment, Timeline
        from pyannote.metrics.diarization import DiarizationErrorRate
    except ImportError as error:
        raise UserError("error rates need pyannote.metrics: pip install 'nearfar-audio[diarization]'") from error

    def annotation(turns: Sequence[Turn]) -> Any:
        made = Annotation()
        for number, turn in enumerate(turns):
            made[Segment(turn.start, turn.end), number] = turn.speaker
        return made

    end = max([seconds, *(turn.end for turn in (*reference, *found))])
    metric = DiarizationErrorRate(collar=2 * collar, skip_overlap=skip_overlap)
    parts = metric(annotation(reference), annotation(found), uem=Timeline([Segment(0, end)]), detailed=True)
    total = parts["total"]
    return {
        "der": float(parts["diarization error rate"]),
        **{
            name.replace(" ", "_"): float(parts[name] / total)
            for name in ("missed detection", "false alarm", "confusion")
        },
        "speech": float(total),
    }
