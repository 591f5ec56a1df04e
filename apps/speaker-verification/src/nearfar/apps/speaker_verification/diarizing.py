"""`nearfar speaker-verification diarize`: who spoke when."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.speaker_verification.common import (
    Channel,
    EncoderRate,
    ForeignEncoder,
    MixChannels,
    Model,
    open_system,
    refuse_folder,
)
from nearfar.audio.checkpoints import load_separator
from nearfar.audio.separation.windows import model_separator
from nearfar.audio.shipped import separator_folder, shipped_separators
from nearfar.audio.sound import Recording, Samples, resample, stream_samples
from nearfar.audio.speakers import diarization
from nearfar.audio.speakers.diarization import Diarization
from nearfar.audio.speakers.gallery import Gallery
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.cli.console import console, messages, progress, show_json, table
from nearfar.core.cli.options import Device, Json, Memory, whole
from nearfar.core.errors import UserError
from nearfar.core.memory import parse_memory, resident_memory


def diarize(
    recording: Annotated[Path, typer.Argument(help="A recording of any length.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="RTTM file for the turns.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    encoder_rate: EncoderRate = None,
    speakers: Annotated[
        int | None, typer.Option(min=1, help="How many talk; by default --likeness decides, up to 20.")
    ] = None,
    likeness: Annotated[
        float, typer.Option(help="From which two groups of windows are one talker: 1 is two halves of one talker.")
    ] = diarization.LIKENESS,
    separator: Annotated[
        Path | None,
        typer.Option(
            help="Model of speech-separation that finds where two speak at once: a folder, or one that comes along "
            f"({', '.join(shipped_separators())}).",
            parser=whole,
        ),
    ] = None,
    gallery: Annotated[Path | None, typer.Option("--gallery", "-g", help="Gallery whose speakers are named.")] = None,
    far: Annotated[float, typer.Option(help="Wanted false-accept rate of names from the gallery.")] = 0.01,
    reference: Annotated[Path | None, typer.Option(help="RTTM of what is true: the error rate is given.")] = None,
    collar: Annotated[float, typer.Option(min=0, help="Seconds beside true boundaries that are not scored.")] = 0.0,
    skip_overlap: Annotated[bool, typer.Option("--skip-overlap", help="Score no overlapping speech.")] = False,
    channel: Channel = None,
    mix_channels: MixChannels = False,
    memory: Memory = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say who spoke when: turns in RTTM, speakers by number, or by name from a gallery.

    --memory counts all of the process. The error rate is pyannote.metrics' (missed, false alarm, confusion), of all
    speech and without a collar unless you say otherwise.
    """
    refuse_folder(output)
    system = open_system(model, encoder, None, encoder_rate, device)
    rate = system.model.sample_rate  # type: ignore[attr-defined]
    with Recording(recording) as sound:
        seconds = sound.frames / sound.rate
    at_once = 3000
    if memory is not None:
        budget = parse_memory(memory) - resident_memory() - RESERVE
        at_once = diarization.windows_at_once(max(budget, 0), seconds, system.model.embedding_dim)

    with progress() as bar:
        task = bar.add_task(recording.name, total=2 * seconds)

        def blocks() -> Iterator[Samples]:
            for block in stream_samples(recording, rate, mix_channels=mix_channels, channel=channel):
                bar.advance(task, len(block) / rate)
                yield block

        try:
            split = None if separator is None else _separator(separator, device)
            found = diarization.diarize(blocks, system, speakers, split, likeness, at_once=at_once)
        except UserError as error:
            raise UserError(f"{recording}: {error}") from error
    if gallery is not None:
        found = found.renamed(_names(found, system, gallery, far))
    name = "_".join(recording.stem.split())
    diarization.write_rttm(output, found.turns, name)
    answer: dict[str, Any] = {
        "recording": str(recording),
        "seconds": found.seconds,
        "overlap": found.overlap,
        "quality": vars(found.quality),
        "speakers": [_spoken(found, speaker) for speaker in found.voices],
        "turns": len(found.turns),
    }
    if reference is not None:
        answer["error"] = diarization.error_rate(_of(reference, name), found.turns, found.seconds, collar, skip_overlap)
        answer["error"] |= {"collar": collar, "overlap_scored": not skip_overlap}
    if as_json:
        show_json(answer)
        return
    console.print(
        table(answer["speakers"], f"{len(found.voices)} speakers in {found.seconds:.1f} s of {recording.name}")
    )
    if separator is not None:
        console.print(f"two speak at once for {found.overlap:.1f} s")
    if reference is not None:
        error = answer["error"]
        console.print(
            f"DER {error['der']:.2%} of {error['speech']:.1f} s: missed {error['missed_detection']:.2%}, false alarm "
            f"{error['false_alarm']:.2%}, confusion {error['confusion']:.2%} (collar {collar:g} s, overlap "
            f"{'left out' if skip_overlap else 'scored'})",
            soft_wrap=True,
        )
    console.print(f"turns: {output}", soft_wrap=True)


RESERVE = 96 << 20
"""Bytes for sound, a batch in the model, and what the allocator takes."""


def _separator(path: Path, device: str) -> Callable[[Samples, int], Samples]:
    net = load_separator(separator_folder(path))
    separate = model_separator(net, device)

    def split(samples: Samples, rate: int) -> Samples:
        voices = separate(resample(samples, rate, net.sample_rate))
        return resample(voices, net.sample_rate, rate, len(samples))

    return split


def _names(found: Diarization, system: SpeakerSystem, path: Path, far: float) -> dict[str, str]:
    """Names of the speakers that the gallery knows, as `identify` tells them; RTTM wants `_` for blanks."""
    known = Gallery.load(path, system.model)
    limit = system.threshold(far, len(known.names))
    models, names = known.models(system.mean), {}
    for speaker, voice in found.voices.items():
        scores = known.scores(system, models, voice)
        best = int(np.argmax(scores))
        if scores[best] > limit.threshold:
            names[speaker] = "_".join(known.names[best].split())
    if len(set(names.values())) < len(names):
        messages.print("several speakers got one name from the gallery and are one now", highlight=False)
    return names


def _spoken(found: Diarization, speaker: str) -> dict[str, Any]:
    own = [turn for turn in found.turns if turn.speaker == speaker]
    spoken = sum(turn.end - turn.start for turn in own)
    return {"speaker": speaker, "seconds": round(spoken, 2), "turns": len(own), "first": round(own[0].start, 2)}


def _of(path: Path, name: str) -> list[diarization.Turn]:
    """Turns of a recording in a reference, of the only one where there is one. Raises UserError."""
    listed = diarization.read_rttm(path)
    if name not in listed and len(listed) > 1:
        raise UserError(f"{path}: has {len(listed)} recordings, none of which is {name}")
    if name not in listed:
        only = next(iter(listed))
        messages.print(f"{path}: its one recording is {only}, taken for {name}", highlight=False, soft_wrap=True)
        return listed[only]
    return listed[name]
