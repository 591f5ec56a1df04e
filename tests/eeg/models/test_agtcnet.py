"""AGTCNet: published numbers, checkpoints, constraints, and life as a braindecode model."""

import copy
import json
import pickle
from pathlib import Path

import h5py
import jaxtyping
import lightning
import mne
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from braindecode import EEGClassifier
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError, UserError
from nearfar.eeg.metrics import chance_bound
from nearfar.eeg.models.agtcnet import VARIANTS, AGTCNet
from nearfar.eeg.models.agtcnet_weights import published_names
from nearfar.eeg.models.graphs import edge_names, grid_graph

CONTRACTS = shipped("agtcnet")
PARAMETERS = {"bciciv2a-3s": 74_213, "bciciv2a-long": 76_517, "eegmmidb-4class": 86_525, "eegmmidb-2class": 83_067}
SMALL = [{"ch_name": f"{row}{n}"} for row, numbers in (("FC", "3z4"), ("C", "531z246"), ("CP", "3z4")) for n in numbers]


def small(**options) -> AGTCNet:
    return AGTCNet(**{"n_outputs": 3, "n_times": 97, "chs_info": SMALL} | options)


@pytest.fixture
def without_shape_checks():
    """torch.compile cannot trace the run-time checks of shapes, which production does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def randomize(model: nn.Module) -> nn.Module:
    """Parameters and running statistics at random, so that nothing is the identity."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 2) if name.endswith("var") else value.add_(0.2 * torch.randn_like(value))
    return model


# ---------------------------------------------------------------- the published numbers


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts(variant):
    assert sum(p.numel() for p in AGTCNet(**VARIANTS[variant]).parameters() if p.requires_grad) == PARAMETERS[variant]


@pytest.mark.parametrize("path", [p for p in CONTRACTS if "op-" not in p.stem], ids=lambda p: p.stem)
def test_electrodes_of_the_variants(path):
    settings = json.loads(path.read_text())["settings"]
    variant = VARIANTS[path.stem.partition("--")[2]]
    names = [c["ch_name"] for c in variant["chs_info"]]
    assert [name.lower() for name in names] == [name.lower() for name in settings["channel_order"]]
    assert (variant["n_times"], variant["n_outputs"]) == (settings["samples"], settings["classes"])
    edges = {frozenset((a.lower(), b.lower())) for a, b in edge_names(grid_graph(names), names)}
    assert edges == {frozenset(edge.lower().split("-")) for edge in settings["edges_undirected"]}


# ---------------------------------------------------------------- the published layout, written out slowly


