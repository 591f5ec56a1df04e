"""What the commands share: their options, and embedding many recordings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.audio.corpora import Utterance
from nearfar.audio.shipped import DEFAULT_SPEAKERS, shipped_speakers, speaker_folder
from nearfar.audio.speakers.embedding import Embedded, Embedder, TableEmbedder
from nearfar.audio.speakers.encoders import EmbeddingTable, read_encoder
from nearfar.audio.speakers.encoders import ForeignEncoder as ForeignNetwork
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.cli.batch import Places, run_batch
from nearfar.core.cli.console import messages
from nearfar.core.cli.options import anywhere, whole
from nearfar.core.errors import UserError, some
from nearfar.core.leakage import LeakageError

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="Model folder that `train` or `calibrate` wrote, or one that comes along "
        f"({', '.join(shipped_speakers())}).",
        show_default=DEFAULT_SPEAKERS,
        parser=whole,
    ),
]
ForeignEncoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="A speaker model of others: FILE.onnx, FILE.pt (TorchScript, a program that runs) or module:callable "
        "(Python that runs). --model is then the folder of its calibration, if there is one.",
    ),
]
EncoderRate = Annotated[
    int | None, typer.Option("--encoder-rate", help="Hz that --encoder needs, if it does not say; 16000 by default.")
]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        help="Embeddings of others, .npz of names and vectors; recordings are then names in it.", parser=whole
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps embeddings; interrupted work goes on there.", parser=anywhere),
]
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


def open_system(
    model: Path | None, encoder: str | None, embeddings: Path | None, rate: int | None, device: str = "cpu"
) -> SpeakerSystem:
    """What the options name. Raises UserError where they do not go together."""
    if rate is not None and encoder is None:
        raise UserError("--encoder-rate: is for --encoder, the others say theirs")
    if encoder is not None and embeddings is not None:
        raise UserError("--encoder and --embeddings: name one of them")
    if encoder is None and embeddings is None:
        return SpeakerSystem.load(speaker_folder(model or DEFAULT_SPEAKERS), device)
    network: ForeignNetwork | EmbeddingTable
    if encoder is not None:
        network = read_encoder(encoder, rate)
    else:
        network = EmbeddingTable.read(embeddings)
        if not network.named:
            dim = network.embedding_dim
            messages.print(
                f"{embeddings}: does not say which encoder made it (array `encoder`); only that its vectors have {dim} "
                "numbers is compared",
                highlight=False,
                soft_wrap=True,
            )
    return SpeakerSystem(network) if model is None else SpeakerSystem.load(model, encoder=network)


def make_embedder(system: SpeakerSystem, cache: Path | None = None, **options: Any) -> Embedder | TableEmbedder:
    """What embeds recordings for the system. options: of `Embedder`."""
    if isinstance(system.model, EmbeddingTable):
        return TableEmbedder(system.model)
    return Embedder(system.model, cache, **options)


def named_utterances(system: SpeakerSystem, names: Sequence[Path | str]) -> list[Utterance]:
    """Recordings as they are named on the command line: files, or names in a table of embeddings."""
    if isinstance(table := system.model, EmbeddingTable):
        return [Utterance(str(name), Path(name), content=table.content(str(name))) for name in names]
    return [Utterance(str(name), Path(name)) for name in names]


def refuse_leaks(where: object, leaks: Sequence[str], allowed: bool) -> None:
    """Say what makes figures too good, and raise LeakageError unless that is allowed."""
    if leaks and not allowed:
        raise LeakageError(f"{where}: {'; '.join(leaks)}; leave them out, or go on with --allow-leakage")
    for leak in leaks:
        messages.print(f"{where}: {leak}: their scores are too good", highlight=False, soft_wrap=True)


def embed_all(
    utterances: Sequence[Utterance],
    embed_one: Callable[[Utterance], Embedded],
    places: Places = Places(),  # noqa: B008
    failed: Path | None = None,
) -> tuple[list[tuple[Utterance, Embedded]], list[str]]:
    """Embed with a progress bar, going on past what cannot be; says what was dropped."""
    found, failures = run_batch(
        utterances, lambda u: (u, embed_one(u)), "embedding", lambda u: str(u.path), places, failed
    )
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
