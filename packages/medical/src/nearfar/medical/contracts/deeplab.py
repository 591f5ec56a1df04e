"""Contracts of DeepLab and the dense CRF: any published variant from its settings and shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.medical.models.deeplab import RULES, DeepLabV2, DeepLabV3, _trunk_settings, published_state
from nearfar.ops.aggregation.multi_scale import multi_scale_scores
from nearfar.ops.convolution.aspp import ASPP, SummedASPP
from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_softmax


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, pyramid or CRF that a contract describes."""
    settings, state = contract.settings, contract.state()
    contract.document("layout")
    if "bi_w" in settings or "crf" in contract.variant:
        if not any(isinstance(settings[name], list) for name in ("pos_w", "bi_w")):
            contract.require(compatibility="Potts")
        if settings["pos_w"] == 0:
            contract.document("pos_xy_std")  # of a kernel without weight
        if settings["bi_w"] == 0:
            contract.document("bi_xy_std", "bi_rgb_std")
        return _CRF(settings).eval()
    rates = settings.get("atrous_rates") or settings.get("rates")
    if "c0.weight" in state:
        out, in_channels = state["c0.weight"].shape[:2]
        contract.require(in_ch=in_channels, out_ch=out)
        rules = [(r"^c(\d+)\.", r"branches.\1.")]
        return loaded(SummedASPP(in_channels, out, rates), rename(state, rules, anywhere=True))
    if "stages.c0.conv.weight" in state:
        out, in_channels = state["stages.c0.conv.weight"].shape[:2]
        contract.require(in_ch=in_channels, out_ch=out)
        contract.require_text(branches="1x1, .* 3x3 atrous, image pool.*")
        aspp = rename(rename(state, [("^", "aspp.")]), RULES, anywhere=True)  # type: ignore[arg-type]
        return loaded(ASPP(in_channels, out, rates), rename(aspp, [(r"^aspp\.", "")], anywhere=True))
    options: dict[str, Any] = {"rates": rates} if rates else {}
    contract.require(bn_eps=1e-5)
    trunk = _trunk_settings(published_state(rename(state, [(r"^base\.", "")], anywhere=True)))
    network = (
        rf"ResNet-{2 + 3 * sum(trunk['depths'])}, Caffe/MSRA layout: stride in the first 1x1 .*, ceil-mode max pool"
    )
    last = next(name for name in reversed(state) if name.endswith("weight"))
    contract.require(n_blocks=trunk["depths"], in_channels=trunk["in_channels"], n_classes=len(state[last]))
    contract.require_text(backbone=network, msc="pixel-wise max .*align_corners False")
    several = any(name.startswith("base.") for name in state)
    scales = settings.get("msc_scales", (0.5, 0.75) if several else ())
    if any("fc1." in name for name in state):
        options["output_stride"] = settings.get("output_stride", 16)
        if grids := settings.get("multi_grids"):
            options["multi_grid"] = grids
        model = DeepLabV3.from_published(state, full_size=False, **options)
        contract.require_text(decoder="(?!none|false).+" if model.decoder else "none|false")
        return _MultiScale(model, scales).eval() if scales else model
    contract.require(output_stride=8)
    options["scales"] = scales
    return DeepLabV2.from_published(state, full_size=False, **options)


class _MultiScale(nn.Module):
    """A network of one size on several, joined by their maximum."""

    def __init__(self, network: nn.Module, scales: Sequence[float]) -> None:
        super().__init__()
        self.network, self.scales = network, tuple(scales)

    def forward(self, x: Tensor) -> Tensor:
        return multi_scale_scores(self.network, x, self.scales)[-1]


class _CRF(nn.Module):
    """The CRF of a contract, on probabilities from its first input and a picture made of its second."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.clip = settings.get("clip", 1e-5)
        self.crf = DenseCRF(
            settings["iterations"],
            torch.as_tensor(settings["pos_w"], dtype=torch.float32),
            settings["pos_xy_std"],
            torch.as_tensor(settings["bi_w"], dtype=torch.float32),
            settings["bi_xy_std"],
            settings["bi_rgb_std"],
            normalization=settings.get("normalisation", "symmetric").lower(),
        )

    def forward(self, logits: Tensor, noise: Tensor) -> Tensor:
        height, width = noise.shape[-2:]
        y = torch.arange(height, dtype=torch.float64, device=noise.device)[:, None] / (height - 1)
        x = torch.arange(width, dtype=torch.float64, device=noise.device) / (width - 1)
        c = torch.arange(noise.shape[1], dtype=torch.float64, device=noise.device)[:, None, None]
        base = 128 + 64 * torch.sin(2 * torch.pi * (x + c * 0.25)) * torch.cos(2 * torch.pi * y)
        image = (base + noise).round().clamp(0, 255).to(logits.dtype)
        return self.crf(unary_from_softmax(logits.softmax(1), self.clip), image)[0]
