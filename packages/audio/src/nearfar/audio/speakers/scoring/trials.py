"""Trial lists, enrolment maps and score files."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nearfar.core.errors import UserError, some
from nearfar.core.files import atomic_path
from nearfar.core.reading import reading

Array = np.ndarray

LONGEST_NAME = 4096
"""Letters of a recording's name in a list."""

LABELS = {"1": 1, "0": 0, "target": 1, "nontarget": 0, "true": 1, "false": 0, "tgt": 1, "imp": 0, "non": 0}
"""How lists write their labels (upper or lower case)."""

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

    Forms: "voxceleb" `label enrol test`; "kaldi" `enrol test label`; "pairs" `enrol test` without labels, all separated
    by white space; "csv" with a header that names LABEL, SAMPLE1, SAMPLE2 (or ENROLL, TEST) and, if any, columns of
    conditions. Labels are 1/0 or target/nontarget. "auto" looks at the lines and refuses what it cannot tell.

    Raises UserError for an empty list, a line of another shape, a label it does not know, or one trial with two
    labels; it names file and line.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise UserError(f"{path}: the trial list is empty")
    if form not in ("auto", "voxceleb", "kaldi", "csv", "pairs"):
        raise ValueError(f"form must be auto, voxceleb, kaldi, csv or pairs, got {form!r}")
    if form == "csv" or (form == "auto" and "," in lines[0][1]):
        return _read_csv_trials(path, lines)
    rows = [(number, line.split()) for number, line in lines]
    if form == "auto":
        form = _guess_form(path, [words for _, words in rows])
    width = 2 if form == "pairs" else 3
    for number, words in rows:
        if len(words) != width:
            raise UserError(f"{path}, line {number}: {len(words)} columns, a {form} list has {width}")
    columns = list(zip(*(words for _, words in rows)))
    if form == "pairs":
        return Trials(np.array(columns[0]), np.array(columns[1]), source=str(path))
    if form == "voxceleb":
        columns = [columns[1], columns[2], columns[0]]
    labels = _parse_labels(path, columns[2], [number for number, _ in rows])
    trials = Trials(np.array(columns[0]), np.array(columns[1]), labels, source=str(path))
    return _refuse_contradictions(trials)


def write_trials(path: str | Path, trials: Trials) -> Path:
    """Write labelled trials in the Kaldi form (`enrol test target|nontarget`), others as pairs."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        if trials.labels is None:
            stream.writelines(f"{e} {t}\n" for e, t in zip(trials.enroll, trials.test))
        else:
            words = np.where(trials.labels == 1, "target", "nontarget")
            stream.writelines(f"{e} {t} {w}\n" for e, t, w in zip(trials.enroll, trials.test, words))
    return Path(path)


def read_enrollments(path: str | Path) -> dict[str, list[str]]:
    """Read a NIST-style enrolment map, model to its utterances: lines `model utterance [utterance ...]`.

    Lines of the same model add up; a header line `modelid segmentid` is skipped.
    Raises UserError where the file is empty, a model has no utterance, or has one twice.
    """
    models: dict[str, list[str]] = {}
    for number, line in _lines(Path(path)):
        model, *utterances = line.replace(",", " ").split()
        if model.lower() in ("modelid", "model_id", "model") and number == 1:
            continue
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
    """Write `enrol test score [target|nontarget]`, one trial per line, with every digit of the score."""
    if len(scores) != len(trials):
        raise ValueError(f"{len(trials)} trials, {len(scores)} scores")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        columns = [trials.enroll.tolist(), trials.test.tolist(), map(repr, np.asarray(scores, float).tolist())]
        if trials.labels is not None:
            columns.append(np.where(trials.labels == 1, "target", "nontarget").tolist())
        stream.writelines(" ".join(words) + "\n" for words in zip(*columns))
    return Path(path)


def read_scores(path: str | Path) -> tuple[Trials, Array]:
    """Read a score file: `enrol test score [label]`.

    Raises UserError for an empty file, a line of another shape, or a score that is no finite number.
    """
    path = Path(path)
    rows = [(number, line.split()) for number, line in _lines(path)]
    if not rows:
        raise UserError(f"{path}: the score file is empty")
    width = len(rows[0][1])
    scores = np.empty(len(rows))
    for row, (number, words) in enumerate(rows):
        if len(words) != width or width not in (3, 4):
            raise UserError(f"{path}, line {number}: expected `enrol test score [label]`, got {len(words)} columns")
        try:
            scores[row] = float(words[2])
        except ValueError:
            raise UserError(f"{path}, line {number}: {words[2]!r} is no score") from None
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise UserError(f"{path}: {len(bad)} scores are not finite, the first in line {rows[bad[0]][0]}")
    columns = list(zip(*(words for _, words in rows)))
    labels = _parse_labels(path, columns[3], [number for number, _ in rows]) if width == 4 else None
    return Trials(np.array(columns[0]), np.array(columns[1]), labels, source=str(path)), scores


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, line in lines:  # arrays of names are as wide as the longest
        if len(line) > LONGEST_NAME and max(map(len, line.replace(",", " ").split())) > LONGEST_NAME:
            raise UserError(f"{path}, line {number}: a name of more than {LONGEST_NAME} letters; it is no such list")
    return lines


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


def _read_csv_trials(path: Path, lines: list[tuple[int, str]]) -> Trials:
    with reading(path, "cannot be read as CSV", "mend it"):
        header, *rows = csv.reader(line for _, line in lines)
    names = [name.strip().lower() for name in header]

    def column(*options: str) -> int | None:
        return next((names.index(option) for option in options if option in names), None)

    left, right, label = column("sample1", "enroll", "enrol"), column("sample2", "test"), column("label", "target")
    if left is None or right is None:
        raise UserError(f"{path}: the header must name LABEL, SAMPLE1 and SAMPLE2, it has {', '.join(header)}")
    if not rows:
        raise UserError(f"{path}: the trial list is empty")
    numbers = [number for number, _ in lines[1:]]
    for number, row in zip(numbers, rows):
        if len(row) != len(header):
            raise UserError(f"{path}, line {number}: {len(row)} columns, the header has {len(header)}")
    columns = [np.array([value.strip() for value in values]) for values in zip(*rows)]
    labels = None if label is None else _parse_labels(path, columns[label].tolist(), numbers)
    conditions = {header[i].strip(): columns[i] for i in range(len(header)) if i not in (left, right, label)}
    return _refuse_contradictions(Trials(columns[left], columns[right], labels, conditions, str(path)))


def _parse_labels(path: Path, words: Sequence[str], numbers: Sequence[int]) -> Array:
    labels = np.fromiter((LABELS.get(word.lower(), -1) for word in words), np.int8, len(words))
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        raise UserError(f"{path}, line {numbers[row]}: {words[row]!r} is no label (1, 0, target or nontarget)")
    return labels


def _refuse_contradictions(trials: Trials) -> Trials:
    if trials.labels is not None:
        seen: dict[tuple[str, str], int] = {}
        for *pair, label in zip(trials.enroll.tolist(), trials.test.tolist(), trials.labels.tolist()):
            if seen.setdefault(tuple(pair), label) != label:
                raise UserError(f"{trials.source}: the trial {pair[0]} {pair[1]} is both target and nontarget")
    return trials
