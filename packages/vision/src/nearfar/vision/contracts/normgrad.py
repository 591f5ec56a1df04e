"""What NormGrad's published code computes, checked against ours."""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.vision.contracts.torchvision_networks import network
from nearfar.vision.explain.gradients import Pass, gradients, smooth
from nearfar.vision.explain.methods import grad_cam
from nearfar.vision.explain.normgrad import (
    AGGREGATIONS,
    CARD,
    METHODS,
    combine,
    identity_map,
    layer_maps,
    stepped_weights,
)

__all__ = ["CARD", "build_contract"]

NAMES = {"norm_grad": "normgrad", "norm_grad_selective": "selective_normgrad", "linear_approx": "linear_approximation"}
"""The published names of `METHODS`."""


def published_map(x: Tensor, g: Tensor, kind: str, aggregation: str) -> Tensor:
    """`identity_map`, norms of dense convolutions in the published order of single-precision sums.

    The published code forms the outer product of a position, up to 9 C^2 numbers (4e7 at a ResNet-50's end), and its
    norm loses 1e-3 to rounding there; a contract records that. The closed form is exact, so it cannot agree.
    """
    if not kind.startswith("conv") or "norm" not in aggregation or x.dtype != torch.float32:
        return identity_map(x, g, kind, aggregation)
    k = int(kind.partition("x")[2])
    a = F.unfold(x, k, padding=k // 2).unflatten(2, x.shape[2:])
    result = x.new_empty(len(x), 1, *x.shape[2:])
    for b in range(len(x)):  # one position after the other, so that memory is that of one product
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                product = a[b, :, row, column, None] * g[b, None, :, row, column]
                product = product.clamp_(min=0) if aggregation == "filter_norm" else product
                result[b, 0, row, column] = torch.linalg.vector_norm(product)
    return result


IDENTITY = r"bias|scaling|(?:conv\d+x\d+|depthwise\d+x\d+)(?:[_-]?(?:depthwise|dw))?"


def identity(name: str) -> str:
    """Our name of a virtual identity."""
    taps = re.search(r"\d+x\d+", name)
    return f"depthwise{taps[0]}" if taps and re.search("depthwise|dw", name) else name


class Maps(nn.Module):
    """The maps that a contract's outputs name, of one network, target and score."""

    def __init__(
        self, model: nn.Module, names: list[str], target: int | None, rate: float, sigma: float | None
    ) -> None:
        super().__init__()
        self.model, self.names, self.target, self.rate, self.sigma = model, names, target, rate, sigma

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        passes: dict[tuple[str, bool, float], Pass] = {}

        def at(layer: str, rate: float = 0.0, negate: bool = False) -> Pass:
            key = (layer, negate, rate)
            if key not in passes:
                meta = (
                    {"weights": stepped_weights(self.model, images, self.target, rate, negate=negate)} if rate else {}
                )
                passes[key] = gradients(self.model, images, self.target, [layer] if layer else [], **meta)
            return passes[key]

        def one(method: str, layer: str, **meta: Any) -> Tensor:
            """The map of a published method, possibly after a step."""
            if method.startswith("gradient"):
                gradient = at("", **meta).images.gradient
                return (gradient.abs() if method == "gradient_max_abs" else gradient).amax(1, keepdim=True)
            found = at(layer, **meta)
            if method == "grad_cam":
                return grad_cam(found, self.model, layer)
            if method == "norm_grad_proper":
                return layer_maps(found, self.model, [layer], "own", "norm")[layer]
            if method == "norm_grad_selective_proper":
                return layer_maps(found, self.model, [layer], "own", "filter_norm")[layer]
            return layer_maps(found, self.model, [layer], **METHODS[NAMES[method]])[layer]

        def grid_map(layer: str, kind: str, aggregation: str) -> Tensor:
            point = at(layer).layers[layer]
            return published_map(point.output, point.gradient, identity(kind), aggregation)

        results: dict[str, Tensor] = {}
        layers = list(dict.fromkeys(m[1] for name in self.names if (m := self.grid(name)) and m[1] != "combined"))
        for name in self.names:
            parts = name.split("/")
            if name == "logits":
                results[name] = at("").output
            elif name.startswith("combined/"):
                maps = {layer: grid_map(layer, *parts[1:]) for layer in layers}
                results[name] = combine(maps, (224, 224)).squeeze()
            elif match := self.grid(name):
                results[name] = grid_map(*match.groups())
            elif parts[0] == "meta":
                step = re.match(r"(-?)lr(-?)([\d.e-]+)", parts[3])
                negate = "neg" in name or bool(step[1] or step[2])
                results[name] = one(parts[1], parts[2], rate=float(step[3]), negate=negate)
            elif parts[0] == "resized_smoothed":
                maps = F.interpolate(one(parts[1], parts[2]), images.shape[2:], mode="bilinear", align_corners=False)
                results[name] = smooth(maps, self.sigma)
            else:
                results[name] = one(*parts)
        return results

    @staticmethod
    def grid(name: str) -> re.Match[str] | None:
        """Layer, identity and aggregation of a map's name."""
        return re.fullmatch(rf"([^/]+)/({IDENTITY})/({'|'.join(AGGREGATIONS)})", name)


def build_contract(contract: Contract) -> Callable[..., Any]:
    """A network with the maps that the outputs name."""
    settings = contract.settings
    names = [output["name"].removeprefix("out.") for output in contract.outputs]
    parts = [m for name in names if (m := Maps.grid(name)) and m[1] != "combined"]
    ordered = lambda i: list(dict.fromkeys(m[i] for m in parts))  # noqa: E731
    aggregations = set(ordered(3))
    if "aggregation" in settings and set(settings["aggregation"]) != aggregations:
        raise UserError(f"{contract.path}: aggregation is {settings['aggregation']}; its outputs have {aggregations}")
    if "virtual_identity" in settings and set(settings["virtual_identity"]) != (identities := set(ordered(2))):
        told = settings["virtual_identity"]
        raise UserError(f"{contract.path}: virtual_identity is {told}; its outputs have {identities}")
    if "output_keys" in settings:
        keys = settings["output_keys"]
        listed = [str(key).removeprefix("out.") for key in (keys if isinstance(keys, list) else [])]
        known = {*names, *ordered(1), *ordered(2), *ordered(3), *(part for name in names for part in name.split("/"))}
        if isinstance(keys, list) and (unknown := [key for key in listed if key not in known]):
            raise UserError(f"{contract.path}: output_keys names {unknown}, which no output has")
    contract.require_text(
        score="(the |class )?logit.*",
        combined=r"product over (the |all )?\w+ layers.*",
        meta=r".*one SGD step.*",
        resized_smoothed=r"bilinear to .*align_corners False.*replicate padding",
        proper_layers=".*unfolded input.*output gradient.*",
    )
    if parts:
        contract.require(layers=ordered(1))
    told = str(settings["target"]) if "target" in settings else ""
    match = re.search(r"\d+", told)
    target = int(match[0]) if match else None
    text = str(settings["resized_smoothed"]) if "resized_smoothed" in settings else ""
    sigma = re.search(r"sigma ([\d.]+)", text)
    rate = re.search(r"lr ([\d.e-]+)", str(settings["meta"]) if "meta" in settings else "")
    for name in names:
        if (found := re.search(r"/-?lr-?([\d.e-]+)$", name)) and rate and float(found[1]) != float(rate[1]):
            raise UserError(f"{contract.path}: meta steps by {rate[1]}, its outputs by {found[1]}")
    return Maps(
        network(contract), names, target, float(rate[1]) if rate else 0.0, float(sigma[1]) if sigma else None
    ).eval()
