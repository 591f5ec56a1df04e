"""Models that nnunetv2 2.8.1 itself trained (six steps, narrow; without their optimizer's state), read and run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nearfar.core.errors import CheckpointError, UserError
from nearfar.medical.bundle import write_bundle
from nearfar.medical.data.scans import read_scan
from nearfar.medical.models.nnunet import NNUNet
from nearfar.medical.models.umamba import plan_recipe
from nearfar.medical.nnunet import axes_order, read_checkpoint, read_plan_file, read_results
from nearfar.medical.segmenter import Segmenter

HERE = Path(__file__).parent / "data" / "nnunet"


@pytest.mark.parametrize("kind", ["plain", "resenc"])
def test_logits_and_label_map_are_those_of_nnunet(kind: str, tmp_path: Path) -> None:
    """The label map with its sums over windows in float32; in float16, as nnunetv2 runs, 3 and 62 voxels differ."""
    want = np.load(HERE / kind / "result.npz")
    network = NNUNet.from_published(read_checkpoint(HERE / kind / "fold_0/checkpoint_final.pth")["network_weights"])
    with torch.no_grad():
        logits = network(torch.from_numpy(want["x"])).numpy()
    assert np.abs(logits - want["y"]).max() < 1e-4 * np.abs(want["y"]).max()
    scan = read_scan(HERE / "c5_0000.nii.gz")
    segmenter = read_results(HERE / kind)
    assert (segmenter(scan, mirror=True) != want["labels"]).sum() <= 2  # of 36000
    segmenter.save(tmp_path / "model")
    again = Segmenter.load(tmp_path / "model")
    np.testing.assert_array_equal(again(scan, memory=2**28), segmenter(scan))
    with pytest.raises(UserError, match="orient stored, crop nonzero, resample cubic"):
        write_bundle(segmenter, tmp_path / "bundle")


def test_pickles_and_other_folders_are_refused(tmp_path: Path) -> None:
    torch.save({"network_weights": {}, "init_args": Path("x")}, tmp_path / "checkpoint_final.pth")
    with pytest.raises(CheckpointError, match="checkpoint_final"):
        read_checkpoint(tmp_path / "checkpoint_final.pth")
    with pytest.raises(UserError, match=r"plans\.json"):
        read_results(tmp_path)


def test_the_second_stage_of_a_cascade_is_refused_by_name(tmp_path: Path) -> None:
    """Of a low-resolution plan the first stage is read like any other; a network that takes labels is told apart."""
    plans = json.loads((HERE / "plain/plans.json").read_text())
    low = plans["configurations"]["3d_fullres"] | {"next_stage": "3d_cascade_fullres"}
    plans["configurations"] |= {
        "3d_lowres": low,
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    assert read_plan_file(tmp_path / "plans.json", "3d_lowres")["network"] == "nnunet_plain"
    for read in (read_plan_file, lambda *given: plan_recipe(*given, "bottleneck")):
        with pytest.raises(UserError, match=r"3d_cascade_fullres is the second stage of a cascade.*3d_lowres"):
            read(tmp_path / "plans.json", "3d_cascade_fullres")
    trained = read_checkpoint(HERE / "plain/fold_0/checkpoint_final.pth")
    for name in [name for name in trained["network_weights"] if ".stages.0.0.convs.0." in name]:
        weight = trained["network_weights"][name]
        if weight.ndim == 5:
            trained["network_weights"][name] = weight.repeat(1, 3, 1, 1, 1)
    (tmp_path / "fold_0").mkdir()
    torch.save(trained, tmp_path / "fold_0/checkpoint_final.pth")
    (tmp_path / "dataset.json").write_bytes((HERE / "plain/dataset.json").read_bytes())
    with pytest.raises(UserError, match=r"takes 3 channels, plans\.json has 1; a network of a cascade"):
        read_results(tmp_path)


@pytest.mark.parametrize(("forward", "order"), [([0, 1, 2], [2, 1, 0]), ([2, 0, 1], [0, 2, 1]), ([1, 0, 2], [2, 0, 1])])
def test_axes_of_a_plan(forward: list[int], order: list[int]) -> None:
    assert axes_order({"transpose_forward": forward}, 3, "plan") == order
    assert [2 - forward[i] for i in order] == [0, 1, 2]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_any_size_and_deep_supervision(residual: bool, dims: int) -> None:
    torch.manual_seed(0)
    network = NNUNet(3, 2, dims, residual=residual, features=(4, 8, 8), strides=[1, 2, (1,) * (dims - 1) + (2,)])
    x = torch.randn(1, 2, *(9, 11, 13)[:dims])
    assert network.eval()(x).shape == (1, 3, *x.shape[2:])
    heads = network.train()(torch.randn(1, 2, *[16] * dims))
    assert [tuple(h.shape[2:]) for h in heads] == [(16,) * dims, (8,) * dims]
    sum(h.sum() for h in heads).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    grouped = NNUNet(3, 2, dims, residual=residual, features=(4, 8, 8), norm_groups=2)
    norms = [m for m in grouped.modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.modules.batchnorm._NormBase)]
    assert {getattr(norm, "num_groups", None) for norm in norms} == {2}
    assert len(norms) == sum("Norm" in type(m).__name__ and "Conv" not in type(m).__name__ for m in network.modules())
    with pytest.raises(ValueError, match="stages"):
        NNUNet(3, 2, dims, features=(4, 8), strides=[1, 2, 2])
    with pytest.raises(ValueError, match="divisible"):
        NNUNet(3, 2, dims, features=(4, 8), norm_groups=3)
