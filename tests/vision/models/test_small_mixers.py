"""AFNO's classifier, DHVT and NiNformer: what every token model has, published layouts, fixed grids."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from nearfar.core.errors import UserError
from nearfar.vision.contracts import dhvt, ninformer
from nearfar.vision.contracts.afno import build_contract
from nearfar.vision.models.afno import AFNOTransformer
from nearfar.vision.models.dhvt import DHVT, DHVTBlock
from nearfar.vision.models.ninformer import NiNBlock, NiNformer
from tests.vision.base import TokenTester, close, described, randomize, shapes_of, without_shape_checks


class TestAFNO(TokenTester):
    model, name = AFNOTransformer, "afno_256_patch4"
    tiny = {"dim": 16, "depth": 4, "img_size": 64, "patch_size": 16}
    least = {"depth": 1}
    prefix_of_levels = 0
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 16, "img_size": 64, "patch_size": 16, "num_blocks": 4}


class TestDHVT(TokenTester):
    model, name = DHVT, "dhvt_tiny"
    tiny = {"dim": 48, "depth": 4, "img_size": 64}
    least = {"depth": 1}
    macs_tolerance = 0.03
    autocast_tolerance = 0.1

    def saved_macs(self, model: DHVT, size: int) -> float:
        """The figures of patches of 2 leave out the products of queries, keys and values; the others have them."""
        if model.patch_size != 2:
            return 0
        heads, dim = model.blocks[0].attn.pos_embed.shape
        return -2 * dim * ((size // model.patch_size) ** 2 + 1 + heads) ** 2 * len(model.blocks)

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 48}

    def test_set_input_size(self) -> None:
        model, x = self.create(), self.input(size=(64, 96))
        y = model(x)
        model.set_input_size((64, 96))
        close(model(x), y, 1e-6)


@torch.no_grad()
def test_variants_of_dhvt_are_told_apart() -> None:
    with torch.device("meta"):
        for name in ("dhvt_small_cifar_patch2", "dhvt_tiny_cifar_patch4", "dhvt_tiny_domain", "dhvt_small"):
            found = DHVT.published_settings(timm.create_model(name).state_dict())
            assert DHVT.variant(found) == name


@torch.no_grad()
def test_contracts_that_are_not_shipped() -> None:
    block = randomize(DHVTBlock(48, 3, 96))
    x = torch.randn(2, 17, 48)
    close(dhvt.build_contract(described(shapes_of(block), {}, [(2, 17, 48)]))(x), block(x, (4, 4)), 1e-6)
    net = randomize(DHVT(48, 2, 3, 7, patch_size=2, img_size=16))
    picture = torch.randn(1, 3, 16, 16)
    published = {n.replace("head.fc.", "head."): s for n, s in shapes_of(net).items()}
    built = dhvt.build_contract(described(published, {"num_heads": 3, "patch_size": 2}, [(1, 3, 16, 16)]))
    assert built(picture).shape == (1, 7)
    with pytest.raises(UserError, match="num_heads"):
        dhvt.build_contract(described(published, {"num_heads": 4}))
    plain = randomize(AFNOTransformer(16, 2, 4, 3, img_size=16, double_skip=False, threshold=0.3, modes="fourcastnet"))
    shapes = {n.replace("head.fc.", "head."): s for n, s in shapes_of(plain).items() if "pos_embed" not in n}
    settings = {"double_skip": False, "sparsity_threshold": 0.3, "modes": "fourcastnet", "patch_size": 4}
    afno = build_contract(described(shapes | {"pos_embed": (1, 16, 16)}, settings, [(1, 3, 16, 16)]))
    assert (afno.blocks[0].double_skip, afno.blocks[0].filter.threshold) == (False, 0.3)
    assert afno.blocks[0].filter.modes == "fourcastnet"


# NiNformer: one grid


@torch.no_grad()
def test_ninformer_refuses_other_grids_and_says_what_to_call() -> None:
    model = randomize(timm.create_model("ninformer_cifar10", dim=32, hidden=48))
    x = torch.randn(2, 3, 32, 48)
    with pytest.raises(ValueError, match=r"set_input_size\(\(32, 48\)\)"):
        model(x)
    with pytest.raises(ValueError, match="multiples of 4"):
        model(torch.randn(1, 3, 30, 32))
    model.set_input_size((32, 48))
    assert model(x).shape == (2, 10)
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 32, 8, 12)
    again = NiNformer.from_published(model.state_dict(), img_size=(32, 48))
    close(again(x), model(x), 1e-6)
    fourier = randomize(timm.create_model("ninformer_fourier", dim=32, hidden=48))
    assert fourier(x).shape == (2, 10)
    assert NiNformer.published_settings(fourier.state_dict())["gate"] == "fourier"
    with pytest.raises(ValueError, match="allowed are mixer, fourier"):
        NiNformer(gate="attention")


def test_ninformer_shares_its_norm() -> None:
    """One norm before both sublayers: its gradient is the sum of both, and there is one pair of tensors."""
    block = NiNBlock(8, 5, 6).double()
    assert [n for n, _ in block.named_parameters() if n.startswith("norm")] == ["norm.weight", "norm.bias"]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x + block.mgu(block.norm(x))
    torch.testing.assert_close(block(x), y + block.ffn(block.norm(y)))


@pytest.mark.parametrize("gate", ["mixer", "fourier"])
def test_ninformer_surface(gate: str, tmp_path: Path) -> None:
    model = timm.create_model("ninformer_cifar100" if gate == "mixer" else "ninformer_fourier", dim=16, hidden=24)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        randomize(model).save_pretrained(tmp_path)
        close(NiNformer.from_pretrained(tmp_path)(x), model(x), 1e-6)
        program = torch.export.export(model, (x,))
        close(program.module()(x), model(x), 1e-5)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
    model.double().train()
    grads = torch.autograd.grad(model(x.double()).square().sum(), list(model.parameters()))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


@torch.no_grad()
@pytest.mark.ci
def test_the_fourier_gate_in_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    without_shape_checks(monkeypatch)
    model, x = randomize(timm.create_model("ninformer_fourier", dim=16, hidden=24)), torch.randn(2, 3, 32, 32)
    onnx = io.BytesIO()
    torch.onnx.export(torch.export.export(model, (x,)), (), onnx, verbose=False)
    session = onnxruntime.InferenceSession(onnx.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(np.asarray(y)), model(x), 1e-5)


@torch.no_grad()
def test_ninformer_contracts_that_are_not_shipped() -> None:
    block = randomize(NiNBlock(8, 5, 6, gate="fourier"))
    shapes = {n.replace("ffn.", "ffn.net."): s for n, s in shapes_of(block).items()}
    assert ninformer.build_contract(described(shapes, {"dim": 8}, [(2, 5, 8)]))(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    with pytest.raises(UserError, match="norm_eps"):
        ninformer.build_contract(described(shapes, {"norm_eps": 1e-6}, [(2, 5, 8)]))
