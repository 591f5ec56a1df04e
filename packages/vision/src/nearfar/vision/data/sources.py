"""Labelled pictures from folders, tables, zip files, WebDataset tars and Hugging Face data sets on disk."""

import json
import logging
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from nearfar.core.errors import UserError, some
from nearfar.core.reading import check_announced, reading
from nearfar.vision.data import tables
from nearfar.vision.data.images import (
    SUFFIXES,
    Pictures,
    is_picture,
    read_file,
    read_member,
    read_part,
    read_row,
    split_pictures,
)

log = logging.getLogger(__name__)

BESIDE = {".txt", ".csv", ".json", ".yaml", ".yml", ".md", ".db", ".ini", ".xml", ".html"}
"""Suffixes of what people keep beside pictures: counted, and no picture that was lost."""

SPLITS = {"train", "val", "valid", "validation", "test"}
"""Folder names that are parts of a data set and no classes."""


class MissingSplit(UserError):
    """The source has no part of the name that was asked for."""


def open_pictures(source: str | Path, split: str | None = None) -> Pictures:
    """Labelled pictures from

    - a folder with one folder of pictures per class, or with one such folder per split;
    - a table, CSV or TSV, of pictures and their classes (see `tables.read_table`), or a folder that holds one called
      `labels.csv` or `metadata.csv`, or `train.csv` and so on for its splits, and no folders of classes;
    - a zip file of the same layouts;
    - a tar file of WebDataset samples, or a folder of them: `KEY.jpg` beside `KEY.cls` with the class's number or
      name, or `KEY.json` with `label` or `labels`; a list there holds all classes of a picture, as `;` does between
      names. Class names may stand in `classes.txt`, one a line. Without labels in the samples a table in the tar file
      or beside it may name the pictures, or they lie in folders of classes. Names like `train-0000.tar` make splits;
    - a Hugging Face image data set: a folder that `save_to_disk` wrote, or Parquet files as a data set's repository
      holds them (which the package datasets then unpacks into its own cache). The picture and the class (or a list of
      them) are the columns called `image` and `label` or `labels`, or those of type Image and ClassLabel.

    `split`: folder inside the source, for example "train"; it may be left out where there is none. Classes are
    numbered in the order of their sorted names. Files that are not used are counted and named. Raises UserError that
    says what is missing.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file() and zipfile.is_zipfile(path):
        return _from_zip(path, split)
    if path.is_file() and re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", path.name.lower()):
        raise UserError(f"{path}: is packed as a whole; unpack it to a .tar file, from which pictures can be read")
    if path.suffix == ".tar":
        if split:
            raise MissingSplit(f"{path}: is one file of samples without splits, so none called {split}")
        return _from_tars([path], path.parent, [])
    if path.is_dir() and (found := _shards(path, split)):
        return _from_tars(*found)
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if saved or path.suffix == ".parquet" or _parquet(path):
        return _from_hugging_face(path, split)
    if (table := _table(path, split)) is not None:
        return _from_table(*table)
    if not path.is_dir():
        raise UserError(f"{path}: is neither a folder nor a zip or tar file of pictures, nor a table (.csv, .tsv)")
    root = _split_folder(path, split) if split else path
    if root is None:
        raise MissingSplit(
            f"{path}: has no folder {split}; it has {some(sorted(p.name for p in path.iterdir() if p.is_dir()))}"
        )
    inside = sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in inside if is_picture(p.relative_to(root))]
    filled = {file.relative_to(root).parts[0] for file in files}
    empty = sorted(d.name for d in root.iterdir() if d.is_dir() and d.name not in filled and d.name[0] != ".")
    parts = [file.relative_to(root).parts for file in files]
    pictures = _labelled(root, [str(f) for f in files], parts, partial(read_file, files), empty)
    say_unused(root, [str(p.relative_to(root)) for p in inside if not is_picture(p.relative_to(root))])
    say_unused(path, _outside_splits(path) if split else [])
    return pictures


def split_of(name: str) -> str:
    """The split that a folder's name says, "" for none: upper case and "training", "testing" are understood."""
    split = {"training": "train", "testing": "test"}.get(name.casefold(), name.casefold())
    return split if split in SPLITS else ""


def _split_folder(path: Path, split: str) -> Path | None:
    """The folder of a split: of this name, or of one that says the same."""
    alike = [p for p in sorted(path.iterdir()) if p.is_dir() and split_of(p.name) == split]
    return path / split if (path / split).is_dir() else next(iter(alike), None)


