"""RveRNet: layouts, counts, views to the published pixel, masks from files, and what context is good for."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from nearfar.core.errors import CheckpointError, UserError
from nearfar.vision.classification.regions import (
    Distillation,
    answers,
    score_regions,
    train_regions,
    warm_ramp,
)
from nearfar.vision.data.plates import AMBIGUOUS, plates
from nearfar.vision.data.regions import (
    Views,
    coco_regions,
    cut_out,
    decode_rle,
    encode_rle,
    grabcut,
    id_regions,
    permuted,
    polygon_mask,
    resize_and_pad,
    translocated,
    view_regions,
    write_views,
)
from nearfar.vision.models.rvernet import (
    BACKBONES,
    PARAMS,
    RegionPooling,
    RveRNet,
    Single,
    create_backbone,
    published_backbone,
    transformer,
)
from tests.vision.base import randomize


@pytest.mark.parametrize("name", BACKBONES)
def test_parameters_of_published_backbones(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_backbone(name).parameters()) == PARAMS[name]


@pytest.mark.parametrize(
    ("roi", "extra", "classes", "params"),
    [("mnet", "mnet", 103, 8_356_407), ("mnet", "vit", 105, 91_420_473), ("deit-dist", "deit-dist", 105, 174_486_329)],
)
def test_parameters_of_published_pairs(roi: str, extra: str, classes: int, params: int) -> None:
    with torch.device("meta"):
        model = RveRNet(roi, extra, classes)
    assert sum(p.numel() for p in model.parameters()) == params
    assert PARAMS[roi] + PARAMS[extra] + 2000 * 640 + 640 + 640 * classes + classes == params


def small_transformer(prefix: int) -> nn.Module:
    return transformer(eps=1e-12, embed_dim=24, depth=2, num_heads=2, img_size=32, num_classes=6, reg_tokens=prefix)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("distilled", [False, True])
def test_names_of_transformers_old_and_new(version: int, distilled: bool) -> None:
    own = randomize(small_transformer(int(distilled))).state_dict()
    kind, theirs = "deit" if distilled else "vit", {}
    for name, value in own.items():
        parts = value.chunk(3) if ".qkv." in name else (value,)
        for part, letter in zip(parts, ("query", "key", "value"), strict=False):
            new = name.replace("cls_token", "embeddings.cls_token").replace(
                "reg_token", "embeddings.distillation_token"
            )
            new = new.replace("pos_embed", "embeddings.position_embeddings")
            new = new.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            if version == 4:
                new = new.replace("blocks.", "encoder.layer.").replace("attn.qkv", f"attention.attention.{letter}")
                new = new.replace("attn.proj", "attention.output.dense").replace("mlp.fc1", "intermediate.dense")
                new = new.replace("mlp.fc2", "output.dense")
            else:
                new = new.replace("blocks.", "layers.").replace("attn.qkv", f"attention.{letter[0]}_proj")
                new = new.replace("attn.proj", "attention.o_proj")
            new = new.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
            new = f"layernorm.{new[5:]}" if new.startswith("norm.") else new
            head = new.startswith("head.")
            theirs[new.replace("head.", "classifier.") if head else f"{kind}.{new}"] = part
    name, back = published_backbone(theirs)
    assert name == ("deit-dist" if distilled else "deit")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[n], own[n]) for n in own)


def test_checkpoints_are_accounted_for() -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint of RveRNet"):
        RveRNet.from_published({"roi_module.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="layout of a backbone is not known"):
        published_backbone({"conv.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="no backbone"):
        create_backbone("resnetty")
    with pytest.raises(ValueError, match="frozen of roi and extra"):
        RveRNet("mnet", "mnet", 3, frozen=("both",))


def test_any_two_backbones_and_views_that_agree() -> None:
    torch.manual_seed(0)
    model = RveRNet("resnet10t", timm.create_model("convnext_atto", num_classes=9), 4, 16, frozen=("extra",)).eval()
    roi, extra = torch.randn(2, 2, 3, 64, 64)
    y = model(roi, extra)
    torch.testing.assert_close(y.exp().sum(1), torch.ones(2))
    assert not any(p.requires_grad for p in model.extra.parameters())
    with pytest.raises(ValueError, match="must agree"):
        model(roi, extra[..., :32])
    pooled = RegionPooling(timm.create_model("resnet10t", num_classes=0), 4, 16).eval()
    masks = torch.zeros(2, 1, 64, 64)
    masks[..., :32, :32] = 1
    assert pooled(roi, masks).shape == (2, 4)
    with pytest.raises(ValueError, match="mask is"):
        pooled(roi, masks[..., :32])


def test_a_second_classifier_reads_the_distillation_token() -> None:
    def deit() -> nn.Module:
        settings = {"depth": 2, "img_size": 32, "embed_dim": 24, "num_heads": 2, "num_classes": 6}
        return timm.create_model("deit_tiny_distilled_patch16_224", **settings)

    torch.manual_seed(0)
    views = torch.randn(2, 2, 3, 32, 32)
    for model in (RveRNet(deit(), deit(), 4, 16, distilled=True), Single(deit(), 4, distilled=True)):
        own, taught = randomize(model).train()(*views)
        assert not torch.allclose(own, taught)
        torch.testing.assert_close(model.eval()(*views), ((own + taught) / 2).log_softmax(1))
        backbone = model.roi if isinstance(model, RveRNet) else model.backbone
        heads = [backbone.head.weight, backbone.head_dist.weight]
        own, taught = model.train()(*views)
        for answer, (read, unread) in ((own, heads), (taught, heads[::-1])):
            found = torch.autograd.grad(answer[:, 0].sum(), (read, unread), retain_graph=True, allow_unused=True)
            assert found[0].any()
            assert found[1] is None
    pooled = randomize(RegionPooling(timm.create_model("resnet10t", num_classes=0), 4, 16, distilled=True)).train()
    own, taught = pooled(torch.randn(2, 3, 64, 64), torch.ones(2, 1, 64, 64))
    assert own.shape == taught.shape == (2, 4)


def test_views_are_the_published_pixels() -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (31, 50, 3), dtype=np.uint8))
    mask = np.zeros((31, 50), bool)
    mask[5:20, 10:30] = True
    roi, extra = cut_out(picture, mask)
    np.testing.assert_array_equal(np.asarray(roi) + np.asarray(extra), np.asarray(picture))
    assert not np.asarray(roi)[~mask].any()
    assert not np.asarray(extra)[mask].any()
    padded = np.asarray(resize_and_pad(roi, 64))  # 64 x 39, 25 rows of grey, 13 above
    assert padded.shape == (64, 64, 3)
    assert (padded[:13] == 125).all()
    assert (padded[52:] == 125).all()
    np.testing.assert_array_equal(padded[13:52], np.asarray(roi.resize((64, 39), Image.Resampling.BICUBIC)))
    views = Views.published(64)
    plain = views(roi, extra)
    assert float(plain[0].amax()) <= 1
    torch.testing.assert_close(plain[0], torch.from_numpy(padded.transpose(2, 0, 1) / 255).float())
    flips = {False: set(), True: set()}
    for paired in flips:
        for seed in range(20):
            made = Views(64, (0,) * 3, (1,) * 3, 0.5, paired)(roi, extra, np.random.default_rng(seed))
            flips[paired].add(tuple(not torch.equal(m, p) for m, p in zip(made, plain, strict=True)))
    assert flips[True] == {(False, False), (True, True)}
    assert flips[False] == {(False, False), (True, True), (True, False), (False, True)}
    for wrong, message in ((mask[:30], "has 50 x 30 pixels, the picture 50 x 31"), (mask & False, "is empty")):
        with pytest.raises(UserError, match=message):
            cut_out(picture, wrong)


def test_noise_of_place_and_order() -> None:
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    mixed = np.asarray(permuted(picture, 64, np.random.default_rng(0)))
    tiles = lambda p: sorted(  # noqa: E731
        p.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, -1).tolist()
    )
    assert tiles(mixed) == tiles(np.asarray(picture))
    assert not np.array_equal(mixed, np.asarray(picture))
    moved = np.asarray(translocated(picture, 64, (20, -10)))
    np.testing.assert_array_equal(moved[:54, 20:], np.asarray(picture)[10:, :44])
    assert (moved[54:] == 125).all()
    assert (moved[:, :20] == 125).all()


def compressed(runs: list[int]) -> str:
    """COCO's string of run lengths, by the format's description."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | 32 if more else bits) + 48)
    return text


