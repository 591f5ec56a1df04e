"""What the commands share: their options, and embedding many recordings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from nearfar.audio.corpora import Utterance
from nearfar.audio.speakers.embedding import Embedded, Embedder
from nearfar.core.cli.batch import run_batch
from nearfar.core.cli.console import messages
from nearfar.core.errors import UserError, some
from nearfar.core.leakage import LeakageError

Model = Annotated[Path, typer.Option("--model", "-m", help="Model folder that `train` wrote.")]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps embeddings; interrupted work goes on there.")]
Channel = Annotated[
    int | None, typer.Option("--channel", min=1, help="Which channel (1, 2 ...) of recordings with several.")
]
MixChannels = Annotated[bool, typer.Option("--mix-channels", help="Average the channels of recordings with several.")]


AllowLeakage = Annotated[
    bool,
    typer.Option(
        "--allow-leakage",
        help="Go on with what the model was trained on, a recording as its own test, or one content under two names. "
        "The figures are too good.",
    ),
]


def refuse_leaks(where: object, leaks: Sequence[str], allowed: bool) -> None:
    """Say what makes figures too good, and raise LeakageError unless that is allowed."""
    if leaks and not allowed:
        raise LeakageError(f"{where}: {'; '.join(leaks)}; leave them out, or go on with --allow-leakage")
    for leak in leaks:
        messages.print(f"{where}: {leak}: their scores are too good", highlight=False, soft_wrap=True)


def embed_all(
    utterances: Sequence[Utterance], embed_one: Embedder
) -> tuple[list[tuple[Utterance, Embedded]], list[str]]:
    """Embed with a progress bar, going on past what cannot be; says what was dropped."""
    found, failures = run_batch(utterances, lambda u: (u, embed_one(u)), "embedding", name=lambda u: str(u.path))
    say_silence([(str(u.path), e) for u, e in found])
    return found, failures


def say_silence(found: Sequence[tuple[str, Embedded]]) -> None:
    """Say which recordings digital silence was dropped from."""
    dropped = [(name, e.quality.silence) for name, e in found if e.quality.silence >= 0.005]
    if dropped:
        listed = some([f"{name} ({seconds:.2f} s)" for name, seconds in dropped], 3)
        messages.print(f"digital silence was dropped from {len(dropped)} of {len(found)}: {listed}", highlight=False)


def matrix(found: Sequence[tuple[Utterance, Embedded]]) -> np.ndarray:
    return np.stack([embedded.embedding for _, embedded in found])


def refuse_folder(output: Path) -> None:
    """Raise UserError, before any work, where a file is to be written over a folder."""
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file to write")
