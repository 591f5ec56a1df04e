"""`nearfar speech-separation`: one file per voice, mixtures to learn from, training, evaluation."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.speech_separation import separating
from nearfar.apps.speech_separation.separating import EACH, Job, Pipe
from nearfar.audio.checkpoints import load_separator
from nearfar.audio.separation.live import WavPipe, read_pipe
from nearfar.audio.separation.memory import fit_window
from nearfar.audio.separation.windows import model_separator
from nearfar.audio.shipped import DEFAULT_SEPARATOR, separator_folder, shipped_separators, speaker_folder
from nearfar.audio.sound import SUFFIXES, Recording, writing
from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import console, messages, progress, show_json, table
from nearfar.core.cli.options import (
    Device,
    Devices,
    Engine,
    Fresh,
    Json,
    Memory,
    Nodes,
    Precision,
    RunFolder,
    Seed,
    Settings,
    Strategy,
    Timeout,
    Workers,
    anywhere,
    recipe_option,
    whole,
)
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.fingerprint import content_digest
from nearfar.core.made_from import MadeFrom, model_digest
from nearfar.core.memory import parse_memory
from nearfar.core.model_folder import TrainedOn, mark, trained_on
from nearfar.core.reading import read_json
from nearfar.core.workers import Once

app = typer.Typer(
    help="Separate the voices of a recording: `separate` with a model that you have, or `train` one from recordings of "
    "single speakers, `mix` to make mixtures on disk, `evaluate` to score a model on mixtures with their sources.",
    no_args_is_help=True,
)

RECIPES = Path(__file__).parent / "recipes"


class Level(StrEnum):
    """keep: as the model gives it. mix: so that the voices sum best to the recording. peak: each voice's peak at 0.9.
    rms: each voice at the recording's level."""

    keep = "keep"
    mix = "mix"
    peak = "peak"
    rms = "rms"


class Format(StrEnum):
    wav = "wav"
    flac = "flac"


ModelPath = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder made by `train`, a released checkpoint, or a model that comes along "
        f"({', '.join(shipped_separators())}).",
        show_default=DEFAULT_SEPARATOR,
        parser=whole,
    ),
]
Rate = Annotated[
    int | None, typer.Option(help="Hz of a released checkpoint, where its layout does not say: 8000 or 16000.")
]
Mapping = Annotated[bool, typer.Option("--mapping", help="The weights do not mask (the released WHAMR! ones).")]
MixFolder = Annotated[str | None, typer.Option("--mix", help="Folder of the mixtures, e.g. mix_both.")]
Targets = Annotated[str | None, typer.Option(help="Folders of the sources, e.g. s{}_reverb.")]
Layout = Annotated[str, typer.Option(help="How paths tell the speaker: auto, folder, ... or a regular expression.")]
Same = Annotated[list[str] | None, typer.Option(help="Folders of one person: --same en-f=es-f. Repeatable.")]


