"""TNT and PyramidTNT: what every token model has, and timm's models with the same weights."""

from typing import Any

import pytest
import timm
import torch

from nearfar.vision.models.tnt import TNT, PyramidTNT
from tests.vision.base import TokenTester, close

SIZES = {"dim": 48, "num_heads": 3, "word_dim": 8, "word_heads": 2}


class TestTNT(TokenTester):
    model, name = TNT, "nearfar_tnt_s_patch16_224"
    tiny = {**SIZES, "depth": 3, "img_size": 64}
    least = {"depth": 1}
    fuses = False

    def segmentation(self) -> dict[str, Any]:
        return {**SIZES, "img_size": 64}

    @pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"])
    @torch.no_grad()
    def test_is_timms(self, name: str) -> None:
        theirs = timm.create_model(name, depth=2, img_size=96).eval()
        ours = TNT.from_published(theirs.state_dict())
        x = self.input(size=(96, 96))
        close(ours(x), theirs(x), 1e-5)
        for a, b in zip(
            ours.forward_intermediates(x, intermediates_only=True),
            theirs.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            close(a, b, 1e-5)

    @torch.no_grad()
    def test_official_layout_with_its_unused_tensor(self) -> None:
        ours = TNT(**SIZES, depth=1, img_size=64, num_classes=5)
        names = {
            "words.proj": "patch_embed.proj", "start.norm1": "proj_norm1", "start.proj": "proj",
            "start.norm2": "proj_norm2", "head.fc": "head", "word_pos": "inner_pos",
            "blocks.0.inner.norm1": "blocks.0.inner_norm1", "blocks.0.inner.norm2": "blocks.0.inner_norm2",
            "blocks.0.inner.mlp": "blocks.0.inner_mlp", "blocks.0.inner.attn": "blocks.0.inner_attn",
            "blocks.0.exchange.norm1": "blocks.0.proj_norm1", "blocks.0.exchange.norm2": "blocks.0.proj_norm2",
            "blocks.0.exchange.proj": "blocks.0.proj", "blocks.0.outer.norm1": "blocks.0.outer_norm1",
            "blocks.0.outer.norm2": "blocks.0.outer_norm2", "blocks.0.outer.mlp": "blocks.0.outer_mlp",
            "blocks.0.outer.attn": "blocks.0.outer_attn",
        }  # fmt: skip
        state = {}
        for name, value in ours.state_dict().items():
            start = max((n for n in names if name.startswith(n)), key=len, default="")
            published = names.get(start, "") + name.removeprefix(start)
            if published.endswith("attn.qkv.weight"):
                stem = published.removesuffix("qkv.weight")
                dim = value.shape[1]
                state |= {f"{stem}qk.weight": value[: 2 * dim], f"{stem}v.weight": value[2 * dim :]}
            elif not published.startswith("pos_embed"):
                state[published] = value
        positions = ours.pos_embed
        state["outer_pos"] = torch.cat((positions.prefix, positions.grid.flatten(1, 2)), 1)
        state["outer_tokens"] = torch.zeros(1, 16, 48)
        x = self.input()
        heads = {name: SIZES[name] for name in ("num_heads", "word_heads")}
        close(TNT.from_published(state, **heads)(x), ours.eval()(x), 1e-6)

    def test_no_embed_class(self) -> None:
        model = self.create(no_embed_class=True)
        assert "pos_embed.prefix" not in model.state_dict()
        assert self.model.published_settings(model.state_dict())["no_embed_class"]


class TestPyramidTNT(TokenTester):
    model, name = PyramidTNT, "pyramid_tnt_ti_192"
    tiny = {"depths": (1, 1, 1, 1), "dim": 16, "num_heads": 2, "word_dim": 4, "word_heads": 1, "img_size": 64}
    default_levels = 4
    prefix_of_levels = 0

    def segmentation(self) -> dict[str, Any]:
        return dict(self.tiny)

    @torch.no_grad()
    def test_tables_of_pairs_are_resized_over_both_grids(self) -> None:
        model = self.create(img_size=128)
        table = model.stages[0].pairs
        flat = torch.linspace(0, 1, table.grid.shape[1])[None, :, None, None, None, None].expand_as(table.grid)
        table.grid.copy_(flat)  # a ramp over the rows of queries stays one
        bias = table.bias((8, 8)).unflatten(2, (8, 8))
        assert bias.shape == (1, 2, 8, 8, 4)
        torch.testing.assert_close(bias.std((3, 4)), torch.zeros(1, 2, 8), atol=1e-5, rtol=0)
        assert (bias[0, 0, :, 0, 0].diff() > 0).all()

    def test_words_are_in_the_first_blocks(self) -> None:
        model = timm.create_model("pyramid_tnt_s_256")
        with_words = [[block.inner is not None for block in stage.blocks] for stage in model.stages]
        assert with_words == [[True, False], [True, True] + [False] * 6, [True] + [False] * 3, [True, False]]
