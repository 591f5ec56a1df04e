"""L-TDNN, LAP and the filter-bank network: contracts, front ends, padding, checkpoints."""

from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import nn
from torchaudio.compliance.kaldi import fbank
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from nearfar.audio.contracts.ltdnn import build_contract
from nearfar.audio.speakers.frontends import KaldiFbank, SelfSupervised
from nearfar.audio.speakers.ltdnn import ECAPA, LAP, LTDNN, SpeakerEncoder, cut_spans
from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError, UserError

CONTRACTS = shipped("l-tdnn")
KINDS = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "hubert": (HubertConfig, HubertModel),
    "wavlm": (WavLMConfig, WavLMModel),
}


@pytest.fixture
def without_shape_checks():
    """torch.compile cannot trace the run-time checks of shapes, which production does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tiny_backbone(kind="wavlm", large=False, layers=3, seed=0):
    """A backbone of the published architecture, base (post-norm, group norm) or large (pre-norm, layer norm), tiny."""
    torch.manual_seed(seed)
    config, model = KINDS[kind]
    return model(
        config(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            do_stable_layer_norm=large,
            feat_extract_norm="layer" if large else "group",
            conv_bias=large,
        )
    ).eval()


def tiny_head(num_states=4, **options):
    return LTDNN(16, num_states, conv_dim=16, layer_pool_dim=16, layer_pool_heads=4, embedding_dim=6, **options)


def saved_backbone(folder, do_normalize=True, **options):
    tiny_backbone(**options).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True).save_pretrained(folder)
    return folder


def published_head(head):
    """The head's state in the published layout: every name spelt out by hand where it differs from ours."""
    names = {}
    for name, value in head.state_dict().items():
        new = name
        for ours, theirs in (
            ("net.norm_in.", "net.in_conv.0."),
            ("net.conv_in.conv.", "net.in_conv.1.conv."),
            ("net.conv_in.norm.", "net.in_conv.1.bn."),
            ("net.fusion.", "net.fusion.0."),
            ("layer_pool.gate.w", "l_pool.W"),
            ("layer_pool.gate.b", "l_pool.b"),
            ("layer_pool.norm_in.", "l_pool.in_projection.0."),
            ("layer_pool.proj_in.", "l_pool.in_projection.1."),
            ("layer_pool.proj_out.", "l_pool.out_projection.0."),
            ("layer_pool.norm_out.", "l_pool.out_projection.1."),
            ("time_pool.reduce.", "t_pool.attention.0."),
            ("time_pool.attention_norm.", "t_pool.attention.2."),
            ("time_pool.expand.", "t_pool.attention.3."),
            ("time_pool.norm.", "t_pool.attn_norm."),
            ("time_pool.linear.", "t_pool.out_proj."),
            ("time_pool.out_norm.", "t_pool.out_norm."),
        ):
            if name.startswith(ours):
                new = theirs + name.removeprefix(ours)
        if name.startswith("net.blocks."):
            _, _, number, part, *rest = name.split(".")
            if part == "stages":
                new = ".".join(["net.se_d2blocks", number, "layers", *rest])
            elif part == "se" and head.settings["form"] == "d3net":
                new = f"net.se_d2blocks.{number}.se.se_attention.{ {'reduce': 1, 'expand': 3}[rest[0]] }.{rest[1]}"
            else:
                block = f"net.block{int(number) + 1}.se_res2block"
                new = {
                    "conv_in": f"{block}.0.",
                    "convs": f"{block}.1.convs.",
                    "conv_out": f"{block}.2.",
                    "se": f"{block}.3.se_attention.",
                }[part]
                rest = [{"reduce": "1", "expand": "3"}.get(word, word) if part == "se" else word for word in rest]
                new += ".".join(rest)
            new = new.replace(".norm.", ".bn.")
            if "se_attention" in new and new.endswith("weight"):
                value = value[:, :, None, None]
        names["encoder." + new] = value
    return names


def published_checkpoint(path, head, backbone=None, classes=3):
    """A training checkpoint in the published layout."""
    names = {f"module.{name}": value for name, value in published_head(head).items()}
    names["module.aam_softmax.weight"] = torch.randn(1, 6, classes)
    names["module.span_mask_kernel"] = torch.ones(1, 1, 3)
    if backbone is not None:
        names |= {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"model_state": names, "val_threshold": 0.3, "epoch": 2}, path)
    return path


