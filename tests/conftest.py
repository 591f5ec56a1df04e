"""Fixtures for all tests."""

import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # tests import `tests.vision.base` however pytest is started
DATA = REPOSITORY.parent / "shared" / "data"
"""Real recordings, pictures and texts that some tests use where they are there."""


torch.set_num_threads(1)  # the tests run in parallel


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("eegmmidb/S001")`: a folder of real data; the test skips where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"needs the recordings of {path}")
        return path

    return find
