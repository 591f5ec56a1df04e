"""DeepLab: contracts, parameter counts, published layouts, sizes, recipe details, export."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError, UserError
from nearfar.medical.contracts.deeplab import build_contract
from nearfar.medical.models.caffe import read_caffemodel
from nearfar.medical.models.deeplab import DeepLabV2, DeepLabV3, refine_scores
from nearfar.ops.aggregation.multi_scale import multi_scale_scores
from nearfar.ops.common.conv_norm_act import fuse
from nearfar.ops.graph.dense_crf import DenseCRF

CONTRACTS = shipped("deeplab")
SMALL = {"depths": (1, 1, 2, 3), "width": 8}


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: DeepLabV2(21), 44_048_532),
        (lambda: DeepLabV2(182), 55_919_384),
        (lambda: DeepLabV3(21), 58_040_661),
        (lambda: DeepLabV3(21, decoder=True), 59_344_309),
    ],
)
def test_parameter_counts(build, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


@torch.no_grad()
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", [(33, 47, 26), (40, 32, 24)])
def test_any_size(dims: int, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 1, *size[:dims])
    for model in (
        DeepLabV2(3, 1, dims=dims, **SMALL),
        DeepLabV3(3, 1, dims=dims, **SMALL),
        DeepLabV3(3, 1, output_stride=8, decoder=True, dims=dims, **SMALL),
    ):
        assert model.eval()(x).shape == (2, 3, *size[:dims])


def test_output_strides() -> None:
    x = torch.randn(1, 3, 65, 65)
    assert DeepLabV2(3, full_size=False, **SMALL).eval()(x).shape[2:] == (9, 9)
    assert DeepLabV3(3, full_size=False, **SMALL).eval()(x).shape[2:] == (5, 5)
    assert DeepLabV3(3, output_stride=8, full_size=False, **SMALL).eval()(x).shape[2:] == (9, 9)


def published(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state of a small model under the reproduction's names, made here from its own."""
    import re

    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(
            r"backbone\.stages\.(\d+)\.(\d+)\.", lambda m: f"layer{int(m[1]) + 2}.block{int(m[2]) + 1}.", name
        )
        name = name.replace("backbone.stem.", "layer1.conv1.").replace(".norm.", ".bn.")
        if isinstance(model, DeepLabV2):
            name = name.replace("aspp.branches.", "aspp.c")
        else:
            name = name.replace("aspp.branches.", "aspp.stages.c").replace("aspp.pool.", "aspp.stages.imagepool.conv.")
            name = name.replace("project.", "fc1.")
            classifier = "fc2.conv3." if model.decoder else "fc2."
            name = name.replace("classifier.", classifier)
            name = name.replace("refine.0.", "fc2.conv1.").replace("refine.1.", "fc2.conv2.")
        state[prefix + name] = tensor
    return state


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "base.", "module.base."])
def test_layouts_of_v2(prefix: str) -> None:
    model = DeepLabV2(5, scales=(0.5, 0.75) if "base" in prefix else (), **SMALL).eval()
    state = {k: v for k, v in published(model, prefix).items() if "num_batches" not in k}
    loaded = DeepLabV2.from_published(state)
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"missing backbone\.stem\.conv\.weight|backbone\.stem"):
        state.pop(f"{prefix}layer2.block1.reduce.bn.bias")
        state[f"{prefix}layer1.conv1.extra"] = torch.zeros(1)
        DeepLabV2.from_published(state)


@torch.no_grad()
@pytest.mark.parametrize("decoder", [False, True])
def test_layouts_of_v3(decoder: bool) -> None:
    model = DeepLabV3(48, decoder=decoder, **SMALL).eval()
    x = torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(DeepLabV3.from_published(published(model))(x), model(x), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="no DeepLab v2"):
        DeepLabV2.from_published(published(model))


