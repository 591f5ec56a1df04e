"""Time and memory of scoring a list as large as Vox1-E: cosine, AS-norm, EER and minDCF.

    uv run --group bench python benchmarks/scoring.py [--trials 580000] [--utterances 145000] [--cohort 6000]

Synthetic 192-d embeddings. Next to it, on a subset: speechbrain's EER and minDCF, whose time grows with the square of
the trials, and a loop that normalizes one trial at a time, compared per trial. Both must give our numbers.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nearfar.audio.speakers import scoring


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def peak_gib() -> float:
    """Greatest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def embeddings(rng: np.random.Generator, centers: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    noise = rng.standard_normal((len(speakers), centers.shape[1]), dtype=np.float32)
    return centers[speakers] + 2.5 * noise


def one_by_one(x, left, right, scores, cohort, top_n):
    """AS-norm as scripts do it: both sides meet the cohort anew in each trial."""
    normalized = np.empty(len(scores))
    for n, (i, j, score) in enumerate(zip(left, right, scores)):
        total = 0.0
        for side in (x[i], x[j]):
            top = np.sort(cohort @ side)[-top_n:]
            total += (score - top.mean()) / top.std()
        normalized[n] = total / 2
    return normalized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=580_000)
    parser.add_argument("--utterances", type=int, default=145_000)
    parser.add_argument("--cohort", type=int, default=6_000)
    parser.add_argument("--top-n", type=int, default=300)
    parser.add_argument("--subset", type=int, default=3_000, help="trials that the slow forms get")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    speakers = rng.integers(0, 1_251, options.utterances)
    x = embeddings(rng, rng.standard_normal((1_251, 192), dtype=np.float32), speakers)
    cohort = rng.standard_normal((options.cohort, 192), dtype=np.float32)
    left, right, labels = scoring.draw_trials(speakers, options.trials)
    found: dict[str, float] = {"trials": options.trials, "utterances": options.utterances, "cohort": options.cohort}

    found["cosine_s"], scores = timed(lambda: scoring.pair_scores(x, x, left, right))
    found["as_norm_s"], normal = timed(
        lambda: scoring.adaptive_s_norm(scores, x, x, left, right, cohort, top_n=options.top_n)
    )
    found["eer_s"], rate = timed(lambda: scoring.eer(normal, labels).value)
    found["min_dcf_s"], _ = timed(lambda: scoring.min_dcf(normal, labels).value)
    found["eer"], found["peak_gib"] = rate, peak_gib()

    part = rng.choice(options.trials, options.subset, replace=False)
    unit, unit_cohort = scoring.unit(x), scoring.unit(cohort)
    loop_s, slow = timed(lambda: one_by_one(unit, left[part], right[part], scores[part], unit_cohort, options.top_n))
    np.testing.assert_allclose(slow, normal[part], atol=1e-3)
    found["loop_over_as_norm"] = (loop_s / options.subset) / (found["as_norm_s"] / options.trials)

    try:
        import torch
        from speechbrain.utils.metric_stats import EER, minDCF
    except ImportError:
        print("speechbrain is not installed (--group bench): its functions are left out")
    else:
        s, y = normal[part], labels[part]
        targets, others = (torch.from_numpy(s[y == label]) for label in (1, 0))
        theirs_s, (theirs, _) = timed(lambda: EER(targets, others))
        ours_s, ours = timed(lambda: scoring.eer(s, y, "midpoint").value)
        assert abs(theirs - ours) < 1e-6, (theirs, ours)
        found["speechbrain_over_eer_on_subset"] = theirs_s / ours_s
        theirs_s, (theirs, _) = timed(lambda: minDCF(targets, others))
        ours_s, ours = timed(lambda: scoring.min_dcf(s, y, normalize=False).value)
        assert abs(theirs - ours) < 1e-6, (theirs, ours)
        found["speechbrain_over_min_dcf_on_subset"] = theirs_s / ours_s

    for name, value in found.items():
        print(f"{name:36s} {value:.4g}" if isinstance(value, float) else f"{name:36s} {value}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(found, stream, indent=2)


if __name__ == "__main__":
    main()
