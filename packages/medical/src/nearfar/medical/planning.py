"""From a data set's fingerprint to a recipe, by the rules of nnU-Net v2, each decision with its reason."""

import functools
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
from nearfar.medical.data.scans import resize_labels
from nearfar.medical.losses import SegmentationLoss
from nearfar.medical.metrics import dice
from nearfar.medical.networks import create_network
from nearfar.medical.preparation import ANISOTROPIC, ChannelSurvey, content_box

KINDS = {"plain": "nnunet_plain", "resenc": "nnunet_resenc"}

REFERENCE = {("plain", 2): 85e6, ("plain", 3): 560e6, ("resenc", 2): 135e6, ("resenc", 3): 680e6}
"""Values in the maps of a batch of `BATCH` that 8 GB hold in training, as nnU-Net counts them."""

BATCH, FIRST, WIDEST = {2: 12, 3: 2}, 32, {2: 512, 3: 320}
LEAST_EDGE = 4
"""Voxels that the coarsest map keeps along an axis."""

BLOCKS = {"plain": [2] * 16, "resenc": [1, 3, 4, *[6] * 13]}
SHORT, DEEP, STEPS = 20_000, 2_000, 300
"""Steps from which on a training is long, those that one in three axes should have at the full width (with less time
it takes slices instead), and those that any should have."""

WIDTHS = ((32, 1000), (16, STEPS), (8, STEPS))
"""Channels at first of a short training, and the steps that it should have for them."""

PATCHES, PROBE = {2: 4, 3: 2}, {2: 64, 3: 24}
"""Patches in a step of a short training, and voxels along a trial patch."""

GROUPS = 4
"""Groups of channels that a short training by slices norms together."""

NETWORK = 0.85
"""Share of the minutes that is for the network's steps."""

