"""Which voice is which: from the windows of a long recording, separated one by one, to tracks through the whole of it.

A separation model returns the voices of a window in an order of its own. Two sources of evidence put them in order:
neighbouring windows share samples, so a voice that speaks there is found again by correlation; and a voice that was
silent for longer is found again by how it sounds. `track_speakers` uses both over the whole recording: outputs that
agree in an overlap form chains, chains are clustered by the embeddings of all their windows, and two outputs of one
window never share a voice. `OnlineTracker` does the same as windows arrive, with centroids of what was heard so far.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Embedder = Callable[[NDArray[np.float32], int], NDArray[np.floating]]
"""(samples (n,), rate in Hz) to a vector; two vectors are compared by their Euclidean distance.

An attribute `threshold` may give the distance below which two stretches of ten seconds or more are one voice; without
it the number of voices is not estimated from the embeddings. Embeddings meant for cosines should be normalized.
"""

SILENT_DB = -30.0
"""An output this far below the loudest output of its window counts as silent."""

SAME = 0.5
"""Correlation over the overlap from which two outputs are the same voice."""

LEAST_SECONDS = 2.0
"""A voice that speaks less than this in the whole recording opens no track when their number is estimated."""

SURE = 0.2
"""How far that correlation must be ahead of those with the other outputs."""


class VoicePrint:
    """A rough embedding that needs no training: mean mel cepstrum (15 numbers) and log pitch of the louder frames.

    Each number is divided by its usual spread among 2-second pieces of one LibriSpeech voice. It tells most pairs of
    voices apart within one recording from 8 seconds of each (equal error rate about 15 % on telephone and read
    speech); a trained speaker model is far better.
    """

    threshold = 5.5
    SPREAD = np.array(
        [1.4, 1.7, 0.85, 0.6, 0.55, 0.47, 0.33, 0.3, 0.31, 0.31, 0.35, 0.33, 0.35, 0.26, 0.23, 0.045],
    )

    def __call__(self, samples: NDArray[np.float32], rate: int) -> NDArray[np.floating]:
        size, hop, bins = int(0.032 * rate), int(0.01 * rate), 1 << int(0.064 * rate - 1).bit_length()
        padded = np.pad(samples.astype(np.float64), (0, max(0, size - len(samples))))
        window = np.hanning(size)
        frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop] * window
        power = np.abs(np.fft.rfft(frames, bins)) ** 2
        frequencies = np.fft.rfftfreq(bins, 1 / rate)
        mel = 1127 * np.log1p(frequencies / 700)
        top = min(3800.0, 0.475 * rate)
        edges = np.interp(np.linspace(1127 * np.log1p(100 / 700), 1127 * np.log1p(top / 700), 26), mel, frequencies)
        low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        filters = np.maximum(
            0, np.minimum((frequencies - low) / (centre - low), (high - frequencies) / (high - centre))
        )
        energy = power @ filters.T
        level = energy.sum(1)
        loud = level > max(level.max() * 1e-3, 1e-20)
        if not loud.any():
            return np.zeros(len(self.SPREAD))
        cepstrum = scipy.fft.dct(np.log(energy[loud] + 1e-9 * level.max()), axis=1, norm="ortho")[:, 1:16]
        lags = np.fft.irfft(np.abs(np.fft.rfft(frames[loud], 2 * bins)) ** 2)[:, :size]
        own = np.fft.irfft(np.abs(np.fft.rfft(window, 2 * bins)) ** 2)[:size]
        lags = lags / (lags[:, :1] + 1e-20) / (own / own[0] + 1e-3)
        shortest, longest = rate // 350, rate // 65
        period = lags[:, shortest:longest].argmax(1) + shortest
        strength = lags[np.arange(len(period)), period]
        pitch = np.log(rate / np.median(period[strength >= np.median(strength)]))
        return np.append(cepstrum.mean(0), pitch) / self.SPREAD


@dataclass
class Window:
    """What is kept of one separated window: a few numbers per output, whatever its length.

    active: (K,) outputs that hold a voice. seconds: (K,) how long each speaks. twin: (K,) index of a louder output
    that carries the same signal (a voice split in two), else -1. embedding: (K, D), NaN where too little is heard.
    overlap: (K before, K here) correlation with the outputs of the window before, over the shared samples. likeness:
    (K,) correlation of each twin with that louder output, else 0; None: 1 for every twin.
    """

    active: NDArray[np.bool_]
    seconds: NDArray[np.floating]
    twin: NDArray[np.intp]
    embedding: NDArray[np.floating]
    overlap: NDArray[np.floating] | None
    likeness: NDArray[np.floating] | None = None

    def apart(self, speakers: int | None) -> "Window":
        """The window as `speakers` voices were asked for: twins are one voice no more where voices would be missing."""
        wanted = 0 if speakers is None else min(speakers, int(self.active.sum()))
        twins = [k for k in range(len(self.twin)) if self.twin[k] >= 0]
        missing = wanted - (int(self.active.sum()) - len(twins))
        if missing <= 0:
            return self
        likeness = np.ones(len(self.twin)) if self.likeness is None else self.likeness
        twin = self.twin.copy()
        for k in sorted(twins, key=lambda k: likeness[k])[:missing]:
            twin[k] = -1
        return replace(self, twin=twin)


def describe(
    outputs: NDArray[np.float32],
    rate: int,
    embed: Embedder | None,
    before: NDArray[np.float32] | None = None,
    floor: float = 1e-4,
    least: float = 0.5,
) -> Window:
    """Measure one window. outputs: (K, n); before: (K, m), what the window before gave for the first m samples here.

    floor: root mean square below which everything is silence. least: seconds of speech that an embedding needs.
    """
    rms = np.sqrt(np.mean(outputs.astype(np.float64) ** 2, axis=1))
    active = rms > max(floor, rms.max() * 10 ** (SILENT_DB / 20))
    correlation = correlate(outputs, outputs)
    twin, likeness = np.full(len(outputs), -1, dtype=np.intp), np.zeros(len(outputs))
    order = np.argsort(-rms)
    for place, k in enumerate(order):
        for louder in order[:place]:
            if active[k] and twin[louder] < 0 and correlation[louder, k] >= SAME:
                twin[k], likeness[k] = louder, correlation[louder, k]
                break
    frame = max(1, int(0.02 * rate))
    usable = outputs[:, : outputs.shape[1] // frame * frame].reshape(len(outputs), -1, frame)
    energy = np.mean(usable.astype(np.float64) ** 2, axis=2) if usable.shape[1] else rms[:, None] ** 2
    speaking = energy > np.maximum(energy.max(axis=1, keepdims=True) * 1e-3, floor**2)
    seconds = np.where(active, speaking.sum(1) * frame / rate, 0.0)
    embeddings: list[NDArray[np.floating] | None] = [
        np.asarray(embed(outputs[k], rate), dtype=np.float64)
        if embed is not None and active[k] and seconds[k] >= least
        else None
        for k in range(len(outputs))
    ]
    size = next((len(e) for e in embeddings if e is not None), 1)
    stacked = np.stack([np.full(size, np.nan) if e is None else e for e in embeddings])
    overlap = None if before is None else correlate(before, outputs[:, : before.shape[1]], floor)
    return Window(active, seconds, twin, stacked, overlap, likeness)


def correlate(first: NDArray[np.float32], second: NDArray[np.float32], floor: float = 1e-4) -> NDArray[np.floating]:
    """(I, n), (J, n) to (I, J): normalized correlation, 0 where one of the two is silent or they are opposed."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    quiet = 10 ** (SILENT_DB / 20)
    least = floor * np.sqrt(max(first.shape[1], 1))
    heard_a = norm_a > max(least, quiet * norm_a.max(initial=0.0))
    heard_b = norm_b > max(least, quiet * norm_b.max(initial=0.0))
    product = first @ second.T / np.maximum(np.outer(norm_a, norm_b), 1e-20)
    return np.where(np.outer(heard_a, heard_b), product.clip(min=0), 0.0)


