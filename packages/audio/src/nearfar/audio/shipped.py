"""Models that come with the package, each in a folder with its card (`README.md`)."""

from pathlib import Path

from nearfar.core.errors import UserError

SPEAKERS, SEPARATORS = (Path(__file__).parent / part / "weights" for part in ("speakers", "separation"))
DEFAULT_SPEAKERS, DEFAULT_SEPARATOR = "small-8k", "two-voices-8k"
"""What commands take where no model is named."""


def shipped_speakers() -> list[str]:
    """The names of the speaker models."""
    return _names(SPEAKERS)


def shipped_separators() -> list[str]:
    """The names of the separators."""
    return _names(SEPARATORS)


def speaker_folder(name: str | Path = DEFAULT_SPEAKERS) -> Path:
    """The folder of a speaker model: one that is there under this name, else one of ours.

    See `nearfar.audio.speakers.system.SpeakerSystem.load`. Raises UserError for a name that is neither.
    """
    return _folder(name, SPEAKERS)


def separator_folder(name: str | Path = DEFAULT_SEPARATOR) -> Path:
    """The folder or file of a separator: one that is there under this name, else one of ours.

    See `nearfar.audio.checkpoints.load_separator`. Raises UserError for a name that is neither.
    """
    return _folder(name, SEPARATORS)


def _names(weights: Path) -> list[str]:
    return sorted(path.parent.name for path in weights.glob("*/config.json"))


def _folder(name: str | Path, weights: Path) -> Path:
    if Path(name).exists():
        return Path(name)
    if str(name) not in (known := _names(weights)):
        raise UserError(f"{name}: no such model; name its folder, or one that comes along ({', '.join(known)})")
    return weights / name
