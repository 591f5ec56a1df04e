"""Pictures of several classes, weights of classes, what chooses the epoch, views."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

from nearfar.core.errors import UserError
from nearfar.vision.classification.classifier import (
    Classifier,
    average_precisions,
    evaluate_multilabel,
    evaluation_transform,
)
from nearfar.vision.classification.comparison import compare
from nearfar.vision.classification.exporting import check, export_classifier
from nearfar.vision.classification.training import ClassifierModule, Recipe, class_weights, train_classifier
from nearfar.vision.data.images import Pictures

SHORT = {"size": 32, "batch_size": 8, "warmup_epochs": 0.5, "smoothing": 0.0, "crop_scale": 0.8}


def bands(number: int, seed: int) -> Pictures:
    """Pictures with a red band above, a blue one below, both or neither."""
    random = np.random.default_rng(seed)
    labels = [tuple(np.flatnonzero(random.random(2) < 0.5).tolist()) for _ in range(number)]
    values = random.integers(0, 60, (number, 32, 32, 3), dtype=np.uint8)
    for picture, label in zip(values, labels, strict=True):
        for c in label:
            picture[16 * c : 16 * c + 16, :, 2 * c] += 150
    names = [f"{seed} {i}" for i in range(number)]
    return Pictures(names, labels, ["red", "blue"], lambda i: Image.fromarray(values[i]), multilabel=True)


def test_figures_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 12, (40, 4)) / 12  # with ties
    truth = (random.random((40, 4)) < 0.3).astype(int)
    truth[:, 3] = 0
    counts = random.multinomial(40, np.full(40, 1 / 40), 5)
    for c in range(3):
        want = [average_precision_score(truth[:, c], scores[:, c], sample_weight=weights) for weights in counts]
        assert np.allclose(average_precisions(scores[:, c], truth[:, c], counts), want)
    found, rows = evaluate_multilabel(torch.tensor(scores), torch.tensor(truth), "abcd")
    want = [average_precision_score(truth[:, c], scores[:, c]) for c in range(3)]
    assert found["mAP"] == pytest.approx(np.mean(want))
    assert found["low"] < found["mAP"] < found["high"]
    assert found["classes"] == 3
    assert [row["AP"] for row in rows] == [*map(pytest.approx, want), None]
    assert [row["pictures"] for row in rows] == truth.sum(0).tolist()
    # an answer that is none is as wrong as can be
    perfect = torch.tensor(truth, dtype=torch.float64)
    assert evaluate_multilabel(perfect, torch.tensor(truth), "abcd")[0]["all right"] == 1
    perfect[:20] = torch.nan
    assert evaluate_multilabel(perfect, torch.tensor(truth), "abcd")[0]["all right"] == 0.5
    with pytest.raises(UserError, match="none of the pictures has a class"):
        evaluate_multilabel(perfect, torch.zeros(40, 4), "abcd")


def test_learns_bands_and_keeps_what_it_is(tmp_path: Path) -> None:
    learn, hold = bands(64, 0), bands(24, 1)
    recipe = Recipe(**SHORT, epochs=4, learning_rate=3e-3, class_weights="balanced", choose_by="F1", mixup=0.1)
    trained, history = train_classifier("test_resnet", learn, hold, recipe, tmp_path / "run")
    assert {"mAP", "F1"} <= history[0].keys()
    loaded = Classifier.load(tmp_path / "run")
    assert loaded.multilabel
    scores = loaded.scores(hold)
    assert torch.allclose(scores, trained.scores(hold))
    assert (scores.sum(1) - 1).abs().max() > 0.1  # each class on its own
    found, _ = evaluate_multilabel(scores, hold.targets(), hold.classes)
    assert found["mAP"] > float(hold.targets().mean(0).max()) + 0.1  # what any order gives
    rows = compare(["linear"], learn, hold, Recipe(**SHORT, epochs=1), tmp_path / "compared")
    assert 0 < rows[0]["mAP"] <= 1


def test_settings_that_do_not_suit_the_labels() -> None:
    learn, hold = bands(8, 0), bands(8, 1)
    one = learn.renumbered(learn.classes, True)
    one.multilabel, one.labels = False, [i % 2 for i in range(8)]
    for pictures, settings, message in (
        (learn, {"patch_mixing": 0.5, "patch_grid": 4}, "patch_mixing: for pictures of one class each"),
        (learn, {"choose_by": "balanced"}, "for pictures of several classes allowed are mAP, F1"),
        (one, {"choose_by": "mAP"}, "for pictures of one class each allowed are accuracy, balanced"),
        (one, {"views": "ten", "crop_mode": "squash"}, "ten views are crops"),
    ):
        other = hold if pictures.multilabel else one.subset([0])
        with pytest.raises(UserError, match=message):
            train_classifier("test_resnet", pictures.subset(range(1, 8)), other, Recipe(**SHORT, **settings))
    for settings in ({"views": "five"}, {"class_weights": "even"}, {"choose_by": "loss"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is '.*'; allowed are"):
            Recipe(**settings)
    with pytest.raises(UserError, match="no picture to learn from has the class blue"):
        class_weights(Pictures(["0", "1"], [(0,), ()], ["red", "blue"], learn.read, multilabel=True))


def test_weights_of_classes() -> None:
    names = [str(i) for i in range(8)]
    pictures = Pictures(names, [0] * 6 + [1] * 2, ["a", "b"], lambda i: Image.new("RGB", (8, 8)))
    weights = class_weights(pictures)
    torch.testing.assert_close(weights, torch.tensor([8 / 12, 2.0]))
    module = ClassifierModule(nn.Flatten(), Recipe(smoothing=0.0), 2, 1, weights=weights)
    logits, target = torch.randn(8, 2), torch.tensor(pictures.labels)
    each = nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(module.loss(logits, target), (each[:6].mean() + each[6:].mean()) / 2)
    several = class_weights(bands(40, 0))
    number = bands(40, 0).targets().sum(0)
    torch.testing.assert_close(several * number, 40 - number)


def test_random_views_are_the_same_in_every_call() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)).eval()
    drawn = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    pictures = Pictures(list("abcdef"), [0] * 6, ["a", "b"], lambda i: Image.fromarray(drawn[i]))
    classifier = Classifier(model, "test", ["a", "b"], 32, 1.0)
    state = torch.get_rng_state()
    first, second = (classifier.scores(pictures, views="random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert (first - classifier.scores(pictures)).abs().max() > 1e-3


def test_views_average_probabilities() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)).eval()
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pictures = Pictures(["p"], [0], ["a", "b"], lambda i: picture)
    classifier = Classifier(model, "test", ["a", "b"], 32, 0.8, views="flip")
    x = evaluation_transform(32, 0.8)(picture)
    with torch.no_grad():
        both = model(torch.stack((x, x.flip(-1)))).softmax(1).mean(0)
        torch.testing.assert_close(classifier.scores(pictures)[0], both)
        torch.testing.assert_close(classifier.scores(pictures, views="one")[0], model(x[None]).softmax(1)[0])
        # ten crops of the whole picture at 40 x 60, whose shorter side the crop covers to 0.8
        whole = evaluation_transform(40, 1.0).transforms[2:]
        wide = picture
        for step in whole:
            wide = step(wide)
        corners = [(0, 0), (0, 28), (8, 0), (8, 28), (4, 14)]
        crops = [wide[:, top : top + 32, left : left + 32] for top, left in corners]
        want = model(torch.stack([*crops, *(crop.flip(-1) for crop in crops)])).softmax(1).mean(0)
        torch.testing.assert_close(classifier.scores(pictures, views="ten")[0], want)


def test_exported_classes_stand_on_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    classifier = Classifier(model.eval(), "test", ["red", "blue"], 32, 1.0, multilabel=True)
    export_classifier(classifier, tmp_path / "model.pt2")
    (row,) = check(classifier, tmp_path / "model.pt2", bands(6, 0))
    assert row["equal answers"] == 1
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.rand(2, 3, 32, 32) * 255
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(program(x), model((x - mean) / std).sigmoid())
