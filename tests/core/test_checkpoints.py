"""Reading checkpoints: safety, unwrapping, the account of keys."""

import argparse
import pickle

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from nearfar.core.checkpoints import identify, load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import CheckpointError


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_safetensors_round_trip(tmp_path):
    ours = model()
    save_state_dict(ours, tmp_path / "m.safetensors")
    assert set(read_state_dict(tmp_path / "m.safetensors")) == set(ours.state_dict())
    other = model()
    load_state_dict(other, read_state_dict(tmp_path / "m.safetensors"))
    assert same(ours.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    ],
)
def test_wrappers_are_taken_off(tmp_path, wrap):
    state = model().state_dict()
    torch.save(wrap(state), tmp_path / "m.pth")
    assert same(read_state_dict(tmp_path / "m.pth"), state)


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/nearfar-pickle-ran",)


def test_arguments_of_the_training_script_beside_the_weights(tmp_path):
    weights = {"fc.weight": torch.ones(2)}
    torch.save(
        {"epoch": 3, "state_dict": weights, "args": argparse.Namespace(lr=0.1, data="x")}, tmp_path / "c.pth.tar"
    )
    assert read_state_dict(tmp_path / "c.pth.tar").keys() == weights.keys()


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"state_dict": model().state_dict(), "hook": Malicious()}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        read_state_dict(tmp_path / "m.pth")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "raw.pt")


def test_keras_file_gives_paths(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["dense/dense/kernel:0"] = np.ones((2, 3), np.float32)
        file.attrs["layer_names"] = ["dense"]
    state = read_state_dict(tmp_path / "w.h5")
    assert list(state) == ["dense/dense/kernel:0"]
    assert state["dense/dense/kernel:0"].shape == (2, 3)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m.h5"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match=name):
        read_state_dict(tmp_path / name)


def test_missing_file_and_no_tensors_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_state_dict(tmp_path / "empty.pth")


def test_every_key_is_accounted_for_and_the_model_unchanged():
    ours = model()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = {k: torch.ones_like(v) for k, v in before.items()}
    del state["0.bias"]
    state["0.weight"] = torch.ones(4, 5)
    state["head.weight"] = torch.ones(2)
    with pytest.raises(CheckpointError) as error:
        load_state_dict(ours, state)
    for part in ("missing 0.bias", "0.weight has shape (4, 5)", "unexpected head.weight", "3 of its tensors"):
        assert part in str(error.value)
    assert same(before, ours.state_dict())


def test_ignored_keys_and_batch_counters_may_differ():
    ours = model()
    state = ours.state_dict()
    del state["1.num_batches_tracked"], state["0.bias"]
    load_state_dict(ours, {**state, "mask": torch.ones(1)}, ignore=["0\\.bias$", "mask"])


def test_exactly_one_candidate_has_to_fit():
    def fails(error):
        raise error

    wrong = {"a": lambda: fails(CheckpointError("has no stem")), "b": lambda: fails(KeyError("depth"))}
    assert identify({**wrong, "c": lambda: 3}, "x.pth") == ("c", 3)
    with pytest.raises(CheckpointError, match=r"^x\.pth: fits c and d alike"):
        identify({**wrong, "c": lambda: 3, "d": lambda: 4}, "x.pth")
    with pytest.raises(
        CheckpointError, match=r"(?s)^x\.pth: is none of 2 known:.*a: has no stem.*b: KeyError: 'depth'"
    ):
        identify(wrong, "x.pth")
    with pytest.raises(CheckpointError, match=r"^x\.pth: has no stem$"):
        identify({"a": wrong["a"]}, "x.pth")
