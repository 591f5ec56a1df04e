"""Vim: the class token in the middle, any grid, the traced form, the ablation."""

import pytest
import timm
import torch

from nearfar.vision.models.vim import VIMS, Vim
from tests.vision.base import close, randomize

TINY = {"dim": 16, "depth": 2, "num_classes": 5, "img_size": 64, "d_state": 4}


@pytest.mark.parametrize(("name", "params"), [("vim_tiny", 7_148_008), ("vim_small", 25_796_584), ("vim_base", None)])
def test_parameters(name: str, params: int | None) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in timm.create_model(name).parameters())
    assert params is None or count == params
    assert round(count / 1e6) == round(VIMS[name].params)


@torch.no_grad()
def test_features_and_sizes() -> None:
    model = randomize(Vim(**TINY)).eval()
    x = torch.randn(2, 3, 64, 48)
    assert model(x).shape == (2, 5)
    features = model.forward_features(x)
    assert features.shape == (2, 13, 16)
    close(model.forward_head(features), model(x), 1e-6)
    final, (patches,) = model.forward_intermediates(x, [1], norm=True)
    assert patches.shape == (2, 16, 4, 3)
    close(patches.flatten(2).mT, final[:, 1:], 1e-6)
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.randn(1, 3, 60, 64))
    overlapping = Vim(**TINY, stride=8).eval()
    assert overlapping(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match="stride"):
        Vim(**TINY, stride=5)


@torch.no_grad()
def test_own_state_and_changed_classifier() -> None:
    model = randomize(Vim(**TINY)).eval()
    x = torch.randn(1, 3, 64, 64)
    close(Vim.from_published(model.state_dict())(x), model(x), 1e-6)
    assert Vim.from_published(model.state_dict(), num_classes=3)(x).shape == (1, 3)


def test_gradients_reach_every_parameter() -> None:
    model = randomize(Vim(**TINY)).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_without_scans_a_patch_reaches_few_others() -> None:
    x = torch.randn(1, 3, 256, 16)
    far = x.clone()
    far[..., :16, :] += 1
    moved = {}
    for scan in (True, False):
        model = randomize(Vim(**TINY, scan=scan)).eval()
        maps = [model.forward_intermediates(t, [1])[1][0][0, :, :, 0] for t in (x, far)]
        moved[scan] = bool((maps[0] - maps[1])[:, -1].abs().max() > 0)
    assert moved == {True: True, False: False}
