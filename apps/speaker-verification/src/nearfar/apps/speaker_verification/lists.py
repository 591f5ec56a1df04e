"""The commands that take trial lists: score, evaluate, calibrate, stress."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.speaker_verification import pages
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
)
from nearfar.audio.corpora import Utterance, chosen_channel, find_utterances, locate
from nearfar.audio.sound import read_samples
from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.encoders import EmbeddingTable
from nearfar.audio.speakers.lists import count_unscored, find_leaks, rows_in, score_trials, unique
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.stress import CONDITIONS, stress
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import console, messages, show_json, table
from nearfar.core.cli.options import (
    Device,
    Engine,
    Json,
    Seed,
    Timeout,
    Workers,
    anywhere,
    whole,
)
from nearfar.core.errors import UserError, some
from nearfar.core.files import atomic_path, write_csv, write_json
from nearfar.core.model_folder import mark
from nearfar.core.reading import read_arrays, read_json, reading
from nearfar.core.report import Report
from nearfar.core.workers import Once

Labels = Annotated[Path | None, typer.Option("--trials", help="Trial list with the labels, if the scores have none.")]
SpeakerPattern = Annotated[
    str | None, typer.Option(help="Expression whose first group is the speaker in a name; else the first folder.")
]


def score(
    trials: Annotated[Path, typer.Argument(help="Trial list: VoxCeleb, Kaldi, CSV or pairs.", parser=whole)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Score file: enrol, test, score and, if known, label.", parser=anywhere),
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the recordings, or a Kaldi folder; not for --embeddings.", parser=anywhere),
    ] = None,
    model: Model = None,
    encoder: ForeignEncoder = None,
    embeddings: Embeddings = None,
    encoder_rate: EncoderRate = None,
    enrollments: Annotated[
        Path | None,
        typer.Option(help="Map of models to their recordings; the list's first names are then models.", parser=whole),
    ] = None,
    average: Annotated[
        str, typer.Option(help="For models of several recordings, average their embeddings or their scores.")
    ] = "embeddings",
    form: Annotated[str, typer.Option("--format", help="auto, voxceleb, kaldi, csv or pairs.")] = "auto",
    backend: Annotated[str | None, typer.Option(help="cosine or plda; by default the model's.")] = None,
    norm: Annotated[str | None, typer.Option(help="none or as (AS-norm); by default the model's.")] = None,
    top_n: Annotated[int | None, typer.Option(help="Cohort rows for AS-norm; by default the model's.")] = None,
    no_mean: Annotated[bool, typer.Option("--no-mean", help="Do not subtract the mean of the training.")] = False,
    keep_speakers: Annotated[
        bool, typer.Option("--keep-cohort-speakers", help="Leave speakers of the trials in the cohort.")
    ] = False,
    quality: Annotated[
        str | None, typer.Option(help="Write quality measures for `calibrate` too: wespeaker or lap.")
    ] = None,
    llr: Annotated[
        bool, typer.Option("--llr", help="Write calibrated log-likelihood ratios, and OUTPUT.csv with intervals.")
    ] = False,
    cache: Cache = None,
    channel: Channel = None,
    mix_channels: MixChannels = False,
    allow_leakage: AllowLeakage = False,
    device: Device = "auto",
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
) -> None:
    """Score a trial list: each recording is embedded once, and kept (default: OUTPUT.cache), so it can go on.

    Trials whose recordings cannot be read are left out, listed in OUTPUT.failed, and the exit status is 1.
    """
    refuse_folder(output)
    system = open_system(model, encoder, embeddings, encoder_rate, device)
    if average not in ("embeddings", "scores"):
        raise UserError(f"--average {average}: must be embeddings or scores")
    if llr and (backend or norm or top_n or quality or no_mean):
        raise UserError("--llr: the calibration says how to score; leave out --backend, --norm and the like")
    if llr and system.calibration is None:
        raise UserError(f"{model}: is not calibrated, --llr needs `calibrate` first")
    quality = system.quality if llr else quality
    if quality and isinstance(system.model, EmbeddingTable) and not system.model.seconds:
        raise UserError(f"{embeddings}: does not say the seconds of speech (array `seconds`) that --quality needs")
    if quality and average == "scores" and enrollments:
        raise UserError("--average scores: quality measures are of averaged embeddings")
    system.choose(backend, norm, top_n, no_mean)
    listed = scoring.read_trials(trials, form)  # type: ignore[arg-type]
    members = scoring.read_enrollments(enrollments) if enrollments else None
    if members is not None and (lost := [name for name in unique(listed.enroll) if name not in members]):
        raise UserError(f"{enrollments}: lacks {len(lost)} models of {trials}, {lost[0]} first")
    needed = listed.names()
    if members is not None:
        needed = list(dict.fromkeys([m for name in unique(listed.enroll) for m in members[name]] + unique(listed.test)))
    places, speakers = _find(system, trials, root, needed)
    leaks = find_leaks(listed, places, system.trained_on, members, speakers)
    refuse_leaks(trials, leaks, allow_leakage)
    if not keep_speakers:
        own = {part for name in needed for part in (*Path(name).parts, speakers.get(name))}
        try:
            system.leave_out(own)
        except UserError as error:
            raise UserError(f"{trials}: {error}; choose a lower --top-n or --keep-cohort-speakers") from error
    utterances = list(places.values())
    keep = cache or output.with_name(output.name + ".cache")
    options = {"mix_channels": mix_channels, "channel": channel}
    embedder = Once(
        lambda: make_embedder(open_system(model, encoder, embeddings, encoder_rate, device), keep, **options)
    )
    seen, failures = embed_all(utterances, lambda u: embedder()(u), Places(workers, engine, timeout))
    if not seen:
        raise_failures(failures, len(utterances))
    x, seconds = matrix(seen), np.array([e.quality.seconds for _, e in seen])
    names = [utterance.name for utterance, _ in seen]
    scored = score_trials(system, listed, names, x, seconds, members, average, quality)
    kept, values, inputs = scored.trials, scored.scores, scored.inputs
    if llr and system.calibration is not None:
        values = system.calibration(inputs)
        if len(system.calibration.replicates) >= 20:
            columns = zip(
                kept.enroll, kept.test, values.tolist(), *map(np.ndarray.tolist, system.calibration.interval(inputs))
            )
            write_csv(
                output.with_name(output.name + ".csv"),
                [dict(zip(("enrol", "test", "llr", "low", "high"), line)) for line in columns],
            )
    elif quality:
        with atomic_path(_beside(output, "quality.npz")) as temporary, temporary.open("wb") as stream:
            np.savez(stream, inputs=inputs)
    scoring.write_scores(output, kept, values)
    known_to = system.trained_on.seen(
        (u.digest for u, _ in seen),
        (speakers.get(u.name) or (Path(u.name).parts[0] if "/" in u.name else None) for u, _ in seen),
    )
    trained = {name for name, flag in zip(names, known_to, strict=True) if flag}
    sides = zip(kept.enroll.tolist(), kept.test.tolist(), strict=True)
    marked = mark([b in trained or not trained.isdisjoint((members or {}).get(a, [a])) for a, b in sides])
    if marked:
        messages.print(f"{marked}, of {len(kept)} trials: their scores are too good", highlight=False)
    about = {
        "trials": str(trials),
        "model": system.model.digest,
        "convention": system.convention,
        "backend": system.backend,
        "norm": system.norm if system.backend == "cosine" else None,
        "top_n": system.top_n if system.backend == "cosine" else None,
        "no_mean": system.mean is None,
        "average": average if members is not None else None,
        "quality": quality,
        "llr": llr,
        "marked": marked,
        "leaks": leaks,
        "scored": len(kept),
        "listed": len(listed),
    }
    write_json(_beside(output, "json"), about)
    console.print(f"{len(kept)} of {len(listed)} trials: {output}", soft_wrap=True)
    if failures:
        lost_trials = listed.select(~scored.possible)
        scoring.write_trials(_beside(output, "failed"), lost_trials)
        failures.append(f"{len(lost_trials)} trials have no score: {output.name}.failed")
    raise_failures(failures, len(utterances))


def _find(
    system: SpeakerSystem, trials: Path, root: Path | None, needed: Sequence[str]
) -> tuple[dict[str, Utterance], dict[str, str | None]]:
    """The utterances of a list by name, and the speakers that a Kaldi folder tells. Raises UserError."""
    if isinstance(table := system.model, EmbeddingTable):
        if missing := [name for name in needed if name not in table.vectors]:
            raise UserError(f"{trials}: {len(missing)} of {len(needed)} names are not in {table.path}: {some(missing)}")
        return {u.name: u for u in named_utterances(system, needed)}, {}
    if root is None:
        raise UserError(f"{trials}: name the folder of its recordings with --root")
    known = find_utterances(root, "kaldi") if (root / "wav.scp").is_file() else []
    places, missing = locate(needed, root, known)
    if missing:
        raise UserError(f"{trials}: {len(missing)} of {len(needed)} recordings are not below {root}: {some(missing)}")
    return places, {u.name: u.speaker for u in known}


def stress_test(
    trials: Annotated[Path, typer.Argument(help="Trial list with labels.")],
    root: Annotated[Path, typer.Option(help="Folder of the recordings, or a Kaldi folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for figures and the page.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    encoder_rate: EncoderRate = None,
    condition: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(CONDITIONS)}; repeat for more, all by default.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="auto, voxceleb, kaldi, csv or pairs.")] = "auto",
    speaker_pattern: SpeakerPattern = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws for the intervals, 0 for none.")] = 200,
    channel: Channel = None,
    mix_channels: MixChannels = False,
    allow_leakage: AllowLeakage = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What zeros, gates, codecs, noise, gain, cuts and resampling do to a model, on your own list.

    The test side of every trial is changed, one condition at a time; the enrolled side stays as it is. Of each
    recording the first minute counts.
    """
    system = open_system(model, encoder, None, encoder_rate, device)
    chosen = condition or list(CONDITIONS)
    if unknown := [name for name in chosen if name not in CONDITIONS]:
        raise UserError(f"--condition {unknown[0]}: must be one of {', '.join(CONDITIONS)}")
    listed = scoring.read_trials(trials, form)  # type: ignore[arg-type]
    if listed.labels is None:
        raise UserError(f"{trials}: has no labels, without which there are no error rates")
    if draws and draws < 20:
        raise UserError(f"--draws {draws}: must be 0, or at least 20")
    places, speakers = _find(system, trials, root, listed.names())
    refuse_leaks(trials, find_leaks(listed, places, system.trained_on, None, speakers), allow_leakage)
    embed_one = Embedder(system.model, mix_channels=mix_channels, channel=channel)
    rate = system.model.sample_rate

    def one(utterance: Utterance) -> tuple[str, dict[str, np.ndarray]]:
        seconds = min(60.0, 60.0 if utterance.seconds is None else utterance.seconds)
        which = chosen_channel(utterance, channel)
        samples = read_samples(utterance.path, rate, utterance.start, seconds, mix_channels, which)
        found = {"clean": embed_one.embed_samples(samples)}
        for place, name in enumerate(chosen):
            rng = np.random.default_rng([seed, place, *utterance.name.encode()])
            found[name] = embed_one.embed_samples(CONDITIONS[name][1](samples, rate, rng).astype(np.float32))
        return utterance.name, found

    done, failures = run_batch(places.values(), one, "embedding", name=lambda u: str(u.path))
    names = [name for name, _ in done]
    possible = np.isin(listed.enroll, names) & np.isin(listed.test, names)
    kept = listed.select(possible)
    if not done or len(set(np.asarray(kept.labels).tolist())) < 2:
        raise_failures(failures, len(places))
        raise UserError(f"{trials}: needs targets and non-targets")
    stacked = {name: np.stack([found[name] for _, found in done]) for name in ("clean", *chosen)}
    clean = stacked.pop("clean")
    sides = pages.speakers_of(kept, speaker_pattern)
    rows = stress(system, kept, names, clean, stacked, sides, draws)
    about = {"trials": str(trials), "scored": len(kept), "listed": len(listed), "convention": system.convention}
    write_json(output / "stress.json", {**about, "conditions": rows})
    write_csv(output / "stress.csv", rows[1:])
    shown = pages.stress_rows(rows)
    page = Report("What a speaker model suffers from", f"{len(kept)} trials of {trials}, by {system.convention}.")
    page.text("The test side of every trial is changed, the enrolled side is not.").table(shown)
    page.write(output / "report.html")
    if as_json:
        show_json({**about, "conditions": rows})
    else:
        console.print(table(shown))
        console.print(f"page: {output / 'report.html'}", soft_wrap=True)
    raise_failures(failures, len(places))


