"""Tables, pictures and pages of the app."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.audio.corpora import Utterance, locate
from nearfar.audio.sound import write_samples
from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.audio.speakers.training import Recipe, read_utterance
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv, write_json
from nearfar.core.plots import new_figure, style
from nearfar.core.report import Report

NAMES = {
    "eer_nist": "EER (NIST: interpolated, tie-safe)",
    "eer_midpoint": "EER (mean of both rates; speechbrain, L-TDNN)",
    "eer_roc": "EER (greater rate; clovaai, LAP)",
    "min_dcf_voxceleb": "minDCF (p 0.01)",
    "min_dcf_voxsrc": "minDCF (VoxSRC: p 0.05)",
    "min_dcf_sre08": "minDCF (SRE08: p 0.01, miss cost 10)",
    "min_dcf_sre10": "minDCF (SRE10: p 0.001)",
    "min_dcf_sre16": "minDCF (SRE16: mean of p 0.01 and 0.005)",
    "min_cllr": "min Cllr (bits)",
    "cllr": "Cllr (bits)",
}


def training_page(system: SpeakerSystem, history: Sequence[Mapping[str, float]], recipe: Recipe) -> Report:
    """Page of a training run."""
    report = Report("Speaker model")
    report.text(f"Scores: {system.convention}.")
    columns = {"loss": "training loss", "val_eer": "EER of the speakers that choose the epoch"}
    with style():
        figure = new_figure(7, 3)
        for place, (name, title) in enumerate(columns.items(), 1):
            axes = figure.add_subplot(1, 2, place)
            axes.plot([row["epoch"] for row in history], [row.get(name, np.nan) for row in history])
            axes.set(xlabel="epoch", title=title)
    report.figure(figure, "Training")
    if system.calibration is not None:
        llr = system.calibration(system.scores)
        report.section("Calibration")
        report.text(
            f"Trials of speakers the network was not trained on; they chose the epoch, so these figures are too good. "
            f"Cllr {scoring.cllr(llr, system.labels):.3f}, at best {scoring.min_cllr(llr, system.labels):.3f}."
        )
        report.figure(scoring.plot_scores(llr, system.labels, 0.0, "log-likelihood ratio"), "Calibrated scores")
    report.section("Recipe")
    report.table([{"setting": name, "value": str(value)} for name, value in vars(recipe).items()])
    return report


def speakers_of(trials: scoring.Trials, pattern: str | None) -> tuple[list[str], list[str]] | None:
    """Speakers of both sides: by a pattern, else the first folder of names where that agrees with all labels.

    None where names do not tell. Raises UserError for a pattern that does not fit, or contradicts the labels.
    """

    def of(name: str) -> str | None:
        if pattern is None:
            return name.split("/")[0] if "/" in name else None
        match = re.search(pattern, name)
        return match.group(1) if match and match.groups() else None

    sides = [[of(name) for name in names.tolist()] for names in (trials.enroll, trials.test)]
    lost = [
        name for names, side in zip((trials.enroll, trials.test), sides) for name, s in zip(names, side) if s is None
    ]
    if lost and pattern is not None:
        raise UserError(f"--speaker-pattern {pattern}: finds no speaker in {lost[0]}")
    if lost:
        return None
    agrees = [(a == b) == (y == 1) for a, b, y in zip(*sides, trials.labels)]
    if not all(agrees):
        if pattern is not None:
            raise UserError(f"--speaker-pattern {pattern}: contradicts the labels of {agrees.count(False)} trials")
        return None
    return [str(s) for s in sides[0]], [str(s) for s in sides[1]]


def figure_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One readable row per figure, as they are or read back from JSON, whose null stands for NaN; rates in percent."""
    rows, figures = [], {name: math.nan if value is None else value for name, value in figures.items()}
    for name, title in NAMES.items():
        if name not in figures:
            continue
        percent = name.startswith("eer")
        show = lambda value, percent=percent: f"{value:.3%}" if percent else f"{value:.4f}"  # noqa: E731
        interval = ""
        if math.isfinite(figures.get(f"{name}_low", math.nan)):  # of a few speakers there is none
            interval = f"{show(figures[f'{name}_low'])} to {show(figures[f'{name}_high'])}"
        rows.append({"figure": title, "value": show(figures[name]), "95 % interval": interval})
        actual = name.replace("min_dcf", "actual_dcf")
        if actual != name and actual in figures:
            rows.append({"figure": "actual " + title[3:], "value": f"{figures[actual]:.4f}", "95 % interval": ""})
    for name, interval in figures.get("minus", {}).get("figures", {}).items():
        value, low, high = (math.nan if x is None else x for x in interval)
        show = lambda value, percent=name == "eer_nist": f"{value:+.3%}" if percent else f"{value:+.4f}"  # noqa: E731
        title = f"{NAMES[name].split(':')[0].rstrip(')')}) minus that of {figures['minus']['scores']}"
        between = f"{show(low)} to {show(high)}" if math.isfinite(low) else ""
        rows.append({"figure": title, "value": show(value), "95 % interval": between})
    return [row | {"marked": figures["marked"]} for row in rows] if "marked" in figures else rows


