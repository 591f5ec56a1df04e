"""A decoder in ONNX, without torch: what a device runs.

    python -m nearfar.eeg.live.client decoder.onnx RECORDING [--every 0.1]

prints a line for each command. In a program of one's own:

    decoder = OnnxDecoder("decoder.onnx")
    stream = StreamDecoder.live(decoder, step=16, rate=160, ch_names=[...], rule=Rule(threshold=decoder.threshold))
    decisions = stream.push(samples)  # (channels, times) in microvolts, any number
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.reading import reading
from nearfar.eeg.live.sources import FileSource
from nearfar.eeg.live.stream import Rule, StreamDecoder
from nearfar.eeg.preprocessing import Preprocessing


class OnnxDecoder:
    """What `export.export_decoder` wrote, with what `StreamDecoder.live` needs of a decoder."""

    def __init__(self, path: str | Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("ONNX files need onnxruntime: pip install 'nearfar-eeg[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        with reading(path, "cannot be read as an exported decoder"):
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            about: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map["nearfar"])
            self.classes, self.ch_names, self.sfreq = about["classes"], about["ch_names"], float(about["sfreq"])
            self.network = SimpleNamespace(n_times=int(about["n_times"]))
            self.metrics: dict[str, Any] = about["metrics"]
            self.preprocessing = Preprocessing.from_dict(about["preprocessing"])
        reference = self.preprocessing.reference
        self.recorded = self.ch_names + (list(reference) if isinstance(reference, tuple) else [])

    @property
    def threshold(self) -> float:
        """The decoder's own, 0 without one."""
        return float(self.metrics.get("threshold", {}).get("threshold", 0.0))

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities of prepared windows (n, channels, times) in microvolts."""
        return np.asarray(self._session.run(None, {"windows": np.asarray(X, np.float32)})[0])


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Decode a recording with an exported decoder, as if it came live.")
    parser.add_argument("decoder", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--every", type=float, default=0.1, help="seconds from one window to the next")
    given = parser.parse_args(arguments)
    decoder, source = OnnxDecoder(given.decoder), FileSource(given.recording, speed=np.inf)
    stream = StreamDecoder.live(
        decoder, max(1, round(given.every * decoder.sfreq)), rate=source.rate, ch_names=source.ch_names,
        unit=source.unit, rule=Rule(threshold=decoder.threshold), batch_size=1,
    )  # fmt: skip
    while (chunk := source.read()) is not None:
        decisions = stream.push(chunk.samples)
        for at, command in zip(decisions.times, decisions.commands):
            if command >= 0:
                print(f"{at:8.2f} s  {decoder.classes[command]}", flush=True)


if __name__ == "__main__":
    main()
