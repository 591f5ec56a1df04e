"""Contracts of VOLO: any published variant from its settings and shapes, and the loss of its training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import count, loaded, ratio
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.outlook import OutlookAttention
from nearfar.vision.classification.token_labels import TokenLabelLoss
from nearfar.vision.models.volo import VOLO, ClassBlock


class ChannelsLast(nn.Module):
    """An operator of (B, C, H, W) called with (B, H, W, C)."""

    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x.movedim(-1, 1)).movedim(1, -1)


class Dense(nn.Module):
    """Both classifiers apart."""

    def __init__(self, model: VOLO) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, dense = self.model.forward_dense(self.model.forward_features(x))
        return {"cls": logits, "dense": dense}


class Losses(nn.Module):
    """The loss without a box, and with the box (1, 0, 3, 2); targets are a softmax over the classes."""

    def __init__(self, loss: TokenLabelLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, cls: Tensor, dense: Tensor, target: Tensor) -> dict[str, Tensor]:
        target = torch.softmax(target, 1)
        boxes = {"nomix": (0, 0, 0, 0), "mix": (1, 0, 3, 2)}
        return {name: self.loss((cls, dense, box), target) for name, box in boxes.items()}


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network or its two classifiers, outlook attention, a class block, or the loss, that a contract describes."""
    state, settings = contract.state(), contract.settings
    if not state:
        loss = TokenLabelLoss(settings["dense_weight"], settings["cls_weight"], settings["ground_truth_mix"])
        return Losses(loss)
    if "attn.weight" in state and "v.weight" in state:
        dim, kernel, heads = len(state["proj.bias"]), settings["kernel"], settings["heads"]
        contract.require(dim=dim, padding=kernel // 2, qkv_bias="v.bias" in state, layout="B H W C")
        operator = OutlookAttention(dim, heads, kernel, settings["stride"], bias="v.bias" in state)
        return ChannelsLast(loaded(operator, state))
    if "attn.kv.weight" in state:
        dim = len(state["norm1.weight"])
        contract.require(dim=dim, qkv_bias="attn.q.bias" in state)
        mlp_ratio = ratio(len(state["mlp.fc1.bias"]), dim)
        return loaded(ClassBlock(dim, settings["heads"], mlp_ratio, "attn.q.bias" in state), state)
    outlook = {"kernel": 3, "stride": 2, "padding": 1, "block_index": 0, **settings.get("outlook", {})}
    if outlook["padding"] != outlook["kernel"] // 2 or outlook["block_index"] or settings.get("downsample_after_block"):
        raise UserError(f"{contract.path}: outlook attention stands in the first group, before the downsampling")
    heads = settings.get("heads")
    model = VOLO.from_published(
        state,
        outlook_kernel=outlook["kernel"],
        outlook_stride=outlook["stride"],
        **({"num_heads": (heads[0], heads[-1])} if heads else {}),
    )
    depths, dims = [len(group) for group in model.stages], [info["num_chs"] for info in model.feature_info]
    contract.require(
        blocks=depths,
        dims=dims,
        heads=[group[0].attn.num_heads for group in model.stages],
        mlp_ratio=model.stages[0][0].mlp.fc1.out_features / dims[0],
        stem_width=model.patch_embed.proj.in_channels,
        patch_size=8,
        class_attention_layers=count(state, r"post_network\.(\d+)\."),
        qkv_bias=model.stages[1][0].attn.qkv.bias is not None,
        layernorm_eps=1e-5,
        activation="exact GELU",
        num_classes=model.num_classes,
        image_size=list(model.img_size),
    )
    return Dense(model) if contract.outputs[0]["name"] == "out.cls" else model
