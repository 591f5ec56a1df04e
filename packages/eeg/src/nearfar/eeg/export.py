"""A decoder as an ONNX file: prepared windows in microvolts to class probabilities; `live.client` runs it."""

import copy
import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import reason
from nearfar.eeg.decoder import Decoder
from nearfar.eeg.live.client import OnnxDecoder
from nearfar.eeg.models.covariances import CovarianceDecoder

TOLERANCE = 1e-4
"""Largest difference of a probability at which a file says what its decoder says."""


class Deployed(nn.Module):
    """Windows (n, channels, times) to probabilities (n, classes), without eigenvalues, which ONNX has not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        if isinstance(self.network, CovarianceDecoder):
            self.network.by_products = True

    def forward(self, windows: Tensor) -> Tensor:
        return self.network(windows).softmax(1)


def export_decoder(decoder: Decoder, path: str | Path, seed: int = 0) -> float:
    """Write `path` (.onnx) and give the largest difference of a probability from the decoder.

    The windows that it is measured on are noise, of alike channels and of channels that are mixed and differ by factors
    of up to 100. Classes, channels, rate, preprocessing, threshold and gate are the file's metadata. Raises UserError,
    and writes nothing, for a decoder that ONNX has no operators for, and where the file would say something else.
    """
    import onnx

    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the name must end in .onnx")
    deployed = Deployed(decoder.network.eval()).eval()
    shape = (len(decoder.ch_names), int(cast(int, decoder.network.n_times)))
    rng = np.random.default_rng(seed)
    windows = rng.normal(0, 10, (8, *shape)).astype(np.float32)
    mixing = rng.normal(size=(4, shape[0], shape[0])) / np.sqrt(shape[0])
    windows[4:] = (mixing * np.geomspace(0.1, 10, shape[0])) @ windows[4:]
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                deployed, (torch.from_numpy(windows[:2]),), dynamo=True, input_names=["windows"],
                output_names=["probabilities"], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch raises whatever the network or the tracer does
        raise UserError(f"{type(decoder.network).__name__}: cannot be exported ({reason(error)})") from error
    told = {
        "classes": decoder.classes,
        "ch_names": decoder.ch_names,
        "sfreq": decoder.sfreq,
        "n_times": shape[1],
        "preprocessing": decoder.preprocessing.to_dict(),
        "metrics": {key: decoder.metrics[key] for key in ("threshold", "gate") if key in decoder.metrics},
    }
    with atomic_path(path) as temporary:
        cast(torch.onnx.ONNXProgram, program).save(temporary)
        model = onnx.load(temporary)
        onnx.helper.set_model_props(model, {"nearfar": json.dumps(told)})
        onnx.save(model, temporary)
        ours = decoder.predict_proba(windows)
        difference = float(np.abs(OnnxDecoder(temporary).predict_proba(windows) - ours).max())
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: would differ from the decoder by {difference:.2g}; it is not written")
    return difference
