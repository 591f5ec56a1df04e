"""What AGTCNet is compared with: spatial patterns, Riemannian geometry, and the networks of braindecode by name.

The classical decoders are scikit-learn estimators of trials (n, channels, times). Each filters its trials to its own
band, since they work on power in a band whatever the preprocessing left. Directions without signal, such as the one
that an average reference removes or those of interpolated channels, are dropped first, and covariances are shrunk.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import braindecode.models
import mne
import numpy as np
import torch
from pyriemann.classification import MDM
from pyriemann.estimation import Covariances
from pyriemann.spatialfilters import CSP
from pyriemann.tangentspace import TangentSpace
from scipy.signal import butter, sosfiltfilt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectKBest, mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from nearfar.core.errors import UserError
from nearfar.eeg.alignment import mean_covariance
from nearfar.eeg.models.agtcnet import AGTCNet
from nearfar.eeg.models.covariances import DECODERS

MU_BETA = (8.0, 30.0)
"""The band of the sensorimotor rhythms, Hz."""

FILTER_BANK = tuple((float(low), float(low + 4)) for low in range(4, 40, 4))
"""The nine bands of FBCSP, 4-8 ... 36-40 Hz."""


class Bandpass(TransformerMixin, BaseEstimator):
    """Butterworth band-pass of order 4, forward and backward, along each trial (n, channels, times)."""

    def __init__(self, sfreq: float, low: float, high: float) -> None:
        self.sfreq, self.low, self.high = sfreq, low, high

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Nothing is learnt; `UserError` where the band does not lie below half of the sampling rate."""
        if self.high >= self.sfreq / 2:
            raise UserError(
                f"{self.low:g}-{self.high:g} Hz does not fit below half of the sampling rate of {self.sfreq:g} Hz; "
                "choose a lower band"
            )
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """The filtered trials, float64, of the same shape."""
        sos = butter(4, (self.low, self.high), "bandpass", fs=self.sfreq, output="sos")
        return sosfiltfilt(sos, np.asarray(X, float), axis=-1, padlen=min(3 * 9, X.shape[-1] - 1))

    def __sklearn_is_fitted__(self) -> bool:
        return True


class FullRank(TransformerMixin, BaseEstimator):
    """Trials (n, channels, times) in an orthonormal basis of the directions that hold signal: (n, rank, times).

    Directions with less than `tolerance` of the largest variance in the training trials are dropped.
    """

    def __init__(self, tolerance: float = 1e-9) -> None:
        self.tolerance = tolerance

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Find `basis_` (channels, rank); `UserError` for trials without any signal."""
        values, vectors = np.linalg.eigh(mean_covariance(np.asarray(X)))
        self.basis_ = vectors[:, values > self.tolerance * max(values[-1], 0.0)]
        if not self.basis_.shape[1]:
            raise UserError("the training trials are flat in every channel")
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """The trials' coordinates."""
        return self.basis_.T.astype(X.dtype) @ X


class QuietCSP(mne.decoding.CSP):
    """MNE's `CSP` without its messages."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        """See MNE."""
        with mne.use_log_level("ERROR"):
            return super().fit(X, y)


class FilterBankCovariances(TransformerMixin, BaseEstimator):
    """Trials to shrunk covariances per band: (n, channels, times) -> (n, bands, channels, channels), of trace 1."""

    def __init__(self, sfreq: float, bands: Sequence[tuple[float, float]] = FILTER_BANK) -> None:
        self.sfreq, self.bands = sfreq, bands

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Nothing is learnt; bands that reach half of the sampling rate are left out, which `bands_` tells."""
        self.bands_ = [band for band in self.bands if band[1] < self.sfreq / 2]
        if not self.bands_:
            raise UserError(f"none of the bands fits below half of the sampling rate of {self.sfreq:g} Hz")
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """One band at a time, so that memory holds one filtered copy of the trials."""
        covariances = [Covariances("oas").transform(Bandpass(self.sfreq, *b).transform(X)) for b in self.bands_]
        stacked = np.stack(covariances, axis=1)
        return stacked / np.trace(stacked, axis1=-2, axis2=-1)[..., None, None]


class FilterBankPatterns(TransformerMixin, BaseEstimator):
    """Common spatial patterns in every band: covariances (n, bands, c, c) -> log variances (n, bands * n_filters)."""

    def __init__(self, n_filters: int = 4) -> None:
        self.n_filters = n_filters

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        """Fit pyriemann's `CSP` in each band."""
        self.patterns_ = [CSP(self.n_filters, log=True).fit(X[:, band], y) for band in range(X.shape[1])]
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """The features of all bands, side by side."""
        return np.concatenate([csp.transform(X[:, band]) for band, csp in enumerate(self.patterns_)], axis=1)


class MutualInformation(TransformerMixin, BaseEstimator):
    """Keeps the `n_features` features that share most information with the class (all, if there are fewer)."""

    def __init__(self, n_features: int = 8, seed: int = 0) -> None:
        self.n_features, self.seed = n_features, seed

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        """Estimate the information with as many neighbours, up to 3, as the smallest class has."""
        neighbours = max(1, min(3, np.unique(y, return_counts=True)[1].min() - 1))

        def information(X: np.ndarray, y: np.ndarray) -> np.ndarray:
            return mutual_info_classif(X, y, n_neighbors=neighbours, random_state=self.seed)

        self.selector_ = SelectKBest(information, k=min(self.n_features, X.shape[1])).fit(X, y)
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """The kept features."""
        return self.selector_.transform(X)


