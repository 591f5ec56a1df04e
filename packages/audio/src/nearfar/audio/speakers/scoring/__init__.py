"""Scoring speaker verification: trial lists, score normalization, calibration and figures. Arrays in, figures out.

Nothing here needs a model. Embeddings are arrays `(n, E)`, scores `(n,)`, labels `(n,)` with 1 for trials in which
both sides are the same speaker (target) and 0 for the others (non-target). A trial is accepted where its score is
greater than the threshold. Everything is done by sorting and matrix products, in chunks, so memory does not grow with
trials times cohort; nothing loops over thresholds or trials.

Wrong arguments raise ValueError, files that a user can mend raise UserError.
"""

from nearfar.audio.speakers.scoring.backend import (
    PLDA,
    CohortStatistics,
    adaptive_s_norm,
    averaged_scores,
    cohort_statistics,
    enroll_models,
    make_cohort,
    normalize_scores,
    pair_scores,
    unit,
)
from nearfar.audio.speakers.scoring.calibration import QUALITY_NAMES, Calibration, draw_trials, quality_features
from nearfar.audio.speakers.scoring.rates import (
    COSTS,
    INTERVAL_METRICS,
    Cost,
    ErrorCurve,
    Interval,
    Rate,
    actual_dcf,
    bootstrap,
    bootstrap_difference,
    by_condition,
    cllr,
    det_points,
    duration_condition,
    eer,
    error_curve,
    error_rates,
    evaluate,
    min_cllr,
    min_dcf,
    plot_det,
    plot_scores,
    threshold_at_far,
)
from nearfar.audio.speakers.scoring.trials import (
    Trials,
    read_enrollments,
    read_scores,
    read_trials,
    write_scores,
    write_trials,
)

__all__ = [
    "COSTS",
    "INTERVAL_METRICS",
    "PLDA",
    "QUALITY_NAMES",
    "Calibration",
    "CohortStatistics",
    "Cost",
    "ErrorCurve",
    "Interval",
    "Rate",
    "Trials",
    "actual_dcf",
    "adaptive_s_norm",
    "averaged_scores",
    "bootstrap",
    "bootstrap_difference",
    "by_condition",
    "cllr",
    "cohort_statistics",
    "det_points",
    "draw_trials",
    "duration_condition",
    "eer",
    "enroll_models",
    "error_curve",
    "error_rates",
    "evaluate",
    "make_cohort",
    "min_cllr",
    "min_dcf",
    "normalize_scores",
    "pair_scores",
    "plot_det",
    "plot_scores",
    "quality_features",
    "read_enrollments",
    "read_scores",
    "read_trials",
    "threshold_at_far",
    "unit",
    "write_scores",
    "write_trials",
]
