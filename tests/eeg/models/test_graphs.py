"""Electrode graphs by name, position and correlation."""

import json

import mne
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.core.contracts import shipped
from nearfar.core.errors import UserError
from nearfar.eeg.models.graphs import (
    channel_positions,
    correlation_graph,
    edge_names,
    electrode_graph,
    grid_graph,
    grid_position,
    nearest_graph,
    radius_graph,
)

CONTRACTS = shipped("agtcnet")
PUBLISHED = [
    settings for path in CONTRACTS if "edges_undirected" in (settings := json.loads(path.read_text())["settings"])
]
CAP = mne.channels.make_standard_montage("biosemi64")


def pairs(graph, names):
    return {frozenset(pair) for pair in edge_names(graph, names)}


def info(names=("C3", "Cz", "C4"), montage=None):
    made = mne.create_info(list(names), 100.0, "eeg")
    return made.set_montage(montage) if montage else made


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda s: f"{s['channels']} channels")
@pytest.mark.parametrize("spelled", [str, str.lower, str.upper])
def test_published_graphs_edge_for_edge(settings, spelled):
    names = [spelled(name) for name in settings["channel_order"]]
    expected = {frozenset(spelled(name) for name in edge.split("-")) for edge in settings["edges_undirected"]}
    graph = grid_graph(names)
    assert pairs(graph, names) == expected
    assert len(expected) == {22: 31, 64: 97}[settings["channels"]]


def test_both_published_sizes_are_held():
    assert {settings["channels"] for settings in PUBLISHED} == {22, 64}


def test_a_dense_cap_fills_the_gaps_of_the_sparse_rows():
    assert pairs(grid_graph(["AF7", "AF3", "PO3", "POz"]), ["AF7", "AF3", "PO3", "POz"]) == {
        frozenset({"AF7", "AF3"}),
        frozenset({"PO3", "POz"}),
    }
    names = ["AF7", "AF5", "AF3"]
    assert pairs(grid_graph(names), names) == {frozenset({"AF7", "AF5"}), frozenset({"AF5", "AF3"})}


def test_electrodes_beyond_a_gap_are_not_linked():
    names = ["F3", "Fz", "F4", "C3", "P3", "FT7", "FT8", "FC5"]
    assert pairs(grid_graph(names), names) == set()


def test_old_names_are_the_present_ones():
    new, old = ["T7", "T8", "P7", "P8", "TP7", "P5"], ["T3", "T4", "T5", "T6", "TP7", "P5"]
    assert np.array_equal(grid_graph(new), grid_graph(old))
    assert grid_graph(old).any()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("Cz", ("C", 0)),
        ("fpZ", ("FP", 0)),
        ("AF3", ("AF", -2)),
        ("PO8", ("PO", 4)),
        ("T10", ("T", 5)),
        ("C7", None),
        ("FT1", None),
        ("C11", None),
        ("AFp3h", None),
        ("A1", None),
        ("EOG-left", None),
        ("", None),
    ],
)
def test_places_in_the_grid(name, place):
    assert grid_position(name) == place


@given(st.text(max_size=6))
def test_any_text_has_a_place_or_none(text):
    place = grid_position(text)
    assert place is None or (isinstance(place[0], str) and abs(place[1]) <= 5)


@given(st.permutations(CAP.ch_names))
def test_the_order_of_channels_does_not_matter(names):
    assert pairs(grid_graph(names), names) == pairs(grid_graph(CAP.ch_names), CAP.ch_names)


def test_names_without_a_place_are_named():
    with pytest.raises(UserError, match="EOG-left, M1"):
        grid_graph(["C3", "EOG-left", "M1"])
    with pytest.raises(UserError, match="T3 and T7 are the same electrode"):
        grid_graph(["T3", "C3", "T7"])


def test_all_ways_to_give_channels():
    given_as = [CAP, info(CAP.ch_names, CAP), info(CAP.ch_names, CAP)["chs"]]
    for rule in ("10-10", "nearest", "radius", "auto"):
        graphs = [electrode_graph(channels, rule) for channels in given_as]
        assert all(np.array_equal(graph, graphs[0]) for graph in graphs)
        assert np.array_equal(graphs[0], graphs[0].T)
        assert not graphs[0].diagonal().any()
        assert set(np.unique(graphs[0])) == {0, 1}
        assert graphs[0].shape == (64, 64)


