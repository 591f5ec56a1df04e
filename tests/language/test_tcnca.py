"""TCNCA and Mega: contracts, sizes, published layouts, the classifier."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from nearfar.core.contracts import Contract, fill, relative_errors, shipped
from nearfar.core.errors import CheckpointError, UserError
from nearfar.language.contracts.tcnca import build_contract
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.tcnca import VARIANTS, SequenceClassifier, create

SMALL = {"hidden_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize("path", shipped("tcnca"), ids=lambda path: path.stem.removeprefix("tcnca--"))
def test_contract(path):
    contract = Contract.load(path)
    with torch.no_grad():
        errors = relative_errors(contract, build_contract(contract)(*contract.input_tensors()))
    assert errors
    assert max(errors.values()) <= 1e-5, errors


def test_the_enwik8_model_has_the_published_size():
    with torch.device("meta"):
        assert create("mega-enwik8-base", vocab_size=208).num_parameters() == 39_137_792
        ours = create("tcnca-enwik8-base", vocab_size=208).num_parameters()
    assert abs(ours / 39_137_792 - 1) < 0.01


def small(name, **more):
    settings = VARIANTS[name]
    mixer = {**settings["mixers"][0], "attention_dim": 8, "value_dim": 24}
    mixer |= {"chunk": 8} if mixer.get("chunk") else {}
    return create(name, **SMALL, mixers=[mixer], state_mixer={**settings["state_mixer"], "hidden": 24}, **more)


def test_decoding_with_the_cache_over_chunk_boundaries():
    for name in ("mega-enwik8-base", "tcnca-enwik8-base"):
        model = small(name).double().eval()
        ids = torch.randint(256, (2, 37), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            whole, cache, parts = model(ids, use_cache=False).logits, None, []
            for piece in ids.split([11, *[1] * 10, 16], 1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


def published(model):
    """Our weights under the names of fairseq's checkpoints."""
    names = {".state_mixer.": ".nffn.", ".mixer.": ".mega_layer."}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (
            *names.items(),
            ("memory.", "move."),
            ("m_proj.", "mx_proj."),
            (".norm.", ".norm.norm."),
            ("attention.bias.bias", "rel_pos_bias.rel_pos_bias"),
            ("attention.bias.", "rel_pos_bias."),
        ):
            name = name.replace(ours, theirs)
        name = name.replace("model.norm.norm.", "final_norm.norm.").removeprefix("model.")
        if name.endswith((".delta", ".alpha", ".beta")) and "move." in name:
            value = value[..., None]
        if name.endswith("norm.norm.weight") and value.dim() == 0:
            name, value = name.replace("weight", "scalar"), value[None]
        if "embed_values" in name:
            name = name.replace("embed_values", "embed_tokens")
        elif value.numel() == 0:
            continue
        if name.startswith("classifier."):
            name = ".0.".join(name.rsplit(".", 1))
        state[name.replace("out.weight", "sentence_projection_layer.weight")] = value
    return state


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith("mega-") and "enwik8" not in n])
def test_arena_checkpoints_load(name):
    model = small(name).eval()
    state = {f"encoder.encoder.{n}": value for n, value in published(model).items()}
    mixer = VARIANTS[name]["mixers"][0]
    told = {n: mixer[n] for n in ("attention", "truncation", "prenorm") if n in mixer}
    again = SequenceClassifier.from_published(state, **told)
    ids = torch.rand(2, 30) if model.config.real_valued else torch.randint(1, 16, (2, 30))
    inputs = {"input_ids": ids, "attention_mask": torch.arange(30) < torch.tensor([[30], [17]])}
    if model.config.pairs:
        inputs |= {"second_ids": ids.flip(0)}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(CheckpointError, match="unexpected"):
        SequenceClassifier.from_published(state | {"encoder.encoder.layers.0.nffn.surprise": torch.zeros(2)}, **told)