def evaluate(
    scores: Annotated[Path, typer.Argument(help="Score file with labels: enrol test score target|nontarget.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for figures, pictures and the page.")],
    trials: Labels = None,
    calibrated: Annotated[bool, typer.Option("--llr", help="The scores are log-likelihood ratios.")] = False,
    speaker_pattern: SpeakerPattern = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the recordings, to hear the worst errors.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Other scores of the same trials: differences with their paired intervals.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws for the intervals.")] = 1000,
    far: Annotated[list[float] | None, typer.Option(help="False-accept rates to give thresholds for.")] = None,
    as_json: Json = False,
) -> None:
    """Figures with their conventions named, thresholds, DET curve, histograms, conditions, and the worst errors."""
    listed, values, reference = _labelled(scores, trials)
    about = _record(scores)
    calibrated = calibrated or about.get("llr", False)
    unscored = np.zeros(len(listed), bool)
    if reference is not None and len(reference) > len(listed):
        listed, values, unscored = count_unscored(listed, values, reference, scores)
    speakers = pages.speakers_of(listed, speaker_pattern)
    rates, other = far or [0.01, 0.001], None
    if against is not None:
        theirs, their_values = scoring.read_scores(against)
        if len(theirs) != len(listed):
            raise UserError(f"{against}: has {len(theirs)} trials, {scores} has {len(listed)}; compare the same ones")
        other = (against.name, their_values[rows_in(listed, theirs, scores)])
    try:
        pages.write_evaluation(
            output,
            listed,
            values,
            calibrated,
            speakers,
            draws,
            rates,
            root,
            unscored,
            about.get("convention", ""),
            other,
            about.get("marked", ""),
        )
    except ValueError as error:
        raise UserError(f"{scores}: {error}") from error
    text = (output / "evaluation.json").read_text(encoding="utf-8")
    if as_json:
        print(text)
    else:
        console.print(table(pages.figure_rows(json.loads(text))))
        console.print(f"page: {output / 'report.html'}", soft_wrap=True)
    if unscored.any():
        messages.print(f"{unscored.sum()} trials of {trials} have no score and count as errors", highlight=False)


