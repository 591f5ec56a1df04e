"""A trained decoder on recordings: at their events, or all along as if live; and what of them it was trained on."""

from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd
from mne.io import BaseRaw

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.annotations import Events, event_classes, event_counts
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.leakage import trial_digests
from nearfar.eeg.live.scores import pseudo_online
from nearfar.eeg.live.stream import Decisions, Rule, decode
from nearfar.eeg.recordings import Reading, Recording, select_channels
from nearfar.eeg.trials import load_trials, trials_array


def decode_trials(
    decoder: Decoder,
    recording: Recording,
    *,
    events: Events | None = None,
    threshold: float = 0.0,
    interpolate: bool = False,
    **reading: Unpack[Reading],
) -> pd.DataFrame:
    """One row per event: onset, duration, predicted class (`trial_type`; n/a below `threshold`), probabilities.

    Where the events' classes are the decoder's, `true` is that of the event; where the decoder was trained on some of
    these trials, `seen_in_training` says on which.
    """
    X, y, names, onsets = _trials(decoder, recording, events, interpolate, **reading)
    rows = _rows(decoder, onsets, decoder.predict_proba(X), threshold)
    if set(names) <= set(decoder.classes):
        rows["true"] = [names[index] for index in y]
    if any(seen := _seen(decoder, X)):
        rows["seen_in_training"] = seen
    return rows


def seen_trials(
    decoder: Decoder,
    recording: Recording,
    *,
    events: Events | None = None,
    interpolate: bool = False,
    **reading: Unpack[Reading],
) -> list[bool]:
    """Which of a recording's trials the decoder was trained on or chosen by; none where it has no known events."""
    if not decoder.trained_on.items:
        return []
    try:
        return _seen(decoder, _trials(decoder, recording, events, interpolate, **reading)[0])
    except UserError:
        return []


def continuous(
    decoder: Decoder, recording: Recording, interpolate: bool = False, **reading: Unpack[Reading]
) -> tuple[BaseRaw, BaseRaw]:
    """A recording as the decoder wants it, and its channels as recorded.

    Raises UserError for a decoder whose preprocessing needs events, and for a recording of another rate, whose windows
    would last another time.
    """
    if decoder.preprocessing.order == "published":
        raise UserError("the decoder preprocesses trial by trial (published order), which needs events: drop --every")
    if decoder.preprocessing.standardization == "trial":
        raise UserError("the decoder standardizes each trial by itself, which needs events; drop --every")
    recorded = select_channels(recording.read(**reading), decoder.recorded, interpolate)
    raw = decoder.preprocessing.apply(recorded)
    check_rate(decoder, raw.info["sfreq"], recording.path)
    return raw, recorded.pick(decoder.recorded)


def check_rate(decoder: Decoder, rate: float, what: Any) -> None:
    """Refuse samples of another rate than the decoder's."""
    if abs(rate - decoder.sfreq) > 1e-6 * decoder.sfreq:
        raise UserError(
            f"{what}: {rate:g} Hz where the decoder's windows are of {decoder.sfreq:g} Hz; resample the recording, or "
            f"train the decoder with --resample {decoder.sfreq:g}"
        )


def decode_all_along(
    decoder: Decoder,
    recording: Recording,
    raw: BaseRaw,
    recorded: BaseRaw,
    step: int,
    rule: Rule,
    events: Events | None = None,
) -> tuple[pd.DataFrame, Decisions, dict[str, float], Any]:
    """Every `step` samples of `raw`, which `continuous` made, a window: rows as of `decode_trials`, with the `command`
    and, where windows abstain because of their input, `abstained`, which says why.

    Also the decisions, the scores of the commands by the events, and what these are, where their classes are known.
    """
    network: Any = decoder.network
    n_times, sfreq = int(network.n_times), decoder.sfreq
    known = events or recording.events or {name: name for name in decoder.classes}
    marks = {name: decoder.classes.index(cls) for name, cls in event_classes(known).items() if cls in decoder.classes}
    scores: dict[str, float] = {}
    found: Any = None
    as_recorded = recorded.get_data() * 1e6, float(recorded.info["sfreq"])
    if set(event_counts(raw)) & set(marks):
        duration = decoder.preprocessing.tmax + n_times / sfreq / 2
        decisions, scores, found = pseudo_online(
            decoder, raw, marks, n_times, step, duration=duration, n_classes=len(decoder.classes), rule=rule,
            recorded=as_recorded,
        )  # fmt: skip
    else:
        decisions = decode(decoder, raw.get_data() * 1e6, n_times, step, sfreq, rule=rule, recorded=as_recorded)
    rows = _rows(decoder, decisions.times - n_times / sfreq, decisions.probabilities, rule.threshold)
    rows["command"] = [decoder.classes[k] if k != metrics.NO_DECISION else "n/a" for k in decisions.commands]
    if (decisions.reasons != "").any():
        rows["abstained"] = [reason or "n/a" for reason in decisions.reasons]
    return rows, decisions, scores, found


def files_of(path: Path) -> list[Path]:
    """A recording's files: some formats keep signals, markers and events beside the one that is named."""
    start = path.stem.removesuffix("_eeg")
    beside = {p for p in path.parent.iterdir() if p.is_file() and p.name.startswith(start)}
    return sorted({path, *(p for p in beside if "_predictions" not in p.name)})


def _trials(
    decoder: Decoder, recording: Recording, events: Events | None, interpolate: bool, **reading: Unpack[Reading]
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    epochs = load_trials(
        recording,
        preprocessing=decoder.preprocessing,
        events=events,
        channels=decoder.ch_names,
        interpolate=interpolate,
        **reading,
    )
    check_rate(decoder, epochs.info["sfreq"], recording.path)
    return *trials_array(epochs), epochs.metadata["onset"].to_numpy()


def _seen(decoder: Decoder, X: np.ndarray) -> list[bool]:
    return decoder.trained_on.seen(digest.hex() for digest in trial_digests(X))


def _rows(decoder: Decoder, onsets: np.ndarray, probabilities: np.ndarray, threshold: float) -> pd.DataFrame:
    answers = [decoder.classes[row.argmax()] if row.max() >= threshold else "n/a" for row in probabilities]
    network: Any = decoder.network
    columns = {"onset": onsets, "duration": network.n_times / decoder.sfreq, "trial_type": answers}
    return pd.DataFrame(columns | {f"p_{name}": probabilities[:, i] for i, name in enumerate(decoder.classes)})
