"""Recordings of speakers: layouts, reading, the quality gate, embedding with a cache, augmentation, training."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.compliance import kaldi

from nearfar.audio.augment import (
    CODECS,
    Augmentation,
    add_noise,
    add_reverberation,
    change_speed,
    colored_noise,
    room_response,
    through_codec,
)
from nearfar.audio.corpora import Utterance, find_utterances, locate
from nearfar.audio.sound import read_samples
from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.frontends import KaldiFbank
from nearfar.audio.speakers.gallery import Gallery
from nearfar.audio.speakers.ltdnn import ECAPA, SpeakerEncoder
from nearfar.audio.speakers.quality import Gate, measure_quality
from nearfar.audio.speakers.scoring.backend import pair_scores
from nearfar.audio.speakers.scoring.calibration import draw_trials
from nearfar.audio.speakers.scoring.rates import eer
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.audio.speakers.training import (
    Crops,
    Recipe,
    build_model,
    fit_length,
    split_speakers,
    train_speaker_model,
    usable,
)
from nearfar.audio.synthesis import VARIANTS, synthesize
from nearfar.core.errors import UserError
from nearfar.core.memory import resident_memory

RATE = 8000


def voice(seconds=1.5, pitch=120.0, seed=0, rate=RATE, formant=600.0):
    """A buzz with a formant, syllables and pauses."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * np.sin(2 * np.pi * 2 * t))) / rate
    buzz = sum(np.sin(k * phase) * np.exp(-(((k * pitch - formant) / 500) ** 2)) for k in range(1, int(3800 / pitch)))
    syllables = np.clip(np.sin(2 * np.pi * 3 * t + rng.uniform(0, 6)), 0, None)
    return (0.1 * buzz * syllables + 0.001 * rng.standard_normal(len(t))).astype(np.float32)


def write(path, samples=None, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, voice(rate=rate) if samples is None else samples, rate, **options)
    return path


def tiny_model(channels=16, rate=RATE):
    torch.manual_seed(0)
    return SpeakerEncoder(KaldiFbank(24, rate), ECAPA(24, channels, 8)).eval()


# Layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "layout", "expected"),
    [
        (["anna/a.wav", "anna/s2/b.flac"], "folder", [("anna/a.wav", "anna", None), ("anna/s2/b.flac", "anna", "s2")]),
        (["wav/id10270/vid/00001.wav"], "voxceleb", [("id10270/vid/00001.wav", "id10270", "vid")]),
        (["dev/84/121/84-121-0001.flac"], "librispeech", [("dev/84/121/84-121-0001.flac", "84", "121")]),
        (
            ["w/p225/p225_024.wav", "w/p225/p225_025_mic1.flac", "w/p225/p225_025_mic2.flac", "w/p280/p280_100.wav"],
            "vctk",
            [("w/p225/p225_025_mic1.flac", "p225", None)],
        ),
        (["7_jackson_32.wav"], r"\d_(?P<speaker>\w+)_\d+\.wav", [("7_jackson_32.wav", "jackson", None)]),
        (["x.wav", "y.ogg"], "folder", [("x.wav", None, None), ("y.ogg", None, None)]),
    ],
)
def test_layouts(tmp_path, files, layout, expected):
    for name in files:
        write(tmp_path / name)
    for given in {layout, "auto" if "(" not in layout else layout}:
        found = find_utterances(tmp_path, given)
        assert [(u.name, u.speaker, u.session) for u in found] == expected
        assert all(u.path.is_file() for u in found)


def test_kaldi_folders(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "wav.scp").write_text(f"u1 {tmp_path / 'a.wav'}\nu2 b.wav\n")
    (tmp_path / "utt2spk").write_text("u1 s1\nu2 s2\n")
    found = find_utterances(tmp_path)
    assert [(u.name, u.speaker, u.path.name) for u in found] == [("u1", "s1", "a.wav"), ("u2", "s2", "b.wav")]
    (tmp_path / "utt2spk").write_text("u1 s1\n")
    with pytest.raises(UserError, match=r"lacks 1 utterances .* u2"):
        find_utterances(tmp_path)
    (tmp_path / "wav.scp").write_text("u1 sox a.wav -t wav - |\n")
    with pytest.raises(UserError, match="never run"):
        find_utterances(tmp_path)
    (tmp_path / "wav.scp").write_text("u1 a\nu1 b\n")
    with pytest.raises(UserError, match="line 2: u1 is there twice"):
        find_utterances(tmp_path)


