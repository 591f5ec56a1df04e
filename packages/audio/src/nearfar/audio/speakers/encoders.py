"""Speaker models that others made: a network in ONNX or TorchScript, a Python function, or embeddings in a file."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nearfar.audio.sound import Samples
from nearfar.core.errors import UserError, some
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.reading import read_arrays, reading


class Encoder(Protocol):
    """What scoring needs to know of a speaker model. digest: equal where the same recording gets the same embedding."""

    @property
    def embedding_dim(self) -> int: ...

    @property
    def digest(self) -> str: ...


class ForeignEncoder(nn.Module):
    """A speaker model of any making as one that an `Embedder` takes.

    Args:
        embed: samples (n,), float32 in [-1, 1] at `sample_rate`, to a vector (E,).
        sample_rate: in Hz.
        digest: of the model; see `Encoder`.
        name: for messages and the record.

    Raises UserError where `embed` gives no vector of finite numbers for two seconds of sound.
    """

    PROBE = 2.0
    """Seconds of the sound that tells whether an encoder is still the one that a calibration was made for."""

    def __init__(self, embed: Callable[[Samples], Any], sample_rate: int, digest: str, name: str) -> None:
        super().__init__()
        if sample_rate < 4000:
            raise UserError(f"{name}: a sample rate of {sample_rate} Hz is too low for speech")
        self._embed, self.sample_rate, self.digest, self.name = embed, sample_rate, digest, name
        time = np.arange(int(self.PROBE * sample_rate)) / sample_rate
        tones = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 12)) * np.sin(2 * np.pi * 3 * time) ** 2
        self.probe = self._vector((0.1 * tones).astype(np.float32))

    @property
    def embedding_dim(self) -> int:
        return len(self.probe)

    @property
    def min_samples(self) -> int:
        """A tenth of a second: what the encoder itself needs is not known here."""
        return self.sample_rate // 10

    def forward(self, waveforms: Tensor) -> Tensor:
        """(B, N) to (B, E), one after the other."""
        found = [self._vector(samples) for samples in waveforms.cpu().numpy()]
        return torch.from_numpy(np.stack(found))

    def _vector(self, samples: Samples) -> NDArray[np.float32]:
        with reading(self.name, "cannot embed a recording", "give it the rate and the length that it needs"):
            found = self._embed(np.ascontiguousarray(samples))
            found = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
            if found.dtype.kind not in "iuf" or found.size != max(found.shape, default=0) or found.size < 2:
                raise ValueError(f"gives {found.dtype} {found.shape} for one recording, not one vector")
            if not np.isfinite(found).all():
                raise ValueError("gives numbers that are not finite")
        return found.reshape(-1).astype(np.float32)


def read_encoder(source: str, sample_rate: int | None = None) -> ForeignEncoder:
    """An encoder from `FILE.onnx`, `FILE.pt` (TorchScript) or `module:callable`.

    An ONNX file takes one input of samples, (1, N) or (N,), and runs in onnxruntime: it can only compute. A TorchScript
    file is a program, which torch's interpreter runs, and a module is Python: use what you trust. Pickled modules are
    refused. A callable takes float32 samples (n,); one whose attribute `sample_rate` is set says its rate, others, and
    files whose metadata lack `sample_rate`, are taken at `sample_rate`, by default 16000.

    Raises UserError where it cannot be read or run.
    """
    path = Path(source)
    if path.suffix.lower() == ".onnx":
        return _onnx(path, sample_rate)
    if path.suffix.lower() in (".pt", ".pth", ".ts", ".torchscript"):
        return _torchscript(path, sample_rate)
    if ":" in source and not path.exists():
        return _callable(source, sample_rate)
    raise UserError(f"{source}: is no encoder; name FILE.onnx, FILE.pt (TorchScript) or module:callable")


def _onnx(path: Path, rate: int | None) -> ForeignEncoder:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: needs onnxruntime: pip install 'nearfar-audio[onnx]'") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with reading(path, "cannot be read as an ONNX network"):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs, known = session.get_inputs(), session.get_modelmeta().custom_metadata_map
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) not in (1, 2):
            shown = [(i.name, i.type, i.shape) for i in inputs]
            raise ValueError(f"its inputs are {shown}, not one of samples (1, N) or (N,)")
        name, flat = inputs[0].name, len(inputs[0].shape) == 1
        hertz = rate or int(known.get("sample_rate", 16000))

    def embed(samples: Samples) -> Any:
        return session.run(None, {name: samples if flat else samples[None]})[0]

    return ForeignEncoder(embed, hertz, data_digest(["onnx", content_digest(path), hertz]), path.name)


def _torchscript(path: Path, rate: int | None) -> ForeignEncoder:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "is no TorchScript network", "export it by torch.jit.trace or script; pickles are not loaded"):
        network = torch.jit.load(str(path), map_location="cpu").eval()
        hertz = rate or int(getattr(network, "sample_rate", 16000))

    def embed(samples: Samples) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(samples)[None])

    return ForeignEncoder(embed, hertz, data_digest(["torchscript", content_digest(path), hertz]), path.name)


def _callable(source: str, rate: int | None) -> ForeignEncoder:
    module, _, names = source.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    with reading(source, "cannot be imported as module:callable", "see that it runs in Python"):
        found: Any = importlib.import_module(module)
        file = getattr(found, "__file__", None)
        for name in names.split("."):
            found = getattr(found, name)
        embed = found() if isinstance(found, type) else found
        if not callable(embed):
            raise TypeError(f"{names} cannot be called")
        hertz = rate or int(getattr(embed, "sample_rate", 16000))
    code = content_digest(Path(file)) if file else ""
    return ForeignEncoder(embed, hertz, data_digest(["callable", source, code, hertz]), source)


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings by name, made elsewhere.

    seconds: of speech in each, where the file says so. digest: of the encoder that the file names in `encoder`; where
    it names none, only the size of the vectors can be compared.
    """

    path: Path
    vectors: dict[str, NDArray[np.float32]]
    seconds: dict[str, float]
    digest: str
    named: bool

    @classmethod
    def read(cls, path: str | Path) -> "EmbeddingTable":
        """An .npz file with `names` and `embeddings` (and `seconds`, `encoder`), as `embed` writes it, or an array a
        name. Raises UserError where it is something else."""
        path = Path(path)
        with reading(path, "holds no embeddings", "it needs names and embeddings, or one vector for each name"):
            arrays = read_arrays(path, "embeddings")
            encoder = str(arrays.pop("encoder", ""))
            if "embeddings" in arrays:
                names, x = [str(name) for name in arrays["names"].tolist()], arrays["embeddings"]
                seconds = np.asarray(arrays.get("seconds", []), np.float64).tolist()
            else:
                names, x, seconds = list(arrays), np.stack(list(arrays.values())), []
            if x.ndim != 2 or x.dtype.kind not in "iuf" or len(x) != len(names) or x.shape[1] < 2:
                raise ValueError(f"{len(names)} names, embeddings {x.dtype} {x.shape}")
            if len(set(names)) != len(names):
                raise ValueError(f"{some([name for name in names if names.count(name) > 1], 3)} there twice")
            if bad := [name for name, row in zip(names, x) if not np.isfinite(row).all() or not row.any()]:
                raise ValueError(f"{len(bad)} vectors are zero or not finite: {some(bad, 3)}")
            if seconds and len(seconds) != len(names):
                raise ValueError(f"{len(names)} names, {len(seconds)} seconds")
        digest = encoder or f"not named, vectors of {x.shape[1]}"
        vectors = dict(zip(names, x.astype(np.float32)))
        return cls(path, vectors, dict(zip(names, seconds)), digest, bool(encoder))

    @property
    def embedding_dim(self) -> int:
        return len(next(iter(self.vectors.values())))

    def find(self, name: str) -> NDArray[np.float32]:
        """The vector of a name. Raises UserError where there is none."""
        if name not in self.vectors:
            raise UserError(f"{self.path}: has no embedding of {name}; {some(list(self.vectors), 3)} are there")
        return self.vectors[name]

    def content(self, name: str) -> str:
        """Digest of a name's vector: one content under two names has one vector."""
        return hashlib.sha256(self.find(name).tobytes()).hexdigest()
