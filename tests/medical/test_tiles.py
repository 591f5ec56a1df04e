"""Tiles and slides: leakage is refused, regions are exact, broken and empty slides are named."""

import numpy as np
import pytest
import tifffile
import torch

from nearfar.core.errors import UserError
from nearfar.medical.data.slides import TiffSlide
from nearfar.medical.data.tiles import (
    Tile,
    aggregate,
    check_tile_split,
    find_tiles,
    jitter_stains,
    split_by_slide,
)


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
    with pytest.raises(UserError, match="tile 10 of level 0 is broken"):
        list(TiffSlide(path).tiles(64))
