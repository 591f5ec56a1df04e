"""What a session was worth: decoded again, its gaps, latencies, abstentions, transfer and false activations."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nearfar.core.report import Report
from nearfar.eeg import metrics, plots
from nearfar.eeg.live.scores import score_events
from nearfar.eeg.live.session import Session, replay, spread
from nearfar.eeg.live.stream import Decisions

SAID = {
    "seconds": "Seconds recorded",
    "decisions": "Windows decided",
    "abstained": "Windows that abstain because of the input",
    "undecided": "Windows below the threshold, or idle",
    "commands": "Commands",
    "gaps": "Gaps",
    "lost": "Samples lost",
    "clocks": "Jumps of the sender's clock",
    "overruns": "Chunks decided late",
    "short": "Samples fewer than the rate says",
    "latency": "Latency, median (s)",
    "latency_p99": "Latency, 99th percentile (s)",
    "jitter": "Latency, spread between quartiles (s)",
    "compute": "Computing a decision, median (s)",
    "compute_p99": "Computing a decision, 99th percentile (s)",
    "events": "Cues",
    "hits": "Cues answered rightly",
    "wrong": "Cues answered wrongly",
    "missed": "Cues without an answer",
    "false": "False activations",
    "false_per_minute": "False activations a minute outside cues",
    "answer": "From the cue to a right answer, median (s)",
    "bits_per_minute": "Information transfer (bits a minute, idle time counted)",
    "replay": "Decoded again",
}


def audit(
    folder: str | Path,
    decoder_folder: str | Path | None = None,
    *,
    events: dict[str, list[str]] | None = None,
    duration: float = 4.0,
) -> dict[str, Any]:
    """Check a session, write `audit.html` into its folder, and give the figures (names: see `SAID`).

    events: class -> its markers; by default a marker that is named as a class stands for it. duration: seconds from a
        marker within which it can be answered.
    """
    session = Session.read(folder)
    found: dict[str, Any] = {"seconds": len(session.times) / session.rate}
    happened = session.events()
    kinds = [line["event"] for line in happened]
    found |= {"gaps": len({line["sample"] for line in happened if line["event"] in ("gap", "edge", "returned")})}
    found |= {"lost": sum(line.get("lost", 0) for line in happened)}
    found |= {"clocks": kinds.count("clock"), "overruns": kinds.count("overrun")}
    jumps = sum(line["seconds"] for line in happened if line["event"] in ("gap", "clock"))
    if len(session.times) > 1:
        spanned = session.times[-1] - session.times[0] - jumps
        found["short"] = round(spanned * session.rate) + 1 - len(session.times)
    made, picture = session.decisions(), None
    remarks: list[str] = []
    if "decoder" in session.about and made:
        again = replay(folder, decoder_folder, session)
        different = f"{len(again.differences)} differences; first {again.differences[0]}" if not again.same else ""
        found["replay"] = different or "same to the last bit"
        if again.changed:
            found["replay"] += f" (changed since: {', '.join(again.changed)})"
        found["decisions"] = len(made)
        found["abstained"] = sum(one["abstained"] != "" for one in made)
        found["undecided"] = sum(one["decision"] is None and not one["abstained"] for one in made)
        found["commands"] = sum(one["command"] is not None for one in made)
        found |= spread([one["latency"] for one in made], [one["compute"] for one in made])
        scores, picture, remarks = _scores(session, made, events, duration)
        found |= scores
    report = Report("A live session", _introduction(session)).section("In short")
    for sentence in (*_summary(found, session), *remarks):
        report.text(sentence)
    if picture is not None:
        report.section("Along the session")
        report.figure(picture, "Probability of each class; shaded: the cues; marks: the commands.")
    report.section("Figures")
    report.table([{"figure": said, "value": found[key]} for key, said in SAID.items() if key in found])
    if happened:
        lines = [
            {"at (s)": line["sample"] / session.rate, "what": line["event"], "more": _more(line)} for line in happened
        ]
        report.section("What happened").table(lines)
    if reasons := pd.Series([one["abstained"] for one in made if one["abstained"]], dtype=str).value_counts().to_dict():
        report.section("Why windows abstained")
        report.table([{"reason": reason, "windows": count} for reason, count in list(reasons.items())[:20]])
    report.section("Settings, to repeat it").table(
        [{"setting": key, "value": str(value)} for key, value in session.about.items()]
    )
    report.write(session.folder / "audit.html")
    return found


def as_decisions(session: Session, made: list[dict[str, Any]]) -> Decisions:
    """The session's decisions as arrays, times in seconds of recorded signal."""
    classes = session.about["classes"]
    numbers = {None: metrics.NO_DECISION} | {name: k for k, name in enumerate(classes)}
    return Decisions(
        np.array([(one["sample"] + 1) / session.rate for one in made]),
        np.array([[np.nan if p is None else p for p in one["probabilities"].values()] for one in made]),
        np.array([numbers[one["decision"]] for one in made]),
        np.array([numbers[one["command"]] for one in made]),
        np.array([one["abstained"] for one in made], object),
    )


