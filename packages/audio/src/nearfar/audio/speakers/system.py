"""A speaker model with all that its scores need: mean vector, cohort, PLDA, calibration, and the trials it rests on."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nearfar.audio.speakers.encoders import Encoder, ForeignEncoder
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.scoring.backend import (
    PLDA,
    adaptive_s_norm,
    cohort_statistics,
    make_cohort,
    pair_scores,
    unit,
)
from nearfar.audio.speakers.scoring.calibration import QUALITY_NAMES, Calibration, draw_trials, quality_features
from nearfar.audio.speakers.scoring.rates import Rate, threshold_at_far
from nearfar.audio.speakers.scoring.trials import Array
from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.core.finite import check_finite
from nearfar.core.model_folder import AGAIN, KINDS, NEXT, TrainedOn, read, trained_on, writing
from nearfar.core.reading import read_arrays, read_json, reading

ENCODER = "encoder.json"
"""What a folder has in place of a model's weights where others made the encoder."""

LEAST_COHORT = 50
"""Rows below which a cohort is not used: the deviation of a few cosines says little."""


LEAST_TRIALS, LEAST_SPEAKERS = 20, 4
"""Targets, and other trials, and their speakers, below which nothing is calibrated."""


@dataclass
class SpeakerSystem:
    """A model and how its embeddings become scores and log-likelihood ratios.

    mean: subtracted from every embedding. cohort: rows for AS-norm, with the speaker of each. backend: "cosine" or
    "plda". norm: of cosines, "none" or "as" with the `top_n` nearest rows. calibration: scores, and quality measures
    where `quality` names them, to log-likelihood ratios; `scores` and `labels` are its trials, from which thresholds
    for a wanted false-accept rate are read.
    """

    model: Encoder
    mean: Array | None = None
    cohort: Array | None = None
    cohort_speakers: tuple[str, ...] = ()
    norm: Literal["none", "as"] = "none"
    top_n: int = 300
    plda: PLDA | None = None
    backend: Literal["cosine", "plda"] = "cosine"
    calibration: Calibration | None = None
    scores: Array = field(default_factory=lambda: np.empty(0))
    labels: Array = field(default_factory=lambda: np.empty(0, np.int64))
    trained_on: TrainedOn = field(default_factory=TrainedOn)

    @classmethod
    def build(cls, model: Encoder, embeddings: Array, speakers: Sequence[str], seed: int = 0) -> "SpeakerSystem":
        """Mean, cohort and, where the utterances suffice, PLDA from training utterances.

        The cohort has the mean of each speaker where there are at least 200, else up to 2000 utterances; with fewer
        than `LEAST_COHORT` rows scores are plain cosines.
        """
        many = len(set(speakers)) >= 200
        cohort, names = make_cohort(embeddings, speakers, "speaker" if many else "utterance", limit=2000, seed=seed)
        enough = len(cohort) >= LEAST_COHORT
        mean = np.mean(embeddings, 0)
        try:
            plda = PLDA.fit(unit(embeddings, mean), speakers)
        except ValueError:
            plda = None
        return cls(
            model,
            mean,
            cohort if enough else None,
            tuple(map(str, names)) if enough else (),
            "as" if enough else "none",
            min(300, max(2, len(cohort) // 5)),
            plda,
        )

    @property
    def convention(self) -> str:
        """How scores are made, in words, for the record."""
        words = "PLDA of length-normalized embeddings" if self.backend == "plda" else "cosine"
        words += " after subtracting the training mean" if self.mean is not None else ""
        if self.backend == "plda":
            return words
        if self.norm == "as" and self.cohort is not None:
            words += f", AS-norm with the top {self.top_n} of {len(self.cohort)} cohort rows, population deviation"
        return words

    def leave_out(self, speakers: Collection[str | None]) -> None:
        """Take `speakers` out of the cohort. Raises UserError where too few rows are left for AS-norm."""
        if self.cohort is None:
            return
        hold = np.array([speaker not in speakers for speaker in self.cohort_speakers])
        if self.backend == "cosine" and self.norm == "as" and hold.sum() < self.top_n and not hold.all():
            raise UserError(
                f"without the trials' own speakers the cohort has {int(hold.sum())} rows, fewer than the "
                f"{self.top_n} that AS-norm takes"
            )
        self.cohort = self.cohort[hold]

    def score(self, enroll: Array, test: Array, left: Array, right: Array) -> Array:
        """Scores of the trials `(enroll[left], test[right])`, rows being embeddings or enrolled models."""
        if self.backend == "plda" and self.plda is not None:
            return self.plda.scores(unit(enroll, self.mean), unit(test, self.mean), left, right)
        scores = pair_scores(enroll, test, left, right, self.mean)
        if self.norm == "as" and self.cohort is not None:
            scores = adaptive_s_norm(scores, enroll, test, left, right, self.cohort, self.mean, self.top_n)
        return scores

    def choose(
        self, backend: str | None = None, norm: str | None = None, top_n: int | None = None, no_mean: bool = False
    ) -> None:
        """Score in another way than the model folder says; None leaves a setting, `no_mean` drops the mean.

        Raises UserError for what is not there or does not go together.
        """
        for name, value, allowed in (("backend", backend, ("cosine", "plda")), ("norm", norm, ("none", "as"))):
            if value not in (None, *allowed):
                raise UserError(f"--{name} {value}: must be {' or '.join(allowed)}")
        self.backend, self.norm, self.top_n = backend or self.backend, norm or self.norm, top_n or self.top_n  # type: ignore[assignment]
        self.mean = None if no_mean else self.mean
        if self.backend == "plda":
            if self.plda is None:
                raise UserError("--backend plda: this model has none, its training recordings were too few")
            if norm == "as" or top_n or no_mean:
                raise UserError("--norm, --top-n and --no-mean are for cosines, not for PLDA")
        elif self.norm == "as" and (self.cohort is None or not 2 <= self.top_n <= len(self.cohort)):
            rows = 0 if self.cohort is None else len(self.cohort)
            raise UserError(f"AS-norm with the top {self.top_n}: the model's cohort has {rows} rows")

    @property
    def quality(self) -> str | None:
        """Name of the quality measures that the calibration takes beside the score (`quality_features`), if any."""
        return None if self.calibration is None else self.calibration.notes.get("quality")

    def inputs(
        self,
        scores: Array,
        enroll: Array,
        test: Array,
        left: Array,
        right: Array,
        seconds: tuple[Array, Array],
        quality: str | None,
        chunk: int = 65536,
    ) -> Array:
        """What a calibration takes: the scores alone, or with the measures `quality` ("wespeaker" or "lap").

        seconds: of the rows of `enroll` and `test`. Raises UserError for other measures, or where they need a cohort.
        """
        if quality is None:
            return scores
        if quality not in QUALITY_NAMES:
            raise UserError(f"--quality {quality}: must be {' or '.join(QUALITY_NAMES)}")
        means = None
        if quality == "wespeaker":
            if self.cohort is None:
                raise UserError("--quality wespeaker needs a cohort, this model has none; 'lap' needs none")
            top_n = min(self.top_n, len(self.cohort))
            means = [cohort_statistics(x, self.cohort, self.mean, top_n).mean for x in (enroll, test)]
        parts = []
        for start in range(0, len(scores), chunk):
            i, j = left[start : start + chunk], right[start : start + chunk]
            parts.append(
                quality_features(
                    scores[start : start + chunk],
                    (seconds[0][i], seconds[1][j]),
                    (enroll[i], test[j]),
                    None if means is None else (means[0][i], means[1][j]),
                    self.mean,
                    quality,  # type: ignore[arg-type]
                )
            )
        return np.concatenate(parts)

    def calibrate(self, embeddings: Array, speakers: Sequence[str], trials: int = 30000, seed: int = 0) -> None:
        """Calibrate on utterances of speakers that the model was not trained on; intervals draw these speakers."""
        names = np.asarray(speakers)
        left, right, labels = draw_trials(list(names), min(trials, 20 * len(names)), seed=seed)
        self.fit(self.score(embeddings, embeddings, left, right), labels, names[left], names[right], seed=seed)

    def fit(
        self,
        inputs: Array,
        labels: Array,
        enroll_speakers: Sequence[str] | None = None,
        test_speakers: Sequence[str] | None = None,
        quality: str | None = None,
        seed: int = 0,
    ) -> None:
        """Calibrate on trials scored by this system; `inputs` are those of the measures `quality`.

        Raises ValueError for too few trials or speakers, scores that cannot be calibrated, or where the trials leave
        nothing open (every interval has no width): they are copies of a few.
        """
        labels = np.asarray(labels)
        counts = int((labels == 1).sum()), int((labels == 0).sum())
        if min(counts) < LEAST_TRIALS:
            raise ValueError(
                f"{counts[0]} targets and {counts[1]} non-targets are too few to calibrate on, {LEAST_TRIALS} of each "
                "are needed"
            )
        if enroll_speakers is not None and test_speakers is not None:
            people = {*map(str, enroll_speakers), *map(str, test_speakers)}
            if len(people) < LEAST_SPEAKERS:
                raise ValueError(
                    f"trials of {len(people)} speakers are too few to calibrate on, {LEAST_SPEAKERS} are needed"
                )
        calibration = Calibration.fit(
            inputs,
            labels,
            QUALITY_NAMES[quality] if quality else ("score",),
            enroll_speakers=enroll_speakers,
            test_speakers=test_speakers,
            replicates=200,
            seed=seed,
            notes={
                "convention": self.convention,
                "intervals": "trials" if enroll_speakers is None else "speakers",
                "quality": quality,
            },
        )
        if len(calibration.replicates) < 100:
            raise ValueError(
                f"only {len(calibration.replicates)} of 200 draws of these trials can be calibrated: they are too few"
            )
        low, high = calibration.interval(inputs)
        if not (high - low > 1e-6).any():
            raise ValueError("the intervals of all ratios have no width: these trials are copies of a few")
        self.calibration = calibration
        self.scores, self.labels = np.reshape(inputs, (len(inputs), -1))[:, 0], np.asarray(labels)

    def threshold(self, far: float, comparisons: int = 1) -> Rate:
        """Score above which at most `far` of the calibration's non-targets lie (see `threshold_at_far`).

        Raises UserError where the system is not calibrated or its trials are too few.
        """
        if not len(self.scores):
            raise UserError("the model folder holds no calibration trials: run `calibrate` first")
        try:
            return threshold_at_far(self.scores, self.labels, far, comparisons)
        except ValueError as error:
            raise UserError(f"--far {far:g}: {error}") from error

    def save(self, folder: str | Path, **notes: Any) -> Path:
        """Write the model and all the rest into one folder; of an encoder that others made, what tells it again."""
        with self._writing(folder) as place:
            if isinstance(self.model, SpeakerEncoder):
                self.model.save_pretrained(place, **notes)
            else:
                about: dict[str, Any] = {"digest": self.model.digest, "embedding_dim": self.model.embedding_dim}
                if isinstance(self.model, ForeignEncoder):
                    about |= {"name": self.model.name, "probe": self.model.probe}
                write_json(place / ENCODER, about | notes)
        return Path(folder)

    def save_scoring(self, folder: str | Path) -> None:
        """Write what `save` writes beside the model, which is in the folder already."""
        with self._writing(folder, keep=("config.json", "model.safetensors")):
            pass

    @contextmanager
    def _writing(self, folder: str | Path, keep: Sequence[str] = ()) -> Iterator[Path]:
        settings = {
            "backend": self.backend,
            "norm": self.norm,
            "top_n": self.top_n,
            "cohort_speakers": self.cohort_speakers,
            "convention": self.convention,
        }
        arrays = {"scores": self.scores, "labels": self.labels}
        arrays |= {name: value for name, value in (("mean", self.mean), ("cohort", self.cohort)) if value is not None}
        if self.plda is not None:
            arrays |= {f"plda_{name}": value for name, value in vars(self.plda).items()}
        for name, values in arrays.items():
            check_finite(values, f"{folder}: {name} of the speaker model")
        with writing(folder, "speaker model", settings, self.trained_on, keep) as place:
            yield place
            np.savez(place / "scoring.npz", **arrays)  # type: ignore[arg-type]
            if self.calibration is not None:
                self.calibration.save(place / "calibration.json")

    def _check(self, arrays: Mapping[str, Array]) -> None:
        """Raise ValueError where what was read does not go together."""
        dim, rows = self.model.embedding_dim, len(self.cohort_speakers)
        shapes: dict[str, tuple[int, ...]] = {"mean": (dim,), "cohort": (rows, dim), "scores": self.labels.shape}
        shapes |= {"plda_mean": (dim,), "plda_psi": (dim,)}
        for name, values in arrays.items():
            if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
                raise ValueError(f"{name} has what is no finite number")
            if name in shapes and values.shape != shapes[name]:
                raise ValueError(f"{name} is {values.shape}, not {shapes[name]}")
        if self.labels.ndim != 1 or not np.isin(self.labels, (0, 1)).all():
            raise ValueError("labels are 0 and 1")
        if not all(isinstance(name, str) for name in self.cohort_speakers) or (rows and self.cohort is None):
            raise ValueError("cohort_speakers are no names of its cohort")
        if self.norm not in ("as", "none") or self.backend not in ("cosine", "plda"):
            raise ValueError(f"norm is {self.norm!r} and backend {self.backend!r}")
        if type(self.top_n) is not int or self.top_n < 1 or (self.backend == "plda" and self.plda is None):
            raise ValueError(f"top_n is {self.top_n!r}, or its PLDA is missing")

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", encoder: Encoder | None = None) -> "SpeakerSystem":
        """Read what `save` wrote, or a bare model (plain cosines, no calibration).

        encoder: the one that the folder was calibrated for, where others made it: a folder never names code to run.

        Raises UserError, also where the encoder is another one.
        """
        folder = Path(folder)
        bare = not (folder / NEXT).exists() and not (folder / KINDS["speaker model"]).exists()
        settings = {} if bare else read(folder, "speaker model")
        model: Encoder
        if encoder is not None:
            _check_encoder(folder, encoder)
            model = encoder
        elif (folder / ENCODER).is_file():
            name = read_json(folder / ENCODER, "an encoder's record").get("name", "the one its embeddings came from")
            raise UserError(f"{folder}: is for another's encoder ({name}); name it with --encoder or --embeddings too")
        else:
            model = SpeakerEncoder.from_pretrained(folder).to(device)
        if bare:
            return cls(model)
        with reading(folder / "scoring.npz", "its scoring files are damaged", AGAIN):
            found = read_arrays(folder / "scoring.npz", "arrays of a speaker model")
            system = cls(
                model,
                found.get("mean"),
                found.get("cohort"),
                tuple(settings["cohort_speakers"]),
                settings["norm"],
                settings["top_n"],
                PLDA(*(found[f"plda_{name}"] for name in PLDA.__dataclass_fields__)) if "plda_psi" in found else None,
                settings["backend"],
                scores=found["scores"],
                labels=found["labels"],
                trained_on=trained_on(folder),
            )
            system._check(found)
        if "calibration.json" in settings["files"]:
            system.calibration = Calibration.load(folder / "calibration.json")
            fitted_for = system.calibration.notes.get("convention")
            if fitted_for != system.convention:
                raise UserError(f"{folder}: its calibration is for other scores ({fitted_for}); run `calibrate` again")
        return system


def _check_encoder(folder: Path, encoder: Encoder) -> None:
    """Raise UserError where the folder is not for this encoder: by its digest and by what it makes of a sound."""
    if not (folder / ENCODER).is_file():
        raise UserError(f"{folder}: holds a model of its own; leave out --encoder and --embeddings")
    with reading(folder / ENCODER, "is no record of an encoder", "run `calibrate` again"):
        known = read_json(folder / ENCODER, "an encoder's record")
        same = known["digest"] == encoder.digest and known["embedding_dim"] == encoder.embedding_dim
        if same and isinstance(encoder, ForeignEncoder) and "probe" in known:
            probe = np.asarray(known["probe"], np.float64)
            same = float(probe @ encoder.probe / np.linalg.norm(probe) / np.linalg.norm(encoder.probe)) > 0.999
    if not same:
        raise UserError(f"{folder}: was calibrated for another encoder ({known['digest'][:40]}); run `calibrate` again")
