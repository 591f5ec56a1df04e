"""Electrode graphs: which electrodes of a cap are neighbours.

Every rule gives an (N, N) array of 0 and 1, symmetric, with an empty diagonal, in the order of the channels. Channels
are given as names, `mne.Info`, `info["chs"]` (braindecode's `chs_info`) or an MNE montage.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import mne
import numpy as np
from numpy.typing import ArrayLike, NDArray

from nearfar.core.errors import UserError
from nearfar.eeg.conventions import bipolar_pair, standard_montage, standard_name

logger = logging.getLogger("nearfar.eeg")

Channels: TypeAlias = Sequence[str] | Sequence[Mapping[str, Any]] | mne.Info | mne.channels.DigMontage

_ROWS = {
    "N": 0,
    "FP": 1,
    "AF": 2,
    "F": 3,
    "FC": 4,
    "FT": 4,
    "C": 5,
    "T": 5,
    "CP": 6,
    "TP": 6,
    "P": 7,
    "PO": 8,
    "O": 9,
    "I": 10,
}

_OLD_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}

_SPARSE_ROWS = ("AF", "PO")  # the 10-10 system has no AF1, AF5, PO1, PO5 and their mirror images


def electrode_graph(channels: Channels, rule: str = "auto") -> NDArray[np.uint8]:
    """The graph that `rule` makes of the channels.

    - "10-10": neighbours in the grid of the 10-10 system, by name (`grid_graph`);
    - "nearest": the 4 nearest electrodes of each, by position (`nearest_graph`);
    - "radius": all electrodes within 5 cm, by position (`radius_graph`);
    - "auto": "10-10" where every channel has a 10-10 name, else "nearest". Electrodes that the grid leaves without a
      neighbour, as on small caps, are linked to their 2 nearest, by position.

    Electrodes that stay alone are told by a warning. Raises ValueError for another rule, UserError where the names or
    positions that it needs are missing.
    """
    names = channel_names(channels)
    if rule == "auto" and None not in map(grid_position, names):
        graph = grid_graph(channels)
        alone = np.flatnonzero(graph.sum(axis=1) == 0)
        if len(alone) and len(names) > 1:
            near = _strongest(-_distances(channels, by_name=True), min(2, len(names) - 1))
            graph[alone], graph[:, alone] = np.maximum(graph[alone], near[alone]), np.maximum(graph, near)[:, alone]
            graph = np.maximum(graph, graph.T)
        return graph
    rule = "nearest" if rule == "auto" else rule
    rules = {"10-10": grid_graph, "nearest": _nearest_four, "radius": radius_graph}
    if rule not in rules:
        raise ValueError(f"there is no electrode graph {rule!r}; choose auto, {', '.join(rules)} or give an adjacency")
    graph = rules[rule](channels)
    if len(alone := np.flatnonzero(graph.sum(axis=1) == 0)) and len(names) > 1:
        logger.warning("the graph %r leaves %s without a neighbour", rule, ", ".join(names[i] for i in alone))
    return graph


def grid_graph(channels: Channels) -> NDArray[np.uint8]:
    """The 4-neighbourhood of the 10-10 grid, by name in any case: AGTCNet's graph.

    Linked are electrodes with the same letters and neighbouring numbers (FC3-FC1, T7-T9; AF7-AF3 and PO3-POz too,
    where the 10-10 system has nothing between), and electrodes with the same number in neighbouring rows of
    N, Fp, AF, F, FC/FT, C/T, CP/TP, P, PO, O, I (FT7-T7, Oz-Iz). So C5-T7 or Fp1-AF7 are not linked. T3, T4, T5, T6
    are T7, T8, P7, P8. An electrode without neighbours stays alone.

    Raises UserError that names the channels without a 10-10 name, or two channels at one place.
    """
    names = channel_names(channels)
    found = [grid_position(name) for name in names]
    unknown = [name for name, place in zip(names, found) if place is None]
    if unknown:
        raise UserError(
            f"no 10-10 electrode is called {', '.join(unknown)}; rename or drop these channels, or build the graph "
            "from electrode positions (rule 'nearest' or 'radius')"
        )
    index: dict[tuple[str, int], int] = {}
    for i, place in enumerate(place for place in found if place is not None):
        if place in index:
            raise UserError(f"channels {names[index[place]]} and {names[i]} are the same electrode; drop one of them")
        index[place] = i
    graph = np.zeros((len(names), len(names)), np.uint8)
    for (row, column), i in index.items():
        beside = column + 1
        if row in _SPARSE_ROWS and (row, beside) not in index and abs(beside) in (1, 3):
            beside += 1
        for (other_row, other_column), j in index.items():
            same_row = other_row == row and other_column == beside
            next_row = other_column == column and _ROWS[other_row] == _ROWS[row] + 1
            if same_row or next_row:
                graph[i, j] = graph[j, i] = 1
    return graph


def nearest_graph(channels: Channels, neighbours: int = 4) -> NDArray[np.uint8]:
    """Each electrode linked to its `neighbours` nearest, by straight-line distance; links hold both ways.

    An electrode may therefore end with more than `neighbours` links. Raises UserError without positions.
    """
    distance = _distances(channels)
    return _strongest(-distance, neighbours)


def radius_graph(channels: Channels, radius: float = 0.05) -> NDArray[np.uint8]:
    """Electrodes at most `radius` metres apart (straight line) are linked. Raises UserError without positions."""
    if not radius > 0:
        raise ValueError(f"radius is {radius}; it must be a positive length in metres")
    graph = (_distances(channels) <= radius).astype(np.uint8)
    np.fill_diagonal(graph, 0)
    return graph


def correlation_graph(
    trials: ArrayLike, neighbours: int | None = None, threshold: float | None = None
) -> NDArray[np.uint8]:
    """Channels linked by the size of their correlation |r| over all samples of `trials` (..., N, T).

    Give either `neighbours`, to link each channel to the most correlated ones (both ways), or `threshold`, to link
    all pairs with |r| >= threshold. Each trial's mean is removed per channel. Fit it on training data only.

    Raises UserError for a channel without variation or with non-finite samples.
    """
    if (neighbours is None) == (threshold is None):
        raise ValueError("give either neighbours or threshold")
    data = np.asarray(trials, dtype=np.float64)
    if data.ndim < 2:
        raise ValueError(f"trials have shape {data.shape}; expected (..., channels, samples)")
    data = data - data.mean(axis=-1, keepdims=True)
    data = np.moveaxis(data, -2, 0).reshape(data.shape[-2], -1)
    bad = np.flatnonzero(~np.isfinite(data).all(axis=1) | (np.ptp(data, axis=1) == 0))
    if len(bad):
        raise UserError(f"channels {', '.join(map(str, bad))} (from 0) are flat or not finite; drop or repair them")
    strength = np.abs(np.corrcoef(data).reshape(len(data), len(data)))
    if threshold is None:
        return _strongest(strength, neighbours)
    graph = (strength >= threshold).astype(np.uint8)
    np.fill_diagonal(graph, 0)
    return graph


def edge_names(graph: ArrayLike, channels: Channels) -> list[tuple[str, str]]:
    """The edges as pairs of names, in the order of the channels; each undirected edge once, a directed one as
    (source, target)."""
    adjacency, names = np.asarray(graph), channel_names(channels)
    if adjacency.shape != (len(names), len(names)):
        raise ValueError(f"the graph has shape {adjacency.shape}, but there are {len(names)} channels")
    return [(names[i], names[j]) for i, j in np.argwhere(adjacency) if i < j or not adjacency[j, i]]


def channel_names(channels: Channels) -> list[str]:
    """The channels' names. Raises UserError where an entry has none."""
    if isinstance(channels, mne.Info | mne.channels.DigMontage):
        return list(channels.ch_names)
    names = [c if isinstance(c, str) else c.get("ch_name") for c in channels]
    if not all(names):
        raise UserError("a channel has no name (ch_name); give names, or an adjacency as the graph")
    return [str(name) for name in names]


