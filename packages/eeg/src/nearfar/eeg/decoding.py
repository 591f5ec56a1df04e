"""Training a network on trials, and the decoder folder that predicts from recordings on its own."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import lightning.pytorch as pl
import mne
import numpy as np
import torch
import torch.nn.functional as F
from pyriemann.utils.mean import mean_covariance
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nearfar.core.errors import UserError
from nearfar.core.fingerprint import data_digest
from nearfar.core.finite import check_finite
from nearfar.core.training import data_loader, train
from nearfar.eeg.alignment import inverse_root
from nearfar.eeg.decoder import predict_logits
from nearfar.eeg.models.baselines import classical, network
from nearfar.eeg.models.covariances import compiled, surrogates


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The defaults are AGTCNet's published recipe.

    Adam at `learning_rate` (`fine_tune_learning_rate` in fine-tuning) without weight decay, batches of `batch_size`,
    `objective`; the learning rate falls by `factor` after `plateau` epochs without a better validation loss, down
    to `min_learning_rate`;
    training stops after `patience` epochs without a better validation accuracy, at the latest after `epochs`, and
    the best epoch's weights stay.

    network: one of `models.baselines.network`, or TangentSpace, MDM, CSP+LDA, which take nothing else from here.
    objective: "cross-entropy", or "published": cross-entropy too, but for two classes the binary cross-entropy of the
    logits' sigmoids, the mean over both outputs, which is what the authors' logged losses of two classes are.
    """

    network: str = "AGTCNet"
    learning_rate: float = 1e-3
    batch_size: int = 32
    epochs: int = 1000
    patience: int = 300
    factor: float = 0.9
    plateau: int = 10
    min_learning_rate: float = 1e-4
    fine_tune_learning_rate: float = 5e-4
    seed: int = 0
    objective: str = "cross-entropy"

    def __post_init__(self) -> None:
        if self.objective not in ("cross-entropy", "published"):
            raise ValueError(f"objective must be cross-entropy or published, got {self.objective!r}")
        for name in ("learning_rate", "fine_tune_learning_rate", "batch_size", "epochs", "patience", "plateau"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must lie between 0 and 1, got {self.factor}")


def loss(objective: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of logits (trials, classes) under an objective of `Recipe`."""
    if objective == "published" and logits.shape[1] == 2:
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 2).to(logits))
    return F.cross_entropy(logits, labels)


class _ByLogits(ClassifierMixin, BaseEstimator):
    """Answers by `_logits`, (trials, classes) of trials in microvolts, and `classes_`."""

    classes_: np.ndarray

    def _logits(self, X: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities (trials, classes)."""
        return torch.from_numpy(self._logits(X)).softmax(1).numpy()

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The most probable class of each trial."""
        return self.classes_[self._logits(X).argmax(1)]


class NetworkClassifier(_ByLogits):
    """Any of the package's networks as a scikit-learn classifier, trained by the shared Lightning engine.

    Trials X are (trials, channels, times) in microvolts, or MNE epochs, which bring their `info` along. scikit-learn's
    cross-validation, calibration and grid search, and MOABB's evaluations, take it as it is; the fields of the recipe
    are parameters too (`recipe__learning_rate`).

    Parameters
    ----------
    recipe: how to train; None takes `Recipe()`.
    info: the trials' `mne.Info`; gives channel names, positions and the sampling rate to networks that use them.
    folder: where the run is kept, so that an interrupted `fit` goes on where it was. Default: nowhere.
    device: "auto", "cpu", "cuda" or "mps".
    fresh: forget what `folder` holds.

    Attributes after `fit`: `network_`, `classes_`, `history_` (per epoch: losses, accuracies, learning rate).
    """

    uses_validation = True

    def __init__(
        self,
        recipe: Recipe | None = None,
        info: mne.Info | None = None,
        folder: str | Path | None = None,
        device: str = "auto",
        show_progress: bool = False,
        fresh: bool = False,
    ) -> None:
        self.recipe = recipe
        self.info = info
        self.folder = folder
        self.device = device
        self.show_progress = show_progress
        self.fresh = fresh

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        return tags

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters, with `deep` also the recipe's fields as `recipe__...`."""
        given = super().get_params(deep=False)
        return given | ({f"recipe__{k}": value for k, value in asdict(self._recipe).items()} if deep else {})

    def set_params(self, **params: Any) -> Self:
        """Set parameters; a field of the recipe makes a new recipe, so that none is shared between classifiers."""
        named = {name: value for name, value in params.items() if not name.startswith("recipe__")}
        changes = {name.removeprefix("recipe__"): value for name, value in params.items() if name not in named}
        unknown = sorted(set(changes) - set(asdict(Recipe())))
        if unknown:
            raise ValueError(f"Invalid parameter {unknown[0]!r} of a recipe; it has {', '.join(asdict(Recipe()))}")
        super().set_params(**named)
        if changes:
            self.recipe = replace(self._recipe, **changes)
        return self

    @property
    def _recipe(self) -> Recipe:
        return Recipe() if self.recipe is None else self.recipe

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray | None = None,
        X_val: np.ndarray | None = None,
        y_val: np.ndarray | None = None,
        monitor: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Self:
        """Train on X (trials, channels, times) in microvolts with labels y; for epochs, without y, the names of their
        events.

        X_val, y_val: the validation set that steers the learning rate, the stop and the choice of weights; without
        one, training runs for `epochs` and keeps the last weights. monitor: trials (X, y) whose accuracy per epoch
        is recorded in `history_` as `test_accuracy` and steers nothing.
        """
        info = X.info if isinstance(X, mne.BaseEpochs) and self.info is None else self.info
        X, y = self._labelled(X, y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise UserError(f"training needs trials of at least two classes, all {len(y)} are of one")
        torch.manual_seed(self._recipe.seed)
        self.network_ = network(
            self._recipe.network,
            n_chans=X.shape[1],
            n_outputs=len(self.classes_),
            n_times=X.shape[2],
            sfreq=None if info is None else float(info["sfreq"]),
            chs_info=None if info is None else info["chs"],
        )
        return self._train(self._recipe.learning_rate, X, y, X_val, y_val, monitor, {})

    def fine_tune(
        self,
        X: np.ndarray,
        y: np.ndarray | None = None,
        X_val: np.ndarray | None = None,
        y_val: np.ndarray | None = None,
        monitor: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Self:
        """Like `fit`, but all weights start from what they are; the learning rate is `fine_tune_learning_rate`."""
        check_is_fitted(self, "network_")
        start = {"starting weights": data_digest(self.network_.state_dict())}
        X, y = self._labelled(X, y)
        return self._train(self._recipe.fine_tune_learning_rate, X, y, X_val, y_val, monitor, start)

    def _train(
        self,
        learning_rate: float,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray | None,
        y_val: np.ndarray | None,
        monitor: tuple[np.ndarray, np.ndarray] | None,
        data: dict[str, str],
    ) -> Self:
        recipe = self._recipe
        trials = self._trials(X, y)
        validation = [self._trials(X_val, y_val)] if X_val is not None and y_val is not None else []
        watched = [self._trials(*monitor)] if monitor is not None else []
        names = ["val"] * len(validation) + ["test"] * len(watched)
        loader = data_loader(
            trials,
            recipe.batch_size,
            shuffle=True,
            seed=recipe.seed,
            drop_last=len(trials) % recipe.batch_size == 1,  # batch norm needs more than one trial
        )
        self.history_ = train(
            _Training(self.network_, recipe, learning_rate, names),
            loader,
            [data_loader(part, 256) for part in (*validation, *watched)] or None,
            epochs=recipe.epochs,
            monitor="val_accuracy" if validation else None,
            patience=recipe.patience,
            seed=recipe.seed,
            folder=self.folder,
            settings=asdict(recipe),
            data=data,
            fresh=self.fresh,
            show_progress=self.show_progress,
            device=self.device,
        )
        self.network_.cpu().eval()
        check_finite(predict_logits(self.network_, X[: recipe.batch_size]), "training diverged: the trained scores")
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Logits (trials, classes); of two classes that of the second less that of the first (trials,)."""
        logits = self._logits(X)
        return logits if len(self.classes_) > 2 else logits[:, 1] - logits[:, 0]

    def _logits(self, X: np.ndarray) -> np.ndarray:
        check_is_fitted(self, "network_")
        X = _microvolts(X)
        channels, times = self.network_.n_chans, self.network_.n_times
        if X.shape[1:] != (channels, times):
            raise ValueError(f"X has shape {X.shape}, the classifier was fitted on (trials, {channels}, {times})")
        return predict_logits(self.network_, X)

    def _labelled(self, X: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if y is None and isinstance(X, mne.BaseEpochs):
            names = {code: name for name, code in X.event_id.items()}
            y = np.array([names[code] for code in X.events[:, 2]])
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        X, y = _microvolts(X), np.asarray(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1 or len(y) != len(X):
            raise ValueError(f"y must hold one label for each of {len(X)} trials, it has shape {y.shape}")
        return X, y

    def _trials(self, X: np.ndarray, y: np.ndarray) -> TensorDataset:
        X, y = self._labelled(X, y)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise UserError(f"the validation or test trials hold classes that the training trials lack: {unknown}")
        return TensorDataset(
            torch.as_tensor(np.ascontiguousarray(X, dtype=np.float32)),
            torch.as_tensor(np.searchsorted(self.classes_, y)),
        )


class CovarianceClassifier(_ByLogits):
    """A decoder of covariances (`models.covariances.DECODERS`) as a scikit-learn classifier, which selects nothing.

    `fine_tune` adapts it to another session: the covariances that it learnt from are moved so that their Riemannian
    mean becomes that of the new trials (Zanini et al. 2018), and it is fitted anew on both together. Directions of
    signal stay those of the first trials.

    Attributes after `fit`: `network_`, `classes_`, `history_` (empty).
    """

    def __init__(self, name: str = "TangentSpace", sfreq: float = 250.0, seed: int = 0) -> None:
        self.name, self.sfreq, self.seed = name, sfreq, seed

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        """Fit on trials X (trials, channels, times) in microvolts."""
        X = _microvolts(X)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError(f"training needs trials of at least two classes, all {len(y)} are of one")
        pipeline = classical(self.sfreq)[self.name](self.seed).fit(X, codes)
        self.network_ = compiled(self.name, pipeline, X, codes)
        self.history_: list[dict[str, float]] = []
        check_finite(self._logits(X), "the trained scores")
        return self

    def fine_tune(self, X: np.ndarray, y: np.ndarray) -> Self:
        """Adapt to trials of a new session."""
        check_is_fitted(self, "network_")
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise UserError(f"the new trials hold classes that the decoder lacks: {unknown}")
        network, codes = cast(Any, self.network_), np.searchsorted(self.classes_, y)
        new = network.covariances(torch.as_tensor(_microvolts(X))).numpy()
        old = network.learnt.numpy()
        means = [mean_covariance(network.shrunk(torch.from_numpy(part)).numpy()) for part in (old, new)]
        values, vectors = np.linalg.eigh(means[1])
        move = (vectors * np.sqrt(values)) @ vectors.T @ inverse_root(means[0])
        learnt = np.concatenate([move @ old @ move.T, new])
        labels = np.concatenate([network.labels.numpy(), codes])
        tail = classical(self.sfreq)[self.name](self.seed)[2:]
        tail.fit(surrogates(learnt, network.n_times), labels)
        adapted = type(network).from_config(network.get_config() | {"learnt": len(learnt)})
        for name, value in (("basis", network.basis), ("learnt", learnt), ("labels", labels)):
            getattr(adapted, name).copy_(torch.as_tensor(value))
        adapted.take(tail)
        self.network_ = adapted.eval()
        check_finite(self._logits(X), "the adapted scores")
        return self

    def _logits(self, X: np.ndarray) -> np.ndarray:
        check_is_fitted(self, "network_")
        return predict_logits(self.network_, _microvolts(X))


def _microvolts(X: np.ndarray | mne.BaseEpochs) -> np.ndarray:
    """Trials (trials, channels, times) in microvolts; ValueError for another shape and for what is not finite."""
    X = X.get_data(copy=False) * 1e6 if isinstance(X, mne.BaseEpochs) else np.asarray(X)
    if X.ndim != 3:
        raise ValueError(f"X must have the shape (trials, channels, times), not {X.shape}")
    if not np.isfinite(X).all():
        raise ValueError("Input X contains NaN or infinity.")
    return X


class _Training(pl.LightningModule):
    """Training of one network; `names` are those of the validation loaders ("val", "test")."""

    def __init__(self, network: nn.Module, recipe: Recipe, learning_rate: float, names: list[str]) -> None:
        super().__init__()
        self.network, self.recipe, self.learning_rate, self.names = network, recipe, learning_rate, names

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._measure(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure(batch, self.names[dataloader_idx])

    def _measure(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        trials, labels = batch
        logits = self.network(trials)
        mean = loss(self.recipe.objective, logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict(
            {f"{name}_loss": mean, f"{name}_accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            batch_size=len(labels),
            add_dataloader_idx=False,
        )
        return mean

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        if "val" not in self.names:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=recipe.factor, patience=recipe.plateau, min_lr=recipe.min_learning_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}
