"""From a data set's fingerprint to a recipe, by the rules of nnU-Net v2, each decision with its reason."""

import math
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nearfar.core.errors import UserError
from nearfar.core.files import write_text
from nearfar.medical.data.cases import Case, Collection
from nearfar.medical.losses import SegmentationLoss
from nearfar.medical.networks import create_network
from nearfar.medical.preparation import ANISOTROPIC, ChannelSurvey, content_box

KINDS = {"plain": "nnunet_plain", "resenc": "nnunet_resenc"}

REFERENCE = {("plain", 2): 85e6, ("plain", 3): 560e6, ("resenc", 2): 135e6, ("resenc", 3): 680e6}
"""Values in the maps of a batch of `BATCH` that 8 GB hold in training, as nnU-Net counts them."""

BATCH = {2: 12, 3: 2}
WIDEST = {2: 512, 3: 320}
LEAST_EDGE = 4
"""Voxels that the coarsest map keeps along an axis."""

BLOCKS = {"plain": [2] * 16, "resenc": [1, 3, 4, *[6] * 13]}
STEPS, SHORT, PROBE = 300, 20_000, {2: 64, 3: 24}
"""Steps that a short training should have at least, those from which on one is long, and voxels of a trial patch."""


@dataclass
class Fingerprint:
    """What the training cases tell: sizes after the cut to what is not empty, voxel sides, classes, intensities."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    sides: list[tuple[float, ...]] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    voxels: dict[str, int] = field(default_factory=dict)
    channels: list[dict[str, Any]] = field(default_factory=list)
    pictures: bool = False

    @property
    def shares(self) -> dict[str, float]:
        """Share of the voxels of each class."""
        total = sum(self.voxels.values())
        return {name: count / total for name, count in self.voxels.items()}


def take_fingerprint(collection: Collection, cases: Sequence[Case]) -> Fingerprint:
    """The fingerprint of labelled cases, in the order of axes of RAS+. Raises UserError for pictures among volumes."""
    found, survey = Fingerprint(), ChannelSurvey()
    names = {0: "background", **collection.labels}
    for number, case in enumerate(cases):
        scan, labels = collection.read(case)
        if labels is None:
            raise UserError(f"{case.name}: has no labels to plan by")
        picture = scan.affine is None
        if number and picture != found.pictures:
            raise UserError(f"{case.name}: is a {'picture' if picture else 'volume'}, the others are none")
        found.pictures = picture
        box = tuple(slice(0, n) for n in scan.shape) if picture else content_box(scan.canonical())
        found.shapes.append(tuple(s.stop - s.start for s in box))
        found.sides.append(scan.canonical_spacing())
        found.kept.append(math.prod(found.shapes[-1]) / math.prod(scan.shape))
        for value, count in zip(*np.unique(labels, return_counts=True)):
            if value != collection.ignore:
                name = names.get(int(value), str(value))
                found.voxels[name] = found.voxels.get(name, 0) + int(count)
        survey.add(scan, labels, collection.ignore)
    found.channels = [channel.as_dict() for channel in survey.channels(collection.channel_names, "auto")]
    return found


def target_spacing(sides: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> tuple[list[float], str]:
    """The spacing that scans are resampled to, and why: the median; finer along a coarse axis of few voxels."""
    target = np.median(np.array(sides), 0)
    sizes = np.median([np.array(n) * np.array(s) / target for n, s in zip(shapes, sides)], 0)
    worst = int(np.argmax(target))
    others = [i for i in range(len(target)) if i != worst]
    coarse = target[worst] > ANISOTROPIC * max(target[others])
    if coarse and sizes[worst] * ANISOTROPIC < min(sizes[others]):
        low = float(np.percentile(np.array(sides)[:, worst], 10))
        target[worst] = max(low, max(target[others]) + 1e-5)
        return [float(v) for v in target], "median sides; the coarse axis, of few voxels, by the 10th percentile"
    return [float(v) for v in target], "median of the voxel sides"


def topology(spacing: Sequence[float], patch: Sequence[int]) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Strides and kernel sizes of each stage, and the patch enlarged to multiples of the strides.

    An axis is halved while it keeps twice the least edge and its spacing is below twice the smallest of those; kernels
    grow from 1 to 3 along an axis once its spacing is below twice the smallest.
    """
    now, size, dims = list(spacing), list(patch), len(spacing)
    strides, kernels, kernel = [[1] * dims], [], [1] * dims
    while True:
        valid = [i for i in range(dims) if size[i] >= 2 * LEAST_EDGE]
        if not valid:
            break
        valid = [i for i in valid if now[i] / min(now[j] for j in valid) < 2]
        if len(valid) == 1 and size[valid[0]] < 3 * LEAST_EDGE:
            break
        kernel = [3 if k == 3 or now[i] / min(now) < 2 else 1 for i, k in enumerate(kernel)]
        strides.append([2 if i in valid else 1 for i in range(dims)])
        kernels.append(kernel)
        for i in valid:
            now[i], size[i] = now[i] * 2, math.ceil(size[i] / 2)
    kernels.append([3] * dims)
    multiple = [math.prod(step[i] for step in strides) for i in range(dims)]
    return strides, kernels, [math.ceil(n / m) * m for n, m in zip(patch, multiple)]


