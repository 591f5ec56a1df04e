"""Long Range Arena's tasks: readers of the files as people have them."""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.core.errors import UserError
from nearfar.core.reading import check_picture, reading
from nearfar.language.arena import listops

PARTS = ("train", "val", "test")
Example = tuple[list[np.ndarray], int]
"""One sequence, or two, and the label."""


@dataclass(frozen=True)
class Task:
    """A task: its classes, and how to read a part of it ("train", "val", "test") from a folder."""

    model: str
    """Name in `nearfar.language.tcnca.VARIANTS`."""
    labels: int
    length: int
    read: Callable[[Path, str], Iterator[Example]]
    mean: float | None = None
    """Of real-valued inputs in 0..1, which become `(x / 255 - mean) / std`; None: token ids, 0 for padding."""
    std: float = 1.0


def lines(path: Path, columns: int, header: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The numbered rows of a table with tabs; a row of another width is an error."""
    if not path.is_file():
        raise UserError(f"{path}: is missing; it is part of Long Range Arena's release (lra_release.gz)")
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if header and number == 1:
                continue
            if len(row) != columns:
                raise UserError(
                    f"{path}: line {number} has {len(row)} columns instead of {columns}; the file is cut off or of "
                    "another release"
                )
            yield number, row


def read_listops(folder: Path, part: str) -> Iterator[Example]:
    path = folder / "listops-1000" / f"basic_{part}.tsv"
    known = {token: number for number, token in enumerate(listops.TOKENS) if number}
    for number, (source, target) in lines(path, 2, header=True):
        words = source.replace("(", " ").replace(")", " ").split()
        unknown = next((word for word in words if word not in known), None)
        if (
            unknown is not None
            or not re.fullmatch(r"\d", target)
            or words.count("]") != sum(w[0] == "[" for w in words)
        ):
            what = f"{unknown!r} is no token" if unknown else "lists that do not end, or no digit as target"
            raise UserError(f"{path}: line {number}: {what}; the file is cut off or of another release")
        yield [np.array([known[word] for word in words[:2000]], dtype=np.uint8)], int(target)


def byte_ids(text: bytes, length: int = 4000) -> np.ndarray:
    """Byte b as b + 1, cut to `length`."""
    return np.frombuffer(text[:length], dtype=np.uint8).astype(np.int64) + 1


def read_text(folder: Path, part: str) -> Iterator[Example]:
    """aclImdb/{train,test}/{neg,pos}/*.txt; there is no validation part, so as in the original it is the test part."""
    base = folder / "aclImdb" / ("train" if part == "train" else "test")
    for label, name in enumerate(("neg", "pos")):
        paths = sorted((base / name).glob("*.txt"))
        if not paths:
            raise UserError(f"{base / name}: holds no reviews (*.txt); unpack aclImdb_v1.tar.gz to {folder}")
        for path in paths:
            if content := path.read_bytes():
                yield [byte_ids(content)], label


def read_retrieval(folder: Path, part: str) -> Iterator[Example]:
    name = {"val": "eval"}.get(part, part)
    path = folder / "tsv_data" / f"new_aan_pairs.{name}.tsv"
    for number, (label, _, _, first, second) in lines(path, 5):
        if label not in ("0", "1", "0.0", "1.0"):
            raise UserError(f"{path}: line {number}: the label is {label!r}, not 0 or 1")
        yield [byte_ids(text.encode()) for text in (first, second)], int(float(label))


def read_image(folder: Path, part: str) -> Iterator[Example]:
    """CIFAR-10's binary version; grey as ToTensor makes it, 45000 / 5000 of the training part by torch's seed 42."""
    base = folder / "cifar-10-batches-bin"
    names = ["test_batch.bin"] if part == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    rows = []
    for name in names:
        path = base / name
        if not path.is_file() or path.stat().st_size % 3073:
            raise UserError(f"{path}: is missing or cut off; unpack cifar-10-binary.tar.gz to {folder}")
        rows.append(np.fromfile(path, dtype=np.uint8).reshape(-1, 3073))
    table = np.concatenate(rows)
    if part != "test":
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(42)).numpy()
        share = len(table) * 9 // 10
        table = table[order[:share] if part == "train" else order[share:]]
    for row in table:
        colours = Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        yield [np.asarray(colours.convert("L")).flatten()], int(row[0])


def read_pathfinder(size: int) -> Callable[[Path, str], Iterator[Example]]:
    """pathfinder{size}/curv_contour_length_14, the hard part; 80 / 10 / 10 by torch's seed 42."""

    def read(folder: Path, part: str) -> Iterator[Example]:
        base = folder / f"pathfinder{size}" / "curv_contour_length_14"
        found = sorted((base / "metadata").glob("*.npy"), key=lambda p: (len(p.stem), p.stem)) if base.is_dir() else []
        if not found:
            raise UserError(f"{base}: is missing or has no metadata; it is part of Long Range Arena's release")
        examples = []
        for path in found:
            with reading(path, "cannot be read as a list of pictures"):
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    words = line.split()
                    if len(words) < 4 or words[3] not in ("0", "1"):
                        raise UserError(f"{path}: line {number} is no `folder file id label ...`; the file is cut off")
                    name = f"{words[0]}/{words[1]}"
                    if not (shown := base / name).resolve().is_relative_to(base.resolve()):
                        raise UserError(f"{path}: line {number} names {name}, which lies outside of {base}")
                    examples.append((shown, int(words[3])))
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(42)).tolist()
        first, second = len(order) * 8 // 10, len(order) * 9 // 10
        own = {"train": order[:first], "val": order[first:second], "test": order[second:]}[part]
        for i in own:
            path, label = examples[i]
            with reading(path, "cannot be read as a picture"):
                if not path.is_file() or not path.stat().st_size:
                    raise UserError(f"{path}: is missing or empty")
                with Image.open(path) as picture:
                    check_picture(picture, path)
                    pixels = np.asarray(picture.convert("L"))
            if pixels.shape != (size, size):
                raise UserError(f"{path}: is {pixels.shape[1]} x {pixels.shape[0]}, not {size} x {size}")
            yield [pixels.flatten()], label

    return read


TASKS = {
    "listops": Task("mega-listops", 10, 2000, read_listops),
    "text": Task("mega-text", 2, 4000, read_text),
    "retrieval": Task("mega-retrieval", 2, 4000, read_retrieval),
    "image": Task("mega-image", 10, 1024, read_image, 0.48, 0.24),
    "pathfinder": Task("mega-pathfinder", 2, 1024, read_pathfinder(32), 0.5, 0.5),
    "pathx": Task("mega-pathx", 2, 16384, read_pathfinder(128), 0.5, 0.5),
}


class Part(Dataset):
    """One part of a task in memory, as bytes; `limit`: only so many examples."""

    def __init__(self, name: str, folder: str | Path, part: str, limit: int | None = None) -> None:
        if name not in TASKS or part not in PARTS:
            raise UserError(f"task {name!r} and part {part!r} must be of {', '.join(TASKS)} and {', '.join(PARTS)}")
        if limit is not None and limit < 1:
            raise UserError(f"a limit of {limit} leaves no example")
        self.task, self.examples = TASKS[name], []
        for example in self.task.read(Path(folder), part):
            self.examples.append(example)
            if len(self.examples) == limit:
                break
        if not self.examples:
            raise UserError(f"{folder}: part {part} of {name} is empty")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def majority(self) -> float:
        """The share of the commonest class: what answering it always would score."""
        return float(np.bincount([label for _, label in self.examples]).max() / len(self.examples))

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Padded sequences with their masks, for `SequenceClassifier`."""
        batch = {"labels": torch.tensor([label for _, label in examples])}
        for place, (ids, mask) in enumerate([("input_ids", "attention_mask"), ("second_ids", "second_mask")]):
            found = [
                torch.from_numpy(np.ascontiguousarray(parts[place])) for parts, _ in examples if place < len(parts)
            ]
            if not found:
                continue
            lengths = torch.tensor([len(sequence) for sequence in found])
            padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
            if self.task.mean is None:
                batch[ids] = padded.long()
            else:
                batch[ids] = (padded.float() / 255 - self.task.mean) / self.task.std
            if int(lengths.min()) < padded.shape[1]:
                batch[mask] = torch.arange(padded.shape[1]) < lengths[:, None]
        return batch
