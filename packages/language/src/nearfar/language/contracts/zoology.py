"""Zoology's contracts: models, mixers, feature maps and data."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.language.layouts import zoology as layout
from nearfar.language.layouts.zoology import load_mixer, part, recognise
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
    if contract.variant.startswith("data-"):
        return lambda *_: data(contract)
    if "backbone.ln_f.weight" in shapes:
        return Logits(
            MixerForCausalLM.translated(layout, contract.state(), {"tie_embeddings": True} | settings, shapes)
        )
    contract.require(causal=True, rotary=False, bidirectional=False, num_blocks=1)
    about = f"{contract.variant} {settings.get('op', '')}".lower()
    if (not shapes or "proj_q.weight" in shapes) and re.search(r"[^a-z](elu|relu|performer|cosformer)", about):
        raise UserError(f"{contract.path}: only the Taylor feature map is known, not that of {about!r}")
    if not shapes:
        return taylor_features
    shapes, state = (part(values, "m.", "mixer.", "") for values in (shapes, contract.state()))
    dim = contract.inputs[0]["shape"][-1]
    state_mixer = feed_forward(shapes)[0] or ("time_mix_k" in shapes and "time_decay" not in shapes)
    table = STATE_MIXERS if state_mixer else MIXERS
    choice = recognise(shapes, {**settings, "op": about}, dim, table)
    contract.require(**{"hyena": {"num_heads": 1}, "base-conv": {"residual": True}}.get(choice["type"], {}))
    module = build(choice, table, "mixer", dim=dim)
    load_mixer(module, state, table[choice["type"]])
    if isinstance(module, Based):
        module.eps = settings.get("eps", module.eps)
    if isinstance(module, SelectiveLookup) and any(o["name"] == "out.aux" for o in contract.outputs):
        return TrainPass(module)
    return module


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
    settings = {name: value for name, value in contract.settings.items() if not isinstance(value, str)}
    task = kind[1] if kind else "mqar"
    inputs, labels = make_examples(task, exact=True, **settings)
    return {"inputs": inputs.to(torch.float64), "labels": labels.to(torch.float64)}