def _outside_splits(path: Path) -> list[str]:
    """Files of a data set of splits that lie in none of them."""
    places = [p for p in sorted(path.iterdir()) if not (p.is_dir() and split_of(p.name))]
    files = [f for place in places for f in ([place] if place.is_file() else sorted(place.rglob("*"))) if f.is_file()]
    return [str(f.relative_to(path)) for f in files if not (f.suffix == ".csv" and split_of(f.stem))]


TABLES = ("labels.csv", "metadata.csv")
"""What a table of a whole data set is called."""


def _table(path: Path, split: str | None) -> tuple[Path, str | None] | None:
    """The table of a source and the part of it to read, where the source is a table or a folder that holds one."""
    if path.is_file():
        return (path, split) if path.suffix.lower() in tables.SUFFIXES else None
    own = _split_folder(path, split) if split else None
    if split and not own and (path / f"{split}.csv").is_file():
        return path / f"{split}.csv", None
    root = own or path
    found = [root / name for name in TABLES if (root / name).is_file()]
    loose = any(file.is_file() and is_picture(Path(file.name)) for file in root.iterdir())
    folders = any(p.is_dir() and any(is_picture(Path(f.name)) for f in p.iterdir()) for p in root.iterdir())
    if not found or (folders and not loose):
        return None
    return found[0], None if root != path else split


def _from_table(path: Path, split: str | None) -> Pictures:
    def beside(listed: Sequence[str]) -> list[str]:
        """Pictures in the folders of the files listed that are none of them."""
        files = [path.parent / name for name in listed]
        known = {file.resolve() for file in files}
        folders = sorted({file.parent for file in files if file.parent.is_dir()})
        there = [f for folder in folders for f in sorted(folder.iterdir()) if is_picture(Path(f.name)) and f.is_file()]
        return [file.name for file in there if file.resolve() not in known]

    with reading(path, "cannot be read as a table of pictures and labels"):
        text = path.read_text(encoding="utf-8-sig")
    table = tables.read_table(path, text, split, lambda name: (path.parent / name).is_file(), beside)
    files = [path.parent / name for name in table.files]
    return _tabled(path, table, split, [str(f) for f in files], partial(read_file, files))


def _tabled(
    path: str | Path,
    table: tables.Labelled,
    split: str | None,
    names: Sequence[str],
    read: Callable[[int], Image.Image],
) -> Pictures:
    """The pictures of a table's rows."""
    if split and not table.splits:
        raise MissingSplit(f"{path}: has no column split, so none called {split}")
    if split and split not in table.splits:
        raise MissingSplit(f"{path}: has no rows of the split {split}; it has {some(table.splits)}")
    if not split and len(table.splits) > 1:
        raise MissingSplit(f"{path}: holds the splits {some(table.splits)}; name one of them")
    if not names:
        raise UserError(f"{path}: names no pictures with a label")
    say_alike(path, table.classes)
    labels = table.labels if table.multilabel else [label for (label,) in table.labels]
    return Pictures(names, labels, table.classes, read, multilabel=table.multilabel)


def say_unused(source: str | Path, names: Sequence[str]) -> None:
    """Name the files of a data set that are not used: those that their suffix makes no picture, and others."""
    hidden = [n for n in names if any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(n).parts)]
    beside = [n for n in names if n not in hidden and PurePosixPath(n).suffix.lower() in BESIDE]
    left = [n for n in names if n not in hidden and n not in beside]
    kinds = (("left out", left), ("beside the pictures", beside), ("hidden", hidden))
    if told := [f"{len(which)} {what} ({some(which)})" for what, which in kinds if which]:
        log.warning("%s: %d files are not used: %s", source, len(names), "; ".join(told))


