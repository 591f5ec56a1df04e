"""Contracts of the Gaussian mixture mask: any published variant from its settings and shapes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from nearfar.vision.models.gaussian_mask import GMMPiT, GMMViT


class Given(nn.Module):
    """A mask or an attention whose sigma and alpha come as inputs, on a fixed grid."""

    def __init__(self, module: nn.Module, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.grid = module, grid

    def forward(self, x: Tensor, sigma: Tensor | None = None, alpha: Tensor | None = None) -> Tensor:
        mask = getattr(self.module, "mask", self.module)
        mask = self.module if isinstance(self.module, GaussianMixtureMask) else mask
        for parameter, value in ((mask.sigma, sigma), (mask.alpha, alpha)):
            if value is not None:
                with torch.no_grad():
                    parameter.copy_(value.reshape(parameter.shape))
        return self.module(x, self.grid)


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its attention or the mask that a contract describes; all with the published table."""
    state, settings = contract.state(), contract.settings
    tables = [shape[-1] for name, shape in contract.shapes.items() if name.split(".")[-1] == "mask"]
    if "sigma" in state or "mask.sigma" in state:
        kernels, heads = state["sigma" if "sigma" in state else "mask.sigma"].shape[:2]
        tokens = tables[0] if tables else contract.inputs[0]["shape"][-1 if "sigma" in state else 1]
        grid = tuple(settings.get("grid", (math.isqrt(tokens),) * 2))
        contract.require(heads=heads, kernels=kernels)
        if "sigma" in state:
            return Given(loaded(GaussianMixtureMask(heads, kernels, clipped=True), state), grid).eval()
        inner, dim = state["to_qkv.weight"].shape
        contract.require(dim=dim, dim_head=inner // (3 * heads), qkv_bias="to_qkv.bias" in state)
        state = rename(state, [(r"to_qkv\.", "qkv."), (r"to_out\.0\.", "proj.")])
        attention = GaussianMaskAttention(
            dim, heads, inner // (3 * heads), kernels=kernels, clipped=True, qkv_bias="qkv.bias" in state
        )
        return Given(loaded(attention, state), grid).eval()
    model = settings.get("model", "pit" if "layers.0.layers.0.0.norm.weight" in state else "vit")
    if model not in ("vit", "pit"):
        raise UserError(f"{contract.path}: the model is {model!r}; vit and pit are built")
    contract.require_text(pool="class token.*" if model == "pit" else "mean.*")
    build = GMMPiT if model == "pit" else GMMViT
    found = build.published_settings(build.published_state(state))
    names = {"image_size": "img_size", "num_classes": "num_classes", "gaussian_kernels": "kernels"}
    names |= {"patch_size": "patch_size", "dim_head": "head_dim", "qkv_bias": "qkv_bias"}
    names |= {"dims": "dims", "depths": "depths", "heads": "num_heads", "dim": "dim", "depth": "depth"}
    contract.require(**{theirs: found[ours] for theirs, ours in names.items() if ours in found})
    if abs(settings.get("mlp_ratio", found["mlp_ratio"]) - found["mlp_ratio"]) > 1e-6:
        raise UserError(f"{contract.path}: mlp_ratio is {settings['mlp_ratio']}, the state has {found['mlp_ratio']}")
    return build.from_published(state, clipped=True, eps=settings.get("norm_eps", 1e-5))