def contract_of(variant, state, settings, **inputs):
    """A contract that gives the tensors of `state` values by their names and shapes."""
    tensors = [{"name": name, "shape": list(t.shape), "kind": "parameter"} for name, t in state.items()]
    given = [{"name": name, "shape": shape, "dist": "normal"} for name, shape in inputs.items()]
    content = {"system": "l-tdnn", "variant": variant, "settings": settings, "state": tensors, "inputs": given}
    return Contract(Path(), content | {"outputs": []})


OTHER_SIZES = [
    {"form": "ecapa", "hidden_size": 20, "num_states": 25, "conv_dim": 24, "scale": 4, "kernel_size": (3, 5),
     "num_blocks": 2, "dilations": (1, 3), "se_channels": 6, "layer_pool_heads": 2, "embedding_dim": 10},
    {"form": "ecapa", "hidden_size": 32, "num_states": 4, "conv_dim": 16, "num_blocks": 4, "layer_pool_heads": 8},
    {"form": "d3net", "hidden_size": 20, "num_states": 7, "conv_dim": 18, "depth": 3, "kernel_size": (3, 3),
     "num_blocks": 2, "se_channels": 9, "layer_pool_heads": 1, "attention_dim": 5},
    {"form": "d3net", "hidden_size": 12, "num_states": 2, "conv_dim": 8, "num_blocks": 1},
]  # fmt: skip


@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=lambda s: f"{s['form']}-{s['num_states']}-states")
@torch.no_grad()
def test_contracts_of_other_sizes_are_built_from_their_shapes(sizes):
    """Other backbones, fewer layers, other settings: nothing but names, shapes and a few settings is given."""
    head = LTDNN(**{"layer_pool_dim": 16, **sizes}).eval()
    state = published_head(head)
    shape = [2, sizes["num_states"], 9, sizes["hidden_size"]]
    usual = (2, 3, 4, 5) if sizes["form"] == "ecapa" else [1, 2, 4, 8][: sizes.get("depth", 4)]
    contract = contract_of("other", state, {"dilations": sizes.get("dilations", usual)}, hidden_states=shape)
    (states,) = contract.input_tensors()
    outputs = build_contract(contract)(states)
    names = dict(zip(state, head.state_dict()))
    head.load_state_dict(  # the same values under our own names; squeeze-and-excites hold matrices
        {names[k]: v.reshape(head.state_dict()[names[k]].shape) for k, v in contract.state().items()}
    )
    torch.testing.assert_close(outputs["embedding"], head(states))
    torch.testing.assert_close(outputs["unit"].norm(dim=1), torch.ones(2))

    def operator(variant, prefix, settings, module, *x_shape, new=""):
        part = {new + name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        contract = contract_of(f"op-{variant}", part, settings, x=list(x_shape))
        (x,) = contract.input_tensors()
        ours = zip(module.state_dict().items(), contract.state().values())
        module.load_state_dict({name: value.reshape(old.shape) for (name, old), value in ours})
        return build_contract(contract)(x), module(x)

    block, blocks = head.net.blocks[0], len(head.net.blocks)
    if sizes["form"] == "ecapa":
        settings = {"dilation": sizes.get("dilations", (2,))[0]}
        got, want = operator(
            "se-res2-block-2d", "encoder.net.block1.", settings, block, 1, head.settings["conv_dim"], 5, 8
        )
    else:
        got, want = operator(
            "se-d2-block-2d", "encoder.net.se_d2blocks.0.", {}, block, 1, head.settings["conv_dim"], 5, 8
        )
    torch.testing.assert_close(got, want)
    pooled = blocks * head.settings["conv_dim"]
    got, want = operator("layer-attention-pool", "encoder.l_pool.", {}, head.layer_pool, 1, pooled, shape[1], 6)
    torch.testing.assert_close(got, want)
    settings = {"valid_frames": [7, 4]}
    got, want = operator("attentive-stats-pool", "encoder.t_pool.", settings, head.time_pool, 2, 16, 7, new="pool.")
    torch.testing.assert_close(got["no_mask"], want)
    assert list(got) == ["no_mask", "mask_7_4"]


def test_contracts_of_scores_follow_their_settings():
    settings = {"mean_subtraction": False, "top_n": 3, "std": "sample (ddof 1)"}
    contract = contract_of("op-score-norm", {}, settings, enrol=[4, 6], test=[5, 6], cohort=[9, 6])
    enroll, test, cohort = (nn.functional.normalize(x.double(), dim=1) for x in contract.input_tensors())
    found = build_contract(contract)(*contract.input_tensors())
    cosine = enroll @ test.T
    top = [(x @ cohort.T).sort(1).values[:, -3:] for x in (enroll, test)]
    e, t = ((x.mean(1), x.std(1)) for x in top)
    want = 0.5 * ((cosine - e[0][:, None]) / e[1][:, None] + (cosine - t[0]) / t[1])
    torch.testing.assert_close(found["asnorm_top3"].double(), want, rtol=1e-5, atol=1e-5)
    settings = {"embedding_dim": 5, "classes": 4, "heads": 3, "margin": 0.3, "scale": 20, "labels": [3, 0]}
    contract = contract_of("op-aam-softmax", {"aam_softmax.weight": torch.empty(3, 5, 4)}, settings, embedding=[2, 5])
    (embedding,) = contract.input_tensors()
    found = build_contract(contract)(embedding)
    centers = nn.functional.normalize(contract.state()["aam_softmax.weight"], dim=1)
    cosine = torch.einsum("be,hec->bhc", nn.functional.normalize(embedding, dim=1), centers).amax(1)
    logits = 20 * cosine
    for row, label in enumerate(settings["labels"]):
        logits[row, label] = 20 * torch.cos(torch.arccos(cosine[row, label]) + 0.3)
    torch.testing.assert_close(found["probability"], logits.softmax(1))


@pytest.mark.parametrize(("form", "count"), [("ecapa", 5_717_272), ("d3net", 6_481_336)])
def test_parameter_counts_of_the_published_forms(form, count):
    assert sum(p.numel() for p in LTDNN(768, 13, form).parameters()) == count


@pytest.mark.parametrize("form", ["ecapa", "d3net"])
@pytest.mark.parametrize(("kind", "large"), [("wav2vec2", True), ("hubert", False), ("wavlm", False), ("wavlm", True)])
def test_padded_utterances_get_the_embedding_they_have_alone(kind, large, form):
    model = SpeakerEncoder(SelfSupervised(tiny_backbone(kind, large), normalize=True), tiny_head(form=form)).eval()
    waveforms, lengths = torch.randn(3, 6000), torch.tensor([6000, 3210, 900])
    with torch.no_grad():
        batch = model(waveforms, lengths)
        for i, n in enumerate(lengths.tolist()):
            alone = model(waveforms[i : i + 1, :n])
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [LAP(16, 4, 4, 16, 6), LAP(16, 4, 1, 16, 6)], ids=["heads", "one head"])
def test_lap_reads_every_layer_and_ignores_padding(head):
    head.eval()
    states = torch.randn(2, 4, 9, 16)
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    torch.testing.assert_close(head(states, mask)[1:], head(states[1:, :, :5]), rtol=1e-4, atol=1e-6)
    states.requires_grad_()
    head(states).sum().backward()
    assert (states.grad.abs().sum((0, 2, 3)) > 0).all()