def test_kaldi_segments_and_commands_that_only_decode(tmp_path):
    write(tmp_path / "a b.wav")
    (tmp_path / "wav.scp").write_bytes(b"\xef\xbb\xbfr1\ta b.wav\r\nr2 sph2pipe -f wav -p -c 2 x.sph |\r\n")
    (tmp_path / "segments").write_text("u1 r1 0.25 1.0\nu2 r1 1.0 -1\nu3 r2 0 1\n")
    (tmp_path / "spk2utt").write_text("s1 u1 u3\ns2 u2\n")
    found = {u.name: u for u in find_utterances(tmp_path)}
    assert [(u.start, u.seconds, u.speaker) for u in found.values()] == [
        (0.25, 0.75, "s1"), (1.0, None, "s2"), (0.0, 1.0, "s1"),
    ]  # fmt: skip
    assert found["u1"].path.name == "a b.wav"
    assert (found["u3"].path.name, found["u3"].channel) == ("x.sph", 2)
    assert found["u1"].digest != found["u2"].digest
    for text, message in (
        ("u1 r1 1.0 0.5\n", "ends after its start"),
        ("u1 r9 0 1\n", "r9 is not in wav.scp"),
        ("u1 r1 0 1\nu1 r1 1 2\n", "line 2: u1 is there twice"),
        ("u1 r1 x 1\n", "no times"),
    ):
        (tmp_path / "segments").write_text(text)
        with pytest.raises(UserError, match=message):
            find_utterances(tmp_path)
    (tmp_path / "segments").unlink()
    for command in ("flac -c -d x.flac; rm y |", "sox x.wav -r 8000 -t wav - |", "cat x.wav y.wav |"):
        (tmp_path / "wav.scp").write_text(f"u1 {command}\n")
        with pytest.raises(UserError, match="never run"):
            find_utterances(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_audiofolders(tmp_path, kind):
    rows = [{"file_name": "a.wav", "speaker_id": "s1"}, {"file_name": "b.wav", "speaker_id": "s2"}]
    if kind == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,speaker_id\na.wav,s1\nb.wav,s2\n")
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [(u.name, u.speaker) for u in find_utterances(tmp_path)] == [("a.wav", "s1"), ("b.wav", "s2")]


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_utterances(tmp_path / "none")
    with pytest.raises(UserError, match="holds no recordings"):
        find_utterances(tmp_path)
    write(tmp_path / "x.wav")
    with pytest.raises(UserError, match="does not fit the layout"):
        find_utterances(tmp_path, "voxceleb")
    with pytest.raises(UserError, match=r"needs a group"):
        find_utterances(tmp_path, r".*")
    with pytest.raises(UserError, match="regular expression"):
        find_utterances(tmp_path, "(")


def test_names_in_lists_are_located(tmp_path):
    write(tmp_path / "a" / "x.flac")
    known = [Utterance("u7", tmp_path / "a" / "x.flac")]
    found, missing = locate(["a/x.flac", "a/x", "u7", "b/y.wav"], tmp_path, known)
    assert list(found) == ["a/x.flac", "a/x", "u7"]
    assert missing == ["b/y.wav"]


# Reading and quality -----------------------------------------------------------------------------------------------


def test_reading_resamples_any_rate_and_reads_stretches(tmp_path):
    tone = lambda rate: np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)  # noqa: E731
    for rate in (8000, 11025, 22051, 44100, 48000):
        samples = read_samples(write(tmp_path / f"{rate}.wav", tone(rate), rate), 16000)
        assert abs(len(samples) - 32000) <= 2
        inner = slice(2000, 30000)
        np.testing.assert_allclose(samples[inner], tone(16000)[inner], atol=2e-3)
    part = read_samples(tmp_path / "8000.wav", 8000, 0.5, 0.25)
    np.testing.assert_allclose(part, tone(8000)[4000:6000], atol=1e-4)


