"""What the published relevance propagation computes, checked against ours."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.vision.contracts.torchvision_networks import network
from nearfar.vision.explain.context_aware import CARD
from nearfar.vision.explain.gradients import scaled
from nearfar.vision.explain.relevance import relevance

__all__ = ["CARD", "build_contract"]


class Propagated(nn.Module):
    """Logits, class, relevance at layers' inputs, and the heat map, of a network of convolutions and linear layers."""

    def __init__(self, model: nn.Module, target: int | None, names: list[str]) -> None:
        super().__init__()
        self.model, self.target, self.names = model, target, names

    def sequence(self) -> list[tuple[str, str]]:
        """Name and kind of the layers as the published code counts them: the flattening between features and classifier
        is one, dropout and adaptive pooling are none."""
        left_out = (nn.Dropout, nn.AdaptiveAvgPool2d)
        layers = [(n, m) for n, m in self.model.named_modules() if not any(True for _ in m.children())]
        listed = [(name, type(module).__name__) for name, module in layers if not isinstance(module, left_out)]
        first = next(i for i, (_, kind) in enumerate(listed) if kind == "Linear")
        return [*listed[:first], ("", "Reshape"), *listed[first:]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        sequence, asked = self.sequence(), {}
        for name in self.names:
            if match := re.fullmatch(r"relevance_at_input_of_layer_(\d+)_(\w+)", name):
                layer, kind = sequence[int(match[1])]
                if kind != match[2]:
                    raise UserError(f"{name}: layer {match[1]} of {type(self.model).__name__} is {kind}")
                asked[name] = layer
        found = relevance(self.model, images, self.target, "published", layers=list(dict.fromkeys(asked.values())))
        results = {
            "logits": self.model(images),
            "class": found.target.float(),
            "heatmap_0_1": scaled(found.pixels.abs()),
        }
        return {**results, **{name: found.layers[layer] for name, layer in asked.items()}}


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network with relevance where the outputs ask for it."""
    names = [output["name"].removeprefix("out.") for output in contract.outputs]
    contract.require_text(
        target_is="the predicted class.*",
        initial_relevance="logit of the class, zeros elsewhere",
        rules=r"linear: positive weights only.*convolution: output \(with bias\).*max pooling: winner takes all.*",
        heatmap="absolute value, min-max over the whole 3-channel map.*",
    )
    target = contract.settings.get("target_class")
    model = Propagated(network(contract), None if target is None else int(target), names).eval()
    if target is not None and "target_is" in contract.settings:
        with torch.no_grad():
            predicted = int(model.model(contract.input_tensors()[0]).argmax())
        contract.require(target_class=predicted)
    return model
