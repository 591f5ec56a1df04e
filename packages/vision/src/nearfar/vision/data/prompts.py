"""Masks of regions from boxes and points: by a SAM of transformers whose weights are at hand, or by `grabcut`."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nearfar.core.errors import UserError, some
from nearfar.core.hub import from_hub, unreachable
from nearfar.core.reading import reading
from nearfar.vision.data.images import is_picture, read_picture
from nearfar.vision.data.regions import Mask, Region, grabcut, itself, read_ids

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

Point = tuple[float, float, bool]
"""x, y in pixels, and whether it lies in the region or beside it."""


@dataclass(frozen=True)
class Prompt:
    """Where one region of a picture is: a box, points in it and beside it, or both. `name` is the picture's file."""

    name: str
    category: str
    box: Box | None = None
    points: tuple[Point, ...] = ()


Segment = Callable[[Image.Image, Prompt], Mask]
"""(picture, prompt) -> the region's mask. ValueError where there is none."""


def in_boxes(picture: Image.Image, prompt: Prompt) -> Mask:
    """By colours alone, see `grabcut`: takes a box."""
    if prompt.box is None or prompt.points:
        raise ValueError("points are for a SAM; without one give a box alone")
    return grabcut(picture, prompt.box)


class Sam:
    """Masks by a segment-anything model, SAM or SAM 2, in a folder of transformers' (needs its extra, `sam`).

    Of each prompt the one mask that the model gives for a box or several points, or the best by its own rating for a
    single point, which several things may be meant by.

    Args:
        source: folder with the model and its processor, or `hub:NAME`, which is fetched.
    """

    def __init__(self, source: str | Path, device: str = "cpu") -> None:
        name, is_hub = from_hub(source, "a SAM")
        try:
            from transformers import AutoModelForMaskGeneration, AutoProcessor
        except ImportError as error:
            raise UserError("sam: needs transformers; pip install 'nearfar-vision[sam]'") from error
        try:
            asked: Any = {"local_files_only": not is_hub, "trust_remote_code": False}
            self.processor: Any = AutoProcessor.from_pretrained(name, **asked)
            loading: Any = AutoModelForMaskGeneration.from_pretrained(
                name, output_loading_info=True, use_safetensors=True, **asked
            )
            self.model, report = loading
        except Exception as error:  # transformers raises anything
            why = unreachable(source, is_hub, error)
            raise UserError(f"{source}: cannot be read as a SAM of transformers ({why})") from error
        if report["missing_keys"]:
            raise UserError(f"{source}: lacks weights of the SAM, {some(sorted(report['missing_keys']))}")
        if not hasattr(self.processor, "post_process_masks"):
            raise UserError(f"{source}: holds a {type(self.model).__name__}, which is no SAM")
        self.model = self.model.eval().to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, prompt: Prompt) -> Mask:
        asked: dict[str, object] = {}
        if prompt.box is not None:
            asked["input_boxes"] = [[list(prompt.box)]]
        if prompt.points:
            asked["input_points"] = [[[[x, y] for x, y, _ in prompt.points]]]
            asked["input_labels"] = [[[int(inside) for *_, inside in prompt.points]]]
        made = self.processor(images=picture.convert("RGB"), return_tensors="pt", **asked)
        sizes = [made.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in made]
        inputs = {key: value.float() if value.is_floating_point() else value for key, value in made.items()}
        vague = prompt.box is None and len(prompt.points) == 1
        found = self.model(**{k: v.to(self.device) for k, v in inputs.items()}, multimask_output=vague)
        (masks,) = self.processor.post_process_masks(found.pred_masks.cpu(), *sizes)
        mask = masks[0, int(found.iou_scores[0, 0].argmax())].numpy().astype(bool)
        if not mask.any():
            raise ValueError("the SAM finds nothing there")
        return mask


COLUMNS = ("picture", "category", "left", "top", "right", "bottom", "x", "y", "inside")


