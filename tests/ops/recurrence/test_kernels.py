"""Other packages' kernels give the numbers of our own forms: in Triton's interpreter on a CPU, and on CUDA."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from nearfar.ops.common import kernels
from nearfar.ops.recurrence import mamba, retnet
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.mamba import Mamba, selective_scan
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4TimeMix

INTERPRETED = """
import json
import torch
from fla.ops.retention.naive import naive_retention
from nearfar.ops.recurrence import based, kernels, rwkv4
from nearfar.ops.recurrence.retnet import Retention

torch.manual_seed(0)
errors = {}

def compare(name, ours, theirs):
    errors[name] = max(((a - b).norm() / a.norm()).item() for a, b in zip(ours, theirs, strict=True))

def with_gradient(run, tensors):
    out = run()
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in out]
    return [*out, *torch.autograd.grad(sum((t * w).sum() for t, w in zip(out, weights)), tensors)]

def both(name, module, run, tensors):
    plain = with_gradient(run, tensors)
    module.kernel = lambda x, where, function, **_: kernels.installed(where, function)
    compare(name, plain, with_gradient(run, tensors))

mixer, x = based.Based(32, num_heads=2, feature_dim=16), torch.randn(2, 75, 32)
both("based", based, lambda: [mixer(x)], list(mixer.parameters()))

k, v, decay, bonus = torch.randn(2, 40, 32), torch.randn(2, 40, 32), torch.randn(32), torch.randn(32)
state = [torch.randn(2, 32), torch.rand(2, 32) + 1, torch.randn(2, 32)]
given = [t.requires_grad_() for t in (decay, bonus, k, v)]

def average():
    wkv, after = rwkv4.weighted_average(*given, tuple(state))
    return [wkv, after[0] * after[2].exp(), after[1] * after[2].exp()]

both("rwkv4", rwkv4, average, given)

q, k, v = torch.randn(3, 2, 2, 75, 16).unbind()
memory, rate = torch.zeros(2, 2, 16, 16), torch.log1p(-(2.0 ** (-5 - torch.arange(2.0))))
compare("retention", [Retention(32).retain(q / 4, k, v, memory, rate)], [naive_retention(q, k, v)])
print(json.dumps(errors))
"""


def test_fla_computes_what_we_do():
    if importlib.util.find_spec("fla") is None:
        pytest.skip("needs flash-linear-attention")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {"based", "rwkv4", "retention"}
    assert max(errors.values()) < 1e-5, errors


def test_mamba_ssm_is_called_as_its_own_reference_is(monkeypatch):
    """transformers' plain form of `selective_scan_fn`, with the kernel's signature, stands in for it."""
    if importlib.util.find_spec("mamba_ssm"):
        pytest.skip("transformers calls the installed kernel instead of its plain form")
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    calls = []

    def fused(*tensors, **more):
        calls.append(more)
        return mamba_selective_scan(*tensors, **more)

    u, dt, A = torch.randn(2, 21, 6), torch.rand(2, 21, 6), -torch.rand(6, 4)
    B, C = torch.randn(2, 2, 21, 4).unbind()
    plain = selective_scan(u, dt, A, B, C)
    monkeypatch.setattr(mamba, "kernel", lambda *_: fused)
    for ours, theirs in zip(plain, selective_scan(u, dt, A, B, C)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert calls == [{"return_last_state": True}]
    selective_scan(u, dt, A, B, C, plain[1])
    assert len(calls) == 1  # the kernel cannot start from a state


def test_on_a_cpu_our_own_forms_run():
    assert kernels.kernel(torch.zeros(1), "fla.ops.rwkv4", "fused_recurrent_rwkv4") is None
    assert kernels.installed("no_such_package.ops", "f") is None


@pytest.mark.parametrize(
    ("triton", "chip", "wrong"),
    [("3.3.1", 9, False), ("3.4.0", 9, True), ("3.7.0", 9, True), ("3.7.1", 9, False), ("3.6.0", 8, False)],
)
def test_a_wrong_gradient_is_not_trained_with(triton, chip, wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (chip, 0))
    monkeypatch.setattr(kernels, "installed", lambda *_: triton)
    monkeypatch.setattr(retnet, "kernel", lambda *_, **__: len)
    monkeypatch.setattr(retnet, "loses_gradients", kernels.loses_gradients.__wrapped__)
    mixer, x = Retention(16), torch.randn(1, 5, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            if wrong and grad:
                mixer(x)
            else:
                with pytest.raises(TypeError):  # len, which stands for the kernel, was called with its arguments
                    mixer(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("make", "module", "name"),
    [
        (lambda: Based(64, num_heads=2), "fla.ops.based", "parallel_based"),
        (lambda: Retention(64, num_heads=2), "fla.ops.retention", "chunk_retention"),
        (lambda: RWKV4TimeMix(64), "fla.ops.rwkv4", "fused_recurrent_rwkv4"),
        (lambda: Mamba(64), "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    ],
    ids=["based", "retention", "rwkv4", "mamba"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_agree_on_cuda(make, module, name, dtype, monkeypatch):
    if kernels.installed(module, name) is None:
        pytest.skip(f"needs {module.split('.')[0]}")
    mixer, x = make().cuda().to(dtype), torch.randn(2, 300, 64, device="cuda", dtype=dtype)
    weight, out = torch.randn_like(x), []
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "enabled", enabled)
        with torch.no_grad():
            inferred = mixer(x)
        y = mixer(x)
        out.append([inferred, y, *torch.autograd.grad((y * weight).sum(), list(mixer.parameters()))])
    for ours, theirs in zip(*out):
        assert (ours - theirs).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * theirs.norm()
