"""Run folders: exact resume, best weights, refusals."""

import json
import math
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import TensorDataset

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import DivergedError, UserError
from nearfar.core.training import data_loader, train, warmup_cosine


class Classifier(pl.LightningModule):
    """Dropout, batch norm and a plateau schedule: everything that a resumed run could get wrong."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch):
        logits = self.model(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class StopAt(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KeyboardInterrupt


def run(folder, callbacks=(), epochs=8, settings=None, monitor="val_loss", module=None):
    torch.manual_seed(3)
    x = torch.randn(64, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    module = module or Classifier()
    history = train(
        module,
        data_loader(TensorDataset(x[:48], y[:48]), 16, shuffle=True, seed=5),
        data_loader(TensorDataset(x[48:], y[48:]), 16),
        epochs=epochs,
        monitor=monitor,
        mode="min",
        seed=5,
        folder=folder,
        settings=settings or {"epochs": epochs},
        callbacks=callbacks,
        device="cpu",
    )
    return module, history


def without_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("stop", [(0, 1), (3, 0), (3, 2), (7, 1)])
def test_interrupted_run_ends_in_the_same_weights(tmp_path, stop):
    whole, history = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [StopAt(*stop)])
    resumed, resumed_history = run(tmp_path / "cut")
    assert without_time(resumed_history) == without_time(history)
    assert len({row["lr"] for row in history}) > 1, "the plateau schedule must act for this test to mean something"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Seen(Callback):
    """The first numbers of the items of each epoch."""

    def __init__(self):
        self.items = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.items.setdefault(trainer.current_epoch, []).extend(batch[0][:, 0].tolist())


def test_a_run_goes_on_within_a_pass_over_the_data(tmp_path):
    """Two passes in three parts each: a pass holds no item twice, and the stopped run is that which was not."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, (x[:, 0] > 0).long())

    def one(folder, *callbacks):
        torch.manual_seed(0)
        loaders = data_loader(data, 8, shuffle=True, seed=3, parts=3), data_loader(data, 50)
        return (module := Classifier()), train(module, *loaders, epochs=6, seed=3, folder=folder, callbacks=callbacks)

    whole, history = one(tmp_path / "whole", seen := Seen())
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "cut", StopAt(1, 1))
    resumed, again = one(tmp_path / "cut", later := Seen())
    assert without_time(again) == without_time(history)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert sorted(later.items) == [1, 2, 3, 4, 5]
    assert all(later.items[epoch] == seen.items[epoch] for epoch in later.items)
    passes = [[n for epoch in range(3) for n in seen.items[3 * turn + epoch]] for turn in range(2)]
    for items in passes:
        assert len(items) == len(set(items)) == 48
    assert passes[0] != passes[1]
    with pytest.raises(UserError, match="50 training items are too few for 51 parts"):
        data_loader(data, 8, shuffle=True, parts=51)


def test_folder_and_memory_give_the_same_best_weights(tmp_path):
    (in_folder, history), (in_memory, _) = run(tmp_path / "run"), run(None)
    for name, value in in_folder.state_dict().items():
        assert torch.equal(value, in_memory.state_dict()[name]), name
    last, _ = run(None, monitor=None)
    best = min(range(len(history)), key=lambda i: history[i]["val_loss"])
    same = all(torch.equal(v, last.state_dict()[k]) for k, v in in_memory.state_dict().items())
    assert same == (best == len(history) - 1)


def test_finished_run_is_not_trained_again(tmp_path):
    first, history = run(tmp_path / "run")
    again, same_history = run(tmp_path / "run", [StopAt(0, 0)])
    assert without_time(same_history) == without_time(history)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def test_other_settings_are_refused(tmp_path):
    run(tmp_path / "run", epochs=1, settings={"lr": 0.1})
    with pytest.raises(UserError, match=r"other settings \(lr\)"):
        run(tmp_path / "run", epochs=1, settings={"lr": 0.2})


def test_settings_of_every_plain_kind_are_recognized(tmp_path):
    settings = {"lr": 1e-5, "shape": (1, 2), "path": tmp_path, "on": True, "none": None}
    for _ in range(2):
        run(tmp_path / "run", epochs=1, settings=settings)


