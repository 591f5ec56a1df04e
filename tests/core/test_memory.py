"""Sizes that users write, and the memory of this process."""

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.core.memory import parse_memory, resident_memory


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 << 30), ("800m", 800 << 20), ("1.5k", 1536), ("4096", 4096), ("1GiB", 1 << 30)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "1e999", "nan"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(UserError, match="--memory"):
        parse_memory(text)


def test_memory_of_the_process_follows_its_arrays():
    before = resident_memory()
    block = np.ones(8 << 20)  # 64 MiB
    held = resident_memory()
    assert held - before > 50 << 20
    del block
    assert resident_memory(peak=True) > held - (1 << 20)  # the kernel brings its counters together now and then
