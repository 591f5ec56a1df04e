"""A page with a picture before and after, and a slider between them; it opens without a server."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from nearfar.core.report import Report

LONGEST = 2000
"""Pixels of a side that the page shows at most."""

SLIDER = """<figure style="position:relative;margin:0;width:{width}px;max-width:100%">
<img src="{after}" alt="after" style="display:block;width:100%">
<img src="{before}" alt="before" id="before"
 style="position:absolute;inset:0;width:100%;height:100%;clip-path:inset(0 50% 0 0)">
<input type="range" min="0" max="100" value="50" aria-label="share that shows the picture before" style="width:100%"
 oninput="document.getElementById('before').style.clipPath='inset(0 '+(100-this.value)+'% 0 0)'">
<figcaption>{caption}</figcaption></figure>"""


def before_and_after(before: Path, after: Path, page: Path) -> None:
    """Write `page`: the enlarged picture, and over it the one before, enlarged by bicubic resizing for the eye."""
    Image.MAX_IMAGE_PIXELS, bound = None, Image.MAX_IMAGE_PIXELS  # the picture was made here
    try:
        with Image.open(after) as picture:
            large = picture.convert("RGBA")
        with Image.open(before) as picture:
            small = picture.convert("RGBA").resize(large.size, Image.Resampling.BICUBIC)
    finally:
        Image.MAX_IMAGE_PIXELS = bound
    caption = f"{before.name}: left bicubic, right {after.name}, {large.width} x {large.height} pixels"
    if max(large.size) > LONGEST:
        left, top = (max(0, (side - LONGEST) // 2) for side in large.size)
        box = (left, top, min(left + LONGEST, large.width), min(top + LONGEST, large.height))
        large, small = large.crop(box), small.crop(box)
        caption += f"; the middle {large.width} x {large.height} of them is shown"
    slider = SLIDER.format(width=large.width, before=_inline(small), after=_inline(large), caption=escape(caption))
    Report(after.name).html(slider).write(page)


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
