"""EViT and Sparsifiner: the plain model at keep rate 1, timm's weights, the switch on timm's models, dense maps."""

from pathlib import Path

import pytest
import timm
import torch

from nearfar.core.errors import CheckpointError, UserError
from nearfar.vision.models.evit import EViT, reorganize_tokens, scheduled_keep_rate, whole_tokens
from nearfar.vision.models.sparsifiner import Sparsifiner
from tests.vision.base import close, randomize

TINY = {"dim": 64, "depth": 4, "num_heads": 2, "img_size": 64, "num_classes": 5, "reduce_at": (1, 2)}


@torch.no_grad()
def test_published_sizes() -> None:
    for name, params in (("evit_deit_tiny", 5.72), ("evit_deit_small", 22.05), ("evit_deit_base", 86.57)):
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name).parameters())
        assert abs(count / 1e6 - params) <= 0.011
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model("sparsifiner_deit_small").parameters()) == 22_251_880
        lv_vit = sum(p.numel() for p in timm.create_model("sparsifiner_lvvit_small").parameters())
        plain = sum(p.numel() for p in timm.create_model("evit_lvvit_small").parameters())
    assert abs(lv_vit / 1e6 - 26.42) < 0.02
    assert abs(plain / 1e6 - 26.15) < 0.05


@torch.no_grad()
def test_keep_rate_one_is_the_plain_model_and_timms() -> None:
    theirs = randomize(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3, num_classes=5))
    ours = EViT.from_published(theirs.state_dict(), keep_rate=1.0, reduce_at=(1, 2), fuse=True)
    x = torch.randn(2, 3, 64, 64)
    close(ours(x), theirs(x), 1e-5)
    plain = EViT.from_published(theirs.state_dict(), keep_rate=0.5, reduce_at=(), fuse=True)
    assert torch.equal(ours(x), plain(x)), "bit for bit"
    for keep, fuse in ((0.5, True), (0.5, False), (5, True)):
        ours.keep_rate, ours.fuse_tokens = keep, fuse
        switched = reorganize_tokens(theirs, keep, (1, 2), fuse=fuse)
        close(ours(x), switched(x), 1e-5)
        assert list(switched.state_dict()) == list(theirs.state_dict())


@torch.no_grad()
def test_maps_are_whole_and_tokens_fewer() -> None:
    model, x = randomize(EViT(**TINY, keep_rate=0.5)), torch.randn(2, 3, 64, 64)
    for fuse in (True, False):
        model.fuse_tokens = fuse
        tokens, trail = model.trail(x)
        assert tokens.shape[1] == 1 + (6 if fuse else 4)
        assert [k.shape[1] for k in trail.kept] == ([8, 5] if fuse else [8, 4])
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape for m in maps] == [(2, 64, 4, 4)] * 4
        assert all(m.isfinite().all() for m in maps)
        close(model.forward_head(tokens), model(x), 1e-6)
    features = timm.create_model(
        "evit_deit_tiny", features_only=True, **{k: v for k, v in TINY.items() if k != "num_classes"}
    )
    assert [f.shape[-2:] for f in features.eval()(x)] == [(4, 4)] * 3


@torch.no_grad()
def test_what_no_shape_tells_is_asked_for_and_saved(tmp_path: Path) -> None:
    settings = {name: value for name, value in TINY.items() if name != "num_classes"}
    model = randomize(timm.create_model("evit_deit_tiny", num_classes=5, keep_rate=0.4, fuse=False, **settings))
    x = torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    found = EViT.from_pretrained(tmp_path)
    assert (found.keep_rate, found.fuse_tokens, found.reduce_at) == (0.4, False, (1, 2))
    close(found(x), model(x), 1e-6)
    with pytest.raises(CheckpointError, match="do not tell num_heads and keep_rate and reduce_at and fuse"):
        EViT.from_published(model.state_dict())
    sparse = randomize(timm.create_model("sparsifiner_deit_small", img_size=64, depth=2, keep_rate=0.5, threshold=0.1))
    sparse.save_pretrained(tmp_path / "sparse")
    close(Sparsifiner.from_pretrained(tmp_path / "sparse")(x), sparse(x), 1e-6)


