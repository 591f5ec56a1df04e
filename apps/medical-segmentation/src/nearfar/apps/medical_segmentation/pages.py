"""Overlay pictures and the evaluation's page, with a slice viewer that needs no server."""

import base64
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from nearfar.core.files import atomic_path
from nearfar.core.plots import COLORS, new_figure
from nearfar.core.report import Report
from nearfar.medical.data.cases import Collection
from nearfar.medical.data.scans import Scan
from nearfar.medical.doctor import Examined, Finding
from nearfar.medical.doctor import table as doctor_table


def overlay(scan: Scan, labels: np.ndarray, index: int | None = None) -> np.ndarray:
    """RGB bytes of a slice with the labels in colour; axial, upright, by default where most is labelled."""
    image, labels = scan.canonical(), scan.to_canonical(labels)
    if image.ndim == 4:
        index = int((labels > 0).sum((0, 1)).argmax()) if index is None else index
        image = np.flip(image[..., index].swapaxes(1, 2), 1)
        labels = np.flip(labels[..., index].T, 0)
    gray = image[:3] if len(image) >= 3 and scan.affine is None else np.repeat(image[:1], 3, 0)
    low, high = np.percentile(gray, [0.5, 99.5])
    shown = np.clip((np.moveaxis(gray, 0, -1) - low) / max(high - low, 1e-6), 0, 1)
    for i, value in enumerate(v for v in np.unique(labels) if v):
        mask = labels == value
        shown[mask] = 0.55 * shown[mask] + 0.45 * np.array(to_rgb(COLORS[i % len(COLORS)]))
    return (255 * shown).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of RGB pixels, enlarged to at least 320 wide."""
    picture = Image.fromarray(pixels)
    factor = max(1, -(-320 // picture.width))
    buffer = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_overlay(path: Path, scan: Scan, labels: np.ndarray) -> None:
    """Write the overlay of the slice with most labels."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(overlay(scan, labels)))


PAGE = 24 << 20
"""Bytes of images and label maps that a page of cases holds at most, before they are packed."""

STYLE = """<style>
.case canvas { background: #000; image-rendering: pixelated; max-width: 100%; margin: .2rem; cursor: crosshair }
.case label { margin-right: 1rem; white-space: nowrap } .case input[type=range] { vertical-align: middle; width: 9rem }
.case b.swatch { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 .8em; vertical-align: -.1em }
.planes { display: flex; flex-wrap: wrap; align-items: flex-start }
.planes figcaption { text-align: center; contain: inline-size }
</style>"""

