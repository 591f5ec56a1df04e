"""Every parser: how small valid files for it are made, and how they are read."""

import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.core.errors import UserError
from tests.fuzz.engine import Target


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def picture(mode: str = "RGB", size: int = 16) -> Any:
    from PIL import Image

    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return Image.fromarray(rng().integers(0, 255, shape, dtype=np.uint8))


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(mode).save(stream, kind, **options)
    return stream.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> list[str]:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return list(files)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# core --------------------------------------------------------------------------------------------------------------


def make_contracts(folder: Path) -> list[str]:
    from nearfar.core.contracts import shipped

    chosen = min(
        (p for p in shipped() if p.with_suffix(".npz").is_file()), key=lambda p: p.with_suffix(".npz").stat().st_size
    )
    for suffix in (".json", ".npz"):
        shutil.copy(chosen.with_suffix(suffix), folder / f"c{suffix}")
    return ["c.json", "c.npz"]


def read_contract(path: Path) -> None:
    from nearfar.core.contracts import Contract, relative_errors

    contract = Contract.load(path)
    _ = contract.system, contract.variant, contract.settings.unread, contract.tolerance, contract.shapes
    _ = contract.recorded
    if sum(int(np.prod(spec["shape"], dtype=float)) for spec in contract.inputs) < 1e6:
        relative_errors(contract, contract.input_tensors())


def make_checkpoints(folder: Path) -> list[str]:
    import h5py
    import safetensors.torch
    import torch

    state = {"module.a.weight": torch.ones(2, 3), "module.b": torch.zeros(4)}
    safetensors.torch.save_file(state, folder / "x.safetensors")
    torch.save(state, folder / "x.pt")
    torch.save({"state_dict": state, "epoch": 3}, folder / "x.ckpt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    with h5py.File(folder / "x.h5", "w") as file:
        file["dense/kernel"] = np.ones((2, 3), "f4")
        file.create_dataset("dense/packed", data=np.ones((64, 3), "f4"), compression="gzip")
    return ["x.safetensors", "x.pt", "x.ckpt", "old.pt", "x.h5"]


def read_checkpoint(path: Path) -> None:
    import torch

    from nearfar.core.checkpoints import load_state_dict, read_state_dict

    state = read_state_dict(path)
    with suppress(UserError):
        load_state_dict(torch.nn.Linear(3, 2), state)


def make_model_folder(folder: Path) -> list[str]:
    from nearfar.core.model_folder import TrainedOn, writing

    with writing(folder, "segmenter", {"labels": {"1": "x"}}, TrainedOn.of(["a", "b"], ["c"])) as place:
        (place / "weights").write_bytes(b"weights")
    return ["model.json", "weights"]


def read_model_folder(path: Path) -> None:
    from nearfar.core.model_folder import mark_seen, read

    read(path.parent, "segmenter")
    mark_seen(path.parent, ["a", "d"])


# vision ------------------------------------------------------------------------------------------------------------

PICTURES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def make_pictures(folder: Path) -> list[str]:
    from PIL import Image

    names = {"JPEG": "jpg", "TIFF": "tif"}
    files = {f"x.{names.get(kind, kind.lower())}": encoded(kind) for kind in PICTURES}
    files |= {"l.tif": encoded("TIFF", compression="tiff_lzw"), "p.png": encoded("PNG", "L")}
    stream = io.BytesIO()
    Image.fromarray(rng().integers(0, 65535, (16, 16), dtype=np.uint16)).save(stream, "PNG")
    exif = picture().getexif()
    exif[0x0112] = 6
    files |= {"g.png": stream.getvalue(), "e.jpg": encoded("JPEG", exif=exif)}
    return write(folder, files)


def read_vision_picture(path: Path) -> None:
    from nearfar.vision.data.images import read_picture

    read_picture(path)
    read_picture(path.read_bytes(), str(path))


def make_archives(folder: Path) -> list[str]:
    png = encoded("PNG")
    for name, kind in (("x.zip", zipfile.ZIP_STORED), ("y.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", kind) as archive:
            for number in range(4):
                archive.writestr(f"train/{'ab'[number % 2]}/{number}.png", png)
    with tarfile.open(folder / "x.tar", "w") as archive:
        for number in range(3):
            for ending, data in (("png", png), ("cls" if number else "json", b"1" if number else b'{"label": 0}')):
                member = tarfile.TarInfo(f"s/{number}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return ["x.zip", "y.zip", "x.tar"]


def read_archive(path: Path) -> None:
    from nearfar.vision.data.sources import open_pictures

    pictures = open_pictures(path, "train" if path.suffix == ".zip" else None)
    _, failures = pictures.readable()
    pictures.digests()
    for line in failures:
        if not line.startswith(str(path)):
            raise AssertionError(line)


def make_parquet(folder: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = pa.array(
        [{"bytes": encoded("PNG"), "path": None}] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 0]}), folder / "x.parquet")
    return ["x.parquet"]


def read_parquet(path: Path) -> None:
    from nearfar.vision.data.sources import open_pictures

    open_pictures(path).readable()


def make_label_maps(folder: Path) -> list[str]:
    import safetensors.torch
    import torch

    maps = {"scores": torch.rand(2, 3, 3), "classes": torch.zeros(2, 3, 3)}
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    safetensors.torch.save_file(maps, folder / "a/x.safetensors")
    torch.save(torch.stack([maps["scores"], maps["classes"]]), folder / "b/x.pt")
    return ["a/x.safetensors", "b/x.pt"]


def read_label_map(path: Path) -> None:
    from nearfar.vision.classification.token_labels import read_label_map as read

    read(path.parent.parent, str(path.with_suffix(".png")), 5)


def make_regions(folder: Path) -> list[str]:
    ids = np.zeros((16, 16), np.uint8)
    ids[2:8, 3:9], ids[9:14, 9:14] = 1, 2
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(ids).save(stream, "PNG")
    square = {"image_id": 1, "category_id": 1, "segmentation": [[2, 2, 8, 2, 8, 8.5, 2, 8]]}
    runs = {"image_id": 1, "category_id": 1, "segmentation": {"size": [16, 16], "counts": [40, 5, 211]}}
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 16}],
        "categories": [{"id": 1, "name": "rice"}],
        "annotations": [{"id": i, **one} for i, one in enumerate((square, runs))],
    }
    table = b"picture,category,left,top,right,bottom,x,y,inside\na.png,rice,2,2,8,8,,,\na.png,rice,,,,,4,4,1\n"
    files = {"p/a.png": encoded("PNG"), "m/a.png": stream.getvalue(), "c.json": as_json(coco), "t.csv": table}
    write(folder, files)
    return ["m/a.png", "c.json", "c.json", "t.csv"]


