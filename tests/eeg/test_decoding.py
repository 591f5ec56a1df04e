"""Training networks on trials, fine-tuning, and decoder folders."""

import json

import mne
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from nearfar.core.errors import UserError
from nearfar.eeg import decoding
from nearfar.eeg.decoder import Decoder, predict_logits
from nearfar.eeg.decoding import NetworkClassifier, Recipe
from nearfar.eeg.preprocessing import Preprocessing

CHANNELS = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"]
RATE = 64.0


def trials(count=48, seed=0, noise=4.0):
    """A 10 Hz rhythm on the left or the right side, in noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2
    times = np.arange(128) / RATE
    X = noise * rng.standard_normal((count, len(CHANNELS), len(times)))
    for side, name in enumerate(("C3", "C4")):
        X[y == side, CHANNELS.index(name)] += 8 * np.sin(
            2 * np.pi * (10 * times + rng.random((int((y == side).sum()), 1)))
        )
    return X.astype(np.float32), y


@pytest.fixture
def info():
    return mne.create_info(CHANNELS, RATE, "eeg").set_montage("colin27_1005")


def classifier(info, folder=None, **recipe):
    settings = {"network": "EEGNet", "batch_size": 16, "epochs": 8} | recipe
    return NetworkClassifier(Recipe(**settings), info, folder, device="cpu")


@pytest.mark.parametrize("network", ["AGTCNet", "EEGNet"])
def test_learns_beyond_chance(info, network):
    (X, y), (X_test, y_test) = trials(96), trials(64, seed=1)
    model = classifier(info, network=network, epochs=25, learning_rate=3e-3).fit(X[:64], y[:64], X[64:], y[64:])
    accuracy = (model.predict(X_test) == y_test).mean()
    assert accuracy > 0.75  # the 99.99 % bound of guessing at 64 trials is 0.73
    assert model.predict_proba(X_test).sum(1) == pytest.approx(1)


def test_keeps_the_weights_of_the_best_validation_epoch(info):
    (X, y), (X_val, y_val), (X_test, y_test) = trials(), trials(40, 1), trials(40, 2)
    model = classifier(info).fit(X, y, X_val, y_val, monitor=(X_test, y_test))
    best = max(row["val_accuracy"] for row in model.history_)
    assert (model.predict(X_val) == y_val).mean() == pytest.approx(best)
    first = next(row for row in model.history_ if row["val_accuracy"] == best)
    assert (model.predict(X_test) == y_test).mean() == pytest.approx(first["test_accuracy"])


def test_the_monitored_trials_steer_nothing(info):
    (X, y), (X_val, y_val) = trials(), trials(40, 1)
    alone = classifier(info, epochs=3).fit(X, y, X_val, y_val)
    watched = classifier(info, epochs=3).fit(X, y, X_val, y_val, monitor=trials(40, 2))
    assert np.array_equal(alone.decision_function(X), watched.decision_function(X))


def test_seed_decides_everything(info):
    X, y = trials()
    first, same, other = (classifier(info, epochs=2, seed=seed).fit(X, y) for seed in (1, 1, 2))
    assert np.array_equal(first.decision_function(X), same.decision_function(X))
    assert not np.array_equal(first.decision_function(X), other.decision_function(X))


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 4 and batch_idx == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("network", ["AGTCNet", "EEGNet"])
def test_interrupted_training_resumes_to_the_same_weights(info, tmp_path, monkeypatch, network):
    (X, y), (X_val, y_val) = trials(), trials(40, 1)
    whole = classifier(info, tmp_path / "whole", network=network).fit(X, y, X_val, y_val)
    train = decoding.train
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "train", lambda *a, **k: train(*a, callbacks=[Interrupt()], **k))
        with pytest.raises(KeyboardInterrupt):
            classifier(info, tmp_path / "cut", network=network).fit(X, y, X_val, y_val)
    assert (tmp_path / "cut" / "last.ckpt").exists()
    torch.manual_seed(99)
    resumed = classifier(info, tmp_path / "cut", network=network).fit(X, y, X_val, y_val)
    for name, value in whole.network_.state_dict().items():
        assert torch.equal(value, resumed.network_.state_dict()[name]), name
    with pytest.raises(UserError, match="other data, validation data"):
        classifier(info, tmp_path / "cut", network=network).fit(X_val, y_val, X, y)


def test_fine_tuning_starts_from_the_weights_and_uses_its_own_rate(info):
    (X, y), (X_new, y_new) = trials(), trials(16, 3)
    model = classifier(info).fit(X, y)
    before = {name: value.clone() for name, value in model.network_.named_parameters()}
    tuned = classifier(info, epochs=1, fine_tune_learning_rate=1e-9)
    tuned.network_, tuned.classes_ = model.network_, model.classes_
    tuned.fine_tune(X_new, y_new)
    assert tuned.history_[0]["lr"] == 1e-9
    for name, value in tuned.network_.named_parameters():
        assert torch.allclose(value, before[name], atol=1e-6), name


def test_training_refuses_one_class_and_unknown_classes(info):
    X, y = trials()
    with pytest.raises(UserError, match="at least two classes"):
        classifier(info).fit(X, np.zeros(len(y), int))
    with pytest.raises(UserError, match="classes that the training trials lack"):
        classifier(info).fit(X, y, X, y + 1)
    with pytest.raises(ValueError, match="epochs must be above 0"):
        Recipe(epochs=0)


def test_batches_do_not_change_the_logits(info):
    X, y = trials()
    model = classifier(info, epochs=1).fit(X, y).network_
    assert np.allclose(predict_logits(model, X), predict_logits(model, X, batch_size=5), atol=1e-5)
    assert not model.training


@pytest.fixture(params=["AGTCNet", "EEGNet"])
def decoder(request, info):
    X, y = trials()
    model = classifier(info, network=request.param, epochs=2).fit(X, y)
    settings = Preprocessing(tmin=0.0, tmax=2.0, l_freq=4.0, h_freq=30.0)
    return Decoder(model.network_, ["left_hand", "right_hand"], settings, CHANNELS, {"sfreq": RATE}, {"accuracy": 0.5})


def test_decoder_folder_round_trip(decoder, tmp_path):
    X, _ = trials()
    decoder.save(tmp_path / "decoder")
    loaded = Decoder.load(tmp_path / "decoder")
    assert np.array_equal(loaded.predict_proba(X), decoder.predict_proba(X))
    for name in ("classes", "preprocessing", "ch_names", "metrics", "sfreq"):
        assert getattr(loaded, name) == getattr(decoder, name)
    assert not [path for path in (tmp_path / "decoder").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    again = type(decoder.network).from_pretrained(tmp_path / "decoder")
    assert np.allclose(predict_logits(again, X), predict_logits(decoder.network, X), atol=1e-6)


def test_other_trials_are_refused(decoder):
    with pytest.raises(UserError, match="takes 8 channels x 128 samples, these trials have 8 x 100"):
        decoder.predict_proba(np.zeros((2, 8, 100), np.float32))


def test_damaged_folders_are_named(decoder, tmp_path):
    folder = decoder.save(tmp_path / "decoder")
    with pytest.raises(UserError, match=r"holds no trained decoder, it lacks decoder\.json"):
        Decoder.load(tmp_path)
    description = json.loads((folder / "decoder.json").read_text())
    (folder / "decoder.json").write_text(json.dumps({**description, "network": "Unknown"}))
    with pytest.raises(UserError, match="no network 'Unknown'"):
        Decoder.load(folder)
    (folder / "decoder.json").write_text(json.dumps(description))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"not the file that decoder\.json describes"):
        Decoder.load(folder)
