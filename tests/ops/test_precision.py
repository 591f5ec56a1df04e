"""bfloat16 on processors whose library computes it wrongly."""

import os
import subprocess
import sys

import pytest
import torch

from nearfar.ops.common import precision


def test_the_guard_acts_on_amx_alone_and_leaves_a_users_choice():
    given = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert not precision.guard_bfloat16(given, amx=True)
    assert given == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert not precision.guard_bfloat16({"DNNL_MAX_CPU_ISA": "AVX2"}, amx=True)
    free: dict[str, str] = {}
    assert not precision.guard_bfloat16(free, amx=False)
    assert free == {}
    assert precision.guard_bfloat16(free, amx=True)
    assert free == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def test_this_machine_is_right():
    assert precision.bfloat16_error() < 0.02
    precision.check_bfloat16.cache_clear()
    precision.check_bfloat16()


@pytest.mark.parametrize("name", ["conv1d", "conv2d"])
def test_the_check_finds_garbage_for_few_channels_and_long_kernels(name, monkeypatch):
    right = getattr(torch, name)

    def wrong(x, weight):
        y = right(x, weight)
        return -y if x.dtype == torch.bfloat16 and x.shape[1] <= 8 and weight.shape[-1] >= 8 else y

    monkeypatch.setattr(torch, name, wrong)
    precision.check_bfloat16.cache_clear()
    with pytest.raises(RuntimeError, match="ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"):
        precision.check_bfloat16()
    precision.check_bfloat16.cache_clear()


def test_operators_set_the_guard_before_anything_is_computed():
    code = (
        "import torch, os; torch.cpu._is_amx_tile_supported = lambda: True; import nearfar.ops; "
        "print(os.environ.get('ONEDNN_MAX_CPU_ISA'))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_MAX_CPU_ISA")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "AVX512_CORE_BF16"
