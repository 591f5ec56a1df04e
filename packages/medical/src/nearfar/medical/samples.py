"""Data that come with the dependencies: the MNI152 brain of nilearn's wheel, a photograph of colon, and textures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tifffile
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json
from nearfar.medical.data.tiles import STAINS

TISSUES = {1: "grey matter", 2: "white matter"}


def write_brain(folder: str | Path, resolution: int = 2) -> Path:
    """Write the MNI152 T1 template as two cases, its right and left half, with tissue labels, to `folder`.

    `images/right.nii.gz`, `labels/right.nii.gz` ... and `labels.json`. A voxel is grey or white matter where that map
    of the template is the larger and at least 1/2. Both halves are of one average of 152 people: a network trained on
    the one is tested on a mirror-like other, which is easier than another person. `resolution` in mm. Needs the extra
    `samples`; nothing is downloaded.
    """
    try:
        from nilearn import datasets, image
    except ImportError as error:
        raise UserError("the brain sample needs nilearn: install nearfar-medical[samples]") from error
    folder = Path(folder)
    brain = datasets.load_mni152_template(resolution=resolution)
    grey = image.resample_to_img(datasets.load_mni152_gm_template(resolution=resolution), brain).get_fdata()
    white = image.resample_to_img(datasets.load_mni152_wm_template(resolution=resolution), brain).get_fdata()
    labels = np.where(grey >= white, 1, 2) * (np.maximum(grey, white) >= 0.5)
    data, middle = brain.get_fdata(dtype=np.float32), brain.shape[0] // 2
    for name, part in (("right", slice(middle, None)), ("left", slice(None, middle))):
        affine = brain.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (part.start or 0)
        for kind, values in (("images", data[part]), ("labels", labels[part].astype(np.uint8))):
            with atomic_path(folder / kind / f"{name}.nii.gz") as temporary:
                nib.save(nib.Nifti1Image(values, affine), temporary)
    write_json(folder / "labels.json", {str(k): v for k, v in TISSUES.items()})
    return folder


def threshold_baseline(image: np.ndarray, train_image: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Tissue by intensity alone: the class whose mean in the training half is nearest, background included."""
    means = np.array([train_image[train_labels == k].mean() for k in range(int(train_labels.max()) + 1)])
    return np.abs(image[..., None] - means).argmin(-1).astype(np.uint8)


TEXTURES = ("brick", "grass", "gravel")


def _textures() -> dict[str, np.ndarray]:
    """The darkness of scikit-image's three photographs, (512, 512) in 0.2..1.2."""
    import skimage.data

    return {name: 1.2 - np.asarray(getattr(skimage.data, name)(), np.float32) / 255 for name in TEXTURES}


