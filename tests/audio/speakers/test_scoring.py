"""Scoring: worked numbers, slow oracles, properties, and bad input."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.lists import count_unscored
from nearfar.audio.speakers.scoring.backend import (
    PLDA,
    CohortStatistics,
    adaptive_s_norm,
    cohort_statistics,
    enroll_models,
    make_cohort,
    normalize_scores,
    pair_scores,
    unit,
)
from nearfar.audio.speakers.scoring.calibration import Calibration, draw_trials, quality_features
from nearfar.audio.speakers.scoring.rates import (
    COSTS,
    Cost,
    actual_dcf,
    bootstrap,
    bootstrap_difference,
    cllr,
    eer,
    error_curve,
    min_cllr,
    min_dcf,
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
from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import UserError


def trials(count=600, shift=1.5, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(int)
    scores = rng.standard_normal(count) + shift * labels
    return (np.round(scores, 1) if ties else scores), labels


def slow_rates(scores, labels, threshold):
    """Miss and false-accept rate by counting."""
    return (
        np.mean([s <= threshold for s, y in zip(scores, labels) if y == 1]),
        np.mean([s > threshold for s, y in zip(scores, labels) if y == 0]),
    )


# Figures -----------------------------------------------------------------------------------------------------------


def test_worked_numbers():
    contract = Contract.load(next(p for p in shipped("l-tdnn") if "eer-mindcf" in p.name))
    scores = contract.input_tensors()[0].double().numpy()
    labels = np.arange(3000) % 5 == 0
    scores = scores + 1.6 * labels
    assert eer(scores, labels).value == pytest.approx(0.23125, abs=1e-12)
    assert eer(scores, labels, "midpoint").value == pytest.approx(0.23146, abs=5e-6)
    assert min_dcf(scores, labels, Cost(0.01)).value == pytest.approx(0.91625, abs=1e-9)
    assert min_dcf(scores, labels, "voxsrc").value == pytest.approx(0.88292, abs=5e-6)
    assert min_dcf(scores, labels, "sre10").value == 1.0
    assert min_dcf(scores, labels, normalize=False).value == pytest.approx(0.0091625, abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_curve_equals_counting(ties):
    scores, labels = trials(200, ties=ties)
    curve = error_curve(scores, labels)
    assert len(curve.threshold) == len(set(scores)) + 1
    for threshold, fnr, fpr in zip(*curve):
        assert (fnr, fpr) == pytest.approx(slow_rates(scores, labels, threshold), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_eer_equals_the_slow_conventions(ties):
    scores, labels = trials(300, ties=ties)
    points = [(0.0, 1.0), *(slow_rates(scores, labels, t) for t in sorted(set(scores)))]
    after = next(i for i, (fnr, fpr) in enumerate(points) if fnr >= fpr)
    (n1, p1), (n2, p2) = points[after], points[after - 1]
    a = (n1 - p1) / (p2 - p1 - (n2 - n1))
    assert eer(scores, labels).value == pytest.approx(n1 + a * (n2 - n1), abs=1e-12)
    unique = sorted(set(scores))
    thresholds = sorted([*unique, *((a + b) / 2 for a, b in pairwise(unique))])
    nearest = min((slow_rates(scores, labels, t) for t in thresholds), key=lambda r: abs(r[0] - r[1]))
    assert eer(scores, labels, "midpoint").value == pytest.approx(sum(nearest) / 2, abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores)
    at = np.argmin(np.abs(1 - tpr - fpr))
    assert eer(scores, labels, "roc").value == max(fpr[at], 1 - tpr[at])


@pytest.mark.parametrize("name", list(COSTS))
def test_min_dcf_equals_counting(name):
    scores, labels = trials(200, ties=True)
    want = np.mean(
        [
            min(
                (c.c_miss * c.p_target * fnr + c.c_fa * (1 - c.p_target) * fpr)
                / min(c.c_miss * c.p_target, c.c_fa * (1 - c.p_target))
                for fnr, fpr in (slow_rates(scores, labels, t) for t in [-math.inf, *scores])
            )
            for c in COSTS[name]
        ]
    )
    assert min_dcf(scores, labels, name).value == pytest.approx(want, abs=1e-12)


scored = st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: 0 < sum(y for _, y in rows) < len(rows)
)


@settings(max_examples=150, deadline=None)
@given(scored)
def test_figures_do_not_depend_on_monotone_maps_or_order(rows):
    scores, labels = np.array([s for s, _ in rows], float), np.array([y for _, y in rows], int)
    order = np.random.default_rng(0).permutation(len(scores))
    for convention in ("nist", "midpoint", "roc"):
        value = eer(scores, labels, convention).value
        assert 0 <= value <= 1
        assert eer(np.exp(scores / 20), labels, convention).value == pytest.approx(value, abs=1e-12)
        assert eer(scores[order], labels[order], convention).value == pytest.approx(value, abs=1e-12)
    for name in COSTS:
        value = min_dcf(scores, labels, name).value
        assert 0 <= value <= 1
        assert min_dcf(scores**3, labels, name).value == pytest.approx(value, abs=1e-12)
    value = min_cllr(scores, labels)
    assert 0 <= value <= 1 + 1e-12
    assert min_cllr(scores**3, labels) == pytest.approx(value, abs=1e-9)
    # swapping the classes and the sign swaps misses and false accepts; ties are shared points either way
    assert eer(-scores, 1 - labels).value == pytest.approx(eer(scores, labels).value, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(scored)
def test_whole_weights_equal_repeated_trials(rows):
    scores, labels = np.array([s for s, _ in rows], float), np.array([y for _, y in rows], int)
    weights = np.random.default_rng(len(rows)).integers(1, 4, len(scores))
    repeated = np.repeat(scores, weights), np.repeat(labels, weights)
    assert eer(scores, labels, weights=weights).value == pytest.approx(eer(*repeated).value, abs=1e-9)
    assert min_dcf(scores, labels, weights=weights).value == pytest.approx(min_dcf(*repeated).value, abs=1e-9)
    assert cllr(scores, labels, weights) == pytest.approx(cllr(*repeated), rel=1e-9)
    assert min_cllr(scores, labels, weights) == pytest.approx(min_cllr(*repeated), abs=1e-9)


def test_extremes():
    assert eer([1, 2, 3, 4], [0, 0, 1, 1]).value == 0
    assert eer([1, 2, 3, 4], [1, 1, 0, 0]).value == 1
    assert eer([0, 0, 0, 0], [0, 1, 0, 1]).value == 0.5
    assert min_dcf([0, 0, 0, 0], [0, 1, 0, 1]).value == 1
    assert min_cllr([1, 2, 3, 4], [0, 0, 1, 1]) == 0
    assert min_cllr([0, 0, 0], [0, 1, 0]) == pytest.approx(1)
    assert cllr(np.zeros(4), [0, 1, 0, 1]) == 1


def test_actual_costs_and_cllr_of_calibrated_scores():
    rng = np.random.default_rng(0)
    labels = rng.random(40000) < 0.5
    # with x ~ N(+-1, 1), 2 x is the true log-likelihood ratio
    llr = 2 * (rng.standard_normal(40000) + np.where(labels, 1, -1))
    assert cllr(llr, labels) - min_cllr(llr, labels) < 0.003
    result = actual_dcf(llr, labels, Cost(0.1))
    assert result.threshold == pytest.approx(math.log(9))
    assert result.value - min_dcf(llr, labels, Cost(0.1)).value < 0.02
    assert cllr(llr + 3, labels) > cllr(llr, labels) + 0.1
    assert actual_dcf(llr + 5, labels, Cost(0.1)).value > result.value + 0.1


def test_min_cllr_is_the_least_over_monotone_maps():
    scores, labels = trials(400, ties=True)
    least = min_cllr(scores, labels)
    assert least < cllr(Calibration.fit(scores, labels)(scores), labels)
    assert least < cllr(scores, labels)


def test_threshold_at_far():
    scores, labels = trials(3000)
    for far in (0.2, 0.05, 0.01):
        miss, threshold = threshold_at_far(scores, labels, far)
        fnr, fpr = slow_rates(scores, labels, threshold)
        assert fnr == pytest.approx(miss)
        assert fpr <= far
        below = max(s for s in scores if s < threshold)
        assert slow_rates(scores, labels, below)[1] > far  # a lower threshold would let more in
    assert threshold_at_far(scores, labels, 0.05, comparisons=20).threshold > threshold_at_far(scores, labels, 0.05)[1]
    with pytest.raises(ValueError, match="cannot show"):
        threshold_at_far(scores, labels, 1e-5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_at_far(scores, labels, 0)


def test_det_points_keep_the_corners():
    scores, labels = trials(300, ties=True)
    fpr, fnr = scoring.det_points(scores, labels)
    curve = error_curve(scores, labels)
    assert len(fpr) <= len(curve.fpr)
    assert (np.diff(fpr) <= 0).all()
    assert (np.diff(fnr) >= 0).all()
    assert min(0.01 * fnr + 0.99 * fpr) == min(0.01 * curve.fnr + 0.99 * curve.fpr)


def test_plots_draw(tmp_path):
    scores, labels = trials()
    figure = scoring.plot_det({"a": (scores, labels), "b": (scores**3, labels)})
    figure.savefig(tmp_path / "det.png")
    assert [line.get_label() for line in figure.axes[0].lines if ":" in str(line.get_label())]
    scoring.plot_scores(scores, labels, 0.7).savefig(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, float("nan"), 2.0], [0, 1, 1], "1 of 3 scores are not finite"),
        ([1.0, 2.0], [1, 1], "got 2 and 0"),
        ([1.0, 2.0], [0, 0], "got 0 and 2"),
        ([], [], "targets and non-targets"),
        ([1.0, 2.0], [0, 2], "labels must be"),
        ([1.0, 2.0], [0, 1, 1], "one length"),
    ],
)
def test_bad_scores_are_refused_everywhere(scores, labels, message):
    scores, labels = np.array(scores), np.array(labels)
    for figure in (error_curve, eer, min_dcf, cllr, min_cllr, actual_dcf, Calibration.fit):
        with pytest.raises(ValueError, match=message):
            figure(scores, labels)


def test_wrong_names_are_refused():
    scores, labels = trials(50)
    with pytest.raises(ValueError, match="nist, midpoint or roc"):
        eer(scores, labels, "vox")
    with pytest.raises(ValueError, match="voxceleb, voxsrc"):
        min_dcf(scores, labels, "sre99")
    with pytest.raises(ValueError, match="p_target"):
        min_dcf(scores, labels, Cost(0.0))


# Embeddings and normalization --------------------------------------------------------------------------------------


def test_pair_scores_equal_the_loop():
    rng = np.random.default_rng(0)
    x, y, mean = rng.standard_normal((7, 5)), rng.standard_normal((6, 5)), rng.standard_normal(5)
    left, right = rng.integers(0, 7, 30), rng.integers(0, 6, 30)
    want = [
        (x[i] - mean) @ (y[j] - mean) / np.linalg.norm(x[i] - mean) / np.linalg.norm(y[j] - mean)
        for i, j in zip(left, right)
    ]
    np.testing.assert_allclose(pair_scores(x, y, left, right, mean, chunk=4), want, atol=1e-12)


@pytest.mark.parametrize("top_n", [None, 6])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("own", [False, True])
def test_cohort_statistics_equal_the_loop(top_n, ddof, own):
    rng = np.random.default_rng(1)
    x, cohort, mean = rng.standard_normal((9, 5)), rng.standard_normal((20, 5)), rng.standard_normal(5)
    speakers, cohort_speakers = list("abcabcabz"), list("abcdefghij" * 2)
    named = {"speakers": speakers, "cohort_speakers": cohort_speakers} if own else {}
    got = cohort_statistics(x, cohort, mean, top_n, ddof, chunk=4, **named)
    for row in range(9):
        values = sorted(
            float(unit(x, mean)[row] @ unit(cohort, mean)[c])
            for c in range(20)
            if not own or speakers[row] != cohort_speakers[c]
        )
        values = values if top_n is None else values[-top_n:]
        assert got.mean[row] == pytest.approx(np.mean(values), abs=1e-12)
        assert got.std[row] == pytest.approx(np.std(values, ddof=ddof), abs=1e-12)


def test_as_norm_does_not_depend_on_the_order_of_the_cohort_and_removes_side_offsets():
    rng = np.random.default_rng(2)
    x, cohort = rng.standard_normal((10, 6)), rng.standard_normal((40, 6))
    left, right = rng.integers(0, 10, 50), rng.integers(0, 10, 50)
    scores = pair_scores(x, x, left, right)
    value = adaptive_s_norm(scores, x, x, left, right, cohort, top_n=10)
    np.testing.assert_allclose(
        adaptive_s_norm(scores, x, x, left, right, cohort[rng.permutation(40)], top_n=10), value, atol=1e-10
    )
    stats = CohortStatistics(np.zeros(50) + 3, np.ones(50) * 2)
    np.testing.assert_allclose(normalize_scores(2 * scores + 3, stats, stats), scores)
    other = CohortStatistics(np.zeros(50), np.ones(50))
    np.testing.assert_allclose(normalize_scores(scores, stats, other, "z"), (scores - 3) / 2)
    np.testing.assert_allclose(normalize_scores(scores, stats, other, "t"), scores)
    with pytest.raises(ValueError, match="s, z or t"):
        normalize_scores(scores, stats, other, "x")


def test_cohorts():
    x = np.array([[1.0, 0], [3, 0], [0, 2], [0, 5]])
    names = ["a", "a", "b", "c"]
    cohort, speakers = make_cohort(x, names)
    np.testing.assert_allclose(cohort, [[2, 0], [0, 2], [0, 5]])
    assert speakers.tolist() == ["a", "b", "c"]
    cohort, speakers = make_cohort(x, names, "utterance", exclude=["b"], limit=2)
    assert len(cohort) == 2
    assert "b" not in speakers
    with pytest.raises(ValueError, match="no speaker is left"):
        make_cohort(x, names, exclude=["a", "b", "c"])
    with pytest.raises(ValueError, match="cannot be taken"):
        cohort_statistics(x, x, top_n=5)
    with pytest.raises(ValueError, match="only 2 cohort rows"):
        cohort_statistics(x, x, top_n=3, speakers=names, cohort_speakers=names)
    with pytest.raises(ValueError, match="both speakers"):
        cohort_statistics(x, x, speakers=names)


def test_bad_embeddings_are_named():
    x = np.ones((4, 3))
    x[1, 0] = np.nan
    x[2] = 0
    with pytest.raises(ValueError, match=r"2 embeddings .* rows 1, 2"):
        unit(x)
    with pytest.raises(ValueError, match="rows 0"):
        unit(np.ones((1, 3)), np.ones(3))


def test_enrolled_models():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 4))
    models = enroll_models(x, [[0], [1, 2, 4]])
    np.testing.assert_allclose(models[0], x[0] / np.linalg.norm(x[0]))
    want = sum(x[i] / np.linalg.norm(x[i]) for i in (1, 2, 4))
    np.testing.assert_allclose(models[1], want / np.linalg.norm(want))
    np.testing.assert_allclose(scoring.averaged_scores(np.array([1.0, 3, 5]), np.array([0, 0, 1]), 2), [2, 5])
    with pytest.raises(ValueError, match="without: 1"):
        enroll_models(x, [[0], []])
    with pytest.raises(ValueError, match="twice"):
        enroll_models(x, [[0, 0]])
    with pytest.raises(ValueError, match="1 trials have no score"):
        scoring.averaged_scores(np.ones(1), np.array([0]), 2)


def plda_data(speakers=400, each=6, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.array([[1.0, 0.4, 0.1], [-0.3, 1.0, 0.5], [0.2, -0.6, 1.0]])
    between, within = mix @ np.diag([4.0, 1.0, 0.2]) @ mix.T, np.diag([1.0, 0.5, 2.0])
    names = np.repeat(np.arange(speakers), each)
    y = rng.multivariate_normal(np.zeros(3), between, speakers)
    return y[names] + rng.multivariate_normal(np.zeros(3), within, len(names)) + 5, names, between, within


def test_plda_scores_are_the_likelihood_ratio_of_gaussians():
    x, names, _, _ = plda_data(60)
    model = PLDA.fit(x, names)
    left, right = np.array([0, 0, 7]), np.array([1, 30, 100])
    inverse = np.linalg.inv(model.transform)
    between, within = inverse.T @ np.diag(model.psi) @ inverse, inverse.T @ inverse
    total = between + within
    joint = np.block([[total, between], [between, total]])
    for i, j, score in zip(left, right, model.scores(x, x, left, right)):
        pair = np.r_[x[i], x[j]] - np.r_[model.mean, model.mean]
        apart = sum(multivariate_normal.logpdf(v, np.zeros(3), total) for v in (pair[:3], pair[3:]))
        assert score == pytest.approx(multivariate_normal.logpdf(pair, np.zeros(6), joint) - apart, abs=1e-8)


def test_plda_finds_the_covariances_and_beats_cosine_where_they_matter():
    x, names, between, within = plda_data(2000)
    model = PLDA.fit(x, names, iterations=30)
    inverse = np.linalg.inv(model.transform)
    np.testing.assert_allclose(inverse.T @ inverse, within, atol=0.1)
    np.testing.assert_allclose(inverse.T @ np.diag(model.psi) @ inverse, between, atol=0.1 * between.max())
    test, test_names, _, _ = plda_data(100, seed=1)
    left, right, labels = draw_trials(test_names, 4000)
    by_plda = eer(model.scores(test, test, left, right), labels).value
    by_cosine = eer(pair_scores(test, test, left, right, model.mean), labels).value
    assert by_plda < by_cosine
    llr = model.scores(test, test, left, right)
    assert cllr(llr, labels) < min_cllr(llr, labels) + 0.05  # calibrated as it comes
    with pytest.raises(ValueError, match="too few"):
        PLDA.fit(x[:4], names[:4])


# Calibration -------------------------------------------------------------------------------------------------------


def test_calibration_is_logistic_regression():
    scores, labels = trials(2000)
    fit = Calibration.fit(scores, labels, smoothing=False)
    weights = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (1 - labels).sum()) * len(labels)
    theirs = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(scores[:, None], labels, sample_weight=weights)
    assert fit.weights[0] == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert fit.bias == pytest.approx(theirs.intercept_[0], abs=1e-4)
    best = minimize(lambda p: cllr(p[0] * scores + p[1], labels), [1.0, 0.0]).fun
    assert cllr(fit(scores), labels) == pytest.approx(best, abs=1e-7)
    smooth = Calibration.fit(scores, labels)
    assert abs(smooth.weights[0] / fit.weights[0] - 1) < 0.05


def test_calibration_never_changes_eer_or_min_dcf():
    for seed in range(5):
        scores, labels = trials(300, seed=seed, ties=True)
        llr = Calibration.fit(scores, labels)(scores)
        for convention in ("nist", "midpoint", "roc"):
            assert eer(llr, labels, convention).value == pytest.approx(eer(scores, labels, convention).value, abs=1e-12)
        assert min_dcf(llr, labels).value == pytest.approx(min_dcf(scores, labels).value, abs=1e-12)
        assert min_cllr(llr, labels) == pytest.approx(min_cllr(scores, labels), abs=1e-12)


def test_few_separated_trials_never_claim_certainty():
    scores, labels = np.array([0.0, 1, 2, 5, 6, 7]), np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="separate"):
        Calibration.fit(scores, labels, smoothing=False)
    llr = Calibration.fit(scores, labels)(scores)
    assert np.abs(llr).max() < 3
    many = Calibration.fit(np.tile(scores, 100), np.tile(labels, 100))
    assert many(scores).max() > llr.max()


def test_calibration_refuses_scores_that_point_the_wrong_way():
    scores, labels = trials()
    with pytest.raises(ValueError, match="cannot be calibrated"):
        Calibration.fit(-scores, labels)
    with pytest.raises(ValueError, match="2 features, 1 names"):
        Calibration.fit(np.c_[scores, scores**2], labels, names=["score"])
    with pytest.raises(ValueError, match=r"takes 1 features \(score\), got 2"):
        Calibration.fit(scores, labels)(np.ones((3, 2)))


def test_calibration_keeps_intervals_and_survives_saving(tmp_path):
    scores, labels = trials(400)
    fit = Calibration.fit(scores, labels, replicates=100, notes={"list": "made up"})
    low, high = fit.interval(np.array([-2.0, 0, 2.0]))
    llr = fit(np.array([-2.0, 0, 2.0]))
    assert (low < llr).all()
    assert (llr < high).all()
    more = Calibration.fit(*trials(4000), replicates=100)
    low_more, high_more = more.interval(np.array([-2.0, 0, 2.0]))
    assert (high_more - low_more < high - low).all()
    fit.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    np.testing.assert_array_equal(again(scores), fit(scores))
    np.testing.assert_array_equal(again.interval(scores)[0], fit.interval(scores)[0])
    assert again.notes["list"] == "made up"
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as a calibration"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(ValueError, match="without bootstrap"):
        Calibration.fit(scores, labels).interval(scores)


def test_quality_measures_help_where_quality_varies():
    rng = np.random.default_rng(0)
    labels = (rng.random(6000) < 0.5).astype(int)
    durations = rng.uniform(1, 30, 6000), rng.uniform(1, 30, 6000)
    short = np.minimum(*durations) < 4
    scores = rng.standard_normal(6000) + 3 * labels + 2.0 * short  # short trials score higher, whoever speaks
    embeddings = rng.standard_normal((6000, 8)), rng.standard_normal((6000, 8))
    means = rng.uniform(0.1, 0.3, 6000), rng.uniform(0.1, 0.3, 6000)
    features = quality_features(scores, durations, embeddings, means)
    assert features.shape == (6000, 13) == (6000, len(scoring.QUALITY_NAMES["wespeaker"]))
    np.testing.assert_allclose(features[:, 1], np.minimum(*durations).clip(max=20))
    np.testing.assert_allclose(features[:, 12], np.maximum(*means) / np.minimum(*means))
    plain, quality = Calibration.fit(scores[:3000], labels[:3000]), Calibration.fit(features[:3000], labels[:3000])
    assert cllr(quality(features[3000:]), labels[3000:]) < cllr(plain(scores[3000:]), labels[3000:]) - 0.01
    lap = quality_features(scores, durations, embeddings, kind="lap")
    assert lap.shape == (6000, 9) == (6000, len(scoring.QUALITY_NAMES["lap"]))
    np.testing.assert_allclose(lap[:, 2], np.log(durations[1]))
    with pytest.raises(ValueError, match="positive"):
        quality_features(scores, (durations[0] * 0, durations[1]), embeddings, means)
    with pytest.raises(ValueError, match="cohort means"):
        quality_features(scores, durations, embeddings)


def test_a_constant_quality_measure_changes_nothing():
    scores, labels = trials(500)
    plain = Calibration.fit(scores, labels)
    both = Calibration.fit(np.c_[scores, np.full(500, 3.0)], labels)
    np.testing.assert_allclose(both(np.c_[scores, np.full(500, 3.0)]), plain(scores), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_drawn_trials_are_what_they_say(seed, with_durations):
    rng = np.random.default_rng(seed)
    speakers = rng.integers(0, 5, 60)
    durations = rng.uniform(2, 10, 60)
    left, right, labels = draw_trials(speakers, 300, durations if with_durations else None, seed=seed)
    assert len(left) == 300
    assert labels.sum() == 150
    assert (left != right).all()
    np.testing.assert_array_equal((speakers[left] == speakers[right]).astype(int), labels)
    if with_durations:
        long = (durations >= 6).astype(int)
        assert np.bincount(long[left] + long[right], minlength=3).tolist() == [100, 100, 100]


def test_impossible_trials_are_refused():
    with pytest.raises(ValueError, match="two speakers"):
        draw_trials(["a", "a"], 10)
    with pytest.raises(ValueError, match="no target trial"):
        draw_trials(["a", "b"], 10)


# Uncertainty -------------------------------------------------------------------------------------------------------


def speaker_trials(speakers=20, each=4, spread=1.0, seed=0):
    """All pairs; speakers differ in how well they are recognized, so trials of one speaker hang together."""
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(speakers), each)
    left, right = np.triu_indices(len(names), 1)
    labels = (names[left] == names[right]).astype(int)
    ease = spread * rng.standard_normal(speakers)
    scores = rng.standard_normal(len(labels)) + labels * (2 + ease[names[left]])
    return scores, labels, names[left], names[right]


def the_eer(*arguments, **options):
    return eer(*arguments, **options).value


def test_bootstrap_over_speakers_is_wider_than_over_trials_and_seeded():
    scores, labels, left, right = speaker_trials()
    over_speakers = bootstrap(the_eer, scores, labels, left, right, draws=200)
    over_trials = bootstrap(the_eer, scores, labels, draws=200)
    assert over_speakers.low <= over_speakers.value <= over_speakers.high
    assert over_speakers.value == the_eer(scores, labels)
    assert over_speakers.high - over_speakers.low > 1.3 * (over_trials.high - over_trials.low)
    assert bootstrap(the_eer, scores, labels, left, right, draws=200) == over_speakers


def test_bootstrap_intervals_cover_the_truth():
    truth = the_eer(*speaker_trials(400, 2, seed=99)[:2])
    covered = 0
    for seed in range(30):
        scores, labels, left, right = speaker_trials(25, 4, seed=seed)
        interval = bootstrap(the_eer, scores, labels, left, right, draws=100, seed=seed)
        covered += interval.low <= truth <= interval.high
    assert covered >= 22  # 95 % of 30, less what 25 speakers and 100 draws cost


def test_paired_differences_see_what_separate_intervals_do_not():
    scores, labels, left, right = speaker_trials(spread=2.0)
    rng = np.random.default_rng(5)
    better = scores + 0.4 * labels + 0.05 * rng.standard_normal(len(scores))
    difference = bootstrap_difference(the_eer, scores, better, labels, left, right, draws=200)
    assert difference.low > 0
    one, two = (bootstrap(the_eer, s, labels, left, right, draws=200) for s in (scores, better))
    assert two.high > one.low  # the separate intervals overlap
    same = bootstrap_difference(the_eer, scores, scores, labels, left, right, draws=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_bootstrap_refuses_what_it_cannot_do():
    scores, labels, left, right = speaker_trials(4)
    with pytest.raises(ValueError, match="contradict"):
        bootstrap(the_eer, scores, 1 - labels, left, right)
    with pytest.raises(ValueError, match="both sides"):
        bootstrap(the_eer, scores, labels, left)
    with pytest.raises(ValueError, match="20 draws"):
        bootstrap(the_eer, scores, labels, draws=5)
    keep = np.where(labels == 1, left == 2, (left == 0) & (right == 1))  # all three must be drawn
    with pytest.raises(ValueError, match="too few speakers"):
        bootstrap(the_eer, scores[keep], labels[keep], left[keep], right[keep], draws=100)


def test_report_names_its_conventions_and_conditions():
    scores, labels, left, right = speaker_trials()
    report = scoring.evaluate(scores, labels, True, left, right, draws=50)
    assert report["interval_resamples"] == "speakers"
    assert report["eer_nist_low"] <= report["eer_nist"] <= report["eer_nist_high"]
    assert {"eer_midpoint", "eer_roc", "min_dcf_sre16", "cllr", "min_cllr", "actual_dcf_voxsrc"} <= set(report)
    assert report["targets"] + report["nontargets"] == report["trials"] == len(scores)
    conditions = np.where(labels == 1, "same", np.where(left < 10, "low", "high"))
    rows = {row["condition"]: row for row in scoring.by_condition(scores, labels, conditions)}
    assert rows["same"]["eer_nist"] is None  # listed, not dropped
    conditions = np.where(left < 10, "low", "high")
    rows = {row["condition"]: row for row in scoring.by_condition(scores, labels, conditions)}
    assert rows["low"]["eer_nist"] == the_eer(scores[left < 10], labels[left < 10])
    seconds = scoring.duration_condition(np.array([1.0, 2.0, 5.0, 90.0]))
    assert seconds.tolist() == ["under 2 s", "2 to 4 s", "4 to 8 s", "from 8 s"]


# Files -------------------------------------------------------------------------------------------------------------

names = st.text(st.characters(categories=["L", "N"], include_characters="/._-"), min_size=1).filter(
    lambda name: name.lower() not in scoring.trials.LABELS
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.tuples(names, names), st.booleans(), min_size=1), st.sampled_from(["voxceleb", "kaldi", "csv"])
)
def test_every_form_reads_back(tmp_path_factory, content, form):
    path = tmp_path_factory.mktemp("lists") / "trials.txt"
    lines = {
        "voxceleb": [f"{int(y)} {e} {t}" for (e, t), y in content.items()],
        "kaldi": [f"{e} {t} {'target' if y else 'nontarget'}" for (e, t), y in content.items()],
        "csv": ["LABEL,SAMPLE1,SAMPLE2,GENDER", *(f"{int(y)},{e},{t},m" for (e, t), y in content.items())],
    }[form]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    for given_form in ("auto", form):
        read = read_trials(path, given_form)
        assert list(zip(read.enroll.tolist(), read.test.tolist())) == list(content)
        assert read.labels.tolist() == [int(y) for y in content.values()]
    write_trials(path, read)
    assert read_trials(path).labels.tolist() == read.labels.tolist()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_crashes_the_readers(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("lists") / "any.txt"
    path.write_text(text, encoding="utf-8")
    for read in (read_trials, read_enrollments, read_scores):
        message = ""
        try:
            read(path)
        except UserError as error:
            message = str(error)
        assert not message or str(path) in message


def test_conditions_come_with_csv_lists(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("label,sample1,sample2,Gender match\n1,a,b,yes\n0,a,c,no\n")
    assert read_trials(path).conditions["Gender match"].tolist() == ["yes", "no"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trial list is empty"),
        ("\n\n", "trial list is empty"),
        ("1 a b\n1 a\n", "line 2: 2 columns"),
        ("1 a b\n7 a c\n", "line 2: '7' is no label"),
        ("a b target\na c maybe\n", "line 2: 'maybe' is no label"),
        ("1 a 0\n", "cannot tell the form"),
        ("a b c d e\n", "cannot tell the form"),
        ("1 a b\n0 a b\n", "a b is both target and nontarget"),
        ("LABEL,SAMPLE1\n1,a\n", "header must name"),
        ("LABEL,SAMPLE1,SAMPLE2\n", "is empty"),
        ("LABEL,SAMPLE1,SAMPLE2\n1,a\n", "line 2: 2 columns"),
    ],
)
def test_bad_trial_lists_are_named(tmp_path, text, message):
    path = tmp_path / "trials.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_trials(path)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_trials(tmp_path / "none.txt")
    (tmp_path / "a.wav").write_bytes(b"RIFF\xff\xfe\x00")
    with pytest.raises(UserError, match="no text file"):
        read_trials(tmp_path / "a.wav")


def test_unknown_utterances_are_counted_and_named():
    some = Trials(np.array(["a", "a", "x"]), np.array(["b", "y", "b"]), np.array([1, 0, 0]), source="list.txt")
    with pytest.raises(UserError, match=r"list\.txt: 2 names in 2 of 3 trials have no embedding: x, y"):
        some.indices(["a", "b"])
    left, right = some.select(np.array([True, False, False])).indices(["a", "b"])
    assert (left.tolist(), right.tolist()) == ([0], [1])
    assert some.names() == ["a", "x", "b", "y"]


def test_enrolment_maps(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("modelid segmentid\nm1 a.wav\nm1 b.wav\nm2 c.wav d.wav\n")
    assert read_enrollments(path) == {"m1": ["a.wav", "b.wav"], "m2": ["c.wav", "d.wav"]}
    path.write_text("m1 a.wav\nm2 b.wav\nm1 a.wav\n")
    with pytest.raises(UserError, match=r"line 3: a\.wav is enrolled twice for model m1"):
        read_enrollments(path)
    path.write_text("m1\n")
    with pytest.raises(UserError, match="has no utterance"):
        read_enrollments(path)
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_enrollments(path)


def test_score_files_keep_every_digit(tmp_path):
    scores, labels = trials(50)
    some = Trials(np.array([f"e{i}" for i in range(50)]), np.array([f"t{i}" for i in range(50)]), labels)
    path = write_scores(tmp_path / "scores.txt", some, scores)
    again, values = read_scores(path)
    np.testing.assert_array_equal(values, scores)
    np.testing.assert_array_equal(again.labels, labels)
    path.write_text("a b 0.5\na c nan\n")
    with pytest.raises(UserError, match="1 scores are not finite, the first in line 2"):
        read_scores(path)
    path.write_text("a b much\n")
    with pytest.raises(UserError, match="'much' is no score"):
        read_scores(path)
    path.write_text("a b 0.5\na c\n")
    with pytest.raises(UserError, match="line 2"):
        read_scores(path)
    with pytest.raises(ValueError, match="50 trials, 3 scores"):
        write_scores(path, some, scores[:3])


@pytest.mark.parametrize(
    ("same", "other"),
    [("same", "different"), ("T", "F"), ("1.0", "0.0"), ("tar", "imp"), ("positive", "negative"), ("yes", "no"),
     ("1", "-1"), ("genuine", "impostor"), ("TARGET", "NONTARGET")],
)  # fmt: skip
def test_usual_label_words(tmp_path, same, other):
    (tmp_path / "t").write_text(f"a.wav b.wav {same}\na.wav c.wav {other}\n")
    assert read_trials(tmp_path / "t").labels.tolist() == [1, 0]


def test_score_files_of_others(tmp_path):
    path = tmp_path / "s"
    path.write_text("a b 1 3.5\na c 0 0.25\n")  # enrol test label score
    trials, scores = read_scores(path)
    assert (trials.labels.tolist(), scores.tolist()) == ([1, 0], [3.5, 0.25])
    path.write_text("a b 1 1\na c 0 0\n")
    with pytest.raises(UserError, match="both the third and the fourth column could be the labels"):
        read_scores(path)
    path.write_text("score;utt2;utt1;label\n1;b;a;same\n0;c;a;different\n")
    trials, scores = read_scores(path)
    assert (trials.enroll.tolist(), trials.test.tolist()) == (["a", "a"], ["b", "c"])
    assert scores.tolist() == [1, 0]
    path.write_text("a b 1.0 target\na b 0.5 nontarget\n")
    with pytest.raises(UserError, match="both target and nontarget"):
        read_scores(path)


def test_names_with_blanks_commas_and_sides_come_back(tmp_path):
    for enroll, test in ((["a b", "c, d"], ["é f", 'g "h"']), (["m", "n"], ["call:a", "call:b"]), (["a;b"], ["c"])):
        labels = np.arange(len(enroll)) % 2
        some = Trials(np.array(enroll), np.array(test), labels)
        again, scores = read_scores(write_scores(tmp_path / "s", some, labels + 0.5))
        assert (again.enroll.tolist(), again.test.tolist()) == (enroll, test)
        assert (again.labels.tolist(), scores.tolist()) == (labels.tolist(), (labels + 0.5).tolist())
        if ":" not in test[0]:
            back = read_trials(write_trials(tmp_path / "t", some))
            assert (back.enroll.tolist(), back.labels.tolist()) == (enroll, labels.tolist())
    (tmp_path / "m").write_text("modelid\tsegmentid\tside\nm 1\tcall x\tb\nm 1\tother\ta\n")
    assert read_enrollments(tmp_path / "m") == {"m 1": ["call x:b", "other:a"]}


def test_copies_of_a_trial_all_get_their_score(tmp_path):
    names = lambda text: np.array(text.split())  # noqa: E731
    listed = Trials(names("a a"), names("b c"), np.array([1, 0]))
    reference = Trials(names("a a a a"), names("b c b d"), np.array([1, 0, 1, 0]), source="list")
    _, scores, unscored = count_unscored(listed, np.array([2.0, 1.0]), reference, tmp_path)
    assert scores.tolist() == [2, 1, 2, 2]  # the last has none and counts as an error
    assert unscored.tolist() == [False, False, False, True]
    double = Trials(names("a a a"), names("b b b"), np.array([1, 1, 1]))
    with pytest.raises(UserError, match="has 3 different scores and is 2 times"):
        count_unscored(double, np.array([1.0, 2.0, 3.0]), reference, tmp_path)
    with pytest.raises(UserError, match="1 of them are there with their sides exchanged"):
        count_unscored(Trials(names("b"), names("a")), np.array([1.0]), reference, tmp_path)
