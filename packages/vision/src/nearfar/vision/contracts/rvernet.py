"""What RveRNet's published code computes, checked against ours."""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.vision.models.rvernet import RveRNet

WORDS = {
    "mnet": "mobilenet_v2|mobilenetv2",
    "vit": "torchvision vit_b_16",
    "deit": "ViTForImageClassification",
    "deit-dist": "DeiTForImageClassification",
    "mixer": "mixer",
}
"""What tells a backbone in the words of a contract."""


class WithAnswers(nn.Module):
    """The network's answer and those of its two backbones."""

    def __init__(self, model: RveRNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, roi: Tensor, extra: Tensor) -> dict[str, Tensor]:
        answers = self.model.forward_features(roi, extra)
        return {
            "log_probs": self.model.forward_head(*answers),
            "roi_logits": answers[0],
            "extra_roi_logits": answers[1],
        }


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network of two backbones."""
    named = {}
    for setting, place in (("roi_module", "roi"), ("extra_roi_module", "extra")):
        text = str(contract.settings[setting])
        found = [name for name, words in WORDS.items() if re.search(words, text, re.I)]
        if len(found) != 1:
            raise UserError(f"{contract.path}: {setting} is {text!r}; known are {', '.join(WORDS.values())}")
        named[place] = found[0]
    model = RveRNet.from_published(contract.state(), **named)
    transformers = [part for part in (model.roi, model.extra) if hasattr(part, "norm") and hasattr(part, "pos_embed")]
    eps = {part.norm.eps for part in transformers}
    contract.require(
        feature_dim_per_module=model.fc1.in_features // 2,
        hidden=model.fc1.out_features,
        classes=model.num_classes,
        image=contract.inputs[0]["shape"][-1],
        activation="relu",
        output="log-softmax",
    )
    told = contract.settings.get("vit_layernorm_eps")
    if told is not None and set(told if isinstance(told, list) else [told]) - eps:
        raise UserError(f"{contract.path}: vit_layernorm_eps is {told}; the backbones are built with {eps or None}")
    if told is None and eps and "vit_layernorm_eps" in contract.settings:
        raise UserError(f"{contract.path}: vit_layernorm_eps is null; the backbones are built with {eps}")
    return WithAnswers(model).eval()