class Diverging(Classifier):
    """A loss or a validation loss that is not finite from one epoch on; the weights stay as they are."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def spoil(self, name, loss):
        return loss * (math.nan if self.name == name and self.current_epoch == 2 else 1.0)

    def training_step(self, batch):
        return self.spoil("train", super().training_step(batch))

    def validation_step(self, batch):
        self.log("other_loss", self.spoil("validation", nn.functional.cross_entropy(self.model(batch[0]), batch[1])))
        super().validation_step(batch)

    def on_train_epoch_end(self):
        if self.name == "weights" and self.current_epoch == 2:
            self.model[0].weight.data[0, 0] = math.inf


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train", "the loss of epoch 3, batch [1-3] is not finite"),
        ("validation", "other_loss of epoch 3 is nan"),
        ("weights", r"before epoch 4.*model\.0\.weight"),
    ],
)
def test_diverged_run_is_refused_and_never_saved(tmp_path, name, message):
    with pytest.raises(DivergedError, match=message):
        run(tmp_path, module=Diverging(name))
    record = json.loads((tmp_path / "run.json").read_text())
    assert not record["finished"]
    for path in (tmp_path / "best.safetensors", tmp_path / "last.ckpt"):
        assert all(torch.isfinite(value).all() for value in read_state_dict(path).values())
    with (tmp_path / "metrics.csv").open() as stream:
        assert sum(1 for _ in stream) in (3, 4)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    model = nn.Linear(2, 2)
    good = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"Linear: 1 of 2 tensors hold numbers that are not finite \(bias"):
        load_state_dict(model, good | {"bias": torch.tensor([1.0, math.nan])})
    assert torch.equal(model.bias, good["bias"])
    model.weight.data[0, 0] = math.inf
    with pytest.raises(DivergedError, match="weight"):
        save_state_dict(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_one_process_per_run_folder(tmp_path):
    code = "import sys; from nearfar.core.files import locked\nwith locked(sys.argv[1]): print(flush=True), input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    with pytest.raises(UserError, match="another process trains in this folder"):
        run(tmp_path, epochs=1)
    other.kill()
    other.wait()
    run(tmp_path, epochs=1)


def test_unknown_monitor_is_named():
    with pytest.raises(ValueError, match="logs no 'val_kappa'"):
        run(None, epochs=1, monitor="val_kappa")


def test_warmup_cosine_ends():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 4, 20, floor=0.1)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.5)
    assert max(rates) == pytest.approx(2.0)
    assert rates[20] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.ci
def test_worker_processes_can_be_spawned():
    loader = data_loader(
        TensorDataset(torch.arange(6.0)), 2, shuffle=True, num_workers=1, multiprocessing_context="spawn"
    )
    assert sorted(torch.cat([x for (x,) in loader]).tolist()) == [0, 1, 2, 3, 4, 5]


class Numbers(TensorDataset):
    """Numbers of a file, as data sets hold paths of what they read."""

    def __init__(self, path):
        self.path = path
        super().__init__(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 2)


def run_on(folder, train_data, validation_data, **options):
    torch.manual_seed(3)
    loaders = [data_loader(part, 16, shuffle=n == 0) for n, part in enumerate((train_data, validation_data))]
    return train(Classifier(), *loaders, epochs=1, folder=folder, settings={}, device="cpu", **options)


def test_a_run_answers_only_for_what_it_was_made_from(tmp_path, monkeypatch):
    file, elsewhere, folder = tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "run"
    file.write_text("one")
    elsewhere.write_text("one")
    other = TensorDataset(torch.zeros(48, 6), torch.arange(48) % 2)
    history = run_on(folder, Numbers(file), Numbers(file))
    assert run_on(folder, Numbers(elsewhere), Numbers(file)) == history, "the same content elsewhere is the same data"
    for parts, name in (((other, Numbers(file)), "data"), ((Numbers(file), other), "validation data")):
        with pytest.raises(UserError, match=f"a run with other {name}; give the same .* --fresh"):
            run_on(folder, *parts)
    labels = Numbers(file)
    labels.tensors = (labels.tensors[0], 1 - labels.tensors[1])
    with pytest.raises(UserError, match="other data; "):
        run_on(folder, labels, Numbers(file))
    with pytest.raises(UserError, match="other starting weights; "):
        run_on(folder, Numbers(file), Numbers(file), data={"starting weights": "x"})
    file.write_text("two")
    with pytest.raises(UserError, match="other data, validation data; "):
        run_on(folder, Numbers(file), Numbers(file))
    fresh = run_on(folder, Numbers(file), Numbers(file), fresh=True)
    assert without_time(run_on(folder, Numbers(file), Numbers(file))) == without_time(fresh)
    monkeypatch.setattr("nearfar.core.training.source_digest", lambda *kinds: "other code")
    with pytest.raises(UserError, match="other code; "):
        run_on(folder, Numbers(file), Numbers(file))


def test_damaged_record_of_a_run_is_one_line(tmp_path):
    for content in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"is no record of a run .*--fresh"):
            run(tmp_path, epochs=1)
