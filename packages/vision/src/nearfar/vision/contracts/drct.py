"""Contracts of DRCT and of super-resolution's protocol: any published variant from its settings and shapes."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.vision.restoration.drct import DRCT, ResidualDenseGroup
from nearfar.vision.restoration.metrics import luma, score
from nearfar.vision.restoration.resize import imresize


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, a residual dense group on tokens, or the protocol."""
    if not contract.shapes:
        contract.document("image", "down", "second_image", "values", "luma")
        return protocol
    contract.require(image_range=1.0, group_residual_scale=0.2, layer_norm_eps=1e-5, qkv_bias=True)
    state = contract.state()
    if "conv_first.weight" in state:
        model = DRCT.from_published(state)
        if "rgb_mean" in contract.settings:
            model.mean.copy_(torch.tensor(contract.settings["rgb_mean"]).view(1, -1, 1, 1))
        group = model.groups[0]
        contract.require(
            upscale=model.scale,
            window=model.window_size,
            groups=len(model.groups),
            in_channels=model.in_chans,
            embed_dim=group.dims[0],
            **of_group(group),
        )
        contract.document("heads_base", "input_size_multiple_of_window", "upsampler", "dense_activation")
        return model
    state = rename(DRCT.published_state(rename(state, [(r"rdg\.", "layers.0.")])), [(r"groups\.0\.", "")])
    dim, growth = len(state["blocks.0.norm1.weight"]), len(state["reduce.0.bias"])
    tables = [state[f"blocks.{i}.attention.bias_table"].shape for i in range(5)]
    window, ratio = (round(tables[0][0] ** 0.5) + 1) // 2, len(state["blocks.0.mlp.0.bias"]) / dim
    sides = [int(side) for side in re.findall(r"(\d+)x(\d+)", str(contract.settings.get("tokens", "")))[0]]
    group = loaded(ResidualDenseGroup(dim, growth, [h for _, h in tables], window, ratio, 0.0), state)
    contract.require(dim=dim, window=window, **of_group(group))
    contract.document("heads_base")
    return Tokens(group, sides)


def of_group(group: ResidualDenseGroup) -> dict[str, Any]:
    """A group's sizes by the names of the contracts' settings."""
    attentions = [block.attention for block in group.blocks]
    return {
        "growth": group.dims[1] - group.dims[0],
        "block_dims": group.dims,
        "heads_in_group": [attention.num_heads for attention in attentions],
        "shift": [attention.shift for attention in attentions],
        "mlp_ratio": [block.mlp[0].out_features / dim for block, dim in zip(group.blocks, group.dims)],
    }


class Tokens(nn.Module):
    """A group called with the tokens (B, H W, C) of a map, row by row."""

    def __init__(self, group: nn.Module, sides: list[int]) -> None:
        super().__init__()
        self.group, self.sides = group, sides

    def forward(self, x: Tensor) -> Tensor:
        return self.group(x.mT.unflatten(2, self.sides)).flatten(2).mT


def protocol(image: Tensor, reference: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Resizing of a picture in [0, 1], and the scores of one picture against another."""
    image = image.abs().clamp(0, 1)
    outputs = {f"down_x{k}": imresize(image, 1 / k) for k in (2, 3, 4)}
    outputs["up_x2"] = imresize(image, 2)
    outputs["down_x2_no_antialias"] = imresize(image, 0.5, antialias=False)
    second = (reference + offset - 12).clamp(0, 255)
    pair = second.double() / 255, reference.double() / 255
    for key, name in (("eight_bit", "8bit"), ("float", "float")):
        values = [score(*pair, border=b, colour=c, protocol=name) for b, c in ((4, "y"), (0, "rgb"))]  # type: ignore[arg-type]
        outputs[f"{key}_psnrY4_ssimY4_psnrRGB_ssimRGB"] = torch.tensor([x for v in values for x in (v.psnr, v.ssim)])
    return outputs | {"luma": luma(pair[1])[None]}
