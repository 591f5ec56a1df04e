"""Readers of two sets of occluded pictures, SMD and ROD, from their tar files as downloaded."""

import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from nearfar.core.errors import UserError, some
from nearfar.vision.data.images import Pictures, is_picture, read_picture


class Member(NamedTuple):
    """A picture in a tar file."""

    path: Path
    name: str


def members(source: str | Path) -> list[Member]:
    """The pictures in a tar file (.tar, .tar.gz, .tgz) or in all of a folder's, in the files' own order.

    Read in this order a packed file is gone through once; out of order it starts anew each time.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    endings = (".tar", ".tar.gz", ".tgz")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith(endings))
    if not files:
        raise UserError(f"{path}: holds no tar files")
    found = []
    for file in files:
        try:
            with tarfile.open(file) as archive:
                inside = [m.name for m in archive if m.isfile() and is_picture(PurePosixPath(m.name))]
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read as a tar file ({error}); download it again") from error
        found += [Member(file, name) for name in inside]
    if not found:
        raise UserError(f"{path}: its tar files hold no pictures")
    return found


@lru_cache(maxsize=8)
def _archive(path: Path, _process: int) -> tarfile.TarFile:
    """An open tar file, one per process, as processes must not share a file position."""
    return tarfile.open(path)


def read_member(found: Sequence[Member], index: int) -> Image.Image:
    """The picture of one member. Raises UserError where it is damaged."""
    path, name = found[index]
    try:
        stream = _archive(path, os.getpid()).extractfile(name)
        content = stream.read() if stream is not None else b""
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise UserError(f"{path}/{name}: damaged in the archive ({error})") from error
    return read_picture(content, f"{path}/{name}")


def class_of(member: Member, known: Sequence[str]) -> str | None:
    """The folder of its path that names a class, the innermost first."""
    return next((part for part in reversed(PurePosixPath(member.name).parts[:-1]) if part in known), None)


def open_smd(source: str | Path, classes: Sequence[str]) -> tuple[Pictures, dict[str, Member]]:
    """The Superimposed Masked Dataset: pictures labelled by the class folder (WordNet id) that they lie in, and name of
    picture -> member with the mask of its occluder.

    A picture is a mask where "mask" stands in its name or in a folder above it; it belongs to the picture of the same
    name without that word. `classes`: of the classifier, in its order. The layout is inferred from the set's
    description; what fits it not is refused.
    """
    every = members(source)
    masks: list[Member] = []
    found: list[Member] = []
    for member in every:
        (masks if "mask" in member.name.lower() else found).append(member)
    pictures = labelled(source, found, {name: i for i, name in enumerate(classes)}, list(classes))
    by_key = {key_of(member.name): member for member in masks}
    return pictures, {
        name: by_key[key_of(member.name)]
        for name, member in zip(pictures.names, found, strict=True)
        if key_of(member.name) in by_key
    }


def key_of(name: str) -> tuple[str, str]:
    """Class folder and bare name of a picture or of its mask."""
    path = PurePosixPath(name.lower())
    bare = path.stem
    for word in ("_mask", "-mask", "mask_", "mask-", "mask"):
        bare = bare.replace(word, "")
    folders = [part for part in path.parts[:-1] if "mask" not in part]
    return folders[-1] if folders else "", bare


def read_mask(member: Member) -> np.ndarray:
    """(H, W), true where the occluder is."""
    return np.asarray(read_member([member], 0).convert("L")) > 127


def open_rod(source: str | Path, classes: Sequence[str], objects: Mapping[str, Sequence[str]]) -> Pictures:
    """The Realistic Occlusion Dataset: photographs in folders of objects.

    `objects`: folder -> the classes that count as right for it, as `classes_rod.py` of the data set's repository lists
    them; the first stands as the label, and `is_right` counts all. Raises UserError for a folder that is not listed, or
    classes that the classifier does not know.
    """
    if unknown := [name for names in objects.values() for name in names if name not in classes]:
        raise UserError(f"{source}: the objects' classes {some(unknown)} are none of the classifier's {len(classes)}")
    index = {folder: list(classes).index(names[0]) for folder, names in objects.items()}
    return labelled(source, members(source), index, list(classes))


def is_right(answers: Sequence[int], pictures: Pictures, objects: Mapping[str, Sequence[str]]) -> list[bool]:
    """For every picture of `open_rod` whether the answer is one of its object's classes."""
    number = pictures.classes.index
    allowed = {number(names[0]): {number(name) for name in names} for names in objects.values()}
    return [answer in allowed[label] for answer, label in zip(answers, pictures.labels, strict=True)]


def labelled(source: str | Path, found: list[Member], index: Mapping[str, int], classes: list[str]) -> Pictures:
    """Pictures with the label of the class folder that they lie in."""
    folders = [class_of(member, list(index)) for member in found]
    if lost := [member.name for member, folder in zip(found, folders, strict=True) if folder is None]:
        raise UserError(f"{source}: {len(lost)} pictures lie in no folder of a known class, for example {lost[0]}")
    names = [f"{member.path}/{member.name}" for member in found]
    labels = [index[folder] for folder in folders if folder is not None]
    return Pictures(names, labels, classes, partial(read_member, found))