def read_prompts(table: Path, named: bool = False) -> list[Prompt]:
    """Boxes and points of a CSV table: one row each, with the columns `picture` (a file's name), `category`, and
    `left, top, right, bottom` or `x, y` and, 0 for a point beside the region, `inside`.

    Rows of one picture and category make one prompt of a box, points or both. Without the column `category`, which
    `named` asks for, every row is a region of its own, called by its number in the picture. UserError names the row
    that is wrong.
    """
    with (
        reading(table, "cannot be read as a table of boxes or points"),
        table.open(newline="", encoding="utf-8-sig") as f,
    ):
        reader = csv.DictReader(f)
        columns = [name.strip() for name in reader.fieldnames or ()]
        lines = list(reader)
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"{table}: has the columns {some(twice)} twice")
    if longer := [number for number, row in enumerate(lines, start=2) if None in row]:
        raise UserError(f"{table}: row {longer[0]} has more cells than there are columns")
    rows = [{key.strip(): (value or "").strip() for key, value in row.items()} for row in lines]
    if named and "category" not in columns:
        raise UserError(f"{table}: has no column category, which says what each region is")
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise UserError(f"{table}: has the columns {some(unknown)}; known are {', '.join(COLUMNS)}")
    if "picture" not in columns or not (
        {"left", "top", "right", "bottom"} <= set(columns) or {"x", "y"} <= set(columns)
    ):
        raise UserError(f"{table}: needs the columns picture and left, top, right, bottom, or x, y")
    if not rows:
        raise UserError(f"{table}: has no rows")
    found: dict[tuple[str, str], Prompt] = {}
    count: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        name = row["picture"]
        count[name] = count.get(name, 0) + 1
        category = row["category"] if "category" in columns else str(count[name])
        if not name or not category:
            raise UserError(f"{table}: row {number} lacks its {'category' if name else 'picture'}")
        before = found.get((name, category), Prompt(name, category))
        try:
            box, points = before.box, before.points
            if any(row.get(key) for key in ("left", "top", "right", "bottom")):
                if box is not None:
                    raise ValueError(f"{name} has a second box of {category}; name the second region otherwise")
                left, top, right, bottom = _numbers(row, "left", "top", "right", "bottom")
                box = left, top, right, bottom
            if any(row.get(key) for key in ("x", "y")):
                if (inside := row.get("inside") or "1") not in ("0", "1"):
                    raise ValueError(f"inside is {inside!r}; 1 or 0")
                x, y = _numbers(row, "x", "y")
                points = (*points, (x, y, inside == "1"))
            if (box, points) == (before.box, before.points):
                raise ValueError("has neither a box nor a point")
        except ValueError as error:
            raise UserError(f"{table}: row {number}: {error}") from error
        found[name, category] = Prompt(name, category, box, points)
    return list(found.values())


def _numbers(row: dict[str, str], *names: str) -> tuple[float, ...]:
    values = []
    for name in names:
        try:
            values.append(float(row.get(name, "")))
        except ValueError as error:
            raise ValueError(f"{name} is {row.get(name, '')!r}, no number") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{', '.join(names)} are {values}; they must be finite")
    return tuple(values)


def prompted_regions(
    pictures: Path,
    table: Path,
    segment: Segment,
    progress: Callable[[Sequence[Prompt]], Iterable[Prompt]] = iter,
    *,
    named: bool = False,
) -> list[Region]:
    """The regions of a table of boxes and points (see `read_prompts`), cut out by `segment`, `in_boxes` or a `Sam`.

    UserError for a picture that is not there, boxes and points outside it, and places where there is nothing.
    """
    prompts = read_prompts(table, named)
    files = {p.name: p for p in sorted(pictures.iterdir()) if is_picture(Path(p.name))}
    if missing := sorted({p.name for p in prompts} - set(files)):
        raise UserError(f"{table}: names {some(missing)}, which {pictures} does not have")
    found = []
    for prompt in progress(prompts):
        path = files[prompt.name]
        picture = read_picture(path)
        _check_inside(f"{table}: {prompt.category} in {prompt.name}", prompt, picture.size)
        try:
            mask = np.asarray(segment(picture, prompt), bool)
        except (UserError, ValueError) as error:
            raise UserError(f"{table}: {prompt.category} in {prompt.name}: {error}") from error
        found.append(Region(path.stem, prompt.category, partial(read_picture, path), partial(itself, mask)))
    return found


def object_masks(pictures: Sequence[Path], masks: Path) -> list[Mask]:
    """Where the object is in every picture, for tests of where maps point: of a folder of PNG files named like the
    pictures, whose values are 0 elsewhere, or of a table with a row `picture, left, top, right, bottom` for every box.

    UserError for a picture without one, or one of another size or empty.
    """
    names = [path.name if masks.is_file() else path.stem for path in pictures]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{masks}: several pictures are called {some(twice)}; explain them in turn")
    boxes: dict[str, list[Prompt]] = {}
    if masks.is_file():
        for prompt in read_prompts(masks):
            if prompt.box is None or prompt.points:
                raise UserError(f"{masks}: {prompt.name} has points; a box says where the object is")
            boxes.setdefault(prompt.name, []).append(prompt)
    found = []
    for path, name in zip(pictures, names, strict=True):
        width, height = read_picture(path).size
        if masks.is_file():
            mask = np.zeros((height, width), bool)
            for prompt in boxes.get(name, []):
                _check_inside(f"{masks}: {name}", prompt, (width, height))
                left, top, right, bottom = prompt.box or (0, 0, 0, 0)
                mask[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
            place = f"{masks}: {name}"
        else:
            place = str(masks / f"{name}.png")
            if not Path(place).is_file():
                raise UserError(f"{place}: is missing; {path.name} needs a mask of its own")
            mask = read_ids(Path(place)) != 0
        if mask.shape != (height, width):
            raise UserError(f"{place}: has {mask.shape[1]} x {mask.shape[0]} pixels, the picture {width} x {height}")
        if not mask.any():
            raise UserError(f"{place}: is empty; there is no object to point at")
        found.append(mask)
    return found


def _check_inside(where: str, prompt: Prompt, size: tuple[int, int]) -> None:
    width, height = size
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UserError(f"{where}: the box {prompt.box} is outside {width} x {height} pixels, or empty")
    if outside := [p for p in prompt.points if not (0 <= p[0] < width and 0 <= p[1] < height)]:
        raise UserError(f"{where}: the point {outside[0][:2]} is outside {width} x {height} pixels")
