"""`nearfar grid-forecast`: train, run and score forecasts of gridded fields."""

import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import GifImagePlugin, Image, ImageDraw

from nearfar.core.cli.console import console, messages, progress, show_json, table
from nearfar.core.cli.options import (
    Device,
    Devices,
    Fresh,
    Json,
    Nodes,
    Precision,
    RunFolder,
    Seed,
    Settings,
    Strategy,
    recipe_option,
)
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_csv
from nearfar.core.plots import COLORS, new_figure, style
from nearfar.core.recipes import read_recipe
from nearfar.vision.forecasting.fields import Statistics, open_fields
from nearfar.vision.forecasting.forecastnet import ForecastNet
from nearfar.vision.forecasting.scores import evaluate as score
from nearfar.vision.forecasting.scores import published_latitudes
from nearfar.vision.forecasting.scores import rollout as roll

app = typer.Typer(
    help="Learn to forecast gridded fields: `simulate` makes a series to try it on, `inspect` shows what a file holds, "
    "`train` learns the next step from a series, `rollout` runs on from a field, `evaluate` scores the forecast beside "
    "persistence and climatology.\n\n"
    "Fields come from netCDF files, zarr stores or (with cfgrib) GRIB files with axes time, latitude and longitude.",
    no_args_is_help=True,
)

Data = Annotated[list[Path], typer.Argument(help="Files or stores of fields; several are put end to end in time.")]
Trained = Annotated[Path, typer.Argument(help="Folder that `train` wrote.")]
Variables = Annotated[
    list[str] | None, typer.Option("--variable", help="A variable, or one level of it as z@500. Repeat; all otherwise.")
]