@app.command()
def separate(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Recordings, folders of them, or - for a pipe (--stream).", parser=anywhere),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the voices; what is done is skipped. -: a pipe.", parser=anywhere
        ),
    ],
    model: ModelPath = None,
    speakers: Annotated[str, typer.Option(help="Number of voices, or auto: estimated.")] = "auto",
    most: Annotated[int | None, typer.Option(help="Most voices that auto may find; else what the model gives.")] = None,
    speaker_model: Annotated[
        Path | None,
        typer.Option(help="Model of speaker-verification, a folder or a name: tells voices apart.", parser=whole),
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="Seconds separated at once: 10, with --stream 4 (the delay).")
    ] = None,
    hop: Annotated[float, typer.Option(help="Where the next window begins, 0.5 to 0.75 of a window.")] = 0.6,
    stream: Annotated[bool, typer.Option("--stream", help="Block by block, as it comes; nothing is revised.")] = False,
    raw: Annotated[
        str | None, typer.Option(help="Samples without a header from -: CODING:RATE[:CHANNELS], e.g. s16le:16000.")
    ] = None,
    consistency: Annotated[bool, typer.Option("--consistency", help="Make the voices sum to the recording.")] = False,
    level: Annotated[Level, typer.Option(help=str(Level.__doc__))] = Level.keep,
    audio_format: Annotated[Format, typer.Option("--format", help="wav is 32-bit float, flac 24 bit.")] = Format.wav,
    channel: Annotated[
        str | None,
        typer.Option(
            help="Of recordings whose channels differ: 1, 2 ..., mix (their mean), or each (every channel is a voice "
            "as it is, no model is asked)."
        ),
    ] = None,
    memory: Memory = None,
    check: Annotated[
        bool, typer.Option("--check", help="Measure on each recording what ought to be equal, and print it.")
    ] = False,
    rate: Rate = None,
    mapping: Mapping = False,
    device: Device = "auto",
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
    as_json: Json = False,
) -> None:
    """Write one file per voice, at the recording's rate, with a page to listen to.

    OUTPUT/<name>/ gets voice1.wav, voice2.wav ..., separation.json, index.html and spectrograms.png.
    With --stream, - reads a pipe (wav, flac, ogg, mp3, or --raw) into OUTPUT/live, and `-o -` writes a wav with one
    channel per voice to standard output, both as the sound comes. --memory counts all of a process; windows are
    shortened to keep to it.
    """
    weights = separator_folder(model or DEFAULT_SEPARATOR)
    piped, to_pipe = inputs == [Path("-")], output == Path("-")
    if speakers != "auto" and (not speakers.isdecimal() or int(speakers) < 1):
        raise UserError(f"--speakers {speakers}: must be a number, at least 1, or auto")
    if most is not None and (most < 1 or speakers != "auto"):
        raise UserError(f"--most {most}: must be at least 1, and is for --speakers auto")
    window = window or (4.0 if stream else 10.0)
    if window < 1 or not 0.5 <= hop <= 0.75:
        raise UserError(f"--window {window:g} --hop {hop:g}: the window must be at least 1 s, the hop 0.5 to 0.75")
    if stream and (consistency or level is not Level.keep or speakers != "auto" or most is not None):
        raise UserError(
            "--stream: writes what the model gives as it comes; leave out --speakers, --most, --level, --consistency"
        )
    if (piped or to_pipe) and not (stream and len(inputs) == 1 and not check):
        raise UserError("-: a pipe needs --stream, one input, and no --check")
    if raw is not None and not piped:
        raise UserError("--raw: is for samples from a pipe, give - as the input")
    if channel is not None and channel not in ("mix", EACH) and not (channel.isdecimal() and int(channel) >= 1):
        raise UserError(f"--channel {channel}: must be 1, 2 ..., mix or each")
    if channel is not None and (piped or to_pipe or (channel == EACH and (stream or check))):
        raise UserError("--channel: is for files, and each for neither --stream nor --check")
    found = inputs if piped else _recordings(inputs)
    prints = None if speaker_model is None else speaker_folder(speaker_model)
    wished, budget = window, None if memory is None else parse_memory(memory)

    def make_job() -> Job:
        net = load_separator(weights, rate, False if mapping else None).to(device)
        embed = None
        if prints is not None:
            from nearfar.audio.separation.voice_embedding import SpeakerPrint
            from nearfar.audio.speakers.system import SpeakerSystem

            embed = SpeakerPrint(SpeakerSystem.load(prints, device))
        window, frames_at_once = (wished, None) if budget is None else fit_window(net, budget, wished)
        return Job(
            net, model_separator(net, device, frames_at_once), device, window, hop, embed,
            None if speakers == "auto" else int(speakers), most, stream, consistency, str(level), str(audio_format),
            channel,
        )  # fmt: skip

    jobs = Once(make_job)
    job = jobs()
    with progress() as bar:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: float, total: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total or None, begun=time.monotonic())
            bar.advance(tasks[name], done)
            task = bar.tasks[tasks[name]]
            factor = (time.monotonic() - task.fields["begun"]) / max(task.completed, 0.1)
            bar.update(task.id, description=f"{name}, {factor:.2f} of real time")

        if to_pipe:
            source, found_rate = _source(found[0], raw)
            tell_band(str(found[0]), found_rate, job.model.sample_rate)
            with broken_pipe():
                out = WavPipe(sys.stdout.buffer, found_rate, job.model.num_speakers)
                separating.stream(job, source, found_rate, out, lambda done: None, str(found[0]))
            return
        if piped:
            folder = output / "live"
            if folder.exists():
                raise UserError(f"{folder}: is there already; name another folder")
            source, found_rate = _source(found[0], raw)
            results, failures = [separating.separate_pipe(job, source, found_rate, folder, advance)], []
        else:
            of_model = model_digest(weights)
            options = {
                name: getattr(job, name) for name in ("window", "hop", "speakers", "most", "stream", "consistency")
            }
            options |= {"level": job.level, "ending": job.ending, "rate": rate, "mapping": mapping, "channel": channel}
            options["voices"] = None if prints is None else model_digest(prints)
            places = Places(workers, engine, timeout)
            tell = advance if places.here else quiet

            def one(path: Path) -> dict[str, Any]:
                record = output / path.stem / "separation.json"
                made = MadeFrom(record.parent, [path], of_model, **options)
                if made.done() and record.is_file():
                    result = read_json(record, "the record of a separation")
                else:
                    result = separating.separate_file(jobs(), path, output / path.stem, tell)
                    made.write()
                if check and "check" not in result:
                    result["check"] = separating.check_file(jobs(), path)
                    write_json(record, result)
                    made.write()
                return result

            failed = output / "failures.json"
            results, failures = run_batch(found, one, "separating", places=places, failed=failed)
    if as_json:
        show_json(results)
    elif results:
        columns = ("file", "seconds", "speakers", "sum_back_db", "sum_back_fitted_db", "correlation", "confidence",
                   "real_time_factor")  # fmt: skip
        console.print(table([{name: row.get(name, "") for name in columns} for row in results]))
        for row in results:
            if check:
                lines = [{**line, "si_sdr": line.get("si_sdr", "")} for line in row["check"]]
                console.print(table(lines, f"check: {row['file']}"))
            tell_band(row["file"], row["rate"], row.get("model_rate", row["rate"]))
            if row["clipped"] > 1e-4:
                messages.print(f"{row['file']}: clipped ({100 * row['clipped']:.2f} % of its samples at full scale)")
            if row.get("collapsed"):
                messages.print(
                    f"{row['file']}: a voice is lost: two are the same signal (correlation {row['correlation']:g}), or "
                    "one is silent"
                )
            if row.get("lowered_db"):
                messages.print(f"{row['file']}: all voices are {row['lowered_db']:g} dB lower, so that none clips")
            if row.get("clipped_out"):
                messages.print(f"{row['file']}: {row['clipped_out']} samples of its voices clip; write wav instead")
            if row["uncertain"]:
                times = ", ".join(f"{t:g}" for t in row["uncertain"][:10])
                messages.print(f"{row['file']}: which voice is which was not clear at {times} s")
    raise_failures(failures, len(found))


