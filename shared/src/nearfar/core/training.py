"""Training with Lightning: run folders, seeds, a metrics CSV and exact resume, shared by every recipe.

All randomness of an epoch (order of the data, dropout, augmentation) follows from the seed and the epoch's number, and
a run folder's `last.ckpt` is the state at the start of an epoch. A run that was interrupted at any moment therefore
goes on from there to the same weights, bit for bit on the CPU, as one that was not.

Several processes (see `nearfar.core.processes`) train as one with a batch of all their batches: each has its share of
the data, gradients and metrics are means over all, batch norm sees all. The first alone reads and writes the run
folder, and goes on when the training is over; the others end there.
"""

import copy
import json
import logging
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_weights
from nearfar.core.devices import check_precision
from nearfar.core.environment import environment
from nearfar.core.errors import DivergedError, UserError, some
from nearfar.core.files import atomic_path, locked, sweep, write_csv, write_json
from nearfar.core.fingerprint import data_digest, source_digest
from nearfar.core.finite import check_weights
from nearfar.core.processes import chosen_precision, place, process_count, process_rank, sharded
from nearfar.core.reading import reading
from nearfar.core.sharing import Share, own_part, shared_norms, trainer_places

Result = TypeVar("Result")

_together: list[int] = []
"""Numbers of processes that have trained together in this one."""


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed Python, NumPy and torch for one epoch of a run, in each of several processes otherwise."""
    rank = process_rank()
    state = np.random.SeedSequence([seed, epoch, *([rank] if rank else [])]).generate_state(1)[0]
    random.seed(int(state))
    np.random.seed(state)  # noqa: NPY002 - libraries draw from the legacy generator
    torch.manual_seed(int(state))


def seed_worker(seed: int, sampler: DistributedSampler, worker: int) -> None:
    """Seed one worker process of a data loader for the sampler's epoch."""
    seed_epoch(seed + 1 + worker, sampler.epoch)


class Parts(DistributedSampler):
    """A process's share of passes over the data, each in an order of its own, one of `parts` of it in an epoch.

    Up to as many items as there are processes and parts, others in each pass, stay out of it.
    """

    def __init__(self, dataset: Dataset, seed: int, parts: int) -> None:
        count, rank, _ = place()
        super().__init__(dataset, count, rank, seed=seed, drop_last=count > 1)
        self.parts = parts

    def __iter__(self) -> Iterator[int]:
        epoch, size = self.epoch, len(self)
        self.epoch = epoch // self.parts
        order = list(super().__iter__())
        self.epoch = epoch
        at = epoch % self.parts * size
        return iter(order[at : at + size])

    def __len__(self) -> int:
        return super().__len__() // self.parts


