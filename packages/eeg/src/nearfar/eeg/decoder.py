"""A trained decoder in a folder: weights, preprocessing and classes together."""

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import mne
import numpy as np
import torch
from torch import nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.core.finite import check_finite
from nearfar.core.model_folder import AGAIN, KINDS, TrainedOn, read, trained_on, writing
from nearfar.core.reading import check_sizes, read_json, reading
from nearfar.eeg.conventions import standard_montage
from nearfar.eeg.models.baselines import network_class
from nearfar.eeg.preprocessing import Preprocessing


@torch.no_grad()
def predict_logits(model: nn.Module, X: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Logits (trials, classes) of `model` for X (trials, channels, times), on the model's device, in eval mode."""
    device = next(chain(model.parameters(), model.buffers())).device
    parts = torch.as_tensor(np.ascontiguousarray(X, dtype=np.float32)).split(batch_size)
    training = model.training
    model.eval()
    logits = torch.cat([model(part.to(device)).float().cpu() for part in parts])
    model.train(training)
    return logits.numpy()


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
    trained_on: TrainedOn = field(default_factory=TrainedOn)

    def __post_init__(self) -> None:
        named = getattr(self.network, "class_names", None)
        if named is not None and list(named) != list(self.classes):
            raise UserError(
                f"the network's outputs are {', '.join(named)}, the decoder's classes {', '.join(self.classes)}; "
                "reorder_classes brings the outputs into another order"
            )

    @property
    def sfreq(self) -> float:
        """Sampling rate of the trials, Hz."""
        return float(self.training["sfreq"])

    @property
    def recorded(self) -> list[str]:
        """The channels that it needs of a recording or stream: its own, and those that are its reference."""
        reference = self.preprocessing.reference
        return self.ch_names + (list(reference) if isinstance(reference, tuple) else [])

    def preprocessed(self, **changes: Any) -> Self:
        """The same decoder with other settings of its preprocessing."""
        return replace(self, preprocessing=replace(self.preprocessing, **changes))

    @property
    def info(self) -> mne.Info:
        """Channels, positions (where the 10-05 system has them) and rate as MNE's Info."""
        info = mne.create_info(self.ch_names, self.sfreq, "eeg")
        return info.set_montage(standard_montage(), on_missing="ignore", verbose="ERROR")

    def save(self, folder: str | Path) -> Path:
        """Write the decoder into `folder`; what else is there stays."""
        about = {
            "network": type(self.network).__name__,
            "classes": self.classes,
            "ch_names": self.ch_names,
            "preprocessing": self.preprocessing.to_dict(),
            "training": self.training,
            "metrics": self.metrics,
        }
        with writing(folder, "decoder", about, self.trained_on) as place:
            write_json(place / "config.json", self.network.get_config())
            save_state_dict(self.network, place / "model.safetensors")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a decoder folder. Raises UserError where it is none, or is damaged."""
        folder = Path(folder)
        description = read(folder, "decoder")
        config, weights = read_json(folder / "config.json", "settings of a network"), folder / "model.safetensors"
        check_sizes(folder / "config.json", config, weights)
        with reading(folder / "config.json", "describes no network", AGAIN):
            model = network_class(description["network"]).from_config(config)
        with reading(weights, "does not fit its description", AGAIN):
            load_state_dict(model, read_state_dict(weights))
        with reading(folder / KINDS["decoder"], "damaged", AGAIN):
            decoder = cls(
                model.eval(),
                description["classes"],
                Preprocessing.from_dict(description["preprocessing"]),
                description["ch_names"],
                description["training"],
                description["metrics"],
                trained_on(folder),
            )
            names = (decoder.classes, decoder.ch_names)
            if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names):
                raise ValueError("classes and ch_names are lists of names")
            if len(set(decoder.ch_names)) < len(decoder.ch_names):
                raise ValueError("a channel is there twice")
            if not 0 < decoder.sfreq < float("inf") or decoder.info["nchan"] != model.n_chans:
                raise ValueError(f"{len(decoder.ch_names)} channels at {decoder.sfreq:g} Hz, the network has others")
            if len(decoder.classes) != model.n_outputs:
                raise ValueError(f"{len(decoder.classes)} classes, the network has {model.n_outputs}")
            return decoder

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities (trials, classes) of X (trials, channels, times): preprocessed, in microvolts."""
        if X.shape[1:] != (len(self.ch_names), self.network.n_times):
            raise UserError(
                f"the decoder takes {len(self.ch_names)} channels x {self.network.n_times} samples, "
                f"these trials have {X.shape[1]} x {X.shape[2]}"
            )
        logits = check_finite(predict_logits(self.network, X), "the decoder's scores")
        return torch.from_numpy(logits).softmax(1).numpy()
