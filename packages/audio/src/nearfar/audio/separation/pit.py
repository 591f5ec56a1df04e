"""Scale-invariant signal-to-distortion ratio, and its minimum over the assignments of estimates to targets (PIT)."""

from functools import lru_cache
from itertools import permutations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

EPS = 1e-8


def si_sdr(estimate: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Scale-invariant SDR in dB over the last axis; both signals lose their mean first.

        a = <e, s> / (|s|^2 + eps);    10 log10(|a s|^2 / (|e - a s|^2 + eps) + eps),    eps = 1e-8

    estimate, target: (..., T), broadcast against each other; lengths: (...) samples that count, the rest being padding.
    Le Roux et al., "SDR - half-baked or well done?" (2019); the separation papers call the same quantity SI-SNR.
    """
    if lengths is not None:
        real = torch.arange(target.shape[-1], device=target.device) < lengths.unsqueeze(-1)
        count = lengths.unsqueeze(-1)
        estimate = (estimate - (estimate * real).sum(-1, keepdim=True) / count) * real
        target = (target - (target * real).sum(-1, keepdim=True) / count) * real
    else:
        estimate = estimate - estimate.mean(-1, keepdim=True)
        target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / (target.square().sum(-1, keepdim=True) + EPS)
    wanted = scale * target
    ratio = wanted.square().sum(-1) / ((estimate - wanted).square().sum(-1) + EPS)
    return 10 * torch.log10(ratio + EPS)


def pairwise_si_sdr(estimates: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
    """SI-SDR of every estimate against every target: (B, I, T) and (B, J, T) to (B, I, J). lengths: (B,)."""
    if lengths is not None:
        lengths = lengths[:, None, None].expand(-1, estimates.shape[1], targets.shape[1])
    return si_sdr(estimates.unsqueeze(2), targets.unsqueeze(1), lengths)


@lru_cache
def _permutation_table(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(list(permutations(range(size))))


def best_permutation(cost: Tensor) -> Tensor:
    """The assignment of least total cost: (B, K, K) costs [estimate, target] to (B, K), each estimate's target.

    All K! permutations at once up to K = 3, the Hungarian method beyond; both give the same minimum.
    """
    size = cost.shape[-1]
    if size > 3:
        rows = [linear_sum_assignment(item)[1] for item in cost.detach().cpu().double().numpy()]
        return torch.stack([torch.from_numpy(row) for row in rows]).to(cost.device)
    table = _permutation_table(size).to(cost.device)
    totals = cost[:, torch.arange(size, device=cost.device), table].sum(-1)
    return table[totals.argmin(-1)]


def pit_si_sdr(estimates: Tensor, targets: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Permutation-invariant loss: minus the mean SI-SDR under the best assignment, per item.

    estimates, targets: (B, K, T); lengths: (B,) samples of each item that count.
    Returns the loss in dB (B,) and (B, K), the target that each estimate was matched with.
    Yu et al. (2017), utterance-level PIT.

    Raises ValueError where the shapes differ.
    """
    if estimates.shape != targets.shape:
        raise ValueError(
            f"estimates are {tuple(estimates.shape)} and targets {tuple(targets.shape)}; both must be (B, K, T)"
        )
    cost = -pairwise_si_sdr(estimates, targets, lengths)
    index = best_permutation(cost)
    return cost.gather(2, index.unsqueeze(-1)).squeeze(-1).mean(-1), index


def training_loss(losses: Tensor, threshold: float | None = -30.0) -> Tensor:
    """Mean of per-item PIT losses, leaving out those already below `threshold` dB (None: keep all).

    What is separated that well teaches nothing more; speechbrain's SepFormer recipe introduced this at -30 dB.
    Zero, with a graph, where every item is below.
    """
    if threshold is None:
        return losses.mean()
    kept = losses > threshold
    return (losses * kept).sum() / kept.sum().clamp(min=1)
