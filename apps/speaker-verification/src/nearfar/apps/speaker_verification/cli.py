"""`nearfar speaker-verification`: train a model, enroll, verify and identify speakers, work on trial lists."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.speaker_verification import diarizing, lists, pages
from nearfar.apps.speaker_verification.common import (
    AllowLeakage,
    Cache,
    Channel,
    Embeddings,
    EncoderRate,
    ForeignEncoder,
    MixChannels,
    Model,
    embed_all,
    make_embedder,
    matrix,
    named_utterances,
    open_system,
    refuse_folder,
    refuse_leaks,
    say_silence,
)
from nearfar.audio.corpora import Utterance, find_utterances
from nearfar.audio.sound import SUFFIXES
from nearfar.audio.speakers import gallery as galleries
from nearfar.audio.speakers.embedding import Embedded, Embedder, TableEmbedder
from nearfar.audio.speakers.encoders import EmbeddingTable
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.quality import Gate
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.audio.speakers.training import (
    Recipe,
    build_model,
    choose_channels,
    split_speakers,
    train_speaker_model,
    usable,
)
from nearfar.core.cli.batch import Places, raise_failures
from nearfar.core.cli.console import console, messages, show_json, table
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
    Settings,
    Strategy,
    Timeout,
    Workers,
    anywhere,
    recipe_option,
)
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.made_from import model_digest
from nearfar.core.memory import parse_memory
from nearfar.core.model_folder import TrainedOn, mark, trained_on
from nearfar.core.recipes import read_recipe
from nearfar.core.remote import told
from nearfar.core.training import seed_epoch
from nearfar.core.workers import Once

app = typer.Typer(
    help="Is it the same speaker? `train` makes a model folder from labelled recordings, `verify` compares two "
    "recordings and answers with a calibrated likelihood ratio, `identify` looks for a speaker in a gallery, `score` "
    "and `evaluate` run trial lists.\n\nA recording that offers too little (speech, level over noise, bandwidth) is "
    "refused, never scored.",
    no_args_is_help=True,
)

RECIPES = Path(__file__).parent / "recipes"

Layout = Annotated[
    str,
    typer.Option(
        help="How paths tell speakers: auto, folder, voxceleb, librispeech, vctk, kaldi, audiofolder, or a regular "
        "expression with (?P<speaker>...)."
    ),
]
LeastSpeech = Annotated[float, typer.Option("--min-speech", help="Seconds of speech that a recording must have.")]
LeastSNR = Annotated[float, typer.Option("--min-snr", help="dB that speech must be above the noise.")]
MostClipped = Annotated[float, typer.Option("--max-clipped", help="Greatest share of clipped samples.")]
LeastBandwidth = Annotated[float, typer.Option("--min-bandwidth", help="Hz up to which there must be sound.")]
NoGate = Annotated[bool, typer.Option("--no-gate", help="Score whatever can be read. The result may mean nothing.")]
Far = Annotated[float, typer.Option(help="Wanted false-accept rate.")]
GATE = Gate()


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder of labelled recordings, or a Kaldi folder.")],
    output: RunFolder,
    recipe: Annotated[str, recipe_option(RECIPES)] = "filterbank",
    settings: Settings = None,
    backbone: Annotated[
        str | None, typer.Option(help="Folder of a wav2vec2, HuBERT or WavLM model, or hub:NAME.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Model folder to start from, for the later stages.")] = None,
    layout: Layout = "auto",
    channel: Channel = None,
    mix_channels: MixChannels = False,
    workers: Workers = 0,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
) -> None:
    """Train a model and write it with its mean, cohort and calibration.

    A share of the speakers is kept apart: they choose the epoch and calibrate the scores. Recordings that cannot be
    read are named and left out.
    """
    changes = [*([] if backbone is None else [f"backbone={backbone}"]), *(settings or [])]
    changes += [] if channel is None else [f"channel={channel}"]
    changes += ["mix_channels=true"] if mix_channels else []
    chosen = read_recipe(Recipe, recipe, changes, RECIPES)
    seed_epoch(chosen.seed, 0)  # the initial weights follow from the seed too
    model = build_model(chosen) if start is None else SpeakerEncoder.from_pretrained(start)
    utterances = choose_channels(find_utterances(data, layout), chosen)
    good, bad = usable(utterances, model.sample_rate, chosen.mix_channels)
    learn, held = split_speakers(good, chosen.validation, chosen.seed)
    messages.print(
        f"training on {len(learn)} recordings of {len({u.speaker for u in learn})} speakers, "
        f"{len({u.speaker for u in held})} speakers choose the epoch and calibrate ..."
    )
    begun = {"starting weights": start, "backbone": chosen.backbone}
    history = train_speaker_model(
        model,
        learn,
        held,
        chosen,
        output / "training",
        workers,
        device=device,
        show_progress=messages.is_terminal,
        data={name: model_digest(path) for name, path in begun.items() if path is not None},
        fresh=fresh,
    )
    embed_one = Embedder(model.to(device), output / "training" / "embeddings", mix_channels=chosen.mix_channels)
    keep = np.random.default_rng(chosen.seed).permutation(len(learn))[:20000]
    seen, lost = embed_all([learn[n] for n in sorted(keep)], embed_one)
    system = SpeakerSystem.build(model, matrix(seen), [str(u.speaker) for u, _ in seen], chosen.seed)
    unseen: list[tuple[Utterance, Embedded]] = []
    if held:
        unseen, more = embed_all(held, embed_one)
        lost += more
        try:
            system.calibrate(matrix(unseen), [str(u.speaker) for u, _ in unseen], seed=chosen.seed)
        except ValueError as error:
            messages.print(f"not calibrated: {error}. `calibrate` can do it with other trials.")
    before = TrainedOn() if start is None else trained_on(start)
    system.trained_on = before | TrainedOn.of((u.digest for u in good), (u.speaker for u in good))
    system.save(output, trained_on={"data": str(data), "speakers": len({u.speaker for u in learn})})
    pages.training_page(system, history, chosen).write(output / "report.html")
    if held and history:
        best = min(row["val_eer"] for row in history)
        console.print(f"EER {best:.2%} on {len({u.speaker for u in held})} speakers that chose the epoch (too good)")
    console.print(f"model: {output}, its page: {output / 'report.html'}", soft_wrap=True)
    raise_failures([*bad, *lost], len(utterances))


@app.command()
def embed(
    paths: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them.", parser=anywhere)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help=".npz file: names, embeddings, qualities, the encoder.", parser=anywhere),
    ],
    model: Model = None,
    encoder: ForeignEncoder = None,
    encoder_rate: EncoderRate = None,
    cache: Cache = None,
    layout: Layout = "auto",
    channel: Channel = None,
    mix_channels: MixChannels = False,
    device: Device = "auto",
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
) -> None:
    """Write the embeddings of recordings, before normalization. Nothing is gated; the qualities are written too.

    Each is kept (default: OUTPUT.cache), so it can go on; OUTPUT.failures.json tells what could not be done.
    """
    refuse_folder(output)
    keep = cache or output.with_name(output.name + ".cache")

    def make() -> Embedder | TableEmbedder:
        system = open_system(model, encoder, None, encoder_rate, device)
        return make_embedder(system, keep, mix_channels=mix_channels, channel=channel)

    embedder = Once(make)
    digest = embedder().digest
    utterances = _recordings(paths, layout)
    failed = output.with_name(output.name + ".failures.json")
    found, failures = embed_all(utterances, lambda u: embedder()(u), Places(workers, engine, timeout), failed)
    if found:
        qualities = {
            name: np.array([getattr(e.quality, name) for _, e in found]) for name in ("seconds", "speech", "snr")
        }
        with atomic_path(output) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                names=np.array([u.name for u, _ in found]),
                speakers=np.array([u.speaker or "" for u, _ in found]),
                embeddings=matrix(found),
                encoder=np.array(digest),
                **qualities,
            )
        console.print(f"{len(found)} embeddings: {output}", soft_wrap=True)
    raise_failures(failures, len(utterances))


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(help="Name of the speaker.")],
    recordings: Annotated[list[Path], typer.Argument(help="Recordings of this speaker, several are better.")],
    gallery: Annotated[Path, typer.Option("--gallery", "-g", help="Gallery file (.npz); made if it is not there.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    embeddings: Embeddings = None,
    encoder_rate: EncoderRate = None,
    replace: Annotated[bool, typer.Option("--replace", help="Enrol again a speaker who is in the gallery.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add to a speaker who is in the gallery.")] = False,
    channel: Channel = None,
    mix_channels: MixChannels = False,
    min_speech: LeastSpeech = GATE.speech,
    min_snr: LeastSNR = GATE.snr,
    max_clipped: MostClipped = GATE.clipped,
    min_bandwidth: LeastBandwidth = GATE.bandwidth,
    device: Device = "auto",
) -> None:
    """Put a speaker into a gallery: the mean of the normalized embeddings of their recordings."""
    if replace and append:
        raise UserError("--replace and --append: are one or the other")
    system = open_system(model, encoder, embeddings, encoder_rate, device)
    gate = Gate(min_speech, min_snr, max_clipped, min_bandwidth)
    embed_one = make_embedder(system, gate=gate, mix_channels=mix_channels, channel=channel)
    found = galleries.Gallery.load(gallery, system.model) if gallery.exists() else galleries.Gallery.new(system.model)
    utterances = named_utterances(system, recordings)
    if len({path.resolve() for path in recordings}) != len(recordings):
        raise UserError(f"{name}: the same recording is given twice")
    seen, failures = embed_all(utterances, embed_one)
    if seen:
        found.add(name, matrix(seen), replace, append)
        found.save(gallery)
        console.print(f"{name} enrolled with {len(seen)} recordings; speakers in {gallery}: {len(found.names)}")
    raise_failures(failures, len(recordings))


@app.command()
def gallery(
    path: Annotated[Path, typer.Argument(metavar="GALLERY", help="Gallery file that `enroll` wrote.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    embeddings: Embeddings = None,
    encoder_rate: EncoderRate = None,
    remove: Annotated[list[str] | None, typer.Option(help="Name of a speaker to forget; repeat for more.")] = None,
    as_json: Json = False,
) -> None:
    """List the speakers of a gallery with their number of recordings, or forget some."""
    found = galleries.Gallery.load(path, open_system(model, encoder, embeddings, encoder_rate).model)
    for name in remove or ():
        found.remove(name)
    if remove:
        found.save(path)
    if as_json:
        show_json(found.counts)
    else:
        rows = [{"speaker": name, "recordings": count} for name, count in found.counts.items()]
        console.print(table(rows, f"{len(rows)} speakers in {path}"))


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="A recording.")],
    second: Annotated[Path, typer.Argument(help="Another recording.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    embeddings: Embeddings = None,
    encoder_rate: EncoderRate = None,
    as_json: Json = False,
    channel: Channel = None,
    mix_channels: MixChannels = False,
    no_gate: NoGate = False,
    allow_leakage: AllowLeakage = False,
    min_speech: LeastSpeech = GATE.speech,
    min_snr: LeastSNR = GATE.snr,
    max_clipped: MostClipped = GATE.clipped,
    min_bandwidth: LeastBandwidth = GATE.bandwidth,
    memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Say how strongly two recordings speak for one speaker: a log-likelihood ratio, its interval, a sentence.

    Recordings may be hours long; --memory counts all of the process.
    """
    system = open_system(model, encoder, embeddings, encoder_rate, device)
    gate = None if no_gate else Gate(min_speech, min_snr, max_clipped, min_bandwidth)
    embed_one = make_embedder(system, gate=gate, mix_channels=mix_channels, channel=channel)
    if memory is not None:
        if isinstance(embed_one, TableEmbedder):
            raise UserError("--memory: of --embeddings nothing is computed")
        embed_one.keep_within(parse_memory(memory))
    sides = named_utterances(system, (first, second))
    found = [embed_one(side) for side in sides]
    if sides[0].digest == sides[1].digest:
        refuse_leaks(first, [f"holds the same as {second}"], allow_leakage)
    is_table = isinstance(system.model, EmbeddingTable)
    say_silence(list(zip(map(str, (first, second)), found, strict=True)))
    x = np.stack([e.embedding for e in found])
    left, right = np.array([0]), np.array([1])
    score = system.score(x, x, left, right)
    answer: dict[str, Any] = {
        "first": str(first),
        "second": str(second),
        "score": float(score[0]),
        "convention": system.convention,
        "qualities": None if is_table else [vars(e.quality) for e in found],
        "gated": gate is not None and not is_table,
        "marked": mark(system.trained_on.seen([side.digest for side in sides])),
    }
    if system.calibration is None:
        answer["sentence"] = (
            f"Score {score[0]:.3f} ({system.convention}). This model is not calibrated, so the score alone says "
            "nothing about the same or different speakers; `calibrate` it with trials of your own."
        )
    else:
        seconds = np.array([e.quality.seconds for e in found])
        inputs = system.inputs(score, x, x, left, right, (seconds, seconds), system.quality)
        answer["llr"] = float(system.calibration(inputs)[0])
        low = high = None
        if len(system.calibration.replicates) >= 20:
            low, high = (float(bound[0]) for bound in system.calibration.interval(inputs))
        answer |= {"llr_low": low, "llr_high": high, "sentence": _sentence(answer["llr"], low, high)}
    if as_json:
        show_json(answer)
    else:
        console.print(answer["sentence"], soft_wrap=True)
        if answer["marked"]:
            console.print(f"recordings {answer['marked']}: the answer is too sure", soft_wrap=True, highlight=False)