def tell_band(name: str, rate: int, model_rate: int) -> None:
    """What a model of a lower rate loses."""
    if model_rate < rate:
        messages.print(
            f"{name}: is at {rate} Hz, the model at {model_rate}: its voices hold nothing above {model_rate // 2} Hz"
        )


def quiet(name: str, done: float, total: float) -> None:
    """Other processes tell no progress within a recording."""


def _source(path: Path, raw: str | None) -> tuple[Iterator[np.ndarray], int]:
    """Blocks of a pipe, unbuffered, or of a recording, and their rate."""
    if path == Path("-"):
        rate, blocks = read_pipe(Pipe(sys.stdin.buffer.raw), raw)  # type: ignore[attr-defined]
        return blocks, rate
    recording = Recording(path)
    return recording.blocks(0.5), recording.rate


@contextmanager
def broken_pipe() -> Iterator[None]:
    """The reader of our output may end a stream at any time."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into


def _recordings(inputs: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: holds no recordings ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    names: dict[str, Path] = {}
    for path in found:
        if path.stem in names:
            raise UserError(f"{path} and {names[path.stem]}: would write the same folder; separate them one by one")
        names[path.stem] = path
    return found


@app.command()
def mix(
    voices: Annotated[list[Path], typer.Argument(help="Folders with one folder of recordings per speaker.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for mix, s1, s2 ... and a manifest.")],
    count: Annotated[int, typer.Option(help="Number of mixtures.")] = 100,
    speakers: Annotated[int, typer.Option(help="Voices per mixture.")] = 2,
    seconds: Annotated[float, typer.Option(help="Longest mixture.")] = 10.0,
    rate: Annotated[int, typer.Option(help="Hz.")] = 8000,
    part: Annotated[str, typer.Option(help="Share of every speaker's utterances: train, valid, test or all.")] = "all",
    noise: Annotated[Path | None, typer.Option(help="Folder of noises to add at -6 to 3 dB SNR.")] = None,
    fill: Annotated[bool, typer.Option("--fill", help="Chain short utterances until the length is reached.")] = False,
    seed: Seed = 0,
    layout: Layout = "auto",
    same: Same = None,
) -> None:
    """Make mixtures with their sources from recordings of single speakers."""
    from nearfar.audio.separation.mixtures import DrawnMixtures, Mixture, write_manifest

    utterances = _voices(voices, layout, same, None if part == "all" else part)
    noises = _recordings([noise]) if noise is not None else []
    drawn = DrawnMixtures(utterances, count, rate, speakers, seconds, fill, (), noises, fixed=seed)
    names = ["mix", *(f"s{k + 1}" for k in range(speakers))]
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty; name a new folder")

    def one(index: int) -> Mixture:
        mixed, sources = drawn[index]
        paths = [output / name / f"{index:05d}.wav" for name in names]
        with writing(paths, rate, "PCM_16") as out:
            out.write(np.concatenate([mixed[None].numpy(), sources.numpy()]))
        return Mixture(f"{index:05d}", paths[0], tuple(paths[1:]))

    made, failures = run_batch(range(count), one, "mixing")
    manifest = write_manifest(output / "manifest.csv", list(made))
    console.print(f"{len(made)} mixtures, listed in {manifest}", soft_wrap=True, highlight=False)
    raise_failures(failures, count)


@app.command()
def train(
    source: Annotated[list[Path], typer.Argument(help="Folders of speakers; or mixtures: a corpus, a folder, a list.")],
    output: RunFolder,
    recipe: Annotated[str, recipe_option(RECIPES)] = "small",
    settings: Settings = None,
    validation: Annotated[
        str | None, typer.Option(help="Mixtures to validate on: a split of SOURCE, or their own folder or list.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of SOURCE to train on, e.g. tr or train-100.")] = None,
    mix_folder: MixFolder = None,
    targets: Targets = None,
    noise: Annotated[Path | None, typer.Option(help="Folder of noises to add to drawn mixtures, -6 to 3 dB.")] = None,
    start: Annotated[Path | None, typer.Option(help="Fine-tune this model: what --model takes elsewhere.")] = None,
    layout: Layout = "auto",
    same: Same = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
) -> None:
    """Train a model. From single speakers, mixtures are drawn anew all the time; every speaker's utterances are split
    into training, validation and test by their names. With --validation SOURCE holds mixtures."""
    from nearfar.audio.separation.mixtures import DrawnMixtures, RecordedMixtures, find_mixtures, refuse_shared_sources
    from nearfar.audio.separation.training import Recipe, train_separation
    from nearfar.core.recipes import read_recipe

    plan = read_recipe(Recipe, recipe, settings or (), RECIPES)
    if precision != "32-true":
        plan = replace(plan, precision=precision)
    if validation is not None:
        if len(source) > 1:
            raise UserError("--validation: goes with one set of mixtures; of several folders only speakers are taken")
        training = find_mixtures(source[0], split, mix_folder, targets)
        own = Path(validation).exists()
        held_out = find_mixtures(validation if own else source[0], None if own else validation, mix_folder, targets)
        if len(training[0].sources) != plan.num_speakers:
            raise UserError(
                f"{source[0]}: has {len(training[0].sources)} sources per mixture, the recipe {plan.num_speakers}; "
                f"say --set num_speakers={len(training[0].sources)}"
            )
        refuse_shared_sources(training, held_out)
        train_set: Any = RecordedMixtures(training, plan.rate, plan.seconds, plan.speeds)
        valid_set: Any = RecordedMixtures(held_out, plan.rate, None)
    else:
        shares = [_voices(source, layout, same, part) for part in ("train", "valid")]
        options = {"num_speakers": plan.num_speakers, "fill": plan.fill}
        train_set = DrawnMixtures(
            shares[0],
            plan.mixtures_per_epoch,
            plan.rate,
            seconds=plan.seconds,
            speeds=plan.speeds,
            noise=_recordings([noise]) if noise is not None else (),
            overlap=plan.overlap,
            rooms=plan.rooms,
            hiss=plan.hiss,
            **options,
        )
        valid_set = DrawnMixtures(
            shares[1],
            max(20, plan.mixtures_per_epoch // 10),
            plan.rate,
            seconds=4.0,
            speeds=(),
            fixed=plan.seed,
            **options,
        )
    start = None if start is None else separator_folder(start)
    begun = None if start is None else load_separator(start)
    _, history = train_separation(
        plan,
        train_set,
        valid_set,
        output,
        start=begun,
        seen=TrainedOn() if start is None else trained_on(start),
        device=device,
        fresh=fresh,
        show_progress=messages.is_terminal,
    )
    best = max(history, key=lambda row: row["si_sdri"])
    console.print(
        f"best epoch {best['epoch']:.0f}: {best['si_sdri']:.2f} dB over the mixture; model in {output / 'model'}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def evaluate(
    mixtures: Annotated[Path, typer.Argument(help="Mixtures with their sources: a corpus, a folder, a list.")],
    model: ModelPath = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV for the scores of every file.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the corpus, e.g. tt or test.")] = None,
    mix_folder: MixFolder = None,
    targets: Targets = None,
    metrics: Annotated[str, typer.Option(help="Comma-separated: si_sdri,sdri,pesq,stoi.")] = "si_sdri,sdri,pesq,stoi",
    rate: Rate = None,
    mapping: Mapping = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a model on whole mixtures: improvement over the mixture, mean over files, 95 % bootstrap interval.

    separate_si_sdri is what `separate` gives for as many voices, and collapsed the share of files in which it loses
    one: two tracks are the same signal, or one is silent.
    """
    from nearfar.audio.separation.metrics import METRICS, evaluate_mixture, summary
    from nearfar.audio.separation.mixtures import Mixture, find_mixtures

    weights = separator_folder(model or DEFAULT_SEPARATOR)
    chosen = [name.strip() for name in metrics.split(",")]
    if unknown := [name for name in chosen if name not in METRICS]:
        raise UserError(f"--metrics {metrics}: unknown {', '.join(unknown)}; known are {', '.join(METRICS)}")
    found = find_mixtures(mixtures, split, mix_folder, targets)
    net = load_separator(weights, rate, False if mapping else None)
    separator, known = model_separator(net, device), trained_on(weights)

    def one(mixture: Mixture) -> dict[str, Any]:
        mixed, sources, found_rate = mixture.read()
        if found_rate != net.sample_rate:
            raise UserError(f"{mixture.mix}: is at {found_rate} Hz, the model at {net.sample_rate} Hz")
        seen = any(known.seen(map(content_digest, (mixture.mix, *mixture.sources))))
        scored = evaluate_mixture(mixed, sources, found_rate, separator, chosen)
        return {"id": mixture.name, **scored, "seen_in_training": seen}

    rows, failures = run_batch(found, one, "evaluating", name=lambda mixture: str(mixture.mix))
    if output is not None:
        write_csv(output, rows)
    scores = summary(rows)
    if marked := mark([row["seen_in_training"] for row in rows]):
        scores = [row | {"marked": marked} for row in scores]
    if as_json:
        show_json({"summary": scores, "files": rows})
    elif scores:
        console.print(table(scores))
    raise_failures(failures, len(found))


def _voices(folders: list[Path], layout: str, same: list[str] | None, part: str | None) -> dict[str, list[Path]]:
    from nearfar.audio.separation.mixtures import find_voices, split_voices

    if part not in (None, "train", "valid", "test"):
        raise UserError(f"--part {part}: must be train, valid, test or all")
    found = find_voices(folders, layout, [pair.split("=") for pair in same or ()])
    return found if part is None else split_voices(found, part)
