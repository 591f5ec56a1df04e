"""Training with fewer tokens: the keep-rate schedule, distillation, Sparsifiner's two phases."""

from pathlib import Path

import pytest
import timm
import torch

from nearfar.core.errors import UserError
from nearfar.vision.classification.classifier import Classifier
from nearfar.vision.classification.token_training import (
    distillation,
    reconstruction,
    set_keep_rate,
    taught_loss,
    token_distillation,
    train_predictors,
)
from nearfar.vision.classification.training import ClassifierModule, Recipe, train_classifier
from nearfar.vision.data.images import Pictures, split_pictures
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.models.evit import EViT
from nearfar.vision.models.sparsifiner import Sparsifiner
from tests.vision.base import close, randomize

SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}


def test_schedule_moves_in_whole_tokens() -> None:
    model = EViT(**SIZES, reduce_at=(1,))
    seen = set()
    for epoch in torch.linspace(0, 12, 200).tolist():
        set_keep_rate(model, epoch, 0.5, 2, 10)
        assert (model.keep_rate * 16) % 1 == 0
        seen.add(model.keep_rate)
    assert seen == {n / 16 for n in range(8, 17)}
    set_keep_rate(model, 0, 0.5, 0, 0)
    assert model.keep_rate == 0.5
    with pytest.raises(UserError, match="keep_rate is for EViT"):
        set_keep_rate(timm.create_model("test_resnet"), 0, 0.5, 0, 0)
    with pytest.raises(ValueError, match="must lie before"):
        Recipe(keep_rate=0.5, keep_warmup=10, keep_shrink=5)
    with pytest.raises(ValueError, match="needs a teacher"):
        Recipe(reconstruction_epochs=5)


def test_losses_against_plain_forms() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    teacher = randomize(EViT(**SIZES, reduce_at=()))
    student = randomize(Sparsifiner(**SIZES, keep_rate=0.5))
    p, q = student(x).softmax(1), teacher(x).softmax(1)
    close(distillation(student(x), teacher(x)), (p * (p.log() - q.log())).sum(1).mean(), 1e-5)
    train_predictors(student, True)
    _, loss = taught_loss(student, x, teacher, 0.5)
    _, told, _ = student.details(x)
    maps = list(attention_maps(teacher, x).values())
    plain = sum(((t.approximate - a[:, :, 1:]) ** 2).sum() for t, a in zip(told, maps, strict=True)) / 2
    close(loss, 0.01 * plain, 1e-5)
    loss.backward()
    moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in student.named_parameters() if ".predictor." in name}
    student.zero_grad()
    train_predictors(student, False)
    logits, taught = taught_loss(student, x, teacher, 0.5)
    tokens = token_distillation(student.forward_features(x)[:, 1:], teacher.forward_features(x)[:, 1:])
    close(taught, 0.5 * (distillation(logits, teacher(x)) + tokens), 1e-5)
    taught.backward()
    assert all(p.grad is None for n, p in student.named_parameters() if ".predictor." in n)
    active = torch.tensor([[True] * 15 + [False]] * 2)
    a, b = torch.zeros(2, 16, 4), torch.zeros(2, 16, 4)
    b[:, 15] = 9
    assert token_distillation(a, b, active) == 0
    with pytest.raises(UserError, match="the same dense model"):
        reconstruction(told, maps[:1])
    with pytest.raises(UserError, match="for Sparsifiner"):
        ClassifierModule(teacher, Recipe(teacher="x", reconstruction_epochs=1), 3, 1)


def test_a_student_trains_and_keeps_its_rate(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(48, 32, 32, 3, generator=generator) * 60).byte()
    noise[::2, :, :16] += 120
    from PIL import Image

    every = Pictures(
        [f"p{i}" for i in range(48)],
        [i % 2 for i in range(48)],
        ["a", "b"],
        lambda i: Image.fromarray(noise[i].numpy()),
    )
    first, second = split_pictures(every, 0.3, 0)
    learn, hold = every.subset(first), every.subset(second)
    common = {"size": 32, "batch_size": 16, "smoothing": 0.0, "warmup_epochs": 0, "learning_rate": 3e-3}
    train_classifier("small-evit_deit_tiny", learn, hold, Recipe(epochs=2, **common), tmp_path / "dense")
    recipe = Recipe(epochs=3, keep_rate=0.5, keep_shrink=2, teacher=str(tmp_path / "dense"), **common)
    _, history = train_classifier("small-evit_deit_tiny", learn, hold, recipe, tmp_path / "few")
    assert len(history) == 3
    assert Classifier.load(tmp_path / "few").model.keep_rate == 0.5
    other = Pictures(every.names, every.labels, ["a", "c"], every.read)
    with pytest.raises(UserError, match="knows other classes"):
        train_classifier("small-evit_deit_tiny", other.subset(first), other.subset(second), recipe)
