"""Training on tiles: augmentation, balance of the classes, the choice of the epoch by slides of their own."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from nearfar.core.errors import UserError, some
from nearfar.core.fingerprint import content_digest, data_digest
from nearfar.core.finite import check_finite
from nearfar.core.leakage import Side, check_apart
from nearfar.core.model_folder import TrainedOn
from nearfar.core.processes import place
from nearfar.core.reading import reading
from nearfar.core.sharing import gathered
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.medical.data.tiles import Tile, check_tile_split, jitter_stains, read_tile, split_by_slide
from nearfar.medical.histology.classifier import (
    TileClassifier,
    TileRecipe,
    create_tile_network,
    fitted,
    normalized,
    start_from,
)


class Tiles(Dataset):
    """Tiles with the index of their class; augmented, and drawn as the recipe says, where `learn`."""

    def __init__(self, tiles: Sequence[Tile], classes: Sequence[str], recipe: TileRecipe, learn: bool = False) -> None:
        self.tiles, self.recipe, self.learn = list(tiles), recipe, learn
        self.labels = [list(classes).index(tile.label) for tile in tiles]
        self.of_class = [[i for i, label in enumerate(self.labels) if label == k] for k in range(len(classes))]

    def __len__(self) -> int:
        return (self.learn and self.recipe.tiles_per_epoch) or len(self.tiles)

    def content_digest(self) -> str:
        """Of the tiles' content, classes and slides."""
        return data_digest([(content_digest(tile.path), tile.label, tile.group) for tile in self.tiles])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        recipe = self.recipe
        if self.learn and recipe.balanced:
            index = random.choice(self.of_class[index % len(self.of_class)])
        elif self.learn and recipe.tiles_per_epoch:
            index = random.randrange(len(self.tiles))
        tile = self.tiles[index]
        with reading(tile.path, "cannot be read as a tile"):
            pixels = read_tile(tile.path)
            seen = augmented(pixels, recipe) if self.learn else fitted(pixels, recipe)
        return normalized(seen), self.labels[index]