def certain_pairs(overlap: NDArray[np.floating]) -> dict[int, tuple[int, float]]:
    """Output here -> (output of the window before, margin), for the pairs that the overlap settles."""
    rows, columns = linear_sum_assignment(-overlap)
    pairs = {}
    for i, j in zip(rows, columns):
        others = np.append(np.delete(overlap[i], j), np.delete(overlap[:, j], i))
        margin = overlap[i, j] - others.max(initial=0.0)
        if overlap[i, j] >= SAME and margin >= SURE:
            pairs[int(j)] = (int(i), float(margin))
    return pairs


@dataclass
class Tracks:
    """Where every output of every window belongs.

    labels: (windows, K) track of each output; outputs that share a track are summed. count: number of tracks.
    confidence: (windows,) from 0, a guess, to 1: how clearly the weakest decision of the window fell.
    """

    labels: NDArray[np.intp]
    count: int
    confidence: NDArray[np.floating]


@dataclass
class _Chain:
    """Outputs of successive windows that the overlaps tie together, or several chains once they are merged."""

    nodes: list[tuple[int, int]]
    seconds: float = 0.0
    total: NDArray[np.floating] | None = None
    weight: float = 0.0
    margin: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def centre(self) -> NDArray[np.floating] | None:
        return None if self.total is None else self.total / self.weight


