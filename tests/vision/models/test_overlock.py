"""OverLoCK: contracts, the surface, merged kernels, the auxiliary head, the dense form."""

from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F

from nearfar.core.errors import UserError
from nearfar.vision.contracts.overlock import build_contract
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.models.overlock import OverLoCK
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestOverLoCK(BackboneTester):
    model = OverLoCK
    name = "overlock_xt"
    tiny: ClassVar = {
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 16, 32),
        "focus_depths": (1, 2),
        "focus_heads": (1, 2),
        "kernel_sizes": (7, 5, 7, 5),
        "head_dim": 24,
    }
    counted: ClassVar = {"merged": True}
    least: ClassVar = {"focus_depths": (1, 1), "kernel_sizes": (5, 5, 5, 5)}


@torch.no_grad()
def test_training_and_merged_checkpoints() -> None:
    model = randomize(timm.create_model("overlock_xt", num_classes=5, aux_head=True, **TestOverLoCK.tiny))
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    loaded = OverLoCK.from_published(model.state_dict())
    assert loaded.aux_head is not None
    close(loaded(x), want, 1e-6)
    # large kernels merged, everything else as it was
    for block in [*(b.proj[1] for s in loaded.stages for b in s.blocks), *(b.lepe[0] for s in loaded.focus for b in s)]:
        block.fuse()
    merged = OverLoCK.from_published(loaded.state_dict())
    assert not any("dil_conv" in name for name in merged.state_dict())
    close(merged(x), want, 1e-5)
    # a model without the auxiliary head takes a checkpoint with one
    plain = timm.create_model("overlock_xt", num_classes=5, **TestOverLoCK.tiny).eval()
    plain.load_state_dict(plain.fit_state(model.state_dict()))
    close(plain(x), want, 1e-6)


def test_auxiliary_head_in_training() -> None:
    model = timm.create_model("overlock_xt", num_classes=5, aux_head=True, **TestOverLoCK.tiny).train()
    logits, overview = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == overview.shape == (2, 5)
    (logits.sum() + 0.4 * overview.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(7)
    assert [y.shape for y in model(torch.randn(2, 3, 64, 64))] == [(2, 7), (2, 7)]


@torch.no_grad()
def test_dense_form() -> None:
    model = timm.create_model("overlock_xt", num_classes=0, feature_norms=True, **TestOverLoCK.tiny)
    randomize(model)
    x = torch.randn(1, 3, 64, 96)
    plain = OverLoCK.from_published(
        {
            **{k: v for k, v in model.state_dict().items() if not k.startswith(("feature_norms.", "h_proj."))},
            **{k: v for k, v in OverLoCK(**TestOverLoCK.tiny, num_classes=0).state_dict().items() if "head." in k},
        },
        num_classes=0,
    )
    levels, overview = plain.forward_all(x)
    got = OverLoCK.from_published({f"backbone.{k}": v for k, v in model.state_dict().items()}).contract_form()(x)
    for i, (level, norm) in enumerate(zip(levels, model.feature_norms, strict=True)):
        want = F.layer_norm(level.movedim(1, -1), (level.shape[1],), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
        close(got[i], want + model.h_proj(overview) if i == 3 else want, 1e-5)


def test_kernels_are_the_attention_maps() -> None:
    model = randomize(timm.create_model("overlock_xt", num_classes=5, **TestOverLoCK.tiny))
    maps = attention_maps(model, torch.randn(1, 3, 64, 96))
    # the 4 x 6 map is enlarged to 7 x 10 for a window of 7, the 2 x 3 map to 5 x 7 for one of 5
    assert [tuple(m.shape) for m in maps.values()] == [(1, 2, 70, 49), (1, 4, 35, 25), (1, 4, 35, 25)]
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@torch.no_grad()
def test_contracts_of_parts() -> None:
    x = torch.randn(1, 32, 6, 5)

    def built(**shapes: tuple[int, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        contract = described({name.replace("_", "."): shape for name, shape in shapes.items()}, inputs=[tuple(x.shape)])
        return build_contract(contract)(x), contract.state()

    got, state = built(proj_1_weight=(16, 32, 1, 1), proj_1_bias=(16,), proj_3_weight=(32, 16, 1, 1), proj_3_bias=(32,))
    hidden = F.gelu(F.conv2d(x.mean((2, 3), keepdim=True), state["proj.1.weight"], state["proj.1.bias"]))
    close(got, x * torch.sigmoid(F.conv2d(hidden, state["proj.3.weight"], state["proj.3.bias"])), 1e-6)
    got, state = built(gamma=(1, 32, 1, 1), beta=(1, 32, 1, 1))
    energy = x.square().sum((2, 3), keepdim=True).sqrt()
    close(got, (state["gamma"] * energy / (energy.mean(1, keepdim=True) + 1e-6) + 1) * x + state["beta"], 1e-6)
    got, state = built(weight=(32, 1, 5, 5), bias=(32,))
    close(got, x + F.conv2d(x, state["weight"], state["bias"], padding=2, groups=32), 1e-6)
    got, state = built(weight=(32, 1, 1, 1), bias=(32,))
    close(got, x * state["weight"].reshape(32, 1, 1) + state["bias"].reshape(32, 1, 1), 1e-6)


@torch.no_grad()
def test_contract_of_the_dense_form() -> None:
    model = OverLoCK(**{**TestOverLoCK.tiny, "mlp_ratios": (15 / 8, 4, 4, 4)}, num_classes=0, feature_norms=True)
    contract = described(shapes_of(model), {"key_pool": 7}, outputs=4)
    assert len(build_contract(contract)(torch.randn(1, 3, 64, 64))) == 4
    with pytest.raises(UserError, match="key_pool is 5"):
        build_contract(described(shapes_of(model), {"key_pool": 5}, outputs=4))
