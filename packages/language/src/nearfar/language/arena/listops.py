"""ListOps of Long Range Arena: nested lists of operators and digits, drawn and computed level by level.

A tree from depth 1: with probability 1/4, below depth 10, an operator with 2 to 10 children, each a tree one deeper,
else a digit. MIN, MAX, MED (the median, of two middle values the mean, cut to an integer) and SM (sum modulo 10).
Trees of more than 500 and less than 2000 tokens are kept, each once. The generator of the original draws through an
unordered set without a seed, so its very sequences cannot be had again; their distribution is this one.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = ("<pad>", *OPERATORS, *(str(digit) for digit in range(10)), "]")
"""Token -> its id, by place: padding, operators, digits, the end of a list."""

OPERATOR, DIGIT, END = 1, 1 + len(OPERATORS), len(TOKENS) - 1
SPLIT = {"train": 96000, "val": 2000, "test": 2000}


@dataclass
class Trees:
    """Trees level by level: at each the parents of its nodes (places in the level above), operators (-1: a digit) and
    digits."""

    parents: list[np.ndarray]
    operators: list[np.ndarray]
    digits: list[np.ndarray]

    @property
    def roots(self) -> int:
        return len(self.operators[0])


def grow(roots: int, rng: np.random.Generator, max_depth: int, max_length: int) -> tuple[Trees, np.ndarray]:
    """Trees whose root is an operator, and their lengths; what gets too long is not grown further and has a length
    beyond `max_length`."""
    parents, operators = [np.arange(roots)], [rng.integers(0, 4, roots, dtype=np.int8)]
    tree = np.arange(roots)
    length = np.full(roots, 2, dtype=np.int64)
    for depth in range(2, max_depth + 1):
        inner = np.flatnonzero(operators[-1] >= 0)
        inner = inner[length[tree[inner]] < max_length]
        children = rng.integers(2, 11, len(inner), dtype=np.int8)
        parent = np.repeat(inner, children)
        if not len(parent):
            break
        tree = tree[parent]
        if depth < max_depth:
            branches = rng.random(len(parent), dtype=np.float32) <= 0.25
        else:
            branches = np.zeros(len(parent), dtype=bool)
        operator = np.where(branches, rng.integers(0, 4, len(parent), dtype=np.int8), np.int8(-1))
        parents.append(parent)
        operators.append(operator)
        length += np.bincount(tree, weights=1 + branches, minlength=roots).astype(np.int64)
    return Trees(parents, operators, []), length


def keep(trees: Trees, wanted: np.ndarray, rng: np.random.Generator) -> Trees:
    """The trees whose root is wanted, with digits drawn for their leaves."""
    parents, operators, digits, kept = [], [], [], wanted
    for level, (parent, operator) in enumerate(zip(trees.parents, trees.operators)):
        here = kept if level == 0 else kept[parent]
        number = np.cumsum(kept) - 1  # of the level above, among what is kept
        parents.append(np.arange(int(here.sum())) if level == 0 else number[parent[here]])
        operators.append(operator[here])
        digits.append(rng.integers(0, 10, len(operators[-1]), dtype=np.int8))
        kept = here
        if not here.any():
            break
    return Trees(parents, operators, digits)


def solve(trees: Trees) -> tuple[np.ndarray, list[np.ndarray]]:
    """The value of each tree, and the length of each node's text level by level."""
    values = lengths = np.empty(0, dtype=np.int64)
    every: list[np.ndarray] = []
    for level in range(len(trees.operators) - 1, -1, -1):
        operator, value = trees.operators[level], trees.digits[level].astype(np.int64)
        length = np.ones(len(operator), dtype=np.int64)
        inner = np.flatnonzero(operator >= 0)
        if len(inner):
            parent = trees.parents[level + 1]
            starts = np.flatnonzero(np.r_[True, parent[1:] != parent[:-1]])
            value[inner] = combine(operator[inner], values, starts)
            length[inner] = 2 + np.add.reduceat(lengths, starts)
        values, lengths = value, length
        every.insert(0, length)
    return values, every


