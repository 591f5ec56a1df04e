"""Errors that a user can mend."""

import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An input that the user can mend: one line that names the file or option, what is wrong and what to do.

    The command line prints it without a traceback and ends with exit status 2. Control characters, of a damaged file's
    names say, are shown as their codes; a line feed and two spaces start an entry of a list of what is wrong.
    """

    def __init__(self, message: object = "") -> None:
        text = re.sub(r"\n(?!  )", r"\\n", str(message).rstrip("\n"))
        super().__init__(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text))


class CheckpointError(UserError):
    """A checkpoint that does not fit the model: missing, unexpected or misshapen tensors, or an unsafe file."""


class DivergedError(UserError):
    """Numbers that are not finite where a result was to be: a training that diverged, damaged weights, a bad input."""


def some(names: Iterable[Any], limit: int = 5) -> str:
    """The first `limit` names of a list for a message, and how many more there are; "nothing" for none."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "nothing"
