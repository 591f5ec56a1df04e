"""Attention at a temperature: softmax(q k^T / (T sqrt(d))), a switch on trained transformers."""

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention, AttentionRope
from timm.models.cait import ClassAttn
from timm.models.eva import EvaAttention
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.ops.attention.conv_projection import ConvProjectionAttention
from nearfar.ops.attention.gated_positional import GatedPositionalAttention
from nearfar.ops.attention.gaussian_mask import GaussianMaskAttention
from nearfar.ops.attention.head_tokens import HeadTokenAttention
from nearfar.ops.attention.outlook import OutlookAttention
from nearfar.ops.attention.self_attention import ClassAttention, PooledAttention, SelfAttention

QUERIES: dict[type[nn.Module], tuple[str, int]] = {
    Attention: ("q_norm", 1),
    AttentionRope: ("q_norm", 1),
    EvaAttention: ("q_norm", 1),
    WindowAttention: ("qkv", 3),
    PVTAttention: ("q", 1),
    ClassAttn: ("q", 1),
    SelfAttention: ("qkv", 3),
    ClassAttention: ("q", 1),
    PooledAttention: ("q", 1),
    ConvProjectionAttention: ("q", 1),
    GatedPositionalAttention: ("qk", 2),
    GaussianMaskAttention: ("qkv", 3),
    HeadTokenAttention: ("qkv", 3),
}
"""Of each attention, the part that makes its queries, and how many equal parts its last axis has, queries first."""

WITHOUT_QUERIES = (OutlookAttention, AttentionPoolLatent)
"""What has no queries of the picture; it stays as it is."""


class Divide:
    """A forward hook that divides the queries by the temperature."""

    def __init__(self, temperature: float, parts: int) -> None:
        self.temperature, self.parts = temperature, parts

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self.parts == 1:
            return output / self.temperature
        width = output.shape[-1] // self.parts
        scale = output.new_ones(output.shape[-1])
        scale[:width] = 1 / self.temperature
        return output * scale


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer of every attention that can be tempered, in the order of the model.

    Raises UserError for a model without attention, or with an attention of another kind.
    """
    found, others = {}, []
    for name, module in model.named_modules():
        if type(module) in QUERIES:
            found[name] = module
        elif not isinstance(module, WITHOUT_QUERIES) and any(
            part in type(module).__name__ for part in ("Attention", "Attn")
        ):
            others.append(f"{name} ({type(module).__name__})")
    if others:
        raise UserError(f"{type(model).__name__}: its attention {others[0]} is of no kind whose queries are known")
    if not found:
        raise UserError(f"{type(model).__name__}: has no attention that a temperature could change")
    return found


def temper(model: nn.Module, temperature: float | Sequence[float], blocks: Iterable[int] | None = None) -> nn.Module:
    """Set the temperature T of a model's attention, in place; returns the model.

    Every attention computes softmax(q k^T / (T sqrt(d)) + bias) v, by dividing its queries, so that fused kernels stay
    in use; biases and masks of the logits are not divided. T = 1 is the plain model, bit for bit. Weights and their
    names stay. Calling it again sets anew what `blocks` names. To be called after `fuse`, which replaces layers.

    Fu et al., "Are Vision Transformers Robust to Patch Perturbations?" (ECCV 2022): a defence against adversarial
    patches that needs no training.

    Args:
        temperature: one number, or one for each layer of `blocks`.
        blocks: which of `attention_layers`, counted from 0, for example `range(4)`; None for all.

    Raises ValueError for temperatures that are not positive numbers, or of another number than the layers; UserError as
    `attention_layers` does.
    """
    layers = list(attention_layers(model).values())
    chosen = range(len(layers)) if blocks is None else list(blocks)
    if any(not 0 <= i < len(layers) for i in chosen):
        raise ValueError(f"blocks is {list(chosen)}; the model has attention layers 0 to {len(layers) - 1}")
    values = [temperature] * len(chosen) if isinstance(temperature, int | float) else list(temperature)
    if len(values) != len(chosen):
        raise ValueError(f"{len(values)} temperatures were given for {len(chosen)} attention layers")
    if any(not 0 < value < float("inf") for value in values):
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    for i, value in zip(chosen, values, strict=True):
        name, parts = QUERIES[type(layers[i])]
        part = layers[i].get_submodule(name)
        for key in [key for key, hook in part._forward_hooks.items() if isinstance(hook, Divide)]:
            del part._forward_hooks[key]
        if value != 1:
            part.register_forward_hook(Divide(float(value), parts))
    return model


def temperatures(model: nn.Module) -> list[float]:
    """The temperature of every attention layer; empty for a model without."""
    try:
        layers = attention_layers(model).values()
    except UserError:
        return []
    hooks = (layer.get_submodule(QUERIES[type(layer)][0])._forward_hooks.values() for layer in layers)
    return [next((h.temperature for h in found if isinstance(h, Divide)), 1.0) for found in hooks]


@contextmanager
def tempered(model: nn.Module, temperature: float | Sequence[float], blocks: Iterable[int] | None = None):
    """`temper` for the length of a block; then the temperatures are as they were."""
    before = temperatures(model)
    temper(model, temperature, blocks)
    try:
        yield model
    finally:
        temper(model, before)