def track_speakers(
    windows: list[Window], speakers: int | None = None, threshold: float | None = None, most: int | None = None
) -> Tracks:
    """Order the outputs of all windows into tracks, one per voice.

    speakers: their number, if known. Otherwise chains are merged while they are closer than `threshold` (widened for
    short ones), and beyond that until there are `most` at the utmost (default: as many as the model gives); without a
    threshold there are as many tracks as voices that ever share a window.

    Outputs that carry the same signal are one voice, unless `speakers` asks for more voices than would then be left:
    they keep tracks of their own, and the window's confidence says how alike they are.

    Raises ValueError for no windows, or a number of speakers below 1.
    """
    if not windows:
        raise ValueError("there are no windows to track")
    if speakers is not None and speakers < 1:
        raise ValueError(f"speakers is {speakers}; it must be at least 1")
    outputs = len(windows[0].active)
    collapse = [0.0 if w.likeness is None else float(w.likeness.max(initial=0.0)) for w in windows]
    released = [w.apart(speakers) for w in windows]
    collapse = [c if new is not old else 0.0 for c, new, old in zip(collapse, released, windows, strict=True)]
    windows = released
    together = max(1, max(int((w.active & (w.twin < 0)).sum()) for w in windows))
    if speakers is None and threshold is None:
        speakers = together
    chains = _chains(windows)
    evidence = {node: margin for chain in chains for node, margin in chain.margin.items()}
    heard = [chain for chain in chains if chain.centre is not None]
    clusters = sorted(_cluster(heard or chains, speakers, threshold, most or outputs), key=lambda c: -c.seconds)
    if speakers is None:  # too little speech to be a voice of its own
        clusters = clusters[:1] + [c for c in clusters[1:] if c.seconds >= LEAST_SECONDS]
    wanted = speakers or min(len(clusters), most or outputs) or 1
    kept = clusters[:wanted]
    kept.sort(key=lambda c: c.nodes[0])  # tracks in the order in which voices first speak
    home = {node: index for index, cluster in enumerate(kept) for node in cluster.nodes}
    labels = np.full((len(windows), outputs), -1, dtype=np.intp)
    confidence = np.ones(len(windows))
    for w, window in enumerate(windows):
        for k in np.flatnonzero(window.active & (window.twin < 0)):
            labels[w, k] = home.get((w, int(k)), -1)
        confidence[w] = min(1 - collapse[w], _place(labels[w], window, [c.centre for c in kept], evidence, w))
    return Tracks(labels, wanted, confidence)


