"""VM-UNet, U-Mamba, SegMamba and DuoFormer: sizes, refusals, plans, checkpoints, ablations."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nearfar.core.checkpoints import loaded
from nearfar.core.errors import CheckpointError, UserError
from nearfar.medical.models.duoformer import DuoFormer, ScaleBlock
from nearfar.medical.models.segmamba import SegMamba, slabs
from nearfar.medical.models.umamba import UMamba, plan_recipe, read_plans
from nearfar.medical.models.vmunet import VMUNet
from nearfar.medical.networks import create_network

SMALL = {"dims_per_level": (8, 16), "depths": (1, 1), "decoder_depths": (1, 1), "d_state": 2}
TINY_SEG = {"features": (4, 8, 8, 8), "depths": (1, 1, 1, 1), "hidden": 8, "d_state": 2}


def parameters(build) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def test_parameter_counts():
    assert parameters(lambda: VMUNet(1)) == 27_427_561
    assert parameters(lambda: SegMamba(4, 4)) == 67_416_196
    plan = {"features": (32, 64, 128, 256, 512), "dims": 2}
    assert parameters(lambda: UMamba(4, 1, **plan)) == 11_257_936
    assert parameters(lambda: UMamba(4, 1, **plan, placement="encoder", patch_size=(64, 64))) == 9_692_304
    assert parameters(lambda: UMamba(14, 1, 3)) == 7_325_802


def test_parameter_counts_of_duoformer():
    assert parameters(lambda: DuoFormer(3, backbone="resnet18", scales=3)) == 87_528_003
    assert parameters(lambda: DuoFormer(3, scale_token="channel")) == 148_186_179


@torch.no_grad()
def test_vmunet_sizes_and_vmamba_start():
    model = VMUNet(3, 1, **SMALL).eval()
    assert model(torch.randn(1, 1, 16, 24)).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="multiples of 8"):
        model(torch.randn(1, 1, 12, 16))
    with pytest.raises(ValueError, match="2-D"):
        VMUNet(dims=3)
    state = {
        re.sub(r"^encoder\.(\d)\.", r"layers.\1.blocks.", name): value
        for name, value in VMUNet(2, 3, **SMALL).state_dict().items()
        if name.startswith("encoder.")
    }
    rest = model.load_vmamba(state)
    assert not any(name.startswith(("encoder.", "decoder.")) for name in rest)
    torch.testing.assert_close(model.encoder[1][0].mixer.scan.D, state["layers.1.blocks.0.mixer.scan.D"])
    torch.testing.assert_close(model.decoder[0][0].mixer.scan.x_proj, state["layers.1.blocks.0.mixer.scan.x_proj"])
    with pytest.raises(CheckpointError, match="no block"):
        model.load_vmamba({"a.weight": torch.zeros(2)})


@torch.no_grad()
def test_umamba_anisotropic_and_deep_supervision():
    settings = {"features": (4, 8, 8), "strides": [(1, 1, 1), (1, 2, 2), (2, 2, 2)], "kernel_sizes": [(1, 3, 3), 3, 3]}
    model = UMamba(2, 1, 3, **settings, d_state=2)
    levels = model.train()(torch.randn(1, 1, 4, 16, 12))
    assert [tuple(level.shape[2:]) for level in levels] == [(4, 16, 12), (4, 8, 6)]
    assert model.eval()(torch.randn(1, 1, 2, 8, 8)).shape == (1, 2, 2, 8, 8)
    with pytest.raises(ValueError, match=r"multiples of \(2, 4, 4\)"):
        model(torch.randn(1, 1, 3, 16, 16))
    again = UMamba.from_published(model.state_dict(), strides=settings["strides"])
    x = torch.randn(1, 1, 4, 8, 8)
    torch.testing.assert_close(again(x), model(x))


@torch.no_grad()
def test_channel_tokens_take_one_size_or_pad():
    settings = {"features": (4, 8, 32), "dims": 2, "placement": "encoder", "patch_size": (16, 16), "d_state": 2}
    model = UMamba(2, 1, **settings).eval()
    assert sorted(model.mamba) == ["0", "2"]
    assert model.mamba["2"].positions == 16
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 2, 16, 16)
    with pytest.raises(ValueError, match=r"images of \(16, 16\)"):
        model(torch.randn(1, 1, 32, 16))
    padded = loaded(UMamba(2, 1, **settings, pad=True), model.state_dict())
    x = torch.randn(1, 1, 12, 9)
    filled = torch.nn.functional.pad(x, (0, 7, 0, 4))
    torch.testing.assert_close(padded(x), model(filled)[..., :12, :9])
    with pytest.raises(ValueError, match="needs patch_size"):
        UMamba(2, 1, dims=2, placement="encoder")


OLD = {
    "patch_size": [16, 64, 48],
    "spacing": [5.0, 1.0, 0.8],
    "UNet_base_num_features": 32,
    "unet_max_num_features": 64,
    "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
}


def test_plans_of_two_generations_give_the_same_network():
    new = {
        "patch_size": OLD["patch_size"],
        "architecture": {
            "arch_kwargs": {
                "features_per_stage": [32, 64, 64],
                "kernel_sizes": OLD["conv_kernel_sizes"],
                "strides": OLD["pool_op_kernel_sizes"],
                "n_conv_per_stage": [2, 2, 2],
                "n_conv_per_stage_decoder": [2, 2],
            }
        },
    }
    plans = {"configurations": {"3d_fullres": OLD, "3d_new": new, "child": {"inherits_from": "3d_fullres"}}}
    settings = read_plans(plans, "3d_fullres")
    assert settings == read_plans(plans, "3d_new") == read_plans(plans, "child")
    assert settings["features"] == [32, 64, 64]
    model = UMamba.from_plans(plans, 3, 1, d_state=2)
    assert model.size_multiple == (2, 4, 4)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({"plans_per_stage": {}}, "nnU-Net v1"),
        ({}, "none of nnU-Net v2"),
        ({"configurations": {"2d": {}}}, "no configuration '3d_fullres'; there are 2d"),
        (
            {"configurations": {"3d_fullres": {k: v for k, v in OLD.items() if k != "pool_op_kernel_sizes"}}},
            "lacks pool_op_kernel_sizes",
        ),
    ],
)
def test_plans_that_are_refused(plans, message):
    with pytest.raises(UserError, match=message):
        UMamba.from_plans(plans, 2, 1)


def test_a_recipe_from_a_plan_has_our_axes(tmp_path):
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps({"configurations": {"3d_fullres": OLD}, "transpose_forward": [0, 1, 2]}))
    recipe = plan_recipe(path, "3d_fullres", "encoder")
    assert recipe["roi"] == recipe["settings"]["patch_size"] == [48, 64, 16]
    assert recipe["spacing"] == [0.8, 1.0, 5.0]
    assert recipe["settings"]["strides"][1] == [2, 2, 1]
    model = create_network(recipe["network"], 2, 1, 3, recipe["settings"] | {"d_state": 1})
    assert model.size_multiple == (4, 4, 2)
    with pytest.raises(UserError, match="pickle"):
        read_plans(tmp_path / "plans.pkl", "2d")


@torch.no_grad()
def test_segmamba_slices():
    x = torch.randn(1, 2, 32, 16, 16)
    derived = SegMamba(3, 2, **TINY_SEG).eval()
    assert derived(x).shape == (1, 3, 32, 16, 16)
    fixed = loaded(SegMamba(3, 2, **TINY_SEG, slices=(16, 8, 4, 2)), derived.state_dict())
    torch.testing.assert_close(fixed(x), derived(x))
    other = loaded(SegMamba(3, 2, **TINY_SEG, slices=(8, 8, 4, 2)), derived.state_dict())
    assert not torch.allclose(other(x), derived(x))
    with pytest.raises(ValueError, match="slices do not divide"):
        SegMamba(3, 2, **TINY_SEG, slices=(48, 8, 4, 2))(x)
    with pytest.raises(ValueError, match="multiples of 16"):
        derived(torch.randn(1, 2, 32, 24, 16))
    assert SegMamba(3, 2, 2, **TINY_SEG).eval()(torch.randn(1, 2, 32, 48)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    "conv",
    [
        torch.nn.Conv3d(2, 3, 1, bias=False),
        torch.nn.Conv3d(2, 3, 3, padding=1),
        torch.nn.ConvTranspose3d(2, 3, 2, 2, bias=False),
    ],
)
def test_segmamba_convolves_slabs_as_the_whole(conv: torch.nn.Module) -> None:
    for n in (16, 33, 50, 64):
        x = torch.randn(2, 2, n, 5, 6)
        with torch.no_grad():
            torch.testing.assert_close(slabs(conv, x.split(1, 1)), conv(x), rtol=1e-5, atol=1e-6)


def test_segmamba_is_its_own_residual_blocks() -> None:
    """The blocks' own forward gives what ours does, in inference and with gradients."""
    model, x = SegMamba(3, 2, 2, **TINY_SEG).eval(), torch.randn(1, 2, 64, 96)
    with torch.no_grad():
        skips = [encode(m) for encode, m in zip(model.encoder, [x, *model.features(x)])]
        y = skips.pop()
        for up in model.decoder:
            y = up(y, skips.pop())
        want = model.head(model.last(y))
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("vmunet", SMALL, (16, 16)),
        ("umamba_bot", {"features": (4, 8), "d_state": 2}, (8, 8)),
        ("umamba_enc", {"features": (4, 8), "d_state": 2, "patch_size": (8, 8)}, (8, 8)),
        ("segmamba", TINY_SEG, (32, 32)),
    ],
)
def test_networks_by_name_train_and_have_an_ablation(name, settings, size):
    for scan in (True, False):
        model = create_network(name, 2, 1, 2, {**settings, "scan": scan})
        assert any("scan" in n for n, _ in model.named_parameters()) == scan
        out = model.train()(torch.randn(2, 1, *size))
        out = out if isinstance(out, torch.Tensor) else torch.cat([o.flatten() for o in out])
        out.square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert sum(p.grad is not None for p in model.parameters()) > 0.9 * len(list(model.parameters()))


