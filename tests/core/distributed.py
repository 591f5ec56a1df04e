"""A small training for the tests of several processes: `python distributed.py FOLDER [name=value ...]`.

batch: of one process. stop: the batch of the third epoch at which process `rank` ends (as by kill -9). fsdp=1: the
model is shared out. norm=0: no batch norm, which sees the batches of a step one by one.
"""

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import TensorDataset

from nearfar.core.checkpoints import save_state_dict
from nearfar.core.cli.console import messages
from nearfar.core.errors import UserError
from nearfar.core.processes import choose, process_rank
from nearfar.core.training import data_loader, train


class Small(pl.LightningModule):
    """Batch norm over all processes, momentum, and a plateau that the validation loss steers."""

    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(4)] if norm else []
        self.net = nn.Sequential(
            nn.Conv1d(1, 4, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 2)
        )

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch):
        logits = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), batch_size=len(logits))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class KillAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)


def main(
    folder: Path,
    batch: int = 4,
    epochs: int = 4,
    dropout: float = 0.0,
    stop: int = -1,
    rank: int = 1,
    fsdp: int = 0,
    norm: int = 1,
    accumulate: int = 1,
) -> None:
    choose(strategy="fsdp" if fsdp else "ddp")
    x = torch.randn(48, 1, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1 + process_rank())  # the model is that of the first process
    module = Small(dropout, bool(norm))
    y = (x[:, 0, 0] * x[:, 0, 1] > 0).long()
    train(
        module,
        data_loader(TensorDataset(x[:32], y[:32]), batch, shuffle=True, seed=2),
        data_loader(TensorDataset(x[32:47], y[32:47]), 4),
        epochs=epochs,
        monitor="val_loss",
        mode="min",
        seed=2,
        folder=folder,
        settings={"epochs": epochs},
        callbacks=[KillAt(stop)] if stop >= 0 and process_rank() == rank else [],
        device="cpu",
        accumulate_grad_batches=accumulate,
    )
    save_state_dict(module, folder / "final.safetensors")


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[2:])
    options = {name: float(value) if name == "dropout" else int(value) for name, value in words.items()}
    try:
        main(Path(sys.argv[1]), **options)
    except UserError as error:
        messages.print(f"refused: {error}", soft_wrap=True)
        sys.exit(2)
