"""Synthetic recall tasks: multi-query associative recall (MQAR) and its relatives, and Boolean circuits.

Every task gives `(inputs, labels)`, both `(examples, length)` of int64; a label stands on the position whose output
should name it, -100 elsewhere. Zoology (Arora et al. 2024, arXiv 2312.04927).

Each task draws in one of two ways of the same distribution: `exact=True` with numpy's legacy generator, call for
call as Zoology's code, so that the data are equal to the bit; else with whole arrays at once, which is some hundred
times faster (100,000 examples over 8192 tokens take seconds instead of minutes).
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nearfar.core.errors import UserError

Examples = tuple[Tensor, Tensor]


class Draws(Protocol):
    """Random numbers for `rows` examples."""

    rows: int

    def distinct(self, low: int, high: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        """`(rows, count)` different integers of low .. high - 1 in random order, weighted where weights are given."""
        ...

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        """`(rows, count)` integers of low .. high - 1."""
        ...

    def permutations(self, count: int) -> np.ndarray:
        """`(rows, count)` orders of 0 .. count - 1."""
        ...


class ExactDraws:
    """numpy's legacy generator, row by row."""

    def __init__(self, seed: int, rows: int) -> None:
        self.rng, self.rows = np.random.RandomState(seed), rows  # the published streams are this generator's

    def distinct(self, low: int, high: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        pool = np.arange(low, high)
        return np.stack([self.rng.choice(pool, count, replace=False, p=weights) for _ in range(self.rows)])

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        return self.rng.randint(low, high, size=(self.rows, count))

    def permutations(self, count: int) -> np.ndarray:
        return np.stack([self.rng.permutation(count) for _ in range(self.rows)])


class FastDraws:
    """numpy's current generator, all rows at once."""

    def __init__(self, seed: int, rows: int) -> None:
        self.rng, self.rows = np.random.default_rng(seed), rows

    def distinct(self, low: int, high: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        size = high - low
        if weights is None and 2 * count**2 < size:  # few of many: draw freely, repeat the rows with a clash
            out = self.rng.integers(low, high, (self.rows, count))
            clash = np.arange(self.rows)
            while len(clash := clash[(np.diff(np.sort(out[clash], 1), axis=1) == 0).any(1)]):
                out[clash] = self.rng.integers(low, high, (len(clash), count))
            return out
        # exponential clocks: the first `count` to ring are a weighted sample without replacement, in order
        parts = []
        for start in range(0, self.rows, step := max(1, 2**24 // size)):
            clocks = self.rng.standard_exponential((min(step, self.rows - start), size), dtype=np.float32)
            if weights is not None:
                clocks /= weights.astype(np.float32)
            first = np.argpartition(clocks, count - 1, axis=1)[:, :count] if count < size else np.arange(size)
            first = np.broadcast_to(first, (len(clocks), count))
            order = np.take_along_axis(clocks, first, 1).argsort(1)
            parts.append(np.take_along_axis(first, order, 1) + low)
        return np.concatenate(parts)

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        return self.rng.integers(low, high, (self.rows, count))

    def permutations(self, count: int) -> np.ndarray:
        return self.rng.permuted(np.tile(np.arange(count), (self.rows, 1)), axis=1)


def draws(seed: int, rows: int, exact: bool) -> Draws:
    return ExactDraws(seed, rows) if exact else FastDraws(seed, rows)


def mqar(
    vocab_size: int = 8192,
    num_examples: int = 1000,
    input_seq_len: int = 64,
    num_kv_pairs: int = 4,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    num_passes: int = 1,
    seed: int = 0,
    exact: bool = False,
    torch_seed: int | None = None,
) -> Examples:
    """Multi-query associative recall: `k1 v1 k2 v2 ...`, then each key once more, to be answered with its value.

    Keys are 1 .. V/2 - 1 and values V/2 .. V - 1, different within an example. Behind the pairs, slots of two tokens
    hold the queries; slot i is chosen with weight i^(power_a - 1), so near 0 most queries come early (1: uniform).

    Args:
        random_non_queries: fill the unused positions with random tokens instead of 0. They may equal keys and
            values, so with few tokens the best accuracy is a little below 1.
        num_passes: how often the pairs are shown (more than once: "just read twice", arXiv 2407.05483).
        exact: draw as Zoology's code does; its fill comes from torch's generator, seeded here by `torch_seed`.
    """
    pairs, context = num_kv_pairs, 2 * num_kv_pairs * num_passes
    check("mqar", vocab_size, input_seq_len, pairs, num_passes=num_passes, power_a=power_a, num_examples=num_examples)
    draw = draws(seed, num_examples, exact)
    keys = draw.distinct(1, vocab_size // 2, pairs)
    values = draw.distinct(vocab_size // 2, vocab_size, pairs)
    shown = np.stack([keys, values], -1).reshape(num_examples, -1)
    slots = choose_slots(draw, (input_seq_len - context) // 2, pairs, power_a)
    inputs, labels = blank(num_examples, input_seq_len)
    inputs[:, :context] = np.tile(shown, num_passes)
    put(inputs, context + 2 * slots, keys)
    put(labels, context + 2 * slots, values)
    return finish(inputs, labels, random_non_queries, vocab_size, seed if torch_seed is None else torch_seed)


def forgetting_mqar(
    vocab_size: int = 8192,
    num_examples: int = 1000,
    input_seq_len: int = 64,
    num_kv_pairs: int = 4,
    num_updates: int = 1,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
    exact: bool = False,
    torch_seed: int | None = None,
) -> Examples:
    """MQAR in which `num_updates` of the keys get a second pair after the context; a query asks for the last value.

    With `exact` the new value is kept apart from the value of a pair that is not always the updated one, as in
    Zoology's code, so now and then a key keeps its value; otherwise it always changes.
    """
    pairs, updates, context = num_kv_pairs, num_updates, 2 * (num_kv_pairs + num_updates)
    check(
        "forgetting-mqar", vocab_size, input_seq_len, pairs, extra=updates, power_a=power_a, num_examples=num_examples
    )
    if not 0 <= updates <= pairs:
        raise UserError(f"forgetting-mqar: num_updates={updates} must lie in 0 .. num_kv_pairs={pairs}")
    draw = draws(seed, num_examples, exact)
    keys = draw.distinct(1, vocab_size // 2, pairs)
    values = draw.distinct(vocab_size // 2, vocab_size, pairs)
    fresh = draw.integers(vocab_size // 2, vocab_size - 1, updates)
    which = draw.distinct(0, pairs, updates)
    old = values[:, :updates] if exact else np.take_along_axis(values, which, 1)
    fresh = fresh + (fresh >= old)
    again = np.take_along_axis(keys, which, 1)
    inputs, labels = blank(num_examples, input_seq_len)
    shown = np.concatenate([np.stack([keys, values], -1), np.stack([again, fresh], -1)], 1)
    inputs[:, :context] = shown.reshape(num_examples, -1)
    np.put_along_axis(values, which, fresh, 1)
    slots = choose_slots(draw, (input_seq_len - context) // 2, pairs, power_a)
    put(inputs, context + 2 * slots, keys)
    put(labels, context + 2 * slots, values)
    return finish(inputs, labels, random_non_queries, vocab_size, seed if torch_seed is None else torch_seed)


def compositional_mqar(
    vocab_size: int = 8192,
    num_examples: int = 1000,
    input_seq_len: int = 64,
    num_kv_pairs: int = 4,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
    exact: bool = False,
    torch_seed: int | None = None,
) -> Examples:
    """MQAR with keys of two tokens: g first and g second ones make a grid of g^2 = num_kv_pairs keys.

    First tokens come from the first third of the vocabulary, second ones from the second, values from the last;
    neither token alone tells the value. Queries stand in slots of three, the label on the second token.
    """
    pairs, context, third = num_kv_pairs, 3 * num_kv_pairs, vocab_size // 3
    side = round(pairs**0.5)
    if side * side != pairs or pairs < 1:
        raise UserError(f"compositional-mqar: num_kv_pairs={pairs} must be a square number (1, 4, 9, 16, ...)")
    if third <= max(pairs, side + 1):
        raise UserError(f"compositional-mqar: vocab_size={vocab_size} is too small for {pairs} pairs")
    if input_seq_len < 2 * context or num_examples < 1 or power_a <= 0:
        raise UserError(
            f"compositional-mqar: needs input_seq_len >= 6 num_kv_pairs = {2 * context}, num_examples >= 1 and "
            f"power_a > 0, got {input_seq_len}, {num_examples} and {power_a}"
        )
    draw = draws(seed, num_examples, exact)
    first = draw.distinct(1, third, side)
    second = draw.distinct(third, 2 * third, side)
    order = draw.permutations(pairs)
    values = draw.distinct(2 * third, vocab_size, pairs)
    first = np.take_along_axis(first, order // side, 1)
    second = np.take_along_axis(second, order % side, 1)
    inputs, labels = blank(num_examples, input_seq_len)
    inputs[:, :context] = np.stack([first, second, values], -1).reshape(num_examples, -1)
    slots = choose_slots(draw, (input_seq_len - context) // 3, pairs, power_a)
    put(inputs, context + 3 * slots, first)
    put(inputs, context + 3 * slots + 1, second)
    put(labels, context + 3 * slots + 1, values)
    return finish(inputs, labels, random_non_queries, vocab_size, seed if torch_seed is None else torch_seed)


def parity(num_examples: int = 1000, input_seq_len: int = 64, cumulative: bool = True, seed: int = 0) -> Examples:
    """Random bits; the label is whether the number of ones so far is odd, at every position or at the last alone."""
    return circuit(num_examples, input_seq_len, cumulative, seed, lambda ones, n: ones % 2)


def majority(num_examples: int = 1000, input_seq_len: int = 64, cumulative: bool = True, seed: int = 0) -> Examples:
    """Random bits; the label is whether more than half of the bits so far are ones."""
    return circuit(num_examples, input_seq_len, cumulative, seed, lambda ones, n: 2 * ones > n)


TASKS: dict[str, Callable[..., Examples]] = {
    "mqar": mqar,
    "forgetting-mqar": forgetting_mqar,
    "compositional-mqar": compositional_mqar,
    "parity": parity,
    "majority": majority,
}
"""Name in a recipe -> task."""


def make_examples(task: str, **settings: Any) -> Examples:
    """The examples of `task`; an unknown task or setting is a UserError."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    allowed = inspect.signature(TASKS[task]).parameters
    for name in settings:
        if name not in allowed:
            raise UserError(f"task {task!r} has no setting {name!r}; it has {', '.join(allowed)}")
    return TASKS[task](**settings)


def segment_seeds(seed: int, train: int, test: int) -> tuple[list[int], list[int]]:
    """Seeds of the training and test segments of one data seed, as Zoology draws them: no two overlap."""
    rng = np.random.RandomState(seed)  # the published stream
    return (
        [int(rng.randint(0, 2**31)) for _ in range(train)],
        [int(rng.randint(2**31, 2**32, dtype=np.int64)) for _ in range(test)],
    )


def check(
    task: str,
    vocab_size: int,
    length: int,
    pairs: int,
    *,
    num_examples: int,
    power_a: float,
    num_passes: int = 1,
    extra: int = 0,
) -> None:
    """Raise UserError for sizes that the task cannot have."""
    need = 2 * pairs * (num_passes + 1) + 2 * extra
    if min(num_examples, pairs, num_passes) < 1 or power_a <= 0:
        raise UserError(f"{task}: num_examples, num_kv_pairs and num_passes must be at least 1 and power_a above 0")
    if length % 2:
        raise UserError(f"{task}: input_seq_len={length} must be even")
    if length < need:
        raise UserError(f"{task}: input_seq_len={length} is too short for {pairs} pairs, which need at least {need}")
    if vocab_size <= length:
        raise UserError(f"{task}: vocab_size={vocab_size} must be larger than input_seq_len={length}")
    if vocab_size // 2 - 1 < pairs:
        raise UserError(f"{task}: vocab_size={vocab_size} has only {vocab_size // 2 - 1} keys for {pairs} pairs")


def choose_slots(draw: Draws, slots: int, count: int, power: float) -> np.ndarray:
    """`(rows, count)` different slots, slot i (from 1) with weight i^(power - 1)."""
    weights = power * np.arange(1, slots + 1) ** (power - 1)
    return draw.distinct(0, slots, count, weights / weights.sum())


def blank(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of zeros and labels of -100."""
    return np.zeros((rows, length), np.int64), np.full((rows, length), -100, np.int64)


def put(array: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
    np.put_along_axis(array, positions, values, 1)


def finish(inputs: np.ndarray, labels: np.ndarray, fill: bool, vocab_size: int, seed: int) -> Examples:
    """As tensors, with unused positions filled by random tokens where wanted."""
    tokens = torch.from_numpy(inputs)
    if fill:
        noise = torch.randint(vocab_size, tokens.shape, generator=torch.Generator().manual_seed(seed))
        tokens = torch.where(tokens == 0, noise, tokens)
    return tokens, torch.from_numpy(labels)


def circuit(rows: int, length: int, cumulative: bool, seed: int, answer: Callable[..., np.ndarray]) -> Examples:
    if min(rows, length) < 1:
        raise UserError(f"num_examples={rows} and input_seq_len={length} must be at least 1")
    bits = FastDraws(seed, rows).integers(0, 2, length)
    labels = answer(bits.cumsum(1), np.arange(1, length + 1)).astype(np.int64)
    if not cumulative:
        labels[:, :-1] = -100
    return torch.from_numpy(bits), torch.from_numpy(labels)