DUO = {"backbone": "resnet18", "dim": 16, "num_heads": 2, "depth": 2}


@pytest.mark.parametrize("scales", [2, 3, 4])
@pytest.mark.parametrize("token", ["random", "channel", "first", "mean"])
@torch.no_grad()
def test_duoformer_computes_only_what_is_read(scales, token):
    model = DuoFormer(3, scales=scales, scale_token=token, **DUO).eval()
    x = torch.randn(2, 3, 64, 96)
    tokens, size = model.patch_tokens(x)
    assert size == (2, 3)
    assert tokens.shape[2] == model.scale_pos.shape[2]
    y = tokens.flatten(0, 1)
    for block in model.blocks:
        y = block(y)
    y = (y.mean(1) if token == "mean" else y[:, 0]).unflatten(0, tokens.shape[:2])
    every = model.patches(y, size, first=False)
    assert every.shape == (2, 7, 16)
    torch.testing.assert_close(model(x), model.head(every[:, 0]), rtol=1e-4, atol=1e-5)


def test_duoformer_frozen_backbone():
    model = DuoFormer(3, scales=2, frozen=True, **DUO).train()
    assert not model.backbone.training
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("backbone."))
    assert DuoFormer(3, scales=2, frozen=True, freeze_statistics=False, **DUO).train().backbone.training