def published_random(n=22, classes=4, length=10, heads=2, m=4, ctc=8, width=16, gtc=96) -> dict[str, torch.Tensor]:
    """A state dict in the published layout with values at random, in float64."""
    shapes = {"pos_scale": (), "ctconv.0.weight": (ctc, 1, 32), "gcat.prelu_alpha": (1, n, n, heads)}
    shapes |= {"gcat.bias": (width,), "chpool.weight": (2 * (ctc + width), 1, 1, n)}

    def conv(name, c, out, k, flat):
        shapes[f"{name}.depthwise.weight"] = (c * m, 1, k) if flat else (c * m, 1, k, 1)
        shapes[f"{name}.pointwise.weight"] = (out, c * m, 1) if flat else (out, c * m, 1, 1)
        norms[f"{name}.bn"] = out

    norms = {"ctconv.1": ctc, "gcat_norm": width, "chpool_norm": 2 * (ctc + width), "mha_norm": gtc}
    conv("gcat.weight_src_dst", ctc, heads * width, 8, False)
    conv("gcat.val", ctc, heads * width, 8, False)
    for head in range(heads):
        conv(f"gcat.attn_src.{head}", width, 1, 2, False)
        conv(f"gcat.attn_dst.{head}", width, 1, 2, False)
    conv("tconv", 2 * (ctc + width), gtc, 8, True)
    conv("tce_conv", gtc, gtc, 2, True)
    for name, size in norms.items():
        shapes |= {f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
    for role in ("query", "key", "value"):
        shapes |= {f"mha_{role}.weight": (16, gtc), f"mha_{role}.bias": (16,)}
    shapes |= {"mha_output.weight": (gtc, 16), "mha_output.bias": (gtc,)}
    shapes |= {"classifier.weight": (classes, gtc * length), "classifier.bias": (classes,)}
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.ndim > 1:
            value.div_(value[0].numel() ** 0.5)
    return state


def published_forward(state: dict[str, torch.Tensor], x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
    """The published model in eval mode, layer by layer in its own layouts."""

    def norm(name, value):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(value, *parts, eps=1e-3)

    def separable(name, value):
        depthwise, pointwise = state[f"{name}.depthwise.weight"], state[f"{name}.pointwise.weight"]
        convolve = F.conv2d if depthwise.ndim == 4 else F.conv1d
        k = depthwise.shape[2]
        padding = [(k - 1) // 2, k // 2]
        value = F.pad(value, [0, 0, *padding] if depthwise.ndim == 4 else padding)
        value = convolve(convolve(value, depthwise, groups=value.shape[1]), pointwise)
        return F.selu(norm(f"{name}.bn", value))

    batch, n, _ = x.shape
    y = norm("ctconv.1", F.conv1d(x.reshape(batch * n, 1, -1), state["ctconv.0.weight"]))
    ctc = rearrange(F.avg_pool1d(y, 4, 2), "(b n) c t -> b c t n", n=n)

    alpha = state["gcat.prelu_alpha"]
    heads = alpha.shape[-1]
    w, v = (
        rearrange(separable(f"gcat.{p}", ctc), "b (h c) t n -> b h c t n", h=heads) for p in ("weight_src_dst", "val")
    )
    edges = adjacency.clone().fill_diagonal_(1)
    out = 0
    for h in range(heads):
        source = separable(f"gcat.attn_src.{h}", w[:, h])[:, 0]  # b t n
        target = separable(f"gcat.attn_dst.{h}", w[:, h])[:, 0]
        e = source[..., :, None] + target[..., None, :]
        e = torch.where(e > 0, e, alpha[..., h] * e).masked_fill(edges != 1, -torch.inf)
        out = out + torch.einsum("btij,bcti->bctj", e.softmax(2), v[:, h]) / heads
    gcat = F.selu(norm("gcat_norm", out + state["gcat.bias"][:, None, None]))

    y = torch.cat([ctc, gcat], dim=1)
    y = F.selu(norm("chpool_norm", F.conv2d(y, state["chpool.weight"], groups=y.shape[1])))[..., 0]
    y = F.avg_pool1d(separable("tconv", F.avg_pool1d(y, 4)), 4)

    c, length = y.shape[1:]
    angle = torch.arange(length, dtype=y.dtype)[:, None] / 10000 ** (2 * (torch.arange(c) // 2) / y.new_tensor(c))
    y = y.mT + state["pos_scale"] * torch.cat([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=1)
    q, k, val = (F.linear(y, state[f"mha_{r}.weight"], state[f"mha_{r}.bias"]) for r in ("query", "key", "value"))
    q, k, val = (rearrange(z, "b t (h d) -> b h t d", h=2) for z in (q, k, val))
    mixed = rearrange((q / 8**0.5 @ k.mT).softmax(-1) @ val, "b h t d -> b t (h d)")
    y = y.mT + norm("mha_norm", F.linear(mixed, state["mha_output.weight"], state["mha_output.bias"]).mT)
    y = y + separable("tce_conv", y)
    return F.linear(y.mT.flatten(1), state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("bciciv2a-3s", {}),
        ("bciciv2a-long", {"length": 16}),
        ("eegmmidb-4class", {"n": 64, "length": 18}),
        ("eegmmidb-2class", {"n": 64, "length": 18, "classes": 2}),
        (None, {"n": 13, "length": 2, "classes": 3, "heads": 3, "m": 2, "ctc": 6, "width": 10, "gtc": 40}),
    ],
    ids=str,
)
def test_equals_the_published_layout_written_out(variant, sizes):
    torch.set_default_dtype(torch.float64)
    try:
        state = published_random(**sizes)
        given = {} if variant else {"n_times": 100, "chs_info": SMALL}
        model = AGTCNet.from_published(state, **given).double()
    finally:
        torch.set_default_dtype(torch.float32)
    if variant:
        expected = VARIANTS[variant]
        assert (model.n_times, model.n_outputs, model.sfreq) == tuple(
            expected[k] for k in ("n_times", "n_outputs", "sfreq")
        )
        assert model.channels == [c["ch_name"] for c in expected["chs_info"]]
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    x = 10 * torch.randn(2, model.n_chans, model.n_times, dtype=torch.float64)
    adjacency = torch.as_tensor(grid_graph(model.channels))
    with torch.no_grad():
        torch.testing.assert_close(model(x), published_forward(state, x, adjacency), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- Keras weight files


def write_keras(path: Path, state: dict[str, torch.Tensor], first: int) -> dict[str, np.ndarray]:
    """`state` as the released code's Keras weight file lays it out, every layer counter beginning at `first`.

    Layers of a kind are numbered in the order in which they are made; groups have other names than the layers.
    """
    heads = state["gcat.prelu_alpha"].shape[-1]
    separable = ["gcat.weight_src_dst", "gcat.val"]
    separable += [f"gcat.attn_{role}.{head}" for role in ("src", "dst") for head in range(heads)]
    group = {"ctconv": "chtconv1", "gcat": "ga_tv1", "tconv": "tconv1", "tce_conv": "tdense"}
    norms = {"ctconv.1": "chtconv1", **{f"{name}.bn": "ga_tv1" for name in separable}, "gcat_norm": "gnorm1"}
    norms |= {"chpool_norm": "chpool", "tconv.bn": "tconv1", "mha_norm": "sequential_6", "tce_conv.bn": "tdense"}
    arrays = {}

    def numbered(kind: str, i: int) -> str:
        return f"{kind}_{first + i}" if first + i else kind

    def put(where: str, leaf: str, value: torch.Tensor) -> None:
        arrays[f"{where}/{leaf}:0"] = value.numpy()

    m = len(state["tce_conv.depthwise.weight"]) // len(state["tconv.pointwise.weight"])
    put(f"chtconv1/{numbered('conv1d', 0)}", "kernel", rearrange(state["ctconv.0.weight"], "o 1 k -> k 1 o"))
    for i, name in enumerate(separable):
        where = f"ga_tv1/{numbered('separable_conv2d', i)}"
        depthwise, pointwise = state[f"{name}.depthwise.weight"], state[f"{name}.pointwise.weight"]
        put(where, "depthwise_kernel", rearrange(depthwise, "(c m) 1 k 1 -> k 1 c m", m=m))
        put(where, "pointwise_kernel", rearrange(pointwise, "o i 1 1 -> 1 1 i o"))
    for i, name in enumerate(("tconv", "tce_conv")):
        where = f"{group[name]}/{numbered('separable_conv1d', i)}"
        put(where, "depthwise_kernel", rearrange(state[f"{name}.depthwise.weight"], "(c m) 1 k -> k c m", m=m))
        put(where, "pointwise_kernel", rearrange(state[f"{name}.pointwise.weight"], "o i 1 -> 1 i o"))
    for i, (name, where) in enumerate(norms.items()):
        where = f"{where}/{numbered('batch_normalization', i)}"
        for leaf, part in {
            "gamma": "weight",
            "beta": "bias",
            "moving_mean": "running_mean",
            "moving_variance": "running_var",
        }.items():
            put(where, leaf, state[f"{name}.{part}"])
    put("ga_tv1/gcat", "bias", state["gcat.bias"])
    put(f"ga_tv1/{numbered('p_re_lu', 0)}", "alpha", state["gcat.prelu_alpha"])
    where = f"chpool/{numbered('depthwise_conv2d', 0)}"
    put(where, "depthwise_kernel", rearrange(state["chpool.weight"], "(c j) 1 1 n -> n 1 c j", j=2))
    put(f"positional_encoding/{numbered('positional_encoding', 0)}", "scale", state["pos_scale"])
    attention = f"multi_head_attention/{numbered('multi_head_attention', 0)}"
    for role in ("query", "key", "value"):
        put(f"{attention}/{role}", "kernel", rearrange(state[f"mha_{role}.weight"], "(h d) c -> c h d", h=2))
        put(f"{attention}/{role}", "bias", rearrange(state[f"mha_{role}.bias"], "(h d) -> h d", h=2))
    put(f"{attention}/attention_output", "kernel", rearrange(state["mha_output.weight"], "c (h d) -> h d c", h=2))
    put(f"{attention}/attention_output", "bias", state["mha_output.bias"])
    put(f"classifier/{numbered('dense', 0)}", "kernel", state["classifier.weight"].T)
    put(f"classifier/{numbered('dense', 0)}", "bias", state["classifier.bias"])
    save_arrays(path, arrays)
    return arrays


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = sorted({name.partition("/")[0] for name in arrays})
        for name, value in arrays.items():
            file[name] = value
        for name, layer in file.items():
            layer.attrs["weight_names"] = [k.partition("/")[2] for k in arrays if k.startswith(f"{name}/")]


@pytest.mark.parametrize("first", [0, 7, 98])
@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("bciciv2a-3s", {}),
        ("bciciv2a-long", {"length": 16}),
        ("eegmmidb-4class", {"n": 64, "length": 18}),
        ("eegmmidb-2class", {"n": 64, "length": 18, "classes": 2}),
    ],
)
def test_keras_files(tmp_path, variant, sizes, first):
    state = {name: value.float() for name, value in published_random(**sizes).items()}
    write_keras(tmp_path / "run-1-best_model.h5", state, first)
    model = AGTCNet.from_published(tmp_path / "run-1-best_model.h5")
    expected = AGTCNet.from_published(state)
    assert not model.training
    assert model.n_times == VARIANTS[variant]["n_times"]
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.fixture
def keras(tmp_path):
    state = {name: value.float() for name, value in published_random().items()}
    path = tmp_path / "weights.h5"
    return path, write_keras(path, state, first=3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ga_tv1/gcat/bias:0", "0 layers gcat, expected 1"),
        ("ga_tv1/separable_conv2d_6/pointwise_kernel:0", r"missing pointwise_kernel .*attn_src.1"),
        ("positional_encoding/positional_encoding_3/scale:0", "0 layers positional_encoding, expected 1"),
        ("classifier/dense_3/bias:0", "missing bias of a layer dense"),
    ],
)
def test_keras_file_without_an_array(keras, name, said):
    path, arrays = keras
    del arrays[name]
    save_arrays(path, arrays)
    with pytest.raises(CheckpointError, match=f"weights.h5: .*(?s:.*){said}"):
        AGTCNet.from_published(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ga_tv1/batch_normalization_77/gamma:0", "13 layers batch_normalization, expected 12"),
        ("optimizer/adam/m:0", "unexpected optimizer/adam/m:0"),
        ("classifier/dense_3/extra:0", "unexpected classifier/dense_3/extra:0"),
        ("elsewhere/dense_3/bias:0", "unexpected elsewhere/dense_3/bias:0"),
    ],
)
def test_keras_file_with_an_array_too_many(keras, name, said):
    path, arrays = keras
    save_arrays(path, arrays | {name: np.zeros(16, np.float32)})
    with pytest.raises(CheckpointError, match=f"(?s:.*){said}"):
        AGTCNet.from_published(path)


def test_keras_file_with_a_misshapen_array(keras):
    path, arrays = keras
    name = "ga_tv1/separable_conv2d_3/depthwise_kernel:0"
    save_arrays(path, arrays | {name: arrays[name][:, :, :, :3]})
    with pytest.raises(CheckpointError, match=r"weights.h5: "):
        AGTCNet.from_published(path)
    save_arrays(path, arrays | {name: arrays[name][0]})
    with pytest.raises(CheckpointError, match=r"separable_conv2d/depthwise_kernel \(gcat.weight_src_dst\) has shape"):
        AGTCNet.from_published(path)


def test_published_weights_in_torch_files(tmp_path):
    state = {name: value.float() for name, value in published_random().items()}
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "weights.pt")
    x = torch.randn(2, 22, 375)
    outputs = [AGTCNet.from_published(s)(x) for s in (state, tmp_path / "weights.safetensors", tmp_path / "weights.pt")]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_published_names_are_those_of_the_contracts():
    for path in CONTRACTS:
        contract = Contract.load(path)
        names = set(published_names(2))
        if "op-" in path.stem:
            names = {name.removeprefix("gcat.") for name in names if name.startswith("gcat.")}
        assert set(contract.state()) == names


def test_published_state_is_strict():
    state = published_random()
    missing, extra = dict(state), state | {"more": torch.zeros(2)}
    del missing["tconv.bn.running_var"]
    with pytest.raises(CheckpointError, match=r"missing tconv.bn.running_var"):
        AGTCNet.from_published(missing)
    with pytest.raises(CheckpointError, match=r"unexpected more \(2,\)"):
        AGTCNet.from_published(extra)
    with pytest.raises(CheckpointError, match=r"weights for 10 pooled time steps, n_times=562 gives 16"):
        AGTCNet.from_published(state, n_times=562)
    with pytest.raises(CheckpointError, match="tells 4 classes apart, n_outputs=2"):
        AGTCNet.from_published(state, n_outputs=2)
    with pytest.raises(CheckpointError, match=r"mha_query|tce.qkv.weight has shape"):
        AGTCNet.from_published(state | {"mha_query.weight": torch.zeros(15, 96)})
    with pytest.raises(CheckpointError, match="missing pos_scale"):
        AGTCNet.from_published({"weight": torch.zeros(3)})


def test_published_weights_of_another_montage():
    state, order = published_random(n=13, length=2), SMALL
    with pytest.raises(CheckpointError, match=r"13 channels and 2 pooled time steps.*give chs_info and n_times"):
        AGTCNet.from_published(state)
    assert AGTCNet.from_published(state, n_times=100, chs_info=order).n_chans == 13
    state, order = published_random(), [c["ch_name"] for c in VARIANTS["bciciv2a-3s"]["chs_info"]]
    mirrored = [{"ch_name": name.translate(str.maketrans("123456", "214365"))} for name in order]
    with pytest.raises(CheckpointError, match="the weights belong to the electrodes Fz FC3"):
        AGTCNet.from_published(state, chs_info=mirrored)
    other_case = [{"ch_name": name.lower()} for name in order]
    assert AGTCNet.from_published(state, chs_info=other_case).n_chans == 22
    own = AGTCNet.from_published(state, chs_info=mirrored, graph=grid_graph(mirrored))
    assert own.channels == [c["ch_name"] for c in mirrored]


# ---------------------------------------------------------------- constraints


def lengths(model: AGTCNet) -> tuple[float, float]:
    return model.gcap.weight.norm(dim=2).max().item(), model.final_layer.weight.norm(dim=1).max().item()


def break_constraints(model: AGTCNet) -> None:
    with torch.no_grad():
        model.gcap.weight.fill_(1)
        model.final_layer.weight.fill_(1)
        model.tce.positions.scale.fill_(3)


@pytest.mark.parametrize("made", ["itself", "deepcopy", "pickle", "compiled"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_constraints_follow_any_optimizer(made, optimizer):
    model = small()
    if made == "deepcopy":
        model = copy.deepcopy(model)
    elif made == "pickle":
        model = pickle.loads(pickle.dumps(model))
    break_constraints(model)
    parameters = (torch.compile(model, backend="eager") if made == "compiled" else model).parameters()
    optimizer = optimizer(parameters, lr=1e-6)
    model(torch.randn(4, 13, 97)).sum().backward()
    assert lengths(model)[0] > 3  # neither the forward nor the backward touches the weights
    optimizer.step()
    assert lengths(model) == pytest.approx((1, 0.25), abs=1e-5)
    assert model.tce.positions.scale.item() == 1


def test_constraints_leave_other_models_alone():
    model, other = small(), small()
    break_constraints(other)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert lengths(other)[0] > 3


def test_weights_within_the_limits_do_not_move():
    model = small()
    model.apply_constraints()
    before = copy.deepcopy(model.state_dict())
    model.apply_constraints()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_constraints_under_lightning(tmp_path):
    class Trial(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small()

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    module = Trial()
    break_constraints(module.model)
    data = torch.utils.data.TensorDataset(torch.randn(8, 13, 97), torch.randint(3, (8,)))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert lengths(module.model) == pytest.approx((1, 0.25), abs=1e-5)


# ---------------------------------------------------------------- a braindecode model


def lateralized(trials: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Microvolts: noise, and a 10 Hz rhythm of random phase that weakens over the hemisphere opposite to the hand."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, trials)
    time = np.arange(97) / 97
    rhythm = np.sin(2 * np.pi * 10 * time + rng.uniform(0, 2 * np.pi, (trials, 2, 1)))
    X = 6 * rng.standard_normal((trials, len(SMALL), 97))
    for side, names in enumerate((("FC3", "C5", "C3", "C1", "CP3"), ("FC4", "C6", "C4", "C2", "CP4"))):
        for i, channel in enumerate(SMALL):
            if channel["ch_name"] in names:
                X[:, i] += 4 * rhythm[:, side] * np.where(y == side, 1.0, 0.3)[:, None]
    return X.astype(np.float32), y


def test_learns_a_lateralized_rhythm_as_an_eegclassifier():
    torch.manual_seed(1)
    model = AGTCNet(chs_info=SMALL, n_outputs=2, n_times=97, sfreq=97)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.1  # the published 0.01 needs hundreds of steps before eval mode means anything
    net = EEGClassifier(
        model,
        optimizer=torch.optim.Adam,
        lr=2e-3,
        batch_size=32,
        max_epochs=12,
        classes=[0, 1],
        train_split=None,
        verbose=0,
    )
    net.fit(*lateralized(192, seed=0))
    X, y = lateralized(100, seed=1)
    assert (net.predict(X) == y).mean() > chance_bound(100, 2) + 0.1
    assert lengths(net.module_) <= (1 + 1e-5, 0.25 + 1e-5)


def test_eegclassifier_builds_it_from_the_data():
    net = EEGClassifier(AGTCNet, module__chs_info=SMALL, batch_size=4, max_epochs=1, train_split=None, verbose=0)
    X, y = lateralized(8, seed=0)
    net.fit(X, y)
    assert (net.module_.n_chans, net.module_.n_times, net.module_.n_outputs) == (13, 97, 2)
    assert net.predict_proba(X).shape == (8, 2)


def test_takes_an_mne_info():
    info = mne.create_info([c["ch_name"] for c in SMALL], 125.0, "eeg")
    info.set_montage("biosemi64")
    model = AGTCNet(chs_info=info["chs"], n_outputs=2, sfreq=125, input_window_seconds=1.0, graph="nearest")
    assert model(torch.randn(3, 13, 125)).shape == (3, 2)
    assert model.gcat.attention.adjacency.sum(0).min() >= 5  # four neighbours and itself


def test_shortest_input():
    assert small(n_times=65)(torch.randn(2, 13, 65)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"n_times is 64; .* at least 65 samples"):
        small(n_times=64)


@pytest.mark.parametrize("shape", [(2, 12, 97), (2, 13, 96), (2, 1, 13, 97)])
def test_other_input_is_refused(shape):
    with pytest.raises(ValueError, match=r"this model takes \(batch, 13, 97\)"):
        small()(torch.randn(shape))


def test_bad_graphs():
    with pytest.raises(ValueError, match="give chs_info, or an adjacency"):
        AGTCNet(n_chans=13, n_outputs=3, n_times=97)
    with pytest.raises(ValueError, match=r"graph has shape \(12, 12\)"):
        small(graph=np.ones((12, 12)))
    with pytest.raises(ValueError, match="0 and 1 only"):
        small(graph=np.full((13, 13), 0.5))
    with pytest.raises(ValueError, match="no electrode graph 'star'"):
        small(graph="star")
    with pytest.raises(UserError, match="no electrode position for FC3"):
        small(graph="radius")


def test_graph_matters_and_may_be_directed():
    edges = np.zeros((13, 13))
    edges[4, 6] = 1
    x = torch.randn(2, 13, 97)
    models = [randomize_like(small(graph=graph)).eval() for graph in (edges, edges.T, "10-10")]
    outputs = [model(x) for model in models]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def randomize_like(model: AGTCNet) -> AGTCNet:
    torch.manual_seed(3)
    return randomize(model)


@pytest.mark.parametrize("graph", ["auto", "array", "tensor"])
def test_save_and_from_pretrained(tmp_path, graph):
    given = {"auto": "auto", "array": np.eye(13)[::-1], "tensor": torch.eye(13).roll(1, 0)}[graph]
    if graph == "array":
        given = np.maximum(given, given.T)
    model = randomize(small(graph=given, drop_prob=0.1, gcat_heads=3)).eval()
    model.save_pretrained(tmp_path)
    again = AGTCNet.from_pretrained(tmp_path).eval()
    assert (again.channels, again.n_times, again.drop.p) == (model.channels, 97, 0.1)
    assert torch.equal(again.gcat.attention.adjacency, model.gcat.attention.adjacency)
    x = torch.randn(2, 13, 97)
    assert torch.equal(again(x), model(x))
    assert AGTCNet.from_pretrained(tmp_path, n_outputs=5)(x).shape == (2, 5)
    mirrored = [{"ch_name": c["ch_name"].translate(str.maketrans("123456", "214365"))} for c in SMALL]
    with pytest.raises(CheckpointError, match="the weights belong to the electrodes FC3 FCz"):
        AGTCNet.from_pretrained(tmp_path, chs_info=mirrored)


def test_weights_stay_with_their_graph(tmp_path):
    path = save_state_dict(small(), tmp_path / "model.safetensors")
    same, other = small(), small(graph=np.ones((13, 13)))
    load_state_dict(same, read_state_dict(path))
    with pytest.raises(CheckpointError, match=r"_extra_state|another electrode graph"):
        load_state_dict(other, read_state_dict(path))
    with pytest.raises(CheckpointError, match=r"another electrode graph .* this model has 169"):
        other.load_state_dict(same.state_dict())
    nameless = AGTCNet(n_chans=13, n_outputs=3, n_times=97, graph=grid_graph(SMALL))
    nameless.load_state_dict(same.state_dict())


def test_config_round_trip():
    model = small(graph=np.eye(13), tce_drop_prob=(0.0, 0.1))
    config = json.loads(json.dumps(model.get_config()))
    again = AGTCNet.from_config(config)
    assert again.tce.conv_dropout.p == 0.1
    assert torch.equal(again.gcat.attention.adjacency, model.gcat.attention.adjacency)


def test_reset_head():
    model = small()
    model.reset_head(7)
    assert model.n_outputs == 7
    assert model(torch.randn(2, 13, 97)).shape == (2, 7)
    with pytest.raises(ValueError):
        model.reset_head(0)


def test_every_parameter_has_a_gradient():
    model = small()
    model(torch.randn(4, 13, 97)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_of_one_trains():
    model = small()
    model(torch.randn(1, 13, 97)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_eval_form_is_the_training_form_with_fixed_statistics():
    # eval mode folds batch norms and joins convolution and pooling; in training mode the same running statistics
    # are used by norms in eval mode
    model = randomize(small()).double().eval()
    x = torch.randn(3, 13, 97, dtype=torch.float64)
    folded = model(x)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.Dropout):
            module.eval()
    model.tce.attention_drop = 0.0
    torch.testing.assert_close(model(x), folded, rtol=0, atol=1e-9)


def test_trials_do_not_see_each_other():
    model = randomize(small()).double().eval()
    x = torch.randn(3, 13, 97, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    model = randomize(small(drop_prob=0.0, graph_drop_prob=0.0, attention_drop_prob=0.0, tce_drop_prob=(0.0, 0.0)))
    model.train(training)
    x = 10 * torch.randn(8, 13, 97)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_compile(without_shape_checks):
    model = randomize(small()).eval()
    x = torch.randn(2, 13, 97)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


def test_export_with_any_batch(tmp_path):
    model = randomize(small()).eval()
    exported = torch.export.export(model, (torch.randn(2, 13, 97),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, tmp_path / "model.pt2")
    x = torch.randn(5, 13, 97)
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    model = randomize(small()).eval()
    x = torch.randn(4, 13, 97)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    model.train()(x.cuda()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
