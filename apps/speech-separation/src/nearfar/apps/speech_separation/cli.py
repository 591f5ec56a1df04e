"""`nearfar speech-separation`: one file per voice, mixtures to learn from, training, evaluation."""

import json
import time
from collections.abc import Iterator
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.speech_separation import pages
from nearfar.audio.mossformer import MossFormer, load_model
from nearfar.audio.separation import OnlineSeparator, Separator, model_separator, resample, separate_recording
from nearfar.audio.sound import SUFFIXES, Recording, writing
from nearfar.core.cli import console, messages, progress, raise_failures, run_batch, table
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv, write_json

app = typer.Typer(
    help="Separate the voices of a recording: `separate` with a model that you have, or `train` one from recordings of "
    "single speakers, `mix` to make mixtures on disk, `evaluate` to score a model on mixtures with their sources.",
    no_args_is_help=True,
)


class Level(StrEnum):
    """keep: as the model gives it. peak: each voice's peak at 0.9. rms: each voice at the recording's level."""

    keep = "keep"
    peak = "peak"
    rms = "rms"


class Format(StrEnum):
    wav = "wav"
    flac = "flac"


ModelPath = Annotated[Path, typer.Option("--model", help="Folder made by `train`, or a released checkpoint.")]
Rate = Annotated[
    int | None, typer.Option(help="Hz of a released checkpoint, where its layout does not say: 8000 or 16000.")
]
Mapping = Annotated[bool, typer.Option("--mapping", help="The weights do not mask (the released WHAMR! ones).")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Layout = Annotated[str, typer.Option(help="How paths tell the speaker: auto, folder, ... or a regular expression.")]
Same = Annotated[list[str] | None, typer.Option(help="Folders of one person: --same en-f=es-f. Repeatable.")]


@app.command()
def separate(
    inputs: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the voices; what is done is skipped.")],
    model: ModelPath,
    speakers: Annotated[int | None, typer.Option(help="Number of voices.  [default: estimated]")] = None,
    window: Annotated[float, typer.Option(help="Seconds that are separated at once; with --stream the delay.")] = 10.0,
    hop: Annotated[float, typer.Option(help="Where the next window begins, 0.5 to 0.75 of a window.")] = 0.6,
    stream: Annotated[bool, typer.Option("--stream", help="Decide block by block, as for live input.")] = False,
    consistency: Annotated[bool, typer.Option("--consistency", help="Make the voices sum to the recording.")] = False,
    level: Annotated[Level, typer.Option(help=str(Level.__doc__))] = Level.keep,
    audio_format: Annotated[Format, typer.Option("--format", help="wav is 32-bit float, flac 24 bit.")] = Format.wav,
    rate: Rate = None,
    mapping: Mapping = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write one file per voice, at the recording's rate, with a page to listen to.

    OUTPUT/<name>/ gets voice1.wav, voice2.wav ..., separation.json, index.html and spectrograms.png.
    """
    if speakers is not None and speakers < 1:
        raise UserError(f"--speakers {speakers}: must be at least 1")
    if window < 1 or not 0.5 <= hop <= 0.75:
        raise UserError(f"--window {window:g} --hop {hop:g}: the window must be at least 1 s, the hop 0.5 to 0.75")
    if stream and (consistency or level is not Level.keep or speakers is not None):
        raise UserError(
            "--stream: writes what the model gives as it comes; leave out --speakers, --level, --consistency"
        )
    found = _recordings(inputs)
    net = load_model(model, rate, False if mapping else None)
    separator = model_separator(net, device)

    def one(path: Path) -> dict[str, Any]:
        folder = output / path.stem
        if (folder / "separation.json").is_file():
            return json.loads((folder / "separation.json").read_text(encoding="utf-8"))
        started = time.monotonic()
        with Recording(path) as recording, atomic_path(folder) as place, progress() as bar:
            place.mkdir()
            task = bar.add_task(path.name, total=round(recording.frames / recording.rate, 1))
            advance = lambda seconds: bar.advance(task, seconds)  # noqa: E731
            if stream:
                result = _stream(recording, net, separator, place, window, hop, audio_format, advance)
            else:
                result = _whole(
                    recording, net, separator, place, window, hop, speakers, consistency, level, audio_format, advance
                )
            spent = time.monotonic() - started
            result = {"file": str(path), **result, "real_time_factor": round(spent / result["seconds"], 3)}
            parts = {path.name: path} | {p.stem: p for p in sorted(place.glob(f"voice*.{audio_format}"))}
            pages.listening_page(parts, result, place)
            write_json(place / "separation.json", result)
        return result

    results, failures = run_batch(found, one, "separating")
    if as_json:
        print(json.dumps(results, indent=2))
    elif results:
        columns = ("file", "seconds", "speakers", "sum_back_db", "confidence", "real_time_factor")
        console.print(table([{name: row[name] for name in columns} for row in results]))
        for row in results:
            if row["clipped"] > 1e-4:
                messages.print(f"{row['file']}: clipped ({100 * row['clipped']:.2f} % of its samples at full scale)")
            if row["uncertain"]:
                times = ", ".join(f"{t:g}" for t in row["uncertain"][:10])
                messages.print(f"{row['file']}: which voice is which was not clear at {times} s")
    raise_failures(failures, len(found))


def _whole(
    recording: Recording,
    net: MossFormer,
    separator: Separator,
    place: Path,
    window: float,
    hop: float,
    speakers: int | None,
    consistency: bool,
    level: Level,
    audio_format: Format,
    advance: Any,
) -> dict[str, Any]:
    separation = separate_recording(
        recording, separator, net.sample_rate, place, window=window, hop=hop, speakers=speakers,
        consistency=consistency, progress=advance,
    )  # fmt: skip
    gain = np.ones((separation.count, 1), dtype=np.float32)
    if level is not Level.keep:  # the gain follows from the whole: make the tracks once to measure them
        for _ in separation.blocks():
            pass
        assert separation.report is not None
        if level is Level.peak:
            gain[:, 0] = 0.9 / np.maximum(separation.report.peak, 1e-6)
        else:
            gain[:, 0] = 10 ** (-np.array(separation.report.levels_db) / 20)
    paths = [place / f"voice{k + 1}.{audio_format}" for k in range(separation.count)]
    with writing(paths, recording.rate) as out:
        for block in separation.blocks():
            out.write(gain * block)
    assert separation.report is not None
    return {**separation.report.as_dict(), "level": str(level), "gain": [round(float(g), 5) for g in gain[:, 0]]}


def _stream(
    recording: Recording,
    net: MossFormer,
    separator: Separator,
    place: Path,
    window: float,
    hop: float,
    audio_format: Format,
    advance: Any,
) -> dict[str, Any]:
    if recording.rate != net.sample_rate:
        online_rate = net.sample_rate
        inner = separator
        separator = lambda mix: resample(  # noqa: E731
            inner(resample(mix, recording.rate, online_rate)), online_rate, recording.rate, len(mix)
        )
    online = OnlineSeparator(separator, recording.rate, window, hop)
    paths = [place / f"voice{k + 1}.{audio_format}" for k in range(net.num_speakers)]
    mixed = rest = 0.0
    clipped, held = 0, np.zeros(0, dtype=np.float32)

    def pieces() -> Iterator[np.ndarray]:
        nonlocal clipped, held
        for block in recording.blocks(0.5):
            clipped += int((np.abs(block) >= 0.9999).sum())
            held = np.concatenate([held, block])
            advance(len(block) / recording.rate)
            yield online.push(block)
        yield online.finish()

    with writing(paths, recording.rate) as out:
        for tracks in pieces():
            if tracks.shape[1]:
                out.write(tracks)
                mix, held = held[: tracks.shape[1]].astype(np.float64), held[tracks.shape[1] :]
                mixed += float(np.sum(mix**2))
                rest += float(np.sum((mix - tracks.sum(0)) ** 2))
    if mixed == 0:
        raise UserError(f"{recording.path}: silent from beginning to end")
    unsure = [k for k, c in enumerate(online.confidences) if c < 0.1]
    return {
        "seconds": recording.frames / recording.rate,
        "rate": recording.rate,
        "speakers": net.num_speakers,
        "sum_back_db": round(10 * float(np.log10(mixed / max(rest, 1e-12 * mixed))), 2),
        "confidence": round(min(online.confidences), 3),
        "uncertain": [round(k * online.hop / recording.rate, 2) for k in unsure],
        "clipped": clipped / recording.frames,
    }


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
    voices: Annotated[Path, typer.Argument(help="Folder with one folder of recordings per speaker.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for mix, s1, s2 ... and a manifest.")],
    count: Annotated[int, typer.Option(help="Number of mixtures.")] = 100,
    speakers: Annotated[int, typer.Option(help="Voices per mixture.")] = 2,
    seconds: Annotated[float, typer.Option(help="Longest mixture.")] = 10.0,
    rate: Annotated[int, typer.Option(help="Hz.")] = 8000,
    part: Annotated[str, typer.Option(help="Share of every speaker's utterances: train, valid, test or all.")] = "all",
    noise: Annotated[Path | None, typer.Option(help="Folder of noises to add at -6 to 3 dB SNR.")] = None,
    fill: Annotated[bool, typer.Option("--fill", help="Chain short utterances until the length is reached.")] = False,
    seed: int = 0,
    layout: Layout = "auto",
    same: Same = None,
) -> None:
    """Make mixtures with their sources from recordings of single speakers."""
    from nearfar.audio.mixtures import DrawnMixtures, Mixture, write_manifest

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
    source: Annotated[Path, typer.Argument(help="Folder of speakers, or mixtures: a corpus, a folder, a list.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run; call again to go on.")],
    recipe: Annotated[str, typer.Option(help="small, mossformer2, or a YAML file.")] = "small",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting: max_epochs=10, lr=0.001 ...")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Mixtures to validate on (with mixtures as SOURCE; or its split).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of SOURCE to train on, e.g. tr or train-100.")] = None,
    start: Annotated[Path | None, typer.Option(help="Fine-tune this model.")] = None,
    layout: Layout = "auto",
    same: Same = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Train a model. From single speakers, mixtures are drawn anew all the time; every speaker's utterances are split
    into training, validation and test by their names."""
    from nearfar.audio.mixtures import DrawnMixtures, RecordedMixtures, find_mixtures, refuse_shared_sources
    from nearfar.audio.separation_training import Recipe, train_separation
    from nearfar.core.training import read_recipe

    shipped = files("nearfar.apps.speech_separation") / "recipes" / f"{recipe}.yaml"
    plan = read_recipe(Recipe, Path(str(shipped)) if shipped.is_file() else Path(recipe), settings or ())
    if validation is not None:
        training = find_mixtures(source, split)
        held_out = find_mixtures(validation)
        refuse_shared_sources(training, held_out)
        train_set: Any = RecordedMixtures(training, plan.rate, plan.seconds, plan.speeds)
        valid_set: Any = RecordedMixtures(held_out, plan.rate, None)
    else:
        shares = [_voices(source, layout, same, part) for part in ("train", "valid")]
        options = {"num_speakers": plan.num_speakers, "fill": plan.fill}
        train_set = DrawnMixtures(
            shares[0], plan.mixtures_per_epoch, plan.rate, seconds=plan.seconds, speeds=plan.speeds, **options
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
    begun = None if start is None else load_model(start)
    _, history = train_separation(
        plan, train_set, valid_set, output, start=begun, accelerator=accelerator, show_progress=messages.is_terminal
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
    model: ModelPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV for the scores of every file.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the corpus, e.g. tt or test.")] = None,
    mix_folder: Annotated[str | None, typer.Option("--mix", help="Folder of the mixtures, e.g. mix_both.")] = None,
    targets: Annotated[str | None, typer.Option(help="Folders of the sources, e.g. s{}_reverb.")] = None,
    metrics: Annotated[str, typer.Option(help="Comma-separated: si_sdri,sdri,pesq,stoi.")] = "si_sdri,sdri,pesq,stoi",
    rate: Rate = None,
    mapping: Mapping = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score a model on whole mixtures: improvement over the mixture, mean over files, 95 % bootstrap interval."""
    from nearfar.audio.mixtures import Mixture, find_mixtures
    from nearfar.audio.separation_metrics import METRICS, evaluate_mixture, summary

    chosen = [name.strip() for name in metrics.split(",")]
    if unknown := [name for name in chosen if name not in METRICS]:
        raise UserError(f"--metrics {metrics}: unknown {', '.join(unknown)}; known are {', '.join(METRICS)}")
    found = find_mixtures(mixtures, split, mix_folder, targets)
    net = load_model(model, rate, False if mapping else None)
    separator = model_separator(net, device)

    def one(mixture: Mixture) -> dict[str, Any]:
        mixed, sources, found_rate = mixture.read()
        if found_rate != net.sample_rate:
            raise UserError(f"{mixture.mix}: is at {found_rate} Hz, the model at {net.sample_rate} Hz")
        return {"id": mixture.name, **evaluate_mixture(mixed, sources, found_rate, separator, chosen)}

    rows, failures = run_batch(found, one, "evaluating", name=lambda mixture: str(mixture.mix))
    if output is not None:
        write_csv(output, rows)
    scores = summary(rows)
    if as_json:
        print(json.dumps({"summary": scores, "files": rows}, indent=2))
    elif scores:
        console.print(table(scores))
    raise_failures(failures, len(found))


def _voices(folder: Path, layout: str, same: list[str] | None, part: str | None) -> dict[str, list[Path]]:
    from nearfar.audio.mixtures import find_voices, split_voices

    found = find_voices(folder, layout, [pair.split("=") for pair in same or ()])
    if part is None:
        return found
    if part not in ("train", "valid", "test"):
        raise UserError(f"--part {part}: must be train, valid, test or all")
    return split_voices(found, part)
