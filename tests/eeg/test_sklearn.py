"""The networks in other people's tools: scikit-learn, MOABB, braindecode."""

import mne
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks

from nearfar.eeg import AGTCNet
from nearfar.eeg.decoding import NetworkClassifier, Recipe
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.recordings import Recording
from nearfar.eeg.trials import load_trials, trials_array

NAMES = ["C3", "Cz", "C4"]


def classifier(**recipe):
    settings = {"network": "EEGNet", "epochs": 1, "batch_size": 16} | recipe
    return NetworkClassifier(Recipe(**settings), mne.create_info(NAMES, 64.0, "eeg"), device="cpu")


@pytest.fixture
def trials():
    X = 10 * np.random.default_rng(0).normal(size=(40, 3, 128)).astype("float32")
    y = np.tile([0, 1], 20)
    X[y == 1, 0] *= 3
    return X, y


CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_get_tags_default_keys",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_parameters_default_constructible",
    "check_no_attributes_set_in_init",
    "check_get_params_invariance",
    "check_set_params",
    "check_mixin_order",
]


@pytest.mark.parametrize("name", [name for name in CHECKS if hasattr(estimator_checks, name)])
def test_checks_of_scikit_learn_that_need_no_table(name):
    """The others fit tables of samples by features, which no network of trials takes."""
    getattr(estimator_checks, name)("NetworkClassifier", NetworkClassifier())


def test_scikit_learn_finds_nothing_wrong():
    results = estimator_checks.check_estimator(NetworkClassifier(), on_fail=None, on_skip=None)
    assert not [each for each in results if each["status"] == "failed"]


def test_scikit_learn_is_told_that_trials_have_three_axes():
    tags = NetworkClassifier().__sklearn_tags__()
    assert tags.input_tags.three_d_array
    assert not tags.input_tags.two_d_array
    assert tags.estimator_type == "classifier"


def test_fields_of_the_recipe_are_parameters():
    given = classifier()
    assert given.get_params()["recipe__learning_rate"] == 1e-3
    other = clone(given).set_params(recipe__learning_rate=0.01, device="auto")
    assert (other.recipe.learning_rate, other.device, other.recipe.network) == (0.01, "auto", "EEGNet")
    assert given.recipe.learning_rate == 1e-3
    assert NetworkClassifier().set_params(recipe__epochs=3).recipe == Recipe(epochs=3)
    assert NetworkClassifier().recipe is None
    with pytest.raises(ValueError, match=r"'lr' of a recipe; it has network, learning_rate"):
        given.set_params(recipe__lr=1)


def test_scores_of_two_classes_as_moabb_takes_them(trials):
    X, y = trials
    assert cross_val_score(classifier(), X, y, cv=2, scoring="roc_auc", error_score="raise").shape == (2,)
    fitted = classifier().fit(X, y)
    scores, shares = fitted.decision_function(X), fitted.predict_proba(X)
    assert scores.shape == (40,)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), shares[:, 1], rtol=1e-4)
    assert roc_auc_score(y, scores) == roc_auc_score(y, shares[:, 1])
    np.testing.assert_array_equal(fitted.predict(X), (scores > 0).astype(int))
    three = classifier().fit(X, np.arange(40) % 3)
    assert three.decision_function(X).shape == (40, 3)


def test_labels_of_any_kind(trials):
    X, y = trials
    named = np.array(["right", "left"])[y]
    fitted = classifier().fit(X, named)
    assert fitted.classes_.tolist() == ["left", "right"]
    assert set(fitted.predict(X)) <= {"left", "right"}
    np.testing.assert_allclose(classifier().fit(X, 1 - y).predict_proba(X), fitted.predict_proba(X), rtol=1e-4)


def test_calibration_and_grid_search(trials):
    X, y = trials
    calibrated = CalibratedClassifierCV(classifier(), cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1, rtol=1e-5)
    search = GridSearchCV(classifier(), {"recipe__learning_rate": [1e-3, 1e-2]}, cv=2, error_score="raise").fit(X, y)
    assert search.best_params_["recipe__learning_rate"] in (1e-3, 1e-2)
    assert search.best_estimator_.recipe.learning_rate == search.best_params_["recipe__learning_rate"]


def test_epochs_are_taken_as_they_are(make_raw):
    epochs = load_trials(Recording(None, "1", raw=make_raw(NAMES)), preprocessing=Preprocessing(tmax=1.0))
    X, y, names = trials_array(epochs)
    given = NetworkClassifier(Recipe(network="AGTCNet", epochs=1), device="cpu").fit(epochs)
    assert given.network_.channels == NAMES
    assert given.classes_.tolist() == names
    np.testing.assert_array_equal(given.predict_proba(epochs), given.predict_proba(X))
    by_code = NetworkClassifier(Recipe(network="EEGNet", epochs=1), device="cpu").fit(epochs, y)
    assert by_code.predict(epochs).dtype == y.dtype


def test_input_that_cannot_be(trials):
    X, y = trials
    fitted = classifier().fit(X, y)
    with pytest.raises(ValueError, match="must have the shape"):
        classifier().fit(X[0], y)
    with pytest.raises(ValueError, match="one label for each of 40 trials"):
        classifier().fit(X, y[:-1])
    with pytest.raises(ValueError, match="contains NaN"):
        classifier().fit(np.where(X > 20, np.nan, X), y)
    with pytest.raises(ValueError, match="target y is None"):
        classifier().fit(X)
    with pytest.raises(ValueError, match=r"was fitted on \(trials, 3, 128\)"):
        fitted.predict(X[:, :2])


def test_moabb_evaluates_it(tmp_path):
    pytest.importorskip("moabb")
    from moabb.datasets.fake import FakeDataset
    from moabb.evaluations import CrossSessionEvaluation
    from moabb.paradigms import LeftRightImagery

    data = FakeDataset(["left_hand", "right_hand"], n_subjects=1, n_sessions=2, n_runs=1, duration=60, seed=1)
    given = NetworkClassifier(Recipe(network="EEGNet", epochs=1), device="cpu")
    with mne.use_log_level("ERROR"):
        evaluation = CrossSessionEvaluation(
            LeftRightImagery(), [data], overwrite=True, hdf5_path=str(tmp_path), error_score="raise"
        )
        scores = evaluation.process({"ours": given})
    assert len(scores) == 2
    assert scores["score"].between(0, 1).all()


def test_braindecode_finds_agtcnet_by_name(trials):
    from braindecode import EEGClassifier
    from braindecode.models.util import models_dict

    assert models_dict["AGTCNet"] is AGTCNet
    X, y = trials
    chs_info = mne.create_info(NAMES, 64.0, "eeg")["chs"]
    found = EEGClassifier("AGTCNet", module__chs_info=chs_info, max_epochs=1, train_split=None, verbose=0)
    found.fit(X, y.astype(np.int64))
    assert isinstance(found.module_, AGTCNet)
    assert found.predict(X).shape == (40,)
