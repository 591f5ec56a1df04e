"""ForecastNet: contracts, published layouts and counts, other grids, export."""

import io
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nearfar.core.checkpoints import save_state_dict
from nearfar.core.errors import CheckpointError
from nearfar.vision.contracts.afno import build_contract
from nearfar.vision.forecasting.forecastnet import ForecastNet, forecast_net
from tests.vision.base import close, described, randomize, shapes_of, without_shape_checks

SMALL = {"image_size": (16, 32), "in_channels": 3, "patch_size": 4, "dim": 16, "depth": 2, "num_blocks": 4}


def test_published_counts() -> None:
    with torch.device("meta"):
        net = forecast_net()
    unused_norm = 2 * 768
    assert sum(p.numel() for p in net.parameters()) + unused_norm == 74691840
    with torch.device("meta"):
        rain = forecast_net("fourcastnet_precipitation")
        assert rain.out_channels == 1
        net = forecast_net("afno_physicsnemo", image_size=(32, 64), in_channels=2)
    assert (net.patch_size, len(net.blocks), net.blocks[0].filter.num_blocks) == ((16, 16), 4, 16)
    with pytest.raises(ValueError, match="allowed are fourcastnet"):
        forecast_net("sfno")


@torch.no_grad()
def test_published_file(tmp_path: Path) -> None:
    """FourCastNet's layout: wrapped, prefixed, positions (1, N, C), a norm that is not used."""
    net = randomize(ForecastNet(**SMALL, precipitation=True, out_channels=1))
    state = {f"module.backbone.{name}": value for name, value in net.state_dict().items() if "conv." not in name}
    state = {name.replace("patch_embed.", "patch_embed.proj."): value for name, value in state.items()}
    state |= {f"module.{name}": value for name, value in net.state_dict().items() if name.startswith("conv.")}
    state["module.backbone.pos_embed"] = net.pos_embed.flatten(1).T[None]
    state |= {f"module.backbone.norm.{name}": torch.ones(16) for name in ("weight", "bias")}
    torch.save({"iters": 3, "epoch": 1, "model_state": state}, tmp_path / "precip.ckpt")
    x = torch.randn(2, 3, 16, 32)
    loaded = ForecastNet.from_published(tmp_path / "precip.ckpt")
    assert loaded.image_size == (16, 32)
    close(loaded(x), net(x), 1e-6)
    save_state_dict(net, tmp_path / "own.safetensors")
    close(ForecastNet.from_published(tmp_path / "own.safetensors")(x), net(x), 1e-6)
    del state["module.backbone.blocks.1.filter.w2"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.filter\.w2"):
        ForecastNet.from_published(state)
    state["module.backbone.pos_embed"] = torch.zeros(1, 31, 16)
    with pytest.raises(CheckpointError, match="say image_size"):
        ForecastNet.from_published(state)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        ForecastNet.from_published({"w": torch.zeros(2)})


@torch.no_grad()
def test_saved_with_its_settings(tmp_path: Path) -> None:
    net = randomize(ForecastNet(**SMALL, modes="lowpass", fraction=0.5, residual=True))
    net.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 16, 32)
    close(ForecastNet.from_pretrained(tmp_path).eval()(x), net(x), 1e-6)


@torch.no_grad()
def test_grids() -> None:
    net = randomize(ForecastNet(**SMALL, modes="lowpass"))
    assert net(torch.randn(1, 3, 24, 40)).shape == (1, 3, 24, 40)
    tall = randomize(ForecastNet((12, 16), 2, 5, (3, 4), 16, 1, 4))
    assert tall(torch.randn(2, 2, 12, 16)).shape == (2, 5, 12, 16)
    with pytest.raises(ValueError, match="for example to 16 x 32"):
        net(torch.randn(1, 3, 19, 33))
    with pytest.raises(ValueError, match="takes \\(B, 3, H, W\\)"):
        net(torch.randn(1, 2, 16, 32))
    with pytest.raises(ValueError, match="no multiple of the patches"):
        ForecastNet((720, 1441))
    with pytest.raises(ValueError, match="residual=True"):
        ForecastNet((16, 16), 2, 3, residual=True)


@torch.no_grad()
def test_pixels_of_a_patch_lie_where_they_came_from() -> None:
    """With blocks and positions off, the head as the embedding's inverse gives the fields back."""
    net = ForecastNet((8, 12), 3, patch_size=4, dim=48, depth=0, num_blocks=4).double()
    net.pos_embed.zero_()
    net.patch_embed.bias.zero_()
    inverse = torch.linalg.inv(net.patch_embed.weight.flatten(1))  # (channel, p1, p2), features
    net.head.weight.copy_(inverse.unflatten(0, (3, 4, 4)).permute(1, 2, 0, 3).flatten(0, 2))
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(net(x), x)


@torch.no_grad()
def test_precipitation_head_is_periodic_along_rows() -> None:
    net = randomize(ForecastNet(**SMALL, precipitation=True)).double()
    y = torch.randn(1, 3, 16, 32, dtype=torch.float64)
    net.forward_body = None
    plain = ForecastNet(**SMALL).double()
    plain.load_state_dict({n: v for n, v in net.state_dict().items() if not n.startswith("conv.")})
    body = plain.eval()(y)
    padded = torch.cat((body[..., -1:], body, body[..., :1]), -1)
    padded = torch.cat((torch.zeros_like(padded[:, :, :1]), padded, torch.zeros_like(padded[:, :, :1])), 2)
    want = torch.nn.functional.conv2d(padded, net.conv.weight, net.conv.bias).clamp(min=0)
    torch.testing.assert_close(net(y), want)


def test_a_residual_net_starts_as_persistence() -> None:
    net, x = ForecastNet(**SMALL, out_channels=2, residual=True), torch.randn(2, 3, 16, 32)
    torch.testing.assert_close(net(x), x[:, :2])


def test_checkpointing_gives_the_same_gradients() -> None:
    net = randomize(ForecastNet(**SMALL)).double().train()
    x = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    assert all(g.abs().sum() > 0 for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.ci
def test_export_and_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    without_shape_checks(monkeypatch)
    net = randomize(ForecastNet(**SMALL))
    x = torch.randn(2, 3, 16, 32)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    close(program.module()(x[:1].repeat(3, 1, 1, 1)), net(x[:1].repeat(3, 1, 1, 1)), 1e-5)
    onnx = io.BytesIO()
    torch.onnx.export(program, (), onnx, verbose=False)
    session = onnxruntime.InferenceSession(onnx.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(np.asarray(y)), net(x), 1e-5)
    torch._dynamo.reset()
    close(torch.compile(net, backend="aot_eager")(x), net(x), 1e-5)


@torch.no_grad()
def test_contract_reads_its_settings() -> None:
    net = randomize(ForecastNet(**SMALL, fraction=0.5, threshold=0.2))
    settings = {"image_size": [16, 32], "hard_thresholding_fraction": 0.5, "sparsity_threshold": 0.2, "mlp_ratio": 4}
    shapes = shapes_of(net) | {"pos_embed": (1, 32, 16)}
    built = build_contract(described(shapes, settings, [(1, 3, 16, 32)]))
    assert (built.blocks[0].filter.fraction, built.blocks[0].filter.threshold) == (0.5, 0.2)
