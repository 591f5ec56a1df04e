"""What a model attends to: the attention or selection maps of every layer that has them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Layer name -> its map, in the order of computation, for one forward pass in eval mode.

    Every module with a method `attention_map`, which takes what `forward` takes, is asked; the forward pass itself
    runs its fused form. A map is (B, heads, queries, keys), with rows that sum to one. The model's training mode is
    restored. A model without such layers gives an empty dict.
    """
    maps: dict[str, Tensor] = {}

    def ask(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, arguments, _output: maps.__setitem__(name, module.attention_map(*arguments).cpu())

    handles = [
        module.register_forward_hook(ask(name))
        for name, module in model.named_modules()
        if hasattr(module, "attention_map")
    ]
    training = model.training
    try:
        model.eval()(*inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return maps