def test_a_language_checkpoint_loads_through_the_family():
    model = small("mega-enwik8-base").eval()
    state = {f"decoder.{n}": value for n, value in published(model).items() if n != "lm_head.weight"}
    state |= {"decoder.version": torch.ones(1), "decoder.output_projection.weight": model.lm_head.weight}
    again = MixerForCausalLM.from_published(state, chunk=8)
    ids = torch.randint(256, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_transformers_old_layout_loads():
    """Its names are recalled: this holds that they map one to one."""
    state = published(small("mega-enwik8-base"))
    theirs = {}
    for name, value in state.items():
        for new, old in (
            ("move.delta", "ema_gate.damping_factor"),
            ("move.alpha", "ema_gate.decay_factor"),
            ("move.beta", "ema_gate.ema_expansion_matrix"),
            ("move.gamma", "ema_gate.kernel_projection_matrix"),
            ("move.omega", "ema_gate.residual_weight"),
            ("rel_pos_bias.beta", "rel_pos_bias.b_param"),
            ("mega_layer.gamma", "mega_layer.qk_weight"),
            ("mega_layer.beta", "mega_layer.qk_bias"),
        ):
            name = name.replace(new, old)
        theirs["lm_head.weight" if name == "lm_head.weight" else f"mega.{name}"] = value
    theirs["mega.embedding_layer.word_embeddings.weight"] = theirs.pop("mega.embed_tokens.weight")
    ids = torch.randint(256, (1, 20))
    with torch.no_grad():
        logits = [MixerForCausalLM.from_published(s, chunk=8)(ids).logits for s in (theirs, state)]
    torch.testing.assert_close(*logits)


def test_an_adaptive_softmax_is_refused():
    state = {f"decoder.{n}": value for n, value in published(small("mega-enwik8-base")).items()}
    state["decoder.adaptive_softmax.head.word_proj.weight"] = fill("x", (4, 16))
    with pytest.raises(CheckpointError, match="adaptive softmax"):
        MixerForCausalLM.from_published(state)


def test_padding_does_not_change_a_class():
    for name in ("mega-listops", "mega-image"):
        model = small(name).double().eval()
        ids = torch.rand(2, 30).double() if model.config.real_valued else torch.randint(1, 16, (2, 30))
        mask = torch.arange(30) < torch.tensor([[30], [17]])
        with torch.no_grad():
            padded = model(ids, attention_mask=mask).logits
            alone = model(ids[1:, :17]).logits
        torch.testing.assert_close(padded[1:], alone, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="no real position"):
        model(ids, attention_mask=torch.zeros(2, 30, dtype=torch.bool))


def test_a_classifier_is_saved_and_read(tmp_path):
    model = small("mega-listops").eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 16, (2, 12))
    for kind in (SequenceClassifier, AutoModelForSequenceClassification):
        again = kind.from_pretrained(tmp_path).eval()
        assert type(again) is SequenceClassifier
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
    assert other(ids).logits.shape == (2, 42)


def test_a_classifier_has_the_losses_and_outputs_of_transformers():
    ids = torch.randint(1, 16, (3, 12))
    for problem, labels, loss in (
        ("single_label_classification", torch.tensor([0, 3, 1]), F.cross_entropy),
        ("multi_label_classification", torch.rand(3, 10).round(), F.binary_cross_entropy_with_logits),
        ("regression", torch.rand(3, 10), F.mse_loss),
    ):
        model = small("mega-listops", problem_type=problem).eval()
        found = model(ids, labels=labels, output_hidden_states=True)
        torch.testing.assert_close(found.loss, loss(found.logits, labels))
        assert [tuple(h.shape) for h in found.hidden_states] == [(3, 12, 16)] * 3
        torch.testing.assert_close(model(ids, labels=labels, return_dict=False), (found.loss, found.logits))
    pairs = small("mega-retrieval").eval()
    found = pairs(ids, second_ids=ids[:, :5], output_hidden_states=True)
    assert [h.shape[1] for h in found.hidden_states] == [12] * 3 + [5] * 3


def test_unknown_models_and_settings_are_refused():
    with pytest.raises(UserError, match="known are mega-enwik8-base"):
        create("mega")
    with pytest.raises(UserError, match="has no setting 'depth'"):
        create("mega-enwik8-base", mixers=[{"type": "mega", "depth": 3}])
    with pytest.raises(UserError, match="attention_dim"):
        create("mega-enwik8-base", mixers=[{"type": "tcnca", "attention_dim": 0}])