def channel_positions(channels: Channels, by_name: bool = False) -> NDArray[np.float64]:
    """The electrodes' positions (N, 3) in metres; of a bipolar channel (`C3-P3`) without one the middle of its two
    in the 10-05 system, where the others are too with `by_name`. Raises UserError that names those without."""
    names = channel_names(channels)
    if isinstance(channels, mne.channels.DigMontage):
        places: Sequence[Any] = list(channels.get_positions()["ch_pos"].values())
    elif isinstance(channels, mne.Info):
        places = [c.get("loc") for c in channels["chs"]]
    else:
        places = [None if isinstance(c, str) else c.get("loc") for c in channels]
    positions = np.array([np.full(3, np.nan) if p is None else np.asarray(p, float)[:3] for p in places]).reshape(-1, 3)
    missing = ~np.isfinite(positions).all(axis=1) | ~positions.any(axis=1)  # MNE: NaN, in older files zero
    if missing.any() and not isinstance(channels, mne.channels.DigMontage):
        known = standard_montage().get_positions()["ch_pos"]
        for i in np.flatnonzero(missing):
            pair = bipolar_pair(names[i]) or ((standard_name(names[i]),) if by_name else ())
            ends = [known[end] for end in pair if end in known]
            positions[i] = np.mean(ends, axis=0) if ends else np.nan
        missing = ~np.isfinite(positions).all(axis=1)
    if missing.any():
        lacking = [name for name, lacks in zip(names, missing) if lacks]
        raise UserError(
            f"no electrode position for {', '.join(lacking)}; set a montage (raw.set_montage), "
            "or give an adjacency as the graph"
        )
    return positions


def grid_position(name: str) -> tuple[str, int] | None:
    """(row letters in capitals, column) of a 10-10 name in any case, None for any other name.

    Column 0 is the midline, -1 and 1 are numbers 1 and 2, -2 and 2 are 3 and 4, and so on to -5 and 5 (9 and 10).
    """
    name = _OLD_NAMES.get(name.upper(), name.upper())
    match = re.fullmatch(r"([A-Z]+?)(Z|10|[1-9])", name)
    if match is None or match[1] not in _ROWS:
        return None
    row, number = match[1], 0 if match[2] == "Z" else int(match[2])
    column = number // 2 if number % 2 == 0 else -(number + 1) // 2
    outer = abs(column) > 3
    if (row in ("FT", "T", "TP") and not outer) or (row in ("FC", "C", "CP") and outer):
        return None
    return row, column


def _nearest_four(channels: Channels) -> NDArray[np.uint8]:
    return nearest_graph(channels, min(4, len(channel_names(channels)) - 1))


def _distances(channels: Channels, by_name: bool = False) -> NDArray[np.float64]:
    positions = channel_positions(channels, by_name)
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


def _strongest(strength: NDArray[np.float64], neighbours: int | None) -> NDArray[np.uint8]:
    """Each node linked to the `neighbours` others of greatest strength, both ways; on a tie to the first."""
    size = len(strength)
    if neighbours is None or not 1 <= neighbours < size:
        raise ValueError(f"neighbours is {neighbours}; it must be from 1 to {size - 1} for {size} channels")
    others = np.where(np.eye(size, dtype=bool), -np.inf, strength)
    chosen = np.argsort(-others, axis=1, kind="stable")[:, :neighbours]
    graph = np.zeros((size, size), np.uint8)
    np.put_along_axis(graph, chosen, 1, axis=1)
    return np.maximum(graph, graph.T)
