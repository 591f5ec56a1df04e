"""What the processes of one training share: their places, validation data, results, the statistics of batch norms."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Sampler

from nearfar.core.errors import UserError
from nearfar.core.processes import place, process_count, sharded


def trainer_places() -> dict[str, Any]:
    """`devices`, `num_nodes` and `strategy` of Lightning's Trainer for the processes that were started."""
    count, _, here = place()
    if count == 1:  # alone, also in a SLURM allocation whose other places are not meant
        return {"devices": 1, "num_nodes": 1, "strategy": "auto", "plugins": [LightningEnvironment()]}
    if count % here:
        raise UserError(f"{count} processes, {here} of them on this machine: all machines must have as many")
    if "WORLD_SIZE" not in os.environ:  # Lightning refuses srun's --ntasks where it does not tell this too
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(here))
    launched = TorchElasticEnvironment() if "WORLD_SIZE" in os.environ else SLURMEnvironment()
    strategy: str | Strategy = Sharded(count) if sharded() else "ddp_find_unused_parameters_true"
    return {"devices": here, "num_nodes": count // here, "strategy": strategy, "plugins": [launched]}


class Share(Sampler[int]):
    """This process's share of a data set for validation: every item is in one share, none is repeated.

    Where there are fewer items than processes, each process has all: metrics are means, so that changes none.
    """

    def __init__(self, dataset: Dataset) -> None:
        size, (count, rank, _) = len(dataset), place()  # type: ignore[arg-type]
        self.places = range(rank, size, count) if size >= count else range(size)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)


def gathered(value: Any) -> list[Any]:
    """`value` (what can be pickled) of every process, in their order."""
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(found, value)
    return found


class _Sum(torch.autograd.Function):
    """The sum over all processes, and of its derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(ctx, gradient)


class _SharedNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of the batch of all processes, on any device.

    torch's SyncBatchNorm is for GPUs alone. The derivative passes through both sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            number = wide.new_tensor(x.numel() / x.shape[1])
            torch.distributed.all_reduce(number)
            mean = _Sum.apply(wide.sum(dims)) / number
            centred = wide - mean.view(shape)
            variance = _Sum.apply(centred.square().sum(dims)) / number
            out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), rate)
            self.running_var.lerp_(variance.detach() * number / (number - 1).clamp_min(1), rate)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


@contextmanager
def shared_norms(module: nn.Module) -> Iterator[list[str]]:
    """While the block runs, batch norms in `module`, and other layers that sum over the batch with their `batch_sum`,
    see the batch of all processes; yields the names of those that cannot (batch norms of classes that have a forward of
    their own) and see their own process's share."""
    changed, summing, alone = [], [], []
    for name, layer in module.named_modules() if process_count() > 1 else ():
        if hasattr(layer, "batch_sum"):
            layer.batch_sum = _Sum.apply
            summing.append(layer)
        if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            if type(layer).forward is not _BatchNorm.forward:
                alone.append(name)
                continue
            changed.append((layer, type(layer)))
            layer.__class__ = type(type(layer).__name__, (_SharedNorm, type(layer)), {})
    try:
        yield alone
    finally:
        for layer, kind in changed:
            layer.__class__ = kind
        for layer in summing:
            del layer.batch_sum


class Sharded(ModelParallelStrategy):
    """Each process keeps a part of every weight, of its gradient and of what the optimizer remembers of it.

    All parts meet for the length of a step, so what is saved between steps is what the memory of a step allows. The
    checkpoints that Lightning writes are whole, as one process would write them.
    """

    def __init__(self, count: int) -> None:
        super().__init__(data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        if self.lightning_module is None:  # the processes are to be connected before there is a model
            self._setup_distributed()
        else:
            super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        # where Lightning asks for it; the parts are made below, when the weights are on their device
        self.lightning_module.configure_model = lambda: None  # type: ignore[method-assign]
        super().setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        module, mesh = self.lightning_module, self.device_mesh["data_parallel"]
        assert module is not None
        for value in (*module.parameters(), *module.buffers()):  # the parts of one model: that of the first process
            torch.distributed.broadcast(value.detach(), 0)
        if module.automatic_optimization:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            for step in ("training_step", "validation_step"):
                register_fsdp_forward_method(module, step)
        else:  # the parts come together for a call and its derivatives, and a step that takes them itself is no call
            for child in module.children():
                fully_shard(child, mesh=mesh, reshard_after_forward=True)
        super().setup_optimizers(trainer)


def own_part(state: dict[str, Any]) -> dict[str, Any]:
    """Of a state dict whose weights are shared out, what this process has."""
    return {name: value.to_local() if hasattr(value, "to_local") else value for name, value in state.items()}
