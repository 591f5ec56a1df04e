"""The order of classes: of published weights, of decoders that are fine-tuned, and against the authors' own log."""

import os

import numpy as np
import pytest
import torch

from nearfar.core.checkpoints import save_state_dict
from nearfar.core.cli import root as cli
from nearfar.core.errors import CheckpointError, UserError
from nearfar.eeg import metrics
from nearfar.eeg.conventions import CLASSES
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.decoding import Recipe, loss
from nearfar.eeg.models.agtcnet import VARIANTS, AGTCNet
from nearfar.eeg.models.baselines import network, reorder_outputs
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.published import authors_log, reproduce
from nearfar.eeg.training import starting_network
from nearfar.eeg.trials import load_trials, trials_array
from tests.eeg.models.test_agtcnet import published_random, write_keras

EEGMMIDB = ["left_hand", "right_hand", "hands", "feet"]


def four_classes():
    return {name: value.float() for name, value in published_random(n=64, length=18).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_customary_order_of_classes_is_that_of_every_published_configuration(name):
    classes = VARIANTS[name]["class_names"]
    assert sorted(classes, key=CLASSES.index) == classes
    assert AGTCNet(**VARIANTS[name]).class_names == classes


def test_published_heads_are_reordered_by_name_and_other_classes_refused():
    state, x = four_classes(), torch.randn(2, 64, 640)
    model = AGTCNet.from_published(state)
    assert model.class_names == EEGMMIDB
    order = ["feet", "left_hand", "hands", "right_hand"]
    other = AGTCNet.from_published(state, class_names=order)
    torch.testing.assert_close(other(x), model(x)[:, [EEGMMIDB.index(name) for name in order]])
    with pytest.raises(CheckpointError, match=r"tells left_hand, right_hand, hands, feet apart, not .*tongue"):
        AGTCNet.from_published(state, class_names=["left_hand", "right_hand", "feet", "tongue"])
    with pytest.raises(CheckpointError, match="in this order"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="the network's outputs are"):
        Decoder(model, order, Preprocessing(), [c["ch_name"] for c in VARIANTS["eegmmidb-4class"]["chs_info"]])
    with pytest.raises(ValueError, match="class_names"):
        AGTCNet(**VARIANTS["bciciv2a-3s"] | {"class_names": ["a", "b"]})


def test_class_names_are_saved_with_the_model(tmp_path):
    model = AGTCNet.from_published(four_classes(), class_names=EEGMMIDB[::-1])
    model.save_pretrained(tmp_path)
    assert AGTCNet.from_pretrained(tmp_path).class_names == EEGMMIDB[::-1]
    model.reset_head(3)
    assert model.class_names is None


@pytest.mark.parametrize("name", ["EEGNet", "ATCNet", "EEGConformer", "TCFormer", "ShallowFBCSPNet", "Deep4Net"])
def test_outputs_of_any_network_are_reordered(name):
    model = network(name, n_chans=8, n_outputs=3, n_times=600, sfreq=128.0).eval()
    x = torch.randn(2, 8, 600)
    before = model(x)
    reorder_outputs(model, [2, 0, 1])
    torch.testing.assert_close(model(x), before[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)


def epochs_of(shared_data, runs=(4, 6), **settings):
    folder = shared_data("eegmmidb/S001")
    preprocessing = Preprocessing.preset("eegmmidb", **settings)
    return load_trials([folder / f"S001R{run:02d}.edf" for run in runs], preprocessing=preprocessing)


def test_fine_tuning_starts_from_outputs_in_the_trials_order(shared_data, tmp_path):
    epochs = epochs_of(shared_data)
    X, _, classes = trials_array(epochs)
    assert classes == EEGMMIDB
    state = four_classes()
    write_keras(tmp_path / "weights.h5", state, 3)
    x, recipe = torch.from_numpy(X[:2]), Recipe()
    start = starting_network(tmp_path / "weights.h5", epochs, classes, recipe)
    turned = starting_network(tmp_path / "weights.h5", epochs, classes[::-1], recipe)
    torch.testing.assert_close(turned(x), start(x).flip(1))
    with pytest.raises(CheckpointError, match="apart, not left_hand, right_hand, feet, rest"):
        starting_network(tmp_path / "weights.h5", epochs, ["left_hand", "right_hand", "feet", "rest"], recipe)
    save_state_dict(start, tmp_path / "own.safetensors")  # the same weights as our own state dict
    torch.testing.assert_close(
        starting_network(tmp_path / "own.safetensors", epochs, classes[::-1], recipe)(x), turned(x)
    )
    about = {"sfreq": 160.0, "recipe": {}, "history": []}
    Decoder(start, classes, Preprocessing(), epochs.ch_names, about).save(tmp_path / "decoder")
    torch.testing.assert_close(starting_network(tmp_path / "decoder", epochs, classes[::-1], recipe)(x), turned(x))
    with pytest.raises(UserError, match="holds weights of published AGTCNet, the recipe's network is EEGNet"):
        starting_network(tmp_path / "weights.h5", epochs, classes, Recipe(network="EEGNet"))


def test_weights_of_no_network_are_refused_with_reasons(make_raw, tmp_path):
    epochs = load_trials_of(make_raw)
    save_state_dict(torch.nn.Linear(3, 2), tmp_path / "linear.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)linear.safetensors: is none of 3 known:.*AGTCNet: .*EEGNet: "):
        starting_network(tmp_path / "linear.safetensors", epochs, ["T1", "T2"], Recipe(network="EEGNet"))


def load_trials_of(make_raw):
    from nearfar.eeg.recordings import Recording

    raw = make_raw(seconds=60)
    return load_trials(Recording(None, "1", raw=raw), preprocessing=Preprocessing(tmax=3))


def test_trials_by_the_names_of_their_classes(make_raw):
    epochs = load_trials_of(make_raw)
    _, y, _ = trials_array(epochs)
    _, turned, classes = trials_array(epochs, ["T3", "T2", "T1"])
    assert classes == ["T3", "T2", "T1"]
    assert (turned == 2 - y).all()
    with pytest.raises(UserError, match="trials of T2; the classes are T1"):
        trials_array(epochs, ["T1"])


def test_the_published_objective():
    logits, labels = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0, 1])
    p = np.array([[1.0, -2.0], [0.5, 3.0]])
    right = np.array([[1, 0], [0, 1]])
    by_hand = (np.log1p(np.exp(-p)) * right + np.log1p(np.exp(p)) * (1 - right)).mean()
    assert float(loss("published", logits, labels)) == pytest.approx(by_hand, rel=1e-6)
    three = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 1])
    assert torch.equal(loss("published", three, labels), loss("cross-entropy", three, labels))
    with pytest.raises(ValueError, match="objective"):
        Recipe(objective="hinge")


