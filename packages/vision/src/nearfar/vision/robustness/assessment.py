"""One report of how classifiers stand broken patches: corruptions, attacks, occlusion, temperatures, weak places."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.core.plots import COLORS, new_figure, style
from nearfar.vision.classification.classifier import Classifier, evaluate_scores, evaluation_transform
from nearfar.vision.data.images import Pictures
from nearfar.vision.robustness.attack import Attacked, OnPixels, attack
from nearfar.vision.robustness.corruptions import IMAGENET_C, KINDS, corrupt, corrupt_patches
from nearfar.vision.robustness.measures import common_correct, fooling_rate, occlusion_curve
from nearfar.vision.robustness.parts import Parts
from nearfar.vision.robustness.patches import check_grid, given_patches, random_patches, random_squares
from nearfar.vision.robustness.tempering import temperatures, tempered

Track = Callable[[Iterable[str], str], Iterable[str]]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    patch: pixels of the grid; count: patches corrupted in a picture; side: of the attacked square, in patches; offset:
    pixels that the square is off the grid. attacked: pictures that are attacked, and whose places are tried.
    """

    kinds: tuple[str, ...] = IMAGENET_C
    severities: tuple[int, ...] = (5,)
    scope: str = "image"
    patch: int = 16
    count: int = 1
    side: int = 1
    offset: int = 0
    steps: int = 100
    step_size: float = 2 / 255
    attacked: int = 100
    temperatures: tuple[float, ...] = (1.0, 1.1, 1.3, 1.5, 2.0)
    shares: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    grids: tuple[int, ...] = (1, 2, 4, 7, 14)
    seeds: int = 3

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"corruption {unknown[0]!r} is unknown; there are {', '.join(KINDS)}")
        if levels := [level for level in self.severities if level not in range(1, 6)]:
            raise ValueError(f"severity {levels[0]} is outside 1 .. 5")
        if self.scope not in ("image", "patch"):
            raise ValueError(f"scope is {self.scope!r}; allowed are 'image' and 'patch'")
        if bad := [t for t in self.temperatures if not 0 < t < math.inf]:
            raise ValueError(f"temperature {bad[0]} must be above 0")
        if bad := [share for share in self.shares if not 0 <= share <= 1]:
            raise ValueError(f"share {bad[0]} is outside [0, 1]")
        for name in ("patch", "count", "side", "steps", "attacked", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.offset < 0:
            raise ValueError(f"offset is {self.offset}; it must be at least 0")


def pixels(pictures: Pictures, classifier: Classifier) -> Tensor:
    """The pictures as the classifier crops them, in 8-bit levels, (B, 3, size, size) in [0, 1]."""
    transform = evaluation_transform(classifier.size, classifier.crop_pct, classifier.crop_mode)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    cropped = pictures.subset(range(len(pictures)), transform)
    found = [(cropped[i][0] * std + mean).clamp(0, 1) for i in range(len(cropped))]  # type: ignore[operator]
    return (torch.stack(found) * 255).round() / 255


@torch.inference_mode()
def answers(model: nn.Module, x: Tensor, device: str, batch: int = 32) -> Tensor:
    """Logits of pictures in [0, 1]."""
    return torch.cat([model(part.to(device)).float().cpu() for part in x.split(batch)])


def in_batches(model: nn.Module, x: Tensor, labels: Tensor, mask: Tensor, device: str, plan: Plan) -> Attacked:
    """`attack` on a device, a few pictures at a time."""
    found = [
        attack(model, *(t.to(device) for t in part), steps=plan.steps, step_size=plan.step_size)
        for part in zip(x.split(16), labels.split(16), mask.split(16), strict=True)
    ]
    return Attacked(*(torch.cat([getattr(f, name) for f in found]).cpu() for name in ("pictures", "fooled", "steps")))


class Assessment:
    """Runs a `Plan` on classifiers of one input size; all see the first one's crop, and rates are over what all get
    right. `run` fills `tables`, `maps` and `left`, the parts that the time did not reach.
    """

    def __init__(
        self, classifiers: Mapping[str, Classifier], pictures: Pictures, plan: Plan, parts: Parts, device: str = "cpu"
    ) -> None:
        first = next(iter(classifiers.values()))
        if other := [name for name, found in classifiers.items() if found.size != first.size]:
            raise UserError(
                f"{other[0]}: takes pictures of {classifiers[other[0]].size} pixels, the first model of {first.size}; "
                "compare models of one size"
            )
        self.size = (first.size, first.size)
        try:
            self.grid = check_grid(self.size, plan.patch)
        except ValueError as error:
            raise UserError(f"{error}; choose another patch") from error
        if plan.count > (number := math.prod(self.grid)):
            raise UserError(f"{plan.count} patches were asked for; pictures have {number} of {plan.patch} pixels")
        if min(self.size) < plan.patch * plan.side + plan.offset:
            raise UserError(
                f"squares of {plan.side} x {plan.patch} pixels, {plan.offset} off, do not fit into {self.size[0]}"
            )
        self.plan, self.parts, self.device = plan, parts, device
        self.x, self.labels = pixels(pictures, first), torch.tensor(pictures.labels)
        self.models: dict[str, nn.Module] = {
            name: OnPixels(found.model, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).to(device).eval()
            for name, found in classifiers.items()
        }
        for model in self.models.values():
            model.requires_grad_(False)
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.maps: dict[str, Any] = {}
        clean = {name: answers(model, self.x, device) for name, model in self.models.items()}
        self.tables["clean"] = [
            {"model": name, **evaluate_scores(logits, pictures.labels)} for name, logits in clean.items()
        ]
        self.common = common_correct(clean, self.labels).nonzero()[:, 0]
        if not len(self.common):
            raise UserError("no picture is given its label by all models, so no fooling rate can be told")
        self.few = self.common[: plan.attacked]

    def run(self, track: Track = lambda items, what: items) -> None:
        """Measure everything that the time allows."""
        self.corruptions(track)
        self.adversarial(track)
        self.occlusion(track)
        self.sweep(track)
        self.weak_places(track)

    def wrong(self, model: nn.Module, x: Tensor, which: Tensor) -> Tensor:
        """Whether each picture is misclassified."""
        return answers(model, x, self.device).argmax(1) != self.labels[which]

    def squares(self, which: Tensor, seed: int) -> Tensor:
        plan = self.plan
        generator = torch.Generator().manual_seed(seed)
        side = plan.patch * plan.side
        return random_squares(len(which), self.size, side, generator, step=plan.patch, offset=plan.offset)

    def corruptions(self, track: Track) -> None:
        plan = self.plan
        rows: list[dict[str, Any]] = []
        names = [f"{kind}, severity {level}" for kind in plan.kinds for level in plan.severities]
        for name in track(names, "corruptions"):
            kind, level = name.split(", severity ")

            def measure(kind: str = kind, level: int = int(level)) -> list[dict[str, Any]]:
                fooled: dict[str, list[Tensor]] = {model: [] for model in self.models}
                for seed in range(plan.seeds):
                    generator = torch.Generator().manual_seed(seed)
                    found = []
                    for part in self.x[self.common].split(32):
                        mask = random_patches(len(part), self.size, plan.patch, plan.count, generator)
                        found.append(corrupt_patches(part, mask, kind, level, generator, scope=plan.scope))
                    for model, runs in fooled.items():
                        runs.append(self.wrong(self.models[model], torch.cat(found), self.common))
                return [
                    {"corruption": kind, "severity": level, "model": model, **fooling_rate(torch.stack(runs))}
                    for model, runs in fooled.items()
                ]

            rows += self.parts.get(name, measure) or []
        self.tables["corruptions"] = rows

    def adversarial(self, track: Track) -> None:
        rows: list[dict[str, Any]] = []
        for source in track(list(self.models), "adversarial patches"):

            def measure(source: str = source) -> list[dict[str, Any]]:
                fooled: dict[str, list[Tensor]] = {model: [] for model in self.models}
                for seed in range(self.plan.seeds):
                    x, labels, mask = self.x[self.few], self.labels[self.few], self.squares(self.few, seed)
                    found = in_batches(self.models[source], x, labels, mask, self.device, self.plan)
                    for model, runs in fooled.items():
                        own = model == source
                        runs.append(found.fooled if own else self.wrong(self.models[model], found.pictures, self.few))
                return [
                    {"patch made for": source, "model": model, **fooling_rate(torch.stack(runs))}
                    for model, runs in fooled.items()
                ]

            rows += self.parts.get(f"attack on {source}", measure) or []
        self.tables["adversarial"] = rows

    def occlusion(self, track: Track) -> None:
        rows: list[dict[str, Any]] = []
        cells = max(g for g in (14, 8, 7, 4, 2, 1) if self.size[0] % g == 0)
        grids = [g for g in self.plan.grids if self.size[0] % g == 0]
        for name in track(list(self.models), "occlusion"):
            for kind in ("replacement", "drop", "permutation"):
                points = [(0.0, g) for g in grids] if kind == "permutation" else [(s, cells) for s in self.plan.shares]

                def measure(name: str = name, kind: str = kind, points: Any = points) -> list[dict[str, Any]]:
                    model = lambda x: self.models[name](x.to(self.device)).cpu()  # noqa: E731
                    curve = occlusion_curve(
                        model, self.x, self.labels, kind, points, seeds=range(self.plan.seeds), batch_size=32
                    )
                    return [{"model": name, **row} for row in curve]

                rows += self.parts.get(f"{kind} of {name}", measure) or []
        self.tables["occlusion"] = rows

    def sweep(self, track: Track) -> None:
        """Temperatures: clean accuracy, patches made at this temperature (adaptive), those made at 1, and both tried.

        What either fools is what a defense is worth: a defender may not choose the attack.
        """
        rows: list[dict[str, Any]] = []
        names = [name for name, model in self.models.items() if temperatures(model)]
        for name in track(names, "temperatures"):
            plain: list[Tensor] = []

            def at_one(name: str = name, plain: list[Tensor] = plain) -> Tensor:
                if not plain:
                    x, labels, mask = self.x[self.few], self.labels[self.few], self.squares(self.few, 0)
                    plain.append(in_batches(self.models[name], x, labels, mask, self.device, self.plan).pictures)
                return plain[0]

            for temperature in self.plan.temperatures:

                def measure(
                    name: str = name, temperature: float = temperature, at_one: Callable[[], Tensor] = at_one
                ) -> dict[str, Any]:
                    model, transferred = self.models[name], at_one()
                    with tempered(model, temperature):
                        clean = answers(model, self.x, self.device).argmax(1) == self.labels
                        x, labels, mask = self.x[self.few], self.labels[self.few], self.squares(self.few, 0)
                        own = in_batches(model, x, labels, mask, self.device, self.plan).fooled
                        other = self.wrong(model, transferred, self.few)
                    adaptive = fooling_rate(own)
                    return {
                        "model": name,
                        "T": temperature,
                        "accuracy": float(clean.double().mean()),
                        "adaptive (%)": adaptive["fooling rate (%)"],
                        "low": adaptive["low"],
                        "high": adaptive["high"],
                        "transferred (%)": fooling_rate(other)["fooling rate (%)"],
                        "either (%)": fooling_rate(own | other)["fooling rate (%)"],
                    }

                if row := self.parts.get(f"T {temperature:g} of {name}", measure):
                    rows.append(row)
        self.tables["temperature"] = rows

    def weak_places(self, track: Track) -> None:
        """For every place of a grid of at most 7 x 7 the share of a few pictures that a short attack there fools."""
        plan = self.plan
        rows, columns = self.grid
        step = max(1, math.ceil(max(rows, columns) / 7))
        which = self.few[:16]
        for name in track(list(self.models), "weak places"):

            def measure(name: str = name) -> list[list[float]]:
                short = Plan(steps=min(10, plan.steps), step_size=max(plan.step_size, 8 / 255))
                return [
                    [
                        float(
                            in_batches(
                                self.models[name],
                                self.x[which],
                                self.labels[which],
                                given_patches(len(which), self.size, plan.patch, [(row, column)]),
                                self.device,
                                short,
                            )
                            .fooled.double()
                            .mean()
                        )
                        for column in range(step // 2, columns, step)
                    ]
                    for row in range(step // 2, rows, step)
                ]

            if (found := self.parts.get(f"places of {name}", measure)) is not None:
                self.maps[name] = found

    @property
    def left(self) -> list[str]:
        """The parts that the time did not reach."""
        return self.parts.left

    def summary(self) -> list[dict[str, Any]]:
        """One row per model."""
        rows = []
        for clean in self.tables["clean"]:
            name = clean["model"]
            mean = lambda table, key="fooling rate (%)", name=name: average(  # noqa: E731
                row[key] for row in self.tables.get(table, ()) if row["model"] == name
            )
            own = [r for r in self.tables.get("adversarial", ()) if r["model"] == name == r["patch made for"]]
            lost = [
                row["accuracy"]
                for row in self.tables.get("occlusion", ())
                if row["model"] == name and row["attack"] == "replacement" and row["share"] == 0.3
            ]
            rows.append(
                {
                    "model": name,
                    "accuracy": clean["accuracy"],
                    "right by all": len(self.common),
                    "corrupted patch, fooled (%)": mean("corruptions"),
                    "adversarial patch, fooled (%)": own[0]["fooling rate (%)"] if own else math.nan,
                    "accuracy, 30 % replaced": lost[0] if lost else math.nan,
                }
            )
        return rows

    def figures(self) -> list[tuple[Figure, str]]:
        """Curves and maps of what was measured, each with its caption."""
        found = []
        if rows := self.tables.get("occlusion"):
            found.append((draw_occlusion(rows), "Accuracy against the share of patches that is lost, and permuted."))
        if rows := self.tables.get("temperature"):
            found.append((draw_sweep(rows), "Adversarial patches against attention at a temperature."))
        if self.maps:
            number = min(16, len(self.few))
            found.append((draw_maps(self.maps), f"Share of {number} pictures that a short attack at a place fools."))
        return found


def average(values: Iterable[float]) -> float:
    """Their mean; NaN for none."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def draw_occlusion(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each kind of occlusion, a line for each model."""
    with style():
        figure = new_figure(11, 3.6)
        for axes, kind in zip(figure.subplots(1, 3, sharey=True), ("replacement", "drop", "permutation"), strict=True):
            x = "grid" if kind == "permutation" else "share"
            for name in dict.fromkeys(row["model"] for row in rows):
                part = [row for row in rows if row["model"] == name and row["attack"] == kind]
                axes.plot([row[x] for row in part], [row["accuracy"] for row in part], marker="o", label=name)
            axes.set(title=kind, xlabel="cells along a side" if x == "grid" else "share lost", ylabel="accuracy")
        axes.legend(fontsize=7)
    return figure


def draw_sweep(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and fooling rates against the temperature."""
    with style():
        figure = new_figure(7, 3.6)
        axes = figure.subplots()
        for color, name in zip(COLORS * 9, dict.fromkeys(row["model"] for row in rows), strict=False):
            part = [row for row in rows if row["model"] == name]
            t = [row["T"] for row in part]
            axes.plot(t, [row["adaptive (%)"] for row in part], "o-", color=color, label=f"{name}, adaptive")
            axes.plot(t, [row["transferred (%)"] for row in part], "o:", color=color, label=f"{name}, transferred")
            axes.plot(t, [100 * row["accuracy"] for row in part], "--", color=color, label=f"{name}, accuracy")
        axes.set(xlabel="temperature", ylabel="per cent", ylim=(0, 100))
        axes.legend(fontsize=7)
    return figure


def draw_maps(maps: Mapping[str, Any]) -> Figure:
    """A map for each model."""
    with style():
        figure = new_figure(3 * len(maps), 3.2)
        for axes, (name, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
            axes.imshow(values, cmap="inferno", vmin=0, vmax=1)
            axes.set_title(name, fontsize=8)
            axes.axis("off")
    return figure


def draw_corruptions(x: Tensor, seed: int = 0) -> Figure:
    """A picture (3, H, W) in [0, 1] under every corruption (rows) at every severity (columns)."""
    with style():
        figure = new_figure(7, 1.35 * len(KINDS))
        panels = figure.subplots(len(KINDS), 5)
        for row, kind in zip(panels, KINDS, strict=True):
            for severity, axes in enumerate(row, start=1):
                shown = corrupt(x[None], kind, severity, torch.Generator().manual_seed(seed))[0]
                axes.imshow(shown.movedim(0, -1).cpu())
                axes.axis("off")
            row[0].set_title(kind, fontsize=7, loc="left")
    return figure
