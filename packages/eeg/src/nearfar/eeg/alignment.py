"""Making recordings alike: exponential moving standardization in time, Euclidean and Riemannian alignment in space."""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter
from sklearn.base import BaseEstimator, TransformerMixin

EXPONENTIAL_MOVING = {"factor_new": 1e-3, "init_block_size": 1000, "eps": 1e-4}
"""Settings of exponential moving standardization that `Preprocessing` uses, for data in microvolts."""


class ExponentialMovingStandardizer:
    """Exponential moving standardization of a stream, chunk by chunk, with the state carried on.

    For each channel, with a = `factor_new` and weights w_i = (1 - a)^i,

        m_t = sum_i w_i x_(t-i) / sum_i w_i,   v_t = sum_i w_i (x_(t-i) - m_(t-i))^2 / sum_i w_i,
        y_t = (x_t - m_t) / max(sqrt(v_t), eps).

    The first `init_block_size` samples get the mean and deviation of that block instead, which takes all of it: `push`
    holds them back until the block is full. With `init_block_size=None` the first samples come at once and nothing
    looks ahead. The output is that of `braindecode.preprocessing.exponential_moving_standardize` over the joined
    chunks, however they were cut. Constant cost and state per sample. `eps` is in the data's unit: give microvolts.
    """

    def __init__(
        self,
        factor_new: float = EXPONENTIAL_MOVING["factor_new"],
        init_block_size: int | None = 1000,
        eps: float = EXPONENTIAL_MOVING["eps"],
    ) -> None:
        if not 0 < factor_new <= 1:
            raise ValueError(f"factor_new must be in (0, 1], not {factor_new}")
        if init_block_size is not None and init_block_size < 1:
            raise ValueError(f"init_block_size must be positive or None, not {init_block_size}")
        self.factor_new, self.init_block_size, self.eps = factor_new, init_block_size, eps
        self._seen = 0  # samples whose moving mean and variance are done
        self._state: NDArray | None = None  # (2, channels, 1): the filters' delays for mean and variance
        self._held: list[NDArray] | None = [] if init_block_size else None

    def push(self, chunk: NDArray) -> NDArray:
        """Standardize the next `chunk` (channels, times); while the first block fills the result has no samples."""
        if self._held is None:
            return self._moving(chunk)
        self._held.append(np.asarray(chunk))
        block = np.concatenate(self._held, axis=1)
        size = self.init_block_size or 0
        if block.shape[1] < size:
            return block[:, :0]
        self._held = None
        result = self._moving(block)
        first = block[:, :size]
        deviation = np.maximum(first.std(axis=1, keepdims=True), self.eps)
        result[:, :size] = (first - first.mean(axis=1, keepdims=True)) / deviation
        return result

    def _moving(self, x: NDArray) -> NDArray:
        if x.shape[1] == 0:  # lfilter would lose the state
            return x
        if self._state is None:
            self._state = np.zeros((2, len(x), 1))
        keep = 1.0 - self.factor_new
        steps = np.arange(self._seen + 1, self._seen + x.shape[1] + 1)
        weight = (1.0 - keep**steps) / self.factor_new  # sum of the w_i up to each sample
        total, self._state[0] = lfilter([1.0], [1.0, -keep], x, axis=1, zi=self._state[0])
        centred = x - total / weight
        total, self._state[1] = lfilter([1.0], [1.0, -keep], centred**2, axis=1, zi=self._state[1])
        self._seen += x.shape[1]
        return centred / np.maximum(np.sqrt(total / weight), self.eps)


