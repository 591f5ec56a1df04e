"""The authors' own figures of AGTCNet, from a download of their results, beside ours with their weights."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nearfar.core.errors import UserError
from nearfar.eeg import metrics
from nearfar.eeg.decoder import predict_logits
from nearfar.eeg.decoding import loss
from nearfar.eeg.models.agtcnet import AGTCNet
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Recording, find_recordings
from nearfar.eeg.trials import load_trials, trials_array

SESSIONS = {
    "AGTCNet+EEGMMIDB+4Class": ((4, 6), (8, 10), (12, 14)),
    "AGTCNet+EEGMMIDB+2Class": ((12,), (8,), (4,)),
}
"""Results folder -> runs of EEGMMIDB that train number 1, 2, 3 of the fine-tuned weights is tested on."""

_TUNED = "EEGMMIDB-SL-DS-FT"

_LINE = re.compile(
    r"^Subject: (\d+)\tTrain No\.: (\d+)\t.*?Test Accuracy: ([\d.]+)\tTest Kappa: (-?[\d.]+)\tTest Loss: ([\d.]+)"
)


def authors_log(path: str | Path) -> dict[tuple[int, int], dict[str, float]]:
    """(subject, train number) -> accuracy, kappa and loss on the test session, as a `log.txt` of the authors tells."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of the authors' results with their logs")
    found: dict[tuple[int, int], dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _LINE.match(line):
            scores = dict(zip(("accuracy", "kappa", "loss"), map(float, match.groups()[2:])))
            found[int(match[1]), int(match[2])] = scores
    if not found:
        raise UserError(f"{path}: tells no test accuracy of any subject; this is not a log of the authors")
    return found


def reproduce(folder: str | Path, recordings: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """One row per weight file of a subject whose recordings are there: ours and theirs, and whether they agree.

    folder: the authors' results (`.results` of their repository, or a folder that holds it), your own download.
    recordings: EEGMMIDB's EDF files. The fine-tuned weights of both EEGMMIDB configurations are tried, on the session
    that each was tested on. `agrees` where accuracy, kappa and loss equal the log's four digits.
    """
    folders = sorted({p for name in SESSIONS for p in Path(folder).glob(f"**/{name}/{_TUNED}")} if folder else ())
    if not folders:
        wanted = " or ".join(f"{name}/{_TUNED}" for name in SESSIONS)
        raise UserError(f"{folder}: holds no folder {wanted}; give the authors' results, a download of your own")
    found = find_recordings(recordings)
    rows: list[dict[str, Any]] = []
    for place in folders:
        log = authors_log(place / "log.txt")
        for (subject, number), theirs in log.items():
            runs = SESSIONS[place.parent.name][number - 1] if number <= 3 else ()
            weights = place / f"subj-{subject}" / f"run-{number}-best_model.h5"
            chosen = [r for r in found if r.subject == f"S{subject:03d}" and r.run in map(str, runs)]
            if runs and weights.is_file() and len(chosen) == len(runs):
                ours = _scores(weights, chosen)
                agrees = all(abs(ours[name] - value) < 1.01e-4 for name, value in theirs.items())
                row: dict[str, Any] = {"weights": place.parent.name, "subject": f"S{subject:03d}"}
                row["tested on runs"] = "+".join(map(str, runs))
                for name, value in theirs.items():
                    row |= {name: ours[name], f"their {name}": value}
                rows.append(row | {"agrees": agrees})
    if not rows:
        raise UserError(
            f"{folder}: has no weights of a subject among {len(found)} recordings; give EEGMMIDB's EDF files"
        )
    return pd.DataFrame(rows)


def _scores(weights: Path, recordings: list[Recording]) -> dict[str, float]:
    epochs = load_trials(recordings, preprocessing=Preprocessing.preset("eegmmidb", order="published"))
    X, y, names = trials_array(epochs)
    model = AGTCNet.from_published(weights, chs_info=epochs.info["chs"], class_names=names)
    logits = predict_logits(model, X)
    mean = loss("published", torch.from_numpy(logits), torch.from_numpy(y))
    predicted = logits.argmax(1)
    return {"accuracy": metrics.accuracy(y, predicted), "kappa": metrics.kappa(y, predicted), "loss": float(mean)}
