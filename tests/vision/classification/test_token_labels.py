"""Label maps: files, targets of crops, maps that a teacher makes, and a training that uses them."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from nearfar.core.errors import UserError
from nearfar.vision.classification.classifier import Classifier
from nearfar.vision.classification.token_labels import (
    label_file,
    label_targets,
    make_token_labels,
    patch_scores,
    read_label_map,
)
from nearfar.vision.classification.training import Recipe, train_classifier
from nearfar.vision.data.images import Pictures
from nearfar.vision.data.sources import open_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Two classes: a bright left half, a bright right half."""
    for label, name in enumerate(("left", "right")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.new("RGB", (48, 32), (20, 20, 10 * i))
            picture.paste((230, 220, 10 * i), (24 * label, 0, 24 + 24 * label, 32))
            picture.save(tmp_path / "data" / name / f"{i}.png")
    return open_pictures(tmp_path / "data")


def teacher(pictures: Pictures) -> Classifier:
    torch.manual_seed(0)
    form = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    model = timm.create_model("nearfar_convnext_atto", num_classes=2, **form).eval()
    return Classifier(model, "nearfar_convnext_atto", pictures.classes, 64, 1.0)


def test_targets_of_a_whole_picture_are_its_map() -> None:
    classes = torch.tensor([[[0, 1], [2, 1]], [[1, 2], [0, 3]]])
    scores = torch.tensor([[[3.0, 2.0], [1.0, 4.0]], [[1.0, 1.0], [0.5, 2.0]]])
    target = label_targets(scores, classes, 2, 4, (2, 2))
    assert target.shape == (4, 6)
    assert target[:, 0].tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(target[:, 1:].sum(0), torch.ones(5))
    dense = torch.zeros(4, 2, 2).scatter_(0, classes, scores)
    torch.testing.assert_close(target[:, 5], dense[:, 1, 1].softmax(0), atol=0.1, rtol=0)
    mirrored = label_targets(scores.flip(2), classes.flip(2), 2, 4, (2, 2))
    assert (mirrored[:, 2:].argmax(0) == target[:, [3, 2, 5, 4]].argmax(0)).all()
    flipped = label_targets(scores, classes, 2, 4, (2, 2), flip=True)
    torch.testing.assert_close(flipped[:, [0, 1, 3, 2, 5, 4]], target)
    # the lower right quarter has the classes of that place
    corner = label_targets(scores, classes, 2, 4, (1, 1), box=(0.75, 0.75, 1, 1))
    assert corner[:, 2].argmax() == 1
    smooth = label_targets(scores, classes, 2, 4, (2, 2), smoothing=0.1)
    torch.testing.assert_close(smooth, target * 0.9 + 0.025)


def test_files_that_are_read_and_refused(tmp_path: Path) -> None:
    picture = "data/left/3.png"
    path = label_file(tmp_path, picture, ".pt")
    assert path == tmp_path / "left" / "3.pt"
    path.parent.mkdir()
    with pytest.raises(UserError, match="no label map"):
        read_label_map(tmp_path, picture, 4)
    scores, classes = torch.rand(5, 3, 2), torch.randint(4, (5, 3, 2))
    torch.save(torch.stack((scores, classes.float())), path)
    found = read_label_map(tmp_path, picture, 4)
    torch.testing.assert_close(found[0], scores)
    assert (found[1] == classes).all()
    with pytest.raises(UserError, match="below 2"):
        read_label_map(tmp_path, picture, 2)
    torch.save({"other": scores}, path)
    with pytest.raises(UserError, match="cannot be read"):
        read_label_map(tmp_path, picture, 4)
    save_file({"scores": scores, "classes": classes[:2].contiguous()}, label_file(tmp_path, picture))
    with pytest.raises(UserError, match=r"not \(k, h, w\)"):
        read_label_map(tmp_path, picture, 4)


def test_a_teacher_writes_maps_once(pictures: Pictures, tmp_path: Path) -> None:
    guide, folder = teacher(pictures), tmp_path / "labels"
    assert make_token_labels(guide, pictures, folder, size=96) == 12
    scores, classes = read_label_map(folder, pictures.names[0], 2)
    assert scores.shape == classes.shape == (2, 3, 3)
    assert make_token_labels(guide, pictures, folder) == 0
    label_file(folder, pictures.names[4]).unlink()
    assert make_token_labels(guide, pictures, folder) == 1
    guide.classes = ["right", "left"]
    with pytest.raises(UserError, match="another order"):
        make_token_labels(guide, pictures, folder)


@torch.no_grad()
def test_cells_are_read_by_the_head(pictures: Pictures) -> None:
    model, x = teacher(pictures).model, torch.randn(2, 3, 64, 32)
    scores = patch_scores(model, x)
    assert scores.shape == (2, 2, 2, 1)
    cell = model.forward_features(x)[:, :, 1:2, :]
    torch.testing.assert_close(scores[:, :, 1, 0], model.forward_head(cell))
    volo = timm.create_model("nearfar_volo_d1_224", num_classes=2, depths=(1, 1), img_size=64).eval()
    assert patch_scores(volo, torch.randn(1, 3, 64, 32)).shape == (1, 2, 4, 2)
    with pytest.raises(UserError, match="no feature map"):
        patch_scores(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64), torch.randn(1, 3, 64, 64))


def test_training_with_label_maps(pictures: Pictures, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    make_token_labels(teacher(pictures), pictures, folder)
    learn = pictures.subset([i for i in range(12) if i % 6])
    hold = pictures.subset([0, 6])
    recipe = Recipe(size=32, epochs=1, batch_size=4, warmup_epochs=0, token_labels=str(folder), randaugment="rand-m9")
    _, history = train_classifier("small-nearfar_volo_d1_224", learn, hold, recipe)
    assert history[-1]["train_loss"] > 0
    form = {"depths": (1, 1), "dims": (16, 32), "num_heads": (2, 2), "aux_dim": 32}
    rmt = timm.create_model("rmt_s_token_label", num_classes=2, **form)
    _, history = train_classifier("rmt_s_token_label", learn, hold, recipe, model=rmt)
    assert history[-1]["train_loss"] > 0
    with pytest.raises(UserError, match="does not classify patches"):
        train_classifier("small-cvt_13", learn, hold, recipe)
    with pytest.raises(ValueError, match="neither mixup"):
        Recipe(token_labels="labels", mixup=0.8)