def _chains(windows: list[Window]) -> list[_Chain]:
    """Chains of outputs, from the overlaps that settle."""
    chains: list[_Chain] = []
    ends: dict[int, _Chain] = {}
    for w, window in enumerate(windows):
        pairs = certain_pairs(window.overlap) if window.overlap is not None else {}
        now: dict[int, _Chain] = {}
        for k in map(int, np.flatnonzero(window.active & (window.twin < 0))):
            before, margin = pairs.get(k, (-1, 0.0))
            chain = ends.get(before)
            if chain is None:
                chain = _Chain([])
                chains.append(chain)
            else:
                chain.margin[w, k] = margin
            chain.nodes.append((w, k))
            chain.seconds += window.seconds[k]
            if not np.isnan(window.embedding[k]).any():
                weighted = window.seconds[k] * window.embedding[k]
                chain.total = weighted if chain.total is None else chain.total + weighted
                chain.weight += window.seconds[k]
            now[k] = chain
        ends = now
    return chains


def _cluster(chains: list[_Chain], speakers: int | None, threshold: float | None, most: int) -> list[_Chain]:
    """Merge chains, nearest first; chains that speak in one window stay apart."""
    clusters = list(chains)
    count = len(clusters)
    spans = [{w for w, _ in c.nodes} for c in clusters]
    distance = np.full((count, count), np.inf)

    def measure(i: int, j: int) -> float:
        if spans[i] & spans[j]:
            return np.inf
        a, b = clusters[i].centre, clusters[j].centre
        if a is None or b is None:  # unheard: last of all, and the nearest in time first
            first, second = clusters[i].nodes, clusters[j].nodes
            gap = min(abs(first[0][0] - second[-1][0]), abs(second[0][0] - first[-1][0]))
            return 1e6 + gap
        d = float(np.linalg.norm(a - b))
        return d / np.sqrt(1 + 4 / max(min(clusters[i].seconds, clusters[j].seconds), 0.5))

    for i in range(count):
        for j in range(i):
            distance[i, j] = distance[j, i] = measure(i, j)
    alive = list(range(count))
    while len(alive) > 1:
        i, j = divmod(int(np.argmin(distance)), distance.shape[1])
        nearest = distance[i, j]
        if not np.isfinite(nearest) or (speakers is not None and len(alive) <= speakers):
            break
        if speakers is None and (threshold is None or nearest > threshold) and len(alive) <= most:
            break
        a, b = clusters[i], clusters[j]
        merged = _Chain(sorted(a.nodes + b.nodes), a.seconds + b.seconds, weight=a.weight + b.weight)
        totals = [c.total for c in (a, b) if c.total is not None]
        merged.total = sum(totals[1:], totals[0]) if totals else None
        clusters[i], spans[i] = merged, spans[i] | spans[j]
        alive.remove(int(j))
        distance[j], distance[:, j] = np.inf, np.inf
        for other in alive:
            if other != i:
                distance[i, other] = distance[other, i] = measure(int(i), other)
    return [clusters[i] for i in alive]


def _place(
    labels: NDArray[np.intp],
    window: Window,
    centres: list[NDArray[np.floating] | None],
    evidence: dict[tuple[int, int], float],
    w: int,
) -> float:
    """Fill in the labels of one window in place (homeless outputs, twins, silence); returns its confidence."""
    free = [t for t in range(len(centres)) if t not in labels]
    heard = [int(k) for k in np.flatnonzero(window.active & (window.twin < 0))]
    sure = [1.0]
    for k in heard:
        if labels[k] >= 0:
            if (w, k) in evidence:
                sure.append(evidence[w, k])
            else:  # the beginning of a chain: found by its sound, or because no other track was left
                taken = {labels[other] for other in heard if other != k}
                left = [t for t in range(len(centres)) if t not in taken]
                sure.append(_margin(window.embedding[k], centres, int(labels[k]), left))
    homeless = [k for k in heard if labels[k] < 0]
    if homeless and free:
        cost = np.array([[_distance(window.embedding[k], centres[t]) for t in free] for k in homeless])
        for row, column in zip(*linear_sum_assignment(np.nan_to_num(cost, nan=1e6))):
            labels[homeless[row]] = free[column]
            sure.append(_margin(window.embedding[homeless[row]], centres, free[column], free))
    free = [t for t in range(len(centres)) if t not in labels]
    loudest = labels[heard[int(np.argmax(window.seconds[heard]))]] if heard else 0
    for k in range(len(labels)):
        if labels[k] < 0:
            if window.twin[k] >= 0:
                labels[k] = labels[window.twin[k]]
            elif free and not window.active[k]:
                labels[k] = free.pop(0)
            else:
                labels[k] = max(loudest, 0)
                sure.append(1.0 if not window.active[k] else 0.0)
    return float(min(sure))