def _labelled(
    root: str | Path, names: Sequence[str], parts: Sequence[tuple[str, ...]], read: Callable, empty: Sequence[str] = ()
) -> Pictures:
    if not names:
        raise UserError(f"{root}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    if loose := [name for name, inside in zip(names, parts, strict=True) if len(inside) < 2]:
        raise UserError(f"{root}: {len(loose)} pictures lie in no class folder, for example {loose[0]}")
    if empty:
        raise UserError(f"{root}: no pictures in the class folder {', '.join(empty)}; remove it or fill it")
    classes = sorted({inside[0] for inside in parts})
    if all(map(split_of, classes)):
        raise MissingSplit(f"{root}: holds the splits {', '.join(classes)}; name one of them")
    if len(classes) < 2:
        raise UserError(f"{root}: holds one class folder only, {classes[0]}; to learn there must be two or more")
    say_alike(root, classes)
    index = {name: i for i, name in enumerate(classes)}
    return Pictures(names, [index[inside[0]] for inside in parts], classes, read)


def say_alike(source: str | Path, classes: Sequence[str]) -> None:
    """Name classes that differ by upper and lower case alone."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(name.casefold(), []).append(name)
    if pairs := [" and ".join(group) for group in alike.values() if len(group) > 1]:
        log.warning("%s: classes that differ by case alone are taken as different: %s", source, some(pairs))


def _from_zip(path: Path, split: str | None) -> Pictures:
    with reading(path, "cannot be read as a zip file"), zipfile.ZipFile(path) as archive:
        inside = sorted(n for n in archive.namelist() if not n.endswith("/"))
        if twice := sorted(name for name, times in Counter(inside).items() if times > 1):
            log.warning("%s: %d names stand in it twice, of which the last is read: %s", path, len(twice), some(twice))
            inside = sorted(set(inside))
        members = [n for n in inside if is_picture(PurePosixPath(n))]
        tabled = _table_inside(path, inside, members, split, lambda name: archive.read(name))
    if tabled is not None:
        where, table, names = tabled
        say_unused(path, [n for n in inside if n not in members and f"{path}/{n}" != where])
        return _tabled(where, table, split, [f"{path}/{n}" for n in names], partial(read_member, path, names))
    if split:
        own = [m for m in members if split in map(split_of, PurePosixPath(m).parts[:-2])]
        own = own or [m for m in members if split in PurePosixPath(m).parts[:-2]]
        if not own:
            raise MissingSplit(
                f"{path}: has no folder {split}; it has {some(sorted({PurePosixPath(m).parts[0] for m in members}))}"
            )
        members = own
    parts = _below_common([PurePosixPath(m).parts for m in members])
    pictures = _labelled(path, [f"{path}/{m}" for m in members], parts, partial(read_member, path, members))
    used = set(members)
    other = [n for n in inside if n not in used]
    say_unused(path, [n for n in other if not (split and any(map(split_of, PurePosixPath(n).parts[:-1])))])
    return pictures


def _table_inside(
    path: Path, inside: Sequence[str], members: Sequence[str], split: str | None, read: Callable[[str], bytes]
) -> tuple[str, tables.Labelled, list[str]] | None:
    """Of an archive without folders of classes: where its table stands, the table, and the members of its rows."""
    wanted = (f"{split}.csv", *TABLES) if split else TABLES
    found = [n for w in wanted for n in inside if PurePosixPath(n).name == w and not n.startswith(("__MACOSX", "."))]
    if not found:
        return None
    root = PurePosixPath(found[0]).parent
    below = [PurePosixPath(m).relative_to(root).parts for m in members if PurePosixPath(m).is_relative_to(root)]
    if len({parts[0] for parts in below if len(parts) > 1}) > 1 and all(len(parts) > 1 for parts in below):
        return None  # folders of classes, beside which the table says something else
    there = {str(PurePosixPath(m).relative_to(root)): m for m in members if PurePosixPath(m).is_relative_to(root)}
    where = f"{path}/{found[0]}"
    with reading(where, "cannot be read as a table of pictures and labels"):
        text = read(found[0]).decode("utf-8-sig")
    part = None if PurePosixPath(found[0]).name == f"{split}.csv" else split
    table = tables.read_table(
        where, text, part, there.__contains__, lambda listed: [n for n in there if n not in set(listed)]
    )
    if part is None and split:
        table.splits = [split]
    return where, table, [there.get(name, str(root / name)) for name in table.files]


def _shards(path: Path, split: str | None) -> tuple[list[Path], Path, list[str]] | None:
    """The tar files of a data set's split, the folder they lie in, and files of it that are not used."""
    root = (_split_folder(path, split) if split else None) or path
    everything = sorted(root.glob("*.tar"))
    if not everything:
        parts = sorted(p.name for p in path.iterdir() if p.is_dir() and split_of(p.name) and any(p.glob("*.tar")))
        if parts:
            raise MissingSplit(f"{path}: holds the splits {some(parts)}; name one of them")
        return None
    shards, of = everything, {shard: split_of(re.split("[^A-Za-z]", shard.stem)[0]) for shard in everything}
    if root == path and any(of.values()):
        found = sorted(set(of.values()) - {""})
        if split and split not in found:
            raise MissingSplit(f"{path}: has no tar files of the split {split}; it has {some(found)}")
        if not split and len(found) > 1:
            raise MissingSplit(f"{path}: holds the splits {some(found)}; name one of them")
        shards = [shard for shard in everything if of[shard] == (split or found[0])]
    elif root == path and split:
        raise MissingSplit(f"{path}: has no tar files of the split {split}")
    known = {*shards, root / "classes.txt", *(shard for shard in everything if of[shard])}
    other = [f for f in sorted(root.rglob("*")) if f.is_file() and f not in known]
    return shards, root, [str(f.relative_to(root)) for f in other]


Part = tuple[Path, int, int, str]
"""A picture in a file: the file, where its bytes begin and how many they are, and its name."""


def _from_tars(paths: Sequence[Path], root: Path, unused: Sequence[str]) -> Pictures:
    """Pictures of tar files in the folder `root`, of whose other files `unused` are not used."""
    pictures: list[Part] = []
    given: list[Any] = []  # what each picture's sample says of its class
    texts: dict[str, bytes] = {}
    left = list(unused)
    for path in paths:
        with reading(path, "cannot be read as a tar file of samples"):
            found, labels, other, tables_inside = _read_tar(path)
        pictures += found
        given += labels
        texts |= tables_inside
        left += [f"{path.name}/{name}" if len(paths) > 1 else name for name in other]
    if not pictures:
        raise UserError(f"{some(paths)}: hold no pictures")
    where: str | Path = root if len(paths) > 1 or unused else paths[0]
    names = [name for *_, name in pictures]
    read = partial(read_part, pictures)
    if without := [name for name, label in zip(names, given, strict=True) if label is None]:
        if beside := [root / name for name in TABLES if (root / name).is_file()]:
            texts[str(beside[0])] = beside[0].read_bytes()
            left = [name for name in left if name != beside[0].name]
        inside = [PurePosixPath(name).relative_to(path).parts for path, *_, name in pictures]
        if len(without) < len(names) or (len(texts) != 1 and any(len(parts) < 2 for parts in inside)):
            raise UserError(
                f"{where}: {len(without)} of {len(names)} pictures have neither .cls nor .json with their label, nor a "
                f"table labels.csv of all: {some(without)}"
            )
        say_unused(where, left)
        if len(texts) == 1:
            return _from_table_of_parts(*next(iter(texts.items())), pictures)
        return _labelled(where, names, _below_common(inside), read)
    listed = root / "classes.txt"
    with reading(listed, "cannot be read as names of classes, one a line"):
        lines = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
    labels, classes, multilabel = tables.numbered(names, given, [line for line in lines if line], listed)
    say_alike(where, classes)
    say_unused(where, left)
    return Pictures(names, labels, classes, read, multilabel=multilabel)


def _read_tar(path: Path) -> tuple[list[Part], list[Any], list[str], dict[str, bytes]]:
    """Pictures of a tar file, what their samples say of their class (None: nothing), files not used, and tables."""
    pictures, given, unused, texts = [], [], [], {}
    size = path.stat().st_size
    with tarfile.open(path, "r:") as archive:  # samples are read from their places, so nothing is compressed
        extract: Callable[[tarfile.TarInfo], Any] = archive.extractfile  # never None for files
        members = []
        for member in archive:
            check_announced(path, member.offset_data + member.size, size=size)
            members += [member] if member.isfile() else []
        samples, hidden = _samples(members)
        unused += hidden
        for parts in samples:
            shown = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in SUFFIXES]
            picture = next((suffix for suffix in shown if "." not in suffix), shown[0] if shown else None)
            told = [s for kind in ("cls", "json") for s in parts if picture and s.rpartition(".")[2] == kind][:1]
            for suffix, member in parts.items():
                if PurePosixPath(member.name).name in TABLES:
                    texts[f"{path}/{member.name}"] = extract(member).read()
                elif suffix not in (picture, *told):
                    unused.append(member.name)
            if picture is None:
                continue
            found = parts[picture]
            pictures.append((path, found.offset_data, found.size, f"{path}/{found.name}"))
            given.append(_told(extract(parts[told[0]]).read().decode(), told[0]) if told else None)
    times: Counter = Counter()
    for i, (file, offset, length, name) in enumerate(pictures):
        times[name] += 1
        if times[name] > 1:  # a name that stands there again is another picture
            pictures[i] = (file, offset, length, f"{name} ({times[name]})")
    return pictures, given, unused, texts


