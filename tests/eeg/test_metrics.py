import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nearfar.eeg import metrics


@given(st.integers(1, 300), st.integers(2, 6), st.sampled_from([0.9, 0.95, 0.99]))
def test_chance_bound_is_the_smallest_count_that_guessing_rarely_reaches(n_trials, n_classes, level):
    bound = round(metrics.chance_bound(n_trials, n_classes, level) * n_trials)

    def probability(at_least):
        return stats.binom.sf(at_least - 1, n_trials, 1 / n_classes)

    assert probability(bound) <= 1 - level + 1e-12
    assert probability(bound - 1) > 1 - level - 1e-12


def test_chance_bound_of_too_few_trials_cannot_be_reached():
    assert metrics.chance_bound(3, 2) > 1
    assert metrics.chance_bound(45, 2) == pytest.approx(29 / 45)


def test_kappa_matches_its_definition_and_is_zero_without_information():
    y_true, y_pred = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    agreement = 4 / 6
    by_chance = (3 * 3 + 2 * 3 + 1 * 0) / 36
    assert metrics.kappa(y_true, y_pred) == pytest.approx((agreement - by_chance) / (1 - by_chance))
    assert metrics.kappa([0, 1, 0, 1], [0, 0, 0, 0]) == 0
    assert metrics.kappa([1, 1], [1, 1]) == 0
    assert metrics.kappa([0, 1], [metrics.NO_DECISION] * 2) == 0


def test_confusion_matrix_keeps_trials_without_a_decision():
    counts = metrics.confusion_matrix([0, 0, 1, 1, 1, 2], [0, -1, 1, 0, -1, 2], 3)
    assert counts.tolist() == [[1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]]
    assert metrics.accuracy([0, 0, 1], [0, -1, 0]) == pytest.approx(1 / 3)


@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 25))
def test_moving_average_accuracy_is_the_best_stretch(curve, window):
    found = metrics.moving_average_accuracy(curve, window)
    means = [np.mean(curve[end - window : end]) for end in range(window, len(curve) + 1)]
    assert np.isnan(found) if not means else found == pytest.approx(max(means))


def test_moving_average_accuracy_starts_with_epoch_20():
    assert np.isnan(metrics.moving_average_accuracy([1.0] * 19))
    assert metrics.moving_average_accuracy([1.0] + [0.5] * 19 + [1.0]) == pytest.approx(0.525)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(0.7, 0.1, (300, 30))
    hits = [low <= 0.7 <= high for low, high in (metrics.bootstrap_interval(s, resamples=400) for s in samples)]
    assert 0.9 <= np.mean(hits) <= 0.98
    assert metrics.bootstrap_interval(samples[0]) == metrics.bootstrap_interval(samples[0])
    assert np.isnan(metrics.bootstrap_interval([0.5])).all()


def test_proportion_interval_holds_the_share():
    low, high = metrics.proportion_interval(0.8, 45)
    assert 0.65 < low < 0.8 < high < 0.9
    assert metrics.proportion_interval(1.0, 10)[1] == 1


def test_wilcoxon_holm_corrects_the_smallest_p_most():
    rng = np.random.default_rng(1)
    scores = pd.DataFrame({"a": rng.uniform(0.4, 0.6, 12)})
    scores["b"] = scores["a"] + 0.1 + rng.uniform(0, 0.01, 12)
    scores["c"] = scores["a"] + rng.normal(0, 0.01, 12)
    table = metrics.wilcoxon_holm(scores).set_index(["a", "b"])
    ordered = table.sort_values("p")
    expected = np.maximum.accumulate(np.minimum(ordered["p"] * [3, 2, 1], 1))
    np.testing.assert_allclose(ordered["p_holm"], expected)
    assert table.loc[("a", "b"), "outcome"] == "b"
    assert table.loc[("b", "c"), "outcome"] == "b"
    assert table.loc[("a", "c"), "outcome"] == "no difference shown"
    assert table.loc[("a", "b"), "p"] == stats.wilcoxon(scores["a"], scores["b"]).pvalue