def csp_lda(sfreq: float, n_components: int = 6, band: tuple[float, float] = MU_BETA) -> Pipeline:
    """MNE's common spatial patterns on shrunk covariances, log power, linear discriminant analysis."""
    csp = QuietCSP(n_components, reg="oas", log=True, rank="full")
    return make_pipeline(FullRank(), Bandpass(sfreq, *band), csp, LinearDiscriminantAnalysis())


def csp_patterns(fitted: Pipeline) -> np.ndarray:
    """The spatial patterns (components, channels) of a fitted `csp_lda`, the most informative first."""
    csp = fitted["quietcsp"]
    return (fitted["fullrank"].basis_ @ csp.patterns_[: csp.n_components].T).T


def fbcsp(sfreq: float, n_filters: int = 4, n_features: int = 8, seed: int = 0) -> Pipeline:
    """Filter-bank common spatial patterns (Ang et al. 2008): nine bands, selection by mutual information, then LDA.

    Each class is told from the rest. Features are selected one by one; the paper also takes the partner of each.
    """
    selection = MutualInformation(n_features, seed)
    binary = make_pipeline(FilterBankPatterns(n_filters), selection, LinearDiscriminantAnalysis())
    return make_pipeline(FullRank(), FilterBankCovariances(sfreq), OneVsRestClassifier(binary))


def tangent_space(sfreq: float, band: tuple[float, float] = MU_BETA) -> Pipeline:
    """Covariances projected to the tangent space at their Riemannian mean, then logistic regression."""
    steps = (Bandpass(sfreq, *band), Covariances("oas"), TangentSpace(), LogisticRegression(max_iter=1000))
    return make_pipeline(FullRank(), *steps)


def minimum_distance(sfreq: float, band: tuple[float, float] = MU_BETA) -> Pipeline:
    """The class whose mean covariance is nearest in Riemannian distance."""
    return make_pipeline(FullRank(), Bandpass(sfreq, *band), Covariances("oas"), MDM())


def classical(sfreq: float) -> dict[str, Callable[[int], Pipeline]]:
    """The classical decoders by name, each as a function from a seed to the unfitted estimator (see `evaluate`)."""
    return {
        "CSP+LDA": lambda seed: csp_lda(sfreq),
        "FBCSP": lambda seed: fbcsp(sfreq, seed=seed),
        "TangentSpace": lambda seed: tangent_space(sfreq),
        "MDM": lambda seed: minimum_distance(sfreq),
    }


NETWORKS = ("AGTCNet", "EEGNet", "ATCNet", "EEGConformer", "TCFormer")
"""The networks that are compared by default; `network` also builds braindecode's others."""


def network_class(name: str) -> type[nn.Module]:
    """AGTCNet or a network of `braindecode.models` by its name; `UserError` for an unknown one."""
    known = {k: v for k, v in vars(braindecode.models).items() if isinstance(v, type) and issubclass(v, nn.Module)}
    known["AGTCNet"] = AGTCNet
    known |= {decoder.__name__: decoder for decoder in DECODERS.values()}
    if name not in known:
        raise UserError(f"there is no network {name!r}; choose one of {', '.join(sorted(known))}")
    return known[name]


def network(
    name: str,
    n_chans: int,
    n_outputs: int,
    n_times: int,
    sfreq: float | None = None,
    chs_info: list[dict[str, Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """A network by its name (see `network_class`), in the setting that its class has as default.

    Args:
        chs_info: MNE's `info["chs"]`: names and positions of the electrodes, needed by graph networks.
        options: arguments of the class, to depart from that setting.

    Raises:
        UserError: unknown name, an option that the class does not have, or trials too short for the network.
    """
    build = network_class(name)
    given = {"n_chans": n_chans, "n_outputs": n_outputs, "n_times": n_times, "sfreq": sfreq, "chs_info": chs_info}
    accepted = inspect.signature(build).parameters
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise UserError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(accepted)}")
    try:
        return build(**{key: value for key, value in given.items() if key in accepted and value is not None}, **options)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{name} cannot be built for {n_chans} channels x {n_times} samples: {str(error).splitlines()[0]}"
        ) from error


@torch.no_grad()
def reorder_outputs(model: nn.Module, order: Sequence[int]) -> None:
    """Make output `order[i]` of a network with `n_outputs` its output i, in place, by its `final_layer`.

    Raises `UserError`, and changes nothing, where that does not give the same outputs in the new order.
    """
    if list(order) == list(range(len(order))):
        return
    x = torch.randn(2, model.n_chans, model.n_times, generator=torch.Generator().manual_seed(0))
    training = model.training
    before = model.eval()(x)
    last = {n: p for n, p in model.named_parameters() if n.startswith("final_layer.") and len(p) % len(order) == 0}
    kept = {name: tensor.clone() for name, tensor in last.items()}
    for tensor in last.values():  # some networks have several heads, or groups of them
        tensor.copy_(tensor.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1))
    fits = torch.allclose(model(x), before[:, list(order)], rtol=1e-4, atol=1e-5)
    model.train(training)
    if not fits:
        for name, tensor in last.items():
            tensor.copy_(kept[name])
        raise UserError(f"{type(model).__name__}: its outputs cannot be reordered; name the classes in its order")
