"""Operators whose tables follow from the size of the map, exported: right at sizes that no trace has seen."""

import io
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nearfar.ops.attention.gaussian_mask import GaussianMaskAttention
from nearfar.ops.attention.head_tokens import HeadTokenAttention
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.ops.convolution.contmix import ContextMixer
from tests.vision.base import without_shape_checks


class Called(nn.Module):
    """A module called in its own way with a map (B, C, H, W)."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


OPERATORS = {
    "Manhattan": Called(ManhattanAttention(16, 2), lambda m, x: m(x)),
    "Manhattan, axes": Called(ManhattanAttention(16, 2, decomposed=True), lambda m, x: m(x)),
    "head tokens": Called(HeadTokenAttention(16, 4), lambda m, x: m(x.flatten(2).mT)),
    "Gaussian mask": Called(GaussianMaskAttention(16, 2), lambda m, x: m(x.flatten(2).mT, x.shape[-2:])),
    "ContMix": Called(ContextMixer(16, 16, 2, 7), lambda m, x: m.mix(x, x, x)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@torch.no_grad()
def test_any_size_of_a_traced_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last three sizes are above, below and beside a window of ContMix, whose kernel is 7."""
    without_shape_checks(monkeypatch)
    torch.manual_seed(0)
    operator = OPERATORS[name].eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        operator, (torch.randn(1, 16, 4, 6),), dynamic_shapes=({2: free, 3: free},), strict=False
    )
    file = io.BytesIO()
    torch.onnx.export(program, (), file, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for size in ((4, 6), (9, 8), (5, 5), (7, 4)):
        x = torch.randn(1, 16, *size)
        want = operator(x)
        torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(np.asarray(got)), want, rtol=1e-4, atol=1e-5)
