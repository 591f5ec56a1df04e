"""Data that comes with installed packages, so that everything runs without a download."""

from importlib.util import find_spec
from pathlib import Path

from nearfar.core.errors import UserError


def installed_path(package: str, path: str, install: str) -> Path:
    """The file or folder `path` inside an installed `package`, which is not imported.

    Raises UserError that says what to `install` (a requirement such as `nearfar-eeg[samples]`) where it is missing.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / path).exists():
            return found
    raise UserError(f"the sample {path} comes with {package}; install {install}")
