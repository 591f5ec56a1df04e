"""`nearfar` with nothing left to chance in a training but the order of the data: `python still.py ARGUMENTS`.

Items are drawn by their place in the data and not by the process that reads them; dropout and mirroring are off. A
gradient that is zero but for rounding, as that of a bias in front of a batch norm, moves nothing: Adam would make whole
steps of it.
"""

import random
import sys
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from nearfar.core import training
from nearfar.core.cli.root import run


class Still(Dataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        random.seed(index)
        np.random.seed(index)  # noqa: NPY002
        torch.manual_seed(index)
        return self.dataset[index]


plain_loader, plain_train = training.data_loader, training.train


def data_loader(dataset: Any, *words: Any, **options: Any) -> Any:
    return plain_loader(Still(dataset), *words, **options)


def train(module: Any, *words: Any, **options: Any) -> Any:
    for part in module.modules():
        for name in ("p", "drop_prob", "dropout", "flip", "attn_drop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    kind = type(module)

    def configure_optimizers(self: Any) -> Any:
        made = kind.configure_optimizers(self)
        several = made[0] if isinstance(made, tuple) else made if isinstance(made, list) else [made]
        for optimizer in (one["optimizer"] if isinstance(one, dict) else one for one in several):
            for group in optimizer.param_groups:
                if "eps" in group:
                    group["eps"] = 1e-3
        return made

    own = {"configure_optimizers": configure_optimizers, "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), own)
    return plain_train(module, *words, **options)


if __name__ == "__main__":
    training.data_loader, training.train = data_loader, train
    sys.exit(run())
