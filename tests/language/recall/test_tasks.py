"""The recall tasks: what an example is, that both ways to draw agree, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.core.errors import UserError
from nearfar.language.recall.tasks import FastDraws, make_examples, segment_seeds


def answers(inputs, labels, context):
    """Each label by looking its key up in the pairs before `context`; the last pair of a key counts."""
    for row, wanted in zip(inputs.tolist(), labels.tolist()):
        known = dict(zip(row[:context:2], row[1:context:2]))
        for position, label in enumerate(wanted):
            if label != -100:
                assert position >= context
                assert known[row[position]] == label


@pytest.mark.parametrize("exact", [False, True])
def test_mqar_examples_are_what_they_say(exact):
    inputs, labels = make_examples(
        "mqar", vocab_size=100, num_examples=40, input_seq_len=40, num_kv_pairs=5, seed=1, exact=exact
    )
    assert inputs.shape == labels.shape == (40, 40)
    assert ((labels != -100).sum(1) == 5).all()
    answers(inputs, labels, 10)
    keys, values = inputs[:, :10:2], inputs[:, 1:10:2]
    assert ((keys >= 1) & (keys < 50)).all()
    assert ((values >= 50) & (values < 100)).all()
    assert all(len(set(row)) == 5 for row in (*keys.tolist(), *values.tolist()))


def test_both_ways_to_draw_have_the_same_distribution():
    shared = {"vocab_size": 40, "num_examples": 6000, "input_seq_len": 32, "num_kv_pairs": 4, "seed": 3}
    slow = make_examples("mqar", exact=True, random_non_queries=False, **shared)
    fast = make_examples("mqar", random_non_queries=False, **shared)
    for a, b in zip(slow, fast):
        places = [(t > 0).double().mean(0) for t in (a, b)]  # where queries stand
        present = [torch.stack([(t == token).any(1) for token in range(40)]).double().mean(1) for t in (a, b)]
        for p, q in (places, present):  # shares of 6000 examples: within 4.5 standard errors
            error = (p * (1 - p) / 6000 + q * (1 - q) / 6000).sqrt()
            assert ((p - q).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize(("high", "count"), [(200, 3), (20, 15), (9, 9)])
def test_fast_distinct_draws_are_distinct_and_uniform(high, count):
    out = FastDraws(0, 8000).distinct(0, high, count)
    assert (np.diff(np.sort(out, 1), axis=1) > 0).all()
    for column in (0, count - 1):
        share = np.bincount(out[:, column], minlength=high) / 8000
        assert abs(share - 1 / high).max() < 5 * (1 / high / 8000) ** 0.5


def test_fast_weighted_draws_take_the_first_by_weight():
    weights = np.array([0.7, 0.2, 0.1])
    out = FastDraws(0, 20000).distinct(0, 3, 2, weights)
    first = np.bincount(out[:, 0], minlength=3) / 20000
    assert abs(first - weights).max() < 0.02
    second = np.bincount(out[out[:, 0] == 0, 1], minlength=3) / (out[:, 0] == 0).sum()
    assert abs(second - [0, 2 / 3, 1 / 3]).max() < 0.02


def test_reading_twice_shows_the_pairs_twice():
    inputs, labels = make_examples(
        "mqar", vocab_size=64, num_examples=5, input_seq_len=32, num_kv_pairs=4, num_passes=2, seed=0
    )
    assert torch.equal(inputs[:, :8], inputs[:, 8:16])
    answers(inputs, labels, 16)


def test_forgetting_asks_for_the_last_value():
    inputs, labels = make_examples(
        "forgetting-mqar", vocab_size=64, num_examples=30, input_seq_len=40, num_kv_pairs=6, num_updates=4, seed=0
    )
    answers(inputs, labels, 20)
    for row in inputs.tolist():
        before = dict(zip(row[:12:2], row[1:12:2]))
        assert all(before[key] != value for key, value in zip(row[12:20:2], row[13:20:2]))


def test_compositional_keys_need_both_tokens():
    inputs, labels = make_examples(
        "compositional-mqar", vocab_size=90, num_examples=20, input_seq_len=60, num_kv_pairs=9, seed=0
    )
    for row, wanted in zip(inputs.tolist(), labels.tolist()):
        known = {(row[i], row[i + 1]): row[i + 2] for i in range(0, 27, 3)}
        assert len(known) == 9
        assert len({a for a, _ in known}) == len({b for _, b in known}) == 3
        asked = [(p, v) for p, v in enumerate(wanted) if v != -100]
        assert len(asked) == 9
        assert all(known[row[p - 1], row[p]] == v for p, v in asked)


@pytest.mark.parametrize("cumulative", [True, False])
def test_circuits(cumulative):
    for task, rule in (
        ("parity", lambda bits: sum(bits) % 2),
        ("majority", lambda bits: int(2 * sum(bits) > len(bits))),
    ):
        inputs, labels = make_examples(task, num_examples=6, input_seq_len=9, cumulative=cumulative, seed=0)
        for bits, wanted in zip(inputs.tolist(), labels.tolist()):
            expected = [rule(bits[: i + 1]) for i in range(9)]
            assert wanted == (expected if cumulative else [-100] * 8 + expected[-1:])


def test_seeds_repeat_and_differ():
    shared = {"vocab_size": 64, "num_examples": 8, "input_seq_len": 16, "num_kv_pairs": 2}
    a, b, c = (make_examples("mqar", seed=s, **shared)[0] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    train, test = segment_seeds(123, 3, 2)
    assert max(train) < 2**31 <= min(test)
    assert segment_seeds(123, 3, 2) == (train, test)
    assert len({*train, *test}) == 5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-2, 40),
    st.integers(-2, 40),
    st.integers(-2, 12),
    st.integers(-1, 3),
    st.sampled_from([-1.0, 0.01, 1.0]),
)
def test_any_sizes_give_examples_or_one_clear_line(vocabulary, length, pairs, passes, power):
    sizes = {"vocab_size": vocabulary, "input_seq_len": length, "num_kv_pairs": pairs, "power_a": power}
    fits = 2 * pairs * (passes + 1) <= length and vocabulary > length and pairs < vocabulary // 2
    if not (fits and length % 2 == 0 and min(pairs, passes) > 0 and power > 0):
        with pytest.raises(UserError, match=r"^mqar: [^\n]+$"):
            make_examples("mqar", num_examples=3, num_passes=passes, **sizes)
        return
    inputs, labels = make_examples("mqar", num_examples=3, num_passes=passes, **sizes)
    assert inputs.shape == (3, length)
    answers(inputs, labels, 2 * pairs * passes)


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("mqar", {"input_seq_len": 63}, "even"),
        ("mqar", {"num_kv_pairs": 17}, "too short"),
        ("mqar", {"vocab_size": 64}, "larger than"),
        ("mqar", {"train_power_a": 1}, "no setting 'train_power_a'"),
        ("compositional-mqar", {"num_kv_pairs": 5}, "square"),
        ("compositional-mqar", {"num_kv_pairs": 16}, "6 num_kv_pairs"),
        ("forgetting-mqar", {"num_updates": 5}, "num_updates=5"),
        ("parity", {"input_seq_len": 0}, "at least 1"),
        ("recall", {}, "unknown task 'recall'"),
    ],
)
def test_wrong_settings_are_named(task, wrong, message):
    with pytest.raises(UserError, match=message):
        make_examples(task, **wrong)
