"""Numerical contracts: what a system's published code computes, held to by ours.

A contract is a JSON file (settings, the names and shapes of the published state dict, inputs, outputs) beside an
`.npz` file with sampled values of each output. No weights are stored: every tensor of the published state gets
values that depend only on its name and shape (`fill`), so the state is rebuilt from the JSON alone.

A package registers one builder per system in the entry-point group `nearfar.contracts`::

    [project.entry-points."nearfar.contracts"]
    agtcnet = "nearfar.eeg.contracts.agtcnet:build_contract"

and ships its contract files in the folder `data` beside that module. The builder takes a `Contract` and returns a
module in eval mode (or a plain function) that holds the published state, loaded through the system's own checkpoint
converter, and is called with the contract's input tensors. Where two packages hold a part of one system each, both
register a builder under its name, which returns None for what the other holds.

Every setting of a contract counts. A builder reads it (`contract.settings[...]`), holds it against what the model is
(`contract.require`, `contract.require_text`), or names it as documentation that no output depends on
(`contract.document`); `verify` refuses a contract with settings that nobody accounted for.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.reading import read_arrays, read_json, reading

MAX_VALUES = 4096  # values kept per output, evenly strided over the flattened tensor
LARGEST = 1 << 31  # numbers in the state, the inputs or the outputs


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 values that contracts give to the published tensor `name` of `shape`."""
    normal = np.asarray(_random_state(name).standard_normal(shape or None))
    if name.endswith("running_var"):
        values = 1.0 + 0.5 * np.tanh(normal)
    elif name.endswith("running_mean"):
        values = 0.1 * normal
    elif len(shape) > 1:
        values = normal / math.sqrt(max(1, math.prod(shape[1:])))
    elif name.endswith("weight"):
        values = 1.0 + 0.1 * normal
    else:
        values = 0.1 * normal
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(shape)


