"""Training a network on trials, and the decoder folder that predicts from recordings on its own."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import mne
import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import file_digest, write_json
from nearfar.core.training import data_loader, environment, train
from nearfar.eeg.baselines import network, network_class
from nearfar.eeg.conventions import standard_montage
from nearfar.eeg.preprocessing import Preprocessing


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The defaults are AGTCNet's published recipe.

    Adam at `lr` (`fine_tune_lr` in fine-tuning) without weight decay, batches of `batch_size`, cross-entropy; the
    learning rate falls by `lr_factor` after `lr_patience` epochs without a better validation loss, down to `min_lr`;
    training stops after `patience` epochs without a better validation accuracy, at the latest after `max_epochs`, and
    the best epoch's weights stay.
    """

    network: str = "AGTCNet"
    lr: float = 1e-3
    batch_size: int = 32
    max_epochs: int = 1000
    patience: int = 300
    lr_factor: float = 0.9
    lr_patience: int = 10
    min_lr: float = 1e-4
    fine_tune_lr: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "fine_tune_lr", "batch_size", "max_epochs", "patience", "lr_patience"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"lr_factor must lie between 0 and 1, got {self.lr_factor}")


class NetworkClassifier(ClassifierMixin, BaseEstimator):
    """Any of the package's networks as a scikit-learn classifier, trained by the shared Lightning engine.

    Parameters
    ----------
    recipe: how to train.
    info: the trials' `mne.Info`; gives channel names, positions and the sampling rate to networks that use them.
    folder: where the run is kept, so that an interrupted `fit` goes on where it was. Default: nowhere.
    accelerator: "auto", "cpu", "cuda" or "mps".

    Attributes after `fit`: `network_`, `classes_`, `history_` (per epoch: losses, accuracies, learning rate).
    """

    uses_validation = True

    def __init__(
        self,
        recipe: Recipe = Recipe(),
        info: mne.Info | None = None,
        folder: str | Path | None = None,
        accelerator: str = "auto",
        show_progress: bool = False,
    ) -> None:
        self.recipe = recipe
        self.info = info
        self.folder = folder
        self.accelerator = accelerator
        self.show_progress = show_progress

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
        one, training runs for `max_epochs` and keeps the last weights. monitor: trials (X, y) whose accuracy per epoch
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
        return self._train(self.recipe.lr, X, y, X_val, y_val, monitor)

    def fine_tune(
        self,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray | None = None,
        y_val: np.ndarray | None = None,
        monitor: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Self:
        """Like `fit`, but all weights start from what they are and the learning rate is `recipe.fine_tune_lr`."""
        check_is_fitted(self, "network_")
        return self._train(self.recipe.fine_tune_lr, X, y, X_val, y_val, monitor)

    def _train(
        self,
        lr: float,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray | None,
        y_val: np.ndarray | None,
        monitor: tuple[np.ndarray, np.ndarray] | None,
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
            _Training(self.network_, recipe, lr, names),
            loader,
            [data_loader(part, 256) for part in (*validation, *watched)] or None,
            max_epochs=recipe.max_epochs,
            monitor="val_accuracy" if validation else None,
            patience=recipe.patience,
            seed=recipe.seed,
            folder=self.folder,
            settings={**asdict(recipe), "data": _digest(X, y, X_val, y_val)},
            show_progress=self.show_progress,
            accelerator=self.accelerator,
            devices=1,
        )
        self.network_.cpu().eval()
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


@torch.no_grad()
def predict_logits(model: nn.Module, X: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Logits (trials, classes) of `model` for X (trials, channels, times), on the model's device, in eval mode."""
    device = next(model.parameters()).device
    parts = torch.as_tensor(np.ascontiguousarray(X, dtype=np.float32)).split(batch_size)
    training = model.training
    model.eval()
    logits = torch.cat([model(part.to(device)).float().cpu() for part in parts])
    model.train(training)
    return logits.numpy()


class _Training(pl.LightningModule):
    """Cross-entropy training of one network; `names` are those of the validation loaders ("val", "test")."""

    def __init__(self, network: nn.Module, recipe: Recipe, lr: float, names: list[str]) -> None:
        super().__init__()
        self.network, self.recipe, self.lr, self.names = network, recipe, lr, names

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._measure(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure(batch, self.names[dataloader_idx])

    def _measure(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        trials, labels = batch
        logits = self.network(trials)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict(
            {f"{name}_loss": loss, f"{name}_accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            batch_size=len(labels),
            add_dataloader_idx=False,
        )
        return loss

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if "val" not in self.names:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=recipe.lr_factor, patience=recipe.lr_patience, min_lr=recipe.min_lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def _digest(*arrays: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass
class Decoder:
    """A trained network with all it needs to predict: montage, preprocessing, classes.

    A decoder folder holds `config.json` and `model.safetensors` (the network; braindecode's `from_pretrained` reads
    them too) and `decoder.json` (the rest, and how it was trained).
    """

    network: nn.Module
    classes: list[str]
    preprocessing: Preprocessing
    ch_names: list[str]
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def sfreq(self) -> float:
        """Sampling rate of the trials, Hz."""
        return float(self.training["sfreq"])

    @property
    def info(self) -> mne.Info:
        """Channels, positions (where the 10-05 system has them) and rate as MNE's Info."""
        info = mne.create_info(self.ch_names, self.sfreq, "eeg")
        return info.set_montage(standard_montage(), on_missing="ignore", verbose="ERROR")

    def save(self, folder: str | Path) -> Path:
        """Write the decoder into `folder`; what else is there stays. `decoder.json` comes last, so a folder that has
        one is complete."""
        folder = Path(folder)
        (folder / "decoder.json").unlink(missing_ok=True)
        write_json(folder / "config.json", self.network.get_config())
        weights = save_state_dict(self.network, folder / "model.safetensors")
        write_json(
            folder / "decoder.json",
            {
                "format": 1,
                "network": type(self.network).__name__,
                "weights": file_digest(weights),
                "classes": self.classes,
                "ch_names": self.ch_names,
                "preprocessing": self.preprocessing.to_dict(),
                "training": self.training,
                "metrics": self.metrics,
                "environment": environment(),
            },
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a decoder folder. Raises UserError where it is none, or is damaged."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "decoder.json").read_text(encoding="utf-8"))
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if file_digest(folder / "model.safetensors") != description["weights"]:
                raise UserError(f"{folder}: model.safetensors is not the file that decoder.json describes")
            model = network_class(description["network"]).from_config(config)
            load_state_dict(model, read_state_dict(folder / "model.safetensors"))
            return cls(
                model.eval(),
                description["classes"],
                Preprocessing.from_dict(description["preprocessing"]),
                description["ch_names"],
                description["training"],
                description["metrics"],
            )
        except FileNotFoundError as error:
            raise UserError(f"{folder}: is no decoder folder, it lacks {Path(error.filename).name}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: damaged decoder folder ({type(error).__name__}: {error})") from error

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities (trials, classes) of X (trials, channels, times): preprocessed, in microvolts."""
        if X.shape[1:] != (len(self.ch_names), self.network.n_times):
            raise UserError(
                f"the decoder takes {len(self.ch_names)} channels x {self.network.n_times} samples, "
                f"these trials have {X.shape[1]} x {X.shape[2]}"
            )
        return torch.from_numpy(predict_logits(self.network, X)).softmax(1).numpy()
