"""ConvNeXt: contracts, the four checkpoint layouts, the isotropic and the dense form."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
import transformers
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock as TimmBlock
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torchvision.models.convnext import CNBlock as TorchvisionBlock
from transformers.models.convnext.modeling_convnext import ConvNextLayer as TransformersBlock

from nearfar.core.errors import CheckpointError, UserError
from nearfar.vision.contracts.convnext import build_contract
from nearfar.vision.models.convnext import ConvNeXt
from nearfar.vision.models.pyramid import PictureConv2d
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


@pytest.mark.parametrize("name", ["nearfar_convnext_tiny", "hornet_tiny_7x7"])
@torch.no_grad()
def test_output_stride(name: str) -> None:
    """Dilated stages have at every kept position what the strided ones have there; also fused, and in decoders."""
    form = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32) if "convnext" in name else (8, 16, 32, 64)}
    strided = randomize(timm.create_model(name, **form))
    x = torch.randn(1, 3, 128, 96)
    for stride in (16, 8):
        dilated = timm.create_model(name, output_stride=stride, **form).eval()
        dilated.load_state_dict(strided.state_dict())
        assert dilated.feature_info[-1]["reduction"] == stride
        maps = dilated.forward_features(x)
        assert maps.shape[-2:] == (128 // stride, 96 // stride)
        step = 32 // stride
        close(maps[..., ::step, ::step], strided.forward_features(x), 1e-6)
        close(dilated.fuse().forward_features(x), maps, 1e-5)
    with pytest.raises(ValueError, match="allows"):
        timm.create_model(name, output_stride=6, **form)
    net = smp.DeepLabV3(f"tu-{name}", encoder_weights=None, classes=2, **form).eval()
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize("name", ["hornet_tiny_gf", "lsnet_t"])
def test_output_stride_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no convolution that could be dilated"), torch.device("meta"):
        timm.create_model(name, output_stride=16)


class TestConvNeXt(BackboneTester):
    model = ConvNeXt
    name = "nearfar_convnext_tiny"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16)}


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names as the official code writes them."""
    names = {}
    for name in state:
        part = name.split(".")
        if part[0] == "stem":
            new = f"downsample_layers.0.{part[1]}.{part[2]}"
        elif part[0] == "stages" and part[2] == "downsample":
            new = f"downsample_layers.{part[1]}.{part[3]}.{part[4]}"
        elif part[0] == "stages":
            new = ".".join(part[:2] + part[3:])
        elif part[0] == "feature_norms":
            new = f"norm{part[1]}.{part[2]}"
        else:
            new = name.replace("head.norm", "norm").replace("head.fc", "head")
        names[name] = new
    return {names[name]: value for name, value in state.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    "source", ["atto", "atto_ols", "nano_ols", "hnf", "torchvision", "transformers", "transformers-backbone"]
)
def test_layouts_of_other_libraries(source: str) -> None:
    config = transformers.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], num_labels=5)
    small = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    theirs = {
        "atto": lambda: timm.create_model("convnext_atto", **small),  # MLP as 1 x 1 convolutions
        "atto_ols": lambda: timm.create_model("convnext_atto_ols", **small),  # overlapping stem
        "nano_ols": lambda: timm.create_model("convnext_nano_ols", **small),
        "hnf": lambda: timm.create_model("convnext_tiny_hnf", **small),  # norm before pooling
        "torchvision": torchvision.models.convnext_tiny,
        "transformers": lambda: transformers.ConvNextForImageClassification(config),
        "transformers-backbone": lambda: transformers.ConvNextBackbone(
            transformers.ConvNextConfig(
                depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], out_features=[f"stage{i}" for i in range(1, 5)]
            )
        ),
    }[source]()
    randomize(theirs)
    ours = ConvNeXt.from_published(theirs.state_dict()).contract_form()
    x = torch.randn(2, 3, 64, 96)
    want, got = theirs(x), ours(x)
    if source == "transformers-backbone":
        for a, b in zip(got, want.feature_maps, strict=True):
            close(a, b, 1e-5)
    else:
        close(got, getattr(want, "logits", want), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("source", "settings", "outputs"),
    [
        ("features", {}, 4),
        ("features", {"out_indices": [1, 3]}, 2),
        ("plain", {"norm_eps": 1e-3}, 0),
        ("plain", {"kernel_sizes": (3, 5, 7, 9)}, 0),
        ("conv_mlp", {"ls_init_value": None}, 0),
        ("transformers", {"final_norm_eps": 1e-3}, 0),
        ("transformers-backbone", {}, 2),
    ],
    ids=str,
)
def test_contracts_of_other_options(source: str, settings: dict[str, Any], outputs: int) -> None:
    small = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    sizes = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
    theirs = {
        "features": lambda: timm.create_model("convnext_tiny", features_only=True, **small, **settings),
        "plain": lambda: timm.create_model("convnext_tiny", **small, **settings),
        "conv_mlp": lambda: timm.create_model("convnext_tiny", conv_mlp=True, **small, **settings),
        "transformers": lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(layer_norm_eps=1e-3, **sizes)
        ),
        "transformers-backbone": lambda: transformers.ConvNextBackbone(
            transformers.ConvNextConfig(out_features=["stage2", "stage4"], **sizes)
        ),
    }[source]()
    randomize(theirs)
    x = torch.randn(1, 3, 64, 64)
    want = theirs(x)
    want = getattr(want, "logits", getattr(want, "feature_maps", want))
    got = build_contract(described(shapes_of(theirs), settings, outputs=outputs))(x)
    for a, b in zip(got, want, strict=True) if outputs else [(got, want)]:
        close(a, b, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("source", ["timm", "timm conv_mlp", "transformers", "torchvision", "norm", "norm of maps"])
def test_contracts_of_blocks(source: str) -> None:
    theirs = {
        "timm": lambda: TimmBlock(8, kernel_size=5, ls_init_value=None),
        "timm conv_mlp": lambda: TimmBlock(8, conv_mlp=True, ls_init_value=1e-6, mlp_ratio=15 / 8),
        "transformers": lambda: TransformersBlock(transformers.ConvNextConfig(), 8),
        "torchvision": lambda: TorchvisionBlock(8, 1e-6, 0.0),
        "norm": lambda: torch.nn.LayerNorm(8, eps=1e-6),
        "norm of maps": lambda: LayerNorm2d(8),
    }[source]()
    x = torch.randn(2, 9, 5, 8) if source == "norm" else torch.randn(2, 8, 9, 5)
    contract = described(shapes_of(randomize(theirs)), inputs=[tuple(x.shape)])
    close(build_contract(contract)(x), theirs(x), 1e-5)


def test_a_setting_that_cannot_be_honoured_is_refused() -> None:
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(UserError, match="output_stride is 16"):
        build_contract(described(shapes_of(model), {"output_stride": 16}))
    with pytest.raises(CheckpointError, match="no checkpoint of ConvNeXt"):
        build_contract(described({"conv.weight": (3, 3, 3, 3)}))


@torch.no_grad()
def test_dense_checkpoint() -> None:
    model = randomize(
        timm.create_model("nearfar_convnext_tiny", num_classes=0, feature_norms=True, **TestConvNeXt.tiny)
    )
    loaded = ConvNeXt.from_published(official(model.state_dict()))
    x = torch.randn(1, 3, 64, 64)
    levels = model.forward_pyramid(x)
    for level, norm, got in zip(levels, model.feature_norms, loaded.contract_form()(x), strict=True):
        want = torch.nn.functional.layer_norm(
            level.permute(0, 2, 3, 1), (level.shape[1],), norm.weight, norm.bias, 1e-6
        )
        close(got, want.permute(0, 3, 1, 2), 1e-5)


@torch.no_grad()
def test_files_of_training_scripts(tmp_path: Path) -> None:
    model = randomize(timm.create_model("nearfar_convnext_tiny", num_classes=5, **TestConvNeXt.tiny))
    state = {f"module.{name}": value for name, value in official(model.state_dict()).items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "convnext.pth")
    x = torch.randn(1, 3, 64, 64)
    close(ConvNeXt.from_published(tmp_path / "convnext.pth")(x), model(x), 1e-6)
    overlay = {"file": str(tmp_path / "convnext.pth"), "num_classes": 5}
    by_timm = timm.create_model(
        "nearfar_convnext_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **TestConvNeXt.tiny
    )
    close(by_timm.eval()(x), model(x), 1e-6)
    for name in ("hornet_tiny_7x7", "nearfar_convnext_tiny"):  # no address is known; nothing there
        overlay = {"file": str(tmp_path / "nowhere.pth")} if "convnext" in name else None
        with pytest.raises(UserError, match=rf"{name}: its published weights cannot be had here .* bring the file"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match="global_pool is 'catavgmax'"):
        model.reset_classifier(5, "catavgmax")


def test_layer_decay_of_the_deep_variants() -> None:
    with torch.device("meta"):
        model = timm.create_model("nearfar_convnext_small")
    scales = {
        name: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for parameter in group["params"]
        for name, own in model.named_parameters()
        if own is parameter
    }
    for name, layer in {
        "stem.0.weight": 0,
        "stages.0.blocks.2.gamma": 1,
        "stages.1.downsample.1.weight": 2,
        "stages.2.downsample.1.weight": 3,
        "stages.2.blocks.2.gamma": 3,
        "stages.2.blocks.3.gamma": 4,
        "stages.2.blocks.26.gamma": 11,
        "stages.3.downsample.1.weight": 12,
        "stages.3.blocks.2.gamma": 12,
        "head.norm.weight": 13,
        "head.fc.weight": 13,
    }.items():
        assert scales[name] == pytest.approx(0.5 ** (13 - layer)), name


def test_training_keeps_the_picture_once() -> None:
    """The map of the first convolution is channels-last, with gradients too, and no copy of the picture is kept."""
    conv, x = PictureConv2d(3, 8, 4, stride=4), torch.randn(2, 3, 16, 16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = conv(x)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
    with torch.no_grad():
        inferred = conv(x)
    close(inferred, y)
    for maps in (y, inferred):
        assert maps.is_contiguous(memory_format=torch.channels_last)
        assert not maps.is_contiguous()
