"""The real transform with a real gradient against torch's own."""

import pytest
import torch

from nearfar.ops.common.real_fft import rfft


@pytest.mark.parametrize(("length", "n"), [(5, 8), (5, 9), (8, 8), (8, 6), (8, 5), (3, 1), (3, 2)])
def test_values_and_gradients(length, n):
    x = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    ours, theirs = rfft(x, n), torch.fft.rfft(x, n)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, x, g), torch.autograd.grad(theirs, x, g)):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda x: rfft(x, n), x)
