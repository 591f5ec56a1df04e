"""How well voices were separated: SI-SDR, SDR, PESQ and STOI under the best assignment, against the mixture itself."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.audio import signal_distortion_ratio

from nearfar.audio.separation.pit import best_permutation, pairwise_si_sdr
from nearfar.audio.separation.windows import separate_samples
from nearfar.core.errors import UserError
from nearfar.core.statistics import bootstrap_interval

METRICS = ("si_sdri", "sdri", "pesq", "stoi")

WORST = {"pesq": 1.0, "stoi": 0.0}
"""What an output counts that the metric cannot score because it is silent."""


def score(
    estimates: Tensor, targets: Tensor, mix: Tensor, rate: int, metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Scores of one file: estimates and targets (K, T), mix (T,), means over the voices.

    si_sdr, si_sdri: SI-SDR in dB of the best assignment, and minus that of the mixture taken as every estimate.
    sdri: BSS-eval's SDR (512 taps) likewise. pesq: P.862 (narrow band at 8 kHz, wide band at 16 kHz). stoi: 0 to 1.
    The assignment is the one that is best for SI-SDR. A missing output (fewer estimates than targets) is taken as
    silence, and silence where PESQ and STOI fail counts as the worst value, never drops out of a mean.

    Raises ValueError for shapes that do not fit or unknown metrics, UserError for PESQ at another rate or a metric
    whose package is not installed.
    """
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"unknown metrics {', '.join(sorted(unknown))}; known are {', '.join(METRICS)}")
    if estimates.shape[-1] != targets.shape[-1] or mix.shape[-1] != targets.shape[-1]:
        raise ValueError(f"lengths differ: {estimates.shape[-1]}, {targets.shape[-1]}, {mix.shape[-1]} samples")
    missing = len(targets) - len(estimates)
    if missing > 0:
        estimates = torch.cat([estimates, estimates.new_zeros(missing, estimates.shape[-1])])
    pairs = pairwise_si_sdr(estimates[None], targets[None])[0]
    spare = len(estimates) - len(targets)  # outputs too many: the targets choose
    square = torch.cat([pairs, pairs.new_zeros(len(estimates), spare)], dim=1)
    index = best_permutation(-square[None])[0]
    chosen = torch.stack([(index == k).nonzero()[0, 0] for k in range(len(targets))])
    estimates = estimates[chosen]
    own = pairs[chosen, torch.arange(len(targets))].mean()
    both = mix.expand_as(targets)
    plain = pairwise_si_sdr(both[None], targets[None])[0].diagonal().mean()
    scores = {"si_sdr": float(own), "si_sdri": float(own - plain)}
    if "sdri" in metrics:
        scores["sdri"] = float((_sdr(estimates, targets) - _sdr(both, targets)).mean())
    for name, measure in (("pesq", _pesq), ("stoi", _stoi)):
        if name in metrics:
            scores[name] = float(np.mean([measure(e, t, rate) for e, t in zip(estimates, targets)]))
    return scores


def _sdr(estimates: Tensor, targets: Tensor) -> Tensor:
    silent = estimates.abs().amax(-1, keepdim=True) == 0
    noisy = torch.where(silent, torch.full_like(estimates, 1e-8), estimates)
    return signal_distortion_ratio(noisy.double(), targets.double(), load_diag=1e-10).clamp(-50, 100)


def _pesq(estimate: Tensor, target: Tensor, rate: int) -> float:
    if rate not in (8000, 16000):
        raise UserError(f"PESQ is defined at 8000 and 16000 Hz, these recordings are at {rate} Hz; leave it out")
    pesq = _need("pesq")
    value = pesq.pesq(rate, target.numpy(), estimate.numpy(), "nb" if rate == 8000 else "wb", on_error=1)
    return float(value) if value >= WORST["pesq"] else WORST["pesq"]  # -1 or NaN: no speech was found


def _stoi(estimate: Tensor, target: Tensor, rate: int) -> float:
    if float(estimate.abs().max()) == 0:
        return WORST["stoi"]
    return max(float(_need("pystoi").stoi(target.numpy(), estimate.numpy(), rate)), WORST["stoi"])


def _need(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(f"the metric needs {package}: pip install 'nearfar-audio[metrics]'") from error


def summary(rows: Iterable[dict[str, float]], draws: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Mean over files with a 95 % bootstrap interval (NaN for too few), one row per metric; every file counts once."""
    table = list(rows)
    out = []
    for name in [key for key in (table[0] if table else {}) if isinstance(table[0][key], float)]:
        values: NDArray[np.floating] = np.array([row[name] for row in table])
        low, high = bootstrap_interval(values, resamples=draws, seed=seed)
        out.append({"metric": name, "mean": float(values.mean()), "low": low, "high": high, "files": len(values)})
    return out


def evaluate_mixture(
    mix: NDArray[np.float32],
    sources: NDArray[np.float32],
    rate: int,
    separate: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    metrics: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Separate one mixture whole, as published figures do, and as `separate` does for its number of voices; score both.

    separate_si_sdri: of the second way, window by window with the voices put in order. collapsed: 1 where a voice was
    lost there (two tracks are one signal, or one is silent), else 0. correlation: greatest between two of its tracks.
    """
    estimates = torch.from_numpy(np.asarray(separate(mix)))
    targets, whole = torch.from_numpy(sources), torch.from_numpy(mix)
    scores = score(estimates, targets, whole, rate, metrics)
    tracks, report = separate_samples(mix, rate, separate, rate, speakers=len(sources))
    own = score(torch.from_numpy(tracks), targets, whole, rate, ["si_sdri"])
    scores |= {"separate_si_sdri": own["si_sdri"], "collapsed": float(report.collapsed)}
    return scores | {"correlation": report.correlation}
