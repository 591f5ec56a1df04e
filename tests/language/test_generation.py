"""What `generate` of transformers gives back, reads and refuses, with every mixer."""

import pytest
import torch

from nearfar.language.cache import MixerCache
from tests.language.test_modeling import LAYERS, VOCABULARY, make, tokens

PROMPT, NEW = 7, 3
WAYS = {  # settings, rows that come out and rows that run for each that goes in
    "greedy": ({}, 1, 1),
    "sample": ({"do_sample": True, "num_return_sequences": 2}, 2, 2),
    "beams": ({"num_beams": 2, "num_return_sequences": 2}, 2, 2),
    "one of the beams": ({"num_beams": 2}, 1, 2),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, 1, 2),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, 1, 1),
    "assistant": ({"assistant_model": None}, 1, 1),
}


@pytest.fixture(params=LAYERS, name="model")
def _model(request):
    return make(request.param)


def written(model, ids=None, **how):
    mask = torch.ones(how.pop("rows", len(ids) if ids is not None else 2), how.pop("width", PROMPT), dtype=torch.long)
    how = {"do_sample": False, "attention_mask": mask, "return_dict_in_generate": True, "output_scores": True} | how
    return model.generate(ids, **how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_states_and_hidden_states_of_every_step(model, way, use_cache):
    how, out, running = WAYS[way]
    if "assistant_model" in how:
        how = {"assistant_model": make("mamba")}
    assisted = way in ("prompt lookup", "assistant")
    rows = 1 if assisted else 2
    how = how | {"output_logits": True, "output_hidden_states": True, "max_new_tokens": NEW, "use_cache": use_cache}
    if assisted and not use_cache:
        with pytest.raises(ValueError, match="use_cache=True"):
            written(model, tokens(rows, PROMPT), **how)
        return
    found = written(model, tokens(rows, PROMPT), **how)
    assert found.sequences.shape == (rows * out, PROMPT + NEW)
    for each in (found.scores, found.logits):
        assert [tuple(step.shape) for step in each] == [(rows * running, VOCABULARY)] * NEW
    lengths = [PROMPT, *[1] * (NEW - 1)] if use_cache else [PROMPT + step for step in range(NEW)]
    if assisted:  # the first step reads the candidates too, and gives their hidden states away
        assert found.hidden_states[0][0].shape[1] >= PROMPT
        lengths[0] = found.hidden_states[0][0].shape[1]
    for length, layers in zip(lengths, found.hidden_states, strict=True):
        assert [tuple(h.shape) for h in layers] == [(rows * running, length, 16)] * 3
    if use_cache:
        assert found.past_key_values.get_seq_length() == PROMPT + NEW - 1
    else:
        assert found.past_key_values is None


@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_of_embeddings(model, beams):
    """With and without its ids: the same continuation and scores, others where the embeddings differ."""
    ids, how = tokens(2, PROMPT), {"num_beams": beams, "max_new_tokens": 5}
    embeds = model.get_input_embeddings()(ids).detach()
    expected = written(model, ids, **how)
    both = written(model, ids, inputs_embeds=embeds, **how)
    alone = written(model, inputs_embeds=embeds, **how)
    assert torch.equal(both.sequences, expected.sequences)
    assert torch.equal(alone.sequences, expected.sequences[:, PROMPT:])
    torch.testing.assert_close(both.scores, expected.scores)
    torch.testing.assert_close(alone.scores, expected.scores)
    other = written(model, ids, inputs_embeds=torch.rand_like(embeds), **how)
    assert not any(torch.allclose(a, b) for a, b in zip(other.scores, expected.scores))


def test_going_on_after_embeddings(model):
    """A state that has read embeddings goes on with the whole text or with what comes after it, as the mask tells."""
    ids = tokens(2, PROMPT)
    embeds = model.get_input_embeddings()(ids).detach()
    expected = written(model, inputs_embeds=embeds, max_new_tokens=4).sequences
    before = written(model, inputs_embeds=embeds, max_new_tokens=3)
    text = torch.cat([embeds, model.get_input_embeddings()(before.sequences).detach()], 1)
    read = before.past_key_values.get_seq_length()
    assert (read, text.shape[1]) == (9, 10)
    for new in (text, text[:, read:]):
        cache = before.past_key_values.copy()
        found = written(model, inputs_embeds=new, past_key_values=cache, width=10, max_new_tokens=1).sequences
        assert torch.equal(found, expected[:, 3:])
    whole = torch.cat([ids, before.sequences], 1)
    for new in (whole, whole[:, read:]):
        cache = before.past_key_values.copy()
        found = written(model, new, past_key_values=cache, width=10, max_new_tokens=1).sequences
        assert torch.equal(found[:, -1:], expected[:, 3:])
    for given in ({"inputs_embeds": text}, {"ids": whole}, {"inputs_embeds": text, "width": 12}):
        given = {"attention_mask": None} | given if "width" not in given else given
        with pytest.raises(ValueError, match="the whole text or do they come after the 9"):
            written(model, past_key_values=before.past_key_values.copy(), max_new_tokens=1, **given)


def test_what_would_be_ignored_is_refused():
    model = make("mamba")
    embeds = model.get_input_embeddings()(tokens(1, PROMPT)).detach()
    for more in ({"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="inputs_embeds are read once"):
            written(model, inputs_embeds=embeds, rows=1, max_new_tokens=2, **more)
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation is '{kind}'"):
            written(model, tokens(2, PROMPT), cache_implementation=kind, max_new_tokens=2)
    written(model, tokens(2, PROMPT), cache_implementation="dynamic", max_new_tokens=2)
    cache = MixerCache(2)
    model.generate(tokens(2, PROMPT), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == PROMPT + 1
