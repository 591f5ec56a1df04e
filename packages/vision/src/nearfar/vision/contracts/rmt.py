"""Contracts of RMT: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.ops.convolution.conv_ffn import ConvFFN
from nearfar.vision.models.rmt import RMT, RMTBlock

PER_STAGE = {
    "heads": "num_heads",
    "decay_initial": "decay_initial",
    "decay_range": "decay_range",
    "decomposed_attention": "decomposed",
}
"""Settings of a contract that shapes do not tell, and ours."""


class ChannelsLast(nn.Module):
    """An operator on (B, *S, C)."""

    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x.movedim(-1, 1)).movedim(1, -1)


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, its feature pyramid, one block or one operator, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.document(  # told by shapes, or words for people
        "kernel", "hidden", "dim", "rotary", "activation", "image_size", "mlp_ratios", "depths", "layer_scale",
        "projection_dim",
        "layout", "heads", "decay_initial", "decay_range",
    )  # fmt: skip
    contract.require(
        local_enhancement_kernel=5, position_conv_kernel=3, ffn_conv_kernel=3, layernorm_eps=1e-6, batchnorm_eps=1e-5
    )
    contract.document("rotary")
    contract.require_text(activation=r"exact GELU.*")
    if "stem.0.weight" not in RMT.published_state(state):
        operator = build_operator(contract, state, settings)
        return ChannelsLast(operator) if settings.get("layout", "B H W C") == "B H W C" else operator
    given = {ours: settings[name] for name, ours in PER_STAGE.items() if name in settings}
    found = RMT.published_settings(RMT.published_state(state))
    contract.require(
        dims=found["dims"],
        depths=found["depths"],
        mlp_ratios=found["mlp_ratios"],
        layer_scale=[bool(scale) for scale in found["layer_scale"]],
        projection_dim=found.get("projection"),
        image_size=contract.inputs[0]["shape"][-2:],
        num_classes=len(state.get("head.bias", ())),
        token_label_head="aux_head.weight" in state,
    )
    return RMT.from_published(state, **given).contract_form(contract)


def build_operator(contract: Contract, state: dict[str, Tensor], settings: dict[str, Any]) -> nn.Module:
    """A block, an attention or a feed-forward layer with its published state."""
    place = "stages.0.blocks.0."
    inner = {name: value for name, value in state.items() if not name.startswith("Relpos.")}
    published = RMT.published_state({place + name: value for name, value in inner.items()})
    inner = {name.removeprefix(place): value for name, value in published.items()}
    if not any(name.startswith(("attn.", "norm1.")) for name in inner):
        inner = rename(inner, ((r"ffn\.", ""), (r"dwconv\.conv\.", "dwconv.")))
        hidden, dim = inner["fc1.weight"].shape[:2]
        contract.require(dim=dim, hidden=hidden, kernel=inner["dwconv.weight"].shape[-1])
        return loaded(ConvFFN(dim, hidden, inner["dwconv.weight"].shape[-1]), inner)
    dim = len(inner["attn.q.weight"])
    contract.require(dim=dim)
    tables = [shape for name, shape in contract.shapes.items() if name.endswith("Relpos.decay")]
    heads = settings["heads"] if "heads" in settings else tables[0][0]
    decomposed = settings.get("decomposed_attention", "decomposed" in contract.variant)
    attention = ManhattanAttention(
        dim, heads, settings.get("decay_initial", 2), settings.get("decay_range", 4), decomposed=bool(decomposed)
    )
    if "norm1.weight" not in inner:
        return loaded(attention, {name.removeprefix("attn."): value for name, value in inner.items()})
    scale = 1.0 if "gamma_1" in inner else 0.0
    block = RMTBlock(dim, attention, len(inner["ffn.fc1.weight"]) / dim, scale, 0.0)
    return loaded(block, inner)
