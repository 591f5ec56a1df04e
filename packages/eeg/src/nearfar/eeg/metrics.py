"""Scores of a decoder: accuracy and kappa, chance bounds, intervals over subjects, paired tests, transfer rate.

A trial without a decision has the predicted class `NO_DECISION` (-1); it counts as wrong everywhere.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score, roc_auc_score
from sklearn.metrics import confusion_matrix as _confusion_matrix

from nearfar.core.statistics import bootstrap_interval, holm, paired_test

NO_DECISION = -1


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of trials whose predicted class is the true one."""
    return float(accuracy_score(y_true, y_pred))


def kappa(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Cohen's kappa: (agreement - agreement expected by chance) / (1 - agreement expected by chance).

    0 where it is undefined, that is where truth and prediction both hold one and the same class only.
    """
    classes = np.union1d(y_true, y_pred)
    return 0.0 if len(classes) < 2 else float(cohen_kappa_score(y_true, y_pred))


def confusion_matrix(y_true: ArrayLike, y_pred: ArrayLike, n_classes: int) -> np.ndarray:
    """Counts of trials, (n_classes, n_classes + 1): rows are true classes, columns predicted ones.

    The last column counts the trials without a decision, so that every row sums to the trials of its class.
    """
    y_true, y_pred = np.asarray(y_true, int), np.asarray(y_pred, int)
    y_pred = np.where(y_pred == NO_DECISION, n_classes, y_pred)
    return _confusion_matrix(y_true, y_pred, labels=np.arange(n_classes + 1))[:n_classes]


def chance_level(y_true: ArrayLike, n_classes: int) -> float:
    """Accuracy of always answering the class that most trials are of: 1 / n_classes where all are as frequent."""
    counts = np.bincount(np.asarray(y_true, int), minlength=n_classes)
    return float(counts.max() / counts.sum()) if counts.sum() else 1 / n_classes


def balanced_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean over the classes of the share of their trials that are answered rightly; 1 / classes for one same answer."""
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    return float(np.mean([(y_pred[y_true == label] == label).mean() for label in np.unique(y_true)]))


def auc(y_true: ArrayLike, probabilities: ArrayLike) -> float:
    """Area under the ROC curve: that a trial of the second class has a higher probability of it than one of the first;
    of more classes the mean over each against the rest. NaN where there are trials of one class only.

    A trial without probabilities (NaN) counts as equal ones.
    """
    y_true, shares = np.asarray(y_true, int), np.asarray(probabilities, float)
    shares = np.where(np.isfinite(shares).all(1, keepdims=True), shares, 1 / shares.shape[1])
    labels = np.unique(y_true)
    if len(labels) < 2:
        return float("nan")
    if shares.shape[1] == 2:
        return float(roc_auc_score(y_true, shares[:, 1]))
    return float(np.mean([roc_auc_score(y_true == label, shares[:, label]) for label in labels]))


def chance_bound(n_trials: int, n_classes: int, level: float = 0.95, chance: float | None = None) -> float:
    """The smallest accuracy k / n_trials that guessing reaches with a probability of at most 1 - level.

    Guessing is Binomial(n_trials, chance), `chance` being 1 / n_classes or what `chance_level` gives; with the latter
    always answering the most frequent class stays below the bound. Accuracies at or above it are above chance at that
    level.
    With very few trials no accuracy is: the bound is then above 1.
    """
    return float(stats.binom.ppf(level, n_trials, chance or 1 / n_classes) + 1) / n_trials


def proportion_interval(share: float, n_trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson interval of one accuracy `share` measured on `n_trials`."""
    interval = stats.binomtest(round(share * n_trials), n_trials).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def score(
    y_true: ArrayLike, y_pred: ArrayLike, n_classes: int, probabilities: ArrayLike | None = None
) -> dict[str, float]:
    """Accuracy with its 95 % interval (`low`, `high`), balanced accuracy, kappa, AUC where probabilities are given;
    chance by the classes' shares, and the bound that guessing stays below."""
    share, trials = accuracy(y_true, y_pred), len(np.asarray(y_true))
    low, high = proportion_interval(share, trials)
    chance = chance_level(y_true, n_classes)
    scores = {"accuracy": share, "low": low, "high": high, "balanced_accuracy": balanced_accuracy(y_true, y_pred)}
    scores["kappa"] = kappa(y_true, y_pred)
    if probabilities is not None and not np.isnan(area := auc(y_true, probabilities)):
        scores["auc"] = area
    return scores | {"chance": chance, "chance_bound": chance_bound(trials, n_classes, chance=chance)}


def moving_average_accuracy(curve: ArrayLike, window: int = 20) -> float:
    """SMA20: the largest mean of `window` successive epochs' accuracies; NaN for a curve with fewer epochs.

    On test accuracies this is a choice of the best stretch of training by the test set, as published for AGTCNet.
    """
    curve = np.asarray(curve, float)
    if len(curve) < window:
        return float("nan")
    return float(np.lib.stride_tricks.sliding_window_view(curve, window).mean(-1).max())


def wilcoxon_holm(scores: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """Wilcoxon's signed-rank test between all pairs of columns, paired over subjects, Holm-corrected.

    Args:
        scores: one row per subject, one column per model, without gaps.
        level: family-wise error rate.

    Returns:
        One row per pair: `a`, `b`, `subjects`, `difference` (mean of a - b), `p`, `p_holm` and `outcome`: the better
        model's name, `no difference shown`, or `too few subjects` where fewer than 6 subjects differ, for then
        no result could be significant (p and p_holm are NaN, and the pair does not count in the correction).
    """
    if scores.isna().any(axis=None):
        raise ValueError("every subject needs a score from every model; a failed one counts as chance, not as a gap")
    rows = []
    for a, b in combinations(scores.columns, 2):
        alone = {"difference": (scores[a] - scores[b]).mean(), "p": np.nan}  # one subject is no sample to test on
        found = paired_test(scores[a], scores[b]) if len(scores) > 1 else alone
        rows.append({"a": a, "b": b, "subjects": len(scores), "difference": found["difference"], "p": found["p"]})
    table = pd.DataFrame(rows, columns=["a", "b", "subjects", "difference", "p"])
    table["p_holm"] = holm(table["p"])
    better = np.where(table["difference"] > 0, table["a"], table["b"])
    outcome = np.where(table["p_holm"] <= level, better, "no difference shown")
    table["outcome"] = np.where(table["p"].isna(), "too few subjects", outcome)
    return table


def bits_per_selection(share: float, n_classes: int) -> float:
    """Wolpaw's information per selection in bits: log2 N + P log2 P + (1 - P) log2((1 - P) / (N - 1)).

    0 for P at or below 1 / N, where the formula would credit answers that are worse than guessing.
    """
    if share <= 1 / n_classes:
        return 0.0
    rest = 0.0 if share >= 1 else (1 - share) * np.log2((1 - share) / (n_classes - 1))
    return float(np.log2(n_classes) + share * np.log2(share) + rest)


def information_transfer_rate(share: float, n_classes: int, seconds: float) -> float:
    """Wolpaw's transfer rate in bits per minute, one selection taking `seconds`."""
    return bits_per_selection(share, n_classes) * 60 / seconds


def choose_threshold(y_true: ArrayLike, probabilities: np.ndarray) -> dict[str, float]:
    """The probability below which a trial is better left unanswered, by trials that the decoder has not learnt from.

    It maximizes the information of a trial, answered share x `bits_per_selection` of the answered ones; of equals the
    lowest counts. `threshold` is 0 where answering all is best. Also `answered` (share), `accuracy` of these, `trials`.
    """
    y_true, best = np.asarray(y_true, int), probabilities.max(1)
    right = probabilities.argmax(1) == y_true
    found, most = {}, -1.0
    for threshold in (0.0, *np.unique(best)):
        given = best >= threshold
        share, accuracy = float(given.mean()), float(right[given].mean())
        if (bits := share * bits_per_selection(accuracy, probabilities.shape[1])) > most + 1e-12:
            most, found = bits, {"threshold": float(threshold), "answered": share, "accuracy": accuracy}
    return found | {"trials": len(y_true)}


def subject_scores(rows: pd.DataFrame, score: str = "accuracy") -> pd.DataFrame:
    """The mean of `score` over sessions and repeats: one row per subject, one column per model."""
    return rows.pivot_table(index="subject", columns="model", values=score, aggfunc="mean", sort=False)


def summary(rows: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """One row per protocol and model from result rows (see `nearfar.eeg.evaluation.Results.rows`).

    `accuracy`, `balanced_accuracy`, `kappa`, `auc` and `sma20` are means over all rows, that is subjects (or their
    sessions) and repeats; `..._std` their population standard deviation over the same rows; `low` and `high` the
    bootstrap interval of the mean accuracy over subjects. `failed` counts the rows of failed fits, which stay in the
    means as chance.
    """
    table = []
    for (protocol, model), group in rows.groupby(["protocol", "model"], sort=False):
        line = {"protocol": protocol, "model": model, "subjects": group["subject"].nunique()}
        line |= {"repeats": group["repeat"].nunique(), "failed": int((group["failure"] != "").sum())}
        for score in [name for name in ("accuracy", "balanced_accuracy", "kappa", "auc", "sma20") if name in group]:
            line |= {score: group[score].mean(), f"{score}_std": group[score].std(ddof=0)}
        line["low"], line["high"] = bootstrap_interval(group.groupby("subject")["accuracy"].mean(), level)
        table.append(line)
    return pd.DataFrame(table)
