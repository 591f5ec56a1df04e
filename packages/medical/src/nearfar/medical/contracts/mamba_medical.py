"""Contracts of the state space models in medicine: VM-UNet, U-Mamba, SegMamba and their operators."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.medical.models.segmamba import SegMamba, published_gsc
from nearfar.medical.models.umamba import UMamba
from nearfar.medical.models.vmunet import VMUNet
from nearfar.ops.convolution.gated_spatial import GatedSpatialConv
from nearfar.ops.recurrence.directional_mamba import SS2D, DirectionalMamba, released_mamba, released_ss2d
from nearfar.ops.recurrence.mamba import selective_scan

TOLD = [
    "patch_size",
    "dims",
    "dims_decoder",
    "d_state",
    "ssm_ratio",
    "dt_rank",
    "d_conv",
    "norm",
    "depths",
    "depths_decoder",
    "num_classes",
    "output",
    "in_chans",
    "out_chans",
    "feat_size",
    "hidden_size",
    "expand",
    "act",
    "conv_bias",
    "kernel",
    "n_conv_per_stage",
    "n_conv_per_stage_decoder",
    "mamba",
    "features",
    "in_channels",
    "channels",
    "d_model",
    "directions",
    "gate",
    "channel_first",
    "dim",
    "state",
    "groups",
    "length",
    "delta_bias",
    "A",
]
"""Settings that shapes tell, or that describe in words what the systems always do."""


class _Sigmoid(nn.Module):
    """The released VM-UNet's single output is a probability."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y.sigmoid() if y.shape[1] == 1 else y


class _Every(nn.Module):
    """The released U-Mamba gives the logits of all decoder levels."""

    def __init__(self, model: UMamba, every: bool) -> None:
        super().__init__()
        self.model, self.every = model, every

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.model.every(x) if self.every else self.model(x)


class _ChannelsLast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.movedim(-1, 1)).movedim(1, -1)


class _Scan(nn.Module):
    """selective_scan on the channel-first tensors of the released kernel."""

    def __init__(self, state: dict[str, Tensor], softplus: bool) -> None:
        super().__init__()
        for name in ("A_log", "D", "dt_bias"):
            self.register_parameter(name, nn.Parameter(state[name]) if name in state else None)
        self.softplus = softplus

    def forward(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, C = B.movedim(-1, 1), C.movedim(-1, 1)
        y, h = selective_scan(
            u.mT,
            dt.mT,
            -torch.exp(self.A_log),
            B,
            C,
            D=self.D,
            z=None if z is None else z.mT,
            dt_bias=self.dt_bias,
            softplus=self.softplus,
        )
        return y.mT, h


class _Tri(nn.Module):
    def __init__(self, model: DirectionalMamba, slices: int | None) -> None:
        super().__init__()
        self.model, self.slices = model, slices

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, slices=self.slices)


def require_plan(contract: Contract, model: UMamba) -> None:
    """Hold a U-Mamba's settings against what is built."""
    firsts = [stage[0].conv1 for stage in model.stages]
    kernels = {size for conv in firsts for size in conv.kernel_size}
    scan = next(module for module in model.modules() if hasattr(module, "A_log"))
    contract.require(
        in_channels=model.stem[0].conv1.in_channels,
        num_classes=model.heads[0].out_channels,
        features=[conv.out_channels for conv in firsts],
        conv_bias=firsts[0].bias is not None,
        kernel=kernels.pop() if len(kernels) == 1 else None,
    )
    contract.document("n_conv_per_stage", "n_conv_per_stage_decoder")  # of the plan; the state's blocks tell
    contract.require_text(
        norm="InstanceNorm affine eps 1e-0?5",
        act="LeakyReLU 0.01",
        mamba=rf"d_state {scan.A_log.shape[-1]}, d_conv \d+, expand \d+",
    )


