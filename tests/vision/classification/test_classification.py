"""Training classifiers: published recipes, shares of several processes, small models, the linear floor."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.recipes import find_recipe, read_recipe
from nearfar.vision.classification import RECIPES
from nearfar.vision.classification.classifier import (
    LINEAR,
    Classifier,
    create_model,
    identify,
    plain_forms,
    small_forms,
)
from nearfar.vision.classification.training import (
    ClassifierModule,
    Recipe,
    loaders,
    new_model,
    start_from,
    train_classifier,
    training_transform,
)
from nearfar.vision.data.images import Pictures
from nearfar.vision.models.convnext import ConvNeXt

PUBLISHED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def shades(number: int, first: int = 0) -> Pictures:
    """Dark (class 0) and light (class 1) pictures."""
    pictures = [Image.new("RGB", (32, 32), (200 * (i % 2) + i,) * 3) for i in range(number)]
    names = [f"picture {first + i}" for i in range(number)]
    return Pictures(names, [i % 2 for i in range(number)], ["dark", "light"], lambda i: pictures[i])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_train(name: str) -> None:
    published = read_recipe(Recipe, name, folder=RECIPES)
    assert published.learning_rate <= 4e-3
    small = ["size=32", "epochs=1", "cooldown_epochs=0", "batch_size=4", "learning_rate_batch=4", "warmup_epochs=0"]
    recipe = read_recipe(Recipe, name, small, RECIPES)
    model = "small-nearfar_convnext_atto" if recipe.layer_decay else "test_resnet"
    classifier, history = train_classifier(model, shades(12), shades(3, 100), recipe)
    assert len(history) == 1
    assert classifier.crop_pct == published.crop_pct


def test_published_recipes_say_what_the_papers_say() -> None:
    recipes = {name: read_recipe(Recipe, name, folder=RECIPES) for name in PUBLISHED}
    assert recipes["convnext_1k"].mixup == 0.8
    assert recipes["convnext_1k"].ema == 0.9999
    assert (recipes["convnext_22k_to_1k"].layer_decay, recipes["convnext_22k_to_1k"].learning_rate) == (0.8, 5e-5)
    assert recipes["hornet_1k"].clip == 100
    assert recipes["attnet_t1"].repeats == 3
    assert (recipes["lsnet_1k"].clip_mode, recipes["lsnet_1k"].clip) == ("agc", 0.02)
    assert recipes["transxnet_1k"].interpolation == "random"
    assert recipes["overlock_1k"].auxiliary == 0.4
    nin, gmm, dhvt = (recipes[name] for name in ("ninformer_cifar", "gmm_cifar", "dhvt_cifar"))
    assert (nin.dropout, nin.weight_decay, nin.learning_rate) == (0.5, 0.0, nin.min_learning_rate)
    assert (gmm.mixing_share, gmm.randaugment, recipes["gmm_tiny_imagenet"].size) == (0.5, "cifar10", 64)
    assert {recipe.padded_crop for recipe in (nin, gmm, dhvt)} == {4}
    assert not any(recipe.choose_on for recipe in recipes.values())  # a held part chooses unless it is asked for
    with pytest.raises(UserError, match=r"none that comes along; those are .*convnext_1k"):
        find_recipe("resnet_1k", RECIPES)


def test_random_augmentation_takes_every_operation() -> None:
    transform = training_transform(Recipe(size=32, randaugment="rand-m9-mstd3-inc1"))
    transform = pickle.loads(pickle.dumps(transform))  # as a worker process gets it
    for _ in range(300):
        assert transform(Image.new("RGB", (32, 32), (90, 120, 200))).shape == (3, 32, 32)


def test_padded_crops_and_policies() -> None:
    """A padded crop is the picture moved by up to so many pixels, black where it was not."""
    transform = training_transform(Recipe(size=32, padded_crop=4, randaugment="cifar10"))
    crop, _, policy, *_ = transform.transforms
    assert policy.policy.value == "cifar10"
    picture = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
    framed = np.pad(picture, ((4, 4), (4, 4), (0, 0)))
    places = [(i, j) for i in range(9) for j in range(9)]
    seen = set()
    for _ in range(20):
        found = np.asarray(crop(Image.fromarray(picture)))
        seen |= {(i, j) for i, j in places if np.array_equal(framed[i : i + 32, j : j + 32], found)}
    assert len(seen) > 5
    mixing = ClassifierModule(nn.Flatten(), Recipe(mixup=1.0, mixing_share=0.25), 2, 1).mix
    assert mixing.mix_prob == 0.25
    dropping = [m.p for m in new_model("small-ninformer_cifar10", 2, Recipe(size=32, dropout=0.5)).modules()
                if isinstance(m, nn.Dropout)]  # fmt: skip
    assert set(dropping[:4]) == {0.5}
    for settings, message in (({"padded_crop": -1}, "below 0"), ({"mixing_share": 2.0}, "no share")):
        with pytest.raises(ValueError, match=message):
            Recipe(**settings)
    with pytest.raises(ValueError, match="choose_on is 'val'"):
        Recipe(choose_on="val")
    with pytest.raises(ValueError, match="views is 'random'"):
        Recipe(views="random")


def test_learning_rate_follows_the_number_of_pictures_a_step() -> None:
    sizes = {"size": 32, "batch_size": 4, "accumulate": 2, "epochs": 2, "warmup_epochs": 0}
    recipe = Recipe(**sizes, learning_rate=0.8, learning_rate_batch=64)
    module = ClassifierModule(new_model("test_resnet", 2, recipe), recipe, 2, 3)
    module._trainer = type("Trainer", (), {"world_size": 2})()
    found = module.configure_optimizers()
    assert found["optimizer"].param_groups[0]["initial_lr"] == pytest.approx(0.2)
    assert module.steps == 2


PLAIN = {
    "affnet_et": "AdaptiveFrequencyFilter",
    "afno_256_patch4": "AFNO",
    "convsharevit_cifar": "SharedConv",
    "dhvt_tiny_cifar_patch4": "HeadTokenAttention",
    "gmm_vit_32": "GaussianMixtureMask",
    "ninformer_cifar10": "MixerGate",
    "spartan_tiny": "WaveMixer",
    "tic_like_tiny": "MSAConv",
}
"""Every small form with a plain counterpart, and the part that the counterpart lacks."""


@pytest.mark.ci
def test_every_small_model_learns_a_step_and_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(size=64, epochs=1, batch_size=4, warmup_epochs=0)
    held = shades(4, 100)
    for name in [LINEAR, *small_forms(), *plain_forms()]:
        classifier, _ = train_classifier(name, shades(8), held, recipe, tmp_path / name)
        loaded = Classifier.load(tmp_path / name)
        torch.testing.assert_close(loaded.scores(held), classifier.scores(held))
        assert sum(p.numel() for p in loaded.model.parameters()) < 6e5


def test_plain_forms_lack_what_their_system_adds() -> None:
    named = {name: create_model(name, 3, 32) for name in (*small_forms(), *plain_forms()) if name[6:] in PLAIN}
    parts = {name: {type(module).__name__ for module in model.modules()} for name, model in named.items()}
    assert [name[6:] for name in plain_forms()] == sorted(PLAIN, key=[n[6:] for n in small_forms()].index)
    for name, part in PLAIN.items():
        assert part in parts[f"small-{name}"]
        assert part not in parts[f"plain-{name}"]
    for name in ("plain-hornet_tiny_7x7", "small-hornet_base_gf", "plain-linear"):
        with pytest.raises(UserError, match=f"{name}: no such model"):
            create_model(name, 3, 64)


def test_repeated_augmentation_shows_every_view_of_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        loader, _ = loaders(shades(12), shades(4, 100), Recipe(size=32, batch_size=2, repeats=3))
        seen.append(list(loader.sampler))
    assert [len(share) for share in seen] == [4, 4, 4]
    counts = torch.bincount(torch.tensor([i for share in seen for i in share]), minlength=12)
    assert sorted(counts.tolist()) == [0] * 8 + [3] * 4


SCRIPT = """
import sys, torch
from nearfar.vision.classification import RECIPES
from nearfar.vision.classification.training import Recipe, train_classifier
from tests.vision.classification.test_classification import shades
torch.set_num_threads(1)
learn, held = shades(16), shades(5, 100)
held.labels = [0, 0, 0, 0, 1]
torch.manual_seed(0)
recipe = Recipe(size=32, epochs=1, batch_size=2, learning_rate=1e-9, min_learning_rate=1e-9, warmup_epochs=0)
model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
torch.nn.init.zeros_(model[2].weight)
model[2].bias.data = torch.tensor([1.0, 0.0])
_, history = train_classifier("test_resnet", learn, held, recipe, sys.argv[1], model=model, device="cpu")
print("accuracy", history[0]["accuracy"])
"""


@pytest.mark.ci
def test_two_processes_count_every_picture_once(tmp_path: Path) -> None:
    """All five validation pictures are called dark, four are: 4/5, and not 5/6 with the repeated first one."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("accuracy")]
    assert [float(value) for value in found] == [pytest.approx(0.8)]  # the first process goes on alone


