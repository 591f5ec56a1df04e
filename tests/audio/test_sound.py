"""Recordings that libsndfile cannot decode, on files that the test itself codes with PyAV."""

import sys

import av
import numpy as np
import pytest
import soundfile

from nearfar.audio.corpora import find_utterances
from nearfar.audio.sound import Recording, read_samples
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
