"""Series of gridded fields from files, checked before anything is computed from them, and their statistics."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nearfar.core.errors import UserError
from nearfar.core.files import write_json
from nearfar.core.finite import is_finite
from nearfar.core.reading import check_announced, check_hdf5, is_hdf5, read_json, reading

AXES = {
    "time": ("time", "valid_time"),
    "latitude": ("latitude", "lat", "y"),
    "longitude": ("longitude", "lon", "x"),
    "level": ("level", "isobaricInhPa", "plev", "pressure_level"),
}
"""Names under which files keep their axes."""

CALENDAR = "its times are no dates of the standard calendar; convert them (xarray's convert_calendar)"


@dataclass(frozen=True)
class Fields:
    """A regular series of fields (time, channel, latitude, longitude), read from its files as it is asked for.

    A channel is a variable, or one level of it, named like `z@500`.
    """

    data: xr.Dataset
    channels: tuple[tuple[str, float | None], ...]
    source: str

    @property
    def names(self) -> list[str]:
        return [name if level is None else f"{name}@{level:g}" for name, level in self.channels]

    @property
    def times(self) -> np.ndarray:
        return self.data["time"].values

    @property
    def latitudes(self) -> np.ndarray:
        return self.data["latitude"].values

    @property
    def size(self) -> tuple[int, int]:
        return self.data.sizes["latitude"], self.data.sizes["longitude"]

    @property
    def step(self) -> Any:
        """The time between two fields."""
        return self.times[1] - self.times[0]

    def __len__(self) -> int:
        return self.data.sizes["time"]

    def part(self, start: int, stop: int) -> "Fields":
        """The fields from `start` to before `stop`."""
        return Fields(self.data.isel(time=slice(start, stop)), self.channels, self.source)

    def read(self, index: int) -> np.ndarray:
        """One time, (channel, latitude, longitude) in float32.

        Raises UserError that names variable and time where a value is missing or not finite.
        """
        now = self.data.isel(time=index)
        maps = []
        for (name, level), title in zip(self.channels, self.names, strict=True):
            field = now[name] if level is None else now[name].sel(level=level)
            with reading(self.source, f"{title} cannot be read at {np.datetime_as_string(self.times[index], 'm')}"):
                values = np.asarray(field.transpose("latitude", "longitude").values, dtype=np.float32)
            if not np.isfinite(values).all():
                raise UserError(
                    f"{self.source}: {title} has {int((~np.isfinite(values)).sum())} missing or infinite values at "
                    f"{np.datetime_as_string(self.times[index], 'm')}; fill or cut them out before"
                )
            maps.append(values)
        return np.stack(maps)


def open_fields(paths: str | Path | Sequence[str | Path], variables: Sequence[str] | None = None) -> Fields:
    """The series in netCDF files, zarr stores or (where cfgrib is installed) GRIB files, put end to end in time.

    Args:
        paths: one or several files or stores.
        variables: which to take, in this order; `name@level` for one level. None for all that have time and grid.

    Raises:
        UserError: a file that cannot be read, an axis or a variable that is not there, latitudes or longitudes that
            are not evenly spaced, times that are not (the first gap is named).
    """
    found = [paths] if isinstance(paths, str | Path) else list(paths)
    if not found:
        raise UserError("no file of fields is given")
    parts = [_open(Path(path)) for path in found]
    source = str(found[0]) if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
    if len(parts) > 1:
        for path, part in zip(found, parts, strict=True):
            for axis in ("latitude", "longitude"):
                if not np.array_equal(part[axis].values, parts[0][axis].values):
                    raise UserError(f"{path}: its {axis}s are not those of {found[0]}; regrid it first")
        parts = [xr.concat(parts, "time", data_vars="minimal", coords="minimal", compat="override", join="override")]
    data = parts[0].sortby("time")
    for axis in ("latitude", "longitude"):
        _check_even(data[axis].values, axis, source)
    _check_times(data["time"].values, source)
    return Fields(data, _channels(data, variables, source), source)


def _open(path: Path) -> xr.Dataset:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    engine: dict[str, Any] = {}
    if path.suffix == ".zarr":
        engine = {"engine": "zarr"}
    elif path.suffix in (".grib", ".grib2", ".grb", ".grb2"):
        engine = {"engine": "cfgrib"}
    with reading(path, "cannot be read as gridded fields"):
        _check_sizes(path, engine)
        try:
            data = xr.open_dataset(path, **engine)
        except ImportError as error:
            raise UserError(f"{path}: needs a package to be read ({error})") from error
        except ValueError as error:
            if "calendar" not in str(error):
                raise
            raise UserError(f"{path}: {CALENDAR} ({error})") from error
        data = _named(path, data)
        if data["time"].dtype.kind != "M":
            raise UserError(f"{path}: {CALENDAR} (they are {data['time'].dtype})")
        return data


def _check_sizes(path: Path, engine: dict[str, Any]) -> None:
    """Raise UserError where a file announces more than it holds, before its axes are read."""
    if path.is_file() and is_hdf5(path):
        check_hdf5(path)
    elif path.is_file() and not engine:
        with xr.open_dataset(path, decode_cf=False, create_default_indexes=False) as data:
            check_announced(path, sum(variable.nbytes for variable in data.variables.values()), compressed=False)


def _named(path: Path, data: xr.Dataset) -> xr.Dataset:
    """With our names for the axes."""
    names = {}
    for axis, known in AXES.items():
        name = next((n for n in known if n in data.dims), None)
        if name is None and axis != "level":
            raise UserError(f"{path}: has no {axis} axis ({', '.join(known)}; it has {', '.join(map(str, data.dims))})")
        if name is not None and name != axis:
            names[name] = axis
        if name is not None and name not in data.coords:
            raise UserError(f"{path}: its axis {name} has no values")
    return data.drop_vars([new for new in names.values() if new in data.variables]).rename(names)


def _check_even(values: np.ndarray, axis: str, source: str) -> None:
    steps = np.diff(values.astype(np.float64))
    if len(steps) == 0 or not np.allclose(steps, steps[0], rtol=1e-3, atol=1e-6):
        spread = f"from {np.abs(steps).min():g} to {np.abs(steps).max():g}" if len(steps) else "of one value"
        raise UserError(f"{source}: its {axis}s are not evenly spaced (steps {spread}); regrid the fields first")


def _check_times(times: np.ndarray, source: str) -> None:
    steps = np.diff(times)
    if len(steps) < 1:
        raise UserError(f"{source}: holds {len(times)} times; a series needs at least two")
    wrong = np.flatnonzero(steps != steps[0])
    if len(wrong) or steps[0] <= np.timedelta64(0):
        i = int(wrong[0]) if len(wrong) else 0
        raise UserError(
            f"{source}: its times are not evenly spaced: after {np.datetime_as_string(times[i], 'm')} comes "
            f"{np.datetime_as_string(times[i + 1], 'm')}, where {np.datetime_as_string(times[i] + steps[0], 'm')} was "
            "due; give a series without gaps or repeats"
        )


def _channels(data: xr.Dataset, variables: Sequence[str] | None, source: str) -> tuple[tuple[str, float | None], ...]:
    grid = {"time", "latitude", "longitude"}
    fitting = [str(n) for n, v in data.data_vars.items() if grid <= set(v.dims) <= {*grid, "level"}]
    channels: list[tuple[str, float | None]] = []
    for wanted in fitting if variables is None else variables:
        name, sign, level = wanted.partition("@")
        if name not in fitting:
            raise UserError(f"{source}: has no variable {name} on (time, latitude, longitude); it has "
                            f"{', '.join(fitting) or 'none'}")  # fmt: skip
        if "level" not in data[name].dims:
            if sign:
                raise UserError(f"{source}: {name} has no levels, so there is no {wanted}")
            channels.append((name, None))
            continue
        levels = [float(v) for v in data["level"].values]
        if sign and (not _number(level) or float(level) not in levels):
            raise UserError(f"{source}: {name} has no level {level}; it has {', '.join(f'{v:g}' for v in levels)}")
        channels += [(name, float(level))] if sign else [(name, v) for v in levels]
    if not channels:
        raise UserError(f"{source}: has no variable on (time, latitude, longitude)")
    return tuple(channels)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Statistics:
    """What is learned from a training series: mean and deviation of each channel, its climatology, and whose they are.

    `climatology` is the mean over time at each place, (channel, latitude, longitude). `first` and `last` are the
    training times, `digest` of their first and last field, so that scores on the same fields are refused.
    """

    names: list[str]
    mean: np.ndarray
    std: np.ndarray
    climatology: np.ndarray
    first: str
    last: str
    digest: str

    def normalize(self, fields: np.ndarray) -> np.ndarray:
        return (fields - self.mean[:, None, None]) / self.std[:, None, None]

    def restore(self, fields: np.ndarray) -> np.ndarray:
        return fields * self.std[:, None, None] + self.mean[:, None, None]

    def save(self, folder: str | Path) -> None:
        """Write them to `statistics.json` in a folder."""
        write_json(Path(folder) / "statistics.json", {k: np.asarray(v).tolist() for k, v in asdict(self).items()})

    @classmethod
    def load(cls, folder: str | Path) -> "Statistics":
        path = Path(folder) / "statistics.json"
        if not path.is_file():
            raise UserError(f"{folder}: is no folder of `train` (it has no statistics.json)")
        with reading(path, "holds no statistics of fields", "train again"):
            found = read_json(path, "statistics of fields")
            arrays = {k: np.asarray(found[k], dtype=np.float32) for k in ("mean", "std", "climatology")}
            statistics = cls(**{**found, **arrays})
            channels = len(statistics.names)
            if not all(isinstance(text, str) for text in (*statistics.names, statistics.digest)) or not channels:
                raise ValueError("names and digest are text")
            if arrays["climatology"].ndim != 3 or any(len(values) != channels for values in arrays.values()):
                raise ValueError(f"{channels} names, and arrays of {[values.shape for values in arrays.values()]}")
            if arrays["mean"].ndim != 1 or arrays["std"].ndim != 1 or not all(map(is_finite, arrays.values())):
                raise ValueError("its numbers are not finite")
            if (arrays["std"] <= 0).any() or not np.datetime64(statistics.first) <= np.datetime64(statistics.last):
                raise ValueError("deviations are positive, and its first time comes before its last")
            return statistics

    def check(self, fields: Fields) -> None:
        """Raise UserError where a test series has other channels or another grid, or shares times with the training."""
        if fields.names != self.names:
            raise UserError(
                f"{fields.source}: its channels are {', '.join(fields.names)}; the net was trained on "
                f"{', '.join(self.names)}"
            )
        if fields.size != self.climatology.shape[1:]:
            raise UserError(f"{fields.source}: its grid is {fields.size}, the training's {self.climatology.shape[1:]}")
        times = fields.times
        if times[0] <= np.datetime64(self.last) and times[-1] >= np.datetime64(self.first):
            raise UserError(
                f"{fields.source}: reaches from {times[0]} to {times[-1]}, the net and its statistics are made from "
                f"{self.first} to {self.last}; scores need times that training has not seen"
            )


def fit_statistics(fields: Fields) -> Statistics:
    """Means, deviations and climatology of a series, one field in memory at a time.

    Raises UserError where a channel does not vary.
    """
    total = square = np.zeros(1)
    for values in iterate(fields):
        total = total + values.astype(np.float64)
        square = square + np.square(values, dtype=np.float64)
    climatology = total / len(fields)
    mean = climatology.mean((1, 2))
    std = np.sqrt(np.maximum((square / len(fields)).mean((1, 2)) - mean**2, 0))
    if flat := [name for name, s, m in zip(fields.names, std, mean, strict=True) if s <= 1e-6 * max(abs(m), 1e-30)]:
        raise UserError(f"{fields.source}: {', '.join(flat)} does not vary, so it cannot be scaled; leave it out")
    marks = fields.read(0).tobytes() + fields.read(len(fields) - 1).tobytes()
    return Statistics(
        fields.names,
        mean.astype(np.float32),
        std.astype(np.float32),
        climatology.astype(np.float32),
        str(fields.times[0]),
        str(fields.times[-1]),
        hashlib.sha256(marks).hexdigest()[:16],
    )


def iterate(fields: Fields) -> Iterator[np.ndarray]:
    for i in range(len(fields)):
        yield fields.read(i)
