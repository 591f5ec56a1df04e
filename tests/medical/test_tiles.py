"""Tiles and slides: leakage is refused, regions are exact, broken and empty slides are named."""

import io
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tifffile
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from nearfar.core.errors import UserError
from nearfar.core.recipes import read_recipe, shipped_recipes
from nearfar.medical.data.slides import TiffSlide, is_slide, open_slide
from nearfar.medical.data.tiles import (
    Tile,
    aggregate,
    check_tile_split,
    find_tiles,
    jitter_stains,
    read_tile,
    split_by_slide,
)
from nearfar.medical.histology import RECIPES
from nearfar.medical.histology.classifier import TileRecipe, create_tile_network, start_from
from nearfar.medical.histology.scores import score, score_tiles
from nearfar.medical.histology.training import Tiles, augmented, class_weights
from nearfar.medical.samples import write_tissue_tiles


def test_find_tiles(tmp_path):
    for name in ("a/s1_0.png", "a/s2_0.png", "b/s1_1.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    tiles = find_tiles(tmp_path)
    assert [(t.label, t.slide) for t in tiles] == [("a", "s1"), ("a", "s2"), ("b", "s1")]
    (tmp_path / "a" / "nameless.png").touch()
    with pytest.raises(UserError, match=r"nameless\.png: its name does not tell the slide"):
        find_tiles(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_tiles(tmp_path / "none")
    with pytest.raises(UserError, match="of 0 classes"):
        find_tiles(tmp_path / "a")


def test_splits_keep_slides_together():
    tiles = [Tile(None, "ab"[(s + i) % 2], f"s{s}") for s in range(10) for i in range(1 + s)]
    parts = split_by_slide(tiles, 3)
    assert sorted(t.slide for _, held in parts for t in held) == sorted(t.slide for t in tiles)
    for train, held in parts:
        assert not {t.slide for t in train} & {t.slide for t in held}
    with pytest.raises(UserError, match="slides on both sides of the split: s1"):
        check_tile_split(tiles, [Tile(None, "a", "s1")])
    with pytest.raises(UserError, match="there are 10"):
        split_by_slide(tiles, 11)
    with pytest.raises(UserError, match="class b is on too few slides"):
        split_by_slide([Tile(None, "a", "1"), Tile(None, "a", "2"), Tile(None, "b", "3")], 2)


def test_aggregation():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    torch.testing.assert_close(aggregate(p), p.mean(0))
    torch.testing.assert_close(aggregate(p, "vote"), torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(aggregate(p, "max"), torch.tensor([0.9, 0.6]) / 1.5)
    with pytest.raises(ValueError, match="mean, vote, max"):
        aggregate(p, "median")


def test_stain_jitter_keeps_range_and_does_nothing_at_zero():
    tile = 0.1 + 0.9 * torch.rand(3, 8, 8)
    torch.testing.assert_close(jitter_stains(tile, 0.0), tile, rtol=1e-4, atol=1e-4)
    moved = jitter_stains(tile, 0.1, torch.Generator().manual_seed(1))
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - tile).abs().max() > 1e-3


def write(path, picture, levels=2, compression="zlib"):
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": compression}
        file.write(picture, subifds=levels - 1, **options)
        for i in range(1, levels):
            file.write(picture[:: 4**i, :: 4**i], subfiletype=1, **options)
    return path


def picture():
    rng = np.random.default_rng(0)
    image = np.full((300, 500, 3), 240, np.uint8)
    image[64:192, 128:320] = rng.integers(0, 120, (128, 192, 3)) + np.array([100, 0, 80])
    return image.astype(np.uint8)


def test_regions_are_exact_and_tiles_follow_the_tissue(tmp_path):
    image = picture()
    with TiffSlide(write(tmp_path / "s.tif", image)) as slide:
        assert slide.levels == [(300, 500), (75, 125)]
        np.testing.assert_array_equal(slide.read(50, 100, 140, 230), image[50:190, 100:330])
        edge = slide.read(280, 480, 40, 40)
        np.testing.assert_array_equal(edge[:20, :20], image[280:, 480:])
        assert (edge[20:] == 255).all()
        np.testing.assert_array_equal(slide.read(0, 0, 75, 125, 1), image[::4, ::4])
        found = {(row, column): tile for row, column, tile in slide.tiles(64)}
        assert set(found) == {(row, column) for row in (1, 2) for column in (2, 3, 4)}
        np.testing.assert_array_equal(found[1, 2], image[64:128, 128:192])


def test_slides_that_are_refused(tmp_path):
    image = picture()
    with pytest.raises(UserError, match="no pyramid"):
        TiffSlide(write(tmp_path / "flat.tif", image, levels=1))
    with pytest.raises(UserError, match="cannot be read"):
        TiffSlide(tmp_path / "missing.tif")
    glass = write(tmp_path / "glass.tif", np.full_like(image, 240))
    with pytest.raises(UserError, match="holds no tissue"):
        list(TiffSlide(glass).tiles(64))
    path = write(tmp_path / "broken.tif", image)
    with tifffile.TiffFile(path) as file:
        offset = file.series[0].levels[0].pages[0].dataoffsets[10]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    with pytest.raises(UserError, match="tile 10 of level 0 is broken"), TiffSlide(path) as slide:
        list(slide.tiles(64))
    cut = write(tmp_path / "cut.tif", image)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UserError, match="is cut off"):
        TiffSlide(cut)


def test_levels_that_lie_as_pages_of_their_own_and_resolutions(tmp_path):
    image = picture()
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for i in range(2):
            small = image[:: 2**i, :: 2**i]
            file.write(small, tile=(64, 64), photometric="rgb", description="Aperio |MPP = 0.2461|x" if i == 0 else "",
                       metadata=None)  # fmt: skip
    with TiffSlide(tmp_path / "pages.tif") as slide:
        assert slide.levels == [(300, 500), (150, 250)]
        assert slide.mpp == 0.2461
        np.testing.assert_array_equal(slide.square(64, 128, 128, 64), image[::2, ::2][32:96, 64:128])
        assert slide.square(64, 128, 100, 64).shape == (64, 64, 3)


def test_ome_tiff_is_read_with_its_resolution(tmp_path):
    image = picture()
    for unit, value in (("µm", 0.25), ("nm", 250.0)):
        about = {"PhysicalSizeX": value, "PhysicalSizeXUnit": unit, "axes": "YXS"}
        with tifffile.TiffWriter(tmp_path / "s.ome.tif", ome=True) as file:
            options = {"tile": (64, 64), "photometric": "rgb"}
            file.write(image, subifds=1, metadata=about, **options)
            file.write(image[::2, ::2], subfiletype=1, **options)
        with open_slide(tmp_path / "s.ome.tif") as slide:
            assert slide.mpp == pytest.approx(0.25)
            assert slide.levels == [(300, 500), (150, 250)]
            np.testing.assert_array_equal(slide.read(50, 100, 140, 230), image[50:190, 100:330])
        assert is_slide(tmp_path / "s.ome.tif")
    tifffile.imwrite(tmp_path / "tile.tif", image, photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    assert not is_slide(tmp_path / "tile.tif")


@pytest.mark.parametrize(("compression", "rgb"), [(7, True), (7, False), (33005, True), (33003, False)])
def test_jpeg_tiles_are_decoded_without_further_packages(compression, rgb, tmp_path):
    """As Aperio writes them: JPEG and JPEG 2000, of red, green and blue as they are, or of luma and chroma."""
    image = np.full((128, 128, 3), 240, np.uint8)
    image[32:96, 32:96] = (180, 60, 140)
    encoded = []
    for size in (128, 64):
        small = image[:: 128 // size, :: 128 // size]
        parts = [small[y : y + 64, x : x + 64] for y in range(0, size, 64) for x in range(0, size, 64)]
        encoded.append([])
        for part in parts:
            stream, tile = io.BytesIO(), Image.fromarray(part)
            if compression == 7:
                tile.save(stream, "JPEG", quality=95, subsampling=0, keep_rgb=rgb)
            else:
                plain = tile if rgb else Image.frombytes("RGB", tile.size, tile.convert("YCbCr").tobytes())
                plain.save(stream, "JPEG2000", no_jp2=True)
            encoded[-1].append(stream.getvalue())
    with tifffile.TiffWriter(tmp_path / "j.tif") as file:
        options = {"tile": (64, 64), "dtype": np.uint8, "compression": "zlib", "photometric": "rgb", "metadata": None}
        file.write(iter(encoded[0]), shape=(128, 128, 3), subifds=1, **options)
        file.write(iter(encoded[1]), shape=(64, 64, 3), subfiletype=1, **options)
    with tifffile.TiffFile(tmp_path / "j.tif", mode="r+b") as file:  # tifffile alone writes none of these
        for level in file.series[0].levels:
            level.pages[0].tags["Compression"].overwrite(compression)
            level.pages[0].tags["PhotometricInterpretation"].overwrite(2 if rgb else 6)
    with TiffSlide(tmp_path / "j.tif") as slide:
        assert np.abs(slide.read(0, 0, 128, 128).astype(int) - image).max() < 12


def test_slides_of_other_scanners_name_what_reads_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(UserError, match="pip install openslide-python openslide-bin"):
        open_slide(tmp_path / "x.ndpi")


def test_slides_by_openslide(tmp_path, monkeypatch):
    """With a stand-in of OpenSlide's interface: regions by places of the finest level, transparent beyond the edge."""
    image = picture()

    class Stub:
        level_dimensions = ((500, 300), (125, 75))
        properties = {"openslide.mpp-x": "0.5"}

        def __init__(self, path):
            pass

        def read_region(self, place, level, size):
            whole = Image.fromarray(image[:: 4**level, :: 4**level]).convert("RGBA")
            x, y = (n // 4**level for n in place)
            return whole.crop((x, y, x + size[0], y + size[1]))

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "openslide", types.SimpleNamespace(OpenSlide=Stub))
    with open_slide(tmp_path / "x.ndpi") as slide, TiffSlide(write(tmp_path / "s.tif", image)) as same:
        assert slide.mpp == 0.5
        assert slide.levels == same.levels
        assert slide.places(64) == same.places(64)
        np.testing.assert_array_equal(slide.read(280, 480, 40, 40), same.read(280, 480, 40, 40))
        np.testing.assert_array_equal(slide.read(8, 20, 30, 40, 1), same.read(8, 20, 30, 40, 1))


def test_scores_are_those_of_scikit_learn_and_intervals_are_over_slides():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 3, 90), [f"s{i // 6}" for i in range(90)]
    scores = rng.dirichlet((1, 1, 1), 90).round(1) + 0.3 * np.eye(3)[labels]
    scores /= scores.sum(1, keepdims=True)
    row = score(scores, labels, groups, resamples=200)
    assert row["accuracy"] == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    assert row["balanced"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    assert row["AUC"] == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))
    for name in ("accuracy", "balanced", "AUC"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    alike = score(np.eye(3)[[0] * 45 + [1] * 45], np.array([0] * 90), groups, resamples=200)
    items = score(np.eye(3)[[0] * 45 + [1] * 45], np.array([0] * 90), [str(i) for i in range(90)], resamples=200)
    width = alike["accuracy_high"] - alike["accuracy_low"]
    assert width > 1.5 * (items["accuracy_high"] - items["accuracy_low"]), "tiles of a slide are no independent items"
    assert np.isnan(alike["AUC"])
    assert np.isnan(score(scores[:30], labels[:30], groups[:30])["accuracy_low"])


def test_a_slide_of_several_classes_has_no_score_without_a_table():
    tiles = [Tile(Path(f"{s}{i}"), "ab"[i % 2] if s == "x" else "a", s) for s in "xyz" for i in range(4)]
    scores = np.tile([0.8, 0.2], (12, 1))
    rows, note = score_tiles(scores, tiles, ["a", "b"])
    assert (rows[0]["items"], rows[1]["items"]) == (12, 2)
    assert note.startswith("1 of 3 slides")
    rows, note = score_tiles(scores, tiles, ["a", "b"], slide_labels={"x": "b", "y": "a", "z": "a"})
    assert not note
    assert rows[1]["accuracy"] == pytest.approx(2 / 3)
    scores[:8] = np.nan
    rows, _ = score_tiles(scores, tiles, ["a", "b"])
    assert (rows[0]["accuracy"], rows[1]["accuracy"]) == (4 / 12, 1 / 2)


def test_networks_by_name_and_starting_weights(tmp_path):
    settings = {"backbone": "test_resnet", "scales": 2, "depth": 1, "dim": 16, "num_heads": 2}
    network = create_tile_network("duoformer", 3, 32, settings)
    assert len(network.blocks) == 1
    ablation = create_tile_network("duoformer-identity", 3, 32, settings).eval()
    assert not len(ablation.blocks)
    first, second = ablation(torch.randn(2, 3, 32, 32))
    assert (first - second).abs().max() > 1e-4, "it sees the tile, not its learnt token alone"
    assert create_tile_network("duoformer_small", 3, 32, {"backbone": "test_resnet", "dim": 16}).head.in_features == 16
    hybrid = create_tile_network("test_resnet+vit", 3, 64, {"depth": 1, "dim": 16, "num_heads": 2, "frozen": True})
    assert hybrid.train()(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert not hybrid.patch_embed.backbone.training
    trunk = {name: torch.randn_like(value.float()) for name, value in network.backbone.state_dict().items()}
    safetensors.torch.save_file({**trunk, "fc.weight": torch.zeros(5, 7)}, tmp_path / "trunk.safetensors")
    for each in (network, hybrid):
        into = each.backbone if each is network else each.patch_embed.backbone
        start_from(each, tmp_path / "trunk.safetensors")
        for name, value in into.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(value, trunk[name])
    with pytest.raises(UserError, match=r"trunk\.safetensors: "):
        start_from(create_tile_network("resnet18", 3, 32), tmp_path / "trunk.safetensors")
    for name, size, what in (
        ("duoformer_r99", 32, "forms are duoformer"), ("duoformer", 40, "multiple of 32"),
        ("resnet18-identity", 32, "is for DuoFormers"), ("nothing", 32, "network nothing"),
        ("test_resnet+vit", 40, "multiple of 32"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            create_tile_network(name, 3, size)


def test_augmentation_makes_nothing_up_where_the_tile_is_large_enough():
    tile = np.full((100, 100, 3), 200, np.uint8)
    for rotate in ("none", "quarter", "any"):
        for fit, size in (("crop", 64), ("resize", 32)):
            recipe = TileRecipe(size=size, fit=fit, rotate=rotate, stains=0, jitter=0)
            for _ in range(4):
                seen = augmented(tile, recipe)
                assert seen.shape == (3, size, size)
                if fit == "crop" or rotate != "any":
                    torch.testing.assert_close(seen, torch.full_like(seen, 200 / 255))
    random.seed(0)
    assert len({augmented(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8),
                          TileRecipe(size=64)).sum().item() for _ in range(4)}) == 4  # fmt: skip


@pytest.mark.parametrize("name", shipped_recipes(RECIPES))
def test_shipped_recipes_are_read_and_their_networks_exist(name):
    recipe = read_recipe(TileRecipe, name, (), RECIPES)
    with torch.device("meta"):
        create_tile_network(recipe.network, 3, recipe.size, recipe.settings)


def test_an_epoch_has_as_many_tiles_of_each_class(tmp_path):
    for i in range(12):
        Image.new("RGB", (32, 32), (i, 100, 100)).save(tmp_path / f"{i}.png")
    tiles = [Tile(tmp_path / f"{i}.png", "a" if i < 10 else "b", f"s{i}") for i in range(12)]
    recipe = TileRecipe(size=32, balanced=True, tiles_per_epoch=20)
    assert [label for _, label in map(Tiles(tiles, "ab", recipe, learn=True).__getitem__, range(20))].count(1) == 10
    assert len(Tiles(tiles, "ab", recipe)) == 12
    torch.testing.assert_close(class_weights(tiles, "ab"), torch.tensor([0.6, 3.0]))


def test_training_starts_from_a_published_duoformer(tmp_path):
    """Of the authors' layout; a head for other classes starts afresh, another depth is refused."""
    rules = (
        (r"^(backbone)\.", "module.resnet_projector."), (r"^token$", "module.channel_token"),
        (r"^tokens\.heads\.(\d)", lambda m: f"module.projection.proj_heads{int(m[1]) + 2}"),
        (r"^blocks\.", "module.vision_transformer.scaleBlocks."), (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.2\.", ".mlp.fc2."), (r"^patches\.layers\.(\d)\.", r"module.vision_transformer.blocks.\1.attn."),
        (r"^patches\.|^(?=head\.)", "module.vision_transformer."),
        (r"^scale_pos", "module.vision_transformer.pos_embed_for_scale"),
    )  # fmt: skip
    settings = {"backbone": "resnet18", "scales": 2, "depth": 1, "dim": 16, "num_heads": 4}
    published = create_tile_network("duoformer", 4, 32, settings).state_dict()
    state = {}
    for name, value in published.items():
        for pattern, word in rules:
            name = re.sub(pattern, word, name)
        state[name] = value.contiguous()
    safetensors.torch.save_file(state, tmp_path / "published.safetensors")
    for classes, fresh in ((4, set()), (7, {"head.weight", "head.bias"})):
        network = create_tile_network("duoformer", classes, 32, settings)
        start_from(network, tmp_path / "published.safetensors")
        assert {n for n, v in network.state_dict().items() if not torch.equal(v, published[n])} == fresh
    with pytest.raises(UserError, match=r"(?s)published\.safetensors: .*missing blocks\.1"):
        start_from(create_tile_network("duoformer", 4, 32, settings | {"depth": 2}), tmp_path / "published.safetensors")


def test_tissue_tiles_hold_the_same_colours_whatever_their_class(tmp_path):
    tiles = find_tiles(write_tissue_tiles(tmp_path))
    assert {tile.label for tile in tiles} == {"stained", "unstained"}
    assert len({tile.slide for tile in tiles}) == 36
    pixels = [np.sort(read_tile(tile.path).reshape(-1, 3), 0) for tile in tiles]
    assert pixels[0].shape == (48 * 48, 3)
    for other in pixels[1:]:
        np.testing.assert_array_equal(other, pixels[0])
    for kind in ("stained", "unstained"):
        assert len({tile.slide for tile in tiles if tile.label == kind}) >= 12
    with pytest.raises(ValueError, match="size is 8"):
        write_tissue_tiles(tmp_path, 8)