def data_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    parts: int = 1,
    **options: Any,
) -> DataLoader:
    """A DataLoader whose order and workers' randomness follow from `seed` and the epoch alone.

    `shuffle=True` is for training. Of several processes each gets its share: in training as many items each, so that up
    to one item less than there are processes, others in each epoch, stay out of it; else every item once (`Share`).
    `batch_size` is that of one process. In `parts` epochs a training sees the data once (`Parts`), so that a run goes
    on within a pass, to a part exactly. `options` go to DataLoader.
    """
    count = process_count()
    if not shuffle:
        share = Share(dataset) if count > 1 else None
        return DataLoader(dataset, batch_size, sampler=share, num_workers=num_workers, **options)
    if len(dataset) < count * parts:  # type: ignore[arg-type]
        shares = " and ".join(f"{n} {what}" for n, what in ((count, "processes"), (parts, "parts")) if n > 1)
        raise UserError(f"{len(dataset)} training items are too few for {shares}")  # type: ignore[arg-type]
    sampler = Parts(dataset, seed, parts)
    # a generator of its own, else making the iterator would draw from the global one at a time of Lightning's choice
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=partial(seed_worker, seed, sampler),
        generator=torch.Generator(),
        **options,
    )


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, floor: float = 0.0) -> LambdaLR:
    """Learning rates that rise linearly over `warmup_steps`, then fall by a half cosine to `floor` times the peak."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def train(
    module: pl.LightningModule,
    train_data: DataLoader,
    validation_data: DataLoader | list[DataLoader] | None = None,
    *,
    epochs: int,
    monitor: str | None = None,
    mode: str = "max",
    patience: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    fresh: bool = False,
    callbacks: Iterable[Callback] = (),
    show_progress: bool = False,
    device: str = "auto",
    **trainer_options: Any,
) -> list[dict[str, float]]:
    """Train `module` and leave it with its best weights; returns one row of metrics per epoch.

    The weights of the epoch with the best `monitor` (a metric that the module logs; `mode` "max" or "min"; on a tie the
    earlier epoch) are restored at the end, without `monitor` those of the last epoch. Training stops after `patience`
    epochs without a better value.

    With `folder`, the run can be interrupted and called again with the same arguments to go on. The folder holds
    `run.json` (settings, versions, git revision), `metrics.csv`, `last.ckpt` (for resuming) and `best.safetensors`.
    A finished run is not trained again. What a run is made from stands in `run.json`: `settings` and seed, digests of
    the content of training and validation data (see `data_digest`) and of what else `data` names, such as starting
    weights, and a digest of the code. Raises UserError that names what differs from that, or if another process trains
    there; `fresh` forgets the run that is there and starts anew. What has diverged is never saved: DivergedError,
    at the step, when the loss is not finite, and where weights or the monitored metric are not.

    Of several processes that were started together the first returns; the others exit with status 0 when the training
    is over, so this is called once in them. Another number of processes is refused where a run goes on.

    `trainer_options` go to Lightning's Trainer: `precision`, `accumulate_grad_batches`, `gradient_clip_val` ...
    """
    precision = trainer_options.setdefault("precision", chosen_precision())
    check_precision(str(precision), device)
    if process_count() > 1:
        if _together:
            raise UserError("several processes train one model in a job; start this alone")
        _together.append(process_count())
    if not len(train_data):
        raise UserError("the training items of a process make no whole batch; lower batch_size, or use fewer processes")
    run = _Run(monitor, mode, seed, None if folder is None else Path(folder), dict(settings or {}))
    extra: list[Callback] = [run, *callbacks]
    if patience is not None and monitor is not None:
        extra.append(EarlyStopping(monitor, patience=patience, mode=mode, check_finite=False))
    if show_progress := show_progress and not process_rank():
        extra.append(RichProgressBar(leave=False))

    def begin() -> bool:
        if folder is not None:
            held.enter_context(locked(folder, "trains"))
            run.made_from = {"data": _content(train_data), "validation data": _content(validation_data)}
            run.made_from |= data or {}
            run.made_from["code"] = source_digest(*{type(part) for part in module.modules()})
            if process_count() > 1:
                run.made_from["number of processes"] = str(process_count())
            if precision != "32-true" and "precision" not in run.settings:
                run.made_from["precision"] = str(precision)
            if fresh:
                run.forget()
        return run.open(module)

    with ExitStack() as held, quiet_lightning():
        trainer = pl.Trainer(
            callbacks=extra,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            max_epochs=epochs,
            enable_progress_bar=show_progress,
            accelerator=device,
            **trainer_places(),
            **trainer_options,
        )
        finished, resume_from = _decide(trainer, lambda: (begin(), run.resume_from))
        if not finished:
            # a model that is shared out does not come together again; the best weights do, in the one that was given
            trained = copy.deepcopy(module) if sharded() else module
            _fit(trainer, trained, train_data, validation_data, run, resume_from)
            run.close(module)
        if process_count() > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            if process_rank():
                raise SystemExit(0)
    return run.history


def _decide(trainer: pl.Trainer, decide: Callable[[], Result]) -> Result:
    """What `decide` returns in the first process, in all of them; where it raises UserError, the others exit."""
    if process_count() == 1:
        return decide()
    trainer.strategy.setup_environment()  # connects the processes
    result, error = None, None
    if not process_rank():
        try:
            result = decide()
        except UserError as raised:
            error = raised
    result, failed = trainer.strategy.broadcast((result, error is not None))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return result


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice to programmers while the block runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    train_data: DataLoader,
    validation_data: DataLoader | list[DataLoader] | None,
    run: "_Run",
    resume_from: Path | None,
) -> None:
    # Lightning resets the generators' states at no point of its own, so the first epoch's are set before it
    seed_epoch(run.seed, 0)
    try:
        with _logged_means(module), shared_norms(module) as alone:
            if alone and not process_rank():
                logging.getLogger("nearfar").warning(
                    f"batch norm sees each process's pictures alone in {some(alone)}: layers of a class of their own"
                )
            trainer.fit(module, train_data, validation_data, ckpt_path=resume_from, weights_only=True)
    except RuntimeError as error:
        if process_count() > 1 and re.search(r"gloo|NCCL", str(error)):
            raise UserError("another process of this job has ended; run the same command again to go on") from error
        raise
    except SystemExit:
        # Lightning turns Ctrl-C into an exit
        if run.interruption is not None:
            raise run.interruption from None
        raise


@contextmanager
def _logged_means(module: pl.LightningModule) -> Iterator[None]:
    """While the block runs, what the module logs is the mean over all processes, by the batch sizes it tells."""
    plain = module.log

    def log(*words: Any, **options: Any) -> None:
        if options.get("batch_size") is not None:
            options["batch_size"] = float(options["batch_size"])  # Lightning's mean of whole numbers is rounded down
        plain(*words, **options | {"sync_dist": True})

    if process_count() > 1:
        module.log = log  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.__dict__.pop("log", None)


def _content(loaders: DataLoader | list[DataLoader] | None) -> str:
    """A digest of the content of the loaders' data."""
    several = loaders if isinstance(loaders, list) else [] if loaders is None else [loaders]
    return data_digest([loader.dataset for loader in several])


