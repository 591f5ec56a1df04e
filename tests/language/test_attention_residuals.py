"""Attention residuals and Kimi Linear: contracts, cached decoding, layouts, what weight decay spares."""

import pytest
import torch

from nearfar.core.contracts import Contract, relative_errors, shipped
from nearfar.core.errors import CheckpointError
from nearfar.language.contracts.attention_residuals import build_contract
from nearfar.language.contracts.tcnca import Logits
from nearfar.language.modeling import MixerConfig, MixerForCausalLM
from nearfar.language.training import split_by_decay

PATHS = {path.stem.removeprefix("attention-residuals--"): path for path in shipped("attention-residuals")}


@pytest.mark.parametrize("name", PATHS)
def test_contract(name):
    contract = Contract.load(PATHS[name])
    with torch.no_grad():
        errors = relative_errors(contract, build_contract(contract)(*contract.input_tensors()))
    assert errors
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("name", ["kimi-linear-tiny", "lm-block4-d64-l5", "lm-full-d64-l4"])
def test_cached_decoding_holds_the_contract_too(name):
    contract = Contract.load(PATHS[name])
    model = build_contract(contract).model
    with torch.no_grad():
        errors = relative_errors(contract, Logits(model, prefill=13)(*contract.input_tensors()))
    assert max(errors.values()) <= 1e-5, errors


def test_a_kimi_checkpoint_of_the_first_release_loads():
    contract = Contract.load(PATHS["kimi-linear-tiny"])
    state, split = contract.state(), {}
    for name, value in state.items():
        base = name.rpartition(".self_attn.")[0] + ".self_attn."
        if name.endswith("self_attn.conv1d.weight"):
            split |= {f"{base}{kind}_conv1d.weight": part for kind, part in zip("qkv", value.chunk(3))}
        elif name.endswith("experts.gate_up_proj") and "shared" not in name:
            stem = name.removesuffix("gate_up_proj").replace(".mlp.", ".block_sparse_moe.")
            for e, both in enumerate(value):
                split[f"{stem}{e}.w1.weight"], split[f"{stem}{e}.w3.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj").replace(".mlp.", ".block_sparse_moe.")
            split |= {f"{stem}{e}.w2.weight": down for e, down in enumerate(value)}
        elif ".mlp.gate." in name or ".shared_experts." in name:
            split[name.replace(".mlp.", ".block_sparse_moe.")] = value
        else:
            split[name.replace("forget_gate.", "")] = value
    settings = contract.settings | {"tie_embeddings": False}
    models = [MixerForCausalLM.from_published(s, **settings) for s in (state, split)]
    ids = contract.input_tensors()[0]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))


def test_a_layers_count_is_turned_into_sub_layers():
    contract = Contract.load(PATHS["lm-block4-d64-l5"])
    state = {
        name.replace("attn_res_", "self_attention_res_").replace("model.res_", "model.output_attn_res_"): value
        for name, value in contract.state().items()
    }
    settings = {n: v for n, v in contract.settings.items() if "block_size" not in n}
    with pytest.raises(CheckpointError, match="block size is not told"):
        MixerForCausalLM.from_published(state, **settings)
    model = MixerForCausalLM.from_published(state, **settings, attn_res_block_size=2)
    with torch.no_grad():
        errors = relative_errors(contract, Logits(model)(*contract.input_tensors()))
    assert max(errors.values()) <= 1e-5


def test_what_is_not_told_is_asked_for():
    contract = Contract.load(PATHS["lm-baseline-d64-l4"])
    with pytest.raises(CheckpointError, match="give heads="):
        MixerForCausalLM.from_published(contract.state())


def test_weight_decay_spares_queries_and_decays():
    mixers = [{"type": "rotary-attention", "num_heads": 2}, {"type": "mega", "attention_dim": 8}]
    residual = {"type": "attention", "block_size": 2, "query": "input"}
    model = MixerForCausalLM(MixerConfig(hidden_size=16, mixers=mixers, residual=residual))
    decayed, kept = ({id(p) for p in group} for group in split_by_decay(model))
    assert len(decayed) + len(kept) == len(list(model.parameters()))
    spared = ("depth.", "memory.", "mixer.gamma", "mixer.beta", "norm", "bias")
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == any(part in name for part in spared), name
