"""Text as tokens: plain files, folders, tables and `datasets` corpora; bytes or any tokenizer; models by name."""

import codecs
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import nearfar.language.modeling  # noqa: F401 - registers MixerForCausalLM with the Auto classes
from nearfar.core.errors import UserError, some
from nearfar.core.files import atomic_path
from nearfar.core.finite import check_weights
from nearfar.core.hub import from_hub, unreachable
from nearfar.core.model_folder import KINDS, NEXT, read
from nearfar.core.reading import check_announced, read_json, reading, reason, whole_numbers

TEXT_ENDINGS = (".txt", ".raw", ".md", ".rst", ".py", ".html", ".csv", ".tex", "")
TABLE_ENDINGS = (".jsonl", ".json", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BYTE_OFFSET = 3
"""ByT5's ids are bytes + 3, after padding, end and unknown."""


def byte_tokenizer() -> ByT5Tokenizer:
    """A tokenizer whose tokens are UTF-8 bytes, 259 with padding, end of text and unknown."""
    return ByT5Tokenizer(extra_ids=0)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """ "bytes", a folder, or hub:NAME."""
    if name == "bytes":
        return byte_tokenizer()
    place, is_hub = from_hub(name, "a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=not is_hub, trust_remote_code=False)
    except Exception as error:  # the hub's client has errors of its own, and damaged files raise anything
        raise UserError(f"{name}: no tokenizer there ({unreachable(name, is_hub, error)})") from error


def load_causal_lm(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """A model in eval mode with its tokenizer, from a folder, or of the hub by `hub:NAME`.

    A folder without a tokenizer whose model has 256 or 259 tokens reads bytes.
    """
    if (Path(name) / NEXT).exists() or (Path(name) / KINDS["language model"]).exists():
        read(name, "language model")
    place, is_hub = from_hub(name, "a model")
    asked: Any = {"local_files_only": not is_hub, "trust_remote_code": False}
    _check_config(Path(place))
    try:
        options = {} if dtype is None else {"dtype": dtype}
        loading: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **asked, **options)
        model, found = loading
    except Exception as error:  # the hub's client has errors of its own, and damaged files raise anything
        raise UserError(f"{name}: no causal language model there ({unreachable(name, is_hub, error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{name}: lacks {some(missing)}; the model would have random weights there")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, **asked)
    except Exception as error:  # damaged files raise anything
        if model.config.vocab_size != len(byte_tokenizer()):
            raise UserError(f"{name}: the model comes without a tokenizer ({reason(error)})") from error
        tokenizer = byte_tokenizer()
    check_weights(model.state_dict(), name)
    return model.to(device).eval(), tokenizer


def _check_config(folder: Path) -> None:
    """Raise UserError where a local config.json is damaged, or announces a model that its weights cannot fill."""
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path, "the settings of a language model")
    files = sorted(folder.glob("*.safetensors"))
    tensors = 0
    for file in files:
        with reading(file, "cannot be read as weights"), safetensors.safe_open(str(file), "pt") as weights:
            tensors += len(weights.keys())
    if not files:
        return
    size = max(sum(file.stat().st_size for file in files), 1 << 20)
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= tensors:
        raise UserError(f"{path}: num_hidden_layers is {layers!r}, and its weights are {tensors} tensors")
    for name, value in whole_numbers(config):
        if abs(value) > size:
            raise UserError(f"{path}: {name} is {value}, more than its weights have bytes")