def test_wilcoxon_holm_says_when_there_are_too_few_subjects():
    for scores in (
        pd.DataFrame({"a": [0.5], "b": [0.6]}),
        pd.DataFrame({"a": [0.5, 0.6, 0.7, 0.8, 0.9], "b": [0.4, 0.5, 0.6, 0.6, 0.7]}),
        pd.DataFrame({"a": [0.5] * 20, "b": [0.5] * 19 + [0.6]}),
    ):
        table = metrics.wilcoxon_holm(scores)
        assert table["outcome"].tolist() == ["too few subjects"]
        assert table["p"].isna().all()
    with pytest.raises(ValueError, match="counts as chance"):
        metrics.wilcoxon_holm(pd.DataFrame({"a": [0.5, np.nan], "b": [0.5, 0.5]}))


def test_information_transfer_rate():
    assert metrics.information_transfer_rate(1.0, 4, 2.0) == pytest.approx(60.0)
    assert metrics.information_transfer_rate(0.5, 2, 1.0) == 0
    assert metrics.information_transfer_rate(0.1, 2, 1.0) == 0  # worse than guessing earns nothing
    bits = 2 + 0.8 * np.log2(0.8) + 0.2 * np.log2(0.2 / 3)
    assert metrics.information_transfer_rate(0.8, 4, 3.0) == pytest.approx(bits * 20)
    rates = [metrics.bits_per_selection(p, 3) for p in np.linspace(0, 1, 50)]
    assert rates == sorted(rates)


def test_summary_takes_the_population_deviation_over_subjects_and_repeats():
    rows = pd.DataFrame(
        {
            "protocol": "p",
            "model": "m",
            "subject": [1, 1, 2, 2],
            "repeat": [0, 1, 0, 1],
            "accuracy": [0.5, 0.7, 0.9, 0.5],
            "kappa": [0.0, 0.4, 0.8, 0.0],
            "sma20": np.nan,
            "failure": ["", "", "", "ValueError"],
        }
    )
    line = metrics.summary(rows).iloc[0]
    assert line["accuracy"] == pytest.approx(0.65)
    assert line["accuracy_std"] == pytest.approx(np.std([0.5, 0.7, 0.9, 0.5]))
    assert (line["subjects"], line["repeats"], line["failed"]) == (2, 2, 1)
    assert np.isnan([line["low"], line["high"]]).all()  # two subjects are too few for an interval
    assert np.isnan(line["sma20"])


def test_always_rest_is_never_above_chance():
    for n, rest in ((60, 48), (20, 15), (200, 199), (10, 5), (5, 5)):
        y = np.array([0] * rest + [1] * (n - rest))
        given = metrics.score(y, np.zeros(n, int), 2, np.tile([0.9, 0.1], (n, 1)))
        assert given["accuracy"] == given["chance"] == rest / n
        assert given["accuracy"] < given["chance_bound"]
        assert given["balanced_accuracy"] == (0.5 if rest < n else 1.0)
        assert given["kappa"] == 0
        assert given.get("auc", 0.5) == 0.5


def test_chance_by_the_shares_of_the_classes():
    assert metrics.chance_level([0, 1, 2, 0], 3) == 0.5
    assert metrics.chance_level([0, 1] * 10, 2) == 0.5
    assert metrics.chance_bound(60, 2, chance=0.5) == metrics.chance_bound(60, 2)
    assert metrics.chance_bound(60, 2, chance=0.8) > 0.8
    rng = np.random.default_rng(0)
    guesses = (rng.random((4000, 60)) < 0.8).mean(1)
    assert (guesses >= metrics.chance_bound(60, 2, chance=0.8)).mean() <= 0.05


def test_area_and_balance():
    y, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    assert metrics.auc(y, np.stack([1 - p, p], axis=1)) == 0.75
    assert np.isnan(metrics.auc([0, 0], [[0.5, 0.5]] * 2))
    assert metrics.auc(y, np.full((4, 2), np.nan)) == 0.5
    three = np.eye(3)[[0, 1, 2, 0]]
    assert metrics.auc([0, 1, 2, 0], three) == 1
    assert metrics.balanced_accuracy([0, 0, 0, 1], [0, 0, 0, 0]) == 0.5
    assert metrics.balanced_accuracy([0, 0, 1, 1], [0, -1, 1, 1]) == 0.75