def test_run_lengths() -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        mask = np.kron(generator.random((5, 7)) < 0.4, np.ones((9, 11))).astype(bool)
        runs = encode_rle(mask)
        np.testing.assert_array_equal(decode_rle(runs, mask.shape), mask)
        np.testing.assert_array_equal(decode_rle(compressed(runs), mask.shape), mask)
    with pytest.raises(ValueError, match="cover 3 pixels of 2 x 2"):
        decode_rle([1, 2], (2, 2))
    with pytest.raises(ValueError, match="no character"):
        decode_rle("\x01", (2, 2))


def test_masks_from_files(tmp_path: Path) -> None:
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    pictures.mkdir()
    masks.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(generator.integers(1, 256, (20, 30, 3), dtype=np.uint8)).save(pictures / f"{name}.png")
    ids = np.zeros((20, 30), np.uint8)
    ids[2:8, 3:9], ids[10:15, 10:20] = 1, 2
    Image.fromarray(ids).save(masks / "a.png")
    Image.fromarray(np.where(ids == 1, ids, 0)).save(masks / "b.png")
    regions = id_regions(pictures, masks, {1: "rice", 2: "soup"})
    assert [(r.category, r.name) for r in regions] == [("rice", "a"), ("soup", "a"), ("rice", "b")]
    assert regions[1].mask().sum() == 50
    assert len(list(write_views(regions, tmp_path / "views"))) == 3
    listed = view_regions(tmp_path / "views")
    assert [(c, n) for c, n, _, _ in listed] == [("rice", "a"), ("rice", "b"), ("soup", "a")]
    with Image.open(listed[2][2]) as view:
        assert (np.asarray(view).any(2) == regions[1].mask()).all()
    with pytest.raises(UserError, match="two regions are"):
        list(write_views([regions[0], regions[0]], tmp_path / "twice"))
    with pytest.raises(UserError, match="holds 2, which no category has"):
        id_regions(pictures, masks, {1: "rice"})
    Image.fromarray(ids[:10]).save(masks / "b.png")
    with pytest.raises(UserError, match=r"b.png: has 30 x 10 pixels, the picture 30 x 20"):
        id_regions(pictures, masks, {1: "rice", 2: "soup"})
    (masks / "b.png").unlink()
    with pytest.raises(UserError, match="is missing"):
        id_regions(pictures, masks, {1: "rice", 2: "soup"})
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 1, "name": "rice"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1,
             "segmentation": {"size": [20, 30], "counts": encode_rle(ids == 1)}},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": [[10, 10, 19, 10, 19, 14, 10, 14]]},
        ],
    }  # fmt: skip
    place = tmp_path / "coco.json"
    place.write_text(json.dumps(content))
    (only,) = coco_regions(pictures, place)
    np.testing.assert_array_equal(only.mask(), ids > 0)  # one category in one picture is one region
    content["annotations"][0]["segmentation"]["size"] = [20, 20]
    place.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rice in a\.png: its mask is for"):
        coco_regions(pictures, place)
    first, second = content["annotations"]
    for annotations, image, message in (
        ([{**first, "segmentation": {"size": [20, 30], "counts": [600]}}], {}, r"rice in a\.png: its mask is empty"),
        ([second], {"width": 31}, r"a\.png has 30 x 20 pixels, its annotations are for 31 x 20"),
        ([second], {"file_name": "z.png"}, r"names .*z\.png, which is missing"),
        ([{**second, "category_id": 9}], {}, "names a picture or category that is not listed"),
        ([{**second, "segmentation": [[1, 2, 3, 4, 1e9, 5]]}], {}, r"a polygon reaches 1e\+09"),
        ([7], {}, "cannot be read as COCO annotations"),
    ):
        images = [{**content["images"][0], **image}]
        place.write_text(json.dumps({**content, "annotations": annotations, "images": images}))
        with pytest.raises(UserError, match=message):
            coco_regions(pictures, place)
    with pytest.raises(ValueError, match="three pairs"):
        polygon_mask([[1, 2, 3, 4]], (5, 5))


