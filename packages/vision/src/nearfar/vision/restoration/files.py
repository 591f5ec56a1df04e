"""Picture files as they are: colours, alpha, bits, profile and EXIF data, read for enlarging and written again."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import png
import tifffile
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import reading

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".avif"}
"""What can be written."""
LONGEST = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535, ".avif": 65536}
"""Pixels of a side that a format holds at most."""
NO_ALPHA = {".jpg", ".jpeg"}
DEEP = {".png", ".tif", ".tiff"}
"""What holds 16 bits."""
TEXTS = {270, 271, 272, 305, 306, 315, 33432}
"""Tags of TIFF files that are EXIF data too: description, make, model, software, time, artist, copyright."""
ORIENTATION, CAMERA, PLACE = 0x0112, 0x8769, 0x8825
LIMIT = 2**28
"""Pixels of the largest picture that is read unless more are allowed."""


@dataclass
class PictureFile:
    """A picture as its file holds it."""

    path: Path
    pixels: np.ndarray
    """(H, W, C), 8 or 16 bits or float32; C: grey 1, grey and alpha 2, RGB 3, RGB and alpha 4."""
    profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    """What was done to the pixels, to be told to the user."""

    @property
    def peak(self) -> float:
        """The value of white."""
        return 1.0 if self.pixels.dtype.kind == "f" else float(np.iinfo(self.pixels.dtype).max)

    @property
    def alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)


def read_file(path: str | Path, *, limit: int = LIMIT, first_frame: bool = False) -> PictureFile:
    """The picture of a file, in its own colours and bits.

    Palettes become RGB, CMYK becomes sRGB through its profile. EXIF data stay as they are, the turn of the picture
    among them, so the pixels are not turned.

    Raises UserError for what is no picture, has more than `limit` pixels, several frames unless `first_frame`, CMYK
    without a profile, other colour spaces, or values that are not finite.
    """
    path = Path(path)
    with reading(path, "cannot be read as a picture"):
        with path.open("rb") as stream:
            head = stream.read(26)
        if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16:
            found = _read_deep_png(path, limit)
        elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            found = _read_tiff(path, limit, first_frame)
        else:
            found = _read_pillow(path, limit, first_frame)
    if 0 in found.pixels.shape:
        raise UserError(f"{path}: has no pixels")
    if found.pixels.dtype.kind == "f":
        if not np.isfinite(found.pixels).all():
            raise UserError(f"{path}: holds values that are not finite")
        if found.pixels.min() < 0 or found.pixels.max() > 1:
            raise UserError(f"{path}: floating-point values lie outside [0, 1]; scale them first")
    return found


def _bounded(path: Path, width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise UserError(f"{path}: has {width} x {height} pixels, more than the limit of {limit}; raise it with --limit")


def _read_pillow(path: Path, limit: int, first_frame: bool) -> PictureFile:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit is asked first
    try:
        with Image.open(path) as picture:
            _bounded(path, *picture.size, limit)
            _one_frame(path, getattr(picture, "n_frames", 1), first_frame)
            info, notes = picture.info, []
            profile, dpi = info.get("icc_profile"), info.get("dpi")
            exif = info.get("exif")
            if picture.format == "TIFF":  # its tags are those of the file as well; Pillow turns its pixels
                own = picture.getexif()
                exif = _exif({tag: own[tag] for tag in TEXTS if tag in own}, own.get_ifd(CAMERA), own.get_ifd(PLACE))
                if own.get(ORIENTATION, 1) != 1:
                    notes.append("turned upright")
            if picture.mode in ("I;16", "I;16B", "I"):
                pixels = np.asarray(picture)
                if pixels.min() < 0 or pixels.max() > 2**16 - 1:
                    raise UserError(f"{path}: holds numbers beyond 16 bits; scale them first")
                pixels = pixels.astype(np.uint16)
            elif picture.mode == "F":
                pixels = np.asarray(picture, np.float32)
            else:
                shown: Image.Image = picture
                if picture.mode == "CMYK":
                    shown, profile = _from_cmyk(path, picture, profile), None
                    notes.append("CMYK became sRGB")
                elif picture.mode in ("P", "PA", "1") or "transparency" in info:
                    clear = picture.mode == "PA" or "transparency" in info
                    shown = picture.convert("RGBA" if clear else "L" if picture.mode == "1" else "RGB")
                    notes.append(f"{picture.mode} became {shown.mode}")
                elif profile and "srgb" not in (name := _profile_name(path, profile)).lower():
                    notes.append(f"enlarged in its own colours, {name}")
                if shown.mode not in ("L", "LA", "RGB", "RGBA"):
                    raise UserError(f"{path}: is in {shown.mode} colours; convert it to RGB first")
                pixels = np.asarray(shown)
    finally:
        Image.MAX_IMAGE_PIXELS = before
    return PictureFile(path, pixels if pixels.ndim == 3 else pixels[..., None], profile, exif, dpi, notes)


def _profile_name(path: Path, profile: bytes) -> str:
    with reading(path, "has a colour profile that cannot be read"):
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()


def _exif(main: dict[int, Any], camera: dict[int, Any], place: dict[int, Any]) -> bytes | None:
    """EXIF data of these tags, None without any."""
    found = Image.Exif()
    found.update(main)
    for tag, owned in ((CAMERA, camera), (PLACE, place)):
        if owned:
            found.get_ifd(tag).update(owned)
            found[tag] = found.get_ifd(tag)
    return found.tobytes() if main or camera or place else None


def _from_cmyk(path: Path, picture: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        raise UserError(f"{path}: is in CMYK colours without a profile, so nothing tells what they look like")
    found = ImageCms.profileToProfile(
        picture, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert found is not None  # None is for pictures that are changed in place
    return found


def _one_frame(path: Path, frames: int, first_frame: bool) -> None:
    if frames > 1 and not first_frame:
        raise UserError(f"{path}: has {frames} frames; --first-frame takes the first")


def _read_deep_png(path: Path, limit: int) -> PictureFile:
    with path.open("rb") as stream:
        reader = png.Reader(file=stream)
        reader.preamble()
        _bounded(path, reader.width, reader.height, limit)
        width, height, rows, _info = reader.asDirect()
        pixels = np.stack([np.frombuffer(row, np.uint16) for row in rows]).reshape(height, width, -1)
    with Image.open(path) as picture:
        info = picture.info
        return PictureFile(path, pixels, info.get("icc_profile"), info.get("exif"), info.get("dpi"))


def _read_tiff(path: Path, limit: int, first_frame: bool) -> PictureFile:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        _bounded(path, page.imagewidth, page.imagelength, limit)
        if page.dtype == np.uint8 or page.dtype == np.bool_ or page.photometric not in (0, 1, 2):
            return _read_pillow(path, limit, first_frame)
        _one_frame(path, len(file.pages), first_frame)
        if page.dtype not in (np.uint16, np.float32, np.float64):
            raise UserError(f"{path}: holds {page.dtype}; 8 and 16 bits and floating point are read")
        pixels = page.asarray()
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if page.planarconfig == 2 and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if page.photometric == 0:
            pixels = np.iinfo(pixels.dtype).max - pixels if pixels.dtype.kind == "u" else 1 - pixels
        if pixels.ndim != 3 or pixels.shape[2] > 4:
            raise UserError(f"{path}: has {pixels.shape[2:]} samples a pixel; grey, RGB and alpha are read")
        tags = {tag: page.tags[tag].value for tag in (*TEXTS, ORIENTATION) if tag in page.tags}
        notes = [
            f"the {name} part of its EXIF data is not kept"
            for tag, name in ((CAMERA, "camera's"), (PLACE, "GPS"))
            if tag in page.tags
        ]
        profile = page.tags.get(34675)
        dpi = page.get_resolution(tifffile.RESUNIT.INCH) if page.tags.get(282) else None
        kind = np.float32 if pixels.dtype.kind == "f" else pixels.dtype
        exif = _exif({tag: int(value) if tag == ORIENTATION else value for tag, value in tags.items()}, {}, {})
        return PictureFile(path, pixels.astype(kind), profile and bytes(profile.value), exif, dpi, notes)


def check_target(source: PictureFile, target: Path) -> None:
    """Raise UserError where a file of `target`'s kind cannot hold what `source` has."""
    kind = target.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{target}: pictures are written as {', '.join(sorted(SUFFIXES))}")
    if source.alpha and kind in NO_ALPHA:
        raise UserError(f"{target}: {kind} holds no transparency, which {source.path} has; write .png")
    if source.pixels.dtype == np.uint16 and kind not in DEEP:
        raise UserError(f"{target}: {kind} holds 8 bits, {source.path} has 16; write .png or .tif")
    if source.pixels.dtype.kind == "f" and kind not in (".tif", ".tiff"):
        raise UserError(f"{target}: {kind} holds no floating-point values, which {source.path} has; write .tif")


