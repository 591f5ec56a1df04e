"""Regions of pictures: masks from files, and the two views that RveRNet sees of each."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw
from torch import Tensor

from nearfar.core.errors import UserError, some
from nearfar.core.reading import check_picture, reading, reason
from nearfar.vision.data.images import is_picture, read_picture

Mask = NDArray[np.bool_]
"""(H, W)."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pixels in [0, 1]."""

GREY = 125
"""The published value of padding."""


def decode_rle(counts: Sequence[int] | str, size: Sequence[int]) -> Mask:
    """COCO's run lengths, plain or compressed, of a picture of `size` (height, width): runs of zeros and ones in turn,
    column by column. ValueError where they do not fill the picture."""
    runs = _uncompressed(counts) if isinstance(counts, str) else [int(n) for n in counts]
    height, width = size
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"its runs cover {sum(runs)} pixels of {height} x {width}")
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return values.reshape(width, height).T


def encode_rle(mask: Mask) -> list[int]:
    """Plain run lengths of a mask: what `decode_rle` reads."""
    flat = np.asarray(mask, bool).T.flatten()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def _uncompressed(text: str) -> list[int]:
    """Six bits a character from '0' on: five of value, lowest first, one that says whether more follow; from the third
    number on, the difference to the one two before."""
    numbers: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no character of compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return numbers


def polygon_mask(polygons: Sequence[Sequence[float]], size: Sequence[int]) -> Mask:
    """The union of polygons x1, y1, x2, y2, ... in a picture of `size` (height, width)."""
    picture = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(picture)
    for points in polygons:
        if len(points) < 6 or len(points) % 2:
            raise ValueError(f"a polygon has {len(points)} numbers; needs at least three pairs")
        values = [float(p) for p in points]
        if not all(abs(v) <= 10 * max(size) for v in values):
            raise ValueError(f"a polygon reaches {max(values, key=abs):g} in a picture of {size[1]} x {size[0]} pixels")
        draw.polygon(values, fill=1)
    return np.asarray(picture, bool)


@dataclass(frozen=True)
class Region:
    """All pixels of one category in one picture: the key is (category, name), since pictures hold several."""

    name: str
    category: str
    picture: Callable[[], Image.Image]
    mask: Callable[[], Mask]