def read_regions(path: Path) -> None:
    from nearfar.vision.data.prompts import prompted_regions
    from nearfar.vision.data.regions import coco_regions, cut_out, id_regions

    if path.suffix == ".png":
        found = id_regions(path.parent.parent / "p", path.parent, {1: "rice", 2: "soup"})
    elif path.suffix == ".json":
        found = coco_regions(path.parent / "p", path)
    else:
        found = prompted_regions(path.parent / "p", path, lambda picture, _: np.ones(picture.size[::-1], bool))
    for region in found:
        cut_out(region.picture(), region.mask(), str(path))


def make_classifier(folder: Path) -> list[str]:
    from nearfar.vision.classification.classifier import LINEAR, Classifier, create_model

    words = {"cat": "a cat", "dog": "a dog"}
    Classifier(create_model(LINEAR, 2, 32), LINEAR, ["cat", "dog"], 32, 0.9, descriptions=words).save(folder)
    return ["classifier.json", "classifier.json", "model.safetensors"]


def read_classifier(path: Path) -> None:
    from nearfar.vision.classification.classifier import Classifier
    from nearfar.vision.data.images import Pictures

    found = Classifier.load(path.parent)
    scores = found.scores(Pictures(["x"], [-1], found.classes, lambda _: picture(size=40)))
    _ = found.classes[int(scores.argmax())]


def make_backbone(folder: Path) -> list[str]:
    from nearfar.vision.classification.classifier import Classifier, create_model

    name = "small-nearfar_convnext_atto"
    Classifier(create_model(name, 2, 64), name, ["cat", "dog"], 64, 1.0).save(folder)
    return ["classifier.json"]


def make_fields(folder: Path) -> list[str]:
    import xarray as xr

    time = np.datetime64("2020-01-01", "ns") + np.arange(4) * np.timedelta64(6, "h").astype("timedelta64[ns]")
    data = xr.Dataset(
        {"t": (("time", "latitude", "longitude"), rng().normal(size=(4, 5, 6)).astype("f4"))},
        {"time": time, "latitude": np.linspace(-40.0, 40, 5), "longitude": np.arange(6) * 10.0},
    )
    data.to_netcdf(folder / "x.nc", engine="h5netcdf")
    data.to_netcdf(folder / "y.nc", engine="h5netcdf", encoding={"t": {"zlib": True}})
    data.to_netcdf(folder / "z.nc", engine="scipy")
    return ["x.nc", "y.nc", "z.nc"]


def read_fields(path: Path) -> None:
    from nearfar.vision.forecasting.fields import open_fields

    fields = open_fields(path)
    for index in range(min(len(fields), 5)):
        fields.read(index)
    fields.data.close()


def make_statistics(folder: Path) -> list[str]:
    from nearfar.vision.forecasting.fields import Statistics

    ones = np.ones(2, np.float32)
    Statistics(["t", "u"], ones, ones, np.ones((2, 5, 6), np.float32), "2020-01-01T00", "2020-01-02T00", "ab").save(
        folder
    )
    return ["statistics.json"]