def _distance(embedding: NDArray[np.floating], centre: NDArray[np.floating] | None) -> float:
    return np.nan if centre is None else float(np.linalg.norm(embedding - centre))


def _margin(
    embedding: NDArray[np.floating], centres: list[NDArray[np.floating] | None], own: int, choice: list[int]
) -> float:
    """How much nearer the own track is than the next in `choice`, from 0 to 1; 1 where there is no choice."""
    if len(choice) < 2:
        return 1.0
    mine = _distance(embedding, centres[own])
    other = min((_distance(embedding, centres[t]) for t in choice if t != own), default=np.nan)
    ratio = (other - mine) / (other + mine + 1e-20)
    return 0.0 if np.isnan(ratio) else float(np.clip(ratio, 0.0, 1.0))


class OnlineTracker:
    """Tracks for windows as they arrive: each is ordered once, by the overlap and else by what was heard so far.

    The number of tracks is the number of outputs. threshold: the embedder's, see `Embedder`: a voice farther than this
    from every track opens an empty one, if there is any left.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold
        self.labels: NDArray[np.intp] | None = None
        self.totals: list[NDArray[np.floating] | None] = []
        self.weights: list[float] = []

    def order(self, window: Window) -> tuple[NDArray[np.intp], float]:
        """The track of each output (K,), and how clear that was, from 0 to 1."""
        outputs = len(window.active)
        if self.labels is None:
            self.labels = np.arange(outputs)
            self.totals, self.weights = [None] * outputs, [0.0] * outputs
            confidence = 1.0
        else:
            labels = np.full(outputs, -1, dtype=np.intp)
            pairs = certain_pairs(window.overlap) if window.overlap is not None else {}
            evidence = {}
            for k, (before, margin) in pairs.items():
                labels[k] = self.labels[before]
                evidence[0, k] = margin
            centres = [None if t is None else t / w for t, w in zip(self.totals, self.weights)]
            open_tracks = [t for t in range(outputs) if t not in labels]
            loose = [k for k in range(outputs) if labels[k] < 0]
            if loose:
                # a voice that sounds like no track so far takes an empty one; silence follows the order before
                cost = np.empty((len(loose), len(open_tracks)))
                known = [_distance(window.embedding[k], c) for k in loose for c in centres if c is not None]
                middle = np.nanmedian(known) if np.isfinite(known).any() else 1.0
                usual = middle if self.threshold is None else self.threshold
                for row, k in enumerate(loose):
                    for column, track in enumerate(open_tracks):
                        d = _distance(window.embedding[k], centres[track])
                        cost[row, column] = usual if np.isnan(d) else d
                        cost[row, column] += 1e-6 * (track != self.labels[k])
                for row, column in zip(*linear_sum_assignment(cost)):
                    labels[loose[row]] = open_tracks[column]
            speaking = [k for k in map(int, np.flatnonzero(window.active)) if window.twin[k] < 0]
            sure = [1.0]
            for k in speaking:
                choice = [t for t in range(outputs) if t not in [labels[o] for o in pairs if o != k]]
                margin = _margin(window.embedding[k], centres, int(labels[k]), choice)
                sure.append(evidence.get((0, k), margin))
            self.labels, confidence = labels, float(min(sure))
        for k in range(outputs):
            if not np.isnan(window.embedding[k]).any():
                track = int(self.labels[k])
                weighted = window.seconds[k] * window.embedding[k]
                old = self.totals[track]
                self.totals[track] = weighted if old is None else old + weighted
                self.weights[track] += window.seconds[k]
        return self.labels, confidence