def test_gradients_reach_everything_through_the_fused_token() -> None:
    model = EViT(**TINY, keep_rate=0.3).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_schedule_and_refusals() -> None:
    assert scheduled_keep_rate(3, 0.7) == 1
    assert scheduled_keep_rate(55, 0.7) == pytest.approx(0.85)
    assert scheduled_keep_rate(200, 0.7) == 0.7
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        EViT(**TINY, keep_rate=0.0)
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        EViT(**{**TINY, "reduce_at": (4,)})
    with pytest.raises(ValueError, match="2 blocks"):
        EViT(**TINY, keep_rate=(0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="VisionTransformer"):
        reorganize_tokens(timm.create_model("test_resnet"))
    with pytest.raises(UserError, match="one class token or none, not 3"):
        reorganize_tokens(timm.create_model("test_vit", reg_tokens=2), 0.5, (1,))
    with pytest.raises(ValueError, match="blocks 0 to"):
        reorganize_tokens(timm.create_model("test_vit"), 0.5, (40,))
    with pytest.raises(ValueError, match="3 values"):
        reorganize_tokens(timm.create_model("test_vit"), (0.5, 0.5, 0.5), (1,))


@torch.no_grad()
def test_rates_of_each_block_counts_and_models_without_class_token() -> None:
    x = torch.randn(2, 3, 64, 64)
    for tokens in ({}, {"class_token": False, "global_pool": "avg"}):
        model = randomize(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4, num_classes=5, **tokens))
        plain = model(x)
        reorganize_tokens(model, (0.5, 3), (1, 2), fuse=False)
        seen: list[int] = []
        note = lambda _m, _i, y, seen=seen: seen.append(y.shape[1])  # noqa: E731
        handles = [block.register_forward_hook(note) for block in model.blocks]
        assert not torch.allclose(model(x), plain)
        prefix = 0 if tokens else 1
        assert seen == [16 + prefix, 8 + prefix, 3 + prefix, 3 + prefix]
        for handle in handles:
            handle.remove()
        assert torch.equal(reorganize_tokens(model, 1.0, (1, 2))(x), plain), "bit for bit"
        assert reorganize_tokens(model, 0.5, (1, 2))(x).isfinite().all()
    assert whole_tokens(0.7, 196) == 138 / 196


@torch.no_grad()
def test_sparsifiner_is_the_dense_model_when_it_keeps_all() -> None:
    sizes = {"dim": 64, "depth": 3, "num_heads": 2, "img_size": 64, "num_classes": 5}
    sparse = randomize(Sparsifiner(**sizes, keep_rate=1.0, coefficients=100))
    plain = EViT(**sizes, reduce_at=())
    plain.load_state_dict({k: v for k, v in sparse.state_dict().items() if "predictor" not in k})
    x = torch.randn(2, 3, 64, 64)
    close(sparse(x), plain.eval()(x), 1e-5)
    assert not torch.allclose(randomize(Sparsifiner(**sizes, keep_rate=0.2))(x), plain(x), atol=1e-3)
    pruned = randomize(Sparsifiner(**sizes, token_keep_rate=0.5, prune_at=(0, 1)))
    features, told, active = pruned.details(x)
    assert active.sum(1).tolist() == [4, 4]
    assert len(told) == 3
    assert features.isfinite().all()
    conv = randomize(Sparsifiner(**sizes, stem="conv", aux_head=True, skip_lambda=2.0, qkv_bias=False, eps=1e-5))
    assert Sparsifiner.from_published(conv.state_dict(), num_heads=2)(x).shape == (2, 5)
    close(Sparsifiner.from_published(conv.state_dict(), num_heads=2)(x), conv(x), 1e-6)
    with pytest.raises(ValueError, match="64 x 64"):
        sparse(torch.randn(1, 3, 96, 96))


@torch.no_grad()
def test_lv_vit_takes_the_switch() -> None:
    sizes = {"dim": 64, "depth": 4, "num_heads": 2, "img_size": 64, "num_classes": 5, "qkv_bias": False}
    sizes |= {"stem": "conv", "aux_head": True, "skip_lambda": 2.0, "eps": 1e-5}
    sparse = randomize(Sparsifiner(**sizes, dense=True))
    state = {name: value for name, value in sparse.state_dict().items() if "predictor" not in name}
    model, x = (
        EViT.from_published(state, num_heads=2, reduce_at=(1, 2), keep_rate=1.0, fuse=True),
        torch.randn(2, 3, 64, 64),
    )
    close(model(x), sparse(x), 1e-5)
    model.keep_rate = 0.5
    tokens, trail = model.trail(x)
    assert (tokens.shape[1], trail.dense(tokens[:, 1:]).shape[1]) == (7, 16)
    logits = model.head.fc(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
    close(model(x), logits, 1e-6)
    assert model.reset_classifier(3) is None
    assert model(x).shape == (2, 3)


def test_pruned_tokens_are_left_out_and_the_numbers_stay() -> None:
    sizes = {"dim": 64, "depth": 5, "num_heads": 2, "img_size": 64, "num_classes": 5, "keep_rate": 0.3}
    model = randomize(Sparsifiner(**sizes, token_keep_rate=0.6, prune_at=(0, 1, 3))).double()
    x, seen = torch.randn(3, 3, 64, 64).double().requires_grad_(), []
    masked, _, active = model.details(x)
    handles = [
        block.register_forward_hook(lambda _m, given, _y: seen.append(given[0].shape[1])) for block in model.blocks
    ]
    left_out = model.forward_features(x)
    for handle in handles:
        handle.remove()
    assert seen == [17, 11, 7, 7, 5], "truly fewer tokens"
    assert active.sum(1).tolist() == [4] * 3
    close(left_out, masked, 1e-9)
    for a, b in zip(
        torch.autograd.grad(masked.square().sum(), (x, model.blocks[0].attn.qkv.weight)),
        torch.autograd.grad(left_out.square().sum(), (x, model.blocks[0].attn.qkv.weight)),
        strict=True,
    ):
        close(a, b, 1e-9)
    maps = model.forward_intermediates(x, indices=[3], intermediates_only=True)
    assert ((maps[0].flatten(2) == 0).all(1).sum(1) == 12).all(), "the others are zeros on the grid"