@app.command()
def simulate(
    output: Annotated[Path, typer.Argument(help="netCDF file to write.")],
    times: Annotated[int, typer.Option(help="Fields.", min=2)] = 300,
    height: Annotated[int, typer.Option(help="Rows.", min=8)] = 32,
    width: Annotated[int, typer.Option(help="Columns.", min=8)] = 64,
    later: Annotated[
        Path | None, typer.Option(help="netCDF file for the last fifth, which training is then not to see.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Simulate rotating shallow water: a series to try the app on, not an observation."""
    from nearfar.vision.forecasting.simulation import shallow_water

    data = shallow_water(times, (height, width), seed=seed)
    cut = times - times // 5 if later else times
    for path, part in ((output, slice(0, cut)), (later, slice(cut, times))):
        if path is not None:
            fields = data.isel(time=part)
            with atomic_path(path) as temporary:
                fields.to_netcdf(temporary, engine="h5netcdf")
            names = ", ".join(map(str, data.data_vars))
            console.print(f"{path}: {fields.sizes['time']} simulated fields of {names} on {height} x {width}")


@app.command()
def inspect(
    data: Data,
    variable: Variables = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of the first fields.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a series holds: channels, grid, times, and the mean and range of each channel."""
    fields = open_fields(data, variable)
    total: dict[str, list[Any]] = {name: [] for name in fields.names}
    with progress() as bar:
        for i in bar.track(range(len(fields)), description="reading"):
            for name, values in zip(fields.names, fields.read(i), strict=True):
                total[name].append((float(values.mean()), float(values.min()), float(values.max())))
    rows = []
    for name, found in total.items():
        mean, low, high = np.array(found).T
        rows.append({"channel": name, "mean": mean.mean(), "min": low.min(), "max": high.max()})
    facts = {
        "times": len(fields),
        "first": str(fields.times[0]),
        "last": str(fields.times[-1]),
        "step": str(fields.step.astype("timedelta64[m]")),
        "grid": list(fields.size),
        "latitudes": [float(fields.latitudes[0]), float(fields.latitudes[-1])],
    }
    if as_json:
        show_json({**facts, "channels": rows})
    else:
        console.print(table([{k: str(v) for k, v in facts.items()}]), table(rows))
    if picture is not None:
        figure = draw(fields.names, [("first", fields.read(0)), ("last", fields.read(len(fields) - 1))])
        with atomic_path(picture) as temporary:
            figure.savefig(temporary, dpi=120)


@app.command()
def train(
    data: Data,
    output: RunFolder,
    variable: Variables = None,
    recipe: Annotated[str | None, recipe_option()] = None,
    settings: Settings = None,
    start: Annotated[Path | None, typer.Option("--from", help="Folder of a trained network to go on from.")] = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
) -> None:
    """Learn the next field from the one before; the epoch is chosen on the last part of the series."""
    from nearfar.vision.forecasting.training import Recipe, train_forecaster

    chosen: Recipe = read_recipe(Recipe, recipe, settings or ())
    fields = open_fields(data, variable)
    net = None if start is None else load(start)[0].train()
    _, _, history = train_forecaster(
        fields, chosen, output, net=net, device=device, show_progress=messages.is_terminal, fresh=fresh
    )
    best = min(history, key=lambda row: row["validation_loss"])
    console.print(
        f"{output}: epoch {int(best['epoch']) + 1} of {len(history)}, on the held part a relative error of "
        f"{best['validation_loss']:.4g}"
    )


@app.command()
def rollout(
    folder: Trained,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="netCDF file of the forecast.")],
    steps: Annotated[int, typer.Option(help="Steps to forecast.", min=1)] = 10,
    at: Annotated[int, typer.Option(help="Which field to start from; -1 is the last.")] = -1,
    animation: Annotated[Path | None, typer.Option(help="GIF of the forecast of the first channel.")] = None,
    device: Device = "auto",
) -> None:
    """Forecast on from a field; each step is written before the next is computed."""
    import h5netcdf

    net, statistics = load(folder)
    fields = open_fields(data, statistics.names)
    if not -len(fields) <= at < len(fields):
        raise UserError(f"{fields.source}: has {len(fields)} times, no number {at}")
    index = at % len(fields)
    if fields.size != net.image_size:
        raise UserError(f"{fields.source}: its grid is {fields.size}, the net's is {net.image_size}; regrid the fields")
    net = net.to(device)
    state = torch.from_numpy(statistics.normalize(fields.read(index)))[None].to(next(net.parameters()).device)
    names = [name.replace("@", "_") for name in statistics.names]
    with atomic_path(output) as temporary, h5netcdf.File(temporary, "w") as file, progress() as bar:
        file.dimensions = {"time": steps, "latitude": fields.size[0], "longitude": fields.size[1]}
        seconds = (fields.step * np.arange(1, steps + 1)).astype("timedelta64[s]")
        origin = np.datetime_as_string(fields.times[index], "s").replace("T", " ")
        time = file.create_variable("time", ("time",), dtype="int64", data=seconds.astype("int64"))
        time.attrs["units"] = f"seconds since {origin}"
        for axis in ("latitude", "longitude"):
            file.create_variable(axis, (axis,), data=fields.data[axis].values.astype("float64"))
        variables = [file.create_variable(n, ("time", "latitude", "longitude"), dtype="float32") for n in names]
        for step, ahead in enumerate(bar.track(roll(net, state, steps), total=steps, description="forecasting")):
            values = statistics.restore(ahead[0].float().cpu().numpy())
            for variable, field in zip(variables, values, strict=True):
                variable[step] = field
    if animation is not None:

        def maps() -> Iterator[np.ndarray]:
            yield fields.read(index)[0]
            with h5netcdf.File(output, "r") as file:
                yield from (file.variables[names[0]][step] for step in range(steps))

        animate(statistics.names[0], maps, animation)
    console.print(f"{output}: {steps} steps from {fields.times[index]}")


@app.command()
def evaluate(
    folder: Trained,
    data: Data,
    leads: Annotated[str, typer.Option(help="Lead times in steps, with commas.")] = "1,2,4,8",
    every: Annotated[int, typer.Option(help="Start at every so manieth field.", min=1)] = 1,
    csv: Annotated[Path | None, typer.Option(help="CSV of the scores.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of RMSE and ACC by lead time.")] = None,
    published: Annotated[
        bool,
        typer.Option("--published-latitudes", help="Weights as in FourCastNet's scores: 90 to -90 degrees."),
    ] = False,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Score the forecast by lead time beside persistence and climatology, on times that training has not seen."""
    net, statistics = load(folder)
    fields = open_fields(data, statistics.names)
    try:
        wanted = sorted({int(lead) for lead in leads.split(",")})
    except ValueError as error:
        raise UserError(f"--leads {leads}: give whole numbers with commas") from error
    net = net.to(device)
    starts = range(0, max(len(fields) - max(wanted), 0), every)
    with progress() as bar:
        task = bar.add_task("scoring", total=len(starts))
        rows = score(
            net,
            fields,
            statistics,
            wanted,
            starts,
            published_latitudes(fields.size[0]) if published else None,
            lambda done, total: bar.update(task, completed=done),
        )
    if csv is not None:
        write_csv(csv, rows)
    if picture is not None:
        figure = draw_scores(rows)
        with atomic_path(picture) as temporary:
            figure.savefig(temporary, dpi=120)
    if as_json:
        show_json(rows)
    else:
        console.print(table(rows, f"{len(starts)} starts, weighted by latitude"))


def load(folder: Path) -> tuple[ForecastNet, Statistics]:
    """The network and the statistics in a folder of `train`."""
    statistics = Statistics.load(folder)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: its training has not ended; call `train` with the same arguments to go on")
    with redirect_stdout(sys.stderr):  # the hub's mixin prints where it loads from
        return ForecastNet.from_pretrained(folder, local_files_only=True).eval(), statistics


def draw(names: list[str], columns: list[tuple[str, np.ndarray]]) -> Figure:
    """One row of maps a channel, one column a time."""
    with style():
        figure = new_figure(4 * len(columns), 2.2 * len(names))
        axes = figure.subplots(len(names), len(columns), squeeze=False)
        for i, name in enumerate(names):
            for axis, (title, fields) in zip(axes[i], columns, strict=True):
                axis.set_title(f"{name}, {title}")
                figure.colorbar(axis.imshow(fields[i], aspect="auto"), ax=axis)
                axis.set_axis_off()
    return figure


def draw_scores(rows: list[dict[str, Any]]) -> Figure:
    """RMSE (above) and ACC (below) against the lead time, one column a variable."""
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    with style():
        figure = new_figure(3.5 * len(variables), 5)
        axes = figure.subplots(2, len(variables), squeeze=False)
        for column, variable in enumerate(variables):
            for measure, axis in zip(("RMSE", "ACC"), axes[:, column], strict=True):
                for color, forecast in zip(COLORS, ("net", "persistence", "climatology"), strict=False):
                    found = [r for r in rows if (r["variable"], r["forecast"]) == (variable, forecast)]
                    leads, values = [r["lead"] for r in found], [r[measure] for r in found]
                    axis.plot(leads, values, marker="o", color=color, label=forecast)
                axis.set(title=variable, xlabel="lead, steps", ylabel=measure)
        axes[0, 0].legend()
    return figure


def animate(name: str, maps: Callable[[], Iterator[np.ndarray]], path: Path) -> None:
    """A GIF of maps (H, W), which are gone through twice, one in memory at a time: for their range, then to draw."""
    low, high, size = np.inf, -np.inf, (0, 0)
    for values in maps():
        low, high, size = min(low, float(values.min())), max(high, float(values.max())), values.shape
    scale, strip = max(1, round(480 / size[1])), 16
    colours = (colormaps["viridis"](np.arange(255) / 254)[:, :3] * 255).round().astype(np.uint8)
    palette = [*colours.flatten().tolist(), 255, 255, 255]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for step, values in enumerate(maps()):
            shades = np.round(254 * (values - low) / max(high - low, 1e-30)).astype(np.uint8)
            picture = np.full((scale * size[0] + strip, scale * size[1]), 255, np.uint8)
            picture[strip:] = shades.repeat(scale, 0).repeat(scale, 1)
            frame = Image.fromarray(picture, "P")
            frame.putpalette(palette)
            ImageDraw.Draw(frame).text((4, 2), f"{name}, step {step}", fill=0)
            if step == 0:
                file.writelines(GifImagePlugin.getheader(frame, info={"loop": 0, "duration": 125})[0])
            file.writelines(GifImagePlugin.getdata(frame, duration=125))
        file.write(b";")