SCRIPT = """<script>
async function nearfarCase(id) {
  const box = document.getElementById(id), about = JSON.parse(box.querySelector('script').textContent);
  const bytes = async text => new Uint8Array(await new Response(new Blob([Uint8Array.from(atob(text),
    c => c.charCodeAt(0))]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer());
  const image = await bytes(about.image), found = await bytes(about.prediction);
  const truth = about.truth ? await bytes(about.truth) : null;
  const [X, Y, Z] = about.shape, at = (x, y, z) => (x * Y + y) * Z + z, place = about.start.slice();
  const get = n => box.querySelector('.' + n), colour = v => about.colours[(v - 1) % about.colours.length];
  // u to the right and v down on the screen -> voxel; w is the slice
  const views = [{ name: 'axial', axes: [0, 1, 2], ends: 'LRAP' }, { name: 'coronal', axes: [0, 2, 1], ends: 'LRSI' },
                 { name: 'sagittal', axes: [1, 2, 0], ends: 'PASI' }].slice(0, about.flat ? 1 : 3);
  function draw() {
    const level = +get('level').value, width = +get('width').value, mode = get('mode').value;
    const low = level - width / 2, [lo, hi] = about.range;
    get('said').textContent = `level ${level.toPrecision(4)}, width ${width.toPrecision(4)} ${about.unit}`;
    for (const view of views) {
      const [a, b, c] = view.axes, n = about.shape, canvas = view.canvas, pen = canvas.getContext('2d');
      const picture = pen.createImageData(n[a], n[b]), p = [0, 0, 0]; p[c] = place[c];
      const voxel = (u, v) => { p[a] = u; p[b] = about.flat ? v : n[b] - 1 - v; return at(p[0], p[1], p[2]); };
      const edge = (map, u, v, i) => map[i] && [[1, 0], [-1, 0], [0, 1], [0, -1]].some(([du, dv]) => {
        const s = u + du, t = v + dv;
        return s < 0 || t < 0 || s >= n[a] || t >= n[b] || map[voxel(s, t)] !== map[i]; });
      for (let v = 0; v < n[b]; v++) for (let u = 0; u < n[a]; u++) {
        const i = voxel(u, v), k = 4 * (v * n[a] + u), value = lo + image[i] / 255 * (hi - lo);
        let rgb = Array(3).fill(255 * Math.min(1, Math.max(0, (value - low) / width)));
        if (mode === 'errors' && truth && found[i] !== truth[i])
          rgb = found[i] ? (truth[i] ? [255, 0, 255] : [255, 60, 40]) : [60, 140, 255];
        else if (mode === 'contours') {
          if (edge(found, u, v, i)) rgb = colour(found[i]);
          else if (truth && edge(truth, u, v, i) && (u + v) % 2) rgb = [255, 255, 255];
        } else if (mode === 'filled' && found[i]) rgb = rgb.map((g, j) => 0.55 * g + 0.45 * colour(found[i])[j]);
        picture.data.set([...rgb, 255], k);
      }
      pen.putImageData(picture, 0, 0);
      pen.fillStyle = '#0f0';
      const u = place[a], v = about.flat ? place[b] : n[b] - 1 - place[b];
      if (get('cross').checked && !about.flat) for (let s = 0; s < Math.max(n[a], n[b]); s += 4) {
        pen.fillRect(u, s, 1, 1); pen.fillRect(s, v, 1, 1); }
      const ends = about.flat ? '' : ` (${view.ends[0]} left, ${view.ends[2]} up)`;
      view.caption.textContent = about.flat ? '' : `${view.name}, slice ${place[c] * about.step[c] + 1} of ` +
        `${about.whole[c]}, ${(about.origin[c] + place[c] * about.step[c] * about.spacing[c]).toFixed(1)} mm${ends}`;
      if (view.slider) view.slider.value = place[c];
    }
    const i = at(...place), name = v => about.labels[v] || 'background';
    get('here').textContent = `here: ${(lo + image[i] / 255 * (hi - lo)).toPrecision(4)} ${about.unit}, ` +
      `predicted ${name(found[i])}` + (truth ? `, truth ${name(truth[i])}` : '');
  }
  for (const view of views) {
    const [a, b, c] = view.axes, figure = document.createElement('figure'), n = about.shape;
    view.canvas = document.createElement('canvas'); [view.canvas.width, view.canvas.height] = [n[a], n[b]];
    const mm = [0, 1, 2].map(k => n[k] * about.step[k] * about.spacing[k]);
    const scale = (about.flat ? 640 : 320) / Math.max(...(about.flat ? mm.slice(0, 2) : mm));
    view.canvas.style.width = mm[a] * scale + 'px'; view.canvas.style.height = mm[b] * scale + 'px';
    view.canvas.onclick = e => { const r = view.canvas.getBoundingClientRect();
      place[a] = Math.min(n[a] - 1, Math.floor((e.clientX - r.left) / r.width * n[a]));
      const v = Math.min(n[b] - 1, Math.floor((e.clientY - r.top) / r.height * n[b]));
      place[b] = about.flat ? v : n[b] - 1 - v; draw(); };
    view.caption = document.createElement('figcaption'); figure.append(view.canvas, view.caption);
    if (!about.flat) { view.slider = Object.assign(document.createElement('input'),
        { type: 'range', min: 0, max: n[c] - 1, value: place[c], ariaLabel: view.name + ' slice' });
      view.slider.oninput = () => { place[c] = +view.slider.value; draw(); };
      figure.append(view.slider); }
    get('planes').append(figure);
  }
  for (const name of ['level', 'width', 'mode', 'cross']) get(name).oninput = draw;
  draw(); box.dataset.ready = '1';
}
</script>"""


