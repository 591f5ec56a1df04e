"""Zoology's contracts, and its checkpoints of other sizes than the contracts'."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nearfar.core.contracts import Contract, fill, shipped
from nearfar.core.errors import CheckpointError, UserError
from nearfar.language.contracts.zoology import build_contract
from nearfar.language.layouts.zoology import recognize
from nearfar.language.modeling import MixerForCausalLM

CONTRACTS = shipped("zoology")
from_published = MixerForCausalLM.from_published


def published(name):
    return Contract.load(next(p for p in shipped("zoology") if p.stem == f"zoology--{name}")).state()


def test_a_checkpoint_file_gives_a_model_that_generates(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": published("lm-based-hybrid-d64-l64")}, path)
    model = from_published(path)
    assert [m["type"] for m in model.config.mixers] == ["base-conv", "based"]
    ids = torch.randint(512, (1, 5), generator=torch.Generator().manual_seed(0))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_heads_and_window_come_from_the_settings():
    state = published("lm-attention-d64-l64")
    assert from_published(state, heads=4).model.layers[0].mixer.num_heads == 4
    assert from_published(state, window=8).model.layers[1].mixer.window == 8


def test_every_tensor_is_accounted_for():
    state = published("lm-attention-d64-l64")
    extra = state | {"backbone.layers.0.surprise.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.0\.surprise\.weight"):
        from_published(extra)
    del state["backbone.layers.1.norm2.bias"]
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.norm2\.bias"):
        from_published(state)


def test_a_state_of_no_known_mixer_is_refused():
    state = published("lm-attention-d64-l64")
    state = {name.replace("Wqkv", "Wxyz"): value for name, value in state.items()}
    with pytest.raises(
        CheckpointError,
        match=r"(?s)tensors are Wxyz\.weight.* is none of 9 known:.*attention: has no Wqkv",
    ):
        from_published(state)


def test_a_hyena_of_another_filter_network_is_recognized():
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


def mixer_shapes(kind, d):
    """Published tensors of a mixer of width d, at sizes that no contract has."""
    linear = lambda name, out, dim=d, bias=True: (  # noqa: E731
        {f"{name}.weight": (out, dim)} | ({f"{name}.bias": (out,)} if bias else {})
    )
    if kind == "attention without bias":
        return linear("Wqkv", 3 * d, bias=False) | linear("out_proj", d)
    if kind == "sliding":
        return linear("Wqkv", 3 * d) | linear("out_proj", d)
    if kind == "base-conv":
        return linear("projection", d) | {"conv.conv.weight": (d, 1, 5), "conv.conv.bias": (d,)}
    if kind == "based":
        return {f"proj_{n}.weight": (rows, d) for n, rows in (("q", 20), ("k", 20), ("v", d), ("o", d))}
    if kind == "h3":
        heads, modes = d // 4, 3
        shapes = {"ssm_k_D": (d,), "D": (heads,)}
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes |= linear(name, d)
        shapes |= {"ssm_k_kernel.kernel.B": (d, 6), "ssm_k_kernel.kernel.C": (1, d, 6)}
        shapes |= {"kernel.kernel.C": (1, heads, modes, 2), "kernel.kernel.log_dt": (heads,)}
        shapes |= {"kernel.kernel.B": (heads, modes, 2), "kernel.kernel.inv_A_real": (heads, modes)}
        return shapes | {"kernel.kernel.A_imag": (heads, modes)} | linear("output_linear", d)
    if kind == "mamba":
        e, s, r = 3 * d, 5, 4
        shapes = {"A_log": (e, s), "D": (e,), "in_proj.weight": (2 * e, d), "conv1d.weight": (e, 1, 3)}
        return shapes | {"x_proj.weight": (r + 2 * s, e), **linear("dt_proj", e, r), "out_proj.weight": (d, e)}
    shapes = {"time_decay": (d,), "time_first": (d,)} | {f"time_mix_{n}": (1, 1, d) for n in "kvr"}
    return shapes | {f"{n}.weight": (d, d) for n in ("key", "value", "receptance", "output")}


@pytest.mark.parametrize(
    ("kinds", "settings", "expected"),
    [
        (
            ["attention without bias"],
            {"mixer": "attention, 4 heads"},
            {"type": "attention", "num_heads": 4, "bias": False, "out_bias": True},
        ),
        (
            ["base-conv", "sliding"],
            {"mixer": "layer 0 BaseConv kernel 5 (SiLU), layer 1 sliding attention (block_size 7)"},
            {"type": "sliding-attention", "num_heads": 1, "window": 7, "bias": True, "out_bias": True},
        ),
        (["base-conv", "based"], {"heads": 4}, {"type": "based", "num_heads": 4, "feature_dim": 5}),
        (["h3"], {}, {"type": "h3", "d_state": 6, "head_dim": 4}),
        (
            ["mamba"],
            {},
            {"type": "mamba", "d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4, "bias": False, "conv_bias": False},
        ),
        (["rwkv4"], {}, {"type": "rwkv4"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("state_mixer", ["mlp", "rwkv4-channel-mix", "identity", "none"])
def test_checkpoints_of_any_size_are_recognized_and_loaded(kinds, settings, expected, state_mixer):
    d, vocabulary = 24, 37
    shapes = {"backbone.embeddings.word_embeddings.weight": (vocabulary, d)}
    for i in range(3):
        layer = f"backbone.layers.{i}."
        where, norms = ("sequence_mixer.", ("norm1", "norm2")) if state_mixer != "none" else ("mixer.", ("norm",))
        shapes |= {layer + where + n: s for n, s in mixer_shapes(kinds[i % len(kinds)], d).items()}
        shapes |= {f"{layer}{norm}.weight": (d,) for norm in norms}
        if state_mixer == "mlp":
            shapes |= {f"{layer}state_mixer.fc1.weight": (2 * d, d), f"{layer}state_mixer.fc1.bias": (2 * d,)}
            shapes |= {f"{layer}state_mixer.fc2.weight": (d, 2 * d), f"{layer}state_mixer.fc2.bias": (d,)}
        if state_mixer == "rwkv4-channel-mix":
            shapes |= {f"{layer}state_mixer.time_mix_{n}": (1, 1, d) for n in "kr"}
            shapes |= {f"{layer}state_mixer.{n}.weight": s for n, s in (("key", (3 * d, d)), ("value", (d, 3 * d)))}
            shapes[f"{layer}state_mixer.receptance.weight"] = (d, d)
    shapes |= {"backbone.ln_f.weight": (d,), "backbone.ln_f.bias": (d,), "lm_head.weight": (vocabulary, d)}
    state = {name: fill(name, shape) for name, shape in shapes.items()}
    model = from_published(state, **settings)
    assert model.config.mixers[len(kinds) - 1] == expected
    assert (model.config.norm, model.config.final_norm) == ("rmsnorm", "layernorm")
    assert not model.config.tie_word_embeddings
    if settings and kinds[0] == "base-conv":
        assert model.config.mixers[0]["activation"] == ("SiLU" in settings.get("mixer", ""))
    ids = torch.randint(vocabulary, (2, 11))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :6], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, whole[:, 6:], rtol=1e-3, atol=1e-4)
    counted = sum(value.numel() for name, value in state.items())
    assert sum(p.numel() for p in model.parameters()) == counted


def described(variant, shapes, settings, inputs=((2, 10, 12),), outputs=("out",)):
    """A contract that no file holds."""
    content = {
        "system": "zoology",
        "variant": variant,
        "settings": settings,
        "inputs": [{"name": f"x{i}", "shape": list(s), "dist": "normal"} for i, s in enumerate(inputs)],
        "outputs": [{"name": name} for name in outputs],
        "state": [{"name": n, "shape": list(s), "kind": "parameter"} for n, s in shapes.items()],
    }
    return Contract(Path(f"zoology--{variant}.json"), content)


GATED = {
    "two maps": {"w1.weight": (20, 12), "w2.weight": (20, 12), "w3.weight": (12, 20)},
    "two maps, biased": {
        "a.weight": (24, 12), "a.bias": (24,), "b.weight": (24, 12), "b.bias": (24,),
        "c.weight": (12, 24), "c.bias": (12,),
    },
    "one map": {"fc1.weight": (40, 12), "fc2.weight": (12, 20)},
}  # fmt: skip


def gated(state, x):
    """(W1 x) gelu(W2 x), then W3, of a state in any of the layouts."""
    *up, down = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    both = torch.cat([F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias")) for name in up], -1)
    value, gate = both.chunk(2, -1)
    return F.linear(value * F.gelu(gate), state[f"{down}.weight"], state.get(f"{down}.bias"))


@torch.no_grad()
@pytest.mark.parametrize("layout", GATED)
def test_gated_mlps_in_every_layout(layout):
    contract = described("op-glu-d12", GATED[layout], {"op": "GLU"})
    state, x = contract.state(), torch.randn(2, 10, 12)
    torch.testing.assert_close(build_contract(contract)(x), gated(state, x))
    # and after each mixer of a whole model
    shapes = {"backbone.embeddings.word_embeddings.weight": (30, 12), "lm_head.weight": (30, 12)}
    for name in ("layers.0.norm1", "layers.0.norm2", "ln_f"):
        shapes |= {f"backbone.{name}.weight": (12,), f"backbone.{name}.bias": (12,)}
    shapes |= {f"backbone.layers.0.sequence_mixer.{n}": s for n, s in mixer_shapes("based", 12).items()}
    shapes |= {f"backbone.layers.0.state_mixer.{n}": s for n, s in GATED[layout].items()}
    state = described("lm-based-glu", shapes, {}).state()
    model = from_published(state, heads=4)
    block = model.model.layers[0]
    x = torch.randn(1, 5, 12)
    own = {n.removeprefix(p): v for n, v in state.items() if n.startswith(p := "backbone.layers.0.state_mixer.")}
    torch.testing.assert_close(block.state_mixer(x), gated(own, x))
    surplus = state | {"backbone.layers.0.state_mixer.surprise": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"(?s)layer 0.*glu: .*unexpected surprise"):
        from_published(surplus, heads=4)


@torch.no_grad()
def test_a_hyena_whose_filter_fades_otherwise():
    d, order, length = 8, 6, 10
    shapes = {"in_proj.weight": (3 * d, d), "in_proj.bias": (3 * d,), "out_proj.weight": (d, d), "out_proj.bias": (d,)}
    shapes |= {"short_filter.weight": (3 * d, 1, 3), "short_filter.bias": (3 * d,), "filter_fn.bias": (d,)}
    shapes |= {"filter_fn.pos_emb.z": (1, length, 3), "filter_fn.implicit_filter.1.freq": (1, order)}
    shapes |= {"filter_fn.implicit_filter.0.weight": (order, 3), "filter_fn.implicit_filter.0.bias": (order,)}
    shapes |= {"filter_fn.implicit_filter.2.weight": (d, order)}
    settings = {"slow_decay_pct": 2.0, "fast_decay_pct": 0.5, "target": 0.1, "shift": 0.05, "num_heads": 1}
    contract = described("op-hyena-d8-lmax10", shapes, settings, ((2, 10, d),))
    w = {name.removeprefix("filter_fn."): value for name, value in contract.state().items()}
    h = torch.sin(
        w["implicit_filter.1.freq"]
        * F.linear(w["pos_emb.z"][0], *(w[f"implicit_filter.0.{n}"] for n in ("weight", "bias")))
    )
    fading = torch.linspace(math.log(0.1) / 2, math.log(0.1) / 0.5, d).abs()
    window = torch.exp(-torch.linspace(0, 1, length)[:, None] * fading) + 0.05
    taps = F.linear(h, w["implicit_filter.2.weight"]) * window
    mixer = build_contract(contract)
    torch.testing.assert_close(mixer.filter.taps(length), taps.T)
    with pytest.raises(UserError, match="num_heads is 2"):
        build_contract(described("op-hyena-d8", shapes, settings | {"num_heads": 2}, ((2, 10, d),)))


@torch.no_grad()
def test_a_selection_of_a_given_number():
    shapes = {"Wqkv.weight": (36, 12), "Wqkv.bias": (36,), "out_proj.weight": (12, 12), "out_proj.bias": (12,)}
    shapes |= {"selecting.weight": (1, 12)}
    variant, x = "op-selective-lookups-sigmoid-d12", torch.randn(2, 10, 12)
    contract = described(variant, shapes, {"heads": 2, "k": 3})
    assert ((build_contract(contract)(x) != x).any(-1).sum(1) == 3).all()
    contract = described(variant, shapes, {"heads": 2, "k": 3}, outputs=("out.y", "out.aux"))
    selection = torch.sigmoid(F.linear(x, contract.state()["selecting.weight"])).mean()
    torch.testing.assert_close(build_contract(contract)(x)["aux"], 1e-3 * (selection - 0.3).relu()[None])
    with pytest.raises(CheckpointError, match="softmax"):
        build_contract(described("op-selective-lookups-softmax-d12", shapes, {"heads": 2}))


@pytest.mark.parametrize(
    ("described", "layer", "expected"),
    [
        ("layer 0 attention (4 heads), layer 1 attention (bias, 2 heads)", 1, ("attention", 2)),
        ("layer 0 attention (4 heads), layer 1 attention", 1, ("attention", 1)),
        ("layer 0 sliding-window attention, w = 8, layer 1 attention", 0, ("sliding-attention", 8)),
        ("layer 0 sliding-window attention, w = 8, layer 1 attention", 1, ("attention", 1)),
        ("sliding attention (1 head, block_size 16)", 1, ("sliding-attention", 16)),
        ("attention, 12 heads", 0, ("attention", 12)),
    ],
)
def test_descriptions_of_layers(described, layer, expected):
    shapes = {"Wqkv.weight": (72, 24), "Wqkv.bias": (72,), "out_proj.weight": (24, 24), "out_proj.bias": (24,)}
    found = recognize(shapes, {"mixer": described}, 24, layer=layer)
    assert (found["type"], found.get("window", found["num_heads"])) == expected


def test_what_the_contracts_cannot_say_is_refused():
    based = {f"proj_{n}.weight": (12, 12) for n in "qkvo"}
    with pytest.raises(UserError, match="only the Taylor feature map"):
        build_contract(described("op-based-elu-d12", based, {"op": "Based with elu + 1"}))
    with pytest.raises(UserError, match="only the Taylor feature map"):
        build_contract(described("op-relu-feature-map-f16", {}, {}))
    short = mixer_shapes("base-conv", 12)
    with pytest.raises(UserError, match="residual is False"):
        build_contract(described("op-baseconv-short-d12-k5", short, {"residual": False}))
    with pytest.raises(UserError, match="rotary is True"):
        build_contract(described("op-based-taylor-d12", based, {"rotary": True}))
    assert build_contract(described("op-based-taylor-d12", based, {"eps": 1e-6})).eps == 1e-6
    with pytest.raises(UserError, match="no setting 'surprise'"):
        build_contract(described("data-mqar-v64-l32", {}, {"surprise": 1, "rng": "numpy"}))()
