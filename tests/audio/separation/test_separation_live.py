"""Live input: resampling in pieces, causal models that carry their state, pipes; memory budgets and checks."""

import io
import os
import re
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import soundfile
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfar.audio.separation.checks import check_equivalence
from nearfar.audio.separation.live import LiveSeparator, StreamResampler, WavPipe, read_pipe
from nearfar.audio.separation.memory import RESERVE, fit_window, frame_bytes
from nearfar.audio.separation.mossformer import MossFormer, MossFormer2
from nearfar.audio.separation.windows import model_separator, separate_samples
from nearfar.audio.sound import resample
from nearfar.core.errors import UserError
from nearfar.core.memory import resident_memory

RATE = 8000
RNG = np.random.default_rng(0)


def small(cls=MossFormer, **settings):
    torch.manual_seed(0)
    return cls(**{"num_filters": 16, "dim": 12, "depth": 1, "group_size": 32, "query_key_dim": 8, **settings}).eval()


def noise(*shape):
    return RNG.uniform(-0.5, 0.5, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44100, 8000), (8000, 44100), (16000, 8000), (8000, 11025), (8000, 8000)]
)
def test_resampling_in_pieces_equals_the_whole(rate, new_rate):
    sound, resampler, out, at = noise(2, rate + 7), StreamResampler(rate, new_rate), [], 0
    while at < sound.shape[1]:
        size = int(RNG.integers(0, 3000))
        out.append(resampler.push(sound[:, at : at + size]))
        at += size
    out.append(resampler.finish(2))
    np.testing.assert_allclose(np.concatenate(out, axis=1), resample(sound, rate, new_rate), atol=1e-6)


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
@pytest.mark.parametrize("block", [61, 900])
def test_a_causal_model_on_a_live_input_equals_the_whole_run(cls, block):
    extra = {"inner": 12, "order": 5} if cls is MossFormer2 else {}
    model, mix = small(cls, causal=True, **extra), noise(3001)
    live = LiveSeparator(model, RATE)
    out = [live.push(mix[a : a + block]) for a in range(0, len(mix), block)]
    with torch.no_grad():
        whole = model(torch.from_numpy(mix)[None])[0].numpy()
    np.testing.assert_allclose(np.concatenate([*out, live.finish()], axis=1), whole, atol=2e-6)
    assert live.delay == 16 / RATE
    assert live.confidence == 1


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("causal", [True, False])
def test_live_at_any_rate_gives_as_many_samples_as_it_got(rate, causal):
    live, came = LiveSeparator(small(causal=causal), rate, window=1.0), 0
    for a, size in enumerate(RNG.integers(0, rate // 4, 12)):
        came += live.push(noise(size)).shape[1]
        assert live.taken - came <= live.delay * rate + 1, a
    assert came + live.finish().shape[1] == live.taken
    assert LiveSeparator(small(causal=causal), rate).finish().shape == (2, 0)


def test_a_live_block_of_nan_is_refused():
    with pytest.raises(UserError, match="finite"):
        LiveSeparator(small(), RATE).push(np.array([0, np.nan], np.float32))


# --------------------------------------------------------------------------------------------------------------- pipes


def through_pipe(data, raw=None):
    read, write = os.pipe()

    def feed():
        with os.fdopen(write, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(read, "rb", buffering=0) as file:
        rate, blocks = read_pipe(file, raw)
        samples = list(blocks)
    thread.join()
    return rate, np.concatenate(samples) if samples else np.zeros(0), len(samples)


@pytest.mark.parametrize(("subtype", "tolerance"), [("PCM_16", 1e-4), ("PCM_24", 1e-6), ("FLOAT", 1e-7)])
def test_a_wav_comes_through_a_pipe_in_blocks(subtype, tolerance):
    sound, buffer = noise(9000, 2), io.BytesIO()
    soundfile.write(buffer, sound, 16000, subtype, format="WAV")
    rate, samples, blocks = through_pipe(buffer.getvalue())
    assert rate == 16000
    assert blocks > 3
    np.testing.assert_allclose(samples, sound.mean(1), atol=tolerance)


@pytest.mark.parametrize(("raw", "kind", "channels"), [("s16le:16000", "<i2", 1), ("f32le:44100:3", "<f4", 3)])
def test_bare_samples_come_through_a_pipe(raw, kind, channels):
    sound = noise(3000, channels)
    coded = (32768 * sound if kind == "<i2" else sound).astype(kind)
    rate, samples, _ = through_pipe(coded.tobytes(), raw)
    assert rate == int(raw.split(":")[1])
    np.testing.assert_allclose(samples, sound.mean(1), atol=1e-4)


def test_what_is_written_to_a_pipe_can_be_read_from_one():
    buffer, sound = io.BytesIO(), noise(2, 5000)
    pipe = WavPipe(buffer, RATE, 2)
    pipe.write(sound[:, :3000])
    pipe.write(sound[:, 3000:])
    rate, samples, _ = through_pipe(buffer.getvalue())
    assert rate == RATE
    np.testing.assert_allclose(samples, sound.mean(0), atol=1e-7)


@pytest.mark.parametrize(
    ("data", "raw", "words"),
    [
        (b"no sound at all, none", None, "cannot be read as sound"),
        (b"", None, "cannot be read as sound"),
        (b"", "s16le", "CODING:RATE"),
        (b"", "s16le:x", "CODING:RATE"),
        (b"", "nothing:8000", "no container format"),
        (np.array([0, np.nan], "<f4").tobytes(), "f32le:8000", "no number"),
    ],
)
def test_what_is_no_sound_is_said(data, raw, words):
    with pytest.raises(UserError, match=words):
        through_pipe(data, raw)


# -------------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Follows the bytes that new tensors hold; `peak` is the most at one time."""

    def __init__(self):
        super().__init__()
        self.users, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
                self.now += size if key not in self.users else 0
                self.peak = max(self.peak, self.now)
                self.users[key] = self.users.get(key, 0) + 1
                weakref.finalize(tensor, self.drop, key, size)
        return out

    def drop(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (MossFormer, {"num_filters": 256, "dim": 256}),
        (MossFormer, {"num_filters": 512, "dim": 384, "num_speakers": 3}),
        (MossFormer, {"num_filters": 512, "dim": 64, "num_speakers": 5}),
        (MossFormer2, {"num_filters": 512, "dim": 256}),
        (MossFormer2, {"num_filters": 64, "dim": 64}),
    ],
)
def test_the_demand_of_a_window_is_what_the_tensors_take(cls, settings, swept):
    model = cls(depth=1, **settings).eval()
    at_once, demand = (256 if swept else None), []
    for frames in (1024, 2048):
        with torch.inference_mode(), LiveBytes() as live:
            model(torch.zeros(1, 8 * frames + 8), frames_at_once=at_once)
        demand.append(live.peak)
    each, fixed = frame_bytes(model, at_once)
    assert demand[1] <= 1.05 * (2048 * each + fixed)
    assert 0.95 <= 1024 * each / (demand[1] - demand[0]) <= 1.5  # per frame; neither too little nor far too much


def test_a_budget_is_kept_by_the_whole_process():
    script = """
import sys, numpy as np, torch
from nearfar.audio.separation.mossformer import MossFormer
from nearfar.audio.separation.windows import model_separator, separate_samples
from nearfar.audio.separation.memory import fit_window
from nearfar.core.memory import resident_memory
torch.set_num_threads(1)
model = MossFormer(num_filters=256, dim=256, depth=1).eval()
budget = resident_memory() + (int(sys.argv[1]) << 20)
window, at_once = fit_window(model, budget, 10.0)
mix = np.random.default_rng(0).standard_normal(8000 * 11).astype(np.float32)
separate_samples(mix, 8000, model_separator(model, "cpu", at_once), 8000, window=window)
print(window, at_once, (budget - resident_memory(peak=True)) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script, "220"], capture_output=True, text=True, check=True)
    window, at_once, left = done.stdout.split()
    assert int(left) > 0
    assert at_once == "256"
    assert 4 <= float(window) <= 10


def test_a_budget_changes_the_window_but_not_what_one_window_gives():
    model, mix = small(num_filters=64, dim=64).eval(), noise(4 * RATE)
    whole = model_separator(model)(mix)
    np.testing.assert_allclose(model_separator(model, "cpu", 32)(mix), whole, atol=1e-5)
    with pytest.raises(UserError, match=r"--memory: 1M are too few, (\d+)M are needed \(the program") as refused:
        fit_window(model, 1 << 20, 10.0)
    total, *parts = (int(number) for number in re.findall(r"(\d+)M", str(refused.value))[1:])
    assert total <= sum(parts) <= total + len(parts)
    assert "the model's weights" in str(refused.value)
    room = (total - parts[0] + 1) << 20  # above what this process holds, whatever that is
    assert fit_window(model, resident_memory() + room, 10.0)[1] == model.blocks[0].attention.group_size
    assert fit_window(model, resident_memory() + RESERVE + (1 << 30), 10.0) == (10.0, None)


# -------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("causal", [False, True])
def test_checks_measure_what_ought_to_be_equal(causal):
    rows = check_equivalence(small(causal=causal), noise(3 * RATE), window=1.0)
    equal = [row for row in rows if row["ought"] == "equal"]
    assert len(equal) == 2
    assert all(row["relative_error"] < 1e-4 for row in equal), rows
    if causal:
        assert "streamed" in equal[-1]["comparison"]
    else:  # windows hear less than the whole: the figure is no rounding, and the separation is still the same one
        windows = next(row for row in rows if row["comparison"].startswith("windows"))
        assert 1e-6 < windows["relative_error"] < 1
        assert windows["si_sdr"] > 0


def test_a_check_finds_a_difference():
    class Careless(MossFormer):
        def forward(self, mix, lengths=None, frames_at_once=None):
            return super().forward(mix, None, frames_at_once)  # padding reaches the rest

    torch.manual_seed(0)
    model = Careless(num_filters=16, dim=12, depth=1, group_size=32, query_key_dim=8)
    rows = check_equivalence(model, noise(2 * RATE), window=1.0)
    assert next(row for row in rows if "padded" in row["comparison"])["relative_error"] > 1e-4


# ------------------------------------------------------------------------------------------------------- speaker model


def test_a_speaker_model_tells_the_voices_apart():
    from nearfar.audio.separation.voice_embedding import SpeakerPrint
    from nearfar.audio.speakers.frontends import KaldiFbank
    from nearfar.audio.speakers.ltdnn import ECAPA, SpeakerEncoder
    from nearfar.audio.speakers.system import SpeakerSystem

    torch.manual_seed(0)
    head = ECAPA(feature_dim=20, channels=16, embedding_dim=8)
    system = SpeakerSystem(SpeakerEncoder(KaldiFbank(20, 16000), head).eval(), mean=np.full(8, 0.1, np.float32))
    system.scores, system.labels = np.array([0.9, 0.8, 0.1, 0.2]), np.array([1, 1, 0, 0])
    embed = SpeakerPrint(system)
    assert 1 - embed.threshold**2 / 2 == pytest.approx(0.5)
    vector = embed(noise(RATE), RATE)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    calls = []

    def counted(samples, rate):
        calls.append(len(samples))
        return embed(samples, rate)

    counted.threshold = embed.threshold
    halves = lambda mix: np.stack([0.7 * mix, 0.0 * mix])  # noqa: E731
    _, report = separate_samples(noise(25 * RATE), RATE, halves, RATE, embed=counted)
    assert report.speakers == 1
    assert len(calls) == 4
    system.norm, system.cohort = "as", noise(6, 8)
    system.cohort_speakers = ("a", "a", "b", "b", "c", "c")
    assert SpeakerPrint(system).threshold is not None
    system.cohort = None
    assert SpeakerPrint(system).threshold is None