class EuclideanAlignment(TransformerMixin, BaseEstimator):
    """Euclidean alignment: whiten each domain's trials by its mean covariance, so that domains become comparable.

        R_d = mean over the trials X (channels, times) of domain d of X X^T / times,
        R_d <- (1 - shrinkage) R_d + shrinkage tr(R_d) / channels I,   X' = R_d^(-1/2) X.

    A domain is a subject or a session. Directions without variance, such as the one that an average reference removes,
    stay zero. No label is used, yet `fit` on the trials that are then scored is TRANSDUCTIVE: each of them sees the
    others' statistics. Fit on a calibration session, or use `RunningAlignment`, where that is not allowed.

    He and Wu 2020, "Transfer Learning for Brain-Computer Interfaces: A Euclidean Space Data Alignment Approach".

    shrinkage: 0 to 1.
    whiteners_: domain -> R_d^(-1/2), after `fit`.
    """

    transductive = True

    def __init__(self, shrinkage: float = 0.0) -> None:
        self.shrinkage = shrinkage

    def fit(self, X: NDArray, y: object = None, domains: ArrayLike | None = None) -> Self:
        """Learn the whitener of each domain from X (trials, channels, times); without `domains` all are one."""
        X = _trials(X)
        labels = _domains(domains, len(X))
        self.whiteners_ = {
            domain: inverse_root(mean_covariance(X[labels == domain]), self.shrinkage) for domain in np.unique(labels)
        }
        return self

    def transform(self, X: NDArray, domains: ArrayLike | None = None) -> NDArray:
        """Whiten each trial by its domain's whitener; ValueError for a domain that was not fitted."""
        X = _trials(X)
        labels = _domains(domains, len(X))
        unknown = set(np.unique(labels)) - set(self.whiteners_)
        if unknown:
            known = ", ".join(map(str, self.whiteners_))
            raise ValueError(f"no alignment for {', '.join(map(str, sorted(unknown)))}; fitted are {known}")
        result = np.empty(X.shape, dtype=np.result_type(X, np.float32))
        for domain in np.unique(labels):
            result[labels == domain] = self.whiteners_[domain] @ X[labels == domain]
        return result

    def fit_transform(self, X: NDArray, y: object = None, domains: ArrayLike | None = None) -> NDArray:
        """`fit` and `transform` on the same trials (transductive)."""
        return self.fit(X, y, domains).transform(X, domains)


class RunningAlignment:
    """Euclidean alignment online, for one domain: each trial is whitened by the mean covariance of the trials so far.

    The present trial counts as one of them (its data is at hand when it is classified), later ones never do: not
    transductive. After n trials the whitener equals that of `EuclideanAlignment` fitted on these n. The first trials
    have poor estimates: use `shrinkage`, or `push` a few calibration trials first.
    """

    transductive = False

    def __init__(self, shrinkage: float = 0.1) -> None:
        self.shrinkage = shrinkage
        self.count = 0
        self._mean: NDArray | None = None

    def push(self, trial: NDArray) -> NDArray:
        """Take the next trial (channels, times) into the mean and return it whitened."""
        covariance = mean_covariance(_trials(trial[None]))
        self.count += 1
        self._mean = covariance if self._mean is None else self._mean + (covariance - self._mean) / self.count
        return (inverse_root(self._mean, self.shrinkage) @ trial).astype(np.result_type(trial, np.float32))


