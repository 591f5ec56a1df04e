"""MACMD: contracts, counts, encoders, the released checkpoint's gap, sizes, gradients."""

from dataclasses import replace

import pytest
import timm
import torch

from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError, UserError
from nearfar.medical.contracts.macmd import build_contract
from nearfar.medical.models.macmd import MACMD, published_state

CONTRACTS = shipped("macmd")
WHOLE = next(path for path in CONTRACTS if "pvtv2b2" in path.stem)


def test_parameter_counts() -> None:
    unused_norms = 2 * (512 + 640 + 256 + 128)
    with torch.device("meta"):
        model = MACMD(9, 1)
        assert sum(p.numel() for p in model.parameters()) == 34_617_576 - unused_norms
        assert sum(p.numel() for p in model.encoder.parameters()) == 24_849_856
        assert round(sum(p.numel() for p in MACMD(4, 1, "pvt_v2_b0").parameters()) / 1e6, 2) == 5.89


def test_the_released_checkpoint_lacks_layers() -> None:
    state = {k: v for k, v in Contract.load(WHOLE).state().items() if ".apm.up_blocks." not in k}
    with pytest.raises(CheckpointError, match="legacy_up_seed"):
        MACMD.from_published(state)
    with pytest.warns(UserWarning, match="random"):
        first = MACMD.from_published(state, legacy_up_seed=3)
    with pytest.warns(UserWarning, match="random"):
        second = MACMD.from_published(state, legacy_up_seed=3)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["pvt_v2_b0", "resnet10t", "mobilenetv3_small_100"])
def test_encoders_and_sizes(encoder: str) -> None:
    model = MACMD(3, 2, encoder).eval()
    assert model(torch.randn(2, 2, 64, 96)).shape == (2, 3, 64, 96)
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.randn(1, 2, 48, 64))


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "classes", "channels", "settings"),
    [
        ("pvt_v2_b0", 4, 1, {"hidden_rate": 3}),
        ("pvt_v2_b1", 1, 3, {"kernel_size": 5}),
        ("pvt_v2_b2", 2, 3, {"out_channels": 16}),
    ],
)
def test_other_published_states_round_trip(encoder: str, classes: int, channels: int, settings: dict) -> None:
    """Names of the given contract, tensors of another variant: it is recognized and computes the same."""
    names = {next(iter(published_state({k: v})), None): k for k, v in Contract.load(WHOLE).state().items()}
    model = MACMD(classes, channels, encoder, **settings).eval()
    state = {
        names[k]: v.reshape(1, 1, -1) if "spatial_mix" in names[k] else v
        for k, v in model.state_dict().items()
        if not k.endswith("tracked")
    }
    x = torch.randn(1, channels, 64, 64)
    torch.testing.assert_close(MACMD.from_published(state)(x), model(x), rtol=0, atol=0)
    state["decoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="extra"):
        MACMD.from_published(state)


def test_training_reaches_every_parameter() -> None:
    model = MACMD(2, 3, "pvt_v2_b0").train()
    logits = model(torch.randn(2, 3, 64, 64))
    assert [tuple(v.shape) for v in logits] == [(2, 2, 64, 64)] * 3
    sum(v.square().mean() for v in logits).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_bad_arguments() -> None:
    with pytest.raises(CheckpointError, match="missing or unknown"):
        MACMD.from_published({"decoder.apm.up_blocks.1.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="1/4 to 1/32"):
        MACMD(encoder="vit_tiny_patch16_224")


def altered(variant: str, settings: dict[str, object], **changes: object) -> Contract:
    """A shipped contract with other settings or outputs."""
    contract = Contract.load(next(path for path in CONTRACTS if path.stem == f"macmd--{variant}"))
    return replace(contract, content=contract.content | changes | {"settings": dict(contract.settings) | settings})


def test_settings_that_no_release_has_are_refused() -> None:
    for variant, settings in (
        ("op-ccmix-48-32-16", {"target_size": 16}),
        ("op-ccmix-48-32-16", {"shift_pixel": 2}),
        ("op-upblock-32to16", {"skip": True}),
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            build_contract(altered(variant, settings))


@torch.no_grad()
def test_contract_of_the_finest_output_alone() -> None:
    x = torch.randn(1, 1, 32, 32)
    finest = build_contract(altered("pvtv2b2-synapse9", {}, outputs=[{"name": "out"}]))(x)
    torch.testing.assert_close(finest, build_contract(Contract.load(WHOLE))(x)[0])


def test_another_package_may_take_the_encoders_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "pvt_v2_b0", lambda **_: torch.nn.Identity())
    assert MACMD(encoder="pvt_v2_b0").encoder.feature_info.channels() == [32, 64, 160, 256]
