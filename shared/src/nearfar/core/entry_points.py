"""Loading what an installed package registers."""

from importlib.metadata import EntryPoint, version
from typing import Any

from nearfar.core.errors import UserError


def load_entry_point(point: EntryPoint) -> Any:
    """Import what an entry point names; an environment in which it cannot be imported is a UserError of one line."""
    try:
        return point.load()
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{point.name}: cannot be imported here ({reason}); nearfar needs torch>=2.11,<2.15 and the versions in "
            f"its uv.lock, this environment has torch {version('torch')}"
        ) from error
