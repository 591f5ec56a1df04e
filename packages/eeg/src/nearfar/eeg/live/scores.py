"""Scores of decisions on a stream: events, false activations, error against the offline decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import mne
import numpy as np
import pandas as pd

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.annotations import annotations, source_name
from nearfar.eeg.live.steps import Step
from nearfar.eeg.live.stream import Decisions, Rule, StreamDecoder, decode


def stream_error(
    estimator: Any,
    data: np.ndarray,
    n_times: int,
    step: int,
    sfreq: float,
    *,
    steps: Sequence[Step] = (),
    rule: Rule = Rule(),
    seed: int = 0,
) -> float:
    """Largest difference of a probability between `decode` and `StreamDecoder` on chunks of random size.

    The windows are the same to the last bit; what may differ is the rounding of a network for another batch size, and
    a decision only where two classes are that close. Infinite if the windows' times differ. `seed` draws the sizes.
    """
    whole = decode(estimator, data, n_times, step, sfreq, steps=steps, rule=rule)
    stream = StreamDecoder(estimator, n_times, step, sfreq, steps=steps, rule=rule)
    cuts = np.cumsum(np.random.default_rng(seed).integers(1, max(2, n_times // 2), size=data.shape[1]))
    parts = [stream.push(chunk) for chunk in np.split(data, cuts[cuts < data.shape[1]], axis=1)]
    parts = [part for part in parts if len(part)]
    if not np.array_equal(np.concatenate([np.zeros(0), *(part.times for part in parts)]), whole.times):
        return float("inf")
    return _largest(np.concatenate([part.probabilities for part in parts]), whole.probabilities)


def live_error(
    decoder: Any, recorded: mne.io.BaseRaw, whole: Decisions, step: int, rule: Rule = Rule()
) -> dict[str, float]:
    """How far a live stream of a recording comes from its decisions as a whole, preprocessing included.

    The recording's EEG channels, unfiltered, go through the causal chain (`StreamDecoder.live`), once whole and once in
    chunks of random size. Returns `streamed - whole`, the largest difference of a probability between these two (what
    chunks alter); `live - offline`, that between the causal chain and `whole`, which was decoded after zero-phase
    filters over the whole recording; and `live differs`, the share of windows with another decision. All are NaN where
    the preprocessing has no causal form for this recording.
    """
    rate, names = float(recorded.info["sfreq"]), list(recorded.ch_names)
    data = recorded.get_data(verbose="ERROR") * 1e6
    try:
        live = [StreamDecoder.live(decoder, step, rate=rate, ch_names=names, rule=rule) for _ in range(2)]
    except UserError:
        return dict.fromkeys(("streamed - whole", "live - offline", "live differs"), float("nan"))
    at_once = live[0].push(data)
    cuts = np.cumsum(np.random.default_rng(0).integers(1, max(2, round(rate)), size=data.shape[1]))
    parts = [live[1].push(chunk) for chunk in np.split(data, cuts[cuts < data.shape[1]], axis=1)]
    streamed = np.concatenate([part.probabilities for part in parts if len(part)])
    count = min(len(at_once), len(whole))
    return {
        "streamed - whole": _largest(streamed, at_once.probabilities),
        "live - offline": _largest(at_once.probabilities[:count], whole.probabilities[:count]),
        "live differs": float((at_once.decisions[:count] != whole.decisions[:count]).mean()),
    }


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; windows that abstain on both sides differ by nothing, on one side by infinity."""
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nan_to_num(np.abs(a - b)).max(initial=0.0))