class _Run(Callback):
    """Seeds each epoch, keeps the history and the best weights, and saves what a resumed run needs."""

    def __init__(
        self, monitor: str | None, mode: str, seed: int, folder: Path | None, settings: dict[str, Any]
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.monitor, self.mode, self.seed, self.folder, self.settings = monitor, mode, seed, folder, settings
        self.made_from: dict[str, str] = {}
        self.history: list[dict[str, float]] = []
        self.best: float | None = None
        self.best_state: dict[str, Tensor] | None = None  # only where there is no folder
        self.interruption: KeyboardInterrupt | None = None
        self.loss: tuple[int, int, Tensor] | None = None  # epoch and batch of the last loss, whether it is finite
        self.started = time.monotonic()

    def open(self, module: pl.LightningModule) -> bool:
        """Look at what the folder holds. True: a finished run, its history and weights are loaded."""
        if self.folder is None:
            return False
        sweep(self.folder)
        record = {"settings": self.settings, "seed": self.seed, "made_from": self.made_from}
        record |= {"environment": environment(), "finished": False}
        if not (path := self.folder / "run.json").exists():
            self.forget()  # a state without its record: nothing tells what it was made from
            write_json(path, record, exact=True)
            return False
        with reading(path, "is no record of a run", "start anew with --fresh"):
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs, made_from = dict(found["settings"]) | {"seed": found["seed"]}, dict(found.get("made_from", {}))
            finished, history = bool(found["finished"]), list(found.get("history", []))
        ours = json.loads(json.dumps(self.settings, default=str)) | {"seed": self.seed}  # tuples come back as lists
        settings = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        different = [f"settings ({', '.join(settings)})"] if settings else []
        different += [k for k in {**self.made_from, **made_from} if self.made_from.get(k) != made_from.get(k)]
        if different:
            raise UserError(
                f"{self.folder}: holds a run with other {', '.join(different)}; "
                "give the same to go on, name another folder, or start anew with --fresh"
            )
        if finished:
            self.history = [{k: float(v) for k, v in row.items()} for row in history]
            load_state_dict(module, read_state_dict(self.folder / "best.safetensors"))
            return True
        return False

    def forget(self) -> None:
        """Remove the run that the folder holds."""
        assert self.folder is not None
        for name in ("run.json", "last.ckpt", "best.safetensors", "metrics.csv"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def resume_from(self) -> Path | None:
        path = None if self.folder is None else self.folder / "last.ckpt"
        return path if path is not None and path.exists() else None

    def close(self, module: pl.LightningModule) -> None:
        if self.folder is not None:
            if process_rank():
                return
            load_state_dict(module, read_state_dict(self.folder / "best.safetensors"))
            if not (self.folder / "run.json").exists():
                raise UserError(f"{self.folder}: was removed while the training ran; run it again")
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            write_json(self.folder / "run.json", {**record, "finished": True, "history": self.history}, exact=True)
        elif self.best_state is not None:
            module.load_state_dict(self.best_state)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # saved here and not at the end of an epoch, because Lightning steps the schedulers after that hook
        if self.folder is not None and trainer.current_epoch > 0:
            check_weights(
                own_part(pl_module.state_dict()), f"training diverged before epoch {trainer.current_epoch + 1}"
            )
            with nullcontext() if process_rank() else atomic_path(self.folder / "last.ckpt") as temporary:
                trainer.save_checkpoint(trainer.strategy.broadcast(temporary))  # the first writes, the others take part
        # a resumed epoch is a whole one: without this Lightning takes up the counters of the epoch before and skips the
        # next step of the schedulers
        trainer.fit_loop.restarting = False
        seed_epoch(self.seed, trainer.current_epoch)
        self.started = time.monotonic()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.check_loss()
        # looked at before the next step only, so that an accelerator is not made to wait for each step
        batch = trainer.fit_loop.epoch_loop.batch_idx
        self.loss = trainer.current_epoch, batch, torch.isfinite(loss.detach()).all()

    def check_loss(self) -> None:
        if self.loss is not None and not bool(self.loss[2]):
            epoch, batch, _ = self.loss
            raise DivergedError(
                f"training diverged: the loss of epoch {epoch + 1}, batch {batch + 1} is not finite; nothing of this "
                "epoch is kept. Lower the learning rate, clip gradients or look for bad values in the data"
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_loss()
        check_weights(own_part(pl_module.state_dict()), f"training diverged in epoch {trainer.current_epoch + 1}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_loss()
        check_weights(own_part(pl_module.state_dict()), f"training diverged in epoch {trainer.current_epoch + 1}")
        row = {"epoch": float(trainer.current_epoch)}
        row |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        row["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row["seconds"] = round(time.monotonic() - self.started, 3)
        row = trainer.strategy.broadcast(row)
        for name, value in row.items():
            if (name == self.monitor or "loss" in name) and not math.isfinite(value):
                raise DivergedError(
                    f"training diverged: {name} of epoch {trainer.current_epoch + 1} is {value}; "
                    "lower the learning rate or clip gradients"
                )
        self.history.append(row)
        if self.monitor is not None:
            if self.monitor not in row:
                raise ValueError(f"the module logs no {self.monitor!r}; it logs {', '.join(row)}")
            value = row[self.monitor] if self.mode == "max" else -row[self.monitor]
            if self.best is None or value > self.best:
                self.best = value
                self.keep(trainer)
        if self.folder is not None and not process_rank():
            write_csv(self.folder / "metrics.csv", self.history)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None:
            self.keep(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        """Keep the weights as they are now; all processes take part, the first has them whole."""
        state = trainer.strategy.lightning_module_state_dict()
        if self.folder is None:
            self.best_state = {k: v.detach().cpu().clone() for k, v in state.items()}
        elif not process_rank():
            save_weights(state, self.folder / "best.safetensors")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.interruption = exception if isinstance(exception, KeyboardInterrupt) else None

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best = list(state_dict["history"]), state_dict["best"]