def combine(operator: np.ndarray, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The value of each list, given its children's, which begin at `starts`."""
    count = np.diff(np.r_[starts, len(values)])
    table = np.full((len(starts), 10), 99, dtype=np.int64)  # at most ten children; 99 sorts behind the digits
    row = np.repeat(np.arange(len(starts)), count)
    table[row, np.arange(len(values)) - starts[row]] = values
    table.sort(1)
    rows = np.arange(len(starts))
    middle = (table[rows, (count - 1) // 2] + table[rows, count // 2]) // 2
    sums = np.add.reduceat(values, starts) % 10
    return np.choose(operator, [table[:, 0], table[rows, count - 1], middle, sums])


def write(trees: Trees, lengths: list[np.ndarray]) -> np.ndarray:
    """The ids of all tokens, tree after tree."""
    ends = lengths[0].cumsum()
    tokens = np.empty(int(ends[-1]), dtype=np.uint8)
    place = ends - lengths[0]
    for level, (operator, digit, length) in enumerate(zip(trees.operators, trees.digits, lengths)):
        if level:
            parent = trees.parents[level]
            before = length.cumsum() - length
            starts = np.flatnonzero(np.r_[True, parent[1:] != parent[:-1]])
            first = before[starts][np.cumsum(np.r_[False, parent[1:] != parent[:-1]])]
            place = place[parent] + 1 + before - first
        inner = operator >= 0
        tokens[place] = np.where(inner, OPERATOR + operator, DIGIT + digit)
        tokens[(place + length - 1)[inner]] = END
    return tokens


def sequences(
    count: int,
    seed: int = 0,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    batch: int = 4000,
) -> Iterator[tuple[np.ndarray, int]]:
    """`count` different sequences of more than `min_length` and less than `max_length` tokens: ids (uint8) and value.

    The order is random: `count` sequences of a seed begin those of a larger count.
    """
    if count < 1 or not 0 <= min_length < max_length - 1 or max_depth < 2:
        raise ValueError(
            f"count={count} must be at least 1, min_length={min_length} from 0 and two below max_length={max_length} "
            f"at least, max_depth={max_depth} at least 2"
        )
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    fruitless = 0
    while count:
        grown, length = grow(batch, rng, max_depth, max_length)
        trees = keep(grown, (length > min_length) & (length < max_length), rng)
        fruitless += 1
        if trees.roots:
            values, lengths = solve(trees)
            for ids, value in zip(np.split(write(trees, lengths), lengths[0].cumsum()[:-1]), values.tolist()):
                mark = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
                if mark in seen:
                    continue
                seen.add(mark)
                fruitless = 0
                yield ids, value
                count -= 1
                if not count:
                    return
        if fruitless > 100:
            raise ValueError(f"there are hardly any trees left of {min_length} to {max_length} tokens at this depth")


def text_of(ids: Iterable[int]) -> str:
    """Tokens with spaces between them."""
    return " ".join(map(TOKENS.__getitem__, ids.tolist() if isinstance(ids, np.ndarray) else ids))


def make(folder: str | Path, sizes: dict[str, int] | None = None, seed: int = 0, **shape: int) -> list[Path]:
    """Write `folder/listops-1000/basic_{train,val,test}.tsv` as Long Range Arena names them: Source, Target.

    The texts have no parentheses, which the original writes and its readers take out. shape: `min_length`, `max_length`
    and `max_depth` of `sequences`, Long Range Arena's by default.
    """
    sizes = SPLIT if sizes is None else sizes
    if any(size < 1 for size in sizes.values()):
        raise UserError(f"every part of ListOps needs at least one example, asked are {sizes}")
    source = sequences(sum(sizes.values()), seed, **shape)
    paths = []
    for part, size in sizes.items():
        path = Path(folder) / "listops-1000" / f"basic_{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
            file.write("Source\tTarget\n")
            for _ in range(size):
                ids, value = next(source)
                file.write(f"{text_of(ids)}\t{value}\n")
        paths.append(path)
    return paths