def score_events(
    decisions: Decisions,
    onsets: np.ndarray,
    labels: np.ndarray,
    *,
    duration: float,
    total: float,
    n_classes: int,
) -> dict[str, float]:
    """Commands against events that begin at `onsets` and last `duration` seconds (or until the next begins).

    The first command within an event answers it: a hit if its class is the event's. A command outside all events is a
    false activation. Windows that begin before an event and end within it count for the event.

    Args:
        onsets, labels: in seconds, ascending; class indices.
        total: length of the recording in seconds.
        n_classes: number of commands to choose from.

    Returns:
        `events, hits, wrong, missed, repeats` (further commands within an event), `false` (activations),
        `false_per_minute` (of the time outside events), `hit_rate` (hits per event: a missed one counts as not hit),
        `latency` (median seconds from onset to hit, NaN without any), and `bits_per_minute`: Wolpaw's information of a
        selection, its accuracy being hits / (hits + wrong + false), times such selections per minute of `total`.
    """
    onsets, labels = np.asarray(onsets, float), np.asarray(labels, int)
    if len(onsets) != len(labels) or (np.diff(onsets) <= 0).any():
        raise ValueError("onsets must ascend and have one label each")
    given = decisions.commands != metrics.NO_DECISION
    times, commands = decisions.times[given], decisions.commands[given]
    event = np.searchsorted(onsets, times) - 1
    inside = (event >= 0) & (times <= onsets[np.maximum(event, 0)] + duration) if len(onsets) else event >= 0
    answered, first = np.unique(event[inside], return_index=True)
    right = commands[inside][first] == labels[answered]
    hits, wrong, false = int(right.sum()), int((~right).sum()), int((~inside).sum())
    lengths = np.minimum(duration, np.diff(np.append(onsets, total)))
    idle_minutes = float(total - lengths.sum()) / 60
    selections = hits + wrong + false
    latencies = (times[inside][first] - onsets[answered])[right]
    bits = metrics.bits_per_selection(hits / selections, n_classes) if selections else 0.0
    return {
        "events": len(onsets),
        "hits": hits,
        "wrong": wrong,
        "missed": len(onsets) - hits - wrong,
        "repeats": int(inside.sum()) - hits - wrong,
        "false": false,
        "false_per_minute": false / idle_minutes if idle_minutes > 0 else float("nan"),
        "hit_rate": hits / len(onsets) if len(onsets) else float("nan"),
        "latency": float(np.median(latencies)) if hits else float("nan"),
        "bits_per_minute": bits * selections / (total / 60),
    }


def pseudo_online(
    estimator: Any,
    raw: mne.io.BaseRaw,
    events: Mapping[str, int],
    n_times: int,
    step: int,
    *,
    duration: float,
    n_classes: int,
    steps: Sequence[Step] = (),
    sfreq: float | None = None,
    rule: Rule = Rule(),
    recorded: tuple[np.ndarray, float] | None = None,
) -> tuple[Decisions, dict[str, float], pd.DataFrame]:
    """Decode a recording as if it came live, and score the commands by its events.

    Args:
        raw: its EEG channels, in their order, are what the estimator was trained on.
        events: annotation name -> class index.
        duration: seconds from its onset within which an event can be answered.
        n_classes: number of commands to choose from.
        sfreq: rate after `steps`, if they change it.
        recorded: see `decode`.

    Returns:
        The decisions, the scores (see `score_events`) and the events: `onset`, `duration`, `label`.

    Raises:
        UserError: none of the events is in the recording.
    """
    onsets, _, names = annotations(raw)
    chosen = np.isin(names, list(events))
    if not chosen.any():
        found = ", ".join(sorted(set(names))) or "no events at all"
        raise UserError(f"{source_name(raw)}: none of the events {', '.join(events)}; it has {found}")
    labels = np.array([events[name] for name in names[chosen]])
    table = pd.DataFrame({"onset": onsets[chosen], "duration": duration, "label": labels}).sort_values("onset")
    data = raw.get_data("eeg", verbose="ERROR") * 1e6
    rate = raw.info["sfreq"]
    decisions = decode(estimator, data, n_times, step, sfreq or rate, steps=steps, rule=rule, recorded=recorded)
    scores = score_events(
        decisions,
        table["onset"].to_numpy(),
        table["label"].to_numpy(),
        duration=duration,
        total=data.shape[1] / rate,
        n_classes=n_classes,
    )
    return decisions, scores, table.reset_index(drop=True)