def read_statistics(path: Path) -> None:
    from nearfar.vision.forecasting.fields import Statistics

    found = Statistics.load(path.parent)
    found.restore(found.normalize(np.ones((2, 5, 6), np.float32)))
    np.datetime64(found.last)


# medical -----------------------------------------------------------------------------------------------------------


def make_scans(folder: Path) -> list[str]:
    import nibabel as nib
    import nrrd

    x, affine = rng().normal(0, 100, (8, 9, 10)).astype("f4"), np.diag([1, 1, 2, 1.0])
    nib.save(nib.Nifti1Image(x, affine), folder / "x.nii")
    nib.save(nib.Nifti1Image(x, affine), folder / "x.nii.gz")
    nib.save(nib.Nifti1Image(x.astype("i2"), affine), folder / "i.nii")
    nib.save(nib.Nifti2Image(x, affine), folder / "y.nii")
    space = {"space": "LPS", "space directions": np.eye(3), "space origin": [0, 0, 0]}
    for encoding in ("raw", "gzip", "ascii"):
        nrrd.write(str(folder / f"{encoding}.nrrd"), x[:4], {"encoding": encoding, **space})
    return ["x.nii", "x.nii.gz", "i.nii", "y.nii", "raw.nrrd", "gzip.nrrd", "ascii.nrrd"]


def read_scan(path: Path) -> None:
    from nearfar.medical.data.scans import read_labels, write_labels
    from nearfar.medical.data.scans import read_scan as read

    scan = read(path)
    _ = scan.canonical(), scan.orientation, scan.spacing
    write_labels(path.with_name("out.nii.gz"), np.zeros(scan.shape, np.uint8), scan)
    with suppress(UserError):
        read_labels(path)


def make_dicom(folder: Path) -> list[str]:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    (folder / "s").mkdir()
    for z in range(2):
        meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{z}"
        data = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.PatientID, data.Modality, data.SeriesInstanceUID = "1", "CT", "1.2.3.1"
        data.Rows = data.Columns = 8
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.PixelSpacing, data.SliceThickness = [1, 1], 2
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 2 * z], [1, 0, 0, 0, 1, 0]
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = np.arange(64, dtype="<i2").tobytes()
        pydicom.dcmwrite(folder / f"s/{z}.dcm", data, enforce_file_format=True)
    return ["s/0.dcm"]


def read_dicom(path: Path) -> None:
    from nearfar.medical.data.layouts import find_cases
    from nearfar.medical.data.scans import read_scan

    read_scan(path.parent)
    find_cases(path.parent)


def make_medical_pictures(folder: Path) -> list[str]:
    kinds = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
    return write(folder, {f"x.{ending}": encoded(kind, "L") for kind, ending in kinds.items()})


def read_medical_picture(path: Path) -> None:
    from nearfar.medical.data.scans import read_labels, read_scan

    with suppress(UserError):
        read_scan(path)
    read_labels(path)


def make_arrays(folder: Path) -> list[str]:
    import h5py

    (folder / "train_npz").mkdir()
    (folder / "test_vol_h5").mkdir()
    image, label = rng().random((16, 16)).astype("f4"), np.zeros((16, 16), "f4")
    np.savez(folder / "train_npz/case0005_slice000.npz", image=image, label=label)
    with h5py.File(folder / "test_vol_h5/case0001.npy.h5", "w") as file:
        file["image"], file["label"] = image[None], label[None]
    return ["train_npz/case0005_slice000.npz", "test_vol_h5/case0001.npy.h5"]


def read_arrays(path: Path) -> None:
    from nearfar.medical.data.layouts import find_cases

    collection = find_cases(path.parent.parent)
    collection.read(next(case for case in collection.cases if case.images[0] == path))


DATASETS = {
    "dataset.json": {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz",
    },
    "msd/dataset.json": {
        "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}], "test": ["./imagesTs/b.nii.gz"],
    },
    "pairs/labels.json": {"0": "background", "1": "cup"},
}  # fmt: skip


def make_datasets(folder: Path) -> list[str]:
    for root in (folder, folder / "msd"):
        for name in ("imagesTr/a_0000", "imagesTr/a", "labelsTr/a", "imagesTs/b_0000", "imagesTs/b"):
            write(root, {f"{name}.nii.gz": b"x"})
    write(folder / "pairs", {"images/q.png": b"x", "labels/q.png": b"x"})
    return write(folder, {name: as_json(value) for name, value in DATASETS.items()})


def read_dataset(path: Path) -> None:
    from nearfar.medical.data.layouts import find_cases

    _ = [case.name + str(case.images) for case in find_cases(path.parent).cases]