def write_log(folder, scores):
    told = "\t".join(f"Test {name}: {value:.4f}" for name, value in zip(("Accuracy", "Kappa", "Loss"), scores))
    (folder / "log.txt").write_text(
        f"AGTCNet\tx\n\nTraining Subject 1\nSubject: 1\tTrain No.: 1\tSeed: 7\tInference Time: 3.5 ms\t{told}\t"
        "MIN Test Loss: 0.1\nSubject: 1\tBEST Run: 1\t\t\tBEST Test Accuracy: 0.9\n",
        encoding="utf-8",
    )


def test_ours_beside_the_log(shared_data, tmp_path):
    folder = shared_data("eegmmidb/S001")
    X, y, _ = trials_array(epochs_of(shared_data, (12,), order="published"))
    state = {name: value.float() for name, value in published_random(n=64, length=18, classes=2).items()}
    with torch.no_grad():
        logits = AGTCNet.from_published(state)(torch.from_numpy(X))
    place = tmp_path / "AGTCNet+EEGMMIDB+2Class" / "EEGMMIDB-SL-DS-FT"
    (place / "subj-1").mkdir(parents=True)
    write_keras(place / "subj-1" / "run-1-best_model.h5", state, 3)
    answers = logits.argmax(1).numpy()
    scores = [(answers == y).mean(), metrics.kappa(y, answers), float(loss("published", logits, torch.from_numpy(y)))]
    write_log(place, scores)
    (row,) = reproduce(tmp_path, folder).to_dict("records")
    assert row["agrees"]
    assert row["tested on runs"] == "12"
    assert row["loss"] == pytest.approx(scores[2], rel=1e-4)
    assert row["their loss"] == round(scores[2], 4)
    write_log(place, [scores[0] + 0.1, *scores[1:]])
    assert cli.run(["motor-imagery", "reproduce", str(tmp_path), str(folder)]) == 1


def test_a_folder_without_results(tmp_path):
    with pytest.raises(UserError, match=r"holds no folder AGTCNet.EEGMMIDB"):
        reproduce(tmp_path, tmp_path)
    (tmp_path / "log.txt").write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="not a log of the authors"):
        authors_log(tmp_path / "log.txt")


@pytest.mark.slow
def test_the_authors_log_is_reproduced(shared_data):
    """With a download of your own: the folder `.results` of the authors' repository."""
    results = os.environ.get("NEARFAR_AGTCNET_RESULTS")
    if not results:
        pytest.skip("needs the authors' results: NEARFAR_AGTCNET_RESULTS=FOLDER")
    found = reproduce(results, shared_data("eegmmidb/S001"))
    assert len(found) == 6, found
    assert found["agrees"].all(), found