def test_masks_of_pictures_that_are_turned_upright(tmp_path: Path) -> None:
    """A photograph of a camera held upright is stored lying; its mask is drawn on what is seen."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6
    for folder in ("p", "m"):
        (tmp_path / folder).mkdir()
    picture.save(tmp_path / "p" / "a.png", exif=exif)
    ids = np.zeros((30, 20), np.uint8)
    ids[3:9, 4:8] = 1
    Image.fromarray(ids).save(tmp_path / "m" / "a.png")
    (region,) = id_regions(tmp_path / "p", tmp_path / "m", {1: "rice"})
    roi, _ = cut_out(region.picture(), region.mask())
    assert np.asarray(roi).any(2)[ids == 1].any()
    picture.save(tmp_path / "p" / "a.bmp")
    with pytest.raises(UserError, match="several pictures called a; their masks cannot be told apart"):
        id_regions(tmp_path / "p", tmp_path / "m", {1: "rice"})


def test_an_object_in_a_box_without_weights() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.normal((60, 120, 60), 12, (48, 64, 3))
    disc = (np.add.outer((np.arange(48) - 24) ** 2, (np.arange(64) - 30) ** 2)) < 150
    pixels[disc] = generator.normal((200, 60, 60), 12, (disc.sum(), 3))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    found = grabcut(picture, (14, 8, 46, 40))
    assert (found & disc).sum() / (found | disc).sum() > 0.85
    with pytest.raises(UserError, match="outside 64 x 48"):
        grabcut(picture, (14, 8, 70, 40))
    with pytest.raises(UserError, match="is the whole picture"):
        grabcut(picture, (0, 0, 64, 48))


def test_what_a_teacher_teaches() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    own = nn.functional.cross_entropy(student, labels)
    assert torch.equal(Distillation().loss(student, labels), own)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(Distillation("soft", 1.0, 2.0).loss(student, labels, teacher), 4 * kl)
    hard = nn.functional.cross_entropy(student, teacher.argmax(1))
    torch.testing.assert_close(Distillation("hard", 0.25).loss(student, labels, teacher), 0.75 * own + 0.25 * hard)
    second = torch.randn(4, 3)
    got = Distillation("deit").loss((student, second), labels, teacher)
    torch.testing.assert_close(got, 0.5 * own + 0.5 * nn.functional.cross_entropy(second, teacher.argmax(1)))
    for wrong in ({"kind": "firm"}, {"weight": 2}, {"temperature": 0}):
        with pytest.raises(ValueError, match="needs kind"):
            Distillation(**wrong)
    with pytest.raises(ValueError, match="the teacher's logits are None"):
        Distillation("soft").loss(student, labels)
    with pytest.raises(ValueError, match="the student gives 1 classifiers"):
        Distillation("deit").loss(student, labels, teacher)


def test_the_effective_ramp_of_the_released_code() -> None:
    rate = warm_ramp(4e-3, 10_980)
    assert [rate(epoch) for epoch in (0, 1)] == [0, pytest.approx(3.643e-6, rel=1e-3)]
    assert rate(29) == pytest.approx(1.056e-4, rel=1e-3)
    assert rate(10_980) == pytest.approx(0, abs=1e-9)


def test_scores() -> None:
    scores = torch.eye(4)[[0, 1, 2, 2, 3, 0]]
    row = score_regions(scores, torch.tensor([0, 1, 2, 3, 3, 1]), ambiguous=(2, 3))
    assert row["accuracy"] == pytest.approx(4 / 6)
    assert row["macro F1"] == pytest.approx(np.mean([2 / 3, 2 / 3, 2 / 3, 2 / 3]))
    assert row["ambiguous F1"] == pytest.approx(2 / 3)
    assert row["ambiguous accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no region has one of these"):
        score_regions(scores, torch.tensor([0, 1, 2, 3, 3, 1]), ambiguous=(9,))


class Tiny(nn.Module):
    """A small backbone with a map of features."""

    num_features = 32

    def __init__(self, classes: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
            nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 4 * 8, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def compared(seed: int) -> dict[str, dict[str, float]]:
    x, m, y = plates(600, 2 * seed)
    tx, tm, ty = plates(300, 2 * seed + 1)
    views, test_views = (x * m, x * (1 - m)), (tx * tm, tx * (1 - tm))
    rows = {}
    for name, make, inputs, test in (
        ("region", lambda: Single(Tiny(), 4), views, test_views),
        ("region and context", lambda: RveRNet(Tiny(), Tiny(), 4, 32), views, test_views),
        ("one pass", lambda: RegionPooling(Tiny(), 4, 32), (x, m), (tx, tm)),
    ):
        torch.manual_seed(seed)
        model = make()
        train_regions(model, inputs, y, epochs=8, learning_rate=3e-3, seed=seed, flip=0.0)
        rows[name] = score_regions(answers(model, test), ty, AMBIGUOUS)
        clear = ty > 1
        rows[name]["clear accuracy"] = float((answers(model, test).argmax(1) == ty)[clear].double().mean())
    return rows


def check_context(rows: dict[str, dict[str, float]]) -> None:
    alone, both, once = rows["region"], rows["region and context"], rows["one pass"]
    assert alone["ambiguous accuracy"] < 0.65  # a coin
    assert both["ambiguous accuracy"] > alone["ambiguous accuracy"] + 0.2
    assert once["ambiguous accuracy"] > alone["ambiguous accuracy"] + 0.2
    assert abs(both["clear accuracy"] - alone["clear accuracy"]) < 0.1


def test_context_helps_where_it_decides_and_only_there() -> None:
    check_context(compared(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_context_helps_for_other_seeds(seed: int) -> None:
    check_context(compared(seed))


def test_a_student_learns_from_its_teacher_alone() -> None:
    x, m, y = plates(400, 0)
    views = (x * m, x * (1 - m))
    torch.manual_seed(0)
    teacher = RveRNet(Tiny(), Tiny(), 4, 32)
    train_regions(teacher, views, y, epochs=8, learning_rate=3e-3, flip=0.0)
    student = RveRNet(Tiny(), Tiny(), 4, 32)
    wrong = torch.randint(4, y.shape, generator=torch.Generator().manual_seed(0))  # labels that say nothing
    train_regions(student, views, wrong, epochs=8, learning_rate=3e-3, flip=0.0,
                  distillation=Distillation("soft", 1.0, 2.0), teacher=teacher.eval())  # fmt: skip
    tx, tm, ty = plates(200, 1)
    assert score_regions(answers(student, (tx * tm, tx * (1 - tm))), ty)["accuracy"] > 0.6
    with pytest.raises(ValueError, match="one needs the other"):
        train_regions(student, views, y, distillation=Distillation("hard"))