def make_plans(folder: Path) -> list[str]:
    plan = {
        "patch_size": [32, 32], "UNet_base_num_features": 8, "unet_max_num_features": 16,
        "conv_kernel_sizes": [[3, 3], [3, 3]], "pool_op_kernel_sizes": [[1, 1], [2, 2]],
        "n_conv_per_stage_encoder": [1, 1], "n_conv_per_stage_decoder": [1], "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"], "batch_size": 2,
    }  # fmt: skip
    return write(folder, {"nnUNetPlans.json": as_json({"configurations": {"2d": plan}})})


def read_plans(path: Path) -> None:
    from nearfar.medical.models.umamba import read_plans as read

    read(path, "2d", str(path))


def make_segmenter(folder: Path) -> list[str]:
    from nearfar.medical.recipe import Recipe
    from nearfar.medical.segmenter import Segmenter

    recipe = Recipe(network="monai.BasicUNet", settings={"features": [4, 4, 4, 4, 4, 4]}, roi=(32, 32))
    Segmenter.create(recipe, {1: "cup"}, 1).save(folder)
    return ["model.json", "model.json", "model.safetensors"]


def read_segmenter(path: Path) -> None:
    from nearfar.medical.data.scans import Scan
    from nearfar.medical.segmenter import Segmenter

    segmenter = Segmenter.load(path.parent)
    segmenter(Scan(path, rng().normal(size=(segmenter.in_channels, 32, 32)).astype("f4")))


def make_tiles(folder: Path) -> list[str]:
    files = {f"x.{ending}": encoded(kind) for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif"))}
    return write(folder, files)


def read_histology_tile(path: Path) -> None:
    from nearfar.medical.data.slides import is_slide
    from nearfar.medical.data.tiles import read_tile

    is_slide(path)
    read_tile(path)


def make_tile_tables(folder: Path) -> list[str]:
    text = "file,class,slide,patient\na.png,one,s1,p1\nb.png,two,s2,p1\n"
    return write(folder, {"t.csv": text.encode(), "u.csv": f"\ufeff{text}".encode()})


def read_tile_table(path: Path) -> None:
    from nearfar.medical.data.tiles import find_tiles

    find_tiles(path)


def make_tile_classifier(folder: Path) -> list[str]:
    from nearfar.medical.histology.classifier import TileClassifier, TileRecipe, create_tile_network

    network = create_tile_network("test_resnet", 2, 32)
    TileClassifier(network, TileRecipe("test_resnet", size=32), ["a", "b"], (32, 32)).save(folder)
    return ["tiles.json", "tiles.json", "model.safetensors"]


def read_tile_classifier(path: Path) -> None:
    from nearfar.medical.histology.classifier import TileClassifier

    classifier = TileClassifier.load(path.parent)
    classifier.probabilities([rng().integers(0, 255, (64, 64, 3), dtype=np.uint8)])


def make_slide(folder: Path) -> list[str]:
    import tifffile

    tile = rng().integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name, options in (("x.tif", {}), ("j.tif", {"compression": "zlib"})):
        with tifffile.TiffWriter(folder / name) as writer:
            writer.write(tile, tile=(16, 16), subifds=1, photometric="rgb", **options)
            writer.write(tile[::2, ::2], tile=(16, 16), subfiletype=1, photometric="rgb", **options)
    return ["x.tif", "j.tif"]


def read_slide(path: Path) -> None:
    from nearfar.medical.data.slides import TiffSlide

    with TiffSlide(path) as slide:
        list(slide.tiles(16))


def make_caffe(folder: Path) -> list[str]:
    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2, len(value)]) + value

    blob = field(5, struct.pack("<6f", *range(6))) + field(7, bytes([1 << 3, 2, 1 << 3, 3]))
    layer = field(1, b"conv1") + field(7, blob)
    key = 100 << 3 | 2
    return write(folder, {"x.caffemodel": bytes([key & 127 | 128, key >> 7, len(layer)]) + layer})


def read_caffe(path: Path) -> None:
    from nearfar.medical.models.caffe import read_caffemodel

    read_caffemodel(path)


# eeg ---------------------------------------------------------------------------------------------------------------


