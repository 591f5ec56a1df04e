"""`nearfar motor-imagery`: inspect recordings, train a decoder, evaluate decoders fairly, predict, report."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nearfar.apps.motor_imagery import live, pages
from nearfar.apps.motor_imagery.options import (
    PATHS,
    Band,
    Causal,
    Channels,
    Classes,
    Encoding,
    Event,
    Interpolate,
    Notch,
    Paths,
    Published,
    Reference,
    Rename,
    Resample,
    Runs,
    SkipBad,
    Standardize,
    SubjectPattern,
    Subjects,
    Types,
    Unit,
    Whiten,
    Window,
    channel_names,
    chosen_recordings,
    chosen_trials,
    event_names,
    preparation,
    reading,
    unadapted,
)
from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import console, messages, progress, show_json, table
from nearfar.core.cli.options import (
    Device,
    Devices,
    Engine,
    Fresh,
    Json,
    Nodes,
    Precision,
    RunFolder,
    Settings,
    Strategy,
    Timeout,
    Workers,
    anywhere,
    recipe_option,
    whole,
)
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.made_from import MadeFrom, model_digest
from nearfar.core.model_folder import mark
from nearfar.core.recipes import read_recipe
from nearfar.core.workers import Once
from nearfar.eeg import plots
from nearfar.eeg.annotations import annotations, event_counts, is_bad, is_edge
from nearfar.eeg.comparison import compare
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.decoding import Recipe
from nearfar.eeg.evaluation import Results
from nearfar.eeg.live.scores import live_error
from nearfar.eeg.live.stream import Rule
from nearfar.eeg.prediction import continuous, decode_all_along, decode_trials, files_of, seen_trials
from nearfar.eeg.protocols import PROTOCOLS
from nearfar.eeg.published import reproduce as reproduced
from nearfar.eeg.recordings import Recording, bad_channels, eeg_channels, find_recordings
from nearfar.eeg.training import train_decoder
from nearfar.eeg.trials import load_trials, select_classes, trials_array

RecipeFile = Annotated[str | None, recipe_option()]

app = typer.Typer(
    help="Decode imagined movements from EEG. Start with `inspect FOLDER` to see what your files hold, compare "
    "decoders with `evaluate`, make one with `train`, use it with `predict`.\n\n"
    "Reads EDF, BDF, GDF, BrainVision, EEGLAB, FIF and all else that MNE reads. The runs of EEGMMIDB and of BCI "
    "Competition IV 2a are known by name; for others say what the events mean: `--event left_hand=769`.",
    no_args_is_help=True,
)

for command in (live.streams, live.calibrate, live.live, live.replay, live.audit, live.export):
    app.command()(command)

SCORES = {
    "events": "events",
    "hits": "hits",
    "wrong": "wrong",
    "missed": "missed",
    "false_per_minute": "false/min",
    "latency": "latency s",
    "bits_per_minute": "bits/min",
}
"""What is shown of the scores of commands, and its heading."""


@app.command()
def inspect(
    paths: Paths,
    unit: Unit = None,
    rename: Rename = None,
    types: Types = None,
    encoding: Encoding = None,
    subject_pattern: SubjectPattern = None,
    as_json: Json = False,
) -> None:
    """Say what recordings hold: subjects, channels, rate, events, what is wrong with them, and what was set aside."""
    how = reading(rename, types, encoding, unit)

    def look(recording: Recording) -> dict[str, Any]:
        notes: list[str] = []
        if (trials := recording.epochs(notes=notes, **how)) is not None:
            return _look_at_trials(recording, trials, notes, as_json)
        raw = recording.read(notes=notes, **how)
        eeg = eeg_channels(raw.info)
        placed = sum(not np.isnan(raw.info["chs"][pick]["loc"][:3]).any() for pick in eeg)
        problems = [f"{name} {why}" for name, why in bad_channels(raw).items()]
        if placed < len(eeg):
            problems.append(f"{len(eeg) - placed} channels without position")
        marks = annotations(raw)[2].tolist()
        counts = {"BAD stretches": sum(map(is_bad, marks)), "edges": sum(map(is_edge, marks))}
        problems += [f"{count} {kind}" for kind, count in counts.items() if count]
        problems += notes
        meaning = {name: cls for cls, name in (recording.events or {}).items()}
        events = {meaning.get(name, name): count for name, count in event_counts(raw).items()}
        return {
            "file": str(recording.path),
            "subject": recording.subject,
            "session": recording.session,
            "run": recording.run,
            "channels": len(eeg),
            "Hz": float(raw.info["sfreq"]),
            "seconds": round(raw.n_times / raw.info["sfreq"], 1),
            "events": events if as_json else ", ".join(f"{name} {count}" for name, count in events.items()),
            "problems": problems if as_json else "; ".join(problems),
        }

    found = find_recordings(paths, subject_pattern)
    rows, failures = run_batch(found, look, "reading", name=lambda recording: str(recording.path))
    if as_json:
        show_json(rows)
    elif rows:
        console.print(table(rows))
    raise_failures(failures, len(found))


@app.command()
def train(
    paths: Paths,
    output: RunFolder,
    test: Annotated[
        list[Path] | None, typer.Option(help="Recordings (or folders) to test the finished decoder on, once.")
    ] = None,
    test_runs: Annotated[str | None, typer.Option(help="Runs of PATHS to test on instead of training on them.")] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Fine-tune from this: a decoder folder, or published AGTCNet weights (.h5) of your own download."
        ),
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of the training data that chooses the weights.")] = 0.2,
    event: Event = None,
    classes: Classes = None,
    runs: Runs = None,
    subjects: Subjects = None,
    channels: Channels = None,
    interpolate: Interpolate = False,
    skip_bad: SkipBad = False,
    unit: Unit = None,
    rename: Rename = None,
    types: Types = None,
    encoding: Encoding = None,
    subject_pattern: SubjectPattern = None,
    window: Window = None,
    band: Band = None,
    notch: Notch = None,
    resample: Resample = None,
    standardize: Standardize = None,
    whiten: Whiten = None,
    reference: Reference = None,
    causal: Causal = False,
    published: Published = False,
    recipe: RecipeFile = None,
    settings: Settings = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
) -> None:
    """Train a decoder and write it to a folder that `predict` needs alone.

    The validation trials (whole subjects where there are several, else the latest trials of each class) choose the
    epoch; the test recordings are looked at once, at the end.
    """
    training = read_recipe(Recipe, recipe, settings or ())
    if published:
        training = replace(training, objective="published")
    recordings = chosen_recordings(find_recordings(paths, subject_pattern), runs, subjects)
    held_out = find_recordings(test, subject_pattern) if test else []
    if test_runs:
        held_out += [recording for recording in recordings if recording.run in test_runs.split(",")]
        recordings = [recording for recording in recordings if recording.run not in test_runs.split(",")]
    preprocessing = preparation(
        recordings, window, band, notch, resample, standardize, published, reference, causal, whiten
    )
    options = {
        "events": event_names(event),
        "interpolate": interpolate,
        "skip_bad": skip_bad,
        "preprocessing": preprocessing,
        **reading(rename, types, encoding, unit),
    }
    epochs = chosen_trials(recordings, classes, channels=channel_names(channels), **options)
    tested = None
    if held_out:
        tested = chosen_trials(held_out, ",".join(epochs.event_id), channels=epochs.ch_names, **options)
    decoder = train_decoder(
        epochs, preprocessing, training, output, test=tested, start=start, validation=validation, device=device,
        show_progress=messages.is_terminal, fresh=fresh, tell=lambda text: messages.print(text, highlight=False),
    )  # fmt: skip
    scores = decoder.metrics
    chosen = (
        f"at epoch {scores['best_epoch']} (it chose the epoch: too good)" if "epochs" in scores else "cross-validated"
    )
    console.print(f"validation accuracy {scores['validation_accuracy']:.3f} {chosen}{unadapted(scores)}")
    if "threshold" in scores:
        found = scores["threshold"]
        console.print(
            f"threshold {found['threshold']:.3f} by {found['trials']} trials: {found['answered']:.0%} answered, "
            f"{found['accuracy']:.0%} of them rightly"
        )
    if "test" in scores:
        console.print(_sentence("test", scores["test"]))
    if causal and held_out:
        others = options | {"preprocessing": replace(preprocessing, causal=False)}
        ahead = chosen_trials(held_out, ",".join(decoder.classes), channels=epochs.ch_names, **others)
        X, y, _ = trials_array(ahead, decoder.classes)
        share = float((decoder.predict_proba(X).argmax(1) == y).mean())
        console.print(f"with filters of zero phase: test accuracy {share:.3f}")
    pages.decoder_page(decoder).write(output / "report.html")
    console.print(f"decoder: {output}, its page: {output / 'report.html'}", soft_wrap=True)


@app.command()
def evaluate(
    paths: Paths,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, pictures and the report.")],
    protocol: Annotated[str, typer.Option(help=f"What is kept apart: {', '.join(PROTOCOLS)}.")] = "cross-session",
    models: Annotated[
        str,
        typer.Option(help="Decoders to compare: AGTCNet, CSP+LDA, FBCSP, TangentSpace, MDM, any braindecode model."),
    ] = "AGTCNet,EEGNet,CSP+LDA,FBCSP,TangentSpace",
    test_session: Annotated[
        str | None, typer.Option(help="cross-session: test these sessions only, never train on them.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeat everything with this many seeds.")] = 1,
    align: Annotated[
        bool, typer.Option("--align", help="Euclidean alignment of each session, causal where the session is unseen.")
    ] = False,
    event: Event = None,
    classes: Classes = None,
    runs: Runs = None,
    subjects: Subjects = None,
    channels: Channels = None,
    interpolate: Interpolate = False,
    skip_bad: SkipBad = False,
    unit: Unit = None,
    rename: Rename = None,
    types: Types = None,
    encoding: Encoding = None,
    subject_pattern: SubjectPattern = None,
    window: Window = None,
    band: Band = None,
    notch: Notch = None,
    resample: Resample = None,
    standardize: Standardize = None,
    whiten: Whiten = None,
    reference: Reference = None,
    causal: Causal = False,
    published: Published = False,
    recipe: RecipeFile = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Compare decoders under one protocol: tables as CSV, pictures, and a report page.

    Finished fits are kept in OUTPUT/cache, so an interrupted evaluation goes on where it was. Every split is checked
    for leakage before anything is trained.
    """
    training = read_recipe(Recipe, recipe, settings or ())
    recordings = chosen_recordings(find_recordings(paths, subject_pattern), runs, subjects)
    preprocessing = preparation(
        recordings, window, band, notch, resample, standardize, published, reference, causal, whiten
    )
    epochs = chosen_trials(
        recordings,
        classes,
        events=event_names(event),
        channels=channel_names(channels),
        interpolate=interpolate,
        skip_bad=skip_bad,
        preprocessing=preprocessing,
        **reading(rename, types, encoding, unit),
    )
    wide = None
    if all(recording.trials is None for recording in recordings):
        settings_of_maps = replace(preprocessing, tmin=-1.0, order="continuous", standardization=None, alignment=None)
        wide = load_trials(
            recordings,
            preprocessing=settings_of_maps,
            events=event_names(event),
            channels="common",
            failures=[],
            **reading(rename, types, encoding, unit),
        )
        wide = select_classes(wide, [name for name in epochs.event_id if name in wide.event_id])
    options: dict[str, Any] = {"published": published, "alignment": align}
    if test_session is not None:
        if protocol != "cross-session":
            raise UserError("--test-session goes with --protocol cross-session")
        options["test"] = test_session.split(",")
    with progress() as bar:
        task = bar.add_task("evaluating", total=None)
        results = compare(
            epochs,
            output,
            protocol,
            models.split(","),
            training,
            seeds=range(training.seed, training.seed + repeats),
            device=device,
            wide=wide,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            **options,
        )
    show_results(results, output)