def map_values(settings: dict[str, Any], patch: Sequence[int], outputs: int, residual: bool) -> float:
    """Values in the maps of one patch: of all convolutions, transposed ones and heads, as nnU-Net counts them."""
    sizes, size = [], list(patch)
    for stride in settings["strides"]:
        size = [math.ceil(n / s) for n, s in zip(size, stride)]
        sizes.append(math.prod(size))
    features, total = settings["features"], 0.0
    if residual:
        total += features[0] * math.prod(patch)
    for s, (width, voxels) in enumerate(zip(features, sizes)):
        number = settings["blocks_per_stage"][s]
        total += width * voxels * (2 * number + (s > 0) if residual else number)
    for i, number in enumerate(settings["decoder_blocks_per_stage"]):
        level = len(features) - 2 - i
        total += sizes[level] * (features[level] * (number + 1) + outputs)
    return total


def plan(
    collection: Collection,
    cases: Sequence[Case],
    *,
    memory: float = 8 * 2**30,
    minutes: float | None = None,
    kind: str = "plain",
    dims: int | None = None,
    seed: int = 0,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, str], Fingerprint]:
    """A recipe for labelled cases, the reason of each of its settings, and the fingerprint.

    Args:
        memory: bytes for the training, by which patch and batch are chosen.
        minutes: for the training on this machine while nothing else runs there (a step is timed); None for nnU-Net's
            1000 epochs of 250 steps.
        kind: "plain" or "resenc", the network.
        dims: 2 for a network that sees slices; None for 3, and 2 for pictures.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    found = take_fingerprint(collection, cases)
    axes = len(found.shapes[0])
    dims = dims or axes
    if dims > axes or dims not in (2, 3):
        raise UserError(f"a network of {dims} axes does not fit scans of {axes}")
    spacing, why = target_spacing(found.sides, found.shapes)
    sizes = [[max(1, round(n * s / t)) for n, s, t in zip(*pair, spacing)] for pair in zip(found.shapes, found.sides)]
    median, voxels = np.median(sizes, 0), sum(math.prod(s) for s in sizes)
    if dims < axes:
        across = int(np.argmax(spacing)) if max(spacing) > 1.5 * sorted(spacing)[-2] else axes - 1
        keep = [i for i in range(axes) if i != across]
        spacing, median = [spacing[i] for i in keep], median[keep]
    outputs = len(collection.regions) if collection.order else 1 + len([v for v in collection.labels if v])
    reference, reasons, widths = REFERENCE[kind, dims] * memory / (8 * 2**30) / BATCH[dims], {}, [32]
    seconds = 0.0
    if minutes is not None:
        widths = [32, 16, 8]
    for base in widths:
        bound = reference
        if minutes is not None:
            seconds = _seconds(kind, dims, base, outputs, len(found.channels))
            bound = min(bound, minutes * 60 / STEPS / 2 / seconds)  # two patches a step at least
        settings, patch, values = _shrunk(kind, dims, base, spacing, median, outputs, bound)
        enough = all(p >= min(PROBE[dims] * 1.3, m) for p, m in zip(patch, median))
        if enough or base == widths[-1]:
            break
    most = max(2, round(0.05 * voxels / math.prod(patch)))
    batch = max(2, min(round(reference / values * BATCH[dims]), most))
    if minutes is not None:
        batch = max(2, min(batch, round(minutes * 60 / STEPS / (seconds * values))))
    recipe: dict[str, Any] = {}

    def decide(name: str, value: Any, reason: str) -> None:
        recipe[name], reasons[name] = value, reason

    decide("network", KINDS[kind], f"nnU-Net's {kind} U-Net")
    told = f"{len(settings['features'])} stages: an axis is halved while it keeps {2 * LEAST_EDGE} voxels and is not "
    told += "coarser than twice the finest; kernels of 1 along coarse axes"
    if base != 32:
        told += f"; {base} channels at first instead of 32, so that {STEPS} steps fit into {minutes:g} minutes here"
    decide("settings", settings, told)
    told = f"of a median image of {'x'.join(f'{m:.0f}' for m in median)} voxels"
    by = f"{memory / 2**30:.3g} GB of memory" + (f" and {minutes:g} minutes" if minutes is not None else "")
    decide("roi", patch, f"{told}; the longest, relative to it, is cut until {by} hold it")
    if found.pictures:
        decide("spacing", None, "pictures have none")
    else:
        decide("spacing", [round(v, 6) for v in spacing], why)
        decide("resample", "cubic", f"splines; an axis over {ANISOTROPIC:g} times as coarse by itself; scores go back")
    cut = 1 - float(np.median(found.kept))
    decide("crop", "padding", f"to what is not empty: {cut:.0%} of the median image fall away")
    schemes = [channel["intensity"] for channel in found.channels]
    named = [channel["name"] or f"channel {i}" for i, channel in enumerate(found.channels)]
    told = ", ".join(f"{name}: {scheme}" for name, scheme in zip(named, schemes))
    decide("intensity", "auto", f"by the channels' names; {told}")
    rare = min(found.shares, key=found.shares.__getitem__)
    told = f"rarest is {rare} with {found.shares[rare]:.2%} of the voxels; classes alike, then voxels"
    decide("foreground", 0.33, told)
    decide("loss", "nnunet", "Dice over the batch and cross-entropy, with deep supervision")
    sided = any(word in name.lower().split() for name in collection.labels.values() for word in ("left", "right"))
    mirrored = [axis for axis in range(dims) if not (sided and axis == 0 and not found.pictures)]
    decide(
        "augment",
        [{"RandFlipd": {"prob": 0.5, "spatial_axis": axis}} for axis in mirrored],
        "mirror images" + (", but not left and right, which labels tell apart" if len(mirrored) < dims else ""),
    )
    decide("batch_size", batch, f"what the budget holds, at most 5 % of the {voxels:,} voxels, at least 2")
    if minutes is None:
        epochs, steps = 1000, 250
        told = "nnU-Net's"
    else:
        epochs, steps = 20, max(1, int(minutes * 60 / (seconds * values * batch)) // 20)
        told = f"a step takes about {seconds * values * batch:.2g} s here, so {20 * steps} fit into {minutes:g} minutes"
    decide("epochs", epochs, told)
    decide("patches_per_epoch", steps * batch, f"{steps} steps of {batch}")
    if epochs * steps >= SHORT:
        decide("optimizer", "sgd", "nnU-Net's, with Nesterov momentum 0.99")
        decide("optimizer_settings", {"momentum": 0.99, "nesterov": True}, "see optimizer")
        decide("learning_rate", 1e-2, "nnU-Net's")
        decide("weight_decay", 3e-5, "nnU-Net's")
        decide("schedule", "poly", "nnU-Net's")
        turns = {f"range_{axis}": 0.5236 for axis in "xyz"[: 1 if dims == 2 else 3]}
        linear = "bilinear" if dims == 2 else "trilinear"
        recipe["augment"] = [
            {"RandRotated": {"prob": 0.2, **turns, "padding_mode": "zeros"}},
            {"RandZoomd": {"prob": 0.2, "min_zoom": 0.7, "max_zoom": 1.4, "mode": [linear, "nearest"],
                           "align_corners": [False, None]}},
            {"RandGaussianNoised": {"prob": 0.1, "std": 0.1}},
            {"RandGaussianSmoothd": {"prob": 0.1}},
            {"RandScaleIntensityd": {"prob": 0.15, "factors": 0.25}},
            {"RandAdjustContrastd": {"prob": 0.3, "gamma": [0.7, 1.5]}},
            *recipe["augment"],
        ]  # fmt: skip
    else:
        decide("optimizer", "adamw", "learns faster than nnU-Net's SGD in a short training")
        decide("learning_rate", 3e-3, "see optimizer")
        decide("schedule", "warmup_cosine", "falls to 0 at the end")
    decide("seed", seed, "given")
    return recipe, reasons, found


def _shrunk(
    kind: str, dims: int, base: int, spacing: Sequence[float], median: Any, outputs: int, bound: float
) -> tuple[dict[str, Any], list[int], float]:
    """Settings, patch and values in its maps: from the image's size, the relatively longest axis is cut to `bound`."""
    tmp = 1 / np.array(spacing)
    whole = tmp * ((256**3 if dims == 3 else 2048**2) / math.prod(tmp)) ** (1 / dims)
    wanted = [max(1, int(min(round(w), m))) for w, m in zip(whole, median)]

    def built(patch: list[int]) -> tuple[dict[str, Any], list[int], float]:
        strides, kernels, padded = topology(spacing, patch)
        n = len(strides)
        if n < 2:
            raise UserError(f"images of {patch} voxels are too small for a U-Net, which halves an axis of 8 at least")
        settings = {
            "features": [min(base * 2**i, WIDEST[dims]) for i in range(n)],
            "kernel_sizes": kernels,
            "strides": strides,
            "blocks_per_stage": BLOCKS[kind][:n],
            "decoder_blocks_per_stage": [2 if kind == "plain" else 1] * (n - 1),
        }
        return settings, padded, map_values(settings, padded, outputs, kind == "resenc")

    settings, patch, values = built(wanted)
    while values > bound and max(patch) > 4 * LEAST_EDGE:
        axis = int(np.argmax([p / m for p, m in zip(patch, median)]))
        step = math.prod(stride[axis] for stride in settings["strides"])
        if patch[axis] <= max(step, 4 * LEAST_EDGE):
            order = np.argsort([-p / m for p, m in zip(patch, median)])
            axis = next((int(i) for i in order if patch[i] > 4 * LEAST_EDGE), axis)
            step = math.prod(stride[axis] for stride in settings["strides"])
        smaller = list(patch)
        smaller[axis] -= step
        # the strides may change with the size, and with them the step
        step = math.prod(stride[axis] for stride in topology(spacing, smaller)[0])
        smaller = list(patch)
        smaller[axis] = max(LEAST_EDGE, smaller[axis] - step)
        settings, patch, values = built(smaller)
    return settings, patch, values


