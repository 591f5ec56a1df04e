"""Which channels of a recording are EEG: by the user's word, their names, their signals."""

import logging
import re
from collections.abc import Mapping

import mne
import numpy as np

from nearfar.core.errors import UserError
from nearfar.eeg import conventions
from nearfar.eeg.annotations import source_name

logger = logging.getLogger("nearfar.eeg")

TYPES = ("eeg", "eog", "ecg", "emg", "stim", "misc")

_BY_NAME = {
    "eog": r"eog|^[vh]eo[gl]?[ud]?\d?$",
    "ecg": r"ecg|ekg",
    "emg": r"emg",
    "stim": r"stim|trig|^sti ?\d|^status|marker|^mrk|event|^din ?\d|digital|ttl|photo|sync|^response|^annot",
    "misc": r"acc|gyr|magn|gsr|eda$|^eda|resp|temp|ppg|pleth|s[pa]o2|aux|count|packet|sample|time|batt|quality|^cq[ _]|"
    r"^exg ?\d|gaze|pupil|joy|button|light|snor|flow|puls|analog|^ana ?\d|^dc ?\d|other|unused|^nc\d?$|^bip ?\d|index",
}
"""Kind -> what names of such channels hold, in any case. Names of electrodes are never taken for one."""


def type_channels(raw: mne.io.BaseRaw | mne.BaseEpochs, types: Mapping[str, str] | None, notes: list[str]) -> None:
    """Give channels their types, in place: as `types` says, else by name, else by their signal.

    What is no EEG but typed as such is set aside: named like an eye, heart, muscle or trigger channel or a sensor;
    piecewise constant or a ramp (a marker, a counter); far off the others' scale; or pulses that are, over noise.
    Channels of type misc that have an electrode's name become EEG. All of it is told in `notes`.
    """
    types = dict(types or {})
    unknown = [name for name in types if name not in raw.ch_names]
    wrong = sorted({kind for kind in types.values() if kind not in TYPES})
    if unknown or wrong:
        raise UserError(
            f"{source_name(raw)}: types of {', '.join(unknown or types)}: there is no "
            + (f"channel {', '.join(unknown)}; it has {', '.join(raw.ch_names)}" if unknown else "type ")
            + ("" if unknown else f"{', '.join(wrong)}; choose from {', '.join(TYPES)}")
        )
    kinds = dict(zip(raw.ch_names, raw.get_channel_types()))
    changed = {name: kind for name, kind in types.items() if kinds[name] != kind}
    for name, kind in kinds.items():
        if name in types:
            continue
        electrode = conventions.is_electrode(name)
        if kind in ("misc", "bio") and electrode:
            changed[name] = "eeg"
            notes.append(f"{name} is typed {kind} and named like an electrode: taken for EEG")
        elif kind == "eeg" and not electrode:
            found = next((k for k, pattern in _BY_NAME.items() if re.search(pattern, name, re.IGNORECASE)), None)
            if found is not None:
                changed[name] = found
                notes.append(f"{name} is named like {found}: set aside, no EEG")
    _set(raw, changed)
    aside = {name: why for name, why in _by_signal(raw).items() if name not in types}
    for name, why in aside.items():
        notes.append(f"{name} {why}: set aside, no EEG")
        logger.warning("%s: channel %s %s: set aside, no EEG (types= says otherwise)", source_name(raw), name, why)
    _set(raw, dict.fromkeys(aside, "misc"))


def _set(raw: mne.io.BaseRaw | mne.BaseEpochs, kinds: Mapping[str, str]) -> None:
    if kinds:
        raw.set_channel_types(dict(kinds), on_unit_change="ignore")


def _by_signal(raw: mne.io.BaseRaw | mne.BaseEpochs) -> dict[str, str]:
    """EEG channels whose signal is none -> why. A channel that never changes is flat, which `bad_channels` tells."""
    picks = mne.pick_types(raw.info, eeg=True, exclude=())
    if not len(picks):
        return {}
    data = raw.get_data(picks, verbose="ERROR") if isinstance(raw, mne.io.BaseRaw) else raw.get_data(picks)
    data = data if data.ndim == 2 else np.concatenate(list(data), axis=1)
    if data.shape[1] < 100:
        return {}
    found: dict[str, str] = {}
    size = max(2, min(round(raw.info["sfreq"]), data.shape[1]))
    spread: dict[str, float] = {}
    signals: dict[str, np.ndarray] = {}
    for name, values in zip([raw.ch_names[pick] for pick in picks], data, strict=True):
        values = values[np.isfinite(values)]
        span = np.ptp(values) if len(values) else 0.0
        if span == 0:
            continue
        straight = (np.abs(np.diff(values, 2)) <= 1e-6 * span).mean()
        moving = (values != np.concatenate([values[:1], values[:-1]])).any()
        if straight > 0.9 and moving:
            found[name] = "is piecewise constant or a ramp, like a marker or a counter"
        blocks = values[: len(values) // size * size].reshape(-1, size)
        spread[name] = float(np.median(blocks.std(axis=1))) if len(blocks) else float(values.std())
        signals[name] = values
    rest = [value for name, value in spread.items() if name not in found and value > 0]
    if len(rest) > 2:
        typical = float(np.median(rest))
        for name, value in spread.items():
            if name not in found and value > 0 and not typical / 300 < value < 300 * typical:
                found[name] = f"varies {value / typical:.2g} times as much as the other channels"
            elif name not in found and not conventions.is_electrode(name) and _pulses(signals[name], 100 * typical):
                found[name] = "jumps to and fro between levels far off the others' scale, like a trigger"
    return {} if len(found) == len(picks) else found


def _pulses(values: np.ndarray, height: float) -> bool:
    """Whether a signal leaves its middle by more than `height` four times or more, mostly to stay at one level."""
    off = np.abs(values - np.median(values))
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], off > height, [False]]).astype(int))).reshape(-1, 2)
    level = [np.ptp(values[start:stop]) <= 0.1 * off[start:stop].max() for start, stop in bounds]
    return len(level) >= 4 and sum(level) > len(level) / 2