def _told(text: str, suffix: str) -> Any:
    """What a sample's file says of its class; None where it says nothing."""
    if not suffix.endswith("json"):
        return text.strip()
    content = json.loads(text)
    if not isinstance(content, dict):
        return content
    found = [name for name in tables.LABELS if content.get(name) is not None]
    if len(found) > 1:
        raise UserError(f"a sample's .json names its classes {len(found)} times, as {some(found)}; leave one")
    label = content[found[0]] if found else None
    return tables.parts_of(label) if found and found[0] in tables.LABELS[2:] else label


def _from_table_of_parts(where: str, content: bytes, pictures: Sequence[Part]) -> Pictures:
    """The pictures of tar files that a table names."""
    index: dict[str, int] = {}
    for i, (path, *_, name) in enumerate(pictures):
        inside = str(PurePosixPath(name).relative_to(path))
        if inside in index:
            raise UserError(f"{where}: {inside} stands in two tar files, so a table cannot say which; rename one")
        index[inside] = i
    with reading(where, "cannot be read as a table of pictures and labels"):
        text = content.decode("utf-8-sig")
    table = tables.read_table(where, text, None, index.__contains__, lambda listed: sorted({*index} - {*listed}))
    if lost := [name for name in table.files if name not in index]:
        raise UserError(f"{where}: {len(lost)} of its pictures are not in the tar files: {some(lost)}")
    parts = [pictures[index[name]] for name in table.files]
    return _tabled(where, table, None, [name for *_, name in parts], partial(read_part, parts))


