"""The recall bench: small language models with exchangeable mixers on synthetic tasks, over a grid of settings.

A recipe names data, models, widths, learning rates and seeds; every combination is a run of its own that ends as one
row of `results.csv`. Zoology (Arora et al. 2024, arXiv 2312.04927), figure 2; Based (arXiv 2402.18668), figure 2.
"""

import csv
import hashlib
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nearfar.core import plots
from nearfar.core.errors import DivergedError, UserError, some
from nearfar.core.files import locked, write_csv
from nearfar.core.fingerprint import source_digest
from nearfar.core.reading import reading
from nearfar.core.training import train
from nearfar.language.configuration import MixerConfig
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.recall.tasks import make_examples, segment_seeds
from nearfar.language.registry import IMPORTED

SEGMENT = {"task": "mqar", "num_examples": 1000}

ROW = ("data", "model", "dim", "learning_rate", "seed")
"""The columns that tell runs apart."""

CHOOSE = "choose "
"""Before the name of a segment on which the learning rate is chosen."""

NUMBERS = ("accuracy", "parameters", "state_size", "epochs", "seconds")
"""What every run has beside."""


@dataclass
class Recipe:
    """What to train, and on what.

    Args:
        data: name -> `{"train": [segment, ...], "test": [segment, ...]}` and optionally a `batch_size` of its own, and
            `"choose": [segment, ...]`, examples of their own on which the learning rate is chosen and a run ends; else
            those are the test's. A segment is `{"task": name, setting: value, ...}`, by default MQAR with 1000
            examples.
        models: name -> settings of `MixerConfig`, above all `mixers`; also `dims` to override the recipe's.
        dims: widths d.
        learning_rates: all are tried; the best counts.
        seeds: of the initial weights; a result is the mean over them.
        vocab_size: tokens V, of every segment and model.
        epochs: at most; a run ends when the accuracy exceeds `stop_above`.
        batch_size: examples per step. Batches never mix segments; their order is the segments'.
        weight_decay: AdamW's.
        data_seed: of the examples.
        exact: draw the examples as Zoology's code does (slow).
    """

    data: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    dims: list[int] = field(default_factory=lambda: [64])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    seeds: list[int] = field(default_factory=lambda: [0])
    vocab_size: int = 8192
    epochs: int = 64
    batch_size: int = 64
    weight_decay: float = 0.1
    stop_above: float = 0.99
    data_seed: int = 123
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "models", "dims", "learning_rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        for name, value in self.data.items():
            unknown = set(value) - {"train", "test", "choose", "batch_size"}
            if unknown or not value.get("train") or not value.get("test"):
                raise ValueError(
                    f"data {name}: needs train and test, may have choose and batch_size; it has {', '.join(value)}"
                )
        self.learning_rates = [float(rate) for rate in self.learning_rates]
        if min(self.epochs, self.batch_size) < 1 or min(self.learning_rates) <= 0:
            raise ValueError("epochs, batch_size and learning_rates must be positive")

    def points(self) -> Iterator["Point"]:
        """Every run of the grid."""
        for data, model in itertools.product(self.data, self.models):
            dims = self.models[model].get("dims", self.dims)
            for dim, rate, seed in itertools.product(dims, self.learning_rates, self.seeds):
                yield Point(self, data, model, int(dim), rate, seed)


