"""Reading published checkpoints safely, with an account of every key."""

import math
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from nearfar.core.errors import CheckpointError
from nearfar.core.files import atomic_path
from nearfar.core.finite import check_weights
from nearfar.core.reading import DEFLATE, check_hdf5, reading

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""One renaming: a regular expression, and what takes the place of its match in a tensor's name."""

Checkpoint = str | Path | Mapping[str, Any]
"""A checkpoint file, or what it holds."""

WRAPPERS = (
    "ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "state_dict", "model_state_dict", "model_state",
    "model", "params",
)  # fmt: skip
"""Keys under which training scripts keep the weights, in order of preference (averaged weights first)."""

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every name."""


def read_state_dict(path: str | Path, *, wrappers: Iterable[str] = WRAPPERS) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU.

    Reads `.safetensors`; `.pt`, `.pth`, `.ckpt`, `.bin`, `.tar` (PyTorch files, never with arbitrary pickle); and
    Keras `.h5`, `.hdf5` (names are the paths inside the file). What training scripts wrap round the weights is taken
    off: the first of `wrappers` that is there, and the prefixes `module.` and `_orig_mod.` where every name has them.

    Raises CheckpointError where the file is missing, damaged, holds no tensors, or would need arbitrary pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    suffix = path.suffix.lower()
    with reading(
        path, "cannot be read as a checkpoint", "it may be damaged or cut off; copy it again", CheckpointError
    ):
        if suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        elif suffix in (".h5", ".hdf5"):
            content = read_hdf5(path)
        else:
            content = _read_torch(path)
        state = unwrap(content, wrappers)
        for name, value in state.items():  # strides of 0 announce more than is stored
            if value.numel() * value.element_size() > DEFLATE * path.stat().st_size:
                raise CheckpointError(f"{path}: {name} announces {value.numel():,} numbers, which it does not hold")
        return state


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # training scripts keep their arguments, plain values
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its words advise to load it all the same
        raise CheckpointError(
            f"{path}: holds Python objects beside tensors, which could run code when loaded; "
            "save its state_dict alone, best as .safetensors"
        ) from error


def unwrap(content: Mapping[str, Any], wrappers: Iterable[str] = WRAPPERS) -> dict[str, Tensor]:
    """The state dict inside what a training script saved: see `read_state_dict`."""
    for name in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return unwrap(content[name], wrappers)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, not a state dict")
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"holds no tensors (top-level entries: {', '.join(map(str, list(content)[:8]))})")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_hdf5(path: str | Path) -> dict[str, Tensor]:
    """Every numeric array of an HDF5 file, by its path inside the file."""
    arrays: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and np.issubdtype(item.dtype, np.number):
            arrays[name] = torch.from_numpy(np.asarray(item[()]))

    check_hdf5(path)
    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return arrays


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, ignore: Iterable[str] = ()) -> None:
    """Load `state` into `model`, every key accounted for.

    `ignore`: regular expressions (matched from the start of the name) of keys that may be missing in `state` or
    superfluous in it, such as tables that the model computes. BatchNorm's `num_batches_tracked` may always be absent.

    Raises CheckpointError that lists every missing, unexpected and misshapen key, DivergedError for numbers that are
    not finite; the model is then unchanged.
    """
    patterns = [re.compile(pattern) for pattern in (*ignore, r".*\bnum_batches_tracked$")]
    ignored = lambda name: any(pattern.match(name) for pattern in patterns)  # noqa: E731
    own = model.state_dict()
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in state and not ignored(name)]
    for name, value in state.items():
        if name not in own:
            if not ignored(name):
                problems.append(f"unexpected {name} {tuple(value.shape)}")
        elif own[name].shape != value.shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, the model's is {tuple(own[name].shape)}")
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit {type(model).__name__}, {len(problems)} of its tensors differ:\n  "
            + "\n  ".join(problems)
        )
    taken = {name: value for name, value in state.items() if name in own}
    check_weights(taken, type(model).__name__)
    model.load_state_dict(taken, strict=False)


def save_state_dict(model: nn.Module, path: str | Path) -> Path:
    """Write the model's parameters and buffers to `path` as safetensors, atomically.

    Raises DivergedError, and writes nothing, where they are not finite.
    """
    return save_weights(model.state_dict(), path)


def save_weights(state: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write a state dict to `path` as `save_state_dict` does."""
    check_weights(state, path)
    with atomic_path(path) as temporary:
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        safetensors.torch.save_file(whole, temporary)
    return Path(path)


def fit_shapes(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with tensors reshaped to the model's where only axes of length one differ.

    So a linear map and a 1 x 1 convolution, or a vector and the same per-channel map, take each other's weights.
    """
    own = model.state_dict()
    long_axes = lambda shape: [n for n in shape if n > 1]  # noqa: E731
    return {
        name: value.reshape(own[name].shape)
        if name in own and long_axes(own[name].shape) == long_axes(value.shape)
        else value
        for name, value in state.items()
    }


def loaded(model: Model, state: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> Model:
    """`model` in eval mode with the renamed `state` in it, shapes fitted, every key accounted for."""
    load_state_dict(model, fit_shapes(model, state), ignore=ignore)
    return model.eval()


def read(source: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, or of what it holds, without the wrappers that training scripts put around."""
    return unwrap(source) if isinstance(source, Mapping) else read_state_dict(source)


def identify(candidates: Mapping[str, Callable[[], T]], what: str) -> tuple[str, T]:
    """Name and result of the one candidate that accounts for every key of `what`.

    A candidate that does not raises CheckpointError with the reason, or whatever another system's names and shapes lead
    it to. Two that fit, or none, are a CheckpointError too.
    """
    fits: dict[str, T] = {}
    reasons: dict[str, str] = {}
    for name, attempt in candidates.items():
        try:
            fits[name] = attempt()
        except CheckpointError as error:
            reasons[name] = str(error)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reasons[name] = f"{type(error).__name__}: {error}"
    if len(fits) > 1:
        raise CheckpointError(f"{what}: fits {' and '.join(fits)} alike; say which one it is")
    if fits:
        return next(iter(fits.items()))
    if len(reasons) == 1:
        raise CheckpointError(f"{what}: {next(iter(reasons.values()))}")
    listed = [f"  {name}: {reason}" for name, reason in sorted(reasons.items(), key=lambda item: "\n" in item[1])]
    raise CheckpointError(f"{what}: is none of {len(reasons)} known:\n" + "\n".join(listed))


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule], *, anywhere: bool = False) -> dict[str, Tensor]:
    """`state` with every rule applied, in order, to the start of every name, or `anywhere` in it.

    Raises CheckpointError where two tensors come out under one name.
    """
    renamed: dict[str, Tensor] = {}
    patterns = [(re.compile(pattern if anywhere else f"^(?:{pattern})"), replacement) for pattern, replacement in rules]
    for name, value in state.items():
        new = name
        for pattern, replacement in patterns:
            new = pattern.sub(replacement, new)
        if new in renamed:
            raise CheckpointError(f"two of the checkpoint's tensors are {new!r}, the second is {name!r}")
        renamed[new] = value
    return renamed


def ratio(hidden: int, dim: int) -> float:
    """The expansion r with int(r dim) = hidden."""
    found = hidden / dim
    return found if int(found * dim) == hidden else math.nextafter(found, math.inf)


def count(state: Mapping[str, Any], pattern: str) -> int:
    """How many indices, from 0 upwards, fill the one group of `pattern` at the start of the names."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1
