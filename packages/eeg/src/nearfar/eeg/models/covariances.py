"""Decoders of covariances as modules of torch: tangent space, minimum distance to mean, common spatial patterns.

A fitted pipeline of `baselines` becomes a module (`compiled`) whose buffers hold all that it learnt, so that it is
saved, loaded, streamed and adapted as a network is, without pickle. With C = Y Y^T / T of a trial in the band,
Y = B^T X F less its mean (B the directions with signal, F the band-pass forward and backward as a matrix), and S its
OAS shrinkage:

    TangentSpace   z_k = <W_k, log(R^(-1/2) S R^(-1/2))> + b_k
    MDM            z_k = -|| log(M_k^(-1/2) S M_k^(-1/2)) ||^2
    CSP+LDA        z_k = w_k . log diag(V^T C V) + b_k

and the probabilities are the softmax of z. All is in float64; a trial costs O(channels T^2 + channels^3). With
`by_products` the logarithm takes matrix products alone, as ONNX has them.
"""

from typing import Any, Self

import numpy as np
import torch
from scipy.signal import butter, sosfiltfilt
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.eeg.alignment import inverse_root


class CovarianceDecoder(nn.Module):
    """What the three have in common: the way to covariances, and those of the trials that it learnt from.

    Args:
        n_chans, n_outputs, n_times, sfreq: of the trials.
        rank: directions with signal.
        learnt: trials that it learnt from.
        band: of the band-pass, Hz.
    """

    def __init__(
        self,
        n_chans: int,
        n_outputs: int,
        n_times: int,
        sfreq: float,
        rank: int,
        learnt: int,
        band: tuple[float, float] = (8.0, 30.0),
    ) -> None:
        super().__init__()
        if not 0 < rank <= n_chans or n_outputs < 2 or n_times < 10:
            raise ValueError(
                "need 0 < rank <= n_chans, two outputs and ten samples or more, got "
                f"{rank}, {n_chans}, {n_outputs}, {n_times}"
            )
        if n_times > 8192:
            raise ValueError(f"trials of {n_times} samples make too large a filter; resample, up to 8192 are taken")
        if not 0 < band[0] < band[1] < sfreq / 2:
            raise ValueError(f"band must lie between 0 and {sfreq / 2:g} Hz, got {band}")
        self.n_chans, self.n_outputs, self.n_times, self.sfreq = n_chans, n_outputs, n_times, float(sfreq)
        self.rank, self.band = rank, (float(band[0]), float(band[1]))
        sos = butter(4, self.band, "bandpass", fs=sfreq, output="sos")
        filtered = sosfiltfilt(sos, np.eye(n_times), axis=-1, padlen=min(3 * 9, n_times - 1))
        self.register_buffer("filter", torch.from_numpy(filtered.copy()), persistent=False)
        self._hold("basis", n_chans, rank)
        self._hold("learnt", learnt, rank, rank)
        self.register_buffer("labels", torch.zeros(learnt, dtype=torch.int64))

    def _hold(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def get_config(self) -> dict[str, Any]:
        """The arguments that it was built with."""
        names = ("n_chans", "n_outputs", "n_times", "sfreq", "rank", "band")
        return {name: getattr(self, name) for name in names} | {"learnt": len(self.learnt)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build it, everything learnt being zero."""
        return cls(**config)

    def covariances(self, x: Tensor) -> Tensor:
        """C of trials (n, channels, times): (n, rank, rank)."""
        y = (self.basis.T @ x.double()) @ self.filter
        y = y - y.mean(2, keepdim=True) if self.centred else y
        return y @ y.mT / self.n_times

    def shrunk(self, c: Tensor) -> Tensor:
        """OAS of covariances (n, rank, rank) of `n_times` samples (Chen et al. 2010, as scikit-learn has it)."""
        p, mean = self.rank, c.diagonal(dim1=1, dim2=2).mean(1)
        alpha = c.square().mean((1, 2))
        rho = ((alpha + mean**2) / ((self.n_times + 1) * (alpha - mean**2 / p))).nan_to_num(1.0, 1.0).clamp(0, 1)
        eye = torch.eye(p, dtype=c.dtype, device=c.device)
        return (1 - rho)[:, None, None] * c + (rho * mean)[:, None, None] * eye

    def scores(self, c: Tensor) -> Tensor:
        """z of covariances: (n, outputs)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Trials (n, channels, times) to logits (n, outputs)."""
        return self.scores(self.covariances(x)).float()

    @torch.no_grad()
    def reorder(self, order: list[int]) -> None:
        """Make output `order[i]` output i."""
        for name in self.of_classes:
            getattr(self, name).copy_(getattr(self, name)[order])
        self.labels.copy_(torch.tensor(np.argsort(order))[self.labels])

    of_classes: tuple[str, ...] = ("weight", "bias")
    """Buffers with an entry for each output."""
    by_products = False
    """Whether logarithms are made of products (`log_by_products`) instead of eigenvalues."""
    centred = True
    """Whether covariances are about the trial's mean, as scikit-learn's OAS has it, or about zero, as MNE's CSP."""

    def logarithm(self, matrices: Tensor) -> Tensor:
        """Of symmetric positive matrices (..., rank, rank)."""
        if self.by_products:
            return log_by_products(matrices)
        values, vectors = torch.linalg.eigh(matrices)
        return (vectors * values.log()[..., None, :]) @ vectors.mT

    def take(self, tail: Pipeline) -> None:
        """Take over what the steps of a pipeline after the band-pass have learnt."""
        raise NotImplementedError

    def _linear(self, coefficients: np.ndarray, intercept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(coefficients) == 1:  # of two classes one score
            coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
            intercept = np.array([0.0, float(intercept[0])])
        return coefficients, intercept


class TangentSpaceDecoder(CovarianceDecoder):
    """`baselines.tangent_space`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._hold("whitener", self.rank, self.rank)
        self._hold("weight", self.n_outputs, self.rank, self.rank)
        self._hold("bias", self.n_outputs)

    def scores(self, c: Tensor) -> Tensor:
        logarithm = self.logarithm(self.whitener @ self.shrunk(c) @ self.whitener)
        return torch.einsum("kij,nij->nk", self.weight, logarithm) + self.bias

    def take(self, tail: Pipeline) -> None:
        coefficients, intercept = self._linear(tail[-1].coef_, tail[-1].intercept_)
        weight = np.zeros((len(coefficients), self.rank, self.rank))
        rows, columns = np.triu_indices(self.rank)
        weight[:, rows, columns] = coefficients * np.where(rows == columns, 1.0, np.sqrt(2))
        weight = (weight + weight.swapaxes(1, 2)) / 2  # what stands off the diagonal comes twice
        _fill(self, whitener=inverse_root(tail["tangentspace"].reference_), weight=weight, bias=intercept)


class MDMDecoder(CovarianceDecoder):
    """`baselines.minimum_distance`."""

    of_classes = ("roots",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._hold("roots", self.n_outputs, self.rank, self.rank)

    def scores(self, c: Tensor) -> Tensor:
        whitened = self.roots @ self.shrunk(c)[:, None] @ self.roots
        if self.by_products:
            return -self.logarithm(whitened).square().sum((-2, -1))
        return -torch.linalg.eigvalsh(whitened).log().square().sum(-1)

    def take(self, tail: Pipeline) -> None:
        _fill(self, roots=np.stack([inverse_root(mean) for mean in tail[-1].covmeans_]))


class CSPDecoder(CovarianceDecoder):
    """`baselines.csp_lda`."""

    centred = False

    def __init__(self, *args: Any, components: int = 6, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.components = components
        self._hold("filters", self.rank, components)
        self._hold("weight", self.n_outputs, components)
        self._hold("bias", self.n_outputs)

    def get_config(self) -> dict[str, Any]:
        """The arguments that it was built with."""
        return super().get_config() | {"components": self.components}

    def scores(self, c: Tensor) -> Tensor:
        power = torch.einsum("im,nij,jm->nm", self.filters, c, self.filters)
        return power.log() @ self.weight.T + self.bias

    def take(self, tail: Pipeline) -> None:
        weight, bias = self._linear(tail[-1].coef_, tail[-1].intercept_)
        _fill(self, filters=tail["quietcsp"].filters_[: self.components].T, weight=weight, bias=bias)


DECODERS: dict[str, type[CovarianceDecoder]] = {
    "TangentSpace": TangentSpaceDecoder,
    "MDM": MDMDecoder,
    "CSP+LDA": CSPDecoder,
}
"""By the names of `baselines.classical`."""


def log_by_products(matrices: Tensor) -> Tensor:
    """Logarithm of symmetric positive matrices (..., n, n) by products alone, to about 1e-9 of its size.

    log A = log(c) I + 2^6 log((A / c)^(1 / 2^6)), c the largest row sum of |A|. Roots come from coupled Newton-Schulz
    iterations, Y <- Y (3 I - Z Y) / 2 and Z <- (3 I - Z Y) / 2 Z from Y = A / c and Z = I, in which Y tends to the root
    and Z to its inverse; the last logarithm is its series of degree 16. The numbers of iterations, fixed, suffice for
    eigenvalues of 1e-8 c or more; where one is smaller the result is NaN.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    scale = matrices.abs().sum(-1).amax(-1)[..., None, None]
    root, sound = matrices / scale, torch.ones_like(scale, dtype=torch.bool)
    for iterations in _ITERATIONS:
        inverse = eye.expand_as(root)
        for _ in range(iterations):
            step = 1.5 * eye - 0.5 * (inverse @ root)
            root, inverse = root @ step, step @ inverse
        sound = sound & ((inverse @ root - eye).abs().amax((-2, -1), keepdim=True) < 1e-8)
    rest, series = eye - root, torch.zeros_like(root)
    for degree in range(16, 0, -1):  # -log(I - E) = E (I + E (I / 2 + ...))
        series = rest @ (eye / degree + series)
    logarithm = eye * scale.log() - 2 ** len(_ITERATIONS) * series
    return torch.where(sound, logarithm, torch.nan)


_ITERATIONS = (30, 19, 13, 10, 8, 7)
"""Of each root: a root's least eigenvalue is the square root of that before."""


def compiled(name: str, pipeline: Pipeline, X: np.ndarray, y: np.ndarray) -> CovarianceDecoder:
    """The module that computes what `pipeline`, fitted on X (trials, channels, times) and y (0 ... K - 1), computes."""
    band, basis = pipeline["bandpass"], pipeline["fullrank"].basis_
    more = {"components": int(pipeline["quietcsp"].n_components)} if name == "CSP+LDA" else {}
    if more and more["components"] > basis.shape[1]:
        more["components"] = basis.shape[1]
    made = DECODERS[name](
        n_chans=X.shape[1], n_outputs=int(y.max()) + 1, n_times=X.shape[2], sfreq=band.sfreq, rank=basis.shape[1],
        learnt=len(X), band=(band.low, band.high), **more,
    )  # fmt: skip
    _fill(made, basis=basis, labels=y)
    with torch.no_grad():
        made.learnt.copy_(made.covariances(torch.as_tensor(np.asarray(X))))
    made.take(pipeline[2:])
    return made.eval()


def surrogates(covariances: np.ndarray, n_times: int) -> np.ndarray:
    """Signals (n, channels, n_times) of mean zero with these covariances, for estimators that take signals.

    sqrt(T) C^(1/2) Q, the rows of Q being cosines that are orthonormal to each other and to the constant.
    """
    size = covariances.shape[1]
    if size >= n_times:
        raise UserError(f"{size} directions of signal need more than {n_times} samples a trial; use longer windows")
    k, t = np.arange(1, size + 1)[:, None], np.arange(n_times) + 0.5
    cosines = np.sqrt(2 / n_times) * np.cos(np.pi * k * t / n_times)
    values, vectors = np.linalg.eigh(covariances)
    roots = (vectors * np.sqrt(np.maximum(values, 0))[:, None]) @ vectors.swapaxes(1, 2)
    return np.sqrt(n_times) * roots @ cosines


def _fill(module: nn.Module, **values: np.ndarray) -> None:
    for name, value in values.items():
        getattr(module, name).copy_(torch.from_numpy(np.ascontiguousarray(value)))
