"""`nearfar motor-imagery`: inspect recordings, train a decoder, evaluate decoders fairly, predict, report."""

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import typer

from nearfar.apps.motor_imagery import pages
from nearfar.core.cli.batch import raise_failures, run_batch
from nearfar.core.cli.console import console, messages, progress, say, table
from nearfar.core.cli.options import Device, Fresh, Json, RunFolder, Settings, recipe_option
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.made_from import MadeFrom, model_digest
from nearfar.core.model_folder import TrainedOn
from nearfar.core.recipes import read_recipe
from nearfar.eeg import metrics, plots
from nearfar.eeg.annotations import Events, event_classes, event_counts
from nearfar.eeg.comparison import compare
from nearfar.eeg.conventions import EEGMMIDB_FILE, is_bciciv2a_file
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.decoding import NetworkClassifier, Recipe
from nearfar.eeg.evaluation import Results
from nearfar.eeg.leakage import check_split, trial_digests
from nearfar.eeg.live.scores import pseudo_online, stream_error
from nearfar.eeg.live.stream import Rule, decode
from nearfar.eeg.models.agtcnet import AGTCNet
from nearfar.eeg.preprocessing import PRESETS, Preprocessing
from nearfar.eeg.protocols import PROTOCOLS, Split, validation_split
from nearfar.eeg.recordings import SAMPLE, Recording, bad_channels, eeg_channels, find_recordings, select_channels
from nearfar.eeg.trials import load_trials, trials_array

if TYPE_CHECKING:
    from mne import BaseEpochs
    from mne.io import BaseRaw

app = typer.Typer(
    help="Decode imagined movements from EEG. Start with `inspect FOLDER` to see what your files hold, compare "
    "decoders with `evaluate`, make one with `train`, use it with `predict`.\n\n"
    "Reads EDF, BDF, GDF, BrainVision, EEGLAB, FIF and all else that MNE reads. The runs of EEGMMIDB and of BCI "
    "Competition IV 2a are known by name; for others say what the events mean: `--event left_hand=769`.",
    no_args_is_help=True,
)


class Standardization(StrEnum):
    exponential_moving = "exponential-moving"
    trial = "trial"


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

Paths = Annotated[list[Path], typer.Argument(help="Recordings, or folders that are searched for recordings.")]
Event = Annotated[
    list[str] | None,
    typer.Option("--event", help="What an event means: CLASS=NAME or CLASS=NAME,NAME. Repeat for each class."),
]
Classes = Annotated[str | None, typer.Option(help="Only these classes, e.g. left_hand,right_hand.")]
Runs = Annotated[str | None, typer.Option(help="Only these runs, e.g. 4,8,12.")]
Subjects = Annotated[str | None, typer.Option(help="Only these subjects, e.g. S001,S002.")]
Channels = Annotated[
    str | None, typer.Option(help="Only these channels, in this order: C3,Cz,C4; or `common`: those all files have.")
]
Interpolate = Annotated[
    bool, typer.Option("--interpolate", help="Compute missing and bad channels from their neighbours (splines).")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Go on without recordings that cannot be used; each is named.")
]
Unit = Annotated[str | None, typer.Option(help="Unit of the file's numbers where it does not say: V, mV, uV, nV.")]
Window = Annotated[
    tuple[float, float] | None, typer.Option(help="Window around the cue in seconds. (default: the preset's, or 0 3)")
]
Band = Annotated[tuple[float, float] | None, typer.Option(help="Band-pass in Hz, e.g. 4 38. (default: as recorded)")]
Notch = Annotated[float | None, typer.Option(help="Remove this mains frequency and its harmonics, in Hz.")]
Resample = Annotated[float | None, typer.Option("--resample", help="Resample to this rate, in Hz.")]
Standardize = Annotated[Standardization | None, typer.Option(help="Standardise each channel. (default: no)")]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="What the paper did: preprocessing trial by trial and, in `evaluate`, the choice of weights on the test "
        "set; results are labelled so. Without it the continuous recording is filtered, and nothing is chosen on test "
        "data.",
    ),
]
RecipeFile = Annotated[str | None, recipe_option()]


