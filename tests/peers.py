"""The tests of timm and transformers, which their wheels leave out: `.ci/peers-tests FOLDER` gets their source
distributions, and NEARFAR_PEERS names the folder. Without it, what needs them skips."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def package(name: str, folder: Path | None = None, **content: type) -> ModuleType:
    """A package among the loaded ones, with `content` and the modules in `folder`."""
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = [] if folder is None else [str(folder)]
    made.__dict__.update(content)
    return made


def package_of(peer: str) -> str:
    """The name of a package that holds the tests of `peer`."""
    if not (folder := os.environ.get("NEARFAR_PEERS")):
        pytest.skip(f"needs the tests of {peer}: see .ci/peers-tests", allow_module_level=True)
    tests = Path(folder).absolute() / peer / "tests"
    if not tests.is_dir():
        raise FileNotFoundError(f"{tests}: is no folder; `.ci/peers-tests {folder}` makes it")
    package(f"{peer}_tests", tests)
    return f"{peer}_tests"
