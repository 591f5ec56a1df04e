"""Training of a ForecastNet on a series of fields, one or several steps ahead."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.core.errors import UserError
from nearfar.core.fingerprint import data_digest
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.vision.forecasting.fields import Fields, Statistics, fit_statistics
from nearfar.vision.forecasting.forecastnet import ForecastNet


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    FourCastNet's: Adam with learning rate 5e-4 and cosine, batches of 64, relative L2 loss on one step; then `steps` 2
    with learning rate 1e-4 from the trained net.
    """

    patch_size: int = 4
    dim: int = 64
    depth: int = 4
    num_blocks: int = 8
    modes: str = "lowpass"
    fraction: float = 1.0
    residual: bool = True
    steps: int = 1
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_epochs: int = 1
    weight_decay: float = 0.0
    validation_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps {self.steps}, epochs {self.epochs} and batch_size {self.batch_size} are at least 1"
            )
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it must lie between 0 and 1")

    def network(self, channels: int, size: tuple[int, int]) -> ForecastNet:
        """The untrained network for so many channels on a grid."""
        return ForecastNet(
            size,
            channels,
            patch_size=self.patch_size,
            dim=self.dim,
            depth=self.depth,
            num_blocks=self.num_blocks,
            modes=self.modes,
            fraction=self.fraction,
            residual=self.residual,
        )


def relative_l2(forecast: Tensor, truth: Tensor) -> Tensor:
    """Mean over the batch of ||forecast - truth|| / ||truth|| over all channels and positions."""
    return ((forecast - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).mean()


class Windows(Dataset):
    """Normalized stretches of steps + 1 fields, (steps + 1, C, H, W); a series of up to `memory` bytes is read once."""

    def __init__(self, fields: Fields, statistics: Statistics, steps: int, memory: int = 2**29) -> None:
        self.fields, self.statistics, self.steps = fields, statistics, steps
        fits = 4 * len(fields) * statistics.climatology.size <= memory
        self.held = np.stack([self.read(i) for i in range(len(fields))]) if fits else None

    def read(self, index: int) -> np.ndarray:
        return self.statistics.normalize(self.fields.read(index)).astype(np.float32)

    def __len__(self) -> int:
        return max(len(self.fields) - self.steps, 0)

    def __getitem__(self, index: int) -> Tensor:
        times = range(index, index + self.steps + 1)
        if self.held is not None:
            return torch.from_numpy(self.held[times.start : times.stop])
        return torch.from_numpy(np.stack([self.read(i) for i in times]))


class Forecaster(pl.LightningModule):
    """The loss of `net` over the steps of a window, each from the net's own last state."""

    def __init__(self, net: ForecastNet, recipe: Recipe, steps_per_epoch: int) -> None:
        super().__init__()
        self.net, self.recipe, self.steps_per_epoch = net, recipe, steps_per_epoch

    def loss(self, window: Tensor) -> Tensor:
        state, total = window[:, 0], window.new_zeros(())
        for step in range(1, window.shape[1]):
            state = self.net(state)
            total = total + relative_l2(state, window[:, step])
        return total / (window.shape[1] - 1)

    def training_step(self, window: Tensor, index: int) -> Tensor:
        loss = self.loss(window)
        self.log("train_loss", loss, on_epoch=True, on_step=False, batch_size=len(window))
        return loss

    def validation_step(self, window: Tensor, index: int) -> None:
        self.log("validation_loss", self.loss(window), batch_size=len(window))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )
        epochs = self.recipe.epochs, self.recipe.warmup_epochs
        total, warmup = (n * self.steps_per_epoch for n in epochs)
        schedule = warmup_cosine(optimizer, warmup, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_forecaster(
    fields: Fields,
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    net: ForecastNet | None = None,
    device: str = "auto",
    show_progress: bool = False,
    fresh: bool = False,
) -> tuple[ForecastNet, Statistics, list[dict[str, float]]]:
    """Train on the first part of a series, choose the epoch on the last part, `validation_share` of it.

    Statistics come from the first part alone. With `folder` the run can be interrupted and goes on; the folder then
    holds the network (`from_pretrained`) and `statistics.json`. `net` goes on from a trained network.

    Raises UserError for a grid that the patches do not divide or a series that is too short.
    """
    held = max(int(recipe.validation_share * len(fields)), recipe.steps + 1)
    if len(fields) - held <= recipe.steps:
        raise UserError(f"{fields.source}: {len(fields)} times are too few for {recipe.steps} steps and a validation")
    learn, hold = fields.part(0, len(fields) - held), fields.part(len(fields) - held, len(fields))
    statistics = fit_statistics(learn)
    begun = {} if net is None else {"starting weights": data_digest(net.state_dict())}
    torch.manual_seed(recipe.seed)
    try:
        net = recipe.network(len(fields.names), fields.size) if net is None else net
    except ValueError as error:
        raise UserError(f"{fields.source}: {error}") from error
    data = Windows(learn, statistics, recipe.steps)
    loader = data_loader(data, recipe.batch_size, shuffle=True, seed=recipe.seed)
    module = Forecaster(net, recipe, len(loader))
    history = train(
        module,
        loader,
        data_loader(Windows(hold, statistics, recipe.steps), recipe.batch_size),
        epochs=recipe.epochs,
        monitor="validation_loss",
        mode="min",
        seed=recipe.seed,
        folder=folder,
        settings={**asdict(recipe), "data": statistics.digest, "channels": fields.names},
        show_progress=show_progress,
        data=begun,
        fresh=fresh,
        device=device,
    )
    if folder is not None:
        net.save_pretrained(folder)
        # the network has seen the validation part in the choice of its epoch
        seen = Statistics(**{**asdict(statistics), "last": str(fields.times[-1])})
        seen.save(folder)
    return net.eval(), statistics, history
