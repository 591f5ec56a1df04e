"""Decoders of covariances: their modules compute what the pipelines do, are saved, streamed and adapted."""

from dataclasses import replace

import mne
import numpy as np
import pandas as pd
import pytest
import torch

from nearfar.core.errors import UserError
from nearfar.eeg.decoder import Decoder, predict_logits
from nearfar.eeg.decoding import CovarianceClassifier, Recipe
from nearfar.eeg.live.scores import stream_error
from nearfar.eeg.metrics import choose_threshold
from nearfar.eeg.models import baselines
from nearfar.eeg.models.covariances import DECODERS, compiled, log_by_products, surrogates
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.training import train_decoder

RATE, NAMES = 128.0, ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"]


def trials(count=40, classes=2, seed=0, mix=None):
    """Rhythms of 12 Hz over other electrodes for each class."""
    rng = np.random.default_rng(seed)
    X, y = 5 * rng.normal(size=(count, len(NAMES), 192)), np.arange(count) % classes
    wave = np.sin(2 * np.pi * 12 * np.arange(192) / RATE)
    for trial, label in zip(X, y):
        trial[2 + label] += 6 * wave
    X = (mix @ X if mix is not None else X).astype(np.float32)
    return X - X.mean(1, keepdims=True), y


def epochs(X, y, file="f"):
    info = mne.create_info(NAMES, RATE, "eeg")
    events = np.stack([np.arange(len(y)) * 200, np.zeros(len(y), int), y + 1], axis=1)
    about = {"subject": "1", "session": "1", "run": "1", "file": file, "onset": np.arange(len(y)) * 4.0}
    return mne.EpochsArray(
        X * 1e-6,
        info,
        events,
        event_id={"left_hand": 1, "right_hand": 2},
        metadata=pd.DataFrame(about),
        verbose="ERROR",
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_module_computes_what_the_pipeline_does(name, classes):
    X, y = trials(classes=classes)
    pipeline = baselines.classical(RATE)[name](0).fit(X, y)
    module = compiled(name, pipeline, X, y)
    found = torch.from_numpy(predict_logits(module, X)).softmax(1).numpy()
    np.testing.assert_allclose(found, pipeline.predict_proba(X), atol=2e-5)
    order = list(range(classes))[::-1]
    module.reorder(order)
    np.testing.assert_allclose(
        torch.from_numpy(predict_logits(module, X)).softmax(1).numpy(), found[:, order], atol=1e-6
    )
    assert module.labels.tolist() == [order.index(label) for label in y]


def test_surrogates_have_the_covariances_and_no_mean():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(5, 4, 6))
    wanted = roots @ roots.swapaxes(1, 2)
    X = surrogates(wanted, 50)
    np.testing.assert_allclose(X @ X.swapaxes(1, 2) / 50, wanted, atol=1e-10)
    assert np.abs(X.mean(2)).max() < 1e-12
    with pytest.raises(UserError, match="longer windows"):
        surrogates(wanted, 4)