def test_filter_banks_equal_kaldis():
    for rate in (8000, 16000):
        waveforms, lengths = torch.rand(2, rate) - 0.5, torch.tensor([rate, rate // 2 + 77])
        features, mask = KaldiFbank(40, rate)(waveforms, lengths)
        for i, n in enumerate(lengths.tolist()):
            want = fbank(waveforms[i : i + 1, :n] * 32768, num_mel_bins=40, sample_frequency=rate, subtract_mean=True)
            assert mask[i].sum() == len(want)
            torch.testing.assert_close(features[i, : len(want)], want, rtol=1e-3, atol=2e-3)


def test_filter_bank_model_needs_no_backbone_and_ignores_padding():
    model = SpeakerEncoder(KaldiFbank(24, 8000), ECAPA(24, 16, 6)).eval()
    waveforms, lengths = torch.randn(2, 8000), torch.tensor([8000, 2500])
    batch = model(waveforms, lengths)
    torch.testing.assert_close(batch[1:], model(waveforms[1:, :2500]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_first_layers_give_the_states_of_the_whole_backbone(large):
    whole = SelfSupervised(tiny_backbone(large=large), normalize=False)
    first = SelfSupervised(tiny_backbone(large=large), normalize=False, num_layers=2)
    waveforms = torch.randn(2, 3000)
    states, _ = whole(waveforms)
    assert states.shape[1] == 4
    assert len(first.backbone.encoder.layers) == 2  # the third layer is gone, so it cannot be computed
    torch.testing.assert_close(first(waveforms)[0], states[:, :3])
    # of a pre-norm model only the very last state has the final norm
    last = whole.backbone(waveforms).last_hidden_state
    torch.testing.assert_close(states[:, -1], last)


def test_normalization_follows_the_preprocessor_of_the_backbone(tmp_path):
    waveforms = 0.1 * torch.randn(1, 3000) + 0.05
    on = SelfSupervised.from_pretrained(saved_backbone(tmp_path / "on", do_normalize=True))
    off = SelfSupervised.from_pretrained(saved_backbone(tmp_path / "off", do_normalize=False))
    assert (on.normalize, off.normalize) == (True, False)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "on")
    values = extractor(waveforms[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
    torch.testing.assert_close(on(waveforms)[0], off(values)[0], rtol=1e-3, atol=1e-4)
    assert SelfSupervised.from_pretrained(tmp_path / "on", normalize=False).normalize is False
    (tmp_path / "on" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config"):
        SelfSupervised.from_pretrained(tmp_path / "on")
    with pytest.raises(UserError, match="nowhere"):
        SelfSupervised.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(("tuned", "expected"), [(0, set()), (1, {2}), ("all", {0, 1, 2})])
def test_tuning_frees_the_layers_it_names(tuned, expected):
    model = SpeakerEncoder(SelfSupervised(tiny_backbone(), normalize=False), tiny_head())
    model.frontend.tune(tuned)
    model.train()
    model(torch.randn(2, 4000)).square().sum().backward()
    layers = model.frontend.backbone.encoder.layers
    got = {i for i, layer in enumerate(layers) if any(p.grad is not None for p in layer.parameters())}
    assert got == expected
    assert {i for i, layer in enumerate(layers) if layer.training} == expected
    assert (model.frontend.backbone.feature_projection.projection.weight.grad is not None) == (tuned == "all")
    assert model.head.net.conv_in.conv.weight.grad is not None


def test_save_and_load(tmp_path):
    for name, model in {
        "ssl": SpeakerEncoder(SelfSupervised(tiny_backbone(large=True), normalize=True, num_layers=2), tiny_head(3)),
        "fbank": SpeakerEncoder(KaldiFbank(24, 8000), ECAPA(24, 16, 6)),
        "lap": SpeakerEncoder(SelfSupervised(tiny_backbone("hubert"), normalize=False), LAP(16, 4, 4, 16, 6)),
    }.items():
        model.eval().save_pretrained(tmp_path / name)
        again = SpeakerEncoder.from_pretrained(tmp_path / name)
        waveforms = torch.randn(1, 4000)
        assert torch.equal(model(waveforms), again(waveforms))
        assert (again.sample_rate, again.embedding_dim) == (model.sample_rate, 6)
    (tmp_path / "lap" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no speaker model"):
        SpeakerEncoder.from_pretrained(tmp_path / "lap")


@pytest.mark.parametrize("form", ["ecapa", "d3net"])
def test_published_checkpoints_load_whatever_their_form(tmp_path, form):
    head, backbone = tiny_head(form=form).eval(), tiny_backbone(seed=5)
    path = published_checkpoint(tmp_path / "model.pt", head, backbone)
    model = SpeakerEncoder.from_published(path, SelfSupervised(tiny_backbone(seed=6), normalize=False))
    waveforms = torch.randn(1, 4000)
    want = SpeakerEncoder(SelfSupervised(backbone, normalize=False), head).eval()(waveforms)
    torch.testing.assert_close(model(waveforms), want)
    assert model.head.net.blocks[0].__class__.__name__ == {"ecapa": "SERes2Block", "d3net": "SED2Block"}[form]


def test_published_checkpoint_of_the_first_layers_drops_those_above(tmp_path):
    head, backbone = tiny_head(3).eval(), tiny_backbone(large=True, seed=5)
    path = published_checkpoint(tmp_path / "model.pt", head, backbone)
    frontend = SelfSupervised(tiny_backbone(large=True, seed=6), normalize=False, num_layers=2)
    model = SpeakerEncoder.from_published(path, frontend)
    torch.testing.assert_close(
        model.frontend.backbone.encoder.layers[1].final_layer_norm.weight,
        backbone.encoder.layers[1].final_layer_norm.weight,
    )
    assert len(model.frontend.backbone.encoder.layers) == 2


def test_mismatches_are_refused_by_name(tmp_path):
    path = published_checkpoint(tmp_path / "model.pt", tiny_head(4).eval())
    frontend = SelfSupervised(tiny_backbone(layers=5), normalize=False)
    with pytest.raises(CheckpointError, match="6 hidden states of 16, the head needs 4 of 16"):
        SpeakerEncoder.from_published(path, frontend)
    state = torch.load(path)["model_state"]
    mixed = state | {"module.encoder.l_pool.W2": torch.randn(4, 2, 7)}
    with pytest.raises(CheckpointError, match="disagree"):
        LTDNN.from_published(mixed)
    del state["module.encoder.t_pool.attn_norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing time_pool\.norm\.weight"):
        LTDNN.from_published(state)
    with pytest.raises(CheckpointError, match="no checkpoint of an L-TDNN"):
        LTDNN.from_published({"encoder.weight": torch.ones(2)})


def test_wrong_inputs_are_refused():
    frontend = SelfSupervised(tiny_backbone(), normalize=False)
    assert frontend.min_samples == 400
    with pytest.raises(ValueError, match="too short"):
        frontend(torch.randn(1, 399))
    with pytest.raises(ValueError, match="too short"):
        frontend(torch.randn(2, 800), torch.tensor([800, 300]))
    with pytest.raises(ValueError, match="lengths must be"):
        frontend(torch.randn(2, 800), torch.tensor([800, 900]))
    with pytest.raises(ValueError, match="num_layers must be 1 to 3"):
        SelfSupervised(tiny_backbone(), normalize=False, num_layers=4)
    with pytest.raises(ValueError, match="hidden states"):
        tiny_head()(torch.randn(1, 5, 9, 16))
    with pytest.raises(ValueError, match="the backbone gives 4"):
        SpeakerEncoder(frontend, tiny_head(3))
    with pytest.raises(ValueError, match="SelfSupervised"):
        SpeakerEncoder(KaldiFbank(), tiny_head())
    with pytest.raises(ValueError, match="filter"):
        KaldiFbank(200, 8000)
    with pytest.raises(ValueError, match="form"):
        tiny_head(form="resnet")
    with pytest.raises(ValueError, match="multiple"):
        LAP(16, 4, 3)


def test_spans_are_cut_out_and_the_gap_closed():
    torch.manual_seed(3)
    states = torch.arange(200.0).view(1, 1, 200, 1).expand(40, 2, 200, 3)
    cut, mask = cut_spans(states, item_prob=1.0)
    share = 1 - mask.sum().item() / (40 * 200)
    assert 0.1 < share < 0.2  # 1 - 0.95^3 = 14 %
    for item, valid in zip(cut[:, 0, :, 0], mask):
        kept = item[valid]
        assert (kept.diff() > 0).all()  # in order, none twice
        gaps = kept.diff()[kept.diff() > 1] - 1
        assert (gaps >= 3).all()
    same, mask = cut_spans(states, item_prob=0.0)
    assert torch.equal(same, states)
    assert mask.all()


def test_trains_with_cut_spans_and_gradient_reaches_everything():
    model = SpeakerEncoder(SelfSupervised(tiny_backbone(), normalize=False), tiny_head(), span_out=True).train()
    model(torch.randn(4, 8000)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.head.parameters())


def test_autocast_and_compile(without_shape_checks):
    head = tiny_head().eval()
    states = torch.randn(1, 4, 9, 16)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="eager")(states), head(states))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(head(states)).all()


def altered(name, variant, settings=(), **changes):
    """A shipped contract under another name, with other settings."""
    contract = Contract.load(next(path for path in CONTRACTS if path.stem == f"l-tdnn--{name}"))
    settings = contract.content["settings"] | dict(settings)
    return replace(contract, content=contract.content | {"variant": variant, "settings": settings} | changes)


def test_contracts_of_other_priors_and_norms():
    shipped = altered("op-eer-mindcf", "op-eer-mindcf")
    outputs = [{"name": f"out.min_dcf_{kind}_p{p}", "shape": []} for kind in ("norm", "raw") for p in ("005", "01")]
    contract = altered("op-eer-mindcf", "op-eer-mindcf-p005", outputs=outputs)
    found = build_contract(contract)(*contract.input_tensors())
    assert found["min_dcf_norm_p01"] == build_contract(shipped)(*shipped.input_tensors())["min_dcf_norm_p01"]
    assert found["min_dcf_raw_p005"] == pytest.approx(0.005 * found["min_dcf_norm_p005"])
    contract = altered("op-score-norm", "op-score-norm-top5", {"top_n": 5, "mean_subtraction": False})
    enrol, test, cohort, _mean = (t.double() for t in contract.input_tensors())
    found = build_contract(contract)(enrol, test, cohort, _mean)
    cosine = nn.functional.normalize(enrol) @ nn.functional.normalize(test).T
    torch.testing.assert_close(found["cosine"], cosine)
    assert found["asnorm_top5"].shape == cosine.shape


def test_contracts_of_other_dilations_are_refused():
    with pytest.raises(UserError, match=r"dilations is \[1, 1, 1, 1\]"):
        build_contract(altered("op-se-d2-block-2d", "op-se-d2-block-2d", {"dilations": [1, 1, 1, 1]}))
