"""Options that the commands of the app share: which recordings, which trials of them, and how they are prepared."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearfar.core.cli.console import messages, say
from nearfar.core.errors import UserError
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Recording
from nearfar.eeg.trials import load_trials, select_classes

if TYPE_CHECKING:
    from mne import BaseEpochs


class Standardization(StrEnum):
    exponential_moving = "exponential-moving"
    trial = "trial"


class Alignment(StrEnum):
    euclidean = "euclidean"
    riemannian = "riemannian"


PATHS = "Recordings, or folders that are searched for recordings."
Paths = Annotated[list[Path], typer.Argument(help=PATHS)]
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
Rename = Annotated[list[str] | None, typer.Option("--rename", help="OLD=NEW: another name of a channel. Repeat.")]
Types = Annotated[
    list[str] | None,
    typer.Option("--types", help="CHANNEL=TYPE: eeg, eog, ecg, emg, stim or misc, where the file's is wrong. Repeat."),
]
Encoding = Annotated[
    str | None, typer.Option(help="Of the annotations' texts, e.g. latin1. (default: UTF-8, else Latin-1)")
]
SubjectPattern = Annotated[
    str | None,
    typer.Option(help="Regular expression for the subject in a path: '(P[0-9]+)_', or (?P<subject>...) ..."),
]
Reference = Annotated[
    str | None,
    typer.Option(help="auto, average, none, or channels: A1,A2. (default: average of 8 electrodes or more)"),
]
Window = Annotated[
    tuple[float, float] | None, typer.Option(help="Window around the cue in seconds. (default: the preset's, or 0 3)")
]
Band = Annotated[tuple[float, float] | None, typer.Option(help="Band-pass in Hz, e.g. 4 38. (default: as recorded)")]
Notch = Annotated[float | None, typer.Option(help="Remove this mains frequency and its harmonics, in Hz.")]
Resample = Annotated[float | None, typer.Option("--resample", help="Resample to this rate, in Hz.")]
Standardize = Annotated[Standardization | None, typer.Option(help="Standardize each channel. (default: no)")]
Whiten = Annotated[
    Alignment | None,
    typer.Option(help="Running alignment: whiten by the mean covariance of the recording so far. (default: no)"),
]
Causal = Annotated[
    bool,
    typer.Option(
        "--causal",
        help="Filter and resample without looking ahead, as on a live stream, which then gives the same decisions. "
        "(default: zero phase)",
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="What the paper did: preprocessing trial by trial and, in `evaluate`, the choice of weights on the test "
        "set; results are labelled so. Without it the continuous recording is filtered, and nothing is chosen on test "
        "data.",
    ),
]


def chosen_recordings(recordings: list[Recording], runs: str | None, subjects: str | None) -> list[Recording]:
    """Those of the named runs and subjects."""
    for name, wanted in (("run", runs), ("subject", subjects)):
        if wanted is not None:
            there = sorted({getattr(recording, name) for recording in recordings})
            if unknown := [value for value in wanted.split(",") if value not in there]:
                raise UserError(f"--{name}s: no recording of {name} {', '.join(unknown)}; there are {', '.join(there)}")
            recordings = [recording for recording in recordings if getattr(recording, name) in wanted.split(",")]
    return recordings


def reading(
    rename: list[str] | None, types: list[str] | None, encoding: str | None, unit: str | None
) -> dict[str, Any]:
    """How files are read, as `nearfar.eeg.recordings.Reading`."""
    return {
        "rename": _pairs("--rename", "OLD=NEW", rename),
        "types": _pairs("--types", "CHANNEL=TYPE", types),
        "encoding": encoding,
        "unit": unit,
    }


def _pairs(option: str, form: str, given: list[str] | None) -> dict[str, str] | None:
    pairs = {}
    for text in given or ():
        name, sign, value = text.rpartition("=")
        if not (name and sign and value):
            raise UserError(f"{option} {text}: write {form}, for example C3=eeg")
        pairs[name] = value
    return pairs or None


def event_names(given: list[str] | None) -> dict[str, list[str]] | None:
    """Class -> names of its events, as --event says."""
    if not given:
        return None
    events: dict[str, list[str]] = {}
    for text in given:
        cls, sign, names = text.partition("=")
        if not (cls and sign and names):
            raise UserError(f"--event {text}: write CLASS=NAME, for example left_hand=769")
        events.setdefault(cls, []).extend(names.split(","))
    return events


def channel_names(given: str | None) -> Any:
    """What --channels says."""
    return given if given in (None, "common") else given.split(",")


def preparation(
    recordings: list[Recording],
    window: tuple[float, float] | None,
    band: tuple[float, float] | None,
    notch: float | None,
    resample: float | None,
    standardize: Standardization | None,
    published: bool,
    reference: str | None = None,
    causal: bool = False,
    whiten: Alignment | None = None,
) -> Preprocessing:
    """The preset of a known set, or a window of 3 s, with what the options change."""
    values: dict[str, Any] = {"causal": True} if causal else {}
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
    if whiten is not None:
        values["alignment"] = whiten.value
    if reference is not None:
        known = {"auto": "auto", "average": "average", "none": None}
        values["reference"] = known[reference] if reference in known else tuple(reference.split(","))
    if published:
        values["order"] = "published"
    return Preprocessing.for_files([recording.path for recording in recordings], **values)


def chosen_trials(recordings: list[Recording], classes: str | None, *, skip_bad: bool, **options: Any) -> "BaseEpochs":
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
        epochs = select_classes(epochs, classes.split(","))
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
    if options["preprocessing"].reference == "auto" and not options["preprocessing"].averages(epochs.ch_names):
        messages.print("reference as recorded; --reference says otherwise", highlight=False)
    return epochs


def unadapted(scores: dict[str, Any]) -> str:
    """What the decoder that was adapted made of the trials before it learnt from them, as the end of a sentence."""
    found = scores.get("before")
    return f"; before adapting {found['accuracy']:.3f} of {found['trials']} trials" if found else ""