@pytest.mark.parametrize("name", DECODERS)
def test_trained_saved_streamed_and_adapted_as_a_network(name, tmp_path):
    X, y = trials()
    recipe = Recipe(network=name)
    settings = Preprocessing(tmax=1.5, reference=None)
    mix = np.eye(8) + 0.35 * np.random.default_rng(5).normal(size=(8, 8))  # of another day
    X_new, y_new = trials(60, seed=1, mix=mix)
    told = []
    decoder = train_decoder(epochs(X, y), settings, recipe, tmp_path / "a", test=epochs(*trials(20, seed=9), file="g"))
    assert decoder.metrics["test"]["accuracy"] > decoder.metrics["test"]["chance_bound"]
    assert decoder.metrics["validation_accuracy"] > 0.8
    assert decoder.metrics["threshold"]["trials"] == 40
    assert {path.suffix for path in (tmp_path / "a").iterdir()} <= {".json", ".safetensors"}
    loaded = Decoder.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.predict_proba(X), decoder.predict_proba(X))
    assert stream_error(loaded, np.concatenate(X[:4], axis=1).astype(float), 192, 32, RATE) < 1e-6
    adapted = train_decoder(epochs(X_new[:30], y_new[:30]), settings, recipe, tmp_path / "b", start=tmp_path / "a")
    assert len(adapted.network.learnt) == 70
    first = float((loaded.predict_proba(X_new[:30]).argmax(1) == y_new[:30]).mean())
    assert adapted.metrics["before"] == {"accuracy": first, "trials": 30}
    seen = train_decoder(epochs(X, y), settings, recipe, tmp_path / "c", start=tmp_path / "a", tell=told.append)
    assert "before" not in seen.metrics
    assert not [text for text in told if "otherwise" in text]
    banded = replace(settings, l_freq=4.0)
    train_decoder(epochs(X, y), banded, recipe, tmp_path / "d", start=tmp_path / "a", tell=told.append)
    assert any("otherwise: l_freq None (here 4.0)" in text for text in told)
    right = [(one.predict_proba(X_new[30:]).argmax(1) == y_new[30:]).mean() for one in (loaded, adapted)]
    assert right[1] >= max(right[0], 0.7)
    other = next(each for each in DECODERS if each != name)
    with pytest.raises(UserError, match="same --set network="):
        train_decoder(epochs(X, y), settings, Recipe(network=other), tmp_path / "c", start=tmp_path / "a")


def test_adapting_to_the_same_trials_keeps_the_answers():
    X, y = trials()
    made = CovarianceClassifier("TangentSpace", RATE).fit(X, y)
    before = made.predict(X)
    assert (made.fine_tune(X, y).predict(X) == before).mean() > 0.95
    with pytest.raises(UserError, match="lacks"):
        made.fine_tune(X, y + 5)


def test_threshold_maximizes_information():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    sure = rng.random(400) < 0.5  # half of the trials are guessed
    p = np.where(sure, 0.95, 0.55) * np.ones((2, 1))
    p[1] = 1 - p[0]
    p = p.T
    said = np.where(sure, y, rng.integers(0, 2, 400))
    p = np.where(said[:, None] == [0, 1], p.max(1, keepdims=True), p.min(1, keepdims=True))
    found = choose_threshold(y, p)
    assert found["threshold"] == pytest.approx(0.95)
    assert found["accuracy"] == 1
    assert choose_threshold(y, np.eye(2)[y])["threshold"] == 0


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="rank"):
        DECODERS["MDM"](4, 2, 100, 128.0, rank=5, learnt=3)
    with pytest.raises(ValueError, match="band"):
        DECODERS["MDM"](4, 2, 100, 50.0, rank=4, learnt=3)
    with pytest.raises(UserError, match="two classes"):
        CovarianceClassifier("MDM", RATE).fit(trials()[0], np.zeros(40))


@pytest.mark.parametrize("size", [1, 3, 22])
def test_the_logarithm_by_products_is_that_by_eigenvalues_or_nan(size):
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 2, size, size, dtype=torch.float64))[0]
    for condition in (1.0, 1e3, 1e7):
        values = 7 * torch.logspace(0, -np.log10(condition), size, dtype=torch.float64)
        wanted = (turn * values.log()) @ turn.mT
        found = log_by_products((turn * values) @ turn.mT)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8)
    if size > 1:
        values = torch.logspace(0, -11, size, dtype=torch.float64)
        assert log_by_products((turn * values) @ turn.mT).isnan().all()


@pytest.mark.parametrize("name", ["TangentSpace", "MDM"])
def test_decoders_by_products_answer_as_by_eigenvalues(name):
    X, y = trials(classes=3)
    made = CovarianceClassifier(name, RATE).fit(X, y).network_
    mixed = torch.as_tensor(X * np.geomspace(0.1, 10, X.shape[1])[:, None])
    wanted = [made(each) for each in (torch.as_tensor(X), mixed)]
    made.by_products = True
    for each, logits in zip((torch.as_tensor(X), mixed), wanted, strict=True):
        np.testing.assert_allclose(made(each), logits, rtol=1e-5, atol=1e-5)
