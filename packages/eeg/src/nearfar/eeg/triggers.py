"""Events from trigger channels of every behaviour: pulses, held levels, bits that overlap, lines of their own."""

from collections import Counter

import mne
import numpy as np

from nearfar.eeg.annotations import annotate

COMPOSITE = ("STI101", "STI 014", "Status")
"""Channels in which a system joins all its trigger lines; the others are then not read."""


def annotate_triggers(raw: mne.io.BaseRaw, notes: list[str]) -> None:
    """Add the triggers of a recording's stim channels as annotations, in place; what was read how goes to `notes`.

    Where one channel has triggers the events' names are its codes; of several each channel's name, with the code where
    it has several (`DIN1`, `port/4`). A channel at 0 most of the time has pulses: codes that join while another is on
    are taken apart into bits (1, then 9, then 8 is 1 and 8). Any other channel holds levels: every change to a value
    but 0 is one. A value of one sample between two others is a glitch of lines that do not switch together, and left
    out. Values in millionths, as a file in microvolts gives them, are made whole; one between whole numbers is read as
    on or off.
    """
    names = [raw.ch_names[pick] for pick in mne.pick_types(raw.info, meg=False, stim=True, exclude=())]
    main = [name for name in COMPOSITE if name in names and raw.get_data([name]).any()][:1]
    if main and len(names) > 1:
        notes.append(f"triggers are read from {main[0]} alone, not from {', '.join(n for n in names if n not in main)}")
    lines: dict[str, tuple[list[int], list[int]]] = {}
    for name in main or names:
        lines[name] = _events(_whole(raw.get_data([name])[0], name, notes), name, notes)
        listed = ", ".join(f"{code} ({count})" for code, count in sorted(Counter(lines[name][1]).items())[:20])
        notes.append(f"trigger channel {name}: {listed or 'none'}")
    lines = {name: line for name, line in lines.items() if line[0]}
    found: list[tuple[float, str]] = []
    for name, (samples, codes) in lines.items():
        for sample, code in zip(samples, codes, strict=True):
            several = name if len(set(codes)) == 1 else f"{name}/{code}"
            found.append((sample / raw.info["sfreq"], str(code) if len(lines) == 1 else several))
    if found:
        onsets, texts = zip(*sorted(found), strict=True)
        annotate(raw, np.array(onsets), 0.0, list(texts))


def _whole(values: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    values = np.nan_to_num(values)
    if 0 < np.abs(values).max() < 0.01:
        values = values * 1e6  # a trigger is no voltage
    if name == "Status":  # BioSemi keeps its own bits above 16
        return np.rint(values).astype(np.int64) & 0xFFFF
    whole = np.rint(values).astype(np.int64)
    if np.quantile(np.abs(values - whole), 0.99) > 0.2:
        middle = (values.min() + values.max()) / 2
        notes.append(f"trigger channel {name} lies between whole numbers: read as on above {middle:.3g}")
        return (values > middle).astype(np.int64)
    return whole


def _events(values: np.ndarray, name: str, notes: list[str]) -> tuple[list[int], list[int]]:
    changes = np.flatnonzero(np.diff(values)) + 1
    if values[0]:
        notes.append(f"trigger channel {name} begins at {values[0]}, which is no event")
    lasting = np.diff(np.append(changes, len(values)))
    after = np.append(values[changes[1:]], 0) if len(changes) else changes
    before = values[changes - 1] if len(changes) else changes
    glitch = (lasting == 1) & (values[changes] != 0) & (after != 0) & (before != after)
    if glitch.any():
        notes.append(f"trigger channel {name}: {glitch.sum()} values of one sample between two others left out")
        values = values.copy()
        values[changes[glitch]] = after[glitch]
        changes = np.flatnonzero(np.diff(values)) + 1
    old, new = values[changes - 1], values[changes]
    joined = (old != 0) & (new != 0)
    nested = ((old & new) == old) | ((old & new) == new)
    bits = (values == 0).mean() > 0.5 and joined.any() and nested[joined].all() and (values >= 0).all()
    samples: list[int] = []
    codes: list[int] = []
    if not bits:
        kept = new != 0
        return changes[kept].tolist(), new[kept].tolist()
    notes.append(f"trigger channel {name}: codes overlap, taken apart into bits")
    added = new & ~old
    alone = set(added[added > 0].tolist())
    for sample, code in zip(changes.tolist(), added.tolist(), strict=True):
        parts = [1 << bit for bit in range(code.bit_length()) if code >> bit & 1]
        for one in parts if len(parts) > 1 and set(parts) <= alone else [code] if code else []:
            samples.append(sample)
            codes.append(one)
    return samples, codes
