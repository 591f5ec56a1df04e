"""What the commands share: their options, and embedding many recordings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from nearfar.audio.corpora import Utterance
from nearfar.audio.speakers.embedding import Embedded, Embedder
from nearfar.core.cli.batch import run_batch
from nearfar.core.errors import UserError

Model = Annotated[Path, typer.Option("--model", "-m", help="Model folder that `train` wrote.")]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps embeddings; interrupted work goes on there.")]
MixChannels = Annotated[bool, typer.Option("--mix-channels", help="Average the channels of recordings with several.")]


def embed_all(
    utterances: Sequence[Utterance], embed_one: Embedder
) -> tuple[list[tuple[Utterance, Embedded]], list[str]]:
    """Embed with a progress bar, going on past what cannot be."""
    return run_batch(utterances, lambda u: (u, embed_one(u.path)), "embedding", name=lambda u: str(u.path))


def matrix(found: Sequence[tuple[Utterance, Embedded]]) -> np.ndarray:
    return np.stack([embedded.embedding for _, embedded in found])


def refuse_folder(output: Path) -> None:
    """Raise UserError, before any work, where a file is to be written over a folder."""
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file to write")
