"""DRCT and CATANet: sizes, checkpoints, any picture; what is not a checkpoint is named."""

from pathlib import Path

import pytest
import torch

from nearfar.core.errors import CheckpointError, UserError
from nearfar.vision.restoration.catanet import CATANet
from nearfar.vision.restoration.drct import DRCT
from nearfar.vision.restoration.networks import create_restorer, load_restorer, restorers
from nearfar.vision.restoration.restorer import pad_to
from tests.vision.base import randomize

SMALL = {
    DRCT: {"groups": 2, "dim": 12, "growth": 4, "num_heads": 2, "window_size": 4, "features": 8},
    CATANet: {
        "dim": 8,
        "qk_dim": 8,
        "hidden": 8,
        "num_heads": 2,
        "patch_sizes": (6, 8),
        "num_centres": (3, 4),
        "group_sizes": (8, 4),
    },
}


def published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the released code."""
    names = {
        DRCT: [
            ("stem_norm.", "patch_embed.norm."), ("stem.", "conv_first."), ("body.", "conv_after_body."),
            ("before.", "conv_before_upsample.0."), ("enlarge.", "upsample."), ("last.", "conv_last."),
            ("attention.bias_table", "attn.relative_position_bias_table"), ("attention.out.", "attn.proj."),
            ("attention.", "attn."), ("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2."),
        ],
    }[type(model)]  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        parts = name.split(".")
        if parts[0] == "groups":
            kind = {"blocks": "swin", "reduce": "adjust"}[parts[2]]
            value = value[..., None, None] if kind == "adjust" and parts[-1] == "weight" else value
            name = ".".join(["layers", parts[1], f"{kind}{int(parts[3]) + 1}", *parts[4:]])
        state[name] = value
    return state


def test_published_sizes() -> None:
    for name, (model, variant) in restorers().items():
        with torch.device("meta"):
            count = sum(p.numel() for p in model(**variant.settings).parameters())
        digits = 10_000 if model is DRCT else 1_000
        if name in ("drct_l_x2", "drct_l_x3"):  # the paper gives the size of x4 alone
            continue
        assert abs(count - variant.params) <= digits, (name, count)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.no_grad()
def test_any_picture(kind: type, scale: int) -> None:
    model = randomize(kind(scale=scale, **SMALL[kind]))
    if kind is CATANet:
        for module in model.modules():
            if hasattr(module, "initialized"):
                module.initialized.fill_(True)
    for height, width in ((1, 1), (3, 17), (16, 9)):
        y = model(torch.rand(2, 3, height, width))
        assert y.shape == (2, 3, scale * height, scale * width)
        assert y.isfinite().all()
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\)"):
        model(torch.rand(1, 4, 8, 8))


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_save_reload_and_train(kind: type, tmp_path: Path) -> None:
    model = randomize(kind(scale=2, **SMALL[kind]))
    model.save_pretrained(tmp_path)
    x = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(kind.from_pretrained(tmp_path).eval()(x), model(x))
    with torch.enable_grad():
        trained = kind(scale=2, **SMALL[kind]).train()
        trained(torch.rand(1, 3, 16, 16)).square().mean().backward()
        for name, parameter in trained.named_parameters():
            assert parameter.grad is not None, name


@torch.no_grad()
def test_a_checkpoint_tells_its_variant(tmp_path: Path) -> None:
    for scale in (2, 3, 4):
        model = randomize(DRCT(scale=scale, **SMALL[DRCT]))
        x = torch.rand(1, 3, 8, 12)
        torch.save({"params_ema": published(model), "params": {"a": x}}, tmp_path / "net.pth")
        found = load_restorer(tmp_path / "net.pth")
        assert found.scale == scale
        torch.testing.assert_close(found(x), model(x))
    with pytest.raises(CheckpointError, match="is none of 2 known"):
        torch.save({"conv.weight": x}, tmp_path / "other.pth")
        load_restorer(tmp_path / "other.pth")
    state = published(model)
    del state["conv_last.bias"]
    with pytest.raises(CheckpointError, match=r"missing last\.bias"):
        DRCT.from_published(state)
    with pytest.raises(UserError, match="no such model"):
        create_restorer("drct_x5")


@torch.no_grad()
def test_without_gradients_the_dense_group_is_the_same() -> None:
    model = randomize(DRCT(scale=2, **SMALL[DRCT]))
    x = torch.rand(1, 3, 8, 8)
    with torch.enable_grad():
        expected = model(x)
    torch.testing.assert_close(model(x), expected.detach())


def test_padding_reflects_again_and_again() -> None:
    x = torch.arange(3.0).view(1, 1, 1, 3)
    assert pad_to(x, 1, 9)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert pad_to(x, 2, 3)[0, 0].tolist() == [[0, 1, 2]] * 2
    assert pad_to(x, 1, 2).shape == x.shape
