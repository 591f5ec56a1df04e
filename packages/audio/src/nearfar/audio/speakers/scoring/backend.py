"""From embeddings to scores: cosine, cohort normalization, PLDA."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.linalg
import torch

from nearfar.audio.speakers.scoring.trials import Array
from nearfar.core.errors import some


def unit(embeddings: Array, mean: Array | None = None) -> Array:
    """Embeddings minus `mean`, scaled to length 1, in their own precision.

    Raises ValueError for values that are not finite and vectors of length 0, naming the rows.
    """
    x = np.asarray(embeddings)
    x = x.astype(np.float32) if x.dtype.kind != "f" else x
    if x.ndim != 2:
        raise ValueError(f"embeddings are (n, E), got {x.shape}")
    if mean is not None:
        x = x - np.asarray(mean, x.dtype)
    norms = np.linalg.norm(x, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise ValueError(f"{len(bad)} embeddings are not finite or have length 0: rows {some(bad)}")
    return x / norms[:, None]


def pair_scores(
    enroll: Array, test: Array, left: Array, right: Array, mean: Array | None = None, chunk: int = 65536
) -> Array:
    """Cosine of each trial `(enroll[left], test[right])` after subtracting `mean`.

    Cost: each embedding is normalized once; O(trials * E) products in chunks.
    """
    e = unit(enroll, mean)
    t = e if test is enroll else unit(test, mean)
    if len(left) != len(right):
        raise ValueError(f"both sides need as many indices, got {len(left)} and {len(right)}")
    scores = np.empty(len(left))
    for start in range(0, len(left), chunk):
        part = slice(start, start + chunk)
        scores[part] = np.einsum("ne,ne->n", e[left[part]], t[right[part]])
    return scores


def enroll_models(embeddings: Array, members: Sequence[Sequence[int]], mean: Array | None = None) -> Array:
    """One vector per model: the mean of its length-normalized embeddings, normalized again.

    `members`: rows of `embeddings` for each model. Raises ValueError for a model without rows or with a row twice.
    """
    sizes = np.array([len(rows) for rows in members])
    if not len(sizes) or (sizes == 0).any():
        raise ValueError(f"every model needs an utterance; models without: {some(np.flatnonzero(sizes == 0))}")
    if any(len(set(rows)) != len(rows) for rows in members):
        raise ValueError("a model has the same utterance twice")
    x = unit(embeddings, mean)[np.concatenate([np.asarray(rows) for rows in members])]
    return unit(np.add.reduceat(x, np.r_[0, np.cumsum(sizes)[:-1]], axis=0))


def averaged_scores(scores: Array, trial: Array, num_trials: int) -> Array:
    """The alternative to `enroll_models`: mean score per trial over its enrolment utterances.

    `trial (n,)`: the trial that each single score belongs to.
    """
    counts = np.bincount(trial, minlength=num_trials)
    if (counts == 0).any():
        raise ValueError(f"{int((counts == 0).sum())} trials have no score")
    return np.bincount(trial, scores, minlength=num_trials) / counts


class CohortStatistics(NamedTuple):
    """Mean and standard deviation of the cosines of each utterance with its cohort."""

    mean: Array
    std: Array


def make_cohort(
    embeddings: Array,
    speakers: Sequence[Any],
    kind: Literal["speaker", "utterance"] = "speaker",
    exclude: Iterable[Any] = (),
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Array, Array]:
    """A cohort and the speaker of each of its rows.

    kind "speaker": one row per speaker, the mean of its embeddings (wespeaker, LAP); "utterance": the embeddings
    themselves (speechbrain). Speakers in `exclude`, such as those of the trials, are left out. `limit` draws that many
    rows at random.
    """
    names = np.asarray(speakers)
    if len(names) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings, {len(names)} speakers")
    keep = ~np.isin(names, np.array(list(exclude), dtype=names.dtype)) if (exclude := list(exclude)) else slice(None)
    x, names = np.asarray(embeddings)[keep], names[keep]
    if not len(x):
        raise ValueError("no speaker is left for the cohort")
    if kind == "speaker":
        names, row = np.unique(names, return_inverse=True)
        sums = np.zeros((len(names), x.shape[1]), np.float64)
        np.add.at(sums, row, x)
        x = (sums / np.bincount(row)[:, None]).astype(x.dtype)
    elif kind != "utterance":
        raise ValueError(f"kind must be speaker or utterance, got {kind!r}")
    if limit is not None and limit < len(x):
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), limit, replace=False))
        x, names = x[chosen], names[chosen]
    return x, names


def cohort_statistics(
    embeddings: Array,
    cohort: Array,
    mean: Array | None = None,
    top_n: int | None = None,
    ddof: int = 0,
    speakers: Sequence[Any] | None = None,
    cohort_speakers: Sequence[Any] | None = None,
    chunk: int = 1024,
) -> CohortStatistics:
    """Statistics for S-norm (`top_n=None`, the whole cohort) and AS-norm (the `top_n` highest cosines of each row).

    Args:
        embeddings: `(n, E)`, each utterance or model once.
        cohort: `(m, E)`; see `make_cohort`.
        mean: subtracted from both before they are normalized.
        top_n: 100 or 300 (wespeaker), 600 (LAP), 400 (ECAPA-TDNN).
        ddof: 0 for the population deviation (wespeaker), 1 for the sample's (speechbrain, LAP).
        speakers, cohort_speakers: where both are given, an utterance never meets its own speaker in the cohort.
        chunk: rows at a time; memory is O(chunk * m).

    Raises ValueError where fewer than `top_n` (or `ddof + 2`) cohort rows are there for an utterance, or all its
    cosines are equal.
    """
    if (speakers is None) != (cohort_speakers is None):
        raise ValueError("to leave out own speakers, both speakers and cohort_speakers are needed")
    x, c = torch.from_numpy(unit(embeddings, mean)), torch.from_numpy(unit(cohort, mean))
    if x.dtype != c.dtype:
        x, c = x.double(), c.double()
    own = cohort_own = None
    if speakers is not None and cohort_speakers is not None:
        codes = {name: code for code, name in enumerate(dict.fromkeys(np.asarray(cohort_speakers).tolist()))}
        own = torch.tensor([codes.get(name, -1) for name in np.asarray(speakers).tolist()])
        cohort_own = torch.tensor([codes[name] for name in np.asarray(cohort_speakers).tolist()])
        if len(own) != len(x) or len(cohort_own) != len(c):
            raise ValueError("speakers and cohort_speakers must name each row")
    need = ddof + 2 if top_n is None else top_n
    if need < ddof + 1 or need > len(c):
        raise ValueError(f"the cohort has {len(c)} rows, top_n={top_n} with ddof={ddof} cannot be taken from it")
    means, stds = np.empty(len(x)), np.empty(len(x))
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        cosines = x[part] @ c.T
        counts = torch.full((len(cosines), 1), float(len(c)), dtype=cosines.dtype)
        if own is not None and cohort_own is not None:
            same = own[part, None] == cohort_own
            cosines.masked_fill_(same, -torch.inf)
            counts -= same.sum(1, keepdim=True)
            if bool((counts < need).any()):
                raise ValueError(
                    f"an utterance has only {int(counts.min())} cohort rows of other speakers, needs {need}"
                )
        if top_n is not None:
            cosines = cosines.topk(top_n, 1, sorted=False).values
            counts = torch.full_like(counts, top_n)
        valid = torch.isfinite(cosines)
        cosines = cosines.masked_fill_(~valid, 0.0).double()
        average = cosines.sum(1, keepdim=True) / counts
        squares = (cosines - average).square_().mul_(valid).sum(1, keepdim=True)
        means[part] = average[:, 0].numpy()
        stds[part] = (squares / (counts - ddof)).sqrt_()[:, 0].numpy()
    if not (stds > 0).all():
        raise ValueError(f"the cohort's cosines do not vary for rows {some(np.flatnonzero(~(stds > 0)))}")
    return CohortStatistics(means, stds)


def normalize_scores(
    scores: Array,
    enroll: CohortStatistics,
    test: CohortStatistics,
    kind: Literal["s", "z", "t"] = "s",
) -> Array:
    """Scores in standard deviations of their cohorts: 1/2 [(s - mu_e) / sigma_e + (s - mu_t) / sigma_t].

    With statistics of the `top_n` this is AS-norm. "z" uses the enrolment side alone, "t" the test side. Scores and
    statistics broadcast: `(n,)` with statistics per trial, or `(n, m)` with `enroll` as columns `(n, 1)`.
    """
    z = (scores - enroll.mean) / enroll.std
    t = (scores - test.mean) / test.std
    match kind:
        case "s":
            return 0.5 * (z + t)
        case "z":
            return np.broadcast_to(z, np.shape(scores)).copy()
        case "t":
            return np.broadcast_to(t, np.shape(scores)).copy()
    raise ValueError(f"kind must be s, z or t, got {kind!r}")


def adaptive_s_norm(
    scores: Array,
    enroll: Array,
    test: Array,
    left: Array,
    right: Array,
    cohort: Array,
    mean: Array | None = None,
    top_n: int | None = 300,
    **options: Any,
) -> Array:
    """AS-norm of the scores of trials `(enroll[left], test[right])`: each embedding meets the cohort once.

    `options` go to `cohort_statistics`. `top_n=None` is S-norm.
    """
    e = cohort_statistics(enroll, cohort, mean, top_n, **options)
    t = e if test is enroll else cohort_statistics(test, cohort, mean, top_n, **options)
    return normalize_scores(
        scores, CohortStatistics(e.mean[left], e.std[left]), CohortStatistics(t.mean[right], t.std[right])
    )


@dataclass(frozen=True)
class PLDA:
    """Two-covariance PLDA: x = mean + y + e with y ~ N(0, B) per speaker and e ~ N(0, W) per utterance.

    `transform` turns W into the identity and B into diag(`psi`). With margin losses, cosine scores usually do better.
    """

    mean: Array
    transform: Array
    psi: Array

    @classmethod
    def fit(cls, embeddings: Array, speakers: Sequence[Any], iterations: int = 10) -> "PLDA":
        """Fit by expectation maximization. Embeddings are best length-normalized (`unit`).

        Raises ValueError with fewer than two speakers or no speaker with two utterances, or where there are fewer
        utterances beyond the speakers' first than dimensions.
        """
        x = np.asarray(embeddings, np.float64)
        names, row = np.unique(np.asarray(speakers), return_inverse=True)
        counts = np.bincount(row)
        if len(names) < 2 or len(x) - len(names) < x.shape[1]:
            raise ValueError(
                f"{len(x)} utterances of {len(names)} speakers are too few for PLDA in {x.shape[1]} dimensions"
            )
        mean = x.mean(0)
        basis = x - mean
        transform = np.eye(x.shape[1])
        sums = np.zeros((len(names), x.shape[1]))
        np.add.at(sums, row, basis)
        centers = sums / counts[:, None]
        within = (basis - centers[row]).T @ (basis - centers[row]) / (len(x) - len(names))
        between = centers.T @ centers / len(names)
        psi = np.ones(x.shape[1])
        for step in range(iterations + 1):
            psi, rotation = scipy.linalg.eigh(between, within)
            psi = psi.clip(min=0)
            transform, basis, centers = transform @ rotation, basis @ rotation, centers @ rotation
            if step == iterations:
                break
            gain = counts[:, None] * psi / (1 + counts[:, None] * psi)
            variance = psi / (1 + counts[:, None] * psi)
            speaker = gain * centers
            rest = basis - speaker[row]
            between = (speaker.T @ speaker + np.diag(variance.sum(0))) / len(names)
            within = (rest.T @ rest + np.diag((counts[:, None] * variance).sum(0))) / len(x)
        return cls(mean, transform, psi)

    def scores(
        self, enroll: Array, test: Array, left: Array, right: Array, utterances: int = 1, chunk: int = 65536
    ) -> Array:
        """Log-likelihood ratios (natural) of trials; an enrolment vector may be the mean of several `utterances`."""
        e, t = (np.asarray(x, np.float64) - self.mean for x in (enroll, test))
        e, t = e @ self.transform, t @ self.transform
        gain = utterances * self.psi / (1 + utterances * self.psi)
        same, other = 1 + self.psi / (1 + utterances * self.psi), 1 + self.psi
        on_e = -0.5 * (e**2 @ (gain**2 / same))
        on_t = -0.5 * (t**2 @ (1 / same - 1 / other))
        constant = 0.5 * np.log(other / same).sum()
        scores = constant + on_e[left] + on_t[right]
        e = e * (gain / same)
        for start in range(0, len(left), chunk):
            part = slice(start, start + chunk)
            scores[part] += np.einsum("ne,ne->n", e[left[part]], t[right[part]])
        return scores
