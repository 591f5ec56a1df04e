"""L-TDNN, LAP and the filter-bank network: contracts, front ends, padding, checkpoints."""

from pathlib import Path

import jaxtyping
import pytest
import torch
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

from nearfar.audio.frontends import KaldiFbank, SelfSupervised
from nearfar.audio.ltdnn import ECAPA, LAP, LTDNN, SpeakerEncoder, build_contract, cut_spans
from nearfar.core.contracts import Contract, relative_errors
from nearfar.core.errors import CheckpointError, UserError

CONTRACTS = sorted((Path(__file__).parents[1] / "contracts").glob("l-tdnn--*.json"))
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


def published_checkpoint(path, head, backbone=None, classes=3):
    """A training checkpoint in the published layout: every name spelt out by hand where it differs from ours."""
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
        names["module.encoder." + new] = value
    names["module.aam_softmax.weight"] = torch.randn(1, 6, classes)
    names["module.span_mask_kernel"] = torch.ones(1, 1, 3)
    if backbone is not None:
        names |= {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"model_state": names, "val_threshold": 0.3, "epoch": 2}, path)
    return path


@pytest.mark.parametrize("path", CONTRACTS, ids=[path.stem.split("--")[1] for path in CONTRACTS])
def test_computes_what_the_published_code_computes(path):
    contract = Contract.load(path)
    with torch.no_grad():
        outputs = build_contract(contract)(*contract.input_tensors())
    for name, error in relative_errors(contract, outputs).items():
        assert error < 1e-5, (name, error)


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


def test_normalisation_follows_the_preprocessor_of_the_backbone(tmp_path):
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