def packed(values: np.ndarray) -> str:
    """Bytes, gzipped, as base64."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()


def viewer(
    scan: Scan,
    labels: np.ndarray,
    title: str,
    truth: np.ndarray | None = None,
    names: Mapping[int, str] | None = None,
    most: int = PAGE // 4,
) -> str:
    """Markup of a case to look through, which needs `STYLE` and `SCRIPT` on the page: three linked planes.

    `most`: bytes of image and label maps, within which every n-th voxel along each axis is shown; the page says which.
    """
    image = scan.canonical()
    gray = image[:3].mean(0) if scan.affine is None else image[0]
    maps = [scan.to_canonical(m) for m in (labels, truth) if m is not None]
    if flat := gray.ndim == 2:
        gray, maps = gray.T[..., None], [m.T[..., None] for m in maps]  # x to the right, y down
    step = [1, 1, 1]
    while math.prod(-(-n // s) for n, s in zip(gray.shape, step)) * (1 + len(maps)) > most:
        axis = int(np.argmax([n / s for n, s in zip(gray.shape, step)]))
        step[axis] += 1
    where = tuple(slice(None, None, s) for s in step)
    low, high = (float(v) for v in np.percentile(gray[where], [0.5, 99.5]))
    high = max(high, low + 1e-6)
    values = sorted({int(v) for m in maps for v in np.unique(m[where])} - {0})[:255]
    index = [
        sum(((m[where] == v) * np.uint8(k) for k, v in enumerate(values, 1)), np.zeros((), np.uint8)) for m in maps
    ]
    index = [np.broadcast_to(np.asarray(m, np.uint8), gray[where].shape) for m in index]
    most_seen = (index[-1] > 0) | (index[0] > 0)
    start = [int(most_seen.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3)]
    named = {k: (names or {}).get(v, f"label {v}") for k, v in enumerate(values, 1)}
    colours = [[int(255 * c) for c in to_rgb(colour)] for colour in COLORS]
    sides = [1.0, 1.0, 1.0] if flat else list(scan.canonical_spacing())
    origin = [0.0] * 3
    if scan.affine is not None:
        corners = scan.affine @ np.array([[0, 0, 0, 1], [*(n - 1 for n in scan.shape), 1]], float).T
        origin = [float(v) for v in corners[:3].min(1)]
    about = {
        "shape": list(gray[where].shape), "whole": list(gray.shape), "step": step, "spacing": sides, "origin": origin,
        "range": [low, high], "start": start, "labels": named, "colours": colours, "flat": flat,
        "unit": "HU" if scan.kind == "dicom" and getattr(scan.source[0], "Modality", "") == "CT" else "",
        "image": packed(np.clip(255 * (gray[where] - low) / (high - low), 0, 255).astype(np.uint8)),
        "prediction": packed(index[0]), "truth": packed(index[1]) if truth is not None else None,
    }  # fmt: skip
    name = "case" + sha256(title.encode()).hexdigest()[:12]
    legend = "".join(
        f'<b class="swatch" style="background: rgb({",".join(map(str, colours[(k - 1) % len(colours)]))})"></b>'
        f"{escape(label)}"
        for k, label in named.items()
    )
    errors = (
        '<b class="swatch" style="background: rgb(255,60,40)"></b>false positive<b class="swatch" style="background: '
        'rgb(60,140,255)"></b>false negative<b class="swatch" style="background: rgb(255,0,255)"></b>another label'
        '<b class="swatch" style="background: #fff; border: 1px dotted #000"></b>contour of the truth'
    )
    modes = ["contours", *(["errors"] if truth is not None else []), "filled", "image"]
    options = "".join(f"<option>{mode}</option>" for mode in modes)
    unit = "pixels" if flat else "mm"
    thinned = "" if max(step) == 1 else f" Every {' x '.join(map(str, step))}-th voxel is shown, to bound the page."
    wide = high - low

    def slider(of: str, least: float, largest: float, value: float) -> str:
        limits = f'min="{least:.6g}" max="{largest:.6g}" value="{value:.6g}" step="any"'
        return f'<label>{of} <input class="{of}" type="range" {limits}></label>'

    return (
        f'<figure class="case" id="{name}"><figcaption><b>{escape(title)}</b></figcaption><div class="planes"></div>'
        f"<div>{slider('level', low, high, (low + high) / 2)}{slider('width', wide / 100, wide, wide)}"
        f'<span class="said"></span></div><div><label>show <select class="mode">{options}</select></label>'
        '<label><input class="cross" type="checkbox" checked> crosshair</label><span class="here"></span></div>'
        f"<figcaption>prediction: {legend}{errors if truth is not None else ''}. Voxels of "
        f"{' x '.join(f'{s:.3g}' for s in sides[: 2 if flat else 3])} {unit}.{thinned}</figcaption>"
        f'<script type="application/json">{json.dumps(about)}</script></figure>'
        f'<script>nearfarCase("{name}")</script>'
    )


def cases_page(path: Path, shown: Sequence[tuple[str, Scan, np.ndarray]], names: Mapping[int, str]) -> Path:
    """Write a page of predictions to look through, in the order given."""
    report = Report("Segmentations", "Click into a plane to move the others there. No truth is known here.")
    report.html(STYLE + SCRIPT)
    for title, scan, labels in shown:
        report.html(viewer(scan, labels, title, None, names, PAGE // max(1, len(shown))))
    return report.write(path)


def evaluation_page(
    path: Path,
    summary: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    worst: Sequence[tuple[str, Scan, np.ndarray, np.ndarray]],
    convention: str,
    names: Mapping[int, str] | None = None,
) -> Path:
    """Write the page of an evaluation: summary with intervals, worst cases to look through, every case."""
    report = Report(
        "Segmentation scores",
        f"Convention: {convention}. Intervals are 95 % bootstrap intervals over cases. A missed structure counts as "
        "the worst value under the convention `nearfar`; others say what they do in `evaluate --help`. Distances are "
        "in mm (pixels for pictures).",
    )
    report.section("Summary").table(summary)
    if worst:
        report.section("Worst cases").text("Click into a plane to move the others there.").html(STYLE + SCRIPT)
    for name, scan, prediction, truth in worst:
        scores = ", ".join(f"{r['label']} {r['dice']:.3f}" for r in rows if r["case"] == name)
        report.html(viewer(scan, prediction, f"{name}: Dice {scores}", truth, names, PAGE // len(worst)))
    report.section("Every case").table(rows)
    return report.write(path)


def doctor_page(
    path: Path, title: str, collection: Collection, seen: Sequence[Examined], findings: Sequence[Finding]
) -> Path:
    """Write what `doctor.examine` found: findings with the commands that mend them, orientations, histograms."""
    report = Report(
        f"Data doctor: {title}",
        f"{collection.layout}, {len(collection.cases)} cases. Errors keep a case from being used; the rest is to be "
        "looked at. Commands write a file beside the old one; none changes it.",
    )
    report.section("Findings")
    if not findings:
        report.text("None.")
    for finding in sorted(findings, key=lambda f: (f.grade != "error", f.case)):
        report.html(f"<p><b>{finding.grade}</b> {escape(finding.case)}: {escape(finding.what)}</p>")
        if finding.mend:
            report.code(finding.mend)
    report.section("Orientation and place").table(
        [
            {
                "case": one.name,
                "axes": one.orientation,
                "shape": "x".join(map(str, one.shape)),
                "mm": "x".join(f"{s:.4g}" for s in one.sides),
            }
            for one in seen
        ]
    )
    report.section("Numbers").table(doctor_table(seen))
    if seen:
        figure = new_figure(7, 4)
        axes = figure.add_subplot()
        for k, one in enumerate(seen):
            if one.histogram is not None:
                centres = np.linspace(*one.range, len(one.histogram))
                axes.plot(centres, one.histogram, lw=0.8, color=COLORS[k % len(COLORS)], label=one.name)
        axes.set(xlabel="intensity (0.5 to 99.5 % of each case)", ylabel="share of voxels")
        if len(seen) <= 10:
            axes.legend(fontsize=7)
        report.section("Histograms").figure(figure, "Intensities of every case, padding left out.")
        shown = [one for one in seen if one.picture is not None][:24]
        report.section("Middle slices").text("Left is left on the screen where the axes say so; letters mark it.")
        for one in shown:
            report.figure(png(one.picture), f"{one.name}: L on the left, A above")  # type: ignore[arg-type]
    return report.write(path)
