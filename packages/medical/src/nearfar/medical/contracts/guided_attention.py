"""Contracts of multi-scale guided attention: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.medical.models.guided_attention import _LAYER, _SEMANTIC, GuidedAttention, GuidedOutputs
from nearfar.ops.attention.guided import AttentionLayer, SemanticModule
from nearfar.ops.attention.position_channel import ChannelAttention, PositionAttention

_ATTENTION = ((r"^(query|key|value)_conv\.", r"\1."),)


def published_outputs(outputs: GuidedOutputs) -> list[Tensor]:
    """The 32 tensors in the order of the published training output; codes flattened over the batch too."""
    codes = [outputs.codes[stack][scale].flatten() for scale in (3, 2, 1, 0) for stack in (0, 1)]
    rest = (outputs.inputs, outputs.reconstructions, outputs.logits)
    return codes + [tensor for group in rest for stack in group for tensor in stack]


class _Published(nn.Module):
    def __init__(self, model: GuidedAttention) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return published_outputs(self.model.every(x))


class _PublishedSemantic(SemanticModule):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, reconstruction = super().forward(x)
        return code.flatten(), reconstruction


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, an attention, an attention layer or a semantic module that a contract describes."""
    state = contract.state()
    named = lambda rules: rename(state, rules, anywhere=True)  # noqa: E731
    contract.document("layout")
    contract.require_text(scale="none")  # of the products that attention takes the softmax of
    if "resnext.layer0.0.weight" in state:
        model = GuidedAttention.from_published(state)
        channels, dim = model.encoder.conv1.in_channels, model.fusion.down[0].conv.out_channels
        blocks = sum(len(getattr(model.encoder, f"layer{i}")) for i in range(1, 5))
        groups = model.encoder.layer1[0].conv2.groups
        contract.require_text(encoder=rf"ResNe[X]?t-{2 + 3 * blocks}( {groups}x\d+d)?(, {channels}-channel 7x7 stem)?")
        contract.require(
            num_classes=model.predict[0][0].out_channels,
            in_channels=channels,
            pyramid_channels=dim,
            attention_stacks=len(model.stacks),
            semantic_channels=2 * dim,
        )
        return _Published(model).eval() if len(contract.outputs) > 1 else model
    if "enc1.encode.0.weight" in state:
        contract.require(channels=state["enc1.encode.0.weight"].shape[1])
        return loaded(_PublishedSemantic(state["enc1.encode.0.weight"].shape[1]), named(_SEMANTIC))
    if "attn.0.weight" in state:
        out, in_channels = state["attn.0.weight"].shape[:2]
        pam = "attn.3.query_conv.weight" in state
        contract.require(in_channels=in_channels, channels=out)
        attention = PositionAttention(out, len(state["attn.3.query_conv.bias"])) if pam else ChannelAttention()
        return loaded(AttentionLayer(in_channels, out, attention), named(_LAYER))
    if "query_conv.weight" in state:
        qk_dim, dim = state["query_conv.weight"].shape[:2]
        contract.require(channels=dim, query_key_channels=qk_dim)
        return loaded(PositionAttention(dim, qk_dim), named(_ATTENTION))
    contract.require(channels=contract.inputs[0]["shape"][1])
    return loaded(ChannelAttention(), state)