def edf(bdf: bool = False, plus: bool = True, records: int = 4, rate: int = 64) -> bytes:
    """Three channels of noise, with annotations or a trigger channel."""

    def cell(value: Any, width: int) -> bytes:
        return str(value).ljust(width).encode()[:width]

    kind, width = ("BDF" if bdf else "EDF"), (3 if bdf else 2)
    labels = ["EEG C3", "EEG Cz", "EEG C4", f"{kind} Annotations" if plus else "Status"]
    counts = [rate] * 3 + [60 if plus else rate]
    low, high = (-8388608, 8388607) if bdf else (-32768, 32767)
    head = (b"\xffBIOSEMI" if bdf else b"0       ") + cell("X X X X", 80) + cell("Startdate 01-JAN-2020 X X X", 80)
    head += b"01.01.2010.00.00" + cell(256 * 5, 8) + cell(f"{kind}+C" if plus else "24BIT" if bdf else "", 44)
    head += cell(records, 8) + cell(1, 8) + cell(4, 4)
    columns = [(labels, 16), ([""] * 4, 80), (["uV"] * 4, 8), ([-200] * 3 + [low], 8), ([200] * 3 + [high], 8)]
    columns += [([low] * 4, 8), ([high] * 4, 8), ([""] * 4, 80), (counts, 8), ([""] * 4, 32)]
    head += b"".join(cell(value, size) for values, size in columns for value in values)
    generator, data = rng(), b""
    for record in range(records):
        for _ in range(3):
            values = (generator.normal(0, 10, rate) / 200 * high).astype(int)
            data += b"".join(int(v).to_bytes(width, "little", signed=True) for v in values)
        if plus:
            notes = f"+{record}\x14\x14\0+{record}.25\x150.5\x14T{record % 3}\x14\0".encode()
            data += notes.ljust(60 * width, b"\0")
        else:
            data += b"".join(int(i // 16 % 3).to_bytes(width, "little", signed=True) for i in range(rate))
    return head + data


def gdf(rate: int = 64, records: int = 4) -> bytes:
    """GDF 2.1: three channels of noise and three cues."""
    head = (b"GDF 2.10" + b"X".ljust(66, b"\0")).ljust(168, b"\0") + struct.pack("<QQH", int(737000.5 * 2**32), 0, 4)
    head = head.ljust(236, b"\0") + struct.pack("<qIIHH", records, 1, 1, 3, 0)
    signals = b"".join(name.ljust(16, b"\0") for name in (b"C3", b"Cz", b"C4")) + bytes(240 + 18)
    signals += struct.pack("<3H", *[4275] * 3)
    for bound in (-200, 200, -32768, 32767):
        signals += struct.pack("<3d", *[bound] * 3)
    signals += bytes(68 * 3 + 36) + struct.pack("<6I", *[rate] * 3, *[3] * 3)
    data = (rng().normal(0, 10, (records, 3, rate)) / 200 * 32767).astype("<i2").tobytes()
    events = b"\x01" + (3).to_bytes(3, "little") + struct.pack("<f3I3H", rate, 10, 80, 150, 769, 770, 769)
    return head + signals.ljust(768, b"\0") + data + events


def make_edf(folder: Path) -> list[str]:
    return write(folder, {"x.edf": edf(), "x0.edf": edf(plus=False), "x.bdf": edf(True), "x0.bdf": edf(True, False)})


def make_other_eeg(folder: Path) -> list[str]:
    import mne
    import scipy.io

    data = rng().normal(0, 1e-5, (3, 256))
    raw = mne.io.RawArray(data, mne.create_info(["C3", "Cz", "C4"], 64.0, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations([0.5, 1.5, 2.5], 0, ["a", "b", "a"]))
    raw.save(folder / "x_raw.fif", verbose="ERROR")
    places = np.array([(name,) for name in raw.ch_names], dtype=[("labels", object)])
    events = np.array([("a", 33.0), ("b", 97.0)], dtype=[("type", object), ("latency", object)])
    sizes = {"srate": 64.0, "nbchan": 3, "pnts": 256, "trials": 1, "xmin": 0.0, "xmax": 4.0, "setname": "x"}
    scipy.io.savemat(folder / "x.set", {"EEG": {"data": data * 1e6, "chanlocs": places, "event": events, **sizes}})
    runs = np.empty(1, object)
    runs[0] = {"X": rng().normal(0, 10, (512, 25)), "trial": np.array([1.0, 65, 129]), "y": np.array([1.0, 2, 1])}
    runs[0] |= {"fs": 64.0, "classes": np.array(["left hand", "right hand"], object)}
    scipy.io.savemat(folder / "A01T.mat", {"data": runs}, do_compression=True)
    header = (
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=x.eeg\n"
        "MarkerFile=x.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=2\n"
        "SamplingInterval=15625\n[Binary Infos]\nBinaryFormat=INT_16\n[Channel Infos]\nCh1=C3,,0.1,uV\nCh2=C4,,0.1,uV\n"
    )
    markers = (
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=x.eeg\n"
        "[Marker Infos]\nMk1=Stimulus,S  1,10,1,0\nMk2=Stimulus,S  2,90,1,0\n"
    )
    samples = (rng().normal(0, 100, (256, 2))).astype("<i2").tobytes()
    write(folder, {"x.vhdr": header.encode(), "x.vmrk": markers.encode(), "x.eeg": samples})
    return ["x_raw.fif", "x.set", "A01T.mat", "x.vhdr"]


def make_gdf(folder: Path) -> list[str]:
    import scipy.io

    scipy.io.savemat(folder / "x.mat", {"classlabel": np.array([1, 2, 1])})
    return [*write(folder, {"x.gdf": gdf()}), "x.mat"]


def read_eeg(path: Path) -> None:
    from nearfar.eeg.preprocessing import Preprocessing
    from nearfar.eeg.recordings import find_recordings
    from nearfar.eeg.trials import load_trials

    if path.name == "x.mat":  # labels of a GDF recording
        path = path.with_suffix(".gdf")
    for recording in find_recordings(path):
        recording.read()
    load_trials(path, preprocessing=Preprocessing(tmin=0.0, tmax=0.4))


def make_decoder(folder: Path) -> list[str]:
    from nearfar.eeg.decoder import Decoder
    from nearfar.eeg.models.baselines import network as create_network
    from nearfar.eeg.preprocessing import Preprocessing

    network = create_network("EEGNet", n_chans=3, n_outputs=2, n_times=128, sfreq=64.0)
    settings = Preprocessing(tmin=0.0, tmax=2.0, l_freq=4.0, h_freq=30.0)
    Decoder(network, ["left", "right"], settings, ["C3", "Cz", "C4"], {"sfreq": 64.0}, {"accuracy": 0.5}).save(folder)
    return ["decoder.json", "decoder.json", "config.json", "model.safetensors"]


def read_decoder(path: Path) -> None:
    from nearfar.eeg.decoder import Decoder

    decoder = Decoder.load(path.parent)
    _ = decoder.sfreq, decoder.info
    decoder.predict_proba(np.zeros((1, len(decoder.ch_names), decoder.network.n_times)))


# audio -------------------------------------------------------------------------------------------------------------


def make_sounds(folder: Path) -> list[str]:
    import soundfile

    samples = rng().normal(0, 0.1, 4000).astype("f4")
    kinds = [("pcm.wav", "PCM_16"), ("float.wav", "FLOAT"), ("ima.wav", "IMA_ADPCM"), ("x.flac", None)]
    for name, subtype in [*kinds, ("x.ogg", "VORBIS"), ("x.mp3", None), ("x.aiff", None)]:
        soundfile.write(folder / name, samples, 8000, subtype=subtype)
    return [*(name for name, _ in kinds), "x.ogg", "x.mp3", "x.aiff"]


def make_containers(folder: Path) -> list[str]:
    import av

    noise = (rng().normal(0, 3000, (1, 4000))).astype("i2")
    names = []
    for name, codec, form in (("x.m4a", "aac", "ipod"), ("x.webm", "libopus", "webm"), ("x.aac", "aac", "adts")):
        rate = 48000 if codec == "libopus" else 16000
        with av.open(str(folder / name), "w", format=form) as container:
            stream = container.add_stream(codec, rate=rate)
            stream.layout = "mono"
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.rate = rate
            size = stream.codec_context.frame_size or None
            resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=size)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                for packet in stream.encode(piece):
                    container.mux(packet)
            for packet in stream.encode(None):
                container.mux(packet)
        names.append(name)
    return names


def read_sound(path: Path) -> None:
    from nearfar.audio.sound import Recording, read_samples

    with Recording(path) as recording:
        for number, _ in enumerate(recording.blocks(0.1)):
            if number > 300:
                break
    read_samples(path, 8000, mix_channels=True)


LISTS = {
    "a.txt": "1 id1/a.wav id2/b.wav\n0 id1/a.wav id3/c.wav\n1 id1/c.wav id3/d.wav\n",
    "k.txt": "spk1 utt1 target\nspk1 utt2 nontarget\n",
    "c.csv": 'LABEL,SAMPLE1,SAMPLE2,gender\n1,a,b,f\n0,"a",c,m\n',
    "p.txt": "a b\nc d\n",
    "s.txt": "a b 0.5 target\nc d -1.25 nontarget\n",
    "e.txt": "modelid segmentid\nm1 a b c\nm2 d\n",
}


def make_lists(folder: Path) -> list[str]:
    return write(folder, {name: text.encode() for name, text in LISTS.items()})


def read_list(path: Path) -> None:
    from nearfar.audio.speakers.scoring import trials

    readers: list[Callable[[Path], Any]] = [trials.read_trials, trials.read_scores, trials.read_enrollments]
    readers += [lambda p, form=form: trials.read_trials(p, form) for form in ("voxceleb", "kaldi", "csv", "pairs")]
    last, taken = None, False
    for read in readers:
        try:
            read(path)
            taken = True
        except UserError as error:
            if not str(error).startswith(str(path)):
                raise
            last = error
    if last is not None and not taken:
        raise last


def make_corpora(folder: Path) -> list[str]:
    write(folder, {f"{place}/{name}.wav": b"x" for place in ("k", "c", "j", "m") for name in "ab"})
    files = {
        "k/wav.scp": "u1 a.wav\nu2 b.wav\n",
        "k/utt2spk": "u1 s1\nu2 s2\n",
        "c/metadata.csv": "file_name,speaker\na.wav,x\nb.wav,y\n",
        "j/metadata.jsonl": '{"file_name": "a.wav", "speaker": "x"}\n{"file_name": "b.wav", "speaker": "y"}\n',
        "m/list.csv": "ID,mix,s1,s2\nx,a.wav,a.wav,b.wav\n",
        "m/list.txt": "a.wav a.wav b.wav\n",
    }
    return write(folder, {name: text.encode() for name, text in files.items()})


def read_corpus(path: Path) -> None:
    if path.parent.name == "m":
        from nearfar.audio.separation.mixtures import find_mixtures

        find_mixtures(path)
        return
    from nearfar.audio.corpora import find_utterances

    for utterance in find_utterances(path.parent):
        utterance.path.is_file()


def speaker_model() -> Any:
    import torch

    from nearfar.audio.speakers.frontends import KaldiFbank
    from nearfar.audio.speakers.ltdnn import ECAPA, SpeakerEncoder

    torch.manual_seed(0)
    return SpeakerEncoder(KaldiFbank(24, 8000), ECAPA(24, 8, 4)).eval()


def make_speaker_system(folder: Path) -> list[str]:
    from nearfar.audio.speakers.system import SpeakerSystem

    x, names = rng().normal(size=(60, 4)).astype("f4"), [f"s{i // 6}" for i in range(60)]
    system = SpeakerSystem.build(speaker_model(), x, names)
    inputs = rng().normal(size=40) + np.arange(40) % 2
    system.fit(inputs, np.arange(40) % 2)
    system.save(folder)
    return ["scoring.json", "scoring.npz", "calibration.json", "config.json", "model.safetensors"]


def _digests_again(path: Path, description: str) -> None:
    """Make the description fit a mutated file beside it, so that its reader and not the digest has to tell."""
    from nearfar.core.files import file_digest

    about = path.parent / description
    if path.name != description:
        content = json.loads(about.read_text())
        content["files"][path.name] = file_digest(path)
        about.write_text(json.dumps(content))


def read_speaker_system(path: Path) -> None:
    from nearfar.audio.speakers.system import SpeakerSystem

    _digests_again(path, "scoring.json")
    system = SpeakerSystem.load(path.parent)
    x = rng().normal(size=(2, system.model.embedding_dim)).astype("f4")
    scores = system.score(x, x, np.array([0]), np.array([1]))
    if system.calibration is not None:
        system.calibration(system.inputs(scores, x, x, np.array([0]), np.array([1]), (np.ones(2), np.ones(2)), None))


def make_gallery(folder: Path) -> list[str]:
    from nearfar.audio.speakers.gallery import Gallery

    gallery = Gallery.new(speaker_model())
    gallery.add("anna", np.ones((2, 4), "f4"))
    gallery.add("bob", np.full((1, 4), 0.5, "f4"))
    gallery.save(folder / "g.npz")
    return ["g.npz"]


def read_gallery(path: Path) -> None:
    from nearfar.audio.speakers.gallery import Gallery
    from nearfar.audio.speakers.system import SpeakerSystem

    model = speaker_model()
    gallery = Gallery.load(path, model)
    gallery.scores(SpeakerSystem(model), gallery.models(None), np.ones(4, "f4"))


def make_separator(folder: Path) -> list[str]:
    from nearfar.audio.separation.mossformer import MossFormer

    MossFormer(num_filters=8, dim=8, depth=1, group_size=16, query_key_dim=4).save_pretrained(folder)
    return ["config.json", "model.safetensors"]


def read_separator(path: Path) -> None:
    from nearfar.audio.checkpoints import load_separator

    load_separator(path.parent)


# language ----------------------------------------------------------------------------------------------------------


def make_texts(folder: Path) -> list[str]:
    files = {
        "x.txt": "Hello, wörld — это текст\nzwei\n".encode() * 3,
        "x.jsonl": b'{"text": "hello"}\n{"text": "w\\u00f6rld"}\n',
        "x.json": b'[{"text": "a"}, {"text": "b"}]',
    }
    return write(folder, files)


def read_text(path: Path) -> None:
    from nearfar.language.texts import byte_tokenizer, read_bytes, read_tokens

    read_tokens(path, byte_tokenizer())
    read_bytes(path)


def make_language_model(folder: Path) -> list[str]:
    from nearfar.language.configuration import MixerConfig
    from nearfar.language.modeling import MixerForCausalLM
    from nearfar.language.texts import byte_tokenizer

    mixers = ["attention", {"type": "base-conv", "kernel_size": 3}]
    config = MixerConfig(vocab_size=259, hidden_size=16, max_position_embeddings=64, mixers=mixers)
    MixerForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return [
        "config.json",
        "config.json",
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def read_language_model(path: Path) -> None:
    import torch

    from nearfar.language.texts import load_causal_lm

    model, _ = load_causal_lm(str(path.parent))
    model(torch.zeros(1, 4, dtype=torch.long))


def make_state(folder: Path) -> list[str]:
    import torch

    from nearfar.language.configuration import MixerConfig
    from nearfar.language.modeling import MixerForCausalLM

    config = MixerConfig(vocab_size=259, hidden_size=16, max_position_embeddings=64, mixers=["attention"])
    with torch.no_grad():
        found = MixerForCausalLM(config).eval()(torch.zeros(1, 4, dtype=torch.long), use_cache=True)
    found.past_key_values.save(folder / "x.safetensors")
    return ["x.safetensors"]


def read_state(path: Path) -> None:
    from nearfar.language.cache import MixerCache

    MixerCache.load(path).numbers()


def make_arena(folder: Path) -> list[str]:
    from nearfar.language.arena import listops

    listops.make(folder, {"train": 3, "val": 1, "test": 1}, 0)
    write(folder, {"tsv_data/new_aan_pairs.train.tsv": b"1\t1\t2\tone text\tother\n0\t1\t2\ttext\tother\n"})
    base = "pathfinder32/curv_contour_length_14"
    stream = io.BytesIO()
    picture("L", 32).save(stream, "PNG")
    rows = "".join(f"imgs/0 {n}.png {n} {n % 2}\n" for n in range(10))
    write(
        folder,
        {f"{base}/metadata/0.npy": rows.encode(), **{f"{base}/imgs/0/{n}.png": stream.getvalue() for n in range(10)}},
    )
    batches = {
        f"cifar-10-batches-bin/data_batch_{i}.bin": rng().integers(0, 9, 6146, np.uint8).tobytes() for i in range(1, 6)
    }
    write(folder, batches)
    tables = ["listops-1000/basic_train.tsv", "tsv_data/new_aan_pairs.train.tsv", f"{base}/metadata/0.npy"]
    return [*tables, *(f"{base}/imgs/0/{n}.png" for n in (0, 1, 2)), "cifar-10-batches-bin/data_batch_1.bin"]


def read_arena(path: Path) -> None:
    from nearfar.language.arena.tasks import Part

    tasks = {"listops-1000": "listops", "tsv_data": "retrieval", "cifar-10-batches-bin": "image"}
    task = tasks.get(path.parent.name, "pathfinder")
    root = path.parents[1] if task != "pathfinder" else next(p for p in path.parents if p.name == "pathfinder32").parent
    Part(task, root, "train")


def make_sweep(folder: Path) -> list[str]:
    from nearfar.language.recall.bench import NUMBERS, ROW

    columns = dict.fromkeys((*ROW, *NUMBERS, "key"), "1") | {"settings": '"{""epochs"": 1}"'}
    return write(folder, {"results.csv": f"{','.join(columns)}\n{','.join(columns.values())}\n".encode()})


def read_sweep(path: Path) -> None:
    from nearfar.language.recall.bench import best_results, read_results

    best_results(read_results(path.parent))


TARGETS: dict[str, Target] = {
    "contracts": Target(make_contracts, read_contract),
    "checkpoints": Target(make_checkpoints, read_checkpoint),
    "model-folders": Target(make_model_folder, read_model_folder),
    "pictures": Target(make_pictures, read_vision_picture),
    "archives": Target(make_archives, read_archive),
    "parquet": Target(make_parquet, read_parquet),
    "label-maps": Target(make_label_maps, read_label_map),
    "regions": Target(make_regions, read_regions),
    "classifier": Target(make_classifier, read_classifier),
    "backbone": Target(make_backbone, read_classifier),
    "fields": Target(make_fields, read_fields),
    "statistics": Target(make_statistics, read_statistics),
    "scans": Target(make_scans, read_scan),
    "dicom": Target(make_dicom, read_dicom),
    "medical-pictures": Target(make_medical_pictures, read_medical_picture),
    "arrays": Target(make_arrays, read_arrays),
    "datasets": Target(make_datasets, read_dataset),
    "plans": Target(make_plans, read_plans),
    "segmenter": Target(make_segmenter, read_segmenter),
    "tiles": Target(make_tiles, read_histology_tile),
    "tile-tables": Target(make_tile_tables, read_tile_table),
    "tile-classifier": Target(make_tile_classifier, read_tile_classifier),
    "slides": Target(make_slide, read_slide),
    "caffe": Target(make_caffe, read_caffe),
    "edf": Target(make_edf, read_eeg),
    "gdf": Target(make_gdf, read_eeg),
    "other-eeg": Target(make_other_eeg, read_eeg),
    "decoder": Target(make_decoder, read_decoder),
    "sounds": Target(make_sounds, read_sound),
    "containers": Target(make_containers, read_sound),
    "lists": Target(make_lists, read_list),
    "corpora": Target(make_corpora, read_corpus),
    "speaker-system": Target(make_speaker_system, read_speaker_system),
    "gallery": Target(make_gallery, read_gallery),
    "separator": Target(make_separator, read_separator),
    "texts": Target(make_texts, read_text),
    "language-model": Target(make_language_model, read_language_model),
    "state": Target(make_state, read_state),
    "arena": Target(make_arena, read_arena),
    "sweep": Target(make_sweep, read_sweep),
}
