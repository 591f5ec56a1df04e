"""Models that come with the package, each in a folder with its card (`README.md`)."""

from pathlib import Path

from nearfar.core.errors import UserError

WEIGHTS = Path(__file__).parent / "speakers" / "weights"
DEFAULT_SPEAKERS = "small-8k"
"""What commands take where no speaker model is named."""


def shipped_speakers() -> list[str]:
    """The names of the speaker models."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def speaker_folder(name: str | Path = DEFAULT_SPEAKERS) -> Path:
    """The folder of a speaker model: one that is there under this name, else one of ours.

    See `nearfar.audio.speakers.system.SpeakerSystem.load`. Raises UserError for a name that is neither.
    """
    if Path(name).exists():
        return Path(name)
    if str(name) not in (known := shipped_speakers()):
        raise UserError(f"{name}: no such model; name its folder, or one that comes along ({', '.join(known)})")
    return WEIGHTS / name
