"""RMT: contracts, the surface, decay tables in checkpoints, token labelling, the dense form."""

from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F

from nearfar.core.contracts import Contract
from nearfar.core.errors import CheckpointError, UserError
from nearfar.ops.attention.manhattan import decay_rates
from nearfar.vision.classification.token_labels import TokenLabelLoss
from nearfar.vision.contracts.rmt import build_contract
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.models.rmt import RMT, RMTBlock
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestRMT(BackboneTester):
    model = RMT
    name = "rmt_t"
    tiny: ClassVar = {
        "depths": (1, 1, 1, 2),
        "dims": (8, 16, 32, 48),
        "num_heads": (2, 2, 4, 4),
        "layer_scale": (0, 0, 0.5, 0.5),
        "projection": 40,
    }
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "decomposed": (True, False)}


def labelled(**settings: int | bool) -> RMT:
    return randomize(RMT(**TestRMT.tiny, num_classes=5, **settings))


@torch.no_grad()
@pytest.mark.parametrize("aux_dim", [48, 40])
def test_token_labelling_form(aux_dim: int, tmp_path: Path) -> None:
    model, x = labelled(aux_dim=aux_dim), torch.randn(2, 3, 64, 96)
    features, y = model.forward_features(x), model(x)
    seen = features if aux_dim == 48 else model.head.norm(features)
    dense = F.linear(seen.flatten(2).mT, model.aux_head.weight, model.aux_head.bias)
    close(y, model.head(features) + 0.5 * dense.amax(1), 1e-6)
    model.save_pretrained(tmp_path)
    again = RMT.from_pretrained(tmp_path)
    close(again(x), y, 1e-6)
    close(again.fuse()(x), y, 1e-5)
    assert RMT.from_published(model.state_dict(), num_classes=3)(x).shape == (2, 3)
    model.reset_classifier(5, "")
    assert model(x).shape == (2, 5, 2, 3)
    model.reset_classifier(7, "avg")
    assert model.eval()(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 40)


@pytest.mark.parametrize("aux_dim", [48, 40])
def test_training_with_token_labels(aux_dim: int) -> None:
    model, x = labelled(aux_dim=aux_dim).train(), torch.randn(4, 3, 64, 96)
    assert model(x).shape == (4, 5)  # without labels, as in eval mode
    model.token_labels = True
    logits, dense, box = model(x)
    assert logits.shape == (4, 5)
    assert dense.shape == (4, 6, 5)
    target = torch.rand(4, 5, 8).softmax(1)
    TokenLabelLoss()((logits, dense, box), target).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="needs aux_dim"):
        labelled(token_labels=True)


@torch.no_grad()
def test_mixing_changes_places_and_puts_logits_back() -> None:
    model, x = labelled(aux_dim=48), torch.randn(2, 3, 64, 96)
    apart, dense, _ = model.forward_train(x, (0, 0, 0, 0))
    close(apart, model.head(model.forward_features(x)), 1e-6)
    other, swapped, _ = model.forward_train(x, (0, 0, 2, 3))
    close(other, apart.flip(0), 1e-5)  # the whole picture moved
    close(swapped, dense, 1e-5)  # and its positions' logits came back
    _, mixed, _ = model.forward_train(x, (0, 1, 2, 2))
    assert (mixed - dense).abs().amax() > 1e-3  # attention sees the other picture


@torch.no_grad()
def test_decay_and_decomposition_are_kept() -> None:
    settings = {
        **TestRMT.tiny,
        "num_heads": (1, 2, 4, 8),
        "decay_initial": (1, 2, 2, 3),
        "decay_range": (3, 4, 5.5, 6),
        "decomposed": (False, True, True, False),
    }
    model, x = randomize(RMT(**settings, num_classes=3)), torch.randn(1, 3, 64, 64)
    again = RMT.from_published(model.state_dict())
    assert [stage.blocks[0].attn.decomposed for stage in again.stages] == [False, True, True, False]
    assert [stage.blocks[0].attn.decay_initial for stage in again.stages] == [1, 2, 2, 3]
    assert [stage.blocks[0].attn.decay_range for stage in again.stages][1:] == [4, 5.5, 6]  # one head has no range
    close(again(x), model(x), 1e-6)