def write_file(target: Path, pixels: np.ndarray, source: PictureFile, *, quality: int = 95) -> None:
    """Write `pixels` (H, W, C), of the dtype and channels of `source`, with its profile, EXIF data and resolution.

    JPEG, WebP and AVIF are written with `quality`, the others without loss. PNG and TIFF are written row by row.

    Raises UserError where the format cannot hold a picture of this size.
    """
    kind, (height, width, channels) = target.suffix.lower(), pixels.shape
    longest = LONGEST.get(kind)
    if longest and max(height, width) > longest:
        raise UserError(f"{target}: {kind} holds at most {longest} pixels a side, the picture has {max(height, width)}")
    with atomic_path(target) as temporary:
        if kind == ".png":
            _write_png(temporary, pixels, source)
        elif kind in (".tif", ".tiff"):
            options: dict[str, Any] = {} if source.dpi is None else {"resolution": source.dpi, "resolutionunit": "INCH"}
            tags: list[Any] = [] if source.profile is None else [(34675, 7, len(source.profile), source.profile, True)]
            exif = Image.Exif()
            exif.load(source.exif or b"")
            tags += [(tag, "s", 0, str(exif[tag]), True) for tag in sorted(TEXTS) if tag in exif]
            tags += [(ORIENTATION, "H", 1, exif[ORIENTATION], True)] if ORIENTATION in exif else []
            parts = {tag: exif.get_ifd(tag) for tag in (CAMERA, PLACE) if exif.get_ifd(tag)}
            tags += [(tag - 1, "I", 1, 0, True) for tag in parts]  # renamed below; tifffile refuses these names
            colours = "rgb" if channels > 2 else "minisblack"
            options |= {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
            shaped = pixels[..., 0] if channels == 1 else pixels
            tifffile.imwrite(
                temporary, shaped, photometric=colours, compression="zlib", predictor=shaped.dtype.kind == "u",
                rowsperstrip=64, extratags=tags, metadata=None, software="", **options,
            )  # fmt: skip
            _append_parts(temporary, parts, width, height)
        else:
            kept: dict[str, Any] = {"quality": quality, "icc_profile": source.profile}
            kept |= {} if source.exif is None else {"exif": _sized(source.exif, width, height)}
            kept |= {} if source.dpi is None or kind == ".avif" else {"dpi": source.dpi}
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(temporary, **kept)


def _append_parts(path: Path, parts: dict[int, Any], width: int, height: int) -> None:
    """Put the camera's and the place's EXIF data behind a TIFF file, where an empty tag of the number before waits."""
    for tag, part in parts.items():
        with tifffile.TiffFile(path, mode="r+") as file:
            found = ImageFileDirectory_v2(prefix=b"II" if file.byteorder == "<" else b"MM")
            found.update(part)
            for name, side in ((0xA002, width), (0xA003, height)):
                if name in found:
                    found[name] = side
            end = file.filehandle.size + file.filehandle.size % 2
            file.filehandle.seek(end)
            file.filehandle.write(found.tobytes(end))
            waiting = file.pages.first.tags[tag - 1]
            waiting.overwrite(end)
            file.filehandle.seek(waiting.offset)
            file.filehandle.write(struct.pack(f"{file.byteorder}H", tag))


def _write_png(path: Path, pixels: np.ndarray, source: PictureFile) -> None:
    height, width, channels = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=bits)

    def rows() -> Iterator[bytes]:
        for row in pixels:
            yield row.astype(">u2" if bits == 16 else np.uint8, copy=False).tobytes()

    with path.open("wb") as stream:
        plain = _Inserting(stream, _chunks(source, width, height))
        writer.write_packed(plain, rows())


