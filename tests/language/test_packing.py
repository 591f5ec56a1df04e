"""Several documents in a row: logits, gradients and states are those of each document alone."""

from itertools import chain

import pytest
import torch
from transformers import DataCollatorWithFlattening

from nearfar.language.cache import MixerCache
from nearfar.language.modeling import MixerConfig, MixerForCausalLM
from nearfar.language.packing import Layout

MIXERS = {
    "mamba": ["base-conv", "mamba"],
    "attention": ["rwkv4", {"type": "attention", "num_heads": 2}],
    "delta": [{"type": "gated-deltanet", "num_heads": 2}, {"type": "mega", "attention_dim": 8, "chunk": 4}],
}
DOCUMENTS = [[5, 6, 7, 8], [9, 10, 11], [12], [13, 14, 15, 16, 17]]


def make(mixers, **more):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 16, "initializer_range": 0.5, "learned_positions": True}
    return MixerForCausalLM(MixerConfig(**settings, mixers=mixers, **more)).double().eval()


def ways(documents):
    """The same packed row told in each way."""
    ids = torch.tensor([list(chain(*documents))])
    lengths = torch.tensor([len(d) for d in documents])
    numbers = torch.arange(len(documents)).repeat_interleave(lengths)[None]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": d} for d in documents]
    )
    batch.pop("labels")
    return {
        "position_ids": {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "seq_idx": {"input_ids": ids, "seq_idx": numbers},
        "cu_seq_lens": {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, *lengths.cumsum(0)])},
        "numbered mask": {"input_ids": ids, "attention_mask": numbers + 1},
        "collator": dict(batch),
    }


@pytest.mark.parametrize("kind", MIXERS)
def test_logits_are_those_of_each_document_alone(kind):
    model = make(MIXERS[kind])
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([d])).logits for d in DOCUMENTS], 1)
        for name, batch in ways(DOCUMENTS).items():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_gradients_too():
    model = make(MIXERS["mamba"])
    ids = torch.tensor([list(chain(*DOCUMENTS))])
    labels = torch.tensor([list(chain(*([-100, *d[1:]] for d in DOCUMENTS)))])
    batch = ways(DOCUMENTS)["seq_idx"]
    model(**batch, labels=labels).loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = [model(torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in DOCUMENTS if len(d) > 1]
    (sum(losses) / (ids.shape[1] - len(DOCUMENTS))).backward()
    for one, parameter in zip(packed, model.parameters()):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-8, atol=1e-9)


def test_padding_between_and_the_state_of_the_last_document():
    model = make(MIXERS["delta"])
    ids = torch.tensor([[0, 5, 6, 7, 9, 10, 11], [3, 4, 12, 13, 14, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0]])
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        more = torch.tensor([[20, 21], [22, 23]])
        after = model(more, past_key_values=out.past_key_values).logits
        for row, documents in enumerate([[[5, 6, 7], [9, 10, 11]], [[3, 4], [12, 13, 14]]]):
            alone = torch.cat([model(torch.tensor([d])).logits[0] for d in documents])
            torch.testing.assert_close(out.logits[row][mask[row] > 0], alone, rtol=1e-9, atol=1e-9)
            whole = model(torch.tensor([documents[1] + more[row].tolist()])).logits[0, -2:]
            torch.testing.assert_close(after[row], whole, rtol=1e-9, atol=1e-9)


def test_position_ids_of_one_text_change_nothing():
    model = make(MIXERS["mamba"])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids, position_ids=torch.arange(4)[None]).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 5, 6]])}, "jump from 1 to 5"),
        ({"position_ids": torch.arange(3)[None]}, "shape"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "runs from 0 to 5"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1]]), "position_ids": torch.tensor([[0, 0, 1, 2]])}, "differently"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "told apart by"),
        ({"token_type_ids": torch.zeros(1, 4)}, "does not know token_type_ids"),
        ({"output_attentions": True}, "does not know output_attentions"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_an_error(more, message):
    with pytest.raises(ValueError, match=message):
        make(MIXERS["mamba"])(torch.tensor([[5, 6, 7, 8]]), **more)


def test_a_continued_text_begins_no_document():
    model = make(MIXERS["mamba"])
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot begin new documents"):
        model(torch.tensor([[7, 8, 9]]), past_key_values=cache, seq_idx=torch.tensor([[0, 1, 1]]))


def test_layout_brings_everything_back():
    real = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    starts = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    layout = Layout(real, starts)
    assert layout.lengths.tolist() == [2, 1, 2, 3, 0]
    x = torch.arange(15.0).view(3, 5, 1)
    assert torch.equal(layout.undo(layout.pack(x))[real], x[real])
    assert layout.last.tolist() == [1, 3, 4]


@pytest.mark.parametrize("kind", MIXERS)
def test_checkpointing_with_a_cache_changes_no_gradient(kind):
    ids, gradients = torch.tensor([[5, 6, 7, 8, 9]]), []
    for checkpointing in (False, True):
        model = make(MIXERS[kind]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        first = model(ids[:, :3], use_cache=True)
        (first.logits.sum() + model(ids[:, 3:], past_key_values=first.past_key_values).logits.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MIXERS)
def test_generating_from_a_state(kind, tmp_path):
    """Read once, ask many times: with the whole text as input, or with what comes after the state alone."""
    model = make(MIXERS[kind])
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, max_new_tokens=5, do_sample=False)[:, 9:]
    with torch.no_grad():
        state = model(ids[:, :4], use_cache=True).past_key_values
    state.save(tmp_path / "state.safetensors")
    how = {"max_new_tokens": 5, "do_sample": False}
    for again in (state.copy(), MixerCache.load(tmp_path / "state.safetensors")):
        assert torch.equal(model.generate(ids[:, 4:], past_key_values=again, **how)[:, 5:], want)
    assert torch.equal(model.generate(ids, past_key_values=state.copy(), **how)[:, 9:], want)
    assert state.get_seq_length() == 4  # the copies went on, the state did not
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)[:, 9:]
    found = model.generate(ids[:, 4:], past_key_values=state.copy(), num_beams=3, **how)
    assert torch.equal(found[:, 5:], beams)