@app.command()
def inspect(paths: Paths, unit: Unit = None, as_json: Json = False) -> None:
    """Say what recordings hold: subjects, channels, rate, events, and what is wrong with them."""

    def look(recording: Recording) -> dict[str, Any]:
        if recording.trials is not None:
            return _look_at_trials(recording, as_json)
        raw = recording.read(unit=unit)
        eeg = eeg_channels(raw.info)
        placed = sum(not np.isnan(raw.info["chs"][pick]["loc"][:3]).any() for pick in eeg)
        problems = [f"{name} {why}" for name, why in bad_channels(raw).items()]
        if placed < len(eeg):
            problems.append(f"{len(eeg) - placed} channels without position")
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

    found = find_recordings(paths)
    rows, failures = run_batch(found, look, "reading", name=lambda recording: str(recording.path))
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
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
    window: Window = None,
    band: Band = None,
    notch: Notch = None,
    resample: Resample = None,
    standardize: Standardize = None,
    published: Published = False,
    recipe: RecipeFile = None,
    settings: Settings = None,
    device: Device = "auto",
    fresh: Fresh = False,
) -> None:
    """Train a decoder and write it to a folder that `predict` needs alone.

    The validation trials (whole subjects where there are several, else the latest trials of each class) choose the
    epoch; the test recordings are looked at once, at the end.
    """
    training = read_recipe(Recipe, recipe, settings or ())
    recordings = _select(find_recordings(paths), runs, subjects)
    held_out = find_recordings(test) if test else []
    if test_runs:
        held_out += [recording for recording in recordings if recording.run in test_runs.split(",")]
        recordings = [recording for recording in recordings if recording.run not in test_runs.split(",")]
    preprocessing = _preprocessing(recordings, window, band, notch, resample, standardize, published)
    options = {
        "events": _events(event),
        "interpolate": interpolate,
        "skip_bad": skip_bad,
        "unit": unit,
        "preprocessing": preprocessing,
    }
    epochs = _trials(recordings, classes, channels=_channels(channels), **options)
    X, y, names = trials_array(epochs)
    learn, choose = validation_split(epochs.metadata, y, np.arange(len(y)), validation, training.seed)
    tested = None
    if held_out:
        tested = _trials(held_out, ",".join(names), channels=epochs.ch_names, **options)
        X_test, y_test, _ = trials_array(tested)
        check_split(
            Split("train", "the test recordings", learn, choose, np.arange(len(y_test)) + len(y), (), ()),
            pd.concat([epochs.metadata, tested.metadata], ignore_index=True),
            trial_seconds=X.shape[2] / epochs.info["sfreq"],
            digests=trial_digests(np.concatenate([X, X_test])),
        )
    classifier = NetworkClassifier(
        training,
        epochs.info,
        output / "training",
        device=device,
        show_progress=messages.is_terminal,
        fresh=fresh,
    )
    messages.print(f"training {training.network} on {len(learn)} trials, {len(choose)} choose the epoch ...")
    fit = classifier.fit
    if start is not None:
        classifier.classes_, classifier.network_ = np.unique(y), _start(start, epochs, names, training)
        fit = classifier.fine_tune
    fit(X[learn], y[learn], X[choose], y[choose])
    best = max(range(len(classifier.history_)), key=lambda epoch: classifier.history_[epoch]["val_accuracy"])
    scores: dict[str, Any] = {
        "trials": {"train": len(learn), "validation": len(choose)},
        "epochs": len(classifier.history_),
        "best_epoch": best,
        "validation_accuracy": classifier.history_[best]["val_accuracy"],
    }
    console.print(
        f"validation accuracy {scores['validation_accuracy']:.3f} at epoch {best} (it chose the epoch: too good)"
    )
    if tested is not None:
        scores["test"] = _score(y_test, classifier.predict(X_test), len(names))
        scores["trials"]["test"] = len(y_test)
        console.print(_sentence("test", scores["test"]))
    decoder = Decoder(
        classifier.network_,
        names,
        preprocessing,
        epochs.ch_names,
        {
            "sfreq": float(epochs.info["sfreq"]),
            "recipe": vars(training),
            "files": sorted(set(epochs.metadata["file"])),
            "start": None if start is None else str(start),
            "history": classifier.history_,
        },
        scores,
        TrainedOn.of(digest.hex() for digest in trial_digests(X)),
    )
    decoder.save(output)
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
    window: Window = None,
    band: Band = None,
    notch: Notch = None,
    resample: Resample = None,
    standardize: Standardize = None,
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
    recordings = _select(find_recordings(paths), runs, subjects)
    preprocessing = _preprocessing(recordings, window, band, notch, resample, standardize, published)
    epochs = _trials(
        recordings,
        classes,
        events=_events(event),
        channels=_channels(channels),
        interpolate=interpolate,
        skip_bad=skip_bad,
        unit=unit,
        preprocessing=preprocessing,
    )
    wide = None
    if all(recording.trials is None for recording in recordings):
        settings_of_maps = replace(preprocessing, tmin=-1.0, order="continuous", standardization=None)
        wide = load_trials(
            recordings, preprocessing=settings_of_maps, events=_events(event), channels="common", unit=unit, failures=[]
        )
        wide = wide[list(epochs.event_id)]
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
    decoder: Annotated[Path, typer.Argument(help="Decoder folder, as `train` writes it.")],
    paths: Paths,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for one table (TSV, like BIDS events) per recording.")
    ] = Path("predictions"),
    event: Event = None,
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
    check: Annotated[
        bool, typer.Option("--check", help="Decode also as a live stream would, and print how far the two differ.")
    ] = False,
) -> None:
    """Decode recordings with a trained decoder: at their events, or all along (`--every 0.5`).

    Writes one table per recording with onset, duration, the predicted class (trial_type) and all probabilities; where
    the events' classes are known also the true class. With --every commands are scored by the events (hits, false
    activations, latency, bits per minute) and drawn. Recordings that have a table already, made by the same decoder
    with the same options, are passed over.
    """
    model, of_model = Decoder.load(decoder), model_digest(decoder)
    options = {"event": event, "every": every, "threshold": threshold, "smoothing": smoothing, "dwell": dwell}
    options |= {"interpolate": interpolate, "unit": unit}
    found = find_recordings(paths)
    targets = _targets(found, output)
    rule = Rule(threshold=threshold, smoothing=smoothing, dwell=dwell)

    def read_out(recording: Recording) -> dict[str, Any] | None:
        target = targets[recording.path, recording.session]
        made = MadeFrom(target, _files_of(recording.path), of_model, **options, session=recording.session)
        if made.done():
            return None
        line: dict[str, Any] = {"file": str(recording.path)}
        if every is None:
            rows = _decode_trials(model, recording, _events(event), threshold, interpolate, unit)
        else:
            raw = _continuous(model, recording, interpolate, unit)
            step = max(1, round(every * model.sfreq))
            rows, scores = _decode_all_along(model, recording, raw, _events(event), step, rule, target)
            line |= {shown: scores[name] for name, shown in SCORES.items() if name in scores}
        with atomic_path(target) as temporary:
            rows.to_csv(temporary, sep="\t", index=False, float_format="%.6g")
        made.write()
        if every is None:
            line |= {name: int((rows["trial_type"] == name).sum()) for name in [*model.classes, "n/a"]}
        else:
            line["windows"] = len(rows)
        if "true" in rows:
            line["accuracy"] = float((rows["true"] == rows["trial_type"]).mean())
        if check:
            raw = raw if every is not None else _continuous(model, recording, interpolate, unit)
            step = max(1, round((every or 0.5) * model.sfreq))
            line["streamed - whole"] = stream_error(
                model, raw.get_data() * 1e6, model.network.n_times, step, model.sfreq, rule=rule
            )
        return line

    lines, failures = run_batch(found, read_out, "decoding", name=lambda recording: str(recording.path))
    if done := [line for line in lines if line]:
        console.print(table(done))
    if skipped := len(lines) - len(done):
        console.print(f"{skipped} recordings had their tables already")
    console.print(f"tables: {output}", soft_wrap=True)
    raise_failures(failures, len(found))


