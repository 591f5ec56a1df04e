"""`nearfar motor-imagery streams | calibrate | live | replay | audit | export`: decode as samples come."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.apps.motor_imagery.options import (
    Band,
    Causal,
    Event,
    Notch,
    Reference,
    Standardization,
    Unit,
    Whiten,
    Window,
    chosen_trials,
    event_names,
    preparation,
    unadapted,
)
from nearfar.core.cli.console import console, messages, show_json, table
from nearfar.core.cli.options import Json
from nearfar.core.errors import UserError
from nearfar.core.recipes import read_recipe
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.decoding import Recipe
from nearfar.eeg.live.audit import SAID
from nearfar.eeg.live.audit import audit as audited
from nearfar.eeg.live.calibration import SIGNS, CuePage, CuePlan, Cues, MarkerOutlet
from nearfar.eeg.live.session import Session, decoder_rule, run
from nearfar.eeg.live.session import replay as replayed
from nearfar.eeg.live.sinks import Lines, Outlet, Sink, Udp
from nearfar.eeg.live.sources import BoardSource, FileSource, Source, StreamSource, find_streams
from nearfar.eeg.recordings import Recording, find_recordings
from nearfar.eeg.training import train_decoder

SessionFolder = Annotated[Path, typer.Argument(help="Folder that `live` or `calibrate` wrote.")]
Stream = Annotated[str | None, typer.Option("--stream", help="LSL stream by its name.")]
StreamType = Annotated[str | None, typer.Option("--type", help="LSL stream by its type, such as EEG.")]
SourceId = Annotated[str | None, typer.Option("--source-id", help="LSL stream by its source id.")]
File = Annotated[Path | None, typer.Option("--file", help="A recording, as if it came now.")]
Speed = Annotated[float, typer.Option("--speed", help="Of --file, times real time; inf: as fast as it is decoded.")]
Board = Annotated[str | None, typer.Option("--board", help="BrainFlow board, such as CYTON_BOARD, SYNTHETIC_BOARD.")]
BoardOption = Annotated[
    list[str] | None, typer.Option("--board-option", help="NAME=VALUE of BrainFlow, e.g. serial_port=/dev/ttyUSB0.")
]
Names = Annotated[str | None, typer.Option("--names", help="Names of the board's EEG channels: C3,Cz,C4.")]
Markers = Annotated[str | None, typer.Option("--markers", help="LSL stream of markers to record too.")]
Patience = Annotated[float, typer.Option(help="Seconds that a stream which stops is waited for.")]
Seconds = Annotated[float | None, typer.Option(help="End after so many seconds of signal.")]


def streams(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to listen.")] = 1.5, as_json: Json = False
) -> None:
    """List the LSL streams of this machine."""
    found = find_streams(seconds)
    if as_json:
        show_json(found)
    elif found:
        console.print(table(found))
    else:
        console.print("no streams")


def live(
    decoder: Annotated[Path, typer.Argument(help="Decoder folder, as `train` or `calibrate` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the session.")],
    stream: Stream = None,
    stream_type: StreamType = None,
    source_id: SourceId = None,
    file: File = None,
    speed: Speed = 1.0,
    board: Board = None,
    board_option: BoardOption = None,
    names: Names = None,
    unit: Unit = None,
    markers: Markers = None,
    patience: Patience = 30.0,
    seconds: Seconds = None,
    every: Annotated[float, typer.Option(min=0.001, help="Seconds from one window to the next.")] = 0.1,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Below it a window decides nothing. (default: the decoder's own)")
    ] = None,
    smoothing: Annotated[int, typer.Option(min=1, help="Average over so many windows.")] = 1,
    dwell: Annotated[int, typer.Option(min=1, help="So many equal answers in a row make a command.")] = 1,
    refractory: Annotated[float, typer.Option(min=0, help="Seconds after a command without another.")] = 0.0,
    idle: Annotated[str | None, typer.Option(help="The class that does nothing. (default: rest, where it is)")] = None,
    outlet: Annotated[str | None, typer.Option(help="Send decisions as an LSL stream of this name.")] = None,
    udp: Annotated[int | None, typer.Option(help="Send decisions as JSON to this UDP port of this machine.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Write decisions to this file, one JSON object a line.")] = None,
    causal: Causal = False,
) -> None:
    """Decode a stream as it comes and record it: samples, decisions, gaps, latencies.

    One of --stream/--type/--source-id, --file and --board says where from. Samples and decisions are written as they
    come, so that a kill loses nothing; `audit` tells what the session was worth. Control-C ends it.
    """
    model = Decoder.load(decoder)
    model = model.preprocessed(causal=True) if causal else model
    if model.preprocessing.looks_ahead:
        messages.print("the decoder was trained with filters of zero phase; live ones are others (train --causal)")
    rule = decoder_rule(model, threshold, idle, smoothing=smoothing, dwell=dwell, refractory=refractory)
    sinks: list[Sink] = [Outlet(model.classes, outlet)] if outlet else []
    sinks += [Udp(udp)] if udp else []
    sinks += [Lines(lines)] if lines else []
    if messages.is_terminal:
        sinks.append(_show)
    given = source_of(stream, stream_type, source_id, file, speed, board, board_option, names, unit, markers, patience)
    counts = run(given, output, decoder, every=every, rule=rule, sinks=sinks, seconds=seconds, decoder=model)
    console.print(table([{"figure": SAID[name], "value": value} for name, value in counts.items() if name in SAID]))
    console.print(f"session: {output}; next: nearfar motor-imagery audit {output}", soft_wrap=True)


def replay(
    session: SessionFolder,
    decoder: Annotated[Path | None, typer.Option(help="The decoder, where it was moved.")] = None,
) -> None:
    """Decode a session again; ends with 1 where a decision is not the recorded one to the last bit."""
    found = replayed(session, decoder)
    if found.changed:
        console.print(f"changed since the session: {', '.join(found.changed)}")
    for line in found.differences[:10]:
        console.print(line, highlight=False, markup=False)
    same = "all are the same to the last bit" if found.same else f"{len(found.differences)} differences"
    console.print(f"{len(found.decisions)} decisions: {same}")
    if not found.same:
        raise typer.Exit(1)


def audit(
    session: SessionFolder,
    event: Event = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds from a cue within which it can be answered.")] = 4.0,
    decoder: Annotated[Path | None, typer.Option(help="The decoder, where it was moved.")] = None,
    bids: Annotated[Path | None, typer.Option(help="Also put the recording into this BIDS dataset.")] = None,
    subject: Annotated[str, typer.Option(help="Its subject there.")] = "01",
    as_json: Json = False,
) -> None:
    """Say what a session was worth: decoded again, gaps, latencies, abstentions, transfer, false activations."""
    found = audited(session, decoder, events=event_names(event), duration=duration)
    recorded = Session.read(session)
    recorded.save()
    if as_json:
        show_json(found)
    else:
        console.print(table([{"figure": said, "value": found[key]} for key, said in SAID.items() if key in found]))
        console.print(f"page: {session / 'audit.html'}, recording: {session / 'session_raw.fif'}", soft_wrap=True)
    if bids is not None:
        console.print(f"BIDS: {recorded.to_bids(bids, subject)}", soft_wrap=True)


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the session, with its `decoder`.")],
    plan: Annotated[
        Path | None, typer.Option(help="YAML: classes, trials (of each), cue, rest, jitter, lead (s), seed.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value of the plan. Repeat.")] = None,
    stream: Stream = None,
    stream_type: StreamType = None,
    source_id: SourceId = None,
    file: File = None,
    speed: Speed = 1.0,
    board: Board = None,
    board_option: BoardOption = None,
    names: Names = None,
    unit: Unit = None,
    patience: Patience = 30.0,
    page: Annotated[bool, typer.Option("--page", help="Show the cues in a browser of this machine.")] = False,
    port: Annotated[int, typer.Option(help="Of the page. (default: a free one)")] = 0,
    marker_outlet: Annotated[
        bool, typer.Option("--outlet", help="Send the cues as the LSL stream nearfar-markers.")
    ] = False,
    model: Annotated[str, typer.Option(help="TangentSpace, MDM, CSP+LDA, or a network.")] = "TangentSpace",
    also: Annotated[list[Path] | None, typer.Option(help="Sessions of the same plan to learn from. Repeat.")] = None,
    start: Annotated[Path | None, typer.Option(help="Adapt this decoder to the session instead of a new one.")] = None,
    window: Window = None,
    band: Band = None,
    notch: Notch = None,
    reference: Reference = None,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Exponential moving standardization of each channel.")
    ] = False,
    whiten: Whiten = None,
    bids: Annotated[Path | None, typer.Option(help="Also put the recording into this BIDS dataset.")] = None,
    subject: Annotated[str, typer.Option(help="Its subject there.")] = "01",
    run_number: Annotated[int, typer.Option("--run", min=1, help="Its run there.")] = 1,
) -> None:
    """Show cues, record what comes, and make a decoder of it after the last one.

    With --file the recording's own events are the cues. The decoder learns from the session alone (and those of
    --also); its validation figure comes from trials that were left out.
    """
    chosen = read_recipe(CuePlan, plan, settings or ())
    source = source_of(stream, stream_type, source_id, file, speed, board, board_option, names, unit, None, patience)
    if file is not None:
        counts = run(source, output)
    else:
        with ExitStack() as open_:
            shows: list[Callable[[str, int, int], Any]] = [_cue]
            if page:
                shows.append(open_.enter_context(CuePage(port)))
                messages.print(f"cues: {shows[-1].url}", highlight=False)
            shows += [MarkerOutlet()] if marker_outlet else []
            cues = Cues(chosen, source.clock, shows)
            counts = run(source, output, markers=cues.markers, stop=cues.stop)
    messages.print(f"{counts['seconds']:.0f} s recorded, {counts['gaps']} gaps, {counts['lost']} samples lost")
    if bids is not None:
        console.print(f"BIDS: {Session.read(output).to_bids(bids, subject, run=run_number)}", soft_wrap=True)
    begun = time.perf_counter()
    recordings = [Recording(folder / "session_raw.fif", subject, folder.name) for folder in (*(also or ()), output)]
    spans = window or (0.5, chosen.cue)
    moving = Standardization.exponential_moving if standardize else None
    preprocessing = preparation(recordings, spans, band, notch, None, moving, False, reference, True, whiten)
    options = {"events": {name: name for name in chosen.classes}, "interpolate": False, "skip_bad": False}
    epochs = chosen_trials(recordings, None, channels=None, preprocessing=preprocessing, **options)
    made = train_decoder(
        epochs, preprocessing, Recipe(network=model), output / "decoder", start=start, device="cpu",
        show_progress=messages.is_terminal, tell=lambda text: messages.print(text, highlight=False),
    )  # fmt: skip
    scores, threshold = made.metrics, made.metrics.get("threshold", {"threshold": 0.0})
    console.print(
        f"validation accuracy {scores['validation_accuracy']:.3f}{unadapted(scores)}, "
        f"threshold {threshold['threshold']:.3f}, {time.perf_counter() - begun:.1f} s after the last cue"
    )
    console.print(f"decoder: {output / 'decoder'}", soft_wrap=True)


def export(
    decoder: Annotated[Path, typer.Argument(help="Decoder folder, as `train` or `calibrate` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx.")],
) -> None:
    """Write a decoder as ONNX for devices without torch, and say how far it is from the decoder.

    `python -m nearfar.eeg.live.client FILE RECORDING` runs it.
    """
    for library in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(library) is None:
            raise UserError(f"export needs {library}: pip install 'nearfar-eeg[onnx]'")
    from nearfar.eeg.export import export_decoder

    difference = export_decoder(Decoder.load(decoder), output)
    console.print(f"{output}: probabilities differ from the decoder's by {difference:.1e} at most", soft_wrap=True)


def source_of(
    stream: str | None,
    stream_type: str | None,
    source_id: str | None,
    file: Path | None,
    speed: float,
    board: str | None,
    board_option: list[str] | None,
    names: str | None,
    unit: str | None,
    markers: str | None,
    patience: float,
) -> Source:
    """The one source that the options name."""
    if sum([any((stream, stream_type, source_id)), file is not None, board is not None]) != 1:
        raise UserError("name one source: --stream, --type or --source-id; --file; or --board")
    if file is not None:
        found = find_recordings([file])
        if len(found) != 1:
            raise UserError(f"{file}: holds {len(found)} recordings; name one")
        return FileSource(found[0], speed=speed, unit=unit)
    if board is not None:
        options = dict(pair.split("=", 1) for pair in board_option or () if "=" in pair)
        return BoardSource(board, names.split(",") if names else None, **options)
    return StreamSource(stream, stream_type, source_id, markers=markers, unit=unit, patience=patience)


def _cue(name: str, seen: int, total: int) -> None:
    messages.print(f"{SIGNS.get(name, '')} {name or '+'}  {seen}/{total}", highlight=False)


def _show(decision: dict[str, Any]) -> None:
    if decision["command"]:
        messages.print(f"{decision['time']:10.2f}  {decision['command']}", highlight=False)
