"""Converting other libraries' pre-norm transformers to attention residuals must not change what they compute."""

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nearfar.ops.aggregation.depth_conversion import attend_over_depth, residual_norms, train_depth_only

LAYERS = 3


def llama(seed=0, layers=LAYERS):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(50, (2, 9)), "use_cache": False}


def vit(seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=LAYERS, num_classes=7, init_values=0.5
    )
    return model.eval(), [torch.randn(2, 3, 32, 32)]


@pytest.mark.parametrize("make", [llama, vit])
@pytest.mark.parametrize("size", [1, 2, 4, 2 * LAYERS])
def test_conversion_changes_nothing(make, size):
    model, example = make()
    before = sum(p.numel() for p in model.parameters())
    assert attend_over_depth(model, example, size) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == before + 2 * 32 * (2 * LAYERS + 1)


def test_tiny_embeddings_do_not_show_the_eps():
    model, example = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-2)
    assert attend_over_depth(model, example) < 1e-5


def test_one_step_changes_queries_only_where_asked():
    model, example = llama()
    attend_over_depth(model, example, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(train_depth_only(model), lr=1.0)
    model(**example, labels=example["input_ids"]).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("depth.") for name in changed)
    # the first aggregation has one source, so nothing to choose
    assert {name for name in changed if name.endswith("query")} == {
        f"depth.attends.{i}.query" for i in range(1, 2 * LAYERS + 1)
    }


def test_cached_decoding_and_reloading():
    model, example = llama()
    attend_over_depth(model, example, 2)
    with torch.no_grad():
        for attend in model.depth.attends:
            attend.query.normal_()
        ids = example["input_ids"]
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-5)
        again, _ = llama(seed=1)
        attend_over_depth(again, example, 2)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, whole)


def test_heat_map():
    model, example = vit()
    attend_over_depth(model, example, 2)
    model.depth.record = True
    model(*example)
    table = model.depth.heat_map()
    assert table.shape == (2 * LAYERS + 1, LAYERS + 1)
    torch.testing.assert_close(table.sum(1), torch.ones(2 * LAYERS + 1))


def test_post_norm_models_are_refused_and_left_as_they_were():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.norm1(x + self.a(x))
            return self.norm2(x + self.b(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.blocks(x))

    model, x = Model(), torch.randn(2, 3, 8)
    before = model(x)
    with pytest.raises(ValueError, match="not pre-norm"):
        attend_over_depth(model, [x])
    assert torch.equal(model(x), before)
    assert not hasattr(model, "depth")


def test_norms_are_found_or_asked_for():
    model, _ = llama(layers=2)
    assert residual_norms(model) == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    with pytest.raises(ValueError, match="name its norms"):
        residual_norms(nn.Sequential(nn.Linear(2, 2)))


def test_gradient_checkpointing_is_refused():
    model, example = llama()
    attend_over_depth(model, example)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="out of order"):
        model(**example, labels=example["input_ids"]).loss.backward()


@pytest.mark.parametrize("size", [0, 3])
def test_bad_block_sizes_are_refused(size):
    model, example = llama()
    with pytest.raises(ValueError, match="block_size"):
        attend_over_depth(model, example, size)
