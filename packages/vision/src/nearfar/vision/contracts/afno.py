"""Contracts of AFNO: any published variant from its settings and shapes."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.spectral.adaptive import AFNO
from nearfar.vision.forecasting.forecastnet import ForecastNet
from nearfar.vision.models.afno import AFNOTransformer


class OnTokens(nn.Module):
    """The filter on row-major tokens (B, N, C) of a grid."""

    def __init__(self, filter: AFNO, grid: Sequence[int]) -> None:
        super().__init__()
        self.filter, self.grid = filter, tuple(grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x.mT.unflatten(2, self.grid)).flatten(2).mT


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The classifier, the forecaster or the filter in one or two dimensions that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(norm_eps=1e-6)
    contract.document("head", "position_embedding")
    given = {"threshold": settings.get("sparsity_threshold", 0.01)}
    given["fraction"] = settings.get("hard_thresholding_fraction", 1.0)
    if "w1" in state:
        return filter_contract(contract, given)
    if settings.get("mlp_ratio") and len(state["blocks.0.mlp.fc1.bias"]) != int(
        settings["mlp_ratio"] * len(state["blocks.0.norm1.bias"])
    ):
        raise UserError(f"{contract.path}: mlp_ratio is {settings['mlp_ratio']!r}, the state has another")
    if "head.bias" not in state:  # a forecaster
        contract.require(double_skip=True)
        size = settings.get("image_size") or contract.inputs[0]["shape"][2:]
        modes = settings.get("modes", "fourcastnet")
        found = ForecastNet.published_settings(ForecastNet.published_state(state), pair(size))
        names = {"in_channels": "in_channels", "out_channels": "out_channels", "patch_size": "patch_size"}
        names |= {"embed_dim": "dim", "depth": "depth", "num_blocks": "num_blocks"}
        contract.require(**{theirs: found[ours] for theirs, ours in names.items()})
        return ForecastNet.from_published(state, image_size=pair(size), modes=modes, **given)
    found = AFNOTransformer.published_settings(AFNOTransformer.published_state(state))
    names = {"image_size": "img_size", "patch_size": "patch_size", "embed_dim": "dim", "depth": "depth"}
    names |= {"num_blocks": "num_blocks", "num_classes": "num_classes"}
    contract.require(**{theirs: found[ours] for theirs, ours in names.items()})
    double_skip = settings.get("double_skip", False)
    modes = settings.get("modes", "afno")
    return AFNOTransformer.from_published(state, double_skip=double_skip, modes=modes, **given)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def filter_contract(contract: Contract, given: dict[str, Any]) -> nn.Module:
    """One filter: on a line or a plane of tokens, or on a grid with the channels last or second."""
    state, settings = contract.state(), contract.settings
    _, blocks, width, hidden = state["w1"].shape
    contract.require(hidden_size=blocks * width, num_blocks=blocks, hidden_size_factor=hidden // width)
    shape = contract.inputs[0]["shape"]
    given |= {"hidden_factor": hidden // width}
    if len(shape) == 4:  # (B, H, W, C), as FourCastNet's
        modes = settings.get("modes", "fourcastnet")
        return ChannelsLast(loaded(AFNO(blocks * width, blocks, modes=modes, **given), state)).eval()
    tokens, layout = shape[1], str(settings.get("layout", ""))
    named = re.search(r"(\d+)\s*[*,x]\s*(\d+)", layout)
    if named and int(named[1]) * int(named[2]) == tokens:
        grid = (int(named[1]), int(named[2]))
    elif "1d" in contract.variant or math.isqrt(tokens) ** 2 != tokens:
        grid = (tokens,)
    else:
        grid = (math.isqrt(tokens),) * 2
    modes = settings.get("modes", "afno")
    return OnTokens(loaded(AFNO(blocks * width, blocks, modes=modes, dims=len(grid), **given), state), grid).eval()


class ChannelsLast(nn.Module):
    """The filter on a grid (B, H, W, C)."""

    def __init__(self, filter: AFNO) -> None:
        super().__init__()
        self.filter = filter

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x.movedim(-1, 1)).movedim(1, -1)
