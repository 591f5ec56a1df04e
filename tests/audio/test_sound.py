"""Recordings that libsndfile cannot decode, on files that the test itself codes with PyAV."""

import struct
import sys

import av
import numpy as np
import pytest
import soundfile

from nearfar.audio.corpora import find_utterances
from nearfar.audio.sound import Recording, measure_channels, read_samples, without_silence
from nearfar.core.errors import UserError

RATE = 16000


def code(path, samples, codec="aac", rate=RATE, options=None):
    """Write samples (channels, n), as int16 for lossless codecs."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo"}[len(samples)])
        planar = {"aac": "fltp", "alac": "s16p"}[codec]
        coded = samples if planar == "fltp" else np.round(32767 * samples).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(coded), planar, stream.layout.name)
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])


def tone(seconds, channels=1, rate=RATE):
    t = np.arange(int(seconds * rate)) / rate
    return np.stack([(0.4 + 0.2 * c) * np.sin(2 * np.pi * (300 + 5 * t) * t) for c in range(channels)]).astype(
        np.float32
    )


def test_lossless_m4a_is_read_to_the_sample(tmp_path):
    sound = tone(3, 2)
    code(tmp_path / "a.m4a", sound, "alac")
    with Recording(tmp_path / "a.m4a") as recording:
        assert (recording.rate, recording.channels, recording.frames) == (RATE, 2, 3 * RATE)
        assert recording.subtype == "alac"
        assert np.abs(recording.read(0, recording.frames) - sound.mean(0)).max() < 1e-4
        assert np.abs(recording.read(20001, 20100) - sound.mean(0)[20001:20100]).max() < 1e-4


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.aac"])
def test_pieces_in_any_order_are_the_whole(tmp_path, name, monkeypatch):
    monkeypatch.setattr("nearfar.audio.containers.Container.KEPT", 1)  # so that going back starts again
    sound = tone(5)
    code(tmp_path / name, sound)
    with Recording(tmp_path / name) as recording:
        whole = recording.read(0, recording.frames)
        assert abs(len(whole) - sound.shape[1]) <= 2048  # the codec pads its ends
        assert max(np.corrcoef(whole[d : d + 4 * RATE], sound[0, : 4 * RATE])[0, 1] for d in (0, 1024)) > 0.999
        assert np.array_equal(np.concatenate(list(recording.blocks(0.7))), whole)
        for start in (60000, 0, 30000, 17, 79000, 50000, 49000):
            assert np.array_equal(recording.read(start, start + 900), whole[start : start + 900])
        with pytest.raises(UserError, match="header says later"):
            recording.read(0, recording.frames + 1)


def test_a_corpus_of_m4a(tmp_path):
    """VoxCeleb2 ships as m4a."""
    place = tmp_path / "id00012" / "video"
    place.mkdir(parents=True)
    code(place / "00001.m4a", tone(2, rate=48000), rate=48000)
    (utterance,) = find_utterances(tmp_path)
    assert (utterance.name, utterance.speaker) == ("id00012/video/00001.m4a", "id00012")
    assert len(read_samples(utterance.path, RATE, 0.5, 1.0)) == RATE


def test_bad_containers_are_named(tmp_path):
    path = tmp_path / "a.m4a"
    path.write_bytes(b"\0\0\0 ftypM4A ")
    with pytest.raises(UserError, match=r"a\.m4a: cannot be read as sound"):
        Recording(path)
    with av.open(str(path), "w", format="mp4") as container:  # a film without sound
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
        container.mux([*stream.encode(picture), *stream.encode(None)])
    with pytest.raises(UserError, match="holds no sound"):
        Recording(path)
    code(path, tone(20), options={"movflags": "faststart"})  # the index is in front
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
    ends = packets[len(packets) // 2].pos + packets[len(packets) // 2].size
    whole = path.read_bytes()
    path.write_bytes(whole[:ends])
    with pytest.raises(UserError, match=r"truncated, 10\.\d of 20\.\d s of sound are there"):
        Recording(path)
    path.write_bytes(whole[: ends + 20])  # in the middle of a packet
    with pytest.raises(UserError, match=r"damaged at 10\.\d s"):
        Recording(path)
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://localhost:9/a.aac\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError, match="cannot be read as sound"):
        Recording(path)


def test_without_pyav_a_container_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nearfar.audio.containers", None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    with pytest.raises(UserError, match=r"a\.m4a: cannot be read as sound .*nearfar-audio\[containers\]"):
        Recording(tmp_path / "a.m4a")
    soundfile.write(tmp_path / "a.flac", np.full(800, 0.1, np.float32), 8000)
    assert Recording(tmp_path / "a.flac").frames == 800


def patched(path, target, size, riff=None, fact=None):
    """A WAV whose header says `size` bytes of sound, and perhaps other things."""
    raw = bytearray(path.read_bytes())
    place = raw.index(b"data") + 4
    raw[place : place + 4] = struct.pack("<I", size)
    if riff is not None:
        raw[4:8] = struct.pack("<I", riff)
    if fact is not None:
        place = raw.index(b"fact") + 8
        raw[place : place + 4] = struct.pack("<I", fact)
    target.write_bytes(raw)
    return target


@pytest.mark.parametrize(
    ("size", "riff"),
    [(0, None), (0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 0x80000024), (0x7FFFF000, None), (1000, None), (0, 36)],
)
def test_headers_of_pipes_and_headers_that_lie_are_read_whole(tmp_path, size, riff):
    sound = tone(1)[0]
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    with Recording(patched(tmp_path / "a.wav", tmp_path / "b.wav", size, riff)) as recording:
        assert recording.frames == RATE
        np.testing.assert_allclose(recording.read(0, RATE), sound, atol=1e-4)
        np.testing.assert_allclose(recording.read(15000, 15010), sound[15000:15010], atol=1e-4)


def test_chunks_behind_the_sound_are_no_sound_and_a_cut_off_file_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1)[0], RATE)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(whole + b"LIST" + struct.pack("<I", 2000) + bytes(2000))
    with Recording(tmp_path / "b.wav") as recording:
        assert recording.frames == RATE
    (tmp_path / "c.wav").write_bytes(whole[:20000])
    with pytest.raises(UserError, match="truncated"):
        Recording(tmp_path / "c.wav")
    soundfile.write(tmp_path / "a.au", tone(1)[0], RATE)
    raw = bytearray((tmp_path / "a.au").read_bytes())
    for said in (0, 100, 0xFFFFFFFF):
        raw[8:12] = struct.pack(">I", said)
        (tmp_path / "b.au").write_bytes(raw)
        with Recording(tmp_path / "b.au") as recording:
            assert recording.frames == RATE


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("WAV", "GSM610"), ("WAV", "MS_ADPCM"), ("WAV", "G721_32"), ("WAV", "ULAW"), ("NIST", "PCM_16"), ("NIST", "ULAW"),
     ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("CAF", "ALAC_16"),
     ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("RF64", "PCM_16")],
)  # fmt: skip
def test_containers_are_read_to_the_sample(tmp_path, form, subtype):
    path = tmp_path / "a.bin"
    soundfile.write(path, tone(2, rate=8000)[0][:12345], 8000, format=form, subtype=subtype)
    with Recording(path) as recording:
        assert recording.frames == 12345
        assert len(recording.read(0, 12345)) == 12345


def test_channels_are_chosen_and_measured(tmp_path):
    both = tone(1, 2).T + np.array([0.1, 0.0])
    soundfile.write(tmp_path / "a.wav", both, RATE, "FLOAT")
    for number in (1, 2):
        with Recording(tmp_path / "a.wav", number) as recording:
            np.testing.assert_allclose(recording.read(0, RATE), both[:, number - 1], atol=1e-6)
        samples = read_samples(tmp_path / "a.wav", RATE, channel=number)
        assert abs(samples.mean()) < 1e-6  # DC is taken away
        np.testing.assert_allclose(samples, both[:, number - 1] - both[:, number - 1].mean(), atol=1e-6)
    with Recording(tmp_path / "a.wav") as recording:
        found = measure_channels(recording)
    assert found.correlation == pytest.approx(1)
    assert not found.alike
    np.testing.assert_allclose(found.means, both.mean(0), atol=1e-6)
    with pytest.raises(UserError, match="there is no channel 3"):
        Recording(tmp_path / "a.wav", 3)


def test_digital_silence_is_dropped_whatever_the_blocks():
    rng = np.random.default_rng(0)
    x = (0.1 * rng.standard_normal(8000)).astype(np.float32)
    gap = np.zeros(400, np.float32)
    mixed = np.concatenate([gap, x[:3000], gap + 0.2, x[3000:], np.zeros(40, np.float32), gap])
    for size in (7, 100, 1000, len(mixed)):
        blocks = [mixed[start : start + size] for start in range(0, len(mixed), size)]
        np.testing.assert_array_equal(np.concatenate(list(without_silence(blocks, 8000))), x)
    short = np.concatenate([x[:3000], np.zeros(50, np.float32), x[3000:]])  # 6 ms: speech may cross zero for long
    np.testing.assert_array_equal(np.concatenate(list(without_silence([short], 8000))), short)
    assert not len(np.concatenate(list(without_silence([np.zeros(8000, np.float32)], 8000))))
