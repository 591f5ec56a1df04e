"""Long measurements in parts: each is kept as soon as it is done, and none begins when the time is over."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.core.fingerprint import data_digest


class Parts:
    """Results by name in `folder/parts.json`, for one set of models, pictures and options.

    `seconds`: time in which parts may begin; None for no limit. Raises UserError where the folder holds the parts of
    something else, unless `fresh`.
    """

    def __init__(
        self, folder: Path, made_from: dict[str, Any], seconds: float | None = None, fresh: bool = False
    ) -> None:
        self.file, self.source = folder / "parts.json", {key: data_digest(value) for key, value in made_from.items()}
        self.done: dict[str, Any] = {}
        self.left: list[str] = []
        """Names of the parts that the time did not reach."""
        self.end = None if seconds is None else time.monotonic() + seconds
        if self.file.is_file() and not fresh:
            try:
                found = json.loads(self.file.read_text(encoding="utf-8"))
                source, done = dict(found["made_from"]), dict(found["parts"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.file}: damaged ({error}); remove it, or start anew with --fresh") from error
            if source != self.source:
                other = ", ".join(key for key in self.source if source.get(key) != self.source[key])
                raise UserError(f"{folder}: holds results of other {other}; name another folder, or use --fresh")
            self.done = done

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of the part `name`: as it is there, or measured; None where the time is over."""
        if name not in self.done:
            if self.end is not None and time.monotonic() >= self.end:
                self.left.append(name)
                return None
            self.done[name] = measure()
            write_json(self.file, {"made_from": self.source, "parts": self.done}, exact=True)
        return self.done[name]
