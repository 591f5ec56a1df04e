"""Contracts of HaloNet: any published variant from its settings and shapes."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.halo import HaloAttention
from nearfar.vision.models.halonet import ACTIVATIONS, HaloNet

TABLES = ((r"pos_embed\.height_rel$", "relative.0"), (r"pos_embed\.width_rel$", "relative.1"))


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid or one halo attention, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document(  # told by shapes, or words for people
        "layout", "keys", "relative_logits", "head_dim", "query_key_head_dim", "value_head_dim", "widths",
        "bottleneck_ratio",
        "attention_blocks", "image_size", "downsampling_shortcut", "stem", "norm",
    )  # fmt: skip
    if "q.weight" in state:
        return build_operator(contract, state)
    contract.require(batchnorm_eps=1e-5, qkv_bias=any(name.endswith("self_attn.q.bias") for name in state))
    found = HaloNet.published_settings(HaloNet.published_state(state))
    contract.require(depths=found["depths"], num_classes=found["num_classes"])
    given = {
        ours: settings[name] for name, ours in (("block", "block_size"), ("halo", "halo_size")) if name in settings
    }
    if "activation" in settings:
        act = settings["activation"].lower().split()[0].strip(",;").replace("swish", "silu")
        if act not in ACTIVATIONS:
            raise UserError(f"{contract.path}: activation is {act!r}; HaloNet has {' and '.join(ACTIVATIONS)}")
        given["act"] = act
    if "stem" in settings:
        given["stem"] = _stem(str(settings["stem"]).lower(), found["stem"])
    _check(contract, found)
    if isinstance(settings.get("heads"), list):
        given["num_heads"] = settings["heads"]
    return HaloNet.from_published(state, **given).contract_form(contract)


def _stem(text: str, found: str) -> str:
    """How the stem ends, which shapes do not tell: with a max pool, or with a strided convolution."""
    if found.startswith("tiered"):
        return "tiered" if "pool" in text and "no pool" not in text and "without" not in text else "tiered_strided"
    return found


def _check(contract: Contract, found: Mapping[str, Any]) -> None:
    """Raise UserError where settings say something else of channel attention, groups or heads than the state."""
    settings = contract.settings
    named = str(settings.get("channel_attention") or "").lower()
    kind = next((kind for kind in ("eca", "se") if named.startswith(kind) or f" {kind}" in named), "")
    if kind == "" and named.startswith(("efficient", "squeeze")):
        kind = "eca" if named.startswith("efficient") else "se"
    if "channel_attention" in settings and kind != found["channel_attention"]:
        raise UserError(
            f"{contract.path}: channel_attention is {named!r}; its state holds {found['channel_attention']!r}"
        )
    group = settings.get("group_size")
    if isinstance(group, int) and group != found["group_size"]:
        raise UserError(f"{contract.path}: group_size is {group}; its state holds {found['group_size']}")
    heads = settings.get("heads")
    if isinstance(heads, int) and heads not in found["num_heads"]:
        raise UserError(f"{contract.path}: heads is {heads}; its state holds {found['num_heads']}")


def build_operator(contract: Contract, state: Mapping[str, Tensor]) -> nn.Module:
    """One halo attention with its published state."""
    settings = contract.settings
    renamed = rename(state, TABLES)
    d = renamed["relative.0"].shape[1]
    queries, dim = renamed["q.weight"].shape[:2]
    heads = queries // d
    contract.require(dim=dim, heads=heads, query_key_head_dim=d, qkv_bias="q.bias" in state)
    operator = HaloAttention(
        dim,
        len(renamed["kv.weight"]) - queries,
        heads,
        d,
        settings.get("block", 8),
        settings.get("halo", 3),
        stride=settings.get("stride", 1),
        avg_down=bool(settings.get("avg_down", False)),
        scale_relative=bool(settings.get("scale_pos_embed", False)),
        qkv_bias="q.bias" in state,
    )
    return loaded(operator, renamed)
