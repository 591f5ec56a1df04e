"""Trial lists, enrolment maps and score files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nearfar.audio.tables import Table, join, read_table
from nearfar.core.errors import UserError, some
from nearfar.core.files import atomic_path

Array = np.ndarray

LABELS = {
    word: label
    for label, words in (
        (1, "1 1.0 target true t tgt tar same yes y positive pos genuine match client"),
        (0, "0 0.0 -1 -1.0 nontarget non-target non_target false f imp impostor imposter non different diff no n "
            "negative neg mismatch nonmatch"),
    )
    for word in words.split()
}  # fmt: skip
"""How lists write their labels (upper or lower case)."""

ROLES = {
    "enroll": (
        "enroll", "enrol", "enrollment", "enrolment", "enrollid", "enrolid", "enrollmentid", "sample1", "modelid",
        "model", "utt1", "utterance1", "file1", "filename1", "wav1", "path1", "audio1", "recording1", "segment1",
    ),
    "test": (
        "test", "testid", "sample2", "segmentid", "segment", "utt2", "utterance2", "file2", "filename2", "wav2",
        "path2", "audio2", "recording2", "segment2", "probe",
    ),
    "label": ("label", "labels", "target", "targettype", "key", "truth", "samespeaker", "issame", "ismatch"),
    "score": ("score", "scores", "llr", "similarity", "cosine", "loglikelihoodratio"),
    "side": ("side", "channel"),
}  # fmt: skip
"""Names of a list's columns, as `nearfar.audio.tables.plain` gives them."""

SIDE = re.compile(r"(.+):([ab])$", re.DOTALL)
"""A name with the side of the call that is meant, a for the first channel, b for the second."""

TrialFormat = Literal["auto", "voxceleb", "kaldi", "csv", "pairs"]


@dataclass(frozen=True)
class Trials:
    """A list of trials: names of the enrolment side and the test side, labels where known, conditions by name."""

    enroll: Array
    test: Array
    labels: Array | None = None
    conditions: Mapping[str, Array] = field(default_factory=dict)
    source: str = "trials"

    def __len__(self) -> int:
        return len(self.enroll)

    def names(self) -> list[str]:
        """Every name on either side once, in order of appearance."""
        return list(dict.fromkeys([*self.enroll.tolist(), *self.test.tolist()]))

    def select(self, keep: Array) -> "Trials":
        """The trials that a mask or indices choose."""
        labels = None if self.labels is None else self.labels[keep]
        conditions = {name: values[keep] for name, values in self.conditions.items()}
        return Trials(self.enroll[keep], self.test[keep], labels, conditions, self.source)

    def indices(self, enroll_names: Sequence[str], test_names: Sequence[str] | None = None) -> tuple[Array, Array]:
        """Row numbers of both sides in tables of embeddings (one table for both if one is given).

        Raises UserError that counts and names what the tables lack.
        """
        on_left = {name: row for row, name in enumerate(enroll_names)}
        on_right = on_left if test_names is None else {name: row for row, name in enumerate(test_names)}
        left = np.fromiter((on_left.get(n, -1) for n in self.enroll.tolist()), np.int64, len(self))
        right = np.fromiter((on_right.get(n, -1) for n in self.test.tolist()), np.int64, len(self))
        missing = list(dict.fromkeys([*self.enroll[left < 0].tolist(), *self.test[right < 0].tolist()]))
        if missing:
            bad = int(((left < 0) | (right < 0)).sum())
            raise UserError(
                f"{self.source}: {len(missing)} names in {bad} of {len(self)} trials have no embedding: "
                f"{some(missing)}; embed them or leave these trials out"
            )
        return left, right


def read_trials(path: str | Path, form: TrialFormat = "auto") -> Trials:
    """Read a trial list.

    Forms: "voxceleb" `label enrol test`; "kaldi" `enrol test label`; "pairs" `enrol test` without labels; "csv" with a
    header that names its columns (LABEL, SAMPLE1, SAMPLE2; ENROLL, TEST; NIST's modelid, segmentid, side, targettype)
    and, if any, columns of conditions. Blanks separate, or tabs or commas, with which names may hold blanks. A side, a
    or b, is kept in the test name, `segment:b`. Labels are `LABELS`: 1/0, target/nontarget, same/different ... "auto"
    looks at the lines and refuses what it cannot tell. For encodings see `nearfar.audio.tables.read_lines`.

    Raises UserError for an empty list, a line of another shape, a label it does not know, or one trial with two
    labels; it names file and line.
    """
    path = Path(path)
    if form not in ("auto", "voxceleb", "kaldi", "csv", "pairs"):
        raise ValueError(f"form must be auto, voxceleb, kaldi, csv or pairs, got {form!r}")
    table = read_table(path, ROLES, ("enroll", "test"))
    if not table.rows:
        raise UserError(f"{path}: the trial list is empty")
    if table.header or form == "csv":
        return _refuse_contradictions(_named_trials(table))
    if form == "auto":
        form = _guess_form(path, [words for _, words in table.rows])
    table.check(2 if form == "pairs" else 3, f"{form} list")
    columns = list(zip(*(words for _, words in table.rows)))
    if form == "pairs":
        return Trials(np.array(columns[0]), np.array(columns[1]), source=str(path))
    if form == "voxceleb":
        columns = [columns[1], columns[2], columns[0]]
    labels = _parse_labels(path, columns[2], [number for number, _ in table.rows])
    trials = Trials(np.array(columns[0]), np.array(columns[1]), labels, source=str(path))
    return _refuse_contradictions(trials)