def _below_common(inside: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths in an archive from where they part."""
    skip = next((i for i in range(8) if len({p[i] if len(p) > i + 1 else "" for p in inside}) > 1), 0)
    return [p[skip:] for p in inside]


def _samples(members: Sequence[tarfile.TarInfo]) -> tuple[list[dict[str, tarfile.TarInfo]], list[str]]:
    """Samples, each its members by suffix, and the names of hidden files.

    A key may hold dots: it is the name up to the suffix that says the class (`cls`, `json`), and what begins with it
    and a dot belongs to it; names without such a neighbour are split at their last dot. A suffix that comes again
    begins another sample.
    """
    shown = [m for m in members if not PurePosixPath(m.name).name.startswith(".")]
    ends = (".cls", ".json")
    labelled = {str(PurePosixPath(m.name).with_suffix("")) for m in shown if m.name.lower().endswith(ends)}
    samples: list[dict[str, tarfile.TarInfo]] = []
    latest: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in shown:
        path = PurePosixPath(member.name)
        parts = path.name.split(".")
        cuts = [str(path.parent / ".".join(parts[:i])) for i in range(len(parts) - 1, 0, -1)]
        key = next((cut for cut in cuts if cut in labelled), cuts[0] if cuts else member.name)
        suffix = path.name[len(PurePosixPath(key).name) + 1 :].lower()
        if key not in latest or suffix in latest[key]:
            latest[key] = {}
            samples.append(latest[key])
        latest[key][suffix] = member
    return samples, [m.name for m in members if m not in shown]


def _parquet(path: Path) -> bool:
    return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))


def _parquet_splits(path: Path) -> dict[str, list[str]]:
    """The Parquet files of a folder by split: that of `NAME-00000-of-00001`, or of a file or folder called `train`."""
    found: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        numbered = re.fullmatch(r"(.+)-\d+-of-\d+", file.stem)
        split = numbered[1] if numbered else split_of(re.split("[^A-Za-z]", file.stem)[0]) or split_of(file.parent.name)
        found.setdefault(split, []).append(str(file))
    if "" in found and len(found) > 1:
        raise UserError(f"{path}: the names of some of its Parquet files say no split: {some(found[''])}; rename them")
    return found


def _from_hugging_face(path: Path, split: str | None) -> Pictures:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: is a Hugging Face data set; install nearfar-vision[datasets] to read it") from error
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else reading a local file is told to the hub
    unused: list[str] = []
    with reading(path, "cannot be read as a Hugging Face data set"):
        if path.is_file():
            data: Any = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif _parquet(path):
            splits = _parquet_splits(path)
            data = datasets.load_dataset(
                "parquet", data_files={name or "train": files for name, files in splits.items()}
            )
            data = data["train"] if "" in splits else data
            files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix != ".parquet"]
            unused = [str(f.relative_to(path)) for f in files]
        else:
            data = datasets.load_from_disk(str(path))
    name = str(path)
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            what = f"has no split {split}; it has" if split else "has splits; name one of"
            raise MissingSplit(f"{path}: {what} {some(sorted(data))}")
        data, name = data[split], f"{path}/{split}"
    elif split:
        raise MissingSplit(f"{path}: has no splits, so none called {split}")

    def column(wanted: Sequence[str], kind: Callable[[Any], bool]) -> str:
        typed = [key for key, feature in data.features.items() if kind(feature)]
        called = [key for key in wanted if key in data.features] or typed
        if len(called) != 1:
            what = f"{len(called)} columns that may be meant, {some(called)}" if called else f"no column {wanted[0]}"
            raise UserError(f"{path}: has {what}; it has {some(sorted(data.column_names))}")
        return called[0]

    def of_class(feature: Any) -> bool:
        return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)

    image = column(("image",), lambda feature: isinstance(feature, datasets.Image))
    label = column(("label", "labels"), of_class)
    if other := sorted({*data.column_names} - {image, label}):
        log.warning("%s: %d columns are not used: %s", name, len(other), some(other))
    say_unused(path, unused)
    with reading(path, f"cannot be read as a data set with classes in its column {label}"):
        labels = list(data[label])
        given = [i for i, value in enumerate(labels) if value is not None and value != -1]
        if len(given) < len(labels):
            log.warning("%s: %d of %d rows have no label and are not used", name, len(labels) - len(given), len(labels))
            data, labels = data.select(given), [labels[i] for i in given]
        if not labels:
            raise ValueError("no row has one")
    names = [f"{name}[{i}]" for i in given]
    feature = data.features[label]
    listed = getattr(getattr(feature, "feature", feature), "names", None) or ()
    numbers, classes, multilabel = tables.numbered(names, labels, listed, f"{path}, column {label}")
    say_alike(path, classes)
    with reading(path, f"cannot be read as a data set with pictures in its column {image}"):
        raw = data.cast_column(image, datasets.Image(decode=False))
    return Pictures(names, numbers, classes, partial(read_row, raw, image, names), multilabel=multilabel)


def same_classes(data: Path, learn: Pictures, hold: Pictures) -> Pictures:
    """`hold` with the classes of `learn`; those without a picture in it are said, others are an error."""
    if unknown := sorted(set(hold.classes) - set(learn.classes)):
        raise UserError(f"{data}: the pictures to choose by have classes that the training has not: {some(unknown)}")
    if hold.multilabel and not learn.multilabel:
        raise UserError(f"{data}: the pictures to choose by have several classes each, those to learn from have one")
    hold = hold.renumbered(learn.classes, learn.multilabel)
    say_missing(data, hold, "the pictures that choose the epoch")
    return hold


def say_missing(data: Path, pictures: Pictures, what: str) -> None:
    """Name the classes that none of the pictures has."""
    if missing := [name for name, number in zip(pictures.classes, pictures.targets().sum(0).tolist()) if not number]:
        log.warning("%s: %s have none of the class %s", data, what, some(missing))


def training_pictures(
    data: Path, share: float, seed: int, track: Callable[..., Any] = lambda items: items, choose_on: str = ""
) -> tuple[Pictures, Pictures, list[str]]:
    """Pictures to learn from, pictures to choose the epoch by, and a line for each that cannot be read.

    The latter are the validation split of `data`, or else a `share` of those to learn from. A test split is left alone
    unless `choose_on` names it.
    """
    try:
        learn = open_pictures(data, "train")
        whole = False
    except MissingSplit:
        learn, whole = open_pictures(data), True
    hold = None
    if choose_on:
        hold = open_pictures(data, choose_on)
    for name in () if whole or choose_on else ("val", "validation", "valid"):
        try:
            hold = open_pictures(data, name)
            break
        except MissingSplit:
            continue
    if hold is None:
        first, second = split_pictures(learn, share, seed)
        learn, hold = learn.subset(first), learn.subset(second)
        say_missing(data, hold, "the pictures that choose the epoch")
    else:
        hold = same_classes(data, learn, hold)
    learn, bad = learn.readable(track)
    hold, also = hold.readable(track)
    if not len(learn) or not len(hold):
        raise UserError(f"{data}: too few readable pictures to learn from")
    return learn, hold, [*bad, *also]