@torch.no_grad()
def test_duoformer_ablations_and_refusals():
    plain = DuoFormer(3, scales=2, patch_attention=False, **DUO).eval()
    assert plain(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    with pytest.raises(ValueError, match="7 x 7"):
        plain(torch.randn(1, 3, 64, 64))
    assert DuoFormer(3, scales=2, identity=True, **DUO).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    for given, message in (
        ({"scales": 5}, "scales is 5"),
        ({"scale_token": "sum"}, "scale_token"),
        ({"backbone": "vit_tiny_patch16_224"}, "1/4 to 1/32"),
    ):
        with pytest.raises(ValueError, match=message):
            DuoFormer(3, **{**DUO, **given})
    with pytest.raises(ValueError, match="multiples of 32"):
        plain(torch.randn(1, 3, 60, 64))
    with pytest.raises(ValueError, match="num_heads"):
        ScaleBlock(10, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lambda: DuoFormer(3, scales=2, scale_token="channel", **DUO), (3, 64, 64)),
        (lambda: SegMamba(3, 1, 2, slices=None, **TINY_SEG), (1, 64, 64)),
        (lambda: VMUNet(3, **SMALL), (3, 64, 64)),
        (lambda: UMamba(3, 1, 2, features=(4, 8, 8), d_state=2), (1, 32, 32)),
    ],
    ids=["duoformer", "segmamba", "vmunet", "umamba"],
)
def test_low_rank_adapters_are_not_passed_by(model, size):
    model, x = model().eval(), torch.randn(1, *size)
    kinds = torch.nn.Linear | torch.nn.Conv2d
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1]
    adapted = get_peft_model(model, LoraConfig(target_modules=names, r=2, init_lora_weights=False)).eval()
    torch.testing.assert_close(adapted(x), adapted.merge_and_unload().eval()(x), rtol=1e-3, atol=1e-3)
