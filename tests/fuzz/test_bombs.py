"""Files that ask for more than they hold, and such as once ended in something else than one clear line."""

import json
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.core.reading import read_arrays, reading
from tests.fuzz import targets
from tests.fuzz.engine import unclear

MOST = 100 << 20
"""Bytes that a reader may hold at once for a file of a few hundred."""


def refusal(read: Callable[[Path], Any], path: Path, says: str = "") -> None:
    """`read` must refuse `path` in one line that says so, within little memory."""
    tracemalloc.start()
    try:
        refused(read, path, says)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def refused(read: Callable[[Path], Any], path: Path, says: str = "") -> None:
    with pytest.raises(UserError, match=says or ":") as caught:
        read(path)
    assert not unclear(str(caught.value), path, path.parent)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """`made(target, folder)`: the first of a target's valid files, in `folder`; made once, copied then."""
    stock = tmp_path_factory.mktemp("stock")
    files: dict[str, str] = {}

    def copied(name: str, folder: Path) -> Path:
        if name not in files:
            (stock / name).mkdir()
            files[name] = targets.TARGETS[name].make(stock / name)[0]
        shutil.copytree(stock / name, folder, dirs_exist_ok=True)
        return folder / files[name]

    return copied


def png(path: Path, side: int, mode: bytes = b"\x08\x02") -> Path:
    """A PNG whose header announces `side` x `side` pixels; its data are a few."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">II", side, side) + mode + b"\0\0\0")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [6_000, 12_000, 60_000])
def test_pictures_that_announce_more_than_they_hold(side: int, tmp_path: Path) -> None:
    from nearfar.medical.data.scans import read_labels, read_scan
    from nearfar.vision.data.images import read_picture

    path = png(tmp_path / "x.png", side)
    for read in (read_picture, read_scan, read_labels):
        refusal(read, path)
    refusal(lambda p: read_picture(p.read_bytes(), str(p)), path)


def test_a_strip_is_no_picture_and_a_uniform_one_is(tmp_path: Path) -> None:
    from PIL import Image

    from nearfar.vision.data.images import read_picture

    Image.new("L", (3000, 2)).save(tmp_path / "strip.png")
    refusal(read_picture, tmp_path / "strip.png", "a strip")
    Image.new("L", (2000, 2000)).save(tmp_path / "black.png")
    assert read_picture(tmp_path / "black.png").size == (2000, 2000)


def test_arrays_of_hdf5_that_are_not_there(tmp_path: Path) -> None:
    import h5py

    from nearfar.core.checkpoints import read_state_dict

    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("w", (200_000, 200_000), "f4", chunks=(1000, 1000), compression="gzip")
    refusal(read_state_dict, tmp_path / "bomb.h5", "announces 40,000,000,000 numbers")
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for number in range(10):
            file.create_dataset(f"w{number}", (2000, 2000), "f4", chunks=(1000, 1000))
    refusal(read_state_dict, tmp_path / "many.h5", "announces")
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file.create_dataset("w", (16,), "u1", external=[(str(tmp_path / "secret"), 0, 16)])
    refusal(read_state_dict, tmp_path / "elsewhere.h5", "in other files")


def test_tensors_of_strides_of_zero(tmp_path: Path) -> None:
    import torch

    from nearfar.core.checkpoints import read_state_dict

    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pt")
    refusal(read_state_dict, tmp_path / "x.pt", "announces 1,000,000,000,000 numbers")


def npz(path: Path, header: bytes = b"", change: Callable[[bytearray], None] = lambda data: None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }\n"
FINE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (16,), }\n"


def put(offset: int, value: int) -> Callable[[bytearray], None]:
    """Set a field of a zip member, in its own header and in the directory."""

    def change(data: bytearray) -> None:
        for start, shift in ((data.index(b"PK\x03\x04"), 0), (data.index(b"PK\x01\x02"), 2)):
            data[start + offset + shift] = value

    return change


@pytest.mark.parametrize(
    ("header", "change"),
    [
        (HUGE, lambda data: None),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", lambda data: None),
        (FINE, put(6, 1)),  # encrypted
        (FINE, put(8, 99)),  # packed by what nobody knows
        (FINE, lambda data: data.__delitem__(slice(60, None))),
        (FINE, lambda data: data.__setitem__(slice(80, 90), bytes(10))),
        (b"{'descr': '<f4', 'shape': (", lambda data: None),
        (b"[" * 3000, lambda data: None),
    ],
)  # fmt: skip
def test_arrays_that_are_damaged(header: bytes, change: Callable[[bytearray], None], tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", header, change)
    refusal(lambda p: read_arrays(p, "arrays"), path)


def test_arrays_that_are_whole(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((500, 500)), b=np.arange(3))
    found = read_arrays(tmp_path / "x.npz", "arrays")
    assert found["a"].shape == (500, 500)
    assert found["b"].tolist() == [0, 1, 2]


def nifti(path: Path, change: Callable[[Any], None], kind: str = "f4", data: int = 4 * 5 * 6 * 4) -> Path:
    import nibabel as nib

    header = nib.Nifti1Header()
    header.set_data_shape((4, 5, 6))
    header.set_data_dtype(kind)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    change(header)
    path.write_bytes(header.binaryblock + bytes(4 + data))
    return path


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda header: header.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting("dim", [3, 30000, 30000, 30000, 1, 1, 1, 1]), "announces"),
        (setting("dim", [3, -4, 5, 6, 1, 1, 1, 1]), ""),
        (setting("dim", [7, 30000, 30000, 30000, 30000, 30000, 30000, 30000]), "announces"),
        (setting("datatype", 128), "colours"),
        (setting("datatype", 32), "complex"),
        (setting("datatype", 4096), "damaged or no NIfTI file"),
        (setting("vox_offset", 1e30), ""),
        (setting("srow_x", [np.nan, 0, 0, 0]), "affine is not finite"),
        (setting("srow_x", [0, 1, 0, 0]), "affine is singular"),
    ],
)  # fmt: skip
def test_odd_nifti_headers(change: Callable[[Any], None], says: str, tmp_path: Path) -> None:
    from nearfar.medical.data.scans import read_scan

    def both(header: Any) -> None:
        change(header)
        header["bitpix"] = 24 if header["datatype"] == 128 else header["bitpix"]

    refusal(read_scan, nifti(tmp_path / "x.nii", both), says)


def test_data_of_an_nrrd_stay_beside_it(tmp_path: Path) -> None:
    from nearfar.medical.data.scans import read_scan

    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: {} 4 4\nencoding: raw\n{}\n"
    for sizes, more in ((4, "data file: /dev/zero\n"), (4, "data file: ../x\n"), (4_000_000_000, "")):
        (tmp_path / "x.nhdr").write_bytes(head.format(sizes, more).encode() + bytes(64))
        refusal(read_scan, tmp_path / "x.nhdr")


def test_sound_that_is_shorter_than_its_header_says(tmp_path: Path) -> None:
    import soundfile

    from nearfar.audio.sound import read_samples

    path = tmp_path / "x.flac"
    soundfile.write(path, np.sin(np.arange(8000)) / 2, 8000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the length of a stream, 36 bits in all
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)
    refusal(lambda p: read_samples(p, 8000), path)
    path = tmp_path / "x.wav"
    soundfile.write(path, np.sin(np.arange(8000)) / 2, 8000)
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 2**31 - 1)  # the rate: a filter of this length would fill the memory
    path.write_bytes(data)
    refusal(lambda p: read_samples(p, 8000), path, "Hz")


def test_members_of_archives_that_unpack_to_too_much(tmp_path: Path) -> None:
    from nearfar.vision.data.sources import open_pictures

    good = targets.encoded("PNG")
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "b/0.png"):
            archive.writestr(name, good)
        archive.writestr("b/1.png", bytes(70 << 20))
    pictures, failures = open_pictures(path).readable()
    assert [name.removeprefix(f"{path}/") for name in pictures.names] == ["a/0.png", "b/0.png"]
    assert len(failures) == 1
    assert failures[0].startswith(f"{path}/b/1.png: ")
    assert "unpack to 73,400,320" in failures[0]


def test_names_in_lists_are_no_novels(tmp_path: Path) -> None:
    from nearfar.audio.speakers.scoring.trials import read_trials

    path = tmp_path / "trials.txt"
    path.write_text("1 a b\n" * 1000 + f"1 a {'x' * 1_000_000}\n")
    refusal(read_trials, path, "line 1001")


CONTENTS = ["", "[]", "null", '"x"', "{}", "[" * 100_000, '{"a": ', "\ufeff{}", "\0", '{"x": NaN}']


@pytest.mark.parametrize(
    "name", ["classifier", "segmenter", "decoder", "speaker-system", "separator", "language-model"]
)
def test_settings_that_are_none(name: str, made: Callable[[str, Path], Path], tmp_path: Path) -> None:
    path = made(name, tmp_path)
    for content in CONTENTS:
        path.write_text(content, encoding="utf-8")
        if name != "language-model" or ("{}" not in content and "NaN" not in content):  # transformers may guess
            refused(targets.TARGETS[name].read, path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("classifier", {"size": 1e308}),
        ("classifier", {"size": 99_999_999}),
        ("classifier", {"size": True}),
        ("classifier", {"crop_pct": float("nan")}),
        ("classifier", {"crop_pct": 1e-9}),
        ("classifier", {"classes": 3}),
        ("classifier", {"classes": ["a"] * 3}),
        ("classifier", {"classes": [None, None]}),
        ("classifier", {"name": "no such"}),
        ("classifier", {"descriptions": [1]}),
        ("classifier", {"trained_on": {"items": [[]], "groups": []}}),
        ("segmenter", {"labels": {"x": "y"}}),
        ("segmenter", {"in_channels": 99_999_999}),
        ("segmenter", {"recipe": {"network": "no such"}}),
        ("segmenter", {"recipe": {"network": "monai.BasicUNet", "roi": [99_999_999, 32]}}),
        ("decoder", {"ch_names": []}),
        ("decoder", {"ch_names": ["C3", "C3", "C4"]}),
        ("decoder", {"training": {"sfreq": "x"}}),
        ("segmenter", {"recipe": {"roi": [32, 32], "window": []}}),
        ("decoder", {"classes": "ab"}),
        ("decoder", {"preprocessing": {"tmin": None}}),
        ("language-model", {"num_hidden_layers": 99_999_999}),
        ("language-model", {"vocab_size": 99_999_999}),
        ("language-model", {"mixers": 3}),
        ("language-model", {"mixers": [None]}),
        ("language-model", {"mixers": [{"type": []}]}),
        ("language-model", {"residual": 3}),
        ("language-model", {"norm": ["layernorm"]}),
        ("language-model", {"hidden_size": "x"}),
        ("language-model", {"norm_eps": None}),
        ("language-model", {"model_type": "no such"}),
    ],
)  # fmt: skip
def test_settings_that_are_odd(
    name: str, change: dict[str, Any], made: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    path = made(name, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(targets.TARGETS[name].read, path)


def test_what_the_block_raises_is_one_line_that_begins_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_text("x")
    problems = [
        MemoryError(),
        RecursionError("deep"),
        StopIteration(),
        KeyError("a\nb"),
        OSError(5, "bad"),
        ValueError("\x1b[31m"),
    ]
    for problem in [*problems, ValueError("\x1b[31m"), UserError("a \x1b line of the reader"), AssertionError()]:
        with pytest.raises(UserError) as caught, reading(path, "cannot be read as data"):
            raise problem
        assert not unclear(str(caught.value), path, path)
    with pytest.raises(UserError, match="no such file"), reading(tmp_path / "none", "cannot be read as data"):
        (tmp_path / "none").read_text()
    with pytest.raises(KeyboardInterrupt), reading(path, "cannot be read as data"):
        raise KeyboardInterrupt