def test_what_names_and_shapes_do_not_tell_must_be_said() -> None:
    published = {name: value for name, value in RMT(**TestRMT.tiny).state_dict().items() if ".attention" not in name}
    with pytest.raises(CheckpointError, match="num_heads and decay_initial and decay_range and decomposed; give them"):
        RMT.from_published(published)
    given = {"num_heads": (2, 2, 4, 4), "decay_initial": (2,) * 4, "decay_range": (4,) * 4, "decomposed": (True,) * 4}
    assert RMT.from_published(published, **given).stages[2].blocks[0].attn.decomposed
    # the published file holds the tables of the decay, from which all but one follow
    published |= {f"layers.{i}.Relpos.decay": decay_rates(2 + i, 2, 3 + i).float() for i in range(4)}
    published |= {"layers.0.Relpos.angle": torch.ones(4)}
    dims = (8, 18, 32, 50)
    model = RMT(**{**TestRMT.tiny, "dims": dims, "num_heads": (2, 3, 4, 5)})
    published = {**model.state_dict(), **{k: v for k, v in published.items() if "Relpos" in k}}
    published = {name: value for name, value in published.items() if not name.endswith(".attention")}
    loaded = RMT.from_published(published, decomposed=(True, False, True, False))
    assert [s.blocks[0].attn.num_heads for s in loaded.stages] == [2, 3, 4, 5]
    assert [s.blocks[0].attn.decay_range for s in loaded.stages] == [3, 4, 5, 6]


def test_published_variants_need_no_tables() -> None:
    with torch.device("meta"):
        state = RMT(depths=(3, 4, 18, 4), mlp_ratios=(4, 4, 3, 3)).state_dict()
    bare = {name: value for name, value in state.items() if not name.endswith(".attention")}
    assert RMT.published_settings(bare)["decomposed"] == (True, True, True, False)
    assert RMT.variant(RMT.published_settings(bare)) == "rmt_s"


@torch.no_grad()
def test_dense_checkpoint() -> None:
    """The released detection and segmentation backbones: no head, a norm of eps 1e-5 on every output."""
    model = randomize(RMT(**TestRMT.tiny, num_classes=0, feature_norms=True))
    state = {name.replace("feature_norms.", "extra_norms."): value for name, value in model.state_dict().items()}
    x = torch.randn(1, 3, 64, 96)
    loaded = RMT.from_published(state).contract_form()
    for level, norm, got in zip(model.forward_pyramid(x), model.feature_norms, loaded(x), strict=True):
        want = F.layer_norm(level.movedim(1, -1), level.shape[1:2], norm.weight, norm.bias, 1e-5).movedim(-1, 1)
        close(got, want, 1e-5)


def test_maps_of_every_block_and_ranges_of_every_head() -> None:
    model = randomize(timm.create_model("rmt_t", **TestRMT.tiny))
    maps = attention_maps(model, torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps.values()] == [
        (1, 2, 256, 256), (1, 2, 64, 64), (1, 4, 16, 16), (1, 4, 4, 4), (1, 4, 4, 4),
    ]  # fmt: skip
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@torch.no_grad()
@pytest.mark.parametrize("decomposed", [True, False])
def test_contract_of_a_block(decomposed: bool) -> None:
    attention = randomize(timm.create_model("rmt_t", **TestRMT.tiny)).stages[2].blocks[0].attn
    attention.decomposed = decomposed
    block, x = RMTBlock(32, attention, 3, 1.0, 0.0), torch.randn(1, 6, 5, 32)
    names = (("norm1", "retention_layer_norm"), ("norm2", "final_layer_norm"), ("pos_embed", "pos.conv"))
    names += (("attn.proj", "retention.out_proj"), ("attn.lepe", "retention.lepe.conv"))
    names += (*((f"attn.{p}", f"retention.{p}_proj") for p in "qkv"), ("ffn.dwconv", "ffn.dwconv.conv"))
    shapes = {}
    for name, shape in shapes_of(block).items():
        for ours, theirs in names:
            if name.startswith(f"{ours}."):
                name = name.replace(ours, theirs, 1)
        shapes[name] = (1, 1, 1, 32) if "gamma" in name else shape
    settings = {"heads": 4, "decay_initial": 2, "decay_range": 6, "decomposed_attention": decomposed}
    contract = described(shapes, settings, inputs=[tuple(x.shape)])
    operator = build_contract(contract)
    inner = operator.operator
    assert inner.attn.decomposed == decomposed
    block.load_state_dict(inner.state_dict())
    close(operator(x), block.eval()(x.movedim(-1, 1)).movedim(1, -1), 1e-6)


def test_contract_of_another_build_is_refused() -> None:
    contract = described({"fc1.weight": (8, 4)}, {"ffn_conv_kernel": 5})
    with pytest.raises(UserError, match="ffn_conv_kernel is 5; rmt"):
        build_contract(Contract(contract.path, {**contract.content, "system": "rmt"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": (8, 16)}, "settings of the stages differ in number"),
        ({"aux_dim": 7}, "aux_dim is 7"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RMT(**{**TestRMT.tiny, **settings})
