"""Zoology's contracts: models, mixers, feature maps and data."""

import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.language.configuration import MixerConfig
from nearfar.language.layouts import zoology as layout
from nearfar.language.layouts.zoology import Shapes, load_mixer, part, recognize
from nearfar.language.mixers.zoology import CARD, feed_forward
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.recall.tasks import make_examples
from nearfar.language.registry import MIXERS, STATE_MIXERS, build
from nearfar.ops.recurrence.based import Based, taylor_features
from nearfar.ops.tokens.selective_lookup import SelectiveLookup

__all__ = ["CARD", "build_contract"]


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The model, mixer, feature map or data of a Zoology contract."""
    settings, shapes = contract.settings, contract.shapes
    contract.document("rng", "dropout", "view", "layout")
    if contract.variant.startswith("data-"):
        return lambda *_: data(contract)
    if "backbone.ln_f.weight" in shapes:
        model = MixerForCausalLM.translated(
            layout, contract.state(), ChainMap(settings, {"tie_embeddings": True}), shapes
        )
        require_model(contract, model.config)
        return Logits(model)
    contract.require(causal=True, rotary=False, bidirectional=False, num_blocks=1)
    about = f"{contract.variant} {settings.get('op', '')}".lower()
    if (not shapes or "proj_q.weight" in shapes) and re.search(r"[^a-z](elu|relu|performer|cosformer)", about):
        raise UserError(f"{contract.path}: only the Taylor feature map is known, not that of {about!r}")
    if not shapes:
        dim = contract.inputs[0]["shape"][-1]
        contract.require(feature_dim=dim, output_dim=1 + dim + dim**2)
        contract.require_text(op="Taylor feature map", order=f"constant, linear, then all {dim**2} products.*")
        return taylor_features
    shapes, state = (part(values, "m.", "mixer.", "") for values in (shapes, contract.state()))
    dim = contract.inputs[0]["shape"][-1]
    state_mixer = feed_forward(shapes)[0] or ("time_mix_k" in shapes and "time_decay" not in shapes)
    table = STATE_MIXERS if state_mixer else MIXERS
    choice = recognize(shapes, ChainMap({"op": about}, settings), dim, table)
    require_mixer(contract, choice, shapes, dim)
    module = build(choice, table, "mixer", dim=dim)
    load_mixer(module, state, table[choice["type"]])
    if isinstance(module, Based):
        module.eps = settings.get("eps", module.eps)
    if isinstance(module, SelectiveLookup) and any(o["name"] == "out.aux" for o in contract.outputs):
        return TrainPass(module)
    return module


WORDS = {
    "attention": "attention",
    "sliding-attention": "attention",
    "selective-lookup": "input-dependent sparse attention|selective",
    "based": "based",
    "base-conv": "baseconv",
    "hyena": "hyena",
    "h3": "h3",
    "mamba": "mamba",
    "rwkv4": "rwkv-?4 time",
    "rwkv4-channel-mix": "rwkv-?4 channel",
    "mlp": "mlp",
    "glu": "glu",
    "identity": "identity",
    "none": "none|identity",
}
"""How contracts call a mixer."""


def require_model(contract: Contract, config: MixerConfig) -> None:
    """Hold the settings of a whole model against its config."""
    mixers = [config.layer_mixer(i) for i in range(config.num_hidden_layers)]
    after = config.state_mixer if isinstance(config.state_mixer, dict) else {"type": config.state_mixer}
    contract.require(
        vocab=config.vocab_size,
        d_model=config.hidden_size,
        layers=config.num_hidden_layers,
        position_embeddings=config.max_position_embeddings if config.learned_positions else 0,
    )
    size = rf".*(hidden {after['mult']}x).*" if "mult" in after else ".*"
    contract.require_text(state_mixer=f"({WORDS[after['type']]}){size}")
    kernels = [m["kernel_size"] for m in mixers if "kernel_size" in m and m["type"] == "base-conv"]
    implicit = [m.get("implicit", False) for m in mixers if m["type"] == "base-conv"]
    taps = [str(k) if k > 0 else "implicit long" if i else "explicit long" for k, i in zip(kernels, implicit)]
    for pattern in {WORDS[m["type"]] for m in mixers}:
        contract.require_text(mixer=f".*({pattern}).*")
    if "kernels" in str(contract.settings.get("mixer", "")):
        contract.require_text(mixer=f".*kernels {', '.join(taps)}.*")
    elif taps and "kernel" in str(contract.settings.get("mixer", "")):
        contract.require_text(mixer=rf".*kernel {taps[0]}\b.*")
    for mixer in mixers:
        if "feature_dim" in mixer and "feature_dim" in str(contract.settings.get("mixer", "")):
            contract.require_text(mixer=rf".*feature_dim {mixer['feature_dim']}\b.*")


def require_mixer(contract: Contract, choice: Mapping[str, Any], shapes: Shapes, dim: int) -> None:
    """Hold the settings of one mixer against what its tensors tell."""
    kind = choice["type"]
    heads = choice.get("num_heads", 1)
    contract.require(d_model=dim, num_heads=heads, heads=heads, head_dim=choice.get("head_dim", dim // heads))
    contract.require_text(op=f".*({WORDS[kind]}).*", mask=r"additive -10000.*")
    contract.require(biases=any(name.endswith("bias") for name in shapes))
    same = ("feature_dim", "d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias")
    contract.require(**{name: choice[name] for name in same if name in choice})
    if kind == "rwkv4-channel-mix":
        contract.require(hidden=shapes["key.weight"][0])
    if kind == "rwkv4":
        contract.require_text(decay=r"w = -exp\(time_decay\)", bonus="time_first")
    if kind == "base-conv":
        long = choice["kernel_size"] == -1
        conv = "depthwise causal" if not long else "implicit long" if choice["implicit"] else "explicit long"
        contract.require(residual=True, kernel_size=choice["kernel_size"], l_max=choice.get("max_length"))
        contract.require_text(conv=f"{conv}.*", activation="false|none|identity|true|silu.*")
    if kind == "based":
        contract.require_text(feature_map=r"1, x/f\^\(1/4\), vec\(x x\^T\)/\(sqrt\(2\) sqrt\(f\)\)")
    if kind == "hyena":
        sizes = {
            "filter_order": "order",
            "short_filter": "kernel_size",
            "emb_dim": "features",
            "num_inner_mlps": "inner",
        }
        contract.require(l_max=choice["max_length"], **{theirs: choice[ours] for theirs, ours in sizes.items()})
        contract.require_text(op="hyena( order 2)?")
        contract.document("sine_w")  # where the frequencies start; the state holds what they have become
    if kind == "h3":
        contract.document("l_max")  # room for the published code's tables; ours has none
        contract.require_text(
            shift_ssm=r"mode shift.*", diag_ssm=r"S4D: mode diag,.*discretisation bilinear.*", skip=r"ssm_k_D, D"
        )
    if kind == "sliding-attention":
        contract.require_text(window=r"\d+|position i sees j with max\(0,i-block_size\) <= j <= i.*")
    if kind == "selective-lookup":
        contract.require_text(
            k=r"[\d.]+|ceil\(sqrt\(length\)\).*",
            selection="sigmoid of a bias-free linear.*",
            residual="y = x at unselected positions; x .*",
            aux=r"relu\(mean\(selection\) - sqrt\(length\)/length\) \* 0.001",
        )


class Logits(nn.Module):
    """A language model that returns its logits alone."""

    def __init__(self, model: MixerForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).logits


class TrainPass(nn.Module):
    """Selective lookup as it trains: output and auxiliary term."""

    def __init__(self, mixer: SelectiveLookup) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, auxiliary = self.mixer.train_pass(x)
        return {"y": y, "aux": auxiliary}


def data(contract: Contract) -> dict[str, Tensor]:
    """The examples of a data contract, drawn as the published code draws them."""
    kind = re.match(r"data-((?:[a-z]+-)*[a-z]+)-v\d", contract.variant)
    settings = {name: contract.settings[name] for name in contract.settings if name not in ("rng",)}
    task = kind[1] if kind else "mqar"
    inputs, labels = make_examples(task, exact=True, **settings)
    return {"inputs": inputs.to(torch.float64), "labels": labels.to(torch.float64)}
