"""A decoder as an ONNX file: prepared windows in microvolts to class probabilities; `live.client` runs it."""

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
from nearfar.eeg.models.covariances import CovarianceDecoder, CSPDecoder

TOLERANCE = 1e-4
"""Largest difference of a probability at which a file says what its decoder says."""


class Deployed(nn.Module):
    """Windows (n, channels, times) to probabilities (n, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, windows: Tensor) -> Tensor:
        return self.network(windows).softmax(1)


def export_decoder(decoder: Decoder, path: str | Path, seed: int = 0) -> float:
    """Write `path` (.onnx) and give the largest difference of a probability from the decoder, on windows of noise.

    Classes, channels, rate, preprocessing, threshold and gate are its metadata. Raises UserError, and writes nothing,
    for a decoder that ONNX has no operators for (tangent space and MDM need eigenvalues), and where the file would say
    something else.
    """
    import onnx

    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the name must end in .onnx")
    if isinstance(decoder.network, CovarianceDecoder) and not isinstance(decoder.network, CSPDecoder):
        raise UserError(
            f"{type(decoder.network).__name__}: needs eigenvalues, which ONNX has no operator for; export a network or "
            "CSP+LDA, or run the decoder itself"
        )
    deployed = Deployed(decoder.network.eval()).eval()
    shape = (len(decoder.ch_names), int(cast(int, decoder.network.n_times)))
    windows = np.random.default_rng(seed).normal(0, 10, (4, *shape)).astype(np.float32)
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