def test_what_cannot_be_scored_is_refused_by_name(tmp_path):
    stereo = write(tmp_path / "stereo.wav", np.stack([voice(), voice()], 1))
    with pytest.raises(UserError, match="has 2 channels"):
        read_samples(stereo, RATE)
    assert len(read_samples(stereo, RATE, mix_channels=True)) == 12000
    for name, samples, rate, message in (
        ("silent.wav", np.zeros(8000), RATE, "is silent"),
        ("slow.wav", voice(), 2000, "too low"),
        ("empty.wav", np.zeros(0), RATE, "no sound"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_samples(write(tmp_path / name, samples, rate), RATE)
        assert name in str(caught.value)
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(UserError, match=r"text\.wav"):
        read_samples(tmp_path / "text.wav", RATE)


def test_quality_measures_what_was_put_in():
    clean = voice(4.0)
    quality = measure_quality(clean, RATE)
    assert quality.seconds == 4.0
    assert 1.0 < quality.speech < 3.5
    assert quality.clipped == 0
    rng = np.random.default_rng(0)
    level = np.sqrt(np.mean(clean**2))
    snrs = [
        measure_quality(clean + level * 10 ** (-snr / 20) * rng.standard_normal(len(clean)), RATE).snr
        for snr in (30, 15, 5)
    ]
    assert snrs == sorted(snrs, reverse=True)
    assert abs(snrs[1] - 15) < 6
    assert measure_quality(np.clip(20 * clean, -1, 1), RATE).clipped > 0.05
    narrow = measure_quality(read_like(clean, 16000), 16000).bandwidth
    assert narrow <= 4500  # little above the old Nyquist frequency
    for nothing in (np.zeros(8000), 1e-5 * rng.standard_normal(8000), np.sin(np.arange(16000.0)), np.zeros(10)):
        assert measure_quality(nothing.astype(np.float32), RATE).speech == 0


def read_like(samples, rate):
    from scipy.signal import resample_poly

    return resample_poly(samples, rate // RATE, 1)


def test_gate_says_why():
    gate = Gate()
    assert gate.reasons(measure_quality(voice(4.0), RATE)) == []
    assert "0.0 s of speech in 1.0 s" in gate.reasons(measure_quality(np.zeros(8000, np.float32), RATE))[0]
    loud = measure_quality(np.clip(20 * voice(4.0), -1, 1), RATE)
    assert any("clipped" in reason for reason in gate.reasons(loud))
    with pytest.raises(UserError, match=r"a\.wav: refused by the quality gate: .* of speech"):
        gate.check("a.wav", measure_quality(voice(0.5), RATE))


def test_real_prompts_pass_and_recordings_of_silence_do_not(shared_data):
    paths = sorted(shared_data("voices").glob("*/*.wav"))
    silence = [path for path in paths if np.abs(soundfile.read(path)[0]).max() < 0.001]
    assert len(silence) == 11
    for path in silence:
        assert Gate().reasons(measure_quality(read_samples(path, RATE), RATE))
    spoken = [path for path in paths if path not in silence]
    refused = [path for path in spoken if Gate(speech=0.5).reasons(measure_quality(read_samples(path, RATE), RATE))]
    assert len(refused) < 0.02 * len(spoken)


# Embedding ---------------------------------------------------------------------------------------------------------


def test_embeddings_are_cached_by_model_and_content(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav")
    model = tiny_model()
    embed = Embedder(model, tmp_path / "cache")
    first = embed(path)
    again = Embedder(model, tmp_path / "cache")
    monkeypatch.setattr(again, "embed_samples", lambda samples: pytest.fail("embedded twice"))
    np.testing.assert_array_equal(again(path).embedding, first.embedding)
    assert again(path).quality == first.quality
    copy = tmp_path / "b.wav"
    shutil.copy(path, copy)
    assert np.array_equal(again(copy).embedding, first.embedding)  # the content counts, not the name
    write(copy, voice(pitch=200))
    assert not np.array_equal(embed(copy).embedding, first.embedding)
    other = tiny_model()
    other.head.time_pool.linear.bias.data += 1
    assert other.digest != model.digest
    assert not np.array_equal(Embedder(other, tmp_path / "cache")(path).embedding, first.embedding)
    (stored,) = [p for p in (tmp_path / "cache").rglob("*.npz") if model.digest[:16] in str(p)][:1]
    stored.write_bytes(b"damaged")
    embed(path), embed(copy)  # a damaged entry is made anew


def test_gate_holds_for_cached_embeddings_too(tmp_path):
    path = write(tmp_path / "short.wav", voice(0.4))
    model = tiny_model()
    Embedder(model, tmp_path / "cache")(path)
    with pytest.raises(UserError, match="refused"):
        Embedder(model, tmp_path / "cache", Gate())(path)


def test_long_recordings_are_embedded_in_parts():
    model, samples = tiny_model(), voice(6.0)
    whole = Embedder(model).embed_samples(samples)
    parts = Embedder(model, max_seconds=2.0).embed_samples(samples)
    want = [Embedder(model).embed_samples(part) for part in np.array_split(samples, 3)]
    np.testing.assert_allclose(parts, np.mean([w / np.linalg.norm(w) for w in want], 0), atol=1e-6)
    assert whole @ parts / np.linalg.norm(whole) / np.linalg.norm(parts) > 0.9
    with pytest.raises(UserError, match="too few"):
        Embedder(model).embed_samples(samples[:100])


@pytest.mark.parametrize("place", ["front", "middle", "end"])
def test_a_recording_and_the_same_with_zeros_agree(tmp_path, place):
    x, zeros = voice(2.0), np.zeros(4000, np.float32)
    cut = {"front": 0, "middle": 8000, "end": len(x)}[place]
    embed = Embedder(tiny_model())
    padded = np.concatenate([x[:cut], zeros, x[cut:]])
    np.testing.assert_allclose(embed.embed_samples(padded), embed.embed_samples(x), atol=1e-5)
    plain = embed(write(tmp_path / "a.wav", x, subtype="FLOAT"))
    gated = embed(write(tmp_path / "b.wav", padded, subtype="FLOAT"))
    np.testing.assert_allclose(gated.embedding, plain.embedding, atol=1e-5)
    assert gated.quality.silence == pytest.approx(0.5, abs=0.001)
    assert gated.quality.speech == plain.quality.speech
    dc = embed(write(tmp_path / "c.wav", x + 0.3, subtype="FLOAT"))
    np.testing.assert_allclose(dc.embedding, plain.embedding, atol=1e-3)


def test_parts_are_shortened_to_a_memory_budget():
    model = SpeakerEncoder(KaldiFbank(24, RATE), ECAPA(24, 512, 16))
    embed, held = Embedder(model), resident_memory()
    embed.keep_within(held + (8 << 30))
    assert embed.max_seconds == 60
    embed.keep_within(held + (320 << 20))
    assert 2 <= embed.max_seconds < 60
    with pytest.raises(UserError, match="2 s in the model"):
        embed.keep_within(held + (200 << 20))


def test_long_files_are_embedded_in_flat_memory_as_they_are_at_once(tmp_path, monkeypatch):
    x = np.concatenate([voice(3.0, seed=seed) for seed in range(10)])
    path = write(tmp_path / "a.wav", x, subtype="FLOAT")
    model = tiny_model()
    whole = Embedder(model, max_seconds=8.0).embed_samples(read_samples(path, RATE))
    monkeypatch.setattr(Embedder, "KEPT", 5)  # so that it is decoded twice
    np.testing.assert_allclose(Embedder(model, max_seconds=8.0)(path).embedding, whole, atol=1e-4)


def test_the_floor_is_the_models_own(tmp_path):
    """Published weights keep Kaldi's; new ones have the recipe's, and it is kept with them."""
    assert KaldiFbank(24, RATE).floor == pytest.approx(2**-23)
    model = build_model(Recipe(sample_rate=RATE, channels=16, num_mels=24, embedding_dim=8))
    assert model.frontend.floor == 10
    model.save_pretrained(tmp_path)
    assert SpeakerEncoder.from_pretrained(tmp_path).frontend.floor == 10
    config = json.loads((tmp_path / "config.json").read_text())
    del config["frontend"]["floor"]  # as older folders are
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SpeakerEncoder.from_pretrained(tmp_path).frontend.floor == pytest.approx(2**-23)
    with pytest.raises(ValueError, match="floor must be"):
        KaldiFbank(24, RATE, floor=0)


def test_faint_power_and_high_frequencies_are_left_out(tmp_path):
    """torchaudio's filters to the same frequency; nothing lies further below the loudest than `top_db`, by item."""
    x = 0.1 * torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.01]])
    front = KaldiFbank(24, RATE, 1.0, top_db=30, high_freq=3000)
    found, _ = front(x, torch.tensor([RATE, RATE // 2]))
    for row, size, own in zip(x, (RATE, RATE // 2), found):
        settings = {"num_mel_bins": 24, "sample_frequency": RATE, "high_freq": 3000, "dither": 0}
        power = kaldi.fbank(row[None, :size] * 32768, **settings).exp()
        power = power.clamp(min=max(1.0, float(power.max()) / 1000)).log()
        torch.testing.assert_close(own[: len(power)], power - power.mean(0), rtol=1e-3, atol=1e-3)
        assert float(own[: len(power)].max() - own[: len(power)].min()) < 40
    assert front.settings["high_freq"] == 3000
    model = build_model(Recipe(sample_rate=RATE, channels=16, num_mels=24, embedding_dim=8, top_db=30, high_freq=3000))
    model.save_pretrained(tmp_path)
    again = SpeakerEncoder.from_pretrained(tmp_path).frontend
    assert (again.top_db, again.high_freq) == (30, 3000)
    for bad in ({"top_db": 0}, {"high_freq": RATE}, {"high_freq": 10}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            KaldiFbank(24, RATE, **bad)


# Augmentation ------------------------------------------------------------------------------------------------------


def test_noise_has_the_wanted_level_and_speed_the_wanted_pitch():
    x, noise = voice(2.0), np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    y = add_noise(x, noise, 10.0)
    assert 10 * np.log10(np.mean(x**2) / np.mean((y - x) ** 2)) == pytest.approx(10, abs=0.1)
    tone = np.sin(2 * np.pi * 400 * np.arange(8000) / 8000).astype(np.float32)
    fast = change_speed(tone, 1.1)
    assert len(fast) == pytest.approx(8000 / 1.1, abs=2)
    peak = np.fft.rfftfreq(len(fast), 1 / 8000)[np.abs(np.fft.rfft(fast)).argmax()]
    assert peak == pytest.approx(440, abs=2)
    with pytest.raises(ValueError, match="speed"):
        change_speed(tone, 3.0)


def test_reverberation_keeps_time_and_level():
    x = voice(1.0)
    pulse = np.zeros(400, np.float32)
    pulse[100] = -2.0
    np.testing.assert_allclose(add_reverberation(x, pulse), -x, atol=1e-5)
    room = pulse + np.r_[np.zeros(101), np.exp(-np.arange(299) / 60)].astype(np.float32)
    wet = add_reverberation(x, room)
    assert np.mean(wet**2) == pytest.approx(np.mean(x**2), rel=1e-3)
    assert not np.allclose(wet, x, atol=0.01)


def test_simulated_rooms_decay_as_they_are_told():
    response = room_response(RATE, np.random.default_rng(0), 0.5, -3.0)
    assert response[0] == 1
    assert 10 * np.log10(np.square(response[1:]).sum()) == pytest.approx(-3, abs=1e-3)
    left = 10 * np.log10(np.cumsum(np.square(response[:0:-1]))[::-1])  # Schroeder's integral
    at = [np.flatnonzero(left < left[0] - fall)[0] / RATE for fall in (5, 25)]
    assert 3 * (at[1] - at[0]) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_colored_noise_falls_as_its_slope(slope):
    noise = colored_noise(1 << 16, np.random.default_rng(0), slope)
    power = np.square(np.abs(np.fft.rfft(noise)))
    low, high = power[500:1000].mean(), power[8000:16000].mean()
    assert np.log2(low / high) / 4 == pytest.approx(slope, abs=0.1)


def test_augmentation_follows_the_seed_and_its_probability(tmp_path):
    for kind in ("noise", "music", "speech"):
        write(tmp_path / "musan" / kind / "a" / "n.wav", voice(1.0, 300))
    write(tmp_path / "rirs" / "r.wav", np.r_[1.0, np.exp(-np.arange(500) / 80)])
    augment = Augmentation(tmp_path / "musan", tmp_path / "rirs", 1.0)
    assert augment.kinds == ["music", "noise", "speech", "reverberation"]
    x = voice(1.0)

    def changed(seed):
        torch.manual_seed(seed)
        return augment(x, RATE)

    assert np.array_equal(changed(1), changed(1))
    assert len({changed(seed).tobytes() for seed in range(6)}) > 3
    assert all(len(changed(seed)) == len(x) for seed in range(6))
    assert np.array_equal(Augmentation(tmp_path / "musan", None, 0.0)(x, RATE), x)
    assert np.array_equal(Augmentation()(x, RATE), x)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no recordings"):
        Augmentation(tmp_path / "nothing")


@pytest.mark.parametrize("codec", list(CODECS))
def test_codecs_keep_length_and_speech(codec):
    x = voice(1.0)
    y = through_codec(x, RATE, codec)
    assert len(y) == len(x)
    delays = range(-400, 401, 8)
    assert max(np.corrcoef(np.roll(y, d), x)[0, 1] for d in delays) > 0.7


@pytest.mark.parametrize("surroundings", [False, True])
def test_degraded_crops_keep_their_length_and_follow_the_seed(surroundings):
    x = voice(1.0)
    augment = Augmentation(degraded=1.0, surroundings=surroundings)

    def changed(seed):
        torch.manual_seed(seed)
        return augment(x, RATE)

    found = [changed(seed) for seed in range(20)]
    assert all(len(y) == len(x) and np.isfinite(y).all() and np.abs(y).max() <= 1 for y in found)
    assert all(np.array_equal(changed(seed), found[seed]) for seed in (0, 7))
    assert len({y.tobytes() for y in found}) == 20


# Training ----------------------------------------------------------------------------------------------------------


def corpus(root, speakers=6, each=6, seconds=1.2):
    for s in range(speakers):
        for n in range(each):
            rng = np.random.default_rng(100 * s + n)  # the formant alone is the speaker's; pitch and noise vary
            samples = voice(seconds, rng.uniform(90, 200), 100 * s + n, formant=400 + 60 * s)
            noise = rng.uniform(0.005, 0.05) * rng.standard_normal(len(samples))
            write(root / f"s{s}" / f"{n}.wav", (samples + noise).clip(-1, 1))
    return find_utterances(root)


def test_crops_are_wrapped_and_speeds_are_new_speakers(tmp_path):
    utterances = corpus(tmp_path, 2, 2, 0.5)
    crops = Crops(utterances, Recipe(sample_rate=RATE, crop_seconds=1.0, speeds=(1.0, 0.9, 1.1)), RATE)
    assert crops.num_classes == 6
    items = [crops[n % 4] for n in range(40)]
    assert all(len(samples) == 8000 for samples, _ in items)
    assert {label for _, label in items} == set(range(6))
    np.testing.assert_array_equal(fit_length(np.array([1, 2, 3]), 7), [1, 2, 3, 1, 2, 3, 1])


def test_speakers_never_stand_on_both_sides(tmp_path):
    utterances = corpus(tmp_path, 5, 2)
    learn, held = split_speakers(utterances, 0.3, 0)
    assert len(learn) + len(held) == 10
    assert not {u.speaker for u in learn} & {u.speaker for u in held}
    assert split_speakers(utterances, 0.0, 0)[1] == []
    with pytest.raises(UserError, match="too few"):
        split_speakers(utterances[:6], 0.3, 0)
    with pytest.raises(UserError, match="have no speaker"):
        split_speakers([Utterance("x", tmp_path / "x.wav")], 0.3, 0)
    with pytest.raises(UserError, match="in training and in validation"):
        train_speaker_model(tiny_model(), utterances, utterances, Recipe(sample_rate=RATE))


def test_unreadable_recordings_are_named_and_the_rest_kept(tmp_path):
    utterances = corpus(tmp_path, 2, 3)
    utterances[2].path.write_text("no sound")
    good, bad = usable(utterances, RATE)
    assert len(good) == 5
    assert len(bad) == 1
    assert str(utterances[2].path) in bad[0]


def test_training_learns_speakers_it_has_not_heard_and_resumes(tmp_path):
    utterances = corpus(tmp_path / "data", 12, 6, 1.0)
    held = [u for u in utterances if u.speaker in ("s1", "s4", "s7", "s10")]
    learn = [u for u in utterances if u not in held]
    recipe = Recipe(
        sample_rate=RATE, channels=16, num_mels=24, embedding_dim=8, crop_seconds=0.5, crops_per_utterance=4,
        batch_size=24, epochs=6, learning_rate=5e-3, scale=15.0, margin=0.1, margin_epochs=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(recipe)

    def error_rate():
        x = np.stack([Embedder(model)(u.path).embedding for u in held])
        left, right, labels = draw_trials([u.speaker for u in held], 600)
        return eer(pair_scores(x, x, left, right), labels).value

    before = error_rate()
    history = train_speaker_model(model, learn, held, recipe, tmp_path / "run", device="cpu")
    after = error_rate()
    assert after < before - 0.15, (before, after)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert min(row["val_eer"] for row in history) == pytest.approx(after, abs=0.05)
    assert history[0]["margin"] == 0.0
    assert history[-1]["margin"] == pytest.approx(0.1)
    again = build_model(recipe)
    assert train_speaker_model(again, learn, held, recipe, tmp_path / "run", device="cpu") == history
    assert again.digest == model.digest


def test_recipes_refuse_what_does_not_go_together():
    for options in (
        {"head": "lap"},
        {"backbone": "x"},
        {"head": "resnet"},
        {"speeds": [0.9]},
        {"schedule": "step"},
        {"span_out": True},
        {"validation": 1.0},
    ):
        with pytest.raises(ValueError, match=r"must|needs|reads"):
            Recipe(**options)


# Systems -----------------------------------------------------------------------------------------------------------


def test_systems_keep_mean_cohort_and_calibration(tmp_path):
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(30), 8)
    centers = rng.standard_normal((30, 8))
    x = (centers[speakers] + 0.5 * rng.standard_normal((240, 8)) + 3).astype(np.float32)
    system = SpeakerSystem.build(tiny_model(), x[:160], [f"s{n}" for n in speakers[:160]])
    assert system.norm == "as"
    assert "AS-norm with the top 32 of 160" in system.convention
    system.calibrate(x[160:], [f"s{n}" for n in speakers[160:]])
    rate = system.threshold(0.05)
    assert np.mean(system.scores[system.labels == 0] > rate.threshold) <= 0.05
    assert system.threshold(0.05, comparisons=5).threshold > rate.threshold
    with pytest.raises(UserError, match="--far 1e-06"):
        system.threshold(1e-6)
    system.save(tmp_path / "model", note="x")
    again = SpeakerSystem.load(tmp_path / "model")
    left, right = np.array([0, 1]), np.array([2, 100])
    np.testing.assert_array_equal(again.score(x, x, left, right), system.score(x, x, left, right))
    np.testing.assert_array_equal(again.calibration(again.scores), system.calibration(system.scores))
    assert again.convention == system.convention
    few = SpeakerSystem.build(tiny_model(), x[:16], [f"s{n}" for n in speakers[:16]])
    assert (few.norm, few.cohort) == ("none", None)
    with pytest.raises(UserError, match="run `calibrate` first"):
        few.threshold(0.1)
    again.norm = "none"
    again.save_scoring(tmp_path / "model")
    with pytest.raises(UserError, match="calibration is for other scores"):
        SpeakerSystem.load(tmp_path / "model")


def test_galleries_forget_and_grow(tmp_path):
    model, rng = tiny_model(), np.random.default_rng(0)
    x = rng.standard_normal((6, 8)).astype(np.float32)
    gallery = Gallery.new(model)
    for name, rows in (("anna", x[:2]), ("bob", x[2:3]), ("eve", x[3:5])):
        gallery.add(name, rows)
    gallery.add("bob", x[5:], append=True)
    assert gallery.counts == {"anna": 2, "bob": 2, "eve": 2}
    gallery.remove("anna")
    gallery.save(tmp_path / "g.npz")
    again = Gallery.load(tmp_path / "g.npz", model)
    assert again.counts == {"bob": 2, "eve": 2}
    np.testing.assert_array_equal(again.embeddings[again.owners == 1], x[3:5])
    np.testing.assert_array_equal(again.embeddings[again.owners == 0], x[[2, 5]])
    with pytest.raises(UserError, match="anna: is not in the gallery; bob, eve are"):
        again.remove("anna")
    with pytest.raises(UserError, match="--append adds"):
        again.add("bob", x[:1])


def test_synthetic_voices_differ():
    first, rate = synthesize("one two three", VARIANTS[0])
    second, _ = synthesize("one two three", VARIANTS[6])
    assert rate == 22050
    assert np.abs(first).max() > 0.1
    assert len(first) > rate // 2
    assert len(first) != len(second) or not np.allclose(first, second)
    again = synthesize("one two three", VARIANTS[0])[0]
    assert abs(len(again) - len(first)) < 0.02 * len(first)  # a voice flutters a little from one time to the next
    with pytest.raises(UserError, match="no voice"):
        synthesize("one", "nobody")
