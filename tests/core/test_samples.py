"""Finding data inside installed packages."""

import sys

import pytest

from nearfar.core.errors import UserError
from nearfar.core.samples import installed_path


def test_finds_files_without_importing(tmp_path, monkeypatch):
    (tmp_path / "carrier" / "data").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "carrier" / "data" / "x.txt").write_text("here")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_path("carrier", "data/x.txt", "carrier").read_text() == "here"
    assert "carrier" not in sys.modules
    with pytest.raises(UserError, match=r"the sample data/y\.txt comes with carrier; install nearfar-x\[samples\]"):
        installed_path("carrier", "data/y.txt", "nearfar-x[samples]")
    with pytest.raises(UserError, match="install nearfar"):
        installed_path("no_such_package", "a", "nearfar")