def _stained(darkness: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8: `darkness` as densities of haematoxylin and eosin, of a mix and a strength drawn by chance."""
    stains = np.asarray(STAINS[:2]) / np.linalg.norm(STAINS[:2], axis=1, keepdims=True)
    share = draw.uniform(0.25, 0.75)
    density = darkness[..., None] * (draw.uniform(0.7, 1.3) * np.array([share, 1 - share]) @ stains)
    return (255 * np.exp(-density)).astype(np.uint8)


def write_texture_tiles(folder: str | Path, size: int = 64) -> Path:
    """Write tiles of three photographs of textures that scikit-image carries, as if of tissue, to `folder`.

    brick, grass and gravel (512 x 512, grey) are the classes. The upper three quarters of each are cut into twelve
    blocks of 128 pixels, the "slides", and each into nine tiles of `size`, half over one another. The darkness of a
    block is given colours of haematoxylin and eosin in a mix of its own, so that colour does not tell the class. No
    tissue is shown, and blocks of one photograph are more alike than slides of several patients: it is for trying the
    tools.
    """
    folder = Path(folder)
    for number, (name, darkness) in enumerate(_textures().items()):
        for block in range(12):
            picture = _stained(darkness, np.random.default_rng([number, block]))
            top, left = 128 * (block // 4), 128 * (block % 4)
            for place in range(9):
                y, x = (top + (128 - size) // 2 * (place // 3), left + (128 - size) // 2 * (place % 3))
                with atomic_path(folder / name / f"{name}{block:02d}_{place}.png") as temporary:
                    Image.fromarray(picture[y : y + size, x : x + size]).save(temporary)
    return folder


STAINED, UNSTAINED = 0.06, 0.03
"""DAB's density from which on a tile's centre is stained, and to which it is not; between them it is neither."""


def write_tissue_tiles(folder: str | Path, size: int = 48) -> Path:
    """Write tiles of the photograph of colon that scikit-image carries, by whether DAB stains them, to `folder`.

    One immunohistochemical section (512 x 512, CC0): glands that express FHL2 in brown (DAB), nuclei in blue
    (haematoxylin). The two are told apart by scikit-image's colour deconvolution. "stained" is a tile where DAB's mean
    density over the inner third (a ninth of the area) is above `STAINED`, "unstained" where it is below `UNSTAINED`.
    The picture is the haematoxylin alone, each pixel's density replaced by its rank in the tile, so that all tiles hold
    the same colours as often, and only how they lie tells the class. Tiles of less than half tissue are left out. 36
    blocks of 80 pixels that do not touch are the "slides", each with up to nine tiles, which overlap.

    All is of one section of one person: scores tell how networks do on the rest of it and nothing of other slides.
    """
    import skimage.color
    import skimage.data

    folder, picture = Path(folder), np.asarray(skimage.data.immunohistochemistry())
    # densities as rgb2hed has them, but not cut off at 0, which would show where DAB is
    density = -np.log(np.maximum(picture / 255, 1e-6)) @ skimage.color.hed_from_rgb
    blue, brown = density[..., 0], skimage.color.rgb2hed(picture)[..., 2]
    tissue, side, third = picture.min(-1) < 220, 80, size // 3
    if not 24 <= size <= side:
        raise ValueError(f"size is {size}; it must be from 24 to {side}")
    for block, (top, left) in enumerate(np.ndindex(6, 6)):
        for place, (down, across) in enumerate(np.ndindex(3, 3)):
            y, x = ((512 - side) * b // 5 + (side - size) * p // 2 for b, p in ((top, down), (left, across)))
            inside = slice(y, y + size), slice(x, x + size)
            stain = brown[y + third : y + size - third, x + third : x + size - third].mean()
            if UNSTAINED <= stain <= STAINED or tissue[inside].mean() < 0.5:
                continue
            values = blue[inside].ravel()
            order = np.lexsort((np.random.default_rng([block, place]).random(len(values)), values))  # ties by chance
            levels = (order.argsort() / len(values)).reshape(size, size, 1)
            colours = np.exp(-1.2 * levels * np.asarray(STAINS[0]) / np.linalg.norm(STAINS[0]))
            name = "stained" if stain > STAINED else "unstained"
            with atomic_path(folder / name / f"block{block:02d}_{place}.png") as temporary:
                Image.fromarray((255 * colours).astype(np.uint8)).save(temporary)
    return folder


def write_texture_slide(path: str | Path, side: int = 2048, seed: int = 0) -> Path:
    """Write a pyramidal TIFF of glass with three round pieces, each of a texture of `write_texture_tiles`.

    They show the lowest quarter of the photographs, of which no tile is cut, mirrored over and over, in one stain.
    Memory is that of a row of the file's tiles.
    """
    draw = np.random.default_rng(seed)
    shade = int(draw.integers(1 << 30))
    strips = {n: _stained(dark[384:], np.random.default_rng(shade)) for n, dark in _textures().items()}
    turn = draw.uniform(0, 2 * np.pi)
    centres = [(0.5 + 0.27 * np.sin(turn + a), 0.5 + 0.27 * np.cos(turn + a)) for a in (0, 2.1, 4.2)]

    def rows(top: int, number: int, step: int) -> np.ndarray:
        part = np.full((number, side // step, 3), 243, np.uint8)
        y = step * np.arange(top, top + number)
        for (cy, cx), strip in zip(centres, strips.values(), strict=True):
            near = np.abs(y / side - cy) < 0.2
            first, last = (int((cx + sign * 0.2) * side / step) for sign in (-1, 1))
            x = step * np.arange(max(0, first), min(last + 1, side // step))
            inside = (y[near, None] / side - cy) ** 2 + (x / side - cx) ** 2 < 0.2**2
            mirrored = strip[np.abs((y[near] + 127) % 254 - 127)][:, np.abs((x + 511) % 1022 - 511)]
            window = part[near, x[0] // step : x[-1] // step + 1]
            part[near, x[0] // step : x[-1] // step + 1] = np.where(inside[..., None], mirrored, window)
        return part

    def tiles(step: int) -> Iterator[np.ndarray]:
        length = side // step
        for top in range(0, length, 256):
            row = rows(top, min(256, length - top), step)
            for left in range(0, length, 256):
                tile = np.full((256, 256, 3), 243, np.uint8)
                piece = row[:, left : left + 256]
                tile[: piece.shape[0], : piece.shape[1]] = piece
                yield tile

    levels = max(2, int(np.log2(side / 512)) + 1)
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as file:
        common: dict[str, Any] = {
            "tile": (256, 256),
            "photometric": "rgb",
            "compression": "zlib",
            "dtype": np.uint8,
            "compressionargs": {"level": 1},
        }
        about: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}
        file.write(tiles(1), shape=(side, side, 3), subifds=levels - 1, **common, **about)
        for level in range(1, levels):
            small = side // 2**level
            file.write(tiles(2**level), shape=(small, small, 3), subfiletype=1, **common, metadata=None)
    return Path(path)
