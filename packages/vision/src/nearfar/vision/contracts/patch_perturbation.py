"""Contracts of patch perturbation: tempered transformers, the gradient of a patch, corrupted patches."""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.vision.models.evit import EViT
from nearfar.vision.robustness.corruptions import corrupt_patches
from nearfar.vision.robustness.patches import given_patches
from nearfar.vision.robustness.rollout import rollout
from nearfar.vision.robustness.tempering import temper

WIDTHS = {"t": 192, "tiny": 192, "s": 384, "small": 384, "b": 768, "base": 768}
"""DeiT's sizes by name."""


class PatchGradient(nn.Module):
    """Loss, rollout, and the gradient of the loss in the input: of the patches named by the outputs, and its sizes."""

    def __init__(self, model: EViT, label: int, named: list[str]) -> None:
        super().__init__()
        self.model, self.label, self.named = model, label, named

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(self.model(x), torch.full((len(x),), self.label, device=x.device))
            (gradient,) = torch.autograd.grad(loss, x)
        side = self.model.patch_size
        outputs = {"loss": loss.detach()[None], "rollout_class_to_patches": rollout(self.model, x.detach())}
        outputs["sign_fraction_positive"] = (gradient > 0).float().mean()[None]
        outputs["patch_gradient_l1"] = F.avg_pool2d(gradient.abs().sum(1), side).flatten(1) * side**2
        for name, row, column in patches_of(self.named):
            outputs[f"gradient_{name}"] = cell(gradient, row, column, side)
        return outputs


def cell(x: Tensor, row: int, column: int, side: int) -> Tensor:
    """One patch of pictures (..., H, W)."""
    return x[..., row * side : (row + 1) * side, column * side : (column + 1) * side]


def patches_of(names: list[str]) -> list[tuple[str, int, int]]:
    """The patches that names of outputs end in: `patch_r3_c5`."""
    found = {match for name in names for match in re.findall(r"(patch_r(\d+)_c(\d+))", name)}
    return sorted((name, int(row), int(column)) for name, row, column in found)


def build_contract(contract: Contract) -> Callable[..., Any]:
    """A tempered transformer, the gradient of its patches, or corrupted patches."""
    settings, state = contract.settings, contract.state()
    named = [output["name"] for output in contract.outputs]
    if not state:
        return corruptions(contract, named)
    model = EViT.from_published(state, keep_rate=1.0, reduce_at=(), fuse=False)
    size = WIDTHS.get(str(settings["backbone"]).removeprefix("deit-"))
    if size != model.embed_dim:
        raise UserError(f"{contract.path}: backbone is {settings['backbone']!r}; the state is {model.embed_dim} wide")
    contract.require(
        image=model.img_size[0],
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        heads=model.blocks[0].attn.num_heads,
        mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.embed_dim,
        qkv_bias=model.blocks[0].attn.qkv.bias is not None,
        layer_norm_eps=model.norm.eps,
        classes=model.num_classes,
    )
    temper(model, settings["temperature"])
    if "label" not in settings:
        contract.require(patch=model.patch_size)
        return model
    contract.require_text(loss="cross-entropy", patch=r"row \d+, column \d+ of the .*")
    return PatchGradient(model, settings["label"], named)


def corruptions(contract: Contract, named: list[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Corrupted patches of an 8-bit picture (H, W, 3), and the picture's mean, as levels."""
    settings = contract.settings
    side, kinds, severities = settings["patch"], settings["corruptions"], settings["severities"]
    places = [(int(row), int(column)) for row, column in re.findall(r"row (\d+), column (\d+)", settings["patches"])]
    height, width = contract.inputs[0]["shape"][:2]
    contract.require_text(image=rf"uint8 RGB, \[{height}, ?{width}, ?3\]")
    if grid := re.search(r"(\d+)x(\d+) grid", settings["patches"]):
        contract.require(patch=height // int(grid[1]))

    def run(picture: Tensor) -> dict[str, Tensor]:
        x = (picture.double() / 255).movedim(-1, 0)[None]
        mask = given_patches(1, (height, width), side, places).to(x.device)
        outputs = {}
        for kind in kinds:
            for severity in severities:
                levels = (corrupt_patches(x, mask, kind, severity) * 255).round()[0].movedim(0, -1)
                prefix = f"{kind}/severity{severity}"
                outputs[f"{prefix}/image_mean"] = levels.mean()[None]
                for name, row, column in patches_of(named):
                    outputs[f"{prefix}/{name}"] = cell(levels.movedim(-1, 0), row, column, side).movedim(0, -1)
        return outputs

    return run
