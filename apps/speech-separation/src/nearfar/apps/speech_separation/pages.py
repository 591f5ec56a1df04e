"""The page to listen to: the recording and each voice with its spectrogram."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
from matplotlib.figure import Figure

from nearfar.audio.sound import Recording, write_samples
from nearfar.core.plots import new_figure, style
from nearfar.core.report import Report

EXCERPT = 60.0
"""Seconds of each part that a page shows and plays."""


def excerpt(path: Path) -> tuple[np.ndarray, int]:
    """The first minute of a recording."""
    with Recording(path) as recording:
        return recording.read(0, min(recording.frames, round(EXCERPT * recording.rate))), recording.rate


def level(path: Path) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Power in dB, (frequencies, frames), and the picture's extent in s and kHz."""
    samples, rate = excerpt(path)
    size = 1 << max(round(0.032 * rate), 2).bit_length()
    padded = np.pad(samples, (0, max(0, size - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 2]
    power = np.abs(scipy.fft.rfft(frames * np.hanning(size).astype(np.float32))) ** 2
    return 10 * np.log10(power.T + 1e-10), (0, len(padded) / rate, 0, rate / 2000)


def spectrograms(parts: dict[str, Path], top: float | None = None) -> Figure:
    """One spectrogram per part, on one scale of 70 dB below `top` (default: the first part's highest)."""
    with style():
        figure = new_figure(9, 1.7 * len(parts) + 0.4)
        axes = np.atleast_1d(figure.subplots(len(parts), 1, sharex=True))
        for axis, (name, path) in zip(axes, parts.items()):
            shown, extent = level(path)
            top = float(shown.max()) if top is None else top
            axis.imshow(shown, origin="lower", aspect="auto", extent=extent, vmin=top - 70, vmax=top, cmap="magma")
            axis.set(ylabel="kHz", title=name)
            axis.grid(False)
        axes[-1].set_xlabel("seconds")
    return figure


def player(path: Path) -> bytes:
    """The first minute as a 16-bit WAV, softer where it would clip."""
    samples, rate = excerpt(path)
    buffer = io.BytesIO()
    write_samples(buffer, samples / max(1.0, float(np.abs(samples).max(initial=0.0))), rate, "PCM_16")
    return buffer.getvalue()


def listening_page(parts: dict[str, Path], result: dict[str, Any], folder: Path) -> Path:
    """Write `index.html` and `spectrograms.png` into `folder`. parts: name of each part and its file."""
    figure = spectrograms(parts)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    (folder / "spectrograms.png").write_bytes(buffer.getvalue())
    page = Report(f"Voices of {next(iter(parts))}")
    longer = " Only the first minute is shown and played here." if result["seconds"] > EXCERPT else ""
    page.text(
        f"{result['seconds']:.1f} s, {result['speakers']} voices. The voices sum back to the recording with an error "
        f"{result['sum_back_db']:.1f} dB below it, at the levels that fit best {result['sum_back_fitted_db']:.1f} dB. "
        f"Least confidence that a voice stayed on its track: {result['confidence']:.2f} of 1.{longer}"
    )
    if result["uncertain"]:
        page.text("Not clear at: " + ", ".join(f"{t:.1f} s" for t in result["uncertain"]))
    top = float(level(next(iter(parts.values())))[0].max())
    for name, path in parts.items():
        page.section(name)
        page.audio(player(path))
        page.figure(spectrograms({name: path}, top))
    return page.write(folder / "index.html")
