"""The same item by its content, or the same group, on both sides of a split."""

import pytest

from nearfar.core.leakage import LeakageError, Side, check_apart, keep_twins_together


def test_what_is_apart_passes():
    first = Side("training", ["a", "b"], ["1", "2"], ["x", None])
    check_apart(first, Side("validation", ["c", "d"], ["3", "4"], ["y", None]))
    check_apart(first, Side("validation", [], []))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Side("test", ["c"], ["2"]), "b and c: hold the same and lie in training and in test; remove the copy"),
        (Side("test", ["b"], ["2"]), "b: lies in training and in test"),
        (Side("test", ["c"], ["3"], ["x"]), "patient x: on both sides, in training and in test; split by patient"),
    ],
)
def test_what_is_on_both_sides_is_named(other, message):
    with pytest.raises(LeakageError, match=message):
        check_apart(Side("training", ["a", "b"], ["1", "2"], ["x", "y"]), other, group="patient")


def test_copies_stay_together():
    assert keep_twins_together([1], ["a", "b", "b", "c", "a"]) == {1, 2}


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one length"):
        Side("training", ["a"], [])