def write_trials(path: str | Path, trials: Trials) -> Path:
    """Write labelled trials in the Kaldi form (`enrol test target|nontarget`), others as pairs.

    Columns are separated by blanks, or by tabs where a name holds a blank or comma.
    """
    columns = [trials.enroll.tolist(), trials.test.tolist()]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(join(columns if trials.labels is None else [*columns, _words(trials.labels)]))
    return Path(path)


def _words(labels: Array) -> list[str]:
    return np.where(labels == 1, "target", "nontarget").tolist()


MODELS = {
    "model": ("modelid", "model", "speaker", "speakerid", "spk", "spkid", "name", "enroll", "enrol"),
    "utterance": (
        "segmentid", "segment", "utterance", "utteranceid", "utt", "uttid", "file", "filename", "path", "wav", "audio",
        "recording", "recordings", "utterances",
    ),
    "side": ROLES["side"],
}  # fmt: skip
"""Names of an enrolment map's columns."""


def read_enrollments(path: str | Path) -> dict[str, list[str]]:
    """Read a NIST-style enrolment map, model to its utterances: lines `model utterance [utterance ...]`.

    Lines of the same model add up; a header such as `modelid segmentid side` tells the columns.
    Raises UserError where the file is empty, a model has no utterance, or has one twice.
    """
    models: dict[str, list[str]] = {}
    table = read_table(path, MODELS, ("model", "utterance"))
    if len(table.header) > 2:
        table.check()
    for number, row in table.rows:
        model, *utterances = row
        if len(table.header) > 2:
            model, utterances = row[table.columns["model"]], [row[table.columns["utterance"]]]
            if "side" in table.columns:
                utterances = [_sided(utterances[0], row[table.columns["side"]], path, number)]
        utterances = [utterance for utterance in utterances if utterance]
        if not utterances:
            raise UserError(f"{path}, line {number}: model {model} has no utterance")
        known = models.setdefault(model, [])
        for utterance in utterances:
            if utterance in known:
                raise UserError(f"{path}, line {number}: {utterance} is enrolled twice for model {model}")
            known.append(utterance)
    if not models:
        raise UserError(f"{path}: the enrolment map is empty")
    return models


def write_scores(path: str | Path, trials: Trials, scores: Array) -> Path:
    """Write `enrol test score [target|nontarget]`, one trial per line, with every digit of the score.

    Trials with sides are written as NIST wants them: tabs, and a header `modelid segmentid side LLR [targettype]`.
    """
    if len(scores) != len(trials):
        raise ValueError(f"{len(trials)} trials, {len(scores)} scores")
    columns = [trials.enroll.tolist(), trials.test.tolist(), [repr(s) for s in np.asarray(scores, float).tolist()]]
    header: list[str] = []
    sides = [SIDE.fullmatch(name) for name in columns[1]]
    if sides and all(sides):
        columns[1:2] = [[match[part] for match in sides if match] for part in (1, 2)]
        header = ["modelid", "segmentid", "side", "LLR"]
    if trials.labels is not None:
        columns.append(_words(trials.labels))
        header += ["targettype"] if header else []
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(join(columns, header))
    return Path(path)


def read_scores(path: str | Path) -> tuple[Trials, Array]:
    """Read a score file: `enrol test score [label]`, `enrol test label score`, or columns that a header names.

    Raises UserError for an empty file, a line of another shape, a score that is no finite number, one trial with two
    labels, or where it cannot be told which column is the score.
    """
    path = Path(path)
    table = read_table(path, ROLES, ("enroll", "test"))
    if not table.rows:
        raise UserError(f"{path}: the score file is empty")
    columns = dict(table.columns)
    if table.header:
        if "score" not in columns:
            raise UserError(f"{path}: the header must name the score, it has {', '.join(table.header)}")
        table.check()
    else:
        columns = _score_columns(table)
    numbers = [number for number, _ in table.rows]
    scores = np.empty(len(table.rows))
    for row, (number, words) in enumerate(table.rows):
        try:
            scores[row] = float(words[columns["score"]])
        except ValueError:
            raise UserError(f"{path}, line {number}: {words[columns['score']]!r} is no score") from None
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise UserError(f"{path}: {len(bad)} scores are not finite, the first in line {numbers[bad[0]]}")
    named = Table(path, table.rows, table.header, columns)
    return _refuse_contradictions(_named_trials(named, conditions=False)), scores