def show_results(results: Results, output: Path) -> None:
    """Print the table, where the rest is, and what failed."""
    page = pages.evaluation_page(output).write(output / "report.html")
    console.print(pages.score_table(results))
    console.print(f"tables and pictures: {output}, the report: {page}", soft_wrap=True)
    for row in results.failures.itertuples():
        messages.print(
            f"counted as chance: {row.model}, subject {row.subject}: {row.failure}", highlight=False, markup=False
        )


@app.command()
def predict(
    decoder: Annotated[Path, typer.Argument(help="Decoder folder, as `train` writes it.", parser=whole)],
    paths: Annotated[list[Path], typer.Argument(help=PATHS, parser=anywhere)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for one table (TSV, like BIDS events) per recording.", parser=anywhere
        ),
    ] = Path("predictions"),
    event: Event = None,
    causal: Causal = False,
    every: Annotated[
        float | None, typer.Option(min=0.001, help="Decode all along, a window every so many seconds, as if live.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="No answer where the most probable class is below this.")
    ] = 0.0,
    smoothing: Annotated[int, typer.Option(min=1, help="With --every: average over so many windows.")] = 1,
    dwell: Annotated[int, typer.Option(min=1, help="With --every: so many equal answers in a row make a command.")] = 1,
    interpolate: Interpolate = False,
    unit: Unit = None,
    rename: Rename = None,
    types: Types = None,
    encoding: Encoding = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Decode the unfiltered recording as a live stream too; say how far they differ."),
    ] = False,
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
) -> None:
    """Decode recordings with a trained decoder: at their events, or all along (`--every 0.5`).

    Writes one table per recording with onset, duration, the predicted class (trial_type) and all probabilities; where
    the events' classes are known also the true class, and which trials the decoder has seen in training. With --every
    commands are scored by the events (hits, false activations, latency, bits per minute) and drawn. Recordings that
    have a table already, made by the same decoder with the same options, are passed over.

    With --causal the decoder's preprocessing is that of a live stream, however it was trained; `zero-phase differs` is
    the share of answers that are others with filters of zero phase.
    """
    decoders, of_model = Once(lambda: Decoder.load(decoder)), model_digest(decoder)
    decoders()
    options = {"event": event, "every": every, "threshold": threshold, "smoothing": smoothing, "dwell": dwell}
    options |= {"causal": causal}
    how = reading(rename, types, encoding, unit)
    options |= {"interpolate": interpolate} | how
    found = find_recordings(paths)
    targets = _targets(found, output)
    rule = Rule(threshold=threshold, smoothing=smoothing, dwell=dwell)

    def read_out(recording: Recording) -> dict[str, Any] | None:
        target = targets[recording.path, recording.session]
        made = MadeFrom(target, files_of(recording.path), of_model, **options, session=recording.session)
        if made.done():
            return None
        line: dict[str, Any] = {"file": str(recording.path)}
        model = decoders()
        looking_ahead = model.preprocessed(causal=False)
        if causal:
            model = model.preprocessed(causal=True)
        given = {"events": event_names(event), "interpolate": interpolate} | how
        if every is None:
            rows = decode_trials(model, recording, threshold=threshold, **given)
            seen = rows.get("seen_in_training", ())
            if causal:
                other = decode_trials(looking_ahead, recording, threshold=threshold, **given)["trial_type"]
        else:
            raw, recorded = continuous(model, recording, interpolate, **how)
            step = max(1, round(every * model.sfreq))
            rows, decisions, scores, marks = decode_all_along(
                model, recording, raw, recorded, step, rule, event_names(event)
            )
            seen = seen_trials(model, recording, **given)
            if causal:
                ahead = continuous(looking_ahead, recording, interpolate, **how)
                other = decode_all_along(looking_ahead, recording, *ahead, step, rule)[0]["trial_type"]
            line |= {shown: scores[name] for name, shown in SCORES.items() if name in scores}
            if marks is not None:
                with atomic_path(target.with_name(target.name.replace(".tsv", ".png"))) as temporary:
                    plots.online_timeline(decisions, marks, model.classes).savefig(
                        temporary, dpi=120, bbox_inches="tight"
                    )
        with atomic_path(target) as temporary:
            rows.to_csv(temporary, sep="\t", index=False, float_format="%.6g", na_rep="n/a")
        made.write()
        if every is None:
            line |= {name: int((rows["trial_type"] == name).sum()) for name in [*model.classes, "n/a"]}
        else:
            line |= {"windows": len(rows), "abstained": int((decisions.reasons != "").sum())}
        if "true" in rows:
            line["accuracy"] = float((rows["true"] == rows["trial_type"]).mean())
        if causal:
            count = min(len(rows), len(other))
            line["zero-phase differs"] = float((rows["trial_type"][:count] != other[:count]).mean())
        if check:
            if every is None:
                raw, recorded = continuous(model, recording, interpolate, **how)
                step = max(1, round(0.5 * model.sfreq))
                decisions = decode_all_along(model, recording, raw, recorded, step, rule)[1]
            line |= live_error(model, recorded, decisions, step, rule)
        line["marked"] = mark(list(seen))
        return line

    places, failed = Places(workers, engine, timeout), output / "failures.json"
    lines, failures = run_batch(found, read_out, "decoding", lambda recording: str(recording.path), places, failed)
    if done := [line for line in lines if line]:
        console.print(table(done))
    if skipped := len(lines) - len(done):
        console.print(f"{skipped} recordings had their tables already")
    console.print(f"tables: {output}", soft_wrap=True)
    raise_failures(failures, len(found))