def write_evaluation(
    folder: Path,
    trials: scoring.Trials,
    scores: np.ndarray,
    calibrated: bool,
    speakers: tuple[list[str], list[str]] | None,
    draws: int,
    rates: Sequence[float],
    root: Path | None,
    unscored: np.ndarray,
    convention: str = "",
    against: tuple[str, np.ndarray] | None = None,
    marked: str = "",
) -> Report:
    """Write figures (JSON, CSV), pictures and the page of scored trials, `against` other scores of them if given.

    unscored: which trials have no score of their own and count as errors. convention: how the scores were made, for
    the record. marked: of the trials, what the model has seen. Raises ValueError for bad scores.
    """
    labels = np.asarray(trials.labels)
    figures = scoring.evaluate(scores, labels, calibrated)
    unsure = ""
    try:
        if draws:
            figures = scoring.evaluate(scores, labels, calibrated, *(speakers or (None, None)), draws)
            if against is not None:
                differences = {
                    name: scoring.bootstrap_difference(
                        metric, scores, against[1], labels, *(speakers or (None, None)), draws
                    )[:3]
                    for name, metric in scoring.INTERVAL_METRICS.items()
                }
                figures["minus"] = {"scores": against[0], "figures": differences}
    except ValueError as error:  # the figures stand, their intervals do not
        unsure = f"No intervals: {error}."
    figures |= {"no_intervals": unsure, "missing": int(unscored.sum()), "llr": calibrated, "trials_from": trials.source}
    figures |= {"scored_by": convention} | ({"marked": marked} if marked else {})
    thresholds = []
    for far in rates:
        try:
            miss, threshold = scoring.threshold_at_far(scores, labels, far)
            thresholds.append({"false-accept rate": f"{far:g}", "threshold": threshold, "miss rate": miss, "note": ""})
        except ValueError as error:
            thresholds.append({"false-accept rate": f"{far:g}", "threshold": "", "miss rate": "", "note": str(error)})
    figures["thresholds"] = thresholds
    conditions = {name: scoring.by_condition(scores, labels, values) for name, values in trials.conditions.items()}
    figures["conditions"] = conditions
    fpr, fnr = scoring.det_points(scores, labels)
    write_csv(folder / "det.csv", [{"fpr": float(a), "fnr": float(b)} for a, b in zip(fpr, fnr)])
    threshold = 0.0 if calibrated else figures["eer_nist_threshold"]
    systems = {"scores": (scores, labels)} | ({} if against is None else {against[0]: (against[1], labels)})
    det = scoring.plot_det(systems)
    histogram = scoring.plot_scores(scores, labels, threshold, "log-likelihood ratio" if calibrated else "score")
    det.savefig(folder / "det.png", dpi=120)
    histogram.savefig(folder / "scores.png", dpi=120)
    worst = worst_errors(trials.select(~unscored), scores[~unscored])
    write_csv(folder / "errors.csv", worst)

    scored = f" Scored by {convention}." if convention else ""
    report = Report("Speaker verification", f"{len(trials)} trials of {trials.source}.{scored}")
    if unscored.any():
        report.text(
            f"{unscored.sum()} trials of the list have no score and count as errors: the targets among them with the "
            "lowest score, the others with the highest."
        )
    report.table(figure_rows(figures))
    if unsure:
        report.text(unsure)
    elif draws:
        unit = figures["interval_resamples"]
        note = "" if speakers else " The names do not tell speakers, so these intervals are too narrow."
        report.text(f"Intervals: {draws} bootstrap draws of {unit}.{note}")
    report.figure(det, "DET curve").figure(histogram, "Scores and the threshold of the EER (or 0 for ratios)")
    report.section("Thresholds").text("Read from these trials; another microphone or language may need others.")
    report.table(thresholds)
    for name, rows in conditions.items():
        report.section(f"By {name}").table(rows)
    report.section("Worst errors")
    for row in worst:
        report.text(f"{row['kind']}: {row['enrol']} and {row['test']}, score {row['score']:.3f}")
        if root is not None:
            places, _ = locate([row["enrol"], row["test"]], root)
            for name, utterance in places.items():
                report.audio(_wav(utterance), name)
    write_json(folder / "evaluation.json", figures)
    report.write(folder / "report.html")
    return report


def worst_errors(trials: scoring.Trials, scores: np.ndarray, count: int = 5) -> list[dict[str, Any]]:
    """The targets with the lowest and the non-targets with the highest scores."""
    order = np.argsort(scores, kind="stable")
    targets = [n for n in order.tolist() if trials.labels[n] == 1][:count]
    others = [n for n in order[::-1].tolist() if trials.labels[n] == 0][:count]
    return [
        {"kind": kind, "enrol": str(trials.enroll[n]), "test": str(trials.test[n]), "score": float(scores[n])}
        for kind, rows in (("same speaker, low score", targets), ("different speakers, high score", others))
        for n in rows
    ]


def _wav(utterance: Utterance) -> bytes:
    buffer = io.BytesIO()
    write_samples(buffer, read_utterance(utterance, 16000, 0.0, 15.0), 16000)
    return buffer.getvalue()


def stress_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of `nearfar.audio.speakers.stress.stress` as they are shown."""
    shown = []
    for row in rows:
        line = {"condition": row["condition"], "what": row.get("what", "as it is"), "EER": f"{row['eer']:.2%}"}
        interval = ""
        if math.isfinite(row.get("low", math.nan)):
            interval = f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}"
        line["adds (points)"] = f"{100 * row['adds']:+.2f}" if "adds" in row else ""
        line["95 % interval"] = interval
        unit = row.get("shift_of", "score")
        line |= (
            {f"{unit}, same": f"{row['shift_same']:+.2f}", f"{unit}, others": f"{row['shift_other']:+.2f}"}
            if ("shift_same" in row)
            else {}
        )
        shown.append(line)
    names = list(dict.fromkeys(name for line in shown for name in line))
    return [{name: line.get(name, "") for name in names} for line in shown]