def id_regions(
    pictures: Path, masks: Path, categories: Mapping[int, str], ignore: Sequence[int] = (0,)
) -> list[Region]:
    """Regions of a folder of pictures and one of PNG files of the same names, whose values are categories' numbers.

    `ignore`: numbers that are no category, such as the background. UserError for a picture without mask, a mask of
    another size or without regions, a number that `categories` does not name, and pictures that share one mask.
    """
    found: list[Region] = []
    files = sorted(p for p in pictures.iterdir() if is_picture(Path(p.name)))
    if not files:
        raise UserError(f"{pictures}: no pictures there")
    stems = [p.stem for p in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(f"{pictures}: has several pictures called {some(twice)}; their masks cannot be told apart")
    for path in files:
        place = masks / f"{path.stem}.png"
        if not place.is_file():
            raise UserError(f"{place}: is missing; {path.name} needs a mask of its own")
        ids = read_ids(place)
        size = size_of(path)
        if ids.shape != size[::-1]:
            raise UserError(f"{place}: has {ids.shape[1]} x {ids.shape[0]} pixels, the picture {size[0]} x {size[1]}")
        numbers = [int(n) for n in np.unique(ids) if n not in ignore]
        if not numbers:
            raise UserError(f"{place}: is empty; leave {path.name} out, or mark a region in it")
        if unknown := [n for n in numbers if n not in categories]:
            raise UserError(f"{place}: holds {some(unknown)}, which no category has; known are {some(categories)}")
        for number in numbers:
            found.append(Region(path.stem, categories[number], _reader(path), partial(_of_number, place, number)))
    return found


def _of_number(path: Path, number: int) -> Mask:
    return read_ids(path) == number


def itself(mask: Mask) -> Mask:
    return mask


def read_ids(path: Path) -> NDArray[np.int64]:
    """The numbers (H, W) of a PNG of one channel, or with a palette."""
    with reading(path, "cannot be read as a mask"), Image.open(path) as picture:
        if picture.mode not in ("L", "P", "1", "I", "I;16"):
            raise UserError(f"{path}: has mode {picture.mode}; a mask has one channel of numbers")
        check_picture(picture, path)
        return np.asarray(picture).astype(np.int64)


def _reader(path: Path) -> Callable[[], Image.Image]:
    return lambda: read_picture(path)


def coco_regions(pictures: Path, annotations: Path) -> list[Region]:
    """Regions of COCO's annotation file: run lengths or polygons, those of one category in one picture together.

    UserError for a picture that is not there, and for masks that do not fit or are empty.
    """
    found = []
    with reading(annotations, "cannot be read as COCO annotations"):
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        files = {i["id"]: i for i in content["images"]}
        grouped: dict[tuple[Any, Any], list[Any]] = {}
        for entry in content["annotations"]:
            if entry.get("image_id") not in files or entry.get("category_id") not in names:
                raise UserError(f"annotation {entry.get('id')} names a picture or category that is not listed")
            grouped.setdefault((entry["image_id"], entry["category_id"]), []).append(entry)
        for (image, category), members in grouped.items():
            record = files[image]
            path = pictures / str(record["file_name"])
            if not path.is_file():
                raise UserError(f"names {path}, which is missing")
            width, height = size_of(path)
            size = height, width
            if (record["height"], record["width"]) != size:
                said = f"{record['width']} x {record['height']}"
                raise UserError(f"{path.name} has {width} x {height} pixels, its annotations are for {said}")
            mask = np.zeros(size, bool)
            try:
                for entry in members:
                    shape = entry["segmentation"]
                    if not isinstance(shape, dict):
                        mask |= polygon_mask(shape, size)
                    elif tuple(shape["size"]) != size:
                        raise ValueError(f"its mask is for {shape['size']}, the picture {list(size)}")
                    else:
                        mask |= decode_rle(shape["counts"], size)
                if not mask.any():
                    raise ValueError("its mask is empty")
            except (ValueError, KeyError, TypeError) as error:
                why = error if type(error) is ValueError else reason(error)
                raise UserError(f"{names[category]} in {path.name}: {why}") from error
            found.append(Region(path.stem, names[category], _reader(path), partial(itself, mask)))
    return found


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture as `read_picture` gives it, upright."""
    with reading(path, "cannot be read as a picture"), Image.open(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return picture.size[::-1] if turned else picture.size


def view_regions(root: Path) -> list[tuple[str, str, Path, Path]]:
    """The published layout, `roi/CATEGORY/NAME` and `extra-roi/CATEGORY/NAME`: category, name and both files.

    UserError for one without the other.
    """
    found = []
    for path in sorted((root / "roi").glob("*/*")):
        if not is_picture(Path(path.name)):
            continue
        other = root / "extra-roi" / path.parent.name / path.name
        if not other.is_file():
            raise UserError(f"{other}: is missing; {path} needs its complement")
        found.append((path.parent.name, path.stem, path, other))
    if not found:
        raise UserError(f"{root}: has no pictures in roi/CATEGORY")
    return found


def cut_out(picture: Image.Image, mask: Mask, name: str = "mask") -> tuple[Image.Image, Image.Image]:
    """The region on black, and the picture with the region blacked out; both keep their frame.

    UserError for a mask of another size or without pixels; a region that is the whole picture has no surroundings.
    """
    pixels, mask = np.asarray(picture), np.asarray(mask, bool)
    if mask.shape != pixels.shape[:2]:
        raise UserError(
            f"{name}: has {mask.shape[1]} x {mask.shape[0]} pixels, the picture {pixels.shape[1]} x {pixels.shape[0]}"
        )
    if not mask.any():
        raise UserError(f"{name}: is empty; there is no region to name")
    inside = mask[..., None] if pixels.ndim == 3 else mask
    return Image.fromarray(pixels * inside), Image.fromarray(pixels * ~inside)


def shrunk(picture: Image.Image, size: int) -> Image.Image:
    """The longer side to `size`, bicubic, sides floored."""
    if size < 1:
        raise ValueError(f"size is {size}; needs at least 1")
    ratio = size / max(picture.size)
    width, height = (max(1, math.floor(n * ratio)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def resize_and_pad(picture: Image.Image, size: int, value: int = GREY) -> Image.Image:
    """The longer side to `size`, then padding, the larger half left and top."""
    small = shrunk(picture, size)
    canvas = Image.new(picture.mode, (size, size), (value,) * len(picture.getbands()))
    canvas.paste(small, (-(-(size - small.width) // 2), -(-(size - small.height) // 2)))
    return canvas


def permuted(picture: Image.Image, size: int, generator: np.random.Generator, patch: int = 16) -> Image.Image:
    """The robustness test of patches out of order: resized, padded with black to multiples of `patch`, all patches
    permuted, then grey padding to `size`."""
    small = shrunk(picture, size)
    pixels = np.asarray(small.convert("RGB"))
    short = [-n % patch for n in pixels.shape[:2]]
    pixels = np.pad(pixels, [(s // 2, s - s // 2) for s in short] + [(0, 0)])
    rows, columns = (n // patch for n in pixels.shape[:2])
    parts = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
    parts = parts[generator.permutation(len(parts))]
    mixed = parts.reshape(rows, columns, patch, patch, 3).swapaxes(1, 2).reshape(pixels.shape)
    return resize_and_pad(Image.fromarray(mixed), size)


def translocated(picture: Image.Image, size: int, shift: tuple[int, int] = (60, -85)) -> Image.Image:
    """The robustness test of things out of place: resized and pasted `shift` pixels right and down on grey; what leaves
    the frame is cut."""
    small = shrunk(picture, size)
    canvas = Image.new("RGB", (size, size), (GREY,) * 3)
    canvas.paste(small.convert("RGB"), shift)
    return canvas


@dataclass(frozen=True)
class Views:
    """How a region becomes two tensors (3, size, size).

    Args:
        size: pixels.
        mean, std: normalization; the published code has none.
        extra_mean, extra_std: those of the surroundings, where the second backbone has its own.
        flip: probability of mirroring, in training.
        paired: mirror both views or none; the published code draws for each, so half of its pairs do not fit.
    """

    size: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    flip: float = 0.5
    paired: bool = True
    extra_mean: tuple[float, ...] | None = None
    extra_std: tuple[float, ...] | None = None

    @classmethod
    def published(cls, size: int = 224) -> "Views":
        """As the paper's code has it: values in [0, 1], each view mirrored by itself."""
        return cls(size, (0.0,) * 3, (1.0,) * 3, 0.5, False)

    def __call__(
        self, roi: Image.Image, extra: Image.Image, generator: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both views; mirrored at random where a generator is given."""
        chances = [False, False] if generator is None else (generator.random(2) < self.flip).tolist()
        if self.paired:
            chances[1] = chances[0]
        return self.tensor(roi, chances[0]), self.tensor(extra, chances[1], True)

    def whole(self, picture: Image.Image, mask: Mask) -> tuple[Tensor, Tensor]:
        """The picture (3, size, size) and the region's share of every pixel (1, size, size), for one pass over both."""
        share = resize_and_pad(Image.fromarray(mask.astype(np.uint8) * 255), self.size, 0)
        return self.tensor(picture), torch.from_numpy(np.asarray(share).astype(np.float32)[None] / 255)

    def tensor(self, picture: Image.Image, flip: bool = False, extra: bool = False) -> Tensor:
        pixels = np.asarray(resize_and_pad(picture, self.size)).astype(np.float32) / 255
        pixels = pixels[:, ::-1] if flip else pixels
        mean, std = (self.mean, self.std) if not extra else (self.extra_mean or self.mean, self.extra_std or self.std)
        x = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))