def read_tokens(
    sources: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> Tensor:
    """The tokens of texts, one after the other.

    A source is a text file (UTF-8), a table (.jsonl, .parquet) with a column `text`, either of them compressed (.gz,
    .zst; no .parquet), a folder of such (in the order of their names, hidden ones left out), or `hub:NAME`,
    `hub:NAME:CONFIG` or `hub:NAME:CONFIG:SPLIT`, a `datasets` corpus that is streamed. Documents of tables and corpora
    are followed by the tokenizer's end of text. Bytes are taken as they are.

    Texts are read in pieces and the tokens kept as int32 in a temporary file that is mapped into memory, so a corpus
    may be larger than the memory.

    Raises UserError that names the file for one that is missing, empty, binary or damaged.
    """
    return _read(sources, tokenizer, max_tokens, counting=False)[0]


def read_counted(
    sources: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> tuple[Tensor, int, int]:
    """`read_tokens`, and the bytes of the texts that all tokens stand for, and those of the first token alone.

    Counted in the texts as they are read: tokens need not tell their bytes, unknown ones do not. Ends of documents
    stand for none.
    """
    return _read(sources, tokenizer, max_tokens, counting=True)


def _read(
    sources: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    counting: bool,
) -> tuple[Tensor, int, int]:
    count = size = first = 0
    with tempfile.TemporaryFile() as file:
        for ids, text in token_parts([sources] if isinstance(sources, str | Path) else sources, tokenizer):
            kept = ids[: None if max_tokens is None else max_tokens - count]
            if counting:
                first = first if count else prefix_bytes(text, tokenizer, 1)
                size += text_size(text) if len(kept) == len(ids) else prefix_bytes(text, tokenizer, len(kept))
            file.write(kept.astype(np.int32).tobytes())
            count += len(kept)
            if count == max_tokens:
                break
        if not count:
            raise UserError(f"{sources}: holds no text")
        file.flush()
        return torch.from_numpy(np.memmap(file, np.int32, "r+", shape=(count,))), size, first


def text_size(text: bytes | str) -> int:
    return len(text if isinstance(text, bytes) else text.encode())


def prefix_bytes(text: bytes | str, tokenizer: PreTrainedTokenizerBase, count: int) -> int:
    """The bytes of UTF-8 that the first `count` tokens of a text stand for, the end behind it for none."""
    if isinstance(tokenizer, ByT5Tokenizer):
        return min(count, text_size(text))
    if not tokenizer.is_fast:
        ids = encode(text[:100_000] if count == 1 else text, tokenizer)
        return token_bytes(torch.from_numpy(ids[:count]), tokenizer)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    end, size = 0, 1000 if count == 1 else len(text)
    while True:  # a first token may lie behind much white space, or be long
        found: Any = tokenizer(text[:size], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        end = max((stop for _, stop in found["offset_mapping"][:count]), default=0)
        if size >= len(text) or 0 < end < size:
            return len(text[:end].encode())
        size *= 10


def read_bytes(sources: str | Path | Sequence[str | Path], max_bytes: int | None = None) -> np.ndarray:
    """The bytes of texts as int64 0 .. 255, without what ends documents; for n-grams."""
    tokens = read_tokens(sources, byte_tokenizer(), max_bytes).numpy().astype(np.int64) - BYTE_OFFSET
    return tokens[tokens >= 0]


def token_parts(
    sources: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, bytes | str]]:
    """Pieces of texts as tokens, documents with their ends, each with the text itself."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for source in sources:
        if str(source).startswith("hub:"):
            for text in hub_texts(str(source)):
                yield np.array([*encode(text, tokenizer).tolist(), *end], np.int64), text
            continue
        from_hub(source, "a corpus")
        for path in text_files(Path(source)):
            if ending(path) in TABLE_ENDINGS:
                for text in table_texts(path):
                    yield np.array([*encode(text, tokenizer).tolist(), *end], np.int64), text
            else:
                for piece in text_pieces(path):
                    yield encode(piece, tokenizer), piece


def encode(text: bytes | str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens without beginning or end."""
    if isinstance(tokenizer, ByT5Tokenizer):
        data = text if isinstance(text, bytes) else text.encode()
        return np.frombuffer(data, np.uint8).astype(np.int64) + BYTE_OFFSET
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def token_bytes(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many bytes of UTF-8 the tokens stand for; special tokens for none. Unknown ones, which do not tell, are a
    UserError: `read_counted` counts in the text."""
    if isinstance(tokenizer, ByT5Tokenizer):
        return int((tokens >= BYTE_OFFSET).sum())
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) and (tokens == tokenizer.unk_token_id).any():
        raise UserError("the text has tokens that are unknown to the tokenizer, and their bytes cannot be counted")
    text: Any = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode())


def text_files(path: Path) -> list[Path]:
    """`path`, or the texts and tables below it."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    known = (*TEXT_ENDINGS[:-1], *TABLE_ENDINGS)
    shown = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    found = sorted(p for p in shown if p.is_file() and ending(p) in known)
    if not found:
        raise UserError(f"{path}: no texts in this folder (looked for {', '.join(known)})")
    return found


def ending(path: Path) -> str:
    """What a file is by its name, whether compressed or not."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def opened(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed by its name's ending."""
    kind = COMPRESSED.get(path.suffix.lower())
    if kind is None:
        return path.open("rb")
    import pyarrow  # takes a while to import, and few need it

    stream: Any = pyarrow.input_stream(str(path), compression=kind)
    return io.BufferedReader(stream)


def whole_lines(file: io.BufferedReader, size: int = 2**22) -> Iterator[bytes]:
    """A file in pieces of about `size` bytes that end with a line, in a longer line with a word, else a character."""
    rest = b""
    while data := file.read(size):
        data, rest = rest + data, b""
        cut = data.rfind(b"\n") + 1 or data.rfind(b" ") + 1
        if not cut:
            cut = next(
                (i for i in range(len(data) - 1, max(0, len(data) - 4), -1) if not 0x80 <= data[i] < 0xC0), len(data)
            )
        rest = data[cut:]
        yield data[:cut]
    if rest:
        yield rest


def text_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a text file, about 4 MB of whole lines at a time; an empty or binary file is refused."""
    read, empty = 0, True
    with reading(path, "cannot be read"), opened(path) as file:
        for data in whole_lines(file):
            if b"\0" in data:
                raise UserError(f"{path}: is binary, not text (zero byte at {read + data.index(0)})")
            # a file cut inside a character at its beginning or end, as EnWik8's parts may be, is sound
            start = 0 if read else next((i for i in range(min(3, len(data))) if not 0x80 <= data[i] < 0xC0), 0)
            try:
                codecs.getincrementaldecoder("utf-8")().decode(data[start:])
            except UnicodeDecodeError as error:
                place = read + start + error.start
                raise UserError(f"{path}: is not UTF-8 text (byte {place}); convert it first") from error
            read += len(data)
            empty = empty and not data.strip()
            yield data
    if empty:
        raise UserError(f"{path}: is empty")


def table_texts(path: Path) -> Iterator[str]:
    """The column `text` of a table."""
    with reading(path, "is damaged or no table"):
        if ending(path) == ".parquet":
            import datasets  # takes a second to import, and few need it

            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else reading a local file is told to the hub
            rows: Any = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            rows = json_rows(path)
        empty = True
        for number, row in enumerate(rows, 1):
            empty = False
            yield text_of(row, f"{path}, row {number}")
        if empty:
            raise UserError(f"{path}: is empty")


def json_rows(path: Path) -> Iterator[Any]:
    """The records of a JSON file: one a line, or all in one list. Nesting that is too deep is an error, no crash."""
    with opened(path) as file:
        listed = file.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        if listed:
            yield from json.loads(file.read().decode("utf-8-sig"))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def hub_texts(source: str) -> Iterator[str]:
    """The texts of `hub:NAME[:CONFIG[:SPLIT]]`, streamed."""
    import datasets

    name, config, split = (*source.removeprefix("hub:").split(":"), "", "")[:3]
    try:
        for row in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            yield text_of(row, source)
    except UserError:
        raise
    except Exception as error:  # the hub's client has errors of its own
        raise UserError(f"{source}: cannot be streamed ({unreachable(source, True, error)})") from error


def text_of(row: Any, source: object) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        if isinstance(row, dict) and "text" in row:
            raise UserError(f"{source}: its `text` is no text but {json.dumps(row['text'])[:80]}; leave such rows out")
        there = some(row) if isinstance(row, dict) else f"a {type(row).__name__} in its place"
        raise UserError(f"{source}: has no column `text`; it has {there}")
    if not row["text"].isascii() and any(0xD800 <= ord(c) < 0xE000 for c in row["text"]):
        raise UserError(f"{source}: holds half of a character (a lone surrogate); write it anew as UTF-8")
    return row["text"]


def split_enwik8(path: str | Path, folder: str | Path) -> list[Path]:
    """Cut the 100,000,000 bytes of EnWik8 into 90 / 5 / 5 million: `train.txt.raw`, `valid.txt.raw`, `test.txt.raw`.

    `path` is the file `enwik8` or a zip archive that holds it.
    """
    path = Path(path)
    with reading(path, "no EnWik8 there"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_announced(path, archive.getinfo("enwik8").file_size, compressed=True)
                data = archive.read("enwik8")
        else:
            data = path.read_bytes()
    if len(data) != 100_000_000:
        raise UserError(f"{path}: EnWik8 has 100,000,000 bytes, this has {len(data):,}")
    written = []
    for name, start, stop in (("train", 0, 90), ("valid", 90, 95), ("test", 95, 100)):
        written.append(Path(folder) / f"{name}.txt.raw")
        with atomic_path(written[-1]) as temporary:
            temporary.write_bytes(data[start * 1_000_000 : stop * 1_000_000])
    return written


def first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def quiet_transformers() -> None:
    """For command lines: transformers draws no bar of its own for each file that it reads."""
    disable_progress_bar()