@app.command()
def identify(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings of unknown speakers.")],
    gallery: Annotated[Path, typer.Option("--gallery", "-g", help="Gallery file that `enroll` wrote.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    embeddings: Embeddings = None,
    encoder_rate: EncoderRate = None,
    far: Far = 0.01,
    as_json: Json = False,
    channel: Channel = None,
    mix_channels: MixChannels = False,
    min_speech: LeastSpeech = GATE.speech,
    min_snr: LeastSNR = GATE.snr,
    max_clipped: MostClipped = GATE.clipped,
    min_bandwidth: LeastBandwidth = GATE.bandwidth,
    device: Device = "auto",
) -> None:
    """Name the speaker in a gallery, or answer "none of these".

    The threshold lets a stranger be taken for anyone in the gallery with a chance of at most `--far`, as far as the
    model's calibration trials are like your recordings.
    """
    system = open_system(model, encoder, embeddings, encoder_rate, device)
    found = galleries.Gallery.load(gallery, system.model)
    limit = system.threshold(far, len(found.names))
    gate = Gate(min_speech, min_snr, max_clipped, min_bandwidth)
    utterances = named_utterances(system, recordings)
    embed_one = make_embedder(system, gate=gate, mix_channels=mix_channels, channel=channel)
    seen, failures = embed_all(utterances, embed_one)
    models, rows = found.models(system.mean), []
    for utterance, embedded in seen:
        scores = found.scores(system, models, embedded.embedding)
        order = np.argsort(-scores)
        accepted = bool(scores[order[0]] > limit.threshold)
        rows.append(
            {
                "recording": utterance.name,
                "speaker": found.names[order[0]] if accepted else "none of these",
                "nearest": found.names[order[0]],
                "score": float(scores[order[0]]),
                "threshold": limit.threshold,
            }
        )
    if as_json:
        show_json({"far": far, "gallery": len(found.names), "results": rows})
    elif rows:
        title = f"at most {far:.2%} of strangers are taken for one of {len(found.names)} speakers"
        console.print(table(rows, title))
    raise_failures(failures, len(recordings))


for command in (lists.score, lists.evaluate, lists.calibrate, lists.fuse):
    app.command()(command)
app.command("stress")(lists.stress_test)
app.command()(diarizing.diarize)


def _recordings(paths: Sequence[Path], layout: str) -> list[Utterance]:
    found: list[Utterance] = []
    for path in paths:
        if path.is_dir():
            found += find_utterances(path, layout)
        elif path.suffix.lower() in SUFFIXES or not path.exists():
            found.append(Utterance(told(str(path)), path))
        else:
            raise UserError(f"{path}: is no recording ({', '.join(SUFFIXES)})")
    return found


def _sentence(llr: float, low: float | None, high: float | None) -> str:
    """The answer in words. Nothing is said about how probable one speaker was beforehand."""
    ratio = _number(math.exp(min(abs(llr), 50)))
    interval = "" if low is None or high is None else f" (95 % interval {low:.2f} to {high:.2f})"
    words = f"Log-likelihood ratio {llr:.2f}{interval}: "
    if low is not None and high is not None and low <= 0 <= high:
        return words + "the recordings do not decide between one speaker and two."
    side = ("one speaker", "two") if llr > 0 else ("two speakers", "one")
    return words + f"what is heard is about {ratio} times as probable from {side[0]} as from {side[1]}."


def _number(value: float) -> str:
    if value >= 1e6:
        return "a million or more"
    return f"{float(f'{value:.2g}'):,g}"
