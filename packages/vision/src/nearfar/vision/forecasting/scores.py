"""Rollouts in bounded memory, and their scores by lead time beside persistence and climatology."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.vision.forecasting.fields import Fields, Statistics


def latitude_weights(latitudes: np.ndarray) -> np.ndarray:
    """w_j = n cos(lat_j) / sum_i cos(lat_i), lat in degrees; mean 1. The poles' cosine is 0 and not below."""
    cosine = np.clip(np.cos(np.deg2rad(latitudes.astype(np.float64))), 0, None)
    if cosine.sum() <= 0:
        raise UserError("the latitudes are all poles, which have no weight")
    return len(cosine) * cosine / cosine.sum()


def published_latitudes(rows: int) -> np.ndarray:
    """lat_j = 90 - 180 j / (n - 1), as FourCastNet's scores take them whatever the file's latitudes are."""
    return 90 - 180 * np.arange(rows) / (rows - 1)


def rmse(forecast: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sqrt(mean_hw(w (forecast - truth)^2)) of each channel of (C, H, W)."""
    return np.sqrt((weights[:, None] * np.square(forecast - truth, dtype=np.float64)).mean((1, 2)))


def acc(forecast: np.ndarray, truth: np.ndarray, climatology: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(w f' t') / sqrt(sum(w f'^2) sum(w t'^2)) of each channel, f', t' the anomalies from the climatology.

    0 where an anomaly is zero everywhere, as the climatology's own is.
    """
    w = weights[:, None]
    f, t = (x.astype(np.float64) - climatology for x in (forecast, truth))
    product = (w * f * t).sum((1, 2))
    size = np.sqrt((w * f * f).sum((1, 2)) * (w * t * t).sum((1, 2)))
    return np.divide(product, size, out=np.zeros_like(product), where=size > 0)


@torch.inference_mode()
def rollout(net: nn.Module, state: Tensor, steps: int) -> Iterator[Tensor]:
    """The normalized state (B, C, H, W) after 1, 2, ... `steps` steps, one at a time; nothing of the past is kept.

    Raises UserError at the step whose values are not finite.
    """
    for step in range(1, steps + 1):
        state = net(state)
        if not torch.isfinite(state).all():
            raise UserError(f"the forecast is not finite after {step} steps; train it longer or on "
                            "two steps")  # fmt: skip
        yield state


def evaluate(
    net: nn.Module,
    fields: Fields,
    statistics: Statistics,
    leads: Sequence[int],
    starts: Sequence[int] | None = None,
    latitudes: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, object]]:
    """RMSE and ACC by lead, variable and forecaster, each the mean over all starts.

    Every forecaster is scored on the same starts: the net, persistence (the field at the start), and climatology (the
    training mean at each place). `starts` are all that leave room for the longest lead, by default; `latitudes` replace
    the files'. One start is in memory at a time.
    """
    statistics.check(fields)
    last = max(leads)
    if min(leads) < 1 or len(fields) <= last:
        raise UserError(f"{fields.source}: has {len(fields)} times; leads from 1 up to {len(fields) - 1} can be scored")
    starts = range(len(fields) - last) if starts is None else starts
    weights = latitude_weights(fields.latitudes if latitudes is None else latitudes)
    device = next(net.parameters()).device
    net.eval()
    sums: dict[tuple[int, str], np.ndarray] = {}
    for done, start in enumerate(starts):
        first = fields.read(start)
        state = torch.from_numpy(statistics.normalize(first))[None].to(device)
        for lead, ahead in enumerate(rollout(net, state, last), 1):
            if lead not in leads:
                continue
            truth = fields.read(start + lead)
            forecasts = {
                "net": statistics.restore(ahead[0].float().cpu().numpy()),
                "persistence": first,
                "climatology": statistics.climatology,
            }
            for name, forecast in forecasts.items():
                pair = np.stack((rmse(forecast, truth, weights), acc(forecast, truth, statistics.climatology, weights)))
                sums[lead, name] = sums.get((lead, name), 0) + pair
        progress(done + 1, len(starts))
    return [
        {
            "lead": lead,
            "variable": variable,
            "forecast": name,
            "RMSE": float(total[0, c] / len(starts)),
            "ACC": float(total[1, c] / len(starts)),
        }
        for (lead, name), total in sorted(sums.items())
        for c, variable in enumerate(fields.names)
    ]
