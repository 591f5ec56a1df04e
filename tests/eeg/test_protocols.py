import dataclasses
import importlib
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from nearfar.core import fingerprint
from nearfar.core.errors import UserError
from nearfar.core.fingerprint import code_digest
from nearfar.eeg import evaluation, leakage, metrics, protocols
from nearfar.eeg.alignment import EuclideanAlignment
from nearfar.eeg.evaluation import evaluate
from nearfar.eeg.leakage import LeakageError, check_split
from nearfar.eeg.protocols import PROTOCOLS, Split

SECONDS = 2.0


def table(subjects=3, sessions=2, trials=20, classes=2, seed=0, runs=2):
    """Metadata and labels; rows are shuffled, as nothing may rely on their order."""
    rng = np.random.default_rng(seed)
    rows = [
        {"subject": s, "session": str(e), "run": str(8 + r), "file": f"{s}-{e}-{r}", "onset": 5.0 * k}
        for s in range(1, subjects + 1)
        for e in range(sessions)
        for r in range(runs)
        for k in range(trials // runs)
    ]
    order = rng.permutation(len(rows))
    metadata = pd.DataFrame(rows).iloc[order]  # the index is not 0, 1, ...
    y = np.concatenate([rng.permutation(np.arange(trials) % classes) for _ in range(subjects * sessions)])
    return metadata, y[order]


def signals(y, metadata, seed=0, channels=4, times=20):
    """Trials whose class shows in the power of one channel."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(len(y), channels, times)).astype(np.float32)
    X[np.arange(len(y)), y] *= 2
    return X * (1 + metadata["subject"].to_numpy()[:, None, None]) + 0.1


def log_power(X):
    return np.log(X.var(-1))


def decoder(seed=0):
    return make_pipeline(FunctionTransformer(log_power), LogisticRegression(random_state=seed))


sizes = st.fixed_dictionaries(
    {
        "subjects": st.integers(2, 7),
        "sessions": st.integers(2, 3),
        "trials": st.sampled_from([12, 20, 26]),
        "classes": st.integers(2, 3),
        "seed": st.integers(0, 9),
    }
)


def options_of(name, shape):
    return {"folds": min(3, shape["subjects"])} if name in ("subject-folds", "within-session") else {}


FORWARD = {"successive-runs", "first-run"}
"""Protocols that never test the first run, and learn from single ones."""


@settings(deadline=None, max_examples=15)
@given(sizes, st.sampled_from(sorted(set(PROTOCOLS) - FORWARD)), st.booleans())
def test_every_trial_is_tested_once_and_nothing_leaks(shape, name, published):
    metadata, y = table(**shape)
    splits = list(PROTOCOLS[name](metadata, y, seed=1, published=published, **options_of(name, shape)))
    tested = np.concatenate([split.test for split in splits])
    assert sorted(tested) == list(range(len(y)))
    for split in splits:
        check_split(split, metadata, trial_seconds=SECONDS)
        assert split.published is published
        assert ("test-set selection" in split.protocol) is published
        values = {
            side: set(metadata[list(split.apart)].iloc[getattr(split, side)].itertuples(index=False, name=None))
            for side in ("train", "test")
        }
        assert not split.apart or not values["train"] & values["test"]
        assert set(y[split.train]) == set(y)
        if published:
            assert np.array_equal(split.validation, split.test)
        else:
            assert not set(split.validation) & (set(split.test) | set(split.train))
            assert set(y[split.validation]) == set(y)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_splits_are_the_same_for_the_same_seed(name):
    metadata, y = table(subjects=6)
    first, again = ([*PROTOCOLS[name](metadata, y, seed=3)] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("train", "validation", "test"))


def test_validation_subjects_are_drawn_by_the_seed():
    metadata, y = table(subjects=8)
    drawn = set()
    for seed in range(6):
        split = next(iter(protocols.leave_one_subject_out(metadata, y, seed=seed)))
        chosen = set(metadata["subject"].iloc[split.validation])
        assert len(chosen) == 2
        assert not chosen & set(metadata["subject"].iloc[split.train])
        drawn.add(frozenset(chosen))
    assert len(drawn) > 1


def test_within_session_folds_are_stratified_and_validate_on_the_latest_trials():
    metadata, y = table(subjects=1, sessions=1, trials=40)
    onset = metadata["onset"].to_numpy() + 1000 * (metadata["run"] == "9").to_numpy()
    for split in protocols.within_session(metadata, y):
        assert np.bincount(y[split.test]).tolist() == [4, 4]
        for label in (0, 1):
            early, late = (rows[y[rows] == label] for rows in (split.train, split.validation))
            assert onset[early].max() < onset[late].min()
    metadata, y = table(subjects=1, sessions=1, trials=8)
    with pytest.raises(UserError, match="use fewer folds"):
        list(protocols.within_session(metadata, y))


def test_runs_are_ordered_by_number_not_by_letters():
    metadata, y = table(subjects=1, sessions=1, trials=40)
    metadata["run"] = metadata["run"].map({"8": "run-9", "9": "run-10"})
    rows = protocols._in_time(metadata, np.arange(len(y)))
    assert metadata["run"].iloc[rows].tolist() == ["run-9"] * 20 + ["run-10"] * 20
    assert (np.diff(metadata["onset"].iloc[rows[:20]]) > 0).all()


def test_cross_session_can_test_named_sessions_and_never_trains_on_them():
    metadata, y = table(sessions=3)
    splits = list(protocols.cross_session(metadata, y, test=["2"]))
    assert [split.held_out for split in splits] == [f"subject {s}, session 2" for s in (1, 2, 3)]
    for split in splits:
        assert set(metadata["session"].iloc[split.train]) == {"0", "1"}
        assert metadata["subject"].iloc[np.concatenate([split.train, split.validation, split.test])].nunique() == 1


def test_subject_folds_are_contiguous_and_excluded_subjects_leave_gaps():
    metadata, y = table(subjects=23, sessions=1, trials=4)
    kept = ~metadata["subject"].isin([9, 10]).to_numpy()  # without trials, but still numbered
    metadata, y = metadata[kept], y[kept]
    splits = list(protocols.subject_folds(metadata, y, subjects=range(1, 24), exclude=[3]))
    members = [sorted(set(metadata["subject"].iloc[split.test])) for split in splits]
    assert members == [
        [1, 2, 4, 5],
        [6, 7, 8],
        [11, 12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22, 23],
    ]
    for split in splits:
        assert not {3} & set(metadata["subject"].iloc[np.concatenate([split.train, split.validation])])
    with pytest.raises(UserError, match="not among those to fold"):
        list(protocols.subject_folds(metadata, y, subjects=range(1, 20)))


@pytest.mark.parametrize("folds", [None, 3])
def test_fine_tuning_starts_from_other_subjects_and_can_have_few_trials(folds):
    metadata, y = table(subjects=6, sessions=3)
    splits = list(protocols.fine_tuned(metadata, y, folds=folds, calibration=4, exclude=[5]))
    assert len(splits) == 5 * 3
    for split in splits:
        own = set(metadata["subject"].iloc[split.test])
        assert own == set(metadata["subject"].iloc[split.train])
        assert not (own | {5}) & set(
            metadata["subject"].iloc[np.concatenate([split.start.train, split.start.validation])]
        )
        tuning = np.concatenate([split.train, split.validation])
        assert np.bincount(y[tuning]).tolist() == [4, 4]


@settings(deadline=None, max_examples=5)
@given(sizes, st.sampled_from(sorted(FORWARD)), st.booleans(), st.integers(1, 2))
def test_a_run_is_decoded_by_what_came_before_it(shape, name, published, calibration):
    metadata, y = table(**shape)
    place = metadata["session"].astype(int).to_numpy() * 2 + metadata["run"].astype(int).to_numpy() - 8
    subject = metadata["subject"].to_numpy()
    splits = list(PROTOCOLS[name](metadata, y, published=published, calibration=calibration))
    assert sorted(np.concatenate([split.test for split in splits])) == list(np.flatnonzero(place >= calibration))
    for split in splits:
        check_split(split, metadata, trial_seconds=SECONDS)
        assert (set(subject[split.test]), len(set(place[split.test]))) == ({subject[split.test[0]]}, 1)
        number, whole = place[split.test[0]], split.joined()
        learnt = whole.train if published else np.concatenate([whole.train, whole.validation])
        upto = number if name == "successive-runs" else calibration
        assert set(learnt) == set(np.flatnonzero((subject == subject[split.test[0]]) & (place < upto)))
        assert len(learnt) == len(set(learnt))
        assert split.continues == (split.start is not None) == (name == "successive-runs" and number > calibration)
        if split.start is not None:
            assert place[split.start.train].max() < calibration <= place[split.train].min()


def test_protocols_that_need_more_subjects_or_sessions_say_so():
    metadata, y = table(subjects=1)
    with pytest.raises(UserError, match="at least 2 subjects"):
        list(protocols.leave_one_subject_out(metadata, y))
    with pytest.raises(UserError, match="at least 5 subjects"):
        list(protocols.subject_folds(metadata, y))
    metadata, y = table(subjects=2, sessions=1)
    with pytest.raises(UserError, match="one session only"):
        evaluate({"d": decoder}, signals(y, metadata), y, metadata, "cross-session", sfreq=10)


# The check


@pytest.fixture
def example():
    metadata, y = table()
    split = next(iter(protocols.leave_one_subject_out(metadata, y)))
    return split, metadata, y


def changed(split, **parts):
    return dataclasses.replace(split, **parts)


def test_check_refuses_a_trial_on_both_sides(example):
    split, metadata, _ = example
    with pytest.raises(LeakageError, match=r"trial 1-.* stands in both training and test"):
        check_split(changed(split, train=np.append(split.train, split.test[0])), metadata, trial_seconds=SECONDS)
    with pytest.raises(LeakageError, match="stands in both validation and test"):
        check_split(changed(split, validation=split.test), metadata, trial_seconds=SECONDS)
    with pytest.raises(LeakageError, match="stands in both training and validation"):
        check_split(changed(split, validation=split.train[:2]), metadata, trial_seconds=SECONDS)
    with pytest.raises(UserError, match="stands twice"):
        check_split(changed(split, train=np.append(split.train, split.train[0])), metadata, trial_seconds=SECONDS)
    with pytest.raises(UserError, match="no test trials"):
        check_split(changed(split, test=split.test[:0]), metadata, trial_seconds=SECONDS)


def test_check_refuses_a_subject_or_session_on_both_sides(example):
    split, metadata, y = example
    moved = changed(split, train=np.append(split.train, split.test[:3]), test=split.test[3:])
    with pytest.raises(
        LeakageError, match="leave-one-subject-out, subject 1: subject 1 stands in both training and test"
    ):
        check_split(moved, metadata, trial_seconds=SECONDS)
    own = next(iter(protocols.cross_session(metadata, y)))
    moved = changed(own, validation=np.append(own.validation, own.test[:3]), test=own.test[3:])
    with pytest.raises(LeakageError, match="subject 1, session 0 stands in both validation and test"):
        check_split(moved, metadata, trial_seconds=SECONDS)


def test_check_looks_at_the_starting_model_of_fine_tuning(example):
    _, metadata, y = example
    split = next(iter(protocols.fine_tuned(metadata, y)))
    start = changed(split.start, train=np.append(split.start.train, split.start.test[-1:]), test=split.start.test[:-1])
    with pytest.raises(LeakageError, match="subject 1 stands in both"):
        check_split(changed(split, start=start), metadata, trial_seconds=SECONDS)
    # even if the start claims another test subject
    start = changed(split.start, train=split.test, validation=split.train, test=split.start.train)
    with pytest.raises(LeakageError, match="pretraining and test"):
        check_split(changed(split, start=start), metadata, trial_seconds=SECONDS)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=12))
def test_overlap_is_found_exactly_where_the_slow_way_finds_it(trials):
    metadata = pd.DataFrame(trials, columns=["onset", "file", "side"])
    sides = [np.flatnonzero(metadata["side"] == side) for side in (0, 1)]
    slow = {
        (a, b)
        for a in sides[0]
        for b in sides[1]
        if metadata["file"][a] == metadata["file"][b] and abs(metadata["onset"][a] - metadata["onset"][b]) < 2 - 1e-9
    }
    found = leakage._overlap(metadata, *sides, 2.0)
    assert (found in slow) if slow else found is None


def test_check_refuses_trials_that_overlap_in_time(example):
    _, metadata, y = example
    split = next(iter(protocols.within_session(metadata, y)))
    check_split(split, metadata, trial_seconds=5.0)  # they touch
    with pytest.raises(LeakageError, match=r"overlap in time .*each lasts 5.1 s"):
        check_split(split, metadata, trial_seconds=5.1)


def test_check_refuses_the_same_signal_under_two_names(example):
    split, metadata, y = example
    X = signals(y, metadata)
    check_split(split, metadata, trial_seconds=SECONDS, digests=leakage.trial_digests(X))
    X[split.train[3]] = X[split.test[5]]
    with pytest.raises(LeakageError, match="hold the same signal"):
        check_split(split, metadata, trial_seconds=SECONDS, digests=leakage.trial_digests(X))


def test_check_refuses_recorded_statistics_of_test_trials(example):
    split, metadata, y = example
    X = signals(y, metadata)
    for rows, clean in ((split.train, True), (np.arange(len(y)), False)):
        alignment = EuclideanAlignment().fit(X[rows])
        with pytest.raises(LeakageError, match="EuclideanAlignment does not record"):
            check_split(split, metadata, trial_seconds=SECONDS, fitted=[alignment])
        alignment.fitted_on_ = leakage.trial_ids(metadata.iloc[rows])
        if clean:
            check_split(split, metadata, trial_seconds=SECONDS, fitted=[alignment])
        else:
            with pytest.raises(LeakageError, match="EuclideanAlignment was fitted on 40 test trials"):
                check_split(split, metadata, trial_seconds=SECONDS, fitted=[alignment])


def standardized(X, rows):
    mean, deviation = X[rows].mean((0, 2), keepdims=True), X[rows].std((0, 2), keepdims=True)
    return (X - mean) / deviation


def test_check_sees_statistics_of_test_trials_in_the_data(example):
    split, metadata, y = example
    X = signals(y, metadata)
    subject, session = metadata["subject"].to_numpy(), metadata["session"].to_numpy()
    leaks = {
        "standardized over all trials": standardized(X, np.arange(len(y))),
        "standardized over subject 1": np.where(subject[:, None, None] == 1, standardized(X, subject == 1), X),
        "whitened over subject 1, session 1": EuclideanAlignment().fit_transform(
            X, domains=[f"{a}-{b}" for a, b in zip(subject, session)]
        ),
    }
    for message, data in leaks.items():
        treated = leakage.treatments(data, metadata)
        assert message in [how for how, _ in treated]
        with pytest.raises(LeakageError, match="test trials included"):
            check_split(split, metadata, trial_seconds=SECONDS, treated=treated)
        with pytest.raises(LeakageError, match="test trials included"):
            evaluate({"d": decoder}, data, y, metadata, "leave-one-subject-out", sfreq=10)
    each = (X - X.mean(-1, keepdims=True)) / X.std(-1, keepdims=True)
    honest = [X, X - X.mean(1, keepdims=True), each, standardized(X, split.train)]
    honest.append(EuclideanAlignment().fit(X[split.train]).transform(X))
    for data in honest:
        check_split(split, metadata, trial_seconds=SECONDS, treated=leakage.treatments(data, metadata))


def test_statistics_that_only_training_subjects_share_are_no_leak(example):
    split, metadata, y = example
    X = signals(y, metadata)
    others = np.isin(metadata["subject"], [2])
    X[others] = standardized(X, others)[others]
    treated = leakage.treatments(X, metadata)
    assert [how for how, _ in treated] == ["standardized over subject 2"]
    check_split(split, metadata, trial_seconds=SECONDS, treated=treated)


def test_metadata_must_be_complete():
    metadata, y = table()
    with pytest.raises(UserError, match="lack the columns"):
        leakage.check_metadata(metadata.drop(columns="onset"), len(y))
    with pytest.raises(UserError, match="rows of metadata"):
        leakage.check_metadata(metadata, len(y) + 1)
    with pytest.raises(UserError, match="stands twice"):
        leakage.check_metadata(pd.concat([metadata.iloc[:1], metadata.iloc[:-1]]), len(y))
    with pytest.raises(UserError, match="gaps in"):
        leakage.check_metadata(metadata.assign(session=None), len(y))


def test_trials_of_unknown_time_are_taken_in_the_order_of_rows_and_told(caplog):
    metadata, y = table(subjects=1, sessions=1)
    metadata = metadata.assign(onset=np.nan, file="all", run="1").reset_index(drop=True)
    leakage.check_metadata(metadata, len(y))
    assert "20 of 20 trials have no onset" in caplog.text
    assert len(set(leakage.trial_ids(metadata))) == 20
    splits = list(protocols.within_session(metadata, y))
    for split in splits:
        check_split(split, metadata, trial_seconds=SECONDS)
        assert all(
            split.train[y[split.train] == k].max() < split.validation[y[split.validation] == k].min() for k in (0, 1)
        )


# The harness


class Spy(DummyClassifier):
    """Notes which trials it is shown; the first sample of each trial is its number."""

    log: list = []

    def fit(self, X, y, **selecting):
        Spy.log.append(("fit", X[:, 0, 0].astype(int), selecting))
        return super().fit(X, y)

    def predict_proba(self, X):
        Spy.log.append(("test", X[:, 0, 0].astype(int), {}))
        return super().predict_proba(X)


class SelectingSpy(Spy):
    uses_validation = True

    def fine_tune(self, X, y, **selecting):
        Spy.log.append(("tune", X[:, 0, 0].astype(int), selecting))
        return self

    @property
    def history_(self):
        return [{"train_loss": 1.0, "test_accuracy": 0.5 + epoch / 100} for epoch in range(30)]


def numbered(y, metadata):
    X = signals(y, metadata)
    X[:, 0, 0] = np.arange(len(y))
    return X


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("spy", [Spy, SelectingSpy])
def test_estimators_see_training_trials_only_and_the_test_once(spy, published):
    metadata, y = table()
    Spy.log = []
    run = evaluate(
        {"spy": lambda seed: spy()},
        numbered(y, metadata),
        y,
        metadata,
        "leave-one-subject-out",
        sfreq=10,
        published=published,
    )
    splits = list(protocols.leave_one_subject_out(metadata, y, published=published))
    assert [kind for kind, *_ in Spy.log] == ["fit", "test"] * 3
    for split, (_, learnt, selecting), (_, tested, _) in zip(splits, Spy.log[::2], Spy.log[1::2], strict=True):
        assert np.array_equal(tested, split.test)
        if spy is Spy:
            assert not selecting
            wanted = split.train if published else np.concatenate([split.train, split.validation])
            assert np.array_equal(np.sort(learnt), np.sort(wanted))
        else:
            assert np.array_equal(learnt, split.train)
            assert np.array_equal(selecting["X_val"][:, 0, 0], split.validation)
            assert ("monitor" in selecting) is published
    assert run.rows["protocol"].unique().tolist() == [
        "published leave-one-subject-out (test-set selection)" if published else "leave-one-subject-out"
    ]
    sma20 = run.rows["sma20"]
    if published and spy is SelectingSpy:
        np.testing.assert_allclose(sma20, 0.5 + np.arange(10, 30).mean() / 100)
    else:
        assert sma20.isna().all()
    assert len(run.history) == (90 if spy is SelectingSpy else 0)


def test_fine_tuning_pretrains_once_per_subject_and_tunes_a_copy():
    metadata, y = table()
    Spy.log = []
    evaluate({"spy": lambda seed: SelectingSpy()}, numbered(y, metadata), y, metadata, "fine-tuned", sfreq=10)
    assert [kind for kind, *_ in Spy.log] == ["fit", "tune", "test", "tune", "test"] * 3
    Spy.log = []
    evaluate({"spy": lambda seed: Spy()}, numbered(y, metadata), y, metadata, "fine-tuned", sfreq=10)
    assert [kind for kind, *_ in Spy.log] == ["fit", "test"] * 6  # no tuning: the subject's own trials alone
    subject = metadata["subject"].to_numpy()
    assert all(len(set(subject[rows])) == 1 for _, rows, _ in Spy.log)


def test_successive_runs_tune_or_fit_on_all_that_came_before():
    metadata, y = table(subjects=1)  # two sessions of two runs
    Spy.log = []
    evaluate({"spy": lambda seed: SelectingSpy()}, numbered(y, metadata), y, metadata, "successive-runs", sfreq=10)
    assert [kind for kind, *_ in Spy.log] == ["fit", "test", "tune", "test", "tune", "test"]  # the first one starts all
    Spy.log = []
    evaluate({"spy": lambda seed: SelectingSpy()}, numbered(y, metadata), y, metadata, "first-run", sfreq=10)
    assert [kind for kind, *_ in Spy.log] == ["fit", "test", "test", "test"]
    Spy.log = []
    run = evaluate({"spy": lambda seed: Spy()}, numbered(y, metadata), y, metadata, "successive-runs", sfreq=10)
    assert [kind for kind, *_ in Spy.log] == ["fit", "test"] * 3
    assert [len(rows) for kind, rows, _ in Spy.log if kind == "fit"] == [10, 20, 30]
    assert run.rows["session"].tolist() == ["0", "1"]
    with pytest.raises(ValueError, match="calibration is 0"):
        next(protocols.successive_runs(metadata, y, calibration=0))
    metadata, y = table(subjects=1, sessions=1, runs=1)
    with pytest.raises(UserError, match="one run"):
        evaluate({"spy": lambda seed: Spy()}, numbered(y, metadata), y, metadata, "successive-runs", sfreq=10)


class Tuned(LogisticRegression):
    """Tuned by fitting anew on old and new trials."""

    def fit(self, X, y):
        self.seen_ = log_power(X), y
        return super().fit(*self.seen_)

    def fine_tune(self, X, y):
        return super().fit(np.concatenate([self.seen_[0], log_power(X)]), np.concatenate([self.seen_[1], y]))

    def predict_proba(self, X):
        return super().predict_proba(log_power(X))


def test_aligned_successive_runs_go_on_to_the_same_answers(tmp_path):
    """Each split aligns the first run's trials anew, so a model of another split's is no start."""
    metadata, y = table(subjects=1, sessions=1, trials=48, runs=4)
    X = signals(y, metadata)

    def run():
        return evaluate(
            {"tuned": lambda seed: Tuned()}, X, y, metadata, "successive-runs", sfreq=10, alignment=True,
            cache_dir=tmp_path,
        ).predictions  # fmt: skip

    whole = run()
    fits = sorted(tmp_path.glob("*.npz"))
    assert len(fits) == 3
    for fit in fits:
        fit.unlink()
        pd.testing.assert_frame_equal(run(), whole)


@pytest.fixture(scope="module")
def experiment():
    metadata, y = table(subjects=7, trials=40)
    return signals(y, metadata), y, metadata


def test_evaluate_finds_what_is_there(experiment):
    X, y, metadata = experiment
    run = evaluate(
        {"power": decoder, "dummy": lambda seed: DummyClassifier(strategy="uniform", random_state=seed)},
        X,
        y,
        metadata,
        "cross-session",
        sfreq=10,
        seeds=(0, 1),
        classes=["left", "right"],
    )
    assert len(run.rows) == 2 * 2 * 14
    assert (run.rows["n_train"] + run.rows["n_validation"] == 40).all()
    assert (run.rows["n_test"] == 40).all()
    means = run.rows.groupby("model")["accuracy"].mean()
    assert means["power"] > 0.85 > 0.6 > means["dummy"]
    power = run.rows[run.rows["model"] == "power"]
    for _, row in power.iterrows():
        same = ["model", "subject", "session", "repeat"]
        own = run.predictions[(run.predictions[same] == row[same]).all(axis=1)]
        assert len(own) == 40
        assert row["accuracy"] == np.mean(own["y_true"] == own["y_pred"])
        assert row["chance_bound"] == metrics.chance_bound(40, 2)
    assert run.confusion("power").sum() == 2 * len(y)
    assert np.trace(run.confusion("power")) / (2 * len(y)) == pytest.approx(means["power"])
    assert run.comparison()["outcome"].tolist() == ["power"]
    assert run.failures.empty
    np.testing.assert_allclose(run.predictions[["p_0", "p_1"]].sum(1), 1)


def test_within_session_rows_pool_the_folds(experiment):
    X, y, metadata = experiment
    run = evaluate({"power": decoder}, X, y, metadata, "within-session", sfreq=10)
    assert len(run.rows) == 14
    assert (run.rows["n_test"] == 40).all()
    assert sorted(run.predictions["trial"]) == list(range(len(y)))


def test_alignment_makes_subjects_alike_without_test_statistics(experiment):
    X, y, metadata = experiment
    split = next(iter(protocols.leave_one_subject_out(metadata, y)))
    aligned = evaluation.align(X, metadata, split)
    again = X.copy()
    last = protocols._in_time(metadata, split.test)[-1]
    again[last] = 1e3 * np.random.default_rng(0).normal(size=X.shape[1:])
    kept = np.setdiff1d(np.arange(len(y)), [last])
    np.testing.assert_array_equal(evaluation.align(again, metadata, split)[kept], aligned[kept])
    learnt = np.concatenate([split.train, split.validation])
    own = learnt[(metadata["subject"].iloc[learnt] == 5) & (metadata["session"].iloc[learnt] == "0")]
    reference = EuclideanAlignment(shrinkage=0.1).fit(X[own]).transform(X[own])
    np.testing.assert_allclose(aligned[own], reference, rtol=1e-5, atol=1e-6)
    run = evaluate({"power": decoder}, X, y, metadata, "leave-one-subject-out", sfreq=10, alignment=True)
    assert set(run.rows["alignment"]) == {"Euclidean"}
    assert run.rows["accuracy"].mean() > 0.8


class Failing(DummyClassifier):
    """Fails on one subject, whose trials are the strongest."""

    def predict_proba(self, X):
        if X.std() > 10:
            raise FloatingPointError("diverged")
        return super().predict_proba(X)


def test_a_failed_fit_counts_as_chance_and_is_told(experiment):
    X, y, metadata = experiment
    run = evaluate({"failing": lambda seed: Failing()}, X, y, metadata, "leave-one-subject-out", sfreq=10)
    assert run.failures["subject"].tolist() == [7]
    failed = run.failures.iloc[0]
    assert (failed["accuracy"], failed["kappa"], failed["failure"]) == (0.5, 0, "FloatingPointError: diverged")
    assert len(run.rows) == 7
    assert run.summary()["failed"].tolist() == [1]
    assert (run.predictions.query("subject == 7")["y_pred"] == metrics.NO_DECISION).all()
    assert run.confusion("failing")[:, 2].sum() == 80


def test_a_subject_that_cannot_be_tested_counts_as_chance(experiment):
    X, y, metadata = experiment
    kept = ~((metadata["subject"] == 4) & (metadata["session"] == "1")).to_numpy()
    run = evaluate({"power": decoder}, X[kept], y[kept], metadata[kept], "cross-session", sfreq=10)
    assert run.failures["subject"].tolist() == [4]
    assert run.failures["accuracy"].tolist() == [0.5]
    assert "another session" in run.failures["failure"].iloc[0]
    assert run.summary()["subjects"].tolist() == [7]


def test_trials_without_a_probability_are_wrong(experiment):
    X, y, metadata = experiment

    class Silent(DummyClassifier):
        def predict_proba(self, X):
            return np.where(X[:, :1, 0] > 0, np.nan, super().predict_proba(X))

    run = evaluate({"silent": lambda seed: Silent()}, X, y, metadata, "leave-one-subject-out", sfreq=10)
    silent = run.predictions["y_pred"] == metrics.NO_DECISION
    assert 0.3 < silent.mean() < 0.7
    assert run.rows["accuracy"].mean() == pytest.approx((run.predictions["y_pred"] == run.predictions["y_true"]).mean())


def test_an_estimator_that_always_fails_raises(experiment):
    X, y, metadata = experiment
    with pytest.raises(UserError, match=r"every fit failed; the last one said: .*strategy"):
        evaluate({"d": lambda seed: DummyClassifier(strategy="no")}, X, y, metadata, "leave-one-subject-out", sfreq=10)


def test_bad_requests(experiment):
    X, y, metadata = experiment
    with pytest.raises(UserError, match="no protocol 'k-fold'"):
        evaluate({"d": decoder}, X, y, metadata, "k-fold", sfreq=10)
    with pytest.raises(UserError, match="one class only"):
        evaluate({"d": decoder}, X, 0 * y, metadata, "cross-session", sfreq=10)
    with pytest.raises(UserError, match="labels"):
        evaluate({"d": decoder}, X, y[:-1], metadata, "cross-session", sfreq=10)


def test_any_function_can_be_a_protocol_but_not_a_leaking_one(experiment):
    X, y, metadata = experiment
    rows = np.random.default_rng(0).permutation(len(y))
    shuffled = Split("random", "half", rows[:200], rows[200:280], rows[280:], ("subject",), ("subject",))
    with pytest.raises(LeakageError, match="random, half: subject"):
        evaluate({"d": decoder}, X, y, metadata, lambda metadata, y, seed: [shuffled], sfreq=10)


def test_results_are_written(experiment, tmp_path):
    X, y, metadata = experiment
    run = evaluate({"power": decoder}, X, y, metadata, "leave-one-subject-out", sfreq=10)
    run.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.csv" for name in ("results", "summary", "comparison", "predictions", "history")
    }
    back = pd.read_csv(tmp_path / "results.csv", keep_default_na=False, na_values="nan")
    np.testing.assert_allclose(back["accuracy"], run.rows["accuracy"])


# The cache

MODULE = """
from helper_of_the_user import POWER
from sklearn.dummy import DummyClassifier

class Own(DummyClassifier):
    fits = 0

    def fit(self, X, y):
        Own.fits += 1
        return super().fit(X ** POWER, y)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An estimator of the user's, in a module of its own that uses another one."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_the_user.py").write_text("POWER = 1\n")
    (tmp_path / "module_of_the_user.py").write_text(textwrap.dedent(MODULE))
    yield lambda: importlib.import_module("module_of_the_user").Own
    for name in ("module_of_the_user", "helper_of_the_user"):
        sys.modules.pop(name, None)


def test_the_cache_is_keyed_by_code_and_data(own, experiment, tmp_path):
    X, y, metadata = experiment
    cache = tmp_path / "cache"
    path = tmp_path / "module_of_the_user.py"

    def fits(X=X, y=y, metadata=metadata, **options):
        importlib.invalidate_caches()
        for name in ("module_of_the_user", "helper_of_the_user"):
            sys.modules.pop(name, None)
        constant, seed = options.pop("constant", None), options.pop("seed", 0)
        cls = own()
        options = {"sfreq": 10, "seeds": (seed,), "cache_dir": cache} | options
        make = {"own": lambda seed: cls(strategy="constant" if constant else "prior", constant=constant)}
        run = evaluate(make, X, y, metadata, "leave-one-subject-out", **options)
        return cls.fits, run

    count, first = fits()
    assert count == 7
    count, again = fits()
    assert count == 0
    pd.testing.assert_frame_equal(again.rows, first.rows)
    pd.testing.assert_frame_equal(again.predictions, first.predictions)

    changed_by_one_byte = X.copy()
    changed_by_one_byte.view(np.uint8)[3, 0, 0] ^= 1
    assert fits(X=changed_by_one_byte)[0] == 7  # each split holds this trial
    assert fits(seed=1)[0] == 7
    assert fits(constant=1)[0] == 7
    assert fits(alignment=True)[0] == 7
    assert fits(published=True)[0] == 7
    labels = y.copy()
    labels[0] = 1 - labels[0]
    assert fits(y=labels)[0] == 7
    assert fits()[0] == 0

    path.write_text(path.read_text().replace("X ** POWER", "X ** POWER * 1"))
    assert fits()[0] == 7
    (tmp_path / "helper_of_the_user.py").write_text("POWER = 2\n")
    assert fits()[0] == 7
    assert fits()[0] == 0

    for stored in cache.iterdir():
        stored.write_bytes(stored.read_bytes()[:100])  # damaged
    assert fits()[0] == 7


def test_an_interrupted_run_goes_on_where_it_was(own, experiment, tmp_path):
    X, y, metadata = experiment
    cls = own()
    make = {"own": lambda seed: cls()}

    def stop(done, total, what):
        assert total == 7
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(make, X, y, metadata, "leave-one-subject-out", sfreq=10, cache_dir=tmp_path / "c", progress=stop)
    assert cls.fits == 4
    run = evaluate(make, X, y, metadata, "leave-one-subject-out", sfreq=10, cache_dir=tmp_path / "c")
    assert cls.fits == 7
    fresh = evaluate(make, X, y, metadata, "leave-one-subject-out", sfreq=10)
    pd.testing.assert_frame_equal(run.rows.drop(columns="seconds"), fresh.rows.drop(columns="seconds"))
    assert len(list((tmp_path / "c").iterdir())) == 7  # nothing half-written is left


def test_failed_fits_are_not_kept(experiment, tmp_path):
    X, y, metadata = experiment
    evaluate({"f": lambda seed: Failing()}, X, y, metadata, "leave-one-subject-out", sfreq=10, cache_dir=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 6


def test_the_digest_of_settings_goes_to_any_depth():
    digests = [
        code_digest(value)
        for value in (
            decoder(0),
            decoder(1),
            make_pipeline(FunctionTransformer(log_power), LogisticRegression(C=2.0, random_state=0)),
            {"a": np.arange(3)},
            {"a": np.arange(3.0)},
            {"a": [np.arange(3)]},
            [[1], [2]],
            [[1, 2]],
            ["a", "b"],
            ["a\0b"],
        )
    ]
    assert len(set(digests)) == len(digests)
    assert code_digest(decoder(0)) == digests[0]
    loop = []
    loop.append(loop)
    assert code_digest(loop) == code_digest(loop)


def test_the_digest_holds_library_versions(monkeypatch):
    now = code_digest(decoder())
    real = fingerprint.version
    monkeypatch.setattr(fingerprint, "version", lambda name: "0.0.1" if name == "scikit-learn" else real(name))
    assert code_digest(decoder()) != now


def test_code_in_no_file_is_not_cached():
    scope = {"__name__": "typed_into_a_notebook"}
    exec("class Typed: pass", scope)  # as a notebook does
    module = type(sys)("typed_into_a_notebook")
    module.__spec__ = importlib.machinery.ModuleSpec("typed_into_a_notebook", None, origin="somewhere")
    sys.modules["typed_into_a_notebook"] = module
    try:
        with pytest.raises(UserError, match="in no file"):
            code_digest(scope["Typed"]())
    finally:
        del sys.modules["typed_into_a_notebook"]
