"""What ought to be equal, measured on a recording: windows and the whole, padded and alone, streamed and offline."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.audio.separation.live import LiveSeparator
from nearfar.audio.separation.mossformer import MossFormer
from nearfar.audio.separation.pit import pit_si_sdr
from nearfar.audio.separation.tracking import Embedder
from nearfar.audio.separation.windows import model_separator, separate_samples
from nearfar.audio.sound import Samples


def check_equivalence(
    model: MossFormer,
    samples: Samples,
    window: float = 10.0,
    hop: float = 0.6,
    embed: Embedder | None = None,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """Compare ways of computing the same, on (n,) samples at the model's rate; n at least a second is sensible.

    Rows hold `comparison`, `relative_error` |a - b| / |b|, and `ought`: "equal" up to rounding, or "close" where the
    two hear different amounts of context or a norm's epsilon shows, so that the figure says what that costs. For
    windows and blocks `si_sdr` says it in dB.
    """
    model = model.to(device).eval()
    mix = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))[None].to(device)
    with torch.inference_mode():
        whole = model(mix)
        group = model.blocks[0].attention.group_size  # type: ignore[union-attr]
        pairs = []
        if model.causal is False:
            pairs.append((f"attention over {group} frames at a time / in one piece", model(mix, frames_at_once=group)))
        padded = torch.nn.functional.pad(mix, (0, mix.shape[1] // 3))
        lengths = torch.tensor([mix.shape[1], padded.shape[1]])
        pairs.append(("in a padded batch / alone", model(padded.expand(2, -1), lengths)[:1, :, : mix.shape[1]]))
        rows: list[dict[str, Any]] = [
            {"comparison": name, "ought": "equal", "relative_error": _error(a, whole)} for name, a in pairs
        ]
        level = _error(10 * model(0.1 * mix), whole)
        rows.append({"comparison": "level 0.1 / level 1", "ought": "close", "relative_error": level})
    if model.causal is True:
        live = LiveSeparator(model, model.sample_rate, device=device)
        rows.append({"comparison": "streamed in blocks of 0.1 s / whole", "ought": "equal", **_live(live, mix, whole)})
        return rows
    options: dict[str, Any] = {"window": window, "hop": hop, "embed": embed}
    tracks, _ = separate_samples(
        mix[0].cpu().numpy(), model.sample_rate, model_separator(model, device), model.sample_rate,
        speakers=model.num_speakers, **options,
    )  # fmt: skip
    live = LiveSeparator(model, model.sample_rate, device=device, **options)
    for name, row in (
        (f"windows of {window:g} s / whole", _matched(torch.from_numpy(tracks)[None], whole.cpu())),
        (f"block by block, {window:g} s late / whole", _live(live, mix, whole)),
    ):
        rows.append({"comparison": name, "ought": "close", **row})
    return rows


def _live(live: LiveSeparator, mix: Tensor, whole: Tensor) -> dict[str, float]:
    samples, size = mix[0].cpu().numpy(), max(1, whole.shape[-1] // 100)
    pieces = [live.push(samples[a : a + size]) for a in range(0, len(samples), size)]
    return _matched(torch.from_numpy(np.concatenate([*pieces, live.finish()], axis=1))[None], whole.cpu())


def _matched(voices: Tensor, whole: Tensor) -> dict[str, float]:
    """Error and SI-SDR under the best order of the voices; a voice that is missing counts as silence."""
    missing = whole.shape[1] - voices.shape[1]
    voices = torch.nn.functional.pad(voices, (0, 0, 0, max(missing, 0)))[:, : whole.shape[1]]
    loss, index = pit_si_sdr(voices.double(), whole.double())
    return {"relative_error": _error(voices[:, index[0].argsort()], whole), "si_sdr": round(-float(loss), 2)}


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