@pytest.mark.parametrize("kind", MIXERS)
def test_what_was_read_is_taken_back(kind, tmp_path):
    """Logits after a cut are those of a text that never had what was cut, whatever the cut and who goes on."""
    model = make(MIXERS[kind])
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 1:4] = 0  # within the piece that is cut
    with torch.no_grad():
        want = model(ids, mask).logits
        state = model(ids[:, :3], mask[:, :3], use_cache=True).past_key_values
        state.activate_past_recording()
        piece = torch.cat([ids[:, 3:6], torch.full((2, 4), 9)], 1)
        model(piece, torch.cat([mask[:, :6], torch.ones(2, 4)], 1), past_key_values=state)
        model(piece[:, :1], past_key_values=state)
        state.crop(-3)  # into the first of two pieces
        assert state.get_seq_length() == 8
        state.crop(6)
        state.crop(0)
        assert state.get_seq_length() == 6
        assert state.has_read(ids)
        assert not state.has_read(ids.flip(0))
        state.save(tmp_path / "state.safetensors")
        for again in (state.copy(), MixerCache.load(tmp_path / "state.safetensors"), state):
            given = {"position_ids": torch.arange(6, 12)[None]} if again is state else {"attention_mask": mask}
            got = model(ids[:, 6:], past_key_values=again, **given).logits
            torch.testing.assert_close(got, want[:, 6:], rtol=1e-9, atol=1e-9)
            assert again.get_seq_length() == 12
            assert again.has_read(torch.cat([ids, ids], 1))
        state.crop(-2)
        hidden = model(ids[:, 10:], past_key_values=state, output_hidden_states=True).hidden_states
        assert {h.shape[1] for h in hidden} == {2}


def test_what_cannot_be_taken_back_is_said():
    model = make(MIXERS["mamba"])
    state = MixerCache(2)
    state.activate_past_recording()
    row = torch.tensor([list(chain(*DOCUMENTS))])
    numbers = torch.arange(4).repeat_interleave(torch.tensor([len(d) for d in DOCUMENTS]))[None]
    with torch.no_grad():
        model(row, seq_idx=numbers, past_key_values=state)
        with pytest.raises(ValueError, match="a state of 13 tokens cannot be cut to 12"):
            state.crop(-1)
        model(row, past_key_values=state)
        state.crop(-3)
        with pytest.raises(ValueError, match="cannot begin new documents"):
            model(row, seq_idx=numbers, past_key_values=state)
        assert state.get_seq_length() == 23
        with pytest.raises(ValueError, match="cannot be cut to 12"):
            state.crop(12)
        state.reset()
        assert state.get_seq_length() == 0
        model(row, past_key_values=state)
        state.crop(-13)
        torch.testing.assert_close(model(row, past_key_values=state).logits, model(row).logits)


@pytest.mark.parametrize("kind", MIXERS)
def test_speculative_and_prompt_lookup_decoding(kind):
    """The same text as greedy decoding; a draft that is always right takes fewer passes."""
    model, other, twin = make(MIXERS[kind]), make(["base-conv"]), make(MIXERS[kind])
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    ids = torch.randint(4, 64, (1, 9), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    for pad in (3, int(ids[0, 0])):  # the second stands in the prompt: transformers masks it
        how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": pad}
        want = model.generate(ids, **how)
        for draft in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": other}, {"assistant_model": twin}):
            passes.clear()
            assert torch.equal(model.generate(ids, **how, **draft), want)
            assert len(passes) < (16 if draft == {"assistant_model": twin} else 27)
    how["pad_token_id"] = 3
    want = model.generate(ids, **how)
    with torch.no_grad():
        state = model(ids[:, :10], use_cache=True).past_key_values
    for given, skipped in ((ids, 0), (ids[:, 10:], 10)):
        own = state.copy()
        found = model.generate(given, past_key_values=own, prompt_lookup_num_tokens=4, **how)
        assert torch.equal(found, want[:, skipped:])
        assert own.pieces is None  # and keeps no more states from here on
    for short in (ids[:, :1], ids[:, :2]):
        want = model.generate(short, **how)
        assert torch.equal(model.generate(short, assistant_model=twin, **how), want)
        found = model.generate(short, prompt_lookup_num_tokens=4, return_dict_in_generate=True, **how)
        assert torch.equal(found.sequences, want)
        assert found.past_key_values.pieces is None


def test_detached_states_end_the_gradient_and_cannot_be_cut():
    model = make(MIXERS["mamba"]).train()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values.detach()).logits
    (gradient,) = torch.autograd.grad(second.sum(), model.model.embed_tokens.weight)
    assert gradient[5].abs().max() < gradient[9].abs().max()  # the tied head alone reaches the tokens before
    with pytest.raises(ValueError, match="cannot be cut to 2"):
        first.past_key_values.crop(2)
    first.past_key_values.crop(-4)  # nothing is always known
    assert first.past_key_values.get_seq_length() == 0


def test_settings_of_the_config_are_defaults():
    model = make(["base-conv"], output_hidden_states=True)
    out = model(torch.tensor([[5, 6, 7]]))
    assert len(out.hidden_states) == 3
    assert out.past_key_values.get_seq_length() == 3
    assert make(["base-conv"], use_cache=False)(torch.tensor([[5, 6, 7]])).past_key_values is None
