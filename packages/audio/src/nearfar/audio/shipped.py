"""Models that come with the package, each in a folder with its card (`README.md`)."""

from pathlib import Path

from nearfar.core.errors import UserError

DEFAULTS = {"speakers": "small-8k", "separation": "two-voices-8k"}
"""By kind: the model that commands take where none is named."""


def shipped_models(kind: str) -> list[str]:
    """The names of those of a kind, "speakers" or "separation"."""
    return sorted(path.parent.name for path in _weights(kind).glob("*/config.json"))


def shipped_model(kind: str, name: str | Path | None = None) -> Path:
    """The folder of a model: one that is there under this name, else one of ours, by default that of `DEFAULTS`.

    Speakers': for `nearfar.audio.speakers.system.SpeakerSystem.load`; separators': for
    `nearfar.audio.checkpoints.load_separator`. Raises UserError for a name that is neither.
    """
    if name is not None and Path(name).exists():
        return Path(name)
    known = shipped_models(kind)
    if (name := str(name or DEFAULTS[kind])) not in known:
        raise UserError(
            f"{name}: no such model; name its folder, or one that comes along ({', '.join(known) or 'none'})"
        )
    return _weights(kind) / name


def _weights(kind: str) -> Path:
    return Path(__file__).parent / kind / "weights"