def _chunks(source: PictureFile, width: int, height: int) -> list[tuple[bytes, bytes]]:
    """What a PNG file holds of a picture beside its pixels."""
    found = []
    if source.profile is not None:
        found.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(source.profile)))
    if source.dpi is not None:
        found.append((b"pHYs", struct.pack(">IIB", *(round(float(n) / 0.0254) for n in source.dpi), 1)))
    if source.exif is not None:
        found.append((b"eXIf", _sized(source.exif, width, height).removeprefix(b"Exif\0\0")))
    return found


class _Inserting:
    """A stream that puts chunks behind a PNG file's first one."""

    def __init__(self, stream: Any, chunks: list[tuple[bytes, bytes]]) -> None:
        self.stream, self.chunks, self.written = stream, chunks, 0

    def write(self, data: bytes) -> None:
        ends = 33  # signature and IHDR
        if self.written < ends <= self.written + len(data):
            cut = ends - self.written
            self.stream.write(data[:cut])
            for chunk in self.chunks:
                png.write_chunk(self.stream, *chunk)
            self.stream.write(data[cut:])
        else:
            self.stream.write(data)
        self.written += len(data)


def _sized(exif: bytes, width: int, height: int) -> bytes:
    """EXIF data that name the new size where they name one."""
    found = Image.Exif()
    found.load(exif)
    for owner in (found, found.get_ifd(0x8769)):
        for tag, side in ((0x0100, width), (0x0101, height), (0xA002, width), (0xA003, height)):
            if tag in owner:
                owner[tag] = side
    return found.tobytes()