class StreamAlignment:
    """Alignment of a stream: each sample is whitened by the mean covariance of the recording before it, without labels.

    The stream is taken in blocks of `block` samples. With C_b the covariance of block b about its mean, shrunk,

        Euclidean    R_b = (1 - w) R_(b-1) + w C_b,
        Riemannian   R_b = R_(b-1)^(1/2) (R_(b-1)^(-1/2) C_b R_(b-1)^(-1/2))^w R_(b-1)^(1/2),
        y_t = R_b^(-1/2) x_t   for t in block b + 1,   w = max(1 / b, 1 / memory),

    the running arithmetic and geometric mean, which forget after `memory` blocks. The first `first` blocks are held
    back and whitened by their own mean; no later sample looks ahead. A block whose variance exceeds `limit` times that
    of R counts with so much, so that an artefact moves R little. Chunks of any size give the same samples.

    He and Wu 2020 (Euclidean), Zanini et al. 2018 (Riemannian); both align trials, not blocks of a stream.
    """

    def __init__(
        self,
        kind: Literal["euclidean", "riemannian"],
        block: int,
        first: int = 3,
        memory: int = 120,
        shrinkage: float = 0.1,
        limit: float = 4.0,
    ) -> None:
        if kind not in ALIGNMENTS:
            raise ValueError(f"kind must be one of {', '.join(ALIGNMENTS)}, not {kind!r}")
        if block < 2 or not 1 <= first <= memory or not 0 < shrinkage <= 1 or not limit >= 1:
            raise ValueError(
                "need 2 samples or more a block, 1 <= first <= memory, shrinkage in (0, 1] and limit of 1 or more, got "
                f"{block}, {first}, {memory}, {shrinkage}, {limit}"
            )
        self.kind, self.block, self.first, self.memory, self.shrinkage, self.limit = (
            kind, block, first, memory, shrinkage, limit,
        )  # fmt: skip
        self.blocks = 0
        self.reference: NDArray | None = None  # R
        self._whitener: NDArray | None = None
        self._held: NDArray | None = None  # the samples of the block that is not full, or of the first blocks

    def push(self, chunk: NDArray) -> NDArray:
        """The aligned samples; while the first blocks fill there are none."""
        held = chunk if self._held is None else np.concatenate([self._held, chunk], axis=1)
        done = 0 if self._held is None or self.reference is None else self._held.shape[1]  # samples given already
        parts, at = [chunk[:, :0]], 0
        if self.reference is None:
            if held.shape[1] < self.first * self.block:
                self._held = held
                return chunk[:, :0]
            while at < self.first * self.block:
                self._take(held[:, at : at + self.block])
                at += self.block
            parts.append(self._whiten(held[:, :at]))
            done = at
        while at < held.shape[1]:
            stop = min(at + self.block, held.shape[1])
            if done < stop:
                parts.append(self._whiten(held[:, max(at, done) : stop]))
            if stop - at < self.block:
                break
            self._take(held[:, at:stop])
            at = stop
        self._held = held[:, at:].copy()
        return np.concatenate(parts, axis=1)

    def after(self, before: Self) -> Self:
        """Go on after a gap with what was known before it."""
        self.blocks, self.reference, self._whitener = before.blocks, before.reference, before._whitener
        return self

    def _take(self, block: NDArray) -> None:
        centred = block - block.mean(axis=1, keepdims=True)
        covariance, size = centred @ centred.T / block.shape[1], len(block)
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * np.trace(covariance) / size * np.eye(size)
        self.blocks += 1
        if self.reference is None or not self.reference.any():  # none before, or nothing but flat ones
            self.reference = covariance
        elif covariance.any():
            weight = max(1 / self.blocks, 1 / self.memory)
            covariance = covariance * min(1.0, self.limit * np.trace(self.reference) / np.trace(covariance))
            if self.kind == "euclidean":
                self.reference = self.reference + weight * (covariance - self.reference)
            else:
                root, inverse = _power(self.reference, 0.5), _power(self.reference, -0.5)
                self.reference = root @ _power(inverse @ covariance @ inverse, weight) @ root
        self._whitener = _power(self.reference, -0.5) if self.reference.any() else self.reference

    def _whiten(self, samples: NDArray) -> NDArray:
        """R^(-1/2) x, channel after channel, so that the number of samples does not alter the rounding."""
        result = np.zeros_like(samples)
        for column, row in zip(self._whitener.T, samples, strict=True):  # type: ignore[union-attr]
            result += column[:, None] * row
        return result


ALIGNMENTS = ("euclidean", "riemannian")


def carry(before: Sequence[object], steps: Sequence[object]) -> None:
    """Let the alignment among `steps` go on after a gap with what that among the steps `before` it knew."""
    known = [step for step in before if isinstance(step, StreamAlignment)]
    for old, new in zip(known, [step for step in steps if isinstance(step, StreamAlignment)]):
        new.after(old)


def _power(matrix: NDArray, exponent: float) -> NDArray:
    """A power of a symmetric positive matrix, its smallest values held at 1e-12 of the largest against rounding."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.maximum(values, 1e-12 * values[-1]) ** exponent) @ vectors.T


def mean_covariance(X: NDArray) -> NDArray:
    """Mean of X X^T / times over trials (trials, channels, times), in float64; nothing is centred."""
    flat = np.moveaxis(X, 1, 0).reshape(X.shape[1], -1).astype(np.float64)
    return flat @ flat.T / flat.shape[1]


def inverse_root(covariance: NDArray, shrinkage: float = 0.0) -> NDArray:
    """R^(-1/2) of the shrunk covariance; directions with less than 1e-10 of the largest variance become zero."""
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], not {shrinkage}")
    size = len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / size * np.eye(size)
    values, vectors = np.linalg.eigh(shrunk)
    kept = values > 1e-10 * values[-1]
    vectors = vectors[:, kept]
    return (vectors / np.sqrt(values[kept])) @ vectors.T


def _trials(X: NDArray) -> NDArray:
    X = np.asarray(X)
    if X.ndim != 3 or not np.isfinite(X).all():
        raise ValueError(f"need finite trials of shape (trials, channels, times), not {X.shape} or NaN")
    return X


def _domains(domains: ArrayLike | None, count: int) -> NDArray:
    labels = np.zeros(count, dtype=int) if domains is None else np.asarray(domains)
    if labels.shape != (count,):
        raise ValueError(f"need one domain for each of {count} trials, got shape {labels.shape}")
    return labels