def calibrate(
    scores: Annotated[Path, typer.Argument(help="Score file with labels, of speakers that the model has not seen.")],
    model: Model = None,
    encoder: ForeignEncoder = None,
    embeddings: Embeddings = None,
    encoder_rate: EncoderRate = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the calibrated model; --model itself by default.")
    ] = None,
    trials: Labels = None,
    speaker_pattern: SpeakerPattern = None,
    allow_leakage: AllowLeakage = False,
    as_json: Json = False,
) -> None:
    """Calibrate a model folder with your own trials, scored with it by `score` (without --llr).

    With --encoder or --embeddings the folder holds their calibration; name both, it and them, from then on.
    Scores without the record that `score` writes beside them are refused: nothing tells what made them.

    From then on the model scores as they were scored: with that back end, norm and quality measures.
    """
    listed, values, _ = _labelled(scores, trials)
    system = open_system(model, encoder, embeddings, encoder_rate)
    if output is None and (model is None or not model.exists()):
        raise UserError(
            "--output: name a folder for the calibrated model; a shipped model or an encoder stays as it is"
        )
    about, inputs = _record(scores), values
    if not about:
        raise UserError(
            f"{scores}: has no record of how it was made ({_beside(scores, 'json').name}), so it may be another "
            "model's; score the trials with `score`"
        )
    if about["llr"]:
        raise UserError(f"{scores}: holds log-likelihood ratios; `calibrate` takes what `score` writes without --llr")
    if about["model"] != system.model.digest or (system.mean is None and not about["no_mean"]):
        raise UserError(f"{scores}: was scored with another model than {model or encoder or embeddings}")
    system.choose(about["backend"], about["norm"], about["top_n"], about["no_mean"])
    if about["quality"]:
        path = _beside(scores, "quality.npz")
        with reading(path, "holds no measures of quality", "run `score` again"):
            inputs = read_arrays(path, "measures of quality")["inputs"]
            if inputs.ndim != 2:
                raise ValueError(f"inputs are {inputs.shape}")
        if not np.array_equal(inputs[:, 0], values):
            raise UserError(f"{scores}: is not what {scores.name}.quality.npz belongs to; run `score` again")
    sides = pages.speakers_of(listed, speaker_pattern)
    leaks = list(about.get("leaks", []))
    people = sorted({*sides[0], *sides[1]}) if sides else []
    if not leaks and (known := [p for p, seen in zip(people, system.trained_on.seen(people, people)) if seen]):
        leaks = [f"the model was trained on {len(known)} of {len(people)} speakers: {some(known, 3)}"]
    refuse_leaks(scores, leaks, allow_leakage)
    try:
        system.fit(inputs, listed.labels, *(sides or (None, None)), about.get("quality"))
        ratios = system.calibration(inputs)
        after, before = scoring.cllr(ratios, listed.labels), scoring.min_cllr(ratios, listed.labels)
    except ValueError as error:
        raise UserError(f"{scores}: {error}") from error
    if output is None and isinstance(system.model, SpeakerEncoder):
        system.save_scoring(model)
    else:
        system.save(output or model)
    if as_json:
        answer = {"trials": len(listed), "convention": system.convention, "cllr": after, "min_cllr": before}
        answer |= {"bias": system.calibration.bias, "intervals": "speakers" if sides else "trials"}
        answer["weights"] = dict(zip(system.calibration.names, system.calibration.weights.tolist()))
        show_json(answer)
        return
    how = "speakers" if sides else "trials (name speakers with --speaker-pattern for honest intervals)"
    console.print(f"calibrated on {len(listed)} trials: Cllr {after:.3f}, at best {before:.3f}; intervals over {how}")
    extra = f", and {len(system.calibration.weights) - 1} quality measures ({system.quality})" if system.quality else ""
    console.print(f"the model now scores by {system.convention}{extra}", soft_wrap=True)