def code_digest() -> str:
    """The same for the same code of models, training and mixers from outside."""
    parts = [source_digest(RecallModule, MixerForCausalLM), *sorted(IMPORTED.values())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@dataclass
class Point:
    """One run of a recipe."""

    recipe: Recipe
    data: str
    model: str
    dim: int
    learning_rate: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        recipe = self.recipe
        return {
            "data": recipe.data[self.data],
            "model": {k: v for k, v in recipe.models[self.model].items() if k != "dims"},
            "dim": self.dim,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        } | {
            name: getattr(recipe, name)
            for name in ("vocab_size", "epochs", "batch_size", "weight_decay", "stop_above", "data_seed", "exact")
        }

    @property
    def key(self) -> str:
        """Short and the same for the same settings and code."""
        return hashlib.sha256(json.dumps([self.settings, code_digest()], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def shared(self) -> str:
        """What runs have in common that differ in rate and seed alone, as JSON: the other settings, and the code."""
        rest = {name: value for name, value in self.settings.items() if name not in ROW}
        return json.dumps(rest | {"data": self.settings["data"], "code": code_digest()}, sort_keys=True)

    def build(self) -> MixerForCausalLM:
        """The untrained model."""
        settings = {"state_mixer": "identity"} | self.settings["model"]
        allowed = MixerConfig.__dataclass_fields__
        if unknown := [name for name in settings if name not in allowed or name in ("vocab_size", "hidden_size")]:
            raise UserError(f"model {self.model}: unknown setting {', '.join(unknown)}")
        segments = [s for part in ("train", "test", "choose") for s in self.recipe.data[self.data].get(part, [])]
        longest = max(s.get("input_seq_len", 64) for s in segments)
        settings = {
            "max_position_embeddings": longest,
            "num_hidden_layers": len(settings.get("mixers", [0, 0])),
        } | settings
        torch.manual_seed(self.seed)
        return MixerForCausalLM(MixerConfig(vocab_size=self.recipe.vocab_size, hidden_size=self.dim, **settings))

    def loaders(self) -> tuple[DataLoader, list[DataLoader], list[str]]:
        """Training batches, one loader per segment to test and to choose on, and the names of these segments."""
        recipe, data = self.recipe, self.recipe.data[self.data]
        size = data.get("batch_size", recipe.batch_size)
        chosen_on = data.get("choose", [])
        seeds = segment_seeds(recipe.data_seed, len(data["train"]), len(data["test"]) + len(chosen_on))
        parts = []
        for segments, part_seeds in zip((data["train"], data["test"] + chosen_on), seeds):
            parts.append([cached_examples(recipe, s, seed) for s, seed in zip(segments, part_seeds)])
        names = [segment_name(s) for s in data["test"]] + [f"{CHOOSE}{segment_name(s)}" for s in chosen_on]
        train_data = DataLoader(Batches(parts[0], size), batch_size=None)
        return train_data, [DataLoader(Batches([p], size), batch_size=None) for p in parts[1]], names


EXAMPLES: dict[str, tuple[Tensor, Tensor]] = {}
"""The last few segments drawn: neighbouring runs of a grid share their data."""


def cached_examples(recipe: Recipe, segment: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = SEGMENT | segment | {"seed": seed}
    if "mqar" in settings["task"]:
        settings = {"vocab_size": recipe.vocab_size, "exact": recipe.exact} | settings
    key = json.dumps(settings, sort_keys=True)
    if key not in EXAMPLES:
        while len(EXAMPLES) >= 24:
            EXAMPLES.pop(next(iter(EXAMPLES)))
        EXAMPLES[key] = make_examples(settings.pop("task"), **settings)
    return EXAMPLES[key]


def segment_name(segment: dict[str, Any]) -> str:
    """For example "mqar 64x4": task, length and pairs."""
    name = f"{segment.get('task', 'mqar')} {segment.get('input_seq_len', 64)}"
    return f"{name}x{segment.get('num_kv_pairs', 4)}" if "mqar" in name else name


class Batches(Dataset):
    """Whole batches, segment by segment."""

    def __init__(self, segments: list[tuple[Tensor, Tensor]], batch_size: int) -> None:
        self.batches = [b for x, y in segments for b in zip(x.split(batch_size), y.split(batch_size))]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index]


class RecallModule(pl.LightningModule):
    """Cross-entropy and accuracy at the labelled positions; logits exist nowhere else.

    AdamW, the learning rate falling to 0 by a cosine once per epoch. Hyena's table of positions has its own rate, 1e-5.
    """

    def __init__(self, model: MixerForCausalLM, rate: float, decay: float, epochs: int, names: list[str]) -> None:
        super().__init__()
        self.model, self.rate, self.decay, self.epochs, self.names = model, rate, decay, epochs, names

    def labelled(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of the labelled positions."""
        wanted = labels != -100
        return self.model.lm_head(self.model.model(inputs).last_hidden_state[wanted]), labels[wanted]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits, labels = self.labelled(*batch)
        loss = F.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        extra = self.model.model.auxiliary_loss
        return loss if extra is None else loss + extra

    def on_validation_epoch_start(self) -> None:
        self.scores: dict[str, list[Tensor]] = {name: [] for name in self.names}

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int, dataloader_idx: int = 0) -> None:
        inputs, labels = batch
        logits, wanted = self.labelled(inputs, labels)
        marked = labels != -100
        right = torch.zeros_like(labels, dtype=torch.float)
        right[marked] = (logits.argmax(-1) == wanted).float()
        self.scores[self.names[dataloader_idx]].append(right.sum(1) / marked.sum(1))

    def on_validation_epoch_end(self) -> None:
        """The share of right answers per example, averaged over examples: of each segment, and of all to test or to
        choose on."""
        scores = {name: torch.cat(values) for name, values in self.scores.items()}
        for name, values in scores.items():
            self.log(f"accuracy {name}", values.mean())
        for measure, chosen_on in (("accuracy", False), ("choice", True)):
            parts = [values for name, values in scores.items() if name.startswith(CHOOSE) is chosen_on]
            if parts:
                self.log(measure, torch.cat(parts).mean())

    def configure_optimizers(self) -> Any:
        slow = [p for n, p in self.named_parameters() if n.endswith("filter.positions")]
        rest = [p for n, p in self.named_parameters() if not n.endswith("filter.positions")]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if slow:
            groups.append({"params": slow, "lr": 1e-5, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, self.rate, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


def run_point(point: Point, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Train one point in `folder` (an interrupted run goes on) and return its row of results."""
    model = point.build()
    train_data, test_data, names = point.loaders()
    recipe = point.recipe
    module = RecallModule(model, point.learning_rate, recipe.weight_decay, recipe.epochs, names)
    measure = "choice" if recipe.data[point.data].get("choose") else "accuracy"
    stop = EarlyStopping(measure, mode="max", patience=recipe.epochs, stopping_threshold=recipe.stop_above)
    started = time.monotonic()
    threads = torch.get_num_threads()
    if point.dim <= 64:
        torch.set_num_threads(1)  # on so small a model several would mostly wait for each other
    failure = ""
    try:
        history = train(
            module,
            train_data,
            test_data,
            epochs=recipe.epochs,
            seed=point.seed,
            folder=folder,
            settings=point.settings,
            callbacks=[stop],
            device=device,
        )
    except DivergedError as error:  # a rate of the grid that is too high: no right answer, and no end of the sweep
        history, failure = [{"accuracy": 0.0, measure: 0.0, "seconds": 0.0}], str(error)
    finally:
        torch.set_num_threads(threads)
    length = max(s.get("input_seq_len", 64) for s in recipe.data[point.data]["test"])
    last = history[-1]
    row = {name: getattr(point, name) for name in ROW} | {
        "accuracy": last["accuracy"],
        "state_size": model.state_size(length),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": 0 if failure else len(history),
        "seconds": round(sum(epoch["seconds"] for epoch in history) or time.monotonic() - started, 1),
        "key": point.key,
        "settings": point.shared,
    }
    row |= {"choice": last["choice"]} if measure == "choice" else {}
    row |= {"failure": failure} if failure else {}
    for weights in ("last.ckpt", "best.safetensors"):  # the numbers are what a sweep is for
        (folder / weights).unlink(missing_ok=True)
    return row | {name: value for name, value in last.items() if name.startswith("accuracy ")}


def sweep(
    recipe: Recipe,
    folder: str | Path,
    device: str = "auto",
    only: Callable[[Point], bool] = lambda point: True,
    report: Callable[[Point, dict[str, Any], int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Every run of the recipe that `folder` does not hold yet; returns the rows of the recipe's runs.

    `folder/results.csv` gains a row after each run, so an interrupted sweep goes on where it stopped. `only` chooses
    points; `report(point, row, number, total)` is called after each.
    """
    folder = Path(folder)
    with locked(folder, "sweeps"):
        rows = read_results(folder) if (folder / "results.csv").exists() else []
        done = {row["key"]: row for row in rows}
        points = [point for point in recipe.points() if only(point)]
        if not points:
            raise UserError("no run of the recipe is chosen")
        for point in points:  # a mistake in the last model should not show after hours
            point.build()
            if point.key not in done:
                point.loaders()
        for number, point in enumerate(points, 1):
            if point.key not in done:
                done[point.key] = run_point(point, folder / "runs" / point.key, device)
                rows.append(done[point.key])
                write_csv(folder / "results.csv", rows)
                shutil.rmtree(folder / "runs" / point.key, ignore_errors=True)
            report(point, done[point.key], number, len(points))
        return [done[point.key] for point in points]


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a sweep's `results.csv`, numbers as numbers."""
    path = Path(folder) / "results.csv"
    missing = reading(path, "no results of a recall sweep", "run `nearfar recall sweep` first")
    with missing, path.open(newline="", encoding="utf-8") as stream:
        table = csv.DictReader(stream, strict=True)
        rows = [{name: number(value) for name, value in row.items() if value != ""} for row in table]
    for line, row in enumerate(rows, 2):
        if lacking := [name for name in (*ROW, *NUMBERS, "key", "settings") if name not in row]:
            raise UserError(f"{path}: no results of a recall sweep, line {line} lacks {some(lacking)}")
        numbers = ["dim", "learning_rate", *NUMBERS, *(["choice"] if "choice" in row else [])]
        if odd := [name for name in numbers if not isinstance(row[name], int | float)]:
            raise UserError(
                f"{path}, line {line}: {odd[0]} is {row[odd[0]]!r}, no number; mend it or run the sweep again"
            )
        if not all(math.isfinite(float(row[name])) for name in numbers):
            raise UserError(f"{path}, line {line}: a number is not finite; run the sweep again")
    if not rows:
        raise UserError(f"{path}: no results of a recall sweep")
    for line, row in enumerate(rows, 2):
        if not settings_of(row):
            raise UserError(
                f"{path}, line {line}: settings is {row['settings']!r}, no JSON object; run the sweep again"
            )
    return [row | {"key": str(row["key"]), "model": str(row["model"]), "data": str(row["data"])} for row in rows]


def settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """The settings of a row; {} where they cannot be read."""
    try:
        found = json.loads(row["settings"])
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def number(text: str) -> int | float | str:
    """`text` as an integer or a float where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def best_results(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per data, model, width and other settings: the best learning rate by its mean accuracy over the seeds.

    `spread` is the standard deviation over the seeds (0 for one). The rate is chosen on the examples that the recipe
    has for it, else on the test's, as in the published figures. Where a model was run with several settings, `settings`
    says what differs.
    """
    groups: dict[tuple, dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        place = groups.setdefault((row["data"], row["model"], row["dim"], row["settings"]), {})
        place.setdefault(row["learning_rate"], []).append(row)
    told = differences(groups)
    best = []
    for (data, model, dim, shared), rates in groups.items():
        apart = all("choice" in row for group in rates.values() for row in group)
        measure = "choice" if apart else "accuracy"
        rate = max(rates, key=lambda r: statistics.mean(row[measure] for row in rates[r]))
        chosen = rates[rate]
        scores = [row["accuracy"] for row in chosen]
        best.append(
            {
                "data": data,
                "model": model,
                "dim": dim,
                "accuracy": statistics.mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                "seeds": len(scores),
                "learning_rate": rate,
                "rates": len(rates),
                "marked": "rate chosen on the test examples" if len(rates) > 1 and not apart else "",
                "state_size": chosen[0]["state_size"],
                "parameters": chosen[0]["parameters"],
                "epochs": max(row["epochs"] for row in chosen),
                "seconds": round(sum(row["seconds"] for row in chosen), 1),
                **({"settings": told[data, model, dim, shared]} if any(told.values()) else {}),
            }
        )
    return best


def differences(groups: Iterable[tuple]) -> dict[tuple, str]:
    """For each (data, model, width, settings) what sets it apart from the others of the same data, model and width."""
    alike: dict[tuple, list[tuple]] = {}
    for group in groups:
        alike.setdefault(group[:3], []).append(group)
    told = {}
    for family in alike.values():
        settings = [json.loads(group[3]) for group in family]
        names = [name for name in settings[0] if any(s.get(name) != settings[0][name] for s in settings)]
        for group, own in zip(family, settings):
            told[group] = ", ".join(f"{name}={json.dumps(own.get(name))}" for name in names)
    return told


AXES = {"dim": "model width d", "state_size": "state size (numbers per sequence)"}


def plot_results(rows: list[dict[str, Any]], axis: str = "dim") -> Figure:
    """Accuracy against `axis` ("dim" or "state_size"), one panel per data, one line per model."""
    if axis not in AXES:
        raise UserError(f"cannot plot against {axis!r}; known are {', '.join(AXES)}")
    best = best_results(rows)
    best = [row | {"model": f"{row['model']} {row.get('settings', '')}".strip()} for row in best]
    data = list(dict.fromkeys(row["data"] for row in best))
    models = list(dict.fromkeys(row["model"] for row in best))
    columns = min(4, len(data))
    lines = math.ceil(len(data) / columns)
    with plots.style():
        figure = plots.new_figure(1.5 + 3.2 * columns, 3.2 * lines)
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for panel, name in itertools.zip_longest(panels.flat, data):
            if name is None:
                panel.set_axis_off()
                continue
            for i, model in enumerate(models):
                points = sorted((r for r in best if (r["data"], r["model"]) == (name, model)), key=lambda r: r[axis])
                style = {"color": plots.COLORS[i % len(plots.COLORS)], "marker": "osD^vPX*"[i // len(plots.COLORS) % 8]}
                x, y = ([r[column] for r in points] for column in (axis, "accuracy"))
                panel.errorbar(x, y, [r["spread"] for r in points], label=model, capsize=3, **style)
            panel.set_title(name)
            panel.set_xscale("log", base=2)
            panel.set_xlabel(AXES[axis])
            panel.set_ylim(-0.03, 1.03)
        for row in panels:
            row[0].set_ylabel("accuracy")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper")
    return figure
