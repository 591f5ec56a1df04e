"""Training a network on trials, and the decoder folder that predicts from recordings on its own."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import mne
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nearfar.core.errors import UserError
from nearfar.core.fingerprint import data_digest
from nearfar.core.finite import check_finite
from nearfar.core.training import data_loader, train
from nearfar.eeg.decoder import predict_logits
from nearfar.eeg.models.baselines import network


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The defaults are AGTCNet's published recipe.

    Adam at `learning_rate` (`fine_tune_learning_rate` in fine-tuning) without weight decay, batches of `batch_size`,
    `objective`; the learning rate falls by `factor` after `plateau` epochs without a better validation loss, down
    to `min_learning_rate`;
    training stops after `patience` epochs without a better validation accuracy, at the latest after `epochs`, and
    the best epoch's weights stay.

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


class NetworkClassifier(ClassifierMixin, BaseEstimator):
    """Any of the package's networks as a scikit-learn classifier, trained by the shared Lightning engine.

    Parameters
    ----------
    recipe: how to train.
    info: the trials' `mne.Info`; gives channel names, positions and the sampling rate to networks that use them.
    folder: where the run is kept, so that an interrupted `fit` goes on where it was. Default: nowhere.
    device: "auto", "cpu", "cuda" or "mps".
    fresh: forget what `folder` holds.

    Attributes after `fit`: `network_`, `classes_`, `history_` (per epoch: losses, accuracies, learning rate).
    """

    uses_validation = True

    def __init__(
        self,
        recipe: Recipe = Recipe(),
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

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray | None = None,
        y_val: np.ndarray | None = None,
        monitor: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Self:
        """Train on X (trials, channels, times) in microvolts with labels y.

        X_val, y_val: the validation set that steers the learning rate, the stop and the choice of weights; without
        one, training runs for `epochs` and keeps the last weights. monitor: trials (X, y) whose accuracy per epoch
        is recorded in `history_` as `test_accuracy` and steers nothing.
        """
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise UserError(f"training needs trials of at least two classes, all {len(y)} are of one")
        torch.manual_seed(self.recipe.seed)
        self.network_ = network(
            self.recipe.network,
            n_chans=X.shape[1],
            n_outputs=len(self.classes_),
            n_times=X.shape[2],
            sfreq=None if self.info is None else float(self.info["sfreq"]),
            chs_info=None if self.info is None else self.info["chs"],
        )
        return self._train(self.recipe.learning_rate, X, y, X_val, y_val, monitor, {})

    def fine_tune(
        self,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray | None = None,
        y_val: np.ndarray | None = None,
        monitor: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Self:
        """Like `fit`, but all weights start from what they are; the learning rate is `fine_tune_learning_rate`."""
        check_is_fitted(self, "network_")
        start = {"starting weights": data_digest(self.network_.state_dict())}
        return self._train(self.recipe.fine_tune_learning_rate, X, y, X_val, y_val, monitor, start)

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
        recipe = self.recipe
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
            devices=1,
        )
        self.network_.cpu().eval()
        check_finite(predict_logits(self.network_, X[: recipe.batch_size]), "training diverged: the trained scores")
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Logits (trials, classes) of X (trials, channels, times) in microvolts."""
        check_is_fitted(self, "network_")
        return predict_logits(self.network_, X)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities (trials, classes)."""
        return torch.from_numpy(self.decision_function(X)).softmax(1).numpy()

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The most probable class of each trial."""
        return self.classes_[self.decision_function(X).argmax(1)]

    def _trials(self, X: np.ndarray, y: np.ndarray) -> TensorDataset:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise UserError(f"the validation or test trials hold classes that the training trials lack: {unknown}")
        return TensorDataset(
            torch.as_tensor(np.ascontiguousarray(X, dtype=np.float32)),
            torch.as_tensor(np.searchsorted(self.classes_, y)),
        )


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
