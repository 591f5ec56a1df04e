"""From a continuous recording to trials: filter, resample, reference, standardize, cut.

`Preprocessing` holds the settings and is all that a model needs to treat new recordings as those it was trained on.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import mne
import numpy as np
import pandas as pd
from scipy import signal

from nearfar.core.errors import UserError
from nearfar.eeg.alignment import ALIGNMENTS, EXPONENTIAL_MOVING, ExponentialMovingStandardizer, StreamAlignment, carry
from nearfar.eeg.annotations import (
    EDGES,
    Events,
    annotate,
    annotation_names,
    annotations,
    event_classes,
    event_counts,
    is_bad,
    is_edge,
    quiet,
    segments,
    source_name,
)
from nearfar.eeg.conventions import bipolar_pair, known_set
from nearfar.eeg.live.steps import AverageReference, CausalDecimator, CausalFilter, ChannelReference, Step

logger = logging.getLogger("nearfar.eeg")

_BREAKS = (*EDGES, "-99", "bad_acq_skip")
"""Annotations at which a filter begins anew."""

PRESETS: dict[str, dict[str, Any]] = {
    "bciciv2a": {"tmin": 0.0, "tmax": 3.0, "sfreq": 125.0},
    "bciciv2a-long": {"tmin": -0.5, "tmax": 4.0, "sfreq": 125.0},
    "eegmmidb": {"tmin": 0.0, "tmax": 4.0, "sfreq": 160.0},
    "finger-movements": {"tmin": -0.63, "tmax": -0.13, "sfreq": 200.0},
}
"""Windows and rates: those of the published AGTCNet configurations (375, 562 and 640
samples), and the whole trials of `nearfar.eeg.samples` at twice their rate, since AGTCNet needs 65 samples (100)."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Settings of the way from a recording to trials; all plain values, so that it goes through JSON unchanged.

    tmin, tmax: window around the cue in seconds, floor((tmax - tmin) sfreq) samples from tmin on, tmax not included.
    l_freq, h_freq: band-pass in Hz, MNE's zero-phase FIR filter; None leaves that side open.
    notch: mains frequency in Hz, removed with its harmonics.
    sfreq: rate to resample to, in Hz; None keeps the recording's.
    reference: "average" (over the channels kept), names of channels (dropped afterwards), None as recorded, or "auto":
        the average of 8 electrodes or more, none of them bipolar, and as recorded where there are fewer: the mean of a
        few neighbours holds the very signal that it is to be taken from.
    standardization: "exponential-moving" (causal, over the recording, see `alignment`), "trial" (each channel of each
        trial to mean 0 and deviation 1) or None. A standard deviation is stored as 1 microvolt, so that
        `trials_array` gives unit variance.
    alignment: "euclidean" or "riemannian": samples are whitened by the covariance of the recording so far (causal, no
        labels, see `alignment.StreamAlignment`), which makes days and people alike; they then have unit variance.
    order: "continuous" filters the recording, each piece between edges (joined runs, EEGLAB's boundary) by itself, and
        cuts afterwards. "published" is AGTCNet's own order, trial by
        trial: cut; where the rate changes, low-pass at the new Nyquist frequency (Butterworth, order 12, forward and
        backward, in transfer-function form) and FFT resampling; average reference. It has neither band-pass, notch nor
        standardization, and the ends of each trial carry the filter's transients.
    causal: no sample depends on later ones: `causal_steps` take the place of filters of zero phase, and begin anew
        after each edge. What is trained so sees on a live stream the very samples that it was trained on.
    """

    tmin: float = 0.0
    tmax: float = 3.0
    l_freq: float | None = None
    h_freq: float | None = None
    notch: float | None = None
    sfreq: float | None = None
    reference: Literal["auto", "average"] | tuple[str, ...] | None = "auto"
    standardization: Literal["exponential-moving", "trial"] | None = None
    alignment: Literal["euclidean", "riemannian"] | None = None
    order: Literal["continuous", "published"] = "continuous"
    causal: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.reference, list):  # as JSON gives a tuple back
            object.__setattr__(self, "reference", tuple(self.reference))
        if not self.tmin < self.tmax:
            raise UserError(f"tmin {self.tmin} s must be before tmax {self.tmax} s")
        for name in ("l_freq", "h_freq", "notch", "sfreq"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive or None, not {value}")
        if self.l_freq and self.h_freq and not self.l_freq < self.h_freq:
            raise UserError(f"l_freq {self.l_freq:g} Hz must be below h_freq {self.h_freq:g} Hz")
        if isinstance(self.reference, str) and self.reference not in ("auto", "average"):
            raise UserError(
                f"reference must be 'auto', 'average', a tuple of channel names or None, not {self.reference!r}"
            )
        if self.standardization not in (None, "exponential-moving", "trial"):
            raise UserError(
                f"standardization must be 'exponential-moving', 'trial' or None, not {self.standardization!r}"
            )
        if self.alignment not in (None, *ALIGNMENTS):
            raise UserError(f"alignment must be one of {', '.join(ALIGNMENTS)} or None, not {self.alignment!r}")
        if self.order not in ("continuous", "published"):
            raise UserError(f"order must be 'continuous' or 'published', not {self.order!r}")
        if self.causal and (self.order == "published" or self.standardization == "trial"):
            raise UserError("treating trials one by one needs all of a trial; it has no causal form")
        if self.order == "published":
            names = ("l_freq", "h_freq", "notch", "standardization", "alignment")
            extra = [name for name in names if getattr(self, name) is not None]
            if extra or isinstance(self.reference, tuple):
                raise UserError(
                    f"the published order has no {', '.join(extra) or 'named reference'}; "
                    "leave that out or use order='continuous'"
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The settings of one of `PRESETS`, with `changes`."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | changes)

    @classmethod
    def for_files(cls, paths: Iterable[Path], **changes: Any) -> Self:
        """The preset of the known set that all files are of, else a window of 3 s, with `changes`."""
        names = {known_set(path) for path in paths}
        preset = PRESETS.get(names.pop() or "", {}) if len(names) == 1 else {}
        return cls(**preset | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings in `values`; an unknown name is a `UserError`."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"preprocessing has no setting {', '.join(sorted(unknown))}")
        return cls(**values)

    def averages(self, ch_names: Sequence[str]) -> bool:
        """Whether channels of these names get the average reference."""
        if self.reference != "auto":
            return self.reference == "average"
        return len(ch_names) >= 8 and not any(bipolar_pair(name) for name in ch_names)

    @property
    def looks_ahead(self) -> bool:
        """Whether a recording's samples depend on later ones, so that those of a stream are others."""
        return not self.causal and any((self.l_freq, self.h_freq, self.notch, self.sfreq))

    def causal_steps(self, sfreq: float, ch_names: Sequence[str], first: int = 0) -> list[Step]:
        """Steps that do causally, on samples of `ch_names` at `sfreq`, what these settings do on a whole recording.

        Butterworth filters take the place of those of zero phase, and decimation that of FFT resampling; so the samples
        are not the same. `ch_names` hold the channels of a named reference too, `first` is the number of the first
        sample. Raises UserError for what has no causal form: another rate than a whole fraction, the published order
        and the standardization of each trial.
        """
        if self.order == "published" or self.standardization == "trial":
            raise UserError("the decoder preprocesses trial by trial, which needs events; it cannot decode a stream")
        wanted = self.sfreq or sfreq
        factor = round(sfreq / wanted)
        if factor < 1 or abs(sfreq / factor - wanted) > 1e-6 * wanted:
            raise UserError(
                f"a stream of {sfreq:g} Hz has no whole fraction of {wanted:g} Hz; use a decoder of another rate"
            )
        steps: list[Step] = []
        if self.notch:
            steps.append(CausalFilter.notch(sfreq, self.notch))
        if self.l_freq or self.h_freq:
            steps.append(CausalFilter.band(sfreq, self.l_freq, self.h_freq))
        if factor > 1:
            steps.append(CausalDecimator(factor, first))
        if isinstance(self.reference, tuple):
            if missing := [name for name in self.reference if name not in ch_names]:
                raise UserError(
                    f"the stream has no reference channel {', '.join(missing)}; it has {', '.join(ch_names)}"
                )
            steps.append(ChannelReference([list(ch_names).index(name) for name in self.reference]))
        elif self.averages(ch_names):
            steps.append(AverageReference())
        if self.standardization == "exponential-moving":
            steps.append(ExponentialMovingStandardizer())
        if self.alignment is not None:
            steps.append(self._aligner(wanted))
        return steps

    def _aligner(self, sfreq: float) -> StreamAlignment:
        if self.alignment is None:
            raise ValueError("these settings have no alignment")
        return StreamAlignment(self.alignment, max(2, round(sfreq)))  # blocks of 1 s

    def n_times(self, sfreq: float | None = None) -> int:
        """Samples of a trial; `sfreq` is the recording's rate, needed where the settings keep it."""
        rate = self.sfreq or sfreq
        if rate is None:
            raise ValueError("these settings keep the recording's sampling rate: give sfreq")
        return int((self.tmax - self.tmin) * rate + 1e-6)

    def apply(self, raw: mne.io.BaseRaw) -> mne.io.BaseRaw:
        """A preprocessed copy of a recording, EEG channels only; in the published order only gaps are filled.

        Raises `UserError` for channels with NaN, for a sampling rate too low for the settings and for a recording
        shorter than the filter.
        """
        raw = raw.copy().load_data(verbose="ERROR").pick("eeg", exclude=(), verbose="ERROR")
        self._check_rate(raw)
        with quiet():
            fill_gaps(raw, hold=self.causal)
            edges = np.array([is_edge(name) for name in annotation_names(raw)], dtype=bool)
            raw.annotations.duration[edges] = 0  # else MNE leaves that long unfiltered
            if self.order == "published":
                return raw
            if self.causal:
                return self._causally(raw)
            rate = raw.info["sfreq"]
            if self.notch:
                lines = np.arange(self.notch, rate / 2, self.notch)
                raw.notch_filter(lines, picks="all", skip_by_annotation=_BREAKS)
            if self.l_freq or self.h_freq:
                needed = 3.3 / min(max(self.l_freq / 4, 2.0), self.l_freq) if self.l_freq else 0.0
                longest = max(stop - start for start, stop in segments(raw))
                if longest / rate < needed:
                    raise UserError(
                        f"{source_name(raw)}: {longest / rate:.1f} s are too short for l_freq {self.l_freq:g} Hz, "
                        f"whose filter spans {needed:.1f} s; raise or drop l_freq"
                    )
                raw.filter(self.l_freq, self.h_freq, picks="all", skip_by_annotation=_BREAKS)
            if self.sfreq and self.sfreq != rate:
                raw.resample(self.sfreq)
            self._rereference(raw)
        if self.standardization == "exponential-moving":
            with quiet():  # slow to import, seldom needed
                from braindecode.preprocessing import exponential_moving_standardize

            standardize = partial(exponential_moving_standardize, **EXPONENTIAL_MOVING)
            raw.apply_function(lambda volts: standardize(volts * 1e6) * 1e-6, picks="all", channel_wise=False)
        if self.alignment is not None:
            with quiet():
                self._through(raw, lambda start: [self._aligner(raw.info["sfreq"])])
        return raw

    def cut(self, raw: mne.io.BaseRaw, events: Events) -> mne.EpochsArray:
        """Trials of `raw`, which has been through `apply`; `metadata.onset` is the cue's time from the recording's
        start in seconds.

        events: class -> annotation name(s); classes get the codes 1, 2, ... in this order. Cues whose window leaves the
        recording, touches an annotation BAD... or crosses an edge are left out, as is a cue that stands there twice,
        which the log says. Raises `UserError` where no cue is left, listing the names that exist, and for cues of two
        classes at one sample.
        """
        rate = raw.info["sfreq"]
        if self.order == "continuous" and self.sfreq not in (None, rate):
            raise ValueError(f"the recording has {rate:g} Hz, not {self.sfreq:g}: put it through apply first")
        names = event_classes(events)
        onsets, durations, descriptions = annotations(raw)
        chosen = np.isin(descriptions, list(names))
        if not chosen.any():
            raise UserError(
                f"{source_name(raw)}: none of the events {', '.join(names)}; it has "
                + (", ".join(f"{name} ({n})" for name, n in event_counts(raw).items()) or "no events at all")
            )
        length = int((self.tmax - self.tmin) * rate + 1e-6)
        starts = np.rint(onsets[chosen] * rate).astype(int) + round(self.tmin * rate)
        bad = np.array([is_bad(name) for name in descriptions], dtype=bool)
        touched = (
            (starts[:, None] < (onsets + durations)[bad] * rate) & (starts[:, None] + length > onsets[bad] * rate)
        ).any(axis=1)
        edges = np.array([start for start, _ in segments(raw)[1:]], dtype=int)
        touched |= ((starts[:, None] < edges) & (starts[:, None] + length > edges)).any(axis=1)
        outside = (starts < 0) | (starts + length > raw.n_times)
        asked = np.array([names[name] for name in descriptions[chosen]])
        twice = _repeated(starts, asked, source_name(raw), rate)
        kept = ~(outside | touched | twice)
        if not kept.all():
            logger.warning(
                "%s: %d of %d trials left out: %d leave the recording, %d touch a bad stretch or gap or cross an edge, "
                "%d are there twice",
                *(source_name(raw), (~kept).sum(), len(kept), outside.sum(), (touched & ~outside & ~twice).sum()),
                (twice & ~outside).sum(),
            )
        if not kept.any():
            raise UserError(
                f"{source_name(raw)}: each of the {len(kept)} trials from {self.tmin:g} to {self.tmax:g} s leaves the "
                "recording, touches a bad stretch or crosses an edge; choose another window"
            )
        codes = {cls: code for code, cls in enumerate(events, start=1)}
        classes = asked[kept]
        order = np.argsort(starts[kept], kind="stable")
        windows = starts[kept][order][:, None] + np.arange(length)
        data = raw.get_data(verbose="ERROR")[:, windows].transpose(1, 0, 2)
        marks = np.stack([windows[:, 0], np.zeros(len(windows), int), [codes[cls] for cls in classes[order]]], axis=1)
        return self._epochs(
            self._per_trial(data, rate, source_name(raw), raw.ch_names) if self.order == "published" else data,
            raw,
            marks,
            {cls: code for cls, code in codes.items() if cls in classes},
            pd.DataFrame({"onset": onsets[chosen][kept][order]}),
        )

    def apply_trials(self, epochs: mne.BaseEpochs) -> mne.EpochsArray:
        """Treat trials that were cut elsewhere, each by itself: window, rate, reference, standardization per trial.

        What takes a continuous recording (band-pass, notch, exponential moving standardization) is refused as a
        `UserError`, as is a window that the trials do not hold. The rate may go up as well, which adds nothing.
        """
        continuous = [name for name in ("l_freq", "h_freq", "notch") if getattr(self, name) is not None]
        continuous += ["causal"] if self.causal else []
        continuous += ["standardization"] if self.standardization == "exponential-moving" else []
        continuous += ["alignment"] if self.alignment is not None else []
        if continuous or isinstance(self.reference, tuple):
            raise UserError(
                f"{', '.join(continuous) or 'named reference'}: needs the recording, not trials cut from it"
            )
        rate = epochs.info["sfreq"]
        first, length = round((self.tmin - epochs.tmin) * rate), int((self.tmax - self.tmin) * rate + 1e-6)
        if first < 0 or first + length > len(epochs.times):
            raise UserError(
                f"trials from {epochs.tmin:g} to {epochs.tmin + len(epochs.times) / rate:g} s do not hold the window "
                f"from {self.tmin:g} to {self.tmax:g} s; choose one within"
            )
        eeg = epochs.copy().pick("eeg", exclude=())
        data = self._per_trial(eeg.get_data(copy=False)[:, :, first : first + length], rate, "trials", eeg.ch_names)
        return self._epochs(data, eeg, epochs.events, epochs.event_id, epochs.metadata)

    def _causally(self, raw: mne.io.BaseRaw) -> mne.io.BaseRaw:
        """`raw` through `causal_steps`, each piece between edges by itself."""
        rate, references = raw.info["sfreq"], self.reference if isinstance(self.reference, tuple) else ()
        if missing := [name for name in references if name not in raw.ch_names]:
            raise self._lacks(raw, missing)
        names, factor = list(raw.ch_names), round(rate / (self.sfreq or rate))
        return self._through(raw, lambda start: self.causal_steps(rate, names, start), factor, references)

    def _through(
        self,
        raw: mne.io.BaseRaw,
        steps_from: Callable[[int], list[Step]],
        factor: int = 1,
        references: Sequence[str] = (),
    ) -> mne.io.BaseRaw:
        """`raw` through steps that begin anew with each piece between edges; only an alignment goes on. A piece too
        short for a standardization or a first alignment becomes zero and BAD_short."""
        rate, data, parts, short = raw.info["sfreq"], raw.get_data(verbose="ERROR") * 1e6, [], []
        before: list[Step] = []
        for start, stop in segments(raw):
            part, steps = data[:, start:stop], steps_from(start)
            carry(before, steps)
            for step in steps:
                part = step.push(part) if part.shape[1] else part
            before = steps
            expected = -(-stop // factor) - -(-start // factor)
            if part.shape[1] < expected:
                short.append((start / rate, (stop - start) / rate))
                part = np.zeros((len(raw.ch_names) - len(references), expected))
            parts.append(part)
        raw.drop_channels(list(references))
        if factor > 1:
            raw.resample(self.sfreq, method="polyphase")  # for the sake of what goes with it; the samples are replaced
        result = np.concatenate(parts, axis=1)[:, : raw.n_times] * 1e-6
        raw.apply_function(lambda _: result, picks="all", channel_wise=False)
        if short:
            onsets, lengths = np.transpose(short)
            annotate(raw, onsets, lengths, ["BAD_short"] * len(short))
        return raw

    def _check_rate(self, raw: mne.io.BaseRaw) -> None:
        rate = raw.info["sfreq"]
        top = self.h_freq or (self.sfreq / 2 if self.sfreq and self.sfreq > rate else 0.0)
        top = max(top, self.notch or 0.0)
        if top >= rate / 2:
            raise UserError(
                f"{source_name(raw)}: sampled at {rate:g} Hz, which holds nothing above {rate / 2:g} Hz, and the "
                f"settings need {top:g} Hz; lower h_freq, notch or sfreq, or use another recording"
            )
        if self.sfreq and self.h_freq and self.h_freq >= self.sfreq / 2:
            raise UserError(f"h_freq {self.h_freq:g} Hz must be below half of sfreq {self.sfreq:g} Hz")

    def _rereference(self, raw: mne.io.BaseRaw) -> None:
        if self.averages(raw.ch_names):
            raw.set_eeg_reference("average", projection=False)
        if not isinstance(self.reference, tuple):
            return
        missing = [name for name in self.reference or () if name not in raw.ch_names]
        if missing:
            raise self._lacks(raw, missing)
        raw.set_eeg_reference(list(self.reference or ()))
        raw.drop_channels(list(self.reference or ()))

    @staticmethod
    def _lacks(raw: mne.io.BaseRaw, missing: list[str]) -> UserError:
        return UserError(
            f"{source_name(raw)}: no reference channel {', '.join(missing)}; it has {', '.join(raw.ch_names)}"
        )

    def _per_trial(self, data: np.ndarray, rate: float, name: str, names: list[str]) -> np.ndarray:
        if self.sfreq not in (None, rate):
            if self.order == "published" and self.sfreq < rate:
                b, a = signal.butter(12, self.sfreq / rate)
                if abs(np.roots(a)).max() >= 1 or abs(b.sum() / a.sum() - 1) > 1e-3:
                    raise UserError(
                        f"{name}: the published filter is unstable from {rate:g} to {self.sfreq:g} Hz (it was made for "
                        "250 to 125); use order='continuous'"
                    )
                data = signal.filtfilt(b, a, data, axis=-1)
            data = mne.filter.resample(data, up=self.sfreq, down=rate, npad="auto", window="boxcar", verbose="ERROR")
            data = data[..., : self.n_times()]
        return data - data.mean(axis=1, keepdims=True) if self.averages(names) else data

    def _epochs(
        self,
        data: np.ndarray,
        source: mne.io.BaseRaw | mne.BaseEpochs,
        marks: np.ndarray,
        event_id: dict[str, int],
        metadata: pd.DataFrame | None,
    ) -> mne.EpochsArray:
        if self.standardization == "trial":
            data = data - data.mean(axis=2, keepdims=True)
            data = 1e-6 * data / np.maximum(data.std(axis=2, keepdims=True), 1e-10)
        with quiet():
            info = source.info
            if self.sfreq not in (None, info["sfreq"]):
                info = mne.create_info(source.ch_names, self.sfreq, "eeg")
                info.set_montage(source.get_montage(), on_missing="ignore")
            return mne.EpochsArray(data, info, marks, tmin=self.tmin, event_id=event_id, metadata=metadata)


def _repeated(starts: np.ndarray, classes: np.ndarray, source: str, rate: float) -> np.ndarray:
    """Which cues stand at a sample that has one of their class already; `UserError` where it has one of another."""
    first: dict[int, int] = {}
    twice = np.zeros(len(starts), bool)
    for index, start in enumerate(starts.tolist()):
        other = first.setdefault(start, index)
        twice[index] = other != index
        if classes[other] != classes[index]:
            raise UserError(
                f"{source}: cues of {classes[other]} and {classes[index]} at one time, in the window from "
                f"{start / rate:.3f} s on; name the events of the classes alone (--event CLASS=NAME)"
            )
    return twice


def fill_gaps(raw: mne.io.BaseRaw, hold: bool = False) -> None:
    """Fill stretches of NaN that all EEG channels share by straight lines and mark them BAD_gap, in place; with `hold`
    by the sample before, which no later one alters.

    They stand between the runs that some files join, and a filter would spread them over everything. NaN in some
    channels only is a fault of these channels: `UserError`.
    """
    picks = mne.pick_types(raw.info, eeg=True, exclude=())
    empty = np.isnan(raw.get_data(picks, verbose="ERROR"))
    gap = empty.all(axis=0)
    faulty = (empty & ~gap).any(axis=1) | gap.all()
    if faulty.any():
        names = [raw.ch_names[pick] for pick in picks[faulty]]
        raise UserError(
            f"{source_name(raw)}: NaN in channel {', '.join(names)}; leave it out with channels= or interpolate it"
        )
    if not gap.any():
        return
    times = np.arange(raw.n_times)
    last = np.maximum.accumulate(np.where(gap, 0, times))
    raw.apply_function(
        lambda x: np.nan_to_num(x)[last] if hold else np.interp(times, times[~gap], x[~gap]), picks=picks
    )
    edges = np.flatnonzero(np.diff(np.concatenate([[False], gap, [False]])))
    starts, stops = edges[::2] / raw.info["sfreq"], edges[1::2] / raw.info["sfreq"]
    annotate(raw, starts, stops - starts, ["BAD_gap"] * len(starts))