def test_auto_takes_positions_where_names_tell_nothing():
    net = mne.channels.make_standard_montage("GSN-HydroCel-32")
    assert np.array_equal(electrode_graph(net), nearest_graph(net, 4))
    assert np.array_equal(electrode_graph(CAP), grid_graph(CAP))
    with pytest.raises(UserError, match="no electrode position for E1, E2"):
        electrode_graph(["E1", "E2"])
    with pytest.raises(ValueError, match="there is no electrode graph 'grid'"):
        electrode_graph(CAP, "grid")


def test_nearest_against_all_distances():
    positions, graph = channel_positions(CAP), nearest_graph(CAP, 3)
    expected = np.zeros_like(graph)
    for i, place in enumerate(positions):
        distance = [(np.linalg.norm(place - other), j) for j, other in enumerate(positions) if j != i]
        for _, j in sorted(distance)[:3]:
            expected[i, j] = expected[j, i] = 1
    assert np.array_equal(graph, expected)


def test_radius_against_all_distances():
    positions, graph = channel_positions(CAP), radius_graph(CAP, 0.04)
    for i in range(64):
        for j in range(64):
            near = i != j and np.linalg.norm(positions[i] - positions[j]) <= 0.04
            assert graph[i, j] == near
    assert graph.any()


@pytest.mark.parametrize("rule", [nearest_graph, radius_graph])
def test_missing_positions_are_named(rule):
    with pytest.raises(UserError, match="no electrode position for C3, Cz, C4; set a montage"):
        rule(info())
    channels = info(("C3", "Cz", "C4"), CAP)["chs"]
    channels[1]["loc"][:3] = 0  # as older files have it
    with pytest.raises(UserError, match="no electrode position for Cz;"):
        rule(channels)
    with pytest.raises(UserError, match="no electrode position for C3, Cz;"):
        rule(["C3", "Cz"])


def test_bad_settings():
    for neighbours in (0, 64):
        with pytest.raises(ValueError, match=f"neighbours is {neighbours}"):
            nearest_graph(CAP, neighbours)
    with pytest.raises(ValueError, match="radius is 0"):
        radius_graph(CAP, 0)
    with pytest.raises(ValueError, match="either neighbours or threshold"):
        correlation_graph(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="shape"):
        correlation_graph(np.zeros(4), neighbours=1)
    with pytest.raises(UserError, match="a channel has no name"):
        grid_graph([{"ch_name": "C3"}, {"loc": np.zeros(12)}])


def test_correlation():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 20, 1, 100))
    noise = rng.standard_normal((20, 5, 100))
    trials = np.concatenate([left, left, -left, right, right], axis=1) + 0.3 * noise
    trials += 100 * rng.standard_normal((20, 1, 1))  # offsets of whole trials are no correlation
    expected = {frozenset(pair) for pair in [(0, 1), (0, 2), (1, 2), (3, 4)]}
    for graph in (correlation_graph(trials, threshold=0.6), correlation_graph(trials, neighbours=1)):
        assert not graph.diagonal().any()
        assert {frozenset(pair) for pair in np.argwhere(graph).tolist()} <= expected
    assert correlation_graph(trials, threshold=0.6).sum() == 8
    trials[:, 3] = 1
    with pytest.raises(UserError, match="channels 3 \\(from 0\\) are flat"):
        correlation_graph(trials, neighbours=1)
    trials[0, 1, 0] = np.nan
    with pytest.raises(UserError, match="channels 1, 3"):
        correlation_graph(trials, neighbours=1)


def test_edges_by_name():
    graph = np.zeros((3, 3), int)
    graph[0, 1] = graph[1, 0] = graph[2, 0] = 1
    assert edge_names(graph, ["a", "b", "c"]) == [("a", "b"), ("c", "a")]
    with pytest.raises(ValueError, match="shape \\(3, 3\\), but there are 2"):
        edge_names(graph, ["a", "b"])