@app.command()
def reproduce(
    folder: Annotated[Path, typer.Argument(help="The authors' results of AGTCNet: a download of your own.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="EEGMMIDB's EDF files or folders. (default: those in FOLDER)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode EEGMMIDB with the published weights and print accuracy, kappa and loss beside the authors' log.

    Ends with 1 where a figure differs from the log's four digits.
    """
    found = reproduced(folder, paths or folder)
    rows = found.to_dict("records")
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        console.print(table([{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))
        console.print(f"{found['agrees'].sum()} of {len(found)} weight files give the figures of the authors' log")
    if not found["agrees"].all():
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` or `train` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Put several evaluations and decoders on one page."""
    console.print(f"the report: {pages.combined_page(folders).write(output)}", soft_wrap=True)


def _look_at_trials(recording: Recording, trials: Any, notes: list[str], as_json: bool) -> dict[str, Any]:
    events = {name: int((trials.events[:, 2] == code).sum()) for name, code in trials.event_id.items()}
    return {
        "file": str(recording.path),
        "subject": recording.subject,
        "session": recording.session,
        "run": recording.run,
        "channels": len(eeg_channels(trials.info)),
        "Hz": float(trials.info["sfreq"]),
        "seconds": round(len(trials) * len(trials.times) / trials.info["sfreq"], 1),
        "events": events if as_json else ", ".join(f"{name} {count}" for name, count in events.items()),
        "problems": notes if as_json else "; ".join(notes),
    }


def _sentence(name: str, score: dict[str, Any]) -> str:
    verdict = "at or above" if score["accuracy"] >= score["chance_bound"] else "below"
    marked = f" ({score['marked']}: too good)" if "marked" in score else ""
    return (
        f"{name} accuracy {score['accuracy']:.3f} (95 % interval {score['low']:.3f} to {score['high']:.3f}), "
        f"balanced {score['balanced_accuracy']:.3f}, kappa {score['kappa']:.3f}; "
        f"{verdict} the chance bound of {score['chance_bound']:.3f}{marked}"
    )


def _targets(recordings: list[Recording], folder: Path) -> dict[tuple[Path, str], Path]:
    """Where each recording's table goes; where file names are not unique, subject and session stand before them."""
    names = [recording.path.name for recording in recordings]
    targets = {}
    for recording in recordings:
        name = recording.path.name.split(".")[0]
        if names.count(recording.path.name) > 1:
            name = f"{recording.subject}_{recording.session}_{name}"
        targets[recording.path, recording.session] = folder / f"{name}_predictions.tsv"
    return targets