def _operator(contract: Contract, state: dict[str, Tensor]) -> Callable[..., Any]:
    settings = contract.settings
    if "proj4.weight" in state:
        weight = state["proj.weight"]
        contract.require(channels=len(weight))
        contract.require_text(norm="InstanceNorm.d, not affine, eps 1e-0?5")
        return loaded(GatedSpatialConv(len(weight), dims=weight.dim() - 2), published_gsc(state))
    if "x_proj_weight" in state:
        state = released_ss2d(state)
        k, width, inner = state["scan.x_proj"].shape
        dim, rank = len(state["out_proj.weight"]), state["scan.dt_proj"].shape[-1]
        if k != 4:
            raise UserError(f"{contract.path}: {k} directions; SS2D has 4")
        model = SS2D(
            dim,
            (width - rank) // 2,
            inner / dim,
            rank,
            state["conv.weight"].shape[-1],
            "conv.bias" in state,
            len(state["in_proj.weight"]) == 2 * inner,
        )
        contract.require(
            d_model=dim,
            d_state=(width - rank) // 2,
            d_conv=state["conv.weight"].shape[-1],
            expand=inner / dim,
            ssm_ratio=inner / dim,
            dt_rank=rank,
            directions=4,
            conv_bias="conv.bias" in state,
        )
        contract.require_text(gate="silu.*" if len(state["in_proj.weight"]) == 2 * inner else "none")
        last = not settings.get("channel_first", contract.inputs[0]["shape"][-1] != dim)
        model = loaded(model, state)
        return _ChannelsLast(model).eval() if last else model
    if "in_proj.weight" in state:
        merge = "mean" if "A_b_log" in state and "A_s_log" not in state else "sum"
        directions = "tri" if "A_s_log" in state else "bidirectional" if "A_b_log" in state else ("row",)
        text = settings.get("directions", "")
        if isinstance(text, str) and "A_b_log" in state:
            merge = "mean" if re.search(r"halved|averaged\b", text) and "not averaged" not in text else "sum"
        state = released_mamba(state)
        inner, dim = state["out_proj.weight"].shape[::-1]
        contract.require(
            d_model=dim,
            d_state=state["scan.A_log"].shape[-1],
            d_conv=state["conv.weight"].shape[-1],
            expand=inner / dim,
            dt_rank=state["scan.dt_proj"].shape[-1],
        )
        model = DirectionalMamba(
            dim,
            directions,
            merge,
            state["scan.A_log"].shape[-1],
            state["conv.weight"].shape[-1],
            inner // dim,
            state["scan.dt_proj"].shape[-1],
        )
        return _Tri(loaded(model, state), settings.get("num_slices")).eval()
    if "A_log" in state:
        contract.document("layout")
        contract.require_text(A=r"-exp\(A_log\)", gate=r"silu\(z\)")
        u = contract.inputs[0]["shape"]
        contract.require(
            dim=u[1], length=u[2], state=state["A_log"].shape[1], delta_bias=any("bias" in n for n in state)
        )
        grouped = [spec["shape"][1] for spec in contract.inputs if len(spec["shape"]) == 4]
        contract.require(groups=grouped[0] if grouped else 1)
        return _Scan(state, settings.get("delta_softplus", True)).eval()
    raise UserError(f"{contract.path}: {contract.variant} is no operator of the medical state space models")


def build_contract(contract: Contract) -> Callable[..., Any] | None:
    """The network or operator that a contract describes; None for Vim and VMamba, which the vision package builds."""
    state, settings = contract.state(), contract.settings
    contract.document(*TOLD)
    if any(name.startswith("vmunet.") or ".self_attention." in name for name in state):
        model = VMUNet.from_published(state)
        mixers = [level[0].mixer for level in model.encoder]
        widths = [mixer.out_proj.out_features for mixer in mixers]
        contract.require(
            num_classes=len(state[next(name for name in state if name.endswith("final_conv.bias"))]),
            patch_size=4,
            dims=widths,
            dims_decoder=widths[::-1],
            depths=[len(level) for level in model.encoder],
            depths_decoder=[len(level) for level in model.decoder],
            d_state=mixers[0].scan.A_log.shape[-1],
            d_conv=mixers[0].conv.weight.shape[-1],
            ssm_ratio=mixers[0].out_proj.in_features / widths[0],
        )
        contract.require_text(norm="LayerNorm eps 1e-0?5", dt_rank=r"ceil\(dim/16\)", output="sigmoid")
        return _Sigmoid(model).eval()
    if "vit.downsample_layers.0.0.weight" in state:
        model = SegMamba.from_published(state, slices=settings.get("num_slices"))
        widths = [gate.conv1.out_channels for gate in model.gates]
        a_log = model.stages[0][0].mamba.scan.A_log
        contract.require(
            in_chans=model.downs[0].in_channels,
            out_chans=model.head.conv.conv.out_channels,
            depths=[len(stage) for stage in model.stages],
            feat_size=widths,
            hidden_size=len(state["encoder5.layer.conv1.conv.weight"]),
            d_state=a_log.shape[-1],
            d_conv=model.stages[0][0].mamba.conv.weight.shape[-1],
            expand=a_log.shape[1] // widths[0],
        )
        return model
    if "encoder.stem.0.conv1.weight" in state:
        size = settings.get("patch_size", contract.inputs[0]["shape"][2:])
        model = UMamba.from_published(state, settings.get("strides"), size)
        require_plan(contract, model)
        return _Every(model, every=settings.get("deep_supervision", len(contract.outputs) > 1)).eval()
    if "patch_embed.0.weight" in state or "patch_embed.proj.weight" in state:
        return None
    return _operator(contract, state)
