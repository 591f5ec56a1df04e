"""Reading the weights of a .caffemodel file, without Caffe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfar.core.errors import CheckpointError
from nearfar.core.reading import reading


def read_caffemodel(path: str | Path) -> dict[str, list[Tensor]]:
    """Layer name -> weight blobs of a Caffe network file (protocol buffers, read here without a library)."""
    path = Path(path)
    with reading(path, "cannot be read as a Caffe model", error=CheckpointError):
        content = memoryview(path.read_bytes())
        layers: dict[str, list[Tensor]] = {}
        for field, value in _fields(content):
            if field in (2, 100):  # V1 layers and layers: name is field 4 or 1, blobs are field 6 or 7
                name_field, blob_field = (4, 6) if field == 2 else (1, 7)
                parts = list(_fields(value))
                name = next(bytes(v).decode() for f, v in parts if f == name_field)
                layers[name] = [_blob(v) for f, v in parts if f == blob_field]
    if not any(layers.values()):
        raise CheckpointError(f"{path}: holds no weights; a .caffemodel is needed, not a .prototxt")
    return layers


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind == 2:
            size = varint()
        if size is None or position + size > len(data):
            raise ValueError(f"damaged at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size


def _blob(data: memoryview) -> Tensor:
    shape: list[int] = []
    legacy: dict[int, int] = {}
    values: list[Tensor] = []
    for field, value in _fields(data):
        if field == 7:
            for inner, dim in _fields(value):
                if inner == 1:  # packed varints, or one of them
                    shape += [dim] if isinstance(dim, int) else [v for _, v in _fields(_as_varint_fields(dim))]
        elif field in (1, 2, 3, 4) and isinstance(value, int):
            legacy[field] = value
        elif field in (5, 8):
            dtype = torch.float32 if field == 5 else torch.float64
            values.append(torch.frombuffer(bytearray(value), dtype=dtype).float())
    return torch.cat(values).reshape(shape or [legacy.get(i, 1) for i in (1, 2, 3, 4)])


def _as_varint_fields(packed: memoryview) -> memoryview:
    """Packed varints as a message of fields of type varint, so that one reader does for both."""
    message, fresh = bytearray(), True
    for byte in packed:
        if fresh:
            message.append(8)
        message.append(byte)
        fresh = byte < 128
    return memoryview(bytes(message))
