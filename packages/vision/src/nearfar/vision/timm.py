"""`python -m nearfar.vision.timm SCRIPT ARGS`: a script of timm (`train.py`, `validate.py`, ...) with our models."""

import runpy
import sys
from pathlib import Path

import nearfar.vision  # noqa: F401  timm finds its models from here on


def main(arguments: list[str]) -> None:
    """Run the script that `arguments` name as if it had been started itself."""
    if not arguments or not Path(arguments[0]).is_file():
        raise SystemExit("usage: python -m nearfar.vision.timm SCRIPT ARGS, with a script of timm's repository")
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
