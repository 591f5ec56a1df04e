"""Contracts of BiFormer: any published variant from its settings and shapes."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention, EnhancedAttention
from nearfar.vision.models.biformer import BiFormer, BiFormerBlock


class Operator(nn.Module):
    """An operator on maps of a contract's layout; also what routed attention chose, if the contract lists it."""

    def __init__(self, operator: nn.Module, channels_first: bool, routes: bool = False) -> None:
        super().__init__()
        self.operator, self.channels_first, self.routes = operator, channels_first, routes

    def forward(self, x: Tensor) -> Any:
        x = x if self.channels_first else x.movedim(-1, 1)
        y = self.operator(x)
        y = y if self.channels_first else y.movedim(1, -1)
        if not self.routes:
            return y
        chosen, scores = self.operator.route(x.movedim(1, -1))
        return {"out": y, "index": chosen, "routing": scores.softmax(-1)}


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one operator, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document(  # told by shapes, or words for people
        "dim", "qkv_bias", "local_enhancement_kernel", "scale", "attention_scale", "mlp_ratio", "activation", "stem",
        "downsampling", "head", "image_size", "position_conv", "layout", "auto_pad", "head_dim", "norm",
    )  # fmt: skip
    contract.require(position_conv_kernel=3, layernorm_eps=1e-6, batchnorm_eps=1e-5, qk_scale=None)
    if "downsample_layers.0.0.weight" not in state:
        return build_operator(contract, state)
    found = BiFormer.published_settings(BiFormer.published_state(state))
    stages, given = len(found["depths"]), {}
    if "regions_per_side" in settings:
        given["regions"] = settings["regions_per_side"]
    if "topk" in settings:
        if strange := [k for k in settings["topk"] if isinstance(k, str) and k != "full attention"]:
            raise UserError(f"{contract.path}: topk has {strange}; a stage has a number or full attention")
        given["topks"] = [k if isinstance(k, int) and k > 0 else 0 for k in settings["topk"]]
    if "heads" in settings:
        given["num_heads"] = settings["heads"]
    elif "head_dim" in settings:
        routed = given.get("topks", found["topks"])
        given["num_heads"] = [d // settings["head_dim"] if k else 8 for d, k in zip(found["dims"], routed, strict=True)]
    contract.require(
        dims=list(found["dims"]),
        depths=list(found["depths"]),
        local_enhancement_kernel=max(found["kernel_sizes"]),
        num_classes=found["num_classes"],
    )
    _check_norm(contract, found["norm"], stages)
    return BiFormer.from_published(state, **given).contract_form(contract)


def _check_norm(contract: Contract, norm: str, stages: int) -> None:
    """Raise UserError where `norm` names another norm for stem and downsampling than the state holds."""
    named = str(contract.settings.get("norm", "")).lower().replace(" ", "")
    other = {"batch": "layernorm", "layer": "batchnorm"}[norm]
    if named.startswith(other) and f"{norm}norm" not in named:
        raise UserError(f"{contract.path}: norm is {contract.settings['norm']!r}; its state holds {norm} norms")


def build_operator(contract: Contract, state: Mapping[str, Tensor]) -> nn.Module:
    """A block or one attention, with its published state."""
    settings = contract.settings
    block = "norm1.weight" in state
    prefix = "attn." if block else ""
    place = "stages.0.blocks.0." + ("" if block else "attn.")
    renamed = BiFormer.published_state({place + name: value for name, value in state.items()})
    inner = {name.removeprefix(place): value for name, value in renamed.items() if name.startswith(place)}
    dim = len(inner[f"{prefix}proj.weight"])
    kernel = inner[f"{prefix}lepe.weight"].shape[-1] if f"{prefix}lepe.weight" in inner else 0
    first = settings["layout"] == "B C H W" if "layout" in settings else state_is_first(state)
    routed = any(f"{prefix}{name}.weight" in state for name in ("wo", "output_linear"))
    if routed:
        padding = "values" if f"{prefix}qkv_linear.weight" in state else "input"
        if padding == "input" and settings.get("auto_pad") is False:
            padding = "none"
        attention: nn.Module = BiLevelRoutingAttention(
            dim,
            settings.get("heads", max(dim // 32, 1)),
            settings.get("regions_per_side", 7),
            settings.get("topk", 4),
            kernel,
            qkv_bias=f"{prefix}qkv.bias" in inner,
            padding=padding,
        )
    else:
        enhance = "values" if state[f"{prefix}qkv.weight"].ndim == 4 else "input"
        bias = f"{prefix}qkv.bias" in inner
        attention = EnhancedAttention(dim, settings.get("heads", 8), kernel, enhance=enhance, qkv_bias=bias)
    routes = len(contract.outputs) > 1
    if not block:
        return Operator(loaded(attention, inner), first, routes)
    scale = 1.0 if "gamma1" in inner else 0.0
    norm = "batch" if "norm1.running_mean" in inner else "layer"
    expansion = len(inner["mlp.0.weight"]) / dim
    whole = BiFormerBlock(dim, attention, expansion, "pos_embed.weight" in inner, norm, scale, 0.0)
    return Operator(loaded(whole, inner), first)


def state_is_first(state: Mapping[str, Tensor]) -> bool:
    """Whether an operator whose layout is not said takes (B, C, H, W): one of 1x1 convolutions, or a block."""
    return any(value.ndim == 4 for name, value in state.items() if "qkv" in name) or "pos_embed.weight" in state