COARSER, KEPT, COVER = (1.5, 2.0, 3.0, 4.0), 0.92, 0.25
"""How much coarser a short training may see images, the Dice that every label must keep on the way there and back, and
the share of an image that a patch should cover."""


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
        dims: 2 for a network that sees slices; None for 3, and 2 for pictures and where the minutes are few.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    found = take_fingerprint(collection, cases)
    axes = len(found.shapes[0])
    if dims is not None and (dims > axes or dims not in (2, 3)):
        raise UserError(f"a network of {dims} axes does not fit scans of {axes}")
    spacing, why = target_spacing(found.sides, found.shapes)
    sizes = [[max(1, round(n * s / t)) for n, s, t in zip(*pair, spacing)] for pair in zip(found.shapes, found.sides)]
    median, voxels = np.median(sizes, 0), sum(math.prod(s) for s in sizes)
    outputs = len(collection.regions) if collection.order else 1 + len([v for v in collection.labels if v])
    reasons: dict[str, str] = {}

    seen, times = list(range(axes)), np.ones(axes)

    def fit(widths: Sequence[tuple[int, int, int]] = ()) -> _Fit:
        """What the budget holds where a network sees the axes `seen`, `times` as coarse."""
        dims = len(seen)
        if not widths:
            widths = [(FIRST, WIDEST[dims], 1 if minutes is None else SHORT)]
            widths += [(base, 4 * base, steps) for base, steps in WIDTHS] if minutes is not None else []
        most = REFERENCE[kind, dims] * memory / (8 * 2**30) / BATCH[dims]
        sides, size = (np.array(spacing) * times)[seen], (median / times)[seen]
        return _fit(kind, sides.tolist(), size, outputs, len(found.channels), most, minutes, widths)

    if dims is None and axes == 3 and minutes is not None:
        if fit([(FIRST, WIDEST[3], DEEP)]).enough:
            told = f"volumes: {DEEP} steps of {FIRST} channels at first fit into {minutes:g} minutes"
        else:
            dims, told = 2, f"slices: in {minutes:g} minutes {DEEP} steps of {FIRST} channels at first do not fit in "
            told += "three axes, and with fewer slices learn more (--axes 3 takes volumes all the same)"
        reasons["axes"] = told
    if (dims or axes) < axes:
        across = int(np.argmax(spacing)) if max(spacing) > 1.5 * sorted(spacing)[-2] else axes - 1
        seen.remove(across)
    chosen, factor = fit(), 1.0
    if minutes is not None:
        fine = [i for i in seen if spacing[i] < 2 * min(spacing[j] for j in seen)]
        for coarser in COARSER:
            if chosen.steps >= SHORT or math.prod(chosen.patch) >= COVER * math.prod((median / times)[seen]):
                break
            if _kept(collection, cases, spacing, fine, coarser) < KEPT:
                break
            times[fine] = factor = coarser
            chosen = fit()
    settings, patch, base, dims = chosen.settings, chosen.patch, chosen.settings["features"][0], len(seen)
    spacing, median = (np.array(spacing) * times)[seen].tolist(), (median / times)[seen]
    voxels = round(voxels / math.prod(times))
    batch = REFERENCE[kind, dims] * memory / (8 * 2**30) / chosen.values
    if minutes is not None:
        batch = min(batch, minutes * 60 / STEPS / (chosen.seconds * chosen.values))
    long = minutes is None or chosen.steps >= SHORT
    batch = max(2, round(min(batch, 0.05 * voxels / math.prod(patch) if long else PATCHES[dims])))
    if not long and dims < axes:
        settings["norm_groups"] = GROUPS
    if minutes is not None:
        step = _timed(kind, settings, patch, batch, outputs, len(found.channels))
    recipe: dict[str, Any] = {}

    def decide(name: str, value: Any, reason: str) -> None:
        recipe[name], reasons[name] = value, reason

    decide("network", KINDS[kind], f"nnU-Net's {kind} U-Net")
    told = f"{len(settings['features'])} stages: an axis is halved while it keeps {2 * LEAST_EDGE} voxels and is not "
    told += "coarser than twice the finest; kernels of 1 along coarse axes"
    if not long:
        told += f"; {base} channels at first and {4 * base} at most instead of {FIRST} and {WIDEST[dims]}, so that "
        told += f"{chosen.steps} steps fit into {minutes:g} minutes here"
    if "norm_groups" in settings:
        told += f"; channels normed in {GROUPS} groups, since a norm of each alone takes from slices how they differ"
    decide("settings", settings, told)
    told = f"of a median image of {'x'.join(f'{m:.0f}' for m in median)} voxels"
    by = f"{memory / 2**30:.3g} GB of memory" + (f" and {minutes:g} minutes" if minutes is not None else "")
    decide("roi", patch, f"{told}; the longest, relative to it, is cut until {by} hold it")
    if "axes" in reasons:
        reasons["roi"] = f"{reasons.pop('axes')}. {reasons['roi']}"
    if factor > 1:
        why = "pixels" if found.pictures else why
        why += f", {factor:g} times as coarse, so that a patch covers more of an image; every label keeps a Dice of "
        why += f"{KEPT:g} at least on the way there and back"
    if found.pictures and factor == 1:
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
    mirrored = [place for place, axis in enumerate(seen) if not (sided and axis == 0 and not found.pictures)]
    decide(
        "augment",
        [{"RandFlipd": {"prob": 0.5, "spatial_axis": axis}} for axis in mirrored],
        "mirror images" + (", but not left and right, which labels tell apart" if len(mirrored) < dims else ""),
    )
    told = f"5 % of the {voxels:,} voxels" if long else f"{PATCHES[dims]}, for more steps teach more than larger ones"
    decide("batch_size", batch, f"what the budget holds, at most {told}, at least 2")
    if minutes is None:
        epochs, steps = 1000, 250
        told = "nnU-Net's"
    else:
        epochs, steps = 20, max(1, int(NETWORK * minutes * 60 / step) // 20)
        told = f"a step takes about {step:.2g} s here, so {20 * steps} fit into {NETWORK:.0%} of {minutes:g} minutes; "
        told += "the rest is for reading, augmenting and checkpoints"
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
        decide(
            "learning_rate", 0.08 / max(8, base), "0.08 by the channels at first, 0.01 at most: AdamW moves each alike"
        )
        decide("schedule", "warmup_cosine", "falls to 0 at the end")
    decide("seed", seed, "given")
    return recipe, reasons, found


@dataclass
class _Fit:
    """What a budget holds: settings, patch, values in the maps of one, seconds per value, steps that were asked for."""

    settings: dict[str, Any]
    patch: list[int]
    values: float
    seconds: float
    steps: int
    enough: bool


def _fit(
    kind: str,
    spacing: Sequence[float],
    median: Any,
    outputs: int,
    channels: int,
    most: float,
    minutes: float | None,
    widths: Sequence[tuple[int, int, int]],
) -> _Fit:
    """The first of `widths` of which a patch that is not small fits, else the last of them.

    Each is channels of the finest map, of the coarsest at most, and steps that shall fit into the minutes. `most`:
    values in the maps of a patch that fit into the memory.
    """
    dims = len(spacing)
    for base, widest, steps in widths:
        seconds, bound = 0.0, most
        if minutes is not None:
            seconds = _seconds(kind, dims, (base, widest), outputs, channels)
            bound = min(bound, minutes * 60 / steps / PATCHES[dims] / seconds)
        settings, patch, values = _shrunk(kind, (base, widest), spacing, median, outputs, bound)
        enough = all(p >= min(PROBE[dims] * 1.3, m) for p, m in zip(patch, median))
        if enough and (minutes is None or PATCHES[dims] * values * seconds * steps <= minutes * 60 * 1.01):
            break
    return _Fit(settings, patch, values, seconds, steps, enough)


def _built(
    kind: str, width: tuple[int, int], spacing: Sequence[float], patch: Sequence[int], outputs: int
) -> tuple[dict[str, Any], list[int], float]:
    """Settings for a patch, the patch enlarged to multiples of the strides, and the values in its maps."""
    strides, kernels, padded = topology(spacing, patch)
    n = len(strides)
    if n < 2:
        raise UserError(f"images of {list(patch)} voxels are too small for a U-Net, which halves an axis of 8 at least")
    settings = {
        "features": [min(width[0] * 2**i, width[1]) for i in range(n)],
        "kernel_sizes": kernels,
        "strides": strides,
        "blocks_per_stage": BLOCKS[kind][:n],
        "decoder_blocks_per_stage": [2 if kind == "plain" else 1] * (n - 1),
    }
    return settings, padded, map_values(settings, padded, outputs, kind == "resenc")


def _shrunk(
    kind: str, width: tuple[int, int], spacing: Sequence[float], median: Any, outputs: int, bound: float
) -> tuple[dict[str, Any], list[int], float]:
    """As `_built`: from the image's size, the relatively longest axis is cut until the values are within `bound`."""
    dims, tmp = len(spacing), 1 / np.array(spacing)
    whole = tmp * ((256**3 if dims == 3 else 2048**2) / math.prod(tmp)) ** (1 / dims)
    wanted = [max(1, int(min(round(w), m))) for w, m in zip(whole, median)]
    built = functools.partial(_built, kind, width, spacing, outputs=outputs)
    settings, patch, values = built(patch=wanted)
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
        settings, patch, values = built(patch=smaller)
    return settings, patch, values


@functools.cache
def _seconds(kind: str, dims: int, width: tuple[int, int], outputs: int, channels: int) -> float:
    """Seconds of a training step here while nothing else runs, per value in the maps, by a small patch."""
    size = [PROBE[dims] * (2 if dims == 2 else 1)] * dims
    settings, patch, values = _built(kind, width, [1.0] * dims, size, outputs)
    return _timed(kind, settings, patch, 2, outputs, channels) / (2 * values)


def _timed(kind: str, settings: dict[str, Any], patch: Sequence[int], batch: int, outputs: int, channels: int) -> float:
    """Seconds of a training step here while nothing else runs, but for reading and augmenting its patches."""
    network = create_network(KINDS[kind], outputs, channels, len(patch), settings).train()
    loss, times, optimizer = SegmentationLoss("nnunet"), [], torch.optim.AdamW(network.parameters())
    x, y = torch.randn(batch, channels, *patch), torch.zeros(batch, *patch, dtype=torch.long)
    for _ in range(3):
        start = time.process_time()
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
        times.append((time.process_time() - start) / torch.get_num_threads())
    return min(times)


def _kept(
    collection: Collection, cases: Sequence[Case], spacing: Sequence[float], axes: Sequence[int], factor: float
) -> float:
    """The least Dice of a label, the mean of up to 4 cases, to itself on a grid `factor` times as coarse and back."""
    scores: dict[int, list[float]] = {}
    for case in cases[:: -(-len(cases) // 4)]:
        scan, stored = collection.read(case)
        assert stored is not None
        labels, sides = scan.to_canonical(stored), scan.canonical_spacing()
        size = [max(1, round(n * sides[i] / (spacing[i] * factor))) if i in axes else n
                for i, n in enumerate(labels.shape)]  # fmt: skip
        back = resize_labels(resize_labels(labels, size), labels.shape)
        for value in np.unique(labels):
            if value and value != collection.ignore:
                scores.setdefault(int(value), []).append(dice(back == value, labels == value))
    return min((float(np.mean(each)) for each in scores.values()), default=0.0)


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