def augmented(tile: np.ndarray, recipe: TileRecipe) -> Tensor:
    """A tile turned, mirrored, cut and coloured by chance, (3, size, size) in 0..1."""
    size = recipe.size
    if recipe.rotate == "any":
        turned = Image.fromarray(tile).rotate(random.uniform(0, 360), Image.Resampling.BILINEAR)
        tile = np.asarray(turned)
        inner = [max(min(size, n), int(n / math.sqrt(2))) for n in tile.shape[:2]] if recipe.fit == "crop" else None
        if inner is not None:
            top, left = ((n - m) // 2 for n, m in zip(tile.shape[:2], inner, strict=True))
            tile = tile[top : top + inner[0], left : left + inner[1]]
    elif recipe.rotate == "quarter":
        tile = np.rot90(tile, random.randrange(4))
    if recipe.flip:
        tile = tile[:: random.choice((1, -1)), :: random.choice((1, -1))]
    if recipe.fit == "crop" and min(tile.shape[:2]) >= size:
        top, left = (random.randint(0, n - size) for n in tile.shape[:2])
        tile = tile[top : top + size, left : left + size]
    x = fitted(np.ascontiguousarray(tile), recipe)
    if recipe.stains:
        x = jitter_stains(x, recipe.stains)
    if recipe.jitter:
        brightness, contrast = (1 + random.uniform(-recipe.jitter, recipe.jitter) for _ in range(2))
        x = x * brightness
        x = ((x - x.mean()) * contrast + x.mean()).clamp(0, 1)
    return x


class TileModule(pl.LightningModule):
    """Cross-entropy of a network; on validation tiles the loss and the mean of the classes' accuracies."""

    weights: Tensor | None

    def __init__(
        self, network: nn.Module, recipe: TileRecipe, steps: int, weights: Tensor | None, classes: int
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.steps, self.num_classes = network, recipe, steps, classes
        self.register_buffer("weights", weights, persistent=False)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        x, labels = batch
        try:
            logits = self.network(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "a batch of one tile cannot train this network's batch norm; set another batch_size"
            ) from error
        loss = F.cross_entropy(logits, labels, self.weights)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        x, labels = batch
        scores = check_finite(self.network(x).float(), "training diverged: the scores of the validation tiles")
        self.seen.append((scores.cpu(), labels.cpu()))

    def on_validation_epoch_end(self) -> None:
        every = [pair for seen in gathered(self.seen) for pair in seen]
        self.seen.clear()
        scores, labels = (torch.cat(parts) for parts in zip(*every, strict=True))
        right = torch.bincount(labels[scores.argmax(1) == labels], minlength=self.num_classes)
        number = torch.bincount(labels, minlength=self.num_classes)
        there = number > 0
        self.log_dict({"loss": F.cross_entropy(scores, labels), "balanced": (right[there] / number[there]).mean()})

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        options = {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
        optimizer = kinds[recipe.optimizer](
            [p for p in self.network.parameters() if p.requires_grad], lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay, **options,
        )  # fmt: skip
        if recipe.schedule == "constant":
            return optimizer
        schedule = warmup_cosine(optimizer, self.steps // 10 + 1, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def class_weights(tiles: Sequence[Tile], classes: Sequence[str]) -> Tensor:
    """N / (classes n_c): of mean 1 over the tiles."""
    counts = Counter(tile.label for tile in tiles)
    return torch.tensor([len(tiles) / (len(classes) * counts[name]) for name in classes])


def readable_tiles(
    tiles: Sequence[Tile], track: Callable[[Sequence[Tile]], Iterable[Tile]] = lambda tiles: tiles
) -> tuple[list[Tile], list[str], tuple[int, int]]:
    """The tiles that can be read, a line for each other, and the smallest and largest side."""
    good, failures, sides = [], [], []
    for tile in track(tiles):
        try:
            sides += read_tile(tile.path).shape[:2]
            good.append(tile)
        except UserError as error:
            failures.append(str(error))
    if not good:
        raise UserError(failures[0] if failures else "there are no tiles")
    return good, failures, (min(sides), max(sides))


def chosen_by(tiles: Sequence[Tile], recipe: TileRecipe) -> tuple[list[Tile], list[Tile]]:
    """What is learnt from, and the slides that choose the epoch: the share `validation` of all."""
    if not recipe.validation:
        return list(tiles), []
    return split_by_slide(tiles, max(2, round(1 / recipe.validation)), recipe.seed)[0]


def check_sides_apart(learn: Sequence[Tile], held: Sequence[Tile], names: tuple[str, str]) -> None:
    """Raise UserError where a slide, a patient or the content of a tile is on both sides."""
    check_tile_split(learn, held)
    sides = zip(names, (learn, held), strict=True)
    first, second = (
        Side(name, [str(t.path) for t in part], [content_digest(t.path) for t in part], [t.group for t in part])
        for name, part in sides
    )
    check_apart(first, second, "slide")


def train_tiles(
    tiles: Sequence[Tile],
    recipe: TileRecipe,
    folder: str | Path,
    *,
    sides: tuple[int, int] | None = None,
    weights: str | Path | None = None,
    num_workers: int = 0,
    **options: Any,
) -> tuple[TileClassifier, list[dict[str, float]]]:
    """Train on tiles; returns the classifier and one row of metrics per epoch.

    `sides`: the smallest and largest of the tiles, where they have been read already (`readable_tiles`). `weights`: as
    in `start_from`. `folder` and `options`: see `nearfar.core.training.train`; an interrupted run goes on, and the
    classifier is saved there.
    """
    if sides is None:
        tiles, failures, sides = readable_tiles(tiles)
        if failures:
            raise UserError(failures[0])
    if recipe.fit == "crop" and sides[0] < recipe.size:
        raise UserError(
            f"the smallest tile has a side of {sides[0]} pixels, the network sees {recipe.size}; lower size, or set "
            "fit=resize"
        )
    classes = sorted({tile.label for tile in tiles})
    if len(classes) < 2:
        raise UserError(f"there are tiles of {some(classes)} alone; at least two classes are needed")
    learn, watched = chosen_by(tiles, recipe)
    if watched:
        check_sides_apart(learn, watched, ("the training", "the slides that choose the epoch"))
    torch.manual_seed(recipe.seed)
    network = create_tile_network(recipe.network, len(classes), recipe.size, recipe.settings)
    if weights is not None:
        start_from(network, weights)
    data = Tiles(learn, classes, recipe, learn=True)
    batch = min(recipe.batch_size, len(data))
    whole = len(data) > batch * place()[0]  # a last batch of few tiles is left out, others in each epoch
    loader = data_loader(data, batch, shuffle=True, seed=recipe.seed, num_workers=num_workers, drop_last=whole)
    held = data_loader(Tiles(watched, classes, recipe), batch, num_workers=num_workers) if watched else None
    steps = recipe.epochs * -(-len(loader) // recipe.accumulate)
    balance = class_weights(learn, classes) if recipe.class_weights else None
    module = TileModule(network, recipe, steps, balance, len(classes))
    history = train(
        module, loader, held, epochs=recipe.epochs, seed=recipe.seed, folder=folder,
        monitor=recipe.choose_by if watched else None, mode="min" if recipe.choose_by == "loss" else "max",
        settings={"classes": classes, **asdict(recipe)},
        data={} if weights is None else {"starting weights": content_digest(Path(weights))},
        accumulate_grad_batches=recipe.accumulate, **options,
    )  # fmt: skip
    seen = TrainedOn.of((content_digest(t.path) for t in tiles), sorted({n for t in tiles for n in (t.slide, t.group)}))
    plain = TileRecipe(**asdict(recipe) | {"settings": {k: v for k, v in recipe.settings.items() if k != "pretrained"}})
    classifier = TileClassifier(network.cpu().eval(), plain, classes, sides, seen)
    classifier.save(folder)
    return classifier, history