def fuse(
    scores: Annotated[list[Path], typer.Argument(help="Score files of the same trials, one for each system.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The fusion (JSON); with --fusion, a score file.")],
    fusion: Annotated[
        Path | None, typer.Option(help="A fusion that was made before: these scores are fused by it.")
    ] = None,
    trials: Labels = None,
    speaker_pattern: SpeakerPattern = None,
    as_json: Json = False,
) -> None:
    """Fuse systems by calibrated logistic regression: their scores to one log-likelihood ratio.

    Make it on labelled trials of other speakers than those that it is for (first call, `-o fusion.json`), then use it
    on the scores of the same systems, in the same order (second call, `--fusion fusion.json -o fused.txt`).
    """
    refuse_folder(output)
    if len(scores) < 2:
        raise UserError("fuse: needs the scores of two systems or more")
    listed, first = scoring.read_scores(scores[0])
    columns = [first]
    for path in scores[1:]:
        others, values = scoring.read_scores(path)
        if len(others) != len(listed):
            raise UserError(f"{path}: has {len(others)} trials, {scores[0]} has {len(listed)}; fuse the same ones")
        columns.append(values[rows_in(listed, others, scores[0])])
    inputs, systems = np.stack(columns, 1), [str(_record(path).get("model", "")) for path in scores]
    if fusion is not None:
        fused = scoring.Calibration.load(fusion)
        known = [str(digest) for digest in fused.notes.get("systems", [])]
        if len(known) != len(scores) or any(a and b and a != b for a, b in zip(known, systems)):
            raise UserError(f"{fusion}: was made for {len(known)} other systems, or these in another order")
        scoring.write_scores(output, listed, fused(inputs))
        about = {"convention": f"fusion of {len(scores)} systems", "llr": True, "scored": len(listed), "marked": ""}
        write_json(_beside(output, "json"), about)
        console.print(f"{len(listed)} trials fused: {output}", soft_wrap=True)
        return
    if trials is not None:
        reference = scoring.read_trials(trials)
        listed = reference.select(rows_in(listed, reference, scores[0]))
    if listed.labels is None:
        raise UserError(f"{scores[0]}: has no labels; give the list that has them with --trials")
    labels, sides = np.asarray(listed.labels), pages.speakers_of(listed, speaker_pattern) or (None, None)
    names = [path.name for path in scores]
    try:
        fused = scoring.Calibration.fit(
            inputs, labels, names, enroll_speakers=sides[0], test_speakers=sides[1], notes={"systems": systems}
        )
    except ValueError as error:
        raise UserError(f"{scores[0]}: {error}") from error
    fused.save(output)
    rows = [
        {"system": name, "weight": float(weight), "EER": scoring.eer(values, labels).value}
        for name, weight, values in zip(
            [*names, "fusion"], [*fused.weights, 1.0], [*columns, fused(inputs)], strict=True
        )
    ]
    if as_json:
        show_json({"systems": rows, "bias": fused.bias, "trials": len(listed)})
        return
    console.print(table(rows, f"{len(listed)} trials, on which it was made: the fusion's figures are too good"))
    console.print(f"fusion: {output}", soft_wrap=True)


def _labelled(scores: Path, trials: Path | None) -> tuple[scoring.Trials, np.ndarray, scoring.Trials | None]:
    """Scored trials with labels, their scores, and the list that the labels come from. Raises UserError."""
    listed, values = scoring.read_scores(scores)
    reference = scoring.read_trials(trials) if trials is not None else None
    if reference is not None:
        listed = reference.select(rows_in(listed, reference, scores))
    if listed.labels is None:
        raise UserError(f"{scores}: has no labels; give the list that has them with --trials")
    return listed, values, reference


def _record(scores: Path) -> dict[str, Any]:
    """What `score` wrote about a score file; empty where the scores come from elsewhere."""
    path = _beside(scores, "json")
    return read_json(path, "a record of scores", "run `score` again") if path.is_file() else {}


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")