def write_views(regions: Sequence[Region], root: Path) -> Iterator[tuple[str, str]]:
    """Write the cut-outs in the published layout, as PNG, whose black stays black: yields category and name.

    UserError where two regions have one category and name.
    """
    from nearfar.core.files import atomic_path

    keys = [(region.category, region.name) for region in regions]
    if len(set(keys)) != len(keys):
        raise UserError(f"{root}: two regions are {some({k for k in keys if keys.count(k) > 1})}")
    for region in regions:
        views = cut_out(region.picture(), region.mask(), f"{region.name}, {region.category}")
        for folder, view in zip(("roi", "extra-roi"), views, strict=True):
            place = root / folder / region.category / f"{region.name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(place) as temporary:
                view.save(temporary, format="PNG")
        yield region.category, region.name


def grabcut(picture: Image.Image, box: Sequence[float], rounds: int = 5, seed: int = 0) -> Mask:
    """The object in a box (left, top, right, bottom), from colours alone, without weights: GrabCut's idea.

    Colours in the box are held against Gaussian mixtures of what is inside and outside, in turn, and the
    labels are smoothed by a random walk (Grady 2006) from the sure ones. Needs scikit-image and scikit-learn.
    """
    try:
        from skimage.color import rgb2lab
        from skimage.segmentation import random_walker
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise UserError(
            "grabcut: needs scikit-image and scikit-learn; pip install scikit-image scikit-learn"
        ) from error
    width, height = picture.size
    left, top, right, bottom = (round(v) for v in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(f"box {tuple(box)}: is outside {width} x {height} pixels, or empty")
    lab = rgb2lab(np.asarray(picture.convert("RGB")))
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    if inside.all():
        raise UserError(f"box {tuple(box)}: is the whole picture; leave a rim that is not the object")
    mask, flat = inside.copy(), lab.reshape(-1, 3)
    for _ in range(rounds):
        scores = []
        for part in (mask, ~mask):
            values = lab[part]
            values = values[:: max(1, len(values) // 5000)]
            mixture = GaussianMixture(min(5, len(values)), random_state=seed, reg_covar=1e-2).fit(values)
            scores.append(mixture.score_samples(flat).reshape(height, width))
        new = inside & (scores[0] > scores[1])
        if not new.any() or (new == mask).all():
            break
        mask = new
    difference = scores[0] - scores[1]
    sure = inside & mask & (difference >= np.median(difference[mask]))
    rest = inside & ~mask
    other = rest & (difference <= np.median(difference[rest])) if rest.any() else rest
    labels = np.where(~inside | other, 2, np.where(sure, 1, 0))
    return (
        random_walker(
            lab, labels, beta=90, mode="bf" if lab.shape[0] * lab.shape[1] < 2**14 else "cg_j", channel_axis=-1
        )
        == 1
    ) & inside
