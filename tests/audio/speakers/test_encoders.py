"""Speaker models that others made: ONNX, TorchScript, functions and tables of embeddings."""

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.encoders import EmbeddingTable, ForeignEncoder, read_encoder
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError

RATE = 8000


class Bands(nn.Module):
    """Log energy of sixteen bands: enough of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        grid = torch.arange(256)[:, None] * (torch.arange(16) + 1) * torch.pi / 18
        self.register_buffer("kernel", (torch.cos(grid) * torch.hann_window(256)[:, None]).T[:, None])

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(samples[:, None], self.kernel, stride=128).square().mean(2).add(1e-6).log()


def plain(samples):
    with torch.inference_mode():
        return Bands()(torch.from_numpy(samples)[None])[0].numpy()


@pytest.fixture
def recording(tmp_path):
    rng = np.random.default_rng(0)
    samples = 0.1 * np.sin(np.arange(12000) * 0.2) + 0.01 * rng.standard_normal(12000)
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    return tmp_path / "a.wav"


@pytest.fixture
def files(tmp_path):
    torch.jit.trace(Bands(), torch.zeros(1, 12000)).save(str(tmp_path / "bands.pt"))
    torch.onnx.export(
        Bands(), (torch.zeros(1, 12000),), str(tmp_path / "bands.onnx"), dynamo=False,
        input_names=["samples"], dynamic_axes={"samples": {1: "n"}},
    )  # fmt: skip
    (tmp_path / "bands_of_a_test.py").write_text(
        "import numpy as np\n"
        "def embed(samples):\n"
        "    return np.abs(np.fft.rfft(samples, 64))\n"
        "embed.sample_rate = 8000\n"
        "def matrix(samples):\n    return np.ones((2, 3))\n"
        "number = 3\n"
    )
    return tmp_path


def test_files_give_what_their_network_gives(files, recording):
    for name in ("bands.pt", "bands.onnx"):
        encoder = read_encoder(str(files / name), RATE)
        assert (encoder.sample_rate, encoder.embedding_dim) == (RATE, 16)
        embed = Embedder(encoder)
        samples = soundfile.read(recording, dtype="float32")[0]
        want = plain(samples - samples.mean())
        np.testing.assert_allclose(embed(recording).embedding, want, rtol=1e-4, atol=1e-4)
        assert read_encoder(str(files / name), RATE).digest == encoder.digest
        assert read_encoder(str(files / name), 16000).digest != encoder.digest


def test_a_function_is_an_encoder(files, recording, monkeypatch):
    monkeypatch.syspath_prepend(files)
    encoder = read_encoder("bands_of_a_test:embed")
    assert (encoder.sample_rate, encoder.embedding_dim) == (8000, 33)
    assert Embedder(encoder, files / "cache")(recording).embedding.shape == (33,)
    for name, message in {"matrix": "not one vector", "number": "cannot be called", "gone": "gone"}.items():
        with pytest.raises(UserError, match=message):
            read_encoder(f"bands_of_a_test:{name}")


def test_what_is_no_encoder_is_refused(tmp_path):
    torch.save(Bands(), tmp_path / "pickle.pt")
    (tmp_path / "text.onnx").write_text("no network")
    for name, message in {
        "pickle.pt": "pickles are not loaded", "text.onnx": "ONNX", "gone.pt": "no such file", "x.bin": "is no encoder",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_encoder(str(tmp_path / name))
    with pytest.raises(UserError, match="not finite"):
        ForeignEncoder(lambda x: np.full(4, np.nan), RATE, "d", "nan")


def test_a_calibration_is_kept_for_its_encoder_alone(tmp_path):
    rng = np.random.default_rng(0)
    speakers = [f"s{n // 10}" for n in range(80)]
    x = np.repeat(rng.standard_normal((8, 16)), 10, 0) + 0.7 * rng.standard_normal((80, 16))
    encoder = ForeignEncoder(plain, RATE, "one", "bands")
    system = SpeakerSystem(encoder)
    system.calibrate(x, speakers)
    system.save(tmp_path / "own")
    again = SpeakerSystem.load(tmp_path / "own", encoder=ForeignEncoder(plain, RATE, "one", "bands"))
    np.testing.assert_allclose(again.calibration(again.scores), system.calibration(system.scores))
    for other in (
        ForeignEncoder(plain, RATE, "two", "bands"),
        ForeignEncoder(lambda s: plain(s)[::-1], RATE, "one", "changed behind its name"),
    ):
        with pytest.raises(UserError, match="another encoder"):
            SpeakerSystem.load(tmp_path / "own", encoder=other)
    with pytest.raises(UserError, match=r"bands.*--encoder"):
        SpeakerSystem.load(tmp_path / "own")


def test_tables_of_both_forms_are_read_and_others_refused(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 5))
    np.savez(tmp_path / "a.npz", names=["a", "b/1", "c d"], embeddings=x)
    np.savez(tmp_path / "b.npz", **{"a": x[0], "b/1": x[1], "c d": x[2]})
    tables = [EmbeddingTable.read(tmp_path / name) for name in ("a.npz", "b.npz")]
    for table in tables:
        np.testing.assert_allclose(table.find("b/1"), x[1], rtol=1e-6)
        assert (table.embedding_dim, table.named) == (5, False)
        with pytest.raises(UserError, match="has no embedding of x"):
            table.find("x")
    wrong = {
        "twice": {"names": ["a", "a", "b"], "embeddings": x},
        "zero or not finite": {"names": ["a", "b", "c"], "embeddings": np.r_[x[:2], [[0.0] * 5]]},
        "3 names": {"names": ["a", "b", "c"], "embeddings": x[:2]},
    }
    for message, arrays in wrong.items():
        np.savez(tmp_path / "w.npz", **arrays)
        with pytest.raises(UserError, match=message):
            EmbeddingTable.read(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", names=np.array(["a", None], object), embeddings=x[:2])
    with pytest.raises(UserError, match=r"w\.npz"):
        EmbeddingTable.read(tmp_path / "w.npz")