class Settings(Mapping[str, Any]):
    """The settings of a contract, which remember what was looked up. Asking whether a name is there is no look-up."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_by_name = dict(values)
        self.seen: set[str] = set()
        """Names that were read, held against the model, or named as documentation."""
        self.documentation: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self.values_by_name[name]
        self.seen.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.values_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    @property
    def unread(self) -> list[str]:
        """What nobody accounted for; sentences of four words or more describe a choice for people, and may stand."""
        prose = lambda value: isinstance(value, str) and len(value.split()) >= 4  # noqa: E731
        return [name for name, value in self.values_by_name.items() if name not in self.seen and not prose(value)]


@dataclass(frozen=True)
class Contract:
    """One contract file. `path` is its JSON; the recorded outputs lie beside it as `.npz`."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> "Contract":
        """Read a contract by the path of its `.json` or `.npz` file, or without an ending.

        Raises UserError where a file is missing or is no contract.
        """
        path = Path(path)
        if path.suffix not in (".json", ".npz"):
            path = path.with_name(path.name + ".json")
        path = path.with_suffix(".json")
        content = read_json(path, "a contract")
        if missing := {"system", "variant", "settings", "inputs", "outputs", "state"} - set(content):
            raise UserError(f"{path}: is no contract, it lacks {', '.join(sorted(missing))}")
        with reading(path, "cannot be read as a contract"):
            _check(content)
        if not path.with_suffix(".npz").is_file():
            raise UserError(f"{path.with_suffix('.npz')}: the recorded outputs are missing")
        return cls(path, content)

    @property
    def system(self) -> str:
        return self.content["system"]

    @property
    def variant(self) -> str:
        return self.content["variant"]

    @cached_property
    def settings(self) -> Settings:
        return Settings(self.content["settings"])

    @property
    def notes(self) -> str:
        return self.content.get("notes", "")

    @property
    def inputs(self) -> list[dict[str, Any]]:
        return self.content["inputs"]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        return self.content["outputs"]

    @property
    def tolerance(self) -> float | None:
        """The contract's own tolerance, where the usual one does not apply."""
        return self.content.get("tolerance")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the published state dict, in its order, computed tables included."""
        return {tensor["name"]: tuple(tensor["shape"]) for tensor in self.content["state"]}

    def require(self, **built: Any) -> None:
        """Raise UserError where a setting has another value than the model is `built` with. Absent ones are no matter.

        For what names and shapes tell, and for what the model always does. Lists and tuples, 4 and 4.0 are the same.
        """
        for name, value in built.items():
            if name in self.settings and _plain(self.settings[name]) != _plain(value):
                raise UserError(
                    f"{self.path}: {name} is {self.settings[name]!r}; {self.system} is built with {_plain(value)!r}"
                )

    def require_text(self, **patterns: str) -> None:
        """Raise UserError where a setting in words does not match the regular expression of what is built, in full."""
        for name, pattern in patterns.items():
            if name in self.settings and not re.fullmatch(pattern, str(self.settings[name]), re.I | re.S):
                raise UserError(
                    f"{self.path}: {name} is {self.settings[name]!r}; {self.system} is built with {pattern!r}"
                )

    def document(self, *names: str) -> None:
        """These settings describe training, layout or naming: no output depends on them."""
        self.settings.documentation.update(names)
        self.settings.seen.update(names)

    def state(self) -> dict[str, Tensor]:
        """The published state dict; tables that the published code computes (kind `constant`) are left out."""
        return {
            tensor["name"]: fill(tensor["name"], tuple(tensor["shape"]))
            for tensor in self.content["state"]
            if tensor["kind"] != "constant"
        }

    def input_tensors(self) -> list[Tensor]:
        """The inputs, in order: float32 from a normal distribution, or int64 in [0, high)."""
        tensors = []
        for spec in self.inputs:
            rng, shape = _random_state("input:" + spec["name"]), tuple(spec["shape"])
            if spec["dist"] == "randint":
                values = rng.randint(0, spec["high"], size=shape).astype(np.int64)
            else:
                values = (spec.get("scale", 1.0) * rng.standard_normal(shape)).astype(np.float32)
            tensors.append(torch.from_numpy(values))
        return tensors

    @cached_property
    def recorded(self) -> dict[str, np.ndarray]:
        """Sampled values of each output, as the published code gave them."""
        path = self.path.with_suffix(".npz")
        arrays = read_arrays(path, "recorded outputs")
        for spec in self.outputs:
            values = arrays.get(spec["name"])
            if (
                values is None
                or values.dtype.kind not in "fiu"
                or values.size != min(MAX_VALUES, math.prod(spec["shape"]))
            ):
                raise UserError(f"{path}: does not hold the values of {spec['name']} that {self.path.name} announces")
        return arrays


def relative_errors(contract: Contract, outputs: Any) -> dict[str, float]:
    """||ours - published|| / ||published|| of each recorded output; inf where it is missing or misshapen.

    `outputs`: a tensor, or tensors nested in tuples, lists and dicts, named `out`, `out.0`, `out.key` ...
    """
    found = named_tensors(outputs)
    errors = {}
    for spec in contract.outputs:
        name, ours = spec["name"], found.get(spec["name"])
        if ours is None or list(ours.shape) != spec["shape"]:
            errors[name] = math.inf
            continue
        theirs = contract.recorded[name]
        error = np.linalg.norm(_sample(ours) - theirs) / max(float(np.linalg.norm(theirs)), 1e-12)
        errors[name] = float(error) if np.isfinite(error) else math.inf
    return errors


def named_tensors(value: Any, prefix: str = "out") -> dict[str, Tensor]:
    """The tensors in nested tuples, lists and dicts, by the names that contracts use."""
    if isinstance(value, Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: t for key, item in items for name, t in named_tensors(item, f"{prefix}.{key}").items()}


def first_that_builds(builders: Sequence[Callable[[Contract], Any]], contract: Contract) -> Callable[..., Any]:
    """What the first of `builders` makes of the contract; one that does not know its variant returns None.

    A system may be spread over packages, each with a builder of its own under the system's name.
    """
    for build in builders:
        if (model := build(contract)) is not None:
            return model
    raise UserError(f"{contract.path}: no installed package builds {contract.system} {contract.variant}")


def shipped(system: str = "*") -> list[Path]:
    """The contract files that came with the installed packages, of one system or of all, sorted by name.

    They lie in the folder `data` beside the modules of the entry points.
    """
    packages = {point.module.rpartition(".")[0] for point in entry_points(group="nearfar.contracts")}
    folders = [Path(place) for name in packages for place in find_spec(name).submodule_search_locations]  # type: ignore[union-attr]
    return sorted((path for f in folders for path in f.glob(f"data/{system}--*.json")), key=lambda path: path.name)


def verify(
    contract: Contract,
    build: Callable[[Contract], Callable[..., Any]],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> dict[str, float]:
    """Build the contract's model, run it on the contract's inputs and return the relative error per output.

    float32 means float32: on CUDA, TF32, torch's default for convolutions, is off meanwhile. bfloat16 and float16 mean
    autocast, as training and inference use them: weights and inputs stay in float32.

    Raises UserError where the builder accounted for less than every setting.
    """
    contract.settings.seen.clear()
    model = build(contract)
    half = dtype in (torch.bfloat16, torch.float16)
    lower = torch.autocast(torch.device(device).type, dtype) if half else nullcontext()
    dtype = torch.float32 if half else dtype
    inputs = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in contract.input_tensors()]
    if isinstance(model, nn.Module):
        model = model.to(device, dtype).eval()
    if compiled:
        model = torch.compile(model)
    with torch.no_grad(), lower, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = model(*inputs)
    if unread := contract.settings.unread:
        raise UserError(
            f"{contract.path}: nothing of {contract.system} depends on {', '.join(unread)}; a setting must be read, "
            "told by a shape, or be on the system's list of documentation"
        )
    return relative_errors(contract, outputs)


def _check(content: Mapping[str, Any]) -> None:
    """Raise ValueError where parts of a contract are of another kind, or larger than any model is."""
    kinds = {"system": str, "variant": str, "settings": dict, "inputs": list, "outputs": list, "state": list}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    needs = {"inputs": ("name", "dist"), "outputs": ("name",), "state": ("name", "kind")}
    for part, names in needs.items():
        total = 0
        for spec in content[part]:
            shape = spec["shape"]
            if not all(isinstance(spec[name], str) for name in names):
                raise ValueError(f"{part} have {' and '.join(names)} in words")
            if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{spec['name']} of the {part} has the shape {shape!r}")
            total += math.prod(shape)
        if total > LARGEST:
            raise ValueError(f"the {part} have {total:,} numbers, more than {LARGEST:,}")
    for spec in content["inputs"]:
        if spec["dist"] == "randint" and not (type(spec["high"]) is int and 0 < spec["high"] < 2**31):
            raise ValueError(f"the input {spec['name']} is below {spec['high']!r}")
        if not math.isfinite(spec.get("scale", 1.0)):
            raise ValueError(f"the input {spec['name']} has the scale {spec['scale']}")
    tolerance = content.get("tolerance")
    if tolerance is not None and (isinstance(tolerance, bool) or not 0 < tolerance < math.inf):
        raise ValueError(f"the tolerance is {tolerance!r}")


def _plain(value: Any) -> Any:
    """Sequences as lists, so that settings compare."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _random_state(name: str) -> np.random.RandomState:
    # contracts are defined by numpy's legacy generator, whose stream never changes
    return np.random.RandomState(zlib.crc32(name.encode()))


def _sample(tensor: Tensor) -> np.ndarray:
    flat = tensor.detach().cpu().to(torch.float64).flatten()
    if flat.numel() > MAX_VALUES:
        flat = flat[torch.from_numpy(_positions(flat.numel()))]
    return flat.numpy()


def _positions(count: int) -> np.ndarray:
    """Which of `count` values a contract keeps: torch.linspace from 0 to count - 1, rounded.

    As a processor with vectors computes it in float32, with one rounding for product and sum: torch's form without them
    rounds twice and gives other positions.
    """
    step = float(np.float32(count - 1) / np.float32(MAX_VALUES - 1))
    place = np.arange(MAX_VALUES)
    exact = np.where(place < MAX_VALUES // 2, step * place, count - 1 - step * (MAX_VALUES - 1 - place))
    return np.rint(exact.astype(np.float32)).astype(np.int64)
