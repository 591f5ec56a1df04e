"""Contracts of MSA-Conv: any published variant from its settings and shapes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.attention.window import MSAConv, window_products, window_sums
from nearfar.vision.models.tic import TiCLike


class LocalProducts(nn.Module):
    """The products of queries and keys, and their softmax times the values, one head."""

    def __init__(self, kernel_size: Sequence[int], dilation: int, scale: float) -> None:
        super().__init__()
        self.kernel_size, self.dilation, self.scale = tuple(kernel_size), dilation, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (x[:, None] for x in (q, k, v))
        products = window_products(query * self.scale, key, self.kernel_size, self.dilation)
        mixed = window_sums(products.softmax(2), value, self.kernel_size, self.dilation)
        return products[:, 0], mixed[:, 0]


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The layer, its two local products, or nearfar's own pyramid of it, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document("outputs", "attention_dropout")  # dropout: of training alone
    kernel = settings.get("kernel_size", 3)
    dilation = settings.get("dilation", 1)
    if not state:
        contract.require(channels=contract.inputs[0]["shape"][1])
        return LocalProducts(pair(kernel), dilation, float(settings.get("scale", 1.0)))
    if "stem.0.weight" in state:
        return TiCLike.from_published(state)
    out, channels, *size = state["mlp.weight"].shape
    contract.require(in_channels=channels, out_channels=out, output_conv_bias="mlp.bias" in state)
    contract.require(softmax_scale="in_channels**-0.5")
    if "kernel_size" in settings and pair(kernel) != tuple(size):
        raise UserError(f"{contract.path}: kernel_size is {kernel}, the state has {size}")
    border = "mask" if "mask" in str(settings.get("padding_keys", "")) else "zero"
    layer = MSAConv(
        channels,
        out,
        size,
        stride=settings.get("stride", 1),
        dilation=dilation,
        padding=settings.get("output_conv_padding", 1),
        bias="mlp.bias" in state,
        num_heads=settings.get("heads", 1),
        dropout=settings.get("attention_dropout", 0.1),
        border=border,
    )
    return loaded(layer, state)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
