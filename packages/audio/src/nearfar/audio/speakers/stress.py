"""How much a speaker model suffers from devices, lines and editors: one condition of the test side at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nearfar.audio import augment
from nearfar.audio.sound import Samples
from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.system import SpeakerSystem

Condition = Callable[[Samples, int, np.random.Generator], Samples]
"""(samples, rate, generator) to samples."""

CONDITIONS: Mapping[str, tuple[str, Condition]] = {
    "zeros": ("100 ms of zeros at the end", lambda x, rate, _: np.r_[x, np.zeros(rate // 10, np.float32)]),
    "gate": ("zeros wherever it is 40 dB below the peak", lambda x, rate, _: augment.gate(x, 40.0)),
    "packets": ("5 % of the packets of 20 ms lost", lambda x, rate, rng: augment.lose_packets(x, rate, rng, 0.05)),
    "mu-law": ("8-bit mu-law", lambda x, rate, _: augment.through_codec(x, rate, "mu-law")),
    "codec": ("GSM full rate", lambda x, rate, _: augment.through_codec(x, rate, "GSM")),
    "noise": ("white noise at 20 dB", lambda x, rate, rng: augment.add_white_noise(x, rng, 20.0)),
    "gain": ("20 dB softer, in 16 bits", lambda x, rate, rng: augment.quantize(augment.apply_gain(x, -20.0), rng)),
    "cut": ("the first half alone", lambda x, rate, _: x[: max(len(x) // 2, min(len(x), rate // 4))]),
    "resampling": ("through 0.8 of its rate", lambda x, rate, _: augment.narrow(x, rate, round(0.8 * rate))),
}
"""By name: what it is in words, and what it does."""


def stress(
    system: SpeakerSystem,
    trials: scoring.Trials,
    names: Sequence[str],
    clean: np.ndarray,
    degraded: Mapping[str, np.ndarray],
    speakers: tuple[Sequence[str], Sequence[str]] | None = None,
    draws: int = 200,
) -> list[dict[str, Any]]:
    """One row per condition: the EER, what it adds, and how the answers shift, on trials whose test side is degraded.

    Args:
        trials: with labels. names: of the rows of `clean` and of each of `degraded`, all embeddings (n, E).
        speakers: of both sides of each trial, for the intervals; None draws trials.

    `shift` is that of the natural log-likelihood ratio where the system is calibrated by scores alone, else of the
    score; the mean over targets and over the others, condition minus clean. Intervals are paired, of the difference.
    """
    left, right = trials.indices(names)
    labels = np.asarray(trials.labels)
    ratios = system.calibration is not None and system.quality is None
    sides = speakers or (None, None)

    def answers(test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = system.score(clean, test, left, right)
        return scores, system.calibration(scores) if ratios and system.calibration is not None else scores

    plain, before = answers(clean)
    rows: list[dict[str, Any]] = [{"condition": "clean", "eer": scoring.eer(plain, labels).value}]
    for name, embeddings in degraded.items():
        scores, after = answers(embeddings)
        shift = after - before
        row = {"condition": name, "what": CONDITIONS[name][0], "eer": scoring.eer(scores, labels).value}
        row["adds"] = row["eer"] - rows[0]["eer"]
        if draws:
            metric = scoring.INTERVAL_METRICS["eer_nist"]
            try:
                interval = scoring.bootstrap_difference(metric, scores, plain, labels, sides[0], sides[1], draws)
                row["low"], row["high"] = interval.low, interval.high
            except ValueError:  # too few speakers: the figure stands, its interval does not
                row["low"] = row["high"] = float("nan")
        row["shift_same"], row["shift_other"] = (float(shift[labels == kind].mean()) for kind in (1, 0))
        row["shift_of"] = "llr" if ratios else "score"
        rows.append(row)
    return rows