def _scores(
    session: Session, made: list[dict[str, Any]], events: dict[str, list[str]] | None, duration: float
) -> tuple[dict[str, Any], Figure, list[str]]:
    remarks: list[str] = []
    classes = session.about["classes"]
    named = {text: cls for cls, texts in (events or {name: [name] for name in classes}).items() for text in texts}
    cues = [(at, classes.index(named[text])) for at, text in session.markers() if named.get(text) in classes]
    idle = session.about["rule"]["idle"]
    cues = [(at, label) for at, label in cues if label != idle]
    all_cues, cues = cues, [cue for k, cue in enumerate(cues) if not k or cue[0] > cues[k - 1][0]]
    if more := len(all_cues) - len(cues):
        remarks.append(f"{more} cues come at the time of another, or in gaps, and are not scored.")
    decisions, total = as_decisions(session, made), len(session.times) / session.rate
    onsets, labels = np.array([at for at, _ in cues]), np.array([label for _, label in cues], int)
    choices = len(classes) - (idle is not None)
    scores = score_events(decisions, onsets, labels, duration=duration, total=total, n_classes=max(2, choices))
    table = pd.DataFrame({"onset": onsets, "duration": duration, "label": labels})
    if not len(cues):
        remarks.append("There are no cues in it, so that every command counts as a false activation.")
    found = {("answer" if key == "latency" else key): value for key, value in scores.items()}
    found = {key: value for key, value in found.items() if key in SAID}
    return found, plots.online_timeline(decisions, table, classes), remarks


def _summary(found: dict[str, Any], session: Session) -> list[str]:
    """The figures in words, for who does not work with such figures every day."""
    told = []
    if found.get("events"):
        answered, idle = found["hits"] + found["wrong"], session.about["rule"]["idle"] is not None
        bound = metrics.chance_bound(answered, max(2, len(session.about["classes"]) - idle)) if answered else 1.0
        better = "more than guessing would give" if found["hits"] >= bound * answered > 0 else "as guessing may give"
        told.append(
            f"Of {found['events']} cues the device answered {found['hits']} rightly and {found['wrong']} wrongly, and "
            f"{found['missed']} not at all. Of its answers {found['hits']} of {answered} are right, {better}."
        )
    if "false" in found:
        told.append(
            f"{found['false']} times it acted when nobody had asked for anything: {found['false_per_minute']:.1f} "
            "times a minute outside the cues."
        )
    if "decisions" in found:
        told.append(
            f"{found['abstained']} of {found['decisions']} windows were not decided because the signal was bad, "
            f"{found['undecided']} because the decoder was not sure or nothing was to be done. Half of the decisions "
            f"came within {1e3 * found['latency']:.0f} ms of their last sample, 99 of 100 within "
            f"{1e3 * found['latency_p99']:.0f} ms."
        )
    told.append(
        f"The recording has {found['gaps']} gaps, {found['lost']} samples lost, {found['clocks']} jumps of the clock."
        if found["gaps"] or found["lost"] or found["clocks"]
        else "The recording is whole: no gap, no lost sample, no jump of the clock."
    )
    if "replay" in found:
        told.append(f"Decoded again from the recording, the decisions are: {found['replay']}.")
    return told


def _introduction(session: Session) -> str:
    about, source = session.about, session.about["source"]
    names = ", ".join(name.replace("_", " ") for name in about.get("classes", ()))
    decoded = f"decoded by {about['decoder']} into {names}" if "decoder" in about else "recorded"
    return (
        f"{datetime.fromisoformat(about['started']):%d %B %Y, %H:%M} UTC: {len(about['ch_names'])} channels at "
        f"{about['rate']:g} Hz from {source['name']}, {decoded}. A command is what the device was told to do; a false "
        "activation is one that nobody had asked for."
    )


def _more(line: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("event", "sample", "time"))
