"""Contracts of Sparsifiner: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.ops.attention.predicted_sparsity import ConnectivityPredictor, PredictedSparseAttention
from nearfar.vision.models.sparsifiner import Sparsifiner

IN_WORDS = ("reduced_tokens", "attention_budget", "attention_budget_per_row", "predictor_scale", "token_budgets")
"""Settings that spell out what the others and the shapes say."""


class Details(nn.Module):
    """Logits, features, what the predictors of the first and last block said, and shares of zeros.

    In float64: two hard choices in every block turn on rounding, and the recorded numbers are those of a float64 run.
    """

    def __init__(self, model: Sparsifiner) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features, told, active = self.model.double().details(x.double())
        bases = [block.attn.predictor.effective_basis() for block in self.model.blocks]
        zeros = lambda tensors: torch.stack([(t == 0).float().mean() for t in tensors]).mean()[None]  # noqa: E731
        outputs = {"logits": self.model.forward_head(features), "features": features[:, 1:]}
        for i in (0, len(told) - 1):
            outputs |= {
                f"approx_attn_block{i}": told[i].approximate,
                f"attn_mask_block{i}": told[i].mask.float(),
                f"basis_coef_block{i}": told[i].coefficients,
            }
        outputs["basis_sparsity"] = zeros(bases)
        outputs["basis_coef_sparsity"] = zeros([t.coefficients for t in told])
        outputs["attn_mask_sparsity"] = zeros([t.mask for t in told])
        if active is not None:
            outputs["last_token_mask"] = active.float()
        return outputs


class InDouble(nn.Module):
    """Logits alone, in float64 for the same reason."""

    def __init__(self, model: Sparsifiner) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.double()(x.double())


class OneAttention(nn.Module):
    """An attention with what its predictor said."""

    def __init__(self, attention: PredictedSparseAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, found, _ = self.attention(x)
        return {
            "x": y,
            "basis_coef": found.coefficients,
            "approx_attn": found.approximate,
            "attn_mask": found.mask.float(),
            "masked_attn": self.attention.attention_map(x),
        }


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network with its details, or one attention."""
    settings, state = contract.settings, contract.state()
    sparse = {
        "keep_rate": settings.get("attention_keep_rate", 0.25),
        "coefficients": settings.get("basis_coefficient_top_k", 8),
        "threshold": settings.get("basis_threshold", 0.02),
        "stable": False,
    }
    if "cls_token" in state:
        given: dict[str, Any] = {"share": settings.get("share_in_out_projection", False)}
        names = {"skip_lambda": "skip_lambda", "layer_norm_eps": "eps", "heads": "num_heads"}
        given |= {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
        model = Sparsifiner.from_published(
            state,
            token_keep_rate=settings.get("token_keep_rate", 1.0),
            prune_at=settings.get("token_pruning_blocks", ()),
            **sparse,
            **given,
        )
        contract.require(
            image_size=model.img_size[0],
            patch_size=model.patch_size,
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.embed_dim,
            qkv_bias=model.blocks[0].attn.qkv.bias is not None,
            classes=model.num_classes,
            token_reduction_factor=model.blocks[0].attn.predictor.num_tokens
            // model.blocks[0].attn.predictor.reduce.shape[1],
            channel_reduction_factor=model.embed_dim
            // model.blocks[0].attn.num_heads
            // model.blocks[0].attn.predictor.q.out_features,
        )
        contract.document("backbone", *IN_WORDS)
        return InDouble(model) if contract.outputs[0]["name"] == "out" else Details(model)
    state = rename(state, [(r"attn\.", "blocks.0.attn.")])
    state = rename(Sparsifiner.published_state(state), [(r"blocks\.0\.attn\.", "")])
    dim, bias = len(state["proj.bias"]), "qkv.bias" in state
    reduced, width = state["predictor.q.weight"].shape
    contract.require(dim=dim, heads=dim // width, qkv_bias=bias)
    contract.document("tokens", "reduced_channels", *IN_WORDS)
    predictor = ConnectivityPredictor(width, *state["predictor.reduce"].shape, reduced, **sparse)
    return OneAttention(loaded(PredictedSparseAttention(dim, dim // width, predictor, qkv_bias=bias), state)).eval()
