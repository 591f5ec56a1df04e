"""Pictures, tables and pages of the app."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from nearfar.core.cli.console import table
from nearfar.core.errors import UserError
from nearfar.core.reading import reading
from nearfar.core.report import Report
from nearfar.eeg import plots
from nearfar.eeg.comparison import spatial_weights
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.decoding import NetworkClassifier
from nearfar.eeg.evaluation import Results
from nearfar.eeg.models.agtcnet import AGTCNet

CAPTIONS = {
    "subjects": "Accuracy of each decoder for each subject, with 95 % intervals; above the dashes a subject is better "
    "than chance.",
    "training": "Training curves of the networks: thin lines are single fits, thick ones their mean.",
    "confusion": "Confusion matrix",
    "spatial": "Spatial weights of the last fit",
    "desynchronization": "Event-related desynchronization: change of power against the time before the cue.",
}


def score_table(results: Results) -> Table:
    """The summary of an evaluation for the terminal."""
    return table(summary_rows(results.summary(), results.rows), title=" / ".join(results.rows["protocol"].unique()))


def summary_rows(summary: pd.DataFrame, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One readable row per decoder, with the chance bound of all test trials together."""
    lines = []
    for line in summary.to_dict("records"):
        own = rows[(rows["model"] == line["model"]) & (rows["protocol"] == line["protocol"])]
        shown = {
            "decoder": line["model"],
            "accuracy": float(line["accuracy"]),
            "± std": float(line["accuracy_std"]),
            "balanced": float(line["balanced_accuracy"]),
            "kappa": float(line["kappa"]),
            "AUC": float(line["auc"]),
            "chance": float(own["chance"].mean()),
            "bound of a test set": float(own["chance_bound"].mean()),
            "subjects": line["subjects"],
            "test trials": int(own[own["repeat"] == own["repeat"].min()]["n_test"].sum()),
            "seconds": float(own["seconds"].sum()),
        }
        if np.isfinite(line["low"]):  # of a few subjects there is none
            shown |= {"95 % low": float(line["low"]), "95 % high": float(line["high"])}
        if np.isnan(shown["AUC"]):
            del shown["AUC"]
        if not np.isnan(line["sma20"]):
            shown["SMA20"] = float(line["sma20"])
        if line["failed"]:
            shown["counted as chance"] = line["failed"]
        lines.append(shown)
    columns = dict.fromkeys(column for line in lines for column in line)
    return [{column: line.get(column, "") for column in columns} for line in lines]


def evaluation_page(folder: Path, report: Report | None = None, level: int = 2) -> Report:
    """The page of an evaluation from what `evaluate` wrote to `folder`; appended to `report` if one is given."""
    with reading(folder, "holds no finished evaluation", "run `evaluate` again"):
        about = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("results", "summary")}
    rows = tables["results"].fillna({"failure": ""})
    report = report or Report("Motor imagery: decoders compared")
    report.section(f"{' / '.join(rows['protocol'].unique())}", level)
    if about.get("published"):
        report.text(
            "These figures follow the published protocol: the test trials chose the epoch of each network. They are "
            "too good and are here to be compared with published ones only."
        )
    report.text(
        f"{about['trials']} trials of {', '.join(about['classes'])}. A test set whose accuracy is above its bound is "
        "better than guessing at 95 %; chance is answering the class of most of its trials, always. A fit that failed "
        "counts as chance."
    )
    report.table(summary_rows(tables["summary"], rows))
    columns = ["model", "subject", "session", "repeat", "n_train", "n_test", "accuracy", "balanced_accuracy", "kappa"]
    columns += ["auc", "chance", "chance_bound"]
    _figures(report, folder / "figures", "subjects", "training", "confusion", "spatial", "desynchronization")
    report.section("All results", level + 1).table(rows[columns].to_dict("records"))
    comparison = pd.read_csv(folder / "comparison.csv")
    if len(comparison):
        report.section("Paired tests between decoders", level + 1).table(comparison.to_dict("records"))
    report.section("Settings", level + 1).code(json.dumps(about, indent=2))
    return report


def decoder_page(decoder: Decoder, report: Report | None = None, level: int = 2) -> Report:
    """The page of a decoder: what it takes, how it was trained, what it is worth, its spatial weights."""
    report = report or Report("Motor imagery: a decoder")
    network, history = decoder.network, pd.DataFrame(decoder.training["history"])
    report.section(f"{type(network).__name__}: {', '.join(decoder.classes)}", level)
    report.text(
        f"Takes {len(decoder.ch_names)} channels ({', '.join(decoder.ch_names)}), {network.n_times} samples at "
        f"{decoder.sfreq:g} Hz from {decoder.preprocessing.tmin:g} s after the cue, in microvolts. "
        f"{sum(p.numel() for p in network.parameters()):,} parameters."
    )
    report.table([{"figure": k, "value": json.dumps(v)} for k, v in decoder.metrics.items()])
    if len(history):
        report.figure(plots.training_curves(history), CAPTIONS["training"])
    if isinstance(network, AGTCNet):
        classifier = NetworkClassifier()
        classifier.network_ = network
        try:
            report.figure(
                plots.topographic_maps(spatial_weights(classifier)[0], decoder.info, label="GCAP weight"),
                "Spatial weights (GCAP): how the strongest filters weigh the electrodes.",
            )
        except UserError as error:
            report.text(f"No map of the spatial weights: {error}")
    report.section("Preprocessing and training", level + 1)
    settings = {"preprocessing": decoder.preprocessing.to_dict(), "recipe": decoder.training["recipe"]}
    return report.code(json.dumps(settings, indent=2))


def combined_page(folders: list[Path]) -> Report:
    """Several evaluations and decoders on one page."""
    report = Report("Motor imagery")
    for folder in folders:
        report.section(str(folder))
        if (folder / "evaluation.json").exists():
            evaluation_page(folder, report, 3)
        elif (folder / "decoder.json").exists():
            decoder_page(Decoder.load(folder), report, 3)
        else:
            raise UserError(f"{folder}: holds neither a finished evaluation nor a decoder")
    return report


def _figures(report: Report, folder: Path, *kinds: str) -> None:
    for kind in kinds:
        for path in sorted(folder.glob(f"{kind}*")):
            model = path.stem.removeprefix(kind).lstrip("-")
            caption = f"{CAPTIONS[kind].rstrip('.')}: {model}." if model else CAPTIONS[kind]
            if path.suffix == ".png":
                report.figure(path, caption)
            else:
                report.text(f"{caption} Not drawn: {path.read_text(encoding='utf-8')}.")
