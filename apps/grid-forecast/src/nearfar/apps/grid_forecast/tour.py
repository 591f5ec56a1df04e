"""The forecasting chapter of `nearfar tour`."""

from pathlib import Path

from nearfar.apps.grid_forecast.cli import draw, draw_scores
from nearfar.core.report import Report
from nearfar.vision.forecasting.fields import open_fields
from nearfar.vision.forecasting.scores import evaluate
from nearfar.vision.forecasting.simulation import shallow_water
from nearfar.vision.forecasting.training import Recipe, train_forecaster


def chapter(report: Report, folder: Path) -> None:
    """Learn the next state of simulated shallow water and score it beside persistence and climatology."""
    file = folder / "shallow-water.nc"
    shallow_water(150, (16, 32)).to_netcdf(file, engine="h5netcdf")
    fields = open_fields(file)
    learn, test = fields.part(0, 120), fields.part(120, 150)
    net, statistics, _ = train_forecaster(learn, Recipe(dim=32, depth=2, num_blocks=4, epochs=10))
    rows = evaluate(net, test, statistics, [1, 2, 4, 8])
    report.section("Forecasting gridded fields")
    report.text(
        "A small ForecastNet (AFNO blocks) learns the next state of simulated rotating shallow water from 120 states "
        "and forecasts the 30 that follow. The fields are simulated, not observed."
    )
    report.figure(draw(fields.names, [("first", fields.read(0)), ("last", fields.read(149))]), "The simulated fields")
    report.table([row for row in rows if row["variable"] == "h"], "Depth anomaly by lead time")
    report.figure(draw_scores(rows), "Error and anomaly correlation by lead time")