@pytest.fixture
def hornet(tmp_path: Path) -> Path:
    """A file as the published ones are: one that names and shapes tell."""
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("hornet_tiny_7x7").state_dict()}, tmp_path / "hornet.pth")
    return tmp_path / "hornet.pth"


def test_a_published_checkpoint_is_a_classifier_of_imagenet(hornet: Path) -> None:
    classifier = Classifier.from_published(hornet)
    assert (classifier.name, classifier.size, classifier.crop_pct) == ("hornet_tiny_7x7.in1k", 224, 0.875)
    assert classifier.classes[:2] == ["n01440764", "n01443537"]
    assert classifier.descriptions["n01440764"] == "tench, Tinca tinca"
    assert Classifier.from_published(hornet, "hornet_tiny_7x7.in1k").name == classifier.name
    with pytest.raises(UserError, match=r"hornet\.pth: is a checkpoint of HorNet, not of overlock_t"):
        Classifier.from_published(hornet, "overlock_t")
    with pytest.raises(
        UserError, match=r"has 1000 classes; published weights of hornet_tiny_7x7: in1k \(1000 classes\)"
    ):
        Classifier.from_published(hornet, "hornet_tiny_7x7.in22k")
    assert ConvNeXt.variant({"stem_dim": None, "depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}) == (
        "nearfar_convnext_tiny"
    )


@pytest.mark.parametrize("name", ["nearfar_convnext_atto", "attnet_xxs", "hornet_tiny_7x7"])
def test_a_checkpoint_without_layer_scale_is_a_model_without(name: str) -> None:
    form = small_forms()[f"small-{name}"]
    model = type(timm.create_model(name, **form))(**form, num_classes=3, layer_scale=None)  # timm leaves out None
    assert not any("gamma" in parameter for parameter in model.state_dict())
    assert type(model).from_published(model.state_dict()).state_dict().keys() == model.state_dict().keys()


def test_exactly_one_class_accounts_for_every_tensor() -> None:
    for name, form in small_forms().items():
        model = timm.create_model(name.removeprefix("small-"), num_classes=3, **form)
        told = type(model).published_settings(model.state_dict())
        if any(told.get(setting) is None for setting in type(model).UNSHAPED):  # and it is no published variant
            with pytest.raises(CheckpointError, match=rf"{type(model).__name__}: .*do not tell"):
                identify(model.state_dict())
            continue
        found = identify(model.state_dict())
        assert type(found) is type(model)
        assert found.num_classes == 3
    form = small_forms()["small-transxnet_t"]
    state = timm.create_model("transxnet_t", num_classes=3, **form).state_dict()
    state["surprise.weight"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"(?s)TransXNet: .*unexpected surprise\.weight") as refused:
        identify(state, "odd.pth")
    assert str(refused.value).startswith("odd.pth: is none of ")
    assert "HorNet: is no checkpoint" in str(refused.value).replace("the state dict: ", "")


def test_checkpoints_that_do_not_fit_are_said_in_a_line(hornet: Path, tmp_path: Path) -> None:
    recipe = Recipe(size=32)
    with pytest.raises(UserError, match=r"hornet\.pth: is a checkpoint of HorNet, not of AttNet$"):
        start_from(new_model("small-attnet_xxs", 2, recipe), hornet)
    torch.save(new_model("test_resnet", 5, recipe).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"(?s)resnet\.pth: is none of .*known:.*AttNet: "):
        start_from(new_model("small-attnet_xxs", 2, recipe), tmp_path / "resnet.pth")
    # of a timm model only the classifier may differ
    start_from(new_model("test_resnet", 2, recipe), tmp_path / "resnet.pth")
    state = timm.create_model("test_resnet", num_classes=5, in_chans=1).state_dict()
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight has shape"):
        start_from(new_model("test_resnet", 2, recipe), tmp_path / "grey.pth")


def test_models_with_a_size_of_their_own_and_without_paths_to_drop() -> None:
    assert new_model("vit_tiny_patch16_224", 2, Recipe(size=48))(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    with pytest.raises(UserError, match=r"lsnet_t: cannot be made with .*drop_path_rate"):
        new_model("lsnet_t", 2, Recipe(size=64, drop_path=0.1))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="epochs must be a number, got 'ten'"):
        Recipe(epochs="ten")
    with pytest.raises(ValueError, match="clip_mode is 'value'"):
        Recipe(clip_mode="value")
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        Recipe(accumulate=0)
    with pytest.raises(ValueError, match="batch_size must be even"):
        Recipe(batch_size=3, mixup=0.2)
    with pytest.raises(ValueError, match="repeats is 3 and parts 2"):
        Recipe(repeats=3, parts=2)