def _seconds(kind: str, dims: int, base: int, outputs: int, channels: int) -> float:
    """Seconds of a training step here while nothing else runs, per value in the maps, by a small patch."""
    size = [PROBE[dims] * (2 if dims == 2 else 1)] * dims
    strides, kernels, patch = topology([1.0] * dims, size)
    n = len(strides)
    settings = {
        "features": [min(base * 2**i, WIDEST[dims]) for i in range(n)], "kernel_sizes": kernels, "strides": strides,
        "blocks_per_stage": BLOCKS[kind][:n], "decoder_blocks_per_stage": [2 if kind == "plain" else 1] * (n - 1),
    }  # fmt: skip
    network = create_network(KINDS[kind], outputs, channels, dims, settings).train()
    loss, times = SegmentationLoss("nnunet"), []
    x, y = torch.randn(2, channels, *patch), torch.zeros(2, *patch, dtype=torch.long)
    for _ in range(3):
        start = time.process_time()
        loss(network(x), y).backward()
        times.append((time.process_time() - start) / torch.get_num_threads())
    return min(times) / (2 * map_values(settings, patch, outputs, kind == "resenc"))


def write_plan(
    path: str | Path, recipe: dict[str, Any], reasons: dict[str, str], found: Fingerprint, data: str
) -> Path:
    """Write the recipe as YAML that `read_recipe` takes, with the fingerprint before and each reason above."""
    shares = ", ".join(f"{name} {share:.2%}" for name, share in found.shares.items())
    lines = [f"Plan of {data}, by nnU-Net's rules.", f"{len(found.shapes)} cases; classes: {shares}."]
    for what, values in (("voxels", found.shapes), ("voxel sides", found.sides)):
        low, mid, high = (np.percentile(np.array(values, float), q, 0) for q in (0, 50, 100))
        told = " to ".join("x".join(f"{v:.4g}" for v in each) for each in (low, high))
        lines.append(f"{what}: {told}, median {'x'.join(f'{v:.4g}' for v in mid)}.")
    for i, channel in enumerate(found.channels):
        told = f"channel {channel['name'] or i}: labelled voxels {channel['low']:.4g} to {channel['high']:.4g} "
        lines.append(told + f"(0.5 to 99.5 %), mean {channel['mean']:.4g}, deviation {channel['std']:.4g}.")
    text = "".join(f"# {part}\n" for line in lines for part in textwrap.wrap(line, 110))
    for name, value in recipe.items():
        text += "".join(f"# {part}\n" for part in textwrap.wrap(reasons[name], 110))
        flow = None if isinstance(value, dict | list) else False
        text += yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=flow, width=110)
    return write_text(path, text)
