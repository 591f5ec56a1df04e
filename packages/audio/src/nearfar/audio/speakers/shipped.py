"""Speaker models that come with the package."""

from pathlib import Path

from nearfar.core.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
DEFAULT_MODEL = "small-8k"


def shipped_models() -> list[str]:
    """Their names."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def shipped_model(name: str = DEFAULT_MODEL) -> Path:
    """The folder of one, with its card in `README.md`; see `nearfar.audio.speakers.system.SpeakerSystem.load`.

    Raises UserError for a name that is none of theirs.
    """
    if name not in shipped_models():
        raise UserError(f"{name}: is no model that comes with the package; {', '.join(shipped_models()) or 'none'} are")
    return WEIGHTS / name
