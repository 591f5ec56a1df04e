"""What a result depends on beside data, settings and code, for the record."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def environment() -> dict[str, str]:
    """Versions of what a result depends on, for the record: python, torch, nearfar, the machine, the git revision."""
    try:
        revision = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "nearfar": version("nearfar-core"),
        "revision": revision,
        "torch": _version("torch"),
        "lightning": _version("lightning"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
