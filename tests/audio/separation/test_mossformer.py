"""MossFormer and MossFormer2: published numbers, layouts and sizes; unequal lengths, streams, memory."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch

from nearfar.audio.checkpoints import load_published, load_separator
from nearfar.audio.contracts.mossformer import build_contract
from nearfar.audio.separation.mossformer import (
    VARIANTS,
    MossFormer,
    MossFormer2,
    create_model,
    detect,
    published_state,
)
from nearfar.audio.speakers.ltdnn import LTDNN
from nearfar.core.checkpoints import load_state_dict, save_state_dict
from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError, UserError

CONTRACTS = shipped("mossformer")
SMALL = {"num_filters": 24, "dim": 16, "depth": 2, "group_size": 32, "query_key_dim": 8, "dropout": 0.0}
RECURRENT = {"inner": 12, "order": 5}


def small(cls=MossFormer, **settings):
    torch.manual_seed(0)
    extra = RECURRENT if cls is MossFormer2 else {}
    model = cls(**{**SMALL, **extra, **settings}).eval()
    with torch.no_grad():  # let the local branch speak: it is silent at initialization
        for block in model.blocks:
            block.gamma.mul_(20)
    return model


@pytest.mark.parametrize(
    ("name", "speakers", "millions"),
    [
        ("mossformer-s", 2, 10.81),
        ("mossformer-m", 2, 25.30),
        ("mossformer-l", 2, 42.10),
        ("mossformer2", 2, 55.74),
        ("mossformer2", 3, 56.00),
    ],
)
def test_parameter_counts(name, speakers, millions):
    with torch.device("meta"):
        model = create_model(name, num_speakers=speakers)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


# ------------------------------------------------------------------------------------------------------- checkpoints


def clearervoice(model):
    """Our state under the names and shapes of the ClearerVoice release, written down independently of the reader."""
    out = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("blocks", "recurrent"):
            place = "layers" if parts[0] == "blocks" else "fsmn"
            head, rest = f"mask_net.mdl.intra_mdl.mossformerM.{place}.{parts[1]}.", ".".join(parts[2:])
            if parts[0] == "recurrent":
                whole = {
                    "reduce": "conv1.0",
                    "prelu": "conv1.1",
                    "norm_in": "norm1",
                    "norm_out": "norm2",
                    "expand": "conv2",
                }
                if parts[2] in whole:
                    rest = f"{whole[parts[2]]}.{parts[3]}"
                if parts[2] in ("u", "v"):
                    rest = ".".join([f"gated_fsmn.to_{parts[2]}.mdl", *parts[3:]])
                if parts[2] == "fsmn":
                    rest = "gated_fsmn." + rest
                    for kind, theirs in (("convs", "conv"), ("norms", "norm"), ("slopes", "prelu")):
                        if f"memory.{kind}." in rest:
                            number = int(rest.split(f"{kind}.")[1].split(".")[0])
                            leaf = rest.split(".")[-1] if kind == "norms" else "weight"
                            rest = f"gated_fsmn.fsmn.conv.{theirs}{number + 1}.{leaf}"
                if rest in ("conv1.0.weight", "conv2.weight") or ".conv.conv" in rest:
                    value = value.unsqueeze(-1)
            rest = rest.replace("to_hidden.", "to_hidden.mdl.").replace("to_qk.", "to_qk.mdl.")
            rest = rest.replace("to_out.", "to_out.mdl.")
            rest = rest.replace("mdl.norm.", "mdl.0.").replace("mdl.linear.", "mdl.1.")
            if rest.endswith("mdl.depthwise"):
                rest, value = rest.replace("depthwise", "3.sequential.1.conv.weight"), value.unsqueeze(1)
            if rest in ("gamma", "beta"):
                rest = "qk_offset_scale." + rest
            out[head + rest] = value
            continue
        theirs = {
            "encoder.weight": "enc.conv1d.weight",
            "decoder.weight": "dec.weight",
            "position_scale": "mask_net.pos_enc.scale",
            "norm": "mask_net.norm",
            "input_proj": "mask_net.conv1d_encoder",
            "block_norm": "mask_net.mdl.intra_mdl.norm",
            "outer_norm": "mask_net.mdl.intra_norm",
            "prelu": "mask_net.prelu",
            "speaker_proj": "mask_net.conv1d_out",
            "output": "mask_net.output.0",
            "output_gate": "mask_net.output_gate.0",
            "mask_proj": "mask_net.conv1_decoder",
        }
        new = theirs.get(name) or f"{theirs[parts[0]]}.{parts[-1]}"
        if name == "encoder.weight":
            value = value.unsqueeze(1)
        elif name == "decoder.weight":
            value = value.mT.unsqueeze(1)
        elif parts[0] in ("input_proj", "speaker_proj", "output", "output_gate", "mask_proj") and parts[-1] == "weight":
            value = value.unsqueeze(-1)
        out[new] = value
    for i in range(len(model.blocks)):
        out[f"mask_net.mdl.intra_mdl.mossformerM.layers.{i}.rotary_pos_emb.freqs"] = 10000.0 ** (-torch.arange(16) / 16)
    half = model.dim // 2
    out["mask_net.pos_enc.inv_freq"] = 10000.0 ** (-torch.arange(half) / half)
    return out


def hub_v1(state):
    out = {}
    for name, value in state.items():
        name = name.replace("enc.conv1d", "encoder.conv1d").replace("mdl.intra_mdl.norm.", "mdl.att_mdl.norm.norm.")
        name = name.replace("dec.weight", "decoder.weight")
        out[name.replace("intra_mdl", "att_mdl").replace("intra_norm", "att_norm")] = value
    return out


def standalone(state):
    out = {}
    for name, value in state.items():
        name = name.replace("enc.conv1d", "encoder.conv1d").replace("dec.weight", "decoder.weight")
        name = name.replace("mdl.intra_mdl.norm.", "dual_mdl.0.intra_mdl.mdl.norm.norm.")
        name = name.replace("mdl.intra_mdl.mossformerM.", "dual_mdl.0.intra_mdl.mdl.flashT.")
        name = name.replace("mdl.intra_norm.", "dual_mdl.0.intra_norm.") if ".mdl.intra_norm" in name else name
        out[name.replace("mask_net.", "masknet.")] = value
    return out


LAYOUTS = {
    "hub": lambda state: state,
    "clearervoice": lambda state: {"model." + name: value for name, value in state.items()},
    "standalone": standalone,
    "hub-v1": hub_v1,
}


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_whole(cls, layout):
    model = small(cls, num_speakers=3)
    state = LAYOUTS[layout](clearervoice(model))
    back = cls.from_published(state, sample_rate=16000, group_size=32, dropout=0.0)
    mix = torch.randn(1, 500)
    assert type(back) is cls
    assert back.sample_rate == 16000
    torch.testing.assert_close(back(mix), model(mix), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [*LAYOUTS, "hub-v1-files"])
@pytest.mark.parametrize(
    ("cls", "settings", "said", "shape"),
    [
        (MossFormer, {"num_filters": 20, "dim": 24, "group_size": 16}, {}, (1, 700, 2)),
        (MossFormer, {"num_speakers": 3, "query_key_dim": 40, "expansion_factor": 2.0}, {"masking": True}, (2, 3, 333)),
        (MossFormer, {"causal": "attention", "group_size": 24}, {"causal": True}, (1, 500, 2)),
        (MossFormer2, {"num_speakers": 3, "depth": 1, "masking": False}, {"masking": False}, None),
        (MossFormer2, {"masking": False, "inner": 8, "fsmn_depth": 3}, {"output": "mapping"}, None),
        (MossFormer2, {"kernel_size": 8, "dim": 10}, {"skip_mask": False}, None),
    ],
)
def test_contracts_of_any_size_and_layout_build_their_model(layout, cls, settings, said, shape):
    extra = {"num_speakers": 2, "masking": True} | settings
    model = small(cls, **extra)
    if layout == "hub-v1-files":
        state = hub_v1(clearervoice(model))
        state = {re.sub("^(encoder|decoder|mask_net)[.]", "", name): value for name, value in state.items()}
    else:
        state = LAYOUTS[layout](clearervoice(model))
    tables = ("freqs", "inv_freq")
    content = {
        "system": "mossformer",
        "variant": "probe",
        "settings": {"group_size": extra.get("group_size", 32), "mask_activation": "ReLU", **said},
        "state": [
            {"name": name, "shape": list(value.shape), "kind": "constant" if name.endswith(tables) else "parameter"}
            for name, value in state.items()
        ],
        "inputs": [],
        "outputs": [{"name": f"out.{k}"} for k in range(3)]
        if shape is None
        else [{"name": "out", "shape": list(shape)}],
    }
    contract = Contract(Path("probe.json"), content)
    load_state_dict(model, published_state(contract.state()))
    batch, samples = (1, 400) if shape is None else (shape[0], max(shape))
    mix = torch.randn(batch, samples)
    with torch.no_grad():
        found, expected = build_contract(contract)(mix), model(mix)
    if shape is None:
        found = torch.stack(found, dim=1)
    elif shape[1] == samples:
        found = found.mT
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_a_foreign_and_a_wrong_tensor_are_all_listed(layout):
    state = LAYOUTS[layout](clearervoice(small(MossFormer2)))
    prelu = next(name for name in state if name.endswith(("masknet.prelu.weight", "mask_net.prelu.weight")))
    prefix = prelu.removesuffix("prelu.weight")
    del state[prelu]
    state[prefix + "surplus.weight"] = torch.zeros(2)
    state[prefix + "output.0.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"3 of its tensors differ") as info:
        MossFormer.from_published(state, sample_rate=8000)
    assert all(word in str(info.value) for word in ("missing prelu.weight", "unexpected surplus", "output.bias"))


def test_a_stored_table_that_differs_is_refused():
    state = clearervoice(small())
    state["mask_net.pos_enc.inv_freq"] = state["mask_net.pos_enc.inv_freq"] * 2
    with pytest.raises(CheckpointError, match="inv_freq"):
        MossFormer.from_published(state)


def test_folders_are_read_as_they_are_downloaded(tmp_path):
    model = small()
    state = hub_v1(clearervoice(model))
    v1 = tmp_path / "v1"
    v1.mkdir()
    for part, prefix in (("encoder", "encoder."), ("decoder", "decoder."), ("masknet", "mask_net.")):
        content = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        torch.save(content, v1 / f"{part}.bin")
    clear = tmp_path / "clear"
    clear.mkdir()
    content = {"module.model." + name: value for name, value in clearervoice(model).items()}
    torch.save({"model": content, "epoch": 3}, clear / "weights.pt")
    (clear / "last_best_checkpoint").write_text("weights.pt\n")
    mix = torch.randn(1, 300)
    for folder in (v1, clear):
        back = MossFormer.from_published(folder, sample_rate=8000, group_size=32, dropout=0.0)
        torch.testing.assert_close(back(mix), model(mix), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="found none"):
        MossFormer.from_published(tmp_path)


def test_what_names_and_shapes_do_not_show_must_be_said(tmp_path):
    state = clearervoice(small())
    with pytest.raises(UserError, match="sample_rate=8000 or sample_rate=16000"):
        MossFormer.from_published(LAYOUTS["clearervoice"](state))
    path = tmp_path / "mossformer2-whamr-2spk.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match="masking=False"):
        MossFormer.from_published(path)
    assert MossFormer.from_published(path, masking=False).masking is False
    with pytest.raises(CheckpointError, match="not of MossFormer2"):
        MossFormer2.from_published(state)
    with pytest.raises(CheckpointError, match="no weights of a MossFormer"):
        MossFormer.from_published({"other.weight": torch.zeros(3)})


def test_detection_gives_back_the_constructor_arguments():
    model = small(MossFormer2, num_speakers=3, query_key_dim=6, order=4, fsmn_depth=3, hidden=7)
    cls, kwargs = detect(published_state(clearervoice(model)))
    assert cls is MossFormer2
    expected = {"num_speakers": 3, "dim": 16, "depth": 2, "query_key_dim": 6, "order": 4, "fsmn_depth": 3, "hidden": 7}
    assert {key: kwargs[key] for key in expected} == expected


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_save_and_load(cls, tmp_path):
    model = small(cls)
    model.save_pretrained(tmp_path / "model")
    back = cls.from_pretrained(tmp_path / "model").eval()
    mix = torch.randn(1, 400)
    torch.testing.assert_close(back(mix), model(mix), rtol=0, atol=0)
    save_state_dict(model, tmp_path / "state.safetensors")


# --------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
@pytest.mark.parametrize("samples", [16, 17, 23, 24, 333])
def test_any_length_from_one_frame_on(cls, samples):
    out = small(cls, num_speakers=3)(torch.randn(2, samples))
    assert out.shape == (2, 3, samples)
    assert out.isfinite().all()


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_a_padded_item_equals_the_item_alone(cls):
    model = small(cls).double()
    mix = torch.randn(3, 700, dtype=torch.float64)
    lengths = torch.tensor([700, 395, 16])
    mix = mix * (torch.arange(700) < lengths[:, None])
    with torch.no_grad():
        together = model(mix, lengths)
        for item, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(together[item, :, :length], model(mix[item : item + 1, :length])[0])
            assert (together[item, :, length:] == 0).all()
        assert (model(mix)[1, :, :395] - together[1, :, :395]).abs().max() > 1e-3  # what a batch without mask does


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
@pytest.mark.parametrize("gain", [0.1, 30.0])
def test_the_output_scales_with_the_input(cls, gain):
    model, mix = small(cls).double(), torch.randn(1, 400, dtype=torch.float64)
    scaled, expected = model(gain * mix), gain * model(mix)
    assert (scaled - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
@pytest.mark.parametrize("piece", [5, 64, 231])
def test_a_causal_stream_equals_the_whole(cls, piece):
    model = small(cls, causal=True).double()
    mix, state = torch.randn(2, 803, dtype=torch.float64), {}
    with torch.no_grad():
        starts = list(range(0, 803, piece))
        pieces = [model.stream(mix[:, a : a + piece], state, final=a == starts[-1]) for a in starts]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), model(mix), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_a_causal_model_sees_no_later_sample_and_its_state_does_not_grow(cls):
    model = small(cls, causal=True).double()
    mix = torch.randn(1, 600, dtype=torch.float64)
    changed = mix.clone()
    changed[:, 400:] += 1
    with torch.no_grad():
        moved = (model(changed) - model(mix)).abs().amax((0, 1)) > 1e-12
        assert not moved[: 400 - 15].any()
        assert moved[400:].any()
        sizes, state = [], {}
        for _ in range(8):
            model.stream(torch.randn(1, 256, dtype=torch.float64), state)
            tensors = [t for value in state.values() for t in _tensors(value)]
            sizes.append(sum(t.numel() for t in tensors))
    assert max(sizes[2:]) == sizes[2]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, tuple) else []


def test_a_short_stream_gives_as_many_samples_as_it_got():
    state = {}
    model = small(causal=True)
    assert model.stream(torch.zeros(1, 9), state).shape == (1, 2, 0)
    assert model.stream(torch.zeros(1, 3), state, final=True).shape == (1, 2, 12)


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_sweeping_in_pieces_gives_the_same_voices(cls):
    model, mix = small(cls).double(), torch.randn(2, 1500, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(mix, frames_at_once=64), model(mix))


def test_mapping_decodes_the_output_itself():
    model = small()
    mapping = small(masking=False)
    mapping.load_state_dict(model.state_dict())
    mix = torch.randn(1, 400)
    assert (mapping(mix) - model(mix)).abs().max() > 1e-3
    torch.testing.assert_close(mapping(3 * mix), mapping(mix), rtol=1e-3, atol=1e-5)  # no input level comes through


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_gradients_reach_every_parameter(cls):
    model = small(cls).train()
    model(torch.randn(2, 400)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_bfloat16_autocast_stays_close(cls):
    model, mix = small(cls), torch.randn(1, 800)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(mix).float()
    with torch.no_grad():
        full = model(mix)
    assert (low - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_compiles_without_a_graph_break(cls, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks are no part of the program
    model, mix = small(cls), torch.randn(1, 400)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(mix), model(mix))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MossFormer(num_speakers=0), "num_speakers"),
        (lambda: MossFormer(kernel_size=15), "kernel_size is 15"),
        (lambda: MossFormer(dim=15), "dim is 15"),
        (lambda: create_model("mossformer-xl"), "mossformer-s, mossformer-m"),
        (lambda: small()(torch.randn(1, 15)), "15 samples"),
        (lambda: small()(torch.randn(2, 50), torch.tensor([50, 9])), "9 samples"),
        (lambda: small().stream(torch.randn(1, 50), {}), "causal=True"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_every_named_size_has_its_class():
    assert [cls for cls, _ in VARIANTS.values()] == [MossFormer, MossFormer, MossFormer, MossFormer2]


def altered(name, **settings):
    """A shipped contract with other settings."""
    contract = Contract.load(next(path for path in CONTRACTS if path.stem == f"mossformer--{name}"))
    return replace(contract, content=contract.content | {"settings": contract.content["settings"] | settings})


def test_contracts_of_other_permutations():
    contract = altered(
        "op-si-snr-pit-3spk", estimate="target[..., [2, 0, 1]] * linspace(0.4, 1.2, 3) + 0.25 * noise + 0.1"
    )
    found = build_contract(contract)(*contract.input_tensors())
    assert found["target_index"].tolist() == [[2, 0, 1]] * 2
    shipped = altered("op-si-snr-pit-3spk")
    before = build_contract(shipped)(*shipped.input_tensors())
    assert before["target_index"].tolist() == [[1, 2, 0]] * 2
    assert (found["neg_si_snr"] < before["neg_si_snr"] - 5).all()


def test_settings_that_no_release_has_are_refused():
    for name, settings in (
        ("s-2spk", {"token_shift": False}),
        ("s-2spk", {"encoder_stride": 4}),
        ("op-dilated-dense-fsmn-depth3", {"dilations": [1, 3, 9]}),
        ("op-gated-fsmn-dim64", {"fsmn_dilations": [1, 3]}),
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            build_contract(altered(name, **settings))


@pytest.mark.parametrize("cls", [MossFormer, MossFormer2])
def test_a_released_checkpoint_is_identified_by_every_key(tmp_path, cls):
    """One class accounts for all of it; none is an error with the reason of each."""
    assert type(load_published(clearervoice(small(cls)), sample_rate=8000)) is cls
    head = LTDNN(16, 3, conv_dim=16, embedding_dim=4, layer_pool_heads=2, layer_pool_dim=8).eval()
    published = {re.sub(r"gate\.(w|b)", lambda m: m[1].replace("w", "W"), n): v for n, v in head.state_dict().items()}
    torch.save({f"encoder.{name}": value for name, value in published.items()}, tmp_path / "head.pt")
    assert type(load_published(tmp_path / "head.pt")) is LTDNN
    with pytest.raises(CheckpointError, match="weights of LTDNN, which separates no voices"):
        load_separator(tmp_path / "head.pt")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"is none of 3 known:\n"):
        load_separator(tmp_path / "other.pt")
