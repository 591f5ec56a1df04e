"""Contracts of CvT: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.conv_projection import ConvProjectionAttention
from nearfar.vision.models.cvt import CvT


class OnGrid(nn.Module):
    """The operator on the grid that the settings name."""

    def __init__(self, operator: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.operator, self.grid = operator, grid

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.grid)


class Features(nn.Module):
    """The maps of the stages, and the class token of the last before the final norm."""

    def __init__(self, model: CvT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pairs = self.model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
        return {f"stage{i}": patches for i, (patches, _) in enumerate(pairs)} | {"cls": pairs[-1][1]}


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature maps, or convolutional-projection attention, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document("head", "qkv_projection")
    contract.require_text(attention_scale=r"dim\*\*-0\.5 \(full stage width.*")
    if "proj_q.weight" in state:
        tokens, grid = contract.inputs[0]["shape"][1], settings["grid"]
        contract.require(class_token=tokens == grid[0] * grid[1] + 1)
        place = "stages.0.blocks.0.attn."
        renamed = CvT.published_state({place + name: value for name, value in state.items()})
        state = {name.removeprefix(place): value for name, value in renamed.items()}
        dim, kernel, bias = len(state["proj.bias"]), state["conv_q.0.weight"].shape[-1], "q.bias" in state
        contract.require(dim=dim, kernel=kernel, padding=kernel // 2, qkv_bias=bias)
        operator = ConvProjectionAttention(
            dim, settings["heads"], kernel, settings["stride_q"], settings["stride_kv"], qkv_bias=bias
        )
        return OnGrid(loaded(operator, state), tuple(settings["grid"]))
    activation = settings.get("activation", "x*sigmoid(1.702x)")
    if "1.702" not in activation and "gelu" not in activation.lower():
        raise UserError(f"{contract.path}: activation is {activation!r}; built are x*sigmoid(1.702x) and GELU")
    quick = "1.702" in activation or "quick" in activation.lower()
    names = {"patch_strides": "strides", "patch_paddings": "paddings", "heads": "num_heads"}
    given = {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
    given |= {name: settings[name] for name in ("stride_q", "stride_kv") if name in settings}
    model = CvT.from_published(state, activation="quick_gelu" if quick else "gelu", **given)
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = settings.get("layernorm_eps", norm.eps)
        elif isinstance(norm, nn.BatchNorm2d):
            norm.eps = settings.get("batchnorm_eps", norm.eps)
    first = model.stages[0].blocks[0]
    contract.require(
        patch_kernels=[stage.patch_embed.proj.kernel_size[0] for stage in model.stages],
        dims=[info["num_chs"] for info in model.feature_info],
        depths=[len(stage.blocks) for stage in model.stages],
        mlp_ratio=first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        qkv_bias=first.attn.q.bias is not None,
        class_token_stages=[stage.cls_token is not None for stage in model.stages],
        num_classes=model.num_classes,
        image_size=contract.inputs[0]["shape"][-2:],
    )
    return model if contract.outputs[0]["name"] == "out" else Features(model)
