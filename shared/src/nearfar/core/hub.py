"""What comes from the network comes only where the user says `hub:`; everything else is a local path."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfar.core.errors import UserError
from nearfar.core.reading import reason

HUB = "hub:"
"""Stands before the name of what is to be fetched."""

NAMES = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def from_hub(name: str | Path, what: str) -> tuple[str, bool]:
    """A local path, or the id behind `hub:`, and whether it is of the hub.

    Raises UserError for what is neither, saying how to ask for `what`, such as "a model", from the hub.
    """
    text = str(name)
    if text.startswith(HUB):
        if not NAMES.fullmatch(hub_id := text.removeprefix(HUB)) or ".." in hub_id:
            raise UserError(f"{text}: is no name of the hub; write hub:NAME or hub:OWNER/NAME")
        return hub_id, True
    if not Path(name).exists():
        advice = f"; to take {what} of the Hugging Face hub write hub:{text}" if NAMES.fullmatch(text) else ""
        raise UserError(f"{text}: no such file or folder{advice}")
    return text, False


def unreachable(name: str | Path, is_hub: bool, error: Exception) -> str:
    """Why something could not be had: the first line of `error`, and what to do."""
    first = reason(error)
    if not is_hub:
        return first
    if switched := next((option for option in OFFLINE if os.environ.get(option, "0") not in ("", "0")), None):
        return f"{first}; {switched} is set, so only what was fetched before can be had"
    return f"{first}; go online, or name a local folder"


def pretrained_setting(settings: Mapping[str, Any], fetch: bool = True) -> dict[str, Any]:
    """Settings of a network in which those that would fetch weights must ask for it by `hub:`.

    `pretrained: hub:timm` becomes True and `encoder_weights: hub:imagenet` the name; without `fetch` both are left out,
    for a network whose weights come from elsewhere. Raises UserError for the same without `hub:`.
    """
    found = {}
    for name, value in settings.items():
        if name in ("pretrained", "encoder_weights") and value:
            if not str(value).startswith(HUB):
                example = "hub:timm" if value is True else f"hub:{value}"
                raise UserError(f"{name}={value}: would fetch weights from the network; write {name}={example} for it")
            if fetch:
                found[name] = True if name == "pretrained" else str(value).removeprefix(HUB)
        else:
            found[name] = value
    return found
