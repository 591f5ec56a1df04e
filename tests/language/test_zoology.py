"""Zoology's contracts, and its checkpoints of other sizes than the contracts'."""

from pathlib import Path

import pytest
import torch

from nearfar.core.contracts import Contract, fill, relative_errors
from nearfar.core.errors import CheckpointError
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.zoology import build_contract, from_published

CONTRACTS = sorted((Path(__file__).parents[1] / "contracts").glob("zoology--*.json"))


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem.removeprefix("zoology--"))
def test_contract(path):
    contract = Contract.load(path)
    with torch.no_grad():
        errors = relative_errors(contract, build_contract(contract)(*contract.input_tensors()))
    limit = 0.0 if contract.variant.startswith("data-") else 1e-5
    assert errors
    assert max(errors.values()) <= limit, errors


def published(name):
    return Contract.load(Path(__file__).parents[1] / "contracts" / f"zoology--{name}.json").state()


def test_a_checkpoint_file_gives_a_model_that_generates(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": published("lm-based-hybrid-d64-l64")}, path)
    model = MixerForCausalLM.from_published(path)
    assert [m["type"] for m in model.config.mixers] == ["base-conv", "based"]
    ids = torch.randint(512, (1, 5), generator=torch.Generator().manual_seed(0))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_heads_and_window_come_from_the_settings():
    state = published("lm-attention-d64-l64")
    assert MixerForCausalLM.from_published(state, heads=4).model.layers[0].mixer.num_heads == 4
    assert from_published(state, window=8).model.layers[1].mixer.window == 8


def test_every_tensor_is_accounted_for():
    state = published("lm-attention-d64-l64")
    extra = state | {"backbone.layers.0.surprise.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.0\.surprise\.weight"):
        from_published(extra)
    del state["backbone.ln_f.bias"]
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.bias"):
        from_published(state)


def test_a_state_of_no_known_mixer_is_refused():
    state = published("lm-attention-d64-l64")
    state = {name.replace("Wqkv", "Wxyz"): value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"no Zoology mixer has these tensors: Wxyz\.weight"):
        from_published(state)


def test_a_hyena_of_another_filter_network_is_recognised():
    d, order, length = 16, 24, 40
    shapes = {
        "in_proj.weight": (3 * d, d),
        "in_proj.bias": (3 * d,),
        "out_proj.weight": (d, d),
        "out_proj.bias": (d,),
        "short_filter.weight": (3 * d, 1, 4),
        "short_filter.bias": (3 * d,),
        "filter_fn.bias": (d,),
        "filter_fn.pos_emb.z": (1, length, 5),
        "filter_fn.pos_emb.t": (1, length, 1),
        "filter_fn.implicit_filter.0.weight": (order, 5),
        "filter_fn.implicit_filter.0.bias": (order,),
        "filter_fn.implicit_filter.1.freq": (1, order),
        "filter_fn.implicit_filter.2.weight": (order, order),
        "filter_fn.implicit_filter.2.bias": (order,),
        "filter_fn.implicit_filter.3.freq": (1, order),
        "filter_fn.implicit_filter.4.weight": (d, order),
        "filter_fn.modulation.deltas": (1, 1, d),
    }
    state = {f"backbone.layers.0.sequence_mixer.{name}": fill(name, shape) for name, shape in shapes.items()}
    for norm in ("layers.0.norm1", "layers.0.norm2", "ln_f"):
        state |= {f"backbone.{norm}.weight": torch.ones(d), f"backbone.{norm}.bias": torch.zeros(d)}
    state["backbone.embeddings.word_embeddings.weight"] = fill("e", (30, d))
    mixer = from_published(state).model.layers[0].mixer
    assert (mixer.filter.max_length, mixer.short.kernel_size, len(mixer.filter.layers)) == (length, 4, 2)
    torch.testing.assert_close(mixer.filter.positions, fill("filter_fn.pos_emb.z", (1, length, 5))[0])
