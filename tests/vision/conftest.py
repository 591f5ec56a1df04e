"""Lets the tests of this folder import `tests.vision.base` however pytest is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