def _score_columns(table: Table) -> dict[str, int]:
    """Places in a file without a header: the label is third or fourth, where the words show it."""
    width = len(table.rows[0][1])
    for number, words in table.rows:
        if len(words) != width or width not in (3, 4):
            raise UserError(
                f"{table.path}, line {number}: expected `enrol test score [label]`, got {len(words)} columns; names "
                "with blanks need tabs between the columns"
            )
    columns = {"enroll": 0, "test": 1, "score": 2}
    if width == 3:
        return columns
    texts = {place: [row[place].lower() for _, row in table.rows] for place in (2, 3)}
    labels = [place for place in texts if all(text in LABELS for text in texts[place])]
    if len(labels) == 2:  # of numbers and words, the words are the labels
        labels = [place for place in labels if not any(_is_number(text) for text in texts[place])]
        if len(labels) != 1:
            raise UserError(
                f"{table.path}: both the third and the fourth column could be the labels; name the columns in a first "
                "line, such as `enrol test score label`"
            )
    label = labels[0] if labels else 3
    return {"enroll": 0, "test": 1, "score": 5 - label, "label": label}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _sided(name: str, side: str, path: str | Path, number: int) -> str:
    """`name:a` or `name:b`; the name alone where there is no side."""
    side = {"1": "a", "2": "b"}.get(side.lower(), side.lower())
    if side not in ("", "a", "b"):
        raise UserError(f"{path}, line {number}: {side!r} is no side; a and b are")
    return f"{name}:{side}" if side else name


def _named_trials(table: Table, conditions: bool = True) -> Trials:
    """Trials of a list whose columns are named. Raises UserError."""
    path, columns = table.path, table.columns
    if "enroll" not in columns or "test" not in columns:
        raise UserError(
            f"{path}: the header must name LABEL, SAMPLE1 and SAMPLE2, it has {', '.join(table.header) or 'no names'}"
        )
    if table.header:
        table.check()
    test = table.column("test")
    if "side" in columns:
        sides = zip(test, table.column("side"), table.rows, strict=True)
        test = [_sided(name, side, path, number) for name, side, (number, _) in sides]
    labels = None
    if "label" in columns:
        labels = _parse_labels(path, table.column("label"), [number for number, _ in table.rows])
    left = range(len(table.header)) if conditions else ()
    others = {
        table.header[place]: np.array([row[place] for _, row in table.rows])
        for place in left
        if place not in columns.values()
    }
    return Trials(np.array(table.column("enroll")), np.array(test), labels, others, str(path))


def _guess_form(path: Path, rows: list[list[str]]) -> TrialFormat:
    if len(rows[0]) == 2:
        return "pairs"
    if len(rows[0]) == 3:
        first = all(words[0].lower() in LABELS for words in rows)
        last = all(words[-1].lower() in LABELS for words in rows)
        if first != last:
            return "voxceleb" if first else "kaldi"
        if not first:  # one bad line should be named as such: go by the first
            first, last = rows[0][0].lower() in LABELS, rows[0][-1].lower() in LABELS
            if first != last:
                return "voxceleb" if first else "kaldi"
    raise UserError(f"{path}: cannot tell the form of this list ({' '.join(rows[0])[:80]!r}); name it with --format")


def _parse_labels(path: Path, words: Sequence[str], numbers: Sequence[int]) -> Array:
    labels = np.fromiter((LABELS.get(word.lower(), -1) for word in words), np.int8, len(words))
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        known = "1, 0, target, nontarget, same, different ..."
        raise UserError(f"{path}, line {numbers[row]}: {words[row]!r} is no label ({known})")
    return labels


def _refuse_contradictions(trials: Trials) -> Trials:
    if trials.labels is not None:
        seen: dict[tuple[str, str], int] = {}
        for *pair, label in zip(trials.enroll.tolist(), trials.test.tolist(), trials.labels.tolist()):
            if seen.setdefault(tuple(pair), label) != label:
                raise UserError(f"{trials.source}: the trial {pair[0]} {pair[1]} is both target and nontarget")
    return trials