def _files_of(path: Path) -> list[Path]:
    """A recording's files: some formats keep signals, markers and events beside the one that is named."""
    start = path.stem.removesuffix("_eeg")
    beside = {p for p in path.parent.iterdir() if p.is_file() and p.name.startswith(start)}
    return sorted({path, *(p for p in beside if "_predictions" not in p.name)})


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` or `train` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Put several evaluations and decoders on one page."""
    console.print(f"the report: {pages.combined_page(folders).write(output)}", soft_wrap=True)


def _look_at_trials(recording: Recording, as_json: bool) -> dict[str, Any]:
    trials = recording.trials
    events = {name: int((trials.events[:, 2] == code).sum()) for name, code in trials.event_id.items()}
    return {
        "file": str(recording.path),
        "subject": recording.subject,
        "session": recording.session,
        "run": recording.run,
        "channels": len(trials.ch_names),
        "Hz": float(trials.info["sfreq"]),
        "seconds": round(len(trials) * len(trials.times) / trials.info["sfreq"], 1),
        "events": events if as_json else ", ".join(f"{name} {count}" for name, count in events.items()),
        "problems": [] if as_json else "",
    }


# What the commands share ----------------------------------------------------------------------------------------------


def _select(recordings: list[Recording], runs: str | None, subjects: str | None) -> list[Recording]:
    for name, wanted in (("run", runs), ("subject", subjects)):
        if wanted is not None:
            there = sorted({getattr(recording, name) for recording in recordings})
            if unknown := [value for value in wanted.split(",") if value not in there]:
                raise UserError(f"--{name}s: no recording of {name} {', '.join(unknown)}; there are {', '.join(there)}")
            recordings = [recording for recording in recordings if getattr(recording, name) in wanted.split(",")]
    return recordings


def _events(given: list[str] | None) -> dict[str, list[str]] | None:
    if not given:
        return None
    events: dict[str, list[str]] = {}
    for text in given:
        cls, sign, names = text.partition("=")
        if not (cls and sign and names):
            raise UserError(f"--event {text}: write CLASS=NAME, for example left_hand=769")
        events.setdefault(cls, []).extend(names.split(","))
    return events


def _channels(given: str | None) -> Any:
    return given if given in (None, "common") else given.split(",")


def _preprocessing(
    recordings: list[Recording],
    window: tuple[float, float] | None,
    band: tuple[float, float] | None,
    notch: float | None,
    resample: float | None,
    standardize: Standardization | None,
    published: bool,
) -> Preprocessing:
    """The preset of a known set, or a window of 3 s, with what the options change."""
    values: dict[str, Any] = {}
    for name, belongs in (
        ("eegmmidb", lambda path: EEGMMIDB_FILE.search(path.name)),
        ("bciciv2a", is_bciciv2a_file),
        (SAMPLE, lambda path: str(path) == SAMPLE),
    ):
        if all(belongs(recording.path) for recording in recordings):
            values = dict(PRESETS[name])
    if window is not None:
        values |= {"tmin": window[0], "tmax": window[1]}
    if band is not None:
        values |= {"l_freq": band[0] or None, "h_freq": band[1]}
    if notch is not None:
        values["notch"] = notch
    if resample is not None:
        values["sfreq"] = resample
    if standardize is not None:
        values["standardization"] = standardize.value
    if published:
        values["order"] = "published"
    return Preprocessing(**values)


def _trials(recordings: list[Recording], classes: str | None, *, skip_bad: bool, **options: Any) -> "BaseEpochs":
    """Trials of all recordings, of the classes asked for; says how many there are."""
    if classes is not None and options["events"] is None:
        # a run whose known events are all of other classes has nothing to give
        wanted = set(classes.split(","))
        recordings = [r for r in recordings if r.events is None or wanted & set(r.events)] or recordings
    failures: list[tuple[Recording, UserError]] | None = [] if skip_bad else None
    epochs = load_trials(recordings, failures=failures, **options)
    for _, error in failures or ():
        say("left out:", str(error), "yellow")
    if classes is not None:
        if unknown := [name for name in classes.split(",") if name not in epochs.event_id]:
            raise UserError(f"--classes: no trials of {', '.join(unknown)}; there are {', '.join(epochs.event_id)}")
        epochs = epochs[classes.split(",")]
        epochs.event_id = {name: epochs.event_id[name] for name in classes.split(",")}
    if len(epochs.event_id) < 2:
        raise UserError(
            f"{recordings[0].path}{' and others' if len(recordings) > 1 else ''}: only one class, "
            f"{next(iter(epochs.event_id))}; a decoder needs two: add recordings of the others or name their events"
        )
    counts = {name: int((epochs.events[:, 2] == code).sum()) for name, code in epochs.event_id.items()}
    messages.print(
        f"{len(epochs)} trials ({', '.join(f'{name} {count}' for name, count in counts.items())}), "
        f"{len(epochs.ch_names)} channels x {len(epochs.times)} samples at {epochs.info['sfreq']:g} Hz",
        highlight=False,
    )
    return epochs


def _start(path: Path, epochs: "BaseEpochs", classes: list[str], recipe: Recipe) -> Any:
    """The network to fine-tune, checked against the trials it is to learn from."""
    if path.is_dir():
        decoder = Decoder.load(path)
        if decoder.ch_names != epochs.ch_names:
            raise UserError(
                f"{path}: was trained on {', '.join(decoder.ch_names)}, these recordings have "
                f"{', '.join(epochs.ch_names)}; choose them with --channels {','.join(decoder.ch_names)}"
            )
        if decoder.classes != classes or decoder.network.n_times != len(epochs.times):
            raise UserError(
                f"{path}: decodes {', '.join(decoder.classes)} from {decoder.network.n_times} samples, these trials "
                f"are {', '.join(classes)} of {len(epochs.times)} samples; choose the same --classes, --window and "
                "--resample"
            )
        return decoder.network
    if recipe.network != "AGTCNet":
        raise UserError(f"{path}: published weights are of AGTCNet, the recipe's network is {recipe.network}")
    return AGTCNet.from_published(path, chs_info=epochs.info["chs"], n_times=len(epochs.times), n_outputs=len(classes))


def _score(y_true: np.ndarray, y_pred: np.ndarray, n_classes: int) -> dict[str, float]:
    share = metrics.accuracy(y_true, y_pred)
    low, high = metrics.proportion_interval(share, len(y_true))
    return {
        "accuracy": share,
        "low": low,
        "high": high,
        "kappa": metrics.kappa(y_true, y_pred),
        "chance": 1 / n_classes,
        "chance_bound": metrics.chance_bound(len(y_true), n_classes),
    }


def _sentence(name: str, score: dict[str, float]) -> str:
    verdict = "at or above" if score["accuracy"] >= score["chance_bound"] else "below"
    return (
        f"{name} accuracy {score['accuracy']:.3f} (95 % interval {score['low']:.3f} to {score['high']:.3f}), "
        f"kappa {score['kappa']:.3f}; {verdict} the chance bound of {score['chance_bound']:.3f}"
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


def _decode_trials(
    model: Decoder,
    recording: Recording,
    events: Events | None,
    threshold: float,
    interpolate: bool,
    unit: str | None,
) -> pd.DataFrame:
    epochs = load_trials(
        recording,
        preprocessing=model.preprocessing,
        events=events,
        channels=model.ch_names,
        interpolate=interpolate,
        unit=unit,
    )
    X, y, names = trials_array(epochs)
    probabilities = model.predict_proba(X)
    rows = _rows(model, epochs.metadata["onset"].to_numpy(), probabilities, threshold)
    if set(names) <= set(model.classes):
        rows["true"] = [names[index] for index in y]
    return rows


def _continuous(model: Decoder, recording: Recording, interpolate: bool, unit: str | None) -> "BaseRaw":
    if model.preprocessing.order == "published":
        raise UserError("the decoder preprocesses trial by trial (published order), which needs events: drop --every")
    if model.preprocessing.standardization == "trial":
        raise UserError("the decoder standardises each trial by itself, which needs events; drop --every")
    return model.preprocessing.apply(select_channels(recording.read(unit=unit), model.ch_names, interpolate))


def _decode_all_along(
    model: Decoder,
    recording: Recording,
    raw: "BaseRaw",
    events: Events | None,
    step: int,
    rule: Rule,
    target: Path,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Decisions for the table; scores and a picture where the events' classes are known."""
    n_times, sfreq = model.network.n_times, model.sfreq
    known = events or recording.events or {name: name for name in model.classes}
    marks = {name: model.classes.index(cls) for name, cls in event_classes(known).items() if cls in model.classes}
    there = set(event_counts(raw))
    scores: dict[str, float] = {}
    if there & set(marks):
        decisions, scores, found = pseudo_online(
            model,
            raw,
            marks,
            n_times,
            step,
            duration=model.preprocessing.tmax + n_times / sfreq / 2,
            n_classes=len(model.classes),
            rule=rule,
        )
        with atomic_path(target.with_name(target.name.replace(".tsv", ".png"))) as temporary:
            plots.online_timeline(decisions, found, model.classes).savefig(temporary, dpi=120, bbox_inches="tight")
    else:
        decisions = decode(model, raw.get_data() * 1e6, n_times, step, sfreq, rule=rule)
    rows = _rows(model, decisions.times - n_times / sfreq, decisions.probabilities, rule.threshold)
    rows["command"] = [model.classes[k] if k != metrics.NO_DECISION else "n/a" for k in decisions.commands]
    return rows, scores


def _rows(model: Decoder, onsets: np.ndarray, probabilities: np.ndarray, threshold: float) -> pd.DataFrame:
    answers = [model.classes[row.argmax()] if row.max() >= threshold else "n/a" for row in probabilities]
    columns = {"onset": onsets, "duration": model.network.n_times / model.sfreq, "trial_type": answers}
    return pd.DataFrame(columns | {f"p_{name}": probabilities[:, i] for i, name in enumerate(model.classes)})
