"""Every parser against seeded mutants: a few in the default run, many under `-m fuzz`."""

from pathlib import Path

import pytest

from tests.fuzz.engine import mutants
from tests.fuzz.targets import TARGETS

FEW = {
    "segmenter": 6,
    "tile-classifier": 6,
    "language-model": 12,
    "decoder": 12,
    "speaker-system": 12,
    "fields": 15,
    "parquet": 10,
}
"""Mutants of the targets that take long, in the default run."""

ROUNDS = 4


def check(name: str, folder: Path, seeds: range) -> None:
    found = list(mutants(TARGETS[name], folder, seeds, name))
    assert not found, "\n".join(f"{which}: {problem}" for which, problem in found)


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, range(FEW.get(name, 30)))


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(ROUNDS))
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutants(name: str, part: int, tmp_path: Path) -> None:
    size = 20 * FEW.get(name, 30)
    check(name, tmp_path, range(1000 + part * size, 1000 + (part + 1) * size))
