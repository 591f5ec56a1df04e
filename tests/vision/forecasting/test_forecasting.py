"""Forecasting: fields from files and what is refused, statistics, scores, rollouts, a training, the app."""

import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib import colormaps
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from nearfar.apps.grid_forecast.cli import animate, app
from nearfar.core.errors import UserError
from nearfar.vision.forecasting.fields import fit_statistics, open_fields
from nearfar.vision.forecasting.forecastnet import ForecastNet
from nearfar.vision.forecasting.scores import acc, evaluate, latitude_weights, published_latitudes, rmse, rollout
from nearfar.vision.forecasting.simulation import shallow_water
from nearfar.vision.forecasting.training import Recipe, Windows, relative_l2, train_forecaster


@pytest.fixture(scope="module")
def water(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("water") / "water.nc"
    shallow_water(90, (16, 32)).to_netcdf(path, engine="h5netcdf")
    return path


def write(path: Path, data: xr.Dataset) -> Path:
    data.to_netcdf(path, engine="h5netcdf")
    return path


def test_fields_are_read_as_they_are(water: Path, tmp_path: Path) -> None:
    data = xr.open_dataset(water)
    fields = open_fields(water, ["v", "h"])
    assert fields.names == ["v", "h"]
    assert (len(fields), fields.size) == (90, (16, 32))
    np.testing.assert_array_equal(fields.read(5)[1], data["h"].values[5])
    # several files are one series, whatever their order
    first, second = (
        write(tmp_path / f"{i}.nc", data.isel(time=part)) for i, part in enumerate((slice(0, 40), slice(40, 90)))
    )
    joined = open_fields([second, first], ["v", "h"])
    np.testing.assert_array_equal(joined.read(41), fields.read(41))
    data.to_zarr(tmp_path / "water.zarr")
    np.testing.assert_array_equal(open_fields(tmp_path / "water.zarr", ["v", "h"]).read(41), fields.read(41))
    # other names of the axes, levels
    other = data.rename(time="valid_time", latitude="lat", longitude="lon").expand_dims(level=[500.0, 850.0])
    levels = open_fields(write(tmp_path / "levels.nc", other), ["h@850", "u"])
    assert levels.names == ["h@850", "u@500", "u@850"]
    np.testing.assert_array_equal(levels.read(3)[0], data["h"].values[3])


def test_what_is_refused(water: Path, tmp_path: Path) -> None:
    data = xr.open_dataset(water)
    hole = data.copy(deep=True)
    hole["u"].values[7, 3, 4] = np.nan
    fields = open_fields(write(tmp_path / "hole.nc", hole))
    with pytest.raises(UserError, match=r"hole.nc: u has 1 missing.*2000-01-02T18"):
        fields.read(7)
    gap = write(tmp_path / "gap.nc", data.isel(time=[0, 1, 2, 4, 5]))
    with pytest.raises(
        UserError, match=r"after 2000-01-01T12:00 comes 2000-01-02T00:00, where 2000-01-01T18:00 was due"
    ):
        open_fields(gap)
    uneven = data.assign_coords(latitude=np.sort(np.random.default_rng(0).uniform(-80, 80, 16)))
    with pytest.raises(UserError, match="latitudes are not evenly spaced"):
        open_fields(write(tmp_path / "gauss.nc", uneven))
    with pytest.raises(UserError, match=r"has no variable t2m .* it has h, u, v"):
        open_fields(water, ["t2m"])
    with pytest.raises(UserError, match="h has no levels"):
        open_fields(water, ["h@500"])
    with pytest.raises(UserError, match="has no longitude axis"):
        open_fields(write(tmp_path / "line.nc", data.isel(longitude=0, drop=True)))
    with pytest.raises(UserError, match="holds 1 times"):
        open_fields(write(tmp_path / "one.nc", data.isel(time=[0])))
    days = data.assign_coords(time=np.arange(90) / 4)
    with pytest.raises(UserError, match=r"days.nc: its times are no dates of the standard calendar.*float64"):
        open_fields(write(tmp_path / "days.nc", days))
    days["time"].attrs = {"units": "days since 2000-01-01", "calendar": "360_day"}
    with pytest.raises(UserError, match=r"model.nc: its times are no dates of the standard calendar"):
        open_fields(write(tmp_path / "model.nc", days))
    (tmp_path / "text.nc").write_text("no fields")
    with pytest.raises(UserError, match=r"text.nc: cannot be read"):
        open_fields(tmp_path / "text.nc")
    with pytest.raises(UserError, match="no such file"):
        open_fields(tmp_path / "none.nc")
    with pytest.raises(UserError, match="latitudes are not those of"):
        open_fields([water, write(tmp_path / "half.nc", data.isel(latitude=slice(0, 8)))])
    still = data.assign(h=xr.zeros_like(data["h"]))
    with pytest.raises(UserError, match="h does not vary"):
        fit_statistics(open_fields(write(tmp_path / "still.nc", still)))


def test_statistics(water: Path, tmp_path: Path) -> None:
    fields = open_fields(water)
    statistics = fit_statistics(fields.part(0, 60))
    values = np.stack([fields.read(i) for i in range(60)]).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, values.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(statistics.std, values.std((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(statistics.climatology, values.mean(0), atol=1e-6)
    x = fields.read(70)
    np.testing.assert_allclose(statistics.restore(statistics.normalize(x)), x, atol=1e-6)
    statistics.save(tmp_path)
    again = type(statistics).load(tmp_path)
    np.testing.assert_array_equal(again.climatology, statistics.climatology)
    assert again.names == ["h", "u", "v"]
    again.check(fields.part(60, 90))
    with pytest.raises(UserError, match="times that training has not seen"):
        again.check(fields.part(59, 90))
    with pytest.raises(UserError, match="trained on h, u, v"):
        again.check(open_fields(water, ["h"]).part(60, 90))


def test_scores_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    f, t, c = rng.standard_normal((3, 2, 4, 5))
    latitudes = np.array([60.0, 20.0, -20.0, -60.0])
    w = latitude_weights(latitudes)
    assert w.mean() == pytest.approx(1)
    total = sum(w[i] * (f[1, i, j] - t[1, i, j]) ** 2 for i in range(4) for j in range(5))
    assert rmse(f, t, w)[1] == pytest.approx((total / 20) ** 0.5)
    cells = [(w[i], f[0, i, j] - c[0, i, j], t[0, i, j] - c[0, i, j]) for i in range(4) for j in range(5)]
    top = sum(a * b * d for a, b, d in cells)
    want = top / (sum(a * b * b for a, b, _ in cells) * sum(a * d * d for a, _, d in cells)) ** 0.5
    assert acc(f, t, c, w)[0] == pytest.approx(want)
    assert acc(t, t, c, w) == pytest.approx(1)
    assert acc(c, t, c, w) == pytest.approx(0)
    np.testing.assert_allclose(published_latitudes(5), [90, 45, 0, -45, -90])


class Shift(nn.Module):
    """The field one column further; a forecaster that is right about a field that moves so."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x.roll(1, -1)


def moving(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    start = rng.standard_normal((8, 16)).astype(np.float32)
    data = shallow_water(30, (8, 16))
    moved = np.stack([np.roll(start, i, -1) for i in range(30)])
    return write(tmp_path / "moving.nc", data[["h"]].assign(h=(data["h"].dims, moved)))


def test_evaluation_of_a_forecaster_that_is_right(tmp_path: Path) -> None:
    fields = open_fields(moving(tmp_path))
    statistics = fit_statistics(fields.part(0, 16))
    rows = evaluate(Shift(), fields.part(16, 30), statistics, [1, 4])
    assert [(r["lead"], r["forecast"]) for r in rows] == [
        (lead, name) for lead in (1, 4) for name in ("climatology", "net", "persistence")
    ]
    for row in rows:
        if row["forecast"] == "net":
            assert row["RMSE"] < 1e-5
            assert row["ACC"] == pytest.approx(1, abs=1e-5)
        else:
            assert row["RMSE"] > 0.3
    with pytest.raises(UserError, match="leads from 1 up to 13"):
        evaluate(Shift(), fields.part(16, 30), statistics, [14])


def test_rollout_keeps_nothing_and_stops_where_it_fails() -> None:
    made, most = [], 0

    class Count(Shift):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made.append(weakref.ref(y := super().forward(x)))
            return y

    steps = rollout(Count(), torch.randn(1, 1, 4, 6), 1000)
    next(steps)
    assert len(made) == 1  # each step is computed when it is asked for
    for _ in steps:
        most = max(most, sum(state() is not None for state in made))
    assert len(made) == 1000
    assert most <= 2  # the last state and the one made of it
    with pytest.raises(UserError, match="not finite after 128 steps"):
        net = Shift()
        net.gain.data.fill_(2.0)
        list(rollout(net, torch.ones(1, 1, 2, 2), 200))


def test_animation_holds_one_map_at_a_time(tmp_path: Path) -> None:
    """Every frame is drawn as it is, and eight hundred of them take no more memory than two hundred."""
    start = np.random.default_rng(0).standard_normal((12, 240)).astype(np.float32)
    peaks = []
    for steps in (200, 800):
        tracemalloc.start()
        animate("h", lambda steps=steps: (np.roll(start, i, 1) for i in range(steps)), tmp_path / "a.gif")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (800, (480, 40), 0)
        picture.seek(37)
        shown = np.asarray(picture.convert("RGB"))[16::2, ::2]
    moved = np.roll(start, 37, 1)
    shade = (moved - start.min()) / (start.max() - start.min())
    want = colormaps["viridis"](np.round(254 * shade) / 254)[..., :3] * 255
    assert np.abs(shown - want).max() <= 2


def test_windows_and_loss(water: Path) -> None:
    fields = open_fields(water)
    statistics = fit_statistics(fields)
    window = Windows(fields, statistics, 2)[4]
    assert window.shape == (3, 3, 16, 32)
    torch.testing.assert_close(Windows(fields, statistics, 2, memory=0)[4], window)
    torch.testing.assert_close(window[2], torch.from_numpy(statistics.normalize(fields.read(6))))
    a, b = torch.randn(2, 4, 3, 5, 6)
    want = sum((a[i] - b[i]).norm() / b[i].norm() for i in range(4)) / 4
    torch.testing.assert_close(relative_l2(a, b), want)


def errors(seed: int, folder: Path) -> tuple[Any, list[dict[str, float]], dict[int, dict[str, float]]]:
    """A net trained on the first four fifths of a simulation, its history, and the errors of each forecast by lead time
    on the last fifth, summed over the variables, which are of one size."""
    path = write(folder / f"{seed}.nc", shallow_water(180, (16, 32), seed=seed))
    fields = open_fields(path)
    recipe = Recipe(dim=32, depth=2, num_blocks=4, epochs=24, learning_rate=3e-3, batch_size=8, seed=seed)
    net, statistics, history = train_forecaster(fields.part(0, 144), recipe, folder / f"run-{seed}", device="cpu")
    found = {lead: dict.fromkeys(("net", "persistence", "climatology"), 0.0) for lead in (1, 4)}
    for row in evaluate(net, fields.part(144, 180), statistics, [1, 4]):
        found[row["lead"]][row["forecast"]] += row["RMSE"]
    return net, history, found


@pytest.mark.slow
def test_training_learns_what_climatology_does_not_know(tmp_path: Path) -> None:
    net, history, found = errors(0, tmp_path)
    assert history[-1]["train_loss"] < 0.95 * history[0]["train_loss"]
    for lead in (1, 4):
        assert found[lead]["net"] < 0.6 * found[lead]["climatology"], found
    close = ForecastNet.from_pretrained(tmp_path / "run-0").eval()
    x = torch.randn(1, 3, 16, 32)
    torch.testing.assert_close(close(x), net(x))
    with pytest.raises(UserError, match="for example to 15 x 30"):
        train_forecaster(open_fields(tmp_path / "0.nc"), Recipe(patch_size=5))
    with pytest.raises(UserError, match="too few"):
        train_forecaster(open_fields(tmp_path / "0.nc").part(0, 4), Recipe(steps=2))


@pytest.mark.slow
def test_training_beats_persistence(tmp_path: Path) -> None:
    """Over three simulations, one step ahead and four."""
    every = [errors(seed, tmp_path)[2] for seed in range(3)]
    for lead in (1, 4):
        ratios = [found[lead]["net"] / found[lead]["persistence"] for found in every]
        assert max(ratios) < 0.8, (lead, ratios)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_app(tmp_path: Path) -> None:
    past, later = tmp_path / "past.nc", tmp_path / "later.nc"
    run("simulate", past, "--later", later, "--times", 40, "--height", 8, "--width", 16)
    data = xr.open_dataset(later)
    facts = json.loads(run("inspect", past, "--json", "--picture", tmp_path / "w.png"))
    assert facts["times"] == 32
    assert [c["channel"] for c in facts["channels"]] == ["h", "u", "v"]
    small = [f"--set={s}" for s in ("epochs=1", "dim=16", "depth=1", "num_blocks=2", "batch_size=8")]
    run("train", past, "--output", tmp_path / "run", "--device", "cpu", *small)
    rows = json.loads(
        run("evaluate", tmp_path / "run", later, "--leads", "1,3", "--csv", tmp_path / "s.csv", "--picture",
            tmp_path / "s.png", "--json", "--device", "cpu")
    )  # fmt: skip
    assert len(rows) == 2 * 3 * 3
    assert (tmp_path / "s.csv").read_text().splitlines()[0] == "lead,variable,forecast,RMSE,ACC"
    out = ("--output", tmp_path / "ahead.nc", "--animation", tmp_path / "a.gif")
    run("rollout", tmp_path / "run", later, *out, "--steps", 3, "--device", "cpu")
    ahead = open_fields(tmp_path / "ahead.nc")
    assert len(ahead) == 3
    assert ahead.times[0] == data["time"].values[-1] + np.timedelta64(6, "h")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("w.png", "s.png", "a.gif"))
    with pytest.raises(UserError, match="times that training has not seen"):
        run("evaluate", tmp_path / "run", past, "--device", "cpu")
    with pytest.raises(UserError, match="is no folder of `train`"):
        run("evaluate", tmp_path, later)
    with pytest.raises(UserError, match="whole numbers"):
        run("evaluate", tmp_path / "run", later, "--leads", "one")