def encode(layers: dict[str, list[Tensor]]) -> bytes:
    """A Caffe network in the wire format of protocol buffers."""

    def varint(n: int) -> bytes:
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def field(number: int, payload: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    content = field(1, b"net")
    for name, blobs in layers.items():
        body = field(1, name.encode()) + field(2, b"Convolution")
        for blob in blobs:
            shape = field(1, b"".join(varint(n) for n in blob.shape))
            body += field(7, field(7, shape) + field(5, struct.pack(f"<{blob.numel()}f", *blob.flatten().tolist())))
        content += field(100, body)
    return content


@torch.no_grad()
def test_caffe_models(tmp_path: Path) -> None:
    model = DeepLabV2(4, **(SMALL | {"depths": (2, 2, 3, 1)})).eval()
    layers: dict[str, list[Tensor]] = {}
    units = {"shortcut": "branch1", "reduce": "branch2a", "conv3x3": "branch2b", "increase": "branch2c"}
    for name, module in model.named_modules():
        if not hasattr(module, "norm"):
            continue
        names = ("conv1", "bn_conv1", "scale_conv1")
        if "stages" in name:
            _, _, stage, block, unit = name.split(".")
            # three blocks are numbered a, b, c; more are a, b1, b2 ...
            letter = "abc"[int(block)] if stage in "03" else "a" if block == "0" else f"b{block}"
            names = tuple(f"{kind}{int(stage) + 2}{letter}_{units[unit]}" for kind in ("res", "bn", "scale"))
        nn.init.normal_(module.norm.running_mean)
        nn.init.uniform_(module.norm.running_var, 0.5, 2)
        factor = torch.tensor([7.0])
        layers[names[0]] = [module.conv.weight]
        layers[names[1]] = [module.norm.running_mean * factor, module.norm.running_var * factor, factor]
        layers[names[2]] = [module.norm.weight, module.norm.bias]
    for i, branch in enumerate(model.aspp.branches):
        layers[f"fc1_voc12_c{i}"] = [branch.weight, branch.bias]
    layers |= {f"{name}_res05": values for name, values in list(layers.items())[:6]}
    path = tmp_path / "train_iter_20000.caffemodel"
    path.write_bytes(encode(layers))
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(DeepLabV2.from_published(path)(x), model(x), rtol=1e-5, atol=1e-6)
    path.write_bytes(encode(layers)[:-50])
    with pytest.raises(CheckpointError, match="cannot be read as a Caffe model"):
        read_caffemodel(path)


@torch.no_grad()
def test_folded_norms_change_nothing() -> None:
    model = DeepLabV3(3, **SMALL).eval()
    x = torch.randn(1, 3, 48, 48)
    before = model(x)
    torch.testing.assert_close(fuse(model)(x), before, rtol=1e-4, atol=1e-5)


def test_training_form_and_groups() -> None:
    model = DeepLabV2(3, frozen_norm=True, **SMALL).train()
    scores = model(torch.randn(1, 3, 65, 65))
    assert [s.shape[-1] for s in scores] == [9, 5, 7, 9]
    before = model.backbone.stem.norm.running_mean.clone()
    sum(s.mean() for s in scores).backward()
    torch.testing.assert_close(model.backbone.stem.norm.running_mean, before)
    groups = {(round(g["lr"] / 2.5e-4), g["weight_decay"]): g["params"] for g in model.parameter_groups()}
    assert set(groups) == {(1, 5e-4), (10, 5e-4), (20, 0.0)}
    assert len(groups[10, 5e-4]) == len(groups[20, 0.0]) == 4
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert not norms & {p for g in groups.values() for p in g}
    everything = list(DeepLabV2(3, **SMALL).parameter_groups())
    assert sum(len(g["params"]) for g in everything) == len(list(DeepLabV2(3, **SMALL).parameters()))


@torch.no_grad()
def test_crf_after_the_network() -> None:
    scores = torch.randn(1, 3, 5, 6)
    q = refine_scores(scores, 255 * torch.rand(1, 3, 20, 24), DenseCRF(2))
    assert q.shape == (1, 3, 20, 24)
    torch.testing.assert_close(q.sum(1), torch.ones(1, 20, 24))


@torch.no_grad()
def test_export_and_autocast() -> None:
    model = DeepLabV2(3, scales=(), **SMALL).eval()
    x = torch.randn(1, 3, 40, 56)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(x)).all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="8 and 16"):
        DeepLabV3(output_stride=4)
    with pytest.raises(ValueError, match="multi_grid"):
        DeepLabV3(depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="depths"):
        DeepLabV2(depths=(1, 1))


@torch.no_grad()
@pytest.mark.parametrize("decoder", [False, True])
def test_contracts_of_several_sizes_of_v3(decoder: bool) -> None:
    model = DeepLabV3(5, decoder=decoder, output_stride=8, full_size=False, **SMALL)
    kinds = [{"name": n, "shape": list(v.shape), "kind": "parameter"} for n, v in published(model, "base.").items()]
    settings = {"output_stride": 8, "atrous_rates": [12, 24, 36], "msc_scales": [0.5]}
    content = {"system": "deeplab", "variant": "v3-msc", "settings": settings, "outputs": [{"name": "out"}]}
    contract = Contract(Path("deeplab--v3-msc.json"), content | {"state": kinds})
    x = torch.randn(1, 3, 48, 40)
    loaded = DeepLabV3.from_published(contract.state(), output_stride=8, full_size=False)
    got = build_contract(contract)(x)
    torch.testing.assert_close(got, multi_scale_scores(loaded, x, [0.5])[-1])
    assert not torch.allclose(got, loaded(x))


def crf_contract(**changes) -> Contract:
    contract = Contract.load(next(path for path in CONTRACTS if "spatial-only" in path.stem))
    return replace(contract, content=contract.content | {"settings": dict(contract.settings) | changes})


def test_contracts_of_other_compatibilities() -> None:
    inputs = crf_contract().input_tensors()
    potts = build_contract(crf_contract(pos_w=3))(*inputs)
    torch.testing.assert_close(build_contract(crf_contract(pos_w=[-3, -3, -3, -3]))(*inputs), potts)
    matrix = (-3 * torch.eye(4)).tolist()
    torch.testing.assert_close(build_contract(crf_contract(pos_w=matrix, compatibility="matrix"))(*inputs), potts)
    with pytest.raises(UserError, match="compatibility is 'matrix'"):
        build_contract(crf_contract(compatibility="matrix"))
